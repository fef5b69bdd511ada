"""Measure a model that is being trained: in a copy, so that nothing of the training changes.

A bridge puts components of its own into a model, and needs eager attention and evaluation mode. So
the model itself is not wrapped: its weights are copied into a second model of the same
configuration, which lives as long as one measurement.
"""

from __future__ import annotations

import copy
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..errors import ModelError
from ..maths.precision import logits_slack
from .converted import _quiet_transformers
from .frequencies import kept_frequencies
from .loading import load
from .passes import probe_tokens

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run the block without gradients or autocast, and leave every random generator as it was."""
    import numpy

    kinds = {weight.device.type for weight in model.parameters()} - {"cpu", "meta"}
    kind = min(kinds, default="cpu")
    cuda = [*range(torch.cuda.device_count())] if kind == "cuda" else []
    states = random.getstate(), numpy.random.get_state()
    on_mps = torch.mps.get_rng_state() if kind == "mps" else None
    try:
        with (
            torch.random.fork_rng(devices=cuda),
            torch.no_grad(),
            torch.autocast(kind, enabled=False),
        ):
            yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        if on_mps is not None:
            torch.mps.set_rng_state(on_mps)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and each of its modules back into its own mode.

    Also of a TransformerBridge, which passes its mode on to the model that it does not register.
    """
    inner: Any = getattr(model, "original_model", None)
    modules = [*model.modules(), *(inner.modules() if isinstance(inner, nn.Module) else ())]
    modes = [(module, module.training) for module in modules]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def unwrapped(model: Any) -> Any:
    """Return the model inside torch.compile's and data parallelism's wrappers."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        else:
            return model


def bridge_of_copy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
) -> TransformerBridge:
    """Return a bridge around a copy of a Transformers model, on the same device, in its dtype.

    The copy is made from the model's configuration, and has its parameters and buffers: memory for
    its weights once more. Call it within `undisturbed`, because new models draw random weights.

    Raises ModelError for what is no Transformers model, for weights that are spread over processes
    or not finite, and for a model that has other weights than its configuration describes.
    """
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            "expected a Transformers model (PreTrainedModel) to copy, got "
            f"{type(model).__module__}.{type(model).__name__}; of adapters (PEFT), measure the "
            "merged model"
        )
    if any(isinstance(module, GeneralizedComponent) for module in model.modules()):
        raise ModelError(
            "a TransformerBridge is around this model already, and edits on it would be lost in a "
            "copy; pass the bridge itself"
        )
    places = sorted({str(weight.device) for weight in model.parameters()})
    if len(places) > 1:
        raise ModelError(
            f"the weights are on several devices ({', '.join(places)}); slashpatch measures models "
            "in training that are on one; measure checkpoints with slashpatch.emergence(...)"
        )
    for name, weight in model.named_parameters():
        if weight.is_meta or hasattr(weight, "ds_id") or type(weight).__name__ == "DTensor":
            raise ModelError(
                f"the weights are spread over processes or not in memory ({name}): slashpatch "
                "measures models whose weights are whole in each process; measure checkpoints with "
                "slashpatch.emergence(...)"
            )
    with _quiet_transformers():
        twin = type(model)._from_config(
            copy.deepcopy(model.config), attn_implementation="eager", dtype=model.dtype
        )
        _copy_tensors(dict(model.named_parameters()), dict(twin.named_parameters()), model)
        _require_finite(twin)
        _copy_tensors(dict(model.named_buffers()), dict(twin.named_buffers()), model)
        if tokenizer is None:
            return load(twin)
        with tempfile.TemporaryDirectory(prefix="slashpatch-") as folder:
            # TransformerLens reads tokenizers again from where they are stored.
            tokenizer.save_pretrained(folder)
            stored = type(tokenizer).from_pretrained(folder)
            return load(twin, tokenizer=stored)


def _copy_tensors(source: dict[str, Tensor], target: dict[str, Tensor], model: Any) -> None:
    """Give each target the value of its source, in dtype and place too. Raises ModelError."""
    if differing := sorted(source.keys() ^ target.keys()):
        whose = "the model has" if differing[0] in source else "the model lacks"
        raise ModelError(
            f"a new {type(model).__name__} of the model's configuration has other weights: {whose} "
            f"{differing[0]} (and {len(differing) - 1} more differ), so no copy of it can be "
            "measured; expected a model as Transformers makes it"
        )
    for name, tensor in target.items():
        if tensor.shape != source[name].shape:
            raise ModelError(
                f"{name} has the shape {list(source[name].shape)}; the model's configuration "
                f"describes {list(tensor.shape)}, so no copy of it can be measured"
            )
        tensor.data = source[name].detach().clone()


def _require_finite(model: nn.Module) -> None:
    """Raise ModelError for weights with NaN or infinite values, as where training diverged."""
    for name, weight in model.named_parameters():
        if not bool(weight.isfinite().all()):
            raise ModelError(f"{name} holds NaN or infinite values; expected finite weights")


def require_same_logits(model: PreTrainedModel, bridge: TransformerBridge) -> None:
    """Raise ModelError unless a model computes what the bridge around its copy computes.

    They differ where the model's code was changed in memory, or hooks change what it computes. A
    model with compiled parts is not run, because that could change how they are compiled.
    """
    compiled = (
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )
    if any(compiled):
        return
    tokens = probe_tokens(bridge.cfg.d_vocab).to(model.device)
    shim: Any = SimpleNamespace(original_model=model)
    with evaluating(model), kept_frequencies(shim):
        # accelerate puts autocast around forward, and keeps the method itself.
        forward = getattr(model, "_original_forward", model.forward)
        theirs = forward(input_ids=tokens).logits.double()
    ours = bridge(tokens, return_type="logits").to(theirs)
    allowed = logits_slack(model.dtype, bridge.cfg.n_layers) * float(theirs.abs().max())
    off = float((ours - theirs).abs().max())
    if not off <= allowed and bool(theirs.isfinite().all()):
        raise ModelError(
            f"a copy of this {type(model).__name__} computes other logits (off by {off:.2g}, where "
            f"rounding explains {allowed:.2g}): its code was changed, or hooks change what it "
            "computes; if a TransformerBridge is around it, pass the bridge"
        )
