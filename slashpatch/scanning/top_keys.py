"""top_keys: where the attention of some heads goes in one text, token by token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import bridge
from ..bridge.attached import reads_diagonals
from ..bridge.provenance import provenance
from ..data.heads import Head, HeadsLike
from ..data.prompts import prompt_set, token_texts
from ..errors import HeadError, ModelError, PromptError, ScanError
from ..maths import top_keys as maths
from ..patching.fused import engine_of_layers
from .batches import run_by
from .scan import which_engine
from .top_keys_result import TopKeys

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def top_keys(
    model: TransformerBridge,
    text: Any,
    heads: HeadsLike,
    *,
    top: int = 5,
    offsets: Any = range(16),
    max_tokens: int | None = None,
    engine: str = "auto",
    seed: int = 0,
) -> TopKeys:
    """Find where the attention of some heads goes in one text: each token's largest keys.

    The model is run as it is, active patches included. In the fused engine no query × key matrix
    is formed, so that long texts cost little memory; in the bridge engine TransformerLens forms
    one, and it is read and dropped layer by layer.

    Args:
        model: A TransformerBridge in evaluation mode.
        text: A text, a file, or token ids [pos], taken as they are; None: natural text.
        heads: The heads, a scan (its slash heads) or whole layers included.
        top: How many keys to keep for each token.
        offsets: Δ ≥ 0 of the diagonals i → i−Δ to keep: an int, ints, a range, or text such as
            "0-15".
        max_tokens: Length to which the text is cut. As for `scan`: None cuts files and natural text
            to 512 tokens or the context, and no other text.
        engine: "fused", "bridge" or "auto", as for `scan`.
        seed: Random seed of natural text.

    Raises:
        ModelError: A model that slashpatch does not support.
        HeadError: Heads that the model does not have.
        OffsetError: Offsets beyond the context.
        PromptError: More than one text, or one beyond the model's context.
        ScanError: A `top` that is no integer from 1, or a pattern with NaN.
    """
    info = bridge.read(model)
    chosen = info.require(heads)
    if not chosen:
        raise HeadError("no heads were given; expected at least one, such as 'L16H0'")
    deltas = info.require_offsets(offsets)
    if isinstance(top, bool) or not hasattr(top, "__index__") or not 1 <= top <= info.n_ctx:
        raise ScanError(
            f"top is an integer from 1 to the model's context of {info.n_ctx}; got {top!r}"
        )
    engine = which_engine(model, engine)
    prompts = prompt_set(model, text, n_prompts=1, max_tokens=max_tokens, seed=seed)
    if len(prompts.tokens) != 1:
        raise PromptError(f"top_keys reads one text; got {len(prompts.tokens)}")
    tokens = prompts.tokens[0]
    with run_by(model, engine):
        rows = _rows_by_head(model, info, tokens, chosen, int(top), deltas)
        by_layer = engine_of_layers(model)
    keys, weights, diagonals = (torch.stack(part) for part in zip(*rows, strict=True))
    return TopKeys(
        heads=chosen,
        tokens=token_texts(model, tokens),
        token_ids=tokens,
        keys=keys,
        weights=weights,
        offsets=deltas,
        diagonals=diagonals,
        provenance=provenance(
            model, engine=engine, engine_of_layers=by_layer, prompts=[prompts.record], seed=seed
        ),
    )


def _rows_by_head(
    model: TransformerBridge,
    info: bridge.ModelInfo,
    tokens: Tensor,
    wanted: tuple[Head, ...],
    top: int,
    offsets: tuple[int, ...],
) -> list[tuple[Tensor, ...]]:
    """Run one forward pass; return keys, weights and diagonals of each head, on the CPU."""
    found: dict[Head, tuple[Tensor, ...]] = {}
    by_layer: dict[int, list[int]] = {}
    for head in sorted(wanted):
        by_layer.setdefault(head.layer, []).append(head.head)

    @reads_diagonals
    def read(pattern: Any, hook: Any) -> None:
        layer = hook.layer()
        rows = maths.top_keys(pattern, by_layer[layer], top, offsets)
        for place, head in enumerate(by_layer[layer]):
            found[Head(layer, head)] = tuple(part[0, place].cpu() for part in rows)

    with torch.no_grad():
        hooks = [(info.hook(layer, "pattern"), read) for layer in by_layer]
        bridge.run_for_hooks(model, tokens[None].to(model.cfg.device), hooks)
    for head in wanted:
        if head not in found:
            raise ModelError(f"the pattern hook of layer {head.layer} did not fire")
        if not all(bool(part.isfinite().all()) for part in found[head][1:]):
            raise ScanError(
                f"the attention pattern of {head} has NaN or infinite entries; check the model's "
                "weights and dtype (fp16 overflows easily; try bfloat16 or float32)"
            )
    return [found[head] for head in wanted]
