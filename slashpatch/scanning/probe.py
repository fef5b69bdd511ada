"""Probe: what is measured of a model at one step of its training, always on the same prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import bridge
from ..bridge.attached import reads_diagonals
from ..data.heads import Head
from ..data.prompts import PromptSet, prompt_set, repeated_random_tokens
from ..errors import EmergenceError, PromptError
from ..maths.bands import NAMED_BANDS, named_bands
from ..maths.repeated_tokens import copying_loss, prefix_matching
from .result import Scan
from .scan import run_by, scan, which_engine

if TYPE_CHECKING:
    import pandas as pd
    from transformer_lens.model_bridge import TransformerBridge

#: What can be measured, and the columns of each measure. Slash scores are always measured.
MEASURES = {
    "slash": (),
    "rank": ("r1_q", "r1_k"),
    "cone": ("cone_q", "cone_k", "cone_x"),
    "bands": tuple(f"band_{name}" for name in NAMED_BANDS),
    "prefix": ("prefix_matching",),
    "copying": ("copying_loss",),
}
#: Length of one copy of the random tokens behind `prefix` and `copying`.
_COPY_TOKENS = 64
#: Logits of one batch, as a number of entries.
_BATCH_LOGITS = 2**24


@dataclass(frozen=True, eq=False)
class Probe:
    """Fixed prompts, and what is measured on them.

    Attributes:
        prompts: Prompts of slash scores, ranks, cones and bands.
        repeats: Repeated random tokens, for `prefix` and `copying`; None without these measures.
        offsets: Offsets Δ of the slash scores.
        measures: Names in `MEASURES`, in their order there; "slash" is always among them.
        engine: "fused" or "bridge", or "auto" for what is exact.
        shape: Numbers of layers, heads and tokens of the vocabulary.
    """

    prompts: PromptSet
    repeats: Int[Tensor, "batch pos"] | None
    offsets: tuple[int, ...]
    measures: tuple[str, ...]
    engine: str
    shape: tuple[int, int, int]

    @property
    def header(self) -> dict[str, Any]:
        """What a file says about the probe, as JSON values; runs with other ones do not mix."""
        repeats = None
        if self.repeats is not None:
            repeats = hashlib.sha256(self.repeats.numpy().tobytes()).hexdigest()[:16]
        return {
            "offsets": list(self.offsets),
            "measures": list(self.measures),
            "prompts": self.prompts.record,
            "n_tokens": self.prompts.n_tokens,
            "repeats": repeats,
            "layers_heads_vocabulary": list(self.shape),
        }

    def measure(self, model: TransformerBridge) -> tuple[pd.DataFrame, str]:
        """Return a row for each head (layer, head, name, scores, measures), and a fingerprint.

        `score_Δ` is the slash score. `r1_q`, `r1_k`, `cone_q`, `cone_k`, `cone_x` are as in
        `Scan.rank_one`; `band_high`, `band_medium`, `band_low` as `band_shares` says;
        `prefix_matching` is the mean attention from the second copy of random tokens to the token
        after the first occurrence; `copying_loss` the loss on the second copy, the same number
        for all heads.

        Raises ModelError for a model that slashpatch does not support, EmergenceError for a model
        with other heads or another vocabulary, ScanError for a pattern with NaN.
        """
        shape = _shape(model)
        if shape != self.shape:
            raise EmergenceError(
                f"the models of one run must agree: expected {_words(self.shape)}, got "
                f"{_words(shape)}"
            )
        with_moments = not {"rank", "cone", "bands"}.isdisjoint(self.measures)
        found = scan(
            model,
            list(self.prompts.tokens),
            self.offsets,
            self.engine,
            moments=with_moments,
            progress=False,
        )
        frame = _score_columns(found)
        if with_moments:
            table = found.rank_one
            for name in ("rank", "cone"):
                if name in self.measures:
                    columns = list(MEASURES[name])
                    frame[columns] = table[columns].to_numpy()
        if "bands" in self.measures:
            frame[list(MEASURES["bands"])] = band_shares(found).flatten(0, 1).numpy()
        if self.repeats is not None:
            self._read_repeats(model, self.repeats, frame)
        return frame, str(found.provenance["fingerprint"])

    def _read_repeats(self, model: TransformerBridge, tokens: Tensor, frame: pd.DataFrame) -> None:
        """Add the columns of `prefix` and `copying`."""
        info = bridge.read(model)
        n_layers, n_heads, d_vocab = self.shape
        matching = torch.zeros(n_layers, n_heads, dtype=torch.float64)
        loss = 0.0
        size = max(1, _BATCH_LOGITS // (tokens.shape[1] * d_vocab))
        for batch in tokens.split(size):
            on_device = batch.to(torch.device(model.cfg.device))

            @reads_diagonals
            def read(pattern: Any, hook: Any, tokens: Tensor = on_device) -> None:
                scores = prefix_matching(pattern, tokens.to(pattern.device), (1,))
                matching[hook.layer()] += scores[..., 0].sum(0).cpu()

            hooks = []
            if "prefix" in self.measures:
                hooks = [(name, read) for name in info.hooks("pattern")]
            with torch.no_grad(), run_by(model, which_engine(model, self.engine)):
                if "copying" in self.measures:
                    logits = model.run_with_hooks(on_device, fwd_hooks=hooks, return_type="logits")
                    loss += float(copying_loss(logits, on_device).sum())
                else:
                    bridge.run_for_hooks(model, on_device, hooks)
        if "prefix" in self.measures:
            frame["prefix_matching"] = (matching / len(tokens)).flatten().numpy()
        if "copying" in self.measures:
            frame["copying_loss"] = loss / len(tokens)


def probe_of(
    model: TransformerBridge,
    prompts: Any = None,
    offsets: Any = range(16),
    measures: Iterable[str] = ("slash",),
    *,
    engine: str = "auto",
    random_tokens: bool = False,
    n_prompts: int = 8,
    max_tokens: int | None = None,
    seed: int = 0,
) -> Probe:
    """Return the probe that arguments like those of `scan` describe; the model makes the prompts.

    Raises EmergenceError for an unknown measure, PromptError, OffsetError or ModelError as `scan`.
    """
    info = bridge.read(model)
    names = require_measures(measures)
    chosen = prompt_set(
        model,
        prompts,
        random_tokens=random_tokens,
        n_prompts=n_prompts,
        max_tokens=max_tokens,
        seed=seed,
    )
    repeats = None
    if {"prefix", "copying"} & set(names):
        n_tokens = min(_COPY_TOKENS, (info.n_ctx - 1) // 2)
        if n_tokens < 3:
            raise PromptError(
                f"prefix and copying need two copies of at least 3 tokens; the model's context is "
                f"{info.n_ctx}"
            )
        repeats = repeated_random_tokens(model, n_prompts, n_tokens, seed)
    deltas = info.require_offsets(offsets)
    return Probe(chosen, repeats, deltas, names, engine, _shape(model))


def require_measures(measures: Iterable[str]) -> tuple[str, ...]:
    """Return names in `MEASURES` in their order, "slash" among them. Raises EmergenceError."""
    given = [measures] if isinstance(measures, str) else list(measures)
    for name in given:
        if name not in MEASURES:
            raise EmergenceError(f"unknown measure {name!r}; expected one of {', '.join(MEASURES)}")
    return tuple(name for name in MEASURES if name == "slash" or name in given)


def band_shares(found: Scan) -> Float[Tensor, "layer head band"]:
    """Return how much each band adds to the predicted logit's peak, for high, medium and low.

    At the head's offset with the highest slash score, the term of each rotary pair in the predicted
    logit (`Moments.pair_peaks`: minus its mean over offsets) is summed over the band and divided by
    the sum of all pairs' absolute terms. The three add up to 1 where all pairs add to the peak,
    and to less where some work against it. *Ours*. Raises ModelError for a layer without RoPE.
    """
    moments = found.require_moments()
    n_layers, n_heads = found.sums.shape[:2]
    best = found.scores.nan_to_num(-1).argmax(-1)
    shares = torch.zeros(n_layers, n_heads, len(NAMED_BANDS), dtype=torch.float64)
    for layer in range(n_layers):
        names = named_bands(moments.rotary(layer).inv_freq)
        member = torch.tensor([[name == band for band in NAMED_BANDS] for name in names])
        for head in range(n_heads):
            offset = found.offsets[int(best[layer, head])]
            terms = moments.pair_peaks(Head(layer, head), offset)
            shares[layer, head] = terms @ member.double() / terms.abs().sum()
    return shares


def _score_columns(found: Scan) -> pd.DataFrame:
    """Return a row for each head: layer, head, name, and a column of scores for each offset."""
    import pandas as pd

    n_layers, n_heads = found.sums.shape[:2]
    heads = [Head(layer, head) for layer in range(n_layers) for head in range(n_heads)]
    frame = pd.DataFrame(
        {
            "layer": [head.layer for head in heads],
            "head": [head.head for head in heads],
            "name": [str(head) for head in heads],
        }
    )
    scores = found.scores.flatten(0, 1).numpy()
    frame[score_columns(found.offsets)] = scores
    return frame


def score_columns(offsets: Sequence[int]) -> list[str]:
    """Return the names of the columns of slash scores."""
    return [f"score_{offset}" for offset in offsets]


def _shape(model: TransformerBridge) -> tuple[int, int, int]:
    info = bridge.read(model)
    return info.n_layers, info.n_heads, info.d_vocab


def _words(shape: tuple[int, int, int]) -> str:
    return f"{shape[0]} layers of {shape[1]} heads and a vocabulary of {shape[2]}"
