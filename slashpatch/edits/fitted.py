"""What is fitted on prompts and saved for later: equality by content, files, provenance."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from ..data.files import load_tensors, save_tensors
from ..errors import EditError

_Own = TypeVar("_Own", bound="Fitted")


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Fitted:
    """What is fitted on prompts. Two are equal when they hold the same.

    Attributes:
        provenance: Model, prompts, seed and versions of the fit.
        path: Files that it was loaded from or saved to; an edit that uses it prints as the last of
            them.
    """

    #: What it is called in messages, and the format of its files.
    WHAT: ClassVar[str]
    FORMAT: ClassVar[str]

    provenance: dict[str, Any] = field(default_factory=dict)
    path: list[str] = field(default_factory=list)

    def header(self) -> dict[str, Any]:
        """Return what a file holds besides tensors and provenance, as JSON values."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors, by the name of their field."""
        raise NotImplementedError

    @classmethod
    def build(
        cls: type[_Own], header: dict[str, Any], tensors: dict[str, Tensor], **more: Any
    ) -> _Own:
        """Return what a file describes; `more` goes to the class. Raises EditError if it cannot."""
        raise NotImplementedError

    @property
    def digest(self) -> str:
        """First 16 hex digits of the SHA-256 over all that it holds."""
        sha = hashlib.sha256(str(self.header()).encode())
        for part in self.tensors().values():
            sha.update(f"{list(part.shape)}".encode())
            sha.update(part.double().cpu().contiguous().numpy().tobytes())
        return sha.hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return repr(self.path[-1]) if self.path else f"<unsaved {self.WHAT} {self.digest}>"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a .safetensors file, atomically: a failed write leaves no partial file.

        Raises EditError for another suffix, OutputError if the file cannot be written.
        """
        if Path(path).suffix != ".safetensors":
            raise EditError(f"a {self.WHAT} is saved as a .safetensors file; got {str(path)!r}")
        header = {"format": self.FORMAT, **self.header(), "provenance": self.provenance}
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors().items()}
        save_tensors(path, header, tensors)
        self.path.append(str(path))

    @classmethod
    def load(cls: type[_Own], path: str | os.PathLike[str]) -> _Own:
        """Load what `save` wrote. Raises EditError for any other file."""

        def build(header: dict[str, Any], tensors: dict[str, Tensor]) -> _Own:
            return cls.build(
                header, tensors, provenance=dict(header["provenance"]), path=[str(path)]
            )

        found: _Own = load_tensors(path, cls.FORMAT, build, EditError)
        return found
