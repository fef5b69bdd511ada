"""A text with its strongest keys as JSON values for the page."""

from __future__ import annotations

import unicodedata
from typing import Any

import torch

from ...scanning.top_keys_result import TopKeys
from .scan_data import fixed


def text_data(text: TopKeys) -> dict[str, Any]:
    """Return tokens, and for each head its keys, as distances back, and diagonals by row.

    Distances are small numbers in most heads, which compress well; −1 stands for no key.
    """
    rows = torch.arange(len(text.tokens))[:, None]
    back = torch.where(text.keys < 0, -1, rows - text.keys)
    return {
        "source": visible(str(text.provenance["prompts"][0]["source"])),
        "tokens": [visible(token) for token in text.tokens],
        "breaks": [i for i, token in enumerate(text.tokens) if "\n" in token],
        "offsets": list(text.offsets),
        "heads": [
            {
                "name": str(head),
                "back": back[index].tolist(),
                "weights": fixed(text.weights[index], 3),
                "diagonals": fixed(text.diagonals[index], 3),
            }
            for index, head in enumerate(text.heads)
        ],
    }


def visible(text: str) -> str:
    """Return a text in which control characters and those that turn its direction can be seen."""
    shown = text.replace("\n", "⏎").replace("\t", "⇥")
    return "".join(
        f"⟨U+{ord(char):04X}⟩" if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co") else char
        for char in shown
    )
