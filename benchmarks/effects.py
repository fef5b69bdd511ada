"""What slash heads pass on in the default model, and what a sweep costs. Part of `make bench`.

`python benchmarks/effects.py [effects] [sweep]` takes about ten minutes on two cores and writes
the table of docs/effects.md.
"""

import sys

from common import (
    THREADS,
    in_turns,
    ratio,
    read_results,
    setting,
    write_results,
    write_table,
)

#: The five strongest heads at Δ=1 in the default model (`slashpatch scan`).
FIVE = "(L16H0, L11H1, L1H2, L19H3, L2H1)"
CONTROLS = ("random-heads:8", "matched-heads:16", "other-offsets:8")
#: All heads of four layers, which lie in the middle on the average, as those of a whole sweep do.
SAMPLE = [(layer, head) for layer in (4, 11, 18, 25) for head in range(9)]
SIZE = {"n_prompts": 8, "max_tokens": 101}


def value(row, name, low, high):
    """A figure with its interval."""
    return f"{row[name]:.2f} [{row[low]:.2f}, {row[high]:.2f}]"


def copying_loss(model, sp):
    """Copying loss, clean, under the edit, and under the controls."""
    found = sp.measure(
        model, "KnockOut(L16H0, 1)", "copying", controls=CONTROLS, n_prompts=16, max_tokens=101
    )
    values = found.tables["values"]
    from slashpatch.effects.statistics import interval

    def of(edit):
        import torch

        rows = values[values["edit"] == edit].sort_values("prompt")["value"].to_numpy()
        low, high = interval(torch.tensor(rows))
        return f"{rows.mean():.2f} [{float(low):.2f}, {float(high):.2f}]"

    rows = {
        "copying loss, clean": of("clean"),
        "copying loss, KnockOut(L16H0, 1)": of("KnockOut(L16H0, offsets=1)"),
    }
    draws = found.tables["draws"]
    for control in CONTROLS:
        own = draws[draws["control"] == control.partition(":")[0]]["effect"]
        rows[f"its effect beside {control}"] = (
            value(found.frame.set_index("against").loc[control], "effect", "low", "high")
            + f" beyond their mean; single draws {own.min():+.3f} to {own.max():+.3f}"
        )
    return rows


def lags(model, sp):
    """Which lag is copied, with and without moved slashes."""
    found = sp.copying(model, f"ShiftSlash({FIVE}, 1)")
    rows = {}
    for edit, name in (("clean", "clean"), (None, "ShiftSlash(five heads, 1)")):
        own = found.frame[(found.frame["edit"] == "clean") == (edit == "clean")]
        for lag in (1, 2):
            row = own[own["lag"] == lag].iloc[0]
            rows[f"top-1 at lag {lag}, {name}"] = value(row, "top1", "top1_low", "top1_high")
    return rows


def flow(model, sp):
    """The flow by offset before and after, and where it changes."""
    found = sp.flow(model, edits=f"KnockOut({FIVE}, 1)")
    rows = {}
    clean = found.frame[found.frame["edit"] == "clean"].set_index("offset")
    edited = found.frame[found.frame["edit"] != "clean"].set_index("offset")
    for offset in (1, 2, 3, 4, 8, 16):
        before = value(clean.loc[offset], "flow", "flow_low", "flow_high")
        after = value(edited.loc[offset], "flow", "flow_low", "flow_high")
        rows[f"flow at Δ={offset}, clean → KnockOut(five heads, 1)"] = (
            f"{before} → {after}; q = {edited.loc[offset, 'q']:.3f}"
        )
    (rows["in words"],) = found.remarks
    return rows


def sweep_cost(model, sp):
    """Seconds of a sweep of a sample of heads, and of patching and running the whole model."""
    from slashpatch.effects.metrics.by_name import as_metric
    from slashpatch.effects.running.conditions import conditions
    from slashpatch.effects.running.evaluate import evaluate
    from slashpatch.effects.running.evaluation import MetricRunner
    from slashpatch.effects.running.inputs import prompts_for

    heads = [sp.Head(*at) for at in SAMPLE]
    runner = MetricRunner(model, [as_metric("copying")])
    prompts = prompts_for(model, runner.metrics, None, **SIZE, seed=0)
    edits = conditions([sp.KnockOut(head, 1) for head in heads])
    found = {}

    def swept():
        found["swept"] = sp.sweep(model, heads=heads, **SIZE).frame.set_index("name")["effect"]

    def naive():
        clean, *values = evaluate(model, runner, prompts, edits)
        found["naive"] = [float((one[0] - clean[0]).mean()) for one in values]

    times = ratio(
        in_turns({"swept": swept, "naive": naive}, rounds=2, warm_up=False), "swept", "naive"
    )
    assert list(found["swept"][[str(head) for head in heads]]) == found["naive"]
    return times


def main(parts):
    """Measure `effects`, `sweep` or both; what is not measured now stays as it was."""
    import torch

    import slashpatch as sp
    from slashpatch.bridge.provenance import provenance

    torch.set_num_threads(THREADS)
    model = sp.load(device="cpu")
    source = provenance(model, seed=0)
    figures = read_results("effects")
    if "effects" in parts:
        figures["rows"] = {}
        for part in (copying_loss, lags, flow):
            figures["rows"] |= part(model, sp)
            write_results("effects", figures, source)
    if "sweep" in parts:
        figures["sweep"] = sweep_cost(model, sp)
        write_results("effects", figures, source)
    times = figures.get("sweep", {"seconds": 0, "plain_seconds": 0, "ratio": 0})
    lines = [
        f"{setting(source)}; 16 prompts, seed 0, 95 % intervals over prompts. Five heads: "
        f"{FIVE[1:-1]}.",
        "",
        "| figure | value |",
        "|---|---|",
        *(f"| {name} | {figure} |" for name, figure in figures.get("rows", {}).items()),
        f"| sweep of {len(SAMPLE)} heads / patching and running the whole model, equal bit for bit "
        f"| {times['seconds']:.1f} s / {times['plain_seconds']:.1f} s = {times['ratio']:.2f} |",
    ]
    write_table("effects", "effects", lines)
    print("\n".join(lines))


if __name__ == "__main__":
    main(sys.argv[1:] or ["effects", "sweep"])
