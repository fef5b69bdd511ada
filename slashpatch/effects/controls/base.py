"""The base class of controls: they draw random variants of a condition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ... import bridge
from ...errors import ControlError, SlashpatchError
from ..running.conditions import Condition
from ..running.inputs import Batch
from ..statistics import LEAST

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


#: Draws of a control that is not told how many: the fewest whose rank p-value reaches 0.05.
DRAWS = 19
#: Random draws tried for each variant asked for, before a control gives up.
_ATTEMPTS = 200


@dataclass(frozen=True)
class Control:
    """Draws `n` random variants of a condition, all different.

    Attributes:
        n: Number of variants; None: 19, or as many as there are if there are fewer.
        name: Name of the control, as in the text "random-heads:8".
    """

    n: int | None = None
    name: ClassVar[str]

    def __post_init__(self) -> None:
        if self.n is None:
            return
        if isinstance(self.n, bool) or not isinstance(self.n, int) or self.n < 1:
            raise ControlError(
                f"{self.name}: the number of draws must be an integer of at least 1; got {self.n!r}"
            )

    def __str__(self) -> str:
        return self.name if self.n is None else f"{self.name}:{self.n}"

    @property
    def most(self) -> int:
        """The number of variants to draw, if there are as many."""
        return DRAWS if self.n is None else self.n

    @property
    def fewest(self) -> int:
        """The number of variants without which the control cannot be drawn."""
        return 1 if self.n is None else self.n

    def draw(
        self,
        model: TransformerBridge,
        condition: Condition,
        batches: Sequence[Batch],
        seed: int,
        label: str | None = None,
    ) -> list[Condition]:
        """Return different variants, as many as `n` says. Raises ControlError for fewer.

        Conditions with the same `label` draw alike: one edit at several doses meets the same heads.
        None: the condition's own text.
        """
        from transformer_lens.utilities.statistics import derive_generator

        draw_one = self.sampler(model, condition, batches)
        generator = derive_generator(seed, self.name, label or str(condition))
        original = str(self.canonical(model, condition))
        variants: dict[str, Condition] = {}
        for _ in range(_ATTEMPTS * self.most):
            drawn = self.canonical(model, draw_one(generator))
            if str(drawn) != original:
                variants.setdefault(str(drawn), drawn)
            if len(variants) == self.most:
                break
        if len(variants) < self.fewest:
            raise ControlError(
                f"{self} cannot be drawn for {condition}: found {len(variants)} different variants;"
                " ask for fewer, or use another control"
            )
        for drawn in variants.values():
            try:
                require_applicable(model, drawn)
            except SlashpatchError as error:
                raise ControlError(
                    f"{self} cannot be drawn for {condition}: {drawn} does not fit the model: "
                    f"{error}"
                ) from error
        return list(variants.values())

    def canonical(self, model: TransformerBridge, condition: Condition) -> Condition:
        """Return the condition in a form in which equal interventions have equal texts."""
        return condition

    def sampler(
        self, model: TransformerBridge, condition: Condition, batches: Sequence[Batch]
    ) -> Callable[[torch.Generator], Condition]:
        """Return a function that draws one variant. Raises ControlError if there are none."""
        raise AssertionError("each control defines what it draws")


def require_applicable(model: TransformerBridge, condition: Condition) -> None:
    """Raise if the edits cannot act on the model: layers differ in RoPE, bases in their heads."""
    info = bridge.read(model)
    for edit in condition.edits:
        edit.validate(info)
        if edit.acts_on_qk:
            edit.prepare(model, info)


def sample(pool: Sequence[Any], n: int, generator: torch.Generator) -> list[Any]:
    """Return n random items of `pool`, without replacement."""
    return [pool[index] for index in torch.randperm(len(pool), generator=generator)[:n].tolist()]


def few_draws(control: Control, n: int) -> tuple[str, ...]:
    """Return a remark, if n draws are too few for a rank p-value of 0.05, or for an interval."""
    if n >= DRAWS:
        return ()
    none = f", and fewer than {LEAST} have no interval" if n < LEAST else ""
    return (
        f"{control.name}: {n} {'draw' if n == 1 else 'draws'} cannot give a p_rank below "
        f"{1 / (1 + n):.2g}; 0.05 needs {DRAWS}{none}.",
    )
