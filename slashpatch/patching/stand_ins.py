"""Stand-ins for the attention matrix in TransformerLens' own attention code.

TransformerLens multiplies queries with keys, scales, caps, masks, takes the softmax and multiplies
with the values, each step an operation on a query × key matrix. Here those operations meet objects
that note what is asked and form no matrix: the same code runs, every other hook fires where it
always does, and the product with the values comes from `EditedAttention`. An operation that is not
among these is refused by name, so nothing is passed over in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import FusedError
from ..maths.attention.edited import EditedAttention
from ..maths.attention.mask import Mask
from ..maths.diagonals import DiagonalChange
from .markers import WAYS_OUT, MaskArgument, _is, _named


class _Symbol:
    """A query × key matrix that is not there."""

    what = "attention matrix"

    def __init__(self, layer: int, like: Tensor, shape: tuple[int, ...]) -> None:
        self.layer = layer
        self.shape = torch.Size(shape)
        self.dtype = like.dtype
        self.device = like.device
        self.ndim = 4

    def detach(self) -> Any:
        """Itself."""
        return self

    def refused(self, what: str) -> FusedError:
        """An error that names the layer, the operation and the ways out."""
        return FusedError(
            f"the fused engine does not form the {self.what} of layer {self.layer}, so it cannot "
            f"do {what} there; {WAYS_OUT}"
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
        symbol = next((arg for arg in args if isinstance(arg, _Symbol)), None)
        if symbol is None:  # inside a list: torch.cat
            symbol = next(one for arg in args for one in arg if isinstance(one, _Symbol))
        return symbol.apply(func, args, kwargs or {})

    def apply(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A torch function that was called on this."""
        raise self.refused(_named(func))


class _RowMaximum:
    """What TransformerLens subtracts before a softmax with sinks; it changes nothing there."""

    values: Any

    def __init__(self) -> None:
        self.values = self


class Scores(_Symbol):
    """Logits of every query and key: notes how they are scaled, capped and masked."""

    what = "scores"

    def __init__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, done: Callable[[EditedAttention], None]
    ) -> None:
        super().__init__(layer, q, (*q.shape[:3], k.shape[-2]))
        self._q, self._k, self._v = q, k, v
        self._done = done
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
                f"the addition of {_shown(mask)} (a bias, an attention "
                "mask of your own making, or the model's attention set anew inside fused)"
            )
        self._mask = mask.mask
        return self

    def __sub__(self, other: Any) -> Scores:
        if not isinstance(other, _RowMaximum):
            raise self.refused(f"the subtraction of {_shown(other)}")
        return self

    def to(self, *args: Any, **kwargs: Any) -> Scores:
        """Itself: sums are kept in float32 or wider."""
        return self

    def max(self, *args: Any, **kwargs: Any) -> _RowMaximum:
        """The largest of each row, for a subtraction that changes nothing."""
        return _RowMaximum()

    def apply(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The functions that attention code calls on scores."""
        if _is(func, "tanh") and not self._capped and self._mask is None:
            self._capped = True
            return self
        if _is(func, "cat") and len(args[0]) == 2 and args[0][0] is self:
            sink = args[0][1]
            if sink.shape[-1] == 1 and kwargs.get("dim", args[1] if len(args) > 1 else 0) == -1:
                self.attention.set_sinks(sink[0, :, 0, 0])
                return self
        if _is(func, "softmax"):
            return Pattern(self.layer, self._q, self.shape, self.attention, self._done)
        raise self.refused(_named(func))

    @property
    def attention(self) -> EditedAttention:
        """The attention that these scores stand for, once they are masked."""
        if self._attention is None:
            if self._mask is None:
                raise self.refused("a softmax without a causal mask")
            self._attention = EditedAttention(
                self._q, self._k, self._v, self._mask, self._scale,
                self._cap if self._capped else None,
            )  # fmt: skip
        return self._attention

    def slash_rows(self, offsets: Tensor) -> Float[Tensor, "batch head query offset"]:
        """Logits i → i−Δ, −inf where there is no key to read."""
        return self.attention.logits(offsets.tolist())

    def logit_sums(
        self, n_offsets: int, real: Bool[Tensor, "batch key"]
    ) -> Float[Tensor, "batch head offset"] | None:
        """Sum of logits i → i−Δ over real tokens, where that is cheaper than `slash_rows`."""
        return self.attention.logit_sums(n_offsets, real)


class Pattern(_Symbol):
    """Attention after the softmax."""

    what = "pattern"

    def __init__(
        self,
        layer: int,
        like: Tensor,
        shape: tuple[int, ...],
        attention: EditedAttention,
        done: Callable[[EditedAttention], None],
    ) -> None:
        super().__init__(layer, like, shape)
        self._attention: EditedAttention | None = attention
        self._done = done

    @property
    def attention(self) -> EditedAttention:
        """The attention that this stands for, until it has met the values."""
        if self._attention is None:
            raise self.refused("anything after the pass")
        return self._attention

    def to(self, *args: Any, **kwargs: Any) -> Pattern:
        """Itself."""
        return self

    def __getitem__(self, index: Any) -> Pattern:
        if index == (..., slice(None, -1, None)) and self.attention.sinks is not None:
            return self  # the sink's column is dropped
        raise self.refused("indexing")

    def apply(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The product with the values; dropout in evaluation mode."""
        if _is(func, "matmul") and args[0] is self:
            attention, self._attention = self.attention, None
            out = attention.output()
            self._done(attention)
            return out
        if _is(func, "dropout") and not kwargs.get("training", True):
            return self
        raise self.refused(_named(func))

    def slash_rows(self, offsets: Tensor) -> Float[Tensor, "batch head query offset"]:
        """Attention i → i−Δ, 0 where there is no key to read."""
        return self.attention.weights(offsets.tolist())

    def slash_sums(
        self, offsets: Sequence[int], rows: Bool[Tensor, "batch query"]
    ) -> Float[Tensor, "batch head offset"]:
        """Sum of attention i → i−Δ over the queries that `rows` names."""
        return self.attention.weight_sums(offsets, rows)


def noted(
    matrix: Scores | Pattern, heads: Sequence[int], changes: Sequence[DiagonalChange]
) -> Scores | Pattern:
    """The same stand-in, with changes of some heads' diagonals noted."""
    stage = "scores" if isinstance(matrix, Scores) else "pattern"
    for change in changes:
        if change.stage == stage:
            matrix.attention.change(heads, change)
    return matrix


def _shown(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ + ("" if shape is None else f" {list(shape)}")
