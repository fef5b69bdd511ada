"""Untrusted text, made visible: control characters and those that turn its direction."""

from __future__ import annotations

import unicodedata


def visible(text: str) -> str:
    """Return a text in which control characters and those that turn its direction can be seen."""
    shown = text.replace("\n", "⏎").replace("\t", "⇥")
    return "".join(
        f"⟨U+{ord(char):04X}⟩" if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co") else char
        for char in shown
    )
