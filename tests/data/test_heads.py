import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import slashpatch as sp
from slashpatch.bridge import read
from slashpatch.data.heads import require_heads
from slashpatch.errors import HeadError

from ..tiny import random_tokens

index = st.integers(0, 999)
any_head = st.builds(sp.Head, index, index)


@st.composite
def written_ranges(draw, most=6):
    """A range as it is typed, and the indices that it holds: "3" or "3-5"."""
    first = draw(st.integers(0, 99))
    last = first + draw(st.integers(0, most))
    text = f"{first}" if last == first and draw(st.booleans()) else f"{first}-{last}"
    return text, range(first, last + 1)


@given(any_head)
def test_head_prints_as_it_parses(head):
    assert sp.Head.parse(str(head)) == head
    assert sp.heads(str(head)) == (head,)
    assert sp.heads((head.layer, head.head)) == (head,)


@given(st.lists(any_head, min_size=1))
def test_heads_keeps_order_and_drops_repeats(found):
    expected = tuple(dict.fromkeys(found))
    assert sp.heads(found) == expected
    assert sp.heads(", ".join(map(str, found))) == expected
    assert sp.heads(*found, *found) == expected


@given(written_ranges(), written_ranges())
def test_a_range_is_the_heads_that_it_spans(layers, columns):
    found = sp.heads(f"L{layers[0]}H{columns[0]}")
    assert found == tuple(sp.Head(la, head) for la in layers[1] for head in columns[1])
    assert sp.heads(f"l{layers[0]}h{columns[0]}") == found
    assert sp.heads(", ".join(map(str, found))) == found
    assert sp.heads(found, f"L{layers[0]}H{columns[0]}", found[::-1]) == found


@given(written_ranges(), st.integers(1, 9))
def test_a_layer_is_all_its_heads(layers, n_heads):
    found = sp.heads(f"L{layers[0]}", n_heads=n_heads)
    assert found == sp.heads(f"L{layers[0]}H0-{n_heads - 1}")
    assert len(found) == n_heads * len(layers[1])
    message = rf"'L{layers[0]}' stands for all heads of a layer.*L{layers[0]}H0-8.*n_heads=model"
    with pytest.raises(HeadError, match=message):
        sp.heads("L0H0", [f"L{layers[0]}"])


@given(st.text(alphabet="LlHh0123456789-, ", max_size=12))
def test_any_text_is_read_or_refused_by_a_head_error(text):
    try:
        found = sp.heads(text, n_heads=3)
    except HeadError:
        return
    assert found
    assert sp.heads(" ".join(map(str, found))) == found


@given(st.integers(1, 5), st.integers(1, 5), st.data())
def test_a_boolean_mask_is_the_heads_where_it_is_true(n_layers, n_heads, data):
    rows = data.draw(
        st.lists(
            st.lists(st.booleans(), min_size=n_heads, max_size=n_heads),
            min_size=n_layers,
            max_size=n_layers,
        )
    )
    expected = tuple(
        sp.Head(la, head)
        for la, row in enumerate(rows)
        for head, chosen in enumerate(row)
        if chosen
    )
    for mask in (torch.tensor(rows), np.array(rows)):
        assert sp.heads(mask) == sp.heads(mask, n_heads=n_heads) == expected
        with pytest.raises(
            HeadError, match=rf"with {n_heads + 1} heads, got \[{n_layers}, {n_heads}"
        ):
            sp.heads(mask, n_heads=n_heads + 1)
    indices = torch.tensor(rows).nonzero()  # the same heads as (layer, head) rows
    assert sp.heads(indices) == sp.heads(indices.numpy()) == expected


def test_a_mask_of_two_columns_is_no_list_of_pairs():
    assert sp.heads(torch.tensor([[True, False], [True, True]])) == sp.heads("L0H0", "L1H0-1")
    assert sp.heads(torch.tensor([[1, 0], [1, 1]])) == sp.heads("L1H0-1")
    for mask in (torch.tensor([True, False]), np.ones((1, 2, 2), bool), pd.Series([True, False])):
        with pytest.raises(
            HeadError, match=r"boolean mask of heads has shape \[layer, head\], got"
        ):
            sp.heads(mask)


def test_a_column_of_names_is_heads(tiny):
    names = pd.Series(["L1H2", "L0H3", "L1H2"], index=[7, 8, 9])
    assert sp.heads(names) == sp.heads("L1H2 L0H3")
    assert sp.heads(names.to_numpy()) == sp.heads("L1H2 L0H3")
    assert sp.heads(names.astype("category")) == sp.heads("L1H2 L0H3")
    frame = sp.scan(tiny, random_tokens(2, 12), range(2)).to_dataframe()
    assert sp.heads(frame["name"]) == tuple(read(tiny).heads)
    assert sp.heads(frame[["layer", "head"]].to_numpy()) == tuple(read(tiny).heads)


