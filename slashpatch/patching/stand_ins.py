"""Stand-ins for the attention matrix in TransformerLens' own attention code.

That code multiplies queries with keys, scales, caps and masks the product, takes the softmax and
multiplies with the values: each step is an operation on a query × key matrix. In the fused engine
the matrix is replaced by `Scores` and then `Pattern`, which record these operations and form no
matrix. All other hooks fire as usual, and the product with the values is computed by
`EditedAttention`. Any other operation raises a FusedError that names it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import FusedError
from ..maths.attention.edited import EditedAttention
from ..maths.attention.mask import Mask
from ..maths.diagonals import DiagonalChange
from .mask_and_keys import ALTERNATIVES, MaskArgument, function_name, is_function


class _StandIn:
    """Stands for a [batch, head, query, key] matrix that is not formed."""

    what = "attention matrix"

    def __init__(self, layer: int, like: Tensor, shape: tuple[int, ...]) -> None:
        self.layer = layer
        self.shape = torch.Size(shape)
        self.dtype = like.dtype
        self.device = like.device
        self.ndim = 4

    def detach(self) -> Any:
        """Return itself."""
        return self

    def refused(self, what: str) -> FusedError:
        """Return an error that names the layer, the operation and the alternatives."""
        return FusedError(
            f"the fused engine does not form the {self.what} of layer {self.layer}, so it cannot "
            f"do {what} there; {ALTERNATIVES}"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise self.refused(repr(name))

    def __getitem__(self, index: Any) -> Any:
        raise self.refused("indexing")

    def _no_arithmetic(self, *others: Any) -> Any:
        raise self.refused("arithmetic")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = _no_arithmetic
    __rtruediv__ = __matmul__ = __pow__ = __neg__ = __lt__ = __gt__ = __le__ = _no_arithmetic
    __ge__ = __iter__ = __len__ = __float__ = __setitem__ = _no_arithmetic

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        stand_in = next((arg for arg in args if isinstance(arg, _StandIn)), None)
        if stand_in is None:  # torch.cat has it inside a list
            stand_in = next(part for arg in args for part in arg if isinstance(part, _StandIn))
        return stand_in.apply(func, args, kwargs or {})

    def apply(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record a torch function that was called on the stand-in, or raise FusedError."""
        raise self.refused(function_name(func))


class _RowMaximum:
    """Stands for each row's largest score, whose subtraction before a softmax changes nothing."""

    values: Any

    def __init__(self) -> None:
        self.values = self


