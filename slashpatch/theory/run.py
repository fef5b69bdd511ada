"""A training run: its weights, and measurements taken during training."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..data import display
from ..data.files import load_tensors, save_tensors
from ..errors import TheoryError
from ..maths.rank import r1
from ..maths.slash_scores import slash_scores
from ..maths.spectrum import margin, predicted_profile
from .data import Examples, sample, seeded
from .model import Pass, ShallowTransformer
from .settings import Settings, as_integer, as_number

if TYPE_CHECKING:
    import pandas as pd


_FORMAT = "slashpatch-theory-1"
#: Slash scores are measured at offsets 0 to 7 (and at the task's own offset).
_OFFSETS = 8
#: Number of sequences for measurements.
_N_SEQUENCES = 32


@dataclass
class Run:
    """A training run: its current weights, and measurements taken during training.

    Attributes:
        settings: The settings, which determine the run completely.
        model: The weights after `step` steps.
        step: The number of steps made.
        rows: Measurements, one row for each recorded step.
        state: Tensors of the optimizer and of the data generator, from which training continues.
    """

    settings: Settings
    model: ShallowTransformer
    step: int = 0
    rows: list[dict[str, float | int]] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)

    @property
    def history(self) -> pd.DataFrame:
        """The measurements as a DataFrame.

        Columns: step, loss, slash scores `score_0` to `score_7`, r1 of Q and K, `matching` (mean
        attention of layer 2 to the answer's position), and `margin` (predicted logit of the task's
        offset over all others, `slashpatch.maths.spectrum.margin`).
        """
        import pandas as pd

        return pd.DataFrame(self.rows)

    @property
    def score(self) -> float:
        """The slash score at the task's offset, at the last recorded step."""
        return self.rows[-1][f"score_{self.settings.offset}"]

    def time_to(self, kappa: float | int = 0.3, column: str | None = None) -> float | int:
        """Return the number of steps until a column reaches κ and stays there; infinite if never.

        The default column is the slash score at the task's offset. The result is exact to about
        5 %, the distance between recorded steps. κ is *ours*. Raises TheoryError for an unknown
        column or κ outside [0, 1].
        """
        name = column or f"score_{self.settings.offset}"
        threshold = as_number("kappa", kappa, 0.0, 1.0)
        if name not in self.rows[0]:
            raise TheoryError(f"no column {name!r}; expected one of {', '.join(self.rows[0])}")
        return lasting_step(self.rows, name, threshold)

    def read(
        self, length: int | None = None, out_of_distribution: bool = False, seed: int = 0
    ) -> dict[str, float | int]:
        """Measure the current weights on new sequences; the result has the columns of `history`.

        `length` replaces the settings' length. Raises TheoryError for a length that is too short.
        """
        changed = self.settings
        if length is not None:
            changed = dataclasses.replace(changed, length=length)
        generator = seeded(seed, "reading", length, out_of_distribution)
        examples = sample(changed, _N_SEQUENCES, generator, out_of_distribution)
        return measure(changed, self.model, examples, self.step)

    def out_of_distribution(self) -> float:
        """Return the slash score at twice the length, on tokens not used in training. *Ours*."""
        row = self.read(2 * self.settings.length, out_of_distribution=True)
        return row[f"score_{self.settings.offset}"]

    def profile(self, n_offsets: int | None = None) -> Float[Tensor, "offset"]:
        """Return the logits that mean query and mean key predict, for Δ = 0, …, n_offsets − 1.

        `n_offsets` is the settings' length if None. See `slashpatch.maths.spectrum`.
        """
        n = self.settings.length
        if n_offsets is not None:
            n = as_integer("n_offsets", n_offsets, 1, 2**20)
        with torch.no_grad():
            result = self.model.forward(self.settings, measurement_examples(self.settings))
        return _profile(result, self.settings, n)

    def plot(self, backend: str = "matplotlib", *, kappa: float = 0.3) -> Any:
        """Return the curves of training, as a matplotlib figure or ("altair") a chart.

        `kappa` is drawn as a rule. Raises PlotError for another backend or before any step is
        measured, ExtraError if Altair is not installed.
        """
        return display.plot(self, backend, kappa=kappa)

    def _repr_html_(self) -> str:
        return display.html(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a .safetensors checkpoint, from which training continues bit for bit."""
        if not str(path).endswith(".safetensors"):
            raise TheoryError(f"a checkpoint's file name ends in .safetensors; got {str(path)!r}")
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
                raise TheoryError(f"{str(path)!r} is damaged: its checksum differs")
            settings = Settings(**header["settings"])
            model = ShallowTransformer(*(tensors.pop(name) for name in ("w_q", "w_k", "w_m")))
            return cls(settings, model, header["step"], header["rows"], tensors)

        run = load_tensors(path, _FORMAT, build, TheoryError)
        assert isinstance(run, Run)
        return run


def _digest(header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """Return a checksum of a checkpoint's header and tensors."""
    sha = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        sha.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:32]


