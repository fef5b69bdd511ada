"""Claim 7 on clean/corrupt pairs, and what later layers repair."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ..data.prompts import PromptSet
from ..effects.activation_patching import activation_patching
from ..effects.between_runs.pairs import copying_pairs
from ..effects.result import Result
from ..effects.running.conditions import Condition
from ..errors import ControlError
from .interventions import NO_SLASH
from .measured import Measured, beyond, mean, refused
from .rules import GAIN
from .runs import matched_heads
from .subjects import Subjects

#: The tests of `on_pairs`, by the direction of patching.
ON_PAIRS = {"denoising": "clean into corrupt", "noising": "corrupt into clean"}


def on_pairs(on: Subjects) -> list[Measured]:
    """Return the tests of patching the slashes' diagonals between clean and corrupt prompts."""
    names = tuple(ON_PAIRS.values())
    if not on.slashes:
        return refused(names, NO_SLASH)
    n_tokens = max(5, on.settings.n_copied // 2)
    if why := on.out_of(2 * n_tokens - 3):
        return refused(names, why)
    pairs = copying_pairs(on.model, on.settings.n_prompts, n_tokens, on.seed)
    edits = on.knock_out()
    refusal = ""
    draws: list[Condition] = []
    try:
        prompts = PromptSet(pairs.clean, pairs.source)
        draws = matched_heads(on, edits, prompts)()
    except ControlError as error:
        refusal = str(error)
    sets = [list(edits), *(list(draw.edits) for draw in draws)]
    found = activation_patching(on.model, sets, pairs, seed=on.seed, progress=on.progress)
    clean, corrupt, patched = _values(found)
    whole = clean - corrupt
    answers = mean("clean into corrupt", whole, on.seed)
    if not answers.low >= GAIN:
        why = (
            "the model does not answer the pairs: its logit difference is higher in the clean run "
            f"by {answers.estimate:.2f} [{answers.low:.2f}, {answers.high:.2f}] "
            f"(at least {GAIN:g} are needed)"
        )
        return refused(names, why)
    if refusal:
        return refused(names, refusal)
    tests = []
    for direction, name in ON_PAIRS.items():
        base, sign = (corrupt, 1) if direction == "denoising" else (clean, -1)
        shares = [sign * (of - base) / whole.mean() for of in patched[direction]]
        detail = f"logit difference {_mean(clean)} clean, {_mean(corrupt)} corrupt"
        tests.append(beyond(name, shares[0], torch.stack(shares[1:]), on.seed, detail))
    return tests


def _values(
    found: Result,
) -> tuple[Float[Tensor, "pair"], Float[Tensor, "pair"], dict[str, list[Float[Tensor, "pair"]]]]:
    """Return the logit differences of both runs, and by direction those of each set of patches."""
    patched: dict[str, list[Tensor]] = {direction: [] for direction in ON_PAIRS}
    runs: dict[str, Tensor] = {}
    for (name, direction), rows in found.tables["values"].groupby(
        ["patched", "direction"], sort=False
    ):
        values = torch.tensor(rows.sort_values("prompt")["value"].to_numpy())
        if direction:
            patched[str(direction)].append(values)
        else:
            runs[str(name)] = values
    return runs["clean"], runs["corrupt"], patched


def _mean(values: Tensor) -> str:
    return f"{float(values.mean()):.2f}"
