"""What the heads of one layer would attend to or write if one of their inputs changed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ...bridge.modes import forming_matrices
from ...bridge.passes import leaving_no_trace
from ...bridge.prefix_cache import PrefixCache
from ...bridge.qk import LayerQK
from ...data.heads import Head
from ...errors import ModelError
from .evaluation import MetricRunner

#: The inputs of a head.
INPUTS = ("q", "k", "v")


def run_until(runner: MetricRunner, tokens: Tensor, layer: int, hooks: list[Any]) -> None:
    """Run a forward pass that ends after `layer`."""
    last = layer == runner.info.n_layers - 1
    kwargs: dict[str, Any] = {} if last else {"stop_at_layer": layer + 1}
    with leaving_no_trace(runner.model), forming_matrices():
        runner.model.run_with_hooks(tokens, fwd_hooks=hooks, return_type=None, **kwargs)


@dataclass
class ReaderLayer:
    """Computes patterns and z of one layer's heads with one of their inputs changed.

    Attributes:
        runner: Runs the model.
        qk: The layer's query and key hooks.
        prefix: The cached residual stream before the layer, of the clean run.
        tokens: The prompts.
        change: The change that is added to the residual stream.
    """

    runner: MetricRunner
    qk: LayerQK
    prefix: PrefixCache
    tokens: Tensor
    change: Float[Tensor, "batch pos d_model"]

    def hooks(self, edges: list[tuple[Head, str]]) -> Iterator[tuple[Any, tuple[str, Any]]]:
        """Yield, for each (head, input), the hook that gives the head its changed pattern or z."""
        info, layer = self.runner.info, self.qk.layer
        pattern, z = info.hook(layer, "pattern"), info.hook(layer, "z")
        names = {"q": self.qk.q.name, "k": self.qk.k.name, "pattern": pattern}
        clean = self._run(names, {})
        # While one input changes, the other one that the pattern or z depends on stays clean.
        kept_clean = {"q": "k", "k": "q", "v": "pattern"}
        for of in INPUTS:
            heads = [head for head, wanted in edges if wanted == of]
            if not heads:
                continue
            name = z if of == "v" else pattern
            held = {names[kept_clean[of]]: clean[kept_clean[of]]}
            (changed,) = self._run({of: name}, held, self.change).values()
            for head in heads:
                yield (head, of), (name, _replacing(changed, head.head, 2 if of == "v" else 1))

    def _run(
        self, names: dict[str, str], held: dict[str, Tensor], change: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Run the layer; return the tensors at the hooks `names`, by the same keys.

        `change` is added to the layer's input; `held` replaces tensors at further hooks, by name.
        """
        values: dict[str, Tensor] = {}
        hooks: list[tuple[str, Any]] = []
        if change is not None:
            hooks.append(
                (self.runner.info.hook(self.qk.layer, "block"), lambda x, hook: x + change)
            )
        for name, value in held.items():
            hooks.append((name, lambda x, hook, value=value: value))
        for key, name in names.items():

            def keep(x: Tensor, hook: Any, key: str = key) -> None:
                values[key] = x.detach()

            hooks.append((name, keep))
        with self.prefix.skipped():
            run_until(self.runner, self.tokens, self.qk.layer, hooks)
        missing = [name for key, name in names.items() if key not in values]
        if missing:
            raise ModelError(f"the hook {missing[0]} did not fire; paths needs it in every pass")
        return values


def _replacing(changed: Tensor, head: int, axis: int) -> Any:
    """Return a hook function that replaces one head of a tensor by that head of `changed`."""

    def replace_head(x: Tensor, hook: Any) -> Tensor:
        whole = x.clone()
        index = (slice(None),) * axis + (head,)
        whole[index] = changed[index]
        return whole

    return replace_head
