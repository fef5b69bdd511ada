"""Drop a direction of the residual stream from the input of heads' queries and keys."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from .. import bridge
from ..bridge import ModelInfo
from ..bridge.modes import own_passes
from ..data.prompts import prompt_set
from ..errors import EditError
from ..maths.cone import without_component
from .axis import Axis, axis_of_tokens
from .base import Edit, HookContext

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_OF = ("qk", "q", "k")
CONTROLS = ("", "same_size", "random", "principal")
#: What the axis is fitted on where none is given (*ours*).
_PROMPTS, _TOKENS = 8, 256


@dataclass(frozen=True, repr=False)
class DropDirection(Edit):
    """Drop one direction u from the attention input x of heads' queries and keys: x − u uᵀx.

    u is the axis of the layer's inputs, the direction of their mean, which by arXiv 2601.08297 is
    where near rank-one queries and keys come from: W_Q and W_K carry it into each of them. So this
    tests their origin. Queries and keys are computed anew from the changed input, before any norm
    on them; values, and other heads, keep the input as it was. It is large: much of x lies along
    the axis. So compare it with `control`, which makes it an edit of another direction instead. No
    other direction has the axis' second moment (it is nearly the largest there is), so there are
    three controls, all *ours*: one of the same size, one random, and one as strong as can be.

    Edits of inputs act before those of queries and keys, in whatever order they are attached.

    Attributes:
        of: Whose input: "qk" (queries and keys), "q" or "k".
        direction: An Axis from `slashpatch.fit_axis`, or the file of one. None: fitted when the
            edit is attached, on 8 built-in natural texts of up to 256 tokens; a run that attaches
            the edit many times is faster with a fitted one.
        control: "": drop the axis itself. "same_size": drop uᵀx along a random w orthogonal to u,
            x − w uᵀx, so that each token's input changes by as much. "random": drop a random
            direction orthogonal to u, x − w wᵀx. "principal": drop a principal direction of what is
            left of x without u, the strongest for draw 0, the next for draw 1, and so on.
        draw: Seed of the random direction, or number of the principal one.
    """

    of: str = "qk"
    direction: Any = None
    control: str = ""
    draw: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.of not in _OF:
            raise EditError(f"DropDirection: of must be one of {', '.join(_OF)}; got {self.of!r}")
        if isinstance(self.direction, (str, os.PathLike)):
            object.__setattr__(self, "direction", Axis.load(self.direction))
        if self.direction is not None and not isinstance(self.direction, Axis):
            raise EditError(
                "DropDirection: direction must be None, an Axis (slashpatch.fit_axis) or its file; "
                f"got {self.direction!r}"
            )
        if self.control not in CONTROLS:
            raise EditError(
                f"DropDirection: control must be one of {', '.join(CONTROLS[1:])}, or '' to drop "
                f"the axis; got {self.control!r}"
            )
        if isinstance(self.draw, bool) or not isinstance(self.draw, int) or self.draw < 0:
            raise EditError(f"DropDirection: draw must be an integer from 0 on; got {self.draw!r}")

    def validate(self, info: ModelInfo) -> None:
        """Raise if the model lacks one of the heads, or the axis one of their layers."""
        super().validate(info)
        for layer in self.layers if self.direction is not None else ():
            n = len(self.direction.principal_of(layer))
            if self.control == "principal" and self.draw >= n:
                raise EditError(f"{self}: the axis has only {n} principal directions")

    def prepare(
        self, model: TransformerBridge, info: ModelInfo
    ) -> dict[int, tuple[Float[Tensor, "d_model"], Float[Tensor, "d_model"]]]:
        """Return by layer the direction to read and the one to change.

        Raises ModelError where queries or keys cannot be computed again, EditError for an axis of
        another width.
        """
        _ = info.projections  # refuses
        axis = self.direction
        if axis is None:
            axis = _natural_axis(model, self.layers)
        if axis.directions.shape[1] != model.cfg.d_model:
            raise EditError(
                f"{self}: the axis has d_model {axis.directions.shape[1]}, the model "
                f"{model.cfg.d_model}"
            )
        return {layer: self._directions(axis, layer) for layer in self.layers}

    def stages(self) -> dict[str, Callable[[HookContext, Tensor], Tensor]]:
        """Return the hooks on the input of queries, of keys, or of both, as `of` says."""
        used = {"qk": ("query_input", "key_input"), "q": ("query_input",), "k": ("key_input",)}
        return {stage: act for stage, act in super().stages().items() if stage in used[self.of]}

    def on_query_input(
        self, ctx: HookContext, x: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return the input of the heads' queries without the direction."""
        return without_component(x, *ctx.prepared)

    def on_key_input(
        self, ctx: HookContext, x: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return the input of the heads' keys without the direction."""
        return without_component(x, *ctx.prepared)

    def _directions(self, axis: Axis, layer: int) -> tuple[Tensor, Tensor]:
        """Return the directions u and w of x − w uᵀx in one layer."""
        u = axis.of(layer)
        if not self.control:
            return u, u
        if self.control == "principal":
            found = axis.principal_of(layer)
            if self.draw >= len(found):
                raise EditError(f"{self}: the axis has only {len(found)} principal directions")
            return found[self.draw], found[self.draw]
        w = random_direction(u, layer, self.draw)
        return (u if self.control == "same_size" else w), w


def random_direction(
    u: Float[Tensor, "d_model"], layer: int, draw: int
) -> Float[Tensor, "d_model"]:
    """Return a random unit vector orthogonal to the unit vector u, the same for the same draw."""
    from transformer_lens.utilities.statistics import derive_generator

    generator = derive_generator(draw, f"direction of layer {layer}")
    w = torch.randn(len(u), generator=generator, dtype=torch.float64)
    w = w - (w @ u.double()) * u.double()
    return w / w.norm()


def _natural_axis(model: TransformerBridge, layers: tuple[int, ...]) -> Axis:
    """Return the axis of the model as it is, on built-in natural text."""
    n_tokens = min(_TOKENS, bridge.read(model).n_ctx)
    texts = prompt_set(model, n_prompts=_PROMPTS, max_tokens=n_tokens)
    with own_passes():
        return axis_of_tokens(model, layers, texts.tokens, {})
