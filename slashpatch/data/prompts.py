"""Prompts: natural text that comes with Python, the user's own, or uniform random tokens."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import PromptError
from .natural_text import code, prose

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_FILE_SUFFIXES = {".txt", ".md", ".rst", ".py", ".json", ".jsonl", ".csv"}
DEFAULT_PROMPTS, DEFAULT_TOKENS = 8, 512


@dataclass(frozen=True)
class PromptSet:
    """Tokenised prompts, each a 1-D integer tensor on the CPU, and where they came from.

    Attributes:
        tokens: One tensor of token ids a prompt.
        source: Where they came from, in words.
    """

    tokens: tuple[Tensor, ...]
    source: str

    @property
    def n_tokens(self) -> int:
        """The number of tokens in all prompts together."""
        return sum(len(prompt) for prompt in self.tokens)

    @property
    def record(self) -> dict[str, Any]:
        """What a result's provenance says about these prompts."""
        return {"source": self.source, "n": len(self.tokens), "digest": self.digest}

    @property
    def digest(self) -> str:
        """SHA-256 over the prompts' lengths and token ids, its first 16 hex digits."""
        return tokens_digest(*self.tokens)


def tokens_digest(*prompts: Tensor) -> str:
    """Return the first 16 hex digits of the SHA-256 over prompts' lengths and token ids."""
    sha = hashlib.sha256()
    for prompt in prompts:
        sha.update(len(prompt).to_bytes(8, "little"))
        sha.update(prompt.to(torch.int64).numpy().tobytes())
    return sha.hexdigest()[:16]


def prompt_set(
    model: TransformerBridge,
    prompts: Any = None,
    *,
    random_tokens: bool = False,
    n_prompts: int = DEFAULT_PROMPTS,
    max_tokens: int | None = None,
    seed: int = 0,
) -> PromptSet:
    """Return the tokenised prompts that were given, or natural or random ones.

    Args:
        model: A TransformerBridge.
        prompts: None (natural text), a text, texts, a file (a Path, or a text that names one) or
            token ids: [pos], [batch, pos] or rows of unequal lengths, taken as they are. Texts and
            rows may come from a generator, which is read to its end.
        random_tokens: Whether to make random prompts instead of natural ones.
        n_prompts: How many natural, random or file prompts at most.
        max_tokens: Length of natural, random and file prompts, at most the model's context; 512 or
            the context when None. Other texts are cut only when it is given.
        seed: Seed of the natural and random prompts.

    Raises:
        PromptError: Anything empty, unreadable, outside the vocabulary, or longer than the model's
            context.
    """
    n_ctx, d_vocab = model.cfg.n_ctx, model.cfg.d_vocab
    for name, value in (("n_prompts", n_prompts), ("max_tokens", max_tokens)):
        if value is None and name == "max_tokens":
            continue
        if isinstance(value, bool) or not hasattr(value, "__index__") or int(value or 0) < 1:
            raise PromptError(f"{name} is an integer from 1; got {value!r}")
    if random_tokens and prompts is not None:
        raise PromptError("give prompts or ask for random tokens, not both")
    if max_tokens is not None and max_tokens > n_ctx:
        raise PromptError(
            f"max_tokens={max_tokens} exceeds the model's context of {n_ctx} tokens; give at most "
            f"{n_ctx}"
        )
    length = min(DEFAULT_TOKENS, n_ctx) if max_tokens is None else max_tokens
    if isinstance(prompts, Mapping):
        raise PromptError(
            f"expected a text, texts, a file or token ids, got a {type(prompts).__name__} with the "
            f"keys {', '.join(map(str, prompts))}; pass its input_ids"
        )
    if isinstance(prompts, Iterable) and not isinstance(prompts, (Sequence, Tensor)):
        prompts = list(prompts)  # an iterator can be read once only
    if random_tokens:
        found = PromptSet(_random(model, n_prompts, length, seed), f"random tokens, seed {seed}")
    elif prompts is None:
        found = PromptSet(_natural(model, n_prompts, length, seed), f"natural text, seed {seed}")
    elif (path := as_path(prompts)) is not None:
        found = PromptSet(_file(model, path, n_prompts, length), f"file {path.name}")
    elif isinstance(prompts, str):
        found = PromptSet(_texts(model, [prompts], max_tokens), "text")
    elif _is_texts(prompts):
        found = PromptSet(_texts(model, prompts, max_tokens), "texts")
    else:
        found = PromptSet(tuple(_token_ids(prompts)), "token ids")
    if not found.tokens:
        raise PromptError("no prompts were given; expected at least one")
    if any(len(prompt) == 0 for prompt in found.tokens):
        raise PromptError("a prompt is empty; expected at least one token in each prompt")
    for index, prompt in enumerate(found.tokens):
        if len(prompt) > n_ctx:
            raise PromptError(
                f"prompt {index} has {len(prompt)} tokens and the model's context is {n_ctx}; "
                "shorten it, or pass max_tokens"
            )
        if int(prompt.min()) < 0 or int(prompt.max()) >= d_vocab:
            raise PromptError(
                f"prompt {index} has token ids outside the vocabulary; expected 0 to {d_vocab - 1}"
            )
    return found


