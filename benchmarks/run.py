"""What slashpatch costs, beside the same run without it. `make bench`; takes a few minutes.

Both sides of a ratio alternate within one run; medians are reported. Results go to
benchmarks/results.json with the machine and versions.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from rich.console import Console
from rich.table import Table

import slashpatch as sp
from slashpatch.prompts import prompt_set
from slashpatch.provenance import provenance

HERE = Path(__file__).parent
THREADS = 2
ROUNDS = 5


def seconds(run):
    """Wall-clock time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def paired(ours, plain, rounds=ROUNDS):
    """Median seconds of both and the median of their ratios, taken in turns after a warm-up."""
    ours(), plain()
    pairs = [(seconds(ours), seconds(plain)) for _ in range(rounds)]
    return {
        "seconds": statistics.median(a for a, _ in pairs),
        "plain_seconds": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(a / b for a, b in pairs),
        "rounds": rounds,
    }


def fastest_start(*arguments):
    """Seconds of `python -m slashpatch.cli ARGUMENTS`, the median of several."""
    command = [sys.executable, "-m", "slashpatch.cli", *arguments]
    return statistics.median(
        seconds(lambda: subprocess.run(command, check=True, capture_output=True))
        for _ in range(ROUNDS)
    )


def processor():
    """The processor's name, where Linux tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")


def write_readme_table(results):
    """Put the figures between the README's markers."""
    machine, versions = results["machine"], results["versions"]
    lines = [
        f"{machine['processor']}, {machine['threads']} threads, torch {versions['torch']}, "
        f"transformer-lens {versions['transformer-lens']}, {results['model']}; "
        f"medians of {ROUNDS}, both sides of a ratio in turns.",
        "",
        "| figure | with slashpatch | without | ratio |",
        "|---|---|---|---|",
    ]
    for name, row in results["ratios"].items():
        lines.append(
            f"| {name} | {row['seconds']:.2f} s | {row['plain_seconds']:.2f} s "
            f"| {row['ratio']:.2f} |"
        )
    lines += [f"| {name} | {value:.2f} s | | |" for name, value in results["seconds"].items()]
    readme = HERE.parent / "README.md"
    before, _, rest = readme.read_text().partition("<!-- bench: begin -->")
    after = rest.partition("<!-- bench: end -->")[2]
    table = "\n".join(lines)
    readme.write_text(f"{before}<!-- bench: begin -->\n{table}\n<!-- bench: end -->{after}")


def main():
    torch.set_num_threads(THREADS)
    console = Console()
    model = sp.load(device="cpu")
    warm = statistics.median(seconds(lambda: sp.load(device="cpu")) for _ in range(ROUNDS))
    long = torch.stack(prompt_set(model, n_prompts=8, max_tokens=1024).tokens)
    one, short = long[:1], long[:1, :32]

    def forward():
        with torch.no_grad():
            model(one, return_type=None, logits_to_keep=1)

    def generate():
        model.generate(short, max_new_tokens=32, do_sample=False, stop_at_eos=False, verbose=False)

    def under(context, run):
        def inside():
            with context():
                run()

        return inside

    eight = [entry.head for entry in sp.scan(model, long[:1, :256], 1).slash_heads()[:8]]
    knock_out = partial(sp.patch, model, sp.KnockOut(eight, 1))
    ablate = partial(sp.patch, model, sp.AblateHeads(eight))
    basis = sp.fit_rank_one(model, eight, long[:2, :256])
    on_eight = {
        "query only": {
            "ShiftSlash": sp.ShiftSlash(eight, 1),
            "DropBand": sp.DropBand(eight, "high"),
            "ScaleBand": sp.ScaleBand(eight, "low", 1.5),
            "RankOne of q": sp.RankOne(eight, "q", basis),
        },
        "keys of its own": {
            "FreezeBand": sp.FreezeBand(eight, "high"),
            "SwapBands": sp.SwapBands(eight, "high", "low"),
            "SetFrequencies": sp.SetFrequencies(eight, lambda theta: theta / 2),
            "RankOne of qk": sp.RankOne(eight, "qk", basis),
            "PlantSlash": sp.PlantSlash(eight, 2),
        },
    }
    monitor = partial(sp.SlashMonitor, model)
    figures = {
        "scan of 16 offsets / forward, 1 x 1,024 tokens": paired(
            lambda: sp.scan(model, one, range(16)), forward
        ),
        "forward with KnockOut on 8 heads / forward, 1,024 tokens": paired(
            under(knock_out, forward), forward
        ),
        "generation under SlashMonitor / generation, 32 tokens": paired(
            under(monitor, generate), generate
        ),
        "generation with KnockOut on 8 heads / generation, 32 tokens": paired(
            under(knock_out, generate), generate
        ),
        "generation with 8 heads ablated / generation, 32 tokens": paired(
            under(ablate, generate), generate
        ),
    }
    for kind, edits in on_eight.items():
        for name, edit in edits.items():
            label = f"generation with {name} on 8 heads ({kind}) / generation, 32 tokens"
            figures[label] = paired(under(partial(sp.patch, model, edit), generate), generate)
    plain = {
        "warm load of the default model": warm,
        "scan of 8 prompts of 1,024 tokens, 16 offsets": seconds(
            lambda: sp.scan(model, long, range(16))
        ),
        "slashpatch --help": fastest_start("--help"),
        "slashpatch --version": fastest_start("--version"),
    }
    results = {
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": THREADS,
            "system": platform.platform(),
        },
        **provenance(model),
        "ratios": figures,
        "seconds": plain,
    }
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    write_readme_table(results)
    console.print(f"{processor()}, {THREADS} threads, torch {torch.__version__}")
    table = Table("figure", "ours (s)", "plain (s)", "ratio")
    for name, row in figures.items():
        table.add_row(
            name, f"{row['seconds']:.2f}", f"{row['plain_seconds']:.2f}", f"{row['ratio']:.2f}"
        )
    for name, value in plain.items():
        table.add_row(name, f"{value:.2f}", "", "")
    console.print(table)


if __name__ == "__main__":
    main()