class Scores(_StandIn):
    """Stands for the scores; records how they are scaled, soft-capped and masked.

    `on_output` is called with the attention once its output has been computed.
    """

    what = "scores"

    def __init__(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        on_output: Callable[[EditedAttention], None],
    ) -> None:
        super().__init__(layer, q, (*q.shape[:3], k.shape[-2]))
        self._q, self._k, self._v = q, k, v
        self._on_output = on_output
        self._scale, self._cap = 1.0, 1.0
        self._capped = False
        self._mask: Mask | None = None
        self._attention: EditedAttention | None = None

    def __mul__(self, factor: Any) -> Scores:
        if isinstance(factor, Tensor) and factor.numel() == 1:
            factor = factor.item()
        if not isinstance(factor, (int, float)) or self._mask is not None:
            raise self.refused(f"a multiplication by {_shown(factor)}")
        if self._capped:
            self._cap *= factor
        else:
            self._scale *= factor
        return self

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> Scores:
        return self * (1 / divisor)

    def __add__(self, mask: Any) -> Scores:
        if not isinstance(mask, MaskArgument) or self._mask is not None:
            raise self.refused(
                f"the addition of {_shown(mask)} (a bias, an attention mask of your own making, or "
                "a mask made after the model's attention implementation was changed inside fused)"
            )
        self._mask = mask.mask
        return self

    def __sub__(self, other: Any) -> Scores:
        if not isinstance(other, _RowMaximum):
            raise self.refused(f"the subtraction of {_shown(other)}")
        return self

    def to(self, *args: Any, **kwargs: Any) -> Scores:
        """Return itself: logits are computed in float32 or wider."""
        return self

    def max(self, *args: Any, **kwargs: Any) -> _RowMaximum:
        """Return a stand-in for each row's maximum, which code with attention sinks subtracts."""
        return _RowMaximum()

    def apply(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record tanh (soft-capping), the concatenation with sinks, or the softmax."""
        if is_function(func, "tanh") and not self._capped and self._mask is None:
            self._capped = True
            return self
        if is_function(func, "cat") and len(args[0]) == 2 and args[0][0] is self:
            sink = args[0][1]
            if sink.shape[-1] == 1 and kwargs.get("dim", args[1] if len(args) > 1 else 0) == -1:
                self.attention.set_sinks(sink[0, :, 0, 0])
                return self
        if is_function(func, "softmax"):
            return Pattern(self.layer, self._q, self.shape, self.attention, self._on_output)
        raise self.refused(function_name(func))

    @property
    def attention(self) -> EditedAttention:
        """The attention with these scores. Raises FusedError before they are masked."""
        if self._attention is None:
            if self._mask is None:
                raise self.refused("a softmax without a causal mask")
            self._attention = EditedAttention(
                self._q, self._k, self._v, self._mask, self._scale,
                self._cap if self._capped else None,
            )  # fmt: skip
        return self._attention

    def slash_rows(self, offsets: Tensor) -> Float[Tensor, "batch head query offset"]:
        """Return logits i → i−Δ; −inf where there is no key to read."""
        return self.attention.logits(offsets.tolist())

    def logit_sums(
        self, n_offsets: int, real: Bool[Tensor, "batch key"]
    ) -> Float[Tensor, "batch head offset"] | None:
        """Return the sum of logits i → i−Δ over real (unpadded) tokens, for Δ < n_offsets.

        None where that is not known without `slash_rows`.
        """
        return self.attention.logit_sums(n_offsets, real)


class Pattern(_StandIn):
    """Stands for the attention pattern, after the softmax."""

    what = "pattern"

    def __init__(
        self,
        layer: int,
        like: Tensor,
        shape: tuple[int, ...],
        attention: EditedAttention,
        on_output: Callable[[EditedAttention], None],
    ) -> None:
        super().__init__(layer, like, shape)
        self._attention: EditedAttention | None = attention
        self._on_output = on_output

    @property
    def attention(self) -> EditedAttention:
        """The attention with this pattern. Raises FusedError after the product with the values."""
        if self._attention is None:
            raise self.refused("anything after the forward pass")
        return self._attention

    def to(self, *args: Any, **kwargs: Any) -> Pattern:
        """Return itself."""
        return self

    def __getitem__(self, index: Any) -> Pattern:
        if index == (..., slice(None, -1, None)) and self.attention.sinks is not None:
            return self  # drops the column of the sink
        raise self.refused("indexing")

    def apply(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute the product with the values; ignore dropout in evaluation mode."""
        if is_function(func, "matmul") and args[0] is self:
            attention, self._attention = self.attention, None
            out = attention.output()
            self._on_output(attention)
            return out
        if is_function(func, "dropout") and not kwargs.get("training", True):
            return self
        raise self.refused(function_name(func))

    def slash_rows(self, offsets: Tensor) -> Float[Tensor, "batch head query offset"]:
        """Return attention i → i−Δ; 0 where there is no key to read."""
        return self.attention.weights(offsets.tolist())

    def slash_sums(
        self, offsets: Sequence[int], rows: Bool[Tensor, "batch query"]
    ) -> Float[Tensor, "batch head offset"]:
        """Return the sum of attention i → i−Δ over the queries where `rows` is True."""
        return self.attention.weight_sums(offsets, rows)

    def pattern_blocks(
        self, heads: Sequence[int]
    ) -> Iterator[tuple[int, Float[Tensor, "batch head row key"]]]:
        """Yield blocks of rows of some heads' pattern, each with the key of its first column."""
        return self.attention.pattern_blocks(heads)


def record_changes(
    matrix: Scores | Pattern, heads: Sequence[int], changes: Sequence[DiagonalChange]
) -> Scores | Pattern:
    """Record changes of some heads' diagonals on a stand-in, and return it."""
    stage = "scores" if isinstance(matrix, Scores) else "pattern"
    for change in changes:
        if change.stage == stage:
            matrix.attention.change(heads, change)
    return matrix


def _shown(value: Any) -> str:
    """Return a value's type, and its shape if it has one."""
    shape = getattr(value, "shape", None)
    return type(value).__name__ + ("" if shape is None else f" {list(shape)}")
