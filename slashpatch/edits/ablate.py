"""Ablate heads: replace their output z by zero, its mean, another token's z, or a fitted vector."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..bridge import ModelInfo
from ..bridge.modes import own_passes
from ..data.heads import heads
from ..data.prompts import prompt_set
from ..errors import EditError
from .base import Edit, HookContext
from .constants import Constants

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


_MODES = ("zero", "mean", "resample", "optimal")
_REFERENCE_PROMPTS, _REFERENCE_TOKENS = 4, 256


@dataclass(frozen=True, repr=False)
class AblateHeads(Edit):
    """Ablate whole heads: replace their output at `hook_z`, before the output projection W_O.

    Zero ablation ("zero") removes the head, but also moves later layers off the distribution that
    they were trained on. Mean ablation ("mean") keeps what the head writes for every token and
    removes what depends on the token. Resample ablation ("resample") keeps the distribution of the
    head's outputs and removes their relation to this prompt. Optimal ablation ("optimal", Li and
    Janson, arXiv 2409.09951) puts in the constant vector that hurts a metric least, so that what is
    left is what no constant can replace. A head that matters should have an effect under all four.
    Reference activations come from the model as it is when the edit is attached, active patches
    included.

    Attributes:
        mode: "zero"; "mean": z becomes the head's mean z over the reference tokens; "resample": z
            at position p becomes the head's z at a random reference token, the same token for every
            prompt (with more positions than reference tokens, the random tokens repeat); "optimal":
            z becomes the head's vector of `constants`.
        reference: Prompts for "mean" and "resample": "natural" (natural text), "random" (uniform
            random tokens), or one or several texts. The two names stand for 4 prompts of up to 256
            tokens (*ours*).
        seed: Random seed of the reference prompts and of resampling.
        constants: For "optimal": what `fit_ablation` returned, or the file that it was saved to.
    """

    mode: str = "zero"
    reference: Any = "natural"
    seed: int = 0
    constants: Any = None

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
        self._set_constants()

    def _set_constants(self) -> None:
        """Load constants that were given as a file. Raises EditError unless they fit the mode."""
        if (self.mode == "optimal") != (self.constants is not None):
            raise EditError(
                f"AblateHeads: mode 'optimal' and constants go together; got mode {self.mode!r} "
                f"{'without' if self.constants is None else 'with'} constants. Fit them with "
                "slashpatch.fit_ablation(model, heads), and pass them or their file as constants="
            )
        if isinstance(self.constants, (str, os.PathLike)):
            object.__setattr__(self, "constants", Constants.load(self.constants))
        if self.constants is not None and not isinstance(self.constants, Constants):
            raise EditError(
                "AblateHeads: constants must be what slashpatch.fit_ablation returned, or its file;"
                f" got {self.constants!r}"
            )

    def validate(self, info: ModelInfo) -> None:
        """Raise if the model lacks one of the heads, or the constants do not fit the heads."""
        super().validate(info)
        if self.constants is None:
            return
        missing = [str(head) for head in heads(self.heads) if head not in self.constants.heads]
        if missing:
            raise EditError(
                f"{self}: the constants were fitted for "
                f"{', '.join(map(str, self.constants.heads))}, not for {', '.join(missing)}"
            )
        if self.constants.z.shape[1] != info.d_head:
            raise EditError(
                f"{self}: the constants have d_head {self.constants.z.shape[1]}, the model "
                f"{info.d_head}"
            )

    def prepare(self, model: TransformerBridge, info: ModelInfo) -> dict[int, Tensor]:
        """Return constant z [head, d_head] or shuffled z [token, head, d_head], by layer."""
        if self.mode == "zero":
            return {}
        if self.mode == "optimal":
            return {layer: self.constants.of(layer, self.heads_in(layer)) for layer in self.layers}
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
        """Return the replacement of z: zeros, a constant vector, or z of the resampled tokens."""
        if self.mode == "zero":
            return torch.zeros_like(z)
        if self.mode in ("mean", "optimal"):
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
