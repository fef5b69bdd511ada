"""Verifies on short forward passes that a bridge's hooks are what slashpatch takes them to be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import ModelError
from ..maths.precision import MASKED, rounding
from .native import NativeRuns, folded_apart
from .passes import PROBE_TOKENS, probe_tokens, run_probe

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from .info import ModelInfo


class _Probe:
    """Overwrites one layer's scores and pattern, and keeps what came of it."""

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
        return [(self.info.hook(self.layer, site), fn) for site, fn in functions.items()]

    def check(self) -> None:
        scores, pattern, z = self.scores, self.pattern, self.z
        if scores is None or pattern is None or z is None:
            site = "scores" if scores is None else "pattern" if pattern is None else "z"
            raise self._refusal(f"the hook {self.info.hook(self.layer, site)} never fired")
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
        total = pattern.double().sum(-1, keepdim=True)
        expected = scores.double().masked_fill(~visible, -torch.inf).softmax(-1)
        off = float((pattern.double() / total - expected).abs().max())
        # Weights are at most 1; each is rounded, as is each exponential, and so is their sum.
        tolerance = 4 * rounding(pattern.dtype)
        if not off <= tolerance or float(total.max()) > 1 + tolerance:
            raise self._refusal(
                f"its pattern is not the softmax of its scores (largest difference {off:.2g}); "
                "the scores hook is read-only there, or fires elsewhere"
            )
        self._check_z(z)

    def _check_shapes(self, scores: Tensor, pattern: Tensor, z: Tensor) -> None:
        a = self.info
        square = [1, a.n_heads, PROBE_TOKENS, PROBE_TOKENS]
        for name, tensor, shape in (
            ("scores", scores, square),
            ("pattern", pattern, square),
            ("z", z, [1, PROBE_TOKENS, a.n_heads, a.d_head]),
        ):
            if list(tensor.shape) != shape:
                raise self._refusal(f"its {name} have shape {list(tensor.shape)}, not {shape}")

    def _check_z(self, z: Float[Tensor, "batch pos head d_head"]) -> None:
        size = z.abs().amax((0, 1, 3))
        if float(size[::2].max()) > 0 or not bool((size[1::2] > 0).all()):
            raise self._refusal(
                "clearing the pattern of its even heads did not clear z of just those heads; "
                "the pattern hook is read-only there, or heads are laid out otherwise"
            )

    def _refusal(self, what: str) -> ModelError:
        return ModelError(f"slashpatch refuses {self.name} at layer {self.layer}: {what}")


def verify_hooks(model: TransformerBridge, info: ModelInfo) -> None:
    """Raise ModelError unless every layer's hooks carry, and take, what their names say."""
    name = str(model.cfg.architecture)
    probes = [_Probe(layer, info, name) for layer in range(info.n_layers)]
    tokens = probe_tokens(info.d_vocab).to(model.cfg.device)
    run_probe(model, tokens, [pair for probe in probes for pair in probe.hooks()])
    for probe in probes:
        try:
            probe.check()
        except ModelError as error:
            attn = model.blocks[probe.layer].attn
            raise ModelError(f"{error} (its attention is of {type(attn).__name__})") from None
    if folded_apart(model):
        return
    with NativeRuns(model) as native:
        run_probe(model, tokens, native.hooks())
    for layer, off, allowed, unknown in native.found:
        if not unknown and off > allowed:
            attn = model.blocks[layer].attn
            hooked = "; a torch hook sits on it, remove that first" if attn._forward_hooks else ""
            raise ModelError(
                f"slashpatch refuses {name} at layer {layer}: TransformerLens' attention "
                f"({type(attn).__name__}) differs by {off:.2g} from the one of Transformers that "
                f"it wraps (allowed {allowed:.2g}), so its hooks carry what the model does not "
                f"compute{hooked}"
            )
