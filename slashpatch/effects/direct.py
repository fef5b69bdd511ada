"""Direct and total effects of edits, and what later layers make of the change (self-repair).

The direct effect lets the change of the edited layers' attention reach the logits by the residual
stream alone: all that comes later writes what it wrote in the clean run (McGrath et al., arXiv
2307.15771). The final norm's scale is held as well, since it is a way of self-repair of its own
(Rushing & Nanda, arXiv 2402.15390).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..bridge.prefix_cache import PrefixCache
from ..bridge.provenance import provenance
from ..data.progress import progress_over
from ..errors import MetricError, ModelError
from ..maths.precision import logits_slack
from ..patching.patch import patch
from .directly.attention_change import CleanLayers, verify_direct_path
from .directly.final_norm import FINAL_INPUT, FINAL_OUTPUT, FinalNorm, read_final_norm
from .metrics.by_name import as_metric
from .ratios import ratio_of_means
from .result import Result
from .running.conditions import Condition, conditions, require_options
from .running.evaluation import MetricRunner
from .running.inputs import Batch, batches, prompts_for
from .statistics import adjusted, compared, few_prompts

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

#: What the rows of a condition measure, in their order.
DIRECT, NEW_NORM, TOTAL, REPAIR = "direct", "direct, new norm", "total", "repair"


def direct_effect(
    model: TransformerBridge,
    edits: Any,
    metric: Any = "loss",
    prompts: Any = None,
    *,
    random_tokens: bool = False,
    n_prompts: int = 16,
    max_tokens: int | None = None,
    batch_size: int | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """Measure the direct and the total effect of edits, and what later layers repair.

    The direct effect is on the logits of: final residual stream of the clean run + Σ over the
    edited layers of the change of their attention's output. That change is measured with the clean
    residual stream before each edited layer, so no edited layer sees another one's change (*ours*),
    and with the final norm's scale held at the clean run's. Soft-capping and scaling of logits are
    the model's own.

    Args:
        model: A TransformerBridge; active patches are part of the clean run.
        edits: One or several edits, each measured alone; edits of a nested list act together.
        metric: A name, function or object that reads logits, such as "loss", "copying" or
            `LogitDifference(right, wrong)`.
        prompts: As for `measure`; None: natural text, or repeated random tokens for copying
            metrics.
        random_tokens: Use uniform random tokens instead of natural text.
        n_prompts: Number of prompts, which are the unit of the intervals.
        max_tokens: Length of generated prompts, at most the model's context; None: 65, or the
            context if that is shorter.
        batch_size: Prompts per forward pass; None: by memory.
        confidence: Level of the intervals.
        seed: Random seed of prompts, bootstrap resamples and sign flips.
        progress: Whether to show a progress bar; None: on a terminal only.

    Returns:
        A Result with four rows an edit, by the column `part`: "direct"; "direct, new norm" (the
        final norm computed anew); "total" (an ordinary run); and "repair", total − direct: what
        later layers and the final norm's scale add. Where the total effect is the smaller one,
        `repaired` is the share of the direct effect that is undone, −repair / direct (ratio of
        means over prompts; NaN where the direct effect is not clear). Where it is the larger one,
        later layers do not repair the change but carry it on.

    Raises:
        EditError: Edits that do not fit the model.
        MetricError: A metric of attention, or one that is misspelt or not finite.
        ModelError: A model whose residual stream does more than add up what attention and MLPs
            write, or whose final norm is unknown.
    """
    require_options(seed, confidence, n_prompts=n_prompts, batch_size=batch_size)
    wanted = conditions(edits)
    runner = MetricRunner(model, [as_metric(metric)])
    if runner.heads:
        raise MetricError(
            f"{runner.names[0]} reads attention, and a direct effect is on the logits; choose a "
            "metric of logits, such as 'loss'"
        )
    for edit in (edit for condition in wanted for edit in condition.edits):
        edit.validate(runner.info)
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
    made = batches(chosen, model.cfg.d_vocab, batch_size, model.cfg.device)
    parts: dict[Any, list[Tensor]] = {}
    steps = [1 + 2 * len(wanted)] * len(made)
    for place, batch in enumerate(progress_over(made, "direct effects", show=progress, n=steps)):
        run = _BatchRun(runner, batch, wanted)
        if place == 0:
            run.verify()
        parts.setdefault("clean", []).append(run.clean_values)
        for condition in wanted:
            for part, found in run.effects(condition).items():
                parts.setdefault((condition, part), []).append(found)
    order = torch.cat([batch.index for batch in made]).argsort()
    values = {key: torch.cat(tensors)[order] for key, tensors in parts.items()}
    rows = [row for c in wanted for row in _rows(runner, c, values, seed, confidence)]
    details = {
        "measured": [str(condition) for condition in wanted],
        "metric": runner.names[0],
        "prompts": chosen.record,
        "confidence": confidence,
        "seed": seed,
    }
    return Result(
        "direct", adjusted(rows), {}, _remarks(rows, wanted), provenance(model, **details)
    )


class _BatchRun:
    """The forward passes over one batch.

    Attributes:
        clean_values: The metric of the clean run.
    """

    def __init__(self, runner: MetricRunner, batch: Batch, wanted: tuple[Condition, ...]) -> None:
        self.runner, self.batch = runner, batch
        layers = sorted({la for c in wanted for edit in c.edits for la in edit.layers})
        self.layers = CleanLayers(runner, batch.tokens, tuple(layers))
        self.prefix = PrefixCache(runner.model, batch.tokens)
        self.norms: dict[str, Tensor] = {}
        hooks = [*self.layers.hooks(), *self._final_hooks()]
        n_layers = runner.info.n_layers
        with self.prefix.keeping([n_layers]):
            (self.clean_values,), self.clean = runner.run(batch, None, Condition(), hooks)
        self.prefix.advance(n_layers)
        self.layers.require()
        missing = {FINAL_INPUT, FINAL_OUTPUT} - set(self.norms)
        if missing:
            raise ModelError(
                f"the hook {sorted(missing)[0]} did not fire; the direct effect needs the final "
                "norm's input and output"
            )
        self.norm: FinalNorm = read_final_norm(
            runner.model, self.norms[FINAL_INPUT], self.norms[FINAL_OUTPUT]
        )

    def _final_hooks(self) -> list[tuple[str, Any]]:
        known = self.runner.model.hook_dict
        names = [name for name in (FINAL_INPUT, FINAL_OUTPUT) if name in known]

        def keep(x: Tensor, hook: Any) -> None:
            self.norms[hook.name] = x.detach()

        return [(name, keep) for name in names]

    def effects(self, condition: Condition) -> dict[str, Tensor]:
        """Return the metric with the direct effect, with a new norm, and in the edited run."""
        runner, x = self.runner, self.norms[FINAL_INPUT]
        change = self.layers.change(condition.edits).to(x.device)
        held = self.norm.change(x, change)
        with patch(runner.model, *condition.edits):
            (total,), _ = runner.run(self.batch, self.clean, condition)
        return {
            DIRECT: self._from_the_end(FINAL_OUTPUT, held, f"the direct effect of {condition}"),
            NEW_NORM: self._from_the_end(FINAL_INPUT, change, f"the direct effect of {condition}"),
            TOTAL: total,
        }

    def _from_the_end(self, name: str, change: Tensor, label: str) -> Tensor:
        """Return the metric of a run of all that comes after the blocks, with a change added."""
        hooks = [(name, _adding(change))]
        with self.prefix.skipped():
            (values,), _ = self.runner.run(
                self.batch, self.clean, label, hooks, from_layer=self.runner.info.n_layers
            )
        return values

    def verify(self) -> None:
        """Raise ModelError unless the way of the direct effect gives the logits that it must.

        The residual stream carries a change as it is. Without a change, the logits are the clean
        run's; a changed input of the final norm gives those of our formula at its output.
        """
        verify_direct_path(self.runner, self.batch.tokens[:1], min(self.layers.layers))
        runner, x, y = self.runner, self.norms[FINAL_INPUT], self.norms[FINAL_OUTPUT]
        nudge = x.roll(1, -1) / 4
        changed = self.norm(x + nudge) - y.to(self.norm.gain)
        clean = runner.logits(self.batch.tokens)
        with self.prefix.skipped():
            again, by_input, by_output = (
                runner.logits(self.batch.tokens, hooks)
                for hooks in (
                    [],
                    [(FINAL_INPUT, _adding(nudge))],
                    [(FINAL_OUTPUT, _adding(changed))],
                )
            )
        slack = logits_slack(clean.dtype, runner.info.n_layers) * float(clean.abs().max())
        for what, one, other in (
            ("the clean run's final residual stream", again, clean),
            ("a final norm with a changed input", by_output, by_input),
        ):
            difference = float((one - other).abs().max())
            if not difference <= slack:
                raise ModelError(
                    f"the logits that {self.runner.model.cfg.architecture} makes of {what} differ "
                    f"by {difference:.2g} from those expected (allowed {slack:.2g}), so a direct "
                    "effect on them cannot be computed"
                )


def _adding(change: Tensor) -> Any:
    """Return a hook function that adds a change."""

    def add(x: Tensor, hook: Any) -> Tensor:
        return (x.to(change) + change.to(x.device)).to(x.dtype)

    return add


def _rows(
    runner: MetricRunner,
    condition: Condition,
    values: dict[Any, Tensor],
    seed: int,
    confidence: float,
) -> list[dict[str, Any]]:
    """Return the rows of one condition: one for each part and each number of the metric."""
    clean = values["clean"]
    direct, total = values[condition, DIRECT], values[condition, TOTAL]
    pairs = {
        DIRECT: (clean, direct),
        NEW_NORM: (clean, values[condition, NEW_NORM]),
        TOTAL: (clean, total),
        REPAIR: (direct, total),
    }
    rows = []
    for part, (before, after) in pairs.items():
        columns = compared(before, after, seed, confidence)
        for at, of in enumerate(runner.labels(0, clean.shape[1])):
            shares = (float("nan"),) * 3
            change, whole = ((x - clean)[:, at] for x in (total, direct))
            if part == REPAIR and abs(float(change.mean())) <= abs(float(whole.mean())):
                shares = ratio_of_means(whole - change, whole, seed, confidence)
            rows.append(
                {
                    "edit": str(condition),
                    "part": part,
                    "metric": runner.names[0],
                    "of": of,
                    "n": len(clean),
                    **{name: float(column[at]) for name, column in columns.items()},
                    **dict(zip(("repaired", "repaired_low", "repaired_high"), shares, strict=True)),
                }
            )
    return rows


def _remarks(rows: list[dict[str, Any]], wanted: tuple[Condition, ...]) -> tuple[str, ...]:
    """Return in words, for metrics of one number, what later layers make of each direct effect."""
    said = [*few_prompts(rows[0]["n"])]
    for condition in wanted:
        found = {row["part"]: row for row in rows if row["edit"] == str(condition)}
        direct, total, repair = (found[part] for part in (DIRECT, TOTAL, REPAIR))
        unclear = [row["low"] <= 0 <= row["high"] for row in (direct, total)]
        if direct["of"] or len(rows) != 4 * len(wanted):
            continue
        sizes = f"direct {direct['effect']:+.3g}, total {total['effect']:+.3g}"
        if repair["repaired"] == repair["repaired"]:
            what = f"later layers and the norm undo {repair['repaired']:.0%} of the direct effect"
        elif all(unclear):
            what = "neither is clearly different from zero"
        elif abs(total["effect"]) > abs(direct["effect"]):
            what = "the effect is larger through later layers than directly"
        else:
            what = "the direct effect is not clear"
        said.append(f"{condition}: {sizes}: {what}")
    return tuple(said)
