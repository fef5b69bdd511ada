"""Forward passes of one prompt that end at the last layer whose hooks are wanted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import bridge

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def run_layers(
    model: TransformerBridge, prompt: Tensor, hooks: list[tuple[str, Any]], last: int
) -> None:
    """Run one prompt [pos] with hooks, without gradients, no further than layer `last`."""
    tokens = prompt[None].to(model.cfg.device)
    with torch.no_grad():
        if last + 1 < model.cfg.n_layers:
            model.run_with_hooks(tokens, fwd_hooks=hooks, return_type=None, stop_at_layer=last + 1)
        else:
            bridge.run_for_hooks(model, tokens, hooks)
