"""A Trainer whose checkpoints hold plain weights, also where a bridge is around the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import Trainer

from .weights import copy_weights, plain_weights

_WEIGHTS = "model.safetensors"


class PlainTrainer(Trainer):
    """The Hugging Face Trainer, except that weights are saved under their plain names.

    Transformers cannot save a model inside a TransformerBridge, which holds each weight under
    several names.
    """

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        assert output_dir is not None
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        weights = {name: weight.contiguous() for name, weight in plain_weights(self.model).items()}
        save_file(weights, Path(output_dir) / _WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        copy_weights(self.model, load_file(Path(resume_from_checkpoint) / _WEIGHTS))