def repeated_random_tokens(
    model: TransformerBridge, n_prompts: int, n_tokens: int, seed: int = 0
) -> Tensor:
    """Return prompts [batch, pos] of uniform random tokens followed by the same tokens again.

    They start with BOS if the model uses it; `n_tokens` is the length of one copy. A model can
    predict the second copy only by copying from the first.
    """
    first = random_ids(model, n_prompts, n_tokens, seed, "repeated")
    bos = torch.tensor([bos_ids(model)] * n_prompts, dtype=torch.long)  # also where there is none
    return torch.cat([bos, first, first], dim=1)


def token_texts(model: TransformerBridge, tokens: Tensor) -> tuple[str, ...]:
    """Return each token's text, decoded by itself.

    A byte that is no whole character shows as U+FFFD. A token id that the tokenizer does not know,
    or any without a tokenizer, shows as the id in brackets.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        return tuple(f"[{token}]" for token in tokens.tolist())
    texts = []
    for token in tokens.tolist():
        piece = tokenizer.convert_ids_to_tokens(token)
        text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
        # SentencePiece decodes no space at the start of a text, but a token may begin with one.
        space = piece is not None and piece.startswith("\u2581") and not text.startswith(" ")
        texts.append(f"[{token}]" if piece is None else " " * space + text)
    return tuple(texts)


def as_path(prompts: Any) -> Path | None:
    """Return the file that `prompts` names, or None if it is not a path.

    A text is a path if it names an existing file, or has no spaces and the suffix of a text file.
    Raises PromptError for a path at which there is no file.
    """
    if isinstance(prompts, str):
        if "\n" in prompts or len(prompts) > 1000:
            return None
        names_file = os.path.isfile(prompts)  # Path.is_file raises on long names
        like_a_file = Path(prompts).suffix in _FILE_SUFFIXES and " " not in prompts
        if not names_file and not like_a_file:
            return None
    elif not isinstance(prompts, os.PathLike):
        return None
    path = Path(prompts)
    if not os.path.isfile(path):
        raise PromptError(f"no file {str(path)!r}; expected a text file to read prompts from")
    return path


def _is_texts(prompts: Any) -> bool:
    return (
        isinstance(prompts, Sequence)
        and len(prompts) > 0
        and all(isinstance(text, str) for text in prompts)
    )


def _texts(
    model: TransformerBridge, texts: Iterable[str], max_tokens: int | None
) -> tuple[Tensor, ...]:
    return tuple(
        _tokenise(model, text)[:max_tokens] if text else torch.empty(0, dtype=torch.long)
        for text in texts
    )


def _tokenise(model: TransformerBridge, text: str) -> Tensor:
    if model.tokenizer is None:
        raise PromptError(
            "the model has no tokenizer; pass token ids, ask for random tokens, or load the model "
            "with slashpatch.load(model, tokenizer=...)"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(f"the text is not valid Unicode: {error}") from None
    return model.to_tokens(text, truncate=False, move_to_device=False)[0]


def _file(model: TransformerBridge, path: Path, n_prompts: int, length: int) -> tuple[Tensor, ...]:
    """Return consecutive pieces of a file, each starting with BOS if the model uses it."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"cannot read {str(path)!r} as UTF-8 text: {error}") from None
    tokens = _tokenise(model, text) if text.strip() else torch.empty(0, dtype=torch.long)
    bos = tokens[: len(bos_ids(model))]
    if len(bos) == 0 or int(bos[0]) != bos_ids(model)[0]:
        return tuple(tokens.split(length)[:n_prompts])
    if length < 2:
        return (bos,)
    return tuple(torch.cat([bos, piece]) for piece in tokens[1:].split(length - 1)[:n_prompts])


