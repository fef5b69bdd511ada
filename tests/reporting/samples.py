"""Made-up results of a model that does not exist, for tests of what people look at.

They have the shapes, names and columns of real ones; the numbers are drawn from a seed.
"""

import math

import pandas as pd
import torch

from slashpatch.data.heads import Head
from slashpatch.effects.result import Result
from slashpatch.explaining.parts import FromAxis, Origin, Variation
from slashpatch.explaining.result import Explanation
from slashpatch.maths.logit_shares import LogitShares
from slashpatch.scanning.moments import Moments
from slashpatch.scanning.result import Scan
from slashpatch.scanning.top_keys_result import TopKeys

#: Text that would act, or mislead, where it is not escaped.
HOSTILE = (
    '<script>alert(1)</script>"onerror=alert(2)//\u202egnp.\u2066</script>'
    "<img src=x onerror=alert(3)>"
)


def origin(model="tiny/model", fingerprint="f" * 64, **details):
    return {
        "model": model,
        "fingerprint": fingerprint,
        "architecture": "TinyForCausalLM",
        "dtype": "float32",
        "device": "cpu",
        "edits": [],
        "other_hooks": [],
        "versions": {"python": "3.11", "slashpatch": "0.1.0", "torch": "2.13.0"},
        **details,
    }


def scan(
    layers=3,
    heads=4,
    offsets=range(8),
    *,
    kv=2,
    d_head=16,
    n=4,
    seed=0,
    moments=True,
    source="natural text",
    **of,
):
    """A scan in which head L1H0 slashes at Δ=1."""
    generator = torch.Generator().manual_seed(seed)
    offsets = tuple(offsets)
    means = 0.05 * torch.rand(layers, heads, len(offsets), generator=generator, dtype=torch.float64)
    if 1 in offsets and layers > 1:
        means[1, 0, offsets.index(1)] = 0.8
    spread = 0.01 * torch.rand(means.shape, generator=generator, dtype=torch.float64)
    prompts = [{"source": f"{source}, seed {seed}", "n": n, "digest": f"{seed:016}"}]
    return Scan(
        offsets,
        means * n,
        (means**2 + spread**2) * n,
        torch.full((len(offsets),), n),
        n * 64,
        origin(prompts=prompts, seed=seed, **of),
        made_up_moments(layers, heads, kv, d_head, generator) if moments else None,
    )


def made_up_moments(layers, heads, kv, d_head, generator, n_tokens=256, n_profile=64):
    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    pairs = d_head // 2
    q, k = draw(layers, heads, d_head), draw(layers, kv, d_head)
    noise_q, noise_k = draw(layers, heads, d_head, d_head), draw(layers, kv, d_head, d_head)
    inv_freq = 10_000.0 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    return Moments(
        n_tokens=torch.tensor(n_tokens),
        gram_q=q[..., None] * q[..., None, :] * n_tokens + noise_q @ noise_q.mT,
        gram_k=k[..., None] * k[..., None, :] * n_tokens + noise_k @ noise_k.mT,
        sum_q=q * n_tokens,
        sum_k=k * n_tokens,
        sum_x=draw(layers, d_head) * n_tokens,
        unit_q=q * n_tokens / 8,
        unit_k=k * n_tokens / 8,
        unit_x=draw(layers, d_head) * n_tokens / 8,
        abs_q=torch.hypot(q[..., :pairs], q[..., pairs:]) * n_tokens * 1.2,
        abs_k=torch.hypot(k[..., :pairs], k[..., pairs:]) * n_tokens * 1.2,
        logits=draw(layers, heads, n_profile) * n_tokens,
        logit_rows=torch.full((layers, heads, n_profile), n_tokens),
        inv_freq=inv_freq.expand(layers, -1).clone(),
        gain=torch.ones(layers, dtype=torch.float64),
        scale=torch.full((layers,), 1 / math.sqrt(d_head), dtype=torch.float64),
        pairing=("half",) * layers,
    )


