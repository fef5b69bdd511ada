"""Train a shallow RoPE transformer in which slash heads emerge.

According to the abstract of arXiv 2601.08297, gradient descent gives a shallow RoPE transformer
slash heads that generalise out of distribution, if token embeddings share a common direction and
the RoPE frequencies add up at one offset. That claim is the paper's. The model, tasks, initial
values, learning rates and thresholds here are *ours*: we know the paper's abstract, not its
construction. `Settings` can switch off each condition.
"""

from .agreement import agreement
from .comparison import compare, draw_settings
from .model import ShallowTransformer
from .phase import phase_diagram
from .prediction import Prediction, predict
from .run import Run, Slash
from .settings import Settings
from .training import train

__all__ = [
    "Prediction",
    "Run",
    "Settings",
    "ShallowTransformer",
    "Slash",
    "agreement",
    "compare",
    "draw_settings",
    "phase_diagram",
    "predict",
    "train",
]
