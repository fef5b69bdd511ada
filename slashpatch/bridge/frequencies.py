"""RoPE frequencies as the model's rotary modules hold them.

Some kinds of RoPE (dynamic NTK, LongRoPE) recompute their frequencies from the length of the prompt
and keep them until the next forward pass.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..maths.rotary import Rotary

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

#: Values of Transformers' `rope_type` whose frequencies depend on the prompt's length.
_LENGTH_DEPENDENT = ("dynamic", "longrope")


class ModuleFrequencies:
    """The frequencies in one buffer of a rotary module.

    Attributes:
        values: θ of each pair at the moment of reading, float64.
        layer_type: Which layers use them (a value of the configuration's `layer_types`), or "" for
            all layers.
        live: The module and the buffer's name where the values change with the prompt's length,
            else None.
    """

    def __init__(self, module: torch.nn.Module, name: str) -> None:
        self.values = getattr(module, name).detach().double().cpu().clone()
        self.layer_type = name.removesuffix("inv_freq").removesuffix("_")
        rope_type = getattr(module, "rope_type", None)
        if isinstance(rope_type, dict):
            rope_type = rope_type.get(self.layer_type)
        follows_length = rope_type in _LENGTH_DEPENDENT or (
            rope_type is None and hasattr(module, "long_inv_freq")
        )
        self.live = (weakref.ref(module), name) if follows_length else None


def module_frequencies(model: TransformerBridge) -> list[ModuleFrequencies]:
    """Return the frequencies that the model's rotary modules use now."""
    return [
        ModuleFrequencies(module, name)
        for module in model.original_model.modules()
        for name, _ in module.named_buffers(recurse=False)
        if name.endswith("inv_freq") and not name.endswith("original_inv_freq")
    ]


class Rotation(NamedTuple):
    """A candidate rotation that agrees with a layer's cos and sin tables; see `LayerQK`."""

    rotary: Rotary | None
    interleaved: bool
    live: Any


def matching_rotations(
    cos: Float[Tensor, "pos column"],
    sin: Float[Tensor, "pos column"],
    frequencies: list[ModuleFrequencies],
    scale: float,
) -> Iterator[Rotation]:
    """Yield each rotation whose frequencies agree with tables of cos and sin.

    Tables have each frequency twice, in halves or side by side, or once. They do not tell which
    dimensions form a pair, so both pairings are yielded; the caller must verify them.
    """
    gain = float(cos[0, 0])
    half = cos.shape[-1] // 2
    layouts = [
        (cos[1, :half], sin[1, :half], False),
        (cos[1, ::2], sin[1, ::2], True),
        (cos[1], sin[1], False),
    ]
    for cos_1, sin_1, interleaved in layouts:
        theta = torch.atan2(sin_1, cos_1)
        for module in frequencies:
            # A loose tolerance, as tables may be rounded to the model's dtype.
            similar = module.values.shape == theta.shape and torch.allclose(
                module.values, theta, rtol=1e-2, atol=1e-2
            )
            for pairing in ("half", "adjacent") if similar else ():
                yield Rotation(
                    Rotary(module.values, pairing, gain, scale), interleaved, module.live
                )


def rope_follows_length(model: TransformerBridge) -> bool:
    """Return whether RoPE's frequencies depend on the prompt's length (dynamic NTK, LongRoPE)."""
    config = model.original_model.config.get_text_config()
    stack = [getattr(config, "rope_parameters", None), getattr(config, "rope_scaling", None)]
    while stack:
        parameters = stack.pop()
        if isinstance(parameters, dict):
            if parameters.get("rope_type", parameters.get("type")) in _LENGTH_DEPENDENT:
                return True
            stack += parameters.values()
    return False


@contextmanager
def kept_frequencies(model: TransformerBridge) -> Iterator[None]:
    """Restore the state of rotary modules on leaving.

    Without it, a forward pass could change later ones: dynamic RoPE keeps the frequencies of the
    longest prompt so far.
    """
    saved = []
    for module in model.original_model.modules():
        buffers = {n: x for n, x in module._buffers.items() if n.endswith("inv_freq")}
        if any(name.endswith("original_inv_freq") for name in {*buffers, *vars(module)}):
            values = {name: buffer.clone() for name, buffer in buffers.items()}
            saved.append((module, buffers, values, dict(vars(module))))
    try:
        yield
    finally:
        for module, buffers, values, attributes in saved:
            for name, buffer in buffers.items():
                buffer.copy_(values[name])  # LongRoPE overwrites its buffers in place
            module._buffers.update(buffers)
            vars(module).update(attributes)
