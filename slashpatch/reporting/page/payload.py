"""The data of a report as JSON values, from which the page's JavaScript draws everything."""

from __future__ import annotations

from typing import Any

from ...explaining.result import RULE
from .inputs import Inputs
from .result_data import effects_by_head, result_data, sweep_values
from .scan_data import pair_data, profile_data, rank_data, scan_data, shown_columns
from .specs import specs, themes
from .text_data import text_data


def payload(found: Inputs, kappa: float) -> dict[str, Any]:
    """Return the data of a report as JSON values."""
    scan = found.scan
    columns = shown_columns(scan)
    scores = {"natural": scan_data(scan, columns)}
    if found.random is not None:
        scores["random"] = scan_data(found.random, columns)
        if scores["random"]["label"] == scores["natural"]["label"]:
            scores["random"]["label"] += " (second scan)"
    return {
        "model": scan.provenance["model"],
        "shape": list(found.shape),
        "offsets": [scan.offsets[column] for column in columns],
        "offsets_left_out": len(scan.offsets) - len(columns),
        "kappa": kappa,
        "scores": scores,
        "sweeps": [
            {"label": label, "values": values}
            for result in found.results
            if result.kind in ("sweep", "screen")
            for label, values in sweep_values(result, found.shape)
        ],
        "rank": rank_data(scan),
        "profile": profile_data(scan),
        "pairs": pair_data(scan),
        "explanations": {
            str(explanation.head): explanation.to_dict() for explanation in found.explanations
        },
        "rule": RULE,
        "results": [result_data(result) for result in found.results],
        "effects": effects_by_head(found.results),
        "texts": [text_data(text) for text in found.texts],
        "specs": specs(),
        "themes": themes(),
    }
