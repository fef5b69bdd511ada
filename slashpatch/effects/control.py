"""What a control is: draws variants of a condition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from .. import bridge
from ..errors import ControlError, SlashpatchError
from .conditions import Condition
from .inputs import Batch

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


_ATTEMPTS = 200


@dataclass(frozen=True)
class Control:
    """Draws `n` variants of a condition.

    Attributes:
        n: How many; they are all different.
    """

    n: int = 8
    name: ClassVar[str]

    def __post_init__(self) -> None:
        if isinstance(self.n, bool) or not isinstance(self.n, int) or self.n < 1:
            raise ControlError(
                f"{self.name}: the number of draws is an integer from 1; got {self.n!r}"
            )

    def __str__(self) -> str:
        return f"{self.name}:{self.n}"

    def draw(
        self,
        model: TransformerBridge,
        condition: Condition,
        batches: Sequence[Batch],
        seed: int,
    ) -> list[Condition]:
        """The variants. Raises ControlError where there are not as many."""
        from transformer_lens.utilities.statistics import derive_generator

        one = self.sampler(model, condition, batches)
        generator = derive_generator(seed, self.name, str(condition))
        own = str(self.canonical(model, condition))
        found: dict[str, Condition] = {}
        for _ in range(_ATTEMPTS * self.n):
            drawn = self.canonical(model, one(generator))
            if str(drawn) != own:
                found.setdefault(str(drawn), drawn)
            if len(found) == self.n:
                break
        if len(found) < self.n:
            raise ControlError(
                f"{self} cannot be drawn for {condition}: found {len(found)} different ones; ask "
                "for fewer, or use another control"
            )
        for drawn in found.values():
            try:
                _require_taken(model, drawn)
            except SlashpatchError as error:
                raise ControlError(
                    f"{self} cannot be drawn for {condition}: {drawn} does not fit the model: "
                    f"{error}"
                ) from error
        return list(found.values())

    def canonical(self, model: TransformerBridge, condition: Condition) -> Condition:
        """The condition such that equal interventions are equal."""
        return condition

    def sampler(
        self, model: TransformerBridge, condition: Condition, batches: Sequence[Batch]
    ) -> Callable[[torch.Generator], Condition]:
        """A function that draws one variant. Raises ControlError where there is none."""
        raise AssertionError("each control says what it draws")


def _require_taken(model: TransformerBridge, condition: Condition) -> None:
    """Raise if the model cannot take the edits: layers differ in RoPE, and bases are of heads."""
    info = bridge.read(model)
    for edit in condition.edits:
        edit.validate(info)
        if {"query", "key"} & set(edit.stages()):
            edit.prepare(model, info)


def _sample(pool: Sequence[Any], n: int, generator: torch.Generator) -> list[Any]:
    return [pool[index] for index in torch.randperm(len(pool), generator=generator)[:n].tolist()]