def test_heads_mixes_specs():
    mixed = sp.heads("L16H0 l2h1-2", (19, 3), [sp.Head(0, 1), "L16H0"], "L3", n_heads=2)
    assert " ".join(map(str, mixed)) == "L16H0 L2H1 L2H2 L19H3 L0H1 L3H0 L3H1"


@pytest.mark.parametrize(
    "bad",
    ["16.", "", "L16", "H0", "L1H2H3", "L-1H0", "16.0", 3, None, (1, -2), "L1H", "L1H0-", "L1-H0",
     "L1H0 - 3", "L1H-3", "L0-", [1.0, 2.0]],
)  # fmt: skip
def test_bad_heads_are_refused_by_name(bad):
    with pytest.raises(HeadError) as caught:
        sp.heads(bad)
    assert isinstance(caught.value, ValueError)
    assert "L16H0" in str(caught.value) or "integer from 0" in str(caught.value)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("16.", r"expected a head such as L16H0 .* L16H0-3, L0-3H2 or L16, got '16\.'"),
        ("L1H3-2", "'L1H3-2' has a range from 3 to 2; write the lower end first"),
        ("L5-4H3", "'L5-4H3' has a range from 5 to 4"),
        ("L0-99999H0-99999", "stands for 10,000,000,000 heads; expected at most 1,000,000"),
    ],
)
def test_messages_of_misspelt_heads(bad, message):
    with pytest.raises(HeadError, match=message):
        sp.heads(bad)


@pytest.mark.parametrize("n_heads", [0, -1, 2.5, "4", True])
@pytest.mark.usefixtures("unchecked")
def test_a_number_of_heads_that_is_none(n_heads):
    with pytest.raises(HeadError, match=r"n_heads is an integer from 1, such as model\.cfg"):
        sp.heads("L1", n_heads=n_heads)


@pytest.mark.parametrize("name", ["L99H0", "L1H99", "L99", "L20-30"])
def test_message_of_a_head_that_the_model_lacks(name):
    first = {"L99": "L99H0", "L20-30": "L30H0"}.get(name, name)
    with pytest.raises(HeadError, match=f"{first} does not exist: .* L0H0 to L29H8"):
        require_heads(sp.heads(name, n_heads=9), 30, 9)


def test_functions_that_know_the_model_take_whole_layers(tiny):
    """And masks of its size; `tiny` has 2 layers of 4 heads."""
    whole = sp.heads("L1H0-3")
    assert read(tiny).require("L1") == whole
    size = {"n_prompts": 3, "max_tokens": 9}
    for given_heads in ("L1", torch.tensor([[False] * 4, [True] * 4])):
        swept = sp.sweep(tiny, "KnockOut({head}, 1)", given_heads, "loss", **size)
        assert sorted(swept.frame["name"]) == [str(head) for head in whole]
    with pytest.raises(HeadError, match=r"shape \[layer, head\] with 4 heads, got \[4, 2\]"):
        sp.sweep(tiny, "KnockOut({head}, 1)", torch.ones(4, 2, dtype=torch.bool), "loss", **size)
    explained = sp.explain_all(tiny, "L1", random_tokens(2, 20))
    assert explained["name"].tolist() == [str(head) for head in whole]
    with pytest.raises(HeadError, match="explain takes one head, got 'L1'"):
        sp.explain(tiny, "L1", random_tokens(2, 20))
    with pytest.raises(HeadError, match="L2H0 does not exist"):
        sp.explain_all(tiny, "L2", random_tokens(2, 20))
    paths = sp.paths(tiny, "L0H1", "L1", "loss", n_prompts=3, max_tokens=9)
    assert {str(head) for head in whole} <= set(paths.frame["reader"])
    assert sp.fit_rank_one(tiny, "L1", random_tokens(2, 20)).heads == whole


def test_edits_and_metrics_are_made_without_the_model(tiny):
    """Ranges and masks are theirs; a whole layer needs the number of heads."""
    edit = sp.KnockOut("L0-1H1-2", 1)
    assert str(edit) == "KnockOut((L0H1, L0H2, L1H1, L1H2), offsets=1)"
    assert sp.parse_edit(str(edit)) == edit == sp.parse_edit("KnockOut('L0-1H1-2', 1)")
    mask = torch.zeros(2, 4, dtype=torch.bool)
    mask[:, 1:3] = True
    assert sp.KnockOut(mask, 1) == edit
    assert sp.KnockOut(sp.heads("L1", n_heads=tiny.cfg.n_heads), 1) == sp.KnockOut("L1H0-3", 1)
    with pytest.raises(HeadError, match=r"KnockOut: 'L1' stands for all heads.*write a range such"):
        sp.KnockOut("L1", 1)
    with pytest.raises(HeadError, match="'L1' stands for all heads of a layer"):
        sp.SlashScores("L1")
