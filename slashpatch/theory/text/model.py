"""New models by Transformers' own code, with random weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import TrainerCallback

from .settings import TextSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: θ of RoPE runs from 1 to 1 / _BASE; "high" and "low" are thirds of that on a logarithmic scale.
_BASE = 10_000.0
#: Standard deviation of initial weights. Transformers' own 0.02 keeps attention uniform for long.
_INITIAL = 0.05


def new_model(settings: TextSettings) -> PreTrainedModel:
    """Return a Llama, Qwen 3 (`qk_norm`) or GPT-2 (learned positions) with random weights."""
    import transformers

    shared: dict[str, Any] = {
        "vocab_size": settings.vocabulary,
        "initializer_range": _INITIAL,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    torch.manual_seed(settings.seed)
    if settings.positions == "learned":
        config = transformers.GPT2Config(
            n_layer=settings.layers,
            n_head=settings.heads,
            n_embd=settings.d_model,
            n_inner=settings.d_mlp,
            n_positions=settings.length,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **shared,
        )
        return transformers.GPT2LMHeadModel(config)
    shared |= {
        "hidden_size": settings.d_model,
        "intermediate_size": settings.d_mlp,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "num_key_value_heads": settings.heads,
        "head_dim": settings.d_model // settings.heads,
        "max_position_embeddings": settings.length,
        "rope_parameters": rope_parameters(settings.frequencies),
    }
    if settings.qk_norm:
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shared))
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shared))


def rope_parameters(frequencies: str) -> dict[str, Any]:
    """Return Transformers' description of RoPE for "all", "high" or "low" frequencies.

    A third of the range of log θ has the base 10,000^(1/3). The low third begins at θ =
    10,000^(−2/3), which dividing all positions by 10,000^(2/3) gives ("linear" scaling).
    """
    if frequencies == "all":
        return {"rope_type": "default", "rope_theta": _BASE}
    base = _BASE ** (1 / 3)
    if frequencies == "high":
        return {"rope_type": "default", "rope_theta": base}
    return {"rope_type": "linear", "rope_theta": base, "factor": _BASE ** (2 / 3)}


class CentredEmbeddings(TrainerCallback):
    """Subtract the mean token embedding from all embeddings, at the start and after every step.

    Args:
        share: How often each token occurs in the text, as shares that add up to 1.
    """

    def __init__(self, share: Float[Tensor, "vocabulary"]) -> None:
        self.share = share

    def _centre(self, model: Any) -> None:
        with torch.no_grad():
            weight = model.get_input_embeddings().weight
            weight -= self.share @ weight

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Centre the initial embeddings; those of a checkpoint are centred already."""
        if state.global_step == 0:
            self._centre(kwargs["model"])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Centre the embeddings of this step, before it is measured or saved."""
        self._centre(kwargs["model"])