def lasting_step(rows: list[dict[str, float | int]], column: str, threshold: float) -> float | int:
    """Return the step from which a column stays at the threshold or above; infinite if never."""
    steps: float | int = math.inf
    for row in reversed(rows):
        if not row[column] >= threshold:
            break
        steps = row["step"]
    return steps


class Slash(NamedTuple):
    """When and where a slash forms, as recorded slash scores show it for a threshold κ. *Ours*.

    Attributes:
        step: The step from which the score at the task's offset stays at κ or above
            (`Run.time_to`); infinite if there is none.
        first_step: The first step at which it is there; infinite if there is none.
        offset: The offset at which a slash forms first: that of the highest score at the first step
            at which any score reaches κ. None if none does.
        final_offset: The offset of the highest score at the end; None if it is below κ.
    """

    step: float | int
    first_step: float | int
    offset: int | None
    final_offset: int | None


def read_slash(rows: list[dict[str, float | int]], offset: int, kappa: float) -> Slash:
    """Return when and where recorded slash scores show a slash; `offset` is the task's."""
    column = f"score_{offset}"
    first = next((row["step"] for row in rows if row[column] >= kappa), math.inf)
    at = [(row, _highest(row)) for row in rows]
    formed = next((highest for row, highest in at if row[f"score_{highest}"] >= kappa), None)
    row, highest = at[-1]
    final = highest if row[f"score_{highest}"] >= kappa else None
    return Slash(lasting_step(rows, column, kappa), first, formed, final)


def _highest(row: dict[str, float | int]) -> int:
    """Return the offset of a row's highest slash score."""
    scores = {key: score for key, score in row.items() if key.startswith("score_")}
    return int(max(scores, key=lambda key: scores[key]).removeprefix("score_"))


def measured_offsets(settings: Settings) -> range:
    """Return the offsets whose slash scores are measured: 0 to 7, and on to the task's own."""
    return range(min(max(_OFFSETS, settings.offset + 1), settings.length))


def measurement_examples(settings: Settings) -> Examples:
    """Return the sequences for measurements during training; training does not use them."""
    return sample(settings, _N_SEQUENCES, seeded(settings.seed, "reading"))


def measure(
    settings: Settings, model: ShallowTransformer, examples: Examples, step: int
) -> dict[str, float | int]:
    """Return one row of `Run.history`."""
    with torch.no_grad():
        result = model.forward(settings, examples)
    scores = slash_scores(result.slash[:, None], measured_offsets(settings))[:, 0].mean(0)
    on_answer = (result.matching * examples.keys).sum(-1)[examples.asked]
    row: dict[str, float | int] = {"step": step, "loss": float(result.loss)}
    row |= {f"score_{offset}": float(score) for offset, score in enumerate(scores)}
    for name, x in (("r1_q", result.q), ("r1_k", result.k)):
        tokens = x.flatten(0, 1).double()
        row[name] = float(r1(tokens.T @ tokens))
    row["matching"] = float(on_answer.double().mean())
    row["margin"] = margin(_profile(result, settings, settings.length), settings.offset)
    return row


def _profile(result: Pass, settings: Settings, n: int) -> Float[Tensor, "offset"]:
    q, k = (x.flatten(0, 1).double().mean(0) for x in (result.q, result.k))
    return predicted_profile(q, k, torch.arange(n), settings.rotary())
