"""Edits of rotary bands and frequencies, made before RoPE because rotations commute.

`ShiftSlash`, `DropBand` and `ScaleBand` need the query only. A changed frequency needs keys of the
head's own as well: x_l · e^{i(θ'_l − θ_l)p} before RoPE is x_l · e^{iθ'_l p} after it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from .. import rope
from ..errors import BandError, EditError
from ..heads import Head
from ..qk import LayerQK
from ..rotary import band_mask, band_pairs, canonical_band, exchanged
from .base import Edit, Site

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from ..anatomy import Anatomy


def _finite(edit: str, field: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= 1e30:
        raise EditError(f"{edit}: {field} is a finite number; got {str(value)[:40]}")
    return float(value)


@dataclass(frozen=True, repr=False)
class _RotaryEdit(Edit):
    """Needs a layer with RoPE."""

    def prepare(self, model: TransformerBridge, anatomy: Anatomy) -> dict[int, Any]:
        """Nothing to keep; raises if a layer has no RoPE, or a band does not fit its pairs."""
        rotaries = {layer: rope.read(model)[layer].require_rotary() for layer in self.layers}
        for layer, rotary in rotaries.items():
            for field in ("band", "a", "b"):
                if hasattr(self, field):
                    try:
                        band_pairs(getattr(self, field), rotary.inv_freq)
                    except BandError as error:
                        raise BandError(f"{self} at layer {layer}: {error}") from None
        return {}

    def _set_band(self, field: str) -> None:
        try:
            object.__setattr__(self, field, canonical_band(getattr(self, field)))
        except BandError as error:
            raise BandError(f"{type(self).__name__}: {error}") from None


@dataclass(frozen=True, repr=False)
class ShiftSlash(_RotaryEdit):
    """Move every logit of the head from offset Δ to Δ + `by`: the slash moves, its shape does not.

    q_l · e^{−iθ_l·by}. What an offset beyond the prompt would have had comes into view at small
    offsets; a part of the head that is not rotated stays where it is. Needs the query only.

    Attributes:
        by: Tokens; may be negative or fractional.
    """

    by: float | int

    def __post_init__(self) -> None:
        super().__post_init__()
        by = _finite("ShiftSlash", "by", self.by)
        object.__setattr__(self, "by", int(by) if by.is_integer() else by)

    def on_query(
        self, site: Site, q: Float[Tensor, "batch pos head d_head"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Queries turned back by `by` tokens."""
        return site.rotary.turn(q, -self.by * site.theta("query").to(q.device))


