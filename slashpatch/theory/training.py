"""Gradient descent on the shallow transformer, and what is read off it on the way."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data.files import require_writable
from ..data.progress import progress_over
from ..errors import TheoryError
from .data import sample, seeded
from .model import ShallowTransformer
from .run import Run, _examples, _reading
from .settings import Settings

if TYPE_CHECKING:
    pass

#: What is read off stands at so many steps per doubling.
_PER_DOUBLING = 16


def train(
    settings: Settings | None = None,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool | None = None,
    **knobs: Any,
) -> Run:
    """Train the shallow transformer; on the CPU, seconds at the default settings.

    Args:
        settings: A `Settings`; or give its fields by name.
        checkpoint: A .safetensors file, written at every doubling of the steps and at the end.
        resume: Go on from the checkpoint, if it is there, to `steps`; it must be of the same
            settings but for their number.
        progress: Whether to show a bar; when None, on a terminal only.
        **knobs: Fields of `Settings`.

    Returns:
        A Run.

    Raises:
        TheoryError for settings that do not fit, a checkpoint of others, or a loss that is not
        finite.
    """
    if settings is None:
        unknown = sorted(set(knobs) - {one.name for one in dataclasses.fields(Settings)})
        if unknown:
            known = ", ".join(one.name for one in dataclasses.fields(Settings))
            raise TheoryError(f"no setting {', '.join(unknown)}; expected some of {known}")
        settings = Settings(**knobs)
    elif knobs:
        raise TheoryError("give a Settings or its fields, not both")
    elif not isinstance(settings, Settings):
        raise TheoryError(f"expected a Settings, or its fields by name; got {settings!r}")
    if checkpoint is not None:
        if not str(checkpoint).endswith(".safetensors"):
            raise TheoryError(f"a checkpoint's name ends in .safetensors; got {str(checkpoint)!r}")
        require_writable(checkpoint)
    if resume and checkpoint is None:
        raise TheoryError("resume goes with a checkpoint: the file from which to go on")
    with _one_thread(), torch.inference_mode(False), torch.enable_grad():
        if resume and checkpoint is not None and os.path.exists(checkpoint):
            run = _resumed(settings, checkpoint)
        else:
            run = Run(settings, ShallowTransformer.initial(settings))
        _train(run, checkpoint, progress)
    return run


@contextmanager
def _one_thread() -> Iterator[None]:
    """Operations here are too small to share; with busy cores sharing takes ten times longer."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _resumed(settings: Settings, checkpoint: str | os.PathLike[str]) -> Run:
    found = Run.load(checkpoint)
    ours, theirs = settings.to_dict(), found.settings.to_dict()
    for name, value in ours.items():
        if name != "steps" and theirs[name] != value:
            raise TheoryError(
                f"{str(checkpoint)!r} is of another configuration: its {name} is {theirs[name]}, "
                f"here it is {value}; use another checkpoint"
            )
    if found.step > settings.steps:
        raise TheoryError(
            f"{str(checkpoint)!r} has made {found.step} steps already; expected at most "
            f"{settings.steps}"
        )
    return Run(settings, found.model, found.step, found.rows, found.state)


def _train(run: Run, checkpoint: Any, progress: bool | None) -> None:
    settings = run.settings
    parameters = {name: one.requires_grad_(True) for name, one in run.model.weights.items()}
    optimizer = _optimizer(settings, parameters)
    data = seeded(settings.seed, "data")
    _restore(run, optimizer, parameters, data)
    full = None
    if settings.n_sequences is not None:
        full = sample(settings, settings.n_sequences, seeded(settings.seed, "sequences"))
    reading = _examples(settings)
    steps = range(run.step, settings.steps + 1)
    for step in progress_over(steps, "training", show=progress):
        run.step = step
        if step == settings.steps or _recorded(step):
            # A run that stopped at a step that is not recorded otherwise has it as its last row.
            run.rows[:] = [row for row in run.rows if row["step"] < step and _recorded(row["step"])]
            run.rows.append(_reading(settings, run.model, reading, step))
        if checkpoint is not None and (step == settings.steps or step & (step - 1) == 0):
            _keep(run, optimizer, parameters, data)
            _detached(run).save(checkpoint)
        if step == settings.steps:
            break
        examples = full if full is not None else sample(settings, settings.batch_size, data)
        optimizer.zero_grad()
        loss = run.model.forward(settings, examples).loss
        if not bool(loss.isfinite()):
            raise TheoryError(
                f"the loss is {float(loss)} at step {step}; expected a finite number. Use a lower "
                f"learning_rate than {settings.rate:g}"
            )
        torch.autograd.backward(loss)
        optimizer.step()
    _keep(run, optimizer, parameters, data)
    for one in parameters.values():
        one.requires_grad_(False)
        one.grad = None


def _optimizer(settings: Settings, parameters: dict[str, Tensor]) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = [
        {"params": [parameters["w_q"], parameters["w_k"]], "lr": settings.rate},
        {"params": [parameters["w_m"]], "lr": settings.slower_rate},
    ]
    return torch.optim.SGD(groups) if settings.optimizer == "gd" else torch.optim.Adam(groups)


def _keep(
    run: Run,
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, Tensor],
    data: torch.Generator,
) -> None:
    """Note the optimizer's state and the generator's, as tensors."""
    run.state = {"generator": data.get_state()}
    for name, one in parameters.items():
        for key, value in optimizer.state.get(one, {}).items():
            if isinstance(value, Tensor):
                run.state[f"{name}.{key}"] = value.detach().clone()


def _restore(
    run: Run,
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, Tensor],
    data: torch.Generator,
) -> None:
    if "generator" in run.state:
        data.set_state(run.state["generator"])
    for name, one in parameters.items():
        kept = {
            key.removeprefix(f"{name}."): value.clone()
            for key, value in run.state.items()
            if key.startswith(f"{name}.")
        }
        if kept:
            optimizer.state[one] = kept


def _detached(run: Run) -> Run:
    model = ShallowTransformer(*(one.detach() for one in run.model.weights.values()))
    return Run(run.settings, model, run.step, run.rows, run.state)


def _recorded(step: float | int) -> bool:
    """Steps at which things are read: all to 16, then 16 per doubling."""
    if step < _PER_DOUBLING:
        return True
    doubling = math.floor(math.log2(step))
    return step in {round(2 ** (doubling + part / _PER_DOUBLING)) for part in range(_PER_DOUBLING)}
