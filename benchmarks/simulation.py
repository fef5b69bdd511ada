"""The simulations of `statistics.py`: samples with a known mean, and slashpatch's own functions."""

import hashlib
import math
from pathlib import Path

import torch
from common import HERE, THREADS, machine, write_results, write_table

from slashpatch.data.journal import Journal
from slashpatch.data.progress import progress_over
from slashpatch.effects.statistics import LEAST, beyond_draws, compared
from slashpatch.maths import crossed, resampling

REPEATS = 1500
SIZES = (4, 6, 8, 16, 32)
LEVEL = 0.05
#: Draws, prompts, and how much draws differ, in standard deviations of one draw on one prompt.
CROSSED = [(8, 8, 0), (8, 8, 1), (8, 16, 1), (19, 8, 1), (19, 16, 0), (19, 16, 1), (19, 16, 3)]
KINDS_CROSSED = ("normal", "log-normal")


def normal(generator, *shape):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def log_normal(generator, *shape):
    return normal(generator, *shape).exp() - math.exp(0.5)


def student_3(generator, *shape):
    chi = sum(normal(generator, *shape) ** 2 for _ in range(3))
    return normal(generator, *shape) / (chi / 3).sqrt()


def bimodal(generator, *shape):
    return 4 * torch.randint(2, shape, generator=generator) - 2 + normal(generator, *shape) / 2


def uneven(generator, *shape):
    high = torch.rand(shape, generator=generator) < 0.3
    return 4 * (high.double() - 0.3) + normal(generator, *shape) / 2


def point_mass(generator, *shape):
    moved = torch.rand(shape, generator=generator) < 0.2
    return moved * 5 * normal(generator, *shape)


#: Distributions with mean zero.
KINDS = {
    "normal": normal,
    "log-normal, σ = 1": log_normal,
    "t, 3 degrees of freedom": student_3,
    "bimodal: ±2, and noise of 0.5": bimodal,
    "bimodal: 30 % at 2.8, 70 % at −1.2, and noise of 0.5": uneven,
    "exactly 0, and 20 % outliers": point_mass,
}


def of_mean(kind, n, repeats, generator):
    """Coverage, rejection, median length over Student's, coverage of Student's."""
    from scipy.stats import t

    sample = KINDS[kind](generator, n, repeats)
    found = compared(0 * sample, sample)
    half = float(t.ppf(1 - LEVEL / 2, n - 1)) * sample.std(0) / math.sqrt(n)
    length = (found["high"] - found["low"]) / (2 * half)
    student = (sample.mean(0).abs() <= half).double().mean()
    return [
        *rates(found["low"], found["high"], 0.0),
        float((found["p"] <= LEVEL).double().mean()) if n >= LEAST else math.nan,
        float(length.nanmedian()),
        float(student),
    ]


def of_ratio(kind, n, repeats, generator):
    """Coverage of mean(edited) / mean(clean), and how often there is an interval."""
    clean = 3 + normal(generator, n, repeats).exp()
    edited = 0.4 * clean + (normal if kind == "normal" else log_normal)(generator, n, repeats)
    low, high = resampling.ratio_interval(edited, clean)
    known = ~low.isnan()
    return [*rates(low[known], high[known], 0.4), float(known.double().mean())]


def of_draws(kind, d, p, spread, repeats, generator):
    """Coverage over prompts and draws, of an interval over prompts, and both tests' rejections."""
    draw = normal if kind == "normal" else log_normal
    shared = draw(generator, p, repeats)
    edit = shared + draw(generator, p, repeats)
    control = shared / 2 + draw(generator, d, p, repeats)
    means = spread * normal(generator, d + 1, 1, repeats)
    like_a_draw = shared / 2 + draw(generator, p, repeats) + means[d]
    fixed = beyond_draws(edit, control + means[:d])
    prompts = compared((control + means[:d]).mean(0), edit)
    ranked = beyond_draws(like_a_draw, control + means[:d])
    return [
        *rates(fixed.low, fixed.high, 0.0),
        *rates(prompts["low"], prompts["high"], 0.0),
        float((ranked.p_rank <= LEVEL + 1e-9).double().mean()),
    ]


def rates(low, high, truth):
    """How often the interval covers."""
    if bool(low.isnan().all()):
        return [math.nan]
    return [float(((low <= truth) & (high >= truth)).double().mean())]


def jobs():
    """Every row: function, its arguments."""
    rows = [(of_mean, (kind, n)) for kind in KINDS for n in SIZES]
    rows += [(of_ratio, (kind, n)) for kind in KINDS_CROSSED for n in SIZES[2:]]
    return rows + [(of_draws, (kind, *size)) for kind in KINDS_CROSSED for size in CROSSED]


def simulated(repeats, progress=None):
    """Return the numbers of each row."""
    todo = jobs()
    files = [Path(module.__file__) for module in (resampling, crossed)] + [Path(__file__)]
    source = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    folder = HERE.parent / ".benchmarks"
    folder.mkdir(exist_ok=True)
    header = {"source": source, "repeats": repeats}
    path = folder / f"statistics-{source[:8]}-{repeats}.jsonl"
    with Journal(path, header, True, range(len(todo)), 4) as journal:
        left = [index for index in range(len(todo)) if index not in journal.rows]
        for index in progress_over(left, "simulating", show=progress):
            run, arguments = todo[index]
            row = run(*arguments, repeats, torch.Generator().manual_seed(index))
            journal.write({index: [-1 if x != x else x for x in (*row, *[0.0] * (4 - len(row)))]})
        journal.remove()
        found = [[math.nan if x == -1 else x for x in journal.rows[i]] for i in range(len(todo))]
    return [
        (run.__name__, arguments, row) for (run, arguments), row in zip(todo, found, strict=True)
    ]


def number(value):
    return "–" if math.isnan(value) else f"{value:.2f}"


def tables(rows):
    """The three tables as lines of Markdown."""
    means = [
        "| effects of each prompt | prompts | covers | rejects | length | Student's t covers |",
        "|---|---|---|---|---|---|",
    ]
    ratios = ["| noise | prompts | covers | has an interval |", "|---|---|---|---|"]
    draws = [
        "| noise | draws | prompts | draws differ by | covers | over prompts alone covers "
        "| p_rank rejects |",
        "|---|---|---|---|---|---|---|",
    ]
    of = {"of_mean": (means, 4), "of_ratio": (ratios, 2), "of_draws": (draws, 3)}
    for name, arguments, row in rows:
        lines, n = of[name]
        lines.append(f"| {' | '.join(map(str, arguments))} | {' | '.join(map(number, row[:n]))} |")
    return means, ratios, draws


def main(repeats=REPEATS):
    """Simulate, and write results.json and docs/statistics.md."""
    torch.set_num_threads(THREADS)
    rows = simulated(repeats)
    here = machine()
    setting = (
        f"{repeats:,} repeats; the standard error of 0.95 is "
        f"{math.sqrt(0.95 * 0.05 / repeats):.3f}. torch {torch.__version__}, {here['processor']}."
    )
    for part, lines in zip(("means", "ratios", "draws"), tables(rows), strict=True):
        write_table("statistics", part, [setting, "", *lines])
    figures = {
        " ".join(map(str, (name, *arguments))): [None if x != x else x for x in row]
        for name, arguments, row in rows
    }
    write_results("statistics", {"rows": figures, "repeats": repeats}, {"torch": torch.__version__})
