"""How often screen finds the heads of largest exact effect, and what it costs next to sweep.

Five seeds (of prompts, halves and audit) and three edits on the default model, copying loss, 8
prompts of 65 tokens. What is asked: are the ten heads of largest |effect| in an exact sweep among
the heads that a method runs or names? Beside it, as many heads as screen's estimates chose, by
other rankings: TransformerLens' attribution patching (which compares two prompts instead of an
edit, and so gives one ranking for all three), the gradient times z without the edit's exact change,
the exact effects on the screening half alone (how far luck with prompts goes), and random heads.

Times are seconds of processor time in one thread, so that other work on the machine counts for
neither side. Finished parts are kept in --folder, from which a run that was stopped goes on. Writes
the table in docs/how-to/screen.md and the part "screen" of results.json.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from common import machine, setting, write_results, write_table
from transformer_lens.tools.analysis.attribution_patching import attribution_patch

import slashpatch as sp
from slashpatch.data.prompts import repeated_random_tokens
from slashpatch.effects.every_head.estimates import contributions
from slashpatch.effects.every_head.run import SweepRun
from slashpatch.effects.every_head.variants import sweep_variants
from slashpatch.effects.running.evaluation import MetricRunner
from slashpatch.effects.running.gradients import gradients
from slashpatch.effects.running.inputs import batches, prompts_for
from slashpatch.effects.screen import halves
from slashpatch.maths.repeated_tokens import copying_loss

EDITS = ("KnockOut({head}, 1)", "AblateHeads({head})", "DropBand({head}, high)")
SEEDS, N_PROMPTS, N_HEADS, TOP = range(5), 8, 270, 10


def cpu_seconds(run):
    start = time.process_time()
    value = run()
    return value, time.process_time() - start


def prompts_of(model, seed):
    sizes = {"n_prompts": N_PROMPTS, "max_tokens": None, "default": 65, "seed": seed}
    return prompts_for(model, [copying_loss], None, random_tokens=False, **sizes)


def exact(model, edit, seed):
    """Effects [head, prompt] of the whole sweep, and what it took."""
    runner = MetricRunner(model, [copying_loss])
    variants = sweep_variants(model, edit, None, None)
    chosen = prompts_of(model, seed)
    rows, taken = cpu_seconds(
        lambda: SweepRun(model, runner, chosen, variants).all(None, None, False)
    )
    effects = [
        [a - b for a, b in zip(rows[v.index], rows[-1], strict=True)]
        for v in sorted(variants, key=lambda v: v.index)
    ]
    return {
        "names": [str(head) for head in runner.info.heads],
        "effects": effects,
        "seconds": taken,
    }


def screened(model, edit, seed, **options):
    found, taken = cpu_seconds(
        lambda: sp.screen(model, edit, n_prompts=N_PROMPTS, seed=seed, progress=False, **options)
    )
    frame, audit = found.frame, found.tables["audit"].iloc[0]
    return {
        "seconds": taken,
        "why": dict(zip(frame["name"], frame["why"], strict=True)),
        "estimate": dict(zip(frame["name"], frame["estimate"], strict=True)),
        "audit": {name: float(value) for name, value in audit.items()},
    }


def by_plain_gradient(model, seed):
    """|gradient · z| of each head, summed over positions, mean over the screening half."""
    runner = MetricRunner(model, [copying_loss])
    half, _ = halves(N_PROMPTS, True, seed)
    scores = torch.zeros(model.cfg.n_layers, model.cfg.n_heads)
    for batch in batches(prompts_of(model, seed), model.cfg.d_vocab, None, "cpu", half):
        found = gradients(runner, batch, range(model.cfg.n_layers))
        for layer, z in found.z.items():
            scores[layer] += (z * found.gradient[layer]).sum((0, 1, 3))
    return scores.abs().flatten().tolist()


def by_attribution_patching(model, seed):
    """TransformerLens' scores of heads: the first copy against other random tokens there."""
    half, _ = halves(N_PROMPTS, True, seed)
    clean = torch.stack([prompts_of(model, seed).tokens[index] for index in half])
    corrupt = clean.clone()
    n = (clean.shape[1] - 1) // 2
    others = repeated_random_tokens(model, len(half), n, seed + 1000)
    corrupt[:, 1 : 1 + n] = torch.stack(list(others))[:, 1 : 1 + n]
    scores = torch.zeros(model.cfg.n_layers, model.cfg.n_heads)
    for a, b in zip(clean, corrupt, strict=True):
        found = attribution_patch(
            model,
            a[None],
            b[None],
            lambda x, t=a[None]: copying_loss(x.reshape(1, *x.shape[-2:]), t)[0],
        )
        for node, score in found.node_scores.items():
            if node.kind == "attn_head_out":
                scores[node.layer, node.head] += score
    return scores.abs().flatten().tolist()


