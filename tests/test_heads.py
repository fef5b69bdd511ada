import pytest
from hypothesis import given
from hypothesis import strategies as st

import slashpatch as sp
from slashpatch.errors import HeadError
from slashpatch.heads import require_heads

any_head = st.builds(sp.Head, st.integers(0, 999), st.integers(0, 999))


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


def test_heads_mixes_specs():
    assert [str(head) for head in sp.heads("L16H0 l2h1", (19, 3), [sp.Head(0, 1), "L16H0"])] == [
        "L16H0",
        "L2H1",
        "L19H3",
        "L0H1",
    ]


@pytest.mark.parametrize(
    "bad", ["16.", "", "L16", "H0", "L1H2H3", "L-1H0", "16.0", 3, None, (1, -2)]
)
def test_bad_heads_are_refused_by_name(bad):
    with pytest.raises(HeadError) as caught:
        sp.heads(bad)
    assert isinstance(caught.value, ValueError)
    assert "L16H0" in str(caught.value) or "integer from 0" in str(caught.value)


def test_message_of_a_misspelt_head():
    with pytest.raises(HeadError, match=r"expected a head such as L16H0 .* got '16\.'"):
        sp.heads("16.")


@pytest.mark.parametrize("name", ["L99H0", "L1H99"])
def test_message_of_a_head_that_the_model_lacks(name):
    with pytest.raises(HeadError, match=f"{name} does not exist: .* L0H0 to L29H8"):
        require_heads(sp.heads(name), 30, 9)
