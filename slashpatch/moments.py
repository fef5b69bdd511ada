"""Sums over tokens that tell rank, cone and mean logits of every head; they add up exactly.

Of the tokens × d_head matrices of pre-RoPE queries and keys: Gram matrices (their eigenvalues are
σ²), means, means of unit vectors and of moduli. Of the logits: means by offset. One pass, nothing
kept that grows with the number of tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from . import rope
from .anatomy import Anatomy
from .errors import ModelError, ScanError
from .fused import reads_diagonals
from .heads import Head
from .precision import MASKED
from .qk import HookLayout, LayerQK
from .rank import r1, r95
from .rotary import Rotary
from .slash import real_rows, slash_rows
from .spectrum import concentration, logit_terms, predicted_profile

if TYPE_CHECKING:
    import pandas as pd
    from transformer_lens.model_bridge import TransformerBridge


class Profile(NamedTuple):
    """Mean logit of a head by offset: measured, and predicted from its mean query and key.

    `correlation` is Pearson's over the offsets that were measured.
    """

    offsets: Int[Tensor, "offset"]
    measured: Float[Tensor, "offset"]
    predicted: Float[Tensor, "offset"]
    correlation: float

    @property
    def measured_peak(self) -> int:
        """The offset with the highest mean logit."""
        return int(self.offsets[self.measured.argmax()])

    @property
    def predicted_peak(self) -> int:
        """The offset with the highest predicted logit."""
        return int(self.offsets[self.predicted.argmax()])


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over `n_tokens` tokens, float64, and each layer's rotation.

    Attributes:
        gram_q: XᵀX of each head's queries; `gram_k` of each KV head's keys.
        sum_q: Sum of queries; `sum_k` of keys; `sum_x` of the attention's input.
        unit_q: Sum of queries, each divided by its length; `unit_k`, `unit_x` likewise.
        abs_q: Sum of the modulus of each rotary pair; `abs_k` likewise.
        logits: Sum of unmasked logits i → i−Δ for Δ from 0; `logit_rows` says of how many.
            (A logit that an edit removed counts as masked.)
        inv_freq: θ of each layer, NaN for a layer without RoPE.
        gain: Gain of each layer's rotation; `scale` of its logits.
        pairing: Layout of each layer's pairs: "half", "adjacent", "" without RoPE, or "weighed"
            where a norm after RoPE weighs the dimensions of a pair differently.
    """

    n_tokens: Int[Tensor, ""]
    gram_q: Float[Tensor, "layer head d_head d_head"]
    gram_k: Float[Tensor, "layer kv_head d_head d_head"]
    sum_q: Float[Tensor, "layer head d_head"]
    sum_k: Float[Tensor, "layer kv_head d_head"]
    sum_x: Float[Tensor, "layer d_model"]
    unit_q: Float[Tensor, "layer head d_head"]
    unit_k: Float[Tensor, "layer kv_head d_head"]
    unit_x: Float[Tensor, "layer d_model"]
    abs_q: Float[Tensor, "layer head pair"]
    abs_k: Float[Tensor, "layer kv_head pair"]
    logits: Float[Tensor, "layer head offset"]
    logit_rows: Int[Tensor, "layer head offset"]
    inv_freq: Float[Tensor, "layer pair"]
    gain: Float[Tensor, "layer"]
    scale: Float[Tensor, "layer"]
    pairing: tuple[str, ...]

    def tensors(self) -> dict[str, Tensor]:
        """Every field that is a tensor, by name."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "pairing"
        }

    def __add__(self, other: Moments) -> Moments:
        fixed = {"inv_freq", "gain", "scale"}
        mine, theirs = self.tensors(), other.tensors()
        for name in fixed:
            if not torch.equal(mine[name].nan_to_num(-1), theirs[name].nan_to_num(-1)):
                raise ScanError(f"scans of models with different {name} cannot be added")
        if self.logits.shape != other.logits.shape:
            raise ScanError(
                f"scans with profiles over {self.logits.shape[-1]} and {other.logits.shape[-1]} "
                "offsets cannot be added"
            )
        sums = {name: mine[name] + theirs[name] for name in mine if name not in fixed}
        return Moments(**{**mine, **sums}, pairing=self.pairing)

    def rotary(self, layer: int) -> Rotary:
        """The layer's rotation. Raises ModelError for a layer without RoPE."""
        if not self.pairing[layer]:
            raise ModelError(f"layer {layer} has no RoPE; profiles need a layer that rotates")
        if self.pairing[layer] == _WEIGHED:
            raise ModelError(
                f"layer {layer} norms queries and keys after RoPE, each dimension with a weight of "
                "its own, so its logits depend on where tokens stand: it has no profile by offset"
            )
        return Rotary(
            self.inv_freq[layer],
            self.pairing[layer],
            float(self.gain[layer]),
            float(self.scale[layer]),
        )

    def _kv_head(self, head: Head) -> int:
        return head.head // (self.gram_q.shape[1] // self.gram_k.shape[1])

    def profile(self, head: Head) -> Profile:
        """Mean logit by offset, measured and predicted. Raises ModelError without RoPE."""
        rotary = self.rotary(head.layer)
        rows = self.logit_rows[head.layer, head.head]
        measured = self.logits[head.layer, head.head] / rows
        seen = rows > 0
        offsets = torch.arange(len(measured))[seen]
        q, k = self.mean(head)
        predicted = predicted_profile(q, k, offsets, rotary)
        pair = torch.stack([measured[seen], predicted])
        return Profile(offsets, measured[seen], predicted, float(torch.corrcoef(pair)[0, 1]))

    def mean(self, head: Head) -> tuple[Float[Tensor, "d_head"], Float[Tensor, "d_head"]]:
        """Mean pre-RoPE query and key of a head."""
        q = self.sum_q[head.layer, head.head]
        return q / self.n_tokens, self.sum_k[head.layer, self._kv_head(head)] / self.n_tokens

    def pair_peaks(self, head: Head, offset: int) -> Float[Tensor, "pair"]:
        """What each pair adds to the predicted logit at an offset beyond its mean over offsets."""
        q, k = self.mean(head)
        n = max(self.logits.shape[-1], offset + 1)
        every = torch.arange(n)
        terms, _ = logit_terms(q.expand(n, -1), k.expand(n, -1), every, self.rotary(head.layer))
        return terms[offset] - terms.mean(0)

    def pair_concentration(self, head: Head) -> Float[Tensor, "part pair"]:
        """|E x_l| / E|x_l| of each pair, for the query and for the key."""
        rotary, kv_head = self.rotary(head.layer), self._kv_head(head)
        return torch.stack(
            [
                concentration(mean, total / self.n_tokens, rotary)
                for mean, total in zip(
                    self.mean(head),
                    (self.abs_q[head.layer, head.head], self.abs_k[head.layer, kv_head]),
                    strict=True,
                )
            ]
        )

    def cones(self) -> dict[str, Float[Tensor, "layer ..."]]:
        """Mean cosine of tokens to their mean direction, for q, k [layer, head] and x [layer]."""
        found = {}
        for part, total, unit in (
            ("q", self.sum_q, self.unit_q),
            ("k", self.sum_k, self.unit_k),
            ("x", self.sum_x, self.unit_x),
        ):
            direction = total / total.norm(dim=-1, keepdim=True)
            found[part] = (direction * unit).sum(-1) / self.n_tokens
        return found

    def rank_table(self) -> pd.DataFrame:
        """r1, R95 and cone of Q and K, a row per query head; keys are those of its KV group."""
        import pandas as pd

        n_layers, n_heads = self.gram_q.shape[:2]
        group = n_heads // self.gram_k.shape[1]
        cones = self.cones()
        columns = {
            "r1_q": r1(self.gram_q),
            "r95_q": r95(self.gram_q),
            "cone_q": cones["q"],
            "r1_k": r1(self.gram_k).repeat_interleave(group, dim=1),
            "r95_k": r95(self.gram_k).repeat_interleave(group, dim=1),
            "cone_k": cones["k"].repeat_interleave(group, dim=1),
            "cone_x": cones["x"][:, None].expand(n_layers, n_heads),
        }
        frame = pd.DataFrame({name: values.flatten().numpy() for name, values in columns.items()})
        heads = [Head(layer, head) for layer in range(n_layers) for head in range(n_heads)]
        frame.insert(0, "name", [str(head) for head in heads])
        frame.insert(0, "head", [head.head for head in heads])
        frame.insert(0, "layer", [head.layer for head in heads])
        return frame


