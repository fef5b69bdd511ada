"""Where one layer's queries and keys are, and how it rotates them."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import ModelError
from ..maths.rotary import Rotary


@dataclass(frozen=True, eq=False)
class HookLayout:
    """A hook that carries queries or keys, and how they lie in its tensor.

    Attributes:
        name: Of the hook point.
        order: "pos head" or "head pos" axes, or "flat" where heads and d_head are one axis.
        d_head: Width of a head.
        after_rope: Whether they are rotated there already: no hook carries them just before RoPE.
        weight: What a norm after RoPE multiplies each dimension by, where it does not treat both
            dimensions of each pair alike; else None, because it then commutes with rotations.
    """

    name: str
    order: str
    d_head: int
    after_rope: bool = False
    weight: Float[Tensor, "d_head"] | None = None

    def read(self, tensor: Tensor) -> Float[Tensor, "batch pos head d_head"]:
        """Return the hook's tensor in the canonical layout; a view."""
        if self.order == "flat":
            return tensor.unflatten(-1, (-1, self.d_head))
        return tensor.transpose(1, 2) if self.order == "head pos" else tensor

    def write(self, canonical: Float[Tensor, "batch pos head d_head"]) -> Tensor:
        """Return the tensor in the hook's own layout: the inverse of `read`."""
        if self.order == "flat":
            return canonical.flatten(-2)
        return canonical.transpose(1, 2) if self.order == "head pos" else canonical

    def with_norm_weight(
        self, weight: Float[Tensor, "d_head"] | None, rotary: Rotary
    ) -> HookLayout:
        """Return this hook with a norm's weights, or without if they commute with the rotation."""
        if weight is not None:
            real, imag, _ = rotary.split(weight)
            if torch.equal(real, imag):
                weight = None
        return replace(self, weight=weight)


@dataclass(frozen=True, eq=False)
class LayerQK:
    """One layer's queries and keys before RoPE and after any norm, and its rotation.

    Attributes:
        layer: Its index.
        q: The hook that carries queries; `k` the one that carries keys.
        scale: What dot products are multiplied by.
        rotary: The rotation, or None for a layer without RoPE.
        interleaved: Whether cos and sin repeat each frequency side by side instead of one half
            after the other.
        softcap: Gemma 2's cap on logits.
        rotated_q: The hook that carries rotated queries, where there is one.
        live: The module (and the name in it) whose frequencies follow the prompt's length.
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
        """Return scores before the mask, from rotated queries and keys of as many heads."""
        return cap(self.scale * torch.einsum("bqhd,bkhd->bhqk", q, k), self.softcap)

    def require_rotary(self) -> Rotary:
        """Return the rotation of short prompts. Raises ModelError for a layer without RoPE."""
        if self.rotary is None:
            raise ModelError(
                f"layer {self.layer} has no RoPE; rotary edits and profiles need a layer that "
                "rotates its queries and keys"
            )
        return self.rotary

    def current(self) -> Rotary:
        """Return the rotation of the current pass: dynamic and LongRoPE follow its length.

        Raises ModelError for a layer without RoPE.
        """
        rotary = self.require_rotary()
        module = None if self.live is None else self.live[0]()
        if self.live is None or module is None:
            return rotary
        now = getattr(module, self.live[1]).detach().double().cpu().clone()
        return replace(rotary, inv_freq=now)

    def unrotate(
        self,
        hook: HookLayout,
        x: Float[Tensor, "batch pos head d_head"],
        positions: Int[Tensor, "rows pos"],
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Return what a hook carries as it would be before RoPE; unchanged if it is."""
        if not hook.after_rope:
            return x
        x = x if hook.weight is None else x / hook.weight.to(x)
        return self.current().unrotate(x, positions[..., None].to(x.device))

    def rotate(
        self,
        hook: HookLayout,
        x: Float[Tensor, "batch pos head d_head"],
        positions: Int[Tensor, "rows pos"],
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Return pre-RoPE values as a hook carries them: the inverse of `unrotate`."""
        if not hook.after_rope:
            return x
        x = self.current().rotate(x, positions[..., None].to(x.device))
        return x if hook.weight is None else x * hook.weight.to(x)

    @property
    def relative(self) -> bool:
        """Whether logits depend on how far tokens are apart, and not on their positions.

        They do not where a norm after RoPE weighs the two dimensions of a pair differently.
        """
        return self.rotary is not None and self.q.weight is None and self.k.weight is None

    def pairs_of(self, table: Tensor) -> Tensor:
        """Return one column per pair of a cos or sin table, [.., dim] → [.., pair]."""
        n = self.require_rotary().n_pairs
        return table[..., ::2] if self.interleaved else table[..., :n]


def cap(logits: Tensor, softcap: float | None) -> Tensor:
    """Return soft-capped logits, c · tanh(logits / c) (Gemma 2); unchanged without a cap."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
