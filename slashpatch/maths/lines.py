"""Offsets whose attention stands out of that of the offsets around them.

A line score is a slash score without attention to the first token, which every row pays in many
heads: score(Δ) = 1/(N−1−Δ) · Σ_{i>Δ} S[i, i−Δ]. It is compared with the mean of the `window` line
scores on each side, without the `gap` nearest. An offset stands out only if it does so on both
sides, so that a decay with distance, as 1/i of uniform rows, makes no line. All *ours*.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .diagonals import diagonal_sums

#: Offsets that an offset is compared with on each side, and nearest offsets left out. *Ours*.
WINDOW, GAP = 8, 2
#: Rows of a formed pattern that are processed at a time.
_ROWS = 256


def all_slash_sums(
    pattern: Any, real: Bool[Tensor, "batch key"]
) -> tuple[Float[Tensor, "batch head offset"], Float[Tensor, "batch head offset"]]:
    """Return the sum along every diagonal, and the part of it that goes to the first token.

    `pattern` is [batch, head, pos, pos], or an attention that yields blocks of rows
    (`pattern_blocks`). Padding, if any, is on the right, and is left out. The part at Δ is the one
    entry S[Δ, 0]. Both are float64 on the CPU (summed in float32 on MPS, which has no float64).
    """
    n_heads, n_keys = pattern.shape[1], pattern.shape[-1]
    device = torch.device(pattern.device)
    wide = torch.float32 if device.type == "mps" else torch.float64
    sums, first = torch.zeros(2, len(real), n_heads, n_keys, dtype=wide, device=device)
    blocks = _row_blocks(pattern) if isinstance(pattern, Tensor) else None
    if blocks is None:
        blocks = pattern.pattern_blocks(range(n_heads))
    padding = None if bool(real.all()) else ~real.to(device)[:, None, :, None]
    start = 0
    for left, block in blocks:
        n_rows, n_columns = block.shape[-2:]
        stop = start + n_rows
        if padding is not None:  # which may be NaN
            block = block.masked_fill(padding[:, :, start:stop], 0)
        if left == 0:
            first[..., start:stop] = block[..., 0]
        of_block = diagonal_sums(block, n_columns - n_rows)
        sums[..., : of_block.shape[-1]] += of_block
        start = stop
    return sums.cpu().double(), first.cpu().double()


def _row_blocks(
    pattern: Float[Tensor, "batch head pos pos"],
) -> Iterator[tuple[int, Float[Tensor, "batch head row key"]]]:
    """Yield blocks of rows of a formed pattern, each up to the token of its last row."""
    wide = torch.float32 if pattern.device.type == "mps" else torch.float64
    for start in range(0, pattern.shape[-2], _ROWS):
        stop = min(start + _ROWS, pattern.shape[-2])
        yield 0, pattern[:, :, start:stop, :stop].detach().to(wide)


def line_scores(
    sums: Float[Tensor, "*of offset"], first: Float[Tensor, "*of offset"], n_tokens: int
) -> Float[Tensor, "*of judged"]:
    """Return the line scores of a prompt of `n_tokens`, for Δ = 0, …, n_tokens − 2; in [0, 1].

    `sums` and `first` are those of `all_slash_sums`.
    """
    n_rows = torch.arange(n_tokens - 1, 0, -1, dtype=sums.dtype, device=sums.device)
    return (sums - first)[..., : n_tokens - 1].clamp(min=0) / n_rows


def n_judged(n_tokens: int, window: int = WINDOW, gap: int = GAP) -> int:
    """Return how many offsets, from 0, have a whole window after them; 0 is never a line."""
    return max(0, n_tokens - 1 - gap - window)


def side_contrasts(
    scores: Float[Tensor, "*of offset"], window: int = WINDOW, gap: int = GAP
) -> tuple[Float[Tensor, "*of judged"], Float[Tensor, "*of judged"]]:
    """Return each score minus the mean score of the offsets before it, and of those after it.

    Before Δ these are Δ − g − window to Δ − g − 1 with g = min(gap, Δ − 1), cut at 0; after it
    Δ + gap + 1 to Δ + gap + window. Offsets without a whole window after them are left out. At
    Δ = 0, which has nothing before it, the first contrast is 0.
    """
    n = scores.shape[-1] - gap - window
    if n <= 0:
        nothing = scores[..., :0]
        return nothing, nothing.clone()
    # Sums up to each offset; differences of them are sums over windows.
    upto = torch.nn.functional.pad(scores.cumsum(-1), (1, 0))
    at = torch.arange(n, device=scores.device)
    stop = (at - (at - 1).clamp(min=0, max=gap)).clamp(min=0)
    start = (stop - window).clamp(min=0)
    before = (upto[..., stop] - upto[..., start]) / (stop - start).clamp(min=1)
    after = (upto[..., at + gap + 1 + window] - upto[..., at + gap + 1]) / window
    own = scores[..., :n]
    return (own - before).where(at > 0, 0.0), own - after


def is_peak(scores: Float[Tensor, "*of offset"], gap: int = GAP) -> Bool[Tensor, "*of offset"]:
    """Return which scores are the largest among the `gap` nearest on each side; the first if tied.

    So the flanks of a line that is wider than one offset are not listed beside it.
    """
    padded = torch.nn.functional.pad(scores, (gap, gap), value=-1.0)
    near = padded.unfold(-1, 2 * gap + 1, 1)
    return (scores >= near.amax(-1)) & (scores > near[..., :gap].amax(-1))


def prompt_contrasts(
    sums: Float[Tensor, "*of key"],
    first: Float[Tensor, "*of key"],
    n_tokens: int,
    window: int = WINDOW,
    gap: int = GAP,
) -> tuple[Float[Tensor, "*of judged"], Float[Tensor, "*of judged"], Float[Tensor, "*of judged"]]:
    """Return a prompt's line scores, and their contrasts to what is before and after them."""
    scores = line_scores(sums, first, n_tokens)
    before, after = side_contrasts(scores, window, gap)
    return scores[..., : before.shape[-1]], before, after


def judged_offsets(counts: Int[Tensor, "offset"], least: int) -> Bool[Tensor, "offset"]:
    """Return the offsets above 0 that at least `least` prompts tell about."""
    return (counts >= least) & (torch.arange(len(counts)) > 0)
