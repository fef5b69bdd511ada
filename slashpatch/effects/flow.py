"""Flow: how much replacing the token i−Δ changes the prediction at token i."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..bridge.provenance import provenance
from ..bridge.workers.options import Workers, as_workers
from ..data.prompts import PromptSet
from ..errors import PromptError
from ..maths.offsets import as_offsets
from ..patching.patch import patch
from ..patching.worker_pool import units_of
from .metrics.logits import kl_divergence, next_token_loss
from .result import Result
from .running.conditions import Condition, conditions, require_options
from .running.evaluation import MetricRunner
from .running.inputs import batches, prompts_for
from .statistics import adjusted, compared, few_prompts, interval, least_p

if TYPE_CHECKING:
    import pandas as pd
    from transformer_lens.model_bridge import TransformerBridge

#: Remarks name an effect if its adjusted p-value is below the level, and its size at least this
#: share of the largest clean flow. *Ours*.
_LEVEL, _SHARE = 0.05, 0.01


@dataclass(frozen=True)
class ReplacedTokens:
    """A prompt and its variants, in each of which one token is replaced by another.

    Attributes:
        positions: Position of the replaced token in each variant.
        tokens: The prompt, and below it the variants.
    """

    positions: Int[Tensor, "variant"]
    tokens: Int[Tensor, "variant+1 pos"]


def flow(
    model: TransformerBridge,
    prompts: Any = None,
    edits: Any = (),
    offsets: Any = range(1, 17),
    *,
    random_tokens: bool = False,
    n_replaced: int = 16,
    n_prompts: int = 16,
    max_tokens: int | None = None,
    batch_size: int | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool | None = None,
    workers: int | str | Workers | None = None,
) -> Result:
    """Measure how much the token i−Δ moves the prediction at token i, clean and under edits.

    In each prompt some tokens are replaced, one at a time, by random other tokens of the same set
    of prompts. flow(Δ) is the mean over the replaced tokens of KL(original ‖ replaced) between the
    next-token distributions Δ tokens later, in nats. *Ours*: the total causal effect through all
    heads and layers, not the effect through one head.

    Args:
        model: A TransformerBridge; active patches are part of the clean run.
        prompts: As for `scan`; None: natural text.
        edits: One or several edits, each measured alone; edits of a nested list act together.
        offsets: Δ ≥ 0; 0 is the prediction at the replaced token itself.
        random_tokens: Use uniform random tokens instead of natural text.
        n_replaced: Number of tokens replaced in each prompt; fewer in short prompts.
        n_prompts: Number of prompts, which are the unit of the intervals.
        max_tokens: Length of generated prompts, at most the model's context; None: 64, or the
            context if that is shorter.
        batch_size: Variants per forward pass; None: by memory.
        confidence: Level of the intervals.
        seed: Random seed of prompts, replaced tokens and bootstrap resamples.
        progress: Whether to show a progress bar; None: on a terminal only.
        workers: Number of worker processes, or a `Workers`; None stays in this process.

    Returns:
        A Result. `frame` has a row per condition and offset: `flow` with its interval, and an
        edit's paired effect on the flow with interval, p and q. `remarks` name the offsets at which
        an edit lowers or raises the flow, compared with the offsets that it edits.

    Raises:
        EditError: An edit that does not fit the model.
        OffsetError: Offsets that are negative or not integers.
        PromptError: Prompts that are too short for the largest offset.
        WorkerError: Workers that cannot start, or differ from this process.
        ExtraError: `workers` without the extra `slashpatch[ray]`.
    """
    require_options(
        seed, confidence, n_prompts=n_prompts, n_replaced=n_replaced, batch_size=batch_size
    )
    pool_of = as_workers(workers)
    wanted = () if isinstance(edits, (list, tuple)) and not edits else conditions(edits)
    deltas = as_offsets(offsets)
    chosen = prompts_for(
        model,
        (),
        prompts,
        random_tokens=random_tokens,
        n_prompts=n_prompts,
        max_tokens=max_tokens,
        default=64,
        seed=seed,
    )
    replaced = [
        _replace_tokens(chosen, index, deltas[-1], n_replaced, seed)
        for index in range(len(chosen.tokens))
    ]
    runs = [Condition(), *wanted]
    job = _FlowJob(runs, replaced, deltas, batch_size)
    curves = torch.zeros(len(runs) * len(replaced), len(deltas), dtype=torch.float64)
    for index, curve in units_of(
        model, job, range(len(curves)), "replacing tokens", pool_of, progress
    ):
        curves[index] = curve
    curves = curves.view(len(runs), len(replaced), -1)
    frame = _frame(runs, deltas, curves, seed, confidence)
    details = {
        "measured": [str(condition) for condition in wanted],
        "prompts": chosen.record,
        "n_replaced": [len(variants.positions) for variants in replaced],
        "confidence": confidence,
        "seed": seed,
        **({} if pool_of is None else pool_of.record),
    }
    remarks = (*(_remark(run, frame) for run in wanted), *few_prompts(len(replaced)))
    return Result("flow", frame, {}, remarks, provenance(model, **details))


@dataclass(frozen=True)
class _FlowJob:
    """The passes of flow; a unit is one prompt and its variants in one run.

    Attributes:
        runs: The clean run, and the conditions.
        replaced: The prompts, with their variants.
        offsets: Offsets after the replaced token.
        batch_size: As for `flow`.
    """

    runs: list[Condition]
    replaced: list[ReplacedTokens]
    offsets: tuple[int, ...]
    batch_size: int | None

    def start(self, model: TransformerBridge) -> Callable[[int], Tensor]:
        """Return a function that measures one prompt in one run."""
        # Only the runner's logits are used; any metric that needs all positions would do.
        return partial(self._measure, MetricRunner(model, [next_token_loss]))

    def _measure(self, runner: MetricRunner, index: int) -> Tensor:
        run, prompt = divmod(index, len(self.replaced))
        with patch(runner.model, *self.runs[run].edits) if run else nullcontext():
            offsets = torch.tensor(self.offsets)
            return _curve(runner, self.replaced[prompt], offsets, self.batch_size)


def _replace_tokens(
    prompts: PromptSet, index: int, longest: int, n: int, seed: int
) -> ReplacedTokens:
    """Return a prompt and up to n variants, with one token replaced by one of all prompts' tokens.

    The first token is never replaced, because many heads attend to it as a sink. Raises PromptError
    for prompts that are too short for the `longest` offset.
    """
    from transformer_lens.utilities.statistics import derive_generator

    tokens = prompts.tokens[index]
    n_places = len(tokens) - longest - 1
    if n_places < 1:
        raise PromptError(
            f"prompt {index} has {len(tokens)} tokens; offsets up to {longest} need at least "
            f"{longest + 2}"
        )
    generator = derive_generator(seed, "flow", index)
    positions = 1 + torch.randperm(n_places, generator=generator)[:n].sort().values
    pool = torch.cat(prompts.tokens)
    rows = [tokens]
    for position in positions.tolist():
        others = pool[pool != tokens[position]]
        if len(others) == 0:
            raise PromptError("all prompts repeat one and the same token, so none can be replaced")
        row = tokens.clone()
        row[position] = others[int(torch.randint(len(others), (), generator=generator))]
        rows.append(row)
    return ReplacedTokens(positions, torch.stack(rows))


def _curve(
    runner: MetricRunner,
    replaced: ReplacedTokens,
    offsets: Int[Tensor, "offset"],
    batch_size: int | None,
) -> Float[Tensor, "offset"]:
    """Return the mean KL divergence over the variants, at each offset after the replaced token."""
    cfg = runner.model.cfg
    rows = PromptSet(tuple(replaced.tokens), "")
    original, sums = None, torch.zeros(len(offsets), dtype=torch.float64)
    for batch in batches(rows, cfg.d_vocab, batch_size, cfg.device):
        logits = runner.logits(batch.tokens)
        if original is None:
            original, logits, variants = logits[0], logits[1:], batch.index[1:] - 1
        else:
            variants = batch.index - 1
        positions = (replaced.positions[variants][:, None] + offsets).to(cfg.device)
        row = torch.arange(len(logits), device=cfg.device)[:, None]
        sums += kl_divergence(original[positions], logits[row, positions]).double().sum(0).cpu()
    return sums / len(replaced.positions)


def _frame(
    runs: list[Condition],
    offsets: tuple[int, ...],
    curves: Float[Tensor, "condition prompt offset"],
    seed: int,
    confidence: float,
) -> pd.DataFrame:
    """Return a row per condition and offset."""
    rows = []
    for condition, curve in zip(runs, curves, strict=True):
        low, high = interval(curve, seed, confidence)
        effect = compared(curves[0], curve, seed, confidence)
        for at, offset in enumerate(offsets):
            row = {
                "edit": str(condition),
                "offset": offset,
                "n": len(curve),
                "flow": float(curve[:, at].mean()),
                "flow_low": float(low[at]),
                "flow_high": float(high[at]),
            }
            if condition.edits:
                row |= {key: float(effect[key][at]) for key in ("effect", "low", "high", "p")}
            rows.append(row)
    return adjusted(rows)


def _remark(condition: Condition, frame: pd.DataFrame) -> str:
    """Say at which offsets an edit changes the flow, and whether it edits these offsets."""
    rows = frame[frame["edit"] == str(condition)]
    n, n_tests = int(rows["n"].iloc[0]), int(frame["edit"].ne(str(Condition())).sum())
    if least_p(n) * n_tests >= _LEVEL:
        return (
            f"{condition}: {n} prompts are too few to tell one changed offset among {n_tests}; "
            "use more"
        )
    least = _SHARE * frame[frame["edit"] == str(Condition())]["flow"].max()
    clear = rows[(rows["q"] < _LEVEL) & (rows["effect"].abs() >= least)]
    lowered = sorted(int(o) for o in clear[clear["effect"] < 0]["offset"])
    raised = sorted(int(o) for o in clear[clear["effect"] > 0]["offset"])
    clauses = [
        f"{word} the flow at Δ = {', '.join(map(str, offsets))}"
        for word, offsets in (("lowers", lowered), ("raises", raised))
        if offsets
    ]
    text = f"{condition}: {' and '.join(clauses) or 'changes the flow at no offset'}"
    edited = _edited_offsets(condition, {int(offset) for offset in rows["offset"]})
    if edited is not None:
        unchanged = sorted(edited - {*lowered, *raised})
        unedited = sorted({*lowered, *raised} - edited)
        if unchanged:
            text += f"; not at Δ = {', '.join(map(str, unchanged))}, which it edits"
        if unedited:
            text += f"; it does not edit Δ = {', '.join(map(str, unedited))}"
    return text + f" (adjusted p < {_LEVEL:g}, and over {_SHARE:.0%} of the largest clean flow)"


def _edited_offsets(condition: Condition, offsets: set[int]) -> set[int] | None:
    """Return which of `offsets` the edits change; None if they do not act on single offsets."""
    edited: set[int] = set()
    for edit in condition.edits:
        changes = edit.diagonal_changes()
        if not changes:
            return None
        for change in changes:
            neutral = 0.0 if change.stage == "scores" else 1.0
            edited |= set(change.offsets) if change.amount != neutral else set()
            edited |= offsets - set(change.offsets) if change.elsewhere != neutral else set()
    return edited & offsets
