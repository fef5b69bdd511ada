"""What an edit is: a small frozen dataclass that overrides the hooks it touches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from jaxtyping import Float
from torch import Tensor

from ..bridge import ModelInfo
from ..bridge.forward_call import ForwardCall
from ..bridge.qk import LayerQK
from ..errors import EditError, HeadError
from ..heads import Head, HeadsLike, heads
from ..maths.diagonals import DiagonalChange
from ..maths.rotary import Rotary

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


#: In the order in which they fire.
STAGES = ("query", "key", "scores", "pattern", "z")


@dataclass(frozen=True)
class HookContext:
    """Where an edit acts in the current forward pass: one layer, and the edit's heads in it.

    Tensors that an edit gets and returns hold these heads only, in this order, so an edit cannot
    reach another head.

    Attributes:
        layer: Its index.
        heads: The edit's heads in it, ascending.
        n_heads: Query heads of the layer.
        call: The current forward pass.
        prepared: What the edit's `prepare` returned for this layer.
        memory: From one hook of the pass to the next, of this edit in this layer.
        qk: The layer's queries, keys and rotation; for edits of queries and keys.
    """

    layer: int
    heads: list[int]
    n_heads: int
    call: ForwardCall
    prepared: Any = None
    memory: dict[str, Tensor] = field(default_factory=dict)
    qk: LayerQK | None = None

    def theta(self, stage: str) -> Float[Tensor, "own pair"]:
        """Return the frequencies of these heads' queries or keys after the edits so far."""
        table = self._thetas.get((stage, self.layer))
        own = self.rotary.inv_freq
        return own.expand(len(self.heads), -1) if table is None else table[self.heads]

    def set_theta(self, stage: str, new: Float[Tensor, "own pair"]) -> None:
        """Note new frequencies of these heads, for the edits that come after."""
        table = self._thetas.get((stage, self.layer))
        own = self.rotary.inv_freq
        table = own.repeat(self.n_heads, 1) if table is None else table.clone()
        table[self.heads] = new.to(table)
        self._thetas[stage, self.layer] = table

    @property
    def _thetas(self) -> dict[tuple[str, int], Float[Tensor, "head pair"]]:
        """Frequencies by (stage, layer), as edits left them so far in this pass."""
        found: dict[tuple[str, int], Tensor] = self.call.state.setdefault("frequencies", {})
        return found

    @property
    def rotary(self) -> Rotary:
        """How the layer rotates in this pass; for edits of queries and keys."""
        assert self.qk is not None
        return self.qk.current()


@dataclass(frozen=True)
class Edit:
    """An intervention on some heads. Prints as it is typed: `parse_edit(str(edit)) == edit`.

    (But for a function of frequencies and for a basis that was not saved, which have no text.)

    Attributes:
        heads: Query heads; given as anything that `slashpatch.heads` reads, kept as a sorted tuple.
    """

    heads: HeadsLike

    def __post_init__(self) -> None:
        try:
            found = tuple(sorted(heads(self.heads)))
        except HeadError as error:
            raise HeadError(f"{type(self).__name__}: {error}") from None
        if not found:
            raise EditError(f"{type(self).__name__} needs at least one head, got {self.heads!r}")
        object.__setattr__(self, "heads", found)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have heads of this edit, ascending."""
        return tuple(sorted({head.layer for head in cast("tuple[Head, ...]", self.heads)}))

    def heads_in(self, layer: int) -> list[int]:
        """The edit's head indices in `layer`, ascending."""
        return [head.head for head in cast("tuple[Head, ...]", self.heads) if head.layer == layer]

    def validate(self, info: ModelInfo) -> None:
        """Raise if the model cannot take this edit. Called before anything is attached."""
        info.require(self.heads)

    def prepare(self, model: TransformerBridge, info: ModelInfo) -> dict[int, Any]:
        """State per layer, computed once when the edit is attached."""
        return {}

    def on_query(
        self, ctx: HookContext, q: Float[Tensor, "batch pos head d_head"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Edit the queries before RoPE and after any norm."""
        return q

    def on_key(
        self, ctx: HookContext, k: Float[Tensor, "batch pos head d_head"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Edit the head's own copy of its keys, before RoPE; the KV group keeps the shared ones."""
        return k

    def on_scores(
        self, ctx: HookContext, scores: Float[Tensor, "batch head query key"]
    ) -> Float[Tensor, "batch head query key"]:
        """Edit the masked logits before the softmax."""
        return scores

    def on_pattern(
        self, ctx: HookContext, pattern: Float[Tensor, "batch head query key"]
    ) -> Float[Tensor, "batch head query key"]:
        """Edit the attention after the softmax."""
        return pattern

    def on_z(
        self, ctx: HookContext, z: Float[Tensor, "batch pos head d_head"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Edit the head outputs, before the output projection."""
        return z

    def diagonal_changes(self) -> tuple[DiagonalChange, ...]:
        """What `on_scores` and `on_pattern` do, if that is all that they do: the fused engine
        does the same without the matrix. Empty: they need the matrix itself.
        """
        return ()

    @property
    def needs_matrix(self) -> bool:
        """Whether the edit acts on scores or pattern otherwise than by `diagonal_changes`.

        Also where a class overrides one of those hooks after the class that says the changes.
        """
        acts = [f"on_{stage}" for stage in ("scores", "pattern") if stage in self.stages()]
        if not acts:
            return False

        def depth(name: str) -> int:
            return next(i for i, one in enumerate(type(self).__mro__) if name in vars(one))

        return not self.diagonal_changes() or depth("diagonal_changes") > min(map(depth, acts))

    def stages(self) -> dict[str, Callable[[HookContext, Tensor], Tensor]]:
        """The hooks that this edit overrides, in the order in which they fire."""
        return {
            stage: getattr(self, f"on_{stage}")
            for stage in STAGES
            if getattr(type(self), f"on_{stage}") is not getattr(Edit, f"on_{stage}")
        }

    def __str__(self) -> str:
        first, *others = dataclasses.fields(self)
        parts = [_written(getattr(self, first.name))]
        for other in others:
            value = getattr(self, other.name)
            if other.default is dataclasses.MISSING or value != other.default:
                parts.append(f"{other.name}={_written(value)}")
        return f"{type(self).__name__}({', '.join(parts)})"

    __repr__ = __str__


def _written(value: Any) -> str:
    """A value as `parse_edit` reads it; a tuple of one is written as its only member."""
    if isinstance(value, tuple):
        if len(value) == 1:
            return _written(value[0])
        first = value[0]
        if (
            len(value) > 3
            and isinstance(first, int)
            and value == (*range(first, first + len(value)),)
        ):
            return f"range({first}, {first + len(value)})"
        return f"({', '.join(_written(member) for member in value)})"
    if callable(value):
        # By its name: where it lies in memory differs from one process to the next.
        return f"<{getattr(value, '__qualname__', type(value).__name__)}>"
    return repr(value)
