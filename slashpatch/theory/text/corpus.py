"""The text that comes with Python, a tokenizer trained on it, and training sequences of it."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from ...errors import TheoryError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from .settings import TextSettings

#: Parts of the standard library that some distributions leave out, or that are tables.
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings"}
_LEFT_OUT |= {"ensurepip", "turtledemo", "tkinter", "distutils", "config", "__pycache__"}
#: One file in so many is held out.
_HELD_OUT = 20
START = "<s>"


def python_text() -> dict[str, str]:
    """Return the help topics and source files that every Python has, by name.

    About ten million characters of English and code. It differs a little from version to version
    of Python, so the weights of a run do too. The topics stand in `pydoc_data/topics.py` once more,
    so training text has those that are held out. Raises TheoryError where the source is missing.
    """
    from pydoc_data.topics import topics

    texts = {f"topic {name}": text for name, text in topics.items()}
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not any(part in _LEFT_OUT or part.startswith("config-") for part in parts):
            texts["/".join(parts)] = path.read_text(encoding="utf-8", errors="replace")
    size = sum(map(len, texts.values()))
    if size < 1_000_000:
        raise TheoryError(
            f"expected the source of Python's standard library in {str(root)!r}, about ten million "
            f"characters; found {size:,}. Use a Python that is installed with its source files"
        )
    return dict(sorted(texts.items()))


def split(texts: dict[str, str]) -> tuple[list[str], list[str]]:
    """Return training texts and held-out ones; a hash of the name decides, so about 5 % are."""
    parts: tuple[list[str], list[str]] = ([], [])
    for name, text in texts.items():
        digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
        parts[digest % _HELD_OUT == 0].append(text)
    return parts


def new_tokenizer(texts: list[str], vocabulary: int, length: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer (`tokenizers`) that puts `<s>` before each text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[START],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    made.post_processor = processors.TemplateProcessing(
        single=f"{START} $A", special_tokens=[(START, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=START,
        eos_token=START,
        pad_token=START,
        model_max_length=length,
    )


def token_ids(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Int[Tensor, "token"]:
    """Return the token ids of all texts after one another, each after `<s>`."""
    ids = [row for text in tokenizer.backend_tokenizer.encode_batch(texts) for row in text.ids]
    return torch.tensor(ids)


def windows(ids: Int[Tensor, "token"], length: int) -> Int[Tensor, "window pos"]:
    """Return consecutive windows of the text, `<s>` first; the rest at the end is left out."""
    n = len(ids) // (length - 1)
    rows = ids[: n * (length - 1)].reshape(n, length - 1)
    return torch.cat([torch.zeros(n, 1, dtype=rows.dtype), rows], dim=1)


def chosen(rows: Int[Tensor, "window pos"], n: int) -> Int[Tensor, "_ pos"]:
    """Return n held-out windows in a fixed random order. Raises TheoryError if there are fewer."""
    if len(rows) < n:
        raise TheoryError(
            f"the held-out text has {len(rows)} sequences of {rows.shape[1]} tokens; expected {n} "
            "or more. Use a shorter length"
        )
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:n]]


def with_repeat(row: Int[Tensor, "pos"], generator: torch.Generator) -> Int[Tensor, "pos"]:
    """Return a sequence in which one passage stands twice: it replaces what stood at a later place.

    The passage has an eighth to almost half of the sequence's tokens; both places are random.
    """

    def draw(least: int, most: int) -> int:
        return int(torch.randint(least, most + 1, (), generator=generator))

    length = len(row)
    size = draw(max(1, length // 8), (length - 1) // 2)
    first = draw(1, length - 2 * size)
    second = draw(first + size, length - size)
    repeated = row.clone()
    repeated[second : second + size] = row[first : first + size]
    return repeated


class Sequences(torch.utils.data.Dataset):
    """The training sequences of a run in their order; the n-th depends on seed and n only."""

    def __init__(self, rows: Int[Tensor, "window pos"], settings: TextSettings) -> None:
        self.rows, self.settings = rows, settings
        self.size = settings.steps * settings.batch_size
        epochs = -(-self.size // len(rows))
        generator = torch.Generator().manual_seed(settings.seed)
        order = [torch.randperm(len(rows), generator=generator) for _ in range(epochs)]
        self.order = torch.cat(order)[: self.size]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.rows[self.order[index]]
        generator = torch.Generator().manual_seed(self.settings.seed * 2**31 + index)
        if float(torch.rand((), generator=generator)) < self.settings.repeats:
            row = with_repeat(row, generator)
        return {"input_ids": row, "labels": row}


class Rows(torch.utils.data.Dataset):
    """Held-out sequences as they stand in the text."""

    def __init__(self, rows: Int[Tensor, "window pos"]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}
