"""Forward passes that slashpatch runs itself, to verify a model or to measure it."""

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
from .frequencies import kept_frequencies, rope_follows_length
from .modes import forming_matrices, own_passes
from .offloaded import loaded

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

#: Length of the prompt of `probe_tokens`.
PROBE_TOKENS = 6


@contextmanager
def suspended(model: TransformerBridge) -> Iterator[None]:
    """Take all hooks off the model's hook points while the block runs."""
    saved = [(point, point._forward_hooks) for point in set(model.hook_points())]
    for point, _ in saved:
        point._forward_hooks = OrderedDict()
    try:
        yield
    finally:
        for point, hooks in saved:
            point._forward_hooks = hooks


def probe_tokens(d_vocab: int) -> Int[Tensor, "batch pos"]:
    """Return one short prompt of distinct token ids; always the same one."""
    return (torch.arange(PROBE_TOKENS)[None] * 7 + 3) % d_vocab


def run_probe(
    model: TransformerBridge,
    tokens: Tensor,
    hooks: list[tuple[str, Any]],
    matrices: bool = True,
    kwargs: dict[str, Any] | None = None,
) -> None:
    """Run one short forward pass with no other hooks than `hooks`, without gradients.

    Attention matrices are formed even while the model runs fused, unless `matrices` is False.
    `kwargs` go to the model. Raises ModelError if the model cannot run.
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
        warnings.simplefilter("ignore")  # unusual models are what the probe is for
        try:
            model.run_with_hooks(tokens, fwd_hooks=hooks, **(kwargs or {}))
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            raise ModelError(
                f"slashpatch refuses this model: a short forward pass failed "
                f"({type(error).__name__}: {error})"
            ) from error


@contextmanager
def leaving_no_trace(model: TransformerBridge) -> Iterator[None]:
    """Run forward passes without gradients, and restore dynamic RoPE's frequencies afterwards."""
    kept = kept_frequencies(model) if rope_follows_length(model) else nullcontext()
    with torch.no_grad(), kept:
        yield


def first_layer(model: TransformerBridge) -> int:
    """Return the first layer whose output is used: above 0 under `start_at_layer`."""
    return getattr(model.blocks[0], "_start_at_layer_idx", None) or 0


def output_weight(model: TransformerBridge, layer: int) -> Float[Tensor, "head d_head d_model"]:
    """Return W_O of a layer, by head. Raises AttributeError where TransformerLens has none."""
    attn = model.blocks[layer].attn
    with loaded(getattr(attn.submodules.get("o"), "original_component", None)):
        weight: Tensor = attn.W_O
    return weight
