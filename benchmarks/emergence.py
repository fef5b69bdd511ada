"""Runs on text: three seeds of every setting, the tables of docs/emergence.md, animation, model.

`python benchmarks/emergence.py FOLDER` trains what FOLDER lacks (each run is resumable), then
writes the tables. Two processes can share the work: `--part 0/2` and `--part 1/2` train only.
Hours of processor time in all: see docs/emergence.md.
"""

import argparse
import itertools
import math
import time
from pathlib import Path

from common import machine, write_results, write_table

SEEDS = (0, 1, 2)
KAPPA = 0.3
ALL_HEADS = "(" + ", ".join(f"L{layer}H{head}" for layer in range(3) for head in range(4)) + ")"
SETTINGS = {
    "default": {},
    "no diagonal Δ = 1 in any head": {"edits": [f"KnockOut({ALL_HEADS}, offsets=1)"]},
    # Its score is 0.86 from step 0 on, over 128 tokens.
    "slash planted in L1H0": {"edits": ["PlantSlash(L1H0, offset=1, strength=64.0)"]},
    "low frequencies": {"frequencies": "low"},
    "centred embeddings": {"centred": True},
    "learned positions (GPT-2)": {"positions": "learned"},
    "one layer": {"layers": 1},
    "high frequencies": {"frequencies": "high"},
    "q/k norm (Qwen 3)": {"qk_norm": True},
    "no repeated passages": {"repeats": 0.0},
}
#: Pairs of quantities whose order the paper's story gives.
ORDER = (
    ("cone of its layer's input", "slash below induction"),
    ("r1 of its queries", "slash below induction"),
    ("r1 of its keys", "slash below induction"),
    ("strongest slash", "induction"),
    ("slash below induction", "induction"),
    ("induction", "copying loss"),
)


def folder_of(root, name, seed):
    return root / f"{''.join(c if c.isalnum() else '-' for c in name)}-{seed}"


def train(root, part, parts):
    """Train the runs of one part that are not finished."""
    import torch

    from slashpatch.theory import TextRun, train_text

    torch.set_num_threads(1)
    todo = list(itertools.product(SETTINGS, SEEDS))[part::parts]
    for name, seed in todo:
        where = folder_of(root, name, seed)
        if (where / "model").exists():
            continue
        start = time.process_time()
        train_text(where, threads=1, resume=True, seed=seed, **SETTINGS[name])
        took = time.process_time() - start
        (where / "seconds.txt").write_text(f"{took:.0f}\n")
        print(f"{name}, seed {seed}: {took:.0f} s of processor time", flush=True)
        print(TextRun.load(where).table(), flush=True)


def steps(values):
    """Steps over seeds: mean and Student's interval of the logarithm; fewer than 3 as they are."""
    from scipy.stats import t

    found = [math.log(value) for value in values if value == value]
    if not found:
        return f"never in {len(values)}"
    mean = sum(found) / len(found)
    if len(found) < 3:
        some = "" if len(found) == len(values) else f" (in {len(found)} of {len(values)})"
        return ", ".join(f"{math.exp(value):.0f}" for value in found) + some
    if len(found) < len(values):
        return f"{math.exp(mean):.0f} in {len(found)} of {len(values)}"
    half = t.ppf(0.975, len(found) - 1) * _deviation(found) / len(found) ** 0.5
    return f"{math.exp(mean):.0f} [{math.exp(mean - half):.0f}, {math.exp(mean + half):.0f}]"


