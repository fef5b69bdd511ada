"""Reads where a bridge's queries and keys are before RoPE, and how each layer rotates them.

Frequencies come from the model's own rotary module. They, the layout of pairs and the scale are
verified: on a short input, q and k must reproduce the layer's scores. A layer that they do not is
refused, with the difference.
"""

from __future__ import annotations

import dataclasses
import math
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import einops
import torch
from jaxtyping import Float
from torch import Tensor

from . import anatomy as anatomies
from .anatomy import Anatomy, run_probe, tolerance
from .errors import ModelError
from .rotary import Rotary

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True)
class HookLayout:
    """A hook that carries heads, and how: "pos head" or "head pos" axes, or flat."""

    name: str
    order: str

    def read(self, tensor: Tensor, d_head: int) -> Float[Tensor, "batch pos head d_head"]:
        """The tensor in the canonical layout; a view."""
        if self.order == "flat":
            return tensor.unflatten(-1, (-1, d_head))
        return tensor.transpose(1, 2) if self.order == "head pos" else tensor

    def write(self, canonical: Float[Tensor, "batch pos head d_head"]) -> Tensor:
        """Inverse of `read`."""
        if self.order == "flat":
            return canonical.flatten(-2)
        return canonical.transpose(1, 2) if self.order == "head pos" else canonical


@dataclass(frozen=True)
class LayerQK:
    """One layer's queries and keys before RoPE and after any norm, and its rotation.

    `rotary` is None for a layer without RoPE; `interleaved` says that cos and sin repeat each
    frequency side by side instead of one half after the other; `softcap` is Gemma 2's;
    `rotated_q` names the hook that carries the rotated queries, where there is one that does.
    """

    layer: int
    q: HookLayout
    k: HookLayout
    scale: float
    rotary: Rotary | None
    interleaved: bool = False
    softcap: float | None = None
    rotated_q: str | None = None

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
        """The rotation. Raises ModelError for a layer without RoPE."""
        if self.rotary is None:
            raise ModelError(
                f"layer {self.layer} has no RoPE; rotary edits and profiles need a layer that "
                "rotates its queries and keys"
            )
        return self.rotary

    def pairs_of(self, table: Tensor) -> Tensor:
        """One column per pair of a cos or sin table, [.., dim] → [.., pair]."""
        n = self.require_rotary().n_pairs
        return table[..., ::2] if self.interleaved else table[..., :n]


_known: weakref.WeakKeyDictionary[Any, tuple[Anatomy, tuple[LayerQK, ...]]] = (
    weakref.WeakKeyDictionary()
)


def read(model: TransformerBridge) -> tuple[LayerQK, ...]:
    """Queries, keys and rotation of every layer, verified; cheap when read before.

    Raises ModelError where they cannot be found or do not reproduce the scores.
    """
    anatomy = anatomies.read(model)
    if model in _known and _known[model][0] is anatomy:
        return _known[model][1]
    layers = _read(model, anatomy)
    _known[model] = (anatomy, layers)
    return layers


def _read(model: TransformerBridge, a: Anatomy) -> tuple[LayerQK, ...]:
    _require_fixed_frequencies(model)
    n_pos = next(n for n in (7, 11, 13) if n not in (a.n_heads, a.n_kv_heads, a.d_head))
    tokens = (torch.arange(n_pos)[None] * 5 + 2) % a.d_vocab
    seen: dict[str, Tensor] = {}
    available = model.hook_dict
    wanted = [
        name
        for layer in range(a.n_layers)
        for name in (_name(layer, point) for point in _POINTS)
        if name in available
    ]

    def keep(tensor: Tensor, hook: Any, name: str) -> None:
        seen[name] = tensor.detach().cpu().clone()

    hooks = [(name, lambda t, hook, name=name: keep(t, hook, name)) for name in wanted]
    run_probe(model, tokens.to(model.cfg.device), hooks)
    frequencies = [
        buffer.detach().double().cpu()
        for name, buffer in model.original_model.named_buffers()
        if name.endswith("inv_freq") and not name.endswith("original_inv_freq")
    ]
    return tuple(
        _read_layer(model, a, layer, seen, frequencies, n_pos) for layer in range(a.n_layers)
    )


_POINTS = ("hook_q", "hook_k", "hook_q_normed", "hook_k_normed", "hook_cos", "hook_sin",
           "hook_rot_q", "hook_attn_scores")  # fmt: skip


def _name(layer: int, point: str) -> str:
    return f"blocks.{layer}.attn.{point}"


