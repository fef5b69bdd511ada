"""How the passes that run now are meant: slashpatch's own, or with attention matrices formed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

_own: ContextVar[bool] = ContextVar("slashpatch_own_passes", default=False)
_matrices: ContextVar[bool] = ContextVar("slashpatch_matrices", default=False)


@contextlib.contextmanager
def own_passes() -> Iterator[None]:
    """Passes inside are slashpatch's own: monitors and the record of what fired skip them."""
    token = _own.set(True)
    try:
        yield
    finally:
        _own.reset(token)


def passes_are_own() -> bool:
    """Whether slashpatch runs the current passes for itself."""
    return _own.get()


@contextlib.contextmanager
def forming_matrices(wanted: bool = True) -> Iterator[None]:
    """Passes inside form whole attention matrices, also while the model runs fused."""
    token = _matrices.set(wanted)
    try:
        yield
    finally:
        _matrices.reset(token)


def matrices_are_formed() -> bool:
    """Whether passes must form attention matrices now."""
    return _matrices.get()