def _deviation(values):
    mean = sum(values) / len(values)
    return (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5


def level(values, form=".2f"):
    """Mean over seeds and half of Student's 95 % interval; fewer than 3 seeds as they are."""
    from slashpatch.reporting.theory import over_seeds

    if len(values) < 3:
        return ", ".join(f"{value:{form}}" for value in values)
    return over_seeds(list(values), form)


def default_table(tables):
    lines = [
        "| what | head and offset, by seed | before → after | step of each seed (quarter to three "
        "quarters of the change) | over seeds |",
        "|---|---|---|---|---|",
    ]
    for quantity in tables[0].index:
        rows = [table.loc[quantity] for table in tables]
        heads = ", ".join(
            f"{row['head']} Δ={row['offset']}" if row["offset"] >= 0 else row["head"]
            for row in rows
        )
        change = f"{level([r['before'] for r in rows])} → {level([r['after'] for r in rows])}"
        each = "; ".join(
            "none" if row["step"] != row["step"]
            else f"{row['step']:.0f} ({row['early']:.0f} to {row['late']:.0f})"
            for row in rows
        )  # fmt: skip
        lines.append(
            f"| {quantity} | {heads} | {change} | {each} | {steps([r['step'] for r in rows])} |"
        )
    return lines


def order_table(tables):
    lines = [
        "| first | then | in this order | later by a factor of |",
        "|---|---|---|---|",
    ]
    for first, then in ORDER:
        pairs = [(table.loc[first, "step"], table.loc[then, "step"]) for table in tables]
        known = [(a, b) for a, b in pairs if a == a and b == b]
        ratios = [math.log(b / a) for a, b in known]
        in_order = f"{sum(a < b for a, b in known)} of {len(known)}"
        lines.append(f"| {first} | {then} | {in_order} | {factor(ratios, len(ratios))} |")
    return lines


def rank_table(runs):
    """Rank one, cone and bands of the slash head below induction, beside its layer's others."""
    lines = [
        "| step | slash score | r1 of queries, keys | other heads | cosine of queries, keys to "
        "their mean | other heads | high, medium, low band |",
        "|---|---|---|---|---|---|---|",
    ]
    names = [run.changes().set_index("quantity").loc["slash below induction"] for run in runs]
    last = runs[0].text.steps[-1]
    for step in (0, 25, 100, 500, 1000, last):
        cells = {}
        for run, row in zip(runs, names, strict=True):
            frame = run.text.frame[run.text.frame["step"] == step].set_index("name")
            head, others = frame.loc[row["head"]], frame.drop(index=row["head"])
            others = others[others["layer"] == head["layer"]]
            cells.setdefault("score", []).append(float(head[f"score_{row['offset']}"]))
            for column in ("r1_q", "r1_k", "cone_q", "cone_k"):
                cells.setdefault(column, []).append(float(head[column]))
                cells.setdefault(f"others {column}", []).append(float(others[column].mean()))
            for band in ("high", "medium", "low"):
                cells.setdefault(band, []).append(float(head[f"band_{band}"]))
        groups = ("score",), ("r1_q", "r1_k"), ("others r1_q", "others r1_k")
        groups += (
            ("cone_q", "cone_k"),
            ("others cone_q", "others cone_k"),
            ("high", "medium", "low"),
        )
        texts = [", ".join(level(cells[name]) for name in group) for group in groups]
        lines.append(f"| {step} | {' | '.join(texts)} |")
    return lines


def cone_table(runs):
    """The cone of each layer's input and the mean r1 of its heads, early and at the end."""
    lines = ["| setting | step | layer | cosine of its input to the mean | r1 of queries, keys |"]
    lines.append("|---|---|---|---|---|")
    for name in ("default", "centred embeddings", "one layer"):
        for step in (25, runs[name][0].text.steps[-1]):
            for layer in range(runs[name][0].settings.layers):
                rows = [
                    frame[(frame["step"] == step) & (frame["layer"] == layer)].mean(
                        numeric_only=True
                    )
                    for frame in (run.text.frame for run in runs[name])
                ]
                cone, *rank = (
                    level([float(row[column]) for row in rows])
                    for column in ("cone_x", "r1_q", "r1_k")
                )
                lines.append(f"| {name} | {step} | {layer} | {cone} | {', '.join(rank)} |")
    return lines


def new_text_loss(run):
    """The final model's loss on held-out source files: help topics stand in the training text."""
    import torch
    from transformers import AutoTokenizer

    import slashpatch as sp
    from slashpatch.theory.text.corpus import chosen, python_text, split, token_ids, windows

    files = {name: text for name, text in python_text().items() if not name.startswith("topic ")}
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "tokenizer")
    rows = chosen(windows(token_ids(tokenizer, split(files)[1]), run.settings.length), 64)
    model = run.model()
    with torch.no_grad(), sp.patch(model, *map(sp.parse_edit, run.settings.edits)):
        return float(model(rows, return_type="loss"))


