"""Forward passes that slashpatch runs for itself."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import ModelError
from .modes import forming_matrices, own_passes

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


PROBE_TOKENS = 6


@contextmanager
def suspended(model: TransformerBridge) -> Iterator[None]:
    """Run the model without the hooks that others have attached to its hook points."""
    saved = [(point, point._forward_hooks) for point in set(model.hook_points())]
    for point, _ in saved:
        point._forward_hooks = OrderedDict()
    try:
        yield
    finally:
        for point, hooks in saved:
            point._forward_hooks = hooks


@contextmanager
def kept_frequencies(model: TransformerBridge) -> Iterator[None]:
    """Leave rotary modules as they are: dynamic RoPE remembers the longest prompt that it saw."""
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
                buffer.copy_(values[name])  # LongRoPE writes in place
            module._buffers.update(buffers)
            vars(module).update(attributes)


def probe_tokens(d_vocab: int) -> Int[Tensor, "batch pos"]:
    """A few distinct tokens, the same ones each time."""
    return (torch.arange(PROBE_TOKENS)[None] * 7 + 3) % d_vocab


def run_probe(
    model: TransformerBridge,
    tokens: Tensor,
    hooks: list[tuple[str, Any]],
    matrices: bool = True,
    kwargs: dict[str, Any] | None = None,
) -> None:
    """One forward pass for the sake of `hooks` alone. Raises ModelError if the model cannot run.

    It forms attention matrices, unless told not to, also where the model runs fused.
    """
    with (
        torch.no_grad(),
        torch.autocast(torch.device(model.cfg.device).type, enabled=False),
        own_passes(),
        forming_matrices(matrices),
        suspended(model),
        kept_frequencies(model),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # what they warn of is what is being found out
        try:
            model.run_with_hooks(tokens, fwd_hooks=hooks, **(kwargs or {}))
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            raise ModelError(
                f"slashpatch refuses this model: a short forward pass failed "
                f"({type(error).__name__}: {error})"
            ) from error


#: Kinds of RoPE whose frequencies follow the prompt's length.
FOLLOWING = ("dynamic", "longrope")


def rope_follows_length(model: TransformerBridge) -> bool:
    """Whether RoPE's frequencies depend on the prompt's length (dynamic NTK, LongRoPE)."""
    config = model.original_model.config.get_text_config()
    stack = [getattr(config, "rope_parameters", None), getattr(config, "rope_scaling", None)]
    while stack:
        found = stack.pop()
        if isinstance(found, dict):
            if found.get("rope_type", found.get("type")) in FOLLOWING:
                return True
            stack += found.values()
    return False


@contextmanager
def leaving_no_trace(model: TransformerBridge) -> Iterator[None]:
    """Passes without gradients, after which dynamic RoPE does not remember their length."""
    kept = kept_frequencies(model) if rope_follows_length(model) else nullcontext()
    with torch.no_grad(), kept:
        yield


def first_layer(model: TransformerBridge) -> int:
    """The first layer that counts in the current pass: `start_at_layer` discards those below."""
    return getattr(model.blocks[0], "_start_at_layer_idx", None) or 0


def output_weight(model: TransformerBridge, layer: int) -> Float[Tensor, "head d_head d_model"]:
    """Return W_O of a layer, by head. Raises AttributeError where TransformerLens has no such."""
    found: Tensor = model.blocks[layer].attn.W_O
    return found
