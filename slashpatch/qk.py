"""Where one layer's queries and keys are, and how it rotates them."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .errors import ModelError
from .rotary import Rotary


@dataclass(frozen=True, eq=False)
class HookLayout:
    """A hook that carries heads, and how: "pos head" or "head pos" axes, or flat.

    `turned` says that they are rotated there already: nothing carries them just before RoPE.
    `weight` is what a norm after RoPE multiplies each dimension by, where it does not treat both
    dimensions of each pair alike: then it commutes with no rotation and is divided out.
    """

    name: str
    order: str
    turned: bool = False
    weight: Float[Tensor, "d_head"] | None = None

    def read(self, tensor: Tensor, d_head: int) -> Float[Tensor, "batch pos head d_head"]:
        """The tensor in the canonical layout; a view."""
        if self.order == "flat":
            return tensor.unflatten(-1, (-1, d_head))
        return tensor.transpose(1, 2) if self.order == "head pos" else tensor

    def weighed_by(self, weight: Float[Tensor, "d_head"] | None, rotary: Rotary) -> HookLayout:
        """The hook with a norm's weights, where they do not commute with the rotation."""
        if weight is not None:
            real, imag, _ = rotary.split(weight)
            if torch.equal(real, imag):
                weight = None
        return replace(self, weight=weight)

    def write(self, canonical: Float[Tensor, "batch pos head d_head"]) -> Tensor:
        """Inverse of `read`."""
        if self.order == "flat":
            return canonical.flatten(-2)
        return canonical.transpose(1, 2) if self.order == "head pos" else canonical


@dataclass(frozen=True, eq=False)
class LayerQK:
    """One layer's queries and keys before RoPE and after any norm, and its rotation.

    `rotary` is None for a layer without RoPE; `interleaved` says that cos and sin repeat each
    frequency side by side instead of one half after the other; `softcap` is Gemma 2's;
    `rotated_q` is the hook that carries the rotated queries, where there is one that does;
    `live` is the module (and the name in it) whose frequencies follow the prompt's length.
    """

    layer: int
    q: HookLayout
    k: HookLayout
    scale: float
    rotary: Rotary | None
    interleaved: bool = False
    softcap: float | None = None
    rotated_q: HookLayout | None = None
    live: tuple[weakref.ref[Any], str] | None = None

    def logits(
        self,
        q: Float[Tensor, "batch query head d_head"],
        k: Float[Tensor, "batch key head d_head"],
    ) -> Float[Tensor, "batch head query key"]:
        """Scores before the mask, from rotated queries and keys of one head each."""
        scores = self.scale * torch.einsum("bqhd,bkhd->bhqk", q, k)
        if self.softcap is None:
            return scores
        return self.softcap * torch.tanh(scores / self.softcap)

    def require_rotary(self) -> Rotary:
        """The rotation, for short prompts. Raises ModelError for a layer without RoPE."""
        if self.rotary is None:
            raise ModelError(
                f"layer {self.layer} has no RoPE; rotary edits and profiles need a layer that "
                "rotates its queries and keys"
            )
        return self.rotary

    def current(self) -> Rotary:
        """The rotation of the pass under way: dynamic and LongRoPE follow the prompt's length.

        Raises ModelError for a layer without RoPE.
        """
        rotary = self.require_rotary()
        module = None if self.live is None else self.live[0]()
        if self.live is None or module is None:
            return rotary
        now = getattr(module, self.live[1]).detach().double().cpu().clone()
        return replace(rotary, inv_freq=now)

    def turned_back(
        self,
        site: HookLayout,
        x: Float[Tensor, "batch pos head d_head"],
        positions: Int[Tensor, "rows pos"],
    ) -> Float[Tensor, "batch pos head d_head"]:
        """What a hook carries as it would be before RoPE."""
        if not site.turned:
            return x
        x = x if site.weight is None else x / site.weight.to(x)
        return self.current().unrotate(x, positions[..., None].to(x.device))

    def turned_on(
        self,
        site: HookLayout,
        x: Float[Tensor, "batch pos head d_head"],
        positions: Int[Tensor, "rows pos"],
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Inverse of `turned_back`."""
        if not site.turned:
            return x
        x = self.current().rotate(x, positions[..., None].to(x.device))
        return x if site.weight is None else x * site.weight.to(x)

    @property
    def relative(self) -> bool:
        """Whether logits depend on how far tokens are apart, and not on where they stand.

        Not where a norm after RoPE weighs the two dimensions of a pair differently.
        """
        return self.rotary is not None and self.q.weight is None and self.k.weight is None

    def pairs_of(self, table: Tensor) -> Tensor:
        """One column per pair of a cos or sin table, [.., dim] → [.., pair]."""
        n = self.require_rotary().n_pairs
        return table[..., ::2] if self.interleaved else table[..., :n]
