"""Ray's session: the one that is there, the cluster of RAY_ADDRESS, or one on this machine."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from collections.abc import Iterator
from typing import Any

from ...errors import WorkerError

#: Bytes that a session on this machine keeps for objects, beside the weights.
_STORE = 256 * 2**20


@contextlib.contextmanager
def ray_session(cpus: int, object_bytes: int) -> Iterator[None]:
    """Connect to Ray as `ray.init()` does, and disconnect on leaving.

    A session that is there already is used and left. Without one, and without a cluster to connect
    to, Ray is started on this machine with at least `cpus` CPUs, and stopped on leaving; its log
    files are deleted unless the block raised. Raises WorkerError if Ray cannot start.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    own = {
        "num_cpus": max(cpus, os.cpu_count() or 1),
        "object_store_memory": _STORE + object_bytes,
        "include_dashboard": False,
    }
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    folder: str | None = None
    try:
        with _random_kept():
            if os.environ.get("RAY_ADDRESS", "local") in ("", "local"):
                try:
                    folder = ray.init(**quiet, **own).address_info.get("session_dir")
                except ValueError:  # a cluster was started here: its resources are given
                    ray.init(**quiet)
            else:
                ray.init(**quiet)
    except Exception as error:  # Ray raises a bare Exception where its daemons start too slowly
        ray.shutdown()  # what it had started
        address = os.environ.get("RAY_ADDRESS")
        where = f"connect to the Ray cluster at {address}" if address else "start Ray here"
        raise WorkerError(f"cannot {where}: {' '.join(str(error).split())}") from error
    with _quiet():
        try:
            yield
        finally:
            with _random_kept():
                ray.shutdown()
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _random_kept() -> Iterator[None]:
    """Leave Python's random numbers as they are: Ray draws from them to start and to stop."""
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Stop Ray from printing what its daemons say of lost workers: stdout may be a result as JSON.

    The pool notices lost workers itself. There is no public setting for this.
    """
    from ray._private import worker

    before = getattr(worker, "_worker_logs_enabled", True)
    worker._worker_logs_enabled = False
    try:
        yield
    finally:
        worker._worker_logs_enabled = before