def kept(folder, name, make):
    """What a file of the folder holds, or what `make` returns, written there."""
    path = folder / f"{name}.json"
    if not path.exists():
        value = make()
        part = path.with_suffix(".part")
        part.write_text(json.dumps(value))
        part.rename(path)
        print(f"{name}: done", flush=True)
    return json.loads(path.read_text())


def largest(scores, names, n):
    return {names[i] for i in sorted(range(len(names)), key=lambda i: -scores[i])[:n]}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "slashpatch-screen"
    )
    parser.add_argument(
        "--only", choices=("exact", "screen"), help="measure these parts, write no table"
    )
    parser.add_argument("--reverse", action="store_true", help="begin with the last seed")
    chosen = parser.parse_args()
    folder = chosen.folder
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    model = sp.load()
    cells = [(edit, seed) for seed in SEEDS for edit in range(len(EDITS))]
    sweeps, screens = {}, {}
    for edit, seed in reversed(cells) if chosen.reverse else cells:
        name = f"{edit}-{seed}"
        if chosen.only != "screen":
            sweeps[edit, seed] = kept(
                folder, f"exact-{name}", lambda e=edit, s=seed: exact(model, EDITS[e], s)
            )
        if chosen.only != "exact":
            screens[edit, seed] = kept(
                folder, f"screen-{name}", lambda e=edit, s=seed: screened(model, EDITS[e], s)
            )
    if chosen.only:
        return
    plain = {s: kept(folder, f"plain-{s}", lambda s=s: by_plain_gradient(model, s)) for s in SEEDS}
    theirs = {
        s: kept(folder, f"patching-{s}", lambda s=s: by_attribution_patching(model, s))
        for s in SEEDS
    }
    offsets = kept(folder, "offsets", lambda: many_offsets(model))
    rows = []
    for (edit, seed), sweep in sweeps.items():
        rows.append(
            figures(sweep, screens[edit, seed], plain[seed], theirs[seed], seed, EDITS[edit])
        )
    report(model, rows, offsets)


def many_offsets(model):
    """Seconds of the estimates alone at one offset and at sixteen, and of one forward pass."""
    runner = MetricRunner(model, [copying_loss])
    half, _ = halves(N_PROMPTS, True, 0)
    (batch,) = batches(prompts_of(model, 0), model.cfg.d_vocab, None, "cpu", half)
    runs = {
        "one": lambda: estimates_only(model, [1]),
        "sixteen": lambda: estimates_only(model, range(16)),
        "forward": lambda: runner.logits(batch.tokens),
    }
    found = {name: [cpu_seconds(run)[1] for _ in range(3)] for name, run in runs.items()}
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def estimates_only(model, offsets):
    """The estimates of every head at some offsets, without the runs that follow them."""
    runner = MetricRunner(model, [copying_loss])
    half, _ = halves(N_PROMPTS, True, 0)
    variants = sweep_variants(model, "KnockOut({head}, {offset})", None, offsets)
    return contributions(runner, prompts_of(model, 0), variants, 0, chosen=half, progress=False)


