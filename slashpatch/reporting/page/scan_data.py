"""A scan as JSON values for the page: scores, ranks, profiles, rotary pairs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...data.heads import Head
from ...errors import ModelError
from ...maths.bands import named_bands
from ...scanning.moments import Moments
from ...scanning.result import Scan
from .shown_text import visible

if TYPE_CHECKING:
    import pandas as pd

#: The number of offsets from which a page leaves some out: it keeps the best offset of each head,
#: and others with high scores up to this number.
MOST_OFFSETS = 128


def shown_columns(scan: Scan) -> list[int]:
    """Return the columns of the offsets on the page: all, or each head's best and the highest."""
    if len(scan.offsets) <= MOST_OFFSETS:
        return list(range(len(scan.offsets)))
    scores = scan.scores.nan_to_num(-1).flatten(0, 1)
    best = scores.argmax(1).unique().tolist()
    order = scores.amax(0).argsort(descending=True, stable=True).tolist()
    rest = [column for column in order if column not in best]
    return sorted([*best, *rest[: max(0, MOST_OFFSETS - len(best))]])


def scan_data(scan: Scan, columns: list[int]) -> dict[str, Any]:
    """Return score and interval of each head and offset, as [head of the model][offset]."""
    low, high = scan.intervals()
    # The slider of κ compares scores, so these have more decimals than are shown.
    rounded = {"score": (scan.scores, 6), "low": (low, 3), "high": (high, 3)}
    return {
        name: fixed(values[:, :, columns].flatten(0, 1), decimals)
        for name, (values, decimals) in rounded.items()
    } | {
        "label": prompts_label(scan),
        "edits": [visible(edit) for edit in scan.provenance["edits"]],
    }


def prompts_label(scan: Scan) -> str:
    """Return what a scan's prompts are: "natural text", "random tokens", or their sources."""
    sources = [str(part.get("source", "?")) for part in scan.provenance["prompts"]]
    return visible(", ".join(dict.fromkeys(source.partition(", seed")[0] for source in sources)))


def rank_data(scan: Scan) -> dict[str, Any] | None:
    """Return the rank measures of each head by name; None for a scan without moments."""
    if scan.moments is None:
        return None
    table = scan.rank_one
    names = ("r1_q", "r95_q", "cone_q", "r1_k", "r95_k", "cone_k")
    return {name: numbers(torch.as_tensor(table[name].to_numpy().copy()), 4) for name in names}


def profile_data(scan: Scan) -> dict[str, Any] | None:
    """Return the mean logit of each head by offset, measured and predicted, and why it lacks one.

    None for a scan without moments. A head whose layer has no profile has None, and `why` says why,
    by layer.
    """
    moments = scan.moments
    if moments is None:
        return None
    heads: list[dict[str, Any] | None] = []
    why: dict[str, str] = {}
    for head in _heads(scan):
        try:
            profile = moments.profile(head)
        except ModelError as error:
            heads.append(None)
            why[str(head.layer)] = str(error)
            continue
        # To about a five-hundredth of the range, whatever the logits' size.
        spread = float(profile.measured.max() - profile.measured.min())
        decimals = min(8, max(0, math.ceil(2.5 - math.log10(spread)))) if spread > 0 else 3
        heads.append(
            {
                "offsets": _or_range(profile.offsets.tolist()),
                "measured": fixed(profile.measured, decimals),
                "predicted": fixed(profile.predicted, decimals),
                "correlation": number(profile.correlation, 5),
                "peaks": [profile.measured_peak, profile.predicted_peak],
            }
        )
    return {"heads": heads, "why": why}


def pair_data(scan: Scan) -> dict[str, Any] | None:
    """Return amplitude and phase of each head's rotary pairs; None for a scan without moments."""
    moments = scan.moments
    if moments is None:
        return None
    layers = [_layer_pairs(moments, layer) for layer in range(scan.sums.shape[0])]
    heads: list[dict[str, Any] | None] = []
    for head in _heads(scan):
        if layers[head.layer] is None:
            heads.append(None)
            continue
        amplitude, phase = moments.amplitude_and_phase(head)
        heads.append({"amplitude": numbers(amplitude, 3), "phase": numbers(phase, 3)})
    return {"layers": layers, "heads": heads}


def _layer_pairs(moments: Moments, layer: int) -> dict[str, Any] | None:
    """Return wavelength and band of each pair of a layer; None for a layer without a profile."""
    try:
        frequencies = moments.rotary(layer).inv_freq
    except ModelError:
        return None
    wavelength = numbers(2 * math.pi / frequencies, 4)
    return {"wavelength": wavelength, "band": named_bands(frequencies)}


def _heads(scan: Scan) -> list[Head]:
    n_layers, n_heads, _ = scan.sums.shape
    return [Head(layer, head) for layer in range(n_layers) for head in range(n_heads)]


def _or_range(offsets: list[int]) -> list[int] | int:
    """Return offsets 0, 1, …, n − 1 as n, which is how most profiles are written."""
    return len(offsets) if offsets == list(range(len(offsets))) else offsets


def numbers(values: Tensor, digits: int) -> Any:
    """Return a tensor as nested lists of numbers with some significant digits; NaN is None."""
    if values.ndim > 1:
        return [numbers(row, digits) for row in values]
    return [number(value, digits) for value in values.tolist()]


def fixed(values: Tensor, decimals: int) -> Any:
    """Return a tensor as nested lists of numbers with some decimals; NaN is None."""
    if values.ndim > 1:
        return [fixed(row, decimals) for row in values]
    return [number(round(value, decimals), 15) for value in values.tolist()]


def number(value: Any, digits: int = 4) -> Any:
    """Return a number with some significant digits; None for NaN, infinities and no number."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return value
    if isinstance(value, int):
        return value
    value = float(value)
    if not math.isfinite(value):
        return None
    rounded = float(f"{value:.{digits}g}")
    if not math.isfinite(rounded):
        return value
    return int(rounded) if rounded == int(rounded) and abs(rounded) < 1e15 else rounded


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Return rows as JSON values, numbers with four significant digits."""
    return [
        {str(name): number(value) for name, value in row.items()}
        for row in frame.to_dict(orient="records")
    ]
