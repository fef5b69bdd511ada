"""The forward passes of a sweep: grouped by layer, each started from the cached residual stream."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from ..bridge.prefix_cache import PrefixCache
from ..data.journal import Journal
from ..data.progress import progress_over
from ..data.prompts import PromptSet
from ..edits import Edit
from ..errors import MetricError
from ..patching.patch import patch
from .batch_rows import OnRows
from .conditions import Condition
from .evaluation import MetricRunner, RunOutputs
from .inputs import Batch, batches
from .sweep_variants import Variant

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


#: Bytes that one layer's patterns, or the logits, of variants in one forward pass may take.
_SHARED_BYTES = 512 * 2**20


#: Bytes of residual streams that the clean run may cache; above this, each is computed when needed.
_AHEAD_BYTES = 1024 * 2**20


class SweepRun:
    """Runs the variants of a sweep over its prompts.

    Args:
        chosen: Indices of the prompts to run; None: all.

    Attributes:
        per_pass: Number of variants that share a forward pass.
    """

    def __init__(
        self,
        model: TransformerBridge,
        runner: MetricRunner,
        prompts: PromptSet,
        batch_size: int | None,
        per_pass: int | None,
        progress: bool | None,
        chosen: Sequence[int] | None = None,
    ) -> None:
        self.model, self.runner, self.progress = model, runner, progress
        self.batches = batches(prompts, model.cfg.d_vocab, batch_size, model.cfg.device, chosen)
        self.order = torch.cat([batch.index for batch in self.batches]).argsort()
        self.per_pass = per_pass or self._default_per_pass()

    def _default_per_pass(self) -> int:
        """Return the number of variants that fit memory together; 1 on the CPU."""
        if torch.device(self.model.cfg.device).type == "cpu":
            return 1
        rows, n_pos = max((batch.tokens.shape for batch in self.batches), key=lambda s: s[0] * s[1])
        pattern = 4 * rows * self.runner.info.n_heads * n_pos**2
        logits = 4 * rows * n_pos * self.model.cfg.d_vocab
        return max(1, _SHARED_BYTES // max(pattern, logits))

    def all(self, variants: list[Variant], journal: Journal | None) -> dict[int, list[float]]:
        """Run all variants that the journal does not hold yet.

        Returns the values [prompt] of each variant by its index; −1 is the clean run.
        """
        rows = {} if journal is None else journal.rows
        prefixes = [PrefixCache(self.model, batch.tokens) for batch in self.batches]
        layers = {variant.edit.layers[0] for variant in variants}
        size = 4 * self.model.cfg.d_model * sum(batch.tokens.numel() for batch in self.batches)
        ahead = layers if len(layers) * size <= _AHEAD_BYTES else set()
        clean = []
        for prefix, batch in zip(prefixes, self.batches, strict=True):
            with prefix.keeping(ahead):
                clean.append(self.runner.run(batch, None, Condition()))
        clean_outputs = [outputs for _, outputs in clean]
        if -1 not in rows:
            self._write(rows, journal, {-1: [values for (values,), _ in clean]})
        groups = [
            group
            for group in self._groups(variants)
            if not all(variant.index in rows for variant in group)
        ]
        sizes = [len(group) for group in groups]
        for group in progress_over(groups, "sweeping", show=self.progress, n=sizes):
            parts: dict[int, list[Tensor]] = {variant.index: [] for variant in group}
            for prefix, batch, outputs in zip(prefixes, self.batches, clean_outputs, strict=True):
                prefix.advance(group[0].edit.layers[0])
                of_group = self._run(prefix, batch, outputs, group)
                for variant, values in zip(group, of_group, strict=True):
                    parts[variant.index].append(values)
            # A run that was killed may have written a part of this group: those rows stay.
            self._write(rows, journal, {i: v for i, v in parts.items() if i not in rows})
        return rows

    def _write(
        self, rows: dict[int, list[float]], journal: Journal | None, parts: dict[int, list[Tensor]]
    ) -> None:
        """Add the values of some variants, given batch by batch, to the journal or to `rows`."""
        new = {}
        for index, values_by_batch in parts.items():
            values = torch.cat(values_by_batch)[self.order]
            if values.shape[1] != 1:
                raise MetricError(
                    f"sweep needs a metric with one number per prompt; {self.runner.names[0]} "
                    f"gives {values.shape[1]}"
                )
            new[index] = values[:, 0].tolist()
        if journal is None:
            rows.update(new)
        else:
            journal.write(new)

    def _groups(self, variants: list[Variant]) -> list[list[Variant]]:
        """Return groups of neighbouring variants of one layer, each of which shares a pass.

        Does not depend on what a journal holds, so that a resumed sweep rounds in the same way.
        """
        groups: list[list[Variant]] = []
        for variant in variants:
            last = groups[-1] if groups else []
            can_share = (
                0 < len(last) < self.per_pass
                and last[0].edit.layers == variant.edit.layers
                and not any("key" in edit.stages() for edit in (last[0].edit, variant.edit))
            )
            if can_share:
                last.append(variant)
            else:
                groups.append([variant])
        return groups

    def _run(
        self, prefix: PrefixCache, batch: Batch, clean: RunOutputs, group: list[Variant]
    ) -> list[Float[Tensor, "batch _"]]:
        """Return the values of each variant of a group, on one batch."""
        n, size = len(group), len(batch.index)
        if n == 1:
            edits: list[Edit] = [group[0].edit]
        else:
            edits = [
                OnRows(variant.edit.heads, variant.edit, place * size, (place + 1) * size)
                for place, variant in enumerate(group)
            ]
        label = group[0].edit if n == 1 else f"{group[0].edit} to {group[-1].edit}"
        with ExitStack() as stack:
            stack.enter_context(patch(self.model, *edits))
            stack.enter_context(prefix.skipped(n))
            (values,), _ = self.runner.run(
                batch.repeated(n), clean.repeated(n), label, from_layer=prefix.layer
            )
        return list(values.split(size))
