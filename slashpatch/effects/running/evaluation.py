"""Run a model with and without edits on the same prompts, and collect metrics per prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ... import bridge
from ...bridge import ModelInfo
from ...bridge.attached import reads_diagonals
from ...bridge.passes import leaving_no_trace
from ...data.heads import Head
from ...errors import MetricError
from ..metrics.by_name import Metric, kept_positions, metric_name, required_arguments
from .inputs import Batch

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True)
class RunOutputs:
    """Outputs of a run that later runs on the same prompts use.

    Attributes:
        logits: Its logits, if a metric compares later runs with them.
        attention: Values of attention metrics by (metric index, layer), for later runs that skip
            that layer.
    """

    logits: Float[Tensor, "batch kept d_vocab"] | None
    attention: dict[tuple[int, int], Float[Tensor, "batch head"]]

    def repeated(self, n: int) -> RunOutputs:
        """Return the outputs for the same prompts n times over."""
        logits = None if self.logits is None else self.logits.repeat(n, 1, 1)
        attention = {key: values.repeat(n, 1) for key, values in self.attention.items()}
        return RunOutputs(logits, attention)


class MetricRunner:
    """Runs one model and computes metrics of each run, per prompt.

    Attributes:
        names: Names of the metrics, in their order.
        compares: Whether a metric compares with the clean run's logits.
        heads: Heads of each attention metric, by its index.
    """

    def __init__(self, model: TransformerBridge, metrics: Sequence[Metric]) -> None:
        self.model = model
        self.info: ModelInfo = bridge.read(model)
        self.metrics = tuple(metrics)
        if not self.metrics:
            raise MetricError("no metric was given; expected at least one, such as 'loss'")
        self.names = [metric_name(metric) for metric in self.metrics]
        twice = next((name for name in self.names if self.names.count(name) > 1), None)
        if twice is not None:
            raise MetricError(f"two metrics are called {twice!r}; give functions different names")
        of_logits = [metric for metric in self.metrics if not hasattr(metric, "read")]
        self.compares = any("clean_logits" in required_arguments(metric) for metric in of_logits)
        self.heads: dict[int, list[Head]] = {
            index: self.info.heads if metric.heads is None else [*self.info.require(metric.heads)]
            for index, metric in enumerate(self.metrics)
            if hasattr(metric, "read")
        }

    def logits(
        self,
        tokens: Int[Tensor, "batch pos"],
        hooks: Sequence[tuple[str, Any]] = (),
        gradients: bool = False,
    ) -> Float[Tensor, "batch kept d_vocab"]:
        """Run one forward pass, and return the logits of the last positions that metrics need."""
        saving = {"use_cache": False, "logits_to_keep": kept_positions(self.metrics, tokens)}
        kwargs: dict[str, Any] = {name: saving[name] for name in self.info.saving}
        with leaving_no_trace(self.model), torch.set_grad_enabled(gradients):
            logits: Tensor = self.model.run_with_hooks(tokens, fwd_hooks=list(hooks), **kwargs)
        return logits.to(tokens.device)  # the last layer may be on another device than the first

    def run(
        self,
        batch: Batch,
        clean: RunOutputs | None,
        label: Any,
        hooks: Sequence[tuple[str, Any]] = (),
        from_layer: int = 0,
    ) -> tuple[list[Float[Tensor, "batch _"]], RunOutputs]:
        """Run the model on a batch; return each metric's values and the run's outputs.

        Args:
            batch: The prompts.
            clean: Outputs of the clean run on these prompts; None if this is the clean run.
            label: Name of the run in error messages.
            hooks: Further hooks, which act before the attention metrics read.
            from_layer: First layer that the model runs; attention metrics of the layers before
                are those of the clean run.

        Raises:
            MetricError: A metric that returns something else than numbers per prompt.
        """
        known = {} if clean is None else clean.attention
        attention = {key: values for key, values in known.items() if key[1] < from_layer}
        hooks = [*hooks, *self._attention_hooks(batch.tokens, attention)]
        logits = self.logits(batch.tokens, hooks)
        clean_logits = logits if clean is None else clean.logits
        values = []
        for index, name in enumerate(self.names):
            if index in self.heads:
                value: Any = self._of_heads(index, attention)
            else:
                value = self.of_logits(index, logits, batch, clean_logits)
            values.append(checked(value, batch, name, label))
        return values, RunOutputs(logits if self.compares else None, attention)

    def of_logits(
        self, index: int, logits: Tensor, batch: Batch, clean_logits: Tensor | None = None
    ) -> Any:
        """Return what a metric of logits returns. Raises MetricError if it changes the logits."""
        metric = self.metrics[index]
        arguments = {
            "logits": logits,
            "tokens": batch.tokens,
            "clean_logits": clean_logits,
            "index": batch.index,
            "n_prompts": batch.n_prompts,
        }
        before = None if logits.is_inference() else logits._version  # which has no count of changes
        value = metric(**{key: arguments[key] for key in required_arguments(metric)})
        if before is not None and logits._version != before:
            raise MetricError(
                f"the metric {self.names[index]} changes the logits in place; copy them"
            )
        return value

    def _attention_hooks(
        self, tokens: Tensor, attention: dict[tuple[int, int], Tensor]
    ) -> Iterator[tuple[str, Any]]:
        """Yield the hooks by which attention metrics read patterns into `attention`."""
        for index, heads in self.heads.items():
            metric = self.metrics[index]
            for layer in sorted({head.layer for head in heads}):

                @reads_diagonals
                def read(
                    pattern: Any, hook: Any, key: tuple[int, int] = (index, layer), m: Any = metric
                ) -> None:
                    attention[key] = m.read(pattern, tokens)

                yield self.info.hook(layer, "pattern"), read

    def _of_heads(
        self, index: int, attention: dict[tuple[int, int], Tensor]
    ) -> Float[Tensor, "batch head"]:
        """Return the values that an attention metric read of its heads, in the heads' order."""
        layers, heads = torch.tensor([(head.layer, head.head) for head in self.heads[index]]).T
        distinct, at = layers.unique(return_inverse=True)
        missing = [layer for layer in distinct.tolist() if (index, layer) not in attention]
        if missing:
            raise MetricError(
                f"{self.names[index]}: the pattern hook of layer {missing[0]} never fired"
            )
        by_layer = torch.stack([attention[index, la].cpu() for la in distinct.tolist()], dim=1)
        return by_layer[:, at, heads]

    def labels(self, index: int, n: int) -> list[str]:
        """Return labels of a metric's n numbers: its heads, else positions, "" for one number."""
        if index in self.heads:
            return [str(head) for head in self.heads[index]]
        return [""] if n == 1 else [str(position) for position in range(n)]


def checked(value: Any, batch: Batch, name: str, label: Any) -> Float[Tensor, "batch _"]:
    """Return a metric's value as [batch, n] in float64. Raises MetricError if it is not that."""
    n = len(batch.index)
    valid = isinstance(value, Tensor) and value.ndim in (1, 2) and value.shape[0] == n
    if not valid or value.numel() == 0:
        came = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise MetricError(
            f"the metric {name} must return one number per prompt, [{n}], or several, [{n}, any]; "
            f"got {came}. Do not average over prompts: the intervals are over prompts"
        )
    values = value.detach().double().cpu().view(n, -1)
    if not bool(values.isfinite().all()):
        prompt, of = (~values.isfinite()).nonzero()[0].tolist()
        raise MetricError(
            f"the metric {name} gave {float(values[prompt, of])} for prompt "
            f"{int(batch.index[prompt])} under {label}; expected finite numbers"
        )
    return values
