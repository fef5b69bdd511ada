"""Runs a model with and without edits on the same prompts, and keeps each prompt's numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import anatomy as anatomies
from .. import rope
from ..anatomy import Anatomy
from ..edits import Edit
from ..errors import EditError, MetricError, PromptError
from ..fused import reads_diagonals
from ..heads import Head
from ..patching import as_edit, patch
from ..prompts import PromptSet, as_path, prompt_set, repeated_random_tokens
from ..report.progress import progress_over
from .metrics import Metric, kept_positions, metric_name, needs_copies, wanted

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

#: Bytes of logits that one pass may make, and that the intact model's may take while they wait.
_LOGIT_BYTES = 256 * 2**20
_KEPT_BYTES = 1024 * 2**20


@dataclass(frozen=True)
class Condition:
    """Edits that act together; none: the model as it is."""

    edits: tuple[Edit, ...] = ()

    def __str__(self) -> str:
        return " then ".join(map(str, self.edits)) or "intact"


def conditions(edits: Any) -> tuple[Condition, ...]:
    """Each member of a list is a condition of its own; those of a nested list act together.

    Raises EditError for anything that is no edit, for none, or for the same condition twice.
    """
    if isinstance(edits, (Edit, str)):
        edits = [edits]
    if not isinstance(edits, (list, tuple)) or not edits:
        raise EditError(f"expected an edit such as KnockOut('L16H0', 1), or several; got {edits!r}")
    found = []
    for member in edits:
        together = member if isinstance(member, (list, tuple)) else [member]
        found.append(Condition(tuple(as_edit(one) for one in together)))
        if not found[-1].edits:
            raise EditError("a condition is without edits; leave it out, intact is always measured")
    names = [str(one) for one in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise EditError(f"{twice} is given twice")
    return tuple(found)


def require_options(seed: Any, confidence: Any, **counts: Any) -> None:
    """Raise MetricError for a seed, a level or a number that is none, before anything runs."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise MetricError(f"seed is an integer; got {seed!r}")
    number = isinstance(confidence, (int, float)) and not isinstance(confidence, bool)
    if not number or not 0 < confidence < 1:
        raise MetricError(f"confidence is between 0 and 1, such as 0.95; got {confidence!r}")
    for name, count in counts.items():
        whole = isinstance(count, int) and not isinstance(count, bool)
        if count is not None and (not whole or count < 1):
            raise PromptError(f"{name} is an integer from 1; got {count!r}")


def prompts_for(
    model: TransformerBridge,
    metrics: Sequence[Metric],
    prompts: Any,
    *,
    max_tokens: int | None,
    **options: Any,
) -> PromptSet:
    """The prompts given; else repeated random tokens where a metric needs them, or natural text.

    `max_tokens`, at most the model's context, is the length of prompts that are made here or of
    pieces of a file; texts and tokens of the user's are taken whole. `options` are those of
    `prompt_set`. Raises PromptError; a prompt of one token has no next one.
    """
    if prompts is not None and as_path(prompts) is None:
        max_tokens = None
    elif max_tokens is not None:
        max_tokens = min(max_tokens, model.cfg.n_ctx)
    if prompts is None and any(map(needs_copies, metrics)) and not options.get("random_tokens"):
        n_tokens = ((max_tokens or model.cfg.n_ctx) - 1) // 2
        found = repeated(model, options["n_prompts"], n_tokens, options["seed"])
    else:
        found = prompt_set(model, prompts, max_tokens=max_tokens, **options)
    if min(len(tokens) for tokens in found.tokens) < 2:
        raise PromptError("a prompt has one token only; nothing is predicted there")
    return found


def repeated(model: TransformerBridge, n_prompts: int, n_tokens: int, seed: int) -> PromptSet:
    """`n_tokens` random tokens twice over. Raises PromptError where two copies do not fit."""
    if n_prompts < 1 or n_tokens < 2 or 2 * n_tokens >= model.cfg.n_ctx:
        raise PromptError(
            f"expected at least 1 prompt, and 2 to {(model.cfg.n_ctx - 1) // 2} tokens so that two "
            f"copies fit the context; got {n_prompts} prompts of {n_tokens} tokens"
        )
    rows = repeated_random_tokens(model, n_prompts, n_tokens, seed)
    return PromptSet(tuple(rows), f"random tokens twice over, seed {seed}")


