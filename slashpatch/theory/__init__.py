"""Train a shallow RoPE transformer in which slash heads emerge.

According to the abstract of arXiv 2601.08297, gradient descent gives a shallow RoPE transformer
slash heads that generalise out of distribution, if token embeddings share a common direction and
the RoPE frequencies add up at one offset. That claim is the paper's. The model, tasks, initial
values, learning rates and thresholds here are *ours*: we know the paper's abstract, not its
construction. `Settings` can switch off each condition.
"""

from .margins import frequency_margins
from .model import ShallowTransformer
from .phase import phase_diagram
from .run import Run
from .settings import Settings
from .training import train

__all__ = ["Run", "Settings", "ShallowTransformer", "frequency_margins", "phase_diagram", "train"]
