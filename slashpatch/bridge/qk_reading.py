"""Reads where a bridge's queries and keys are before RoPE, and how each layer rotates them.

Frequencies come from the model's own rotary module. They, the layout of pairs and the scale are
verified: on a short input, q and k must reproduce the layer's scores. A layer that they do not is
refused, with the difference.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import einops
import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import ModelError
from ..maths.precision import MASKED, rounding
from ..maths.rotary import Rotary
from .passes import FOLLOWING, run_probe
from .qk import HookLayout, LayerQK, cap

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from .info import ModelInfo


class _Frequencies:
    """θ as a rotary module keeps it, for all layers or for those of one type."""

    def __init__(self, module: torch.nn.Module, name: str) -> None:
        self.values = getattr(module, name).detach().double().cpu().clone()
        self.layer_type = name.removesuffix("inv_freq").removesuffix("_")
        kind = getattr(module, "rope_type", None)
        if isinstance(kind, dict):
            kind = kind.get(self.layer_type)
        follows = kind in FOLLOWING or (kind is None and hasattr(module, "long_inv_freq"))
        self.live = (weakref.ref(module), name) if follows else None


def _frequencies(model: TransformerBridge) -> list[_Frequencies]:
    return [
        _Frequencies(module, name)
        for module in model.original_model.modules()
        for name, _ in module.named_buffers(recurse=False)
        if name.endswith("inv_freq") and not name.endswith("original_inv_freq")
    ]


def read_layers(model: TransformerBridge, a: ModelInfo) -> tuple[LayerQK, ...]:
    """Return queries, keys and rotation of every layer, verified on one short forward pass.

    Raises ModelError where they cannot be found or do not reproduce the scores.
    """
    n_pos = next(n for n in (7, 11, 13) if n not in (a.n_heads, a.n_kv_heads, a.d_head))
    tokens = (torch.arange(n_pos)[None] * 5 + 2) % a.d_vocab
    seen: dict[str, Tensor] = {}
    frequencies: list[_Frequencies] = []
    available = model.hook_dict
    wanted = [
        name
        for layer in range(a.n_layers)
        for name in (_name(layer, point) for point in _POINTS)
        if name in available
    ]

    def keep(tensor: Tensor, hook: Any, name: str) -> None:
        if not frequencies:  # those of this very pass
            frequencies.extend(_frequencies(model))
        seen[name] = tensor.detach().cpu().clone()

    hooks = [(name, lambda t, hook, name=name: keep(t, hook, name)) for name in wanted]
    run_probe(model, tokens.to(model.cfg.device), hooks)
    return tuple(
        _Layer(model, a, layer, seen, frequencies, n_pos).read() for layer in range(a.n_layers)
    )


_POINTS = ("hook_q", "hook_k", "hook_q_normed", "hook_k_normed", "hook_cos", "hook_sin",
           "hook_rot_q", "hook_rot_k", "hook_attn_scores")  # fmt: skip


def _name(layer: int, point: str) -> str:
    return f"blocks.{layer}.attn.{point}"


class _Layer:
    """One layer as a short pass showed it, and the readings that may explain it."""

    def __init__(
        self,
        model: TransformerBridge,
        a: ModelInfo,
        layer: int,
        seen: dict[str, Tensor],
        frequencies: list[_Frequencies],
        n_pos: int,
    ) -> None:
        self.a, self.layer, self.n_pos = a, layer, n_pos
        self.frequencies = frequencies
        self.seen = {
            point: seen[_name(layer, point)] for point in _POINTS if _name(layer, point) in seen
        }
        attention = model.blocks[layer].attn.original_component
        self.scale = float(getattr(attention, "scaling", a.d_head**-0.5))
        self.softcap = getattr(attention, "attn_logit_softcapping", None)
        config = getattr(attention, "config", None)
        self.clip = getattr(config, "clip_qkv", None)
        types = getattr(config, "layer_types", None) or [""] * a.n_layers
        self.layer_type = types[layer]
        self.norms = [_weight(model.blocks[layer].attn, norm) for norm in ("q_norm", "k_norm")]
        self.normed_late = bool(getattr(model.cfg, "qk_norm_after_rope", False))
        for point in ("hook_q", "hook_k", "hook_attn_scores"):
            if point not in self.seen:
                raise self.refusal(f"the hook {_name(layer, point)} is missing or does not fire")
        scores = self.seen["hook_attn_scores"]
        masked = scores <= MASKED  # in the future, or beyond a window
        self.visible = torch.ones(n_pos, n_pos, dtype=torch.bool).tril() & ~masked
        self.scores = scores.double()
        self.rounding = max(rounding(scores.dtype), rounding(self.seen["hook_q"].dtype))

    def refusal(self, what: str) -> ModelError:
        return ModelError(f"slashpatch cannot read queries and keys of layer {self.layer}: {what}")

    def read(self) -> LayerQK:
        """The reading that reproduces the scores. Raises ModelError if there is none."""
        fits = sorted(self.readings(), key=lambda fit: fit[0])
        if not fits:
            raise self.refusal("its cos and sin are none of the model's own frequencies")
        excess, difference, allowed, found = fits[0]
        if excess > 1:
            raise self.refusal(
                f"they do not reproduce its scores (largest difference {difference:.2g}, allowed "
                f"{allowed:.2g}); its rotary layout or its scale is unknown, or something is added "
                "to the scores (ALiBi)"
            )
        # Low precision may let a wrong layout pass: the right one must be clearly better.
        for other in fits[1:]:
            rotary = other[3].rotary
            if rotary and rotary.n_pairs > 1 and not _same(other[3], found):
                if 2 * excess < other[0]:
                    break
                raise self.refusal(
                    f"two rotary layouts reproduce its scores about as well ({difference:.2g} and "
                    f"{other[1]:.2g}); load the model in float32"
                )
        return found

    def readings(self) -> Iterator[tuple[float, float, float, LayerQK]]:
        """Each possible reading: how far it is off in units of what rounding explains, the largest
        difference and what is allowed there, and the reading.
        """
        # Of a clip too that these few tokens do not reach: another prompt may.
        if self.normed_late or self.clip is not None:
            yield from self.late_readings()
            return
        before = self.site("hook_q" + self.normed), self.site("hook_k" + self.normed)
        values = tuple(self.values(site) for site in before)
        for rotary, interleaved, live in self.rotations():
            found = LayerQK(
                self.layer, *before, self.scale, rotary, interleaved, self.softcap, None, live
            )
            turned = values if rotary is None else tuple(self.rotate(rotary, x) for x in values)
            carried = self.site("hook_rot_q") if "hook_rot_q" in self.seen else None
            if carried and self.off(turned[0], self.values(carried), self.slack(rotary)) <= 1:
                found = dataclasses.replace(found, rotated_q=carried)
            yield (*self.score_off(turned, 4 * self.slack(rotary)), found)

    @property
    def normed(self) -> str:
        """What the names of hooks end in that carry normed queries and keys."""
        return "_normed" if "hook_q_normed" in self.seen else ""

    def late_readings(self) -> Iterator[tuple[float, float, float, LayerQK]]:
        """Readings where nothing carries what RoPE rotates: clipped before it, or normed after it.

        There queries and keys are read once they are final, and turned back.
        """
        if not {"hook_rot_q", "hook_rot_k"} <= set(self.seen):
            raise self.refusal("its rotated queries and keys have no hook")
        if self.normed_late:
            names, weights, source = ("hook_q_normed", "hook_k_normed"), self.norms, ""
        else:
            names, weights, source = ("hook_rot_q", "hook_rot_k"), [None, None], self.normed
        q, k = (dataclasses.replace(self.site(point), after_rope=True) for point in names)
        sources = [self.values(self.site(point + source)) for point in ("hook_q", "hook_k")]
        if self.clip is not None:
            sources = [x.clamp(-self.clip, self.clip) for x in sources]
        rotated = [self.values(self.site(point)) for point in ("hook_rot_q", "hook_rot_k")]
        carried = dataclasses.replace(q, after_rope=False)
        values = self.values(q), self.values(k)
        excess, difference, allowed = self.score_off(values, 4 * self.slack(None))
        for final, made, weight in zip(values, rotated, weights, strict=True):
            # A norm after RoPE gives every vector a length of its own, and each dimension a weight.
            shape = made if weight is None else made * weight
            squares = shape.square().sum(-1, keepdim=True).clamp(min=1e-30)
            length = (final * shape).sum(-1, keepdim=True) / squares
            excess = max(excess, self.off(length * shape, final, 2 * self.slack(None)))
        for rotary, interleaved, live in self.rotations():
            if rotary is None:
                continue
            # The scores say nothing of the rotation here; what it is made from and makes does.
            own = max(
                self.off(self.rotate(rotary, source), made, self.slack(rotary))
                for source, made in zip(sources, rotated, strict=True)
            )
            q_site, k_site = (
                site.with_norm_weight(weight, rotary)
                for site, weight in zip((q, k), weights, strict=True)
            )
            found = LayerQK(
                self.layer,
                q_site,
                k_site,
                self.scale,
                rotary,
                interleaved,
                self.softcap,
                carried,
                live,
            )
            yield max(excess, own), difference, allowed, found

    def site(self, point: str) -> HookLayout:
        """A hook point with the layout that its shape shows. Raises ModelError for another."""
        n_heads = self.a.n_heads if "_q" in point else self.a.n_kv_heads
        shape = list(self.seen[point].shape)
        orders = {
            (1, self.n_pos, n_heads, self.a.d_head): "pos head",
            (1, n_heads, self.n_pos, self.a.d_head): "head pos",
            (1, self.n_pos, n_heads * self.a.d_head): "flat",
        }
        if tuple(shape) not in orders:
            name = _name(self.layer, point)
            raise self.refusal(f"{name} has shape {shape}, which is no known layout")
        return HookLayout(_name(self.layer, point), orders[tuple(shape)], self.a.d_head)

    def values(self, site: HookLayout) -> Float[Tensor, "batch pos head d_head"]:
        """What a hook carried, float64; keys of a group once for each of its query heads."""
        x = site.read(self.seen[site.name.rsplit(".", 1)[1]].double())
        return einops.repeat(x, "b p h d -> b p (h group) d", group=self.a.n_heads // x.shape[2])

    def rotate(self, rotary: Rotary, x: Tensor) -> Tensor:
        """RoPE at the positions of the pass."""
        return rotary.rotate(x, torch.arange(self.n_pos)[:, None])

    def slack(self, rotary: Rotary | None) -> float:
        """What rounding may do to one side of a dot product, relative to its size.

        The table, two products and a sum are rounded, by half an eps each, and the angle, which
        float32 knows to eps · position.
        """
        return 2 * self.rounding + (2 * self.n_pos * rounding(torch.float32) if rotary else 0)

    def off(self, found: Tensor, expected: Tensor, slack: float) -> float:
        """Largest difference in units of what rounding explains."""
        limit = slack * expected.abs().amax(-1, keepdim=True).clamp(min=1e-30) * 2
        return float(((found - expected).abs() / limit).nan_to_num(torch.inf).max())

    def score_off(self, sides: tuple[Tensor, ...], slack: float) -> tuple[float, float, float]:
        """How far rotated queries and keys are from the scores: in units of what rounding explains,
        the largest difference, and what is allowed there.
        """
        logits = torch.einsum("bqhd,bkhd->bhqk", *sides)
        left, right = (x.norm(dim=-1).transpose(1, 2) for x in sides)
        products = abs(self.scale) * left[..., None] * right[..., None, :]
        limit = slack * products.clamp(min=1e-30)
        off = (
            (cap(self.scale * logits, self.softcap) - self.scores)
            .masked_fill(~self.visible, 0)
            .abs()
        )
        excess = (off / limit).nan_to_num(torch.inf)
        worst = int(excess.argmax())
        return float(excess.max()), float(off.max()), float(limit.flatten()[worst])

    def rotations(self) -> Iterator[tuple[Rotary | None, bool, Any]]:
        """The rotations that this layer's cos and sin tables may stand for."""
        if "hook_cos" not in self.seen or "hook_sin" not in self.seen:
            yield None, False, None
            return
        cos, sin = (self.seen[point][0].double() for point in ("hook_cos", "hook_sin"))
        gain = float(cos[0, 0])
        half = cos.shape[-1] // 2
        layouts = [
            (cos[1, :half], sin[1, :half], False),
            (cos[1, ::2], sin[1, ::2], True),
            (cos[1], sin[1], False),
        ]
        for cos_1, sin_1, interleaved in layouts:
            theta = torch.atan2(sin_1, cos_1)
            for own in self.frequencies:
                if own.layer_type not in ("", self.layer_type):
                    continue
                # Tables may be rounded to the model's dtype; the scores decide in the end.
                near = own.values.shape == theta.shape and torch.allclose(
                    own.values, theta, rtol=1e-2, atol=1e-2
                )
                for pairing in ("half", "adjacent") if near else ():
                    yield Rotary(own.values, pairing, gain, self.scale), interleaved, own.live


def _same(one: LayerQK, other: LayerQK) -> bool:
    """Whether two readings rotate alike, in other prompts too."""
    a, b = one.rotary, other.rotary
    alike = a and b and a.pairing == b.pairing and torch.equal(a.inv_freq, b.inv_freq)
    return bool(alike and one.live == other.live)


def _weight(attn: Any, norm: str) -> Tensor | None:
    """What a norm of queries or keys multiplies each dimension of a head by."""
    module = attn.submodules.get(norm)
    weight = getattr(getattr(module, "original_component", None), "weight", None)
    return None if weight is None else weight.detach().double().cpu().clone()
