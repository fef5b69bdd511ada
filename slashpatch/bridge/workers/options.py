"""How many worker processes, and what each may use."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from ...errors import ExtraError, WorkerError

_TEXT = re.compile(r"([1-9][0-9]*)(?:x([1-9][0-9]*))?")


@dataclass(frozen=True)
class Workers:
    """Worker processes that each hold the model; for the argument `workers`.

    Results do not depend on their number. They do depend on the threads, by rounding: they equal
    those of one process with the same `torch.get_num_threads()`, bit for bit on equal processors.

    Attributes:
        count: How many worker processes.
        threads: CPU threads of each, which are the CPUs that Ray reserves for it.
        gpus: GPUs that Ray reserves for each, 0.5 to let two share one. None: 1 if the model is on
            a CUDA device, else 0.
    """

    count: int
    threads: int = 1
    gpus: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("count", self.count), ("threads", self.threads)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise WorkerError(f"{name} of workers must be an integer from 1; got {value!r}")
        number = isinstance(self.gpus, (int, float)) and not isinstance(self.gpus, bool)
        if self.gpus is not None and not (number and self.gpus >= 0):
            raise WorkerError(f"gpus of a worker must be a number from 0; got {self.gpus!r}")

    @property
    def record(self) -> dict[str, int]:
        """What a result's provenance says about the workers."""
        return {"workers": self.count, "threads": self.threads}


def as_workers(workers: Any) -> Workers | None:
    """Return what an argument `workers` asks for; None is this process alone.

    Takes a number, a `Workers`, or a text: "8", or "8x4" for 8 workers of 4 threads each. Raises
    WorkerError for anything else, and ExtraError if Ray is not installed.
    """
    if workers is None:
        return None
    if isinstance(workers, str):
        found = _TEXT.fullmatch(workers.strip())
        if found is None:
            raise WorkerError(
                f"expected a number of workers such as 4, or 4x2 for 4 workers of 2 threads each; "
                f"got {workers!r}"
            )
        workers = Workers(int(found[1]), int(found[2] or 1))
    elif not isinstance(workers, Workers):
        workers = Workers(workers)
    if find_spec("ray") is None:
        raise ExtraError(
            "workers need Ray, which is not installed; pip install 'slashpatch[ray]', or leave "
            "workers out to stay in this process"
        )
    return workers
