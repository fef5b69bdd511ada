"""Cases drawn at random: a family, edits, prompts, and a way to run them, against the reference.

`python -m tests.drawn_cases --cases 10000 --seed 0` runs many; `--only 4711` runs that one of them
again. test_drawn_cases.py draws the same cases by Hypothesis.
"""

import argparse
import contextlib
import dataclasses
import functools
import math
import os
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor
from transformer_lens.utilities.statistics import derive_generator

import slashpatch as sp
from slashpatch.bridge import read

from .reference_model import ReferenceModel
from .tiny import bridge, padded, random_tokens
from .zoo import FAMILIES, Family, build

#: Those that slashpatch takes and whose attention Transformers lets another function do.
NAMES = [name for name, one in FAMILIES.items() if not one.refused and name != "Falcon"]
#: θ follows the length of the longest prompt of a batch.
LIVE = ("Llama, dynamic", "Llama, LongRoPE", "Phi-3, LongRoPE")
N_HEADS, N_LAYERS, LONGEST, BASIS_RANK = 4, 2, 22, 4
ANY_LAYER = ("AblateHeads", "ScaleOffsets", "KnockOut", "KeepOnly", "RankOne", "DropDirection")
ROTATED = ("ShiftSlash", "DropBand", "FreezeBand", "SwapBands", "ScaleBand", "SetFrequencies",
           "PlantSlash")  # fmt: skip
TEXTS = ("w1 w2 w3 w4 w5", "w9 the w8", "w7 w7 w20 of w3 w11 w2")


@dataclass(frozen=True)
class Case:
    """One drawn case.

    Attributes:
        family: A name in tests/zoo.py.
        edits: In the order in which they are attached.
        lengths: Tokens of each prompt.
        side: Where shorter prompts are padded.
        cuts: Columns at which a pass ends and the next goes on from its KV cache; () for one pass.
        engine: "bridge" or "fused".
        attach: "patch": all edits at once; "nested": a patch for each; "hooks": `sp.hooks` through
            `run_with_hooks`.
        fused_first: Whether the fused engine is entered before the edits are attached.
        typed: Whether edits are given as the texts that they print, where those say it all.
        tokens: Seed of the token ids.
    """

    family: str
    edits: tuple[Any, ...]
    lengths: tuple[int, ...]
    side: str
    cuts: tuple[int, ...]
    engine: str
    attach: str
    fused_first: bool
    typed: bool
    tokens: int


@dataclass(frozen=True)
class Outcome:
    """What came of a case: the refusal that a documented rule asks for, or how far logits are off.

    Attributes:
        refused: Name of the rule; "" for a case that runs.
        error: Largest difference of a logit at a real token.
        allowed: The most that rounding explains.
        scale: Largest logit.
    """

    refused: str = ""
    error: float = 0.0
    allowed: float = 0.0
    scale: float = 1.0

    @property
    def right(self) -> bool:
        """Whether the package did what the reference says, or refused what it should refuse."""
        return bool(self.refused) or self.error <= self.allowed


def halved(theta: Tensor) -> Tensor:
    """Frequencies half as high."""
    return 0.5 * theta


