"""The edits of a dose: one for each number, from a text with {} or a function."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any

from ... import bridge
from ...edits import Edit, parse_edit
from ...errors import EditError, SlashpatchError
from ..running.conditions import Condition, conditions

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

#: The most doses that a range may have; a smaller step is more likely to be a slip.
_MOST = 1000
_EXAMPLE = "0:2:0.25 (from 0 to 2 in steps of 0.25, both ends included) or 1,2,4"


def as_doses(values: Any) -> tuple[float | int, ...]:
    """Return the doses, ascending, each once; whole numbers as integers.

    Args:
        values: Numbers, or a text such as "0:2:0.25" (both ends included) or "1,2,4".

    Raises EditError for anything else, for no doses, and for the same dose twice.
    """
    if isinstance(values, str):
        given = [number for part in values.split(",") for number in _of_text(part)]
    elif isinstance(values, Iterable):
        given = [_whole(value, values) for value in values]
    else:
        raise EditError(f"doses are numbers, or a text such as {_EXAMPLE}; got {values!r}")
    if not given:
        raise EditError(f"no doses were given; expected numbers, or a text such as {_EXAMPLE}")
    twice = next((value for value in given if given.count(value) > 1), None)
    if twice is not None:
        raise EditError(f"the dose {twice:g} is given twice")
    return tuple(sorted(given))


def _of_text(part: str) -> list[float | int]:
    """Return the numbers of one part of a text: a number, start:stop or start:stop:step."""
    words = [word.strip() for word in part.split(":")]
    try:
        numbers = [Decimal(word) for word in words]
        if not all(number.is_finite() for number in numbers) or len(numbers) > 3:
            raise InvalidOperation
    except InvalidOperation:
        raise EditError(f"doses are typed as {_EXAMPLE}; got {part.strip()!r}") from None
    if len(numbers) == 1:
        return [_whole(float(numbers[0]), part)]
    start, stop = numbers[:2]
    step = numbers[2] if len(numbers) == 3 else Decimal(1)
    if step <= 0 or stop < start or (stop - start) / step >= _MOST:
        raise EditError(
            f"expected start:stop:step with a step above 0, a stop of at least the start and at "
            f"most {_MOST} doses; got {part.strip()!r}"
        )
    # Decimals, so that 0:2:0.1 ends at 2 and its numbers print as they were typed.
    return [_whole(float(start + i * step), part) for i in range(int((stop - start) / step) + 1)]


def _whole(value: Any, given: Any) -> float | int:
    """Return a finite number, as an integer where it is whole. Raises EditError."""
    value = value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not abs(value) <= 1e30:
        raise EditError(f"doses are finite numbers, such as {_EXAMPLE}; got {value!r} in {given!r}")
    return int(value) if float(value).is_integer() else float(value)


def dose_conditions(
    model: TransformerBridge, make_edit: Any, doses: tuple[float | int, ...]
) -> list[Condition]:
    """Return the condition of each dose; one without edits where the function returned none.

    Raises EditError for a `make_edit` that makes no edit, errors of the edits that name the dose,
    and ModelError if a layer does not support its edit.
    """
    info = bridge.read(model)
    make = _maker(make_edit)
    made = []
    for dose in doses:
        try:
            condition = _condition(make(dose))
            for edit in condition.edits:
                edit.validate(info)
                if {"query", "key"} & set(edit.stages()):
                    edit.prepare(model, info)
        except SlashpatchError as error:
            raise type(error)(f"at dose {dose}: {error}") from None
        made.append(condition)
    if not any(condition.edits for condition in made):
        raise EditError("make_edit returned no edit at any dose")
    return made


def require_template(text: str) -> None:
    """Raise EditError unless a text has {} in the place of the dose."""
    if "{}" not in text:
        raise EditError(
            "expected a text with {} in the place of the dose, such as "
            f"'ScaleOffsets(L16H0, 1, {{}})'; got {text!r}"
        )


def template(make_edit: Any) -> str:
    """Return how the edit is named in results: the text, or the function's name."""
    if isinstance(make_edit, str):
        return make_edit
    return f"<{getattr(make_edit, '__name__', type(make_edit).__name__)}>"


def _maker(make_edit: Any) -> Callable[[float | int], Any]:
    if isinstance(make_edit, str):
        require_template(make_edit)
        return lambda dose: parse_edit(make_edit.replace("{}", repr(dose)))
    if not callable(make_edit) or isinstance(make_edit, Edit):
        raise EditError(
            "expected a text such as 'ScaleOffsets(L16H0, 1, {})' or a function of the dose; got "
            f"{make_edit!r}"
        )
    try:
        inspect.signature(make_edit).bind(0)
    except TypeError:
        raise EditError(
            f"make_edit is called with the dose, but {make_edit!r} does not take one argument"
        ) from None
    except ValueError:
        pass  # some builtins have no signature
    found: Callable[[float | int], Any] = make_edit
    return found


def _condition(made: Any) -> Condition:
    """Return the condition of what `make_edit` returned: an edit, several that act together, None.

    Raises EditError for anything else.
    """
    if made is None or (isinstance(made, (list, tuple)) and not made):
        return Condition()
    (condition,) = conditions([list(made) if isinstance(made, (list, tuple)) else made])
    return condition
