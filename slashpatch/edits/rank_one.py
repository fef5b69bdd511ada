"""Project a head's queries and keys to rank one: what all tokens share stays, the rest goes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..bridge import ModelInfo
from ..errors import EditError, PatchError
from ..heads import heads
from ..maths.rank import basis as leading
from ..maths.rank import project
from .base import Edit, HookContext
from .basis import Basis

_OF = ("qk", "q", "k")


@dataclass(frozen=True, repr=False)
class RankOne(Edit):
    """Project pre-RoPE queries and keys onto their leading direction, tokens × d_head, uncentred.

    Keeps what the paper's first condition says makes the slash, and removes what tokens do not
    share. Give it before edits of frequencies: those turn tokens by their positions. Without a
    basis it is each prompt's own leading direction, which later tokens would change: in generation
    give a basis fitted by `fit_rank_one` (without a KV cache each step is a pass of its own, and
    refits).

    Attributes:
        of: "qk", "q" or "k".
        basis: None, a Basis, or the file of one.
        rank: How many directions to keep; with a basis, of those that it has.
    """

    of: str = "qk"
    basis: Any = None
    rank: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.of not in _OF:
            raise EditError(f"RankOne: of is one of {', '.join(_OF)}; got {self.of!r}")
        if isinstance(self.basis, (str, os.PathLike)):
            object.__setattr__(self, "basis", Basis.load(self.basis))
        if self.basis is not None and not isinstance(self.basis, Basis):
            raise EditError(f"RankOne: basis is None, a Basis or its file; got {self.basis!r}")
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise EditError(f"RankOne: rank is an integer from 1; got {self.rank!r}")

    def validate(self, info: ModelInfo) -> None:
        """Raise if the model lacks a head, or the basis one of the heads, or its width."""
        super().validate(info)
        if self.rank > info.d_head:
            raise EditError(f"{self}: rank is at most d_head = {info.d_head}")
        if self.basis is None:
            return
        missing = [str(head) for head in heads(self.heads) if head not in self.basis.heads]
        if missing:
            raise EditError(
                f"{self}: the basis was fitted for {', '.join(map(str, self.basis.heads))}, "
                f"not for {', '.join(missing)}"
            )
        if self.basis.q.shape[1] != info.d_head:
            raise EditError(
                f"{self}: the basis has width {self.basis.q.shape[1]} and the heads {info.d_head}"
            )
        if self.rank > self.basis.q.shape[2]:
            raise EditError(f"{self}: the basis has {self.basis.q.shape[2]} directions a head")

    def stages(self) -> dict[str, Any]:
        """The query, the key, or both."""
        found = super().stages()
        wanted = {"qk": ("query", "key"), "q": ("query",), "k": ("key",)}[self.of]
        return {stage: act for stage, act in found.items() if stage in wanted}

    def on_query(
        self, ctx: HookContext, q: Float[Tensor, "batch pos head d_head"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Queries projected."""
        return self._projected(ctx, q, "q")

    def on_key(
        self, ctx: HookContext, k: Float[Tensor, "batch pos head d_head"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Keys projected."""
        return self._projected(ctx, k, "k")

    def _projected(self, ctx: HookContext, x: Tensor, part: str) -> Tensor:
        if self.basis is not None:
            return project(x, self.basis.of(ctx.layer, ctx.heads, part)[..., : self.rank])
        if ctx.call.past:
            raise PatchError(
                f"{self} has no basis: each prompt's own would change as tokens arrive. Fit one "
                "with slashpatch.fit_rank_one and pass it as basis="
            )
        wide = x.double()
        if ctx.call.real is not None:
            wide = wide * ctx.call.real.to(x.device)[:, :, None, None]
        gram = torch.einsum("bphd,bphe->bhde", wide, wide)
        return project(x, leading(gram, self.rank)[:, None])
