"""Scores of edited heads, from single layers: the same as whole passes with z put back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import slashpatch as sp
from slashpatch.bridge import read
from slashpatch.maths.slash_scores import slash_scores
from slashpatch.scanning.isolated_scores import isolated_scores

from ..tiny import random_tokens

HEADS = sp.heads("L0H1", "L1H2", "L0H3")
OFFSETS = (0, 1, 3)


def expected(model, edits, prompt):
    """Each layer's pattern under the edits, in a run whose z is clean in every layer."""
    info, kept, patterns = read(model), {}, {}
    with torch.no_grad():
        hooks = [(name, lambda z, hook: kept.update({hook.layer(): z})) for name in info.hooks("z")]
        model.run_with_hooks(prompt[None], fwd_hooks=hooks)
        hooks = [(name, lambda z, hook: kept[hook.layer()]) for name in info.hooks("z")]
        hooks += [
            (name, lambda p, hook: patterns.update({hook.layer(): p}))
            for name in info.hooks("pattern")
        ]
        with sp.patch(model, *edits):
            model.run_with_hooks(prompt[None], fwd_hooks=hooks)
    return torch.stack(
        [slash_scores(patterns[h.layer][:, h.head, None], OFFSETS)[0, 0] for h in HEADS]
    )


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(5, 12), min_size=1, max_size=4), st.integers(0, 99))
def test_they_agree_with_whole_passes(tiny, lengths, seed):
    prompts = [random_tokens(1, n, seed + at)[0] for at, n in enumerate(lengths)]
    sets = {
        "shift": [sp.ShiftSlash(HEADS, 1)],
        "two": [sp.DropBand("L0H1", "high"), sp.RankOne(["L0H3", "L1H2"])],
        "one layer": [sp.KnockOut("L1H2", 1)],
    }
    found = isolated_scores(tiny, HEADS, sets, prompts, OFFSETS, progress=False)
    assert set(found) == {"", *sets}
    for label, edits in (*sets.items(), ("", [])):
        for at, prompt in enumerate(prompts):
            whole = (
                expected(tiny, edits, prompt)
                if edits
                else expected(tiny, [sp.ScaleBand("L0H0", "high", 1)], prompt)
            )
            torch.testing.assert_close(found[label][at], whole.double(), atol=1e-5, rtol=1e-4)


def test_offsets_beyond_a_prompt_have_no_score(tiny):
    prompts = [random_tokens(1, 3)[0], random_tokens(1, 9)[0]]
    found = isolated_scores(tiny, HEADS, {}, prompts, (1, 3), progress=False)[""]
    assert found[0, :, 1].isnan().all()
    assert not found[1].isnan().any()
    assert not found[0, :, 0].isnan().any()


def test_the_model_is_left_as_it_was(tiny):
    tokens = random_tokens(2, 8)
    with torch.no_grad():
        before = tiny(tokens)
        isolated_scores(
            tiny, HEADS, {"a": [sp.ShiftSlash(HEADS, 1)]}, list(tokens), (1,), progress=False
        )
        assert torch.equal(tiny(tokens), before)


def test_bad_edits_are_refused(tiny):
    with pytest.raises(sp.SlashpatchError, match="pairs 9-9"):
        isolated_scores(
            tiny, HEADS, {"a": [sp.DropBand("L0H1", "pairs 9")]}, list(random_tokens(1, 8)), (1,)
        )
