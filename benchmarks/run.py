"""What slashpatch costs, beside the same run without it. `make bench`; takes a few minutes.

Edits, monitors and loading; `fused.py` times the fused engine. Both sides of a ratio alternate
within one run; medians are reported. Results go to benchmarks/results.json with the machine and
versions.
"""

import statistics
import subprocess
import sys
from functools import partial

import torch
from common import (
    ROUNDS,
    THREADS,
    paired,
    seconds,
    setting,
    write_results,
    write_table,
)
from rich.console import Console
from rich.table import Table

import slashpatch as sp
from slashpatch.bridge.provenance import provenance
from slashpatch.data.prompts import prompt_set


def fastest_start(*arguments):
    """Seconds of `python -m slashpatch.cli ARGUMENTS`, the median of several."""
    command = [sys.executable, "-m", "slashpatch.cli", *arguments]
    return statistics.median(
        seconds(lambda: subprocess.run(command, check=True, capture_output=True))
        for _ in range(ROUNDS)
    )


def table_lines(figures, plain, source):
    """The table for docs/costs.md."""
    lines = [
        f"{setting(source)}; medians of {ROUNDS}, both sides of a ratio in turns.",
        "",
        "| figure | with slashpatch | without | ratio |",
        "|---|---|---|---|",
    ]
    for name, row in figures.items():
        lines.append(
            f"| {name} | {row['seconds']:.2f} s | {row['plain_seconds']:.2f} s "
            f"| {row['ratio']:.2f} |"
        )
    return [*lines, *(f"| {name} | {value:.2f} s | | |" for name, value in plain.items())]


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
        "per-head keys": {
            "FreezeBand": sp.FreezeBand(eight, "high"),
            "SwapBands": sp.SwapBands(eight, "high", "low"),
            "SetFrequencies": sp.SetFrequencies(eight, lambda theta: theta / 2),
            "RankOne of qk": sp.RankOne(eight, "qk", basis),
            "PlantSlash": sp.PlantSlash(eight, 2),
        },
    }
    monitor = partial(sp.SlashMonitor, model)
    figures = {
        "scan of 16 offsets by the bridge / forward, 1 x 1,024 tokens": paired(
            lambda: sp.scan(model, one, range(16), "bridge"), forward
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
    source = provenance(model)
    write_results("costs", {"ratios": figures, "seconds": plain}, source)
    write_table("costs", "bench", table_lines(figures, plain, source))
    console.print(setting(source))
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
