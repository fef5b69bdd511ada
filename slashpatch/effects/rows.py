"""An edit that acts on some rows of a batch only, so that several edits share one pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..bridge import ModelInfo
from ..edits import Edit, HookContext

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True, repr=False)
class OnRows(Edit):
    """`edit` on rows `start` to `stop` of the batch; the others stay as they are.

    For edits without keys of their own, whose frequencies are kept for all rows together.
    """

    edit: Edit
    start: int
    stop: int

    def validate(self, info: ModelInfo) -> None:
        """As the edit's."""
        self.edit.validate(info)

    def prepare(self, model: TransformerBridge, info: ModelInfo) -> dict[int, Any]:
        """As the edit's."""
        return self.edit.prepare(model, info)

    def stages(self) -> dict[str, Callable[[HookContext, Tensor], Tensor]]:
        """Those of the edit, each for the rows alone."""
        return {stage: partial(self._act, act) for stage, act in self.edit.stages().items()}

    def _act(
        self, act: Callable[[HookContext, Tensor], Tensor], ctx: HookContext, x: Tensor
    ) -> Tensor:
        rows = slice(self.start, self.stop)
        whole = x.clone()
        whole[rows] = act(replace(ctx, call=ctx.call.of_rows(rows)), x[rows]).to(x.dtype)
        return whole
