"""Leading directions of heads' pre-RoPE queries and keys, fitted on prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from .. import bridge
from ..bridge.attached import has_per_head_keys
from ..bridge.provenance import provenance
from ..data.heads import Head, HeadsLike, heads
from ..data.prompts import prompt_set
from ..errors import EditError
from ..maths.rank import basis as leading
from .fitted import Fitted

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True, eq=False, repr=False)
class Basis(Fitted):
    """Orthonormal leading directions of some heads' pre-RoPE queries and keys.

    Two bases are equal when their heads and directions are equal.

    Attributes:
        heads: The query heads, ascending.
        q: Directions of the queries of each head.
        k: Directions of the keys of each head; heads of one KV group have the same.
        provenance: Model, prompts, seed and versions of the fit.
        path: Files that the basis was loaded from or saved to; an edit that uses the basis prints
            as the last of them.
    """

    WHAT: ClassVar[str] = "basis"
    FORMAT: ClassVar[str] = "slashpatch-basis-1"

    heads: tuple[Head, ...]
    q: Float[Tensor, "head d_head rank"]
    k: Float[Tensor, "head d_head rank"]

    def header(self) -> dict[str, Any]:
        """Return the names of the heads."""
        return {"heads": [str(head) for head in self.heads]}

    def tensors(self) -> dict[str, Tensor]:
        """Return the directions of queries and keys."""
        return {"q": self.q, "k": self.k}

    @classmethod
    def build(cls, header: dict[str, Any], tensors: dict[str, Tensor], **more: Any) -> Basis:
        """Return the basis of a file. Raises EditError if its directions are not orthonormal."""
        basis = cls(heads(header["heads"]), tensors["q"], tensors["k"], **more)
        basis._validate()
        return basis

    def of(self, layer: int, wanted: list[int], part: str) -> Tensor:
        """Return the directions [head, d_head, rank] of these heads of a layer.

        `part` is "q" or "k".
        """
        rows = [self.heads.index(Head(layer, head)) for head in wanted]
        return (self.q if part == "q" else self.k)[rows]

    def _validate(self) -> None:
        """Raise EditError unless there are orthonormal directions for each head."""
        identity = torch.eye(self.q.shape[-1], dtype=torch.float64)
        valid = (
            self.q.ndim == 3
            and self.q.shape == self.k.shape
            and len(self.heads) == len(self.q)
            and all(
                bool(((part.double().mT @ part.double()) - identity).abs().max() < 1e-4)
                for part in (self.q, self.k)
            )
        )
        if not valid:
            raise EditError(
                "shapes of heads, q and k do not agree, or directions are not orthonormal"
            )


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
    """Fit the leading directions of some heads' pre-RoPE queries and keys on prompts.

    The right singular vectors of the uncentred tokens × d_head matrices, over the tokens of all
    prompts. The model is run as it is, active patches included. Pass the basis to
    `RankOne(heads, basis=...)`.

    Args:
        model: A TransformerBridge in evaluation mode.
        wanted: Query heads.
        prompts: As for `scan`; None: natural text.
        rank: Number of directions per head, from 1 to d_head.
        n_prompts: Number of prompts.
        max_tokens: Length of each prompt, as for `scan`.
        seed: Random seed of the prompts.

    Raises:
        EditError: A rank outside 1 to d_head, or active edits that use per-head keys.
        HeadError: Heads that the model does not have.
        PromptError: Prompts that are empty or longer than the context.
        ModelError: A model whose queries and keys cannot be read.
    """
    info = bridge.read(model)
    chosen = tuple(sorted(info.require(wanted)))
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= info.d_head:
        raise EditError(f"rank must be an integer from 1 to {info.d_head}; got {rank!r}")
    if has_per_head_keys(model):
        raise EditError(
            "the model has active edits that use per-head keys, whose keys no hook carries; leave "
            "their patches before fitting a basis"
        )
    layers = info.qk
    fitted_on = prompt_set(model, prompts, n_prompts=n_prompts, max_tokens=max_tokens, seed=seed)
    grams = {
        (head, part): torch.zeros(info.d_head, info.d_head, dtype=torch.float64)
        for head in chosen
        for part in "qk"
    }
    group = info.n_heads // info.n_kv_heads

    def accumulate(part: str, layer: int) -> Any:
        layout = getattr(layers[layer], part)

        def hook_fn(tensor: Tensor, hook: Any) -> None:
            all_heads = layout.read(tensor.detach())
            positions = torch.arange(all_heads.shape[1])[None]
            all_heads = layers[layer].unrotate(layout, all_heads, positions)
            for head in (head for head in chosen if head.layer == layer):
                column = head.head if part == "q" else head.head // group
                x = all_heads[:, :, column].flatten(0, 1).cpu().double()
                grams[head, part] += x.T @ x

        return layout.name, hook_fn

    hooks = [accumulate(part, layer) for layer in {h.layer for h in chosen} for part in "qk"]
    with torch.no_grad():
        for tokens in fitted_on.tokens:
            bridge.run_for_hooks(model, tokens[None].to(model.cfg.device), hooks)
    q, k = (torch.stack([leading(grams[head, part], rank) for head in chosen]) for part in "qk")
    details = {"prompts": [{"source": fitted_on.source, "digest": fitted_on.digest}], "seed": seed}
    return Basis(chosen, q, k, provenance=provenance(model, **details))
