"""The edits: interventions on attention heads, one idea per file."""

from .ablate import AblateHeads
from .axis import Axis, fit_axis
from .bands import DropBand, ScaleBand
from .base import Edit, HookContext
from .basis import Basis, fit_rank_one
from .constants import Constants
from .drop_direction import DropDirection
from .frequencies import FreezeBand, SetFrequencies, SwapBands
from .offsets import KeepOnly, KnockOut, ScaleOffsets
from .parse import EDITS, as_edit, parse_edit
from .plant import PlantSlash
from .rank_one import RankOne
from .shift import ShiftSlash

__all__ = [
    "EDITS",
    "AblateHeads",
    "Axis",
    "Basis",
    "Constants",
    "DropBand",
    "DropDirection",
    "Edit",
    "FreezeBand",
    "HookContext",
    "KeepOnly",
    "KnockOut",
    "PlantSlash",
    "RankOne",
    "ScaleBand",
    "ScaleOffsets",
    "SetFrequencies",
    "ShiftSlash",
    "SwapBands",
    "as_edit",
    "fit_axis",
    "fit_rank_one",
    "parse_edit",
]
