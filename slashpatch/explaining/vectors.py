"""One more pass over the prompts: logits by offset and key, and how queries and keys vary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from .. import bridge
from ..bridge.qk import HookLayout, LayerQK
from ..data.heads import Head
from ..edits import Axis
from ..errors import ModelError
from ..maths.logit_shares import BandSums, LogitShares, band_sums, logit_shares
from ..maths.rank import basis
from ..maths.spectrum import predicted_profile
from ..scanning.moments import Moments
from .parts import Variation
from .runs import run_layers

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

#: Most offsets of the logits whose variance is shared out, and most tokens of a prompt (*ours*).
N_OFFSETS, N_TOKENS = 64, 1024


class VectorSums:
    """Sums over tokens of the queries and keys of some heads, by layer.

    Args:
        model: A TransformerBridge.
        heads: The heads.
        moments: Of a scan of the same prompts.
        n_tokens: Length of the shortest prompt.
        axis: Of the layers' attention inputs; None: not wanted.
    """

    def __init__(
        self,
        model: TransformerBridge,
        heads: Sequence[Head],
        moments: Moments,
        n_tokens: int,
        axis: Axis | None,
    ) -> None:
        info = bridge.read(model)
        self.model, self.layers, self.moments = model, info.qk, moments
        self.group = info.n_heads // info.n_kv_heads
        self.heads: dict[int, list[Head]] = {}
        for head in heads:
            self.heads.setdefault(head.layer, []).append(head)
        self.n_offsets = {la: self._visible(la, n_tokens) for la in self.heads}
        self.sums: dict[int, list[BandSums]] = {layer: [] for layer in self.heads}
        # By layer and part: [norm, norm², positive component; head], and the tokens.
        self.varying: dict[tuple[int, str], Tensor] = {}
        self.n_tokens = 0
        # By layer: E(uᵀx)² and E|x|² of the attention's input x, times the tokens.
        self.along: dict[int, Tensor] = {}
        self.axis = axis

    def add(self, prompt: Tensor) -> None:
        """Run one prompt [pos] and add it to the sums."""
        before_rope: dict[str, Tensor] = {}

        def catch(qk: LayerQK, part: str) -> Any:
            layout: HookLayout = getattr(qk, part)
            columns = [
                head.head if part == "q" else head.head // self.group
                for head in self.heads[qk.layer]
            ]

            def hook_fn(tensor: Tensor, hook: Any) -> None:
                carried = layout.read(tensor.detach())[0][:, columns].double().cpu()
                positions = torch.arange(len(carried))
                plain = qk.unrotate(layout, carried[None], positions[None])[0]
                self._add_variation(qk.layer, part, plain.transpose(0, 1))
                if qk.rotary is not None and not layout.after_rope:
                    carried = qk.current().rotate(carried, positions[:, None])
                before_rope[part] = carried.transpose(0, 1)
                if part == "k":
                    self._add_logits(qk, before_rope.pop("q"), before_rope.pop("k"))

            return layout.name, hook_fn

        hooks = [catch(self.layers[layer], part) for layer in self.heads for part in ("q", "k")]
        if self.axis is not None:
            info = bridge.read(self.model)
            hooks += [(info.hook(layer, "input"), self._add_input) for layer in self.heads]
        run_layers(self.model, prompt, hooks, max(self.heads))
        self.n_tokens += len(prompt)

    def shares(self, head: Head) -> LogitShares | None:
        """Return what the head's logits depend on; None for prompts that are too short."""
        n = self.n_offsets[head.layer]
        if n < 2:
            return None
        row = self.heads[head.layer].index(head)
        own = [one.of_head(row) for one in self.sums[head.layer]]
        try:
            rotary = self.moments.rotary(head.layer)
            curve = predicted_profile(*self.moments.mean(head), torch.arange(n), rotary)
        except ModelError:  # without RoPE, or with logits that depend on more than the offset
            curve = torch.full((n,), torch.nan, dtype=torch.float64)
        return logit_shares(own, curve[None])[0]

    def variation(self, head: Head) -> Variation:
        """Return how the head's queries and keys vary in norm and in sign."""
        row = self.heads[head.layer].index(head)
        norms, signs = [], []
        for part in ("q", "k"):
            norm, square, positive = self.varying[head.layer, part][:, row] / self.n_tokens
            norms.append(float((square - norm.square()).clamp(min=0).sqrt() / norm))
            signs.append(float(torch.minimum(positive, 1 - positive)))
        return Variation(*norms, *signs)

    def share_along_axis(self, layer: int) -> float:
        """Return the share of the inputs' second moment along the axis."""
        along, whole = self.along[layer]
        return float(along / whole)

    def _visible(self, layer: int, n_tokens: int) -> int:
        """Return how many offsets from 0 all tokens see: none is masked by a window."""
        seen = (self.moments.logit_rows[layer] > 0).all(0).long().cumprod(0).sum()
        return min(N_OFFSETS, n_tokens // 2, int(seen))

    def _add_variation(
        self, layer: int, part: str, vectors: Float[Tensor, "head pos d_head"]
    ) -> None:
        norm = vectors.norm(dim=-1)
        leading = torch.stack(
            [leading_direction(self.moments, head, part) for head in self.heads[layer]]
        )
        positive = torch.einsum("hpd,hd->hp", vectors, leading) > 0
        sums = torch.stack([norm.sum(1), norm.square().sum(1), positive.sum(1).to(norm)])
        self.varying[layer, part] = self.varying.get((layer, part), 0) + sums

    def _add_input(self, x: Tensor, hook: Any) -> None:
        assert self.axis is not None
        layer = hook.layer()
        wide = x.detach()[0].double().cpu()
        sums = torch.stack([(wide @ self.axis.of(layer)).square().sum(), wide.square().sum()])
        self.along[layer] = self.along.get(layer, 0) + sums

    def _add_logits(self, qk: LayerQK, q: Tensor, k: Tensor) -> None:
        n = self.n_offsets[qk.layer]
        if n >= 2:
            q, k = q[:, :N_TOKENS], k[:, :N_TOKENS]
            self.sums[qk.layer].append(band_sums(q, k, n, qk.scale, qk.softcap))


def leading_direction(moments: Moments, head: Head, part: str) -> Float[Tensor, "d_head"]:
    """Return the leading direction of a head's queries ("q") or keys ("k"); its sign is arbitrary.

    The first right singular vector of the uncentred tokens × d_head matrix.
    """
    grams = moments.gram_q if part == "q" else moments.gram_k
    column = head.head * grams.shape[1] // moments.gram_q.shape[1]
    return basis(grams[head.layer, column])[:, 0]
