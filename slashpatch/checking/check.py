"""`check`: the contract that slashpatch keeps, tried on the user's own model.

What is compared is equal up to rounding, and how far rounding goes is measured on the model itself:
each layer's inputs, queries, keys, values, scores and outputs are multiplied by 1 ± eps of the
dtype at random, and the logits may differ by four times what that does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .. import bridge
from ..bridge.attached import active_edits, other_hooks
from ..bridge.frequencies import kept_frequencies
from ..bridge.provenance import provenance
from ..errors import ModelError
from ..patching.fused import is_fused
from .contracts import _Checks
from .result import Report

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def check(model: TransformerBridge, *, seed: int = 0, progress: bool | None = None) -> Report:
    """Try on two short prompts all that slashpatch promises, edit by edit.

    A check passes, fails, or is refused: slashpatch says by name what it cannot do with the model.
    Raises ModelError only for what is no TransformerBridge in evaluation mode, or has hooks on it.
    """
    from transformer_lens.model_bridge import TransformerBridge

    if not isinstance(model, TransformerBridge) or model.training:
        bridge.read(model)  # says what is wrong
    if other_hooks(model) or active_edits(model) or is_fused(model):
        raise ModelError(
            "check tries the model by itself; leave slashpatch.patch and slashpatch.fused first, "
            f"and remove other hooks ({', '.join(other_hooks(model)) or 'none'})"
        )
    device = torch.device(model.cfg.device).type
    with kept_frequencies(model), torch.autocast(device, enabled=False):
        rows = _Checks(model, seed, progress).run()
    return Report(tuple(rows), provenance(model, seed=seed))
