"""Slash scores of each prompt by itself, where a scan keeps their sums only."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from .. import bridge
from ..bridge.workers.options import Workers
from ..data.prompts import PromptSet
from ..errors import OffsetError
from ..maths.offsets import as_offsets
from .batches import ScanJob
from .scan import batches_of, in_order, which_engine

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def prompt_scores(
    model: TransformerBridge,
    prompts: PromptSet,
    offsets: tuple[int, ...],
    engine: str = "auto",
    *,
    batch_size: int | None = None,
    progress: bool | None = None,
    workers: Workers | None = None,
) -> Float[Tensor, "prompt layer head offset"]:
    """Return the slash scores of every prompt, in [0, 1], float64.

    The model is run as it is, as in `scan`, whose scores are the means over prompts.

    Args:
        model: A TransformerBridge in evaluation mode.
        prompts: Tokenised prompts, each longer than the largest offset.
        offsets: Δ ≥ 0, in tokens.
        engine: As in `scan`.
        batch_size: As in `scan`.
        progress: As in `scan`.
        workers: As in `scan`.

    Raises:
        OffsetError: A prompt that is too short for an offset.
        ModelError: As in `scan`.
        ScanError: As in `scan`.
    """
    info, deltas = bridge.read(model), as_offsets(offsets)
    shortest = min(len(tokens) for tokens in prompts.tokens)
    if deltas[-1] >= shortest:
        raise OffsetError(
            f"offset {deltas[-1]} needs prompts of at least {deltas[-1] + 1} tokens each; the "
            f"shortest has {shortest}"
        )
    engine = which_engine(model, engine)
    batch_size = 1 if info.rope_follows_length else batch_size
    places = list(batches_of(prompts, batch_size, info.n_heads, engine))
    batches = [[prompts.tokens[index] for index in indices] for indices in places]
    job = ScanJob(batches, deltas, engine, None, keeps_prompts=True)
    with closing(in_order(model, job, workers, progress)) as found:
        parts = [sums.by_prompt for sums in found if sums.by_prompt is not None]
    order = torch.tensor([index for indices in places for index in indices])
    return torch.cat(parts)[order.argsort()]
