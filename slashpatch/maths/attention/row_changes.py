"""Changes of diagonals applied to any rows of an attention matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..diagonals import DiagonalChange


def change_rows(
    matrix: Float[Tensor, "batch head row key"],
    tokens: Int[Tensor, "batch head row"],
    changes: Sequence[DiagonalChange],
    stage: str,
) -> Float[Tensor, "batch head row key"]:
    """Return a copy of some rows of scores or pattern, with the changes of that stage applied.

    `tokens` is the key column of each row's own token; rows need not be consecutive.
    """
    for change in changes:
        if change.stage != stage:
            continue
        offsets = torch.tensor(change.offsets, device=matrix.device)
        columns = tokens[..., None] - offsets
        exists, columns = columns >= 0, columns.clamp(min=0)
        old = matrix.gather(-1, columns)
        new = old + change.amount if stage == "scores" else old * change.amount
        # Entries of keys that do not exist are written to a spare column, then dropped.
        rest = torch.full_like(matrix, change.elsewhere) if change.removes_the_rest else matrix
        spare = torch.nn.functional.pad(rest, (0, 1))
        columns = torch.where(exists, columns, matrix.shape[-1])
        matrix = spare.scatter(-1, columns, new)[..., :-1]
    return matrix


def rest_removed(changes: Sequence[DiagonalChange], stage: str) -> bool:
    """Return whether a change of this stage removes all diagonals but its own."""
    return any(change.removes_the_rest for change in changes if change.stage == stage)
