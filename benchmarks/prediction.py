"""Predicted against measured steps and offsets of slashes, on settings drawn at random.

`python benchmarks/prediction.py FILE.parquet` trains 60 settings with three seeds each, in about
twenty minutes on one core, into that file (continuing it if it is unfinished), and writes the
tables of docs/theory-prediction.md and its picture. A finished file is read instead. While the
prediction was made, other settings were looked at: those that seed 1 draws.
"""

import itertools
import math
import sys
from pathlib import Path

from common import machine, write_results, write_table

#: Drawn with a seed that was used for nothing else.
N_SETTINGS, DRAWN_WITH = 60, 2024
SEEDS = (0, 1, 2)
KAPPA = 0.5
#: Growth in a step from which steps are large.
FAST = 0.1
PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "prediction.png"
KINDS = {"predicted": "integrated", "closed_form": "closed form"}
MEASURES = {
    "r2": "R² of the log of the step from which the score stays at 0.5",
    "median_error": "median error of that step",
    "r2_first": "R² of the log of the step at which it first reaches 0.5",
    "median_error_first": "median error of that step",
    "slash_right": "right that there is such a step within 1,000, or none",
    "offset_right": "right offset where a slash forms first",
    "offset_right_where_measured": "the same, of the slashes in training only",
    "final_offset_right": "right offset at the end",
}
CASES = ("both", "predicted_only", "measured_only", "neither")
#: How the settings are split to show where the prediction fails.
RANGES = {
    "cone": (0, 0.5, 1, 1.5, 2),
    "learning_rate": (5, 10, 20, 40),
    "fastest_rate": (0, 0.02, 0.05, 0.1, 0.2, math.inf),
    "offset": (1, 2, 3, 4, 5),
    "length": (12, 32, 48, 65),
}


def measured(path):
    """The table of all runs."""
    import pandas as pd

    from slashpatch import theory

    settings = theory.draw_settings(N_SETTINGS, DRAWN_WITH)
    if path.exists():
        frame = pd.read_parquet(path)
        if frame["cone"].tolist() != [one.cone for one in settings for _ in SEEDS]:
            raise SystemExit(f"{path} holds other settings; expected those of draw_settings")
        return frame
    return theory.compare(settings, seeds=SEEDS, kappa=KAPPA, path=path, resume=True)


def estimate(agreed, name, percent=False):
    """A measure with its interval, as text."""
    row = agreed.set_index("measure").loc[name]
    if math.isnan(row["value"]):
        return "–"
    if percent:
        return f"{row['value']:.0%} ({row['low']:.0%} to {row['high']:.0%})"
    return f"{row['value']:.2f} ({row['low']:.2f} to {row['high']:.2f})"


def counts(agreed):
    """The four cases, as text."""
    values = agreed.set_index("measure")["value"]
    return " / ".join(f"{values[name]:.0f}" for name in CASES)


def agreement_lines(agreed, frame):
    """The table of agreement."""
    lines = [
        f"{machine()['processor']}; {N_SETTINGS} settings, {len(SEEDS)} seeds each; in brackets "
        "95 % bootstrap intervals over settings.",
        "",
        f"| | {' | '.join(KINDS.values())} | runs |",
        "|---|---|---|---|",
    ]
    for name, words in MEASURES.items():
        percent = not name.startswith("r2")
        cells = [estimate(agreed[by], name, percent) for by in KINDS]
        counted = {int(agreed[by].set_index("measure").loc[name, "n"]): 0 for by in KINDS}
        lines.append(f"| {words} | {' | '.join(cells)} | {', '.join(map(str, counted))} |")
    cells = [counts(agreed[by]) for by in KINDS]
    lines.append(
        "| runs with a step in both / prediction only / training only / neither "
        f"| {' | '.join(cells)} | {N_SETTINGS * len(SEEDS)} |"
    )
    task = estimate(agreed["predicted"], "task_offset", True)
    elsewhere = frame[frame["measured_offset"].notna()]
    elsewhere = elsewhere[elsewhere["measured_offset"] != elsewhere["offset"]]
    found = (elsewhere["measured_offset"] == elsewhere["predicted_offset"]).sum()
    firsts = frame[["predicted_first_step", "measured_first_step"]]
    both = firsts.map(math.isfinite).all(axis=1)
    near = (firsts.iloc[:, 0] - firsts.iloc[:, 1]).abs() <= 0.25 * firsts.iloc[:, 1]
    fast = both & (frame["fastest_rate"] >= FAST)
    return [
        *lines,
        "",
        *left_out_lines(frame),
        "",
        f"Of the slashes in training, {task} form at the task's offset; of the {len(elsewhere)} "
        f"that form elsewhere, the prediction has {found} right. Where the fastest pair grows by "
        f"{FAST:.0%} a step or more, the step at which the score first reaches {KAPPA} is within a "
        f"quarter in {(fast & near).sum()} of {fast.sum()} runs.",
    ]


