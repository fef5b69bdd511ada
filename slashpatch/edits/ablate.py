"""Ablate heads: replace their output z by nothing, by a mean, or by that of another token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..bridge import ModelInfo
from ..bridge.modes import own_passes
from ..errors import EditError
from .base import Edit, HookContext

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


_MODES = ("zero", "mean", "resample")
_REFERENCE_PROMPTS, _REFERENCE_TOKENS = 4, 256


@dataclass(frozen=True, repr=False)
class AblateHeads(Edit):
    """Replace the output of whole heads at `hook_z`, the input of the output projection.

    `zero` removes the head, but also moves later layers off the distribution that they know; `mean`
    keeps what the head always writes and removes what depends on the token; `resample` keeps the
    head's distribution and removes its relation to this prompt. A head whose slash matters should
    show it under all three. Reference activations come from the model as it is when the edit is
    attached.

    Attributes:
        mode: "zero"; "mean": the head's mean z over the reference tokens; "resample": position p
            gets the head's z at a reference token drawn by `seed` (the same one for every prompt;
            with more positions than reference tokens the draws repeat).
        reference: "natural", "random" (uniform random tokens), or a text or texts; for mean and
            resample only. *Ours*: 4 prompts of up to 256 tokens for the two names.
        seed: Of the reference prompts and the draws.
    """

    mode: str = "zero"
    reference: Any = "natural"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in _MODES:
            raise EditError(f"AblateHeads: mode is one of {', '.join(_MODES)}; got {self.mode!r}")
        if isinstance(self.reference, list):
            object.__setattr__(self, "reference", tuple(self.reference))
        texts = self.reference if isinstance(self.reference, tuple) else (self.reference,)
        if not texts or not all(isinstance(text, str) and text for text in texts):
            raise EditError(
                "AblateHeads: reference is 'natural', 'random', a text or texts; "
                f"got {self.reference!r}"
            )
        if len(texts) == 1:  # one text prints, and so reads back, as that text
            object.__setattr__(self, "reference", texts[0])
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise EditError(f"AblateHeads: seed is an integer; got {self.seed!r}")

    def prepare(self, model: TransformerBridge, info: ModelInfo) -> dict[int, Tensor]:
        """Per layer: mean z [head, d_head], or z of shuffled reference rows [row, head, d_head]."""
        if self.mode == "zero":
            return {}
        bank = _reference_z(self, model, info)
        if self.mode == "mean":
            return {layer: z.double().mean(0).to(z) for layer, z in bank.items()}
        from transformer_lens.utilities.statistics import derive_generator

        n_rows = len(next(iter(bank.values())))
        order = torch.randperm(n_rows, generator=derive_generator(self.seed, "resample"))
        return {layer: z[order.to(z.device)] for layer, z in bank.items()}

    def on_z(
        self, ctx: HookContext, z: Float[Tensor, "batch pos head d_head"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Z of the replacement."""
        if self.mode == "zero":
            return torch.zeros_like(z)
        if self.mode == "mean":
            return ctx.prepared.to(z).expand_as(z)
        rows = ctx.call.positions.to(z.device) % len(ctx.prepared)
        return ctx.prepared.to(z)[rows]


def _reference_z(
    edit: AblateHeads, model: TransformerBridge, info: ModelInfo
) -> dict[int, Float[Tensor, "row head d_head"]]:
    """z of the edit's heads at every token of the reference prompts, in order."""
    from ..data.prompts import prompt_set

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
    rows: dict[int, list[Tensor]] = {layer: [] for layer in edit.layers}

    def keep(z: Tensor, hook: Any) -> None:
        layer = hook.layer()
        rows[layer].append(z[0, :, edit.heads_in(layer)].detach())

    hooks = [(info.hook(layer, "z"), keep) for layer in edit.layers]
    with torch.no_grad(), own_passes():
        for tokens in prompts.tokens:
            model.run_with_hooks(tokens[None].to(model.cfg.device), fwd_hooks=hooks)
    return {layer: torch.cat(parts) for layer, parts in rows.items()}
