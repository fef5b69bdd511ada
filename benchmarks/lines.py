"""Lines that stand out of the offsets around them: how many are found, and how many are made up.

Three parts; each stops and goes on from --folder, and all write into docs/how-to/far-slashes.md.

planted: attention patterns of 8,192 tokens with known slashes of strength 0.005 to 0.5 at offsets
    from 24 to 5,000, over four backgrounds, and none elsewhere. A row's strength is drawn from 0 to
    twice the slash's, and a prompt's from a log-normal of mean 1.
random: the default model's architecture with random weights, which has no slashes.
model: the default model, 8 natural prompts of --model-tokens, all heads and offsets; one at a
    time, and then added. One prompt of 8,192 tokens is timed as well.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from common import THREADS, machine, read_results, write_results, write_table

import slashpatch as sp
from slashpatch.data.files import write_json
from slashpatch.data.prompts import prompt_set
from slashpatch.maths.lines import all_slash_sums
from slashpatch.scanning.lines import LineSums, lines_frame

N, N_PROMPTS, ROWS = 8192, 8, 256
STRENGTHS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
OFFSETS = (24, 60, 150, 400, 1000, 2500, 5000)
BACKGROUNDS = ("uniform", "recency", "sink", "content")
RANDOM_PROMPTS, RANDOM_TOKENS = 8, 512
MODEL_PROMPTS = 8


def variants():
    """The planted slashes [(strength, offsets)] of one head each, none first; at most 0.7 a row."""
    groups = [(0.0, ())]
    for strength in STRENGTHS:
        size = max(1, int(0.7 / strength + 1e-9))
        groups += [(strength, OFFSETS[at : at + size]) for at in range(0, len(OFFSETS), size)]
    return groups


def logits(background, rows, tokens, generator):
    """Logits of some rows over all keys, without the causal mask."""
    keys = torch.arange(N)
    distance = rows[:, None] - keys
    noise = torch.randn(len(rows), N, generator=generator)
    if background == "uniform":
        return 0.5 * noise
    if background == "recency":
        return noise - 1.5 * distance.clamp(min=0).float().add(1).log()
    if background == "sink":
        return noise + 9.0 * (keys == 0)
    after_same = torch.zeros(len(rows), N, dtype=torch.bool)
    after_same[:, 1:] = tokens[rows, None] == tokens[None, :-1]  # as induction heads
    return noise + 4.0 * after_same + 5.0 * (keys == 0)


class Planted:
    """A pattern in blocks of rows, as `all_slash_sums` reads it: one head for each variant."""

    def __init__(self, background, prompt):
        self.shape, self.device = (1, len(variants()), N, N), torch.device("cpu")
        self.background = background
        self.generator = torch.Generator().manual_seed(
            1000 * prompt + BACKGROUNDS.index(background)
        )
        ranks = torch.arange(1, 5001, dtype=torch.float64)
        self.tokens = torch.multinomial(1 / ranks, N, True, generator=self.generator)  # Zipf
        normal = torch.randn(len(variants()), len(OFFSETS), generator=self.generator)
        self.of_prompt = (0.3 * normal - 0.045).exp()

    def pattern_blocks(self, heads):
        for start in range(0, N, ROWS):
            rows = torch.arange(start, start + ROWS)
            scores = logits(self.background, rows, self.tokens, self.generator)[:, : start + ROWS]
            future = rows[:, None] < torch.arange(start + ROWS)
            soft = scores.masked_fill(future, -torch.inf).softmax(-1)
            planted = torch.zeros(len(heads), len(OFFSETS), ROWS)
            for head, (strength, offsets) in enumerate(variants()):
                for place, offset in enumerate(offsets):
                    of_row = 2 * strength * torch.rand(ROWS, generator=self.generator)
                    planted[head, place] = of_row * self.of_prompt[head, place] * (rows >= offset)
            planted *= 0.95 / planted.sum(1, keepdim=True).clamp(min=0.95)
            block = (soft * (1 - planted.sum(1))[..., None])[None]
            for head, (_, offsets) in enumerate(variants()):
                for place, offset in enumerate(offsets):
                    at = rows[rows >= offset]
                    block[0, head, at - start, at - offset] += planted[head, place, at - start]
            yield 0, block


def planted(folder):
    """LineSums of each number of prompts, whose heads are variants of each background."""
    total, found = None, {}
    for prompt in range(N_PROMPTS):
        path = folder / f"planted-{prompt}.pt"
        if not path.exists():
            real = torch.ones(1, N, dtype=torch.bool)
            parts = [all_slash_sums(Planted(one, prompt), real) for one in BACKGROUNDS]
            torch.save([torch.stack(x, 1) for x in zip(*parts, strict=True)], path)
            print(f"planted: prompt {prompt}", flush=True)
        sums, first = torch.load(path, weights_only=True)
        one = LineSums.of_prompts(sums, first, [N])
        total = one if total is None else total + one
        if prompt + 1 in (4, N_PROMPTS):
            found[prompt + 1] = total
    return found


def recall(total):
    """Which planted slashes were found by (background, strength, offset), and the false lines."""
    lines = total.find(0.05, 0.001, 1.5, 1, 0.95)
    at = {(line.head.layer, line.head.head, line.offset) for line in lines}
    known = {
        (layer, head, offset): (background, strength, offset)
        for layer, background in enumerate(BACKGROUNDS)
        for head, (strength, offsets) in enumerate(variants())
        for offset in offsets
    }
    false = [f"{BACKGROUNDS[a]} Δ{c} ({variants()[b][0]})" for a, b, c in sorted(at - set(known))]
    return [[*name, key in at] for key, name in known.items()], false


def random_weights(folder):
    """The number of lines of the default model's architecture with random weights."""
    path = folder / "random.safetensors"
    if not path.exists():
        from transformers import AutoModelForCausalLM

        made = sp.load(device="cpu")
        torch.manual_seed(0)
        config = made.original_model.config
        model = sp.load(AutoModelForCausalLM.from_config(config).eval(), tokenizer=made.tokenizer)
        sizes = {"n_prompts": RANDOM_PROMPTS, "max_tokens": RANDOM_TOKENS}
        sp.scan(model, lines=True, moments=False, **sizes).save(path)
    scan = sp.Scan.load(path)
    return {"lines": len(scan.lines()), "without_size_rules": len(scan.lines(least=0.0, ratio=0.0))}