#: Instead of a layout of pairs where logits depend on more than the offset.
_WEIGHED = "weighed"
#: Tokens at a time: what fits the processor's cache.
_SOME_TOKENS = 1024


class MomentSums:
    """Running sums of one scan. Raises ModelError where q and k cannot be read."""

    def __init__(self, model: TransformerBridge, anatomy: Anatomy, n_offsets: int) -> None:
        self.anatomy = anatomy
        self.layers = rope.read(model)
        #: Of layers whose frequencies follow the prompt's length: those of these prompts.
        self.rotaries: dict[int, Rotary] = {}
        n_pairs = max((qk.rotary.n_pairs for qk in self.layers if qk.rotary), default=0)
        n_layers, n_heads, n_kv = anatomy.n_layers, anatomy.n_heads, anatomy.n_kv_heads
        d_head, d_model = anatomy.d_head, model.cfg.d_model

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
            prefix = f"blocks.{qk.layer}.attn"
            found += [
                (qk.q.name, self._adder(qk, "q", qk.q, real)),
                (qk.k.name, self._adder(qk, "k", qk.k, real)),
                (f"{prefix}.hook_in", self._adder(qk, "x", None, real)),
                (f"{prefix}.hook_attn_scores", self._logit_adder(qk.layer, real, offsets, rows)),
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
                read = layout.read(tensor, self.anatomy.d_head)
                read = qk.turned_back(layout, read, torch.arange(read.shape[1])[None])
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
