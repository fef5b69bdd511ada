"""Train the shallow transformer, with measurements on the way and checkpoints to resume from."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..data.files import require_writable
from ..data.progress import progress_over
from ..errors import TheoryError
from .data import sample, seeded
from .model import ShallowTransformer
from .run import Run, measure, measurement_examples
from .settings import Settings, as_settings

#: Number of recorded steps in each doubling of the step count.
_PER_DOUBLING = 16


def train(
    settings: Settings | None = None,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool | None = None,
    **knobs: Any,
) -> Run:
    """Train the shallow transformer on the CPU; it takes seconds at the default settings.

    Args:
        settings: A `Settings`; or give its fields by name.
        checkpoint: A .safetensors file to write, at every doubling of the step count and at the
            end.
        resume: Continue from the checkpoint, if the file exists, up to `steps`. Its settings must
            be the same apart from `steps`.
        progress: Whether to show a progress bar; None: on a terminal only.
        **knobs: Fields of `Settings`.

    Returns:
        The run: final weights, and measurements taken during training.

    Raises:
        TheoryError: Invalid settings, a checkpoint with other settings, or a loss that is not
            finite.
    """
    settings = as_settings(Settings, settings, knobs)
    if checkpoint is not None:
        if not str(checkpoint).endswith(".safetensors"):
            raise TheoryError(
                f"a checkpoint's file name ends in .safetensors; got {str(checkpoint)!r}"
            )
        require_writable(checkpoint)
    if resume and checkpoint is None:
        raise TheoryError("resume needs a checkpoint: the file to continue from")
    with with_threads(1), torch.inference_mode(False), torch.enable_grad():
        if resume and checkpoint is not None and os.path.exists(checkpoint):
            run = _resumed(settings, checkpoint)
        else:
            run = Run(settings, ShallowTransformer.initial(settings))
        _train(run, checkpoint, progress)
    return run


@contextmanager
def with_threads(number: int | None) -> Iterator[None]:
    """Use so many threads of torch meanwhile; None: as many as now.

    One is best for the shallow transformer, whose operations are so small that more are slower.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(before if number is None else number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _resumed(settings: Settings, checkpoint: str | os.PathLike[str]) -> Run:
    """Return the run of a checkpoint, to be continued under the given settings."""
    run = Run.load(checkpoint)
    saved = run.settings.to_dict()
    for name, value in settings.to_dict().items():
        if name != "steps" and saved[name] != value:
            raise TheoryError(
                f"{str(checkpoint)!r} is of another configuration: its {name} is {saved[name]}, "
                f"here it is {value}; use another checkpoint"
            )
    if run.step > settings.steps:
        raise TheoryError(
            f"{str(checkpoint)!r} already has {run.step} steps; expected at most {settings.steps}"
        )
    return Run(settings, run.model, run.step, run.rows, run.state)


def _train(run: Run, checkpoint: Any, progress: bool | None) -> None:
    """Continue a run in place until it has made all steps of its settings."""
    settings = run.settings
    parameters = {name: weight.requires_grad_(True) for name, weight in run.model.weights.items()}
    optimizer = _optimizer(settings, parameters)
    data = seeded(settings.seed, "data")
    _restore_state(run, optimizer, parameters, data)
    full_batch = None
    if settings.n_sequences is not None:
        full_batch = sample(settings, settings.n_sequences, seeded(settings.seed, "sequences"))
    held_out = measurement_examples(settings)
    steps = range(run.step, settings.steps + 1)
    for step in progress_over(steps, "training", show=progress):
        run.step = step
        if step == settings.steps or recorded(step):
            # A resumed run may have recorded its last step, which a whole run would not record.
            run.rows[:] = [row for row in run.rows if row["step"] < step and recorded(row["step"])]
            run.rows.append(measure(settings, run.model, held_out, step))
        if checkpoint is not None and (step == settings.steps or step & (step - 1) == 0):
            _store_state(run, optimizer, parameters, data)
            _detached(run).save(checkpoint)
        if step == settings.steps:
            break
        examples = full_batch
        if examples is None:
            examples = sample(settings, settings.batch_size, data)
        optimizer.zero_grad()
        loss = run.model.forward(settings, examples).loss
        if not bool(loss.isfinite()):
            raise TheoryError(
                f"the loss is {loss.item()} at step {step}; expected a finite number. Use a lower "
                f"learning_rate than {settings.rate:g}"
            )
        torch.autograd.backward(loss)
        optimizer.step()
    _store_state(run, optimizer, parameters, data)
    for weight in parameters.values():
        weight.requires_grad_(False)
        weight.grad = None


def _optimizer(settings: Settings, parameters: dict[str, Tensor]) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = [
        {"params": [parameters["w_q"], parameters["w_k"]], "lr": settings.rate},
        {"params": [parameters["w_m"]], "lr": settings.slower_rate},
    ]
    return torch.optim.SGD(groups) if settings.optimizer == "gd" else torch.optim.Adam(groups)


def _store_state(
    run: Run,
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, Tensor],
    data: torch.Generator,
) -> None:
    """Store the state of the optimizer and of the data generator in the run, as tensors."""
    run.state = {"generator": data.get_state()}
    for name, weight in parameters.items():
        for key, value in optimizer.state.get(weight, {}).items():
            if isinstance(value, Tensor):
                run.state[f"{name}.{key}"] = value.detach().clone()


def _restore_state(
    run: Run,
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, Tensor],
    data: torch.Generator,
) -> None:
    """Restore the state of the optimizer and of the data generator from the run."""
    if "generator" in run.state:
        data.set_state(run.state["generator"])
    for name, weight in parameters.items():
        state = {
            key.removeprefix(f"{name}."): value.clone()
            for key, value in run.state.items()
            if key.startswith(f"{name}.")
        }
        if state:
            optimizer.state[weight] = state


def _detached(run: Run) -> Run:
    """Return the run with weights that need no gradients, for saving."""
    model = ShallowTransformer(*(weight.detach() for weight in run.model.weights.values()))
    return Run(run.settings, model, run.step, run.rows, run.state)


def recorded(step: float | int) -> bool:
    """Return whether measurements are taken at a step: up to 16 at each, then 16 per doubling."""
    if step < _PER_DOUBLING:
        return True
    doubling = math.floor(math.log2(step))
    return step in {round(2 ** (doubling + part / _PER_DOUBLING)) for part in range(_PER_DOUBLING)}
