"""The worker: holds one model, and runs a job's units on it. Ray makes an actor of it."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

#: What a worker answers with: "done" and the values, "raised" and (the error, its traceback, the
#: worker's name), or "empty" if it was restarted and has no model.
Answer = tuple[str, Any]


class Worker:
    """Holds a model. Loading is not in the constructor, so that its errors are answers.

    Args:
        setting: A function of the model that returns a context manager, inside which it runs; as
            cloudpickle's bytes, so that what is not installed here is an answer too.
        threads: CPU threads of torch.
        precision: `torch.get_float32_matmul_precision()` of the driver.
    """

    def __init__(self, setting: bytes, threads: int, precision: str) -> None:
        self._setting, self._threads, self._precision = setting, threads, precision
        self._model: Any = None
        self._stack = ExitStack()
        self._serial = -1
        self._run: Callable[[int], Any] | None = None

    def hello(self, shipped: list[Any]) -> Answer:
        """Load the model, a `Shipped` in a list of one reference.

        Answers with this process's name, its identity and its probe.
        """
        return _answer(self._hello, shipped)

    def _hello(self, shipped: list[Any]) -> tuple[str, dict[str, str], Any]:
        import ray
        import torch
        from ray import cloudpickle

        from .identity import here, identity, probe

        torch.set_num_threads(self._threads)
        torch.set_float32_matmul_precision(self._precision)
        if self._model is None:
            model = ray.get(shipped[0]).unpack()
            self._stack.enter_context(cloudpickle.loads(self._setting)(model))
            self._model = model
        return here(), identity(self._model), probe(self._model)

    def work(self, serial: int, job: list[Any], index: int) -> Answer:
        """Run one unit of a job, which is in a list of one reference; start the job before."""
        if self._model is None:
            return "empty", None
        return _answer(self._work, serial, job, index)

    def _work(self, serial: int, job: list[Any], index: int) -> Any:
        import ray
        from ray import cloudpickle

        if self._serial != serial or self._run is None:
            self._run = None
            self._run = cloudpickle.loads(ray.get(job[0])).start(self._model)
            self._serial = serial
        return self._run(index)


def _answer(function: Callable[..., Any], *args: Any) -> Answer:
    """Return what a function returns or raises, as an answer that can be sent."""
    from ray import cloudpickle

    from .identity import here

    try:
        return "done", function(*args)
    except Exception as error:
        text = traceback.format_exc()
        try:
            cloudpickle.loads(cloudpickle.dumps(error))
        except Exception:  # an error that cannot be sent is told in words
            error = RuntimeError(f"{type(error).__name__}: {error}")
        error.__cause__ = error.__context__ = None
        return "raised", (error, text, here())
