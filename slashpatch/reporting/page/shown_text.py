"""Untrusted text, made visible: control characters and those that turn its direction."""

from __future__ import annotations

import unicodedata

#: Categories of Unicode characters that have no sign of their own, or change how others are shown.
UNSEEN = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")


def visible(text: str) -> str:
    """Return a text in which control characters and those that turn its direction can be seen."""
    shown = text.replace("\n", "⏎").replace("\t", "⇥")
    return "".join(
        f"⟨U+{ord(char):04X}⟩" if unicodedata.category(char) in UNSEEN else char for char in shown
    )
