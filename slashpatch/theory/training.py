"""Gradient descent on the shallow transformer, and what is read off it on the way."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import TheoryError
from ..files import load_tensors, require_writable, save_tensors
from ..rank import r1
from ..report.progress import progress_over
from ..slash import slash_scores
from ..spectrum import margin, predicted_profile
from .data import Examples, sample, seeded
from .model import Pass, ShallowTransformer
from .settings import Settings, as_integer, as_number

if TYPE_CHECKING:
    import pandas as pd

_FORMAT = "slashpatch-theory-1"
#: What is read off stands at so many steps per doubling.
_PER_DOUBLING = 16
_OFFSETS = 8
_READ_SEQUENCES = 32


@dataclass
class Run:
    """A training run: its weights now, and what was read off them on the way.

    Attributes:
        settings: What it depends on.
        model: The weights after `step` steps.
        step: How many have been made.
        rows: What was read off: one row per recorded step.
        state: The optimizer's tensors and the data generator's, for going on.
    """

    settings: Settings
    model: ShallowTransformer
    step: int = 0
    rows: list[dict[str, float | int]] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)

    @property
    def history(self) -> pd.DataFrame:
        """Step, loss, slash score at Δ = 0 to 7, r1 of Q and K, matching score, and the margin.

        `matching` is the mean attention of layer 2 to where the answer stands; `margin` is the
        predicted logit of the rewarded offset over all others (`slashpatch.spectrum.margin`).
        """
        import pandas as pd

        return pd.DataFrame(self.rows)

    @property
    def score(self) -> float:
        """Slash score at the rewarded offset, as last read."""
        return self.rows[-1][f"score_{self.settings.offset}"]

    def time_to(self, kappa: float | int = 0.3, column: str | None = None) -> float | int:
        """Steps until a column (the rewarded offset's score) reaches κ for good; infinite if never.

        To within a twentieth, the distance of recorded steps. κ is *ours*. Raises TheoryError.
        """
        name = column or f"score_{self.settings.offset}"
        least = as_number("kappa", kappa, 0.0, 1.0)
        if name not in self.rows[0]:
            raise TheoryError(f"no column {name!r}; expected one of {', '.join(self.rows[0])}")
        after = math.inf
        for row in reversed(self.rows):
            if not row[name] >= least:
                break
            after = row["step"]
        return after

    def read(
        self, length: int | None = None, out_of_distribution: bool = False, seed: int = 0
    ) -> dict[str, float | int]:
        """What the weights do now, on fresh sequences. Raises TheoryError."""
        changed = self.settings
        if length is not None:
            changed = dataclasses.replace(changed, length=length)
        generator = seeded(seed, "reading", length, out_of_distribution)
        examples = sample(changed, _READ_SEQUENCES, generator, out_of_distribution)
        return _reading(changed, self.model, examples, self.step)

    def out_of_distribution(self) -> float:
        """Slash score at twice the length, on tokens that training never saw. *Ours*."""
        found = self.read(2 * self.settings.length, out_of_distribution=True)
        return found[f"score_{self.settings.offset}"]

    def profile(self, n_offsets: int | None = None) -> Float[Tensor, "offset"]:
        """Logit by offset that the mean query and key predict, from Δ = 0."""
        n = self.settings.length
        if n_offsets is not None:
            n = as_integer("n_offsets", n_offsets, 1, 2**20)
        examples = _examples(self.settings)
        with torch.no_grad():
            found = self.model.forward(self.settings, examples)
        return _profile(found, self.settings, n)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a .safetensors checkpoint, from which training goes on bit for bit."""
        if not str(path).endswith(".safetensors"):
            raise TheoryError(f"a checkpoint's name ends in .safetensors; got {str(path)!r}")
        tensors = {**self.model.weights, **self.state}
        header = {
            "format": _FORMAT,
            "settings": self.settings.to_dict(),
            "step": self.step,
            "rows": self.rows,
        }
        save_tensors(path, {**header, "digest": _digest(header, tensors)}, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Run:
        """Read a checkpoint. Raises TheoryError for any other file."""

        def build(header: dict[str, Any], tensors: dict[str, Tensor]) -> Run:
            digest = header.pop("digest")
            if _digest(header, tensors) != digest:
                raise TheoryError(f"{str(path)!r} is damaged: it is not what was saved")
            settings = Settings(**header["settings"])
            model = ShallowTransformer(*(tensors.pop(name) for name in ("w_q", "w_k", "w_m")))
            return cls(settings, model, header["step"], header["rows"], tensors)

        found = load_tensors(path, _FORMAT, build, TheoryError)
        assert isinstance(found, Run)
        return found


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


def _digest(header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """Of all that a checkpoint holds."""
    sha = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        sha.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:32]


def _detached(run: Run) -> Run:
    model = ShallowTransformer(*(one.detach() for one in run.model.weights.values()))
    return Run(run.settings, model, run.step, run.rows, run.state)


def _recorded(step: float | int) -> bool:
    """Steps at which things are read: all to 16, then 16 per doubling."""
    if step < _PER_DOUBLING:
        return True
    doubling = math.floor(math.log2(step))
    return step in {round(2 ** (doubling + part / _PER_DOUBLING)) for part in range(_PER_DOUBLING)}


def _examples(settings: Settings) -> Examples:
    """The sequences on which things are read: never those of training."""
    return sample(settings, _READ_SEQUENCES, seeded(settings.seed, "reading"))


def _reading(
    settings: Settings, model: ShallowTransformer, examples: Examples, step: int
) -> dict[str, float | int]:
    """One row of the history."""
    with torch.no_grad():
        found = model.forward(settings, examples)
    n = min(max(_OFFSETS, settings.offset + 1), settings.length)
    scores = slash_scores(found.slash[:, None], range(n))[:, 0].mean(0)
    on_answer = (found.matching * examples.keys).sum(-1)[examples.asked]
    row: dict[str, float | int] = {"step": step, "loss": float(found.loss)}
    row |= {f"score_{offset}": float(score) for offset, score in enumerate(scores)}
    for name, x in (("r1_q", found.q), ("r1_k", found.k)):
        tokens = x.flatten(0, 1).double()
        row[name] = float(r1(tokens.T @ tokens))
    row["matching"] = float(on_answer.double().mean())
    row["margin"] = margin(_profile(found, settings, settings.length), settings.offset)
    return row


def _profile(found: Pass, settings: Settings, n: int) -> Float[Tensor, "offset"]:
    q, k = (x.flatten(0, 1).double().mean(0) for x in (found.q, found.k))
    return predicted_profile(q, k, torch.arange(n), settings.rotary())
