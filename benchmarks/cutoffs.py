"""Which ranges of frequencies single out an offset, in theory, in training and in real heads.

`python benchmarks/cutoffs.py` trains 294 small models (half an hour on one core; a stopped run
goes on where it was), measures heads of the default model, draws docs/pictures/cutoffs.png and
writes the tables of docs/theory-frequencies.md.
"""

import itertools

import torch
from common import HERE, machine, rank_correlation, write_table
from cutoffs_heads import N_TOKENS, drop_table, head_table

from slashpatch.data.heads import Head

N_PAIRS = 8
THETAS = 10_000.0 ** (-torch.arange(N_PAIRS, dtype=torch.float64) / N_PAIRS)
RANGES = list(itertools.combinations_with_replacement(range(N_PAIRS), 2))
#: At the default learning rate some of these end with a slash at another offset.
MIDDLE = [(first, last) for first, last in RANGES if first in (1, 2)]
GENTLE = {"learning_rate": 5.0, "steps": 1000}
OFFSETS = (1, 3)
SEEDS = (0, 1, 2)
KAPPA = 0.3
#: Positions of the sequences of training.
LENGTH = 64
HEAD = Head(16, 0)
KEPT = HERE.parent / "build" / "cutoffs"
#: What is kept of each training run.
MEASURED = ("steps", "score", "matching", "margin", "outside", "longer", "alike", "amplitude", "r1")


def trained(name, ranges, **knobs):
    """A row for each range of frequencies, offset and seed: what training ends with."""
    import pandas as pd

    from slashpatch.data.journal import Journal
    from slashpatch.theory import train

    every = THETAS.tolist()
    todo = list(itertools.product(OFFSETS, ranges, SEEDS))
    header = {"kappa": KAPPA, "frequencies": every, "offsets": list(OFFSETS)}
    header |= {"measured": list(MEASURED), **knobs}
    KEPT.mkdir(parents=True, exist_ok=True)
    with Journal(KEPT / f"{name}.jsonl", header, True, range(len(todo)), len(MEASURED)) as journal:
        for index, (offset, (first, last), seed) in enumerate(todo):
            if index in journal.rows:
                continue
            some = every[first : last + 1]
            run = train(frequencies=some, offset=offset, seed=seed, progress=False, **knobs)
            journal.write({index: measured(run)})
            print(name, offset, first, last, seed, journal.rows[index], flush=True)
        rows = dict(journal.rows)
    return pd.DataFrame(
        [
            {"offset": offset, "first": first, "last": last, "seed": seed}
            | dict(zip(MEASURED, rows[index], strict=True))
            for index, (offset, (first, last), seed) in enumerate(todo)
        ]
    )


def measured(run):
    """The numbers of `MEASURED` for one run."""
    import torch

    from slashpatch.maths.interference import profile_score
    from slashpatch.maths.spectrum import amplitude_and_phase
    from slashpatch.theory.run import measurement_examples

    settings, last = run.settings, run.rows[-1]
    with torch.no_grad():
        found = run.model.forward(settings, measurement_examples(settings))
    q, k = (x.flatten(0, 1).double().mean(0) for x in (found.q, found.k))
    amplitude, _ = amplitude_and_phase(q, k, settings.rotary())
    return [
        float(run.time_to(KAPPA)),
        run.score,
        last["matching"],
        last["margin"],
        run.out_of_distribution(),
        run.read(256)[f"score_{settings.offset}"],
        profile_score(run.profile(), settings.offset),
        float(amplitude.sum()),
        min(last["r1_q"], last["r1_k"]),
    ]


def with_predictors(frame):
    """The rows with what theory says of each range of frequencies, before any training."""
    from slashpatch.maths.interference import margins_by_cutoff, needed_amplitude

    for offset in OFFSETS:
        margins = margins_by_cutoff(THETAS, offset, LENGTH)
        for first, last in RANGES:
            rows = (frame["offset"] == offset) & (frame["first"] == first)
            rows &= frame["last"] == last
            frame.loc[rows, "in_theory"] = float(margins[first, last])
            needed = needed_amplitude(THETAS[first : last + 1], offset, LENGTH)
            frame.loc[rows, "needed"] = needed
    frame["bound"] = 1 - THETAS[frame["first"].tolist()].cos().numpy()
    return frame


def correlation_table(frame):
    """How well each predictor orders the ranges by what training makes of them."""
    lines = ["| predictor | Δ | final score | out of distribution | steps to a slash |"]
    lines.append("|---|--:|---|---|---|")
    for name, column, sign in (
        ("margin, equal amplitudes", "in_theory", 1),
        ("needed amplitude", "needed", -1),
        ("1 − cos θ of the highest frequency", "bound", 1),
    ):
        for offset in OFFSETS:
            sets = frame[frame["offset"] == offset].groupby(["first", "last"])
            x = sign * sets[column].first()
            steps = -sets["steps"].median().clip(upper=1e9)
            found = [sets["score"].mean(), sets["outside"].mean(), steps]
            cells = " | ".join(rank_correlation(x, y) for y in found)
            lines.append(f"| {name} | {offset} | {cells} |")
    return lines