def left_out_lines(frame):
    """What becomes of R² and error if runs with a step in only one of the two count too."""
    import pandas as pd

    from slashpatch.theory import agreement

    said, seen = frame["predicted_step"], frame["measured_step"]
    in_both = said.map(math.isfinite) & seen.map(math.isfinite)
    alone = (said.map(math.isfinite) != seen.map(math.isfinite)).sum()
    error = ((said - seen).abs() / seen)[in_both]
    worst = pd.concat([error, pd.Series([math.inf] * alone)]).median()
    last = frame.assign(predicted_step=said.clip(upper=1000))[seen.map(math.isfinite)]
    r2 = agreement(last, n_resamples=1).set_index("measure").loc["r2"]
    return [
        f"R² and errors leave out runs with a step in only one of the two. If a missing predicted "
        f"step counts as 1,000, R² of the integrated step is {r2['value']:.2f} over the "
        f"{r2['n']:.0f} runs with a step in training. If all {alone} runs with a step in only one "
        f"count as wholly wrong, the median error is {worst:.0%}. The prediction is the recorded "
        f"step itself in {(error == 0).sum()} of {len(error)} runs, and within a quarter in "
        f"{(error <= 0.25).sum()}."
    ]


def map_lines(frame):
    """The table of where the prediction holds and where it fails."""
    import pandas as pd

    from slashpatch.theory import agreement

    lines = [
        "| settings | runs | median error | slash or none, right | offset right "
        "| both / prediction only / training only / neither |",
        "|---|---|---|---|---|---|",
    ]
    parts = {}
    named = frame["frequencies"].isin(("all", "high", "medium", "low"))
    band = frame["frequencies"].where(named)
    n_given = frame["frequencies"].where(~named).str.count(",") + 1
    for name in ("all", "high", "medium", "low"):
        parts[f"frequencies {name}"] = band == name
    for low, high in ((1, 2), (3, 5), (6, 12)):
        parts[f"{low} to {high} drawn frequencies"] = n_given.between(low, high)
    for column, edges in RANGES.items():
        binned = pd.cut(frame[column], edges, right=False, labels=False)
        for at, (low, high) in enumerate(itertools.pairwise(edges)):
            words = column.replace("_", " ")
            upper = f"to {high:g}" if math.isfinite(high) else "or more"
            label = f"{words} {low}" if column == "offset" else f"{words} {low:g} {upper}"
            parts[label] = binned == at
    for label, rows in parts.items():
        if not rows.any():
            continue
        found = agreement(frame[rows], n_resamples=1).set_index("measure")["value"]
        cells = [
            "–" if math.isnan(found[name]) else f"{found[name]:.0%}"
            for name in ("median_error", "slash_right", "offset_right")
        ]
        told = counts(agreement(frame[rows], n_resamples=1))
        lines.append(f"| {label} | {int(rows.sum())} | {' | '.join(cells)} | {told} |")
    return lines


