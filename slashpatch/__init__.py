"""slashpatch: see, explain, edit and measure slash-dominant attention heads on TransformerLens.

Importing this is cheap: torch and TransformerLens load on first use of a name that needs them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .data.heads import Head, heads
from .errors import SlashpatchError

if TYPE_CHECKING:
    from .bridge.loading import load, memory_needed
    from .bridge.memory import MemoryNeeded
    from .bridge.workers.options import Workers
    from .checking.check import check
    from .checking.result import Check, Report
    from .claims.evidence import evidence
    from .claims.result import Evidence
    from .edits import (
        AblateHeads,
        Axis,
        Basis,
        Constants,
        DropBand,
        DropDirection,
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
        fit_axis,
        fit_rank_one,
        parse_edit,
    )
    from .effects.ablations import ablations
    from .effects.activation_patching import activation_patching
    from .effects.between_runs.pairs import Pairs, copying_pairs
    from .effects.circuit import circuit
    from .effects.copying import copied_lags, copying, copying_losses
    from .effects.direct import direct_effect
    from .effects.dose import dose
    from .effects.fit_ablation import fit_ablation
    from .effects.flow import flow
    from .effects.measure import measure
    from .effects.metrics.attention import PrefixMatching, SlashScores
    from .effects.metrics.logits import LogitDifference
    from .effects.paths import paths
    from .effects.persistence import persistence
    from .effects.result import Result
    from .effects.screen import screen
    from .effects.sweep import sweep
    from .explaining.explain import explain, explain_all
    from .explaining.result import Explanation
    from .patching.fused import fused
    from .patching.patch import hooks, patch
    from .reporting.page.report import report
    from .scanning.callback import SlashCallback
    from .scanning.emergence import emergence
    from .scanning.emergence_result import Emergence
    from .scanning.lines import SlashLine
    from .scanning.monitor import SlashMonitor
    from .scanning.result import Scan, SlashHead
    from .scanning.scan import scan
    from .scanning.top_keys import top_keys
    from .scanning.top_keys_result import TopKeys

__version__ = "0.1.0"

_HOMES = {
    "bridge.loading": "load memory_needed",
    "bridge.memory": "MemoryNeeded",
    "bridge.workers.options": "Workers",
    "checking.check": "check",
    "checking.result": "Check Report",
    "claims.evidence": "evidence",
    "claims.result": "Evidence",
    "edits": "AblateHeads Axis Basis Constants DropBand DropDirection Edit FreezeBand KeepOnly "
    "KnockOut PlantSlash RankOne ScaleBand ScaleOffsets SetFrequencies ShiftSlash SwapBands "
    "fit_axis fit_rank_one parse_edit",
    "effects.ablations": "ablations",
    "effects.activation_patching": "activation_patching",
    "effects.metrics.attention": "PrefixMatching SlashScores",
    "effects.circuit": "circuit",
    "effects.copying": "copied_lags copying copying_losses",
    "effects.direct": "direct_effect",
    "effects.dose": "dose",
    "effects.fit_ablation": "fit_ablation",
    "effects.flow": "flow",
    "effects.metrics.logits": "LogitDifference",
    "effects.measure": "measure",
    "effects.between_runs.pairs": "Pairs copying_pairs",
    "effects.paths": "paths",
    "effects.persistence": "persistence",
    "effects.result": "Result",
    "effects.screen": "screen",
    "effects.sweep": "sweep",
    "explaining.explain": "explain explain_all",
    "explaining.result": "Explanation",
    "patching.fused": "fused",
    "patching.patch": "hooks patch",
    "reporting.page.report": "report",
    "scanning.callback": "SlashCallback",
    "scanning.emergence": "emergence",
    "scanning.emergence_result": "Emergence",
    "scanning.lines": "SlashLine",
    "scanning.monitor": "SlashMonitor",
    "scanning.result": "Scan SlashHead",
    "scanning.scan": "scan",
    "scanning.top_keys": "top_keys",
    "scanning.top_keys_result": "TopKeys",
}
_LAZY = {name: home for home, names in _HOMES.items() for name in names.split()}
_PACKAGES = ("theory",)

__all__ = [
    "AblateHeads",
    "Axis",
    "Basis",
    "Check",
    "Constants",
    "DropBand",
    "DropDirection",
    "Edit",
    "Emergence",
    "Evidence",
    "Explanation",
    "FreezeBand",
    "Head",
    "KeepOnly",
    "KnockOut",
    "LogitDifference",
    "MemoryNeeded",
    "Pairs",
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
    "SlashCallback",
    "SlashHead",
    "SlashLine",
    "SlashMonitor",
    "SlashScores",
    "SlashpatchError",
    "SwapBands",
    "TopKeys",
    "Workers",
    "ablations",
    "activation_patching",
    "check",
    "circuit",
    "copied_lags",
    "copying",
    "copying_losses",
    "copying_pairs",
    "direct_effect",
    "dose",
    "emergence",
    "evidence",
    "explain",
    "explain_all",
    "fit_ablation",
    "fit_axis",
    "fit_rank_one",
    "flow",
    "fused",
    "heads",
    "hooks",
    "load",
    "measure",
    "memory_needed",
    "parse_edit",
    "patch",
    "paths",
    "persistence",
    "report",
    "scan",
    "screen",
    "sweep",
    "theory",
    "top_keys",
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
