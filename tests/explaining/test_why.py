"""What explain says of logits, of variation and of the origin, against direct computation."""

import json
import math

import pytest
import torch

import slashpatch as sp
from slashpatch.bridge import read
from slashpatch.data.files import without_nan
from slashpatch.errors import EditError
from slashpatch.maths.resampling import halves

from ..edits.test_rotary_edits import PLANTED
from ..planted import planted_model
from ..tiny import random_tokens, tiny_model
from ..zoo import zoo


def vectors(model, tokens, layer):
    """Pre-RoPE q and k [token, head, d_head] and attention inputs [token, d_model], float64."""
    qk = read(model).qk[layer]
    found = []
    with torch.no_grad():
        for prompt in tokens:
            _, cache = model.run_with_cache(prompt[None])
            positions = torch.arange(len(prompt))[None]
            row = [
                qk.unrotate(layout, layout.read(cache[layout.name]), positions)[0].double()
                for layout in (qk.q, qk.k)
            ]
            found.append([*row, cache[f"blocks.{layer}.attn.hook_in"][0].double()])
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


@pytest.mark.parametrize("kv_head", [0, 1])
def test_variation_is_that_of_norms_and_signs(tiny, kv_head):
    tokens = random_tokens(3, 20)
    head = sp.Head(1, 2 * kv_head + 1)
    q, k, _ = vectors(tiny, tokens, 1)
    found = sp.explain(tiny, head, tokens, offset=1).variation
    for x, norm, sign in (
        (q[:, head.head], found.norm_q, found.sign_q),
        (k[:, kv_head], found.norm_k, found.sign_k),
    ):
        lengths = x.norm(dim=-1)
        assert norm == pytest.approx(float(lengths.std(correction=0) / lengths.mean()), abs=1e-5)
        along = x @ torch.linalg.svd(x, full_matrices=False).Vh[0]
        positive = float((along > 0).double().mean())
        assert sign == pytest.approx(min(positive, 1 - positive), abs=1e-9)


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Phi", "Phi-3", "GPT-2",
                                    "OLMo 2", "HunYuan", "Cohere"])  # fmt: skip
def test_the_parts_of_the_mean_add_up(family):
    model = zoo(family)
    origin = sp.explain(model, "L1H1", random_tokens(2, 24)).origin
    for part in (origin.q, origin.k):
        assert part.axis + part.bias + part.rest == pytest.approx(1, abs=1e-9)
        assert -1 <= part.cosine <= 1
        assert 0 <= part.leading <= 1
    assert 0 < origin.share < 1
    assert {name: len(draws) for name, draws in origin.controls.items()} == {
        "same_size": 5,
        "random": 2,
        "principal": 3,
    }


def test_the_share_along_the_axis_and_the_mean_query_of_it(tiny):
    tokens = random_tokens(3, 20)
    axis = sp.fit_axis(tiny, "L1H2", n_prompts=3, max_tokens=64, seed=1)
    origin = sp.explain(tiny, "L1H2", tokens, offset=1).origin
    q, _, x = vectors(tiny, tokens, 1)
    u = axis.of(1)
    share = (x @ u).square().sum() / x.square().sum()
    assert origin.share == pytest.approx(float(share), abs=1e-5)
    made = tiny.blocks[1].attn.q.original_component
    with torch.no_grad():
        alone = made(((u @ x.mean(0)) * u).float()).double().view(4, 8)[2]
    mean = q[:, 2].mean(0)
    assert origin.q.axis == pytest.approx(float(alone @ mean / mean.square().sum()), abs=1e-4)
    cosine = torch.nn.functional.cosine_similarity(alone, mean, dim=0)
    assert origin.q.cosine == pytest.approx(float(cosine), abs=1e-4)


def test_scores_without_the_axis_equal_scans_under_the_edit():
    model = tiny_model(seed=1)
    tokens = random_tokens(2, 20)
    axis = sp.fit_axis(model, ["L0H1", "L1H2"], n_prompts=2, max_tokens=64, seed=1)
    frame = sp.explain_all(model, ["L0H1", "L1H2"], tokens).set_index("name")
    measured = [tokens[at] for at in halves(len(tokens), 0)[1]]  # offsets are picked on the others
    for head in frame.index:
        at = sp.Head.parse(head)
        scores = {}
        for control, draw in (("", 0), *(("same_size", d) for d in range(5)),
                              ("random", 0), ("random", 1),
                              *(("principal", d) for d in range(3))):  # fmt: skip
            with sp.patch(model, sp.DropDirection(head, "qk", axis, control, draw)):
                scan = sp.scan(model, measured, [int(frame.offset[head])], batch_size=1)
            scores[control, draw] = float(scan.scores[at.layer, at.head, 0])
        assert frame.drop_axis[head] == pytest.approx(scores.pop(("", 0)), abs=1e-5)
        lowest = frame.drop_axis_lowest_control[head]
        assert lowest == pytest.approx(min(scores.values()), abs=1e-5)


def test_planted_heads_come_from_the_axis_and_their_logits_from_position():
    model = planted_model([*PLANTED[:4], None])
    tokens = random_tokens(3, 100)
    axis = sp.fit_axis(model, "L0H1", random_tokens(9, 100, seed=7))
    one = sp.explain(model, "L0H1", tokens, axis=axis)
    assert one.shares.position > 0.95
    assert one.shares.curve > 0.95
    assert one.variation.sign_q == 0
    assert one.origin.q.axis > 0.95
    assert one.origin.dropped["qk"] < 0.5 * one.natural
    assert "Origin of condition 1" in str(one)
    other = sp.explain(model, "L0H4", tokens, kappa=0.0, axis=axis)
    assert other.shares.position < 0.5
    assert other.origin.q.leading < one.origin.q.leading


def test_an_axis_of_other_layers_is_refused(tiny):
    axis = sp.fit_axis(tiny, "L0H0", random_tokens(2, 20))
    with pytest.raises(EditError, match="fitted for layers 0, not for layer 1"):
        sp.explain(tiny, "L1H2", random_tokens(2, 20), axis=axis)


def test_without_rope_there_is_no_curve_and_short_prompts_have_no_shares():
    one = sp.explain(zoo("GPT-2"), "L1H1", random_tokens(2, 24))
    assert math.isnan(one.shares.curve)
    assert one.shares.both >= max(one.shares.position, one.shares.token) - 1e-9
    short = sp.explain(zoo("Llama"), "L1H1", random_tokens(1, 3), kappa=0.0)
    assert short.shares is None


def test_windows_limit_the_offsets():
    one = sp.explain(zoo("Mistral"), "L1H1", random_tokens(2, 40))
    assert one.shares.n_offsets == 7


def test_files_of_earlier_versions_lack_these_parts(tiny, tmp_path):
    record = without_nan(sp.explain(tiny, "L0H1", random_tokens(1, 20)).to_dict())
    for name in ("logit_shares", "variation", "origin"):
        assert record.pop(name) is not None
    (tmp_path / "old.json").write_text(json.dumps(record))
    old = sp.Explanation.load(tmp_path / "old.json")
    assert (old.shares, old.variation, old.origin) == (None, None, None)
    assert "Origin" not in str(old)
