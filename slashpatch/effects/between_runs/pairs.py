"""Clean and corrupt prompts of equal length, each with its own answer, for activation patching."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...data.prompts import PromptSet, as_path, bos_ids, random_ids
from ...errors import PromptError
from .pair_files import read_rows

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True)
class Pairs:
    """Pairs of a clean and a corrupt prompt of equal length, and the answer to each.

    Attributes:
        clean: Token ids of each clean prompt, [pos].
        corrupt: Token ids of each corrupt prompt, as many as the clean one has.
        right: Token id of the answer in each clean prompt.
        wrong: Token id of the answer in each corrupt prompt.
        position: Position whose next token is the answer; −1 is the last token.
        source: Where they came from, in words.

    Raises:
        PromptError: Lengths that differ, no pairs, equal answers, or a position outside a prompt.
    """

    clean: tuple[Tensor, ...]
    corrupt: tuple[Tensor, ...]
    right: tuple[int, ...]
    wrong: tuple[int, ...]
    position: int = -1
    source: str = "pairs"

    def __post_init__(self) -> None:
        for name in ("clean", "corrupt"):
            rows = tuple(torch.as_tensor(row).detach().cpu() for row in getattr(self, name))
            for at, row in enumerate(rows):
                if row.ndim != 1 or row.is_floating_point() or row.dtype == torch.bool:
                    raise PromptError(
                        f"pair {at}: {name} must be token ids [pos]; got a tensor of shape "
                        f"{list(row.shape)}, {row.dtype}"
                    )
            object.__setattr__(self, name, tuple(row.long() for row in rows))
        for name in ("right", "wrong"):
            ids = getattr(self, name)
            ids = ids.tolist() if hasattr(ids, "tolist") else ids
            object.__setattr__(self, name, tuple(int(token) for token in ids))
        counts = {name: len(getattr(self, name)) for name in ("clean", "corrupt", "right", "wrong")}
        if not self.clean or len(set(counts.values())) > 1:
            raise PromptError(
                "expected at least one pair, and as many clean prompts, corrupt prompts, right and "
                f"wrong answers; got {', '.join(f'{n} {name}' for name, n in counts.items())}"
            )
        for at in range(len(self.clean)):
            self._require_pair(at)

    def _require_pair(self, at: int) -> None:
        n, other = len(self.clean[at]), len(self.corrupt[at])
        if n != other:
            raise PromptError(
                f"pair {at}: the clean prompt has {n} tokens and the corrupt one {other}; patching "
                "needs as many in both"
            )
        if not -n <= self.position < n:
            raise PromptError(f"pair {at}: position {self.position} is outside its {n} tokens")
        if self.right[at] == self.wrong[at]:
            raise PromptError(
                f"pair {at}: the right and the wrong answer are both {self.right[at]}"
            )

    def __len__(self) -> int:
        return len(self.clean)

    @property
    def record(self) -> dict[str, Any]:
        """What a result's provenance says about these pairs."""
        return {"source": self.source, "n": len(self), "digest": self.digest}

    @property
    def digest(self) -> str:
        """SHA-256 over all prompts, answers and the position, its first 16 hex digits."""
        answers = torch.tensor([*self.right, *self.wrong, self.position])
        whole = PromptSet((*self.clean, *self.corrupt, answers), self.source)
        return hashlib.sha256(whole.digest.encode()).hexdigest()[:16]


def copying_pairs(
    model: TransformerBridge, n_prompts: int = 16, n_tokens: int = 25, seed: int = 0
) -> Pairs:
    """Return pairs of repeated random tokens in which the token before the answer is changed.

    The first copy holds `n_tokens` distinct random tokens, among them "x A" and "y B" at random
    places. The second copy repeats the other tokens in their order, and ends with x. In the clean
    prompt A follows x; in the corrupt prompt x and y have changed places in the first copy, so
    that B follows x. Each prompt is the other's counterfactual, with a well-defined answer
    (symmetric token replacement: Zhang & Nanda, arXiv 2309.16042). The construction is *ours*.

    Args:
        model: A TransformerBridge.
        n_prompts: Number of pairs.
        n_tokens: Length of the first copy, from 5; prompts have 2 · `n_tokens` − 3 tokens, and BOS
            if the model uses it.
        seed: Random seed.

    Raises:
        PromptError: More tokens than the context or the vocabulary holds.
    """
    from transformer_lens.utilities.statistics import derive_generator

    bos = bos_ids(model)
    most = (model.cfg.n_ctx + 3 - len(bos)) // 2
    if n_prompts < 1 or not 5 <= n_tokens <= most:
        raise PromptError(
            f"expected at least 1 pair, and 5 to {most} tokens so that two copies fit the context; "
            f"got {n_prompts} pairs of {n_tokens} tokens"
        )
    generator = derive_generator(seed, "copying pairs")
    clean: list[Tensor] = []
    corrupt: list[Tensor] = []
    right: list[int] = []
    wrong: list[int] = []
    for at in range(n_prompts):
        pool = random_ids(model, 1, max(64, 8 * n_tokens), seed, f"copying pair {at}")[0]
        first = torch.tensor(list(dict.fromkeys(pool.tolist()))[:n_tokens])
        if len(first) < n_tokens:
            raise PromptError(
                f"the vocabulary is too small for {n_tokens} distinct random tokens; got "
                f"{len(first)}. Ask for fewer tokens"
            )
        x, y = _two_places(n_tokens, generator)
        rest = torch.ones(n_tokens, dtype=torch.bool)
        rest[[x, x + 1, y, y + 1]] = False
        swapped = first.clone()
        swapped[[x, y]] = first[[y, x]]
        start = torch.tensor(bos, dtype=torch.long)
        for prompts, copy in ((clean, first), (corrupt, swapped)):
            prompts.append(torch.cat([start, copy, first[rest], first[x : x + 1]]))
        right.append(int(first[x + 1]))
        wrong.append(int(first[y + 1]))
    source = f"copying pairs of {n_tokens} random tokens, seed {seed}"
    return Pairs(tuple(clean), tuple(corrupt), tuple(right), tuple(wrong), -1, source)


