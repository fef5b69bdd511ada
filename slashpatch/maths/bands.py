"""Bands of rotary pairs: thirds or shares by frequency, pair indices, ranges of wavelengths."""

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
    """Return the canonical text of a band, such as `high`, `pairs 0-7` or `wavelength 8-64`.

    Accepts that text, several of them joined by `+`, a slice of pair indices, or a list of these.
    `high`, `medium` and `low` are the thirds of the pairs sorted by frequency θ, the highest first
    (*ours*). Pair indices follow the model's own order. `share 0-0.25` is the first quarter of the
    pairs sorted by θ, the highest first, rounded to whole pairs (*ours*). Wavelengths 2π/θ are in
    tokens; a range includes its lower end and excludes its upper end. Raises BandError for anything
    else.
    """
    if isinstance(band, slice):
        if band.step not in (None, 1) or not all(
            isinstance(end, int) and end >= 0 for end in (band.start or 0, band.stop)
        ):
            raise BandError(
                f"a slice of pairs needs a start and a stop of at least 0 and no step; got {band}"
            )
        first, stop = band.start or 0, band.stop
        if stop <= first:
            raise BandError(f"{band} contains no pairs; expected a stop above the start")
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
    "a band is high, medium or low, pairs such as 'pairs 0-7', a share of the pairs by frequency "
    "such as 'share 0-0.25', wavelengths in tokens such as 'wavelength 8-64', or several joined by "
    "+"
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
    match = re.fullmatch(rf"shares? ({_NUMBER}) ?- ?({_NUMBER})", words)
    if match and float(match[1]) < float(match[2]) <= 1:
        return f"share {match[1]}-{match[2]}"
    match = re.fullmatch(rf"wavelengths? ({_NUMBER}) ?- ?({_NUMBER}|inf)", words)
    if match and float(match[2]) > float(match[1]):
        return f"wavelength {match[1]}-{match[2]}"
    raise BandError(f"{_EXPECTED}; got {part.strip()!r}")


def band_pairs(band: Any, inv_freq: Float[Tensor, "pair"]) -> tuple[int, ...]:
    """Return the indices of the pairs in a band, sorted from the highest frequency θ to the lowest.

    Raises BandError for a pair index that the head does not have, and for a band without pairs.
    """
    order = inv_freq.argsort(descending=True, stable=True).tolist()
    names = named_bands(inv_freq)
    chosen: set[int] = set()
    for part in canonical_band(band).split("+"):
        kind, _, ends = part.partition(" ")
        if kind in NAMED_BANDS:
            pairs = {pair for pair, name in enumerate(names) if name == kind}
        elif kind == "pairs":
            first, last = (int(end) for end in ends.split("-"))
            if last >= len(order):
                raise BandError(
                    f"{part!r} is outside the {len(order)} rotary pairs, 0 to {len(order) - 1}"
                )
            pairs = set(range(first, last + 1))
        elif kind == "share":
            low, high = (float(end) for end in ends.split("-"))
            # A pair is inside if the middle of its place is, which rounds to the nearest.
            middles = [(rank + 0.5) / len(order) for rank in range(len(order))]
            pairs = {pair for pair, at in zip(order, middles, strict=True) if low <= at < high}
        else:
            low, high = (float(end) for end in ends.split("-"))
            wavelengths = (2 * math.pi / inv_freq).tolist()
            pairs = {pair for pair, length in enumerate(wavelengths) if low <= length < high}
        if not pairs:
            raise BandError(f"the band {part!r} holds none of the {len(order)} rotary pairs")
        chosen |= pairs
    return tuple(pair for pair in order if pair in chosen)


def named_bands(inv_freq: Float[Tensor, "pair"]) -> list[str]:
    """Return the name of the third by frequency that each rotary pair is in."""
    names = [""] * len(inv_freq)
    order = inv_freq.argsort(descending=True, stable=True)
    for name, pairs in zip(NAMED_BANDS, order.tensor_split(3), strict=True):
        for pair in pairs.tolist():
            names[pair] = name
    return names


def band_mask(band: Any, inv_freq: Float[Tensor, "pair"]) -> Tensor:
    """Return a boolean mask over rotary pairs: True for the pairs in the band."""
    mask = torch.zeros(len(inv_freq), dtype=torch.bool)
    mask[list(band_pairs(band, inv_freq))] = True
    return mask


def exchanged(n_pairs: int, a: Sequence[int], b: Sequence[int]) -> Int[Tensor, "pair"]:
    """For each pair, return the index of the pair whose frequency it gets if two bands swap.

    `a` and `b` are pair indices sorted by frequency. In bands of unequal width, a pair gets the
    frequency at the same relative rank of the other band, rounded to the nearest: the first pair
    gets the first, the last pair the last (*ours*).
    """
    source = torch.arange(n_pairs)
    for band, other in ((a, b), (b, a)):
        rank = torch.linspace(0, len(other) - 1, len(band)).round().long()
        source[list(band)] = torch.tensor(other)[rank]
    return source
