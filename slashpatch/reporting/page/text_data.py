"""A text with its strongest keys as JSON values for the page."""

from __future__ import annotations

import unicodedata
from typing import Any

import torch
from torch import Tensor

from ...scanning.top_keys_result import TopKeys
from .shown_text import visible


def text_data(text: TopKeys) -> dict[str, Any]:
    """Return tokens, and for each head its keys, as distances back, and diagonals by row.

    Weights are in thousandths, so that 4,096 tokens take little room; a distance of −1 is no key.
    """
    rows = torch.arange(len(text.tokens))[:, None]
    back = torch.where(text.keys < 0, -1, rows - text.keys)
    sources = [str(part.get("source", "?")) for part in text.provenance.get("prompts", ())]
    return {
        "source": visible(", ".join(sources)),
        "tokens": [_shown(token) for token in text.tokens],
        "breaks": [i for i, token in enumerate(text.tokens) if "\n" in token],
        "offsets": list(text.offsets),
        "heads": [
            {
                "name": str(head),
                "back": back[index].tolist(),
                "rest": _thousandths(1 - text.weights[index].double().sum(-1)),
                "weights": _thousandths(text.weights[index]),
                "diagonals": _thousandths(text.diagonals[index]),
            }
            for index, head in enumerate(text.heads)
        ],
    }


def _shown(token: str) -> str:
    """Return a token so that it can be seen: also an empty one, or a mark that needs a letter."""
    shown = visible(token)
    if not shown:
        return "⟨empty⟩"
    return f"◌{shown}" if unicodedata.combining(shown[0]) else shown


def _thousandths(weights: Tensor) -> Any:
    return (weights.double() * 1000).round().long().tolist()
