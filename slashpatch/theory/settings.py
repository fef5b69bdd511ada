"""The settings of a training run; equal settings give equal runs."""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import TheoryError
from ..maths.bands import NAMED_BANDS, band_pairs
from ..maths.rotary import Rotary

_Own = TypeVar("_Own")

TASKS = ("copying", "regression")
#: By task and optimizer; found by trial at the default settings. Gradient descent needs large rates
#: because gradients are small: the loss of a position reaches layer 1 through two attention layers.
LEARNING_RATES = {
    ("copying", "gd"): 20.0,
    ("copying", "adam"): 0.02,
    ("regression", "gd"): 100.0,
    ("regression", "adam"): 0.02,
}


@dataclass(frozen=True)
class Settings:
    """The settings of one training run. All default values are *ours*.

    Attributes:
        task: "copying": a segment of tokens occurs twice; in the second, predict the token `offset`
            positions further on. "regression": each token x is followed `offset` positions later by
            a label; predict the label where x occurs again.
        offset: The offset Δ at which a slash head solves the task, from 1.
        cone: Strength of the direction that all embeddings share, 0 to 2; the part that tells
            tokens apart has norm 1.
        frequencies: RoPE frequencies of layer 1: "all", or a third of the pairs ("high", "medium",
            "low"), or numbers θ in radians per token.
        n_pairs: Number of rotary pairs of "all"; θ_l = base^(−l/n_pairs).
        base: Base of the frequencies.
        vocabulary: Number of tokens. Training uses the first half only.
        length: Number of positions in a sequence.
        segment: Tokens in the copied segment, or labelled tokens x in a sequence.
        batch_size: Sequences in a training step.
        n_sequences: None: new sequences at every step. A number: this many fixed sequences, all of
            them at every step (full batch).
        optimizer: "gd" for plain gradient descent, or "adam".
        learning_rate: Learning rate of layer 1; None: the one in `LEARNING_RATES`.
        matching_rate: Learning rate of layer 2 divided by that of layer 1. None: 0.1 for gradient
            descent, so that layer 1 learns clearly before layer 2, and 1 for Adam.
        steps: Number of training steps.
        initial: Standard deviation of the initial W_Q and W_K, times the square root of d_model.
        matching: Initial w_m of layer 2 is this times the identity, so that equal tokens match.
        output_scale: Factor from the output of layer 2 to logits (copying).
        seed: Seed of initial weights and data.
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
        one_of("task", self.task, TASKS)
        one_of("optimizer", self.optimizer, ("gd", "adam"))
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
        given = self.frequencies
        if isinstance(given, str):
            one_of("frequencies", given, ("all", *NAMED_BANDS))
            if given != "all" and self.n_pairs < 3:
                raise TheoryError(
                    f"frequencies={given!r} is a third of the pairs; expected n_pairs of at "
                    f"least 3, got {self.n_pairs}"
                )
        elif not given:
            raise TheoryError("frequencies: no θ is left; expected at least one")
        elif not all(math.isfinite(theta) and abs(theta) <= math.pi for theta in given):
            raise TheoryError(f"frequencies are in radians per token, from −π to π; got {given}")

    def _check_room(self) -> None:
        if self.segment >= self.seen:
            raise TheoryError(
                f"a segment of {self.segment} different tokens does not fit: training uses half of "
                f"the vocabulary, {self.seen} tokens, and needs at least one outside the segment"
            )
        if self.task == "copying" and self.offset >= self.segment:
            raise TheoryError(
                f"offset {self.offset} is beyond a segment of {self.segment} tokens: the token "
                f"{self.offset} positions further on would be outside it; use a longer segment"
            )
        if self.length < self.least_length:
            raise TheoryError(
                f"length {self.length} is too short for offset {self.offset} and a segment of "
                f"{self.segment} tokens; expected at least {self.least_length}"
            )

    @property
    def least_length(self) -> int:
        """The smallest length that holds the two halves of a sequence."""
        block = 1 if self.task == "copying" else self.offset + 1
        return 2 * self.segment * block

    @property
    def seen(self) -> int:
        """The number of tokens that training uses; the rest are for out-of-distribution tests."""
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
        """Return the frequencies of layer 1, in radians per token."""
        if not isinstance(self.frequencies, str):
            return torch.tensor(self.frequencies, dtype=torch.float64)
        every = self.base ** (-torch.arange(self.n_pairs, dtype=torch.float64) / self.n_pairs)
        if self.frequencies == "all":
            return every
        return every[list(band_pairs(self.frequencies, every))]

    def rotary(self) -> Rotary:
        """Return the rotation of layer 1."""
        theta = self.thetas()
        return Rotary(theta, "half", 1.0, (2 * len(theta)) ** -0.5)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a dictionary."""
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


def one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    """Raise TheoryError unless a value is one of the known ones."""
    if value not in known:
        raise TheoryError(f"{name} is one of {', '.join(known)}; got {value!r}")


def as_settings(kind: type[_Own], settings: _Own | None, knobs: dict[str, Any]) -> _Own:
    """Return settings of a kind, given whole or by their fields. Raises TheoryError for others."""
    if settings is None:
        known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
        unknown = sorted(set(knobs) - set(known))
        if unknown:
            raise TheoryError(
                f"no setting {', '.join(unknown)}; expected some of {', '.join(known)}"
            )
        return kind(**knobs)
    if knobs:
        raise TheoryError(f"give a {kind.__name__} or its fields, not both")
    if not isinstance(settings, kind):
        raise TheoryError(f"expected a {kind.__name__}, or its fields by name; got {settings!r}")
    return settings


def as_integer(name: str, value: Any, least: int, most: int) -> int:
    """Return an integer in [least, most]. Raises TheoryError for any other value."""
    try:
        integer = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        integer = least - 1
    if not least <= integer <= most:
        raise TheoryError(f"{name} is an integer from {least} to {most}; got {value!r}")
    return integer


def as_number(name: str, value: Any, least: float, most: float = 1e9) -> float:
    """Return a number in [least, most] as a float. Raises TheoryError for any other value."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not least <= value <= most:
        raise TheoryError(f"{name} is a number from {least:g} to {most:g}; got {value!r}")
    return float(value)


def _as_frequencies(given: Any) -> tuple[float, ...]:
    values = given.tolist() if hasattr(given, "tolist") else given
    if not isinstance(values, (list, tuple)) or not all(
        isinstance(theta, numbers.Real) and not isinstance(theta, bool) for theta in values
    ):
        raise TheoryError(f"frequencies are a band's name or a list of θ; got {given!r}")
    return tuple(float(theta) for theta in values)
