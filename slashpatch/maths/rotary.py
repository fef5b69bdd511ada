"""Rotary position embeddings (RoPE), written with complex numbers.

Pair l of a head is a complex number x_l; RoPE at position p multiplies it by e^{iθ_l p}. So
logit(i, j) = scale · Re Σ_l q_{i,l} k*_{j,l} e^{iθ_l (i−j)}, plus the dot product of the dimensions
that are not rotated (RoFormer, arXiv 2104.09864). Rotations in one plane commute, so every change
of phase, frequency or gain can be applied before RoPE.

Models pair dimensions in two layouts: "half" (dimension l with l + n_pairs) and "adjacent"
(dimension 2l with 2l + 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rotary:
    """The rotation of one layer: its frequencies, and which dimensions form a pair.

    Attributes:
        inv_freq: Frequency θ_l of each pair in radians per token, in the model's order, float64.
        pairing: "half" or "adjacent" (see the module's docstring).
        gain: Factor by which RoPE also scales each pair (YaRN's attention factor), usually 1.
        scale: Factor on the dot product of a rotated query and key, usually d_head ** -0.5.
    """

    inv_freq: Float[Tensor, "pair"]
    pairing: str
    gain: float
    scale: float

    @property
    def n_pairs(self) -> int:
        """The number of rotated pairs."""
        return len(self.inv_freq)

    def split(
        self, x: Float[Tensor, "*rows d_head"]
    ) -> tuple[Float[Tensor, "*rows pair"], Float[Tensor, "*rows pair"], Tensor]:
        """Return the pairs' real parts, their imaginary parts, and the unrotated dimensions."""
        n = self.n_pairs
        rotated, rest = x[..., : 2 * n], x[..., 2 * n :]
        if self.pairing == "half":
            return rotated[..., :n], rotated[..., n:], rest
        return rotated[..., 0::2], rotated[..., 1::2], rest

    def join(
        self, real: Float[Tensor, "*rows pair"], imag: Float[Tensor, "*rows pair"], rest: Tensor
    ) -> Float[Tensor, "*rows d_head"]:
        """Return vectors from their three parts: the inverse of `split`."""
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
        """Multiply pair l by gain_l · e^{i angle_l}; unrotated dimensions stay as they are.

        `angle` (radians) and `gain` broadcast over the rows of x. Sine and cosine are computed in
        the dtype of `angle`, then rounded to the dtype of x.
        """
        return self.multiply(x, (angle.cos() * gain).to(x), (angle.sin() * gain).to(x))

    def multiply(
        self,
        x: Float[Tensor, "*rows d_head"],
        cos: Float[Tensor, "*angles pair"],
        sin: Float[Tensor, "*angles pair"],
    ) -> Float[Tensor, "*rows d_head"]:
        """Multiply pair l by cos_l + i sin_l; unrotated dimensions stay as they are."""
        real, imag, rest = self.split(x)
        return self.join(real * cos - imag * sin, real * sin + imag * cos, rest)

    def rotate(
        self, x: Float[Tensor, "*rows d_head"], positions: Tensor
    ) -> Float[Tensor, "*rows d_head"]:
        """Apply the layer's RoPE at integer `positions`, which broadcast over the rows of x."""
        angle = positions[..., None].double() * self.inv_freq.to(positions.device)
        return self.rotate_by(x, angle, self.gain)

    def unrotate(
        self, x: Float[Tensor, "*rows d_head"], positions: Tensor
    ) -> Float[Tensor, "*rows d_head"]:
        """Undo the layer's RoPE: the inverse of `rotate`."""
        angle = positions[..., None].double() * self.inv_freq.to(positions.device)
        return self.rotate_by(x, -angle, 1 / self.gain)