def _two_places(n_tokens: int, generator: torch.Generator) -> tuple[int, int]:
    """Return where two bigrams start in a copy, in random order; they do not overlap."""
    while True:
        x, y = torch.randint(n_tokens - 1, (2,), generator=generator).tolist()
        if abs(x - y) >= 2:
            return x, y


def as_pairs(model: TransformerBridge, pairs: Any = None, **options: Any) -> Pairs:
    """Return the pairs that were given, those of a file, or copying pairs.

    Args:
        model: A TransformerBridge.
        pairs: A `Pairs`; a .jsonl or .csv file; rows as in such a file; None: `copying_pairs`.
        options: Arguments of `copying_pairs`.

    Raises:
        PromptError: Pairs that are misspelt, outside the vocabulary, or longer than the context.
    """
    if pairs is None:
        pairs = copying_pairs(model, **options)
    elif not isinstance(pairs, Pairs):
        pairs = pairs_of_rows(model, pairs)
    for at, (clean, corrupt) in enumerate(zip(pairs.clean, pairs.corrupt, strict=True)):
        ids = torch.cat([clean, corrupt, torch.tensor([pairs.right[at], pairs.wrong[at]])])
        if int(ids.min()) < 0 or int(ids.max()) >= model.cfg.d_vocab:
            raise PromptError(
                f"pair {at} has token ids outside the vocabulary; expected 0 to "
                f"{model.cfg.d_vocab - 1}"
            )
        if len(clean) > model.cfg.n_ctx:
            raise PromptError(
                f"pair {at} has {len(clean)} tokens and the model's context is {model.cfg.n_ctx}"
            )
    return pairs


def pairs_of_rows(model: TransformerBridge, given: Any) -> Pairs:
    """Return the pairs of a .jsonl or .csv file, or of rows with the names of its columns.

    Raises PromptError, which names the line.
    """
    path = as_path(given)
    if path is not None:
        rows, source = read_rows(path), f"file {path.name}"
    elif isinstance(given, Sequence) and not isinstance(given, str):
        rows, source = [(f"row {at}", row) for at, row in enumerate(given)], "rows"
    else:
        raise PromptError(
            "expected Pairs, a .jsonl or .csv file of clean, corrupt, right and wrong, or rows "
            f"with these names; got {given!r:.60}"
        )
    found: list[tuple[Tensor, Tensor, int, int]] = []
    for where, row in rows:
        if not isinstance(row, dict) or set(row) != {"clean", "corrupt", "right", "wrong"}:
            names = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
            raise PromptError(f"{where}: expected clean, corrupt, right and wrong; got {names}")
        clean, corrupt = (_ids(model, row[of], f"{where}: {of}", True) for of in _PROMPTS)
        right, wrong = (_one_token(model, row[of], f"{where}: {of}") for of in _ANSWERS)
        if len(clean) != len(corrupt):
            raise PromptError(
                f"{where}: clean has {len(clean)} tokens and corrupt {len(corrupt)}; patching "
                "needs as many in both, so choose words of as many tokens"
            )
        if right == wrong:
            raise PromptError(f"{where}: right and wrong are the same token, {right}")
        found.append((clean, corrupt, right, wrong))
    if not found:
        raise PromptError(f"{source} holds no pairs; expected at least one")
    clean_ids, corrupt_ids, right_ids, wrong_ids = zip(*found, strict=True)
    return Pairs(clean_ids, corrupt_ids, right_ids, wrong_ids, source=source)


_PROMPTS, _ANSWERS = ("clean", "corrupt"), ("right", "wrong")


def _ids(model: TransformerBridge, given: Any, where: str, bos: bool) -> Tensor:
    """Return the token ids of a text or of a list of ids; texts start with BOS if `bos`."""
    if isinstance(given, list):
        if not given or not all(type(token) is int for token in given):
            raise PromptError(f"{where} must be a text or token ids; got {given!r:.60}")
        return torch.tensor(given)
    if not isinstance(given, str) or not given:
        raise PromptError(f"{where} must be a text or token ids; got {given!r:.60}")
    if model.tokenizer is None:
        raise PromptError(f"{where} is a text, and the model has no tokenizer; give token ids")
    more: dict[str, Any] = {} if bos else {"prepend_bos": False}
    return model.to_tokens(given, truncate=False, move_to_device=False, **more)[0]


def _one_token(model: TransformerBridge, given: Any, where: str) -> int:
    """Return the token id of an answer. Raises PromptError unless it is a single token."""
    if type(given) is int:
        return given
    ids = _ids(model, given, where, False)
    if len(ids) != 1:
        raise PromptError(
            f"{where} must be one token, and {given!r:.60} has {len(ids)}; most words are one "
            "token only with a space before them"
        )
    return int(ids[0])
