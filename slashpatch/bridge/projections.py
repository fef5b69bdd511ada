"""How each layer computes its queries and keys from the attention's input, verified.

The model's own modules compute them again from another input: W_Q or W_K, then a norm on queries or
keys and a clip, where the layer has them. Nothing is assumed of the order of axes that the norm
takes: the one is used that reproduces what the layer's hooks carry.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import ModelError
from ..maths.precision import rounding
from .offloaded import loaded
from .passes import run_probe
from .qk import LayerQK

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from .model_info import ModelInfo

#: Axes of the tensor that a norm on queries or keys takes; the first that fits is used.
_NORM_AXES = ("flat", "pos head", "head pos")


@dataclass(frozen=True, eq=False)
class Projection:
    """How one layer computes queries (`part` "q") or keys ("k") from the attention's input.

    Attributes:
        qk: The layer's queries and keys.
        part: "q" or "k".
        d_model: Width of the input.
        attn: The attention's bridge, which has the modules q, k, q_norm and k_norm.
        norm_axes: Axes of the tensor that the norm takes: "flat" where heads and d_head are one
            axis, "pos head", "head pos"; "" without a norm.
        norm_after_rope: Whether the norm comes after RoPE.
        clip: What each number is clipped to before RoPE; None: not clipped.
    """

    qk: LayerQK
    part: str
    d_model: int
    attn: weakref.ref[Any]
    norm_axes: str = ""
    norm_after_rope: bool = False
    clip: float | None = None

    def __call__(
        self, x: Float[Tensor, "batch pos d_model"], positions: Int[Tensor, "rows pos"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Return pre-RoPE queries or keys of all heads, as `LayerQK` defines them, for input x."""
        layout = self.qk.q if self.part == "q" else self.qk.k
        made = self._apply(self.part, x).unflatten(-1, (-1, layout.d_head))
        if not self.norm_after_rope:
            made = self._normed(made)
        if self.clip is not None:
            made = made.clamp(-self.clip, self.clip)
        if self.norm_after_rope:
            made = self.qk.current().rotate(made, positions[..., None].to(made.device))
            made = self.qk.unrotate(layout, self._normed(made), positions)
        return made

    def weight(self) -> tuple[Float[Tensor, "_ d_model"], Float[Tensor, "_"]]:
        """Return W and the bias (zeros without one) of the map before any norm, in float64."""
        module = self._module(self.part)
        with torch.no_grad(), loaded(module):
            if type(module) is torch.nn.Linear:
                weight = module.weight.detach().double().cpu()
                bias = weight[:, 0] * 0 if module.bias is None else module.bias.double().cpu()
                return weight, bias
            parameter = next(module.parameters())  # of another class: by what the module returns
            floating = parameter if parameter.is_floating_point() else torch.zeros(())
            zero = torch.zeros(1, 1, self.d_model, device=parameter.device, dtype=floating.dtype)
            bias = module(zero)[0, 0].double().cpu()
            unit = torch.eye(self.d_model, device=zero.device, dtype=zero.dtype)[None]
            return module(unit)[0].double().cpu().T - bias[:, None], bias

    def _module(self, name: str) -> Any:
        attn = self.attn()
        module = getattr(getattr(attn, name, None), "original_component", None)
        if module is None:
            raise ModelError(
                f"slashpatch cannot compute queries and keys of layer {self.qk.layer} again: its "
                f"attention ({type(attn).__name__}) has no module {name}"
            )
        return module

    def _apply(self, name: str, x: Tensor) -> Tensor:
        module = self._module(name)
        held = next(module.parameters(), None)
        if held is not None and held.device.type != "meta":  # layers may lie on several devices
            x = x.to(held.device)
        made: Tensor = module(x)
        return made

    def _normed(self, x: Float[Tensor, "batch pos head d_head"]) -> Tensor:
        if not self.norm_axes:
            return x
        norm = f"{self.part}_norm"
        if self.norm_axes == "flat":
            return self._apply(norm, x.flatten(-2)).unflatten(-1, x.shape[-2:])
        if self.norm_axes == "head pos":
            return self._apply(norm, x.transpose(1, 2)).transpose(1, 2)
        return self._apply(norm, x)


