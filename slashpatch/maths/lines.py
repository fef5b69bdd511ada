"""Offsets whose attention stands out of that of the offsets around them.

A line score is a slash score without attention to the first token, which every row pays in many
heads: score(Δ) = 1/(N−1−Δ) · Σ_{i>Δ} S[i, i−Δ]. It is compared with the `window` line scores on
each side, without the `gap` nearest: its rank among all of them tells how sure a line is, its
contrast to the median of each side how strong. Near a line, the median does not see it. Since
both sides count, a decay with distance, as 1/i of uniform rows, makes no line. All *ours*.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .diagonals import diagonal_sums

#: Offsets that an offset is compared with on each side, and nearest offsets left out. *Ours*.
WINDOW, GAP = 16, 2
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


def neighbours(
    scores: Float[Tensor, "*of offset"], window: int = WINDOW, gap: int = GAP
) -> tuple[Float[Tensor, "*of judged window"], Float[Tensor, "*of judged window"]]:
    """Return the scores that each score is compared with, before it and after it.

    Before Δ these are the offsets Δ − gap − window to Δ − gap − 1, NaN below 0; for Δ up to `gap`,
    offset 0 alone. After it they are Δ + gap + 1 to Δ + gap + window. Offsets without a whole
    window after them are left out. At Δ = 0 there is nothing before it.
    """
    n = max(0, scores.shape[-1] - gap - window)
    if n == 0:
        nothing = scores.new_zeros(*scores.shape[:-1], 0, window)
        return nothing, nothing.clone()
    padded = torch.nn.functional.pad(scores, (gap + window, 0), value=torch.nan)
    before = padded[..., : n + window - 1].unfold(-1, window, 1)
    if gap and n > 1:
        before = before.clone()
        before[..., 1 : gap + 1, -1] = scores[..., :1]
    return before, scores[..., gap + 1 :].unfold(-1, window, 1)


def contrasts_and_ranks(
    scores: Float[Tensor, "*of offset"], window: int = WINDOW, gap: int = GAP
) -> tuple[Float[Tensor, "*of judged"], Float[Tensor, "*of judged"], Float[Tensor, "*of judged"]]:
    """Return each score minus the median of those before it and after it, and its rank.

    The rank is (1 + number of neighbours at least as large) / (1 + number of neighbours), so that
    a score that is as likely as its neighbours to be the largest has a rank that is uniform, or
    larger. The median of an even number is the lower one of the middle two. At Δ = 0, which has
    nothing before it, the first contrast is 0 and the rank 1.
    """
    before, after = neighbours(scores, window, gap)
    own = scores[..., : before.shape[-2]]
    larger, count = torch.zeros_like(own), torch.zeros_like(own)
    contrasts = []
    for side in (before, after):
        larger += (side >= own[..., None]).sum(-1)
        count += side.isfinite().sum(-1)
        middle = own if own.shape[-1] == 0 else side.nanmedian(-1).values
        contrasts.append((own - middle).nan_to_num(0.0))
    rank = (1 + larger) / (1 + count)
    rank[..., :1] = 1.0
    return contrasts[0], contrasts[1], rank


def is_peak(scores: Float[Tensor, "*of offset"], gap: int = GAP) -> Bool[Tensor, "*of offset"]:
    """Return which scores are the largest among the `gap` nearest on each side; the first if tied.

    So the flanks of a line that is wider than one offset are not listed beside it.
    """
    padded = torch.nn.functional.pad(scores, (gap, gap), value=-1.0)
    near = padded.unfold(-1, 2 * gap + 1, 1)
    return (scores >= near.amax(-1)) & (scores > near[..., :gap].amax(-1))


def sum_of_ranks_p(total: Float[Tensor, "*of"], n: Float[Tensor, "*#of"]) -> Float[Tensor, "*of"]:
    """Return how likely n uniform ranks have a sum of at most `total`.

    Edgington's additive method of combining p-values (1972): Σ_k (−1)^k C(n, k) (total − k)^n / n!
    over k ≤ total. Where total exceeds n/4 (for n up to 20, n/2), which is no small p, the normal
    approximation, since the terms would cancel.
    """
    n = n.expand_as(total)
    normal = torch.special.ndtr((total - n / 2) / (n / 12).sqrt())
    exact = torch.zeros_like(total)
    small = total <= torch.where(n > 20, n / 4, n / 2)
    for k in range(int(total[small].max()) + 1 if bool(small.any()) else 0):
        log = (
            n * (total - k).clamp(min=0).log()
            - torch.lgamma(n - k + 1)
            - torch.lgamma(torch.tensor(k + 1.0, dtype=total.dtype))
        )
        exact += (-1) ** k * log.exp() * (total > k)
    return torch.where(small, exact, normal).clamp(0, 1)


def judged_offsets(counts: Int[Tensor, "offset"], least: int) -> Bool[Tensor, "offset"]:
    """Return the offsets above 0 that at least `least` prompts tell about."""
    return (counts >= least) & (torch.arange(len(counts)) > 0)
