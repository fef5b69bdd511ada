"""Leading directions of pre-RoPE queries and keys, fitted on prompts."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from .. import bridge
from ..bridge.provenance import provenance
from ..data.files import load_tensors, save_tensors
from ..data.prompts import prompt_set
from ..errors import EditError
from ..heads import Head, HeadsLike, heads
from ..maths.rank import basis as leading

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


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
    info = bridge.read(model)
    chosen = tuple(sorted(info.require(wanted)))
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= info.d_head:
        raise EditError(f"rank is an integer from 1 to {info.d_head}; got {rank!r}")
    from ..bridge.attached import has_per_head_keys

    if has_per_head_keys(model):
        raise EditError("active edits give heads keys of their own; fit outside of them")
    layers = bridge.read(model).qk
    found = prompt_set(model, prompts, n_prompts=n_prompts, max_tokens=max_tokens, seed=seed)
    grams = {
        (head, part): torch.zeros(info.d_head, info.d_head, dtype=torch.float64)
        for head in chosen
        for part in "qk"
    }
    group = info.n_heads // info.n_kv_heads

    def accumulate(part: str, layer: int) -> Any:
        layout = getattr(layers[layer], part)

        def hook_fn(tensor: Tensor, hook: Any) -> None:
            rows = layout.read(tensor.detach())
            rows = layers[layer].unrotate(layout, rows, torch.arange(rows.shape[1])[None])
            for head in (head for head in chosen if head.layer == layer):
                column = head.head if part == "q" else head.head // group
                x = rows[:, :, column].flatten(0, 1).cpu().double()
                grams[head, part] += x.T @ x

        return layout.name, hook_fn

    hooks = [accumulate(part, layer) for layer in {h.layer for h in chosen} for part in "qk"]
    with torch.no_grad():
        for tokens in found.tokens:
            bridge.run_for_hooks(model, tokens[None].to(model.cfg.device), hooks)
    q, k = (torch.stack([leading(grams[head, part], rank) for head in chosen]) for part in "qk")
    details = {"prompts": [{"source": found.source, "digest": found.digest}], "seed": seed}
    return Basis(chosen, q, k, provenance(model, **details))