@dataclass(frozen=True, repr=False)
class ScaleBand(_RotaryEdit):
    """Multiply what a band of pairs contributes to the logit: the softmax sharpens or flattens.

    Attributes:
        band: high, medium, low, `pairs 0-7`, `wavelength 8-64`, or several joined by +.
        factor: Finite; 1 changes nothing, 0 drops the band.
    """

    band: Any
    factor: float | int

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set_band("band")
        object.__setattr__(self, "factor", _finite("ScaleBand", "factor", self.factor))

    def on_query(
        self, site: Site, q: Float[Tensor, "batch pos head d_head"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Queries with the band's pairs scaled."""
        return _scaled(q, site, self.band, self.factor)


@dataclass(frozen=True, repr=False)
class DropBand(_RotaryEdit):
    """Remove what a band of pairs contributes to the logit, content and position both.

    Says which frequencies carry a slash; the softmax also flattens, because a part of the logit is
    gone, so compare with dropping other bands of as many pairs.

    Attributes:
        band: high, medium, low, `pairs 0-7`, `wavelength 8-64`, or several joined by +.
    """

    band: Any

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set_band("band")

    def on_query(
        self, site: Site, q: Float[Tensor, "batch pos head d_head"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Queries with the band's pairs at zero."""
        return _scaled(q, site, self.band, 0.0)


def _scaled(q: Tensor, site: Site, band: str, factor: float) -> Tensor:
    assert site.qk is not None
    rotary = site.qk.require_rotary()  # bands are of its own θ, whatever the prompt's length
    gain = torch.ones(rotary.n_pairs, dtype=q.dtype, device=q.device)
    gain[band_mask(band, rotary.inv_freq).to(q.device)] = factor
    real, imag, rest = rotary.split(q)
    return rotary.join(real * gain, imag * gain, rest)


@dataclass(frozen=True, repr=False)
class _FrequencyEdit(_RotaryEdit):
    """Gives the head's pairs other frequencies θ'; queries and the head's own keys both turn."""

    def changed(
        self, site: Site, current: Float[Tensor, "head pair"]
    ) -> Float[Tensor, "head pair"]:
        """θ' of each head's pairs, from those that they have now; radians per token, float64."""
        raise AssertionError("each frequency edit says its frequencies")

    def _turned(self, site: Site, x: Tensor, stage: str) -> Tensor:
        """x before RoPE such that RoPE will turn it to θ', whatever edits came before."""
        current = site.theta(stage)
        new = self.changed(site, current)
        site.set_theta(stage, new)
        positions = site.call.rope_positions.to(x.device)[:, :, None, None]
        return site.rotary.turn(x, positions.double() * (new - current).to(x.device))

    def on_query(
        self, site: Site, q: Float[Tensor, "batch pos head d_head"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Queries that RoPE will turn to the new frequencies."""
        return self._turned(site, q, "query")

    def on_key(
        self, site: Site, k: Float[Tensor, "batch pos head d_head"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Keys of the head's own that RoPE will turn to the new frequencies."""
        return self._turned(site, k, "key")


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
        self, site: Site, current: Float[Tensor, "head pair"]
    ) -> Float[Tensor, "head pair"]:
        """θ with zeros in the band."""
        return current.masked_fill(site.state, 0.0)

    def prepare(self, model: TransformerBridge, anatomy: Anatomy) -> dict[int, Any]:
        """Per layer: which pairs are in the band. Raises if it does not fit."""
        super().prepare(model, anatomy)
        layers = rope.read(model)
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

    def stages(self) -> dict[str, Callable[[Site, Tensor], Tensor]]:
        """None for a band exchanged with itself, so that nothing at all is recomputed."""
        return {} if self.a == self.b else super().stages()

    def prepare(self, model: TransformerBridge, anatomy: Anatomy) -> dict[int, Any]:
        """Per layer: the pair whose frequency each pair takes. Raises for bands that overlap."""
        super().prepare(model, anatomy)
        found = {}
        for layer in self.layers:
            inv_freq = rope.read(model)[layer].require_rotary().inv_freq
            a, b = (band_pairs(band, inv_freq) for band in (self.a, self.b))
            shared = sorted(set(a) & set(b))
            if shared and set(a) != set(b):
                raise BandError(f"{self}: the bands share pairs {shared}; expected none")
            found[layer] = exchanged(len(inv_freq), a, b)
        return found

    def changed(
        self, site: Site, current: Float[Tensor, "head pair"]
    ) -> Float[Tensor, "head pair"]:
        """θ with those of the two bands exchanged by rank."""
        return current[:, site.state]


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

    def validate(self, anatomy: Anatomy) -> None:
        """Raise if the model lacks a head, the donor included."""
        super().validate(anatomy)
        if isinstance(self.frequencies, Head):
            anatomy.require(self.frequencies)

    def prepare(self, model: TransformerBridge, anatomy: Anatomy) -> dict[int, Any]:
        """Per layer: θ', and the layer that it comes from.

        Where RoPE follows the prompt's length, a function or a donor is asked in every pass. Raises
        EditError unless each pair has a finite frequency.
        """
        super().prepare(model, anatomy)
        layers = rope.read(model)
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
        self, site: Site, current: Float[Tensor, "head pair"]
    ) -> Float[Tensor, "head pair"]:
        """The frequencies asked for."""
        new, donor = site.state
        if donor.live is not None:
            new = self._new(site.rotary.inv_freq, donor)
        return new.expand_as(current)
