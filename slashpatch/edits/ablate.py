"""Ablate heads: replace their output z by zero, by its mean, or by its value at another token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..bridge import ModelInfo
from ..bridge.modes import own_passes
from ..data.prompts import prompt_set
from ..errors import EditError
from .base import Edit, HookContext

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


_MODES = ("zero", "mean", "resample")
_REFERENCE_PROMPTS, _REFERENCE_TOKENS = 4, 256


@dataclass(frozen=True, repr=False)
class AblateHeads(Edit):
    """Ablate whole heads: replace their output at `hook_z`, before the output projection W_O.

    Zero ablation ("zero") removes the head, but also moves later layers off the distribution that
    they were trained on. Mean ablation ("mean") keeps what the head writes for every token and
    removes what depends on the token. Resample ablation ("resample") keeps the distribution of the
    head's outputs and removes their relation to this prompt. A head that matters should have an
    effect under all three. Reference activations come from the model as it is when the edit is
    attached, active patches included.

    Attributes:
        mode: "zero"; "mean": z becomes the head's mean z over the reference tokens; "resample": z
            at position p becomes the head's z at a random reference token, the same token for every
            prompt (with more positions than reference tokens, the random tokens repeat).
        reference: Prompts for "mean" and "resample": "natural" (natural text), "random" (uniform
            random tokens), or one or several texts. The two names stand for 4 prompts of up to 256
            tokens (*ours*).
        seed: Random seed of the reference prompts and of resampling.
    """

    mode: str = "zero"
    reference: Any = "natural"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in _MODES:
            raise EditError(
                f"AblateHeads: mode must be one of {', '.join(_MODES)}; got {self.mode!r}"
            )
        if isinstance(self.reference, list):
            object.__setattr__(self, "reference", tuple(self.reference))
        texts = self.reference if isinstance(self.reference, tuple) else (self.reference,)
        if not texts or not all(isinstance(text, str) and text for text in texts):
            raise EditError(
                "AblateHeads: reference must be 'natural', 'random', a text or several texts; "
                f"got {self.reference!r}"
            )
        if len(texts) == 1:  # `str(edit)` writes a 1-tuple as its only member
            object.__setattr__(self, "reference", texts[0])
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise EditError(f"AblateHeads: seed must be an integer; got {self.seed!r}")

    def prepare(self, model: TransformerBridge, info: ModelInfo) -> dict[int, Tensor]:
        """Return mean z [head, d_head] or shuffled z [token, head, d_head], by layer."""
        if self.mode == "zero":
            return {}
        reference = _reference_z(self, model, info)
        if self.mode == "mean":
            return {layer: z.double().mean(0).to(z) for layer, z in reference.items()}
        from transformer_lens.utilities.statistics import derive_generator

        n_tokens = len(next(iter(reference.values())))
        order = torch.randperm(n_tokens, generator=derive_generator(self.seed, "resample"))
        return {layer: z[order.to(z.device)] for layer, z in reference.items()}

    def on_z(
        self, ctx: HookContext, z: Float[Tensor, "batch pos head d_head"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Return the replacement of z: zeros, the mean z, or z of the resampled tokens."""
        if self.mode == "zero":
            return torch.zeros_like(z)
        if self.mode == "mean":
            return ctx.prepared.to(z).expand_as(z)
        resampled = ctx.call.positions.to(z.device) % len(ctx.prepared)
        return ctx.prepared.to(z)[resampled]


def _reference_z(
    edit: AblateHeads, model: TransformerBridge, info: ModelInfo
) -> dict[int, Float[Tensor, "token head d_head"]]:
    """Return z of the edit's heads at every token of the reference prompts, by layer."""
    if edit.reference in ("natural", "random"):
        prompts = prompt_set(
            model,
            random_tokens=edit.reference == "random",
            n_prompts=_REFERENCE_PROMPTS,
            max_tokens=min(_REFERENCE_TOKENS, info.n_ctx),
            seed=edit.seed,
        )
    else:
        texts = [edit.reference] if isinstance(edit.reference, str) else list(edit.reference)
        prompts = prompt_set(model, texts)
    by_layer: dict[int, list[Tensor]] = {layer: [] for layer in edit.layers}

    def keep(z: Tensor, hook: Any) -> None:
        layer = hook.layer()
        by_layer[layer].append(z[0, :, edit.heads_in(layer)].detach())

    hooks = [(info.hook(layer, "z"), keep) for layer in edit.layers]
    with torch.no_grad(), own_passes():
        for tokens in prompts.tokens:
            model.run_with_hooks(tokens[None].to(model.cfg.device), fwd_hooks=hooks)
    return {layer: torch.cat(parts) for layer, parts in by_layer.items()}
