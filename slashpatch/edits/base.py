"""The base class of all edits, and the hook context that their hook functions receive."""

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
from ..data import display
from ..data.heads import Head, HeadsLike, heads
from ..errors import EditError, HeadError
from ..maths.diagonals import DiagonalChange
from ..maths.rotary import Rotary

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


#: Hook points that an edit can override (`on_query`, `on_key`, ...), in the order they fire.
STAGES = ("query_input", "key_input", "query", "key", "scores", "pattern", "z")


@dataclass(frozen=True)
class HookContext:
    """Context of one hook call: the layer, the edit's heads in it, and the current forward pass.

    The tensors that an edit's hooks receive and return hold only these heads, in this order, so an
    edit cannot change another head.

    Attributes:
        layer: Index of the layer.
        heads: Indices of the edit's heads in this layer, ascending.
        n_heads: Number of query heads in the layer.
        call: Arguments of the current forward pass.
        prepared: What the edit's `prepare` returned for this layer.
        memory: Tensors that one hook of this edit keeps for its later hooks, in the same layer and
            forward pass.
        qk: The layer's query and key hooks and its RoPE; None unless the edit acts on queries or
            keys.
    """

    layer: int
    heads: list[int]
    n_heads: int
    call: ForwardCall
    prepared: Any = None
    memory: dict[str, Tensor] = field(default_factory=dict)
    qk: LayerQK | None = None

    def theta(self, stage: str) -> Float[Tensor, "head pair"]:
        """Return θ of these heads' rotary pairs, as the earlier edits of this pass left them.

        `stage` is "query" or "key"; radians per token.
        """
        table = self._thetas.get((stage, self.layer))
        inv_freq = self.rotary.inv_freq
        return inv_freq.expand(len(self.heads), -1) if table is None else table[self.heads]

    def set_theta(self, stage: str, new: Float[Tensor, "head pair"]) -> None:
        """Record new frequencies of these heads, for the later edits of this pass."""
        table = self._thetas.get((stage, self.layer))
        inv_freq = self.rotary.inv_freq
        table = inv_freq.repeat(self.n_heads, 1) if table is None else table.clone()
        table[self.heads] = new.to(table)
        self._thetas[stage, self.layer] = table

    @property
    def _thetas(self) -> dict[tuple[str, int], Float[Tensor, "head pair"]]:
        """Frequencies of all heads of the edited layers, by (stage, layer)."""
        thetas: dict[tuple[str, int], Tensor] = self.call.state.setdefault("frequencies", {})
        return thetas

    @property
    def rotary(self) -> Rotary:
        """The layer's RoPE in the current forward pass; for edits of queries and keys only."""
        assert self.qk is not None
        return self.qk.current()


