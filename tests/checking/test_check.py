"""`check` must fail on models and edits that are broken on purpose."""

import json
import subprocess
import sys

import pytest
import torch

import slashpatch as sp
from slashpatch.checking import contracts
from slashpatch.checking.check import check
from slashpatch.checking.result import CONTRACTS, Check, Report
from slashpatch.cli.app import app
from slashpatch.edits.frequencies import _FrequencyEdit
from slashpatch.edits.shift import ShiftSlash
from slashpatch.errors import ModelError
from slashpatch.maths.attention.edited import EditedAttention
from slashpatch.maths.diagonals import DiagonalChange
from slashpatch.patching.binding import EditInLayer
from slashpatch.patching.per_head_keys import PerHeadKeys

from ..tiny import bridge, llama, random_tokens, tiny_model, tokenizer
from ..zoo import FAMILIES, Family, build

pytestmark = pytest.mark.filterwarnings("ignore")


def failed(model):
    """Return (contract, subject) of each failed check."""
    return {(one.contract, one.subject) for one in check(model).checks if one.status == "fail"}


def test_a_sound_model_passes(tiny):
    report = check(tiny)
    assert report.ok
    assert {one.status for one in report.checks} == {"pass"}
    assert {one.contract for one in report.checks} == set(CONTRACTS)
    edits = {one.subject for one in report.checks if one.contract == "edits"}
    every = {name for name in dir(sp) if isinstance(getattr(sp, name), type)
             and issubclass(getattr(sp, name), sp.Edit)} - {"Edit"}  # fmt: skip
    assert edits == every
    for contract in ("cache", "padding", "fused"):
        found = {one.subject for one in report.checks if one.contract == contract}
        assert found == every | {"no edit"}


def test_a_diagonal_that_forgets_cached_tokens_fails(tiny, monkeypatch):
    right = DiagonalChange.on_matrix
    monkeypatch.setattr(DiagonalChange, "on_matrix", lambda self, m, past: right(self, m, 0))
    assert {("cache", "KnockOut"), ("cache", "KeepOnly"), ("cache", "ScaleOffsets")} <= failed(tiny)


def test_per_head_keys_that_are_not_kept_fail(tiny, monkeypatch):
    right = PerHeadKeys._all_keys

    def shifted(self, qk, heads, call):
        rows = right(self, qk, heads, call)
        return rows.roll(1, 1) if call.past else rows

    monkeypatch.setattr(PerHeadKeys, "_all_keys", shifted)
    assert {("cache", "FreezeBand"), ("cache", "RankOne")} <= failed(tiny)


def test_edits_by_column_instead_of_position_fail(tiny, monkeypatch):
    """Rotating by a token's column, which left padding shifts, and not by its position."""

    def by_column(self, ctx, x, stage):
        current = ctx.theta(stage)
        new = self.changed(ctx, current)
        columns = torch.arange(x.shape[1])[None, :, None, None].double()
        return ctx.rotary.rotate_by(x, columns * (new - current))

    monkeypatch.setattr(_FrequencyEdit, "_rotate_ahead", by_column)
    found = failed(tiny)
    assert ("cache", "SetFrequencies") in found
    assert ("edits", "SetFrequencies") not in found


def test_a_fused_result_that_is_off_fails(tiny, monkeypatch):
    right = EditedAttention._after_changes

    def off(self):
        out, lse = right(self)
        return (out * 1.001, lse) if self._changes else (out, lse)

    monkeypatch.setattr(EditedAttention, "_after_changes", off)
    assert {("fused", "KnockOut"), ("fused", "KeepOnly")} <= failed(tiny)


def test_an_edit_that_leaves_a_trace_fails(monkeypatch):
    model = tiny_model(seed=5)

    def prepare(self, bridge, info):
        with torch.no_grad():
            bridge.original_model.lm_head.weight.mul_(1.01)
        return {}

    monkeypatch.setattr(ShiftSlash, "prepare", prepare)
    assert ("edits", "ShiftSlash") in failed(model)


def test_an_edit_whose_hook_never_fires_fails(tiny, monkeypatch):
    """A failure and not a refusal: the edit was attached and did nothing."""
    right = EditInLayer.hooks

    def hooks(self):
        for name, act in right(self):
            nowhere = "blocks.0.attn.hook_q_input"  # a hook that never fires
            yield (nowhere if isinstance(self.edit, ShiftSlash) else name), act

    monkeypatch.setattr(EditInLayer, "hooks", hooks)
    found = {(one.contract, one.subject): one for one in check(tiny).checks}
    assert found["edits", "ShiftSlash"].status == "fail"
    assert "never fired" in found["edits", "ShiftSlash"].detail


def test_an_edit_that_does_nothing_fails(tiny, monkeypatch):
    monkeypatch.setattr(ShiftSlash, "on_query", lambda self, ctx, q: q + 0)
    assert failed(tiny) == {("edits", "ShiftSlash")}


def test_an_identity_that_changes_something_fails(tiny, monkeypatch):
    right = ShiftSlash.on_query
    monkeypatch.setattr(ShiftSlash, "on_query", lambda self, ctx, q: 1.001 * right(self, ctx, q))
    assert ("identities", "ShiftSlash(L1H0, by=0)") in failed(tiny)


