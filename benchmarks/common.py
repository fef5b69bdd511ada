"""What every benchmark shares: threads, timing in turns, the machine, results, tables of docs/."""

import json
import os
import platform
import statistics
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
THREADS = 2
ROUNDS = 5


def seconds(run):
    """Wall-clock time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def in_turns(runs, rounds=ROUNDS, warm_up=True):
    """Seconds of each run in each round, the runs taken in turns, after each ran once."""
    for run in runs.values() if warm_up else ():
        run()
    found = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            found[name].append(seconds(run))
    return found


def ratio(found, ours, plain):
    """Median seconds of two runs, and the median of their ratios round by round."""
    pairs = list(zip(found[ours], found[plain], strict=True))
    return {
        "seconds": statistics.median(a for a, _ in pairs),
        "plain_seconds": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(a / b for a, b in pairs),
        "rounds": len(pairs),
    }


def paired(ours, plain, rounds=ROUNDS):
    """Median seconds of both and the median of their ratios."""
    return ratio(in_turns({"ours": ours, "plain": plain}, rounds), "ours", "plain")


def machine():
    """Processor (where Linux tells), cores, threads and system."""
    processor = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if "model name" in line]
        processor = names[0].split(":")[1].strip() if names else processor
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": THREADS,
        "system": platform.platform(),
    }


def read_results(part):
    """What was measured before, or nothing."""
    return json.loads(RESULTS.read_text()).get(part, {}) if RESULTS.exists() else {}


def write_results(part, figures, provenance):
    """Put one benchmark's figures into results.json, beside the other's."""
    whole = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    whole[part] = {**figures, "machine": machine(), **provenance}
    RESULTS.write_text(json.dumps(whole, indent=1) + "\n")


def write_table(page, part, lines, by=""):
    """Put a table between the comment marks for `part` in docs/`page`.md."""
    path = HERE.parent / "docs" / f"{page}.md"
    before, begin, rest = path.read_text().partition(f"<!-- {part}: begin {by}-->")
    _, end, after = rest.partition(f"<!-- {part}: end -->")
    if not (begin and end):
        raise SystemExit(f"{path} has no comment marks for {part}")
    table = "\n".join(lines)
    path.write_text(f"{before}{begin}\n{table}\n{end}{after}")


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


def setting(provenance):
    """One line that says on which machine, with which versions and which model."""
    versions, here = provenance["versions"], machine()
    return (
        f"{here['processor']}, {THREADS} threads, torch {versions['torch']}, transformers "
        f"{versions['transformers']}, transformer-lens {versions['transformer-lens']}, "
        f"{provenance['model']} in {provenance['dtype']}"
    )
