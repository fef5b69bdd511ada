"""What the fused engine costs beside Transformers' own SDPA forward pass. Part of `make bench`.

Both sides of a ratio run in turns in one process; each peak of memory has a process of its own.
`python benchmarks/fused.py [times] [peaks]` takes about half an hour on two cores.
"""

import copy
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import (
    THREADS,
    in_turns,
    ratio,
    read_results,
    seconds,
    setting,
    write_results,
    write_table,
)

#: Tokens of the prompt, and rounds.
LENGTHS = {1024: 9, 2048: 5, 4096: 3, 8192: 2}
BRIDGE_AT, MEMORY_AT, LONGEST = 4096, 8192, 32768
#: Processes of each peak, of which the median counts.
PROCESSES = 3
#: From this size on freed memory goes back to the system at once (see `peak_of`).
THRESHOLD = 2**20
#: The patterns of all layers at 4,096 tokens are 18 GB; half of them are cached.
CACHED_LAYERS = 15


def tokens_of(model, n_tokens):
    """A prompt of the built-in text, repeated where it is longer than the context."""
    import torch

    from slashpatch.data.prompts import prompt_set

    text = prompt_set(model, n_prompts=1, max_tokens=min(n_tokens, 1024)).tokens[0]
    return text.repeat(-(-n_tokens // len(text)))[:n_tokens][None].to(torch.int64)


def sdpa_model(config):
    """The default model as Transformers itself runs it, from its configuration."""
    from transformers import LlamaForCausalLM

    # Weights are random: the time is the same. The bridge keeps its own configuration.
    plain = LlamaForCausalLM(copy.deepcopy(config)).eval()
    plain.config._attn_implementation = "sdpa"
    return plain


def sdpa_forward(plain, tokens):
    """One forward pass, logits of the last token, no KV cache: as the scan does it."""
    import torch

    with torch.no_grad():
        plain(tokens, logits_to_keep=1, use_cache=False)


def times(model, plain):
    """Seconds and ratios at every length."""
    import torch

    import slashpatch as sp
    from slashpatch.bridge import run_for_hooks

    eight = [
        entry.head
        for entry in sp.scan(model, tokens_of(model, 256), 1, moments=False).slash_heads()
    ][:8]
    knock_out = sp.KnockOut(eight, 1)
    figures = {}
    for n_tokens, rounds in LENGTHS.items():
        tokens = tokens_of(model, n_tokens)

        def forward(tokens=tokens):
            with torch.no_grad(), sp.fused(model):
                run_for_hooks(model, tokens, [])

        def knocked_out(tokens=tokens):
            with torch.no_grad(), sp.fused(model), sp.patch(model, knock_out):
                run_for_hooks(model, tokens, [])

        def scan(tokens=tokens, offsets=range(16), moments=False):
            sp.scan(model, tokens, offsets, "fused", moments=moments)

        runs = {
            "SDPA forward": lambda tokens=tokens: sdpa_forward(plain, tokens),
            "fused forward": forward,
            "scan of 16 offsets": scan,
            "scan of 16 offsets, with rank and profile sums": lambda scan=scan: scan(moments=True),
            "fused forward with KnockOut on 8 heads": knocked_out,
        }
        if n_tokens == BRIDGE_AT:
            runs["scan of all offsets"] = lambda scan=scan: scan(offsets="all")
        print(f"{n_tokens:,} tokens, {rounds} rounds of {len(runs)} runs", flush=True)
        found = in_turns(runs, rounds, warm_up=n_tokens < BRIDGE_AT)  # shorter ones warmed up
        for name in runs:
            if name != "SDPA forward":
                plain_name = "fused forward" if "KnockOut" in name else "SDPA forward"
                label = f"{name} / {plain_name}, {n_tokens:,} tokens"
                figures[label] = ratio(found, name, plain_name)
                print(f"  {label}: {figures[label]['ratio']:.3f}", flush=True)
        if n_tokens == BRIDGE_AT:
            names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(CACHED_LAYERS)]

            def cached(tokens=tokens, names=names):
                with torch.no_grad():
                    model.run_with_cache(
                        tokens, names_filter=names, return_type=None, logits_to_keep=1
                    )

            took = [seconds(cached) for _ in range(2)]
            own = sorted(found["scan of 16 offsets"])
            median = own[len(own) // 2]
            label = f"run_with_cache of patterns (bridge) / scan, {n_tokens:,} tokens"
            figures[label] = {
                "seconds": min(took),
                "plain_seconds": median,
                "ratio": min(took) / median,
                "rounds": len(took),
            }
            print(f"  {label}: {figures[label]['ratio']:.3f}", flush=True)
    return figures


def peak_of(what, n_tokens, config, threshold):
    """Run this file for one run alone, and read the peak that it reports.

    `threshold` (bytes) is from which size on the C library returns freed memory to the system at
    once; by default it moves, and the peak then tells how the heap was fragmented by chance.
    """
    command = [sys.executable, __file__, what, str(n_tokens), config]
    own = {} if threshold is None else {"MALLOC_MMAP_THRESHOLD_": str(threshold)}
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, **own}
    )
    return json.loads(done.stdout.splitlines()[-1])


