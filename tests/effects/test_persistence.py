import pandas as pd
import pytest
import torch

import slashpatch as sp
from slashpatch.data.prompts import PromptSet, prompt_set
from slashpatch.effects.persistence import counterparts
from slashpatch.effects.statistics import compared
from slashpatch.errors import MetricError, OffsetError, ScanError
from slashpatch.scanning.prompt_scores import prompt_scores

from ..planted import planted_model
from ..tiny import random_tokens

PROMPTS = [random_tokens(1, n, n)[0] for n in (20, 24, 20, 31, 17, 20)]


@pytest.fixture(scope="module")
def found(tiny):
    return sp.persistence(tiny, prompts=PROMPTS, kappa=0.1, kappa_random=0.05, offsets=range(4))


@pytest.mark.parametrize("against", ["random", "shuffled"])
def test_counterparts_have_the_lengths_and_the_bos_of_the_prompts(tiny, against):
    with_bos = [torch.cat([torch.tensor([0]), p]) for p in PROMPTS[:2]]
    natural = PromptSet((*with_bos, *PROMPTS[2:]), "test")
    made = counterparts(tiny, natural, against, 3)
    again = counterparts(tiny, natural, against, 3)
    assert [len(tokens) for tokens in made.tokens] == [len(tokens) for tokens in natural.tokens]
    assert all(torch.equal(a, b) for a, b in zip(made.tokens, again.tokens, strict=True))
    assert [int(tokens[0]) == 0 for tokens in made.tokens] == [True, True, *[False] * 4]
    for tokens, of in zip(made.tokens, natural.tokens, strict=True):
        assert not torch.equal(tokens, of)
        same = torch.equal(tokens.sort().values, of.sort().values)
        assert same == (against == "shuffled")


def test_every_row_is_that_of_the_paired_scores(tiny, found):
    natural = PromptSet(tuple(PROMPTS), "test")
    before, after = (
        prompt_scores(tiny, prompts, (0, 1, 2, 3))
        for prompts in (natural, counterparts(tiny, natural, "random", 0))
    )
    assert len(found.frame) == before[0].numel()
    for row in found.frame.to_dict(orient="records"):
        at = (slice(None), row["layer"], row["head"], row["offset"])
        expected = compared(before[at][:, None], after[at][:, None])
        assert row["natural"] == pytest.approx(float(before[at].mean()))
        assert row["random"] == pytest.approx(float(after[at].mean()))
        for name, column in (("difference", "effect"), ("low",) * 2, ("high",) * 2, ("p",) * 2):
            assert row[name] == pytest.approx(float(expected[column][0]), abs=1e-9)
    highest = found.frame[["natural", "random"]].max(axis=1)
    assert highest.is_monotonic_decreasing


def test_counts_at_equal_and_at_own_thresholds(found):
    frame, counts = found.frame, found.tables["counts"]
    assert len(counts) == 6
    for row in counts.to_dict(orient="records"):
        natural = frame[frame["natural"] >= row["kappa"]]
        random = frame[frame["random"] >= row["kappa_random"]]
        both = natural.index.intersection(random.index)
        parts = [natural.index, random.index, both]
        if row["counted"] == "head":
            parts = [set(frame["name"][index]) for index in parts]
        assert [row["natural"], row["random"], row["both"]] == [len(part) for part in parts]
    assert set(zip(counts["kappa"], counts["kappa_random"], strict=True)) == {
        (0.1, 0.1),
        (0.05, 0.05),
        (0.1, 0.05),
    }


def test_planted_slashes_persist_and_heads_that_read_content_do_not():
    model = planted_model([1, 3, None, None], n_ctx=64)
    prompts = random_tokens(8, 40)
    found = sp.persistence(model, prompts=prompts, kappa=0.5)
    at = found.tables["counts"].set_index("counted").loc["head and offset"]
    assert (at["natural"], at["random"], at["both"]) == (2, 2, 2)
    picked = found.tables["slash_heads"].iloc[0]
    assert (picked["picked"], picked["kept"], picked["n"]) == (2, 2, 4)
    assert abs(picked["difference"]) < 0.01
    assert "2 on natural text, 2 on random tokens, 2 on both" in found.remarks[0]


def test_some_heads_and_files(tiny, tmp_path):
    found = sp.persistence(tiny, "L1H0", PROMPTS[:2], offsets=[1])
    assert found.frame["name"].tolist() == ["L1H0"]
    assert "slash_heads" not in found.tables  # too few prompts to pick on one half of them
    assert found.tables["counts"]["kappa_random"].tolist() == [0.1, 0.1]
    found.save(tmp_path / "p.json")
    loaded = sp.Result.load(tmp_path / "p.json")
    pd.testing.assert_frame_equal(loaded.frame, found.frame)
    assert loaded.kind == "persistence"


def test_random_prompts_do_not_move_the_natural_ones(tiny):
    found = sp.persistence(tiny, n_prompts=2, max_tokens=32, offsets=2)
    natural = prompt_set(tiny, n_prompts=2, max_tokens=32)
    assert found.provenance["prompts"]["digest"] == natural.digest


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kappa": 2}, ScanError, "from 0 to 1; got 2"),
        ({"kappa_random": -1}, ScanError, "from 0 to 1; got -1"),
        ({"against": "noise"}, MetricError, "one of random, shuffled; got 'noise'"),
        ({"offsets": 25}, OffsetError, "the shortest has 17"),
    ],
)
def test_bad_input(unchecked, tiny, options, error, message):
    with pytest.raises(error, match=message):
        sp.persistence(tiny, prompts=PROMPTS, **options)


def test_slash_heads_are_kept_by_the_threshold_of_random_tokens(tiny):
    sizes = {"kappa": 0.1, "n_prompts": 6, "max_tokens": 20, "offsets": range(3)}
    kept = [
        sp.persistence(tiny, kappa_random=at, **sizes).tables["slash_heads"]["kept"].item()
        for at in (0.0, 0.1, 0.9)
    ]
    picked = sp.persistence(tiny, **sizes).tables["slash_heads"]["picked"].item()
    assert kept[0] == picked > kept[2] == 0
    frame = sp.persistence(tiny, **sizes).frame
    ends = frame[["natural_low", "natural_high", "random_low", "random_high"]]
    assert ((ends >= 0) & (ends <= 1)).all(axis=None)