class LayerProjections(NamedTuple):
    """How one layer computes queries and keys from the attention's input."""

    q: Projection
    k: Projection


def read_projections(model: TransformerBridge, info: ModelInfo) -> tuple[LayerProjections, ...]:
    """Return the projections of every layer, verified on one short forward pass.

    Raises ModelError for a layer whose queries or keys they do not reproduce.
    """
    cfg = model.cfg
    if cfg.use_split_qkv_input or cfg.use_attn_in:
        raise ModelError(
            "the model computes queries and keys of each head from an input of its own "
            "(use_split_qkv_input or use_attn_in), so there is no one attention input to edit; "
            "turn both off"
        )
    layers = info.qk
    n_pos = next(n for n in (7, 11, 13) if n not in (info.n_heads, info.n_kv_heads, info.d_head))
    tokens = (torch.arange(n_pos)[None] * 5 + 2) % info.d_vocab
    positions = torch.arange(n_pos)[None]
    inputs: dict[int, Tensor] = {}
    found: dict[tuple[int, str], Projection | ModelError] = {}

    def on_input(x: Tensor, hook: Any) -> None:
        inputs[hook.layer()] = x.detach().clone()

    def on_part(qk: LayerQK, part: str) -> Any:
        layout = getattr(qk, part)

        def hook_fn(tensor: Tensor, hook: Any) -> None:
            expected = qk.unrotate(layout, layout.read(tensor), positions)
            x = inputs.get(qk.layer)
            found[qk.layer, part] = _verified(model, qk, part, x, expected, positions)

        return layout.name, hook_fn

    hooks: list[tuple[str, Any]] = [(name, on_input) for name in info.hooks("input")]
    hooks += [on_part(qk, part) for qk in layers for part in "qk"]
    run_probe(model, tokens.to(cfg.device), hooks)
    for result in found.values():
        if isinstance(result, ModelError):
            raise result
    return tuple(
        LayerProjections(found[qk.layer, "q"], found[qk.layer, "k"])  # type: ignore[arg-type]
        for qk in layers
    )


def _verified(
    model: TransformerBridge,
    qk: LayerQK,
    part: str,
    x: Tensor | None,
    expected: Float[Tensor, "batch pos head d_head"],
    positions: Int[Tensor, "rows pos"],
) -> Projection | ModelError:
    """Return the projection that reproduces what a hook carries, or why there is none."""
    what = f"{'queries' if part == 'q' else 'keys'} of layer {qk.layer}"
    refusal = f"slashpatch cannot compute {what} again from the attention's input: "
    if x is None or x.ndim != 3:
        return ModelError(f"{refusal}its hook fires too late, or not with [batch, pos, d_model]")
    attn = model.blocks[qk.layer].attn
    clip = getattr(getattr(attn.original_component, "config", None), "clip_qkv", None)
    after = bool(getattr(model.cfg, "qk_norm_after_rope", False))
    has_norm = f"{part}_norm" in attn.submodules
    best: float | None = None
    problem = ""
    for axes in _NORM_AXES if has_norm else ("",):
        made = Projection(qk, part, x.shape[-1], weakref.ref(attn), axes, after, clip)
        try:
            values = made(x, positions)
        except ModelError as error:
            return error
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            problem = f"{type(error).__name__}: {error}"
            continue
        if values.shape != expected.shape:
            problem = f"shape {list(values.shape)}, expected {list(expected.shape)}"
            continue
        eps = rounding(expected.dtype) + expected.shape[1] * rounding(torch.float32)
        size = expected.double().abs().amax(-1, keepdim=True).clamp(min=1e-30)
        excess = ((values.double() - expected.double()).abs() / (16 * eps * size)).nan_to_num(
            torch.inf
        )
        if float(excess.max()) <= 1:
            return made
        largest = float((values - expected).abs().max())
        best = largest if best is None else min(best, largest)
    if best is not None:
        problem = f"its modules give others (largest difference {best:.2g})"
    return ModelError(refusal + problem)
