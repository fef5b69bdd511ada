"""Verify on short forward passes that a model's hooks carry what their names say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import ModelError
from ..maths.precision import MASKED, rounding
from .model_info import ModelInfo
from .native import NativeRuns, folded_apart
from .passes import PROBE_TOKENS, probe_tokens, run_probe

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


class _Probe:
    """Hooks that change one layer's scores and pattern, and a check of what follows from that.

    Noise is added to the scores: the pattern must be the softmax of the noisy scores. The pattern
    of every second head is cleared: exactly these heads must have z = 0.
    """

    def __init__(self, layer: int, info: ModelInfo, name: str) -> None:
        self.layer = layer
        self.name = name
        self.info = info
        self.scores: Tensor | None = None
        self.scores_came_last = False
        self.pattern: Tensor | None = None
        self.z: Tensor | None = None

    def on_scores(self, scores: Tensor, hook: Any) -> Tensor:
        noise = torch.rand(scores.shape, generator=torch.Generator().manual_seed(self.layer))
        self.scores_came_last = self.pattern is not None
        self.scores = scores + noise.to(scores)
        return self.scores

    def on_pattern(self, pattern: Tensor, hook: Any) -> Tensor:
        self.pattern = pattern
        cleared = pattern.clone()
        cleared[:, ::2] = 0
        return cleared

    def on_z(self, z: Tensor, hook: Any) -> None:
        self.z = z

    def hooks(self) -> list[tuple[str, Any]]:
        functions = {"scores": self.on_scores, "pattern": self.on_pattern, "z": self.on_z}
        return [(self.info.hook(self.layer, kind), fn) for kind, fn in functions.items()]

    def check(self) -> None:
        scores, pattern, z = self.scores, self.pattern, self.z
        if scores is None or pattern is None or z is None:
            missing = "scores" if scores is None else "pattern" if pattern is None else "z"
            raise self._refusal(f"the hook {self.info.hook(self.layer, missing)} never fired")
        if self.scores_came_last:
            raise self._refusal(
                "its scores hook fires after its pattern hook: TransformerLens leaves this "
                "attention to Transformers and shows copies afterwards, which no hook can change"
            )
        self._check_shapes(scores, pattern, z)
        scores, pattern, z = scores.cpu(), pattern.cpu(), z.cpu()
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if float(pattern.masked_fill(visible, 0).abs().max()) > 0:
            raise self._refusal("its attention looks at later tokens; expected causal attention")
        if float(scores.masked_fill(visible, -torch.inf).max()) > MASKED:
            raise self._refusal("its scores hook fires before the causal mask is applied")
        total = pattern.double().sum(-1, keepdim=True)  # below 1 with attention sinks
        expected = scores.double().masked_fill(~visible, -torch.inf).softmax(-1)
        difference = float((pattern.double() / total - expected).abs().max())
        # Weights are at most 1. Each is rounded, and so are the exponentials and their sum.
        tolerance = 4 * rounding(pattern.dtype)
        if not difference <= tolerance or float(total.max()) > 1 + tolerance:
            raise self._refusal(
                f"its pattern is not the softmax of its scores (largest difference "
                f"{difference:.2g}); the model ignores what the scores hook returns"
            )
        self._check_z(z)

    def _check_shapes(self, scores: Tensor, pattern: Tensor, z: Tensor) -> None:
        info = self.info
        square = [1, info.n_heads, PROBE_TOKENS, PROBE_TOKENS]
        for name, tensor, shape in (
            ("scores", scores, square),
            ("pattern", pattern, square),
            ("z", z, [1, PROBE_TOKENS, info.n_heads, info.d_head]),
        ):
            if list(tensor.shape) != shape:
                raise self._refusal(
                    f"its {name} hook has shape {list(tensor.shape)}; expected {shape}"
                )

    def _check_z(self, z: Float[Tensor, "batch pos head d_head"]) -> None:
        largest = z.abs().amax((0, 1, 3))
        if float(largest[::2].max()) > 0 or not bool((largest[1::2] > 0).all()):
            raise self._refusal(
                "clearing the pattern of heads 0, 2, ... did not clear z of exactly these heads; "
                "the model ignores what the pattern hook returns, or z orders its heads differently"
            )

    def _refusal(self, reason: str) -> ModelError:
        return ModelError(f"slashpatch refuses {self.name} at layer {self.layer}: {reason}")


def verify_hooks(model: TransformerBridge, info: ModelInfo) -> None:
    """Raise ModelError unless each layer's hooks carry what their names say and can change it."""
    name = str(model.cfg.architecture)
    probes = [_Probe(layer, info, name) for layer in range(info.n_layers)]
    tokens = probe_tokens(info.d_vocab).to(model.cfg.device)
    run_probe(model, tokens, [pair for probe in probes for pair in probe.hooks()])
    for probe in probes:
        try:
            probe.check()
        except ModelError as error:
            attn = model.blocks[probe.layer].attn
            raise ModelError(f"{error} (class of its attention: {type(attn).__name__})") from None
    if folded_apart(model):
        return
    with NativeRuns(model) as native:
        run_probe(model, tokens, native.hooks())
    for layer, difference, allowed, unknown in native.found:
        if not unknown and difference > allowed:
            attn = model.blocks[layer].attn
            hooked = "; a torch hook sits on it, remove that first" if attn._forward_hooks else ""
            raise ModelError(
                f"slashpatch refuses {name} at layer {layer}: TransformerLens' attention "
                f"({type(attn).__name__}) differs by {difference:.2g} from the attention of "
                f"Transformers that it wraps (allowed {allowed:.2g}), so its hooks carry tensors "
                f"that the original model does not compute{hooked}"
            )
