"""What slashpatch costs on a GPU, from 2k to 128k tokens. `make bench-gpu`.

Measures forward passes by SDPA and fused, scans, edited generation, sweeps with shared passes and
screens, in bfloat16 and float32, with peaks of memory; and compares scores with those of the CPU.
Writes benchmarks/results-gpu.json and a table of docs/costs.md. Without CUDA it writes "not run"
there. `--device cpu --small` runs every stage on a CPU at small sizes and writes nothing.
"""

import argparse
import copy
import gc
import json
import statistics
import time
from contextlib import contextmanager

from common import HERE, machine, write_table

FILE = HERE / "results-gpu.json"
LENGTHS = tuple(2**power for power in range(11, 18))
DTYPES = ("bfloat16", "float32")
ROUNDS = 5
#: A stage that took this many seconds is timed once, and left out at longer prompts.
LONG = 30.0
GENERATED = 32
#: A few layers of a model of 8 billion parameters, whose context is 128k.
SHAPE = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "head_dim": 128,
    "num_hidden_layers": 4, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 131072, "rope_parameters": {"rope_type": "default",
    "rope_theta": 500000.0},
}  # fmt: skip
SMALL = {
    "vocab_size": 200, "hidden_size": 64, "intermediate_size": 64, "head_dim": 16,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
HEADER = (
    "| model | dtype | tokens | stage | seconds | beside | ratio | peak, GB |",
    "|---|---|---|---|---|---|---|---|",
)


class Device:
    """Where it runs: how it is waited for, and how its memory is read."""

    def __init__(self, name):
        import torch

        self.name, self.cuda = name, torch.cuda if name.startswith("cuda") else None

    def describe(self):
        return self.cuda.get_device_name(self.name) if self.cuda else machine()["processor"]

    def free(self):
        gc.collect()
        if self.cuda:
            self.cuda.empty_cache()

    @contextmanager
    def peak(self, found):
        """Put the peak of allocated memory while the block runs into `found`, in GB."""
        if self.cuda:
            self.cuda.reset_peak_memory_stats(self.name)
        yield
        if self.cuda:
            found["gigabytes"] = self.cuda.max_memory_allocated(self.name) / 1e9

    def seconds(self, run):
        if self.cuda:
            self.cuda.synchronize(self.name)
        start = time.perf_counter()
        run()
        if self.cuda:
            self.cuda.synchronize(self.name)
        return time.perf_counter() - start


def measured(device, run, beside=None, rounds=ROUNDS):
    """Median seconds of a run, of another that takes turns with it, their ratio, and the peak.

    "failed" says why there are no seconds.
    """
    import torch

    found = {}
    device.free()
    try:
        if beside is not None:
            beside()
        with device.peak(found):
            first = device.seconds(run)  # a warm-up
        ours, plain = [], []
        for _ in range(1 if first > LONG else rounds):
            ours.append(device.seconds(run))
            if beside is not None:
                plain.append(device.seconds(beside))
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}
    except Exception as error:  # the table says what broke, and the other stages go on
        return {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    finally:
        device.free()
    found["seconds"] = statistics.median(ours)
    if plain:
        found["beside"] = statistics.median(plain)
        found["ratio"] = statistics.median(a / b for a, b in zip(ours, plain, strict=True))
    return found


def random_llama(device, dtype, shape):
    """A bridge around a Llama of random weights, and a Transformers model of the same weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import slashpatch as sp

    config = LlamaConfig(**shape, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    torch.manual_seed(0)
    with torch.device(device.name):
        hf_model = LlamaForCausalLM._from_config(config, dtype=getattr(torch, dtype)).eval()
    plain = with_sdpa(hf_model)
    return sp.load(hf_model), plain


def default_model(device, dtype):
    """The default model as a bridge, and a Transformers model of the same weights."""
    import torch
    from transformers import AutoModelForCausalLM

    import slashpatch as sp
    from slashpatch.bridge.loading import default_model_path

    found = AutoModelForCausalLM.from_pretrained(default_model_path(), dtype=getattr(torch, dtype))
    hf_model = found.to(device.name).eval()
    plain = with_sdpa(hf_model)
    return sp.load(hf_model), plain


def with_sdpa(hf_model):
    """A Llama that shares the weights of another, and runs as Transformers itself would run it."""
    import torch

    config = copy.deepcopy(hf_model.config)
    with torch.device("meta"):
        plain = type(hf_model)._from_config(config, dtype=hf_model.dtype).eval()
    plain.load_state_dict(hf_model.state_dict(), assign=True)
    plain.model.rotary_emb = type(plain.model.rotary_emb)(config).to(hf_model.device)
    plain.config._attn_implementation = "sdpa"
    return plain


def stages(model, plain, n_tokens):
    """Name, run and what it is compared with, of each stage at one length."""
    import torch

    import slashpatch as sp
    from slashpatch.bridge import run_for_hooks

    place = model.cfg.device
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, model.cfg.d_vocab, (1, n_tokens), generator=generator)
    on_device = tokens.to(place)
    last = model.cfg.n_layers - 1
    n_edited = min(8, model.cfg.n_heads)
    heads = [sp.Head(last, head) for head in range(n_edited)]
    knock_out, freeze = sp.KnockOut(heads, 1), sp.FreezeBand(heads[0], "high")

    def sdpa():
        with torch.no_grad():
            plain(on_device, logits_to_keep=1, use_cache=False)

    def forward(*edits):
        with torch.no_grad(), sp.fused(model), sp.patch(model, *edits):
            run_for_hooks(model, on_device, [])

    def scan(offsets=range(16), moments=False):
        sp.scan(model, tokens, offsets, "fused", moments=moments, progress=False)

    def generate(*edits):
        short = on_device[:, : n_tokens - GENERATED]
        with sp.fused(model), sp.patch(model, *edits):
            model.generate(
                short, max_new_tokens=GENERATED, do_sample=False, stop_at_eos=False, verbose=False,
                return_type="tokens",
            )  # fmt: skip

    def sweep(per_pass=n_edited):
        with sp.fused(model):
            sp.sweep(
                model, "KnockOut({head}, 1)", heads, "loss", tokens.repeat(2, 1),
                per_pass=per_pass, progress=False,
            )  # fmt: skip

    yield "fused forward / SDPA forward", forward, sdpa
    yield "scan of 16 offsets / SDPA forward", scan, sdpa
    yield "the same with rank and profile sums / SDPA forward", lambda: scan(moments=True), sdpa
    yield "scan of all offsets / SDPA forward", lambda: scan("all"), sdpa
    yield (
        f"fused forward, KnockOut on {n_edited} heads / fused forward",
        lambda: forward(knock_out),
        forward,
    )
    yield (
        f"generation of {GENERATED} tokens, KnockOut on {n_edited} heads / no edit",
        lambda: generate(knock_out),
        generate,
    )
    yield (
        f"generation of {GENERATED} tokens, FreezeBand (per-head keys) / no edit",
        lambda: generate(freeze),
        generate,
    )
    yield f"sweep of {n_edited} heads, shared passes / a pass each", sweep, lambda: sweep(1)
    if hasattr(sp, "screen"):

        def screen():
            sp.screen(model, "KnockOut({head}, 1)", metric="copying", n_prompts=8, progress=False)

        if n_tokens <= LENGTHS[0]:
            yield "screen of all heads, 8 prompts", screen, None


def agreement(device, dtype, small):
    """Largest differences of scores from those of the CPU in float32, and what `check` finds.

    Of the default model; of a small one if `small`.
    """
    import slashpatch as sp

    if small:
        cpu, here = (random_llama(Device("cpu"), of, SHAPE | SMALL)[0] for of in ("float32", dtype))
        prompts = {"random_tokens": True}
    else:
        cpu, here = sp.load(device="cpu"), sp.load(device=device.name, dtype=dtype)
        prompts = {}
    figures = {}
    for engine in ("fused", "bridge"):
        scans = [
            sp.scan(model, n_prompts=2, max_tokens=256, engine=engine, progress=False, **prompts)
            for model in (cpu, here)
        ]
        off = (scans[0].scores - scans[1].scores).abs().max()
        figures[f"largest difference of a score from the CPU's, {engine}"] = float(off)
        figures[f"engine of the layers, {engine}"] = sorted(
            set(scans[1].provenance["engine_of_layers"])
        )
    report = sp.check(here, progress=False)
    figures["check"] = "passes" if report.ok else str(report)
    return figures


def run(device, small):
    """All figures: rows of the table, and how far scores are from those of the CPU."""
    rows, agree = [], {}
    lengths, rounds = ((64,), 1) if small else (LENGTHS, ROUNDS)
    models = {
        "4 layers of 32 heads of 128, random": lambda dtype: random_llama(
            device, dtype, SHAPE | SMALL if small else SHAPE
        ),
        "SmolLM2-135M-Instruct": lambda dtype: default_model(device, dtype),
    }
    for dtype in DTYPES:
        agree[dtype] = agreement(device, dtype, small)
        print(dtype, agree[dtype], flush=True)
        for name, make in models.items():
            model, plain = make(dtype)
            slow = set()
            for n_tokens in lengths:
                if n_tokens > model.cfg.n_ctx:
                    break
                for stage, ours, beside in stages(model, plain, n_tokens):
                    found = {"failed": "left out: too slow at a shorter prompt"}
                    if stage not in slow:
                        found = measured(device, ours, beside, rounds)
                    if found.get("seconds", LONG + 1) > LONG:
                        slow.add(stage)
                    row = {"model": name, "dtype": dtype, "tokens": n_tokens, "stage": stage}
                    rows.append({**row, **found})
                    print(line(rows[-1]), flush=True)
            del model, plain
            device.free()
    return {"rows": rows, "agreement": agree}


def line(row):
    """A row of the table."""
    of = f"| {row['model']} | {row['dtype']} | {row['tokens']:,} | {row['stage']} | "
    if "failed" in row:
        return f"{of}{row['failed']} | | | |"
    beside = f"{row['beside']:.3f} | {row['ratio']:.2f}" if "ratio" in row else " | "
    peak = f"{row['gigabytes']:.2f}" if "gigabytes" in row else "–"
    return f"{of}{row['seconds']:.3f} | {beside} | {peak} |"


def main():
    import torch

    from slashpatch.bridge.provenance import versions

    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--device", default="cuda")
    options.add_argument("--small", action="store_true", help="small sizes; nothing is written")
    chosen = options.parse_args()
    if chosen.device.startswith("cuda") and not torch.cuda.is_available():
        print("no CUDA device: not run")
        if not FILE.exists():  # figures of a machine that has one stay
            write_table("costs", "gpu", ["Not run: no CUDA device was at hand."])
        return
    device = Device(chosen.device)
    figures = run(device, chosen.small)
    lines = [
        f"{device.describe()}, torch {torch.__version__}; medians of {ROUNDS} after a warm-up, "
        "both sides of a ratio in turns; peaks are of the allocator, weights included.",
        "",
        *HEADER,
        *(line(row) for row in figures["rows"]),
    ]
    for dtype, found in figures["agreement"].items():
        lines += ["", f"{dtype}: " + "; ".join(f"{key} {value}" for key, value in found.items())]
    if chosen.small or not device.cuda:
        print("\n".join(lines))
        return
    whole = {**figures, "gpu": device.describe(), "machine": machine(), "versions": versions()}
    FILE.write_text(json.dumps(whole, indent=1) + "\n")
    write_table("costs", "gpu", lines)


if __name__ == "__main__":
    main()
