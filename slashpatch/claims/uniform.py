"""Slash scores of attention that is uniform over the tokens a layer can see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import bridge
from ..maths.precision import MASKED

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True, eq=False)
class Uniform:
    """What a token would get of uniform attention, in each layer.

    Attributes:
        offsets: The offsets Δ.
        weights: 1 over the number of tokens that query i sees, where it sees token i − Δ, else 0.
    """

    offsets: tuple[int, ...]
    weights: Float[Tensor, "layer pos offset"]

    def score(self, n_tokens: int) -> Float[Tensor, "layer offset"]:
        """Return the slash scores in a prompt of `n_tokens` (arXiv 2601.08297's definition).

        1/(N−Δ) Σ_{i≥Δ} 1/(i+1) where a layer has no sliding window.
        """
        columns = [
            self.weights[:, offset:n_tokens, at].mean(1) for at, offset in enumerate(self.offsets)
        ]
        return torch.stack(columns, dim=1)


def uniform(
    model: TransformerBridge, tokens: Int[Tensor, "pos"], offsets: Sequence[int]
) -> Uniform:
    """Read from one forward pass which tokens each layer sees: those before, in its window."""
    info, n = bridge.read(model), len(tokens)
    weights = torch.zeros(info.n_layers, n, len(offsets), dtype=torch.float64)

    def add(scores: Tensor, hook: Any) -> None:
        visible = (scores[0].detach() > MASKED).any(0).tril().cpu()
        share = visible.double() / visible.sum(1, keepdim=True).clamp(min=1)
        for at, offset in enumerate(offsets):
            weights[hook.layer(), offset:, at] = share.diagonal(-offset)

    hooks = [(info.hook(layer, "scores"), add) for layer in range(info.n_layers)]
    with torch.no_grad():
        bridge.run_for_hooks(model, tokens[None].to(model.cfg.device), hooks)
    return Uniform(tuple(offsets), weights)