def settings_table(runs):
    lines = [
        "| setting | seeds | slash heads at the end, by offset | strongest slash at step "
        "| its score "
        "| on random tokens | induction at step | prefix matching | copying loss "
        "| loss on new text |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    figures = {}
    for name, found in runs.items():
        tables = [run.changes().set_index("quantity") for run in found]
        offsets = [slashes(run) for run in found]
        first = [table.loc["strongest slash"] for table in tables]
        outside = [
            float(run.random.frame[lambda f: f["step"] == f["step"].max()]
                  .set_index("name").loc[row["head"], f"score_{row['offset']}"])
            for run, row in zip(found, first, strict=True)
        ]  # fmt: skip
        last = [run.text.summary(KAPPA).iloc[-1] for run in found]
        figures[name] = {
            "seeds": len(found),
            "slashes": offsets,
            "first_slash": [float(row["step"]) for row in first],
            "first_slash_score": [float(row["after"]) for row in first],
            "on_random_tokens": outside,
            "induction": [float(table.loc["induction", "step"]) for table in tables],
            "prefix_matching": [float(row["prefix_matching"]) for row in last],
            "copying_loss": [float(row["copying_loss"]) for row in last],
            "eval_loss": [float(row["eval_loss"]) for row in last],
            "new_text_loss": [new_text_loss(run) for run in found],
        }
        now = figures[name]
        cells = [
            name, str(len(found)), "; ".join(offset or "none" for offset in offsets),
            steps(now["first_slash"]), level(now["first_slash_score"]), level(outside),
            steps(now["induction"]), level(now["prefix_matching"]),
            level(now["copying_loss"], ".1f"), level(now["new_text_loss"]),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return lines, figures


def paired_table(runs):
    """Steps of induction and of the fall of the copying loss, divided by the default's, by seed."""
    lines = [
        "| setting | induction later by a factor of | copying later by a factor of |",
        "|---|---|---|",
    ]
    plain = {
        run.settings.seed: run.changes().set_index("quantity")["step"] for run in runs["default"]
    }
    for name, found in runs.items():
        cells = []
        for quantity in ("induction", "copying loss"):
            ratios = [
                math.log(run.changes().set_index("quantity")["step"][quantity]
                         / plain[run.settings.seed][quantity])
                for run in found
            ]  # fmt: skip
            cells.append(factor([ratio for ratio in ratios if ratio == ratio], len(ratios)))
        if name != "default" and cells != ["–", "–"]:
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def factor(logarithms, n):
    """The geometric mean of ratios with Student's interval; how many there are of n, if fewer."""
    if not logarithms:
        return "–"
    mean = sum(logarithms) / len(logarithms)
    some = "" if len(logarithms) == n else f" in {len(logarithms)} of {n}"
    if len(logarithms) < 3:
        return ", ".join(f"{math.exp(value):.2f}" for value in logarithms) + some
    from scipy.stats import t

    half = t.ppf(0.975, len(logarithms) - 1) * _deviation(logarithms) / len(logarithms) ** 0.5
    low, high = math.exp(mean - half), math.exp(mean + half)
    return f"{math.exp(mean):.2f} [{low:.2f}, {high:.2f}]{some}"


def slashes(run):
    """How many heads end as slash heads (κ = 0.3), by offset from 1: `3 at Δ=1, 1 at Δ=2`."""
    best = run.text.best(1)
    ended = best[(best["step"] == best["step"].max()) & (best["score"] >= KAPPA)]
    counts = ended["offset"].value_counts().sort_index()
    return ", ".join(f"{n} at Δ={offset}" for offset, n in counts.items())


def main():
    """Train what is missing, and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--only-write", action="store_true")
    given = parser.parse_args()
    part, parts = map(int, given.part.split("/"))
    if not given.only_write:
        train(given.folder, part, parts)
    if parts == 1:
        write(given.folder)


def write(root):
    """Write the tables, the pictures and results.json from the runs that are finished."""
    import torch

    from slashpatch.reporting.animation import save_animation
    from slashpatch.reporting.figures import save_figure
    from slashpatch.theory import TextRun

    runs, seconds = {}, {}
    for name, seed in itertools.product(SETTINGS, SEEDS):
        where = folder_of(root, name, seed)
        if (where / "model").exists():
            runs.setdefault(name, []).append(TextRun.load(where))
            if (where / "seconds.txt").exists():
                seconds.setdefault(name, []).append(int((where / "seconds.txt").read_text()))
    tables = [run.changes().set_index("quantity") for run in runs["default"]]
    lines, figures = settings_table(runs)
    took = [second for each in seconds.values() for second in each]
    head = [
        f"{machine()['processor']}, one thread a run, torch {torch.__version__}; "
        f"{runs['default'][0].settings.steps} steps, {min(took)} to {max(took)} s of processor "
        "time a run.",
        "",
    ]
    write_results("emergence", {"settings": figures, "seconds": seconds}, {})
    write_table("emergence", "default", head + default_table(tables))
    write_table("emergence", "order", order_table(tables))
    write_table("emergence", "rank", rank_table(runs["default"]))
    write_table("emergence", "cone", cone_table(runs))
    write_table("emergence", "settings", lines)
    write_table("emergence", "paired", paired_table(runs))
    pictures = Path(__file__).parents[1] / "docs" / "pictures"
    save_figure(runs["default"][0].plot(), pictures / "learning.png")
    save_animation(runs["default"][0], pictures / "learning.gif")
    save_model(runs["default"][0])


def save_model(run):
    """Write a run's model in half precision, 2 MB, for the tests: tests/text_model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target = Path(__file__).parents[1] / "tests" / "text_model"
    model = AutoModelForCausalLM.from_pretrained(run.folder / "model", dtype=torch.float16)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(run.folder / "model").save_pretrained(target)


if __name__ == "__main__":
    main()
