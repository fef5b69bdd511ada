"""A Trainer whose checkpoints hold plain weights, and a callback that ends a diverged run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback

from ...errors import TheoryError
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


class FiniteWeights(TrainerCallback):
    """End a run whose weights are no longer finite, before they are measured or saved.

    The Trainer does not: it logs the mean of earlier losses instead of a NaN.

    Args:
        every: Number of steps between checks; the last step is checked too.
    """

    def __init__(self, every: int) -> None:
        self.every = every

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise TheoryError for weights that are NaN or infinite."""
        step = state.global_step
        if step % self.every and step < state.max_steps:
            return
        if not all(bool(torch.isfinite(weight).all()) for weight in kwargs["model"].parameters()):
            raise TheoryError(
                f"the weights are not finite at step {step}; use a lower learning_rate than "
                f"{args.learning_rate:g}, in another folder"
            )
