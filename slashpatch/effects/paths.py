"""Paths: which heads read what an edit changes, and by which of their inputs.

The edge from an edited layer to one input of one later head: the edited layer's attention output,
minus the clean one, is added to what that head's query, key or value is made from, and to nothing
else. Every other reader still sees the clean output. Exact, norms included (path patching; Wang et
al., arXiv 2211.00593). TransformerLens' `get_act_patch_direct_path` does the same for a mean over
prompts, and for q alone under grouped-query attention; here a query head gets a pattern (or z) of
its own, so that its group is left alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from .. import bridge
from ..bridge.attached import has_per_head_keys
from ..bridge.modes import forming_matrices
from ..bridge.passes import leaving_no_trace
from ..bridge.prefix_cache import PrefixCache
from ..bridge.provenance import provenance
from ..data.progress import progress_over
from ..edits import AblateHeads, Edit
from ..errors import EditError, HeadError, ModelError
from ..heads import Head
from ..patching.patch import patch
from .conditions import Condition, conditions, require_options
from .evaluation import Meter, Taken
from .inputs import batches, prompts_for
from .metrics import as_metric
from .result import Result
from .statistics import compared, false_discovery

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

INPUTS = ("q", "k", "v")


def paths(
    model: TransformerBridge,
    edit: Any,
    readers: Any = None,
    metric: Any = "copying",
    prompts: Any = None,
    *,
    inputs: str = "qkv",
    random_tokens: bool = False,
    n_prompts: int = 16,
    max_tokens: int | None = 65,
    batch_size: int | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """The effect of an edit through one input of one later head at a time.

    Args:
        model: A TransformerBridge; active patches are part of "clean".
        edit: Of heads of one layer; a head stands for its ablation.
        readers: Later heads to try; None for all, which takes three passes for each.
        metric: A name, function or object that gives one number per prompt.
        prompts: As for `measure`; None: repeated random tokens for metrics of copying.
        inputs: Which of q, k and v.
        random_tokens: Uniform random tokens instead of natural text.
        n_prompts: How many; the unit of intervals.
        max_tokens: Length of prompts that are made here.
        batch_size: Prompts per pass; picked by memory when None.
        confidence: Of the intervals.
        seed: Of prompts, resamples and sign flips.
        progress: Whether to show a bar; when None, on a terminal only.

    Returns:
        A Result; `frame` has a row per reader and input, the largest effect first, after the row
        "all" of the edit itself: what its direct edges here and all others do together.

    Raises:
        EditError for edits of several layers or of the last; HeadError for readers that are not
        later; ModelError for layers whose queries and keys cannot be read; MetricError.
    """
    require_options(seed, confidence, n_prompts=n_prompts, batch_size=batch_size)
    edits = _edits(edit)
    layer = edits[0].layers[0]
    meter = Meter(model, [as_metric(metric)])
    info = meter.info
    for one in edits:
        one.validate(info)
    wanted = _readers(info, readers, layer)
    if not inputs or set(inputs) - set(INPUTS):
        raise EditError(f"inputs are some of q, k and v, such as 'qk'; got {inputs!r}")
    if has_per_head_keys(model):
        raise EditError(
            "paths needs a model without active edits that give heads keys of their own; "
            "leave those patches first"
        )
    layers = bridge.read(model).qk
    found = prompts_for(
        model,
        meter.metrics,
        prompts,
        random_tokens=random_tokens,
        n_prompts=n_prompts,
        max_tokens=max_tokens,
        seed=seed,
    )
    todo = batches(found, model.cfg.d_vocab, batch_size, model.cfg.device)
    order = torch.cat([batch.index for batch in todo]).argsort()
    edges = [(head, of) for head in wanted for of in INPUTS if of in inputs]
    total = Condition(tuple(edits))
    taken: dict[Any, list[Tensor]] = {"clean": [], "all": [], **{edge: [] for edge in edges}}
    ready: list[tuple[PrefixCache, Tensor, Taken]] = []
    for batch in todo:
        prefix = PrefixCache(model, batch.tokens)
        (values,), clean = meter.run(batch, None, Condition())
        taken["clean"].append(values)
        prefix.advance(layer)
        change = _change(model, meter, prefix, batch.tokens, edits)
        with patch(model, *edits), prefix.skipped():
            (values,), _ = meter.run(batch, clean, total, from_layer=layer)
        taken["all"].append(values)
        ready.append((prefix, change, clean))
    by_layer = {
        d: [edge for edge in edges if edge[0].layer == d] for d in {h.layer for h in wanted}
    }
    steps = [(d, place) for d in sorted(by_layer) for place in range(len(todo))]
    work = [len(by_layer[d]) for d, _ in steps]
    for d, place in progress_over(steps, "trying paths", show=progress, n=work):
        batch, (prefix, change, clean) = todo[place], ready[place]
        prefix.advance(d)
        edge = _Layer(meter, layers[d], prefix, batch.tokens, change)
        for (head, of), hook in edge.hooks(by_layer[d]):
            with prefix.skipped():
                (values,), _ = meter.run(batch, clean, f"{total} by {of} of {head}", [hook], d)
            taken[head, of].append(values)
    return _result(taken, edges, order, total, meter, found, confidence, seed)


def _edits(edit: Any) -> list[Edit]:
    if isinstance(edit, Head) or (isinstance(edit, str) and "(" not in edit):
        edit = AblateHeads(edit)
    (condition,) = conditions([edit])
    layers = sorted({layer for one in condition.edits for layer in one.layers})
    if len(layers) > 1:
        raise EditError(f"a path starts in one layer; {condition} edits layers {layers}")
    return list(condition.edits)


def _readers(info: bridge.ModelInfo, readers: Any, layer: int) -> list[Head]:
    if layer == info.n_layers - 1:
        raise EditError(f"no head reads what layer {layer} gives: it is the last")
    if readers is None:
        later = range(layer + 1, info.n_layers)
        return [Head(d, head) for d in later for head in range(info.n_heads)]
    found = sorted(info.require(readers))
    if not found:
        raise HeadError("no readers were given; expected at least one head, or None for all")
    early = [head for head in found if head.layer <= layer]
    if early:
        raise HeadError(f"{early[0]} does not read layer {layer}: expected heads of later layers")
    return found


def _change(
    model: TransformerBridge, meter: Meter, prefix: PrefixCache, tokens: Tensor, edits: list[Edit]
) -> Float[Tensor, "batch pos d_model"]:
    """What the edits add to the residual stream by their layer's attention itself."""
    layer, taken = edits[0].layers[0], []
    hook = (meter.info.hook(layer, "output"), lambda x, hook: taken.append(x.detach()))
    for edited in (False, True):
        with patch(model, *edits) if edited else nullcontext(), prefix.skipped():
            _until(model, meter, tokens, layer, [hook])
    if len(taken) != 2:
        raise ModelError(f"{hook[0]} did not fire once a pass; paths cannot be read off this model")
    return taken[1] - taken[0]


