"""Scores of the slash heads under sets of edits, each head edited in a clean run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from ..data.heads import Head
from ..edits import Edit
from ..scanning.isolated_scores import isolated_scores
from .measured import Measured, beyond, share
from .subjects import Slash, Subjects


@dataclass
class Plan:
    """Sets of edits to run, by label, and the slashes whose scores they are for.

    Attributes:
        edits: Edits by label.
        slashes: The slashes that a label's edits act on.
    """

    edits: dict[str, list[Edit]] = field(default_factory=dict)
    slashes: dict[str, tuple[Slash, ...]] = field(default_factory=dict)

    def add(self, label: str, edits: Iterable[Edit], slashes: Sequence[Slash]) -> None:
        """Add a set of edits."""
        self.edits[label], self.slashes[label] = list(edits), tuple(slashes)


class Scores:
    """Scores under the edits of a plan, as shares of the clean scores.

    Attributes:
        on: The model and prompts.
        plan: The plan that was run.
        found: Scores [prompt, slash, offset] by label.
    """

    def __init__(self, on: Subjects, plan: Plan) -> None:
        self.on, self.plan = on, plan
        prompts = [tokens[: on.settings.n_effect_tokens] for tokens in on.natural.tokens]
        longest = min(len(tokens) for tokens in prompts)
        self.offsets = tuple(range(min(on.settings.n_offsets + 2, longest)))
        self.found = isolated_scores(
            on.model, on.heads, plan.edits, prompts, self.offsets, on.progress
        )

    def at(self, label: str, of: Sequence[Slash], later: int = 0) -> Float[Tensor, "prompt"]:
        """Return the mean over slashes of the score at Δ + `later`, per prompt."""
        scores = self.found[label]
        places = {slash.head: place for place, slash in enumerate(self.on.slashes)}
        columns = [
            scores[:, places[head], self.offsets.index(offset + later)] for head, offset in of
        ]
        return torch.stack(columns).mean(0)

    def kept(self, test: str, label: str, later: int = 0, detail: str = "") -> Measured:
        """Return the share of the clean score that is kept (`later` tokens further on)."""
        of = self.plan.slashes[label]
        named = detail or ", ".join(map(str, of))
        return share(test, self.at(label, of, later), self.at("", of), self.on.seed, named)

    def shares(self, label: str) -> Float[Tensor, "prompt"]:
        """Return each prompt's score under a label, over the mean clean score of all prompts."""
        of = self.plan.slashes[label]
        return self.at(label, of) / self.at("", of).mean()

    def against(self, test: str, label: str, control: str, sign: int = 1) -> Measured:
        """Return how much more (or, with sign −1, less) is kept than in the control's draws."""
        draws = [name for name in self.plan.edits if name.startswith(f"{control} #")]
        if not draws:
            return Measured(test, why_not=f"no draws of the control: {control}")
        sample = sign * self.shares(label) + (0 if sign == 1 else 1)
        rows = torch.stack([sign * self.shares(name) + (0 if sign == 1 else 1) for name in draws])
        kept = f"{float(self.shares(label).mean()):.2f}"
        others = f"{float(torch.stack([self.shares(name) for name in draws]).mean()):.2f}"
        return beyond(test, sample, rows, self.on.seed, f"kept {kept} against {others}")


def by_layer(slashes: Sequence[Slash]) -> dict[int, list[Head]]:
    """Return the heads of slashes by layer."""
    groups: dict[int, list[Head]] = {}
    for head, _ in slashes:
        groups.setdefault(head.layer, []).append(head)
    return groups
