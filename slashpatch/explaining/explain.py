"""Explain slash heads: measure two conditions, test them by interventions, give a verdict.

The conditions of arXiv 2601.08297: queries and keys near rank one, and RoPE frequencies that give
their mean logit a peak at the offset.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .. import bridge
from ..bridge.provenance import provenance
from ..data.heads import Head, HeadsLike
from ..data.prompts import prompt_set
from ..edits import Axis
from ..errors import HeadError, ModelError
from ..maths.bands import NAMED_BANDS, band_mask
from ..maths.resampling import halves
from ..scanning.result import Scan, require_kappa
from ..scanning.scan import scan
from .interventions import condition_edits, edited_scores
from .origin import axis_edits, axis_elsewhere, origin_of
from .result import RANK_MEASURES, Explanation, verdict
from .vectors import VectorSums

if TYPE_CHECKING:
    import pandas as pd
    from transformer_lens.model_bridge import TransformerBridge


def explain(
    model: TransformerBridge,
    head: HeadsLike,
    prompts: Any = None,
    *,
    offset: int | None = None,
    n_prompts: int = 8,
    max_tokens: int | None = None,
    kappa: float = 0.1,
    seed: int = 0,
    axis: Axis | None = None,
    progress: bool | None = None,
) -> Explanation:
    """Explain why a head is a slash head, with a verdict by `slashpatch.explaining.result.RULE`.

    Measures the two conditions (near rank-one queries and keys; frequencies with a peak at the
    offset), and the head's slash score under edits that remove each of them. The model is run as it
    is, active patches included.

    Args:
        model: A TransformerBridge in evaluation mode.
        head: One query head.
        prompts: As for `scan`; None: natural text of 256 tokens per prompt.
        offset: The slash's offset Δ; None: the offset from 0 to 15 with the head's highest score on
            one half of the prompts, and all that follows is measured on the other half.
        n_prompts: Number of prompts.
        max_tokens: Length of each prompt.
        kappa: Least slash score of a slash head.
        seed: Random seed of the prompts and of the random-token control.
        axis: Axis of the attention inputs of the head's layer, from `fit_axis` on other prompts;
            None: fitted on built-in text that another seed draws.
        progress: Whether to show progress bars; None: on a terminal only.

    Raises:
        EditError: An axis that was not fitted for the head's layer.
        HeadError: More than one head, or one that the model does not have.
        PromptError: Prompts that are empty or longer than the context.
        ScanError: κ outside [0, 1].
        ModelError: A model that slashpatch does not support.
    """
    chosen = bridge.read(model).require(head)
    if len(chosen) != 1:
        raise HeadError(
            f"explain takes one head, got {head!r}; explain_all (explain --all) takes several"
        )
    return next(
        explanations(
            model, chosen, prompts, offset, n_prompts, max_tokens, kappa, seed, progress, axis
        )
    )


def explain_all(
    model: TransformerBridge,
    wanted: HeadsLike = None,
    prompts: Any = None,
    *,
    n_prompts: int = 8,
    max_tokens: int | None = None,
    kappa: float = 0.1,
    seed: int = 0,
    axis: Axis | None = None,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Explain several heads; return a table with the columns of `Explanation.to_row`.

    `wanted` are the heads; None: all heads whose slash score reaches κ at some offset from 0 to 15,
    on the half of the prompts on which `explain` picks the offset.
    The other arguments and the exceptions are those of `explain`.
    """
    import pandas as pd

    chosen = None if wanted is None else bridge.read(model).require(wanted)
    rows = explanations(
        model, chosen, prompts, None, n_prompts, max_tokens, kappa, seed, progress, axis
    )
    return pd.DataFrame([row.to_row() for row in rows])


