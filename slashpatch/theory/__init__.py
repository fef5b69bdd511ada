"""Train a shallow RoPE transformer in which slash heads emerge.

According to the abstract of arXiv 2601.08297, gradient descent gives a shallow RoPE transformer
slash heads that generalise out of distribution, if token embeddings share a common direction and
the RoPE frequencies add up at one offset. That claim is the paper's. The model, tasks, initial
values, learning rates and thresholds here are *ours*: we know the paper's abstract, not its
construction. `Settings` can switch off each condition.

`train_text` asks the same of a small language model that learns from text.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .agreement import agreement
from .comparison import compare, draw_settings
from .margins import frequency_margins
from .model import ShallowTransformer
from .phase import phase_diagram
from .prediction import Prediction, predict
from .run import Run, Slash
from .settings import Settings
from .training import train

if TYPE_CHECKING:
    from .text.run import TextRun
    from .text.settings import TextSettings
    from .text.training import train_text

__all__ = [
    "Prediction",
    "Run",
    "Settings",
    "ShallowTransformer",
    "Slash",
    "TextRun",
    "TextSettings",
    "agreement",
    "compare",
    "draw_settings",
    "frequency_margins",
    "phase_diagram",
    "predict",
    "train",
    "train_text",
]

#: Names that need Transformers and TransformerLens, which load on first use.
_LAZY = {"TextRun": "run", "TextSettings": "settings", "train_text": "training"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.text.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
