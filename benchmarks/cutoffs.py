"""Which ranges of frequencies single out an offset, in theory, in training and in real heads.

`python benchmarks/cutoffs.py` trains 294 small models (half an hour on one core; a stopped run
goes on where it was), measures heads of the default model, draws docs/pictures/cutoffs.png and
writes the tables of docs/theory-frequencies.md.
"""

import itertools

import torch
from common import HERE, machine, write_table

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
#: Positions of the sequences of training, and tokens of the prompts of the real model.
LENGTH, N_TOKENS = 64, 256
HEAD = Head(16, 0)
#: What is dropped of a head's frequencies, and what is left, by name.
CUTS = (
    ("all", "", "share 0-1"),
    ("highest half", "share 0.5-1", "share 0-0.5"),
    ("highest quarter", "share 0.25-1", "share 0-0.25"),
    ("highest eighth", "share 0.125-1", "share 0-0.125"),
    ("all but the highest eighth", "share 0-0.125", "share 0.125-1"),
    ("all but the highest quarter", "share 0-0.25", "share 0.25-1"),
    ("lowest half", "share 0-0.5", "share 0.5-1"),
)
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
    frame["bound"] = 1 - THETAS[frame["first"].to_numpy()].cos().numpy()
    return frame


def rank_correlation(x, y, draws=4000):
    """Spearman's correlation, and its 95 % interval by bootstrap over the entries, as text."""
    import numpy as np
    from scipy.stats import spearmanr

    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    generator = np.random.default_rng(0)
    chosen = generator.integers(len(x), size=(draws, len(x)))
    with np.errstate(invalid="ignore"):
        resampled = [spearmanr(x[some], y[some])[0] for some in chosen]
    low, high = np.nanquantile(resampled, (0.025, 0.975))
    return f"{spearmanr(x, y)[0]:.2f} [{low:.2f}, {high:.2f}]"


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
    lines = [
        "| highest θ | sets | margin | needed amplitude (nats) | "
        + " | ".join(
            f"Δ={offset}: runs with score ≥ 0.5 | out of distribution too" for offset in OFFSETS
        )
        + " |",
        "|---|--:|---|---|" + "--:|--:|" * len(OFFSETS),
    ]
    parts = [
        (f"{theta:.2g}, {how}", frame[(frame["first"] == at) & (alone == (frame["last"] == at))])
        for at, theta in enumerate(THETAS[:3].tolist())
        for how, alone in (("alone", True), ("with lower ones", False))
    ]
    parts[4:4] = [
        ("0.32, with lower ones, gentle", gentle[(gentle["first"] == 1) & (gentle["last"] > 1)])
    ]
    parts += [
        ("0.1, with lower ones, gentle", gentle[(gentle["first"] == 2) & (gentle["last"] > 2)]),
        ("0.032", frame[frame["first"] == 3]),
        ("0.01 and below", frame[frame["first"] > 3]),
    ]
    for name, rows in parts:
        ranges = [span(rows["in_theory"], ".2g"), span(rows["needed"], ".2g")]
        cells = [str(rows.groupby(["first", "last"]).ngroups), *ranges]
        for offset in OFFSETS:
            some = rows[rows["offset"] == offset]
            both = (some["score"] >= 0.5) & (some["outside"] >= 0.5)
            cells += [f"{(some['score'] >= 0.5).sum()} of {len(some)}", str(both.sum())]
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


