"""Claims 1, 2 and 5, from scans of one prompt each: scores, r1, and logit profiles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..data.heads import Head
from ..data.progress import progress_over
from ..data.prompts import PromptSet
from ..errors import ModelError
from ..maths.rank import r1
from ..maths.spectrum import logit_terms, predicted_profile
from ..scanning.moments import Profile
from ..scanning.result import Scan
from ..scanning.scan import scan
from .measured import Measured, beyond, mean, refused, share
from .rules import rules_of
from .subjects import Slash, Subjects, least_score


@dataclass(frozen=True)
class OfPrompt:
    """What a scan of one prompt tells: slash scores, r1, and the profiles of the slash heads.

    Attributes:
        scores: Slash scores.
        r1_q: r1 of the queries; `r1_k` of the keys of each query head's KV head.
        profiles: Logit profiles of the slash heads; none where logits have none.
    """

    scores: Float[Tensor, "layer head offset"]
    r1_q: Float[Tensor, "layer head"] | None
    r1_k: Float[Tensor, "layer head"] | None
    profiles: dict[Head, Profile]


def scans(on: Subjects, prompts: PromptSet, moments: bool, title: str) -> list[OfPrompt]:
    """Scan each prompt by itself."""
    found = []
    for tokens in progress_over(prompts.tokens, title, show=on.progress):
        of_prompt = scan(
            on.model,
            [tokens],
            on.picked.offsets,
            moments=moments,
            profile_offsets=on.settings.n_profile,
            progress=False,
        )
        found.append(_read(on, of_prompt))
    return found


def _read(on: Subjects, of_prompt: Scan) -> OfPrompt:
    moments = of_prompt.moments
    if moments is None:
        return OfPrompt(of_prompt.scores, None, None, {})
    group = on.info.n_heads // on.info.n_kv_heads
    profiles = {}
    for head in on.heads:
        try:
            profiles[head] = moments.profile(head)
        except ModelError:
            continue
    r1_k = r1(moments.gram_k).repeat_interleave(group, dim=1)
    return OfPrompt(of_prompt.scores, r1(moments.gram_q), r1_k, profiles)


def existence(on: Subjects, natural: list[OfPrompt], random: list[OfPrompt]) -> list[Measured]:
    """Return the tests of claim 1: scores on natural text, and on random tokens at the same κ."""
    kappa = on.settings.kappa
    chosen = on.all_slashes or (_strongest(on),)
    strongest = chosen[0]
    scores = _of(natural, [strongest], on)[:, 0]
    at = strongest.head.layer, on.picked.offsets.index(strongest.offset)
    uniform = torch.stack([on.uniform.score(len(tokens))[at] for tokens in on.natural.tokens])
    n_later = sum(slash.offset >= 1 for slash in on.all_slashes)
    detail = (
        f"{strongest}; {len(on.all_slashes)} heads reach κ = {kappa:g} on the picking prompts, "
        f"{n_later} of them with Δ ≥ 1"
    )
    tests = [mean("score", scores - uniform, on.seed, detail)]
    if not on.all_slashes:
        none = "no head reaches κ on the picking prompts"
        return [*tests, Measured("random", why_not=none), Measured("random score", why_not=none)]
    on_random, on_natural = _of(random, chosen, on), _of(natural, chosen, on)
    least = _least(on, chosen)
    reach = (on_random >= least).double().mean(1)
    others = float((on_natural >= least).double().mean())
    detail = f"mean over the prompts; on natural text {others:.2f}"
    return [
        *tests,
        mean("random", reach, on.seed, detail),
        share("random score", on_random.mean(1), on_natural.mean(1), on.seed),
    ]


def _least(on: Subjects, slashes: tuple[Slash, ...]) -> Float[Tensor, "prompt head"]:
    """Return what each slash has to score in each prompt, of natural text or of random tokens."""
    rows = [least_score(on.settings.kappa, on.uniform, [len(t)]) for t in on.natural.tokens]
    at = [(slash.head.layer, on.picked.offsets.index(slash.offset)) for slash in slashes]
    return torch.stack([torch.stack([row[place] for place in at]) for row in rows])


def _strongest(on: Subjects) -> Slash:
    """Return the head and offset with the highest score on the picking prompts."""
    scores = on.picked.scores.nan_to_num(-1)
    layer, head, column = (int(i) for i in torch.unravel_index(scores.argmax(), scores.shape))
    return Slash(Head(layer, head), on.picked.offsets[column])


def _of(
    found: list[OfPrompt], slashes: tuple[Slash, ...] | list[Slash], on: Subjects
) -> Float[Tensor, "prompt head"]:
    """Return the score of each slash in each prompt."""
    at = [(s.head.layer, s.head.head, on.picked.offsets.index(s.offset)) for s in slashes]
    return torch.stack([torch.stack([one.scores[place] for place in at]) for one in found])


def near_rank_one(on: Subjects, natural: list[OfPrompt]) -> list[Measured]:
    """Return the tests of claim 2: r1 of slash heads against other heads of their layers."""
    heads = [head for head in on.heads if on.others(head)]
    why = ""
    if not on.slashes:
        why = "no head with Δ ≥ 1 reaches κ"
    elif not heads:
        why = "the layers of the slash heads have no other heads to compare with"
    elif natural[0].r1_q is None:
        why = str(on.picked.provenance.get("moments", "queries and keys cannot be read"))
    if why:
        return refused(rules_of(2), why)
    generator = on.generator("r1")
    tests = []
    for part in ("q", "k"):
        names = f"r1 {part}", f"r1 {part} beyond other heads"
        if part == "k" and on.info.n_kv_heads == 1:
            tests += refused(names, "all heads of a layer share one key head")
            continue
        values = torch.stack([getattr(one, f"r1_{part}") for one in natural])
        sample = _mean_over(values, heads)
        others = torch.stack([_mean_over(values, on.others(head)) for head in heads]).mean(0)
        draws = torch.stack(
            [_mean_over(values, draw) for draw in _drawn_heads(on, heads, generator)]
        )
        detail = f"{float(sample.mean()):.2f} against {float(others.mean()):.2f}"
        tests += [
            mean(names[0], sample - others, on.seed, detail),
            beyond(names[1], sample, draws, on.seed),
        ]
    return tests


def _mean_over(values: Tensor, heads: list[Head]) -> Float[Tensor, "prompt"]:
    return torch.stack([values[:, head.layer, head.head] for head in heads]).mean(0)


def _drawn_heads(on: Subjects, heads: list[Head], generator: torch.Generator) -> list[list[Head]]:
    """Return draws that replace each head by another head of its layer that is no slash head.

    The draws are different; there may be fewer than were asked for, where layers have few heads.
    """
    draws: dict[tuple[Head, ...], list[Head]] = {}
    for _ in range(20 * on.settings.n_draws):
        if len(draws) == on.settings.n_draws:
            break
        draw = []
        for head in heads:
            pool = on.others(head)
            draw.append(pool[int(torch.randint(len(pool), (), generator=generator))])
        draws.setdefault(tuple(draw), draw)
    return list(draws.values())


def predicted(on: Subjects, natural: list[OfPrompt]) -> list[Measured]:
    """Return the tests of claim 5: profiles predicted on some prompts, measured on the others."""
    names = ("profile", "peak", "profile beyond other heads", "profile beyond shuffled pairs")
    heads = [head for head in on.heads if all(head in one.profiles for one in natural)]
    if not heads:
        why = "no head with Δ ≥ 1 reaches κ" if not on.slashes else _no_profile(on)
        return [Measured(name, why_not=why) for name in names]
    moments = on.picked.require_moments()
    generator = on.generator("profiles")

    def correlations(curves: Callable[[Head], Tensor]) -> Float[Tensor, "prompt"]:
        of_heads = []
        for head in heads:
            curve = curves(head)
            of_heads.append(
                torch.stack([_correlation(one.profiles[head], curve) for one in natural])
            )
        return torch.stack(of_heads).mean(0)

    n = on.settings.n_profile
    deltas = torch.arange(n)

    def own(head: Head) -> Tensor:
        return predicted_profile(*moments.mean(head), deltas, moments.rotary(head.layer))

    sample = correlations(own)
    peaks = torch.stack(
        [_peak_found(one.profiles[head], own(head)) for head in heads for one in natural]
    )
    peaks = peaks.view(len(heads), len(natural)).mean(0)
    tests = [
        mean("profile", sample, on.seed, f"{len(heads)} heads, offsets 0 to {n - 1}"),
        mean("peak", peaks, on.seed),
    ]
    drawn = _drawn_heads(on, heads, generator) if all(map(on.others, heads)) else []
    if drawn:
        draws = []
        for draw in drawn:
            of_other = dict(zip(heads, draw, strict=True))
            draws.append(correlations(lambda head, of=of_other: own(of[head])))  # type: ignore[misc]
        tests.append(beyond("profile beyond other heads", sample, torch.stack(draws), on.seed))
    else:
        tests.append(
            Measured("profile beyond other heads", why_not="their layers have no other heads")
        )
    shuffled = []
    for _ in range(on.settings.n_draws):
        order = {
            head: torch.randperm(moments.rotary(head.layer).n_pairs, generator=generator)
            for head in heads
        }
        shuffled.append(correlations(lambda head, of=order: _shuffled(on, head, of[head])))  # type: ignore[misc]
    tests.append(beyond("profile beyond shuffled pairs", sample, torch.stack(shuffled), on.seed))
    return tests


def _no_profile(on: Subjects) -> str:
    moments = on.picked.moments
    if moments is None:
        return str(on.picked.provenance.get("moments", "queries and keys cannot be read"))
    try:
        moments.rotary(on.heads[0].layer)
    except ModelError as error:
        return str(error)
    return "the logits of these heads have no profile by offset"


def _shuffled(on: Subjects, head: Head, order: Tensor) -> Float[Tensor, "offset"]:
    """Return the predicted profile with each pair's mean q and k moved to another frequency."""
    moments = on.picked.require_moments()
    rotary = moments.rotary(head.layer)
    deltas = torch.arange(on.settings.n_profile)
    q, k = moments.mean(head)
    q_re, q_im, q_rest = rotary.split(q)
    k_re, k_im, k_rest = rotary.split(k)
    q = rotary.join(q_re[order], q_im[order], q_rest)
    k = rotary.join(k_re[order], k_im[order], k_rest)
    n = len(deltas)
    terms, rest = logit_terms(q.expand(n, -1), k.expand(n, -1), deltas, rotary)
    return terms.sum(-1) + rest


def _correlation(profile: Profile, curve: Tensor) -> Float[Tensor, ""]:
    """Return the correlation of a measured profile with a predicted curve; 0 for a flat one."""
    both = torch.stack([profile.measured.double(), curve[profile.offsets].double()])
    return torch.corrcoef(both)[0, 1].nan_to_num(0.0)


def _peak_found(profile: Profile, curve: Tensor) -> Float[Tensor, ""]:
    """Return 1 where a predicted curve peaks within one token of the measured profile, else 0."""
    peak = int(profile.offsets[curve[profile.offsets].argmax()])
    return torch.tensor(float(abs(profile.measured_peak - peak) <= 1))
