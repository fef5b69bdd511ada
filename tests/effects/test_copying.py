import pandas as pd
import pytest
import torch

import slashpatch as sp
from slashpatch.data.prompts import repeated_random_tokens
from slashpatch.errors import PromptError

from ..planted import induction_model
from ..tiny import llama
from ..zoo import zoo


@pytest.fixture(scope="module")
def planted():
    return induction_model()


def test_the_copied_lag_moves_by_exactly_what_the_slash_is_shifted(planted):
    edits = [f"ShiftSlash(L0H0, by={by})" for by in (1, 2)]
    found = sp.copying(planted, edits, n_tokens=20, n_prompts=8)
    for by, edit in enumerate(["clean", *edits]):
        rows = found.frame[found.frame["edit"] == edit].set_index("lag")
        assert rows["top1"].idxmax() == 1 + by
        assert rows["top1"].max() > 0.8
        assert rows["top1"].drop(1 + by).max() < 0.1
        assert rows["loss"].idxmin() == 1 + by
        heads = found.tables["heads"].query("edit == @edit")
        assert list(heads["head"]) == ["L1H2"]
        assert heads["matches_lag"].item() == 1 + by
        assert f"{edit}: copies lag {1 + by}" in found.remarks[by]


def test_without_the_previous_token_head_nothing_is_copied(planted):
    found = sp.copying(planted, "AblateHeads(L0H0)", n_tokens=20, n_prompts=8)
    assert "copies no lag of 1, 2, 3, 4" in found.remarks[1]
    assert found.tables["heads"]["matches_lag"].tolist() == [1, pd.NA]


def test_lags_by_definition(tiny):
    found = sp.copying(tiny, (), (1, 3), n_prompts=3, n_tokens=7)
    tokens = repeated_random_tokens(tiny, 3, 7)
    with torch.no_grad():
        p = tiny(tokens).double().log_softmax(-1)
    rows = found.frame.set_index("lag")
    for lag in (1, 3):
        places = range(8, 15 - lag)
        hits = [[int(p[b, i].argmax() == tokens[b, i + lag]) for i in places] for b in range(3)]
        losses = [[-float(p[b, i, tokens[b, i + lag]]) for i in places] for b in range(3)]
        assert rows.loc[lag, "top1"] == pytest.approx(float(torch.tensor(hits).double().mean()))
        assert rows.loc[lag, "loss"] == pytest.approx(float(torch.tensor(losses).mean()), rel=1e-5)
    assert float(sp.copying_losses(tiny, 3, 7).mean()) == pytest.approx(rows.loc[1, "loss"])
    assert sp.copied_lags(tiny, (1, 3), 3, 7).mean(0).tolist() == pytest.approx(
        rows["top1"].tolist()
    )
    assert "effect" not in found.frame


def test_lags_in_any_order_are_those_lags(planted):
    found = sp.copying(planted, "ShiftSlash(L0H0, by=1)", (3, 2), n_tokens=20, n_prompts=4)
    heads = found.tables["heads"]
    assert heads["head"].tolist() == ["L1H2", "L1H2"]
    assert heads["at_lag_1"][0] > 0.8 > 0.1 > heads["at_lag_1"][1]
    assert heads["matches_lag"].tolist() == [1, 2]
    assert found.frame["lag"].tolist() == [2, 3, 2, 3]


@pytest.mark.usefixtures("unchecked")
def test_bad_input(tiny):
    for wrong, said in (
        ({"lags": [7], "n_tokens": 7}, "lags must be integers from 1 to 6"),
        ({"lags": [], "n_tokens": 7}, "lags must be integers"),
        ({"lags": [1.5], "n_tokens": 7}, "lags must be integers"),
        ({"lags": 7, "n_tokens": 7}, "lags must be integers"),
        ({"n_tokens": 32}, "2 to 31 tokens"),
        ({"n_tokens": 7, "n_prompts": 0}, "n_prompts must be an integer of at least 1"),
    ):
        with pytest.raises(PromptError, match=said):
            sp.copying(tiny, **wrong)


def test_models_without_bos_copy_too():
    """Prompts of repeated tokens where no BOS comes first."""
    model = sp.load(llama(seed=4))
    assert sp.copied_lags(model, n_prompts=2, n_tokens=12).shape == (2, 3)
    found = sp.copying(model, "KnockOut(L0H1, 1)", n_prompts=3, n_tokens=12)
    assert set(found.frame["edit"]) == {"clean", "KnockOut(L0H1, offsets=1)"}
    assert len(sp.sweep(model, heads="L0H0, L1H0", n_prompts=3, max_tokens=13).frame) == 2
    assert len(sp.measure(zoo("GLM"), "AblateHeads(L0H0)", "copying", n_prompts=3).frame) == 1


@pytest.mark.parametrize("name", ["measure", "flow", "paths", "sweep"])
def test_lengths_beyond_the_context_are_refused(tiny, name):
    arguments = () if name in ("flow", "sweep") else ("KnockOut(L0H1, 1)",)
    with pytest.raises(
        PromptError, match="max_tokens is at most the model's context of 64; got 65"
    ):
        getattr(sp, name)(tiny, *arguments, n_prompts=2, max_tokens=65)
