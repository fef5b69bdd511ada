"""What is measured of one pass: numbers per prompt, never averaged over prompts.

A metric is a function of any of `logits` [batch, pos, d_vocab], `tokens` [batch, pos], `intact`
(the unedited model's logits), `index` (which prompts these are, [batch]) and `n_prompts`, by those
names; it returns [batch], or [batch, n] for several numbers. Metrics of attention are objects with
a `read`. A function is known by its name: two that differ must not share one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import MetricError, PromptError
from ..heads import HeadsLike, heads
from ..slash import slash_rows

Metric = Any


def token_losses(
    logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos-1"]:
    """Loss of each token given those before it, in nats."""
    from transformer_lens.utilities.lm_utils import lm_cross_entropy_loss

    return lm_cross_entropy_loss(logits.float(), tokens.long(), per_token=True)


def next_token_loss(
    logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch"]:
    """Mean next-token loss, in nats."""
    return token_losses(logits, tokens).double().mean(1)


def loss_by_position(
    logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos-1"]:
    """Next-token loss of the prediction made at each position, in nats. Prompts of one length."""
    return token_losses(logits, tokens).double()


def kl_divergence(
    true: Float[Tensor, "*of d_vocab"], other: Float[Tensor, "*of d_vocab"]
) -> Float[Tensor, "*of"]:
    """KL(true ‖ other) of the next-token distributions of two sets of logits, in nats, from 0."""
    p, q = true.float().log_softmax(-1), other.float().log_softmax(-1)
    return torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1).clamp(min=0)


def kl_to_intact(
    logits: Float[Tensor, "batch pos d_vocab"], intact: Float[Tensor, "batch pos d_vocab"]
) -> Float[Tensor, "batch"]:
    """Mean over positions of KL(intact ‖ this) of the next-token distribution, in nats."""
    # One prompt at a time: the logarithms of a large vocabulary are what takes memory here.
    pairs = zip(intact, logits, strict=True)
    return torch.stack([kl_divergence(true, other).double().mean() for true, other in pairs])


def top1_agreement(
    logits: Float[Tensor, "batch pos d_vocab"], intact: Float[Tensor, "batch pos d_vocab"]
) -> Float[Tensor, "batch"]:
    """How often the likeliest next token is the intact model's, from 0 to 1."""
    return (logits.argmax(-1) == intact.argmax(-1)).double().mean(1)


def copy_length(tokens: Int[Tensor, "batch pos"]) -> int:
    """Length of one copy in prompts that are tokens twice over, after a first token or none.

    Raises PromptError for other prompts.
    """
    n = tokens.shape[1] // 2
    if n < 2 or not torch.equal(tokens[:, -n:], tokens[:, -2 * n : -n]):
        raise PromptError(
            "this metric is of copying: it needs prompts that are the same tokens twice over, such "
            "as slashpatch.prompts.repeated_random_tokens makes"
        )
    return n


