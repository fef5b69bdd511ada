"""A training run: its weights, and what was read off them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

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


def _digest(header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """Of all that a checkpoint holds."""
    sha = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        sha.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:32]


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
