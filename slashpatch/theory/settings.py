"""What a training run depends on, and nothing else."""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import TheoryError
from ..maths.bands import NAMED_BANDS, band_pairs
from ..maths.rotary import Rotary

TASKS = ("copying", "regression")
#: Found by trial on the default settings. Those of gradient descent are large because gradients are
#: small: a position's loss reaches layer 1 through two attentions over the whole sequence.
LEARNING_RATES = {
    ("copying", "gd"): 20.0,
    ("copying", "adam"): 0.02,
    ("regression", "gd"): 100.0,
    ("regression", "adam"): 0.02,
}


@dataclass(frozen=True)
class Settings:
    """One training run. All choices of values are *ours*.

    Attributes:
        task: "copying": a segment comes twice, and the second time the token `offset` further on is
            to be said. "regression": a label comes `offset` after its x, and is to be said when
            the x comes again.
        offset: Δ that the task rewards, from 1.
        cone: Strength of the direction that all embeddings share, 0 to 2, beside a semantic part of
            norm 1.
        frequencies: "all", "high", "medium" or "low" (thirds of the rotary pairs), or θ's.
        n_pairs: Rotary pairs of "all"; θ_l = base^(−l/n_pairs).
        base: Of the frequencies.
        vocabulary: Tokens. The second half is never seen in training.
        length: Positions of a sequence.
        segment: Tokens of a copy, or x's of a sequence.
        batch_size: Sequences of a step.
        n_sequences: None: fresh sequences at every step. A number: so many, all of them at every
            step (full batch).
        optimizer: "gd", plain gradient descent, or "adam".
        learning_rate: None: `LEARNING_RATES`.
        matching_rate: Learning rate of layer 2 over that of layer 1; None: 0.1 for gradient
            descent, so that its stages stand apart, and 1 for Adam.
        steps: How many.
        initial: Standard deviation of W_Q and W_K, times the root of d_model.
        matching: Layer 2 starts as this times the identity: tokens match themselves a little.
        output_scale: Logits are this times what layer 2 reads (copying).
        seed: Of initial weights and data.
    """

    task: str = "copying"
    offset: int = 1
    cone: float | int = 1.0
    frequencies: Any = "all"
    n_pairs: int = 16
    base: float | int = 10_000.0
    vocabulary: int = 64
    length: int = 64
    segment: int = 16
    batch_size: int = 32
    n_sequences: int | None = None
    optimizer: str = "gd"
    learning_rate: float | int | None = None
    matching_rate: float | int | None = None
    steps: int = 500
    initial: float | int = 0.3
    matching: float | int = 1.0
    output_scale: float | int = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        _one_of("task", self.task, TASKS)
        _one_of("optimizer", self.optimizer, ("gd", "adam"))
        for name, (least, most) in _COUNTS.items():
            if getattr(self, name) is not None or name != "n_sequences":
                self._set(name, as_integer(name, getattr(self, name), least, most))
        self._set("cone", as_number("cone", self.cone, 0.0, 2.0))
        self._set("base", as_number("base", self.base, 1.0))
        for name in ("initial", "matching", "output_scale", "learning_rate", "matching_rate"):
            if getattr(self, name) is not None or not name.endswith("_rate"):
                self._set(name, as_number(name, getattr(self, name), 0.0))
        if not isinstance(self.frequencies, str):
            self._set("frequencies", _as_frequencies(self.frequencies))
        self._check_frequencies()
        self._check_room()

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_frequencies(self) -> None:
        found = self.frequencies
        if isinstance(found, str):
            _one_of("frequencies", found, ("all", *NAMED_BANDS))
            if found != "all" and self.n_pairs < 3:
                raise TheoryError(
                    f"{found} is a third of the pairs, of which there are {self.n_pairs}"
                )
        elif not found:
            raise TheoryError("frequencies: no θ is left; expected at least one rotary pair")
        elif not all(math.isfinite(theta) and abs(theta) <= math.pi for theta in found):
            raise TheoryError(f"frequencies are radians per token, from −π to π; got {found}")

    def _check_room(self) -> None:
        if self.segment >= self.seen:
            raise TheoryError(
                f"segment: {self.segment} different tokens and at least one other are needed, and "
                f"training sees {self.seen} (half of the vocabulary)"
            )
        if self.task == "copying" and self.offset >= self.segment:
            raise TheoryError(
                f"offset {self.offset} is beyond a segment of {self.segment} tokens: the token so "
                "far on is not in the copy; use a longer segment"
            )
        if self.length < self.least_length:
            raise TheoryError(
                f"length {self.length} cannot hold the task at offset {self.offset} with a segment "
                f"of {self.segment}: it needs {self.least_length}"
            )

    @property
    def least_length(self) -> int:
        """Positions that one sequence takes."""
        block = 1 if self.task == "copying" else self.offset + 1
        return 2 * self.segment * block

    @property
    def seen(self) -> int:
        """Tokens that training sees; the rest are for tests out of distribution."""
        return self.vocabulary // 2

    @property
    def rate(self) -> float:
        """The learning rate of layer 1."""
        default = LEARNING_RATES[self.task, self.optimizer]
        return default if self.learning_rate is None else float(self.learning_rate)

    @property
    def slower_rate(self) -> float:
        """The learning rate of layer 2."""
        share = self.matching_rate
        if share is None:
            share = 0.1 if self.optimizer == "gd" else 1.0
        return self.rate * share

    def thetas(self) -> Float[Tensor, "pair"]:
        """The frequencies of layer 1, in radians per token."""
        if not isinstance(self.frequencies, str):
            return torch.tensor(self.frequencies, dtype=torch.float64)
        every = self.base ** (-torch.arange(self.n_pairs, dtype=torch.float64) / self.n_pairs)
        if self.frequencies == "all":
            return every
        return every[list(band_pairs(self.frequencies, every))]

    def rotary(self) -> Rotary:
        """How layer 1 rotates, as every other part of slashpatch reads it."""
        theta = self.thetas()
        return Rotary(theta, "half", 1.0, (2 * len(theta)) ** -0.5)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return dataclasses.asdict(self)


_COUNTS = {
    "offset": (1, 4096),
    "n_pairs": (1, 4096),
    "vocabulary": (8, 65536),
    "length": (4, 4096),
    "segment": (2, 4096),
    "batch_size": (1, 65536),
    "n_sequences": (1, 65536),
    "steps": (0, 10_000_000),
    "seed": (0, 2**63 - 1),
}


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise TheoryError(f"{name} is one of {', '.join(known)}; got {value!r}")


def as_integer(name: str, value: Any, least: int, most: int) -> int:
    """An integer in a range. Raises TheoryError."""
    try:
        found = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = least - 1
    if not least <= found <= most:
        raise TheoryError(f"{name} is an integer from {least} to {most}; got {value!r}")
    return found


def as_number(name: str, value: Any, least: float, most: float = 1e9) -> float:
    """A number in a range. Raises TheoryError."""
    good = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not good or not least <= value <= most:
        raise TheoryError(f"{name} is a number from {least:g} to {most:g}; got {value!r}")
    return float(value)


def _as_frequencies(given: Any) -> tuple[float, ...]:
    values = given.tolist() if hasattr(given, "tolist") else given
    if not isinstance(values, (list, tuple)):
        raise TheoryError(f"frequencies are a band's name or several θ's; got {given!r}")
    good = all(isinstance(one, numbers.Real) and not isinstance(one, bool) for one in values)
    if not good:
        raise TheoryError(f"frequencies are a band's name or several θ's; got {given!r}")
    return tuple(float(one) for one in values)
