"""A finished run on text: its folder, its measurements and its model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from ...bridge.loading import load
from ...data import display
from ...data.files import load_json
from ...errors import TheoryError
from ...scanning.emergence_result import Emergence
from .changes import changes
from .patterns import load_patterns
from .settings import TextSettings

if TYPE_CHECKING:
    import pandas as pd
    from transformer_lens.model_bridge import TransformerBridge

SETTINGS, MODEL, CHECKPOINTS, TOKENIZER = "settings.json", "model", "checkpoints", "tokenizer"
TEXT, RANDOM, PATTERNS = "text.parquet", "random.parquet", "patterns"


@dataclass(frozen=True, eq=False)
class TextRun:
    """A finished run on text, as `train_text` leaves it in a folder.

    The folder holds settings.json, tokenizer/, model/ (Transformers format, safetensors),
    text.parquet and random.parquet (`Emergence` files), and patterns/ (attention patterns of one
    sequence at every measured step). While the run goes on, checkpoints/ holds its last two states.

    Attributes:
        folder: The folder.
        settings: The settings, which determine the run.
        text: Measurements on held-out text, with the losses.
        random: Measurements on uniform random tokens.
    """

    folder: Path
    settings: TextSettings
    text: Emergence
    random: Emergence

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> TextRun:
        """Read a finished run. Raises TheoryError for any other folder."""
        root = Path(folder)
        settings = cls.settings_of(root)
        if not (root / MODEL).exists():
            raise TheoryError(
                f"the run in {str(root)!r} is not finished; continue it with "
                "train_text(..., resume=True) or --resume"
            )
        return cls(root, settings, Emergence.load(root / TEXT), Emergence.load(root / RANDOM))

    @staticmethod
    def settings_of(folder: Path) -> TextSettings:
        """Return the settings of the run in a folder. Raises OutputError or TheoryError."""
        found = load_json(
            folder / SETTINGS, lambda record: TextSettings(**record), "settings of a run on text"
        )
        assert isinstance(found, TextSettings)
        return found

    def model(self) -> TransformerBridge:
        """Load the trained model. The edits of the settings are not on it."""
        return load(str(self.folder / MODEL))

    def patterns(self) -> dict[int, Float[Tensor, "layer head query key"]]:
        """Return attention patterns by step: of 24 random tokens that come twice, after `<s>`."""
        return load_patterns(self.folder / PATTERNS)

    def changes(self) -> pd.DataFrame:
        """Return when slashes, rank one, the cone, induction and copying appeared.

        See `slashpatch.theory.text.changes.changes`.
        """
        return changes(self.text, self.random)

    def table(self) -> str:
        """Return the changes as plain text."""
        return display.text(self)

    def plot(self, backend: str = "matplotlib", *, kappa: float = 0.3) -> Any:
        """Return the curves of what changed, each with the step at which it did, as a figure.

        With "altair": a chart of the measurements on held-out text, as `Emergence.plot` draws it.
        `kappa` is drawn as a rule. Raises PlotError for another backend, ExtraError if Altair is
        not installed.
        """
        return display.plot(self, backend, kappa=kappa)

    def _repr_html_(self) -> str:
        return display.html(self)

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        return f"<TextRun {str(self.folder)!r}: {self.settings.steps} steps>"
