"""Persistence: do slash scores on natural text hold on random tokens of the same lengths?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from .. import bridge
from ..bridge.provenance import provenance
from ..bridge.workers.options import Workers, as_workers
from ..data.prompts import PromptSet, prompt_set, random_ids
from ..errors import MetricError
from ..maths.offsets import as_offsets
from ..scanning.prompt_scores import prompt_scores
from ..scanning.result import require_kappa
from .result import Result
from .running.conditions import require_options
from .statistics import compared, false_discovery, few_prompts, interval

if TYPE_CHECKING:
    import pandas as pd
    from transformer_lens.model_bridge import TransformerBridge

#: What the natural prompts are compared with.
AGAINST = ("random", "shuffled")
#: Columns whose resamples fit memory together.
_COLUMNS = 256
#: Fewest prompts of which one half can pick and the other can estimate.
_LEAST_TO_SPLIT = 4


def persistence(
    model: TransformerBridge,
    heads: Any = None,
    prompts: Any = None,
    *,
    kappa: float = 0.1,
    kappa_random: float | None = None,
    offsets: Any = range(16),
    against: str = "random",
    n_prompts: int = 16,
    max_tokens: int | None = None,
    engine: str = "auto",
    batch_size: int | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool | None = None,
    workers: int | str | Workers | None = None,
) -> Result:
    """Compare slash scores on natural text with those on random tokens of the same lengths.

    Each natural prompt is paired with a random one of the same length, which starts with the same
    BOS token if there is one. *Ours*, as are the thresholds: the paper (arXiv 2601.08297) says that
    slash-dominant heads persist on random tokens, and is said to use another threshold there.

    Args:
        model: A TransformerBridge; active patches stay.
        heads: Heads to compare; None for all.
        prompts: Natural prompts, as for `scan`.
        kappa: Least score of a slash head on the natural prompts, 0 to 1.
        kappa_random: The same on random tokens; None: `kappa`.
        offsets: Δ ≥ 0: an int, ints, a range, or text such as "0-15".
        against: "random": tokens drawn uniformly from the vocabulary. "shuffled": each prompt's own
            tokens in another order, which keeps how often each occurs.
        n_prompts: Number of natural prompts, and of random ones; the unit of all intervals.
        max_tokens: Length of generated prompts; None: 512, or the context if that is shorter.
        engine: As in `scan`.
        batch_size: Prompts per forward pass; None: by memory.
        confidence: Level of the intervals.
        seed: Random seed of prompts, bootstrap resamples and sign flips.
        progress: Whether to show a progress bar; None: on a terminal only.
        workers: Number of worker processes, or a `Workers`; None stays in this process.

    Returns:
        A Result. `frame` has a row per head and offset, the highest score first: `natural` and
        `random` are the mean scores, `difference` is random − natural, each with an interval over
        prompts; `p` and `q` (Benjamini-Hochberg over all rows) are of the difference.
        `tables["counts"]` counts slash heads at each pair of thresholds: `natural`, `random` and
        `both`, once of (head, offset) and once of heads. `tables["slash_heads"]` is the mean over
        slash heads that the first half of the natural prompts picks, estimated on the other half.

    Raises:
        HeadError: A head that the model does not have.
        ScanError: A threshold outside [0, 1].
        OffsetError: An offset that one of the prompts is too short for.
        PromptError: Prompts as in `scan`.
        MetricError: An unknown `against`, seed or confidence.
    """
    require_options(seed, confidence, n_prompts=n_prompts, batch_size=batch_size)
    kappa_random = kappa if kappa_random is None else kappa_random
    require_kappa(kappa)
    require_kappa(kappa_random)
    if against not in AGAINST:
        raise MetricError(f"against must be one of {', '.join(AGAINST)}; got {against!r}")
    info, deltas, pool_of = bridge.read(model), as_offsets(offsets), as_workers(workers)
    chosen = info.heads if heads is None else sorted(info.require(heads))
    natural = prompt_set(model, prompts, n_prompts=n_prompts, max_tokens=max_tokens, seed=seed)
    other = counterparts(model, natural, against, seed)
    layer, head = torch.tensor([(one.layer, one.head) for one in chosen]).T
    before, after = (
        prompt_scores(
            model,
            some,
            deltas,
            engine,
            batch_size=batch_size,
            progress=progress,
            workers=pool_of,
        )[:, layer, head]
        for some in (natural, other)
    )
    names = [(one, offset) for one in chosen for offset in deltas]
    columns = _compared(before.flatten(1), after.flatten(1), seed, confidence)
    frame = _frame(names, len(before), columns)
    counts = _counts(frame, kappa, kappa_random)
    tables = {"counts": counts}
    picked = _slash_heads(
        before.flatten(1), after.flatten(1), kappa, kappa_random, seed, confidence
    )
    if picked is not None:
        tables["slash_heads"] = picked
    details = {
        "prompts": natural.record,
        "random_prompts": other.record,
        "kappa": kappa,
        "kappa_random": kappa_random,
        "against": against,
        "confidence": confidence,
        "seed": seed,
        **({} if pool_of is None else pool_of.record),
    }
    remarks = tuple(_remarks(frame, tables, kappa, kappa_random, against))
    return Result("persistence", frame, tables, remarks, provenance(model, **details))


def counterparts(
    model: TransformerBridge, natural: PromptSet, against: str, seed: int
) -> PromptSet:
    """Return a random prompt of the same length for each natural one.

    A BOS token at the start of a natural prompt is kept. `against` is as for `persistence`.
    """
    from transformer_lens.utilities.statistics import derive_generator

    bos = getattr(model.tokenizer, "bos_token_id", None)
    longest = max(len(tokens) for tokens in natural.tokens)
    drawn = random_ids(model, len(natural.tokens), longest, seed, "counterparts")
    made = []
    for index, tokens in enumerate(natural.tokens):
        kept = int(bos is not None and int(tokens[0]) == bos)
        if against == "shuffled":
            generator = derive_generator(seed, "shuffled", index)
            rest = tokens[kept:][torch.randperm(len(tokens) - kept, generator=generator)]
        else:
            rest = drawn[index, kept : len(tokens)]
        made.append(torch.cat([tokens[:kept], rest]))
    what = "the same tokens shuffled" if against == "shuffled" else "random tokens"
    return PromptSet(tuple(made), f"{what}, seed {seed}")


def _compared(
    before: Float[Tensor, "prompt of"],
    after: Float[Tensor, "prompt of"],
    seed: int,
    confidence: float,
) -> dict[str, Tensor]:
    """Return the columns of the frame, some of the tests at a time."""
    parts = []
    for a, b in zip(before.split(_COLUMNS, 1), after.split(_COLUMNS, 1), strict=True):
        paired = compared(a, b, seed, confidence)
        # Scores lie in [0, 1], whatever the resampling says.
        (natural_low, natural_high), (random_low, random_high) = (
            [end.clamp(0, 1) for end in interval(scores, seed, confidence)] for scores in (a, b)
        )
        parts.append(
            {
                "natural": paired["baseline"],
                "natural_low": natural_low,
                "natural_high": natural_high,
                "random": paired["edited"],
                "random_low": random_low,
                "random_high": random_high,
                "difference": paired["effect"],
                **{name: paired[name] for name in ("low", "high", "p")},
            }
        )
    columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return {**columns, "q": false_discovery(columns["p"])}


def _frame(names: list[Any], n: int, columns: dict[str, Tensor]) -> pd.DataFrame:
    """Return the main table, the highest of both scores first."""
    import pandas as pd

    frame = pd.DataFrame(
        {
            "name": [str(head) for head, _ in names],
            "layer": [head.layer for head, _ in names],
            "head": [head.head for head, _ in names],
            "offset": [offset for _, offset in names],
            "n": n,
            **{name: values.numpy() for name, values in columns.items()},
        }
    )
    highest = frame[["natural", "random"]].max(axis=1)
    order = highest.sort_values(ascending=False, kind="stable").index
    return frame.loc[order].reset_index(drop=True)


def _counts(frame: pd.DataFrame, kappa: float, kappa_random: float) -> pd.DataFrame:
    """Return how many slash heads there are at equal and at own thresholds."""
    import pandas as pd

    rows = []
    pairs = [(kappa, kappa), (kappa_random, kappa_random), (kappa, kappa_random)]
    for at, at_random in dict.fromkeys(pairs):
        natural, random = frame["natural"] >= at, frame["random"] >= at_random
        for what in ("head and offset", "head"):
            of = frame.index if what == "head and offset" else frame["name"]
            n = [len(set(of[which])) for which in (natural, random, natural & random)]
            rows.append((what, at, at_random, *n))
    columns = ["counted", "kappa", "kappa_random", "natural", "random", "both"]
    return pd.DataFrame(rows, columns=columns)


def _slash_heads(
    before: Float[Tensor, "prompt of"],
    after: Float[Tensor, "prompt of"],
    kappa: float,
    kappa_random: float,
    seed: int,
    confidence: float,
) -> pd.DataFrame | None:
    """Return the mean scores of slash heads that half of the prompts picks, on the other half.

    None for fewer than four prompts, or if no head is picked.
    """
    import pandas as pd

    half = len(before) // 2
    picked = before[:half].mean(0) >= kappa if len(before) >= _LEAST_TO_SPLIT else None
    if picked is None or not bool(picked.any()):
        return None
    natural, random = (x[half:, picked].mean(1, keepdim=True) for x in (before, after))
    found = _compared(natural, random, seed, confidence)
    kept = after[half:, picked].mean(0) >= kappa_random
    row = {name: float(values[0]) for name, values in found.items() if name != "q"}
    counts = {"picked": int(picked.sum()), "kept": int(kept.sum()), "n": len(natural)}
    return pd.DataFrame([{"kappa": kappa, "kappa_random": kappa_random, **counts, **row}])


def _remarks(
    frame: pd.DataFrame,
    tables: dict[str, pd.DataFrame],
    kappa: float,
    kappa_random: float,
    against: str,
) -> Iterator[str]:
    """Yield the counts in words."""
    yield from few_prompts(int(frame["n"].iloc[0]))
    other = "shuffled tokens" if against == "shuffled" else "random tokens"
    for row in tables["counts"].to_dict(orient="records"):
        at = f"κ={row['kappa']:g}"
        if row["kappa_random"] != row["kappa"]:
            at += f" on natural text and κ={row['kappa_random']:g} on {other}"
        what = "heads" if row["counted"] == "head" else "slashes (a head at an offset)"
        yield (
            f"{what} at {at}: {row['natural']} on natural text, {row['random']} on {other}, "
            f"{row['both']} on both"
        )
    if "slash_heads" in tables:
        (row,) = tables["slash_heads"].to_dict(orient="records")
        known = row["low"] == row["low"]
        ends = f" [{row['low']:+.3f}, {row['high']:+.3f}]" if known else ""
        yield (
            f"of {row['picked']:.0f} slashes that the first half of the prompts picks at "
            f"κ={kappa:g}, {row['kept']:.0f} reach κ={kappa_random:g} on {other} of the other "
            f"half; mean score {row['natural']:.3f} and {row['random']:.3f}, difference "
            f"{row['difference']:+.3f}{ends}"
        )
    if len(frame) > 2:
        yield (
            "correlation of natural and random scores over rows: "
            f"{frame['natural'].corr(frame['random']):.2f}"
        )
