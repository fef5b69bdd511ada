"""How well a sweep splits over worker processes of one thread each. Part of `make bench`.

`python benchmarks/workers.py [heads] [rounds]` takes about twenty minutes on two cores. Nothing
else may run meanwhile: two workers then share what the system leaves them, and look no faster than
one.
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from common import in_turns, setting, write_results, write_table

#: Heads of the sweep, spread over all layers; its prompts; and rounds.
HEADS, SIZE, ROUNDS = 90, {"n_prompts": 16, "max_tokens": 65}, 3
WORKERS = 2


class AllStarted:
    """A job that does nothing but wait until all workers have the model: the start is left."""

    def __init__(self, folder, workers):
        self.folder, self.workers = Path(folder), workers

    def start(self, model):
        def wait(index):
            (self.folder / str(os.getpid())).touch()
            while len(list(self.folder.iterdir())) < self.workers:
                time.sleep(0.05)

        return wait


def main():
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", RAY_ADDRESS="local")
    import torch

    import slashpatch as sp
    from slashpatch.bridge.provenance import provenance
    from slashpatch.patching.worker_pool import units_of

    n_heads = int(sys.argv[1]) if len(sys.argv) > 1 else HEADS
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else ROUNDS
    torch.set_num_threads(1)
    model = sp.load(device="cpu")
    every = [sp.Head(la, h) for la in range(model.cfg.n_layers) for h in range(model.cfg.n_heads)]
    heads = every[:: max(1, len(every) // n_heads)][:n_heads]
    frames = {}

    def sweep(workers):
        frames[workers] = sp.sweep(model, heads=heads, workers=workers, **SIZE).frame

    def start(workers):
        with tempfile.TemporaryDirectory() as folder:
            job = AllStarted(folder, workers)
            list(units_of(model, job, range(workers), "starting", sp.Workers(workers)))

    runs = {"here": lambda: sweep(None)}
    for n in (1, WORKERS):
        runs[f"{n}"] = lambda n=n: sweep(n)
        runs[f"start {n}"] = lambda n=n: start(n)
    found = in_turns(runs, rounds, warm_up=False)
    for frame in frames.values():
        assert frame.equals(frames[None]), "workers gave other numbers"

    for n in ("1", f"{WORKERS}"):
        for whole, begin in zip(found[n], found[f"start {n}"], strict=True):
            if whole < 3 * begin:
                raise SystemExit(
                    f"a sweep of {whole:.0f} s, of which {begin:.0f} s are the start of {n} "
                    "workers, tells nothing; take more heads"
                )

    def median(of):
        return statistics.median(map(of, range(rounds)))

    whole = median(lambda i: found["1"][i] / (WORKERS * found[f"{WORKERS}"][i]))
    rows = median(
        lambda i: (
            (found["1"][i] - found["start 1"][i])
            / (WORKERS * (found[f"{WORKERS}"][i] - found[f"start {WORKERS}"][i]))
        )
    )
    seconds = {name: statistics.median(times) for name, times in found.items()}
    source = provenance(model)
    figures = {"seconds": seconds, "efficiency": whole, "efficiency without the start": rows}
    write_results("workers", {"heads": len(heads), "rounds": rounds, **figures, **SIZE}, source)
    n = len(heads)
    lines = [
        f"{setting(source).replace('2 threads', '1 thread a process')}; a sweep of {n} heads, "
        f"{SIZE['n_prompts']} prompts of {SIZE['max_tokens']} tokens; medians of {rounds}, in "
        "turns. The rows are the same, bit for bit.",
        "",
        "| processes | whole call | of it the start | rows per second after it |",
        "|---|---|---|---|",
        f"| this one | {seconds['here']:.1f} s | | {n / seconds['here']:.2f} |",
    ]
    for name in ("1", f"{WORKERS}"):
        begin = seconds[f"start {name}"]
        lines.append(
            f"| {name} worker{'s' * (name != '1')} | {seconds[name]:.1f} s | {begin:.1f} s "
            f"| {n / (seconds[name] - begin):.2f} |"
        )
    lines += [
        "",
        f"Efficiency of {WORKERS} workers against 1: {whole:.2f} of the whole call, {rows:.2f} "
        "without the start (1 is perfect).",
    ]
    write_table("costs", "workers", lines)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