def training_table(frame, gentle):
    """Ranges by their highest frequency: what theory says, and how many runs form a slash."""
    lines = ["| highest θ | sets | margin | needed amplitude | Δ=1 | Δ=3 |"]
    lines.append("|---|--:|---|---|---|---|")
    first, alone = frame["first"], frame["first"] == frame["last"]
    softly = gentle[gentle["first"] < gentle["last"]]
    parts = {
        "1, alone": frame[(first == 0) & alone],
        "1 and lower ones": frame[(first == 0) & ~alone],
        "0.32, alone": frame[(first == 1) & alone],
        "0.32 and lower ones": frame[(first == 1) & ~alone],
        "the same, gently": softly[softly["first"] == 1],
        "0.1, alone": frame[(first == 2) & alone],
        "0.1 and lower ones": frame[(first == 2) & ~alone],
        "the same again, gently": softly[softly["first"] == 2],
        "0.032": frame[first == 3],
        "0.01 and below": frame[first > 3],
    }
    for name, rows in parts.items():
        cells = [str(rows.groupby(["first", "last"]).ngroups)]
        cells += [span(rows["in_theory"], ".2g"), span(rows["needed"], ",.0f")]
        for offset in OFFSETS:
            some = rows[rows["offset"] == offset]
            inside, outside = (some[name] >= 0.5 for name in ("score", "outside"))
            counts = (inside.sum(), outside.sum(), (inside & outside).sum())
            cells.append(f"{', '.join(map(str, counts))} of {len(some)}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def span(values, form):
    """The least and the largest value as text."""
    low, high = (f"{value:{form}}" for value in (values.min(), values.max()))
    return low if low == high else f"{low} to {high}"


def length_table(frame):
    """The margin of ranges from the highest frequency on, by the number of offsets."""
    from slashpatch.maths.interference import margins_by_cutoff

    lengths = (64, 256, 4096)
    lines = [
        "| frequencies | "
        + " | ".join(f"margin, {n:,} offsets" for n in lengths)
        + " | trained at 64: score at 64 | at 256 |",
        "|---|" + "--:|" * 5,
    ]
    for last in (0, 1, 2, 3, 7):
        margins = [float(margins_by_cutoff(THETAS, 1, n)[0, last]) for n in lengths]
        rows = frame[(frame["offset"] == 1) & (frame["first"] == 0) & (frame["last"] == last)]
        cells = [f"{margin:.2g}" for margin in margins]
        cells += [f"{rows[name].mean():.2f}" for name in ("score", "longer")]
        name = "1 alone" if last == 0 else f"1 to {THETAS[last]:.2g}"
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main():
    """Train, measure, and write the picture and the tables."""
    import slashpatch as sp
    from slashpatch.reporting.figures import save_figure
    from slashpatch.reporting.margins_figure import margins_figure
    from slashpatch.theory import frequency_margins

    torch.set_num_threads(1)
    frame = with_predictors(trained("trained", RANGES))
    gentle = with_predictors(trained("gentle", MIDDLE, **GENTLE))
    model = sp.load(device="cpu")
    scan = sp.scan(model, n_prompts=8, max_tokens=N_TOKENS, profile_offsets=N_TOKENS)
    in_training = frequency_margins(THETAS, n_offsets=LENGTH)
    sets = frame[frame["offset"] == 1].groupby(["first", "last"])
    in_training["score"] = sets["score"].mean().to_numpy()
    moments = scan.require_moments()
    amplitude, phase = moments.amplitude_and_phase(HEAD)
    own = frequency_margins(
        moments.rotary(HEAD.layer).inv_freq,
        n_offsets=N_TOKENS,
        amplitudes=amplitude,
        phases=phase,
    )
    panels = {
        "Δ=1 in theory (colour) and in trained models (circles)": in_training,
        f"Δ=1 in {HEAD} of SmolLM2, its own amplitudes and phases": own,
    }
    save_figure(margins_figure(panels), HERE.parent / "docs" / "pictures" / "cutoffs.png")
    head = [
        f"{machine()['processor']}, torch {torch.__version__}; sequences of {LENGTH} positions, "
        f"{len(SEEDS)} seeds, 500 steps at the default rate of 20, gently: "
        f"{GENTLE['steps']} steps at {GENTLE['learning_rate']:g}. Below Δ: runs with a slash score "
        "of at least 0.5 in training, out of distribution, and both. Needed amplitude in nats.",
        "",
    ]
    page = "theory-frequencies"
    write_table(page, "training", head + training_table(frame, gentle))
    write_table(page, "correlations", correlation_table(frame))
    write_table(page, "lengths", length_table(frame))
    write_table(page, "heads", head_table(scan))
    write_table(page, "dropped", drop_table(model, scan))


if __name__ == "__main__":
    main()