def default_model(folder, n_tokens, n_prompts=MODEL_PROMPTS):
    """The scan of all prompts, and the seconds of processor time of each."""
    scan, took = None, []
    model = chosen = None
    for prompt in range(n_prompts):
        path = folder / f"model-{n_tokens}-{prompt}.safetensors"
        clock = path.with_suffix(".json")
        if not (path.exists() and clock.exists()):
            if model is None:
                model = sp.load(device="cpu")
                chosen = prompt_set(model, n_prompts=n_prompts, max_tokens=n_tokens)
            start = time.process_time(), time.perf_counter()
            one = sp.scan(model, [chosen.tokens[prompt]], lines=True, moments=False)
            cpu, wall = time.process_time() - start[0], time.perf_counter() - start[1]
            one.save(path)
            write_json(clock, {"cpu": cpu, "wall": wall})
            print(
                f"model: {n_tokens} tokens, prompt {prompt}, {cpu:.0f} s of processor time",
                flush=True,
            )
        took.append(json.loads(clock.read_text())["cpu"])
        one = sp.Scan.load(path)
        scan = one if scan is None else scan + one
    return scan, took


def planted_table(found):
    """Lines of docs: recall by strength and distance, and false lines."""
    rows = ["| strength | " + " | ".join(f"Δ={offset:,}" for offset in OFFSETS) + " |"]
    rows.append("|---" * (len(OFFSETS) + 1) + "|")
    for strength in STRENGTHS:
        cells = []
        for offset in OFFSETS:
            counts = []
            for total in found.values():
                hits = [hit for _, s, d, hit in total["recall"] if (s, d) == (strength, offset)]
                counts.append(f"{sum(hits)}")
            cells.append(", ".join(counts))
        rows.append(f"| {strength} | " + " | ".join(cells) + " |")
    false = "; ".join(f"{len(total['false'])} with {n} prompts" for n, total in found.items())
    n_judged = len(BACKGROUNDS) * len(variants()) * (N - 20)
    rows += [
        "",
        f"How many of the {len(BACKGROUNDS)} backgrounds (uniform rows, recency, a sink on the "
        f"first token, content) show the slash, with {' and with '.join(map(str, found))} prompts "
        f"of {N:,} tokens. False lines among {n_judged:,} heads and offsets: {false}.",
    ]
    return rows


