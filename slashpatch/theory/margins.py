"""Which ranges of RoPE frequencies single out an offset, as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import TheoryError
from ..maths.interference import margins_by_cutoff
from .settings import as_integer

if TYPE_CHECKING:
    import pandas as pd


def frequency_margins(
    frequencies: Any,
    *,
    offset: int = 1,
    n_offsets: int = 64,
    amplitudes: Any = None,
    phases: Any = None,
) -> pd.DataFrame:
    """Return by how much each range of frequencies singles out an offset.

    If all tokens are alike, a head's logit at offset δ is Σ_l A_l cos(θ_l δ + φ_l) (arXiv
    2601.08297). The margin, *ours*, is this sum over a range of frequencies at `offset`, minus the
    largest sum at any other of the offsets 0 to `n_offsets` − 1, divided by the total amplitude. 1
    is perfect; at 0 or below, the head attends to another offset as much, or more.

    Args:
        frequencies: Frequencies θ in radians per token, such as `Settings().thetas()`, at least 0.
        offset: The offset Δ.
        n_offsets: Number of offsets, such as the length of the context.
        amplitudes: A_l ≥ 0 of each frequency, such as `Moments.amplitude_and_phase` has for a
            head; None: 1.
        phases: φ_l in radians; None: −θ_l Δ, for which all cosines are 1 at the offset.

    Returns:
        A row for each range: `highest` and `lowest`, its ends (θ); `n_frequencies`; `margin` (NaN
        if all its amplitudes are 0).

    Raises:
        TheoryError: Frequencies, amplitudes or phases that are no list of finite numbers, lists of
            different lengths, or a negative frequency.
        OffsetError: An offset that is not among `n_offsets`.
        BandError: Negative amplitudes.
    """
    import pandas as pd

    theta = _numbers("frequencies", frequencies)
    if not len(theta) or bool((theta < 0).any()):
        raise TheoryError(f"frequencies are at least one number θ ≥ 0; got {theta.tolist()}")
    amplitude, phase = (
        None if given is None else _numbers(name, given, len(theta))
        for name, given in (("amplitudes", amplitudes), ("phases", phases))
    )
    at = as_integer("offset", offset, 0, 2**20)
    n = as_integer("n_offsets", n_offsets, 2, 2**20)
    margins = margins_by_cutoff(theta, at, n, amplitude, phase)
    ends = theta.sort(descending=True).values.tolist()
    return pd.DataFrame(
        [
            {
                "highest": ends[first],
                "lowest": ends[last],
                "n_frequencies": last - first + 1,
                "margin": float(margins[first, last]),
            }
            for first in range(len(ends))
            for last in range(first, len(ends))
        ]
    )


def _numbers(name: str, given: Any, n: int | None = None) -> Float[Tensor, "pair"]:
    """Return a list of numbers, of n numbers unless n is None, as a tensor."""
    try:
        values = torch.as_tensor(given, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        values = torch.empty(0, 0)
    if values.ndim != 1 or not bool(values.isfinite().all()):
        raise TheoryError(f"{name} are a list of finite numbers; got {given!r}")
    if n is not None and len(values) != n:
        raise TheoryError(f"{name} are one for each of the {n} frequencies; got {len(values)}")
    return values
