"""Parse an edit from its text, such as "KnockOut(L16H0, 1)", without evaluating any code."""

from __future__ import annotations

import ast
import difflib
import re
from typing import Any

from ..data.heads import Head
from ..errors import EditError, SlashpatchError
from .ablate import AblateHeads
from .bands import DropBand, ScaleBand
from .base import Edit
from .drop_direction import DropDirection
from .frequencies import FreezeBand, SetFrequencies, SwapBands
from .offsets import KeepOnly, KnockOut, ScaleOffsets
from .plant import PlantSlash
from .rank_one import RankOne
from .shift import ShiftSlash

#: The edits that `parse_edit` knows, by name.
EDITS: dict[str, type[Edit]] = {
    edit.__name__: edit
    for edit in (
        AblateHeads,
        ScaleOffsets,
        KnockOut,
        KeepOnly,
        ShiftSlash,
        DropBand,
        FreezeBand,
        SwapBands,
        ScaleBand,
        SetFrequencies,
        RankOne,
        PlantSlash,
        DropDirection,
    )
}
_LONGEST = 1_000_000
#: A quoted text, or a range of heads outside quotes, which Python would read as a subtraction.
_QUOTED_OR_RANGE = re.compile(
    r"""('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")|\bL\d+(?:-\d+(?:H\d+(?:-\d+)?)?|H\d+-\d+)\b""",
    re.IGNORECASE | re.ASCII | re.DOTALL,
)


def parse_edit(text: str) -> Edit:
    """Return the edit that a text such as `KnockOut(L16H0, 1)` describes.

    The text is a call of one of `EDITS`, such as `AblateHeads([L16H0, L11H1], mode=mean)`. Heads,
    ranges of heads (L16H0-3) and words need no quotes; lists, tuples and range(a, b) are allowed.
    The inverse of `str(edit)`. Raises EditError, HeadError, OffsetError or BandError.
    """
    if not isinstance(text, str):
        raise EditError(f"expected the text of an edit, got {type(text).__name__}")
    if len(text) > _LONGEST:
        raise EditError(
            f"expected the text of an edit, of at most {_LONGEST} characters; got {len(text)}"
        )
    try:
        quoted = _QUOTED_OR_RANGE.sub(lambda m: m[0] if m[1] else repr(m[0]), text.strip())
        node = ast.parse(quoted, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        node = None
    text = text if len(text) < 200 else f"{text[:200]}..."
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise EditError(f"expected an edit such as KnockOut(L16H0, 1), got {text!r}")
    name = node.func.id
    if name not in EDITS:
        close = difflib.get_close_matches(name, EDITS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise EditError(f"unknown edit {name!r}; {hint}edits are {', '.join(sorted(EDITS))}")
    try:
        args = [_value(argument) for argument in node.args]
        kwargs = {str(keyword.arg): _value(keyword.value) for keyword in node.keywords}
        if len(kwargs) < len(node.keywords):
            raise ValueError("an argument was given twice")
        return EDITS[name](*args, **kwargs)
    except SlashpatchError:
        raise
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        problem = str(error).replace("__init__()", name).replace(f"{name}.{name}", name)
        raise EditError(f"cannot read {text!r}: {problem}") from None


def as_edit(edit: Any) -> Edit:
    """Return `edit`, parsed first if it is a text. Raises EditError for anything else."""
    if isinstance(edit, str):
        return parse_edit(edit)
    if not isinstance(edit, Edit):
        raise EditError(
            f"expected an edit such as KnockOut('L16H0', 1), got {edit!r} "
            f"of type {type(edit).__name__}"
        )
    return edit


def _value(node: ast.expr) -> Any:
    """Return the value of an argument; raise ValueError for syntax that edits do not use."""
    if isinstance(node, ast.Constant) and (
        node.value is None or isinstance(node.value, (int, float, str, bool))
    ):
        return node.value
    if isinstance(node, ast.Name):
        try:
            return Head.parse(node.id)
        except SlashpatchError:
            return node.id
    if isinstance(node, (ast.Tuple, ast.List)):
        return tuple(_value(member) for member in node.elts)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _value(node.operand)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return -value
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "range"
        and not node.keywords
    ):
        return range(*(_value(argument) for argument in node.args))
    raise ValueError(
        f"expected heads, numbers, words, lists or range(a, b), got {ast.unparse(node)!r}"
    )
