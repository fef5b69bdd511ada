"""How close a matrix X of activations [token, d_head] is to rank one, from its Gram matrix XᵀX."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def _spectrum(gram: Float[Tensor, "*heads d_head d_head"]) -> Float[Tensor, "*heads d_head"]:
    """Return the squared singular values of X in descending order; negative ones are rounding."""
    return torch.linalg.eigvalsh(gram.double()).flip(-1).clamp(min=0)


def r1(gram: Float[Tensor, "*heads d_head d_head"]) -> Float[Tensor, "*heads"]:
    """Return σ₁²/Σσ² of X, uncentred: 1 for a matrix of rank one, NaN for X = 0.

    The usual convention; that slashpatch uses it is *ours*.
    """
    squares = _spectrum(gram)
    return squares[..., 0] / squares.sum(-1)


def r95(gram: Float[Tensor, "*heads d_head d_head"], share: float = 0.95) -> Int[Tensor, "*heads"]:
    """Return how many of the largest σ² it takes to reach `share` of their sum.

    The usual convention; that slashpatch uses it is *ours*.
    """
    squares = _spectrum(gram)
    reached = squares.cumsum(-1) / squares.sum(-1, keepdim=True)
    # With share = 1, rounding may leave the cumulative sum just below 1.
    return (reached < share - 1e-12).sum(-1) + 1


def basis(
    gram: Float[Tensor, "*heads d_head d_head"], rank: int = 1
) -> Float[Tensor, "*heads d_head rank"]:
    """Return the `rank` leading right singular vectors of X, as orthonormal columns."""
    vectors = torch.linalg.eigh(gram.double()).eigenvectors
    return vectors.flip(-1)[..., :rank]


def project(
    x: Float[Tensor, "*rows d_head"],
    directions: Float[Tensor, "*spaces d_head rank"],
    along: Float[Tensor, "*spaces d_head rank"] | None = None,
) -> Float[Tensor, "*rows d_head"]:
    """Project x onto the span of orthonormal columns, which broadcast over x's leading axes.

    The components are written along the columns of `along` instead, if it is given.
    """
    directions = directions.to(x)
    written = directions if along is None else along.to(x)
    return ((x[..., None, :] @ directions) @ written.mT)[..., 0, :]
