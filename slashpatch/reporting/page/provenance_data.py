"""Where each part of a report comes from, and the definitions behind its numbers."""

from __future__ import annotations

from typing import Any

from ...explaining.result import RULE
from .inputs import Inputs, parts

PAPER = "arXiv 2601.08297"
OURS = "ours"


def sources(found: Inputs) -> list[dict[str, Any]]:
    """Return, for each part of the report, its name and (label, value) pairs of its provenance."""
    return [
        {"name": name, "rows": [(_label(key), _shown(value)) for key, value in _facts(part)]}
        for name, part in parts(found)
    ]


def _facts(part: Any) -> list[tuple[str, Any]]:
    """Return (key, value) pairs of a provenance; nested ones are spelt out in their key."""
    facts: list[tuple[str, Any]] = []
    for key, value in part.provenance.items():
        if key == "prompts" and isinstance(value, list):
            facts += [(f"prompts {number}", one) for number, one in enumerate(value, 1)]
        elif isinstance(value, dict):
            facts += [(f"{key}: {name}", one) for name, one in value.items()]
        else:
            facts.append((key, value))
    return facts


def _label(key: str) -> str:
    return key.replace("_", " ")


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name} {_shown(one)}" for name, one in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_shown(one) for one in value) or "none"
    return "–" if value is None else str(value)


def definitions() -> list[tuple[str, str, str]]:
    """Return (term, meaning, source) of everything that the page shows."""
    return [
        (
            "slash score",
            "Mean attention weight from token i to token i−Δ over the rows i ≥ Δ of a prompt, "
            "averaged over prompts. Of the causal attention after the softmax; from 0 to 1.",
            PAPER,
        ),
        (
            "slash head",
            "A head with a slash score of at least κ at some offset Δ. The paper defines (κ, Δ); "
            "the default κ = 0.1 is ours.",
            f"{PAPER}; κ {OURS}",
        ),
        (
            "interval",
            "Over prompts, the unit of chance: Student's t at 95 % for scores; bootstrap-t for "
            "effects, at the level that is written with them. Effects of fewer than 6 prompts have "
            "none, nor have scores of a single prompt.",
            OURS,
        ),
        (
            "random tokens",
            "Prompts of uniformly drawn tokens. The paper says that slash heads keep their slash "
            "there.",
            PAPER,
        ),
        (
            "r1, R95",
            "Of the singular values σ of the uncentred tokens × d_head matrix of queries (keys) "
            "before RoPE: r1 = σ1² / Σσ²; R95 is the fewest σ² that make up 95 % of Σσ².",
            OURS,
        ),
        ("cone", "Mean cosine of the tokens' queries (keys) with their mean vector.", OURS),
        (
            "predicted logit",
            "The logit at each offset if every token had the mean query and the mean key: "
            "Σ_l A_l cos(θ_l Δ + φ_l), plus the dimensions that are not rotated.",
            f"sum of cosines: {PAPER}; means in it: {OURS}",
        ),
        (
            "amplitude A_l, phase φ_l",
            "Modulus and angle of mean query times conjugate mean key in rotary pair l, as complex "
            "numbers, with the scale of the logits.",
            PAPER,
        ),
        (
            "band",
            "A third of the rotary pairs by frequency: high, medium, low. A dropped band adds "
            "nothing to the logits; a band that is not rotated keeps its content.",
            OURS,
        ),
        ("verdict", RULE, OURS),
        (
            "effect",
            "Value with the edit minus value of the clean run, paired by prompt. q is p adjusted "
            "for all rows of its table (Benjamini-Hochberg).",
            OURS,
        ),
        (
            "control",
            "The same kind of edit at randomly drawn heads, offsets or rotary pairs; each draw is "
            "shown.",
            OURS,
        ),
    ]
