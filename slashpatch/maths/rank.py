"""How close a matrix of activations is to rank one, from its Gram matrix."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def _spectrum(gram: Float[Tensor, "*heads d_head d_head"]) -> Float[Tensor, "*heads d_head"]:
    """Squared singular values, descending; tiny negative ones are rounding."""
    return torch.linalg.eigvalsh(gram.double()).flip(-1).clamp(min=0)


def r1(gram: Float[Tensor, "*heads d_head d_head"]) -> Float[Tensor, "*heads"]:
    """σ₁²/Σσ² of the matrix X with gram = XᵀX, uncentred; 1 is rank one. NaN for X = 0.

    *Ours*, the usual convention.
    """
    squares = _spectrum(gram)
    return squares[..., 0] / squares.sum(-1)


def r95(gram: Float[Tensor, "*heads d_head d_head"], share: float = 0.95) -> Int[Tensor, "*heads"]:
    """The fewest σ² that reach `share` of their sum. *Ours*, the usual convention."""
    squares = _spectrum(gram)
    reached = squares.cumsum(-1) / squares.sum(-1, keepdim=True)
    # A share of exactly 1 is reached by rounding only just: compare with that much slack.
    return (reached < share - 1e-12).sum(-1) + 1


def basis(
    gram: Float[Tensor, "*heads d_head d_head"], rank: int = 1
) -> Float[Tensor, "*heads d_head rank"]:
    """The `rank` leading right singular vectors of X, orthonormal columns, from XᵀX."""
    vectors = torch.linalg.eigh(gram.double()).eigenvectors
    return vectors.flip(-1)[..., :rank]


def project(
    x: Float[Tensor, "*rows d_head"], directions: Float[Tensor, "*spaces d_head rank"]
) -> Float[Tensor, "*rows d_head"]:
    """x projected onto the span of orthonormal columns, which broadcast over its leading axes."""
    directions = directions.to(x)
    return ((x[..., None, :] @ directions) @ directions.mT)[..., 0, :]
