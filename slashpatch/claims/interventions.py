"""Claims 3, 4, 6 and the first part of 8: slash scores of heads whose own inputs are edited."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..data.heads import Head
from ..edits import Basis, DropBand, Edit, RankOne, ShiftSlash, fit_rank_one
from ..maths.bands import band_pairs
from .cone import Cone
from .edited_scores import Plan, Scores, by_layer
from .measured import Measured, attempted, refused
from .rules import rules_of
from .subjects import Slash, Subjects

NO_SLASH = "no head with Δ ≥ 1 reaches κ on the picking prompts"


def plan_rank_one(on: Subjects, plan: Plan) -> None:
    """Add rank one, the leading direction removed, and rank one along other directions.

    Directions are fitted on the picking prompts. The controls write the same components along
    random directions, or along those of other heads, so that sizes and signs stay.
    """
    wanted = sorted({other for head in on.heads for other in (head, *_directions(on, head))})
    fitted = fit_rank_one(on.model, wanted, [*on.picking.tokens], seed=on.seed)
    fitted = _oriented(on, fitted)
    own = _basis(on, {head: (_of(fitted, head, "q"), _of(fitted, head, "k")) for head in on.heads})
    plan.add("rank one", _rank_one(on, own), on.slashes)
    rest = {head: tuple(_complement(_of(fitted, head, part)) for part in "qk") for head in on.heads}
    plan.add("leading direction removed", _rank_one(on, _basis(on, rest)), on.slashes)
    generator = on.generator("directions")
    for index in range(on.settings.n_draws):
        drawn = {head: tuple(_random(on.info.d_head, generator) for _ in "qk") for head in on.heads}
        edits = _rank_one(on, own, _basis(on, drawn))
        plan.add(f"random directions #{index}", edits, on.slashes)
    able = [slash for slash in on.slashes if _directions(on, slash.head)]
    if not able:
        return
    seen: set[object] = set()
    for _ in range(20 * on.settings.n_draws):
        if len(seen) == on.settings.n_draws:
            break
        picked = tuple(_pick(_directions(on, slash.head), generator) for slash in able)
        if picked in seen:
            continue
        directions = {
            slash.head: (_of(fitted, other, "q"), _of(fitted, other, "k"))
            for slash, other in zip(able, picked, strict=True)
        }
        edits = _rank_one(on, own, _basis(on, directions))
        plan.add(f"directions of other heads #{len(seen)}", edits, able)
        seen.add(picked)


def _directions(on: Subjects, head: Head) -> list[Head]:
    """Return heads of the same layer whose directions to try: of other KV groups if possible."""
    group = on.info.n_heads // on.info.n_kv_heads
    others = on.others(head)
    apart = [other for other in others if other.head // group != head.head // group]
    return apart or (others if on.info.n_kv_heads == 1 else [])


def _pick(pool: list[Head], generator: torch.Generator) -> Head:
    return pool[int(torch.randint(len(pool), (), generator=generator))]


def _oriented(on: Subjects, basis: Basis) -> Basis:
    """Return the directions with the signs of their heads' mean queries and keys.

    Singular vectors have arbitrary signs. Written along a direction of another head, one wrong sign
    would turn a peak of the logits into a dip.
    """
    moments = on.picked.require_moments()
    signs = torch.stack([torch.stack(moments.mean(head)) for head in basis.heads]).double()
    q, k = (
        torch.where((signs[:, part, None] @ directions) < 0, -directions, directions)
        for part, directions in enumerate((basis.q.double(), basis.k.double()))
    )
    return replace(basis, q=q, k=k)


def _of(basis: Basis, head: Head, part: str) -> Float[Tensor, "d_head rank"]:
    return basis.of(head.layer, [head.head], part)[0]


def _random(d_head: int, generator: torch.Generator) -> Float[Tensor, "d_head rank"]:
    drawn = torch.randn(d_head, 1, generator=generator, dtype=torch.float64)
    return drawn / drawn.norm()


def _complement(direction: Float[Tensor, "d_head 1"]) -> Float[Tensor, "d_head rank"]:
    """Return an orthonormal basis of what is orthogonal to a direction."""
    full = torch.linalg.qr(direction.double(), mode="complete")[0]
    return full[:, 1:]


def _basis(on: Subjects, directions: Mapping[Head, tuple[Tensor, ...]]) -> Basis:
    heads = tuple(sorted(directions))
    q, k = (torch.stack([directions[head][part].double() for head in heads]) for part in (0, 1))
    return Basis(heads=heads, q=q, k=k, provenance={})


def _rank_one(on: Subjects, basis: Basis, along: Basis | None = None) -> list[Edit]:
    """Return the projection of the heads of `along`, or else of the basis, onto all directions."""
    return [RankOne((along or basis).heads, "qk", basis, basis.q.shape[2], along)]


def rank_one(scores: Scores) -> list[Measured]:
    """Return the tests of claim 3."""
    return [
        scores.kept("rank one", "rank one"),
        scores.against("rank one beyond random directions", "rank one", "random directions"),
        _other_heads(scores),
        scores.kept("leading direction removed", "leading direction removed"),
    ]


def _other_heads(scores: Scores) -> Measured:
    test, control = "rank one beyond other heads", "directions of other heads"
    if f"{control} #0" not in scores.plan.edits:
        return Measured(test, why_not="their layers have no other key heads to take directions of")
    return scores.against(test, "rank one", control)


def plan_bands(on: Subjects, plan: Plan) -> None:
    """Add the bands that are dropped, and as many random pairs as the low band has."""
    rotating = _rotating(on)
    if not rotating:
        return
    groups = by_layer(rotating)
    heads = tuple(slash.head for slash in rotating)
    plan.add("low dropped", [DropBand(heads, "low")], rotating)
    plan.add("high and medium dropped", [DropBand(heads, "high+medium")], rotating)
    generator = on.generator("pairs")
    seen: set[object] = set()
    for _ in range(20 * on.settings.n_draws):
        if len(seen) == on.settings.n_draws:
            break
        bands = {layer: _random_pairs(on, layer, generator) for layer in groups}
        if str(bands) in seen:
            continue
        edits = [DropBand(tuple(of), bands[layer]) for layer, of in groups.items()]
        plan.add(f"random pairs #{len(seen)}", edits, rotating)
        seen.add(str(bands))


def _random_pairs(on: Subjects, layer: int, generator: torch.Generator) -> str:
    """Return a band of random pairs, as many as the layer's low band has, but not that band."""
    inv_freq = on.info.qk[layer].require_rotary().inv_freq
    low = sorted(band_pairs("low", inv_freq))
    drawn = low
    while drawn == low and len(inv_freq) > 1:
        order = torch.randperm(len(inv_freq), generator=generator)
        drawn = sorted(order[: len(low)].tolist())
    return "+".join(f"pairs {pair}" for pair in drawn)


