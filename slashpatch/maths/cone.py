"""How far vectors lie on a cone: the axis of their mean, and their other strong directions."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

#: Widths from which only the wanted eigenvectors are computed.
_WIDE = 512


def axis_and_principal(
    moment: Float[Tensor, "d_model d_model"], mean: Float[Tensor, "d_model"], n: int
) -> tuple[Float[Tensor, "_ d_model"], Float[Tensor, "_"]]:
    """Return the direction u of the mean, then the n strongest directions orthogonal to it.

    `moment` is the second moment E xxᵀ, uncentred. The others are the leading eigenvectors of
    P E xxᵀ P with P = 1 − uuᵀ: at most d_model − 1 of them. Beside the directions, the share of
    E|x|² along each. *Ours*, after the cone of arXiv 2601.08297.
    """
    moment, u = moment.double(), mean.double() / mean.double().norm()
    n = min(n, len(u) - 1)
    left = moment - torch.outer(moment @ u, u)
    left = left - torch.outer(u, u @ left)
    found = _leading((left + left.T) / 2, n)
    # Rounding leaves a trace of u in directions in which x hardly varies.
    found = torch.linalg.qr(torch.cat([u[:, None], found], dim=1)).Q[:, 1:]
    directions = torch.cat([u[None], found.T])
    shares = torch.einsum("id,de,ie->i", directions, moment, directions) / moment.trace()
    return directions, shares


def _leading(matrix: Float[Tensor, "d_model d_model"], n: int) -> Float[Tensor, "d_model n"]:
    """Return the n leading eigenvectors of a symmetric matrix as columns, the strongest first."""
    if len(matrix) < _WIDE or 2 * n > len(matrix):
        return torch.linalg.eigh(matrix).eigenvectors.flip(-1)[:, :n]
    from scipy.sparse.linalg import eigsh

    start = torch.ones(len(matrix), dtype=torch.float64).numpy()  # the same in each run
    _, vectors = eigsh(matrix.numpy(), k=n, which="LA", v0=start)
    return torch.from_numpy(vectors.copy()).flip(-1)


def without_component(
    x: Float[Tensor, "*rows d_model"],
    read: Float[Tensor, "d_model"],
    write: Float[Tensor, "d_model"],
) -> Float[Tensor, "*rows d_model"]:
    """Return x − w (uᵀx) with u = `read` and w = `write`; with w = u, x without its u component.

    Computed in float32 at least, and rounded to the dtype of x.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(dtype)
    size = wide @ read.to(wide)
    return (wide - size[..., None] * write.to(wide)).to(x.dtype)


def parts_along(parts: Float[Tensor, "_ d_model"]) -> Float[Tensor, "_"]:
    """Return each part's share of the length of their sum: its component along it, over its length.

    The shares add up to 1; one may be negative, or above 1. NaN where the sum is zero. *Ours*.
    """
    total = parts.sum(0)
    return parts @ total / total.square().sum()
