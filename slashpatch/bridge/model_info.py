"""What slashpatch has verified of one model: sizes, hook names, queries, keys and rotation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..data.heads import Head, HeadsLike, heads, require_heads
from ..errors import OffsetError
from ..maths.offsets import as_offsets
from .projections import LayerProjections
from .qk import LayerQK

_HOOKS = {
    "block": "hook_in",
    "input": "attn.hook_in",
    "cos": "attn.hook_cos",
    "sin": "attn.hook_sin",
    "scores": "attn.hook_attn_scores",
    "pattern": "attn.hook_pattern",
    "v": "attn.v.hook_out",
    "z": "attn.hook_z",
    "output": "hook_attn_out",
    "mlp": "mlp.hook_out",
    "block_output": "hook_out",
}


@dataclass(frozen=True)
class ModelInfo:
    """What slashpatch has verified of one model. All layers have the same heads.

    Attributes:
        n_kv_heads: Key heads of each layer; fewer than `n_heads` under grouped-query attention.
        d_head: Width of a head.
        n_ctx: Longest prompt, in tokens.
        d_vocab: Size of the vocabulary.
        saving: Which arguments that save work (`logits_to_keep`, `use_cache`) its forward takes.
        rope_follows_length: Whether RoPE's frequencies depend on the prompt's length (dynamic NTK,
            LongRoPE).
        read_qk: Reads `qk` from the model; `read_projections` reads `projections`.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    n_ctx: int
    d_vocab: int
    saving: tuple[str, ...] = ()
    rope_follows_length: bool = False
    read_qk: Callable[[], tuple[LayerQK, ...]] | None = field(
        default=None, repr=False, compare=False
    )
    read_projections: Callable[[], tuple[LayerProjections, ...]] | None = field(
        default=None, repr=False, compare=False
    )

    def hook(self, layer: int, site: str) -> str:
        """Return the hook point name of a site in `layer`.

        Sites: the `block`'s input; the attention's `input`, `cos`, `sin`, `v`, `scores`, `pattern`,
        `z` and `output`; the `mlp`'s output, and the `block_output`. Those of queries and keys
        differ from family to family: see `qk`.
        """
        return f"blocks.{layer}.{_HOOKS[site]}"

    def hooks(self, site: str) -> list[str]:
        """Return the hook point names of a site in every layer."""
        return [self.hook(layer, site) for layer in range(self.n_layers)]

    @property
    def heads(self) -> list[Head]:
        """Every query head, layer by layer."""
        return [Head(la, head) for la in range(self.n_layers) for head in range(self.n_heads)]

    @cached_property
    def qk(self) -> tuple[LayerQK, ...]:
        """Queries, keys and rotation of every layer; verified on first use, then remembered.

        Raises ModelError where they cannot be found or do not reproduce the scores.
        """
        assert self.read_qk is not None
        return self.read_qk()

    @cached_property
    def projections(self) -> tuple[LayerProjections, ...]:
        """How every layer computes queries and keys from the attention's input; as `qk`.

        Raises ModelError where the model's modules do not reproduce its queries or keys.
        """
        assert self.read_projections is not None
        return self.read_projections()

    def require(self, wanted: HeadsLike) -> tuple[Head, ...]:
        """Return the heads that `wanted` stands for, whole layers included.

        Raises HeadError if the model lacks one.
        """
        found = heads(wanted, n_heads=self.n_heads)
        require_heads(found, self.n_layers, self.n_heads)
        return found

    def require_offsets(self, wanted: Any) -> tuple[int, ...]:
        """Return the offsets that `wanted` names. Raises OffsetError if one exceeds the context."""
        found = as_offsets(wanted)
        if found[-1] >= self.n_ctx:
            raise OffsetError(
                f"offset {found[-1]} does not fit the model's context of {self.n_ctx} tokens; "
                f"expected 0 to {self.n_ctx - 1}"
            )
        return found
