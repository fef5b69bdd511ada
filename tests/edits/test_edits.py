import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

import slashpatch as sp
from slashpatch.errors import BandError, EditError, HeadError, OffsetError

some_heads = st.lists(
    st.builds(sp.Head, st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=4
)
some_offsets = st.lists(st.integers(0, 100), min_size=1, max_size=4) | st.builds(
    range, st.integers(0, 9), st.integers(10, 5000)
)
factors = st.floats(0, 1e6, allow_nan=False)
text = st.text(min_size=1, max_size=20)
index = st.integers(0, 40)
part = st.one_of(
    st.sampled_from(["high", "medium", "low", "share 0-0.25"]),
    st.sampled_from(["wavelength 4-64", "wavelength 1.5-inf"]),
    st.tuples(st.integers(0, 9), st.integers(0, 9)).map(lambda ab: slice(min(ab), max(ab) + 1)),
)
bands = st.one_of(part, st.lists(part, min_size=1, max_size=3))
any_edit = st.one_of(
    st.builds(
        sp.AblateHeads,
        some_heads,
        mode=st.sampled_from(["zero", "mean", "resample"]),
        reference=st.one_of(
            st.sampled_from(["natural", "random"]), text, st.lists(text, min_size=1, max_size=3)
        ),
        seed=st.integers(-5, 2**40),
    ),
    st.builds(sp.ScaleOffsets, some_heads, some_offsets, factors, st.booleans()),
    st.builds(sp.KnockOut, some_heads, some_offsets, st.booleans()),
    st.builds(sp.KeepOnly, some_heads, some_offsets, st.booleans()),
    st.builds(sp.ShiftSlash, some_heads, st.floats(-1e6, 1e6) | st.integers(-99, 99)),
    st.builds(sp.DropBand, some_heads, bands),
    st.builds(sp.FreezeBand, some_heads, bands),
    st.builds(sp.ScaleBand, some_heads, bands, st.floats(-1e6, 1e6)),
    st.builds(sp.SwapBands, some_heads, bands, bands),
    st.builds(
        sp.SetFrequencies,
        some_heads,
        st.lists(st.floats(0, 4), min_size=1, max_size=5) | st.builds(sp.Head, index, index),
    ),
    st.builds(
        sp.RankOne, some_heads, st.sampled_from(["qk", "q", "k"]), st.none(), st.integers(1, 9)
    ),
    st.builds(
        sp.DropDirection,
        some_heads,
        st.sampled_from(["qk", "q", "k"]),
        st.none(),
        st.sampled_from(["", "same_size", "random", "principal"]),
        st.integers(0, 9),
    ),
    st.builds(sp.PlantSlash, some_heads, st.integers(0, 99), st.floats(-99, 99)),
)


@given(any_edit)
def test_an_edit_reads_back_what_it_prints(edit):
    again = sp.parse_edit(str(edit))
    assert again == edit
    assert hash(again) == hash(edit)


@given(any_edit)
def test_edits_are_frozen(edit):
    with pytest.raises(dataclasses.FrozenInstanceError):
        edit.heads = ()


@pytest.mark.parametrize(
    ("typed", "printed"),
    [
        ("KnockOut(L16H0, 1)", "KnockOut(L16H0, offsets=1)"),
        ("KnockOut('l16h0', [1, 2])", "KnockOut(L16H0, offsets=(1, 2))"),
        ("KnockOut([L16H0, L2H1], range(3))", "KnockOut((L2H1, L16H0), offsets=(0, 1, 2))"),
        ("KnockOut(L16H0, '2-9')", "KnockOut(L16H0, offsets=range(2, 10))"),
        ("KnockOut(L16H0, '0-2', renormalize=False)",
         "KnockOut(L16H0, offsets=(0, 1, 2), renormalize=False)"),
        ("AblateHeads(L16H0)", "AblateHeads(L16H0)"),
        (" AblateHeads(heads=L1H1, mode=mean)", "AblateHeads(L1H1, mode='mean')"),
        ("ScaleOffsets(L1H1, 1, 0.5)", "ScaleOffsets(L1H1, offsets=1, factor=0.5)"),
    ],
)  # fmt: skip
def test_what_can_be_typed(typed, printed):
    assert str(sp.parse_edit(typed)) == printed


@pytest.mark.parametrize(
    ("typed", "error", "message"),
    [
        ("Knockout(L16H0, 1)", EditError, "did you mean KnockOut"),
        ("Zap(L16H0)", EditError, "unknown edit 'Zap'; edits are AblateHeads, DropBand.*KnockOut"),
        ("KnockOut(L16H0", EditError, "expected an edit such as"),
        ("", EditError, "expected an edit such as"),
        ("L16H0", EditError, "expected an edit such as"),
        ("__import__('os').system('true')", EditError, "expected an edit such as"),
        ("KnockOut(__import__('os'), 1)", EditError, "expected heads, numbers, words"),
        ("KnockOut(L16H0, (lambda: 1)())", EditError, "expected heads, numbers, words"),
        ("KnockOut(L16H0, 2**99999)", EditError, "expected heads, numbers, words"),
        ("KnockOut(" + "(" * 300 + ")" * 300, EditError, "expected an edit"),
        ("KnockOut" + "(" * 2_000_000, EditError, "at most"),
        ("KnockOut(L16H0, 1, " + "-" * 2000 + "1)", EditError, "cannot read|expected an edit"),
        ("KnockOut(L16H0, range(1, start=5))", EditError, "expected heads, numbers, words"),
        ("KnockOut(L16H0, offsets=1, offsets=2)", EditError, "twice|expected an edit"),
        ("KnockOut(L16H0, 1, renormalize=-True)", EditError, "expected heads, numbers, words"),
        ("ScaleOffsets(L16H0, 1, " + "9" * 400 + ")", EditError, "factor must be a finite number"),
        ("ShiftSlash(L16H0, by=" + "9" * 400 + ")", EditError, "by must be a finite number"),
        ("KnockOut(L16H0)", EditError, "missing.*offsets"),
        ("KnockOut(L16H0, 1, nope=2)", EditError, "nope"),
        ("KnockOut(L16H0, heads=L1H1, offsets=1)", EditError, "multiple values.*heads"),
        ("KnockOut(16., 1)", HeadError, "KnockOut: expected a head"),
        ("KnockOut([], 1)", EditError, "at least one head"),
        ("KnockOut(L16H0, -1)", OffsetError, "KnockOut: an offset is an integer from 0"),
        ("KnockOut(L16H0, 1.5)", OffsetError, "1.5"),
        ("KnockOut(L16H0, [])", OffsetError, "no offsets were given"),
        ("KnockOut(L16H0, 1, renormalize=2)", EditError, "True or False"),
        ("ScaleOffsets(L16H0, 1, -1)", EditError, "factor must be 0 or more; got -1"),
        ("ScaleOffsets(L16H0, 1, 1e999)", EditError, "factor must be a finite number"),
        ("ScaleOffsets(L16H0, 1, half)", EditError, "factor must be a finite number"),
        ("ShiftSlash(L16H0, by=nan)", EditError, "by must be a finite number; got nan"),
        ("ShiftSlash(L16H0)", EditError, "missing.*by"),
        ("DropBand(L16H0, hi)", BandError, "DropBand: a band is high, medium or low.*'hi'"),
        ("ScaleBand(L16H0, high, 1e999)", EditError, "factor must be a finite number; got inf"),
        ("SetFrequencies(L16H0, [])", EditError, "frequencies must be finite numbers"),
        ("SetFrequencies(L16H0, [1e999])", EditError, "frequencies must be finite numbers"),
        ("SetFrequencies(L16H0, fast)", HeadError, "expected a head"),
        ("RankOne(L16H0, of=v)", EditError, "of must be one of qk, q, k; got 'v'"),
        ("RankOne(L16H0, rank=0)", EditError, "rank must be an integer of at least 1"),
        ("DropDirection(L16H0, of=v)", EditError, "of must be one of qk, q, k; got 'v'"),
        ("DropDirection(L16H0, control=no)", EditError, "one of same_size, random, principal"),
        ("DropDirection(L16H0, draw=-1)", EditError, "draw must be an integer from 0 on; got -1"),
        ("DropDirection(L16H0, direction=3)", EditError, "an Axis"),
        ("RankOne(L16H0, basis='absent.safetensors')", EditError, "no file"),
        ("PlantSlash(L16H0, -3)", OffsetError, "integer from 0"),
        ("PlantSlash(L16H0, [1, 2])", EditError, "one offset"),
        ("AblateHeads(L16H0, mode=gone)", EditError, "zero, mean, resample, optimal; got 'gone'"),
        ("AblateHeads(L16H0, mode=mean, reference=7)", EditError, "reference"),
        ("AblateHeads(L16H0, mode=mean, seed=1.5)", EditError, "seed"),
        ("AblateHeads(L16H0, mode=optimal)", EditError, "go together.*fit_ablation"),
        ("AblateHeads(L16H0, optimal, constants='absent.safetensors')", EditError, "no file"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_typed(typed, error, message):
    with pytest.raises(error, match=f"(?s){message}"):
        sp.parse_edit(typed)


def test_an_edit_needs_a_head():
    with pytest.raises(EditError, match="at least one head"):
        sp.KnockOut([], 1)


@pytest.mark.parametrize(
    ("text", "heads"),
    [
        ("KnockOut(L1H0-3, 1)", "L1H0-3"),
        ("KnockOut(L0-1H2, 1)", "L0-1H2"),
        ("KnockOut([L0-1H0-1, L2H3], 1)", "L0-1H0-1, L2H3"),
        ("KnockOut('L1H0-3', 1)", "L1H0-3"),
        ("KnockOut([L0H1,], 1)", "L0H1"),
    ],
)
def test_ranges_of_heads_need_no_quotes(text, heads):
    edit = sp.parse_edit(text)
    assert edit == sp.KnockOut(heads, 1)
    assert sp.parse_edit(str(edit)) == edit


def test_ranges_inside_quoted_texts_stay_text():
    edit = sp.parse_edit("AblateHeads(L0H0, mode=mean, reference='of L1H0-3, \"L1H0-3\"')")
    assert edit.reference == 'of L1H0-3, "L1H0-3"'


@pytest.mark.parametrize(
    "reference", ['it\'s "so" L0H1-2 here', ('it\'s "one"', "L0H1-2"), "a\\", "L0-1"]
)
def test_any_reference_text_is_read_back(reference):
    edit = sp.AblateHeads("L0H0", "mean", reference)
    assert sp.parse_edit(str(edit)) == edit


def test_layers_without_heads_say_what_is_missing():
    with pytest.raises(sp.SlashpatchError, match="'L0-1' stands for all heads of a layer"):
        sp.parse_edit("KnockOut(L0-1, 1)")
