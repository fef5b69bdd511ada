"""What a model gains by copying: it cannot be tested where there is nothing to lose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..data.prompts import PromptSet
from ..effects.metrics.by_name import as_metric
from ..effects.running.evaluate import evaluate
from ..effects.running.evaluation import MetricRunner
from ..effects.running.inputs import repeated
from ..maths.repeated_tokens import copy_length
from .measured import mean
from .rules import GAIN
from .settings import Settings

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True, eq=False)
class Copying:
    """Whether a model copies repeated random tokens.

    Attributes:
        prompts: The repeated random tokens.
        gain: Loss on the first copy minus that on the second, per prompt, in nats.
        why_not: Why copying cannot be tested; empty if it can.
    """

    prompts: PromptSet
    gain: Float[Tensor, "prompt"]
    why_not: str


def copying_gain(
    model: TransformerBridge, settings: Settings, seed: int, progress: bool | None
) -> Copying:
    """Measure what the clean model gains by copying."""
    prompts = repeated(model, settings.n_prompts, settings.n_copied, seed)
    first = clean_values(model, prompts, first_copy_loss, progress)[:, 0]
    gain = first - clean_values(model, prompts, "copying", progress)[:, 0]
    found = mean("copying", gain, seed)
    why = (
        f"the model does not copy: its loss on the second copy of random tokens is lower by "
        f"{found.estimate:.2f} nats [{found.low:.2f}, {found.high:.2f}] than on the first (at "
        f"least {GAIN:g} are needed)"
    )
    return Copying(prompts, gain, "" if found.low >= GAIN else why)


def clean_values(
    model: TransformerBridge, prompts: PromptSet, metric: Any, progress: bool | None
) -> Float[Tensor, "prompt _"]:
    """Return a metric's values in the clean run."""
    runner = MetricRunner(model, [as_metric(metric)])
    ((values,),) = evaluate(model, runner, prompts, [], None, progress, None)
    return values


def first_copy_loss(
    logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch"]:
    """Return the mean loss on the first copy of repeated tokens, where nothing can be copied.

    Without the first token of the copy, as in the copying loss. In nats.
    """
    n, length = copy_length(tokens), tokens.shape[1]
    start = length - 2 * n
    predicted = logits[:, start : start + n - 1].float()
    targets = tokens[:, start + 1 : start + n].long()
    losses = torch.nn.functional.cross_entropy(predicted.mT, targets, reduction="none")
    return losses.double().mean(1)
