"""Project a head's queries and keys to rank one: what all tokens share stays, the rest goes."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from .. import anatomy as anatomies
from .. import rope
from ..errors import EditError, PatchError
from ..files import load_tensors, save_tensors
from ..heads import Head, HeadsLike, heads
from ..prompts import prompt_set
from ..provenance import provenance
from ..rank import basis as leading
from ..rank import project
from .base import Edit, Site

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from ..anatomy import Anatomy

_OF = ("qk", "q", "k")
_FORMAT = "slashpatch-basis-1"


@dataclass(frozen=True, eq=False)
class Basis:
    """Orthonormal directions of some heads' pre-RoPE queries and keys, fitted on prompts.

    Two bases are equal when their heads and directions are. `path` is the file it was saved to or
    loaded from, by which an edit that uses it prints.
    """

    heads: tuple[Head, ...]
    q: Float[Tensor, "head d_head rank"]
    k: Float[Tensor, "head d_head rank"]
    provenance: dict[str, Any]
    path: list[str] = field(default_factory=list)

    @property
    def digest(self) -> str:
        """SHA-256 over heads and directions, first 16 hex digits."""
        sha = hashlib.sha256(str(self.heads).encode())
        for part in (self.q, self.k):
            sha.update(f"{list(part.shape)}".encode())
            sha.update(part.double().contiguous().numpy().tobytes())
        return sha.hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Basis) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return repr(self.path[-1]) if self.path else f"<unsaved basis {self.digest}>"

    def of(self, layer: int, wanted: list[int], part: str) -> Tensor:
        """Directions [head, d_head, rank] of some heads of a layer; `part` is "q" or "k"."""
        rows = [self.heads.index(Head(layer, head)) for head in wanted]
        return (self.q if part == "q" else self.k)[rows]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a .safetensors file, whole or not at all. Raises OutputError or EditError."""
        if Path(path).suffix != ".safetensors":
            raise EditError(f"a basis is saved as .safetensors; got {str(path)!r}")
        header = {
            "format": _FORMAT,
            "heads": [str(head) for head in self.heads],
            "provenance": self.provenance,
        }
        tensors = {"q": self.q.contiguous(), "k": self.k.contiguous()}
        save_tensors(path, header, tensors)
        self.path.append(str(path))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Basis:
        """Read what `save` wrote. Raises EditError for anything else."""

        def build(header: dict[str, Any], tensors: dict[str, Tensor]) -> Basis:
            own, q, k = heads(header["heads"]), tensors["q"], tensors["k"]
            basis = cls(own, q, k, dict(header["provenance"]), [str(path)])
            basis._validate()
            return basis

        found: Basis = load_tensors(path, _FORMAT, build, EditError)
        return found

    def _validate(self) -> None:
        """Raise EditError unless the directions are orthonormal, a set for each head."""
        identity = torch.eye(self.q.shape[-1], dtype=torch.float64)
        fits = (
            self.q.ndim == 3
            and self.q.shape == self.k.shape
            and len(self.heads) == len(self.q)
            and all(
                bool(((part.double().mT @ part.double()) - identity).abs().max() < 1e-4)
                for part in (self.q, self.k)
            )
        )
        if not fits:
            raise EditError("its parts do not fit together, or its directions are not orthonormal")


