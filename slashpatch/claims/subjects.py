"""What the claims are tested on: slash heads picked on some prompts, and the other prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .. import bridge
from ..bridge import ModelInfo
from ..bridge.workers.options import Workers
from ..data.heads import Head
from ..data.prompts import PromptSet, prompt_set
from ..edits import KnockOut
from ..errors import PromptError
from ..scanning.result import Scan
from ..scanning.scan import scan
from .copying_gain import Copying, copying_gain
from .rules import TIMES_UNIFORM
from .settings import TOKENS, Settings
from .uniform import Uniform, uniform

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


class Slash(NamedTuple):
    """A slash: a head and the offset Δ at which it attends most."""

    head: Head
    offset: int

    def __str__(self) -> str:
        return f"{self.head} Δ{self.offset}"


@dataclass(frozen=True, eq=False)
class Subjects:
    """A model, the slashes that were picked, and the prompts to measure them on.

    Attributes:
        model: The model.
        info: What slashpatch has verified of it.
        settings: Sizes of the run.
        seed: Random seed.
        workers: Worker processes for the runs that compare predictions; None for this one.
        progress: Whether to show progress bars; None: on terminals.
        picking: Prompts of natural text on which everything is picked.
        natural: Other prompts of natural text.
        random: Prompts of random tokens, as long and as many as `natural`.
        uniform: What uniform attention would score.
        picked: The scan of the picking prompts.
        all_slashes: Every head's best slash that reaches κ on the picking prompts, best first.
        slashes: The strongest of those with Δ ≥ 1: the heads that are edited.
    """

    model: TransformerBridge
    info: ModelInfo
    settings: Settings
    seed: int
    workers: Workers | None
    progress: bool | None
    picking: PromptSet
    natural: PromptSet
    random: PromptSet
    uniform: Uniform
    picked: Scan
    all_slashes: tuple[Slash, ...]
    slashes: tuple[Slash, ...]

    @cached_property
    def copying(self) -> Copying:
        """Repeated random tokens, and what the model gains by copying them."""
        return copying_gain(self.model, self.settings, self.seed, self.progress)

    @property
    def heads(self) -> tuple[Head, ...]:
        """The heads of `slashes`."""
        return tuple(slash.head for slash in self.slashes)

    @property
    def named(self) -> str:
        """The slashes in words."""
        return ", ".join(map(str, self.slashes))

    def by_offset(self) -> dict[int, list[Head]]:
        """Return the heads of the slashes by offset."""
        groups: dict[int, list[Head]] = {}
        for head, offset in self.slashes:
            groups.setdefault(offset, []).append(head)
        return dict(sorted(groups.items()))

    def out_of(self, length: int) -> str:
        """Return why prompts of a length cannot show what the slashes do; empty if they can."""
        nearest = min(self.by_offset(), default=0)
        if 2 * nearest <= length:
            return ""
        return (
            f"the slashes' offsets, from {nearest} on, are too large for prompts of {length} tokens"
        )

    def knock_out(self) -> list[KnockOut]:
        """Return the edits that remove all slash diagonals together."""
        return [KnockOut(heads, offset) for offset, heads in self.by_offset().items()]

    def others(self, head: Head) -> list[Head]:
        """Return the other heads of a head's layer whose best slash does not reach κ."""
        taken = {slash.head for slash in self.all_slashes if slash.offset >= 1}
        layer = (Head(head.layer, index) for index in range(self.info.n_heads))
        return [other for other in layer if other not in taken and other != head]

    def generator(self, *label: str) -> torch.Generator:
        """Return a random generator of the run's seed and a label."""
        from transformer_lens.utilities.statistics import derive_generator

        return derive_generator(self.seed, "claims", *label)


def subjects(
    model: TransformerBridge,
    prompts: Any,
    settings: Settings,
    seed: int,
    workers: Workers | None,
    progress: bool | None,
) -> Subjects:
    """Pick each head's best slash on some prompts, and set others apart to measure them on.

    Raises PromptError for fewer than 4 different prompts, or one of fewer than `TOKENS` tokens.
    """
    info = bridge.read(model)
    chosen = prompt_set(
        model,
        prompts,
        n_prompts=settings.n_picking + settings.n_prompts,
        max_tokens=settings.n_tokens if prompts is None else None,
        seed=seed,
    )
    picking, natural = _split(chosen, settings)
    shortest = min(map(len, (*picking.tokens, *natural.tokens)))
    if shortest < TOKENS:
        raise PromptError(
            f"the claims need prompts of at least {TOKENS} tokens; the shortest has {shortest}"
        )
    settings = settings.within(shortest)
    lengths = [len(tokens) for tokens in natural.tokens]
    random = prompt_set(
        model,
        random_tokens=True,
        n_prompts=len(lengths),
        max_tokens=max(lengths),
        seed=seed,
    )
    random = PromptSet(
        tuple(tokens[:length] for tokens, length in zip(random.tokens, lengths, strict=True)),
        random.source,
    )
    offsets = range(settings.n_offsets)
    picked = scan(
        model,
        list(picking.tokens),
        offsets,
        profile_offsets=settings.n_profile,
        progress=progress,
    )
    seen = uniform(model, max((*picking.tokens, *natural.tokens), key=len), offsets)
    least = least_score(settings.kappa, seen, [len(tokens) for tokens in picking.tokens])
    # Of a head's offsets that reach κ, the best; a NaN never does.
    scores = picked.scores.where(picked.scores >= least[:, None], -1)
    best, at = scores.max(-1)
    order = best.flatten().argsort(descending=True).tolist()
    found = tuple(
        Slash(head, int(at[head.layer, head.head]))
        for head in (info.heads[index] for index in order)
        if float(best[head.layer, head.head]) >= settings.kappa
    )
    edited = tuple(slash for slash in found if slash.offset >= 1)[: settings.n_heads]
    return Subjects(
        model,
        info,
        settings,
        seed,
        workers,
        progress,
        picking,
        natural,
        random,
        seen,
        picked,
        found,
        edited,
    )


def least_score(
    kappa: float, seen: Uniform, lengths: Sequence[int]
) -> Float[Tensor, "layer offset"]:
    """Return the least score of a slash head: κ, and `TIMES_UNIFORM` that of uniform attention.

    The second is larger than κ = 0.1 only in prompts of fewer than 110 tokens, and in layers with
    a sliding window of fewer than 20.
    """
    uniform_scores = torch.stack([seen.score(length) for length in lengths]).mean(0)
    return (TIMES_UNIFORM * uniform_scores).clamp(min=kappa)


def _split(chosen: PromptSet, settings: Settings) -> tuple[PromptSet, PromptSet]:
    """Return the prompts to pick on, and the others; prose and code alternate in both.

    A prompt that comes twice is used once: it must not be in both.
    """
    different = {tuple(tokens.tolist()): tokens for tokens in chosen.tokens}
    chosen = PromptSet(tuple(different.values()), chosen.source)
    n = len(chosen.tokens)
    if n < 4:
        raise PromptError(
            f"the claims need at least 4 different prompts, half of them to pick heads on; got {n}"
        )
    n_picking = round(n * settings.n_picking / (settings.n_picking + settings.n_prompts))
    parts = chosen.tokens[:n_picking], chosen.tokens[n_picking:]
    made = (PromptSet(part, chosen.source) for part in parts)
    return next(made), next(made)
