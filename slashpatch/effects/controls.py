"""Controls: the same edit where it should do nothing in particular, drawn by seed.

An effect says little by itself: removing anything from a model hurts. Each control answers one
objection. Which pools are drawn from is *ours*.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from .. import anatomy as anatomies
from .. import rope
from ..anatomy import run_for_attention
from ..calls import internal_passes
from ..edits import Edit
from ..errors import ControlError, ModelError, SlashpatchError
from ..heads import Head
from ..rotary import band_pairs
from .runs import Batch, Condition

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
    anatomy = anatomies.read(model)
    for edit in condition.edits:
        edit.validate(anatomy)
        if {"query", "key"} & set(edit.stages()):
            edit.prepare(model, anatomy)


def _heads(condition: Condition) -> list[Head]:
    return sorted({head for edit in condition.edits for head in edit.heads})


def _moved(condition: Condition, to: dict[Head, Head]) -> Condition:
    return Condition(
        tuple(
            dataclasses.replace(edit, heads=tuple(to[head] for head in edit.heads))
            for edit in condition.edits
        )
    )


def _sample(pool: Sequence[Any], n: int, generator: torch.Generator) -> list[Any]:
    return [pool[index] for index in torch.randperm(len(pool), generator=generator)[:n].tolist()]


class RandomHeads(Control):
    """The same edit on other heads of the same layers, as many in each."""

    name: ClassVar[str] = "random-heads"

    def sampler(
        self, model: TransformerBridge, condition: Condition, batches: Sequence[Batch]
    ) -> Callable[[torch.Generator], Condition]:
        """Uniform over heads of each layer that the condition does not touch."""
        n_heads = anatomies.read(model).n_heads
        layers = {
            layer: list(group)
            for layer, group in itertools.groupby(_heads(condition), key=lambda head: head.layer)
        }
        pools = {
            layer: [head for head in (Head(layer, h) for h in range(n_heads)) if head not in used]
            for layer, used in layers.items()
        }
        for layer, used in layers.items():
            if len(pools[layer]) < len(used):
                raise ControlError(
                    f"{self} cannot be drawn for {condition}: layer {layer} has {n_heads} heads "
                    f"and {len(used)} of them are edited, which leaves {len(pools[layer])}; edit "
                    "fewer, or use matched-heads, which draws from all layers"
                )
        possible = math.prod(math.comb(len(pools[layer]), len(layers[layer])) for layer in layers)
        if len(condition.edits) == 1 and possible < self.n:
            raise ControlError(
                f"{self} cannot be drawn for {condition}: its layers have only {possible} other "
                f"such sets of heads; ask for at most {self.name}:{possible}, or use "
                "matched-heads, which draws from all layers"
            )

        def one(generator: torch.Generator) -> Condition:
            to: dict[Head, Head] = {}
            for layer, used in layers.items():
                to.update(zip(used, _sample(pools[layer], len(used), generator), strict=True))
            return _moved(condition, to)

        return one


class MatchedHeads(Control):
    """The same edit on other heads, of any layer, that write about as much.

    For each edited head: one of the heads nearest in mean norm of the output z W_O over the
    prompts; twice as many as are drawn, at least 8.
    """

    name: ClassVar[str] = "matched-heads"

    def sampler(
        self, model: TransformerBridge, condition: Condition, batches: Sequence[Batch]
    ) -> Callable[[torch.Generator], Condition]:
        """Uniform over the nearest heads, without using one twice."""
        norms = output_norms(model, batches).clamp(min=1e-12).log()
        used = _heads(condition)
        layers = [layer for layer in range(len(norms)) if _fits(model, condition, layer)]
        others = [
            head
            for head in (Head(*at) for at in itertools.product(layers, range(norms.shape[1])))
            if head not in used
        ]
        if len(others) < max(len(used), self.n if len(used) == 1 else 1):
            raise ControlError(
                f"{self} cannot be drawn for {condition}: the model has only {len(others)} heads "
                "beside the edited ones that can take it"
            )
        size = max(2 * self.n, 8)

        def near(head: Head) -> list[Head]:
            own = float(norms[head.layer, head.head])
            by_norm = sorted(others, key=lambda o: abs(float(norms[o.layer, o.head]) - own))
            return by_norm[:size]

        pools = {head: near(head) for head in used}

        def one(generator: torch.Generator) -> Condition:
            to: dict[Head, Head] = {}
            for head in used:
                free = [other for other in pools[head] if other not in to.values()]
                if not free:
                    free = [other for other in others if other not in to.values()]
                to[head] = _sample(free, 1, generator)[0]
            return _moved(condition, to)

        return one


def _fits(model: TransformerBridge, condition: Condition, layer: int) -> bool:
    """Whether a layer can take the edits: some lack RoPE, or have other frequencies."""
    moved = _moved(condition, dict.fromkeys(_heads(condition), Head(layer, 0)))
    try:
        _require_taken(model, moved)
    except SlashpatchError:
        return False
    return True


def output_norms(model: TransformerBridge, batches: Sequence[Batch]) -> Float[Tensor, "layer head"]:
    """Mean norm of what each head adds to the residual stream, z W_O, over the prompts' tokens.

    Before any norm that the model applies to attention's output. Raises ControlError for models
    whose output projection TransformerLens cannot split by heads.
    """
    anatomy = anatomies.read(model)
    sums = torch.zeros(anatomy.n_layers, anatomy.n_heads, dtype=torch.float64)

    def add(z: Tensor, hook: Any) -> None:
        weight = model.blocks[hook.layer()].attn.W_O.to(z)
        # |z W|² = z (W Wᵀ) zᵀ: what is written is never formed for all heads at once.
        squares = einsum(
            z, weight @ weight.mT, z, "b pos head d, head d e, b pos head e -> b pos head"
        )
        sums[hook.layer()] += squares.clamp(min=0).sqrt().double().sum((0, 1)).cpu()

    hooks = [(anatomy.hook(layer, "z"), add) for layer in range(anatomy.n_layers)]
    try:
        with rope.leaving_no_trace(model), internal_passes():
            for batch in batches:
                run_for_attention(model, batch.tokens, None, hooks)
    except (AttributeError, RuntimeError, ValueError) as error:
        raise ControlError(f"matched-heads needs W_O of every layer: {error}") from error
    return sums / sum(batch.tokens.numel() for batch in batches)


class OtherOffsets(Control):
    """The same edit of the same heads at other offsets, as many of them."""

    name: ClassVar[str] = "other-offsets"
    #: From 1; beyond it a head's attention is mostly nothing.
    most: ClassVar[int] = 16

    def sampler(
        self, model: TransformerBridge, condition: Condition, batches: Sequence[Batch]
    ) -> Callable[[torch.Generator], Condition]:
        """Uniform over offsets 1 to 16 that no edit of the condition names."""
        last = min(self.most, max(batch.tokens.shape[1] for batch in batches) - 1)
        used = {offset for edit in condition.edits for offset in _offsets(edit)}
        pool = [offset for offset in range(1, last + 1) if offset not in used]
        edits = [edit for edit in condition.edits if _offsets(edit)]
        if not edits:
            raise ControlError(
                f"{self} cannot be drawn for {condition}: it names no offset; use it with "
                "KnockOut, KeepOnly, ScaleOffsets or PlantSlash"
            )
        n = len(used)
        if len(pool) < n or (len(edits) == 1 and math.comb(len(pool), n) < self.n):
            raise ControlError(
                f"{self} cannot be drawn for {condition}: offsets 1 to {last} "
                f"leave {len(pool)} others for {n}; ask for fewer, or use longer prompts"
            )

        def one(generator: torch.Generator) -> Condition:
            to = dict(zip(sorted(used), _sample(pool, n, generator), strict=True))
            return Condition(tuple(_with_offsets(edit, to) for edit in condition.edits))

        return one


def _offsets(edit: Edit) -> tuple[int, ...]:
    if hasattr(edit, "offsets"):
        return tuple(edit.offsets)
    return (edit.offset,) if hasattr(edit, "offset") else ()


def _with_offsets(edit: Edit, to: dict[int, int]) -> Edit:
    if hasattr(edit, "offsets"):
        return dataclasses.replace(edit, offsets=tuple(to[o] for o in edit.offsets))  # type: ignore
    if hasattr(edit, "offset"):
        return dataclasses.replace(edit, offset=to[edit.offset])  # type: ignore[call-arg]
    return edit


class RandomPairs(Control):
    """The same edit of the same heads on random rotary pairs, as many as the band has."""

    name: ClassVar[str] = "random-pairs"

    def sampler(
        self, model: TransformerBridge, condition: Condition, batches: Sequence[Batch]
    ) -> Callable[[torch.Generator], Condition]:
        """Uniform over sets of pairs that are not the band itself; two bands stay disjoint."""
        if not any(_bands(edit) for edit in condition.edits):
            raise ControlError(
                f"{self} cannot be drawn for {condition}: it names no band; use it with DropBand, "
                "FreezeBand, ScaleBand or SwapBands"
            )
        sizes = {
            (edit, field): len(_pairs_of(model, edit, field, self, condition))
            for edit in condition.edits
            for field in _bands(edit)
        }
        layers = rope.read(model)

        def one(generator: torch.Generator) -> Condition:
            edits = []
            for edit in condition.edits:
                fields = _bands(edit)
                n_pairs = layers[edit.layers[0]].require_rotary().n_pairs if fields else 0
                pairs = iter(_sample(range(n_pairs), n_pairs, generator))
                bands = {
                    field: _band(itertools.islice(pairs, sizes[edit, field])) for field in fields
                }
                edits.append(dataclasses.replace(edit, **bands))
            return Condition(tuple(edits))

        return one

    def canonical(self, model: TransformerBridge, condition: Condition) -> Condition:
        """Bands pair by pair; two that are exchanged in one order."""
        edits = []
        for edit in condition.edits:
            fields = _bands(edit)
            bands = [_pairs_of(model, edit, field, self, condition) for field in fields]
            given = dict(zip(fields, map(_band, sorted(bands)), strict=True))
            edits.append(dataclasses.replace(edit, **given) if given else edit)
        return Condition(tuple(edits))


def _pairs_of(
    model: TransformerBridge, edit: Edit, field: str, control: Control, condition: Condition
) -> list[int]:
    """The rotary pairs of a band, ascending; the same ones in all the edit's layers."""
    layers = rope.read(model)
    try:
        found = {
            tuple(sorted(band_pairs(getattr(edit, field), layers[layer].require_rotary().inv_freq)))
            for layer in edit.layers
        }
    except ModelError as error:
        raise ControlError(f"{control} cannot be drawn for {condition}: {error}") from error
    if len(found) > 1:
        raise ControlError(
            f"{control} cannot be drawn for {condition}: the band is of other pairs in other "
            "layers; give each layer an edit of its own, or name pairs"
        )
    return list(found.pop())


def _band(pairs: Iterable[int]) -> str:
    return "+".join(f"pairs {pair}-{pair}" for pair in sorted(pairs))


def _bands(edit: Edit) -> list[str]:
    return [field for field in ("band", "a", "b") if hasattr(edit, field)]


CONTROLS: dict[str, type[Control]] = {
    kind.name: kind for kind in (RandomHeads, MatchedHeads, OtherOffsets, RandomPairs)
}


def as_control(spec: Any) -> Control:
    """A control from its text, such as `random-heads:20`, or itself. Raises ControlError."""
    if isinstance(spec, Control):
        return spec
    match = (
        re.fullmatch(r"\s*([a-z-]+)\s*(?::\s*(\d{1,6})\s*)?", spec)
        if isinstance(spec, str)
        else None
    )
    if match is None or match[1] not in CONTROLS:
        raise ControlError(
            f"no control {spec!r}; expected one of {', '.join(CONTROLS)}, with how many draws, "
            "such as random-heads:20"
        )
    return CONTROLS[match[1]](*([int(match[2])] if match[2] else []))
