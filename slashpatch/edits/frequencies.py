"""Give a head's rotary pairs other frequencies."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from .. import bridge
from ..bridge import ModelInfo
from ..bridge.qk import LayerQK
from ..errors import BandError, EditError
from ..heads import Head
from ..maths.bands import band_mask, band_pairs, exchanged
from .base import HookContext
from .rotary import _RotaryEdit

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True, repr=False)
class _FrequencyEdit(_RotaryEdit):
    """Gives the head's pairs other frequencies θ'; queries and the head's own keys both turn."""

    def changed(
        self, ctx: HookContext, current: Float[Tensor, "head pair"]
    ) -> Float[Tensor, "head pair"]:
        """θ' of each head's pairs, from those that they have now; radians per token, float64."""
        raise AssertionError("each frequency edit says its frequencies")

    def _turned(self, ctx: HookContext, x: Tensor, stage: str) -> Tensor:
        """x before RoPE such that RoPE will turn it to θ', whatever edits came before."""
        current = ctx.theta(stage)
        new = self.changed(ctx, current)
        ctx.set_theta(stage, new)
        positions = ctx.call.rope_positions.to(x.device)[:, :, None, None]
        return ctx.rotary.rotate_by(x, positions.double() * (new - current).to(x.device))

    def on_query(
        self, ctx: HookContext, q: Float[Tensor, "batch pos head d_head"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Queries that RoPE will turn to the new frequencies."""
        return self._turned(ctx, q, "query")

    def on_key(
        self, ctx: HookContext, k: Float[Tensor, "batch pos head d_head"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Keys of the head's own that RoPE will turn to the new frequencies."""
        return self._turned(ctx, k, "key")


@dataclass(frozen=True, repr=False)
class FreezeBand(_FrequencyEdit):
    """Do not rotate a band of pairs (θ = 0): its content still counts, its position does not.

    Tells apart what `DropBand` removes together.

    Attributes:
        band: high, medium, low, `pairs 0-7`, `wavelength 8-64`, or several joined by +.
    """

    band: Any

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set_band("band")

    def changed(
        self, ctx: HookContext, current: Float[Tensor, "head pair"]
    ) -> Float[Tensor, "head pair"]:
        """θ with zeros in the band."""
        return current.masked_fill(ctx.prepared, 0.0)

    def prepare(self, model: TransformerBridge, info: ModelInfo) -> dict[int, Any]:
        """Per layer: which pairs are in the band. Raises if it does not fit."""
        super().prepare(model, info)
        layers = bridge.read(model).qk
        return {
            layer: band_mask(self.band, layers[layer].require_rotary().inv_freq)
            for layer in self.layers
        }


@dataclass(frozen=True, repr=False)
class SwapBands(_FrequencyEdit):
    """Exchange the frequencies of two bands; the content of every pair stays.

    Pairs of both bands are ordered by θ. Bands of one width exchange frequencies one by one. Of
    unequal widths, each pair takes the frequency at its relative rank in the other band (the first
    takes the first, the last the last, those between the nearest), so some frequencies are used
    twice or not at all (*ours*). Bands that overlap without being equal are refused; a band
    exchanged with itself changes nothing.

    Attributes:
        a: high, medium, low, `pairs 0-7`, `wavelength 8-64`, or several joined by +.
        b: The other band.
    """

    a: Any
    b: Any

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set_band("a")
        self._set_band("b")

    def stages(self) -> dict[str, Callable[[HookContext, Tensor], Tensor]]:
        """None for a band exchanged with itself, so that nothing at all is recomputed."""
        return {} if self.a == self.b else super().stages()

    def prepare(self, model: TransformerBridge, info: ModelInfo) -> dict[int, Any]:
        """Per layer: the pair whose frequency each pair takes. Raises for bands that overlap."""
        super().prepare(model, info)
        found = {}
        for layer in self.layers:
            inv_freq = bridge.read(model).qk[layer].require_rotary().inv_freq
            a, b = (band_pairs(band, inv_freq) for band in (self.a, self.b))
            shared = sorted(set(a) & set(b))
            if shared and set(a) != set(b):
                raise BandError(f"{self}: the bands share pairs {shared}; expected none")
            found[layer] = exchanged(len(inv_freq), a, b)
        return found

    def changed(
        self, ctx: HookContext, current: Float[Tensor, "head pair"]
    ) -> Float[Tensor, "head pair"]:
        """θ with those of the two bands exchanged by rank."""
        return current[:, ctx.prepared]


@dataclass(frozen=True, repr=False)
class SetFrequencies(_FrequencyEdit):
    """Give the head frequencies of your own.

    Attributes:
        frequencies: θ' of each pair in radians per token, in the model's order of pairs (numbers or
            a tensor); or a donor head, whose layer's frequencies are taken; or a function from θ to
            θ', tensor to tensor. A function prints by its name and cannot be read back.
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
                "SetFrequencies: frequencies are finite numbers, one a pair, a donor head, or a "
                f"function of θ; got {given!r}"
            )
        object.__setattr__(self, "frequencies", values)

    def validate(self, info: ModelInfo) -> None:
        """Raise if the model lacks a head, the donor included."""
        super().validate(info)
        if isinstance(self.frequencies, Head):
            info.require(self.frequencies)

    def prepare(self, model: TransformerBridge, info: ModelInfo) -> dict[int, Any]:
        """Per layer: θ', and the layer that it comes from.

        Where RoPE follows the prompt's length, a function or a donor is asked in every pass. Raises
        EditError unless each pair has a finite frequency.
        """
        super().prepare(model, info)
        layers = bridge.read(model).qk
        found = {}
        for layer in self.layers:
            donor = self.frequencies.layer if isinstance(self.frequencies, Head) else layer
            new = self._new(layers[layer].require_rotary().inv_freq, layers[donor])
            found[layer] = (new, layers[donor])
        return found

    def _new(self, own: Float[Tensor, "pair"], donor: LayerQK) -> Float[Tensor, "pair"]:
        if isinstance(self.frequencies, Head):
            new = donor.current().inv_freq
        elif callable(self.frequencies):
            new = torch.as_tensor(self.frequencies(own.clone())).double().cpu()
        else:
            new = torch.tensor(self.frequencies, dtype=torch.float64)
        if new.shape != own.shape or not bool(new.isfinite().all()):
            raise EditError(
                f"{self}: expected {len(own)} finite frequencies, one a pair; got shape "
                f"{list(new.shape)}"
            )
        return new

    def changed(
        self, ctx: HookContext, current: Float[Tensor, "head pair"]
    ) -> Float[Tensor, "head pair"]:
        """The frequencies asked for."""
        new, donor = ctx.prepared
        if donor.live is not None:
            new = self._new(ctx.rotary.inv_freq, donor)
        return new.expand_as(current)