def model_table(scan, took, of_longest, random):
    lines = scan.lines()
    far = lines_frame([line for line in lines if line.offset >= 64])
    n_tokens = scan.n_tokens // len(took)
    bands = [(1, 16), (16, 64), (64, 256), (256, 1024), (1024, n_tokens)]
    counts = [sum(low <= line.offset < high for line in lines) for low, high in bands]
    names = [f"{low:,} to {high - 1:,}" for low, high in bands]
    rows = ["| Δ | " + " | ".join(names) + " |", "|---" * (len(bands) + 1) + "|"]
    rows += ["| lines | " + " | ".join(map(str, counts)) + " |", ""]
    rows += ["| far line | Δ | score | contrast | interval | q |", "|---" * 6 + "|"]
    for row in far.head(12).to_dict(orient="records"):
        rows.append(
            f"| {row['name']} | {row['offset']:,} | {row['score']:.4f} | {row['contrast']:.4f} | "
            f"{row['low']:.4f} to {row['high']:.4f} | {row['q']:.1g} |"
        )
    at = machine()
    rows += [
        "",
        f"The default model, {len(took)} natural prompts of {n_tokens:,} tokens, all heads and "
        f"offsets. Processor time of one such prompt: {sorted(took)[len(took) // 2]:.0f} s; of "
        f"one of {N:,} tokens: {of_longest:.0f} s ({at['processor']}, {THREADS} threads). The same "
        f"architecture with random weights, {RANDOM_PROMPTS} prompts of {RANDOM_TOKENS}: "
        f"{random['lines']} lines ({random['without_size_rules']} without the rules of size: "
        "ripples of RoPE).",
    ]
    return rows, {
        "counts": dict(zip(names, counts, strict=True)),
        "seconds": took,
        "longest": of_longest,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "lines")
    parser.add_argument("--only", choices=["planted", "random", "model"])
    parser.add_argument("--model-tokens", type=int, default=2048)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(THREADS)
    figures = {}
    if options.only in (None, "planted"):
        found = {}
        for n, total in planted(options.folder).items():
            hits, false = recall(total)
            found[n] = {"recall": hits, "false": false}
        write_table("how-to/far-slashes", "planted", planted_table(found))
        figures["planted"] = {
            n: {
                "planted": len(part["recall"]),
                "missed": [f"{b} {s} Δ{d}" for b, s, d, hit in part["recall"] if not hit],
                "false": part["false"],
            }
            for n, part in found.items()
        }
    if options.only in (None, "random"):
        print(random_weights(options.folder))
    if options.only in (None, "model"):
        random = random_weights(options.folder)
        _, (of_longest,) = default_model(options.folder, N, 1)
        scan, took = default_model(options.folder, options.model_tokens)
        rows, figures["model"] = model_table(scan, took, of_longest, random)
        figures["random"] = random
        write_table("how-to/far-slashes", "model", rows)
    write_results("lines", {**read_results("lines"), **figures}, {"threads": THREADS})


if __name__ == "__main__":
    main()