def explanations(
    model: TransformerBridge,
    wanted: Sequence[Head] | None,
    prompts: Any = None,
    offset: int | None = None,
    n_prompts: int = 8,
    max_tokens: int | None = None,
    kappa: float = 0.1,
    seed: int = 0,
    progress: bool | None = None,
    axis: Axis | None = None,
) -> Iterator[Explanation]:
    """Yield the explanation of each head; None: of all heads that reach κ. Raises as `explain`."""
    require_kappa(kappa)
    if prompts is None and max_tokens is None:
        max_tokens = min(256, model.cfg.n_ctx)
    texts = prompt_set(model, prompts, n_prompts=n_prompts, max_tokens=max_tokens, seed=seed)
    tokens = list(texts.tokens)
    to_pick: list[Tensor] = []
    if offset is None and len(tokens) > 1:  # what is picked for being largest looks larger there
        picking, estimating = halves(len(tokens), seed)
        to_pick, tokens = [tokens[i] for i in picking], [tokens[i] for i in estimating]
    longest = min(max(map(len, half)) for half in (tokens, to_pick) if half)
    offsets = range(min(16, longest)) if offset is None else sorted({0, offset})
    n_profile = max(64, 2 * (offset or 0))
    natural = scan(model, tokens, offsets, profile_offsets=n_profile, progress=progress)
    control = scan(
        model,
        offsets=offsets,
        random_tokens=True,
        n_prompts=len(tokens),
        max_tokens=longest,
        moments=False,
        seed=seed,
        progress=progress,
    )
    picked = natural
    if to_pick:
        picked = scan(model, to_pick, offsets, moments=False, progress=progress)
    if wanted is None:
        wanted = list(dict.fromkeys(entry.head for entry in picked.slash_heads(kappa)))
    layers = bridge.read(model).qk
    at = {head: _best_offset(picked, head, offset) for head in wanted}
    if not at:
        return
    n_tokens = min(256, model.cfg.n_ctx)
    axis = axis_elsewhere(model, list(at), len(texts.tokens), n_tokens, seed, axis)
    edits = condition_edits(list(at), layers) | ({} if axis is None else axis_edits(list(at), axis))
    edited = edited_scores(model, tokens, at, edits, progress)
    shortest = min(len(prompt) for prompt in tokens)
    vectors = VectorSums(model, list(at), natural.require_moments(), shortest, axis)
    for prompt in tokens:
        vectors.add(prompt)
    source = provenance(
        model,
        prompts=[{"source": texts.source, "n": len(texts.tokens), "digest": texts.digest}],
        seed=seed,
    )
    table = natural.rank_one.set_index("name")
    for head in wanted:
        one = _explanation(head, at[head], natural, control, edited[head], table, kappa, source)
        origin = None
        if axis is not None:
            share, moments = vectors.share_along_axis(head.layer), natural.require_moments()
            origin = origin_of(model, head, axis, moments, share, edited[head])
        yield replace(
            one, shares=vectors.shares(head), variation=vectors.variation(head), origin=origin
        )


def _best_offset(picked: Scan, head: Head, offset: int | None) -> int:
    """Return `offset`, or the offset with the head's highest score if it is None."""
    if offset is not None:
        return offset
    return picked.offsets[int(picked.scores[head.layer, head.head].nan_to_num(-1).argmax())]


def _explanation(
    head: Head,
    offset: int,
    natural: Scan,
    control: Scan,
    edited: dict[str, float],
    table: pd.DataFrame,
    kappa: float,
    source: dict[str, Any],
) -> Explanation:
    """Put together what was measured of one head; `table` has the rank measures of all heads."""
    column = natural.offsets.index(offset)
    score = float(natural.scores[head.layer, head.head, column])
    moments = natural.require_moments()
    try:
        rotary = moments.rotary(head.layer)
        profile = moments.profile(head)
        terms = moments.pair_peaks(head, offset)
        wavelengths = 2 * torch.pi / rotary.inv_freq
        order = terms.abs().argsort(descending=True)[:8].tolist()
        pairs = [(pair, float(wavelengths[pair]), float(terms[pair])) for pair in order]
        cosines = moments.cosines(head)
        per_pair = moments.pair_concentration(head)
        masks = {band: band_mask(band, rotary.inv_freq) for band in NAMED_BANDS}
        concentration = {
            band: (float(per_pair[0, mask].mean()), float(per_pair[1, mask].mean()))
            for band, mask in masks.items()
        }
    except ModelError:  # a layer without RoPE, or whose logits depend on more than the offset
        profile, pairs, cosines, concentration = None, [], [], {}
    of_head = table.loc[str(head)]
    rank = {
        name: (float(of_head[name]), float(np.mean(table[name] < of_head[name])))  # type: ignore[arg-type]
        for name in RANK_MEASURES
    }
    dropped = {band: edited[f"drop {band}"] for band in NAMED_BANDS if f"drop {band}" in edited}
    frozen = {band: edited[f"freeze {band}"] for band in NAMED_BANDS if f"freeze {band}" in edited}
    rank_one = {of: edited[f"rank one {of}"] for of in ("q", "k", "qk")}
    return Explanation(
        head=head,
        offset=offset,
        natural=score,
        random=float(control.scores[head.layer, head.head, column]),
        rank=rank,
        dropped=dropped,
        frozen=frozen,
        rank_one=rank_one,
        profile=profile,
        pairs=pairs,
        concentration=concentration,
        verdict=verdict(score, offset, rank_one["qk"], dropped, profile, kappa),
        kappa=kappa,
        provenance=source,
        cosines=cosines,
    )