def copying_loss(
    logits: Float[Tensor, "batch kept d_vocab"], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch"]:
    """Mean loss on the second copy of repeated tokens but its first, in nats.

    Chance is the log of d_vocab. *Ours*, after the usual induction test (Olsson et al., arXiv
    2209.11895). Raises PromptError.
    """
    n = copy_length(tokens)
    return token_losses(logits[:, -n:], tokens[:, -n:]).double().mean(1)


def copying_top1(
    logits: Float[Tensor, "batch kept d_vocab"], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch"]:
    """How often the likeliest token is the next one of the second copy. Raises PromptError."""
    from transformer_lens.utilities.lm_utils import lm_accuracy

    n = copy_length(tokens)
    return lm_accuracy(logits[:, -n:], tokens[:, -n:], per_token=True).double().mean(1)


@dataclass(frozen=True)
class LogitDifference:
    """Logit of one answer minus that of another, at one position.

    Attributes:
        right: Token id of the answer, or one for each prompt.
        wrong: Token id of the other answer, or one for each prompt.
        position: Where the prediction is read; −1 is the last token.
    """

    right: int | tuple[int, ...]
    wrong: int | tuple[int, ...]
    position: int = -1

    def __post_init__(self) -> None:
        for name in ("right", "wrong"):
            given = getattr(self, name)
            given = given.tolist() if hasattr(given, "tolist") else given
            ids = tuple(given) if isinstance(given, (list, tuple)) else given
            if not all(_is_integer(one) for one in (ids if isinstance(ids, tuple) else (ids,))):
                raise MetricError(
                    f"LogitDifference: {name} is a token id, or one for each prompt; got {given!r}"
                )
            object.__setattr__(self, name, ids)
        if not _is_integer(self.position):
            raise MetricError(f"LogitDifference: position is an integer; got {self.position!r}")

    def __call__(
        self,
        logits: Float[Tensor, "batch pos d_vocab"],
        index: Int[Tensor, "batch"],
        n_prompts: int,
    ) -> Float[Tensor, "batch"]:
        """The difference, per prompt. Raises MetricError for answers that do not fit."""
        if not -logits.shape[1] <= self.position < logits.shape[1]:
            raise MetricError(
                f"position {self.position} is outside a prompt of {logits.shape[1]} tokens"
            )
        here = logits[:, self.position].double()
        right, wrong = (self._ids(ids, index, n_prompts, here) for ids in (self.right, self.wrong))
        rows = torch.arange(len(here), device=here.device)
        return here[rows, right] - here[rows, wrong]

    def _ids(
        self, ids: int | tuple[int, ...], index: Tensor, n_prompts: int, here: Tensor
    ) -> Tensor:
        each = torch.tensor(ids, device=here.device)
        if each.ndim:
            if len(each) != n_prompts:
                raise MetricError(
                    f"expected an answer for each of {n_prompts} prompts, or one for all; got "
                    f"{len(each)}"
                )
            each = each[index.to(each.device)]
        if int(each.min()) < 0 or int(each.max()) >= here.shape[1]:
            raise MetricError(f"answers are token ids from 0 to {here.shape[1] - 1}; got {ids}")
        return each.expand(len(here))


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class SlashScores:
    """Slash score of heads at one offset (arXiv 2601.08297, definition), per prompt.

    Attributes:
        heads: Whose scores; None for all. Heads downstream of an edit show what it does to them.
        offset: Δ.
    """

    heads: HeadsLike | None = None
    offset: int = 1

    def __post_init__(self) -> None:
        _fix_heads(self)
        if not _is_integer(self.offset) or self.offset < 0:
            raise MetricError(f"SlashScores: offset is an integer from 0; got {self.offset!r}")

    def read(self, pattern: Any, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch head"]:
        """Mean attention i → i−Δ of each head of a layer."""
        if self.offset >= tokens.shape[1]:
            raise PromptError(
                f"offset {self.offset} needs prompts of at least {self.offset + 1} tokens; "
                f"got one of {tokens.shape[1]}"
            )
        offsets = torch.tensor([self.offset], device=tokens.device)
        return slash_rows(pattern, offsets)[:, :, self.offset :, 0].double().mean(-1)


@dataclass(frozen=True)
class PrefixMatching:
    """Induction score of heads, per prompt (Olsson et al., arXiv 2209.11895).

    On repeated tokens: the mean attention from a token of the second copy to the one `lag` places
    after its first occurrence.

    Attributes:
        heads: Whose scores; None for all.
        lag: 1 is what an induction head matches; 0 the token itself.
    """

    heads: HeadsLike | None = None
    lag: int = 1
    repeated: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _fix_heads(self)
        if not _is_integer(self.lag) or self.lag < 0:
            raise MetricError(f"PrefixMatching: lag is an integer from 0; got {self.lag!r}")

    def read(self, pattern: Any, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch head"]:
        """Mean attention of each head of a layer. Raises PromptError for prompts without copies."""
        return matched(pattern, tokens, (self.lag,))[..., 0]


def _fix_heads(metric: Any) -> None:
    """Heads as a tuple, so that equal metrics are equal."""
    if metric.heads is not None:
        found = heads(metric.heads)
        if not found:
            raise MetricError(f"{type(metric).__name__} needs at least one head, or None for all")
        object.__setattr__(metric, "heads", found)


def matched(
    pattern: Any, tokens: Int[Tensor, "batch pos"], lags: Sequence[int]
) -> Float[Tensor, "batch head lag"]:
    """Mean attention from the second copy to `lag` places after each token's first occurrence."""
    n = copy_length(tokens)
    if not all(0 <= lag < n for lag in lags):
        raise PromptError(f"lags of copies of {n} tokens are 0 to {n - 1}; got {list(lags)}")
    offsets = torch.tensor([n - lag for lag in lags], device=tokens.device)
    return slash_rows(pattern, offsets)[:, :, -n:].double().mean(2)


for _function in (copying_loss, copying_top1):
    _function.repeated = True  # type: ignore[attr-defined]
    _function.keeps = copy_length  # type: ignore[attr-defined]

#: What a metric function can ask for.
_GIVEN = {"logits", "tokens", "intact", "index", "n_prompts"}

#: What the command line calls them.
METRICS: dict[str, Metric] = {
    "loss": next_token_loss,
    "kl": kl_to_intact,
    "top1": top1_agreement,
    "loss-by-position": loss_by_position,
    "copying": copying_loss,
    "copying-top1": copying_top1,
    "prefix-matching": PrefixMatching(),
    "slash": SlashScores(),
}


def as_metric(spec: Any) -> Metric:
    """A metric from its name, or the function or object itself. Raises MetricError."""
    if isinstance(spec, str):
        if spec not in METRICS:
            raise MetricError(f"no metric {spec!r}; expected one of {', '.join(METRICS)}")
        return METRICS[spec]
    if inspect.isclass(spec) or not (callable(spec) or hasattr(spec, "read")):
        raise MetricError(
            "a metric is a name, a function of logits and tokens, or an object with `read` such as "
            f"SlashScores(); got {spec!r}"
        )
    if not hasattr(spec, "read"):
        try:
            asked = wanted(spec)
        except (TypeError, ValueError):
            asked = []
        unknown = sorted(set(asked) - _GIVEN)
        if unknown or not asked:
            raise MetricError(
                f"the metric {metric_name(spec)} asks for {', '.join(unknown) or 'nothing'}; it "
                f"can have {', '.join(sorted(_GIVEN))}, by these names"
            )
    return spec


def metric_name(metric: Metric) -> str:
    """How results call it: its short name, the function's own, or the object as it is written."""
    for name, known in METRICS.items():
        if known is metric or (hasattr(known, "read") and known == metric):
            return name
    return str(getattr(metric, "__name__", None) or repr(metric))


def wanted(metric: Callable[..., Tensor]) -> list[str]:
    """The arguments that a metric function must be given."""
    return [
        name
        for name, parameter in inspect.signature(metric).parameters.items()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    ]


def kept_positions(metrics: Sequence[Metric], tokens: Int[Tensor, "batch pos"]) -> int:
    """How many of the last positions' logits all the metrics can do with."""
    n_pos = tokens.shape[1]
    keeps = [
        0 if hasattr(metric, "read") else getattr(metric, "keeps", lambda _: n_pos)(tokens)
        for metric in metrics
    ]
    return max(1, *keeps)


def needs_copies(metric: Metric) -> bool:
    """Whether a metric is of repeated tokens only."""
    return bool(getattr(metric, "repeated", False))