def failures_lines(frame):
    """The table of settings in which a run's step is off by a quarter, or its offset is wrong."""
    said, seen = frame["predicted_step"], frame["measured_step"]
    off = (said != seen) & ~((said - seen).abs() / seen <= 0.25)
    wrong = frame["predicted_offset"].fillna(-1) != frame["measured_offset"].fillna(-1)
    lines = [
        "| cone | frequencies | Δ | length | learning rate | fastest rate | seeds: predicted step "
        "(offset), measured step (offset) |",
        "|---|---|---|---|---|---|---|",
    ]

    def text(step, offset):
        when = f"{step:.0f}" if math.isfinite(step) else "none"
        return when if math.isnan(offset) else f"{when} (Δ={offset:.0f})"

    for _, runs in frame[off | wrong].groupby("setting"):
        first = runs.iloc[0]
        theta = first["frequencies"]
        if theta[0].isdigit():
            values = [float(part) for part in theta.split(",")]
            theta = f"{len(values)} from {max(values):.2g} to {min(values):.2g}"
            theta = f"{values[0]:.2g}" if len(values) == 1 else theta
        told = "; ".join(
            f"{run.seed}: {text(run.predicted_step, run.predicted_offset)}, "
            f"{text(run.measured_step, run.measured_offset)}"
            for run in runs.itertuples()
        )
        lines.append(
            f"| {first['cone']:.2f} | {theta} | {first['offset']} | {first['length']} "
            f"| {first['learning_rate']:.1f} | {first['fastest_rate']:.2f} | {told} |"
        )
    return lines


def draw(frame):
    """Predicted against measured step, on logarithmic axes; runs without a step on the edge."""
    from slashpatch.reporting.figures import save_figure
    from slashpatch.reporting.style import ink, new_figure, plain_numbers, styled

    @styled
    def figure():
        found = new_figure(5.4, 5.4)
        axes = found.subplots()
        steps = frame[["measured_step", "predicted_step"]]
        none = 1400
        inside = steps.clip(lower=1).replace(math.inf, none)
        finite = steps.map(math.isfinite)
        right = frame["predicted_offset"].fillna(-1) == frame["measured_offset"].fillna(-1)
        cases = {
            "step in both, offset right": finite.all(axis=1) & right,
            "step in both, offset wrong": finite.all(axis=1) & ~right,
            "step in the prediction only": finite["predicted_step"] & ~finite["measured_step"],
            "step in training only": finite["measured_step"] & ~finite["predicted_step"],
            "step in neither": ~finite.any(axis=1),
        }
        for index, (name, rows) in enumerate(cases.items()):
            at = inside[rows]
            if at.empty:
                continue
            label = f"{name}: {len(at)}"
            axes.scatter(at["measured_step"], at["predicted_step"], 16, alpha=0.6,
                         marker="os^Dv"[index], label=label)  # fmt: skip
        least = 0.8 * inside.to_numpy().min()
        axes.plot([least, 1000], [least, 1000], color=ink(), linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlabel="measured step (right edge: none in 1000)",
                 ylabel="predicted step (upper edge: none in 1000)")  # fmt: skip
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(plain_numbers())
        axes.set_title(f"{N_SETTINGS} settings drawn at random, {len(SEEDS)} seeds: number of runs")
        found.legend(loc="outside lower center", ncols=2)
        return found

    save_figure(figure(), PICTURE)


def main():
    """Train or read, and write results.json, the tables and the picture."""
    import torch

    from slashpatch.data.files import without_nan
    from slashpatch.theory import agreement

    torch.set_num_threads(1)
    if len(sys.argv) != 2 or not sys.argv[1].endswith(".parquet"):
        raise SystemExit("expected a .parquet file for the runs")
    frame = measured(Path(sys.argv[1]))
    agreed = {by: agreement(frame, by) for by in KINDS}
    write_table("theory-prediction", "agreement", agreement_lines(agreed, frame))
    write_table("theory-prediction", "map", map_lines(frame))
    write_table("theory-prediction", "failures", failures_lines(frame))
    draw(frame)
    figures = {by: without_nan(one.to_dict(orient="records")) for by, one in agreed.items()}
    settings = {"settings": N_SETTINGS, "drawn_with": DRAWN_WITH, "seeds": SEEDS, "kappa": KAPPA}
    write_results("prediction", {**settings, "agreement": figures}, {"torch": torch.__version__})


if __name__ == "__main__":
    main()
