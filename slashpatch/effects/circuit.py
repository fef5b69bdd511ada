"""Circuit: what a set of heads or diagonals does together, with all other heads ablated."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import bridge
from ..bridge.provenance import provenance
from ..bridge.workers.options import Workers, as_workers
from ..data.files import require_output
from ..data.journal import Journal
from ..data.prompts import PromptSet
from ..edits import AblateHeads, Constants
from .metrics.by_name import as_metric
from .result import SUFFIXES, Result
from .resumable import resumable
from .running.conditions import Condition, require_options, seen_in_fits
from .running.evaluation import MetricRunner
from .running.inputs import prompts_for
from .running.runs import digest_of, run_all
from .sets.members import as_members, keeping, random_sets, random_subsets, without
from .sets.shares import Plan, Shares, joined

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def circuit(
    model: TransformerBridge,
    members: Any,
    metric: Any = "copying",
    prompts: Any = None,
    *,
    mode: str = "mean",
    constants: Constants | None = None,
    n_subsets: int = 8,
    n_random: int = 19,
    path: str | os.PathLike[str] | None = None,
    resume: bool = False,
    random_tokens: bool = False,
    n_prompts: int = 16,
    max_tokens: int | None = None,
    batch_size: int | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool | None = None,
    workers: int | str | Workers | None = None,
) -> Result:
    """Measure faithfulness, completeness and minimality of a set of heads or diagonals.

    All numbers are shares of what ablating every attention head changes. With m(S) the mean metric
    when only S is left, M the whole model and ∅ no head, the share of S is
    f(S) = (m(S) − m(∅)) / (m(M) − m(∅)), the faithfulness of MIB (Mueller et al., arXiv 2504.13151,
    after Marks et al., arXiv 2403.19647), whose circuits hold MLPs and edges as well. Here only
    attention heads are ablated, MLPs stay, and m(∅) has every head ablated (*ours*). For a set C:

    - faithfulness: f(C). 1 means that C alone does all of it.
    - left without: f(M − C). 0 means that nothing does it beside C, so C is complete.
    - incompleteness: |f(C − K) − f(M − K)|, mean over random subsets K of C, the criterion of
      Wang et al. (arXiv 2211.00593) as a share. Near 0 means that C fails where the model fails.
    - minimality: f(C) − f(C − {v}) for each member v. Wang et al. look for the K under which v
      matters most; here K is empty (*ours*), so of two members that do the same, both look idle.

    Of a head with diagonals as members, the attention at other offsets is removed and theirs stays
    as it is, without renormalising (*ours*). A set that was chosen on some prompts looks better on
    them: measure on others.

    Args:
        model: A TransformerBridge; active patches are part of the clean run.
        members: Heads in any form, or diagonals: "L16H0@1, L19H3@1", or tuples of head and offset.
        metric: A name, function or object that gives one number per prompt.
        prompts: As for `measure`.
        mode: How heads are ablated: "zero", "mean", "resample" or "optimal". Reference activations
            come from natural text, or from random tokens if the prompts are random.
        constants: For "optimal": constants that were fitted for all heads of the model.
        n_subsets: Number of random subsets K; fewer if C has fewer.
        n_random: Number of random sets with as many heads in each layer, drawn from all its heads;
            fewer if there are fewer. 19 are needed for a rank p-value of 0.05.
        path: A .parquet or .json file to write, as for `sweep`.
        resume: Continue an unfinished run, or load a finished one.
        random_tokens: Use uniform random tokens instead of natural text.
        n_prompts: Number of prompts, which are the unit of the intervals.
        max_tokens: Length of generated prompts, at most the model's context; None: 65, or the
            context if that is shorter.
        batch_size: Prompts per forward pass; None: by memory.
        confidence: Level of the intervals.
        seed: Random seed of prompts, subsets, random sets and ablations.
        progress: Whether to show a progress bar; None: on a terminal only.
        workers: Number of worker processes, or a `Workers`; None stays in this process.

    Returns:
        A Result. `frame` has a row for each number: what, member, value (the mean metric), share,
        low and high (over prompts, as of `ratio_of_means`), p (of the difference that is divided),
        q, and for faithfulness p_rank, (1 + random sets at least as faithful) / (1 + random sets).
        `tables` has `subsets`, `random_sets` and each run's `values`.

    Raises:
        EditError: Members or a mode that are misspelt, or constants that lack heads.
        HeadError: Heads that the model does not have.
        MetricError: A metric that is misspelt, or gives several numbers per prompt.
        PromptError: Prompts that are empty or longer than the context.
        OutputError: A path that cannot be written.
        SweepError: The file at `path` holds another run.
    """
    require_options(seed, confidence, n_prompts=n_prompts, batch_size=batch_size)
    require_options(seed, confidence, n_subsets=n_subsets, n_random=n_random)
    pool_of, info = as_workers(workers), bridge.read(model)
    target = None if path is None else Path(path)
    require_output(target, SUFFIXES)
    chosen = as_members(members, info)
    runner = MetricRunner(model, [as_metric(metric)])
    on = prompts_for(
        model,
        runner.metrics,
        prompts,
        random_tokens=random_tokens,
        n_prompts=n_prompts,
        max_tokens=max_tokens,
        default=65,
        seed=seed,
    )
    ablation = _ablation(info, mode, constants, prompts is None, on, seed)
    ablation.validate(info)
    plan = Plan(
        chosen,
        random_subsets(chosen, n_subsets, seed),
        random_sets(chosen, info, n_random, seed),
        {
            "all ablated": keeping((), info, ablation),
            "members alone": keeping(chosen, info, ablation),
            "without members": without(chosen, ablation),
        },
    )
    for one in chosen:
        rest = [other for other in chosen if other != one]
        plan.conditions[f"members alone, without {one}"] = keeping(rest, info, ablation)
    for subset in plan.subsets:
        rest = [one for one in chosen if one not in subset]
        plan.conditions[f"members alone, without {joined(subset)}"] = keeping(rest, info, ablation)
        plan.conditions[f"without {joined(subset)}"] = without(subset, ablation)
    for drawn in plan.draws:
        plan.conditions[f"{joined(drawn)} alone"] = keeping(drawn, info, ablation)
    runs = list(dict.fromkeys(run for run in plan.conditions.values() if run.edits))
    origin = provenance(
        model,
        measured=[joined(chosen)],
        metric=runner.names[0],
        ablation={"mode": mode, "reference": ablation.reference, "constants": repr(constants)},
        runs=digest_of([f"{label}: {run}" for label, run in plan.conditions.items()]),
        prompts=on.record,
        confidence=confidence,
        seed=seed,
    )
    made_by = origin if pool_of is None else {**origin, **pool_of.record}

    def run(journal: Journal | None) -> Result:
        found = run_all(model, runner, on, runs, journal, batch_size, progress, pool_of)[..., 0]
        by_run = dict(zip([Condition(), *runs], found, strict=True))
        values = {label: by_run[run] for label, run in plan.conditions.items()}
        table = Shares(plan, by_run[Condition()], values, runner.names[0], seed, confidence)
        frame, tables, remarks = table.all()
        return Result("circuit", frame, tables, (*remarks, *seen_in_fits(runs, on)), made_by)

    n_rows = 3 + len(chosen) + 2 * bool(plan.draws)
    return resumable(target, resume, origin, "circuit", n_rows, len(on.tokens), run, len(runs))


def _ablation(
    info: bridge.ModelInfo,
    mode: str,
    constants: Constants | None,
    generated: bool,
    on: PromptSet,
    seed: int,
) -> AblateHeads:
    """Return the ablation of all heads."""
    if mode in ("mean", "resample"):
        reference = "random" if generated and on.source.startswith("random") else "natural"
        return AblateHeads(info.heads, mode, reference, seed, constants)
    return AblateHeads(info.heads, mode, constants=constants)
