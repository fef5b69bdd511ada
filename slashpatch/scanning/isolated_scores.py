"""Slash scores of a few heads under edits, each head edited in an otherwise clean run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from .. import bridge
from ..bridge.attached import reads_diagonals
from ..bridge.passes import leaving_no_trace
from ..bridge.prefix_cache import PrefixCache
from ..data.heads import Head
from ..data.heads import heads as as_heads
from ..data.progress import progress_over
from ..edits import Edit
from ..maths.slash_scores import slash_rows
from ..patching.fused import fused_where_exact
from ..patching.patch import patch

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def isolated_scores(
    model: TransformerBridge,
    heads: Sequence[Head],
    edits: Mapping[str, Sequence[Edit]],
    prompts: Sequence[Tensor],
    offsets: Sequence[int],
    progress: bool | None = None,
) -> dict[str, Float[Tensor, "prompt head offset"]]:
    """Return slash scores of some heads per prompt, clean and under each set of edits.

    The heads of a layer are edited while all layers before it are clean, so that a head's scores
    tell what its own edit does. Only the layers of `heads` are run for each set of edits.

    Args:
        model: A TransformerBridge; active patches are part of the clean run.
        heads: The heads whose scores are read.
        edits: Sets of edits by label. `""` is the label of the clean run.
        prompts: Token ids of each prompt.
        offsets: Offsets Δ; NaN for prompts that are no longer than one.
        progress: Whether to show a progress bar; None: on a terminal only.
    """
    found = {
        label: torch.full((len(prompts), len(heads), len(offsets)), torch.nan).double()
        for label in ("", *edits)
    }
    groups: dict[int, list[int]] = {}
    for index, tokens in enumerate(prompts):
        groups.setdefault(len(tokens), []).append(index)
    caches = {
        length: PrefixCache(model, torch.stack([prompts[i] for i in at]).to(model.cfg.device))
        for length, at in groups.items()
    }
    columns = torch.tensor(list(offsets), device=model.cfg.device)
    layers = sorted({head.layer for head in heads})
    jobs = [(layer, label) for layer in layers for label in found]
    with fused_where_exact(model):  # entered once, since that takes a moment
        for layer, label in progress_over(jobs, "scoring edited heads", show=progress):
            wanted = [(place, head) for place, head in enumerate(heads) if head.layer == layer]
            own = [_in_layer(edit, layer) for edit in edits.get(label, ()) if layer in edit.layers]
            if label == "":
                for cache in caches.values():
                    cache.advance(layer)
            with patch(model, *own) if own else nullcontext():
                for length, at in groups.items():
                    scores = _scores(model, caches[length], layer, columns).cpu()
                    for place, head in wanted:
                        found[label][at, place] = scores[:, head.head]
    return found


def _in_layer(edit: Edit, layer: int) -> Edit:
    """Return the same edit of its heads in one layer alone."""
    return replace(edit, heads=tuple(head for head in as_heads(edit.heads) if head.layer == layer))


def _scores(
    model: TransformerBridge, cache: PrefixCache, layer: int, offsets: Tensor
) -> Float[Tensor, "batch head offset"]:
    """Return the scores of one layer's heads, from a pass that starts and ends at the layer."""
    kept: list[Tensor] = []

    @reads_diagonals
    def read(pattern: Any, hook: Any) -> None:
        here = offsets.to(pattern.device)  # layers may lie on several devices
        rows = cache.tokens.shape[1] - here
        sums = slash_rows(pattern.detach(), here).double().sum(2)
        kept.append(sums / torch.where(rows > 0, rows, torch.nan))

    info = bridge.read(model)
    last = layer == info.n_layers - 1
    stop: dict[str, Any] = {} if last else {"stop_at_layer": layer + 1}
    with cache.skipped(), leaving_no_trace(model):
        hooks = [(info.hook(layer, "pattern"), read)]
        model.run_with_hooks(cache.tokens, fwd_hooks=hooks, return_type=None, **stop)
    return kept[-1]
