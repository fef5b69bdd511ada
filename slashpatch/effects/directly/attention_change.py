"""What edits change in the residual stream by the attention of their layers, and nothing else.

In one forward pass under the edits, each edited layer's block gets the clean run's residual stream
as its input, and its MLP's output is held at the clean run's. So the change of the block's output
is the change of its attention's part, scaled and normed as the model does it, and no edited layer
sees what another one changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ... import bridge
from ...bridge.passes import leaving_no_trace
from ...edits import Edit
from ...errors import ModelError
from ...maths.precision import logits_slack
from ...patching.patch import patch
from ..running.evaluation import MetricRunner
from .final_norm import FINAL_INPUT

_SITES = ("block", "mlp", "block_output")


@dataclass
class CleanLayers:
    """Clean inputs and outputs of some layers' blocks, and outputs of their MLPs, of one batch.

    Attributes:
        runner: Runs the model.
        tokens: The prompts.
        layers: The layers.
        clean: Tensors by (site, layer).
    """

    runner: MetricRunner
    tokens: Tensor
    layers: tuple[int, ...]
    clean: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def hooks(self) -> list[tuple[str, Any]]:
        """Return hooks that keep the tensors in a clean run."""

        def keep(key: tuple[str, int]) -> Any:
            def hook_fn(x: Any, hook: Any) -> None:
                if not isinstance(x, Tensor):
                    raise ModelError(f"{hook.name} carries a {type(x).__name__}, not a tensor")
                self.clean[key] = x.detach()

            return hook_fn

        info = self.runner.info
        return [
            (info.hook(layer, site), keep((site, layer)))
            for layer in self.layers
            for site in _SITES
        ]

    def require(self) -> None:
        """Raise ModelError where a hook did not fire."""
        for layer in self.layers:
            for site in _SITES:
                if (site, layer) not in self.clean:
                    raise ModelError(
                        f"the hook {self.runner.info.hook(layer, site)} did not fire; the direct "
                        "effect needs the inputs and outputs of blocks, and the outputs of MLPs"
                    )

    def change(self, edits: Sequence[Edit]) -> Float[Tensor, "batch pos d_model"]:
        """Return the sum over the edited layers of what attention adds more under the edits."""
        layers = sorted({layer for edit in edits for layer in edit.layers})
        outputs = self._outputs(layers, edits)
        total: Any = 0
        for layer in layers:
            clean = self.clean["block_output", layer]
            wide = torch.promote_types(clean.dtype, torch.float32)
            total = total + (outputs[layer].to(wide) - clean.to(wide)).to(self.tokens.device)
        return total

    def _outputs(self, layers: Sequence[int], edits: Sequence[Edit]) -> dict[int, Tensor]:
        """Return the outputs of some blocks under edits, with clean inputs and MLP outputs."""
        info, found = self.runner.info, dict[int, Tensor]()

        def hold(site: str, layer: int) -> Any:
            return lambda x, hook: self.clean[site, layer]

        def keep(layer: int) -> Any:
            def hook_fn(x: Tensor, hook: Any) -> None:
                found[layer] = x.detach()

            return hook_fn

        hooks: list[tuple[str, Any]] = []
        for layer in layers:
            hooks += [(info.hook(layer, site), hold(site, layer)) for site in _SITES[:2]]
            hooks.append((info.hook(layer, "block_output"), keep(layer)))
        last = max(layers)
        stop: dict[str, Any] = {} if last == info.n_layers - 1 else {"stop_at_layer": last + 1}
        model = self.runner.model
        with leaving_no_trace(model), patch(model, *edits):
            model.run_with_hooks(self.tokens, fwd_hooks=hooks, return_type=None, **stop)
        return found


def verify_direct_path(runner: MetricRunner, tokens: Int[Tensor, "batch pos"], layer: int) -> None:
    """Raise ModelError unless a change of the residual stream reaches the final norm as it is.

    A change of the input of block `layer` is run through the model while z and the MLPs' outputs
    are held at the clean run's, from that block on. Only the residual stream can then carry it.
    """
    info, model = runner.info, runner.model
    sites = [info.hook(at, site) for at in range(layer, info.n_layers) for site in ("z", "mlp")]
    start = info.hook(layer, "block")
    clean: dict[str, Tensor] = {}
    changed: dict[str, Tensor] = {}

    def keep(into: dict[str, Tensor]) -> Any:
        def hook_fn(x: Tensor, hook: Any) -> None:
            into[hook.name] = x.detach()

        return hook_fn

    def hold(x: Tensor, hook: Any) -> Tensor:
        return clean[hook.name]

    with leaving_no_trace(model):
        kept = [(name, keep(clean)) for name in (*sites, start, FINAL_INPUT)]
        bridge.run_for_hooks(model, tokens, kept)
        nudge = clean[start].roll(1, -1) / 8
        held: list[tuple[str, Any]] = [(start, lambda x, hook: x + nudge)]
        held += [(name, hold) for name in sites] + [(FINAL_INPUT, keep(changed))]
        bridge.run_for_hooks(model, tokens, held)
    before, after = (one[FINAL_INPUT].to(nudge.device).float() for one in (clean, changed))
    missed = (after - before - nudge).norm(dim=-1)
    allowed = logits_slack(nudge.dtype, info.n_layers) * (before.norm(dim=-1) + nudge.norm(dim=-1))
    if bool((missed > allowed).any()):
        share = float((missed / nudge.float().norm(dim=-1)).max())
        raise ModelError(
            f"a change of the residual stream before block {layer} of {model.cfg.architecture} "
            f"does not reach the final norm as it is while attention and MLPs are held "
            f"({share:.2g} of it is changed on the way), so a direct effect is not defined"
        )
