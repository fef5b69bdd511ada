"""Accumulate the sums over tokens from which rank, cone and mean logits are computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from ..bridge import ModelInfo
from ..bridge.attached import reads_diagonals
from ..bridge.qk import HookLayout, LayerQK
from ..errors import ModelError, ScanError
from ..maths.precision import MASKED
from ..maths.rotary import Rotary
from ..maths.slash_scores import real_rows, slash_rows
from .moments import WEIGHED, Moments

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


#: Tokens that are added at a time, so that they fit the processor's cache.
_CHUNK_TOKENS = 1024


class BatchMoments(NamedTuple):
    """The sums of one batch, as another process can send them; names as in `MomentSums`."""

    sums: dict[str, Tensor]
    n_tokens: Tensor
    logit_rows: Tensor
    rotaries: dict[int, Rotary]


class MomentSums:
    """Sums of one batch, or of a scan. Raises ModelError if queries or keys cannot be read.

    Attributes:
        sums: The sums by their names in `Moments`, one row per layer.
        rotaries: By layer, the rotation at these prompts' length, where RoPE follows the length.
    """

    def __init__(self, model: TransformerBridge, info: ModelInfo, n_offsets: int) -> None:
        self.info = info
        self.layers = info.qk
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

    @property
    def of_batch(self) -> BatchMoments:
        """The sums so far."""
        return BatchMoments(self.sums, self.n_tokens, self.logit_rows, self.rotaries)

    def add(self, batch: BatchMoments) -> None:
        """Add the sums of a batch. Raises ScanError if its RoPE is another than that of before."""
        for layer, rotary in batch.rotaries.items():
            self._require_same(self.rotaries.setdefault(layer, rotary), rotary)
        for name, sums in batch.sums.items():
            self.sums[name] += sums
        self.n_tokens = self.n_tokens + batch.n_tokens
        self.logit_rows += batch.logit_rows

    def hooks(self, real: Bool[Tensor, "batch pos"]) -> list[tuple[str, Callable[..., None]]]:
        """Return hooks that add one batch to the sums; padding is left out."""
        offsets = torch.arange(self.logit_rows.shape[-1])
        rows = real_rows(real, real.shape[1], offsets)
        self.n_tokens = self.n_tokens + real.sum()
        hooks = []
        for qk in self.layers:
            hooks += [
                (qk.q.name, self._adder(qk, "q", qk.q, real)),
                (qk.k.name, self._adder(qk, "k", qk.k, real)),
                (self.info.hook(qk.layer, "input"), self._adder(qk, "x", None, real)),
                (
                    self.info.hook(qk.layer, "scores"),
                    self._logit_adder(qk.layer, real, offsets, rows),
                ),
            ]
        return hooks

    def _adder(
        self, qk: LayerQK, part: str, layout: HookLayout | None, real: Tensor
    ) -> Callable[[Tensor, Any], None]:
        """Return a hook that adds queries ("q"), keys ("k") or the attention's input ("x")."""
        unpadded = bool(real.all())

        def add(tensor: Tensor, hook: Any) -> None:
            read = tensor
            if layout is not None:
                self._require_same_rotation(qk)
                read = layout.read(tensor)
                read = qk.unrotate(layout, read, torch.arange(read.shape[1])[None])
            tokens = read.flatten(0, 1) if unpadded else read[real.to(read.device)]
            for chunk in tokens.detach().split(_CHUNK_TOKENS):
                self._add(qk, part, chunk)

        return add

    def _require_same_rotation(self, qk: LayerQK) -> None:
        """Raise ScanError if RoPE follows the prompt's length and its frequencies have changed."""
        if qk.live is None:
            return
        now = qk.current()
        self._require_same(self.rotaries.setdefault(qk.layer, now), now)

    @staticmethod
    def _require_same(before: Rotary, now: Rotary) -> None:
        if not torch.equal(before.inv_freq, now.inv_freq):
            raise ScanError(
                "the model's RoPE frequencies follow the prompt's length (dynamic NTK or LongRoPE) "
                "and differ between these prompts, so there is no common profile; scan prompts of "
                "one length, or pass moments=False"
            )

    def _add(self, qk: LayerQK, part: str, tokens: Tensor) -> None:
        """Add tokens [token, head, d_head], or [token, d_model] for part "x".

        Products and sums over these tokens are in their own dtype, float32 at least; the running
        sums are in float64.
        """
        x = tokens.unsqueeze(0) if part == "x" else tokens.transpose(0, 1)
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        x = x.contiguous()  # [head, token, width]
        lengths = torch.linalg.vector_norm(x, dim=-1).clamp(min=1e-12)
        both = torch.stack([torch.ones_like(lengths), 1 / lengths], dim=1) @ x
        totals = {"sum": both[:, 0], "unit": both[:, 1]}
        if part != "x":
            totals["gram"] = x.mT @ x
            if qk.rotary is not None:
                totals["abs"] = torch.hypot(*qk.rotary.split(x)[:2]).sum(1)
        for name, total in totals.items():
            sums = self.sums[f"{name}_{part}"][qk.layer]
            sums = sums[:, : total.shape[-1]] if name == "abs" else sums
            sums += total.cpu().double().view(sums.shape)

    def _logit_adder(
        self, layer: int, real: Tensor, offsets: Tensor, rows: Bool[Tensor, "batch query offset"]
    ) -> Callable[[Tensor, Any], None]:
        """Return a hook that adds the unmasked logits of real (unpadded) tokens, by offset."""
        n_rows = rows.sum((0, 1))

        @reads_diagonals
        def add(scores: Any, hook: Any) -> None:
            if not isinstance(scores, Tensor):
                sums = scores.logit_sums(len(offsets), real)
                if sums is not None:
                    self.sums["logits"][layer] += sums.double().sum(0).cpu()
                    self.logit_rows[layer] += n_rows
                    return
            logits = slash_rows(scores, offsets.to(scores.device))
            # Keys outside a sliding window are masked, and have no logit.
            unmasked = rows.to(scores.device)[:, None] & (logits > MASKED)
            logits = logits.masked_fill(~unmasked, 0)
            self.sums["logits"][layer] += logits.sum((0, 2), dtype=widest_float(logits)).cpu()
            self.logit_rows[layer] += unmasked.sum((0, 2)).cpu()

        return add

    def finish(self) -> Moments:
        """Return the sums so far, with each layer's rotation."""
        n_pairs = self.sums["abs_q"].shape[-1]
        inv_freq = torch.full((len(self.layers), n_pairs), torch.nan, dtype=torch.float64)
        for qk in self.layers:
            if qk.rotary is not None:
                if qk.rotary.n_pairs != n_pairs:
                    raise ModelError(
                        "layers differ in their number of rotary pairs, which is not supported"
                    )
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
    """Return `Moments.pairing` of a layer."""
    if qk.rotary is None:
        return ""
    return qk.rotary.pairing if qk.relative else WEIGHED


def widest_float(x: Tensor) -> torch.dtype:
    """Return float64, or float32 on MPS devices, which have no float64."""
    return torch.float32 if x.device.type == "mps" else torch.float64