def _token_ids(prompts: Any) -> Iterator[Tensor]:
    if not isinstance(prompts, (Tensor, Iterable)):
        raise PromptError(
            f"expected a text, texts, a file or token ids, got {type(prompts).__name__}"
        )
    rows: Any = prompts if isinstance(prompts, Tensor) else list(prompts)
    if len(rows) and all(hasattr(row, "__index__") and not _has_axis(row) for row in rows):
        rows = [[int(row) for row in rows]]
    if isinstance(rows, Tensor) and rows.ndim == 1:
        rows = rows[None]
    for row in rows:
        try:
            ids = torch.as_tensor(row)
        except (TypeError, ValueError, RuntimeError):
            ids = torch.empty(0, 0, 0)
        if ids.numel() == 0 and ids.ndim == 1:
            ids = ids.long()
        if ids.ndim == 2 and len(ids) == 1:
            ids = ids[0]  # as `to_tokens` returns one prompt
        if ids.ndim != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
            came = (
                f"{type(row).__name__} {list(row.shape)}" if _has_axis(row) else type(row).__name__
            )
            raise PromptError(
                "expected token ids as integers [pos] or [batch, pos], or only texts; "
                f"got a row of type {came}"
            )
        yield ids.detach().cpu().long()


def _has_axis(row: Any) -> bool:
    return bool(getattr(row, "ndim", 0))


def bos_ids(model: TransformerBridge) -> list[int]:
    """Return the BOS token id in a list, or an empty list if the model's prompts have no BOS."""
    bos = getattr(model.tokenizer, "bos_token_id", None)
    return [bos] if bos is not None and getattr(model.cfg, "default_prepend_bos", True) else []


def random_ids(
    model: TransformerBridge, n_prompts: int, n_tokens: int, seed: int, label: str
) -> Tensor:
    """Return token ids drawn uniformly from the vocabulary without its special tokens."""
    from transformer_lens.utilities.statistics import derive_generator

    tokenizer = model.tokenizer
    d_vocab = model.cfg.d_vocab
    ids = torch.arange(d_vocab if tokenizer is None else min(len(tokenizer), d_vocab))
    special = torch.tensor([] if tokenizer is None else tokenizer.all_special_ids)
    ids = ids[~torch.isin(ids, special)]
    draw = torch.randint(len(ids), (n_prompts, n_tokens), generator=derive_generator(seed, label))
    return ids[draw]


def _random(model: TransformerBridge, n_prompts: int, length: int, seed: int) -> tuple[Tensor, ...]:
    bos = bos_ids(model)[: max(length - 1, 0)]
    ids = random_ids(model, n_prompts, length - len(bos), seed, "random tokens")
    return tuple(torch.cat([torch.tensor(bos, dtype=torch.long), row]) for row in ids)


def _natural(
    model: TransformerBridge, n_prompts: int, length: int, seed: int
) -> tuple[Tensor, ...]:
    """Return prompts of prose and code alternately, each from other documents while they last."""
    from transformer_lens.utilities.statistics import derive_generator

    documents = []
    for label, texts in (("prose", prose()), ("code", code())):
        order = torch.randperm(len(texts), generator=derive_generator(seed, "natural", label))
        documents.append(itertools.cycle([texts[index] for index in order.tolist()]))
    prompts = []
    for index in range(n_prompts):
        text, limit = "", 8 * length  # few tokens have more than 8 characters
        tokens = torch.empty(0, dtype=torch.long)
        while len(tokens) < length:
            while len(text) < limit:
                text += next(documents[index % 2]) + "\n\n"
            tokens = _tokenise(model, text[:limit])
            limit *= 2
        prompts.append(tokens[:length])
    return tuple(prompts)
