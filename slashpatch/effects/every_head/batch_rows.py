"""Restrict an edit to some rows of a batch, so that several edits share one forward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...bridge import ModelInfo
from ...edits import Edit, HookContext

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True, repr=False)
class OnRows(Edit):
    """Apply `edit` to rows `start` to `stop` of the batch only.

    Not for edits that use per-head keys, which are stored for all rows of the batch together.
    """

    edit: Edit
    start: int
    stop: int

    def validate(self, info: ModelInfo) -> None:
        """Check the wrapped edit against the model."""
        self.edit.validate(info)

    def prepare(self, model: TransformerBridge, info: ModelInfo) -> dict[int, Any]:
        """Return the wrapped edit's state by layer."""
        return self.edit.prepare(model, info)

    def stages(self) -> dict[str, Callable[[HookContext, Tensor], Tensor]]:
        """Return the wrapped edit's hooks, restricted to these rows of the batch."""
        return {stage: partial(self._act, act) for stage, act in self.edit.stages().items()}

    def _act(
        self, act: Callable[[HookContext, Tensor], Tensor], ctx: HookContext, x: Tensor
    ) -> Tensor:
        rows = slice(self.start, self.stop)
        whole = x.clone()
        whole[rows] = act(replace(ctx, call=ctx.call.of_rows(rows)), x[rows]).to(x.dtype)
        return whole
