"""A two-layer attention-only transformer whose layers can be read off.

Layer 1 has one head with RoPE; layer 2 one head without. What layer 1 writes is kept beside the
token's own embedding, so that each is what it is: layer 2 compares a token's own semantic part
with the semantic part that layer 1 brought to another position, and says what stands there.
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
    """What one forward pass gives."""

    q: Float[Tensor, "batch pos d_head"]
    k: Float[Tensor, "batch pos d_head"]
    slash: Float[Tensor, "batch pos pos"]
    matching: Float[Tensor, "batch pos pos"]
    loss: Float[Tensor, ""]


@dataclass
class ShallowTransformer:
    """The trainable weights: W_Q and W_K of layer 1, and the matching matrix of layer 2.

    Attributes:
        w_q: [d_model, d_head]; d_model is the vocabulary, a label and the common direction.
        w_k: [d_model, d_head].
        w_m: [vocabulary, vocabulary]: how much a position of token s asks for one to which layer 1
            has brought token t.
    """

    w_q: Float[Tensor, "d_model d_head"]
    w_k: Float[Tensor, "d_model d_head"]
    w_m: Float[Tensor, "vocabulary vocabulary"]

    @classmethod
    def initial(cls, settings: Settings) -> ShallowTransformer:
        """Small random W_Q and W_K, and `matching` times the identity, by the settings' seed."""
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
        """By name."""
        return {"w_q": self.w_q, "w_k": self.w_k, "w_m": self.w_m}

    def forward(self, settings: Settings, examples: Examples) -> Pass:
        """Both attentions, and the mean loss over what is asked.

        Copying: cross-entropy in nats. Regression: squared error.
        """
        x, vocabulary = examples.x, settings.vocabulary
        rotary = settings.rotary()
        q, k = x @ self.w_q, x @ self.w_k
        slash = attention(q, k, rotary)
        brought = slash @ x[..., :vocabulary]
        asks = einsum(x[..., :vocabulary], self.w_m, "batch pos s, s t -> batch pos t")
        matching = _causal_softmax(einsum(asks, brought, "b query t, b key t -> b query key"))
        read = (matching @ x)[examples.asked]
        wanted = examples.targets[examples.asked]
        if settings.task == "copying":
            logits = settings.output_scale * read[:, :vocabulary]
            loss = torch.nn.functional.cross_entropy(logits, wanted)
        else:
            loss = (read[:, vocabulary] - wanted).square().mean()
        return Pass(q, k, slash, matching, loss)


def attention(
    q: Float[Tensor, "batch pos d_head"], k: Float[Tensor, "batch pos d_head"], rotary: Rotary
) -> Float[Tensor, "batch pos pos"]:
    """Causal attention of one head with RoPE."""
    positions = torch.arange(q.shape[1])
    q, k = rotary.rotate(q, positions), rotary.rotate(k, positions)
    return _causal_softmax(rotary.scale * einsum(q, k, "b query d, b key d -> b query key"))


def _causal_softmax(scores: Float[Tensor, "batch pos pos"]) -> Float[Tensor, "batch pos pos"]:
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -torch.inf).softmax(-1)
