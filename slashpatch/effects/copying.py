"""Copying: how well the model predicts the second run through tokens that it has seen once.

Uniform random tokens repeat; only a model that finds the earlier copy can predict the second one.
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
from .attention_metrics import PrefixMatching
from .conditions import Condition, conditions, require_options
from .evaluation import Meter, evaluate
from .inputs import repeated
from .logit_metrics import copy_length, copying_loss
from .result import Result
from .statistics import adjusted, compared, interval

if TYPE_CHECKING:
    import pandas as pd
    from transformer_lens.model_bridge import TransformerBridge

#: Below this rate, and this score of a head, nothing is said to be copied or matched. *Ours*.
_LEAST = 0.1


def copying_losses(
    model: TransformerBridge, n_prompts: int = 8, n_tokens: int = 100, seed: int = 0
) -> Float[Tensor, "prompt"]:
    """Mean next-token loss on the second copy of `n_tokens` random tokens, per prompt, in nats.

    The model as it is, patches included. Chance is the log of the vocabulary size. The first token
    of the second copy is left out: nothing announces it. *Ours*, after the usual induction test
    (Olsson et al., arXiv 2209.11895). Raises PromptError for fewer than 2 tokens, or more than the
    context holds twice.
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
    """How often the likeliest token is the one `lag` places on in the first copy, per prompt.

    Over positions of the second copy whose continuation lies in it. A model that copies says the
    next token: lag 1. Chance is one over the vocabulary. Raises PromptError as `copying_losses`
    does, or for a lag that is not from 1 to n_tokens − 1. *Ours*.
    """
    chosen = _lags(lags, n_tokens)
    tokens = torch.stack(repeated(model, n_prompts, n_tokens, seed).tokens).to(model.cfg.device)
    with torch.no_grad():
        rates = LagTop1(chosen)(model(tokens), tokens).cpu()
    return rates[:, [chosen.index(lag) for lag in lags]]


def _lags(lags: Any, n_tokens: int) -> tuple[int, ...]:
    """Distinct lags, ascending."""
    try:
        found = as_offsets(lags)
    except OffsetError:
        found = ()
    if not found or not (found[0] >= 1 and found[-1] < n_tokens):
        raise PromptError(f"lags are integers from 1 to {n_tokens - 1}; got {lags!r}")
    return found