def test_scores_that_are_off_fail(tiny, monkeypatch):
    right = contracts.scan

    def off(*args, **kwargs):
        found = right(*args, **kwargs)
        found.sums.mul_(1.0001)
        return found

    monkeypatch.setattr(contracts, "scan", off)
    assert ("scores", "") in failed(tiny)


def test_what_a_model_raises_is_a_finding():
    model = tiny_model(seed=6)
    model.original_model.generation_config = None
    right = model.original_model.forward

    def forward(*args, past_key_values=None, **kwargs):
        if past_key_values is not None:
            raise ZeroDivisionError("no room")
        return right(*args, **kwargs)

    model.original_model.forward = forward
    report = check(model)
    found = [one for one in report.checks if one.contract == "cache"]
    assert {one.status for one in found} == {"fail"}
    assert "ZeroDivisionError: no room" in found[0].detail


def test_a_model_in_training_mode_is_no_report():
    model = tiny_model(seed=7)
    model.train()
    with pytest.raises(ModelError, match="training mode"):
        check(model)


@pytest.mark.parametrize("n_ctx", [4, 8])
def test_a_short_context(n_ctx):
    report = check(tiny_model(seed=10, n_ctx=n_ctx))
    assert report.ok, str(report)


def test_a_tiny_vocabulary():
    config = {**FAMILIES["Llama"].config, "vocab_size": 4}
    report = check(bridge(build(Family("Llama", config)), "few"))
    assert report.ok, str(report)


def test_float64_where_the_model_itself_gives_nan_is_refused_by_name():
    report = check(bridge(build(FAMILIES["Llama"], torch.float64), "wide"))
    assert report.ok, str(report)
    assert [one.detail for one in report.checks if one.status == "refused"] == [
        "the model itself gives NaN for a prompt padded on the left"
    ]


def test_what_is_on_the_model_must_go_first(tiny):
    with sp.patch(tiny, "KnockOut(L0H1, 1)") as model, torch.no_grad():
        model(random_tokens(1, 4))
        with pytest.raises(ModelError, match="leave slashpatch.patch"):
            check(model)
    with sp.fused(tiny), pytest.raises(ModelError, match="leave slashpatch.patch and slashpatch.f"):
        check(tiny)
    with (
        tiny.hooks(fwd_hooks=[("blocks.0.attn.hook_pattern", lambda tensor, hook: None)]),
        pytest.raises(ModelError, match=r"remove other hooks \(blocks.0.attn.hook_pattern\)"),
    ):
        check(tiny)
    with torch.autocast("cpu", torch.bfloat16):
        assert check(tiny).ok


def test_a_torch_hook_on_the_attention_is_named():
    model = tiny_model(seed=11)
    handle = model.blocks[1].attn.register_forward_hook(
        lambda module, args, out: (2 * out[0], *out[1:])
    )
    with pytest.raises(ModelError, match="a torch hook sits on it"):
        sp.scan(model, random_tokens(1, 4), 1)
    handle.remove()
    sp.scan(model, random_tokens(1, 4), 1)


def test_the_status_of_a_contract():
    def report(*found):
        return Report(tuple(Check("edits", "", status, "") for status in found), {"model": "m"})

    assert report().status("edits") == "–"
    assert report("pass", "pass").status("edits") == "pass"
    assert report("pass", "refused").status("edits") == "part"
    assert report("refused").status("edits") == "refused"
    assert report("refused", "fail", "pass").status("edits") == "fail"
    assert not report("refused", "fail").ok
    assert report("refused").ok


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model on disk."""
    found = tmp_path_factory.mktemp("model")
    llama(seed=8).save_pretrained(found)
    tokenizer().save_pretrained(found)
    return str(found)


def test_the_command(folder):
    done = subprocess.run(
        [sys.executable, "-m", "slashpatch.cli", "check", "-m", folder, "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert found["ok"]
    assert {one["contract"] for one in found["checks"]} == set(CONTRACTS)


def test_the_command_fails_with_the_contract(folder, monkeypatch):
    from typer.testing import CliRunner

    monkeypatch.setattr(ShiftSlash, "on_query", lambda self, ctx, q: q + 0)
    done = CliRunner().invoke(app, ["check", "-m", folder])
    assert done.exit_code == 1
    assert "fail" in done.output
    assert "the logits did not change" in " ".join(done.output.split())


def test_the_command_on_a_refused_model(tmp_path):
    from typer.testing import CliRunner

    build(FAMILIES["GPT-J"]).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    done = CliRunner().invoke(app, ["check", "-m", str(tmp_path)])
    assert done.exit_code == 0
    assert "refused" in done.output


def test_checking_leaves_no_trace():
    model, tokens = tiny_model(seed=9), random_tokens(1, 9)
    with torch.no_grad():
        before = model(tokens)
        check(model)
        assert torch.equal(model(tokens), before)
    assert not any(point.fwd_hooks for point in model.hook_points())
    assert not model.original_model._forward_hooks
    assert not any(block.attn._forward_hooks for block in model.blocks)
