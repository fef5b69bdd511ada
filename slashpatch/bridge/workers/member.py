"""One worker as the pool knows it, and what passes between them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from ...errors import WorkerError


@dataclass
class Member:
    """One worker, as the pool knows it.

    Attributes:
        number: Counted from 1.
        actor: Ray's handle.
        name: Its process and machine, once it has said hello.
        ready: Whether it has the model.
        hello: The reference of its hello, while it is awaited.
        units: Units that it has and has not returned, by reference; the first is being run.
    """

    number: int
    actor: Any
    name: str = "not started"
    ready: bool = False
    hello: Any = None
    units: dict[Any, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"worker {self.number} ({self.name})"


def pickled(thing: Any, what: str) -> bytes:
    """Return an object as cloudpickle's bytes. Raises WorkerError if it cannot be pickled."""
    from ray import cloudpickle

    try:
        found: bytes = cloudpickle.dumps(thing)
    except Exception as error:  # any object of the user's may refuse
        raise WorkerError(
            f"{what} cannot be sent to workers ({type(error).__name__}: {error}); a metric or edit "
            "holds something that cannot be pickled"
        ) from error
    return found


def said(error: Exception) -> str:
    """Return the first line of Ray's message, without its colours."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).splitlines()
    return next((line.strip() for line in lines if line.strip()), "no reason")
