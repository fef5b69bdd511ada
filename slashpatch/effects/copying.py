"""Copying: how well a model predicts the second copy of repeated random tokens.

Only a model that finds the first copy in its context, as induction heads do, can predict it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..bridge.provenance import provenance
from ..errors import OffsetError, PromptError
from ..maths.offsets import as_offsets
from ..maths.repeated_tokens import copy_length, copying_loss
from .metrics.attention import PrefixMatching
from .result import Result
from .running.conditions import Condition, conditions, require_options
from .running.evaluate import evaluate
from .running.evaluation import MetricRunner
from .running.inputs import repeated
from .statistics import adjusted, compared, few_prompts, interval, split

if TYPE_CHECKING:
    import pandas as pd
    from transformer_lens.model_bridge import TransformerBridge

#: Least rate at which a lag counts as copied, and least score at which a head matches it. *Ours*.
_LEAST = 0.1


def copying_losses(
    model: TransformerBridge, n_prompts: int = 8, n_tokens: int = 100, seed: int = 0
) -> Float[Tensor, "prompt"]:
    """Return the mean next-token loss on the second copy of random tokens, per prompt, in nats.

    The model is run as it is, active patches included. Chance is log d_vocab. The first token of
    the second copy is left out, because nothing tells that the copy begins. *Ours*, after the usual
    induction test (Olsson et al., arXiv 2209.11895). Raises PromptError for fewer than 2 tokens, or
    if two copies exceed the context.
    """
    tokens = torch.stack(repeated(model, n_prompts, n_tokens, seed).tokens).to(model.cfg.device)
    with torch.no_grad():
        return copying_loss(model(tokens), tokens).float().cpu()


def copied_lags(
    model: TransformerBridge,
    lags: Sequence[int] = (1, 2, 3),
    n_prompts: int = 8,
    n_tokens: int = 100,
    seed: int = 0,
) -> Float[Tensor, "prompt lag"]:
    """Return how often the likeliest next token is the token `lag` positions on, per prompt.

    Over the positions of the second copy that have such a token in the copy. A model that copies
    predicts the next token, lag 1. Chance is 1 / d_vocab. *Ours*. Raises PromptError as
    `copying_losses` does, and for lags outside 1 to n_tokens − 1.
    """
    chosen = _lags(lags, n_tokens)
    tokens = torch.stack(repeated(model, n_prompts, n_tokens, seed).tokens).to(model.cfg.device)
    with torch.no_grad():
        rates = LagTop1(chosen)(model(tokens), tokens).cpu()
    return rates[:, [chosen.index(lag) for lag in lags]]


def _lags(lags: Any, n_tokens: int) -> tuple[int, ...]:
    """Return distinct lags, ascending. Raises PromptError for lags outside 1 to n_tokens − 1."""
    try:
        chosen = as_offsets(lags)
    except OffsetError:
        chosen = ()
    if not chosen or not (chosen[0] >= 1 and chosen[-1] < n_tokens):
        raise PromptError(f"lags must be integers from 1 to {n_tokens - 1}; got {_shown(lags)}")
    return chosen


def _shown(lags: Any) -> str:
    """Return lags as they are typed at the shell where they are a range."""
    return f"{lags[0]} to {lags[-1]}" if isinstance(lags, range) and lags else repr(lags)


@dataclass(frozen=True)
class LagTop1:
    """How often the likeliest next token is the token `lag` positions on, for several lags."""

    lags: tuple[int, ...]
    keeps: ClassVar[Any] = staticmethod(copy_length)

    def __call__(
        self, logits: Float[Tensor, "batch kept d_vocab"], tokens: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch lag"]:
        """Return one number per lag, over the positions whose token `lag` on is in the copy."""
        n = copy_length(tokens)
        guesses, second = logits[:, -n:].argmax(-1), tokens[:, -n:]
        rates = [(guesses[:, :-lag] == second[:, lag:]).double().mean(1) for lag in self.lags]
        return torch.stack(rates, dim=1)


@dataclass(frozen=True)
class LagLoss:
    """Mean loss if the token `lag` positions on were the next token, in nats, for several lags."""

    lags: tuple[int, ...]
    keeps: ClassVar[Any] = staticmethod(copy_length)

    def __call__(
        self, logits: Float[Tensor, "batch kept d_vocab"], tokens: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch lag"]:
        """Return one number per lag, over the positions whose token `lag` on is in the copy."""
        n = copy_length(tokens)
        second_logits, second = logits[:, -n:].float(), tokens[:, -n:]
        log_probs = second_logits - second_logits.logsumexp(-1, keepdim=True)
        losses = [
            -log_probs[:, :-lag].gather(-1, second[:, lag:, None])[..., 0].double().mean(1)
            for lag in self.lags
        ]
        return torch.stack(losses, dim=1)


def copying(
    model: TransformerBridge,
    edits: Any = (),
    lags: Any = (1, 2, 3, 4),
    *,
    n_prompts: int = 16,
    n_tokens: int = 50,
    batch_size: int | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """Measure which lag the model copies on repeated random tokens, clean and under edits.

    Args:
        model: A TransformerBridge; active patches are part of the clean run.
        edits: One or several edits, each measured alone; edits of a nested list act together.
        lags: 1 for the token that came next in the first copy, 2 for the token after it, ...
        n_prompts: Number of prompts, which are the unit of the intervals.
        n_tokens: Length of one copy, in tokens.
        batch_size: Prompts per forward pass; None: by memory.
        confidence: Level of the intervals.
        seed: Random seed of tokens, bootstrap resamples and halves.
        progress: Whether to show a progress bar; None: on a terminal only.

    Returns:
        A Result. `frame` has a row per condition and lag, with `top1` (how often the likeliest next
        token is the token at that lag) and `loss` (in nats, if that token were the right answer),
        each with an interval, and an edit's paired effect on the loss. `tables["heads"]` has the
        heads whose prefix-matching score reaches 0.1 (*ours*) at some lag in some condition, and
        the lag that they match best. The lag is picked on one half of the prompts, and the scores
        are those on the other.

    Raises:
        EditError: An edit that does not fit the model.
        PromptError: Two copies that exceed the context, or lags outside 1 to `n_tokens` − 1.
        PatchError: As `patch` raises it.
    """
    require_options(seed, confidence, n_prompts=n_prompts, n_tokens=n_tokens)
    wanted = () if isinstance(edits, (list, tuple)) and not edits else conditions(edits)
    chosen = _lags(lags, n_tokens)
    prompts = repeated(model, n_prompts, n_tokens, seed)
    matched_lags = sorted({0, 1, *chosen})
    matching = [PrefixMatching(lag=lag) for lag in matched_lags]
    runner = MetricRunner(model, [LagTop1(chosen), LagLoss(chosen), *matching])
    values = evaluate(model, runner, prompts, wanted, batch_size, progress)
    runs = [Condition(), *wanted]
    tops, losses = [of_run[0] for of_run in values], [of_run[1] for of_run in values]
    matches = [torch.stack(of_run[2:], dim=-1) for of_run in values]  # [prompt, head, lag]
    frame = _frame(runs, chosen, tops, losses, seed, confidence)
    details = {
        "measured": [str(condition) for condition in wanted],
        "prompts": prompts.record,
        "confidence": confidence,
        "seed": seed,
    }
    return Result(
        "copying",
        frame,
        {"heads": _heads(runs, matched_lags, matches, runner.labels(2, 0), seed, confidence)},
        (
            *(_remark(run, chosen, top, seed) for run, top in zip(runs, tops, strict=True)),
            *few_prompts(n_prompts),
        ),
        provenance(model, **details),
    )


def _frame(
    runs: list[Condition],
    lags: tuple[int, ...],
    tops: list[Tensor],
    losses: list[Tensor],
    seed: int,
    confidence: float,
) -> pd.DataFrame:
    """Return a row per condition and lag."""
    rows = []
    for condition, top, loss in zip(runs, tops, losses, strict=True):
        top_low, top_high = interval(top, seed, confidence)
        loss_low, loss_high = interval(loss, seed, confidence)
        effect = compared(losses[0], loss, seed, confidence)
        for at, lag in enumerate(lags):
            row = {
                "edit": str(condition),
                "lag": lag,
                "n": len(top),
                "top1": float(top[:, at].mean()),
                "top1_low": float(top_low[at]),
                "top1_high": float(top_high[at]),
                "loss": float(loss[:, at].mean()),
                "loss_low": float(loss_low[at]),
                "loss_high": float(loss_high[at]),
            }
            if condition.edits:
                row |= {key: float(effect[key][at]) for key in ("effect", "low", "high", "p")}
            rows.append(row)
    return adjusted(rows)


def _heads(
    runs: list[Condition],
    lags: list[int],
    matches: list[Tensor],
    names: list[str],
    seed: int,
    confidence: float,
) -> pd.DataFrame:
    """Return a row per condition and head that matches some lag in some condition.

    Heads and lags are picked on one half of the prompts, and their scores are those on the other.
    """
    import pandas as pd

    picking, estimating = split(len(matches[0]), seed, "copying halves")
    means = torch.stack([scores[picking].mean(0) for scores in matches])  # [condition, head, lag]
    shown = (means[..., 1:].amax(-1) >= _LEAST).any(0).nonzero()[:, 0]
    order = shown[means[0, shown, 1].argsort(descending=True, stable=True)]
    rows = []
    for condition, scores, mean in zip(runs, matches, means, strict=True):
        low, high = interval(scores[estimating], seed, confidence)
        estimate = scores[estimating].mean(0)
        for head in order.tolist():
            best = int(mean[head].argmax())
            rows.append(
                {
                    "edit": str(condition),
                    "head": names[head],
                    "matches_lag": lags[best] if float(mean[head, best]) >= _LEAST else None,
                    "score": float(estimate[head, best]),
                    "low": float(low[head, best]),
                    "high": float(high[head, best]),
                    "at_lag_1": float(estimate[head, 1]),
                }
            )
    columns = ["edit", "head", "matches_lag", "score", "low", "high", "at_lag_1"]
    frame = pd.DataFrame(rows, columns=columns)
    return frame.astype({"matches_lag": "Int64"})


def _remark(condition: Condition, lags: tuple[int, ...], top: Tensor, seed: int) -> str:
    """Say which lag is copied most often: picked on one half of the prompts, rate on the other."""
    picking, estimating = split(len(top), seed, "copying halves")
    rates = top[picking].mean(0)
    best = int(rates.argmax())
    rate = float(top[estimating, best].mean())
    if float(rates[best]) < _LEAST:
        return f"{condition}: copies no lag of {', '.join(map(str, lags))} (at best {rate:.0%})"
    return f"{condition}: copies lag {lags[best]} ({rate:.0%} of tokens)"
