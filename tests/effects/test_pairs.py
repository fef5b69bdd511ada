"""Pairs of clean and corrupt prompts: copying pairs, files, and what is refused."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import slashpatch as sp
from slashpatch.effects.between_runs.pairs import as_pairs
from slashpatch.errors import PromptError

from ..tiny import tiny_model


@given(seed=st.integers(0, 10_000), n_tokens=st.integers(5, 30))
def test_each_copying_prompt_is_the_others_counterfactual(tiny, seed, n_tokens):
    pairs = sp.copying_pairs(tiny, 3, n_tokens, seed)
    for clean, corrupt, right, wrong in zip(
        pairs.clean, pairs.corrupt, pairs.right, pairs.wrong, strict=True
    ):
        assert len(clean) == len(corrupt) == 1 + 2 * n_tokens - 3
        first, other = clean[1 : n_tokens + 1].tolist(), corrupt[1 : n_tokens + 1].tolist()
        assert len(set(first)) == n_tokens
        assert set(first) == set(other)
        assert torch.equal(clean[n_tokens + 1 :], corrupt[n_tokens + 1 :])
        x = int(clean[-1])
        assert first[first.index(x) + 1] == right
        assert other[other.index(x) + 1] == wrong
        changed = [at for at in range(n_tokens) if first[at] != other[at]]
        assert changed == sorted([first.index(right) - 1, first.index(wrong) - 1])
        y = first[first.index(wrong) - 1]
        rest = [token for token in first if token not in (x, y, right, wrong)]
        assert clean[n_tokens + 1 : -1].tolist() == rest


def test_copying_pairs_are_seeded_and_distinct(tiny):
    one, again, other = (sp.copying_pairs(tiny, 8, seed=seed) for seed in (0, 0, 1))
    assert one.digest == again.digest != other.digest
    assert len({tuple(row.tolist()) for row in one.clean}) == 8
    more = sp.copying_pairs(tiny, 12)
    assert all(torch.equal(a, b) for a, b in zip(one.clean, more.clean, strict=False))
    for wrong in ({"n_tokens": 4}, {"n_tokens": 60}, {"n_prompts": 0}):
        with pytest.raises(PromptError, match="fit the context"):
            sp.copying_pairs(tiny, **wrong)
    with pytest.raises(PromptError, match="vocabulary is too small"):
        sp.copying_pairs(tiny_model(n_ctx=256), n_tokens=90)


ROWS = [
    {"clean": "w1 w2 w3", "corrupt": "w1 w4 w3", "right": "w5", "wrong": "w6"},
    {"clean": [7, 8], "corrupt": [9, 8], "right": 10, "wrong": "w7"},
]


def test_files_and_rows_give_the_same_pairs(tiny, tmp_path):
    lines, table = tmp_path / "pairs.jsonl", tmp_path / "pairs.csv"
    lines.write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    table.write_text(
        'clean,corrupt,right,wrong\nw1 w2 w3,w1 w4 w3,w5,w6\n"[7, 8]","[9, 8]",#10,w7\n'
    )
    read = [as_pairs(tiny, given) for given in (ROWS, lines, str(table))]
    assert len({pairs.digest for pairs in read}) == 1
    assert read[0].clean[0].tolist() == tiny.to_tokens("w1 w2 w3")[0].tolist()
    assert read[0].right == (int(tiny.to_tokens("w5", prepend_bos=False)), 10)
    assert read[1].record["source"] == "file pairs.jsonl"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"clean": "w1 w2", "corrupt": "w1", "right": "w3", "wrong": "w4"}, "3 tokens and corrupt"),
        ({"clean": "w1", "corrupt": "w2", "right": "w3 w4", "wrong": "w5"}, "must be one token"),
        ({"clean": "w1", "corrupt": "w2", "right": "w3", "wrong": "w3"}, "are the same token"),
        ({"clean": "", "corrupt": "w2", "right": "w3", "wrong": "w4"}, "clean must be a text"),
        ({"clean": "w1", "corrupt": "w2", "right": "w3"}, "expected clean, corrupt, right and"),
        ({"clean": [1.5], "corrupt": "w2", "right": "w3", "wrong": "w4"}, "or token ids"),
        ([1, 2], "expected clean, corrupt"),
        ("not json", "not a JSON object"),
    ],
)
def test_a_bad_line_is_named(tiny, tmp_path, line, said):
    path = tmp_path / "pairs.jsonl"
    bad = line if line == "not json" else json.dumps(line)
    path.write_text(f"{json.dumps(ROWS[0])}\n\n{bad}\n")
    with pytest.raises(PromptError, match=said) as error:
        as_pairs(tiny, path)
    assert "pairs.jsonl, line 3" in str(error.value)


def test_what_is_no_pair_is_refused(tiny, tmp_path, unchecked):
    row = torch.tensor([5, 6, 7])
    for change, said in (
        ({"corrupt": (row[:2],)}, "has 3 tokens and the corrupt one 2"),
        ({"right": (5, 6)}, "2 right"),
        ({"wrong": (8,)}, "are both 8"),
        ({"position": 3}, "position 3 is outside"),
        ({"clean": (row.float(),)}, "must be token ids"),
        ({"clean": (), "corrupt": (), "right": (), "wrong": ()}, "at least one pair"),
    ):
        with pytest.raises(PromptError, match=said):
            sp.Pairs(**{"clean": (row,), "corrupt": (row,), "right": (8,), "wrong": (9,), **change})
    with pytest.raises(PromptError, match="outside the vocabulary"):
        as_pairs(tiny, sp.Pairs((row,), (row,), (8,), (999,)))
    with pytest.raises(PromptError, match="context is 64"):
        as_pairs(tiny, sp.Pairs((row.repeat(30),), (row.repeat(30),), (8,), (9,)))
    for given_, said in (
        (3, "expected Pairs"),
        ([], "holds no pairs"),
        ("w1 w2", "expected Pairs"),
    ):
        with pytest.raises(PromptError, match=said):
            as_pairs(tiny, given_)
    empty = tmp_path / "pairs.txt"
    empty.write_text("")
    with pytest.raises(PromptError, match=r"expected a .jsonl or .csv file"):
        as_pairs(tiny, empty)
