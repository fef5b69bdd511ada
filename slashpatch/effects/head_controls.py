"""Controls that move an edit to other heads."""

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

from .. import bridge
from ..bridge.modes import own_passes
from ..bridge.passes import leaving_no_trace, output_weight
from ..errors import ControlError, SlashpatchError
from ..heads import Head
from .conditions import Condition
from .control import Control, _require_taken, _sample
from .inputs import Batch

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def _heads(condition: Condition) -> list[Head]:
    return sorted({head for edit in condition.edits for head in edit.heads})


def _moved(condition: Condition, to: dict[Head, Head]) -> Condition:
    return Condition(
        tuple(
            dataclasses.replace(edit, heads=tuple(to[head] for head in edit.heads))
            for edit in condition.edits
        )
    )


class RandomHeads(Control):
    """The same edit on other heads of the same layers, as many in each."""

    name: ClassVar[str] = "random-heads"

    def sampler(
        self, model: TransformerBridge, condition: Condition, batches: Sequence[Batch]
    ) -> Callable[[torch.Generator], Condition]:
        """Uniform over heads of each layer that the condition does not touch."""
        n_heads = bridge.read(model).n_heads
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
    info = bridge.read(model)
    sums = torch.zeros(info.n_layers, info.n_heads, dtype=torch.float64)

    def add(z: Tensor, hook: Any) -> None:
        weight = output_weight(model, hook.layer()).to(z)
        # |z W|² = z (W Wᵀ) zᵀ: what is written is never formed for all heads at once.
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
        raise ControlError(f"matched-heads needs W_O of every layer: {error}") from error
    return sums / sum(batch.tokens.numel() for batch in batches)
