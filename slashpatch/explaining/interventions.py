"""Slash scores of heads under edits, each head edited in an otherwise clean run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ..bridge.qk import LayerQK
from ..data.heads import Head, heads
from ..edits import DropBand, Edit, FreezeBand, RankOne
from ..maths.bands import NAMED_BANDS
from ..scanning.isolated_scores import isolated_scores

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def condition_edits(wanted: Sequence[Head], layers: Sequence[LayerQK]) -> dict[str, Edit]:
    """Return the edits that take the conditions from the heads that can lose them, by label."""
    edits: dict[str, Edit] = {f"rank one {of}": RankOne(wanted, of) for of in ("q", "k", "qk")}
    rotated = [head for head in wanted if layers[head.layer].rotary is not None]
    if rotated:
        edits |= {f"drop {band}": DropBand(rotated, band) for band in NAMED_BANDS}
        edits |= {f"freeze {band}": FreezeBand(rotated, band) for band in NAMED_BANDS}
    return edits


def edited_scores(
    model: TransformerBridge,
    tokens: list[Tensor],
    at: dict[Head, int],
    edits: dict[str, Edit],
    progress: bool | None,
) -> dict[Head, dict[str, float]]:
    """Return each head's score at its offset under each of its edits, mean over prompts."""
    offsets = sorted(set(at.values()))
    sets = {label: [edit] for label, edit in edits.items()}
    scores = isolated_scores(model, list(at), sets, tokens, offsets, progress)
    return {
        head: {
            label: float(scores[label][:, place, offsets.index(offset)].nanmean())
            for label, edit in edits.items()
            if head in heads(edit.heads)
        }
        for place, (head, offset) in enumerate(at.items())
    }
