"""Activation patching: put some heads' activations of a clean run into a corrupt one, or back.

Denoising (clean into corrupt) asks what is sufficient, noising (corrupt into clean) what is
necessary (Heimersheim & Nanda, arXiv 2404.15255). The metric is the logit difference between the
right and the wrong answer (Zhang & Nanda, arXiv 2309.16042).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..bridge.prefix_cache import PrefixCache
from ..bridge.provenance import provenance
from ..data.progress import progress_over
from ..data.prompts import PromptSet
from ..errors import EditError, PromptError
from .between_runs.pairs import Pairs, as_pairs
from .between_runs.swapped_activations import Kept, keeping, putting
from .between_runs.targets import Target, Together, targets
from .metrics.logits import LogitDifference
from .ratios import ratio_of_means
from .result import Result
from .running.conditions import Condition, require_options
from .running.evaluation import MetricRunner
from .running.inputs import Batch, batches
from .statistics import adjusted, compared, few_prompts, interval

if TYPE_CHECKING:
    import pandas as pd
    from transformer_lens.model_bridge import TransformerBridge

#: By direction: the run that is patched, and the one that the activations come from.
DIRECTIONS = {"denoising": ("corrupt", "clean"), "noising": ("clean", "corrupt")}


def activation_patching(
    model: TransformerBridge,
    heads: Any,
    pairs: Any = None,
    *,
    parts: Any = None,
    offsets: Any = None,
    directions: Any = ("denoising", "noising"),
    n_prompts: int = 16,
    n_tokens: int = 25,
    batch_size: int | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """Measure what heads, their q, k or v, or single diagonals carry, between two prompts.

    A patched head, or part of it, has at every position the activations of the same head and
    position in the other run:

    - z: the head's output, before W_O.
    - q, k: queries or keys before RoPE and after any norm, of this query head alone.
    - v: values of this query head alone; its pattern is that of the patched run.
    - diagonal of offset Δ: z_i gains p'_{i,i−Δ} v'_{i−Δ} − p_{i,i−Δ} v_{i−Δ}, where p' and v' are
      the other run's pattern and values. The rest of the row stays, and is not renormalised.

    Args:
        model: A TransformerBridge; active patches are part of both runs.
        heads: What to patch, each alone; what is in a nested list, together. Heads in any form,
            "L16H0.k" for a part, "L16H0@1", (head, 1) or `KnockOut(heads, 1)` for diagonals.
        pairs: `Pairs`, or a .jsonl or .csv file of clean, corrupt, right and wrong; None:
            `copying_pairs`.
        parts: For heads without a part: some of z, q, k, v and diagonal, each alone; None: z, or
            the diagonals of `offsets`.
        offsets: For heads without a part: the offsets of their diagonals, each alone.
        directions: "denoising" (clean activations into the corrupt run), "noising" (corrupt ones
            into the clean run), or both.
        n_prompts: Number of copying pairs.
        n_tokens: Length of their first copy.
        batch_size: Pairs per forward pass; None: by memory.
        confidence: Level of the intervals.
        seed: Random seed of copying pairs, bootstrap resamples and sign flips.
        progress: Whether to show a progress bar; None: on a terminal only.

    Returns:
        A Result with a row per item of `heads` and direction. `baseline` and `edited` are the mean
        logit difference, right − wrong, of the unpatched and the patched run; `effect` is their
        paired difference. `normalized` is that effect as a share of the whole difference between
        the two runs: 0 is the unpatched run, 1 the other run (ratio of means over the pairs, with
        its interval; NaN where the two runs do not differ). `tables` has each pair's `values`.

    Raises:
        EditError: Targets that are misspelt, twice there or do not go together.
        HeadError, OffsetError: Heads or offsets that the model has not.
        PromptError: Pairs that do not fit the model.
        ModelError: A model whose queries, keys or values cannot be read.
    """
    require_options(seed, confidence, n_prompts=n_prompts, batch_size=batch_size)
    wanted = _directions(directions)
    chosen = as_pairs(model, pairs, n_prompts=n_prompts, n_tokens=n_tokens, seed=seed)
    runner = MetricRunner(model, [LogitDifference(chosen.right, chosen.wrong, chosen.position)])
    groups = targets(runner.info, heads, parts, offsets)
    _require_lengths(groups, chosen)
    run = _Run(runner, groups, wanted)
    made = batches(
        PromptSet(chosen.clean, chosen.source), model.cfg.d_vocab, batch_size, model.cfg.device
    )
    steps = [len(wanted) * len(groups)] * len(made)
    for batch in progress_over(made, "patching pairs", show=progress, n=steps):
        run.add(batch, chosen)
    order = torch.cat([batch.index for batch in made]).argsort()
    values = {key: torch.cat(parts)[order, 0] for key, parts in run.values.items()}
    details = {
        "measured": [str(group) for group in groups],
        "metric": "logit difference",
        "prompts": chosen.record,
        "confidence": confidence,
        "seed": seed,
    }
    rows = [
        _row(group, direction, values, seed, confidence) for group in groups for direction in wanted
    ]
    return Result(
        "pairs",
        adjusted(rows),
        {"values": _values(values, groups, wanted)},
        _remarks(values, seed, confidence),
        provenance(model, **details),
    )


class _Run:
    """The forward passes of activation patching.

    Attributes:
        values: Logit differences by "clean" or "corrupt", or by (group, direction); one tensor
            [batch, 1] for each batch.
    """

    def __init__(
        self, runner: MetricRunner, groups: Sequence[Together], directions: Sequence[str]
    ) -> None:
        self.runner, self.directions = runner, directions
        self.groups = sorted(groups, key=lambda group: group.first_layer)
        self.targets: list[Target] = sorted({t for group in groups for t in group.targets})
        self.values: dict[Any, list[Tensor]] = {}

    def add(self, batch: Batch, pairs: Pairs) -> None:
        """Run one batch of clean prompts, their corrupt ones, and all patches between them."""
        corrupt = torch.stack([pairs.corrupt[at] for at in batch.index.tolist()])
        runs = {
            "clean": batch,
            "corrupt": Batch(batch.index, corrupt.to(batch.tokens.device), batch.n_prompts),
        }
        kept: dict[str, Kept] = {"clean": {}, "corrupt": {}}
        for name, of_run in runs.items():
            # Without keys of their own, and so exactly as the model runs without slashpatch.
            self._evaluate(of_run, name, name, [])
            if any(DIRECTIONS[direction][1] == name for direction in self.directions):
                with keeping(self.runner.model, self.targets, kept[name]) as hooks:
                    self.runner.run(of_run, None, f"the {name} run", hooks)
        for direction in self.directions:
            patched, other = DIRECTIONS[direction]
            prefix = PrefixCache(self.runner.model, runs[patched].tokens)
            for group in self.groups:
                prefix.advance(group.first_layer)
                with (
                    putting(self.runner.model, group, kept[other]) as hooks,
                    prefix.skipped(),
                ):
                    label = f"{direction} of {group}"
                    self._evaluate(runs[patched], (group, direction), label, hooks)

    def _evaluate(self, batch: Batch, key: Any, label: str, hooks: list[tuple[str, Any]]) -> None:
        (values,), _ = self.runner.run(batch, None, Condition() if not hooks else label, hooks)
        self.values.setdefault(key, []).append(values)


def _directions(given: Any) -> tuple[str, ...]:
    """Return the directions. Raises EditError for others."""
    names = (given,) if isinstance(given, str) else tuple(given)
    if not names or set(names) - set(DIRECTIONS):
        raise EditError(f"directions must be some of {', '.join(DIRECTIONS)}; got {given!r}")
    return tuple(name for name in DIRECTIONS if name in names)


def _require_lengths(groups: Sequence[Together], pairs: Pairs) -> None:
    """Raise PromptError for a diagonal that a prompt is too short for."""
    shortest = min(map(len, pairs.clean))
    most = max((offset for group in groups for offset in group.offsets), default=0)
    if most >= shortest:
        raise PromptError(
            f"a diagonal of offset {most} needs prompts of at least {most + 1} tokens; the "
            f"shortest has {shortest}"
        )


def _row(
    group: Together, direction: str, values: dict[Any, Tensor], seed: int, confidence: float
) -> dict[str, Any]:
    """Return the row of one group and direction, from the logit differences of each pair."""
    patched, other = (values[name] for name in DIRECTIONS[direction])
    after = values[group, direction]
    columns = compared(patched[:, None], after[:, None], seed, confidence)
    ratio, low, high = ratio_of_means(after - patched, other - patched, seed, confidence)
    return {
        "patched": str(group),
        "part": group.parts,
        "direction": direction,
        "metric": "logit difference",
        "n": len(after),
        **{name: float(column[0]) for name, column in columns.items()},
        "normalized": ratio,
        "normalized_low": low,
        "normalized_high": high,
    }


def _values(
    values: dict[Any, Tensor], groups: Sequence[Together], directions: Sequence[str]
) -> pd.DataFrame:
    """Return the logit differences of each pair: of both runs, and of each patched run."""
    import pandas as pd

    keys: list[Any] = ["clean", "corrupt", *((g, d) for g in groups for d in directions)]
    rows = [
        (*((key, "") if isinstance(key, str) else (str(key[0]), key[1])), prompt, value)
        for key in keys
        for prompt, value in enumerate(values[key].tolist())
    ]
    return pd.DataFrame(rows, columns=["patched", "direction", "prompt", "value"])


def _remarks(values: dict[Any, Tensor], seed: int, confidence: float) -> tuple[str, ...]:
    """Return what is known of the two unpatched runs, and whether a patch can tell anything."""
    clean, corrupt = values["clean"], values["corrupt"]
    few = few_prompts(len(clean))
    right, wrong = float((clean > 0).double().mean()), float((corrupt < 0).double().mean())
    said = [
        f"logit difference, right − wrong: {float(clean.mean()):+.3f} in the clean run, "
        f"{float(corrupt.mean()):+.3f} in the corrupt run; each run prefers its own answer in "
        f"{right:.0%} and {wrong:.0%} of the pairs"
    ]
    low, high = (float(end) for end in interval(clean - corrupt, seed, confidence))
    if low <= 0 <= high:
        said.append(
            "the two runs do not differ clearly on these pairs, so nothing is normalized: choose "
            "pairs that the model answers"
        )
    return (*few, *said)
