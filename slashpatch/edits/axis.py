"""The axis of the attention inputs of some layers, and their other strong directions, fitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from .. import bridge
from ..bridge.provenance import provenance
from ..data.heads import HeadsLike
from ..data.prompts import prompt_set
from ..errors import EditError
from ..maths.cone import axis_and_principal
from .fitted import Fitted

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

#: Principal directions that are fitted beside each axis (*ours*).
N_PRINCIPAL = 8


@dataclass(frozen=True, eq=False, repr=False)
class Axis(Fitted):
    """The axis of the cone on which a layer's attention inputs lie: the direction of their mean.

    By the account of arXiv 2601.08297, embeddings lie near a cone, and W_Q and W_K carry its axis
    into every query and key. That x is the attention's input (after the layer norm, in models that
    norm it before), and the axis the direction of its mean, is *ours*.

    Attributes:
        layers: The layers, ascending.
        directions: Unit vectors u of the layers.
        principal: Strongest directions of what is left of x without its component along u, the
            strongest first: orthonormal, and orthogonal to u.
        shares: Share of the inputs' second moment E|x|² along u, then along each principal
            direction.
        cosines: Mean cosine of the inputs to u.
        provenance: Model, prompts, seed and versions of the fit.
        path: Files that the axis was loaded from or saved to; an edit that uses the axis prints as
            the last of them.
    """

    WHAT: ClassVar[str] = "axis"
    FORMAT: ClassVar[str] = "slashpatch-axis-1"

    layers: tuple[int, ...]
    directions: Float[Tensor, "layer d_model"]
    principal: Float[Tensor, "layer n d_model"]
    shares: Float[Tensor, "layer more"]
    cosines: Float[Tensor, "layer"]

    def header(self) -> dict[str, Any]:
        """Return the layers."""
        return {"layers": list(self.layers)}

    def tensors(self) -> dict[str, Tensor]:
        """Return directions, shares and cosines."""
        names = ("directions", "principal", "shares", "cosines")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def build(cls, header: dict[str, Any], tensors: dict[str, Tensor], **more: Any) -> Axis:
        """Return the axis of a file. Raises EditError if its directions are not orthonormal."""
        names = ("directions", "principal", "shares", "cosines")
        axis = cls(tuple(header["layers"]), *(tensors[name].double() for name in names), **more)
        axis._validate()
        return axis

    def of(self, layer: int) -> Float[Tensor, "d_model"]:
        """Return the axis of one layer. Raises EditError if it was not fitted there."""
        return self.directions[self._row(layer)]

    def principal_of(self, layer: int) -> Float[Tensor, "n d_model"]:
        """Return the principal directions of one layer. Raises as `of`."""
        return self.principal[self._row(layer)]

    def _row(self, layer: int) -> int:
        if layer not in self.layers:
            raise EditError(
                f"the axis was fitted for layers {', '.join(map(str, self.layers))}, not for "
                f"layer {layer}"
            )
        return self.layers.index(layer)

    def _validate(self) -> None:
        """Raise EditError unless each layer has orthonormal directions."""
        n = len(self.layers)
        shaped = (
            all(isinstance(layer, int) and layer >= 0 for layer in self.layers)
            and self.directions.ndim == 2
            and self.principal.ndim == 3
            and {n} == {len(tensor) for tensor in self.tensors().values()}
            and self.principal.shape[2] == self.directions.shape[1]
            and self.shares.shape == (n, 1 + self.principal.shape[1])
            and self.cosines.ndim == 1
        )
        if shaped:
            rows = torch.cat([self.directions[:, None], self.principal], dim=1).double()
            shaped = bool(((rows @ rows.mT) - torch.eye(rows.shape[1])).abs().max() < 1e-4)
        if not shaped:
            raise EditError(
                "shapes of layers, directions, principal, shares and cosines do not agree, or "
                "directions are not orthonormal"
            )


def fit_axis(
    model: TransformerBridge,
    wanted: HeadsLike,
    prompts: Any = None,
    *,
    n_prompts: int = 8,
    max_tokens: int | None = None,
    seed: int = 0,
) -> Axis:
    """Fit the axis of the attention inputs of some heads' layers, for `DropDirection`.

    The direction of the mean input over the tokens of all prompts, and beside it the strongest
    other directions, which are its controls. The model is run as it is, active patches included.
    Fit it on other prompts than those that you measure on.

    Args:
        model: A TransformerBridge in evaluation mode.
        wanted: Query heads; only their layers count.
        prompts: As for `scan`; None: natural text.
        n_prompts: Number of prompts.
        max_tokens: Length of each prompt, as for `scan`.
        seed: Random seed of the prompts.

    Raises:
        HeadError: Heads that the model does not have.
        PromptError: Prompts that are empty or longer than the context.
        EditError: Inputs of a layer whose mean is zero.
    """
    layers = sorted({head.layer for head in bridge.read(model).require(wanted)})
    fitted_on = prompt_set(model, prompts, n_prompts=n_prompts, max_tokens=max_tokens, seed=seed)
    details = {"prompts": [{"source": fitted_on.source, "digest": fitted_on.digest}], "seed": seed}
    return axis_of_tokens(model, layers, fitted_on.tokens, provenance(model, **details))


def axis_of_tokens(
    model: TransformerBridge,
    layers: Sequence[int],
    prompts: Sequence[Tensor],
    source: dict[str, Any],
) -> Axis:
    """Return the axis of some layers over prompts [pos]. Raises EditError for a mean of zero."""
    d_model = model.cfg.d_model
    info = bridge.read(model)
    grams = {la: torch.zeros(d_model, d_model, dtype=torch.float64) for la in layers}
    sums = {la: torch.zeros(2, d_model, dtype=torch.float64) for la in layers}
    n_tokens = 0

    def accumulate(x: Tensor, hook: Any) -> None:
        rows = x.detach().flatten(0, 1).cpu().double()
        grams[hook.layer()] += rows.T @ rows
        unit = rows / rows.norm(dim=-1, keepdim=True).clamp(min=1e-30)
        sums[hook.layer()] += torch.stack([rows.sum(0), unit.sum(0)])

    hooks = [(info.hook(layer, "input"), accumulate) for layer in layers]
    with torch.no_grad():
        for tokens in prompts:
            bridge.run_for_hooks(model, tokens[None].to(model.cfg.device), hooks)
            n_tokens += len(tokens)
    rows = []
    for layer in layers:
        mean, unit = sums[layer] / n_tokens
        if not float(mean.norm()) > 0:
            raise EditError(f"the attention inputs of layer {layer} have mean zero, so no axis")
        directions, shares = axis_and_principal(grams[layer] / n_tokens, mean, N_PRINCIPAL)
        rows.append((directions[0], directions[1:], shares, unit @ directions[0]))
    columns = [torch.stack(column) for column in zip(*rows, strict=True)]
    return Axis(tuple(layers), *columns, provenance=source)
