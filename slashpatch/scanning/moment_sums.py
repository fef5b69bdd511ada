"""Running sums over tokens behind rank, cone and mean logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool
from torch import Tensor

from .. import bridge
from ..bridge import ModelInfo
from ..bridge.attached import reads_diagonals
from ..bridge.qk import HookLayout, LayerQK
from ..errors import ModelError, ScanError
from ..maths.precision import MASKED
from ..maths.rotary import Rotary
from ..maths.slash_scores import real_rows, slash_rows
from .moments import _WEIGHED, Moments

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


#: Tokens at a time: what fits the processor's cache.
_SOME_TOKENS = 1024


class MomentSums:
    """Running sums of one scan. Raises ModelError where q and k cannot be read."""

    def __init__(self, model: TransformerBridge, info: ModelInfo, n_offsets: int) -> None:
        self.info = info
        self.layers = bridge.read(model).qk
        #: Of layers whose frequencies follow the prompt's length: those of these prompts.
        self.rotaries: dict[int, Rotary] = {}
        n_pairs = max((qk.rotary.n_pairs for qk in self.layers if qk.rotary), default=0)
        n_layers, n_heads, n_kv = info.n_layers, info.n_heads, info.n_kv_heads
        d_head, d_model = info.d_head, model.cfg.d_model

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(n_layers, *shape, dtype=torch.float64)

        self.sums = {
            "gram_q": zeros(n_heads, d_head, d_head),
            "gram_k": zeros(n_kv, d_head, d_head),
            "sum_q": zeros(n_heads, d_head),
            "sum_k": zeros(n_kv, d_head),
            "sum_x": zeros(d_model),
            "unit_q": zeros(n_heads, d_head),
            "unit_k": zeros(n_kv, d_head),
            "unit_x": zeros(d_model),
            "abs_q": zeros(n_heads, n_pairs),
            "abs_k": zeros(n_kv, n_pairs),
            "logits": zeros(n_heads, n_offsets),
        }
        self.n_tokens = torch.tensor(0)
        self.logit_rows = torch.zeros(n_layers, n_heads, n_offsets, dtype=torch.int64)

    def hooks(self, real: Bool[Tensor, "batch pos"]) -> list[tuple[str, Callable[..., None]]]:
        """Hooks that add one batch to the sums; padding is left out."""
        offsets = torch.arange(self.logit_rows.shape[-1])
        rows = real_rows(real, real.shape[1], offsets)
        self.n_tokens = self.n_tokens + real.sum()
        found = []
        for qk in self.layers:
            found += [
                (qk.q.name, self._adder(qk, "q", qk.q, real)),
                (qk.k.name, self._adder(qk, "k", qk.k, real)),
                (self.info.hook(qk.layer, "input"), self._adder(qk, "x", None, real)),
                (
                    self.info.hook(qk.layer, "scores"),
                    self._logit_adder(qk.layer, real, offsets, rows),
                ),
            ]
        return found

    def _adder(
        self, qk: LayerQK, part: str, layout: HookLayout | None, real: Tensor
    ) -> Callable[[Tensor, Any], None]:
        every = bool(real.all())

        def add(tensor: Tensor, hook: Any) -> None:
            read = tensor
            if layout is not None:
                self._same_rotation(qk)
                read = layout.read(tensor)
                read = qk.unrotate(layout, read, torch.arange(read.shape[1])[None])
            tokens = read.flatten(0, 1) if every else read[real.to(read.device)]
            for some in tokens.detach().split(_SOME_TOKENS):
                self._add(qk, part, some)

        return add

    def _same_rotation(self, qk: LayerQK) -> None:
        """Raise ScanError where RoPE follows the prompt's length and prompts rotate differently."""
        if qk.live is None:
            return
        now = qk.current()
        before = self.rotaries.setdefault(qk.layer, now)
        if not torch.equal(before.inv_freq, now.inv_freq):
            raise ScanError(
                "the model's RoPE follows the prompt's length (dynamic or LongRoPE), and these "
                "prompts are rotated at different frequencies, of which no profile can be made; "
                "scan prompts of one length, or give moments=False"
            )

    def _add(self, qk: LayerQK, part: str, tokens: Tensor) -> None:
        """Add some tokens, [token, head, d_head] or [token, d_model]: products and sums in their
        own precision (float32 at least), float64 beyond.
        """
        x = tokens.unsqueeze(0) if part == "x" else tokens.transpose(0, 1)
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        x = x.contiguous()  # [head, token, width]
        lengths = torch.linalg.vector_norm(x, dim=-1).clamp(min=1e-12)
        both = torch.stack([torch.ones_like(lengths), 1 / lengths], dim=1) @ x
        found = {"sum": both[:, 0], "unit": both[:, 1]}
        if part != "x":
            found["gram"] = x.mT @ x
            if qk.rotary is not None:
                found["abs"] = torch.hypot(*qk.rotary.split(x)[:2]).sum(1)
        for name, total in found.items():
            sums = self.sums[f"{name}_{part}"][qk.layer]
            sums = sums[:, : total.shape[-1]] if name == "abs" else sums
            sums += total.cpu().double().view(sums.shape)

    def _logit_adder(
        self, layer: int, real: Tensor, offsets: Tensor, rows: Bool[Tensor, "batch query offset"]
    ) -> Callable[[Tensor, Any], None]:
        everywhere = rows.sum((0, 1))

        @reads_diagonals
        def add(scores: Any, hook: Any) -> None:
            if not isinstance(scores, Tensor):
                sums = scores.logit_sums(len(offsets), real)
                if sums is not None:
                    self.sums["logits"][layer] += sums.double().sum(0).cpu()
                    self.logit_rows[layer] += everywhere
                    return
            taken = slash_rows(scores, offsets.to(scores.device))
            # Keys outside a sliding window are masked, not measured.
            seen = rows.to(scores.device)[:, None] & (taken > MASKED)
            kept = taken.masked_fill(~seen, 0)
            self.sums["logits"][layer] += kept.sum((0, 2), dtype=_widest(kept)).cpu()
            self.logit_rows[layer] += seen.sum((0, 2)).cpu()

        return add

    def finish(self) -> Moments:
        """The sums as they stand."""
        n_pairs = self.sums["abs_q"].shape[-1]
        inv_freq = torch.full((len(self.layers), n_pairs), torch.nan, dtype=torch.float64)
        for qk in self.layers:
            if qk.rotary is not None:
                if qk.rotary.n_pairs != n_pairs:
                    raise ModelError("layers rotate different numbers of pairs; not supported")
                inv_freq[qk.layer] = self.rotaries.get(qk.layer, qk.rotary).inv_freq
        rotaries = [qk.rotary for qk in self.layers]
        return Moments(
            n_tokens=self.n_tokens,
            **self.sums,
            logit_rows=self.logit_rows,
            inv_freq=inv_freq,
            gain=torch.tensor([r.gain if r else 1.0 for r in rotaries], dtype=torch.float64),
            scale=torch.tensor([qk.scale for qk in self.layers], dtype=torch.float64),
            pairing=tuple(_pairing(qk) for qk in self.layers),
        )


def _pairing(qk: LayerQK) -> str:
    if qk.rotary is None:
        return ""
    return qk.rotary.pairing if qk.relative else _WEIGHED


def _widest(x: Tensor) -> torch.dtype:
    """float64, or float32 on MPS, which has none."""
    return torch.float32 if x.device.type == "mps" else torch.float64
