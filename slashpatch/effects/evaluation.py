"""Runs a model with and without edits on the same prompts, and keeps each prompt's numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import bridge
from ..bridge import ModelInfo
from ..bridge.attached import reads_diagonals
from ..bridge.passes import leaving_no_trace
from ..data.progress import progress_over
from ..data.prompts import PromptSet
from ..errors import MetricError
from ..heads import Head
from ..patching.patch import patch
from .conditions import Condition
from .inputs import Batch, batches
from .metrics import Metric, kept_positions, metric_name, wanted

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_KEPT_BYTES = 1024 * 2**20


@dataclass(frozen=True)
class Taken:
    """What a run leaves for others to compare with, or to take where layers are not run again.

    Attributes:
        logits: Where a metric compares with them.
        read: What attention metrics read, by (metric, layer).
    """

    logits: Float[Tensor, "batch kept d_vocab"] | None
    read: dict[tuple[int, int], Float[Tensor, "batch head"]]

    def repeated(self, n: int) -> Taken:
        """For the same prompts n times over."""
        logits = None if self.logits is None else self.logits.repeat(n, 1, 1)
        return Taken(logits, {at: values.repeat(n, 1) for at, values in self.read.items()})


class Meter:
    """Reads metrics off passes of one model, and checks what they give."""

    def __init__(self, model: TransformerBridge, metrics: Sequence[Metric]) -> None:
        self.model = model
        self.info: ModelInfo = bridge.read(model)
        self.metrics = tuple(metrics)
        if not self.metrics:
            raise MetricError("no metric was given; expected at least one, such as 'loss'")
        self.names = [metric_name(metric) for metric in self.metrics]
        twice = next((name for name in self.names if self.names.count(name) > 1), None)
        if twice is not None:
            raise MetricError(f"two metrics are called {twice!r}; name functions apart")
        of_logits = [metric for metric in self.metrics if not hasattr(metric, "read")]
        self.compares = any("clean_logits" in wanted(metric) for metric in of_logits)
        every = [
            Head(layer, head)
            for layer in range(self.info.n_layers)
            for head in range(self.info.n_heads)
        ]
        self.heads: dict[int, list[Head]] = {
            place: every if metric.heads is None else list(self.info.require(metric.heads))
            for place, metric in enumerate(self.metrics)
            if hasattr(metric, "read")
        }

    def logits(
        self, tokens: Int[Tensor, "batch pos"], hooks: Sequence[tuple[str, Any]] = ()
    ) -> Float[Tensor, "batch kept d_vocab"]:
        """One forward pass, without what no metric needs: a KV cache, or all positions' logits."""
        saving = {"use_cache": False, "logits_to_keep": kept_positions(self.metrics, tokens)}
        kwargs: dict[str, Any] = {name: saving[name] for name in self.info.saving}
        with leaving_no_trace(self.model):
            return self.model.run_with_hooks(tokens, fwd_hooks=list(hooks), **kwargs)

    def run(
        self,
        batch: Batch,
        clean: Taken | None,
        what: Any,
        hooks: Sequence[tuple[str, Any]] = (),
        from_layer: int = 0,
    ) -> tuple[list[Float[Tensor, "batch _"]], Taken]:
        """Each metric's values on a batch; `clean_logits` None: this is the clean run.

        `what` names the run in messages; `hooks` act before attention is read; layers before
        `from_layer` are not run again, and their attention is the clean one. Raises MetricError.
        """
        known = {} if clean is None else clean.read
        read = {at: values for at, values in known.items() if at[1] < from_layer}
        logits = self.logits(batch.tokens, [*hooks, *self._attention_hooks(batch.tokens, read)])
        given = {
            "logits": logits,
            "tokens": batch.tokens,
            "clean_logits": logits if clean is None else clean.logits,
            "index": batch.index,
            "n_prompts": batch.n_prompts,
        }
        values = []
        for place, (metric, name) in enumerate(zip(self.metrics, self.names, strict=True)):
            if place in self.heads:
                found: Any = self._of_heads(place, read)
            else:
                before = logits._version
                found = metric(**{key: given[key] for key in wanted(metric)})
                if logits._version != before:
                    raise MetricError(f"the metric {name} changes the logits in place; copy them")
            values.append(_checked(found, batch, name, what))
        return values, Taken(logits if self.compares else None, read)

    def _attention_hooks(
        self, tokens: Tensor, read: dict[tuple[int, int], Tensor]
    ) -> Iterator[tuple[str, Any]]:
        for place, heads in self.heads.items():
            metric = self.metrics[place]
            for layer in sorted({head.layer for head in heads}):

                @reads_diagonals
                def take(
                    pattern: Any, hook: Any, at: tuple[int, int] = (place, layer), m: Any = metric
                ) -> None:
                    read[at] = m.read(pattern, tokens)

                yield self.info.hook(layer, "pattern"), take

    def _of_heads(
        self, place: int, read: dict[tuple[int, int], Tensor]
    ) -> Float[Tensor, "batch head"]:
        """What a metric of attention read of its heads, in their order."""
        layers, heads = torch.tensor([(head.layer, head.head) for head in self.heads[place]]).T
        own, at = layers.unique(return_inverse=True)
        missing = [layer for layer in own.tolist() if (place, layer) not in read]
        if missing:
            raise MetricError(
                f"{self.names[place]}: the pattern hook of layer {missing[0]} never fired"
            )
        every = torch.stack([read[place, layer].cpu() for layer in own.tolist()], dim=1)
        return every[:, at, heads]

    def labels(self, place: int, n: int) -> list[str]:
        """What each of a metric's numbers is of: a head, a position, or nothing."""
        if place in self.heads:
            return [str(head) for head in self.heads[place]]
        return [""] if n == 1 else [str(index) for index in range(n)]


