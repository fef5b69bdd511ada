"""Claims 8 and 9: shifted slashes move copying, and planted slashes restore it."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from ..edits import Edit, PlantSlash, ShiftSlash
from ..effects.copying import LagTop1
from ..effects.running.conditions import Condition
from ..scanning.isolated_scores import isolated_scores
from .interventions import NO_SLASH
from .measured import Measured, refused, share
from .passing import MATCHED, OFFSETS, against
from .rules import COPIES, rules_of
from .runs import matched_heads, other_offsets, run
from .subjects import Subjects

#: Strengths of planted slashes that are tried.
_STRENGTHS = (10.0, 20.0, 40.0, 80.0, 160.0)
#: The tests of `moved_copying`.
MOVED = ("next token", "token after next")


def moved_copying(on: Subjects) -> list[Measured]:
    """Return the tests of copying with the slashes at Δ = 1 shifted to Δ = 2."""
    heads = [head for head, offset in on.slashes if offset == 1]
    able = [head for head in heads if on.info.qk[head.layer].relative]
    copying = on.copying if able else None
    why = (
        NO_SLASH
        if not on.slashes
        else "no slash head has Δ = 1"
        if not heads
        else "the layers of the slash heads have no RoPE to shift by"
        if copying is None
        else copying.why_not
    )
    if why or copying is None:
        return refused(MOVED, why)
    edits = [ShiftSlash(tuple(able), 1)]
    lags = LagTop1((1, 2))
    controls = {MATCHED: matched_heads(on, edits, copying.prompts)}
    runs = run(on, copying.prompts, [lags], edits, controls)
    clean = runs.clean[0]
    falls = against(on, MOVED[0], runs, MATCHED, lambda of: clean[:, 0] - of[0][:, 0])
    rises = against(on, MOVED[1], runs, MATCHED, lambda of: of[0][:, 1] - clean[:, 1])
    return [falls, rises]


def planted(on: Subjects) -> list[Measured]:
    """Return the tests of claim 9: copying with planted slashes against that without any."""
    names = rules_of(9)
    copying = on.copying if on.slashes else None
    able = all(on.info.qk[head.layer].relative for head in on.heads)
    why = (
        NO_SLASH
        if copying is None
        else on.out_of(2 * on.settings.n_copied)
        or copying.why_not
        or ("" if able else "a slash cannot be planted in layers without RoPE")
    )
    if why or copying is None:
        return refused(names, why)

    prompts, length = on.copying.prompts, 2 * on.settings.n_copied
    without = run(on, prompts, ["copying"], on.knock_out(), {})
    clean, none = without.clean[0][:, 0], without.edited[0][:, 0]
    lost = none - clean
    if float(lost.mean() / copying.gain.mean()) < COPIES:
        return refused(names, "copying survives without the slashes: there is nothing to restore")
    strength = _strength(on)

    def plant(to: dict[int, int]) -> list[Edit]:
        groups = on.by_offset().items()
        return [PlantSlash(heads, to[offset], strength) for offset, heads in groups]

    own = {offset: offset for offset in on.by_offset()}
    elsewhere = matched_heads(on, plant(own), prompts)

    def in_other_heads() -> list[Condition]:
        removed = tuple(on.knock_out())
        return [Condition((*removed, *draw.edits)) for draw in elsewhere()]

    controls = {
        OFFSETS: other_offsets(on, plant, length, "planted offsets"),
        MATCHED: in_other_heads,
    }
    runs = run(on, prompts, ["copying"], plant(own), controls)

    def restored(of: list[Tensor]) -> Float[Tensor, "prompt"]:
        return (none - of[0][:, 0]) / lost.mean()

    detail = (
        f"loss {_mean(clean)} clean, {_mean(none)} without slashes, {_mean(runs.edited[0])} "
        f"planted with strength {strength:g}"
    )
    whole = share("planted", none - runs.edited[0][:, 0], lost, on.seed, detail)
    return [
        whole,
        against(on, names[1], runs, OFFSETS, restored),
        against(on, names[2], runs, MATCHED, restored),
    ]


def _strength(on: Subjects) -> float:
    """Return the least strength at which planted slashes score as high as the heads' own.

    One of `_STRENGTHS`, on the picking prompts; the largest, if none is enough.
    """
    prompts = [tokens[: on.settings.n_effect_tokens] for tokens in on.picking.tokens]
    edits: dict[str, list[Edit]] = {
        f"{strength:g}": [PlantSlash(head, offset, strength) for head, offset in on.slashes]
        for strength in _STRENGTHS
    }
    offsets = sorted(on.by_offset())
    scores = isolated_scores(on.model, on.heads, edits, prompts, offsets, on.progress)
    columns = [offsets.index(offset) for _, offset in on.slashes]
    at = {label: float(of[:, range(len(columns)), columns].mean()) for label, of in scores.items()}
    enough = [strength for strength in _STRENGTHS if at[f"{strength:g}"] >= at[""]]
    return enough[0] if enough else _STRENGTHS[-1]


def _mean(values: Tensor) -> str:
    return f"{float(values.mean()):.2f}"
