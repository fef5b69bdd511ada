"""Controls that make the same edit at other heads."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from ... import bridge
from ...bridge.modes import own_passes
from ...bridge.passes import leaving_no_trace, output_weight
from ...data.heads import Head
from ...errors import ControlError, SlashpatchError
from ..running.conditions import Condition
from ..running.inputs import Batch
from .base import Control, require_applicable, sample

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def _edited_heads(condition: Condition) -> list[Head]:
    return sorted({head for edit in condition.edits for head in edit.heads})


def _with_heads(condition: Condition, to: dict[Head, Head]) -> Condition:
    """Return the same edits, with each head replaced by its counterpart in `to`."""
    return Condition(
        tuple(
            dataclasses.replace(edit, heads=tuple(to[head] for head in edit.heads))
            for edit in condition.edits
        )
    )


class RandomHeads(Control):
    """The same edit at random other heads of the same layers, as many in each layer."""

    name: ClassVar[str] = "random-heads"

    def sampler(
        self, model: TransformerBridge, condition: Condition, batches: Sequence[Batch]
    ) -> Callable[[torch.Generator], Condition]:
        """Return a function that draws uniformly from each layer's unedited heads."""
        n_heads = bridge.read(model).n_heads
        layers = {
            layer: list(group)
            for layer, group in itertools.groupby(
                _edited_heads(condition), key=lambda head: head.layer
            )
        }
        pools = {
            layer: [head for head in (Head(layer, h) for h in range(n_heads)) if head not in used]
            for layer, used in layers.items()
        }
        for layer, used in layers.items():
            if len(pools[layer]) < len(used):
                raise ControlError(
                    f"{self} cannot be drawn for {condition}: layer {layer} has {n_heads} heads, "
                    f"{len(used)} of them edited, which leaves {len(pools[layer])}; edit fewer "
                    "heads, or use matched-heads, which draws from all layers"
                )
        possible = math.prod(math.comb(len(pools[layer]), len(layers[layer])) for layer in layers)
        if len(condition.edits) == 1 and possible < self.fewest:
            raise ControlError(
                f"{self} cannot be drawn for {condition}: its layers have only {possible} other "
                f"sets of as many heads; ask for at most {self.name}:{possible}, or use "
                "matched-heads, which draws from all layers"
            )

        def draw_one(generator: torch.Generator) -> Condition:
            to: dict[Head, Head] = {}
            for layer, used in layers.items():
                to.update(zip(used, sample(pools[layer], len(used), generator), strict=True))
            return _with_heads(condition, to)

        return draw_one


class MatchedHeads(Control):
    """The same edit at random heads of any layer whose outputs have a similar norm.

    Each edited head is replaced by one of the heads that are nearest to it in mean norm of the
    output z W_O over the prompts' tokens. There are 2n such candidates, at least 8 (*ours*).
    """

    name: ClassVar[str] = "matched-heads"

    def sampler(
        self, model: TransformerBridge, condition: Condition, batches: Sequence[Batch]
    ) -> Callable[[torch.Generator], Condition]:
        """Return a function that draws uniformly from the nearest heads, each at most once."""
        norms = output_norms(model, batches).clamp(min=1e-12).log()
        used = _edited_heads(condition)
        layers = [layer for layer in range(len(norms)) if _applies(model, condition, layer)]
        others = [
            head
            for head in (Head(*at) for at in itertools.product(layers, range(norms.shape[1])))
            if head not in used
        ]
        if len(others) < max(len(used), self.fewest if len(used) == 1 else 1):
            raise ControlError(
                f"{self} cannot be drawn for {condition}: the model has only {len(others)} "
                "unedited heads at which the edit can act"
            )
        size = max(2 * self.most, 8)

        def nearest(head: Head) -> list[Head]:
            target = float(norms[head.layer, head.head])
            by_norm = sorted(others, key=lambda o: abs(float(norms[o.layer, o.head]) - target))
            return by_norm[:size]

        pools = {head: nearest(head) for head in used}

        def draw_one(generator: torch.Generator) -> Condition:
            to: dict[Head, Head] = {}
            for head in used:
                free = [other for other in pools[head] if other not in to.values()]
                if not free:
                    free = [other for other in others if other not in to.values()]
                to[head] = sample(free, 1, generator)[0]
            return _with_heads(condition, to)

        return draw_one


def _applies(model: TransformerBridge, condition: Condition, layer: int) -> bool:
    """Return whether the edits can act in a layer: some lack RoPE or have other frequencies."""
    moved = _with_heads(condition, dict.fromkeys(_edited_heads(condition), Head(layer, 0)))
    try:
        require_applicable(model, moved)
    except SlashpatchError:
        return False
    return True


def output_norms(model: TransformerBridge, batches: Sequence[Batch]) -> Float[Tensor, "layer head"]:
    """Return each head's mean output norm |z W_O|, over the tokens of all prompts.

    Taken before any norm that the model applies to the attention's output. Raises ControlError for
    models whose W_O TransformerLens cannot split by heads.
    """
    info = bridge.read(model)
    sums = torch.zeros(info.n_layers, info.n_heads, dtype=torch.float64)

    def add(z: Tensor, hook: Any) -> None:
        weight = output_weight(model, hook.layer()).to(z)
        # |z W|² = z (W Wᵀ) zᵀ saves memory: z W of all heads at once is n_heads times d_model wide.
        squares = einsum(
            z, weight @ weight.mT, z, "b pos head d, head d e, b pos head e -> b pos head"
        )
        sums[hook.layer()] += squares.clamp(min=0).sqrt().double().sum((0, 1)).cpu()

    hooks = [(info.hook(layer, "z"), add) for layer in range(info.n_layers)]
    try:
        with leaving_no_trace(model), own_passes():
            for batch in batches:
                bridge.run_for_hooks(model, batch.tokens, hooks)
    except (AttributeError, RuntimeError, ValueError) as error:
        raise ControlError(f"matched-heads needs W_O of every layer, by heads: {error}") from error
    return sums / sum(batch.tokens.numel() for batch in batches)
