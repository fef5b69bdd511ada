"""Margins of the default model's heads, and scores without a part of their frequencies.

Part of `python benchmarks/cutoffs.py`.
"""

import itertools

import torch
from common import rank_correlation

import slashpatch as sp
from slashpatch.maths.bands import band_pairs
from slashpatch.maths.interference import margins_by_cutoff, profile_score
from slashpatch.maths.resampling import mean_inference

#: Tokens of a prompt.
N_TOKENS = 256
#: What is dropped of a head's frequencies, and what is left, by name.
CUTS = (
    ("all", "", "share 0-1"),
    ("highest half", "share 0.5-1", "share 0-0.5"),
    ("highest quarter", "share 0.25-1", "share 0-0.25"),
    ("highest eighth", "share 0.125-1", "share 0-0.125"),
    ("all but the highest eighth", "share 0-0.125", "share 0.125-1"),
    ("all but the highest quarter", "share 0-0.25", "share 0.25-1"),
    ("lowest half", "share 0-0.5", "share 0.5-1"),
)


def head_table(scan):
    """Margins of slash heads and of all others, each at its best offset from 1."""
    moments = scan.require_moments()
    best = scan.scores[:, :, 1:].max(-1)
    kept = {
        "all": "high+medium+low",
        "without low": "high+medium",
        "high alone": "high",
        "without high": "medium+low",
        "low alone": "low",
    }
    margins = {name: [] for name in kept}
    alike = []
    for layer, head in itertools.product(*map(range, best.values.shape)):
        theta = moments.rotary(layer).inv_freq
        at = int(best.indices[layer, head]) + 1
        amplitude, phase = moments.amplitude_and_phase(sp.Head(layer, head))
        for name, band in kept.items():
            some = list(band_pairs(band, theta))
            found = margins_by_cutoff(theta[some], at, N_TOKENS, amplitude[some], phase[some])
            margins[name].append(float(found[0, -1]))
        alike.append(profile_score(moments.profile(sp.Head(layer, head)).predicted, at))
    scores = best.values.flatten()
    slash = scores >= 0.1
    groups = {"slash heads": slash, "all others": ~slash}
    titles = " | ".join(f"{len(scores[some])} {name}" for name, some in groups.items())
    lines = [f"| frequencies | {titles} |", "|---|---|---|"]
    for name, values in margins.items():
        cells = []
        for some in groups.values():
            sample = torch.tensor(values, dtype=torch.float64)[some]
            low, high, _ = mean_inference(sample)
            share = f"{(sample > 0).sum()} of {len(sample)} above 0"
            cells.append(f"{sample.mean():.3f} [{low:.3f}, {high:.3f}], {share}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    x = torch.tensor(margins["all"])
    said = [f"margin {rank_correlation(x, scores)}"]
    said += [f"score of the predicted profile {rank_correlation(alike, scores)}"]
    return [
        *lines,
        "",
        "Spearman's correlation with the measured score, over all heads (95 % "
        f"interval by bootstrap over heads): {', '.join(said)}.",
    ]


def drop_table(model, scan):
    """Measured scores of three slash heads with a part of their frequencies dropped."""
    moments = scan.require_moments()
    lines = ["| head | kept frequencies | margin | score if all tokens were alike | measured |"]
    lines.append("|---|---|--:|--:|--:|")
    alike, measured = [], []
    for found in scan.slash_heads(0.1, 1)[:3]:
        head, at = found.head, found.offset
        theta = moments.rotary(head.layer).inv_freq
        amplitude, phase = moments.amplitude_and_phase(head)
        for name, dropped, kept in CUTS:
            some = list(band_pairs(kept, theta))
            margins = margins_by_cutoff(theta[some], at, N_TOKENS, amplitude[some], phase[some])
            angle = torch.arange(N_TOKENS)[:, None] * theta[some] + phase[some]
            alike.append(profile_score((amplitude[some] * angle.cos()).sum(-1), at))
            with sp.patch(model, *([sp.DropBand(head, dropped)] if dropped else [])):
                again = sp.scan(
                    model,
                    offsets=[at],
                    n_prompts=4,
                    max_tokens=N_TOKENS,
                    moments=False,
                    progress=False,
                )
            measured.append(float(again.scores[head.layer, head.head, 0]))
            margin = float(margins[0, -1])
            cells = f"{name} | {margin:.3f} | {alike[-1]:.2f} | {measured[-1]:.2f}"
            lines.append(f"| {head}, Δ={at} | {cells} |")
            print(lines[-1], flush=True)
    return [
        *lines,
        "",
        f"Spearman's correlation of the last two columns: {rank_correlation(alike, measured)}.",
    ]