def fit_rank_one(
    model: TransformerBridge,
    wanted: HeadsLike,
    prompts: Any = None,
    *,
    rank: int = 1,
    n_prompts: int = 8,
    max_tokens: int | None = None,
    seed: int = 0,
) -> Basis:
    """The leading directions of some heads' pre-RoPE queries and keys over prompts, uncentred.

    The model as it is, patches included, the heads' own edits of queries too. Prompts as for
    `scan`. Raises HeadError, PromptError, ModelError, or EditError for a rank outside 1 to d_head.
    """
    anatomy = anatomies.read(model)
    chosen = tuple(sorted(anatomy.require(wanted)))
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= anatomy.d_head:
        raise EditError(f"rank is an integer from 1 to {anatomy.d_head}; got {rank!r}")
    from ..patching import active_edits

    if any("key" in edit.stages() for edit in active_edits(model)):
        raise EditError("active edits give heads keys of their own; fit outside of them")
    layers = rope.read(model)
    found = prompt_set(model, prompts, n_prompts=n_prompts, max_tokens=max_tokens, seed=seed)
    grams = {
        (head, part): torch.zeros(anatomy.d_head, anatomy.d_head, dtype=torch.float64)
        for head in chosen
        for part in "qk"
    }
    group = anatomy.n_heads // anatomy.n_kv_heads

    def accumulate(part: str, layer: int) -> Any:
        layout = getattr(layers[layer], part)

        def hook_fn(tensor: Tensor, hook: Any) -> None:
            rows = layout.read(tensor.detach(), anatomy.d_head)
            rows = layers[layer].turned_back(layout, rows, torch.arange(rows.shape[1])[None])
            for head in (head for head in chosen if head.layer == layer):
                column = head.head if part == "q" else head.head // group
                x = rows[:, :, column].flatten(0, 1).cpu().double()
                grams[head, part] += x.T @ x

        return layout.name, hook_fn

    hooks = [accumulate(part, layer) for layer in {h.layer for h in chosen} for part in "qk"]
    with torch.no_grad():
        for tokens in found.tokens:
            anatomies.run_for_attention(model, tokens[None].to(model.cfg.device), None, hooks)
    q, k = (torch.stack([leading(grams[head, part], rank) for head in chosen]) for part in "qk")
    details = {"prompts": [{"source": found.source, "digest": found.digest}], "seed": seed}
    return Basis(chosen, q, k, provenance(model, **details))


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

    def validate(self, anatomy: Anatomy) -> None:
        """Raise if the model lacks a head, or the basis one of the heads, or its width."""
        super().validate(anatomy)
        if self.rank > anatomy.d_head:
            raise EditError(f"{self}: rank is at most d_head = {anatomy.d_head}")
        if self.basis is None:
            return
        missing = [str(head) for head in heads(self.heads) if head not in self.basis.heads]
        if missing:
            raise EditError(
                f"{self}: the basis was fitted for {', '.join(map(str, self.basis.heads))}, "
                f"not for {', '.join(missing)}"
            )
        if self.basis.q.shape[1] != anatomy.d_head:
            raise EditError(
                f"{self}: the basis has width {self.basis.q.shape[1]} and the heads "
                f"{anatomy.d_head}"
            )
        if self.rank > self.basis.q.shape[2]:
            raise EditError(f"{self}: the basis has {self.basis.q.shape[2]} directions a head")

    def stages(self) -> dict[str, Any]:
        """The query, the key, or both."""
        found = super().stages()
        wanted = {"qk": ("query", "key"), "q": ("query",), "k": ("key",)}[self.of]
        return {stage: act for stage, act in found.items() if stage in wanted}

    def on_query(
        self, site: Site, q: Float[Tensor, "batch pos head d_head"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Queries projected."""
        return self._projected(site, q, "q")

    def on_key(
        self, site: Site, k: Float[Tensor, "batch pos head d_head"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Keys projected."""
        return self._projected(site, k, "k")

    def _projected(self, site: Site, x: Tensor, part: str) -> Tensor:
        if self.basis is not None:
            return project(x, self.basis.of(site.layer, site.heads, part)[..., : self.rank])
        if site.call.past:
            raise PatchError(
                f"{self} has no basis: each prompt's own would change as tokens arrive. Fit one "
                "with slashpatch.fit_rank_one and pass it as basis="
            )
        wide = x.double()
        if site.call.real is not None:
            wide = wide * site.call.real.to(x.device)[:, :, None, None]
        gram = torch.einsum("bphd,bphe->bhde", wide, wide)
        return project(x, leading(gram, self.rank)[:, None])
