"""Claim 7: slash diagonals pass information, for predictions on natural text and for copying."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..data.heads import Head
from ..data.prompts import PromptSet
from ..edits import Edit, KnockOut
from ..effects.direct import direct_effect
from ..effects.metrics.attention import PrefixMatching
from ..effects.running.inputs import repeated
from .copying_gain import clean_values
from .interventions import NO_SLASH
from .measured import Measured, beyond, mean, refused
from .rules import PREFIX_MATCHING
from .runs import Runs, matched_heads, other_offsets, run
from .subjects import Subjects

MATCHED, OFFSETS = "matched heads", "other offsets"
#: The tests of `on_natural_text` and of `on_repeated_tokens`.
ON_NATURAL_TEXT = (
    "predictions",
    "predictions beyond matched heads",
    "predictions beyond other offsets",
    "loss",
)
ON_REPEATED_TOKENS = (
    "copying",
    "copying beyond matched heads",
    "copying beyond other offsets",
    "induction",
)


def against(
    on: Subjects,
    test: str,
    runs: Runs,
    control: str,
    value: Callable[[list[Tensor]], Float[Tensor, "prompt"]],
    detail: str = "",
) -> Measured:
    """Return a number under the edit beyond that under a control's draws.

    `value` makes the number from the values of all metrics in a run.
    """
    if control in runs.refused:
        return Measured(test, why_not=runs.refused[control])
    draws = torch.stack([value(of) for of in runs.draws[control]])
    sample = value(runs.edited)
    shown = detail or f"{float(sample.mean()):.3g} against {float(draws.mean()):.3g}"
    return beyond(test, sample, draws, on.seed, shown)


def knocked_out(on: Subjects, to: dict[int, int]) -> list[Edit]:
    """Return the edits that remove the slashes' diagonals, at other offsets."""
    return [KnockOut(heads, to[offset]) for offset, heads in on.by_offset().items()]


def on_natural_text(on: Subjects) -> list[Measured]:
    """Return the tests of predictions and loss on natural text."""
    names = ON_NATURAL_TEXT
    if not on.slashes:
        return refused(names, NO_SLASH)
    length = on.settings.n_effect_tokens
    prompts = PromptSet(tuple(t[:length] for t in on.natural.tokens), on.natural.source)
    shortest = min(map(len, prompts.tokens))  # a longer offset would change nothing
    edits = on.knock_out()
    runs = run(
        on,
        prompts,
        ("kl", "loss"),
        edits,
        {
            MATCHED: matched_heads(on, edits, prompts),
            OFFSETS: other_offsets(on, lambda to: knocked_out(on, to), shortest, "offsets"),
        },
    )
    clean_loss = runs.clean[1][:, 0]
    return [
        mean("predictions", runs.edited[0][:, 0], on.seed, on.named),
        against(on, names[1], runs, MATCHED, lambda of: of[0][:, 0]),
        against(on, names[2], runs, OFFSETS, lambda of: of[0][:, 0]),
        against(on, names[3], runs, MATCHED, lambda of: of[1][:, 0] - clean_loss),
    ]


def on_repeated_tokens(on: Subjects) -> list[Measured]:
    """Return the tests of copying, and of the prefix matching of induction heads."""
    names = ON_REPEATED_TOKENS
    if not on.slashes:
        return refused(names, NO_SLASH)
    if why := on.out_of(2 * on.settings.n_copied):
        return refused(names, why)
    copying, induction = on.copying, _induction_heads(on)
    if copying.why_not and not induction:
        why = "no head attends to the token after an earlier occurrence (no induction head)"
        return [*refused(names[:3], copying.why_not), Measured(names[3], why_not=why)]
    metrics = ["copying", *([PrefixMatching(tuple(induction))] if induction else [])]
    edits = on.knock_out()
    length = 2 * on.settings.n_copied
    runs = run(
        on,
        copying.prompts,
        metrics,
        edits,
        {
            MATCHED: matched_heads(on, edits, copying.prompts),
            OFFSETS: other_offsets(on, lambda to: knocked_out(on, to), length, "offsets"),
        },
    )
    clean, gain = runs.clean[0][:, 0], copying.gain.mean()

    def lost(of: list[Tensor]) -> Float[Tensor, "prompt"]:
        return (of[0][:, 0] - clean) / gain

    tests = (
        refused(names[:3], copying.why_not)
        if copying.why_not
        else [
            mean("copying", lost(runs.edited), on.seed, f"{on.named}; gain {float(gain):.2f} nats"),
            against(on, names[1], runs, MATCHED, lost),
            against(on, names[2], runs, OFFSETS, lost),
        ]
    )
    if not induction:
        return [*tests, Measured(names[3], why_not="the model has no induction head")]
    matching = runs.clean[1].mean(1)

    def unmatched(of: list[Tensor]) -> Float[Tensor, "prompt"]:
        return (matching - of[1].mean(1)) / matching.mean()

    heads = ", ".join(map(str, induction))
    return [*tests, against(on, names[3], runs, MATCHED, unmatched, f"of {heads}")]


def _induction_heads(on: Subjects) -> list[Head]:
    """Return up to 4 heads that are no slash heads with the most prefix matching, on other tokens.

    Their scores are at least `PREFIX_MATCHING`.
    """
    settings = on.settings
    picking = repeated(on.model, settings.n_picking, settings.n_copied, on.seed + 1)
    scores = clean_values(on.model, picking, PrefixMatching(), on.progress).mean(0)
    order = scores.argsort(descending=True).tolist()
    able = [on.info.heads[i] for i in order if float(scores[i]) >= PREFIX_MATCHING]
    return [head for head in able if head not in on.heads][:4]


def self_repair(on: Subjects) -> list[Measured]:
    """Return what later layers add to the direct effect of removing the slashes, on copying."""
    if not on.slashes:
        return refused(("self-repair",), NO_SLASH)
    if why := on.out_of(2 * on.settings.n_copied) or on.copying.why_not:
        return refused(("self-repair",), why)
    found = direct_effect(
        on.model,
        [list(on.knock_out())],
        "copying",
        [*on.copying.prompts.tokens],
        seed=on.seed,
        progress=on.progress,
    )
    rows = found.frame.set_index("part")
    repair: dict[Any, Any] = rows.loc["repair"].to_dict()
    effects: dict[Any, Any] = rows["effect"].to_dict()
    detail = f"direct {effects['direct']:.2f} nats, total {effects['total']:.2f} nats"
    numbers = repair["effect"], repair["low"], repair["high"], repair["n"]
    return [Measured("self-repair", *numbers, detail=detail)]