def explanation(head="L1H0", of=None, **details):
    """An explanation of a head of `scan()`."""
    of = of or scan()
    name = Head.parse(head)
    bands = {"high": 0.02, "medium": 0.5, "low": 0.8}
    return Explanation(
        head=name,
        offset=1,
        natural=float(of.scores[name.layer, name.head, of.offsets.index(1)]),
        random=0.6,
        rank=dict.fromkeys(
            ("r1_q", "r95_q", "cone_q", "r1_k", "r95_k", "cone_k", "cone_x"), (0.9, 0.75)
        ),
        dropped=bands,
        frozen=bands,
        rank_one={"q": 0.7, "k": 0.75, "qk": 0.72},
        profile=None if of.moments is None else of.profile(head),
        pairs=[(0, 6.28, 1.5), (1, 12.5, 0.5)],
        concentration=dict.fromkeys(bands, (0.9, 0.8)),
        verdict="RoPE-made slash",
        kappa=0.1,
        provenance=origin(
            prompts=[{"source": "natural text", "n": 4, "digest": "d"}], seed=0, **details
        ),
        shares=LogitShares(0.8, 0.1, 0.9, 0.75, 0.3, 1.5, 64),
        variation=Variation(0.1, 0.2, 0.01, 0.0),
        origin=Origin(
            0.85,
            0.72,
            FromAxis(0.9, 0.0, 0.1, 0.98, 0.97),
            FromAxis(0.7, 0.2, 0.1, 0.95, 0.9),
            {"q": 0.1, "k": 0.05, "qk": 0.02},
            {"same_size": [0.5, 0.6], "random": [0.7], "principal": [0.7, 0.6, 0.65]},
        ),
    )


def _effect(value, width=0.3):
    return {"effect": value, "low": value - width, "high": value + width, "p": 0.01, "q": 0.02}


def _pairs_frame():
    rows = [
        {"patched": patched, "part": "diagonal", "direction": direction, "n": 4}
        | {"metric": "logit difference", "baseline": -6.0, "edited": share * 12 - 6}
        | _effect(12 * share)
        | {"normalized": share, "normalized_low": share - 0.1, "normalized_high": share + 0.1}
        for patched, share in (("L1H0@1", 0.7), ("L1H0@1, L2H1.k", 0.9))
        for direction in ("denoising", "noising")
    ]
    return pd.DataFrame(rows)


def _direct_frame(edit):
    rows = [
        {"edit": edit, "part": part, "metric": "copying", "of": "", "n": 4}
        | {"baseline": 2.0, "edited": 2.0 + value, **_effect(value)}
        | dict(zip(("repaired", "repaired_low", "repaired_high"), shares, strict=True))
        for part, value, shares in (
            ("direct", 2.0, (float("nan"),) * 3),
            ("direct, new norm", 1.9, (float("nan"),) * 3),
            ("total", 0.5, (float("nan"),) * 3),
            ("repair", -1.5, (0.75, 0.7, 0.8)),
        )
    ]
    return pd.DataFrame(rows)