def _until(
    model: TransformerBridge, meter: Meter, tokens: Tensor, layer: int, hooks: list[Any]
) -> None:
    """A pass that ends after `layer`."""
    last = layer == meter.info.n_layers - 1
    kwargs: dict[str, Any] = {} if last else {"stop_at_layer": layer + 1}
    with leaving_no_trace(model), forming_matrices():
        model.run_with_hooks(tokens, fwd_hooks=hooks, return_type=None, **kwargs)


@dataclass
class _Layer:
    """One layer of readers: what their pattern or z would be with one input changed."""

    meter: Meter
    qk: Any
    prefix: PrefixCache
    tokens: Tensor
    change: Float[Tensor, "batch pos d_model"]

    def hooks(self, edges: list[tuple[Head, str]]) -> Iterator[tuple[Any, tuple[str, Any]]]:
        """For each edge, the hook that makes the head read through it."""
        info, layer = self.meter.info, self.qk.layer
        pattern, z = info.hook(layer, "pattern"), info.hook(layer, "z")
        names = {"q": self.qk.q.name, "k": self.qk.k.name, "pattern": pattern}
        clean = self._run(names, {})
        kept = {"q": "k", "k": "q", "v": "pattern"}
        for of in INPUTS:
            heads = [head for head, wanted in edges if wanted == of]
            if not heads:
                continue
            name = z if of == "v" else pattern
            held = {names[kept[of]]: clean[kept[of]]}
            (made,) = self._run({of: name}, held, self.change).values()
            for head in heads:
                yield (head, of), (name, _putting(made, head.head, 2 if of == "v" else 1))

    def _run(
        self, wanted: dict[str, str], held: dict[str, Tensor], change: Tensor | None = None
    ) -> dict[str, Tensor]:
        """What hooks carry while the layer's input is changed and some hooks are held as given."""
        taken: dict[str, Tensor] = {}
        hooks: list[tuple[str, Any]] = []
        if change is not None:
            hooks.append((self.meter.info.hook(self.qk.layer, "block"), lambda x, hook: x + change))
        for name, value in held.items():
            hooks.append((name, lambda x, hook, value=value: value))
        for key, name in wanted.items():

            def take(x: Tensor, hook: Any, key: str = key) -> None:
                taken[key] = x.detach()

            hooks.append((name, take))
        with self.prefix.skipped():
            _until(self.meter.model, self.meter, self.tokens, self.qk.layer, hooks)
        missing = [name for key, name in wanted.items() if key not in taken]
        if missing:
            raise ModelError(f"the hook {missing[0]} did not fire; paths cannot be read there")
        return taken


def _putting(made: Tensor, head: int, axis: int) -> Any:
    def put(x: Tensor, hook: Any) -> Tensor:
        whole = x.clone()
        index = (slice(None),) * axis + (head,)
        whole[index] = made[index]
        return whole

    return put


def _result(
    taken: dict[Any, list[Tensor]],
    edges: list[tuple[Head, str]],
    order: Tensor,
    total: Condition,
    meter: Meter,
    prompts: Any,
    confidence: float,
    seed: int,
) -> Result:
    import pandas as pd

    clean = torch.cat(taken["clean"])[order]
    if clean.shape[1] != 1:
        raise EditError(f"paths takes a metric with one number per prompt, not {meter.names[0]}")
    after = torch.cat([torch.cat(taken[key])[order] for key in ("all", *edges)], dim=1)
    said = compared(clean.expand_as(after), after, seed, confidence)
    frame = pd.DataFrame(
        {
            "reader": ["all", *(str(head) for head, _ in edges)],
            "input": ["", *(of for _, of in edges)],
            "metric": meter.names[0],
            "n": len(clean),
            **{name: values.numpy() for name, values in said.items()},
            "q": false_discovery(said["p"]).numpy(),
        }
    )
    first, rest = frame.iloc[:1], frame.iloc[1:]
    rest = rest.sort_values("effect", key=lambda e: -e.abs(), kind="stable")
    details = {
        "measured": [str(total)],
        "prompts": prompts.record,
        "confidence": confidence,
        "seed": seed,
    }
    frame = pd.concat([first, rest], ignore_index=True)
    return Result("paths", frame, provenance=provenance(meter.model, **details))