@dataclass(frozen=True)
class Batch:
    """Prompts of one length that go through the model together."""

    index: Int[Tensor, "batch"]
    tokens: Int[Tensor, "batch pos"]
    n_prompts: int

    def repeated(self, n: int) -> Batch:
        """The same prompts n times over."""
        return replace(self, index=self.index.repeat(n), tokens=self.tokens.repeat(n, 1))


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


def batches(prompts: PromptSet, d_vocab: int, batch_size: int | None, device: Any) -> list[Batch]:
    """Prompts by length, as many together as memory for their logits allows. Nothing is padded."""
    lengths: dict[int, list[int]] = {}
    for index, tokens in enumerate(prompts.tokens):
        lengths.setdefault(len(tokens), []).append(index)
    found = []
    for length, indices in sorted(lengths.items()):
        most = batch_size or max(1, _LOGIT_BYTES // (4 * d_vocab * length))
        for chunk in torch.tensor(indices).split(most):
            rows = torch.stack([prompts.tokens[index] for index in chunk.tolist()])
            found.append(Batch(chunk, rows.to(device), len(prompts.tokens)))
    return found


class Meter:
    """Reads metrics off passes of one model, and checks what they give."""

    def __init__(self, model: TransformerBridge, metrics: Sequence[Metric]) -> None:
        self.model = model
        self.anatomy: Anatomy = anatomies.read(model)
        self.metrics = tuple(metrics)
        if not self.metrics:
            raise MetricError("no metric was given; expected at least one, such as 'loss'")
        self.names = [metric_name(metric) for metric in self.metrics]
        twice = next((name for name in self.names if self.names.count(name) > 1), None)
        if twice is not None:
            raise MetricError(f"two metrics are called {twice!r}; name functions apart")
        self.compares = any(
            "intact" in wanted(metric) for metric in self.metrics if not hasattr(metric, "read")
        )
        every = [
            Head(layer, head)
            for layer in range(self.anatomy.n_layers)
            for head in range(self.anatomy.n_heads)
        ]
        self.heads: dict[int, list[Head]] = {
            place: every if metric.heads is None else list(self.anatomy.require(metric.heads))
            for place, metric in enumerate(self.metrics)
            if hasattr(metric, "read")
        }

    def logits(
        self, tokens: Int[Tensor, "batch pos"], hooks: Sequence[tuple[str, Any]] = ()
    ) -> Float[Tensor, "batch kept d_vocab"]:
        """One forward pass, without what no metric needs: a KV cache, or all positions' logits."""
        saving = {"use_cache": False, "logits_to_keep": kept_positions(self.metrics, tokens)}
        kwargs: dict[str, Any] = {name: saving[name] for name in self.anatomy.kwargs}
        with rope.leaving_no_trace(self.model):
            return self.model.run_with_hooks(tokens, fwd_hooks=list(hooks), **kwargs)

    def run(
        self,
        batch: Batch,
        intact: Taken | None,
        what: Any,
        hooks: Sequence[tuple[str, Any]] = (),
        from_layer: int = 0,
    ) -> tuple[list[Float[Tensor, "batch _"]], Taken]:
        """Each metric's values on a batch; `intact` None: this is the intact run.

        `what` names the run in messages; `hooks` act before attention is read; layers before
        `from_layer` are not run again, and their attention is the intact one. Raises MetricError.
        """
        known = {} if intact is None else intact.read
        read = {at: values for at, values in known.items() if at[1] < from_layer}
        logits = self.logits(batch.tokens, [*hooks, *self._attention_hooks(batch.tokens, read)])
        given = {
            "logits": logits,
            "tokens": batch.tokens,
            "intact": logits if intact is None else intact.logits,
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

                yield self.anatomy.hook(layer, "pattern"), take

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
    """Values of each metric under the intact model and then each condition, on the same prompts."""
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
    """Batches whose intact logits fit memory together; all of them where none are kept."""
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
