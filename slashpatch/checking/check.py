"""`check`: test slashpatch's promises on the user's own model.

Logits that are compared may differ by rounding. How much rounding changes them is measured on the
model itself: each layer's inputs, queries, keys, values, scores and outputs are multiplied by
random factors 1 ± eps of the dtype, and four times the largest change of a logit is allowed.
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
from .contracts import Checker
from .result import Report

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def check(model: TransformerBridge, *, seed: int = 0, progress: bool | None = None) -> Report:
    """Test all of slashpatch's promises (`CONTRACTS`) on a model, with two short random prompts.

    A check passes, fails, or is refused, if slashpatch does not support something on this model and
    says so. Raises ModelError only for a model that is not a TransformerBridge in evaluation mode,
    or that has hooks or patches attached.
    """
    from transformer_lens.model_bridge import TransformerBridge

    if not isinstance(model, TransformerBridge) or model.training:
        bridge.read(model)  # raises ModelError with the reason
    if other_hooks(model) or active_edits(model) or is_fused(model):
        others = ", ".join(other_hooks(model))
        raise ModelError(
            "check needs a model without edits; leave slashpatch.patch and slashpatch.fused first"
            + (f", and remove other hooks ({others})" if others else "")
        )
    device = torch.device(model.cfg.device).type
    with kept_frequencies(model), torch.autocast(device, enabled=False):
        checks = Checker(model, seed, progress).run()
    return Report(tuple(checks), provenance(model, seed=seed))
