"""Constant outputs of heads that optimal ablation puts in their place, fitted on prompts."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..data.files import load_tensors, save_tensors
from ..data.heads import Head, heads
from ..errors import EditError

_FORMAT = "slashpatch-constants-1"


@dataclass(frozen=True, eq=False)
class Constants:
    """One vector for each of some heads, for `AblateHeads(heads, mode="optimal", constants=...)`.

    `fit_ablation` makes them. Two are equal when their heads and vectors are equal.

    Attributes:
        heads: The query heads, ascending.
        z: The vector that stands for each head's output at `hook_z`, before W_O.
        losses: Value of the fitted metric on the prompts of the fit at each step; the first is that
            of mean ablation on these prompts.
        provenance: Model, prompts, metric, seed and versions of the fit.
        path: Files that they were loaded from or saved to; an edit that uses them prints as the
            last of them.
    """

    heads: tuple[Head, ...]
    z: Float[Tensor, "head d_head"]
    losses: tuple[float, ...]
    provenance: dict[str, Any]
    path: list[str] = field(default_factory=list)

    @property
    def digest(self) -> str:
        """First 16 hex digits of the SHA-256 over heads and vectors."""
        sha = hashlib.sha256(f"{self.heads} {list(self.z.shape)}".encode())
        sha.update(self.z.double().contiguous().numpy().tobytes())
        return sha.hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constants) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return repr(self.path[-1]) if self.path else f"<unsaved constants {self.digest}>"

    def of(self, layer: int, wanted: list[int]) -> Tensor:
        """Return the vectors [head, d_head] of these heads of a layer."""
        return self.z[[self.heads.index(Head(layer, head)) for head in wanted]]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a .safetensors file, atomically: a failed write leaves no partial file.

        Raises EditError for another suffix, OutputError if the file cannot be written.
        """
        if Path(path).suffix != ".safetensors":
            raise EditError(f"constants are saved as a .safetensors file; got {str(path)!r}")
        header = {
            "format": _FORMAT,
            "heads": [str(head) for head in self.heads],
            "provenance": self.provenance,
        }
        losses = torch.tensor(self.losses, dtype=torch.float64)
        save_tensors(path, header, {"z": self.z.contiguous(), "losses": losses})
        self.path.append(str(path))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Constants:
        """Load constants from a file that `save` wrote. Raises EditError for any other file."""

        def build(header: dict[str, Any], tensors: dict[str, Tensor]) -> Constants:
            fitted, z, losses = heads(header["heads"]), tensors["z"], tensors["losses"]
            if z.ndim != 2 or len(fitted) != len(z) or not bool(z.isfinite().all()):
                raise EditError("expected one finite vector for each of its heads")
            values = tuple(losses.double().tolist())
            return cls(fitted, z, values, dict(header["provenance"]), [str(path)])

        constants: Constants = load_tensors(path, _FORMAT, build, EditError)
        return constants
