"""The batches of a scan: each is one unit of work, in this process or in a worker."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import bridge
from ..bridge.attached import reads_diagonals
from ..bridge.modes import forming_matrices
from ..data.heads import Head
from ..errors import ModelError, ScanError
from ..maths.lines import all_slash_sums
from ..maths.slash_scores import slash_sums
from ..patching.fused import engine_of_layers, fused
from .lines import LineSums
from .moment_sums import BatchMoments, MomentSums

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


class BatchSums(NamedTuple):
    """Sums over the prompts of one batch, and how its layers were computed.

    `by_prompt` are the scores of each prompt, where the job keeps them.
    """

    sums: Float[Tensor, "layer head offset"]
    squares: Float[Tensor, "layer head offset"]
    counts: Int[Tensor, "offset"]
    moments: BatchMoments | None
    engine_of_layers: list[str]
    by_prompt: Float[Tensor, "batch layer head offset"] | None = None
    lines: LineSums | None = None


@dataclass(frozen=True)
class ScanJob:
    """The batches of a scan; a unit is a batch.

    Attributes:
        batches: Prompts of each batch.
        offsets: Offsets of the scores.
        engine: "fused" or "bridge".
        profile_offsets: As for `scan`; None without moments.
        keeps_prompts: Whether to return the scores of each prompt as well.
        lines: Whether to gather the sums behind `Scan.lines`, at all offsets.
    """

    batches: list[list[Tensor]]
    offsets: tuple[int, ...]
    engine: str
    profile_offsets: int | None
    keeps_prompts: bool = False
    lines: bool = False

    def start(self, model: TransformerBridge) -> Callable[[int], BatchSums]:
        """Return a function that scans one batch."""
        return partial(self._scan, model, bridge.read(model))

    def _scan(self, model: TransformerBridge, info: bridge.ModelInfo, index: int) -> BatchSums:
        n_profile = self.profile_offsets
        moments = None if n_profile is None else MomentSums(model, info, n_profile)
        with run_by(model, self.engine):
            batch = self.batches[index]
            means, counts, lines = _scan_batch(
                model, info, batch, self.offsets, moments, self.lines
            )
            by_layer = engine_of_layers(model)
        squares = means.square().sum(0)
        of_batch = None if moments is None else moments.of_batch
        kept = means if self.keeps_prompts else None
        return BatchSums(means.sum(0), squares, counts, of_batch, by_layer, kept, lines)


@contextmanager
def run_by(model: TransformerBridge, engine: str) -> Iterator[None]:
    """Run the model by one of the engines "fused" and "bridge"."""
    with fused(model) if engine == "fused" else forming_matrices():
        yield


def _scan_batch(
    model: TransformerBridge,
    info: bridge.ModelInfo,
    prompts: list[Tensor],
    offsets: tuple[int, ...],
    moments: MomentSums | None,
    lines: bool,
) -> tuple[Float[Tensor, "batch layer head offset"], Int[Tensor, "offset"], LineSums | None]:
    """Return each prompt's scores (0 if it is too short), and the prompts that count by offset.

    With `lines`, the sums behind lines as well.
    """
    device = torch.device(model.cfg.device)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    n_pos = int(lengths.max())
    tokens = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True).to(device)
    real = torch.arange(n_pos) < lengths[:, None]
    per_layer: list[Tensor | None] = [None] * info.n_layers
    at_all_offsets: dict[int, tuple[Tensor, Tensor]] = {}

    @reads_diagonals
    def accumulate(pattern: Any, hook: Any) -> None:
        if not lines:
            per_layer[hook.layer()] = slash_sums(pattern, offsets, real)
            return
        sums, _ = at_all_offsets[hook.layer()] = all_slash_sums(pattern, real)
        beyond = max(0, offsets[-1] + 1 - n_pos)
        per_layer[hook.layer()] = torch.nn.functional.pad(sums, (0, beyond))[..., list(offsets)]

    hooks = [(info.hook(layer, "pattern"), accumulate) for layer in range(info.n_layers)]
    if moments is not None:
        hooks += moments.hooks(real)
    with torch.no_grad():
        mask = None if bool(real.all()) else real.long()
        bridge.run_for_hooks(model, tokens, hooks, mask)
    missing = [layer for layer, layer_sums in enumerate(per_layer) if layer_sums is None]
    if missing:
        raise ModelError(f"the pattern hook of layer {missing[0]} did not fire")
    totals = torch.stack([x for x in per_layer if x is not None], dim=1)
    if not bool(totals.isfinite().all()):
        _, layer, head, _ = (~totals.isfinite()).nonzero()[0].tolist()
        raise ScanError(
            f"the attention pattern of {Head(layer, head)} has NaN or infinite entries; "
            "check the model's weights and dtype (fp16 overflows easily; try bfloat16 or float32)"
        )
    n_rows = (lengths[:, None] - torch.tensor(offsets)).clamp(min=0)
    means = totals / n_rows.clamp(min=1)[:, None, None, :]
    found = None
    if lines:
        by_layer = [at_all_offsets[layer] for layer in range(info.n_layers)]
        sums, first = (torch.stack(parts, dim=1) for parts in zip(*by_layer, strict=True))
        found = LineSums.of_prompts(sums, first, lengths.tolist())
    return means, (n_rows > 0).sum(0), found
