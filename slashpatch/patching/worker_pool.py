"""A pool of workers whose models are edited and run as the model here is."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..bridge.attached import active_patches
from ..bridge.sources import source_of
from ..bridge.watch import watch
from ..bridge.workers.options import Workers
from ..bridge.workers.pool import Job, WorkerPool
from ..data.progress import progress_over
from ..errors import WorkerError
from .attachment import Attachment
from .engine import FusedEngine
from .fused import fused, is_fused
from .patch import patch

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def worker_pool(model: TransformerBridge, workers: Workers) -> WorkerPool:
    """Return a pool whose workers attach the model's active edits, in the same order.

    Their models run fused if the model does. Raises WorkerError for a model object that runs fused,
    which cannot be sent, and for a monitor, which would see no pass.
    """
    for follower in watch(model).followers:
        if not isinstance(follower, (Attachment, FusedEngine)):
            raise WorkerError(
                f"a {type(follower).__name__} is on the model, and would not see the passes of "
                "workers; leave it before, or leave workers out to stay in this process"
            )
    runs_fused = is_fused(model)
    if runs_fused and source_of(model) is None:
        raise WorkerError(
            "a model object cannot be sent to workers while it runs fused; leave sp.fused before, "
            "or load the model from a directory or a hub id"
        )
    return WorkerPool(model, workers, _Setting(active_patches(model), runs_fused))


def units_of(
    model: TransformerBridge,
    job: Job,
    indexes: Sequence[int],
    what: str,
    workers: Workers | None,
    progress: bool | None = None,
    n: Sequence[int] | None = None,
    ahead: int | None = None,
) -> Generator[tuple[int, Any], None, None]:
    """Run units of a job here or, if `workers` is given, in workers; yield (index, values) of each.

    Here they come in the order of `indexes`, from workers as they are finished. The other arguments
    are those of `WorkerPool.run`.
    """
    if not indexes:
        return
    if workers is None:
        run = job.start(model)
        for index in progress_over(indexes, what, show=progress, n=n):
            yield index, run(index)
        return
    with worker_pool(model, workers) as pool:
        yield from pool.run(job, indexes, what, show=progress, n=n, ahead=ahead)


@dataclass(frozen=True)
class _Setting:
    """How a model is run: under these patches, the first the outermost, and fused or not."""

    patches: tuple[tuple[Any, ...], ...]
    fused: bool

    @contextmanager
    def __call__(self, model: TransformerBridge) -> Iterator[None]:
        with ExitStack() as stack:
            if self.fused:
                stack.enter_context(fused(model))
            for edits in self.patches:
                stack.enter_context(patch(model, *edits))
            yield
