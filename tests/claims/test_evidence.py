"""Every claim on hand-built models: each verdict as the model was built."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

import slashpatch as sp
from slashpatch.claims import evidence as module
from slashpatch.claims import interventions
from slashpatch.claims.rules import CLAIMS, RULES
from slashpatch.claims.verdicts import CANNOT_TELL, CONTRADICTED, SUPPORTED
from slashpatch.data.files import without_nan
from slashpatch.errors import ModelError, OutputError, PromptError, SweepError

from .. import claim_models
from ..tiny import bridge, llama, random_tokens, tiny_model
from ..zoo import FAMILIES, build
from .verdicts import EXPECTED, REAL

#: The models that the fast tests run; the long tier runs all.
FAST = (
    *("true", "content", "low frequencies", "unread", "no cone", "offset 0"),
    *("GPT-2, random", "random", "shuffled"),
)
MODELS = [
    pytest.param(name, marks=() if name in FAST else pytest.mark.exhaustive) for name in EXPECTED
]
MODELS += [pytest.param(name, marks=(pytest.mark.exhaustive, pytest.mark.real)) for name in REAL]


@pytest.mark.parametrize("name", MODELS)
def test_each_verdict_is_as_the_model_was_built(name):
    make, _, expected = (EXPECTED | REAL)[name]
    found = sp.evidence(make(), quick=True)
    frame = found.frame
    assert frame["claim"].tolist() == [claim.number for claim in CLAIMS]
    assert frame["verdict"].tolist() == expected, frame[["claim", "verdict", "why"]].to_string()
    assert set(found.tests["test"]) == set(RULES)


@pytest.fixture(scope="module")
def found():
    return sp.evidence(claim_models.true_model(), quick=True)


def test_evidence_saves_loads_and_prints(found, tmp_path):
    found.save(tmp_path / "e.json")
    again = sp.Evidence.load(tmp_path / "e.json")
    assert str(again) == str(found)
    assert without_nan(again.to_dict()) == without_nan(found.to_dict())
    record = json.loads((tmp_path / "e.json").read_text())
    assert [claim["verdict"] for claim in record["claims"]] == [SUPPORTED] * 9
    for suffix in (".md", ".html"):
        found.save(tmp_path / f"e{suffix}")
        text = (tmp_path / f"e{suffix}").read_text()
        assert all(claim.says in text.replace("&#39;", "'") for claim in CLAIMS)
    with pytest.raises(OutputError, match=r"\.json, \.md, \.html"):
        found.save(tmp_path / "e.txt")


def test_other_files_are_refused(found, tmp_path):
    record = found.to_dict()
    path = tmp_path / "e.json"
    for change in (
        {"format": "slashpatch-evidence-0"},
        {"claims": [{"tests": [{"test": "unknown"}]}]},
        {"claims": None},
        {"claims": [{"tests": [{**record["claims"][0]["tests"][0], "low": "high"}]}]},
        {"claims": [{"tests": [{**record["claims"][0]["tests"][0], "n": 2.5}]}]},
    ):
        path.write_text(json.dumps({**record, **change}))
        with pytest.raises(OutputError, match="is not evidence that slashpatch saved"):
            sp.Evidence.load(path)


def test_verdicts_of_a_loaded_file_follow_from_its_numbers(found, tmp_path):
    """A verdict that was written into the file by hand is not believed."""
    record = found.to_dict()
    for claim in record["claims"]:
        claim["verdict"] = CONTRADICTED
    path = tmp_path / "e.json"
    path.write_text(json.dumps(record))
    assert sp.Evidence.load(path).frame["verdict"].tolist() == [SUPPORTED] * 9


def test_untrusted_text_is_escaped(found, tmp_path):
    record = found.to_dict()
    bad = "<script>alert(1)</script>|x\n# y\u202e"
    record["provenance"]["model"] = bad
    record["provenance"]["slashes"] = [bad]
    record["claims"][0]["tests"][0]["detail"] = bad
    path = tmp_path / "e.json"
    path.write_text(json.dumps(record))
    loaded = sp.Evidence.load(path)
    for suffix in (".html", ".md"):
        loaded.save(tmp_path / f"e{suffix}")
        text = (tmp_path / f"e{suffix}").read_text()
        assert not re.search(r"(?<!\\)<script", text)
        assert "\u202e" not in text
        assert "\n# y" not in text
    assert "<script" not in loaded._repr_html_()


def test_a_figure_of_all_claims(found):
    figure = found.plot()
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert titles == [f"{claim.number}. {claim.name}: supported" for claim in CLAIMS]


def test_a_run_that_is_interrupted_goes_on(found, tmp_path, monkeypatch):
    path = tmp_path / "e.json"
    model = claim_models.true_model()
    run = []

    def counted(name, step):
        def measure(on):
            if len(run) == 3:
                raise KeyboardInterrupt
            run.append(name)
            return step(on)

        return measure

    steps = {name: counted(name, step) for name, step in module.STEPS.items()}
    with monkeypatch.context() as patched:
        patched.setattr(module, "STEPS", steps)
        with pytest.raises(KeyboardInterrupt):
            sp.evidence(model, quick=True, path=path)
    assert not path.exists()
    with pytest.raises(SweepError, match="resume"):
        sp.evidence(model, quick=True, path=path)
    with pytest.raises(SweepError, match="seed"):
        sp.evidence(model, quick=True, path=path, resume=True, seed=1)
    rest = []
    steps = {
        name: (lambda on, name=name, step=step: rest.append(name) or step(on))
        for name, step in module.STEPS.items()
    }
    with monkeypatch.context() as patched:
        patched.setattr(module, "STEPS", steps)
        again = sp.evidence(model, quick=True, path=path, resume=True)
    assert run + rest == list(module.STEPS)
    assert without_nan(again.to_dict()) == without_nan(found.to_dict())
    assert [file.name for file in tmp_path.iterdir()] == ["e.json"]
    again = sp.evidence(model, quick=True, path=path, resume=True)
    assert without_nan(again.to_dict()) == without_nan(found.to_dict())


def test_a_killed_process_loses_no_finished_step(tmp_path):
    path = tmp_path / "e.json"
    program = textwrap.dedent(
        f"""
        import os, signal, sys
        import slashpatch as sp
        from slashpatch.claims import evidence as module
        from tests.tiny import tiny_model
        last = list(module.STEPS)[-1]
        def killed(on):
            os.kill(os.getpid(), signal.SIGKILL)
        if sys.argv[1] == "kill":
            module.STEPS[last] = killed
        sp.evidence(tiny_model(), quick=True, path={str(path)!r}, resume=sys.argv[1] == "resume")
        """
    )
    run = [sys.executable, "-c", program]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    killed = subprocess.run([*run, "kill"], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    unfinished = tmp_path / "e.json.unfinished"
    assert len(unfinished.read_text().splitlines()) == len(module.STEPS)  # header, all but one
    subprocess.run([*run, "resume"], env=environment, check=True)
    assert not unfinished.exists()
    assert len(sp.Evidence.load(path).measured) == len(RULES)


def test_few_prompts():
    with pytest.raises(PromptError, match="at least 4 different prompts"):
        sp.evidence(tiny_model(), ["the of a", "and is to"], quick=True)
    texts = [f"the of a and w{index} is to in if w{index} w3 w4" for index in range(6)]
    longer = [f"{text} {text}" for text in texts]
    frame = sp.evidence(tiny_model(), longer, quick=True).frame
    assert set(frame["verdict"]) == {CANNOT_TELL}
    with pytest.raises(PromptError, match="at least 16 tokens; the shortest has 13"):
        sp.evidence(tiny_model(), [*longer, texts[0]], quick=True)
    with pytest.raises(PromptError, match="4 different prompts.* got 1"):
        sp.evidence(tiny_model(), longer[:1] * 16, quick=True)


@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, 1)])
def test_signs_of_singular_vectors_do_not_matter(monkeypatch, signs):
    """Rank one along a direction that other heads share keeps the slashes: 3 is false."""

    def fitted(model, heads, prompts, seed):
        basis = sp.fit_rank_one(model, heads, prompts, seed=seed)
        flips = torch.tensor([signs[head.head % 2] for head in basis.heads])[:, None, None]
        return dataclasses.replace(basis, k=basis.k * flips)

    monkeypatch.setattr(interventions, "fit_rank_one", fitted)
    monkeypatch.setattr(module, "STEPS", {"edited heads": interventions.run_interventions})
    found = sp.evidence(claim_models.shared_direction_model(), quick=True)
    assert found.verdict(3)[0] == CONTRADICTED
    assert "rank one beyond other heads" in found.verdict(3)[1]


def test_a_far_slash_is_found_and_not_tested_on_short_prompts():
    """Slashes at Δ = 30, which no prompt of copied tokens reaches far enough to show."""
    found = sp.evidence(claim_models.far_slash_model(), quick=True)
    came = [found.verdict(claim)[0] for claim in range(1, 10)]
    assert came == [SUPPORTED] * 6 + [CANNOT_TELL] * 3
    assert "too large for prompts of 50 tokens" in found.verdict(9)[1]


def test_prompts_of_unequal_lengths():
    """Offsets end at half of the shortest prompt, wherever it is: far ones have too few rows."""
    rows = [random_tokens(1, length, length)[0] for length in (*range(50, 61), 17, 18, 19)]
    found = sp.evidence(tiny_model(), rows, quick=True)
    assert found.provenance["settings"]["n_offsets"] == 8
    assert found.provenance["settings"]["n_profile"] == 8


@pytest.mark.parametrize("name", ["StarCoder2", "Mistral", "EXAONE 4"])
def test_a_window_makes_no_slash(name):
    """Random weights with windows of 7 tokens: uniform attention is 1/7 at each offset."""
    found = sp.evidence(bridge(build(FAMILIES[name])), quick=True)
    assert found.verdict(1)[0] != SUPPORTED


def test_only_bridges():
    with pytest.raises(ModelError, match="TransformerBridge"):
        sp.evidence(llama(), quick=True)


def test_the_command(call, model, tmp_path):
    out, picture = tmp_path / "e.html", tmp_path / "e.png"
    code, said, _ = call("evidence", "-m", model, "--quick", "--out", out, "--plot", picture)
    assert code == 0
    assert "slash heads exist" in said
    assert "contradicted" in said
    assert out.exists()
    assert picture.exists()
    code, said, _ = call("evidence", "-m", model, "--quick", "--json")
    assert code == 0
    assert [claim["claim"] for claim in json.loads(said)["claims"]] == list(range(1, 10))
    code, _, error = call("evidence", "-m", model, "--resume")
    assert (code, "--resume goes with --out" in error) == (2, True)
