"""Rotary position embeddings as complex numbers: frequencies, bands, rotations.

Pair l of a head is a complex number x_l; RoPE at position p multiplies it by e^{iθ_l p}. So
logit(i, j) = scale · Re Σ_l q_{i,l} k*_{j,l} e^{iθ_l (i−j)}, plus the dot product of the dimensions
that are not rotated (RoFormer, arXiv 2104.09864). Rotations of one plane commute, so every change
of phase, frequency or gain can be made before RoPE.

Two layouts of pairs exist: "half" (dimension l with l + n) and "adjacent" (2l with 2l + 1).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .errors import BandError

NAMED_BANDS = ("high", "medium", "low")


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

    def turn(
        self,
        x: Float[Tensor, "*rows d_head"],
        angle: Float[Tensor, "*angles pair"],
        gain: Any = 1.0,
    ) -> Float[Tensor, "*rows d_head"]:
        """Multiply pair l by gain_l · e^{i angle_l}; dimensions that are not rotated stay.

        `angle` (radians) and `gain` broadcast over the rows of x. Sines are taken in the angle's
        own precision and then rounded to x's dtype.
        """
        return self.turn_by(x, (angle.cos() * gain).to(x), (angle.sin() * gain).to(x))

    def turn_by(
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
        return self.turn(x, angle, self.gain)

    def unrotate(
        self, x: Float[Tensor, "*rows d_head"], positions: Tensor
    ) -> Float[Tensor, "*rows d_head"]:
        """Inverse of `rotate`."""
        angle = positions[..., None].double() * self.inv_freq.to(positions.device)
        return self.turn(x, -angle, 1 / self.gain)


def canonical_band(band: Any) -> str:
    """The text of a band: names, `pairs 0-7`, `wavelength 8-64`, joined by `+`.

    Accepts that text, a slice of pairs, or a list of either. Thirds are of the pairs ordered by θ,
    the highest first (*ours*); pairs are counted in the model's order; wavelengths 2π/θ are in
    tokens, the lower end included. Raises BandError.
    """
    if isinstance(band, slice):
        if band.step not in (None, 1) or not all(
            isinstance(end, int) and end >= 0 for end in (band.start or 0, band.stop)
        ):
            raise BandError(
                f"a slice of pairs has a start and a stop from 0 and no step; got {band}"
            )
        first, stop = band.start or 0, band.stop
        if stop <= first:
            raise BandError(f"the slice {band} holds no pairs")
        return f"pairs {first}-{stop - 1}"
    if isinstance(band, (list, tuple)):
        parts = [canonical_band(part) for part in band]
    elif isinstance(band, str):
        parts = [_canonical_part(part) for part in band.split("+")]
    else:
        parts = []
    if not parts:
        raise BandError(f"{_EXPECTED}; got {band!r}")
    return "+".join(dict.fromkeys(name for part in parts for name in part.split("+")))


_EXPECTED = (
    "a band is high, medium or low, pairs such as 'pairs 0-7', wavelengths in tokens such as "
    "'wavelength 8-64', or several joined by +"
)
_NUMBER = r"\d+(?:\.\d+)?"


def _canonical_part(part: str) -> str:
    words = " ".join(part.split())
    if words in NAMED_BANDS:
        return words
    if match := re.fullmatch(r"pairs? (\d+)(?: ?- ?(\d+))?", words):
        first, last = int(match[1]), int(match[2] or match[1])
        if last >= first:
            return f"pairs {first}-{last}"
    match = re.fullmatch(rf"wavelengths? ({_NUMBER}) ?- ?({_NUMBER}|inf)", words)
    if match and float(match[2]) > float(match[1]):
        return f"wavelength {match[1]}-{match[2]}"
    raise BandError(f"{_EXPECTED}; got {part.strip()!r}")


def band_pairs(band: Any, inv_freq: Float[Tensor, "pair"]) -> tuple[int, ...]:
    """Indices of the pairs in a band, ascending in θ's order from high to low.

    Raises BandError for pairs that the head lacks, or a band that holds none.
    """
    order = inv_freq.argsort(descending=True, stable=True).tolist()
    thirds = torch.tensor(order).tensor_split(3)
    chosen: set[int] = set()
    for part in canonical_band(band).split("+"):
        kind, _, ends = part.partition(" ")
        if kind in NAMED_BANDS:
            found = set(thirds[NAMED_BANDS.index(kind)].tolist())
        elif kind == "pairs":
            first, last = (int(end) for end in ends.split("-"))
            if last >= len(order):
                raise BandError(
                    f"{part!r} lies outside the {len(order)} rotary pairs, 0 to {len(order) - 1}"
                )
            found = set(range(first, last + 1))
        else:
            low, high = (float(end) for end in ends.split("-"))
            waves = (2 * math.pi / inv_freq).tolist()
            found = {pair for pair, wave in enumerate(waves) if low <= wave < high}
        if not found:
            raise BandError(f"the band {part!r} holds none of the {len(order)} rotary pairs")
        chosen |= found
    return tuple(pair for pair in order if pair in chosen)


def band_mask(band: Any, inv_freq: Float[Tensor, "pair"]) -> Tensor:
    """Boolean [pair]: which pairs are in the band."""
    mask = torch.zeros(len(inv_freq), dtype=torch.bool)
    mask[list(band_pairs(band, inv_freq))] = True
    return mask


def exchanged(n_pairs: int, a: Sequence[int], b: Sequence[int]) -> Int[Tensor, "pair"]:
    """The pair whose frequency each pair takes when bands `a` and `b` exchange theirs.

    Both in order of θ. Of unequal widths, a pair takes the one at its relative rank in the other
    band: the first the first, the last the last, others the nearest (*ours*).
    """
    source = torch.arange(n_pairs)
    for own, other in ((a, b), (b, a)):
        rank = torch.linspace(0, len(other) - 1, len(own)).round().long()
        source[list(own)] = torch.tensor(other)[rank]
    return source
