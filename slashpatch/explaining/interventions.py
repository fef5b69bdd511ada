"""Slash scores of heads under edits, each head edited in an otherwise clean run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import bridge
from ..bridge.attached import reads_diagonals
from ..bridge.prefix_cache import PrefixCache
from ..bridge.qk import LayerQK
from ..data.heads import Head, heads
from ..data.progress import progress_over
from ..edits import DropBand, Edit, FreezeBand, RankOne
from ..maths.bands import NAMED_BANDS
from ..maths.slash_scores import slash_sums
from ..patching.fused import fused_where_exact
from ..patching.patch import patch
from .runs import run_layers

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
    """Return each head's score at its offset under each of its edits, mean over prompts.

    One forward pass serves all heads: each layer's pattern is read under the edits, and then the
    layer's z is replaced by its clean value. So every head is edited in an otherwise clean run.
    Layers before the first of the heads run once for each prompt, and those after the last not.
    """
    offsets = sorted(set(at.values()))
    layers = sorted({head.layer for head in at})
    sums: dict[str, Tensor] = {}
    counts = torch.zeros(len(offsets))
    jobs = [(prompt, label) for prompt in tokens for label in edits]
    clean: dict[int, Tensor] = {}
    with fused_where_exact(model):
        for prompt, label in progress_over(jobs, "trying edits", show=progress):
            if label == next(iter(edits)):
                prefix = PrefixCache(model, prompt[None].to(model.cfg.device))
                prefix.advance(layers[0])
                with prefix.skipped():
                    clean = _clean_z(model, prompt, layers)
                counts += torch.tensor([float(len(prompt) > offset) for offset in offsets])
            with patch(model, edits[label]), prefix.skipped():
                scores = _scores_with_z(model, prompt, offsets, clean).nan_to_num(0)
            sums[label] = sums[label] + scores if label in sums else scores
    return {
        head: {
            label: float(
                (total / counts)[layers.index(head.layer), head.head, offsets.index(offset)]
            )
            for label, total in sums.items()
            if head in heads(edits[label].heads)
        }
        for head, offset in at.items()
    }


def _clean_z(model: TransformerBridge, prompt: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
    """Return z of some layers, by layer."""
    by_layer: dict[int, Tensor] = {}

    def keep(z: Tensor, hook: Any) -> None:
        by_layer[hook.layer()] = z

    info = bridge.read(model)
    run_layers(model, prompt, [(info.hook(layer, "z"), keep) for layer in layers], layers[-1])
    return by_layer


def _scores_with_z(
    model: TransformerBridge, prompt: Tensor, offsets: Sequence[int], z: dict[int, Tensor]
) -> Tensor:
    """Return slash scores [layer, head, offset] of one prompt, with the layers' z replaced."""
    by_layer: dict[int, Tensor] = {}
    real = torch.ones(1, len(prompt), dtype=torch.bool)
    rows = len(prompt) - torch.tensor(offsets)

    @reads_diagonals
    def read(pattern: Any, hook: Any) -> None:
        by_layer[hook.layer()] = slash_sums(pattern, offsets, real)[0] / rows.clamp(min=0)

    def replace_z(edited: Tensor, hook: Any) -> Tensor:
        return z[hook.layer()]

    info = bridge.read(model)
    hooks: list[tuple[str, Any]] = [(info.hook(layer, "pattern"), read) for layer in z]
    hooks += [(info.hook(layer, "z"), replace_z) for layer in z]
    run_layers(model, prompt, hooks, max(z))
    return torch.stack([by_layer[layer] for layer in sorted(z)])
