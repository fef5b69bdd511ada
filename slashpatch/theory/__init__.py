"""Slash heads from scratch: the shallow RoPE transformer, trained, with the conditions as knobs.

The paper (arXiv 2601.08297, abstract) says that under two conditions, embeddings with a common
direction and frequencies that add up, gradient descent gives a shallow RoPE transformer slash heads
that generalise out of distribution. That claim is the paper's. The model, tasks, initial values,
learning rates and thresholds here are *ours*: we have its abstract, not its construction.
"""

from .model import ShallowTransformer
from .phase import phase_diagram
from .run import Run
from .settings import Settings
from .training import train

__all__ = ["Run", "Settings", "ShallowTransformer", "phase_diagram", "train"]
