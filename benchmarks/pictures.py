"""Draws the pictures of docs/what-is-a-slash.md, and attention patterns for the gallery.

`make gallery` runs this and `benchmarks/gallery.py`.
"""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

import slashpatch as sp
from slashpatch.data.prompts import prompt_set
from slashpatch.maths.bands import NAMED_BANDS, band_mask
from slashpatch.maths.spectrum import logit_terms
from slashpatch.reporting.figures import profile_figure, save_figure

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
HEAD = sp.Head(16, 0)
#: Colours that a colour-blind reader tells apart (Okabe and Ito), and the map of attention.
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
ATTENTION = {"cmap": "cividis", "norm": PowerNorm(0.5, 0, 1), "interpolation": "nearest"}
N_TOKENS = 48
#: Prompts of the scan behind the profile and the ranks.
SCANNED = {"n_prompts": 8, "max_tokens": 256}


def draw_patterns(patterns, titles):
    """A figure of attention patterns [query, key] side by side; the future is left white."""
    figure = Figure(figsize=(7.6, 3.7), layout="compressed")
    axes = figure.subplots(1, len(patterns), sharey=True)
    for axis, pattern, title in zip(axes, patterns, titles, strict=True):
        past = torch.ones_like(pattern).tril().bool()
        image = axis.imshow(pattern.where(past, torch.nan).numpy(), **ATTENTION)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("token that is read")
    axes[0].set_ylabel("token that reads")
    bar = figure.colorbar(image, ax=axes, shrink=0.85, ticks=[0, 0.05, 0.2, 0.5, 1])
    bar.set_label("attention")
    return figure


def pattern_of(model, tokens, head=HEAD):
    """The attention pattern [query, key] of a head on one prompt."""
    name = f"blocks.{head.layer}.attn.hook_pattern"
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=name)
    return cache[name][0, head.head].cpu()


def pattern_figure(model):
    """A slash head's pattern on natural text and on random tokens, its diagonal pointed out."""
    found = {}
    for title, random_tokens in (("natural text", False), ("random tokens", True)):
        prompt = prompt_set(model, random_tokens=random_tokens, n_prompts=1, max_tokens=N_TOKENS)
        pattern = pattern_of(model, prompt.tokens[0])
        mean = float(pattern.diagonal(-1).mean())
        found[f"{title}\nmean of the diagonal Δ=1: {mean:.2f}"] = pattern
    figure = draw_patterns(list(found.values()), list(found))
    figure.axes[0].annotate(
        f"{HEAD} attends\nto the token before",
        xy=(30.5, 30.5),
        xytext=(27, 8),
        fontsize=9,
        arrowprops={"arrowstyle": "->", "color": "black"},
    )
    return figure


def terms_figure(scan):
    """The predicted logit of a head by offset, and what each band of rotary pairs adds to it."""
    moments = scan.require_moments()
    rotary, (q, k) = moments.rotary(HEAD.layer), moments.mean(HEAD)
    offsets = torch.arange(33)
    n = len(offsets)
    terms, _ = logit_terms(q.expand(n, -1), k.expand(n, -1), offsets, rotary)
    figure = Figure(figsize=(7.6, 3.2), layout="constrained")
    axis = figure.subplots()
    styles = dict(zip(NAMED_BANDS, ((ORANGE, "-"), (GREEN, "--"), (BLUE, ":")), strict=True))
    for band, (colour, style) in styles.items():
        part = terms[:, band_mask(band, rotary.inv_freq)].sum(-1)
        axis.plot(offsets, part - part.mean(), style, color=colour, label=f"{band} frequencies")
    total = terms.sum(-1)
    axis.plot(offsets, total - total.mean(), "o-", color="black", markersize=3, label="their sum")
    axis.set_xlabel("offset Δ")
    axis.set_ylabel("logit, less its mean over Δ")
    axis.set_title(f"{HEAD}: cosines that add up at Δ={int(total.argmax())}", fontsize=11)
    axis.legend()
    axis.grid(alpha=0.3)
    return figure


def rank_figure(scan):
    """r1 of queries and keys of every head; slash heads with Δ ≥ 1 in another colour."""
    ranks = scan.rank_one.set_index("name")
    slash = {str(entry.head) for entry in scan.slash_heads(min_offset=1)}
    figure = Figure(figsize=(7.6, 3.4), layout="constrained")
    axis = figure.subplots()
    for label, colour, marker, chosen in (
        ("other heads", "0.6", "o", ~ranks.index.isin(slash)),
        ("slash heads with Δ ≥ 1", ORANGE, "^", ranks.index.isin(slash)),
    ):
        rows = ranks[chosen]
        label += f" ({len(rows)}; median {rows.r1_q.median():.2f} and {rows.r1_k.median():.2f})"
        axis.plot(rows.r1_q, rows.r1_k, marker, color=colour, markersize=5, alpha=0.8, label=label)
    at = ranks.loc[str(HEAD)]
    axis.annotate(str(HEAD), (at.r1_q, at.r1_k), xytext=(-14, -15), textcoords="offset points")
    axis.set_xlabel("r1 of the queries")
    axis.set_ylabel("r1 of the keys")
    axis.set_title("how close queries and keys are to rank one, each head", fontsize=11)
    axis.legend(loc="lower right", fontsize=8)
    axis.grid(alpha=0.3)
    return figure


def main():
    """Draw them all."""
    model = sp.load(device="cpu")
    scan = sp.scan(model, **SCANNED)
    figures = {
        "pattern": pattern_figure(model),
        "rank": rank_figure(scan),
        "terms": terms_figure(scan),
        "profile": profile_figure(scan.profile(HEAD), str(HEAD)),
    }
    for name, figure in figures.items():
        save_figure(figure, PICTURES / f"{name}.png")


if __name__ == "__main__":
    main()