def half_and_order_reversed(theta: Tensor) -> Tensor:
    """Frequencies in the opposite order, half of them as they are and half doubled."""
    new = theta.flip(0).clone()
    new[: len(new) // 2] *= 2
    return new


# Models ------------------------------------------------------------------------------------------


def family_of(name: str) -> Family:
    """A family of the zoo; each token goes to all experts, so that no rounding can swap them."""
    found = FAMILIES[name]
    config = dict(found.config)
    for experts in ("num_local_experts", "num_experts"):
        if experts in config:
            config["num_experts_per_tok"] = config[experts]
    return dataclasses.replace(found, config=config)


@functools.cache
def package_model(name: str) -> Any:
    """The family's model as a bridge, float32."""
    return bridge(build(family_of(name)), name.split()[0].rstrip(","))


@functools.cache
def reference_model(name: str, dtype: torch.dtype = torch.float64) -> ReferenceModel:
    """The same model with the reference's attention."""
    adjacent = "interleaved" in FAMILIES[name].about
    return ReferenceModel(build(family_of(name), dtype), "adjacent" if adjacent else "half")


@functools.cache
def basis_of(name: str) -> Any:
    """A basis of the package's for all heads of a family."""
    every = [(layer, head) for layer in range(N_LAYERS) for head in range(N_HEADS)]
    return sp.fit_rank_one(package_model(name), every, random_tokens(2, 12), rank=BASIS_RANK)


@functools.cache
def exchanged_basis_of(name: str) -> Any:
    """The same with the directions of queries and keys exchanged, and the first of them last."""
    found = basis_of(name)
    return sp.Basis(found.heads, found.k.flip(-1), found.q.flip(-1), provenance={})


@functools.cache
def axis_of(name: str) -> Any:
    """An axis of the package's for both layers of a family."""
    return sp.fit_axis(package_model(name), [(0, 0), (1, 0)], random_tokens(2, 12))


@functools.cache
def constants_of(name: str) -> Any:
    """Constants for all heads of a family, which no one fitted."""
    every = [sp.Head(layer, head) for layer in range(N_LAYERS) for head in range(N_HEADS)]
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(len(every), read(package_model(name)).d_head, generator=generator)
    return sp.Constants(tuple(every), z, ())


# Drawing -----------------------------------------------------------------------------------------


def draw_case(rng: random.Random) -> Case:
    """A case whose every choice comes from `rng`."""
    family = rng.choice(NAMES)
    live = family in LIVE
    attach = rng.choice(("patch", "nested", "hooks"))
    n_prompts = rng.randint(1, 3)
    lengths = tuple(rng.randint(1, LONGEST) for _ in range(n_prompts))
    if live:  # batched with a longer prompt, or continued, a prompt is rotated otherwise than alone
        lengths = lengths[:1] * n_prompts
    cuts: tuple[int, ...] = ()
    if not live and rng.random() < 0.5:
        most = max(lengths)
        cuts = tuple(sorted({rng.randint(1, most) for _ in range(rng.randint(1, 4))} - {most}))
    # A few cases are drawn without regard to what is refused, to see that it is.
    careless = rng.random() < 0.1
    every = [(layer, head) for layer in range(N_LAYERS) for head in range(N_HEADS)]
    if rng.random() < 0.6:  # few heads, so that edits meet on one
        every = rng.sample(every, 3)
    edits = tuple(
        draw_edit(rng, family, every, bool(cuts), careless)
        for _ in range(rng.choice((1, 2, 2, 3, 3)))
    )
    return Case(
        family,
        edits,
        lengths,
        rng.choice(("left", "right")),
        cuts,
        rng.choice(("bridge", "fused")),
        attach,
        rng.random() < 0.5,
        rng.random() < 0.3,
        rng.randint(0, 999),
    )


def draw_edit(
    rng: random.Random, family: str, heads: list[tuple[int, int]], cached: bool, careless: bool
) -> Any:
    """An edit of one to three of some heads; `careless` also draws what is refused."""
    reference = reference_model(family)
    kind = rng.choice(ANY_LAYER + ROTATED)
    pool = heads
    if kind in ROTATED and not careless:
        pool = [head for head in heads if reference.rotates(head[0])]
    if kind == "PlantSlash" and reference.normed_late and not careless:
        pool = []
    if not pool:
        return draw_edit(rng, family, heads, cached, careless)
    wanted = rng.sample(pool, rng.randint(1, min(3, len(pool))))
    theta = next((t for t in reference.short.values() if len(t)), torch.ones(4))
    if kind == "AblateHeads":
        mode = rng.choice(("zero", "optimal", "mean", "resample"))
        if mode == "zero":
            return sp.AblateHeads(wanted)
        if mode == "optimal":
            return sp.AblateHeads(wanted, mode, constants=constants_of(family))
        texts = rng.sample(TEXTS, rng.randint(1, 2))
        return sp.AblateHeads(wanted, mode, texts, seed=rng.randint(0, 3))
    if kind in ("ScaleOffsets", "KnockOut", "KeepOnly"):
        offsets: Any = rng.sample(range(LONGEST), rng.randint(1, 3))
        if rng.random() < 0.5:
            first = rng.randint(0, 2)
            offsets = range(first, first + rng.randint(1, 9))
        renormalize = rng.random() < 0.6
        if kind == "ScaleOffsets":
            factor = rng.choice((0, 0.25, 0.5, 1, 2.0, 5.0, 30.0))
            return sp.ScaleOffsets(wanted, offsets, factor, renormalize)
        return getattr(sp, kind)(wanted, offsets, renormalize)
    if kind == "RankOne":
        own = careless or not cached
        basis = None if own and rng.random() < 0.6 else basis_of(family)
        of, rank = rng.choice(("qk", "q", "k")), rng.randint(1, 3)
        along = None if basis is None or rng.random() < 0.6 else exchanged_basis_of(family)
        return sp.RankOne(wanted, of, basis, rank, along)
    if kind == "DropDirection":
        control = rng.choice(("", "", "same_size", "random", "principal"))
        of = rng.choice(("qk", "q", "k"))
        return sp.DropDirection(wanted, of, axis_of(family), control, rng.randint(0, 3))
    if kind == "ShiftSlash":
        return sp.ShiftSlash(wanted, rng.choice((rng.randint(-6, 9), rng.uniform(-4, 4))))
    if kind == "PlantSlash":
        return sp.PlantSlash(wanted, rng.randint(0, 8), rng.uniform(1, 15))
    if kind == "SetFrequencies":
        return sp.SetFrequencies(wanted, draw_frequencies(rng, reference, theta))
    if kind == "SwapBands":
        a, b = draw_two_bands(rng, len(theta))
        return sp.SwapBands(wanted, a, b)
    if kind == "ScaleBand":
        return sp.ScaleBand(wanted, draw_band(rng, theta), rng.choice((-1.5, 0, 0.3, 1, 1.7, 3)))
    return getattr(sp, kind)(wanted, draw_band(rng, theta))


def draw_frequencies(rng: random.Random, reference: ReferenceModel, theta: Tensor) -> Any:
    """θ' for an edit: numbers, a function, or a head of a layer that has RoPE."""
    donors = [index for index in range(N_LAYERS) if reference.rotates(index)] or [0]
    return rng.choice(
        (
            [round(rng.uniform(-0.2, 1.2), 3) for _ in theta],
            halved,
            half_and_order_reversed,
            sp.Head(rng.choice(donors), rng.randint(0, N_HEADS - 1)),
        )
    )


def draw_band(rng: random.Random, theta: Tensor) -> str:
    """A band that holds at least one pair in every layer with frequencies like `theta`."""
    parts = []
    for _ in range(rng.choice((1, 1, 2))):
        kind = rng.choice(("name", "pairs", "share", "wavelength"))
        first, last = sorted(rng.randint(0, len(theta) - 1) for _ in range(2))
        if kind == "name":
            parts.append(rng.choice(("high", "medium", "low")))
        elif kind == "pairs":
            parts.append(f"pairs {first}-{last}")
        elif kind == "share":
            parts.append(f"share 0-{rng.uniform(0.5, 1):.3f}")
        else:  # from the shortest wavelength, which the layers share
            shortest = 2 * math.pi / float(theta.max())
            parts.append(f"wavelength {0.9 * shortest:.3f}-{rng.uniform(2, 999) * shortest:.3f}")
    if len(theta) < 3:
        parts = [f"pairs {rng.randint(0, len(theta) - 1)}"]
    return "+".join(parts)


def draw_two_bands(rng: random.Random, n_pairs: int) -> tuple[str, str]:
    """Two bands that share no pair, or one band twice."""
    if rng.random() < 0.3 and n_pairs >= 3:
        a, b = rng.sample(("high", "medium", "low"), 2)
        return (a, a) if rng.random() < 0.2 else (a, b)
    order = rng.sample(range(n_pairs), n_pairs)
    first = rng.randint(1, max(1, n_pairs // 2))
    second = rng.randint(first + 1, n_pairs) if first < n_pairs else n_pairs
    a, b = order[:first], order[first:second]
    return tuple("+".join(f"pairs {pair}" for pair in part) for part in (a, b))


# What the documentation says is refused ----------------------------------------------------------


def rule(case: Case) -> tuple[str, str, str] | None:
    """The refusal that the documentation promises: its name, the error's, words of the message."""
    reference = reference_model(case.family)
    for edit in case.edits:
        if type(edit).__name__ in ROTATED and not all(map(reference.rotates, edit.layers)):
            return "no RoPE", "ModelError", "has no RoPE"
        if type(edit).__name__ == "PlantSlash" and reference.normed_late:
            return "norm after RoPE", "ModelError", "norms queries and keys after RoPE"
    if case.cuts and any(
        type(edit).__name__ == "RankOne" and edit.basis is None for edit in case.edits
    ):
        return "RankOne without a basis, cached", "PatchError", "has no basis"
    return None


# Running -----------------------------------------------------------------------------------------


def run_case(case: Case) -> Outcome:
    """Run a case both ways. Raises what the package raises, if no rule says that it should."""
    expected = rule(case)
    if expected is not None:
        name, error, words = expected
        try:
            by_package(case)
        except sp.SlashpatchError as raised:
            if type(raised).__name__ != error or words not in str(raised):
                raise
            return Outcome(refused=name)
        raise AssertionError(f"not refused, though the documentation says so: {name}")
    found = by_package(case)
    off = rounding = scale = 0.0
    for logits, tokens in zip(found, prompts(case), strict=True):
        exact = by_reference(case, tokens, torch.float64)
        single = by_reference(case, tokens, torch.float32)
        off = max(off, largest(logits.double() - exact))
        rounding = max(rounding, largest(single.double() - exact))
        scale = max(scale, largest(exact))
    return Outcome("", off, allowed(rounding, scale), scale)


def allowed(rounding: float, scale: float) -> float:
    """How far apart two ways to compute in float32 may be.

    `rounding` is what float32 costs the reference itself on this very case, by its largest error of
    a logit: it knows how sharp the softmax is that the edits leave, and how much of a row cancels.
    The same operations in another order draw their errors anew, from the same distribution: over
    80 logits or more its largest is about as large again, and 8 times is far out. Where the
    reference happens to round to nearly nothing, 8 units in the last place of the largest logit
    remain, about what two layers cost at the least.
    """
    return 8 * rounding + 8 * torch.finfo(torch.float32).eps * scale


def largest(x: Tensor) -> float:
    """The largest magnitude in x; infinite where x is not finite."""
    return float(x.abs().max()) if bool(x.isfinite().all()) else math.inf


def prompts(case: Case) -> list[Tensor]:
    """Token ids [pos] of each prompt."""
    return [
        random_tokens(1, length, case.tokens + number)[0]
        for number, length in enumerate(case.lengths)
    ]


def by_reference(case: Case, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits [pos, vocabulary] of one prompt under the case's edits."""
    model = reference_model(case.family, dtype)
    found: dict[int, Any] = {}
    for number, edit in enumerate(case.edits):
        if type(edit).__name__ == "AblateHeads" and edit.mode in ("mean", "resample"):
            # From the model as it is when the edit is attached: inside the patches before it.
            before = case.edits[:number] if case.attach == "nested" else ()
            rows = reference_rows(case, edit, before, found, dtype)
            found[number] = replacement(edit, rows, len(tokens))
    return model.run(tokens, case.edits, found)


def reference_rows(
    case: Case, edit: Any, before: Any, found: dict[int, Any], dtype: torch.dtype
) -> dict[int, Tensor]:
    """z [token, head, d_head] of each layer at every token of an ablation's texts."""
    model, rows = reference_model(case.family, dtype), []
    texts = (edit.reference,) if isinstance(edit.reference, str) else edit.reference
    for text in texts:
        tokens = package_model(case.family).to_tokens(text)[0]
        # Ablations before this one have their own z at the positions of this text.
        own = {
            number: replacement(
                case.edits[number], reference_rows(case, case.edits[number],
                                                   case.edits[:number], found, dtype), len(tokens)
            )
            for number in found
            if number < len(before)
        }  # fmt: skip
        rows.append(model.outputs(tokens, before, own))
    return {layer: torch.cat([one[layer] for one in rows]) for layer in range(N_LAYERS)}


def replacement(edit: Any, rows: dict[int, Tensor], n: int) -> dict[int, Tensor]:
    """z of each layer [pos, head, d_head] that an ablation puts in place of n tokens' own."""
    if edit.mode == "mean":
        return {layer: z.mean(0).expand(n, -1, -1) for layer, z in rows.items()}
    n_rows = len(rows[0])
    order = torch.randperm(n_rows, generator=derive_generator(edit.seed, "resample"))
    return {layer: z[order][torch.arange(n) % n_rows] for layer, z in rows.items()}


def by_package(case: Case) -> list[Tensor]:
    """Logits [pos, vocabulary] of each prompt's real tokens, by the package."""
    model = package_model(case.family)
    tokens, mask = padded(prompts(case), case.side)
    edits = [as_given(edit, case.typed) for edit in case.edits]
    fused = sp.fused(model) if case.engine == "fused" else contextlib.nullcontext()
    parts, cache, start = [], None, 0
    with contextlib.ExitStack() as stack, torch.no_grad():
        if case.fused_first:
            stack.enter_context(fused)
        hooks = []
        if case.attach == "patch":
            stack.enter_context(sp.patch(model, *edits))
        elif case.attach == "nested":
            for edit in edits:
                stack.enter_context(sp.patch(model, edit))
        else:
            hooks = sp.hooks(model, *edits)
        if not case.fused_first:
            stack.enter_context(fused)
        for stop in (*case.cuts, tokens.shape[1]):
            given: dict[str, Any] = {}
            if not bool(mask.all()):
                given["attention_mask"] = mask[:, :stop]
                if case.side == "left":
                    positions = (mask.cumsum(1) - 1).clamp(min=0)
                    given["position_ids"] = positions[:, start:stop]
            if case.cuts:
                given |= {"use_cache": True, "past_key_values": cache}
            part, start = tokens[:, start:stop], stop
            if hooks:
                kind = "logits_and_cache" if case.cuts else "logits"
                logits = model.run_with_hooks(part, fwd_hooks=hooks, return_type=kind, **given)
                logits, cache = logits if case.cuts else (logits, None)
            else:
                out = model.original_model(part, **given)
                logits, cache = out.logits, getattr(out, "past_key_values", None)
            parts.append(logits)
    whole = torch.cat(parts, dim=1)
    return [row[real] for row, real in zip(whole, mask.bool(), strict=True)]


def as_given(edit: Any, typed: bool) -> Any:
    """The edit, or the text that it prints where that can be read back."""
    frequencies = getattr(edit, "frequencies", None)
    fitted = getattr(edit, "basis", None) or getattr(edit, "constants", None)
    if not typed or callable(frequencies) or fitted is not None:
        return edit
    if type(edit).__name__ == "DropDirection":
        return edit
    return str(edit)


def outcome_of(case: Case) -> tuple[Outcome, str]:
    """What came of a case, and what is wrong with it, if anything is.

    Wrong are logits that are off by more than rounding, and any error that no rule asks for.
    """
    try:
        outcome = run_case(case)
    except Exception as error:
        return Outcome(), f"{type(error).__name__}: {error}"
    return outcome, "" if outcome.right else str(outcome)


def simplest(case: Case) -> Case:
    """A wrong case with whatever can be left out of it left out, so long as it stays wrong."""
    for simpler in simplifications(case):
        if outcome_of(simpler)[1]:
            return simplest(simpler)
    return case


def simplifications(case: Case) -> list[Case]:
    """The case with one thing less."""
    found, change = [], functools.partial(dataclasses.replace, case)
    if len(case.edits) > 1:
        found += [
            change(edits=case.edits[:number] + case.edits[number + 1 :])
            for number in range(len(case.edits))
        ]
    if len(case.lengths) > 1:
        found += [change(lengths=(length,)) for length in case.lengths]
    found += [change(cuts=cuts) for cuts in ((), case.cuts[:1]) if cuts != case.cuts]
    shorter = tuple(length - length // 3 for length in case.lengths)
    found.append(change(lengths=shorter))
    for number, edit in enumerate(case.edits):
        for head in edit.heads if len(edit.heads) > 1 else ():
            one = (dataclasses.replace(edit, heads=head),)
            found.append(change(edits=case.edits[:number] + one + case.edits[number + 1 :]))
    plain = {"engine": "bridge", "attach": "patch", "typed": False, "fused_first": False,
             "side": "left"}  # fmt: skip
    found += [change(**{name: value}) for name, value in plain.items()]
    # Nothing is cut where no prompt goes on.
    found = [
        dataclasses.replace(one, cuts=tuple(cut for cut in one.cuts if cut < max(one.lengths)))
        for one in found
    ]
    return [one for one in found if one != case]


# A great many ------------------------------------------------------------------------------------


def case_number(seed: int, number: int) -> Case:
    """Case `number` of the series `seed`, the same in every process."""
    return draw_case(random.Random(f"{seed}-{number}"))


def main() -> None:
    """Run many cases and print what came of them; exits with 1 if one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--cases", type=int, default=1000, help="how many to draw")
    parser.add_argument("--seed", type=int, default=0, help="of the series")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", type=int, help="run this case of the series, and print it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    numbers = range(options.first, options.first + options.cases)
    if options.only is not None:
        numbers = range(options.only, options.only + 1)
        print(case_number(options.seed, options.only))
    counts: dict[str, Counter] = {
        name: Counter() for name in ("refused", "family", "engine", "attached", "edits", "way")
    }
    kinds, wrong, worst, began = Counter(), [], (0.0, -1), time.monotonic()
    for done, number in enumerate(numbers, 1):
        case = case_number(options.seed, number)
        outcome, problem = outcome_of(case)
        if problem:
            wrong.append(number)
            print(f"\nWRONG {number} (--seed {options.seed} --only {number}): {problem}\n  {case}")
            least = simplest(case)
            print(f"at its simplest: {outcome_of(least)[1]}\n  {least}", flush=True)
        if outcome.refused:
            counts["refused"][outcome.refused] += 1
        else:
            counts["family"][case.family] += 1
            counts["engine"][case.engine] += 1
            counts["attached"][case.attach] += 1
            counts["edits"][len(case.edits)] += 1
            one = "batch" if len(case.lengths) > 1 else "single"
            counts["way"][f"{one}, {'cached' if case.cuts else 'whole'}"] += 1
            kinds.update({type(edit).__name__ for edit in case.edits})
            if outcome.allowed:
                worst = max(worst, (outcome.error / outcome.allowed, number))
        if done % 50 == 0 or done == len(numbers):
            print(
                f"{done} of {len(numbers)} cases, {counts['refused'].total()} refused by rule, "
                f"{len(wrong)} wrong, {time.monotonic() - began:.0f} s",
                flush=True,
            )
    for name, counter in (*counts.items(), ("with an edit of kind", kinds)):
        print(f"{name}: " + ", ".join(f"{key} {n}" for key, n in sorted(counter.items())))
    print(f"largest error: {worst[0]:.2f} of what is allowed, in case {worst[1]}")
    print(f"wrong: {wrong or 'none'}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
