"""The origin of rank one: how much of a head's queries and keys the axis of its inputs makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from .. import bridge
from ..bridge.projections import Projection
from ..data.heads import Head
from ..data.prompts import prompt_set
from ..edits import Axis, DropDirection, Edit
from ..edits.axis import axis_of_tokens
from ..errors import EditError, ModelError
from ..maths.cone import parts_along
from ..scanning.moments import Moments
from .parts import FromAxis, Origin
from .vectors import leading_direction

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

#: How many draws of each control of `DropDirection` are tried (*ours*).
DRAWS = {"same_size": 5, "random": 2, "principal": 3}


def axis_elsewhere(
    model: TransformerBridge,
    heads: Sequence[Head],
    n_prompts: int,
    n_tokens: int,
    seed: int,
    given: Axis | None = None,
) -> Axis | None:
    """Return the axis of the heads' layers: `given`, or on built-in text that another seed draws.

    None where the model's queries and keys cannot be computed from another input.
    """
    try:
        _ = bridge.read(model).projections
        if given is not None:
            return given
        texts = prompt_set(model, n_prompts=n_prompts, max_tokens=n_tokens, seed=seed + 1)
        layers = sorted({head.layer for head in heads})
        return axis_of_tokens(model, layers, texts.tokens, {})
    except (ModelError, EditError):
        return None


def axis_edits(heads: Sequence[Head], axis: Axis) -> dict[str, Edit]:
    """Return the edits that drop the axis and its controls from the heads' inputs, by label."""
    edits: dict[str, Edit] = {
        f"axis {of}": DropDirection(heads, of, axis) for of in ("q", "k", "qk")
    }
    n_principal = axis.principal.shape[1]
    for control, draws in DRAWS.items():
        for draw in range(min(draws, n_principal) if control == "principal" else draws):
            label = f"{control} {draw}"
            edits[label] = DropDirection(heads, "qk", axis, control, draw)
    return edits


def origin_of(
    model: TransformerBridge,
    head: Head,
    axis: Axis,
    moments: Moments,
    share: float,
    scores: dict[str, float],
) -> Origin:
    """Return how much of a head's queries and keys comes from the axis.

    `moments` are of the prompts of the explanation, and so is `share`, that of the inputs' second
    moment along the axis. `scores` are the slash scores under `axis_edits`.
    """
    layer = head.layer
    u = axis.of(layer)
    q, k = (_from_axis(model, head, part, u, moments) for part in ("q", "k"))
    controls: dict[str, list[float]] = {}
    for label, score in scores.items():
        name, _, draw = label.partition(" ")
        if name in DRAWS and draw.isdigit():
            controls.setdefault(name, []).append(score)
    return Origin(
        cosine=float(moments.unit_x[layer] @ u / moments.n_tokens),
        share=share,
        q=q,
        k=k,
        dropped={of: scores[f"axis {of}"] for of in ("q", "k", "qk")},
        controls=controls,
    )


def _from_axis(
    model: TransformerBridge,
    head: Head,
    part: str,
    u: Float[Tensor, "d_model"],
    moments: Moments,
) -> FromAxis:
    info = bridge.read(model)
    project: Projection = getattr(info.projections[head.layer], part)
    column = head.head if part == "q" else head.head * info.n_kv_heads // info.n_heads
    rows = slice(column * info.d_head, (column + 1) * info.d_head)
    weight, bias = (one[rows] for one in project.weight())
    mean_x = moments.sum_x[head.layer] / moments.n_tokens
    on_axis = (u @ mean_x) * u
    shares = parts_along(torch.stack([weight @ on_axis, bias, weight @ (mean_x - on_axis)]))
    device = torch.device(model.cfg.device)
    dtype = next(model.original_model.parameters()).dtype
    with torch.no_grad():
        made = project(on_axis[None, None].to(device, dtype), torch.zeros(1, 1, dtype=torch.long))
    alone = made[0, 0, column].double().cpu()
    mean = dict(zip(("q", "k"), moments.mean(head), strict=True))[part]
    leading = leading_direction(moments, head, part)
    cosines = [
        float(torch.nn.functional.cosine_similarity(alone, other, dim=0))
        for other in (mean, leading)
    ]
    axis, bias_share, rest = shares.tolist()
    return FromAxis(axis, bias_share, rest, cosines[0], abs(cosines[1]))