@dataclass(frozen=True)
class Edit:
    """An intervention on some attention heads.

    A subclass is a frozen dataclass that overrides one or more of `on_query`, `on_key`,
    `on_scores`, `on_pattern` and `on_z`. `str` gives the text that `parse_edit` reads back:
    `parse_edit(str(edit)) == edit`, except for edits that hold a Python function or an unsaved
    basis, which have no such text.

    Attributes:
        heads: Query heads, in any form that `slashpatch.heads` reads; stored as a sorted tuple.
    """

    heads: HeadsLike

    def __post_init__(self) -> None:
        try:
            chosen = tuple(sorted(heads(self.heads)))
        except HeadError as error:
            raise HeadError(f"{type(self).__name__}: {error}") from None
        if not chosen:
            raise EditError(f"{type(self).__name__} needs at least one head, got {self.heads!r}")
        object.__setattr__(self, "heads", chosen)

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the layers that contain heads of this edit, ascending."""
        return tuple(sorted({head.layer for head in cast("tuple[Head, ...]", self.heads)}))

    def heads_in(self, layer: int) -> list[int]:
        """Indices of the edit's heads in `layer`, ascending."""
        return [head.head for head in cast("tuple[Head, ...]", self.heads) if head.layer == layer]

    def validate(self, info: ModelInfo) -> None:
        """Raise if the edit cannot act on this model; called before any hook is attached."""
        info.require(self.heads)

    def prepare(self, model: TransformerBridge, info: ModelInfo) -> dict[int, Any]:
        """Return state by layer index, computed once, when the edit is attached to the model."""
        return {}

    def on_query_input(
        self, ctx: HookContext, x: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """Edit the attention's input x, as these heads' queries are computed from it.

        The queries of other heads, and the values, are computed from the input as it was. Heads
        whose input other edits have made different from each other's get a call each.
        """
        return x

    def on_key_input(
        self, ctx: HookContext, x: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """Edit the attention's input x, as these heads' keys are computed from it.

        As `on_query_input`; the heads get per-head keys, as by `on_key`.
        """
        return x

    def on_query(
        self, ctx: HookContext, q: Float[Tensor, "batch pos head d_head"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Edit the queries, before RoPE and after any query norm."""
        return q

    def on_key(
        self, ctx: HookContext, k: Float[Tensor, "batch pos head d_head"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Edit the heads' keys, before RoPE and after any key norm.

        Under grouped-query attention these are per-head copies of the shared keys (per-head keys):
        the other query heads of the group keep the shared keys.
        """
        return k

    def on_scores(
        self, ctx: HookContext, scores: Float[Tensor, "batch head query key"]
    ) -> Float[Tensor, "batch head query key"]:
        """Edit the masked attention scores (logits), before the softmax."""
        return scores

    def on_pattern(
        self, ctx: HookContext, pattern: Float[Tensor, "batch head query key"]
    ) -> Float[Tensor, "batch head query key"]:
        """Edit the attention pattern, after the softmax."""
        return pattern

    def on_z(
        self, ctx: HookContext, z: Float[Tensor, "batch pos head d_head"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Edit the head outputs z, before the output projection W_O."""
        return z

    def diagonal_changes(self) -> tuple[DiagonalChange, ...]:
        """Return the changes of attention diagonals that equal `on_scores` and `on_pattern`.

        The fused engine applies these changes without forming the attention matrix. Empty (the
        default) where `on_scores` or `on_pattern` does anything else, and so needs the matrix.
        """
        return ()

    @property
    def needs_matrix(self) -> bool:
        """Whether the edit needs the attention matrix, beyond what `diagonal_changes` describes.

        Also True where a subclass overrides `on_scores` or `on_pattern` but inherits
        `diagonal_changes`, which then describes the parent class only.
        """
        overrides = [f"on_{stage}" for stage in ("scores", "pattern") if stage in self.stages()]
        if not overrides:
            return False

        def depth(name: str) -> int:
            return next(i for i, cls in enumerate(type(self).__mro__) if name in vars(cls))

        return not self.diagonal_changes() or depth("diagonal_changes") > min(map(depth, overrides))

    @property
    def acts_on_qk(self) -> bool:
        """Whether the edit changes queries or keys, which must then be readable."""
        return not {"query_input", "key_input", "query", "key"}.isdisjoint(self.stages())

    @property
    def uses_per_head_keys(self) -> bool:
        """Whether the edit changes keys, so that its heads get keys of their own."""
        return not {"key_input", "key"}.isdisjoint(self.stages())

    def stages(self) -> dict[str, Callable[[HookContext, Tensor], Tensor]]:
        """Return the hook methods that this edit overrides, by stage, in the order they fire."""
        return {
            stage: getattr(self, f"on_{stage}")
            for stage in STAGES
            if getattr(type(self), f"on_{stage}") is not getattr(Edit, f"on_{stage}")
        }

    def _repr_html_(self) -> str:
        return display.html(self)

    def __str__(self) -> str:
        first, *others = dataclasses.fields(self)
        parts = [_as_text(getattr(self, first.name))]
        for other in others:
            value = getattr(self, other.name)
            if other.default is dataclasses.MISSING or value != other.default:
                parts.append(f"{other.name}={_as_text(value)}")
        return f"{type(self).__name__}({', '.join(parts)})"

    __repr__ = __str__


def finite_number(edit: str, field: str, value: Any) -> float:
    """Return `value` as a float; raise EditError unless it is a finite number (up to 1e30)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= 1e30:
        raise EditError(f"{edit}: {field} must be a finite number; got {str(value)[:40]}")
    return float(value)


def _as_text(value: Any) -> str:
    """Return the text that `parse_edit` reads back as `value`; a 1-tuple without parentheses."""
    if isinstance(value, tuple):
        if len(value) == 1:
            return _as_text(value[0])
        first = value[0]
        if (
            len(value) > 3
            and isinstance(first, int)
            and value == (*range(first, first + len(value)),)
        ):
            return f"range({first}, {first + len(value)})"
        return f"({', '.join(_as_text(member) for member in value)})"
    if callable(value):
        # Not its repr, whose memory address differs from one process to the next.
        return f"<{getattr(value, '__qualname__', type(value).__name__)}>"
    return repr(value)
