"""The shallow transformer with and without its conditions. Part of `make bench`.

`python benchmarks/theory.py` takes about five minutes on two cores and writes the table
of docs/theory.md.
"""

import math

from common import THREADS, machine, seconds, write_results, write_table

SEEDS = (0, 1, 2)
KAPPA = 0.3
ADAM = {"optimizer": "adam"}
#: The first three are to be seen in under a minute together.
RUNS = {
    "default: copying, Δ=1, cone 1, all frequencies": {},
    "cone 0": {"cone": 0.0},
    "lowest third of the frequencies": {"frequencies": "low"},
    "highest third": {"frequencies": "high"},
    "Δ=2": {"offset": 2},
    "Δ=3": {"offset": 3},
    "regression": {"task": "regression"},
    "full batch of 256 sequences": {"n_sequences": 256},
    "Adam": ADAM,
    "Adam, cone 0": {**ADAM, "cone": 0.0},
    "Adam, lowest third of the frequencies": {**ADAM, "frequencies": "low"},
}


def main():
    """Train, and write results.json and the table of docs/theory.md."""
    import torch

    from slashpatch import theory
    from slashpatch.reporting.theory import over_seeds

    torch.set_num_threads(THREADS)
    figures, lines = {}, []
    for name, knobs in RUNS.items():
        runs = []

        def train(runs=runs, knobs=knobs):
            runs += [theory.train(**knobs, seed=seed) for seed in SEEDS]

        took = seconds(train)
        soon = [run.time_to(KAPPA) for run in runs]
        matched = [run.time_to(KAPPA, "matching") for run in runs]
        scores = [run.score for run in runs]
        outside = [run.out_of_distribution() for run in runs]
        highest = max(row[f"score_{run.settings.offset}"] for run in runs for row in run.rows)
        figures[name] = {
            "steps_to_slash": [step if math.isfinite(step) else None for step in soon],
            "steps_to_matching": [step if math.isfinite(step) else None for step in matched],
            "score": scores,
            "out_of_distribution": outside,
            "highest_score": highest,
            "seconds": took,
        }
        cells = [over_seeds(soon, ".0f"), over_seeds(matched, ".0f"), over_seeds(scores)]
        cells += [over_seeds(outside), f"{took:.0f} s"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    write_results("theory", {"runs": figures, "kappa": KAPPA}, {"torch": torch.__version__})
    head = [
        f"{machine()['processor']}, torch {torch.__version__}; 500 steps, three seeds: mean ± half "
        "Student's 95 % interval.",
        "",
        f"| settings | steps until the slash passes {KAPPA} | until layer 2 does | final score "
        "| out of distribution | three runs |",
        "|---|---|---|---|---|---|",
    ]
    write_table("theory", "theory", head + lines)


if __name__ == "__main__":
    main()
