"""Project heads' queries and keys onto few directions: keep only what the tokens share."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..bridge import ModelInfo
from ..data.heads import heads
from ..errors import EditError, PatchError
from ..maths.rank import basis as leading
from ..maths.rank import project
from .base import Edit, HookContext
from .basis import Basis

_OF = ("qk", "q", "k")


@dataclass(frozen=True, repr=False)
class RankOne(Edit):
    """Project pre-RoPE queries and keys onto their leading direction (or directions).

    The direction is the first right singular vector of the uncentred tokens × d_head matrix. The
    projection keeps what makes the slash by the first condition of arXiv 2601.08297, near rank-one
    queries and keys, and removes what differs from token to token. Attach it before edits of
    frequencies, which rotate queries and keys by their positions.

    Without a basis, the direction is fitted to each prompt in each forward pass. In generation new
    tokens would change it, so a KV cache needs a basis from `fit_rank_one`; without a KV cache each
    step fits the direction again.

    Attributes:
        of: What to project: "qk" (queries and keys), "q" or "k".
        basis: A Basis, the file of one, or None to fit each prompt.
        rank: Number of directions to keep; at most the basis' number of directions.
        along: A Basis (or its file) of as many directions, along which to write the components that
            are kept, each along its counterpart: Σ_r b_r (a_rᵀ x) for the directions a of `basis`
            and b of `along`. None: along `basis` itself. It is a control (*ours*): other
            directions, with sizes and signs as they are.
    """

    of: str = "qk"
    basis: Any = None
    rank: int = 1
    along: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.of not in _OF:
            raise EditError(f"RankOne: of must be one of {', '.join(_OF)}; got {self.of!r}")
        for name in ("basis", "along"):
            given = getattr(self, name)
            if isinstance(given, (str, os.PathLike)):
                object.__setattr__(self, name, Basis.load(given))
            elif given is not None and not isinstance(given, Basis):
                raise EditError(f"RankOne: {name} must be None, a Basis or its file; got {given!r}")
        if self.along is not None and self.basis is None:
            raise EditError("RankOne: along needs a basis, whose components it writes elsewhere")
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise EditError(f"RankOne: rank must be an integer of at least 1; got {self.rank!r}")

    def validate(self, info: ModelInfo) -> None:
        """Raise if the model lacks one of the heads, or the basis does not fit heads or rank."""
        super().validate(info)
        if self.rank > info.d_head:
            raise EditError(f"{self}: rank must be at most d_head = {info.d_head}")
        for name in ("basis", "along"):
            if getattr(self, name) is not None:
                self._require_fit(info, name)

    def _require_fit(self, info: ModelInfo, name: str) -> None:
        """Raise EditError if a basis does not fit the edit's heads, its rank, or the model."""
        basis = getattr(self, name)
        missing = [str(head) for head in heads(self.heads) if head not in basis.heads]
        if missing:
            raise EditError(
                f"{self}: the {name} was fitted for {', '.join(map(str, basis.heads))}, "
                f"not for {', '.join(missing)}"
            )
        if basis.q.shape[1] != info.d_head:
            raise EditError(
                f"{self}: the {name} has d_head {basis.q.shape[1]}, the model {info.d_head}"
            )
        if self.rank > basis.q.shape[2]:
            raise EditError(f"{self}: the {name} has only {basis.q.shape[2]} directions per head")

    def stages(self) -> dict[str, Any]:
        """Return the hooks on queries, on keys, or on both, as `of` says."""
        projected = {"qk": ("query", "key"), "q": ("query",), "k": ("key",)}[self.of]
        return {stage: act for stage, act in super().stages().items() if stage in projected}

    def on_query(
        self, ctx: HookContext, q: Float[Tensor, "batch pos head d_head"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Return the projected queries."""
        return self._projected(ctx, q, "q")

    def on_key(
        self, ctx: HookContext, k: Float[Tensor, "batch pos head d_head"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Return the projected per-head keys."""
        return self._projected(ctx, k, "k")

    def _projected(self, ctx: HookContext, x: Tensor, part: str) -> Tensor:
        """Return x projected onto the basis, or onto each prompt's leading directions."""
        if self.basis is not None:
            kept = self.basis.of(ctx.layer, ctx.heads, part)[..., : self.rank]
            along = kept if self.along is None else self.along.of(ctx.layer, ctx.heads, part)
            return project(x, kept, along[..., : self.rank])
        if ctx.call.past:
            raise PatchError(
                f"{self} has no basis and fits each prompt, which tokens after a KV cache would "
                "change; fit a basis with slashpatch.fit_rank_one and pass it as basis="
            )
        wide = x.double()
        if ctx.call.real is not None:
            wide = wide * ctx.call.real.to(x.device)[:, :, None, None]
        gram = torch.einsum("bphd,bphe->bhde", wide, wide)
        return project(x, leading(gram, self.rank)[:, None])
