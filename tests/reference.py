"""What every edit means, on one layer's whole attention matrix, in plain torch.

Nothing is imported from the package. Edits are read by their type's name and their fields.

One prompt at a time, from position 0, without padding and without a KV cache: those are ways to
run a model and must not change what an edit means, so a padded or cached run is compared with each
of its prompts alone. A query head at a time as well, with its own copy of its KV group's keys, so
that an edit of one head cannot touch another.

Order: edits of the input that queries and keys are computed from, of queries, of keys, of scores,
of the pattern, of z; within one stage as given.

Pair l of a head is the complex number x_l. RoPE at position p makes it gain · x_l · e^{iθ_l p}.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformer_lens.utilities.statistics import derive_generator


@dataclass
class Layer:
    """One layer's attention, but for its queries, keys and values.

    Attributes:
        index: Its number, from 0.
        scale: Of the dot product.
        theta: Radians per token of each pair in this pass; of no pair in a layer without RoPE.
        band_theta: Those of a short prompt, by which bands are read (θ of some models follows the
            length of the prompt).
        pairing: "half": dimension l turns with l + n; "adjacent": 2l with 2l + 1. Dimensions
            after the pairs do not turn.
        gain: What RoPE multiplies each pair by.
        window: A token reads itself and the window − 1 tokens before it; None: all before it.
        softcap: Logits become softcap · tanh(logit / softcap); None: they stay.
        sinks: One more logit of each head's softmax, whose share is written nowhere; or None.
        weights: What a norm after RoPE multiplies queries and keys by, each [d_head]; or None.
    """

    index: int
    scale: float
    theta: Tensor
    band_theta: Tensor
    pairing: str = "half"
    gain: float = 1.0
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    weights: tuple[Tensor, Tensor] | None = None


def attention(
    layer: Layer,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    edits: list[Any],
    thetas: dict[int, Tensor],
    replacements: dict[int, Tensor],
    x: Tensor,
    project: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> Tensor:
    """z [pos, head, d_head] of one layer under edits.

    Args:
        layer: How the layer attends.
        q: Before RoPE and after any norm, [pos, head, d_head].
        k: The same of keys, [pos, kv_head, d_head].
        v: Values, [pos, kv_head, d_head].
        edits: In the order in which they were attached; those of other layers do nothing.
        thetas: θ of every layer with RoPE, for edits that take those of another.
        replacements: By the index of an AblateHeads in `edits` with mode mean or resample, what z
            becomes in this layer, [pos, head, d_head].
        x: The attention's input, [pos, d_model].
        project: From another input to the q and k that the layer computes from it.
    """
    n_heads, group = q.shape[1], q.shape[1] // k.shape[1]
    z = torch.empty(*q.shape[:2], v.shape[-1], dtype=v.dtype)
    for head in range(n_heads):
        own = [
            (number, edit)
            for number, edit in enumerate(edits)
            if (layer.index, head) in [(one.layer, one.head) for one in edit.heads]
        ]
        own_q, own_k = q[:, head], k[:, head // group]
        drops = [edit for _, edit in own if type(edit).__name__ == "DropDirection"]
        if any("q" in edit.of for edit in drops):
            own_q = project(without_directions(layer, "q", x, drops))[0][:, head]
        if any("k" in edit.of for edit in drops):
            own_k = project(without_directions(layer, "k", x, drops))[1][:, head // group]
        queries = edited_vectors(layer, head, "q", own_q, [e for _, e in own], thetas)
        keys = edited_vectors(layer, head, "k", own_k, [e for _, e in own], thetas)
        scores = masked_scores(layer, queries, keys)
        pattern = edited_pattern(layer, head, scores, [e for _, e in own])
        z[:, head] = pattern @ v[:, head // group]
        for number, edit in own:
            if type(edit).__name__ == "AblateHeads":
                if edit.mode == "zero":
                    z[:, head] = 0
                elif edit.mode == "optimal":
                    fitted = [(one.layer, one.head) for one in edit.constants.heads]
                    z[:, head] = edit.constants.z[fitted.index((layer.index, head))].to(z)
                else:
                    z[:, head] = replacements[number][:, head].to(z)
    return z


def edited_vectors(
    layer: Layer, head: int, part: str, x: Tensor, edits: list[Any], thetas: dict[int, Tensor]
) -> Tensor:
    """Queries (part "q") or keys ("k") of one head, [pos, d_head], edited but not yet rotated.

    An edit of frequencies turns the vector at position p by p·(θ' − θ), so that RoPE, which goes on
    to turn it by p·θ, makes it p·θ' in all. `theta` says where the head has got to.
    """
    theta = layer.theta
    positions = torch.arange(len(x)).double()[:, None]
    for edit in edits:
        kind = type(edit).__name__
        if kind == "ShiftSlash" and part == "q":
            x = turned(layer, x, -edit.by * theta)
        elif kind in ("DropBand", "ScaleBand") and part == "q":
            pairs, rest = split(layer, x)
            pairs = pairs.clone()
            factor = 0.0 if kind == "DropBand" else edit.factor
            pairs[:, band(edit.band, layer.band_theta)] *= factor
            x = join(layer, pairs, rest)
        elif kind in ("FreezeBand", "SwapBands", "SetFrequencies"):
            new = new_frequencies(edit, theta, layer, thetas)
            x = turned(layer, x, positions * (new - theta))
            theta = new
        elif kind == "RankOne" and part in edit.of:
            own = leading_directions(edit, layer.index, head, part, x)
            along = own if edit.along is None else columns(edit, "along", layer.index, head, part)
            x = x @ own @ along.to(x).T
        elif kind == "PlantSlash":
            theta = layer.theta
            pairs, rest = split(layer, torch.zeros_like(x))
            n = len(theta)
            amplitude = edit.strength / (abs(layer.scale) * n * layer.gain**2)
            x = join(layer, pairs + (amplitude if part == "q" else 1.0), rest)
            if part == "q":
                x = turned(layer, x, -edit.offset * theta)
    return x


def without_directions(layer: Layer, part: str, x: Tensor, edits: list[Any]) -> Tensor:
    """The input [pos, d_model] of a head's queries or keys after each DropDirection in turn."""
    for edit in edits:
        if part not in edit.of:
            continue
        row = edit.direction.layers.index(layer.index)
        u = edit.direction.directions[row]
        read = write = u
        if edit.control == "principal":
            read = write = edit.direction.principal[row, edit.draw]
        elif edit.control:
            generator = derive_generator(edit.draw, f"direction of layer {layer.index}")
            w = torch.randn(len(u), generator=generator, dtype=torch.float64)
            write = w - (w @ u) * u
            write = write / write.norm()
            read = u if edit.control == "same_size" else write
        x = x - torch.outer(x @ read.to(x), write.to(x))
    return x


def new_frequencies(edit: Any, theta: Tensor, layer: Layer, thetas: dict[int, Tensor]) -> Tensor:
    """θ' [pair] that an edit of frequencies makes of θ."""
    kind, new = type(edit).__name__, theta.clone()
    if kind == "FreezeBand":
        new[band(edit.band, layer.band_theta)] = 0.0
    elif kind == "SwapBands":
        a, b = band(edit.a, layer.band_theta), band(edit.b, layer.band_theta)
        for own, other in ((a, b), (b, a)):
            for rank, pair in enumerate(own):
                # The first takes the first, the last the last, those between the nearest.
                place = rank * (len(other) - 1) / (len(own) - 1) if len(own) > 1 else 0
                new[pair] = theta[other[round(place)]]
    elif callable(edit.frequencies):
        new = torch.as_tensor(edit.frequencies(layer.theta.clone())).double()
    elif hasattr(edit.frequencies, "layer"):
        new = thetas[edit.frequencies.layer]
    else:
        new = torch.tensor(edit.frequencies, dtype=torch.float64)
    return new


def leading_directions(edit: Any, layer: int, head: int, part: str, x: Tensor) -> Tensor:
    """Orthonormal columns [d_head, rank]: those of the edit's basis, or of this prompt's own x."""
    if edit.basis is None:
        return torch.linalg.svd(x, full_matrices=False).Vh[: edit.rank].T
    return columns(edit, "basis", layer, head, part).to(x)


def columns(edit: Any, name: str, layer: int, head: int, part: str) -> Tensor:
    """Orthonormal columns [d_head, rank] of an edit's basis, or of its `along`."""
    basis = getattr(edit, name)
    found = [(one.layer, one.head) for one in basis.heads].index((layer, head))
    return (basis.q if part == "q" else basis.k)[found][:, : edit.rank]


def masked_scores(layer: Layer, q: Tensor, k: Tensor) -> Tensor:
    """Logits [query, key] of one head from vectors before RoPE; −inf where a key is not seen."""
    q, k = rotated(layer, q), rotated(layer, k)
    if layer.weights is not None:
        q, k = q * layer.weights[0].to(q), k * layer.weights[1].to(k)
    scores = layer.scale * (q @ k.T)
    if layer.softcap is not None:
        scores = layer.softcap * torch.tanh(scores / layer.softcap)
    for i in range(len(q)):
        for j in range(len(q)):
            if j > i or (layer.window is not None and j <= i - layer.window):
                scores[i, j] = -math.inf
    return scores


def edited_pattern(layer: Layer, head: int, scores: Tensor, edits: list[Any]) -> Tensor:
    """Attention [query, key] of one head after edits of single diagonals and the softmax.

    Where a row is renormalised, log(factor) is added to the logits, so that the softmax does it;
    elsewhere the factor multiplies the pattern. A row that loses all its keys attends to nothing.
    """
    factors = [(edit, factor_by_offset(edit, len(scores))) for edit in edits if is_diagonal(edit)]
    for edit, factor in factors:
        if edit.renormalize:
            scores = scores + factor.log().to(scores)
    columns = [scores]
    if layer.sinks is not None:
        columns.append(layer.sinks[head].to(scores).expand(len(scores), 1))
    pattern = torch.cat(columns, dim=1).softmax(dim=1)[:, : len(scores)]
    pattern = pattern.masked_fill((scores == -math.inf).all(dim=1)[:, None], 0.0)
    for edit, factor in factors:
        if not edit.renormalize:
            pattern = pattern * factor.to(pattern)
    return pattern


def is_diagonal(edit: Any) -> bool:
    """Whether an edit scales, removes or keeps single diagonals of the pattern."""
    return type(edit).__name__ in ("ScaleOffsets", "KnockOut", "KeepOnly")


def factor_by_offset(edit: Any, n: int) -> Tensor:
    """What such an edit multiplies the attention i → j by, [query, key], float64."""
    kind = type(edit).__name__
    factor = torch.ones(n, n, dtype=torch.float64)
    for i in range(n):
        for j in range(n):
            listed = i - j in edit.offsets
            if kind == "KeepOnly":
                factor[i, j] = 1.0 if listed else 0.0
            elif listed:
                factor[i, j] = 0.0 if kind == "KnockOut" else edit.factor
    return factor


def split(layer: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
    """The complex pairs [pos, pair] of vectors [pos, d_head], and the dimensions left over."""
    n = len(layer.theta)
    if layer.pairing == "half":
        pairs = torch.complex(x[:, :n], x[:, n : 2 * n])
    else:
        pairs = torch.complex(x[:, 0 : 2 * n : 2], x[:, 1 : 2 * n : 2])
    return pairs, x[:, 2 * n :]


def join(layer: Layer, pairs: Tensor, rest: Tensor) -> Tensor:
    """Vectors [pos, d_head] of which `split` makes these pairs and this rest."""
    n = len(layer.theta)
    x = torch.empty(len(rest), 2 * n + rest.shape[1], dtype=rest.dtype)
    if layer.pairing == "half":
        x[:, :n], x[:, n : 2 * n] = pairs.real, pairs.imag
    else:
        x[:, 0 : 2 * n : 2], x[:, 1 : 2 * n : 2] = pairs.real, pairs.imag
    x[:, 2 * n :] = rest
    return x


def turned(layer: Layer, x: Tensor, angle: Tensor) -> Tensor:
    """x [pos, d_head] with pair l times e^{i angle_l}; angles are [pair] or [pos, pair]."""
    pairs, rest = split(layer, x)
    turn = torch.polar(torch.ones_like(angle), angle)
    return join(layer, pairs * turn.to(pairs.dtype), rest)


def rotated(layer: Layer, x: Tensor) -> Tensor:
    """RoPE of x [pos, d_head] at positions 0, 1, 2, ..."""
    pairs, rest = split(layer, x)
    angle = torch.arange(len(x)).double()[:, None] * layer.theta
    turn = torch.polar(torch.full_like(angle, layer.gain), angle)
    return join(layer, pairs * turn.to(pairs.dtype), rest)


def unrotated(layer: Layer, x: Tensor) -> Tensor:
    """Inverse of `rotated`."""
    pairs, rest = split(layer, x)
    angle = torch.arange(len(x)).double()[:, None] * layer.theta
    turn = torch.polar(torch.full_like(angle, 1 / layer.gain), -angle)
    return join(layer, pairs * turn.to(pairs.dtype), rest)


def band(text: str, theta: Tensor) -> list[int]:
    """The pairs of a band, those with the highest θ first.

    high, medium and low are thirds of the pairs by θ; `pairs 2-4` counts them in the model's order,
    both ends included; `share 0-0.25` is the first quarter by θ, to the nearest whole pair;
    `wavelength 8-64` has 8 ≤ 2π/θ < 64; several are joined by +.
    """
    order = sorted(range(len(theta)), key=lambda pair: -float(theta[pair]))
    thirds = [third.tolist() for third in torch.tensor_split(torch.tensor(order), 3)]
    chosen = set()
    for part in text.split("+"):
        name, _, ends = part.partition(" ")
        if name in ("high", "medium", "low"):
            chosen |= set(thirds[("high", "medium", "low").index(name)])
        elif name == "pairs":
            first, last = (int(end) for end in ends.split("-"))
            chosen |= set(range(first, last + 1))
        elif name == "share":
            first, last = (float(end) * len(order) for end in ends.split("-"))
            chosen |= set(order[math.ceil(first - 0.5) : math.ceil(last - 0.5)])
        elif name == "wavelength":
            first, last = (float(end) for end in ends.split("-"))
            chosen |= {p for p in order if first <= 2 * math.pi / float(theta[p]) < last}
        else:
            raise ValueError(f"no band: {part}")
    return [pair for pair in order if pair in chosen]
