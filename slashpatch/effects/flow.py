"""Flow: how much the token Δ back moves a prediction, by replacing it."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..bridge.provenance import provenance
from ..data.progress import progress_over
from ..data.prompts import PromptSet
from ..errors import PromptError
from ..maths.offsets import as_offsets
from ..patching.patch import patch
from .conditions import Condition, conditions, require_options
from .evaluation import Meter
from .inputs import batches, prompts_for
from .logit_metrics import kl_divergence, next_token_loss
from .result import Result
from .statistics import adjusted, compared, interval, least_p

if TYPE_CHECKING:
    import pandas as pd
    from transformer_lens.model_bridge import TransformerBridge

#: A change is spoken of where its adjusted p-value is below the one, and its size at least the
#: other's share of the largest clean flow. *Ours*.
_LEVEL, _SHARE = 0.05, 0.01


@dataclass(frozen=True)
class Replaced:
    """One prompt, and after it variants, in each of which one token is another."""

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
    max_tokens: int | None = 64,
    batch_size: int | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """How much token i−Δ moves the prediction at i, by offset, clean and under edits.

    In each prompt some tokens are replaced, one at a time, by others of the same prompts; flow(Δ)
    is the mean over them of KL(as it was ‖ with the other token) of the next-token distribution Δ
    later, in nats. A definition of ours: total causal effect through all heads, not one head's.

    Args:
        model: A TransformerBridge; active patches are part of "clean".
        prompts: As for `scan`; None: natural text.
        edits: An edit or several, each by itself; those of a nested list act together.
        offsets: Δ ≥ 0; 0 is the prediction at the replaced token itself.
        random_tokens: Uniform random tokens instead of natural text.
        n_replaced: Tokens replaced in each prompt; fewer where a prompt has fewer.
        n_prompts: How many; the unit of intervals.
        max_tokens: Length of prompts that are made here.
        batch_size: Variants per pass; picked by memory when None.
        confidence: Of the intervals.
        seed: Of prompts, which tokens are replaced and by what, resamples and sign flips.
        progress: Whether to show a bar; when None, on a terminal only.

    Returns:
        A Result. `frame`: a row per condition and offset: `flow` with its interval, and for edits
        the paired effect on it, with interval, p and q. `remarks` say which offsets an edit
        lowered or raised, and whether they are those whose diagonals it changed.

    Raises:
        EditError, OffsetError, and PromptError for prompts too short for the largest offset.
    """
    require_options(
        seed, confidence, n_prompts=n_prompts, n_replaced=n_replaced, batch_size=batch_size
    )
    wanted = () if isinstance(edits, (list, tuple)) and not edits else conditions(edits)
    steps = as_offsets(offsets)
    meter = Meter(model, [next_token_loss])
    found = prompts_for(
        model,
        (),
        prompts,
        random_tokens=random_tokens,
        n_prompts=n_prompts,
        max_tokens=max_tokens,
        seed=seed,
    )
    variants = [_replaced(found, i, steps[-1], n_replaced, seed) for i in range(len(found.tokens))]
    every = [Condition(), *wanted]
    todo = [(which, row) for which in range(len(every)) for row in range(len(variants))]
    curves = torch.zeros(len(every), len(variants), len(steps), dtype=torch.float64)
    lasting = torch.tensor(steps)
    for which, row in progress_over(todo, "replacing tokens", show=progress):
        with patch(model, *every[which].edits) if which else nullcontext():
            curves[which, row] = _curve(meter, variants[row], lasting, batch_size)
    frame = _frame(every, steps, curves, seed, confidence)
    details = {
        "measured": [str(condition) for condition in wanted],
        "prompts": found.record,
        "n_replaced": [len(one.positions) for one in variants],
        "confidence": confidence,
        "seed": seed,
    }
    remarks = tuple(_remark(condition, frame) for condition in wanted)
    return Result("flow", frame, {}, remarks, provenance(model, **details))


def _replaced(prompts: PromptSet, index: int, longest: int, n: int, seed: int) -> Replaced:
    """A prompt, and variants with one token drawn from all prompts' tokens in place of its own.

    The first token is never replaced: models use it as a place to attend to.
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
            raise PromptError("all prompts are of one and the same token; none can be replaced")
        row = tokens.clone()
        row[position] = others[int(torch.randint(len(others), (), generator=generator))]
        rows.append(row)
    return Replaced(positions, torch.stack(rows))


