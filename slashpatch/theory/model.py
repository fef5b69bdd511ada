"""A two-layer attention-only transformer whose layers are easy to interpret.

Layer 1 has one head with RoPE, layer 2 one head without. The output of layer 1 is not added to the
token's embedding but kept beside it. The head of layer 2 matches its own token with the token that
layer 1 has copied to another position, and outputs the embedding at that position.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from ..maths.rotary import Rotary
from .data import Examples, seeded
from .settings import Settings


@dataclass
class Pass:
    """The result of one forward pass.

    Attributes:
        q: Queries of layer 1, before RoPE.
        k: Keys of layer 1, before RoPE.
        slash: Attention pattern of layer 1.
        matching: Attention pattern of layer 2.
        loss: Mean loss over positions with a target.
    """

    q: Float[Tensor, "batch pos d_head"]
    k: Float[Tensor, "batch pos d_head"]
    slash: Float[Tensor, "batch pos pos"]
    matching: Float[Tensor, "batch pos pos"]
    loss: Float[Tensor, ""]


@dataclass
class ShallowTransformer:
    """The trainable weights: W_Q and W_K of layer 1, and the matching matrix of layer 2.

    Attributes:
        w_q: W_Q of layer 1. d_model is the vocabulary, a label and the common direction.
        w_k: W_K of layer 1.
        w_m: Entry (s, t) is the score of layer 2 from a position with token s to a position to
            which layer 1 has copied token t.
    """

    w_q: Float[Tensor, "d_model d_head"]
    w_k: Float[Tensor, "d_model d_head"]
    w_m: Float[Tensor, "vocabulary vocabulary"]

    @classmethod
    def initial(cls, settings: Settings) -> ShallowTransformer:
        """Return initial weights: small random W_Q and W_K, and w_m = `matching` · identity."""
        d_model, d_head = settings.vocabulary + 2, 2 * len(settings.thetas())
        generator = seeded(settings.seed, "weights")
        w_q, w_k = (
            settings.initial
            * d_model**-0.5
            * torch.randn(d_model, d_head, generator=generator, dtype=torch.float32)
            for _ in range(2)
        )
        return cls(
            w_q, w_k, settings.matching * torch.eye(settings.vocabulary, dtype=torch.float32)
        )

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights by name."""
        return {"w_q": self.w_q, "w_k": self.w_k, "w_m": self.w_m}

    def forward(self, settings: Settings, examples: Examples) -> Pass:
        """Run the model on examples.

        The loss is cross-entropy in nats for copying and squared error for regression.
        """
        x, vocabulary = examples.x, settings.vocabulary
        rotary = settings.rotary()
        q, k = x @ self.w_q, x @ self.w_k
        slash = attention(q, k, rotary)
        copied = slash @ x[..., :vocabulary]
        queries = einsum(x[..., :vocabulary], self.w_m, "batch pos s, s t -> batch pos t")
        matching = _causal_softmax(einsum(queries, copied, "b query t, b key t -> b query key"))
        output = (matching @ x)[examples.asked]
        targets = examples.targets[examples.asked]
        if settings.task == "copying":
            logits = settings.output_scale * output[:, :vocabulary]
            loss = torch.nn.functional.cross_entropy(logits, targets)
        else:
            loss = (output[:, vocabulary] - targets).square().mean()
        return Pass(q, k, slash, matching, loss)


def attention(
    q: Float[Tensor, "batch pos d_head"], k: Float[Tensor, "batch pos d_head"], rotary: Rotary
) -> Float[Tensor, "batch pos pos"]:
    """Return the causal attention pattern of one head with RoPE, from q and k before RoPE."""
    positions = torch.arange(q.shape[1])
    q, k = rotary.rotate(q, positions), rotary.rotate(k, positions)
    return _causal_softmax(rotary.scale * einsum(q, k, "b query d, b key d -> b query key"))


def _causal_softmax(scores: Float[Tensor, "batch pos pos"]) -> Float[Tensor, "batch pos pos"]:
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -torch.inf).softmax(-1)
