"""All that is known of a TransformerBridge: what its hooks carry, and how its layers rotate.

`read(model)` is the one door: rooms above this one ask the `ModelInfo` that it returns.
"""

from .info import read, run_for_hooks
from .model_info import ModelInfo

__all__ = ["ModelInfo", "read", "run_for_hooks"]
