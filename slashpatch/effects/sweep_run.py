"""The forward passes of a sweep."""

from __future__ import annotations

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
from .conditions import Condition
from .evaluation import Meter, Taken
from .inputs import Batch, batches
from .rows import OnRows
from .sweep_variants import Variant

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


#: Bytes that one layer's attention of variants that share a pass may take.
_SHARED_BYTES = 512 * 2**20


#: Bytes of layers' outputs that are kept from the clean run; beyond, each is computed in its turn.
_AHEAD_BYTES = 1024 * 2**20


class _Run:
    """The passes of a sweep over its prompts."""

    def __init__(
        self,
        model: TransformerBridge,
        meter: Meter,
        prompts: PromptSet,
        batch_size: int | None,
        per_pass: int | None,
        progress: bool | None,
    ) -> None:
        self.model, self.meter, self.progress = model, meter, progress
        self.todo = batches(prompts, model.cfg.d_vocab, batch_size, model.cfg.device)
        self.order = torch.cat([batch.index for batch in self.todo]).argsort()
        self.per_pass = per_pass or self._room()
        self.kept: list[Taken] = []

    def _room(self) -> int:
        """How many variants share a pass."""
        if torch.device(self.model.cfg.device).type == "cpu":
            return 1
        rows, n_pos = max((batch.tokens.shape for batch in self.todo), key=lambda s: s[0] * s[1])
        pattern = 4 * rows * self.meter.info.n_heads * n_pos**2
        logits = 4 * rows * n_pos * self.model.cfg.d_vocab
        return max(1, _SHARED_BYTES // max(pattern, logits))

    def all(self, variants: list[Variant], journal: Journal | None) -> dict[int, list[float]]:
        """Each variant's values, by index; −1 is the clean run. The journal's are not run."""
        rows = {} if journal is None else journal.rows
        prefixes = [PrefixCache(self.model, batch.tokens) for batch in self.todo]
        layers = {one.edit.layers[0] for one in variants}
        size = 4 * self.model.cfg.d_model * sum(batch.tokens.numel() for batch in self.todo)
        ahead = layers if len(layers) * size <= _AHEAD_BYTES else set()
        clean = []
        for prefix, batch in zip(prefixes, self.todo, strict=True):
            with prefix.keeping(ahead):
                clean.append(self.meter.run(batch, None, Condition()))
        self.kept = [taken for _, taken in clean]
        if -1 not in rows:
            self._note(rows, journal, {-1: [values for (values,), _ in clean]})
        every = self._groups(variants)
        groups = [group for group in every if not all(one.index in rows for one in group)]
        sizes = [len(group) for group in groups]
        for group in progress_over(groups, "sweeping", show=self.progress, n=sizes):
            found: dict[int, list[Tensor]] = {one.index: [] for one in group}
            for prefix, batch, kept in zip(prefixes, self.todo, self.kept, strict=True):
                prefix.advance(group[0].edit.layers[0])
                for one, values in zip(group, self._run(prefix, batch, kept, group), strict=True):
                    found[one.index].append(values)
            # Of a group that was cut in two, what had been written stays as it was.
            self._note(rows, journal, {i: v for i, v in found.items() if i not in rows})
        return rows

    def _note(
        self, rows: dict[int, list[float]], journal: Journal | None, found: dict[int, list[Tensor]]
    ) -> None:
        new = {}
        for index, parts in found.items():
            values = torch.cat(parts)[self.order]
            if values.shape[1] != 1:
                raise MetricError(
                    f"a sweep takes a metric with one number per prompt; {self.meter.names[0]} "
                    f"gives {values.shape[1]}"
                )
            new[index] = values[:, 0].tolist()
        if journal is None:
            rows.update(new)
        else:
            journal.write(new)

    def _groups(self, variants: list[Variant]) -> list[list[Variant]]:
        """Neighbours of one layer that can share a pass; always the same ones."""
        groups: list[list[Variant]] = []
        for one in variants:
            last = groups[-1] if groups else []
            shares = (
                0 < len(last) < self.per_pass
                and last[0].edit.layers == one.edit.layers
                and not any("key" in edit.stages() for edit in (last[0].edit, one.edit))
            )
            if shares:
                last.append(one)
            else:
                groups.append([one])
        return groups

    def _run(
        self, prefix: PrefixCache, batch: Batch, kept: Taken, group: list[Variant]
    ) -> list[Float[Tensor, "batch _"]]:
        """Values of each variant of a group on one batch."""
        n, size = len(group), len(batch.index)
        if n == 1:
            edits: list[Edit] = [group[0].edit]
        else:
            edits = [
                OnRows(one.edit.heads, one.edit, place * size, (place + 1) * size)
                for place, one in enumerate(group)
            ]
        what = group[0].edit if n == 1 else f"{group[0].edit} to {group[-1].edit}"
        with ExitStack() as stack:
            stack.enter_context(patch(self.model, *edits))
            stack.enter_context(prefix.skipped(n))
            (values,), _ = self.meter.run(
                batch.repeated(n), kept.repeated(n), what, from_layer=prefix.layer
            )
        return list(values.split(size))
