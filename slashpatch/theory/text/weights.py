"""A model's weights under the names that Transformers gives them, also inside a bridge."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...errors import TheoryError

#: What a TransformerBridge adds to the names of the modules that it wraps.
_WRAPPED = "._original_component"


def plain_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's parameters, each once, by their names without a bridge."""
    named = model.named_parameters()
    return {name.replace(_WRAPPED, ""): weight.detach() for name, weight in named}


def copy_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into a model's parameters in place. Raises TheoryError for other names."""
    own = plain_weights(model)
    if own.keys() != weights.keys():
        other = sorted(own.keys() ^ weights.keys())[0]
        raise TheoryError(f"the weights are of another model: one of the two lacks {other}")
    with torch.no_grad():
        for name, weight in own.items():
            weight.copy_(weights[name])
