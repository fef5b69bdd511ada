"""Sums over tokens from which rank, cone and mean logits of every head are computed.

From the tokens × d_head matrices of pre-RoPE queries and keys: Gram matrices (whose eigenvalues are
the σ²), sums of vectors, of unit vectors, and of the moduli of rotary pairs. From the logits: sums
by offset. They need one forward pass per batch and constant memory, and sums of two scans add.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..data.heads import Head
from ..errors import ModelError, ScanError
from ..maths.bands import named_bands
from ..maths.rank import r1, r95
from ..maths.rotary import Rotary
from ..maths.spectrum import (
    amplitude_and_phase,
    concentration,
    logit_terms,
    predicted_profile,
)

if TYPE_CHECKING:
    import pandas as pd


#: `Moments.pairing` of a layer whose logits depend on more than the offset.
WEIGHED = "weighed"


class Profile(NamedTuple):
    """Mean logit of a head by offset, measured and predicted from its mean query and key.

    Attributes:
        offsets: Offsets Δ with a measured logit.
        measured: Mean logit i → i−Δ over the tokens.
        predicted: Logit of the mean query and the mean key at Δ.
        correlation: Pearson correlation of the two over these offsets.
    """

    offsets: Int[Tensor, "offset"]
    measured: Float[Tensor, "offset"]
    predicted: Float[Tensor, "offset"]
    correlation: float

    @property
    def measured_peak(self) -> int:
        """Offset with the highest mean logit."""
        return int(self.offsets[self.measured.argmax()])

    @property
    def predicted_peak(self) -> int:
        """Offset with the highest predicted logit."""
        return int(self.offsets[self.predicted.argmax()])


class Cosine(NamedTuple):
    """One rotary pair's share of a head's predicted logit, A cos(θΔ + φ) at offset Δ.

    Attributes:
        pair: Index of the pair, in the model's order.
        wavelength: 2π/θ in tokens; infinite for a pair that does not rotate.
        band: "high", "medium" or "low", the pair's third by frequency.
        amplitude: A ≥ 0.
        phase: φ in radians, from −π to π.
    """

    pair: int
    wavelength: float
    band: str
    amplitude: float
    phase: float


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over `n_tokens` tokens, in float64, and each layer's rotation.

    Attributes:
        gram_q: Gram matrix XᵀX of each head's pre-RoPE queries; `gram_k` of each KV head's keys.
        sum_q: Sum of the queries; `sum_k` of the keys; `sum_x` of the attention's input x.
        unit_q: Sum of the queries divided by their norms; `unit_k` and `unit_x` likewise.
        abs_q: Sum of the modulus of each rotary pair of the queries; `abs_k` of the keys.
        logits: Sum of the unmasked logits i → i−Δ for Δ = 0, 1, ... (a logit that an edit removed
            counts as masked).
        logit_rows: Number of logits in each of these sums.
        inv_freq: Frequencies θ of each layer; NaN for a layer without RoPE.
        gain: Factor of each layer's cos and sin tables (`Rotary.gain`).
        scale: Factor of each layer's dot products.
        pairing: How each layer pairs dimensions: "half", "adjacent", "" without RoPE, or "weighed"
            if a norm after RoPE weighs the two dimensions of a pair differently.
    """

    n_tokens: Int[Tensor, ""]
    gram_q: Float[Tensor, "layer head d_head d_head"]
    gram_k: Float[Tensor, "layer kv_head d_head d_head"]
    sum_q: Float[Tensor, "layer head d_head"]
    sum_k: Float[Tensor, "layer kv_head d_head"]
    sum_x: Float[Tensor, "layer d_model"]
    unit_q: Float[Tensor, "layer head d_head"]
    unit_k: Float[Tensor, "layer kv_head d_head"]
    unit_x: Float[Tensor, "layer d_model"]
    abs_q: Float[Tensor, "layer head pair"]
    abs_k: Float[Tensor, "layer kv_head pair"]
    logits: Float[Tensor, "layer head offset"]
    logit_rows: Int[Tensor, "layer head offset"]
    inv_freq: Float[Tensor, "layer pair"]
    gain: Float[Tensor, "layer"]
    scale: Float[Tensor, "layer"]
    pairing: tuple[str, ...]

    def tensors(self) -> dict[str, Tensor]:
        """Return all fields that are tensors, by name."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "pairing"
        }

    def __add__(self, other: Moments) -> Moments:
        fixed = {"inv_freq", "gain", "scale"}
        mine, theirs = self.tensors(), other.tensors()
        for name in fixed:
            if not torch.equal(mine[name].nan_to_num(-1), theirs[name].nan_to_num(-1)):
                raise ScanError(f"scans of models with different {name} cannot be added")
        if self.logits.shape != other.logits.shape:
            raise ScanError(
                f"scans with profiles over {self.logits.shape[-1]} and {other.logits.shape[-1]} "
                "offsets cannot be added"
            )
        sums = {name: mine[name] + theirs[name] for name in mine if name not in fixed}
        return Moments(**{**mine, **sums}, pairing=self.pairing)

    def rotary(self, layer: int) -> Rotary:
        """Return the layer's rotation.

        Raises ModelError for a layer without RoPE, or whose logits depend on more than the offset.
        """
        if not self.pairing[layer]:
            raise ModelError(f"layer {layer} has no RoPE; profiles need a layer with RoPE")
        if self.pairing[layer] == WEIGHED:
            raise ModelError(
                f"layer {layer} norms queries and keys after RoPE with a weight per dimension, "
                "so its logits depend on the positions and there is no profile by offset"
            )
        return Rotary(
            self.inv_freq[layer],
            self.pairing[layer],
            float(self.gain[layer]),
            float(self.scale[layer]),
        )

    def _kv_head(self, head: Head) -> int:
        return head.head // (self.gram_q.shape[1] // self.gram_k.shape[1])

    def profile(self, head: Head) -> Profile:
        """Return the mean logit by offset, measured and predicted. Raises as `rotary` does."""
        rotary = self.rotary(head.layer)
        rows = self.logit_rows[head.layer, head.head]
        measured = self.logits[head.layer, head.head] / rows
        known = rows > 0
        offsets = torch.arange(len(measured))[known]
        q, k = self.mean(head)
        predicted = predicted_profile(q, k, offsets, rotary)
        both = torch.stack([measured[known], predicted])
        return Profile(offsets, measured[known], predicted, float(torch.corrcoef(both)[0, 1]))

    def mean(self, head: Head) -> tuple[Float[Tensor, "d_head"], Float[Tensor, "d_head"]]:
        """Return the mean pre-RoPE query and key of a head."""
        q = self.sum_q[head.layer, head.head]
        return q / self.n_tokens, self.sum_k[head.layer, self._kv_head(head)] / self.n_tokens

    def amplitude_and_phase(
        self, head: Head
    ) -> tuple[Float[Tensor, "pair"], Float[Tensor, "pair"]]:
        """Return amplitude A_l and phase φ_l of each pair for a head's mean query and mean key.

        `profile(head).predicted` is Σ_l A_l cos(θ_l Δ + φ_l), plus the unrotated dimensions; see
        `slashpatch.maths.spectrum.amplitude_and_phase`. Raises as `rotary` does.
        """
        return amplitude_and_phase(*self.mean(head), self.rotary(head.layer))

    def cosines(self, head: Head) -> list[Cosine]:
        """Return each pair's cosine for a head's mean query and mean key. Raises as `rotary`."""
        inv_freq = self.rotary(head.layer).inv_freq
        columns = [(2 * torch.pi / inv_freq).tolist(), named_bands(inv_freq)]
        columns += [values.tolist() for values in self.amplitude_and_phase(head)]
        return [Cosine(pair, *cells) for pair, cells in enumerate(zip(*columns, strict=True))]

    def pair_peaks(self, head: Head, offset: int) -> Float[Tensor, "pair"]:
        """Return each pair's term of the predicted logit at an offset, minus its mean over offsets.

        Large terms are the frequencies that make a peak at that offset.
        """
        q, k = self.mean(head)
        n = max(self.logits.shape[-1], offset + 1)
        deltas = torch.arange(n)
        terms, _ = logit_terms(q.expand(n, -1), k.expand(n, -1), deltas, self.rotary(head.layer))
        return terms[offset] - terms.mean(0)

    def pair_concentration(self, head: Head) -> Float[Tensor, "part pair"]:
        """Return the concentration |E x_l| / E|x_l| of each rotary pair, for query and key."""
        rotary, kv_head = self.rotary(head.layer), self._kv_head(head)
        return torch.stack(
            [
                concentration(mean, total / self.n_tokens, rotary)
                for mean, total in zip(
                    self.mean(head),
                    (self.abs_q[head.layer, head.head], self.abs_k[head.layer, kv_head]),
                    strict=True,
                )
            ]
        )

    def cones(self) -> dict[str, Float[Tensor, "layer ..."]]:
        """Return the mean cosine of tokens to their mean vector: q, k [layer, head], x [layer]."""
        cones = {}
        for part, total, unit in (
            ("q", self.sum_q, self.unit_q),
            ("k", self.sum_k, self.unit_k),
            ("x", self.sum_x, self.unit_x),
        ):
            direction = total / total.norm(dim=-1, keepdim=True)
            cones[part] = (direction * unit).sum(-1) / self.n_tokens
        return cones

    def rank_table(self) -> pd.DataFrame:
        """Return r1, R95 and cones of Q and K, a row per query head with its KV head's keys."""
        import pandas as pd

        n_layers, n_heads = self.gram_q.shape[:2]
        group = n_heads // self.gram_k.shape[1]
        cones = self.cones()
        columns = {
            "r1_q": r1(self.gram_q),
            "r95_q": r95(self.gram_q),
            "cone_q": cones["q"],
            "r1_k": r1(self.gram_k).repeat_interleave(group, dim=1),
            "r95_k": r95(self.gram_k).repeat_interleave(group, dim=1),
            "cone_k": cones["k"].repeat_interleave(group, dim=1),
            "cone_x": cones["x"][:, None].expand(n_layers, n_heads),
        }
        frame = pd.DataFrame({name: values.flatten().numpy() for name, values in columns.items()})
        heads = [Head(layer, head) for layer in range(n_layers) for head in range(n_heads)]
        frame.insert(0, "name", [str(head) for head in heads])
        frame.insert(0, "head", [head.head for head in heads])
        frame.insert(0, "layer", [head.layer for head in heads])
        return frame