def result(kind, **of):
    """A result of a kind in `KINDS` of test_notebook.py."""
    edit = "KnockOut(L1H0, 1)"
    details = {
        "confidence": 0.95,
        "seed": 0,
        "prompts": {"n": 4, "source": "repeated random tokens"},
    }
    tables, remarks = {}, ("The edit raises the loss.",)
    if kind == "measure":
        base = {"edit": edit, "metric": "copying", "of": "", "n": 4, "baseline": 2.0, "edited": 8.0}
        no_draws = dict.fromkeys(("p_rank", "as_large"), float("nan"))
        frame = pd.DataFrame(
            [
                {**base, "against": "clean", **_effect(6.0), **no_draws},
                {
                    **base,
                    "against": "random-heads:2",
                    **_effect(5.9),
                    "p_rank": 1 / 3,
                    "as_large": 0.0,
                },
            ]
        )
        tables["draws"] = pd.DataFrame(
            [
                {
                    "edit": edit,
                    "control": "random-heads",
                    "drawn": f"KnockOut(L1H{head}, 1)",
                    "metric": "copying",
                    "of": "",
                    "effect": 0.05 * head,
                }
                for head in (2, 3)
            ]
        )
        details |= {"measured": [edit], "metrics": ["copying"], "controls": ["random-heads:2"]}
    elif kind == "flow":
        frame = pd.DataFrame(
            [
                {
                    "edit": name,
                    "offset": offset,
                    "flow": flow / offset,
                    "flow_low": 0.8 * flow / offset,
                    "flow_high": 1.2 * flow / offset,
                    **(
                        _effect(-0.2)
                        if name != "clean"
                        else dict.fromkeys(_effect(0), float("nan"))
                    ),
                }
                for name, flow in (("clean", 1.5), (edit, 0.8))
                for offset in range(1, 9)
            ]
        )
        details |= {"measured": [edit]}
    elif kind == "copying":
        frame = pd.DataFrame(
            [
                {
                    "edit": name,
                    "lag": lag,
                    "top1": share,
                    "top1_low": share - 0.02,
                    "top1_high": share + 0.02,
                    "loss": 3.0,
                    "loss_low": 2.5,
                    "loss_high": 3.5,
                    **(
                        _effect(0.5) if name != "clean" else dict.fromkeys(_effect(0), float("nan"))
                    ),
                }
                for name, shares in (("clean", (0.6, 0.1)), (edit, (0.1, 0.3)))
                for lag, share in enumerate(shares, 1)
            ]
        )
        details |= {"measured": [edit]}
    elif kind == "screen":
        nothing = dict.fromkeys(("effect", "low", "high", "p", "q"), float("nan"))
        frame = pd.DataFrame(
            [
                {
                    "name": f"L{layer}H{head}",
                    "layer": layer,
                    "head": head,
                    "edit": f"KnockOut(L{layer}H{head}, 1)",
                    "metric": "copying",
                    "n": 2,
                    "estimate": estimate,
                    "size": abs(estimate),
                    **(_effect(value) if value is not None else nothing),
                    "why": why,
                }
                for layer, head, estimate, value, why in (
                    (1, 0, 2.0, 6.0, "top"),
                    (2, 1, -0.5, -1.5, "top"),
                    (0, 3, 0.01, 0.7, "flagged"),
                    (2, 3, 0.02, 0.05, "audit"),
                    (0, 0, 0.01, None, ""),
                )
            ]
        )
        details |= {"metric": "copying", "proxy": None, "split": True}
        tables["audit"] = pd.DataFrame([{"above": 0.5, "missed_at_most": 1, "recall": 1.0}])
    elif kind == "dose":
        frame = pd.DataFrame(
            [
                {
                    "dose": float(dose),
                    "edit": f"ScaleOffsets(L1H0, offsets=1, factor={dose:.1f})",
                    "metric": "copying",
                    "against": against,
                    "n": 4,
                    "baseline": 2.0,
                    "edited": 2.0 + value * dose,
                    **_effect(value * dose),
                    "p_rank": float("nan") if against == "clean" else 1 / 3,
                    "as_large": float("nan") if against == "clean" else 0.0,
                }
                for against, value in (("clean", 3.0), ("random-heads:2", 2.8))
                for dose in (0.0, 0.5, 1.0, 2.0)
            ]
        )
        tables["trend"] = pd.DataFrame(
            [{"metric": "copying", "against": "clean", "n": 4, "spearman": 1.0, "slope": 3.0}]
        )
        details |= {"measured": ["ScaleOffsets(L1H0, 1, {})"], "metrics": ["copying"]}
    elif kind == "circuit":
        frame = pd.DataFrame(
            [
                {
                    "what": what,
                    "member": member,
                    "metric": "copying",
                    "n": 4,
                    "value": 3.0,
                    "share": share,
                    "low": share - 0.1,
                    "high": share + 0.1,
                    "p": 0.1,
                    "q": 0.2,
                    "p_rank": 0.05 if what == "faithfulness" else float("nan"),
                }
                for what, member, share in (
                    ("faithfulness", "", 0.9),
                    ("random sets", "", 0.05),
                    ("beyond random sets", "", 0.85),
                    ("left without", "", 0.1),
                    ("incompleteness", "", 0.1),
                    ("minimality", "L1H0", 0.8),
                    ("minimality", "L2H1@3", 0.7),
                )
            ]
        )
        tables["random_sets"] = pd.DataFrame(
            {"drawn": ["L1H2, L2H3", "L1H1, L2H0"], "share": [0.1, 0.0]}
        )
        details |= {"measured": ["L1H0, L2H1@3"], "metric": "copying"}
    elif kind == "paths":
        frame = pd.DataFrame(
            [
                {
                    "edit": edit,
                    "reader": reader,
                    "input": part,
                    "metric": "copying",
                    "baseline": 2.0,
                    "edited": 2.0 + value,
                    **_effect(value),
                }
                for reader, part, value in (
                    ("L2H1", "k", 3.0),
                    ("L2H1", "q", 0.1),
                    ("L2H3", "v", -0.1),
                )
            ]
        )
        details |= {"measured": [edit], "metric": "copying"}
    elif kind == "pairs":
        frame = _pairs_frame()
        details |= {"measured": ["L1H0@1", "L1H0@1, L2H1.k"], "metric": "logit difference"}
    elif kind == "direct":
        frame = _direct_frame(edit)
        details |= {"measured": [edit], "metric": "copying"}
    elif kind == "persistence":
        frame = pd.DataFrame(
            [
                {
                    "name": f"L{layer}H{head}",
                    "layer": layer,
                    "head": head,
                    "offset": offset,
                    "n": 4,
                    "natural": natural,
                    "natural_low": natural - 0.02,
                    "natural_high": natural + 0.02,
                    "random": other,
                    "random_low": other - 0.01,
                    "random_high": other + 0.01,
                    "difference": other - natural,
                    "low": other - natural - 0.03,
                    "high": other - natural + 0.03,
                    "p": 0.01,
                    "q": 0.02,
                }
                for layer, head, offset, natural, other in (
                    (1, 0, 1, 0.8, 0.7),
                    (2, 1, 0, 0.3, 0.08),
                    (0, 3, 2, 0.05, 0.2),
                    (0, 0, 1, 0.02, 0.01),
                )
            ]
        )
        details |= {"kappa": 0.1, "kappa_random": 0.05, "against": "random"}
    else:
        frame = pd.DataFrame(
            [
                {
                    "name": f"L{layer}H{head}",
                    "layer": layer,
                    "head": head,
                    "edit": f"KnockOut(L{layer}H{head}, offsets=1)",
                    "metric": "copying",
                    "n": 4,
                    "baseline": 2.0,
                    "edited": 2.5,
                    **_effect(5.0 if (layer, head) == (1, 0) else 0.01 * head),
                }
                for layer in range(3)
                for head in range(4)
            ]
        )
        details |= {"metric": "copying"}
    return Result(kind, frame, tables, remarks, origin(**details, **of))


