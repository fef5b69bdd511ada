"""The settings of a run on text; on one machine, equal settings give equal weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ...edits import Edit, parse_edit
from ...errors import TheoryError
from ..settings import as_integer, as_number, one_of

POSITIONS = ("rope", "learned")
FREQUENCIES = ("all", "high", "low")


@dataclass(frozen=True)
class TextSettings:
    """The settings of one run on text. All default values are *ours*, found by trial.

    Attributes:
        layers: Number of layers.
        heads: Attention heads of a layer.
        d_model: Width of the residual stream; a multiple of twice `heads`.
        d_mlp: Width of the MLPs.
        vocabulary: Tokens of the tokenizer, which is trained on the same text.
        length: Tokens of a training sequence.
        batch_size: Sequences of a training step.
        steps: Number of training steps.
        learning_rate: The highest learning rate of AdamW: after 50 steps, up to 70 % of all steps.
        repeats: Share of the training sequences in which one passage of the text stands twice, at
            random places. Real corpora repeat passages too; in text without any, no induction head
            forms within the default number of steps.
        positions: "rope" (Llama), or "learned": no RoPE but a learned embedding of each position
            (GPT-2, which differs in its norms and MLPs too).
        frequencies: "all" RoPE frequencies, θ from 1 to 1/10,000 radians per token; or all pairs in
            the "high" or the "low" third of that range, on a logarithmic scale.
        centred: Subtract the mean token embedding, weighted by how often each token occurs, after
            every step: embeddings have no common direction then. Later layers can still make one.
        qk_norm: Normalise queries and keys before RoPE (Qwen 3).
        edits: Edits that act during the whole training and in all measurements, such as
            ("KnockOut(L0H0 L0H1, 1)",); Edit objects are kept as they print.
        every: Steps between measurements.
        seed: Seed of initial weights and of the order of the text.
    """

    layers: int = 3
    heads: int = 4
    d_model: int = 160
    d_mlp: int = 384
    vocabulary: int = 1024
    length: int = 128
    batch_size: int = 16
    steps: int = 1500
    learning_rate: float | int = 3e-3
    repeats: float | int = 0.25
    positions: str = "rope"
    frequencies: str = "all"
    centred: bool = False
    qk_norm: bool = False
    edits: Any = ()
    every: int = 25
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (least, most) in _COUNTS.items():
            self._set(name, as_integer(name, getattr(self, name), least, most))
        self._set("learning_rate", as_number("learning_rate", self.learning_rate, 0.0, 1.0))
        self._set("repeats", as_number("repeats", self.repeats, 0.0, 1.0))
        one_of("positions", self.positions, POSITIONS)
        one_of("frequencies", self.frequencies, FREQUENCIES)
        for name in ("centred", "qk_norm"):
            if not isinstance(getattr(self, name), bool):
                raise TheoryError(f"{name} is True or False; got {getattr(self, name)!r}")
        if self.d_model % (2 * self.heads):
            raise TheoryError(
                f"d_model is a multiple of twice the number of heads, {2 * self.heads}; got "
                f"{self.d_model}"
            )
        if self.positions == "learned" and (self.frequencies != "all" or self.qk_norm):
            raise TheoryError(
                "learned positions go with frequencies='all' and without qk_norm: such a model has "
                "no RoPE"
            )
        self._set("edits", self._as_text(self.edits))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _as_text(self, given: Any) -> tuple[str, ...]:
        """Return edits as they print, after parsing them. Raises EditError or TheoryError."""
        if isinstance(given, (str, Edit)) or not isinstance(given, Iterable):
            raise TheoryError(f"edits is a list of edits or of their texts; got {given!r}")
        edits = [edit if isinstance(edit, Edit) else parse_edit(edit) for edit in given]
        return tuple(map(str, edits))

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return {**dataclasses.asdict(self), "edits": list(self.edits)}


_COUNTS = {
    "layers": (1, 48),
    "heads": (1, 64),
    "d_model": (8, 4096),
    "d_mlp": (8, 16384),
    "vocabulary": (300, 65536),
    "length": (32, 4096),
    "batch_size": (1, 4096),
    "steps": (1, 1_000_000),
    "every": (1, 1_000_000),
    "seed": (0, 2**31 - 1),
}
