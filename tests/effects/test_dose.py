"""dose(): an edit over a range of its number, its trend, and its file."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import slashpatch as sp
from slashpatch.effects.doses.edits import as_doses
from slashpatch.effects.doses.trend import rank_correlations, slopes
from slashpatch.effects.statistics import beyond_draws
from slashpatch.errors import (
    BandError,
    ControlError,
    EditError,
    MetricError,
    OffsetError,
    SweepError,
)

from ..planted import reading_model
from ..tiny import random_tokens, tiny_model


@pytest.fixture(scope="module")
def tiny():
    return tiny_model()


@pytest.mark.parametrize(
    ("given", "doses"),
    [
        ("0:2:0.25", (0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2)),
        ("0:1:0.1", (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)),
        ("1:8", tuple(range(1, 9))),
        ("1, 2,4", (1, 2, 4)),
        ("-1:1:0.5", (-1, -0.5, 0, 0.5, 1)),
        ("0:1:0.4,2", (0, 0.4, 0.8, 2)),
        ([2.0, 1], (1, 2)),
        (range(3), (0, 1, 2)),
        (torch.tensor([0.5, 1.0]), (0.5, 1)),
    ],
)
def test_doses(given, doses):
    found = as_doses(given)
    assert found == doses
    assert all(isinstance(one, int) for one in found if float(one).is_integer())


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "bad", ["", "a", "0:2:0", "2:0", "0:1:0.0001", "1:2:3:4", "nan", [], 3, [True], ["1"], None,
            [math.inf], [1, 1.0], "1,1"],
)  # fmt: skip
def test_bad_doses(bad):
    with pytest.raises(EditError):
        as_doses(bad)


@given(st.integers(0, 9999), st.integers(2, 9), st.integers(1, 4))
def test_trends_are_scipys_of_each_prompt(seed, n_doses, n_prompts):
    from scipy.stats import linregress, spearmanr

    generator = torch.Generator().manual_seed(seed)
    doses = torch.randn(n_doses, generator=generator, dtype=torch.float64)
    values = torch.randint(0, 4, (n_doses, n_prompts), generator=generator).double()
    if n_doses > 2:
        values += torch.randn(values.shape, generator=generator) * (seed % 2)
    values[:, 0] = 1.0
    ranks, lines = rank_correlations(doses, values), slopes(doses, values)
    assert float(ranks[0]) == 0
    for at in range(n_prompts):
        assert float(lines[at]) == pytest.approx(linregress(doses, values[:, at]).slope, abs=1e-9)
        if len(values[:, at].unique()) > 1:
            expected = spearmanr(doses, values[:, at]).statistic
            assert float(ranks[at]) == pytest.approx(expected, abs=1e-9)


def test_each_dose_is_what_measure_says(tiny):
    tokens = random_tokens(7, 16)
    result = sp.dose(
        tiny, "ScaleOffsets(L0H1, 1, {})", "0:2:0.5", ("loss", "kl"), tokens, "random-heads:2"
    )
    for row in result.frame[result.frame["against"] == "clean"].to_dict(orient="records"):
        single = sp.measure(tiny, row["edit"], row["metric"], tokens).frame.iloc[0]
        for column in ("n", "baseline", "edited", "effect", "low", "high", "p"):
            assert row[column] == pytest.approx(single[column], abs=1e-9)
    assert list(result.frame["metric"].unique()) == ["loss", "kl"]
    assert len(result.frame) == 5 * 2 * 2
    assert len(result.tables["draws"]) == 5 * 2 * 2
    assert set(result.tables["trend"]["against"]) == {"clean", "random-heads:2"}
    # The draws are the same heads at each dose.
    heads = result.tables["draws"]["drawn"].str.extract(r"\((L\d+H\d+)")[0]
    by_dose = heads.groupby(result.tables["draws"]["dose"]).agg(frozenset)
    assert by_dose.nunique() == 1


@pytest.mark.parametrize(
    ("make_edit", "values", "nothing"),
    [
        ("ScaleOffsets(L0H1, [0, 1], {})", "0:2:0.5", 1),
        ("ShiftSlash(L0H1, {})", "0:1:0.25", 0),
        ("ScaleBand(L0H1, high, {})", "0,1,2", 1),
        (lambda share: sp.DropBand("L0H1", f"share 0-{share}") if share else None, "0:1:0.5", 0),
        (lambda share: [] if share == 0 else "KnockOut(L0H1, 1)", [0, 1], 0),
    ],
)
def test_a_dose_that_changes_nothing_has_no_effect_at_all(tiny, make_edit, values, nothing):
    result = sp.dose(tiny, make_edit, values, "loss", random_tokens(6, 12))
    rows = result.frame.set_index("dose")
    assert (rows.loc[nothing, ["effect", "low", "high"]] == 0).all()
    assert (rows.drop(nothing)["effect"] != 0).all()


def test_controls_are_compared_as_measure_compares_them(tiny):
    tokens = random_tokens(7, 12)
    control = "other-offsets:6"
    result = sp.dose(tiny, "ScaleOffsets(L0H1, 1, {})", [0, 1], "loss", tokens, control)
    row = result.frame[(result.frame["against"] == control) & (result.frame["dose"] == 0)].iloc[0]
    drawn = result.tables["draws"].query("dose == 0")["drawn"]
    runs = sp.measure(tiny, ["ScaleOffsets(L0H1, 1, 0)", *drawn], "loss", tokens)
    values = runs.tables["values"].pivot(columns="edit", index="prompt", values="value")
    clean = torch.tensor(values["clean"].to_numpy())
    edit = torch.tensor(values[row["edit"]].to_numpy()) - clean
    draws = torch.stack([torch.tensor(values[one].to_numpy()) - clean for one in drawn])
    found = beyond_draws(edit, draws)
    for column in ("low", "high", "p_rank"):
        assert row[column] == pytest.approx(float(getattr(found, column)), abs=1e-9)
    unchanged = result.frame[(result.frame["against"] == control) & (result.frame["dose"] == 1)]
    assert (unchanged[["effect", "low", "high"]] == 0).all(axis=None)
    assert (unchanged["p_rank"] == 1).all()
    assert any("6 draws cannot give a p_rank below" in remark for remark in result.remarks)


def test_each_error_names_the_dose(tiny):
    with pytest.raises(OffsetError, match=r"at dose 0\.5: .*integer"):
        sp.dose(tiny, "KnockOut(L0H1, {})", [0, 0.5])


def test_the_ranks_of_rank_one(tiny):
    result = sp.dose(tiny, "RankOne(L0H1, rank={})", "1:8", "kl", random_tokens(4, 12))
    assert list(result.frame["dose"]) == list(range(1, 9))
    assert result.frame["effect"].iloc[-1] == pytest.approx(0, abs=1e-5)
    assert result.frame["effect"].iloc[0] > 1e-3


def test_a_weaker_slash_reads_less():
    """L0H0 says the token before: its loss falls as the slash is made stronger."""
    model = reading_model(1)
    tokens = random_tokens(6, 20)

    def says_the_one_before(logits, tokens):
        found = logits.log_softmax(-1)[:, 1:].gather(-1, tokens[:, :-1, None])
        return -found[..., 0].double().mean(1)

    edit = "ScaleOffsets(L0H0, 1, {}, renormalize=False)"
    result = sp.dose(model, edit, "0:1:0.25", says_the_one_before, tokens)
    assert result.frame["effect"].is_monotonic_decreasing
    (trend,) = result.tables["trend"].to_dict(orient="records")
    assert trend["spearman"] == pytest.approx(-1)
    assert trend["slope_high"] < 0
    assert trend["spearman_p"] < 0.01


def test_a_killed_run_goes_on(tiny, tmp_path, monkeypatch):
    path = tmp_path / "dose.json"
    arguments = (tiny, "ScaleOffsets(L0H1, 1, {})", "0:2:0.5", ("loss", "kl"), random_tokens(4, 12))
    whole = sp.dose(*arguments, "random-heads:1")
    from slashpatch.data.journal import Journal

    write, written = Journal.write, []

    def stop(self, rows):
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(rows)
        write(self, rows)

    monkeypatch.setattr(Journal, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        sp.dose(*arguments, "random-heads:1", path=path)
    monkeypatch.setattr(Journal, "write", write)
    assert (tmp_path / "dose.json.unfinished").exists()
    with pytest.raises(SweepError, match="is of another run"):
        sp.dose(*arguments, "random-heads:1", path=path, resume=True, seed=1)
    done = sp.dose(*arguments, "random-heads:1", path=path, resume=True)
    assert done.frame.equals(whole.frame)
    assert not (tmp_path / "dose.json.unfinished").exists()
    again = sp.dose(*arguments, "random-heads:1", path=path, resume=True)
    assert again.kind == "dose"
    assert len(again.frame) == len(whole.frame)
    assert json.loads(path.read_text())["trend"]


@pytest.mark.usefixtures("unchecked")
def test_what_has_no_dose(tiny):
    tokens = random_tokens(4, 12)
    for make_edit, error, message in (
        ("ScaleOffsets(L0H1, 1, 2)", EditError, "with {}"),
        ("ScaleOffsets(L0H1, 1, -{})", EditError, "at dose 1: .*factor must be 0 or more"),
        ("DropBand(L0H1, 'pairs 0-{}')", BandError, "outside the 4 rotary pairs"),
        (3, EditError, "a function of the dose"),
        (sp.KnockOut("L0H1", 1), EditError, "a function of the dose"),
        (lambda: None, EditError, "does not take one argument"),
        (lambda dose: None, EditError, "no edit at any dose"),
        (lambda dose: 7, EditError, "expected an edit"),
    ):
        with pytest.raises(error, match=message):
            sp.dose(tiny, make_edit, "1,9", "loss", tokens)
    edit = "KnockOut(L0H1, {})"
    with pytest.raises(MetricError, match="one number per prompt; loss-by-position gives 11"):
        sp.dose(tiny, edit, "1,2", "loss-by-position", tokens)
    with pytest.raises(ControlError, match="no control"):
        sp.dose(tiny, edit, "1,2", "loss", tokens, "random")
