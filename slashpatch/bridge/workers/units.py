"""Which units of a job wait, which are finished, and at which workers died."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from typing import Any


class Units:
    """The units of a job, handed out in their order.

    Args:
        indexes: All of them.
        ahead: As for `WorkerPool.run`.
    """

    def __init__(self, indexes: Sequence[int], ahead: int | None) -> None:
        self._waiting = deque(indexes)
        self._places = {index: place for place, index in enumerate(indexes)}
        self._unfinished = deque(indexes)
        self._done: set[int] = set()
        self._deaths: Counter[int] = Counter()
        self._ahead = len(indexes) if ahead is None else ahead

    @property
    def finished(self) -> bool:
        """Whether all are."""
        return not self._unfinished

    @property
    def n_waiting(self) -> int:
        """How many are not handed out."""
        return len(self._waiting)

    def next(self) -> int | None:
        """Return the next unit to hand out, or None if there is none, or none may go yet."""
        if not self._waiting:
            return None
        first = self._places[self._unfinished[0]]
        if self._places[self._waiting[0]] - first > self._ahead:
            return None
        return self._waiting.popleft()

    def finish(self, index: int) -> bool:
        """Note that a unit is finished; return False if it was before."""
        if index in self._done:
            return False
        self._done.add(index)
        while self._unfinished and self._unfinished[0] in self._done:
            self._unfinished.popleft()
        return True

    def take_back(self, indexes: Any) -> None:
        """Put units back in front, in their order."""
        back = sorted((i for i in indexes if i not in self._done), key=self._places.__getitem__)
        self._waiting.extendleft(reversed(back))

    def died_at(self, index: int) -> int:
        """Count one more worker that died at a unit; return how many did."""
        self._deaths[index] += 1
        return self._deaths[index]