def alone(what, n_tokens, config=None):
    """One run in this process; prints its seconds and its peak resident memory as JSON."""
    import torch

    import slashpatch as sp
    from slashpatch.bridge import run_for_hooks

    torch.set_num_threads(THREADS)
    if what == "sdpa":
        import transformer_lens  # noqa: F401  # both sides with the same libraries in memory
        from transformers import LlamaConfig

        plain = sdpa_model(LlamaConfig.from_json_file(config))
        tokens = torch.randint(0, plain.config.vocab_size, (1, n_tokens))

        def run():
            sdpa_forward(plain, tokens)
    else:
        model = sp.load(device="cpu")
        model.cfg.n_ctx = max(model.cfg.n_ctx, n_tokens)  # beyond the trained context: cost only
        tokens = tokens_of(model, n_tokens)

        def run():
            if what == "forward":
                with torch.no_grad(), sp.fused(model):
                    run_for_hooks(model, tokens, [])
            else:
                sp.scan(model, tokens, range(16), "fused", moments="moments" in what)

    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is that of loading
    before = resident("VmRSS")
    took = seconds(run)
    print(json.dumps({"seconds": took, "gigabytes": resident("VmHWM"), "before": before}))


def resident(field):
    """Resident memory of this process in GB: now (VmRSS) or at its peak (VmHWM)."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith(field)) * 1024 / 1e9


def peaks(config):
    """Peak of memory, and seconds, of runs that each had a process of their own, one by one."""
    wanted = {
        f"{name}, {MEMORY_AT:,} tokens{said}": (what, MEMORY_AT, PROCESSES, threshold)
        for said, threshold in (("", THRESHOLD), (", allocator as it comes", None))
        for name, what in (("SDPA forward", "sdpa"), ("fused scan of 16 offsets", "scan"))
    }
    wanted[f"fused scan of 16 offsets, {LONGEST:,} tokens"] = ("scan", LONGEST, 1, THRESHOLD)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/config.json"
        config.to_json_file(path)
        for name, (what, n_tokens, times, threshold) in wanted.items():
            rows = [peak_of(what, n_tokens, path, threshold) for _ in range(times)]
            row = {
                key: statistics.median(one[key] for one in rows) for key in ("seconds", "gigabytes")
            }
            row["every"] = [one["gigabytes"] for one in rows]
            print(f"{name}: {row}", flush=True)
            yield name, row


def table_lines(figures, memory, source):
    """The tables for docs/costs.md."""
    lines = [
        f"{setting(source)}; medians, both sides of a ratio in turns.",
        "",
        "| figure | with slashpatch | beside | ratio |",
        "|---|---|---|---|",
    ]
    for name, row in figures.items():
        ours, plain = (f"{row[key]:.2f} s" for key in ("seconds", "plain_seconds"))
        lines.append(f"| {name} | {ours} | {plain} | {row['ratio']:.2f} |")
    lines += ["", "| peak memory, a process each | GB | of each process |", "|---|---|---|"]
    for name, row in memory.items():
        every = ", ".join(f"{one:.2f}" for one in row["every"])
        lines.append(f"| {name} | {row['gigabytes']:.2f} | {every} |")
    return lines


def main(parts):
    """Measure `times`, `peaks` or both; what is not measured now stays as it was."""
    import torch

    import slashpatch as sp
    from slashpatch.bridge.provenance import provenance

    torch.set_num_threads(THREADS)
    model = sp.load(device="cpu")
    source = provenance(model)
    config = model.original_model.config
    print(setting(source))
    figures = read_results("fused")
    if "times" in parts:
        figures["ratios"] = times(model, sdpa_model(config))
    del model
    save(figures, source)
    if "peaks" in parts:
        figures["peaks"] = {}
    for name, row in peaks(config) if "peaks" in parts else ():
        figures["peaks"][name] = row
        save(figures, source)  # the last of them takes minutes


def save(figures, source):
    """What was measured so far, into results.json and docs/costs.md."""
    write_results("fused", figures, source)
    lines = table_lines(figures.get("ratios", {}), figures.get("peaks", {}), source)
    write_table("costs", "fused", lines)


if __name__ == "__main__":
    if len(sys.argv) > 2 and sys.argv[2].isdigit():  # `scan 32768`; `sdpa 8192 config.json`
        alone(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
    else:
        main(sys.argv[1:] or ["times", "peaks"])
