"""How far slash scores of the default model in half precision are from float32.

Part of `make bench`; takes about a minute on two cores and writes a table of docs/limits.md.
"""

from common import THREADS, setting, write_results, write_table

DTYPES = ("bfloat16", "float16")
KAPPA = 0.1
N_PROMPTS, N_TOKENS = 8, 256


def slash_heads(scan):
    """(head, offset) of each score that reaches κ."""
    return {(str(entry.head), entry.offset) for entry in scan.slash_heads(KAPPA)}


def named(pairs, scores, expected):
    """Heads with their offset and both scores, the largest change first."""
    from slashpatch import Head

    def change(pair):
        head = Head.parse(pair[0])
        at = (head.layer, head.head, pair[1])
        return float(expected[at]), float(scores[at])

    rows = sorted(((pair, *change(pair)) for pair in pairs), key=lambda r: -abs(r[1] - r[2]))
    return "; ".join(f"{head} at {delta} ({a:.3f} → {b:.3f})" for (head, delta), a, b in rows)


def main():
    import torch

    import slashpatch as sp
    from slashpatch.bridge.provenance import provenance
    from slashpatch.data.prompts import prompt_set

    torch.set_num_threads(THREADS)
    model = sp.load(device="cpu")
    source = provenance(model, seed=0)
    prompts = list(prompt_set(model, n_prompts=N_PROMPTS, max_tokens=N_TOKENS).tokens)

    def scan(of, some):
        return sp.scan(of, some, range(16))

    exact = scan(model, prompts)
    halves = [scan(model, prompts[half::2]) for half in (0, 1)]
    with torch.no_grad():
        answers = [model(tokens[None])[0].argmax(-1) for tokens in prompts]
    del model
    compared = {"float32, other half of the prompts": halves}
    agree = {}
    for dtype in DTYPES:
        low = sp.load(device="cpu", dtype=dtype)
        compared[dtype] = [exact, scan(low, prompts)]
        with torch.no_grad():
            own = [low(tokens[None])[0].argmax(-1) for tokens in prompts]
        agree[dtype] = float((torch.cat(own) == torch.cat(answers)).double().mean())
    figures = {}
    for name, (first, second) in compared.items():
        off = (second.scores - first.scores).abs()
        ranks = [one.rank_one.set_index("name")["r1_q"] for one in (first, second)]
        before, after = slash_heads(first), slash_heads(second)
        figures[name] = {
            "largest": float(off.max()),
            "median": float(off.median()),
            "slash_heads": len(before),
            "lost": named(before - after, second.scores, first.scores),
            "gained": named(after - before, second.scores, first.scores),
            "largest_r1": float((ranks[0] - ranks[1]).abs().max()),
            "top1": agree.get(name),
        }
    write_results("dtypes", figures, source)
    write_table("limits", "dtypes", table_lines(figures, source))


def table_lines(figures, source):
    """The table for docs/limits.md."""
    lines = [
        f"{setting(source)} as the reference; {N_PROMPTS} prompts of {N_TOKENS} tokens, Δ from 0 "
        f"to 15; κ = {KAPPA}.",
        "",
        "| against float32 | largest difference of a score | median | slash heads lost | gained | "
        "largest difference of r1 of q | same top-1 token |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in figures.items():
        same = "–" if row["top1"] is None else f"{row['top1']:.1%}"
        lines.append(
            f"| {name} | {row['largest']:.4f} | {row['median']:.1e} | {shown(row['lost'])} | "
            f"{shown(row['gained'])} | {row['largest_r1']:.4f} | {same} |"
        )
    return lines


def shown(heads):
    """Heads as `named` gives them; their number where they are many."""
    n = heads.count(";") + 1 if heads else 0
    return heads if 0 < n <= 3 else str(n)


if __name__ == "__main__":
    main()
