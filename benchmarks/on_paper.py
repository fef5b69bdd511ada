"""What a large screen and sweep would cost, computed from what was measured here. Not run on a GPU.

1,024 heads × 16 offsets × 3 edits of a model of 8 billion weights, on 8 and 64 GPUs. Measured, from
results.json: how many forward passes a variant of a sweep and the estimates of a screen take
(benchmarks/screen.py), and how well rows split over workers (benchmarks/workers.py). Assumed, and
said so in the table: a GPU's rate, and its price. Writes a table of docs/how-to/workers.md.
"""

import statistics

from common import read_results, write_results, write_table

N_HEADS, N_OFFSETS, N_EDITS = 1024, 16, 3
WEIGHTS = 8e9
#: Assumed: half-precision operations per second that a forward pass reaches, and dollars an hour.
RATE, PRICE = 4e14, 2.5
PROMPTS = ((16, 512), (128, 2048))
GPUS = (8, 64)


def gpu_seconds(tokens, measured):
    """GPU-seconds of both ways: every variant exactly, and three screens of all heads, offsets."""
    forward = 2 * WEIGHTS * tokens / RATE
    variants = N_HEADS * N_OFFSETS * N_EDITS
    exact = variants * measured["passes_of_variant"] * forward
    # A screen runs its estimates on one half of the prompts, and variants on the other.
    each = measured["passes_of_estimates"] + measured["run"] * measured["passes_of_variant"]
    return exact, N_EDITS * each * forward / 2


def shown(seconds):
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds" if seconds >= 1 else "under a second"


def main():
    screen, workers = read_results("screen"), read_results("workers")
    if not screen or not workers:
        raise SystemExit("run benchmarks/screen.py and benchmarks/workers.py first")
    share = workers["efficiency without the start"]
    # The rows that a screen runs do not grow with those it estimates: top, flagged and audit.
    run = statistics.fmean(row["run"] for row in screen["rows"])
    measured = {**screen["passes"], "run": run}
    lines = [
        "| prompts | way | GPU-hours | price | " + " | ".join(f"{n} GPUs" for n in GPUS) + " |",
        "|---|---|---|---|" + "---|" * len(GPUS),
    ]
    figures = {}
    for n_prompts, n_tokens in PROMPTS:
        both = dict(
            zip(("exactly", "by screen"), gpu_seconds(n_prompts * n_tokens, measured), strict=True)
        )
        for way, seconds in both.items():
            times = [shown(seconds / n / share) for n in GPUS]
            hours = seconds / 3600
            lines.append(
                f"| {n_prompts} of {n_tokens:,} tokens | {way} | {hours:,.2f} | "
                f"${hours * PRICE:,.2f} | {' | '.join(times)} |"
            )
            figures[f"{n_prompts} x {n_tokens} {way}"] = hours
    lines += [
        "",
        f"{N_HEADS:,} heads × {N_OFFSETS} offsets × {N_EDITS} edits, {WEIGHTS / 1e9:.0f} billion "
        "weights. **On paper**: nothing of it was run. Measured on the default model: a variant of "
        f"a sweep takes {measured['passes_of_variant']:.2f} forward passes, the estimates of a "
        f"screen at sixteen offsets {measured['passes_of_estimates']:.1f}, a screen runs "
        f"{measured['run']:.0f} variants exactly, and two workers are "
        f"{share:.2f} times as fast as twice one. Assumed: {RATE / 1e12:.0f} TFLOP/s in a forward "
        "pass (2 operations a weight and token; attention, the time between kernels and loading "
        "left out), "
        f"${PRICE:.2f} an hour, the same efficiency on more GPUs, and that the model fits one GPU.",
    ]
    write_table("how-to/workers", "on paper", lines)
    write_results("on paper", {"gpu_hours": figures, "rate": RATE, "price": PRICE}, {})
    print("\n".join(lines))


if __name__ == "__main__":
    main()