def _checked(found: Any, batch: Batch, name: str, what: Any) -> Float[Tensor, "batch _"]:
    n = len(batch.index)
    fits = isinstance(found, Tensor) and found.ndim in (1, 2) and found.shape[0] == n
    if not fits or found.numel() == 0:
        came = f"shape {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise MetricError(
            f"the metric {name} must give one number per prompt, [{n}], or [{n}, several]; "
            f"got {came}. Do not average over prompts: intervals need them"
        )
    values = found.detach().double().cpu().view(n, -1)
    if not bool(values.isfinite().all()):
        prompt, of = (~values.isfinite()).nonzero()[0].tolist()
        raise MetricError(
            f"the metric {name} gave {float(values[prompt, of])} for prompt "
            f"{int(batch.index[prompt])} under {what}; expected finite numbers"
        )
    return values


def evaluate(
    model: TransformerBridge,
    meter: Meter,
    prompts: PromptSet,
    wanted_conditions: Sequence[Condition],
    batch_size: int | None = None,
    progress: bool | None = None,
) -> list[list[Float[Tensor, "prompt _"]]]:
    """Values of each metric under the clean run and then each condition, on the same prompts."""
    todo = batches(prompts, model.cfg.d_vocab, batch_size, model.cfg.device)
    runs = [Condition(), *wanted_conditions]
    steps = [
        (chunk, condition)
        for chunk in _chunks(todo, meter.compares, model.cfg.d_vocab)
        for condition in range(len(runs))
    ]
    found: list[list[list[Tensor]]] = [[[] for _ in meter.metrics] for _ in runs]
    kept: list[Taken] = []
    for chunk, which in progress_over(steps, "measuring", show=progress):
        with patch(model, *runs[which].edits) if which else nullcontext():
            if which == 0:
                kept = []
            for place, batch in enumerate(chunk):
                values, taken = meter.run(batch, kept[place] if which else None, runs[which])
                if which == 0:
                    kept.append(taken)
                for metric, rows in enumerate(values):
                    found[which][metric].append(rows)
    order = torch.cat([batch.index for batch in todo]).argsort()
    return [
        [_joined(parts, name)[order] for parts, name in zip(values, meter.names, strict=True)]
        for values in found
    ]


def _chunks(todo: list[Batch], compares: bool, d_vocab: int) -> Iterator[list[Batch]]:
    """Batches whose clean logits fit memory together; all of them where none are kept."""
    chunk: list[Batch] = []
    size = 0
    for batch in todo:
        size += 4 * d_vocab * batch.tokens.numel() if compares else 0
        if chunk and size > _KEPT_BYTES:
            yield chunk
            chunk, size = [], 4 * d_vocab * batch.tokens.numel()
        chunk.append(batch)
    yield chunk


def _joined(parts: list[Tensor], name: str) -> Float[Tensor, "prompt _"]:
    widths = {part.shape[1] for part in parts}
    if len(widths) > 1:
        raise MetricError(
            f"the metric {name} gave {min(widths)} numbers for one prompt and {max(widths)} for "
            "another; use prompts of one length, such as by max_tokens"
        )
    return torch.cat(parts)
