"""Attention patterns during training, to look at: of one sequence, at every measured step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import TrainerCallback

from ... import bridge as layouts
from ...bridge.trained import bridge_of_copy, evaluating, undisturbed, unwrapped
from ...data.files import load_tensors, save_tensors
from ...errors import TheoryError
from .settings import TextSettings

_FORMAT = "slashpatch-patterns-1"
#: Random tokens of the sequence, which then come a second time.
N_REPEATED = 24


def sequence(settings: TextSettings) -> Int[Tensor, "1 pos"]:
    """Return the sequence whose patterns are kept: `<s>`, 24 random tokens, and these again."""
    n = min(N_REPEATED, (settings.length - 1) // 2)
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, settings.vocabulary, (1, n), generator=draw)
    return torch.cat([torch.zeros(1, 1, dtype=tokens.dtype), tokens, tokens], dim=1)


class PatternCallback(TrainerCallback):
    """Write the attention patterns of one sequence at every measured step, each to its own file.

    Args:
        folder: The folder of the files.
        settings: The run's settings.
        bridge: A TransformerBridge around the trained model, where edits act; None: copy the model.
    """

    def __init__(self, folder: Path, settings: TextSettings, bridge: Any = None) -> None:
        self.folder, self.settings, self.bridge = folder, settings, bridge

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the patterns before the first step."""
        self.folder.mkdir(exist_ok=True)
        if state.global_step == 0:
            self._write(kwargs["model"], 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the patterns, if it is time."""
        if state.global_step % self.settings.every == 0 or state.global_step == state.max_steps:
            self._write(kwargs["model"], state.global_step)

    def _write(self, model: Any, step: int) -> None:
        model = unwrapped(model)
        with undisturbed(model):
            made = bridge_of_copy(model) if self.bridge is None else self.bridge
            found: dict[int, Tensor] = {}

            def keep(pattern: Tensor, hook: Any) -> None:
                found[hook.layer()] = pattern[0].detach().float().cpu()

            with evaluating(made):
                hooks = [(name, keep) for name in layouts.read(made).hooks("pattern")]
                made.run_with_hooks(sequence(self.settings), fwd_hooks=hooks, return_type="logits")
        patterns = torch.stack([found[layer] for layer in sorted(found)])
        rounded = (255 * patterns).round().to(torch.uint8)
        header = {"format": _FORMAT, "step": step}
        save_tensors(self.folder / f"step-{step:08d}.safetensors", header, {"patterns": rounded})


def load_patterns(folder: Path) -> dict[int, Float[Tensor, "layer head query key"]]:
    """Return the patterns of a folder by step, exact to 1/510. Raises TheoryError."""

    def build(header: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[int, Tensor]:
        return int(header["step"]), tensors["patterns"].float() / 255

    files = sorted(folder.glob("step-*.safetensors"))
    return dict(load_tensors(path, _FORMAT, build, TheoryError) for path in files)
