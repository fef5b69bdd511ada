"""Which ranges of frequencies single out an offset, in theory, in training and in real heads.

`python benchmarks/cutoffs.py` trains 216 small models (twenty minutes on one core; a stopped run
goes on where it was), measures heads of the default model, draws docs/pictures/cutoffs.png and
writes the tables of docs/theory-frequencies.md.
"""

import itertools
from pathlib import Path

from common import HERE

N_PAIRS = 8
OFFSETS = (1, 3)
SEEDS = (0, 1, 2)
KAPPA = 0.3
KEPT = HERE.parent / "build" / "cutoffs"
#: What is kept of each training run.
MEASURED = ("steps", "score", "matching", "margin", "outside", "longer", "alike", "amplitude", "r1")


def trained(folder: Path):
    """A row for each range of frequencies, offset and seed: what training ends with."""
    import pandas as pd

    from slashpatch.data.journal import Journal
    from slashpatch.theory import Settings, train

    every = Settings(n_pairs=N_PAIRS).thetas().tolist()
    ranges = list(itertools.combinations_with_replacement(range(N_PAIRS), 2))
    todo = list(itertools.product(OFFSETS, ranges, SEEDS))
    header = {"kappa": KAPPA, "frequencies": every, "offsets": OFFSETS, "measured": MEASURED}
    header = {name: list(x) if isinstance(x, tuple) else x for name, x in header.items()}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "trained.jsonl"
    with Journal(path, header, True, range(len(todo)), len(MEASURED)) as journal:
        for index, (offset, (first, last), seed) in enumerate(todo):
            if index in journal.rows:
                continue
            run = train(
                frequencies=every[first : last + 1], offset=offset, seed=seed, progress=False
            )
            journal.write({index: measured(run)})
            print(offset, first, last, seed, journal.rows[index], flush=True)
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


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    trained(Path("/tmp/cutoffs"))