def figures(sweep, screen, plain, theirs, seed, edit):
    """What one edit and seed say: recalls of the exact top ten, and the costs."""
    from scipy.stats import spearmanr

    names = sweep["names"]
    sizes = [abs(statistics.fmean(effects)) for effects in sweep["effects"]]
    half, _ = halves(N_PROMPTS, True, seed)
    on_half = [abs(statistics.fmean(e[i] for i in half)) for e in sweep["effects"]]
    top = largest(sizes, names, TOP)
    chosen = {name for name, why in screen["why"].items() if why in ("top", "flagged")}
    run = {name for name, why in screen["why"].items() if why}
    drawn = random.Random(seed).sample(names, len(chosen))

    def recall(found):
        return len(top & set(found)) / TOP

    n = len(chosen)
    return {
        "edit": edit,
        "seed": seed,
        "chosen": n,
        "run": len(run),
        "recall_run": recall(run),
        "recall_chosen": recall(chosen),
        "recall_top": recall(name for name, why in screen["why"].items() if why == "top"),
        "recall_exact_half": recall(largest(on_half, names, n)),
        "recall_plain": recall(largest(plain, names, n)),
        "recall_patching": recall(largest(theirs, names, n)),
        "recall_random": recall(drawn),
        "spearman": float(
            spearmanr([abs(screen["estimate"][name]) for name in names], sizes).statistic
        ),
        "sweep_seconds": sweep["seconds"],
        "screen_seconds": screen["seconds"],
        "audit": screen["audit"],
    }


def report(model, rows, offsets):
    from slashpatch.bridge.provenance import provenance

    def mean(name, of):
        return statistics.fmean(row[name] for row in of)

    columns = {
        "recall_run": "heads that are run",
        "recall_chosen": "heads chosen by the estimates",
        "recall_top": "top alone, without flagged",
        "recall_exact_half": "exact effects on the screening half",
        "recall_plain": "gradient × z",
        "recall_patching": "attribution patching",
        "recall_random": "random heads",
        "spearman": "rank correlation of sizes",
    }
    lines = [
        f"| edit | chosen, run | {' | '.join(columns.values())} | share of the sweep's time |",
        "|---|---|" + "---|" * (len(columns) + 1),
    ]
    for edit in (*EDITS, None):
        of = [row for row in rows if edit in (None, row["edit"])]
        share = statistics.median(row["screen_seconds"] / row["sweep_seconds"] for row in of)
        cells = " | ".join(f"{mean(name, of):.2f}" for name in columns)
        label = "all" if edit is None else f"`{edit}`"
        counts = f"{mean('chosen', of):.0f}, {mean('run', of):.0f}"
        lines.append(f"| {label} | {counts} | {cells} | {share:.2f} |")
    origin = provenance(model)
    lines += [
        "",
        f"Recall of the ten heads of largest effect in an exact sweep, over {len(SEEDS)} seeds, "
        f"{N_PROMPTS} prompts of 65 tokens, copying loss; the other rankings name as many heads as "
        "the estimates chose. Times are processor time, the share is a median. Estimates at "
        f"sixteen offsets took {offsets['sixteen'] / offsets['one']:.2f} times as long as at one "
        f"({offsets['one']:.0f} s). {setting(origin).replace('2 threads', '1 thread')}.",
    ]
    write_table("how-to/screen", "screen", lines)
    # A forward pass of half of the prompts is what "offsets" holds; a sweep runs all of them.
    of_sweep = statistics.median(row["sweep_seconds"] for row in rows) / N_HEADS
    passes = {
        "passes_of_estimates": offsets["sixteen"] / offsets["forward"],
        "passes_of_variant": of_sweep / (2 * offsets["forward"]),
    }
    figures = {"rows": rows, "offsets": offsets, "passes": passes, "threads": 1}
    write_results("screen", figures, origin)
    print("\n".join(lines), machine()["processor"])


if __name__ == "__main__":
    main()
