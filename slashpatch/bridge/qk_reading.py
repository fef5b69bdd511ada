"""Find a model's queries and keys before RoPE, and how each layer rotates them.

The frequencies come from the model's own rotary modules. They, the layout of rotary pairs and the
scale are verified: on a short prompt, queries and keys must reproduce the layer's scores. A layer
where they do not is refused, and the message says how large the difference is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import einops
import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import ModelError
from ..maths.precision import MASKED, rounding
from ..maths.rotary import Rotary
from .frequencies import ModuleFrequencies, Rotation, matching_rotations, module_frequencies
from .model_info import ModelInfo
from .offloaded import loaded
from .passes import run_probe
from .qk import HookLayout, LayerQK, cap

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_POINTS = ("hook_q", "hook_k", "hook_q_normed", "hook_k_normed", "hook_cos", "hook_sin",
           "hook_rot_q", "hook_rot_k", "hook_attn_scores")  # fmt: skip


class _Candidate(NamedTuple):
    """A possible description of a layer's queries, keys and rotation, and how well it fits.

    Attributes:
        excess: Largest difference in units of what rounding explains: above 1, it does not fit.
        difference: Largest absolute difference between computed and actual scores.
        allowed: The difference that rounding explains, where the excess is largest.
        qk: The description.
    """

    excess: float
    difference: float
    allowed: float
    qk: LayerQK


def read_layers(model: TransformerBridge, info: ModelInfo) -> tuple[LayerQK, ...]:
    """Return queries, keys and rotation of every layer, verified on one short forward pass.

    Raises ModelError where they cannot be found or do not reproduce the scores.
    """
    # A prompt length that no other axis has, so that shapes tell the layout.
    n_pos = next(n for n in (7, 11, 13) if n not in (info.n_heads, info.n_kv_heads, info.d_head))
    tokens = (torch.arange(n_pos)[None] * 5 + 2) % info.d_vocab
    recorded: dict[str, Tensor] = {}
    frequencies: list[ModuleFrequencies] = []
    available = model.hook_dict
    names = [_name(layer, point) for layer in range(info.n_layers) for point in _POINTS]

    def record(tensor: Tensor, hook: Any, name: str) -> None:
        if not frequencies:  # read during the pass: they may depend on the prompt's length
            frequencies.extend(module_frequencies(model))
        recorded[name] = tensor.detach().cpu().clone()

    hooks = [
        (name, lambda tensor, hook, name=name: record(tensor, hook, name))
        for name in names
        if name in available
    ]
    run_probe(model, tokens.to(model.cfg.device), hooks)
    return tuple(
        _LayerReader(model, info, layer, recorded, frequencies, n_pos).read()
        for layer in range(info.n_layers)
    )


def _name(layer: int, point: str) -> str:
    return f"blocks.{layer}.attn.{point}"


class _LayerReader:
    """The tensors that one layer's hooks carried, and the candidates that may explain them."""

    def __init__(
        self,
        model: TransformerBridge,
        info: ModelInfo,
        layer: int,
        recorded: dict[str, Tensor],
        frequencies: list[ModuleFrequencies],
        n_pos: int,
    ) -> None:
        self.info, self.layer, self.n_pos = info, layer, n_pos
        self.frequencies = frequencies
        names = {point: _name(layer, point) for point in _POINTS}
        self.tensors = {p: recorded[name] for p, name in names.items() if name in recorded}
        attention = model.blocks[layer].attn.original_component
        self.scale = float(getattr(attention, "scaling", info.d_head**-0.5))
        self.softcap = getattr(attention, "attn_logit_softcapping", None)
        config = getattr(attention, "config", None)
        self.clip = getattr(config, "clip_qkv", None)
        types = getattr(config, "layer_types", None) or [""] * info.n_layers
        self.layer_type = types[layer]
        attn = model.blocks[layer].attn
        self.norm_weights = [_norm_weight(attn, norm) for norm in ("q_norm", "k_norm")]
        self.norm_after_rope = bool(getattr(model.cfg, "qk_norm_after_rope", False))
        for point in ("hook_q", "hook_k", "hook_attn_scores"):
            if point not in self.tensors:
                raise self.refusal(f"the hook {_name(layer, point)} is missing or never fired")
        scores = self.tensors["hook_attn_scores"]
        masked = scores <= MASKED  # in the future, or outside a sliding window
        self.visible = torch.ones(n_pos, n_pos, dtype=torch.bool).tril() & ~masked
        self.scores = scores.double()
        self.eps = max(rounding(scores.dtype), rounding(self.tensors["hook_q"].dtype))

    def refusal(self, reason: str) -> ModelError:
        return ModelError(
            f"slashpatch cannot read queries and keys of layer {self.layer}: {reason}"
        )

    def read(self) -> LayerQK:
        """Return the candidate that reproduces the scores. Raises ModelError if there is none."""
        candidates = sorted(self.candidates(), key=lambda candidate: candidate.excess)
        if not candidates:
            raise self.refusal(
                "its tables of cos and sin match no frequencies of the model's rotary modules"
            )
        best = candidates[0]
        if best.excess > 1:
            raise self.refusal(
                f"they do not reproduce its scores (largest difference {best.difference:.2g}, "
                f"allowed {best.allowed:.2g}); its rotary layout or its scale is unknown, or a "
                "bias is added to the scores (ALiBi)"
            )
        # In low precision a wrong layout may fit too: the right one must be clearly better.
        for other in candidates[1:]:
            rotary = other.qk.rotary
            if rotary and rotary.n_pairs > 1 and not _rotate_alike(other.qk, best.qk):
                if 2 * best.excess < other.excess:
                    break
                raise self.refusal(
                    "two rotary layouts reproduce its scores about equally well (largest "
                    f"differences {best.difference:.2g} and {other.difference:.2g}); load the "
                    "model in float32"
                )
        return best.qk

    def candidates(self) -> Iterator[_Candidate]:
        """Yield every description that the layer's hooks and tables allow."""
        # A clip also counts where this prompt's values stay below it: other prompts may not.
        if self.norm_after_rope or self.clip is not None:
            yield from self.candidates_after_rope()
            return
        layouts = self.layout("hook_q" + self.normed), self.layout("hook_k" + self.normed)
        before_rope = tuple(self.values(layout) for layout in layouts)
        for rotary, interleaved, live in self.rotations():
            qk = LayerQK(
                self.layer, *layouts, self.scale, rotary, interleaved, self.softcap, None, live
            )
            rotated = tuple(x if rotary is None else self.rotate(rotary, x) for x in before_rope)
            rotated_q = self.layout("hook_rot_q") if "hook_rot_q" in self.tensors else None
            if rotated_q is not None:
                slack = self.slack(rotary)
                if self.vector_excess(rotated[0], self.values(rotated_q), slack) <= 1:
                    qk = dataclasses.replace(qk, rotated_q=rotated_q)
            yield _Candidate(*self.score_excess(rotated, 4 * self.slack(rotary)), qk)

    @property
    def normed(self) -> str:
        """The suffix of the hooks that carry queries and keys after a norm and before RoPE."""
        return "_normed" if "hook_q_normed" in self.tensors else ""

    def candidates_after_rope(self) -> Iterator[_Candidate]:
        """Yield candidates where no hook carries what RoPE rotates.

        This is so where queries and keys are clipped just before RoPE, or normed after it. They are
        then read after RoPE and norm, and un-rotated.
        """
        if not {"hook_rot_q", "hook_rot_k"} <= set(self.tensors):
            raise self.refusal("no hooks carry its rotated queries and keys")
        if self.norm_after_rope:
            points, weights, suffix = ("hook_q_normed", "hook_k_normed"), self.norm_weights, ""
        else:
            points, weights, suffix = ("hook_rot_q", "hook_rot_k"), [None, None], self.normed
        q, k = (dataclasses.replace(self.layout(point), after_rope=True) for point in points)
        before_rope = [self.values(self.layout(point + suffix)) for point in ("hook_q", "hook_k")]
        if self.clip is not None:
            before_rope = [x.clamp(-self.clip, self.clip) for x in before_rope]
        rotated = [self.values(self.layout(point)) for point in ("hook_rot_q", "hook_rot_k")]
        final = self.values(q), self.values(k)
        excess, difference, allowed = self.score_excess(final, 4 * self.slack(None))
        for normed, vector, weight in zip(final, rotated, weights, strict=True):
            # A norm scales each vector by one number, and each dimension by its weight.
            weighted = vector if weight is None else vector * weight
            squares = weighted.square().sum(-1, keepdim=True).clamp(min=1e-30)
            factor = (normed * weighted).sum(-1, keepdim=True) / squares
            norm_excess = self.vector_excess(factor * weighted, normed, 2 * self.slack(None))
            excess = max(excess, norm_excess)
        for rotary, interleaved, live in self.rotations():
            if rotary is None:
                continue
            # The scores come after the rotation here, so compare what RoPE gets and returns.
            rope_excess = max(
                self.vector_excess(self.rotate(rotary, x), y, self.slack(rotary))
                for x, y in zip(before_rope, rotated, strict=True)
            )
            qk = LayerQK(
                self.layer,
                q.with_norm_weight(weights[0], rotary),
                k.with_norm_weight(weights[1], rotary),
                self.scale,
                rotary,
                interleaved,
                self.softcap,
                dataclasses.replace(q, after_rope=False),
                live,
            )
            yield _Candidate(max(excess, rope_excess), difference, allowed, qk)

    def layout(self, point: str) -> HookLayout:
        """Return a hook point's layout, known by its shape. Raises ModelError for other shapes."""
        n_heads = self.info.n_heads if "_q" in point else self.info.n_kv_heads
        shape = tuple(self.tensors[point].shape)
        orders = {
            (1, self.n_pos, n_heads, self.info.d_head): "pos head",
            (1, n_heads, self.n_pos, self.info.d_head): "head pos",
            (1, self.n_pos, n_heads * self.info.d_head): "flat",
        }
        if shape not in orders:
            expected = ", ".join(str(list(known)) for known in orders)
            raise self.refusal(
                f"{_name(self.layer, point)} has shape {list(shape)}; expected one of {expected}"
            )
        return HookLayout(_name(self.layer, point), orders[shape], self.info.d_head)

    def values(self, layout: HookLayout) -> Float[Tensor, "batch pos head d_head"]:
        """Return what a hook carried, in float64; each KV head is repeated for its query heads."""
        x = layout.read(self.tensors[layout.name.rsplit(".", 1)[1]].double())
        group = self.info.n_heads // x.shape[2]
        return einops.repeat(x, "b p h d -> b p (h group) d", group=group)

    def rotate(self, rotary: Rotary, x: Tensor) -> Tensor:
        """Apply RoPE at the positions of the short prompt."""
        return rotary.rotate(x, torch.arange(self.n_pos)[:, None])

    def slack(self, rotary: Rotary | None) -> float:
        """Return the relative rounding error of a query or key vector.

        The cos and sin tables, two products and a sum are rounded by half an eps each. With RoPE,
        the angle adds an error of eps · position, in float32.
        """
        return 2 * self.eps + (2 * self.n_pos * rounding(torch.float32) if rotary else 0)

    def vector_excess(self, vectors: Tensor, expected: Tensor, slack: float) -> float:
        """Return the largest difference between vectors, in units of what rounding explains."""
        limit = slack * expected.abs().amax(-1, keepdim=True).clamp(min=1e-30) * 2
        return float(((vectors - expected).abs() / limit).nan_to_num(torch.inf).max())

    def score_excess(self, rotated: tuple[Tensor, ...], slack: float) -> tuple[float, float, float]:
        """Return how far the products of rotated queries and keys are from the actual scores.

        The three numbers are the first three of a `_Candidate`.
        """
        products = torch.einsum("bqhd,bkhd->bhqk", *rotated)
        q_norm, k_norm = (x.norm(dim=-1).transpose(1, 2) for x in rotated)
        size = abs(self.scale) * q_norm[..., None] * k_norm[..., None, :]
        limit = slack * size.clamp(min=1e-30)
        logits = cap(self.scale * products, self.softcap)
        difference = (logits - self.scores).masked_fill(~self.visible, 0).abs()
        excess = (difference / limit).nan_to_num(torch.inf)
        worst = int(excess.argmax())
        return float(excess.max()), float(difference.max()), float(limit.flatten()[worst])

    def rotations(self) -> list[Rotation]:
        """Return the rotations that the layer's cos and sin tables may stand for."""
        if "hook_cos" not in self.tensors or "hook_sin" not in self.tensors:
            return [Rotation(None, False, None)]
        cos, sin = (self.tensors[point][0].double() for point in ("hook_cos", "hook_sin"))
        frequencies = [
            module for module in self.frequencies if module.layer_type in ("", self.layer_type)
        ]
        return list(matching_rotations(cos, sin, frequencies, self.scale))


def _rotate_alike(first: LayerQK, second: LayerQK) -> bool:
    """Return whether two candidates apply the same rotation, in prompts of any length."""
    a, b = first.rotary, second.rotary
    alike = a and b and a.pairing == b.pairing and torch.equal(a.inv_freq, b.inv_freq)
    return bool(alike and first.live == second.live)


def _norm_weight(attn: Any, norm: str) -> Tensor | None:
    """Return the weight of a norm on queries or keys, float64, or None if it has none."""
    module = getattr(attn.submodules.get(norm), "original_component", None)
    with loaded(module):
        weight = getattr(module, "weight", None)
        return None if weight is None else weight.detach().double().cpu().clone()
