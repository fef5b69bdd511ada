"""The mask and the keys that TransformerLens' attention code meets in the fused engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import FusedError
from ..maths.attention.mask import Mask

#: How to get at what the fused engine does not form.
WAYS_OUT = (
    "run outside slashpatch.fused, where TransformerLens forms the matrix; or read diagonals with "
    "slashpatch.scan or SlashMonitor, which work in both engines"
)


class MaskArgument:
    """What Transformers hands to each layer as its attention mask, under our own name for masks.

    A layer that runs on real matrices gets the mask that the "eager" attention would have had.
    """

    ndim = 4

    def __init__(self, mask: Mask, dtype: torch.dtype) -> None:
        self.mask = mask
        self.dtype = dtype
        self.device = mask.device
        self.shape = torch.Size([mask.batch, 1, mask.n_queries, mask.n_keys])
        self._matrix: Tensor | None = None

    def is_floating_point(self) -> bool:
        """As a mask of zeros and lowest numbers is."""
        return True

    def to(self, *args: Any, **kwargs: Any) -> MaskArgument:
        """Itself: layers ask for their scores' dtype or device."""
        return self

    def matrix(self, dtype: torch.dtype) -> Float[Tensor, "batch 1 query key"]:
        """0 where a key may be read, else the dtype's lowest number."""
        if self._matrix is None or self._matrix.dtype != dtype:
            rows = torch.arange(self.mask.n_queries, device=self.device)
            columns = torch.arange(self.mask.n_keys, device=self.device)
            allowed = self.mask.at(rows[None, None, :, None], columns[None, None, None])
            zero = torch.zeros((), dtype=dtype, device=self.device)
            self._matrix = torch.where(allowed, zero, torch.finfo(dtype).min)
        return self._matrix

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Tensor:
        if _is(func, "add") and len(args) == 2 and isinstance(args[0], Tensor):
            return args[0] + args[1].matrix(args[0].dtype)
        raise FusedError(f"the fused engine does not know {_named(func)} on an attention mask")


class Keys(Tensor):
    """Keys whose product with queries is noted and not formed; anything else is done as usual.

    What is made of them are such keys too. `scores` says what becomes of the product.
    """

    scores: Callable[[Tensor, Tensor], Any] | None = None

    @classmethod
    def mark(cls, k: Tensor, scores: Callable[[Tensor, Tensor], Any]) -> Keys:
        """The same keys, marked."""
        marked = k.as_subclass(cls)
        marked.scores = scores
        return marked

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _is(func, "matmul") and len(args) == 2 and isinstance(args[1], Keys):
            if args[1].scores is None:
                raise FusedError(
                    f"the fused engine lost track of keys that went through another operation; "
                    f"{WAYS_OUT}"
                )
            return args[1].scores(args[0], args[1].as_subclass(Tensor).mT)
        made = super().__torch_function__(func, types, args, kwargs or {})
        source = next((arg for arg in args if isinstance(arg, Keys)), None)
        if isinstance(made, Keys) and source is not None:
            made.scores = source.scores
        return made


def _named(func: Any) -> str:
    return str(getattr(func, "__name__", func))


def _is(func: Any, name: str) -> bool:
    """Whether a torch function is `name` in one of its spellings."""
    return _named(func) in (name, f"__{name}__", f"__r{name}__")
