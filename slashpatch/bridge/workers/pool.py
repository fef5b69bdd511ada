"""The pool: hands the units of a job to workers, and yields their values as they come."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

from ...data.progress import WorkersBar
from ...errors import WorkerError
from .actor import Worker
from .identity import difference, difference_of_probes, identity, probe
from .member import Member, pickled, said
from .options import Workers
from .session import ray_session
from .shipping import ship
from .units import Units

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

#: How often Ray restarts a worker, and how many workers may die at one unit.
_RESTARTS, _DEATHS = 3, 3
#: Seconds without any worker after which the pool says so, once.
_PATIENCE = 60.0
#: A function of a worker's model, which returns the context manager inside which jobs run there.
Setting = Callable[[Any], AbstractContextManager[Any]]


@runtime_checkable
class Job(Protocol):
    """Work on one model, as units with an index. Ray sends it to workers by cloudpickle."""

    def start(self, model: TransformerBridge) -> Callable[[int], Any]:
        """Return a function that runs one unit and returns its values, in the worker."""
        ...


class WorkerPool:
    """Workers that hold one model, for one or several jobs. Use it in a `with` block.

    Workers start with the first unit, at most one a unit, and are gone when the block is left.

    Args:
        model: The model, which must stay as it is inside the block.
        workers: How many, and what each may use.
        setting: A function of a worker's model that returns the context manager inside which jobs
            run there, for example a patch; Ray sends it by cloudpickle.
    """

    def __init__(
        self,
        model: TransformerBridge,
        workers: Workers,
        setting: Setting = contextlib.nullcontext,
    ) -> None:
        self.model, self.workers, self.setting = model, workers, setting
        self._members: list[Member] = []
        self._stack = ExitStack()
        self._serial = 0
        self._make: Callable[[], Any] | None = None
        self._shipped: list[Any] | None = None
        self._waiting_since: float | None = None

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *exception: object) -> None:
        import ray

        for member in self._members:
            with contextlib.suppress(Exception):  # one that is dead already
                ray.kill(member.actor, no_restart=True)
        self._members = []
        self._make = self._shipped = None
        self._stack.close()

    def run(
        self,
        job: Job,
        indexes: Sequence[int],
        what: str,
        *,
        show: bool | None = None,
        n: Sequence[int] | None = None,
        ahead: int | None = None,
    ) -> Iterator[tuple[int, Any]]:
        """Run units of a job, handed out in the order of `indexes`; yield (index, values) of each.

        Values come in the order in which they are finished, each index once.

        Args:
            job: The work.
            indexes: Which units, all different.
            what: Title of the progress bar.
            show: Whether to show it; None: on a terminal only.
            n: How much each unit counts in it.
            ahead: How far, at most, a unit that is handed out may lie behind the first one that is
                not finished; None: any number. Bounds what a caller who needs the order must keep.

        Raises:
            WorkerError: A worker that differs from this process, or no worker that is left. What
                was yielded before is right.
            Exception: What the job raised in a worker, with the worker's traceback as its cause.
        """
        import ray

        if not indexes:
            return
        job_bytes = pickled(job, "the work")
        self._start(min(self.workers.count, len(indexes)))
        self._serial += 1
        job_in_store = [ray.put(job_bytes)]
        counts = dict(zip(indexes, n or [1] * len(indexes), strict=True))
        work = Units(indexes, ahead)
        bar = WorkersBar(what, sum(counts.values()), self.workers.count, show)
        try:
            with bar:
                while not work.finished:
                    self._hand_out(work, job_in_store)
                    bar.alive(sum(member.ready for member in self._members))
                    for member, ref in self._answered():
                        found = self._receive(member, ref, work)
                        if found is not None and work.finish(found[0]):
                            bar.advance(counts[found[0]])
                            yield found
        finally:
            for member in self._members:
                member.units.clear()  # answers of this job that still come are nobody's

    def _start(self, count: int) -> None:
        """Connect to Ray and ship the model, once; start workers until there are `count`."""
        import ray

        if self._make is None:
            shipped = ship(self.model)
            self._expected = identity(self.model)
            self._probe = probe(self.model)
            self._reserved = self._options(shipped.device)
            cpus = self.workers.count * self.workers.threads
            size = len(shipped.pickled) + sum(array.nbytes for array in shipped.weights)
            self._stack.enter_context(ray_session(cpus, 2 * size))
            self._shipped = [ray.put(shipped)]
            setting = pickled(self.setting, "the active edits")
            settings = (setting, self.workers.threads, torch.get_float32_matmul_precision())
            cls = ray.remote(**self._reserved)(Worker)
            self._make = lambda: cls.remote(*settings)
            self._waiting_since = time.monotonic()
        while len(self._members) < count:
            member = Member(len(self._members) + 1, self._make())
            self._members.append(member)
            self._greet(member)

    def _options(self, device: str) -> dict[str, Any]:
        """Return what Ray reserves for a worker, and how often it restarts one."""
        gpus = self.workers.gpus
        if gpus is None:
            gpus = 1 if device == "cuda" else 0
        return {
            "num_cpus": self.workers.threads,
            "num_gpus": gpus,
            "max_restarts": _RESTARTS,
            "max_task_retries": _RESTARTS,
        }

    def _greet(self, member: Member) -> None:
        """Ask a worker that has no model to load it; Ray asks again if it dies meanwhile."""
        member.ready = False
        member.hello = member.actor.hello.remote(self._shipped)

    def _hand_out(self, work: Units, job: list[Any]) -> None:
        """Give each worker that is ready a unit, and a second one ahead while there are many."""
        for depth in (1, 2):
            for member in self._members:
                many = depth == 1 or work.n_waiting > len(self._members)
                while member.ready and len(member.units) < depth and many:
                    index = work.next()
                    if index is None:
                        return
                    # Not retried by Ray, which would wait for a lost worker: others take the unit.
                    call = member.actor.work.options(max_task_retries=0)
                    member.units[call.remote(self._serial, job, index)] = index

    def _answered(self) -> list[tuple[Member, Any]]:
        """Return some answers that are there, with the workers that gave them; waits a second."""
        import ray

        owners = {ref: m for m in self._members for ref in (m.hello, *m.units) if ref is not None}
        ready, _ = ray.wait(list(owners), num_returns=1, timeout=1.0)
        self._say_if_none_starts()
        return [(owners[ref], ref) for ref in ready]

    def _receive(self, member: Member, ref: Any, work: Units) -> tuple[int, Any] | None:
        """Take an answer; return (index, values) if it is that of a unit."""
        import ray

        try:
            kind, value = ray.get(ref)
        except ray.exceptions.RayTaskError:
            raise
        except ray.exceptions.RayError as error:
            self._lost(member, ref, work, error)
            return None
        if kind == "raised":
            raised, text, member.name = value
            if ref is member.hello:
                raise WorkerError(
                    f"{member} cannot load the model as it is here: {type(raised).__name__}: "
                    f"{raised}. What is finished is kept"
                ) from raised
            raise raised from WorkerError(f"in {member}:\n{text}")
        if ref is member.hello:
            member.hello = None
            self._welcome(member, *value)
            return None
        if kind == "empty":  # it was restarted while it had nothing to do
            self._take_back(member, work)
            self._greet(member)
            return None
        return member.units.pop(ref), value

    def _welcome(self, member: Member, name: str, found: dict[str, str], logits: Any) -> None:
        """Let a worker begin, if it has the same model, versions and edits as this process."""
        member.name = name
        differs = difference(self._expected, found) or difference_of_probes(
            self._probe, logits, next(self.model.original_model.parameters()).dtype
        )
        if differs:
            raise WorkerError(
                f"{member} would give other numbers than this process: {differs}. Use the same "
                "model files, versions and devices on all machines; what is finished is kept"
            )
        member.ready = True
        self._waiting_since = None

    def _lost(self, member: Member, ref: Any, work: Units, error: Exception) -> None:
        """Take back what a dead worker had, and greet it again if Ray restarts it."""
        import ray

        if ref is not member.hello:
            first = next(iter(member.units.values()), None)
            if first is not None and work.died_at(first) >= _DEATHS:
                raise WorkerError(
                    f"unit {first} of this work has ended {_DEATHS} workers, {member} the last "
                    f"({said(error)}); perhaps it needs more memory than there is. What is "
                    "finished is kept: resume it"
                ) from error
            self._take_back(member, work)
            try:
                self._greet(member)
                return
            except ray.exceptions.RayActorError as refused:
                error = refused
        # No restart is left, or it could not even be made.
        self._members.remove(member)
        if not self._members:
            raise WorkerError(
                f"no worker is left; {member} was the last one to end, after {_RESTARTS} "
                f"restarts at most ({said(error)}). What is finished is kept: resume it"
            ) from error

    def _take_back(self, member: Member, work: Units) -> None:
        work.take_back(member.units.values())
        member.units.clear()

    def _say_if_none_starts(self) -> None:
        import ray

        since = self._waiting_since
        if since is not None and time.monotonic() - since > _PATIENCE:
            self._waiting_since = None
            warnings.warn(
                f"no worker has started yet; each needs {self._reserved['num_cpus']} CPUs and "
                f"{self._reserved['num_gpus']} GPUs, and the cluster has free: "
                f"{ray.available_resources()}",
                stacklevel=2,
            )
