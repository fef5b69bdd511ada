"""The attention mask and the keys that the fused engine gives to TransformerLens' attention code.

Both look like tensors to that code. They let the engine see the operations that would form a
query × key matrix: adding the mask to the scores, and multiplying queries with keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import FusedError
from ..maths.attention.mask import Mask

#: Part of error messages: what to do where the fused engine does not form a matrix.
ALTERNATIVES = (
    "run outside slashpatch.fused, where TransformerLens forms the matrix; or read diagonals with "
    "slashpatch.scan or SlashMonitor, which work in both engines"
)


class MaskArgument:
    """The attention mask that Transformers passes to each layer while the fused engine runs.

    It stands for the mask's rule. A layer that must form its attention matrix adds it to the
    scores, and then gets the matrix that Transformers' "eager" attention would use.
    """

    ndim = 4

    def __init__(self, mask: Mask, dtype: torch.dtype) -> None:
        self.mask = mask
        self.dtype = dtype
        self.device = mask.device
        self.shape = torch.Size([mask.batch, 1, mask.n_queries, mask.n_keys])
        self._matrix: Tensor | None = None

    def is_floating_point(self) -> bool:
        """Return True: the mask that this stands for has zeros and the dtype's lowest number."""
        return True

    def to(self, *args: Any, **kwargs: Any) -> MaskArgument:
        """Return the mask itself; `matrix` takes the dtype of the scores."""
        return self

    def matrix(self, like: Tensor) -> Float[Tensor, "batch 1 query key"]:
        """Return the mask's matrix: 0 where a key may be read, else the dtype's lowest number.

        In the dtype and on the device of `like`, which are those of the layer's scores.
        """
        dtype = like.dtype
        if self._matrix is None or self._matrix.dtype != dtype:
            rows = torch.arange(self.mask.n_queries, device=self.device)
            columns = torch.arange(self.mask.n_keys, device=self.device)
            allowed = self.mask.at(rows[None, None, :, None], columns[None, None, None])
            zero = torch.zeros((), dtype=dtype, device=self.device)
            self._matrix = torch.where(allowed, zero, torch.finfo(dtype).min)
        return self._matrix.to(like.device)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Tensor:
        if is_function(func, "add") and len(args) == 2 and isinstance(args[0], Tensor):
            return args[0] + args[1].matrix(args[0])
        raise FusedError(
            f"the fused engine cannot apply {function_name(func)} to an attention mask; "
            f"{ALTERNATIVES}"
        )


class Keys(Tensor):
    """Keys whose matrix product with queries is not computed.

    The product calls `scores(queries, keys)` instead and returns its result, a stand-in for the
    scores. All other operations work as usual, and tensors made from these keys are `Keys` too.
    """

    scores: Callable[[Tensor, Tensor], Any] | None = None

    @classmethod
    def mark(cls, k: Tensor, scores: Callable[[Tensor, Tensor], Any]) -> Keys:
        """Return the same keys as `Keys`, with `scores` called in place of their product."""
        marked = k.as_subclass(cls)
        marked.scores = scores
        return marked

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_function(func, "matmul") and len(args) == 2 and isinstance(args[1], Keys):
            if args[1].scores is None:
                raise FusedError(
                    "an operation between the KV cache and the scores returned keys that the fused "
                    f"engine cannot follow; {ALTERNATIVES}"
                )
            return args[1].scores(args[0], args[1].as_subclass(Tensor).mT)
        result = super().__torch_function__(func, types, args, kwargs or {})
        source = next((arg for arg in args if isinstance(arg, Keys)), None)
        if isinstance(result, Keys) and source is not None:
            result.scores = source.scores
        return result


def function_name(func: Any) -> str:
    """Return the name of a torch function."""
    return str(getattr(func, "__name__", func))


def is_function(func: Any, name: str) -> bool:
    """Return whether a torch function has a name, also as an operator such as `__add__`."""
    return function_name(func) in (name, f"__{name}__", f"__r{name}__")
