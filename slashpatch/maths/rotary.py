"""Rotary position embeddings as complex numbers: frequencies, bands, rotations.

Pair l of a head is a complex number x_l; RoPE at position p multiplies it by e^{iθ_l p}. So
logit(i, j) = scale · Re Σ_l q_{i,l} k*_{j,l} e^{iθ_l (i−j)}, plus the dot product of the dimensions
that are not rotated (RoFormer, arXiv 2104.09864). Rotations of one plane commute, so every change
of phase, frequency or gain can be made before RoPE.

Two layouts of pairs exist: "half" (dimension l with l + n) and "adjacent" (2l with 2l + 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rotary:
    """How one layer rotates: its frequencies, in radians per token, and where its pairs lie.

    Attributes:
        inv_freq: θ_l of each pair, in the order of the model, float64.
        pairing: "half" or "adjacent".
        gain: What rotation multiplies each pair by beside turning it (YaRN's attention factor).
        scale: What the dot product of rotated queries and keys is multiplied by.
    """

    inv_freq: Float[Tensor, "pair"]
    pairing: str
    gain: float
    scale: float

    @property
    def n_pairs(self) -> int:
        """Number of rotated pairs."""
        return len(self.inv_freq)

    def split(
        self, x: Float[Tensor, "*rows d_head"]
    ) -> tuple[Float[Tensor, "*rows pair"], Float[Tensor, "*rows pair"], Tensor]:
        """Real parts, imaginary parts, and the dimensions that are not rotated."""
        n = self.n_pairs
        rotated, rest = x[..., : 2 * n], x[..., 2 * n :]
        if self.pairing == "half":
            return rotated[..., :n], rotated[..., n:], rest
        return rotated[..., 0::2], rotated[..., 1::2], rest

    def join(
        self, real: Float[Tensor, "*rows pair"], imag: Float[Tensor, "*rows pair"], rest: Tensor
    ) -> Float[Tensor, "*rows d_head"]:
        """Inverse of `split`."""
        if self.pairing == "half":
            return torch.cat([real, imag, rest], dim=-1)
        pairs = torch.stack([real, imag], dim=-1).flatten(-2)
        return torch.cat([pairs, rest], dim=-1)

    def rotate_by(
        self,
        x: Float[Tensor, "*rows d_head"],
        angle: Float[Tensor, "*angles pair"],
        gain: Any = 1.0,
    ) -> Float[Tensor, "*rows d_head"]:
        """Multiply pair l by gain_l · e^{i angle_l}; dimensions that are not rotated stay.

        `angle` (radians) and `gain` broadcast over the rows of x. Sines are taken in the angle's
        own precision and then rounded to x's dtype.
        """
        return self.multiply(x, (angle.cos() * gain).to(x), (angle.sin() * gain).to(x))

    def multiply(
        self,
        x: Float[Tensor, "*rows d_head"],
        cos: Float[Tensor, "*angles pair"],
        sin: Float[Tensor, "*angles pair"],
    ) -> Float[Tensor, "*rows d_head"]:
        """Multiply pair l by cos_l + i sin_l; dimensions that are not rotated stay."""
        real, imag, rest = self.split(x)
        return self.join(real * cos - imag * sin, real * sin + imag * cos, rest)

    def rotate(
        self, x: Float[Tensor, "*rows d_head"], positions: Tensor
    ) -> Float[Tensor, "*rows d_head"]:
        """RoPE of this layer at integer `positions`, which broadcast over the rows of x."""
        angle = positions[..., None].double() * self.inv_freq.to(positions.device)
        return self.rotate_by(x, angle, self.gain)

    def unrotate(
        self, x: Float[Tensor, "*rows d_head"], positions: Tensor
    ) -> Float[Tensor, "*rows d_head"]:
        """Inverse of `rotate`."""
        angle = positions[..., None].double() * self.inv_freq.to(positions.device)
        return self.rotate_by(x, -angle, 1 / self.gain)