def head_table(scan):
    """Margins of slash heads and of all others, each at its best offset from 1."""
    import slashpatch as sp
    from slashpatch.maths.bands import band_pairs
    from slashpatch.maths.interference import margins_by_cutoff, profile_score
    from slashpatch.maths.resampling import mean_inference

    moments = scan.require_moments()
    best = scan.scores[:, :, 1:].max(-1)
    kept = {
        "all": "high+medium+low",
        "without low": "high+medium",
        "high alone": "high",
        "without high": "medium+low",
        "low alone": "low",
    }
    margins = {name: [] for name in kept}
    alike = []
    for layer, head in itertools.product(*map(range, best.values.shape)):
        theta = moments.rotary(layer).inv_freq
        at = int(best.indices[layer, head]) + 1
        amplitude, phase = moments.amplitude_and_phase(sp.Head(layer, head))
        for name, band in kept.items():
            some = list(band_pairs(band, theta))
            found = margins_by_cutoff(theta[some], at, N_TOKENS, amplitude[some], phase[some])
            margins[name].append(float(found[0, -1]))
        alike.append(profile_score(moments.profile(sp.Head(layer, head)).predicted, at))
    scores = best.values.flatten()
    slash = scores >= 0.1
    groups = {"slash heads": slash, "all others": ~slash}
    titles = " | ".join(f"{len(scores[some])} {name}" for name, some in groups.items())
    lines = [f"| frequencies | {titles} |", "|---|---|---|"]
    for name, values in margins.items():
        cells = []
        for some in groups.values():
            sample = torch.tensor(values, dtype=torch.float64)[some]
            low, high, _ = mean_inference(sample)
            share = f"{(sample > 0).sum()} of {len(sample)} above 0"
            cells.append(f"{sample.mean():.3f} [{low:.3f}, {high:.3f}], {share}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    x = torch.tensor(margins["all"])
    said = [f"margin {rank_correlation(x, scores)}"]
    said += [f"score of the predicted profile {rank_correlation(alike, scores)}"]
    return [
        *lines,
        "",
        "Spearman's correlation with the measured score, over all heads (95 % "
        f"interval by bootstrap over heads): {', '.join(said)}.",
    ]


def drop_table(model, scan):
    """Measured scores of three slash heads with a part of their frequencies dropped."""
    import slashpatch as sp
    from slashpatch.maths.bands import band_pairs
    from slashpatch.maths.interference import margins_by_cutoff, profile_score

    moments = scan.require_moments()
    lines = ["| head | kept frequencies | margin | score if all tokens were alike | measured |"]
    lines.append("|---|---|--:|--:|--:|")
    alike, measured = [], []
    for found in scan.slash_heads(0.1, 1)[:3]:
        head, at = found.head, found.offset
        theta = moments.rotary(head.layer).inv_freq
        amplitude, phase = moments.amplitude_and_phase(head)
        for name, dropped, kept in CUTS:
            some = list(band_pairs(kept, theta))
            margins = margins_by_cutoff(theta[some], at, N_TOKENS, amplitude[some], phase[some])
            angle = torch.arange(N_TOKENS)[:, None] * theta[some] + phase[some]
            alike.append(profile_score((amplitude[some] * angle.cos()).sum(-1), at))
            with sp.patch(model, *([sp.DropBand(head, dropped)] if dropped else [])):
                again = sp.scan(
                    model,
                    offsets=[at],
                    n_prompts=4,
                    max_tokens=N_TOKENS,
                    moments=False,
                    progress=False,
                )
            measured.append(float(again.scores[head.layer, head.head, 0]))
            margin = float(margins[0, -1])
            cells = f"{name} | {margin:.3f} | {alike[-1]:.2f} | {measured[-1]:.2f}"
            lines.append(f"| {head}, Δ={at} | {cells} |")
            print(lines[-1], flush=True)
    return [
        *lines,
        "",
        f"Spearman's correlation of the last two columns: {rank_correlation(alike, measured)}.",
    ]


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
    head = [f"{machine()['processor']}, torch {torch.__version__}.", ""]
    page = "theory-frequencies"
    write_table(page, "training", head + training_table(frame, gentle))
    write_table(page, "correlations", correlation_table(frame))
    write_table(page, "lengths", length_table(frame))
    write_table(page, "heads", head_table(scan))
    write_table(page, "dropped", drop_table(model, scan))


if __name__ == "__main__":
    main()
