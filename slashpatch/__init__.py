"""slashpatch: see, explain, edit and measure slash-dominant attention heads on TransformerLens.

Importing this is cheap: torch and TransformerLens load on first use of a name that needs them.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .errors import SlashpatchError
from .heads import Head, heads

if TYPE_CHECKING:
    from . import theory
    from .checks import check
    from .edits import (
        AblateHeads,
        Basis,
        DropBand,
        Edit,
        FreezeBand,
        KeepOnly,
        KnockOut,
        PlantSlash,
        RankOne,
        ScaleBand,
        ScaleOffsets,
        SetFrequencies,
        ShiftSlash,
        SwapBands,
        fit_rank_one,
        parse_edit,
    )
    from .effects.copying import copied_lags, copying, copying_losses
    from .effects.flow import flow
    from .effects.measure import measure
    from .effects.metrics import LogitDifference, PrefixMatching, SlashScores
    from .effects.paths import paths
    from .effects.result import Result
    from .effects.sweep import sweep
    from .explain import explain, explain_all
    from .explanations import Explanation
    from .fused import fused
    from .models import load
    from .monitor import SlashMonitor
    from .patching import hooks, patch
    from .reports import Check, Report
    from .scan import scan
    from .scans import Scan, SlashHead

__version__ = "0.1.0"

_HOMES = {
    "checks": "check",
    "edits": "AblateHeads Basis DropBand Edit FreezeBand KeepOnly KnockOut PlantSlash RankOne "
    "ScaleBand ScaleOffsets SetFrequencies ShiftSlash SwapBands fit_rank_one parse_edit",
    "effects.copying": "copied_lags copying copying_losses",
    "effects.flow": "flow",
    "effects.measure": "measure",
    "effects.metrics": "LogitDifference PrefixMatching SlashScores",
    "effects.paths": "paths",
    "effects.result": "Result",
    "effects.sweep": "sweep",
    "explain": "explain explain_all",
    "explanations": "Explanation",
    "fused": "fused",
    "models": "load",
    "monitor": "SlashMonitor",
    "patching": "hooks patch",
    "reports": "Check Report",
    "scan": "scan",
    "scans": "Scan SlashHead",
}
_LAZY = {name: home for home, names in _HOMES.items() for name in names.split()}
_PACKAGES = ("theory",)

__all__ = [
    "AblateHeads",
    "Basis",
    "Check",
    "DropBand",
    "Edit",
    "Explanation",
    "FreezeBand",
    "Head",
    "KeepOnly",
    "KnockOut",
    "LogitDifference",
    "PlantSlash",
    "PrefixMatching",
    "RankOne",
    "Report",
    "Result",
    "ScaleBand",
    "ScaleOffsets",
    "Scan",
    "SetFrequencies",
    "ShiftSlash",
    "SlashHead",
    "SlashMonitor",
    "SlashScores",
    "SlashpatchError",
    "SwapBands",
    "check",
    "copied_lags",
    "copying",
    "copying_losses",
    "explain",
    "explain_all",
    "fit_rank_one",
    "flow",
    "fused",
    "heads",
    "hooks",
    "load",
    "measure",
    "parse_edit",
    "patch",
    "paths",
    "scan",
    "sweep",
    "theory",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY and name not in _PACKAGES:
        raise AttributeError(f"module 'slashpatch' has no attribute {name!r}")
    if name in _PACKAGES:
        return import_module(f".{name}", __name__)
    value = getattr(import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps `slashpatch.scan` the function when the file scan.py is imported after it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _LAZY and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
