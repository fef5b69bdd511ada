"""Generate text, and yield step by step which heads attend where."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..data.prompts import prompt_set
from ..errors import PromptError
from ..patching.fused import fused_where_exact
from ..patching.patch import patch
from .monitor import SlashMonitor

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from ..edits import Edit


def continuation(
    model: TransformerBridge,
    prompt: str,
    max_new_tokens: int = 40,
    sample: bool = False,
    seed: int = 0,
) -> str:
    """Return the text that the model generates after `prompt`, without special tokens.

    Greedy, or sampled by `seed`; active patches act. Raises PromptError if prompt and new tokens
    exceed the context.
    """
    tokens = _prompt_tokens(model, prompt, max_new_tokens)
    with torch.random.fork_rng(enabled=sample), fused_where_exact(model):
        if sample:
            torch.manual_seed(seed)
        out = model.generate(tokens, max_new_tokens=max_new_tokens, do_sample=sample, verbose=False)
    return model.tokenizer.decode(out[0, tokens.shape[1] :], skip_special_tokens=True)


def watched(
    model: TransformerBridge,
    prompt: str,
    edits: Sequence[Edit],
    offsets: Sequence[int],
    kappa: float,
    max_new_tokens: int,
    top: int,
) -> Iterator[dict[str, Any]]:
    """Generate greedily under edits, and yield at each step which heads attend where.

    Yields dicts with `token` (the new token), `at` (the newest token before it, whose attention is
    read), `position` (the position of `at`) and `heads`: up to `top` dicts of `head`, `offset`,
    `reads` (the token at position − offset), `weight` (attention from `at` to it) and `score` (the
    mean over all tokens so far), for weights of at least κ, the largest first.
    """
    tokens = _prompt_tokens(model, prompt, max_new_tokens)
    written = tokens[0].tolist()
    text = model.tokenizer.decode
    with contextlib.ExitStack() as stack:
        stack.enter_context(fused_where_exact(model))
        stack.enter_context(patch(model, *edits))
        monitor = stack.enter_context(SlashMonitor(model, offsets, kappa))
        stream = model.generate_stream(
            tokens,
            max_new_tokens=max_new_tokens,
            max_tokens_per_yield=1,
            do_sample=False,
            return_type="tokens",
            verbose=False,
        )
        stack.callback(stream.close)
        for chunk in stream:
            position = len(written) - 1
            new = chunk[0].tolist()[-1]
            heads = []
            newest, scores = monitor.newest, monitor.scores
            newest[
                ..., [offset > position for offset in monitor.offsets]
            ] = -1  # before the first token
            flat = newest.flatten().topk(min(top, newest.numel()))
            for weight, index in zip(flat.values.tolist(), flat.indices.tolist(), strict=True):
                layer, rest = divmod(index, newest.shape[1] * newest.shape[2])
                head, column = divmod(rest, newest.shape[2])
                if weight < max(kappa, 0):
                    break
                heads.append(
                    {
                        "head": f"L{layer}H{head}",
                        "offset": monitor.offsets[column],
                        "reads": text([written[position - monitor.offsets[column]]]),
                        "weight": weight,
                        "score": float(scores[layer, head, column]),
                    }
                )
            at = text([written[position]])
            written.append(new)
            yield {"token": text([new]), "at": at, "position": position, "heads": heads}


def _prompt_tokens(model: TransformerBridge, prompt: str, max_new_tokens: int) -> torch.Tensor:
    tokens = prompt_set(model, [prompt]).tokens[0]
    if len(tokens) + max_new_tokens > model.cfg.n_ctx:
        raise PromptError(
            f"the prompt's {len(tokens)} tokens and {max_new_tokens} new ones exceed the model's "
            f"context of {model.cfg.n_ctx}; ask for fewer"
        )
    return tokens[None].to(model.cfg.device)
