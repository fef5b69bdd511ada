"""Edits: one idea a file."""

from .ablate import AblateHeads
from .base import Edit, Site
from .offsets import KeepOnly, KnockOut, ScaleOffsets
from .parse import EDITS, parse_edit

__all__ = [
    "EDITS",
    "AblateHeads",
    "Edit",
    "KeepOnly",
    "KnockOut",
    "ScaleOffsets",
    "Site",
    "parse_edit",
]
