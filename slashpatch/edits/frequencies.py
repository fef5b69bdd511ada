"""Edits that give heads other RoPE frequencies: freeze, swap or set them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..bridge import ModelInfo
from ..bridge.qk import LayerQK
from ..data.heads import Head
from ..errors import BandError, EditError
from ..maths.bands import band_mask, band_pairs, exchanged
from .base import HookContext
from .rotary import _RotaryEdit

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True, repr=False)
class _FrequencyEdit(_RotaryEdit):
    """Base of the edits that replace frequencies θ by θ', in queries and in per-head keys."""

    def changed(
        self, ctx: HookContext, current: Float[Tensor, "head pair"]
    ) -> Float[Tensor, "head pair"]:
        """Return θ' of each head's pairs, given the current θ; radians per token, float64."""
        raise AssertionError("each frequency edit defines its frequencies")

    def _rotate_ahead(self, ctx: HookContext, x: Tensor, stage: str) -> Tensor:
        """Return pre-RoPE queries or keys rotated by (θ' − θ)p, so that RoPE completes θ'p.

        θ are the frequencies that earlier edits of this pass left.
        """
        current = ctx.theta(stage)
        new = self.changed(ctx, current)
        ctx.set_theta(stage, new)
        positions = ctx.call.rope_positions.to(x.device)[:, :, None, None]
        return ctx.rotary.rotate_by(x, positions.double() * (new - current).to(x.device))

    def on_query(
        self, ctx: HookContext, q: Float[Tensor, "batch pos head d_head"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Return pre-RoPE queries that RoPE then rotates to the new frequencies."""
        return self._rotate_ahead(ctx, q, "query")

    def on_key(
        self, ctx: HookContext, k: Float[Tensor, "batch pos head d_head"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Return pre-RoPE per-head keys that RoPE then rotates to the new frequencies."""
        return self._rotate_ahead(ctx, k, "key")


@dataclass(frozen=True, repr=False)
class FreezeBand(_FrequencyEdit):
    """Stop rotating a band of pairs (θ = 0): its content still counts, its position does not.

    `DropBand` removes both; the difference between the two edits is the band's content alone.

    Attributes:
        band: high, medium, low, `pairs 0-7`, `share 0-0.25` (by frequency, the highest first),
            `wavelength 8-64` (in tokens), or several of these joined by +.
    """

    band: Any

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set_band("band")

    def changed(
        self, ctx: HookContext, current: Float[Tensor, "head pair"]
    ) -> Float[Tensor, "head pair"]:
        """Return θ with zeros in the band."""
        return current.masked_fill(ctx.prepared, 0.0)

    def prepare(self, model: TransformerBridge, info: ModelInfo) -> dict[int, Any]:
        """Return, by layer, a mask of the band's rotary pairs."""
        super().prepare(model, info)
        return {
            layer: band_mask(self.band, info.qk[layer].require_rotary().inv_freq)
            for layer in self.layers
        }


@dataclass(frozen=True, repr=False)
class SwapBands(_FrequencyEdit):
    """Exchange the frequencies of two bands; the content of every pair stays.

    The pairs of each band are ordered by θ. Bands of equal width exchange frequencies one by one.
    In bands of unequal width, each pair takes the frequency at its relative rank in the other band
    (the first takes the first, the last takes the last, the others the nearest rank), so some
    frequencies are used twice or not at all (*ours*). Bands that overlap without being equal are
    refused. Swapping a band with itself changes nothing.

    Attributes:
        a: high, medium, low, `pairs 0-7`, `share 0-0.25` (by frequency, the highest first),
            `wavelength 8-64` (in tokens), or several of these joined by +.
        b: The other band, in the same form.
    """

    a: Any
    b: Any

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set_band("a")
        self._set_band("b")

    def stages(self) -> dict[str, Callable[[HookContext, Tensor], Tensor]]:
        """Return no hooks if both bands are the same, so that nothing is recomputed; else both."""
        return {} if self.a == self.b else super().stages()

    def prepare(self, model: TransformerBridge, info: ModelInfo) -> dict[int, Any]:
        """Return, by layer, the pair whose frequency each pair takes.

        Raises BandError for bands that overlap without being equal.
        """
        super().prepare(model, info)
        sources = {}
        for layer in self.layers:
            inv_freq = info.qk[layer].require_rotary().inv_freq
            a, b = (band_pairs(band, inv_freq) for band in (self.a, self.b))
            shared = sorted(set(a) & set(b))
            if shared and set(a) != set(b):
                raise BandError(f"{self}: the bands share pairs {shared}; expected none")
            sources[layer] = exchanged(len(inv_freq), a, b)
        return sources

    def changed(
        self, ctx: HookContext, current: Float[Tensor, "head pair"]
    ) -> Float[Tensor, "head pair"]:
        """Return θ with the frequencies of the two bands exchanged by rank."""
        return current[:, ctx.prepared]


@dataclass(frozen=True, repr=False)
class SetFrequencies(_FrequencyEdit):
    """Set the frequencies of the heads' rotary pairs.

    Attributes:
        frequencies: θ' of each pair in radians per token, in the model's order of pairs (numbers or
            a tensor); or a donor head, whose layer's frequencies are taken; or a function from the
            tensor θ to the tensor θ'. An edit with a function prints the function's name, which
            `parse_edit` cannot read back.
    """

    frequencies: Any

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.frequencies
        if callable(given) or isinstance(given, Head):
            return
        if isinstance(given, str):
            object.__setattr__(self, "frequencies", Head.parse(given))
            return
        try:
            given = (given,) if isinstance(given, (int, float)) else given
            values = tuple(float(value) for value in given)
        except (TypeError, ValueError):
            values = ()
        if not values or not all(math.isfinite(value) for value in values):
            raise EditError(
                "SetFrequencies: frequencies must be finite numbers, one per rotary pair, or a "
                f"donor head, or a function of θ; got {given!r}"
            )
        object.__setattr__(self, "frequencies", values)

    def validate(self, info: ModelInfo) -> None:
        """Raise HeadError if the model lacks one of the heads or the donor head."""
        super().validate(info)
        if isinstance(self.frequencies, Head):
            info.require(self.frequencies)

    def prepare(self, model: TransformerBridge, info: ModelInfo) -> dict[int, Any]:
        """Return, by layer, θ' and the layer that θ' is derived from.

        Where RoPE follows the prompt's length (dynamic NTK, LongRoPE), θ' is computed again in each
        forward pass. Raises EditError unless each pair has a finite frequency.
        """
        super().prepare(model, info)
        layers = info.qk
        prepared = {}
        for layer in self.layers:
            donor = self.frequencies.layer if isinstance(self.frequencies, Head) else layer
            new = self._new(layers[layer].require_rotary().inv_freq, layers[donor])
            prepared[layer] = (new, layers[donor])
        return prepared

    def _new(self, theta: Float[Tensor, "pair"], donor: LayerQK) -> Float[Tensor, "pair"]:
        """Return θ', given the layer's own frequencies θ and the donor head's layer."""
        if isinstance(self.frequencies, Head):
            new = donor.current().inv_freq
        elif callable(self.frequencies):
            new = torch.as_tensor(self.frequencies(theta.clone())).double().cpu()
        else:
            new = torch.tensor(self.frequencies, dtype=torch.float64)
        if new.shape != theta.shape or not bool(new.isfinite().all()):
            raise EditError(
                f"{self}: expected {len(theta)} finite frequencies, one per rotary pair; got shape "
                f"{list(new.shape)}"
            )
        return new

    def changed(
        self, ctx: HookContext, current: Float[Tensor, "head pair"]
    ) -> Float[Tensor, "head pair"]:
        """Return θ', the same for all heads of the layer."""
        new, donor = ctx.prepared
        if donor.live is not None:
            new = self._new(ctx.rotary.inv_freq, donor)
        return new.expand_as(current)
