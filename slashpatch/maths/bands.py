"""Bands of rotary pairs: thirds by frequency, pairs by number, wavelengths."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import BandError

NAMED_BANDS = ("high", "medium", "low")


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