def _read_layer(
    model: TransformerBridge,
    a: Anatomy,
    layer: int,
    seen: dict[str, Tensor],
    frequencies: list[Tensor],
    n_pos: int,
) -> LayerQK:
    def refusal(what: str) -> ModelError:
        return ModelError(f"slashpatch cannot read queries and keys of layer {layer}: {what}")

    sites = {}
    for point, n_heads in (("hook_q", a.n_heads), ("hook_k", a.n_kv_heads)):
        name = _name(layer, f"{point}_normed")
        name = name if name in seen else _name(layer, point)
        if name not in seen:
            raise refusal(f"the hook {name} is missing or does not fire")
        order = _order(list(seen[name].shape), n_pos, n_heads, a.d_head)
        if order is None:
            raise refusal(f"{name} has shape {list(seen[name].shape)}, which is no known layout")
        sites[point] = HookLayout(name, order)
    scores = seen[_name(layer, "hook_attn_scores")]
    masked = scores <= torch.finfo(scores.dtype).min / 2  # in the future, or beyond a window
    scores = scores.double()
    q, k = (sites[p].read(seen[sites[p].name].double(), a.d_head) for p in ("hook_q", "hook_k"))
    k = einops.repeat(k, "b p kv d -> b p (kv group) d", group=a.n_heads // a.n_kv_heads)
    attention = model.blocks[layer].attn.original_component
    scale = float(getattr(attention, "scaling", a.d_head**-0.5))
    visible = torch.ones(n_pos, n_pos, dtype=torch.bool, device=scores.device).tril() & ~masked
    largest = float(scores.masked_fill(~visible, 0).abs().max())
    limit = tolerance(model) * max(largest, 1e-3)
    fits: list[tuple[float, LayerQK]] = []
    softcap = getattr(attention, "attn_logit_softcapping", None)
    for rotary, interleaved in _candidates(layer, seen, frequencies, scale):
        found = LayerQK(
            layer, sites["hook_q"], sites["hook_k"], scale, rotary, interleaved, softcap
        )
        if rotary is None:
            left, right = q, k
        else:
            positions = torch.arange(n_pos, device=q.device)[:, None]
            left, right = rotary.rotate(q, positions), rotary.rotate(k, positions)
        off = float((found.logits(left, right) - scores).masked_fill(~visible, 0).abs().max())
        name = _name(layer, "hook_rot_q")
        carried = name in seen and seen[name].shape == left.shape
        close = carried and float((seen[name].double() - left).abs().max()) <= limit
        fits.append((off, dataclasses.replace(found, rotated_q=name if close else None)))
    fits.sort(key=lambda fit: fit[0])
    best = fits[0][0] if fits else math.inf
    if best <= limit:
        # Low precision may let a wrong layout pass: the right one must be clearly better.
        rivals = [
            off
            for off, other in fits[1:]
            if other.rotary and other.rotary.n_pairs > 1 and not _same(other, fits[0][1])
        ]
        if not rivals or 2 * best < rivals[0]:
            return fits[0][1]
        raise refusal(
            f"two rotary layouts reproduce its scores about as well ({best:.2g} and "
            f"{rivals[0]:.2g}); load the model in float32"
        )
    raise refusal(
        f"they do not reproduce its scores (largest difference {best:.2g}, allowed {limit:.2g}); "
        "its rotary layout or its scale is unknown"
    )


def _same(one: LayerQK, other: LayerQK) -> bool:
    """Whether two readings rotate alike."""
    a, b = one.rotary, other.rotary
    return bool(a and b and a.pairing == b.pairing and torch.equal(a.inv_freq, b.inv_freq))


def _require_fixed_frequencies(model: TransformerBridge) -> None:
    """Raise ModelError for RoPE whose frequencies depend on the prompt's length."""
    config = model.original_model.config.get_text_config()
    stack = [getattr(config, "rope_parameters", None), getattr(config, "rope_scaling", None)]
    while stack:
        found = stack.pop()
        if isinstance(found, dict):
            kind = found.get("rope_type", found.get("type"))
            if kind in ("dynamic", "longrope"):
                raise ModelError(
                    f"slashpatch cannot read queries and keys under {kind} RoPE: its frequencies "
                    "change with the prompt's length; scans and edits of the pattern work"
                )
            stack += found.values()


def _order(shape: list[int], n_pos: int, n_heads: int, d_head: int) -> str | None:
    orders = {
        (1, n_pos, n_heads, d_head): "pos head",
        (1, n_heads, n_pos, d_head): "head pos",
        (1, n_pos, n_heads * d_head): "flat",
    }
    return orders.get(tuple(shape))


def _candidates(
    layer: int, seen: dict[str, Tensor], frequencies: list[Tensor], scale: float
) -> list[tuple[Rotary | None, bool]]:
    """The rotations that this layer's cos and sin tables may stand for."""
    tables = [seen.get(_name(layer, point)) for point in ("hook_cos", "hook_sin")]
    if tables[0] is None or tables[1] is None:
        return [(None, False)]
    cos, sin = (table[0].double().cpu() for table in tables if table is not None)
    gain = float(cos[0, 0])
    found: list[tuple[Rotary | None, bool]] = []
    half = cos.shape[-1] // 2
    layouts = [
        (cos[1, :half], sin[1, :half], False),
        (cos[1, ::2], sin[1, ::2], True),
        (cos[1], sin[1], False),
    ]
    for cos_1, sin_1, interleaved in layouts:
        theta = torch.atan2(sin_1, cos_1)
        for own in frequencies:
            # Tables may be rounded to the model's dtype; the scores decide in the end.
            if own.shape == theta.shape and torch.allclose(own, theta, rtol=1e-2, atol=1e-2):
                found += [(Rotary(own, pairing, gain, scale), interleaved) for pairing in _PAIRINGS]
    return found


_PAIRINGS = ("half", "adjacent")