@dataclass(frozen=True)
class LagTop1:
    """How often the likeliest token is the one `lag` places on, in the copy; for each of `lags`."""

    lags: tuple[int, ...]
    keeps: ClassVar[Any] = staticmethod(copy_length)

    def __call__(
        self, logits: Float[Tensor, "batch kept d_vocab"], tokens: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch lag"]:
        """Over positions of the second copy whose continuation lies in it."""
        n = copy_length(tokens)
        guesses, second = logits[:, -n:].argmax(-1), tokens[:, -n:]
        rates = [(guesses[:, :-lag] == second[:, lag:]).double().mean(1) for lag in self.lags]
        return torch.stack(rates, dim=1)


@dataclass(frozen=True)
class LagLoss:
    """Mean loss if the token `lag` places on were the next one, in nats; for each of `lags`."""

    lags: tuple[int, ...]
    keeps: ClassVar[Any] = staticmethod(copy_length)

    def __call__(
        self, logits: Float[Tensor, "batch kept d_vocab"], tokens: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch lag"]:
        """Over positions of the second copy whose continuation lies in it."""
        n = copy_length(tokens)
        here, second = logits[:, -n:].float(), tokens[:, -n:]
        chances = here - here.logsumexp(-1, keepdim=True)
        losses = [
            -chances[:, :-lag].gather(-1, second[:, lag:, None])[..., 0].double().mean(1)
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
    """Which lag the model copies on repeated random tokens, clean and under edits.

    Args:
        model: A TransformerBridge; active patches are part of "clean".
        edits: An edit or several, each by itself; those of a nested list act together.
        lags: 1: the token that came next in the first copy; 2: the one after it.
        n_prompts: How many; the unit of intervals.
        n_tokens: Length of one copy.
        batch_size: Prompts per pass; picked by memory when None.
        confidence: Of the intervals.
        seed: Of tokens, resamples and sign flips.
        progress: Whether to show a bar; when None, on a terminal only.

    Returns:
        A Result. `frame`: a row per condition and lag, with `top1` (how often the likeliest token
        is the one at that lag) and `loss` (nats, if it were the right one), each with an interval,
        and the effect on the loss. `tables["heads"]`: heads whose prefix-matching score reaches 0.1
        at some lag in some condition, and the lag that they match.

    Raises:
        EditError, PromptError, and what `patch` raises.
    """
    require_options(seed, confidence, n_prompts=n_prompts, n_tokens=n_tokens)
    wanted = () if isinstance(edits, (list, tuple)) and not edits else conditions(edits)
    chosen = _lags(lags, n_tokens)
    found = repeated(model, n_prompts, n_tokens, seed)
    tried = sorted({0, 1, *chosen})
    matching = [PrefixMatching(lag=lag) for lag in tried]
    meter = Meter(model, [LagTop1(chosen), LagLoss(chosen), *matching])
    values = evaluate(model, meter, found, wanted, batch_size, progress)
    every = [Condition(), *wanted]
    tops, losses = [one[0] for one in values], [one[1] for one in values]
    matches = [torch.stack(one[2:], dim=-1) for one in values]  # [prompt, head, lag]
    frame = _frame(every, chosen, tops, losses, seed, confidence)
    details = {
        "measured": [str(condition) for condition in wanted],
        "prompts": found.record,
        "confidence": confidence,
        "seed": seed,
    }
    return Result(
        "copying",
        frame,
        {"heads": _heads(every, tried, matches, meter.labels(2, 0), seed, confidence)},
        tuple(_remark(condition, chosen, top) for condition, top in zip(every, tops, strict=True)),
        provenance(model, **details),
    )


def _frame(
    every: list[Condition],
    lags: tuple[int, ...],
    tops: list[Tensor],
    losses: list[Tensor],
    seed: int,
    confidence: float,
) -> pd.DataFrame:
    rows = []
    for condition, top, loss in zip(every, tops, losses, strict=True):
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
    every: list[Condition],
    lags: list[int],
    matches: list[Tensor],
    names: list[str],
    seed: int,
    confidence: float,
) -> pd.DataFrame:
    import pandas as pd

    means = torch.stack([one.mean(0) for one in matches])  # [condition, head, lag]
    shown = (means[..., 1:].amax(-1) >= _LEAST).any(0).nonzero()[:, 0]
    order = shown[means[0, shown, 1].argsort(descending=True, stable=True)]
    rows = []
    for condition, one, mean in zip(every, matches, means, strict=True):
        low, high = interval(one, seed, confidence)
        for head in order.tolist():
            best = int(mean[head].argmax())
            rows.append(
                {
                    "edit": str(condition),
                    "head": names[head],
                    "matches_lag": lags[best] if float(mean[head, best]) >= _LEAST else None,
                    "score": float(mean[head, best]),
                    "low": float(low[head, best]),
                    "high": float(high[head, best]),
                    "at_lag_1": float(mean[head, 1]),
                }
            )
    columns = ["edit", "head", "matches_lag", "score", "low", "high", "at_lag_1"]
    frame = pd.DataFrame(rows, columns=columns)
    return frame.astype({"matches_lag": "Int64"})


def _remark(condition: Condition, lags: tuple[int, ...], top: Tensor) -> str:
    rates = top.mean(0)
    best = int(rates.argmax())
    rate = float(rates[best])
    if rate < _LEAST:
        return f"{condition}: copies no lag of {', '.join(map(str, lags))} (at best {rate:.0%})"
    return f"{condition}: copies lag {lags[best]} ({rate:.0%} of tokens)"
