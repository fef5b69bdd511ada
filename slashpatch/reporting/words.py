"""Mark the words in which two texts differ."""

from __future__ import annotations

import difflib
import re

from rich.text import Text


def marked_pair(first: str, second: str, styled: bool = True) -> tuple[Text, Text]:
    """Return both texts with their differing words underlined, or in ⟦ ⟧ if not `styled`."""
    words: list[list[str]] = [re.findall(r"\s+|\w+|[^\w\s]", text) for text in (first, second)]
    matcher = difflib.SequenceMatcher(None, words[0], words[1], autojunk=False)
    marked = (Text(), Text())
    for tag, *spans in matcher.get_opcodes():
        for text, its_words, start, stop in zip(
            marked, words, spans[::2], spans[1::2], strict=True
        ):
            part = "".join(its_words[start:stop])
            if tag == "equal" or not part.strip():
                text.append(part)
            elif styled:
                text.append(part, style="bold underline yellow")
            else:
                text.append(f"⟦{part}⟧")
    return marked