def text(
    n=40,
    heads=("L1H0", "L2H3"),
    tokens=None,
    top=4,
    offsets=range(8),
    seed=0,
    scattered=False,
    **of,
):
    """A text of n tokens in which each token reads the one before most; or any keys at all."""
    generator = torch.Generator().manual_seed(seed)
    tokens = tuple(tokens or (f" word{i}" if i % 9 else "\n" for i in range(n)))
    n = len(tokens)
    keys = torch.full((len(heads), n, top), -1)
    weights = torch.zeros(len(heads), n, top)
    for place in range(top):
        weights[:, place + 1 :, place] = 0.5 / 2**place
        keys[:, place + 1 :, place] = torch.arange(n - place - 1)
    if scattered:
        weights = (
            torch.rand(len(heads), n, top, generator=generator).sort(-1, descending=True).values
        )
        weights /= top
        keys = (
            torch.rand(len(heads), n, top, generator=generator) * torch.arange(n)[:, None]
        ).long()
    diagonals = torch.zeros(len(heads), n, len(offsets))
    for column, offset in enumerate(offsets):
        diagonals[:, offset:, column] = 0.1 * torch.rand(
            len(heads), n - offset, generator=generator
        )
    if 1 in offsets:
        diagonals[:, 1:, tuple(offsets).index(1)] = 0.5
    details = origin(prompts=[{"source": "a text", "n": 1, "digest": "d"}], seed=seed, **of)
    return TopKeys(
        tuple(Head.parse(name) for name in heads),
        tokens,
        torch.arange(n),
        keys,
        weights,
        tuple(offsets),
        diagonals,
        details,
    )