def _curve(
    meter: Meter, replaced: Replaced, offsets: Int[Tensor, "offset"], batch_size: int | None
) -> Float[Tensor, "offset"]:
    """Mean over the variants of the KL divergence at each offset after the replaced token."""
    device = meter.model.cfg.device
    rows = PromptSet(tuple(replaced.tokens), "")
    base, sums = None, torch.zeros(len(offsets), dtype=torch.float64)
    for batch in batches(rows, meter.model.cfg.d_vocab, batch_size, device):
        logits = meter.logits(batch.tokens)
        if base is None:
            base, logits, variants = logits[0], logits[1:], batch.index[1:] - 1
        else:
            variants = batch.index - 1
        places = (replaced.positions[variants][:, None] + offsets).to(device)
        rows_of = torch.arange(len(logits), device=device)[:, None]
        sums += kl_divergence(base[places], logits[rows_of, places]).double().sum(0).cpu()
    return sums / len(replaced.positions)


def _frame(
    every: list[Condition],
    offsets: tuple[int, ...],
    curves: Float[Tensor, "condition prompt offset"],
    seed: int,
    confidence: float,
) -> pd.DataFrame:
    rows = []
    for condition, curve in zip(every, curves, strict=True):
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
    """Which offsets changed, and whether they are those that the edit is about."""
    rows = frame[frame["edit"] == str(condition)]
    n, n_tests = int(rows["n"].iloc[0]), int(frame["edit"].ne(str(Condition())).sum())
    if n < 2 or least_p(n) * n_tests >= _LEVEL:
        return (
            f"{condition}: {n} prompts are too few to tell one changed offset among {n_tests}; "
            "use more"
        )
    least = _SHARE * frame[frame["edit"] == str(Condition())]["flow"].max()
    sure = rows[(rows["q"] < _LEVEL) & (rows["effect"].abs() >= least)]
    lowered = sorted(int(o) for o in sure[sure["effect"] < 0]["offset"])
    raised = sorted(int(o) for o in sure[sure["effect"] > 0]["offset"])
    said = [
        f"{word} the flow at Δ = {', '.join(map(str, offsets))}"
        for word, offsets in (("lowers", lowered), ("raises", raised))
        if offsets
    ]
    text = f"{condition}: {' and '.join(said) or 'changes the flow at no offset'}"
    aimed = _aimed(condition, {int(offset) for offset in rows["offset"]})
    if aimed is not None:
        missed = sorted(aimed - {*lowered, *raised})
        beside = sorted({*lowered, *raised} - aimed)
        if missed:
            text += f"; not at Δ = {', '.join(map(str, missed))}, which it edits"
        if beside:
            text += f"; Δ = {', '.join(map(str, beside))} is beside what it edits"
    return text + f" (adjusted p < {_LEVEL:g}, and over {_SHARE:.0%} of the largest clean flow)"


def _aimed(condition: Condition, offsets: set[int]) -> set[int] | None:
    """Of some offsets, those whose diagonals the edits change; None where edits do more."""
    aimed: set[int] = set()
    for edit in condition.edits:
        changes = edit.diagonal_changes()
        if not changes:
            return None
        for change in changes:
            nothing = 0.0 if change.stage == "scores" else 1.0
            aimed |= set(change.offsets) if change.amount != nothing else set()
            aimed |= offsets - set(change.offsets) if change.elsewhere != nothing else set()
    return aimed & offsets
