"""Edits: one idea a file."""

from .ablate import AblateHeads
from .base import Edit, Site
from .offsets import KeepOnly, KnockOut, ScaleOffsets
from .parse import EDITS, parse_edit
from .plant import PlantSlash
from .rank_one import Basis, RankOne, fit_rank_one
from .rotary import DropBand, FreezeBand, ScaleBand, SetFrequencies, ShiftSlash, SwapBands

__all__ = [
    "EDITS",
    "AblateHeads",
    "Basis",
    "DropBand",
    "Edit",
    "FreezeBand",
    "KeepOnly",
    "KnockOut",
    "PlantSlash",
    "RankOne",
    "ScaleBand",
    "ScaleOffsets",
    "SetFrequencies",
    "ShiftSlash",
    "Site",
    "SwapBands",
    "fit_rank_one",
    "parse_edit",
]