def _rotating(on: Subjects) -> list[Slash]:
    """Return the slashes of layers with RoPE."""
    return [slash for slash in on.slashes if on.info.qk[slash.head.layer].rotary is not None]


def bands(scores: Scores) -> list[Measured]:
    """Return the tests of claim 4."""
    names = ("low dropped", "high and medium dropped", "low beyond random pairs")
    if "low dropped" not in scores.plan.edits:
        why = "the layers of the slash heads have no RoPE"
        return [Measured(name, why_not=why) for name in names]
    return [
        scores.kept("low dropped", "low dropped"),
        scores.kept("high and medium dropped", "high and medium dropped"),
        scores.against("low beyond random pairs", "low dropped", "random pairs"),
    ]


def plan_shift(on: Subjects, plan: Plan) -> None:
    """Add the shift of all slashes by one token."""
    rotating = [slash for slash in _rotating(on) if on.info.qk[slash.head.layer].relative]
    if rotating:
        plan.add("shifted", [ShiftSlash(tuple(slash.head for slash in rotating), 1)], rotating)


def moved(scores: Scores) -> list[Measured]:
    """Return the first test of claim 8."""
    if "shifted" not in scores.plan.edits:
        return [Measured("moved", why_not="the layers of the slash heads have no RoPE to shift by")]
    return [scores.kept("moved", "shifted", later=1)]


def run_interventions(on: Subjects) -> list[Measured]:
    """Run the edits of claims 3, 4, 6 and 8 on heads in clean runs, and return their tests."""
    cone = Cone()
    # What adds edits to the plan, what reads their scores, and the tests that come of it.
    parts: tuple[tuple[Any, Any, tuple[str, ...]], ...] = (
        (plan_rank_one, rank_one, rules_of(3)),
        (plan_bands, bands, rules_of(4)),
        (cone.add, cone.read, rules_of(6)),
        (plan_shift, moved, ("moved",)),
    )
    if not on.slashes:
        return [test for *_, names in parts for test in refused(names, NO_SLASH)]
    plan = Plan()
    found: list[Measured] = []
    able = []
    for add, read, names in parts:
        part = Plan()
        why = attempted(names, lambda add=add, part=part: add(on, part) or [])  # type: ignore[misc]
        if why:
            found += why
        else:
            plan.edits |= part.edits
            plan.slashes |= part.slashes
            able.append((read, names))
    scores = Scores(on, plan)
    for read, names in able:
        found += attempted(names, lambda read=read: read(scores))  # type: ignore[misc]
    return found
