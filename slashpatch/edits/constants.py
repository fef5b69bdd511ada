"""Constant outputs of heads that optimal ablation puts in their place, fitted on prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..data.heads import Head, heads
from ..errors import EditError
from .fitted import Fitted


@dataclass(frozen=True, eq=False, repr=False)
class Constants(Fitted):
    """One vector for each of some heads, for `AblateHeads(heads, mode="optimal", constants=...)`.

    `fit_ablation` makes them.

    Attributes:
        heads: The query heads, ascending.
        z: The vector that stands for each head's output at `hook_z`, before W_O.
        losses: Value of the fitted metric on the prompts of the fit at each step; the first is that
            of mean ablation on these prompts.
        provenance: Model, prompts, metric, seed and versions of the fit.
        path: Files that they were loaded from or saved to; an edit that uses them prints as the
            last of them.
    """

    WHAT: ClassVar[str] = "constants"
    FORMAT: ClassVar[str] = "slashpatch-constants-1"

    heads: tuple[Head, ...]
    z: Float[Tensor, "head d_head"]
    losses: tuple[float, ...]

    def header(self) -> dict[str, Any]:
        """Return the heads."""
        return {"heads": [str(head) for head in self.heads]}

    def tensors(self) -> dict[str, Tensor]:
        """Return the vectors and the losses."""
        return {"z": self.z, "losses": torch.tensor(self.losses, dtype=torch.float64)}

    @classmethod
    def build(cls, header: dict[str, Any], tensors: dict[str, Tensor], **more: Any) -> Constants:
        """Return the constants of a file. Raises EditError unless each head has a finite vector."""
        fitted, z, losses = heads(header["heads"]), tensors["z"], tensors["losses"]
        if z.ndim != 2 or len(fitted) != len(z) or not bool(z.isfinite().all()):
            raise EditError("expected one finite vector for each of its heads")
        return cls(fitted, z, tuple(losses.double().tolist()), **more)

    def of(self, layer: int, wanted: list[int]) -> Tensor:
        """Return the vectors [head, d_head] of these heads of a layer."""
        return self.z[[self.heads.index(Head(layer, head)) for head in wanted]]
