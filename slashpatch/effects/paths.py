"""Path patching: which later heads read what an edit changes, through query, key or value.

A path leads from the edited layer to one input (q, k or v) of one later head. The change of the
edited layer's attention output is added to the residual stream from which that one input is
computed; every other head and every MLP still reads that layer's clean output. Exact, norms
included (Wang et al., arXiv 2211.00593). TransformerLens' `get_act_patch_direct_path` does the same
for a mean over prompts, and under grouped-query attention for q only. Here each path replaces the
pattern (or z) of a single query head, so the other heads of its KV group stay clean.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from .. import bridge
from ..bridge.attached import has_per_head_keys
from ..bridge.prefix_cache import PrefixCache
from ..bridge.provenance import provenance
from ..data.heads import Head
from ..data.progress import progress_over
from ..data.prompts import PromptSet
from ..edits import AblateHeads, Edit
from ..errors import EditError, HeadError, ModelError
from ..patching.patch import patch
from .metrics.by_name import as_metric
from .result import Result
from .running.conditions import Condition, conditions, require_options
from .running.evaluation import MetricRunner, RunOutputs
from .running.inputs import batches, prompts_for
from .running.reader_layer import INPUTS, ReaderLayer, run_until
from .statistics import compared, false_discovery, few_prompts, largest

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


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
    max_tokens: int | None = None,
    batch_size: int | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """Measure the effect of an edit through one input of one later head at a time.

    Args:
        model: A TransformerBridge; active patches are part of the clean run.
        edit: An edit of heads of one layer; a head stands for its zero ablation.
        readers: Later heads to try; None for all. Each takes one forward pass per input.
        metric: A name, function or object that gives one number per prompt.
        prompts: As for `measure`; None: natural text, or repeated random tokens for copying
            metrics.
        inputs: Which of q, k and v to try, such as "qk".
        random_tokens: Use uniform random tokens instead of natural text.
        n_prompts: Number of prompts, which are the unit of the intervals.
        max_tokens: Length of generated prompts, at most the model's context; None: 65, or the
            context if that is shorter.
        batch_size: Prompts per forward pass; None: by memory.
        confidence: Level of the intervals.
        seed: Random seed of prompts, bootstrap resamples and halves.
        progress: Whether to show a progress bar; None: on a terminal only.

    Returns:
        A Result. The first row of `frame`, "all", is the total effect of the edit, through all
        paths. Then follows a row per reader and input, the largest effect first. A remark names the
        reader and input that is largest on one half of the prompts, and its effect on the other.

    Raises:
        EditError: Edits of several layers or of the last layer, or active edits that use per-head
            keys.
        HeadError: Readers that are not in later layers.
        ModelError: Layers whose queries and keys cannot be read.
        MetricError: A metric that is misspelt or gives something else than finite numbers.
    """
    require_options(seed, confidence, n_prompts=n_prompts, batch_size=batch_size)
    edits = _edits(edit)
    layer = edits[0].layers[0]
    runner = MetricRunner(model, [as_metric(metric)])
    info = runner.info
    for active in edits:
        active.validate(info)
    wanted = _readers(info, readers, layer)
    if not inputs or set(inputs) - set(INPUTS):
        raise EditError(f"inputs must be some of q, k and v, such as 'qk'; got {inputs!r}")
    if has_per_head_keys(model):
        raise EditError(
            "the model has active edits that use per-head keys, which paths does not support; "
            "leave their patches first"
        )
    layers = info.qk
    chosen = prompts_for(
        model,
        runner.metrics,
        prompts,
        random_tokens=random_tokens,
        n_prompts=n_prompts,
        max_tokens=max_tokens,
        default=65,
        seed=seed,
    )
    all_batches = batches(chosen, model.cfg.d_vocab, batch_size, model.cfg.device)
    order = torch.cat([batch.index for batch in all_batches]).argsort()
    edges = [(head, of) for head in wanted for of in INPUTS if of in inputs]
    total = Condition(tuple(edits))
    parts: dict[Any, list[Tensor]] = {"clean": [], "all": [], **{edge: [] for edge in edges}}
    ready: list[tuple[PrefixCache, Tensor, RunOutputs]] = []
    for batch in all_batches:
        prefix = PrefixCache(model, batch.tokens)
        (values,), clean = runner.run(batch, None, Condition())
        parts["clean"].append(values)
        prefix.advance(layer)
        change = _change(runner, prefix, batch.tokens, edits)
        with patch(model, *edits), prefix.skipped():
            (values,), _ = runner.run(batch, clean, total, from_layer=layer)
        parts["all"].append(values)
        ready.append((prefix, change, clean))
    by_layer = {
        d: [edge for edge in edges if edge[0].layer == d] for d in {h.layer for h in wanted}
    }
    steps = [(d, place) for d in sorted(by_layer) for place in range(len(all_batches))]
    work = [len(by_layer[d]) for d, _ in steps]
    for d, place in progress_over(steps, "trying paths", show=progress, n=work):
        batch, (prefix, change, clean) = all_batches[place], ready[place]
        prefix.advance(d)
        readers_of_layer = ReaderLayer(runner, layers[d], prefix, batch.tokens, change)
        for (head, of), hook in readers_of_layer.hooks(by_layer[d]):
            with prefix.skipped():
                (values,), _ = runner.run(batch, clean, f"{total} by {of} of {head}", [hook], d)
            parts[head, of].append(values)
    return _result(parts, edges, order, total, runner, chosen, confidence, seed)


def _edits(edit: Any) -> list[Edit]:
    """Return the edits that act together. Raises EditError unless they are all in one layer."""
    if isinstance(edit, Head) or (isinstance(edit, str) and "(" not in edit):
        edit = AblateHeads(edit)
    (condition,) = conditions([edit])
    layers = sorted({layer for edit in condition.edits for layer in edit.layers})
    if len(layers) > 1:
        raise EditError(f"a path starts in one layer, but {condition} edits layers {layers}")
    return list(condition.edits)


def _readers(info: bridge.ModelInfo, readers: Any, layer: int) -> list[Head]:
    """Return the heads that can read the output of `layer`; all heads of later layers if None."""
    if layer == info.n_layers - 1:
        raise EditError(f"no head reads the output of layer {layer}, which is the last layer")
    if readers is None:
        return [head for head in info.heads if head.layer > layer]
    wanted = sorted(info.require(readers))
    if not wanted:
        raise HeadError("no readers were given; expected at least one head, or None for all")
    early = [head for head in wanted if head.layer <= layer]
    if early:
        raise HeadError(f"{early[0]} does not read layer {layer}; expected heads of later layers")
    return wanted


def _change(
    runner: MetricRunner, prefix: PrefixCache, tokens: Tensor, edits: list[Edit]
) -> Float[Tensor, "batch pos d_model"]:
    """Return the change of the edited layer's attention output, edited − clean."""
    layer = edits[0].layers[0]
    outputs: list[Tensor] = []
    hook = (runner.info.hook(layer, "output"), lambda x, hook: outputs.append(x.detach()))
    for edited in (False, True):
        with patch(runner.model, *edits) if edited else nullcontext(), prefix.skipped():
            run_until(runner, tokens, layer, [hook])
    if len(outputs) != 2:
        raise ModelError(
            f"the hook {hook[0]} fired {len(outputs)} times in two forward passes; paths needs it "
            "once in each"
        )
    return outputs[1] - outputs[0]


def _result(
    parts: dict[Any, list[Tensor]],
    edges: list[tuple[Head, str]],
    order: Tensor,
    total: Condition,
    runner: MetricRunner,
    prompts: PromptSet,
    confidence: float,
    seed: int,
) -> Result:
    """Return the table of all paths, from the values of each run, batch by batch."""
    import pandas as pd

    clean = torch.cat(parts["clean"])[order]
    if clean.shape[1] != 1:
        raise EditError(f"paths needs a metric with one number per prompt, not {runner.names[0]}")
    after = torch.cat([torch.cat(parts[key])[order] for key in ("all", *edges)], dim=1)
    columns = compared(clean.expand_as(after), after, seed, confidence)
    frame = pd.DataFrame(
        {
            "reader": ["all", *(str(head) for head, _ in edges)],
            "input": ["", *(of for _, of in edges)],
            "metric": runner.names[0],
            "n": len(clean),
            **{name: values.numpy() for name, values in columns.items()},
            "q": false_discovery(columns["p"]).numpy(),
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
    names = [f"{of} of {head}" for head, of in edges]
    remarks = largest(names, after[:, 1:] - clean, seed, confidence) + few_prompts(len(clean))
    return Result("paths", frame, {}, remarks, provenance(runner.model, **details))
