"""Figures in files (matplotlib)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import written_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..moments import Profile
    from ..scans import Scan


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure in the format of the file's suffix. Raises OutputError."""
    with written_whole(path) as file:
        figure.savefig(file, format=Path(path).suffix[1:], dpi=150)


def scan_figure(scan: Scan, control: Scan | None = None, kappa: float = 0.1) -> Figure:
    """Each head's highest score over the offsets; the offset stands in heads that reach κ."""
    from matplotlib.figure import Figure

    scans = [scan] if control is None else [scan, control]
    n_layers, n_heads, _ = scan.sums.shape
    height = 1.2 + len(scans) * (0.26 * n_heads + 0.75)
    figure = Figure(figsize=(max(6.0, 0.3 * n_layers + 1.8), height), layout="constrained")
    axes = figure.subplots(len(scans), 1, squeeze=False, sharex=True)[:, 0]
    for axis, one in zip(axes, scans, strict=True):
        image = _draw_scan(axis, one, kappa)
    axes[-1].set_xlabel("layer")
    figure.colorbar(image, ax=axes.tolist(), label="slash score", shrink=0.8, pad=0.01)
    figure.suptitle(
        f"{scan.provenance['model']}: highest slash score of each head\n"
        f"(number: its offset Δ, where the score is at least {kappa:g})",
        fontsize=11,
    )
    return figure


def _draw_scan(axis: Axes, scan: Scan, kappa: float):  # type: ignore[no-untyped-def]
    best = scan.scores.nan_to_num(0).max(-1)
    n_layers, n_heads = best.values.shape
    image = axis.imshow(best.values.T.numpy(), vmin=0, vmax=1, cmap="magma", aspect="auto")
    for layer in range(n_layers):
        for head in range(n_heads):
            score = float(best.values[layer, head])
            if score >= kappa:
                axis.text(
                    layer,
                    head,
                    str(scan.offsets[int(best.indices[layer, head])]),
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="black" if score > 0.6 else "white",
                )
    axis.set_yticks(range(n_heads), [f"H{head}" for head in range(n_heads)], fontsize=7)
    axis.set_xticks(range(0, n_layers, max(1, n_layers // 15)))
    axis.set_title(scan.provenance["prompts"][0]["source"].partition(",")[0], fontsize=10)
    return image


def losses_figure(
    losses: Mapping[str, Sequence[float]], title: str, xlabel: str = "loss (nats)"
) -> Figure:
    """One row per condition: every prompt's loss as a dot, and their mean as a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 0.8 + 0.45 * len(losses)), layout="constrained")
    axis = figure.subplots()
    for row, values in enumerate(losses.values()):
        axis.plot(values, [row] * len(values), "o", color="tab:blue", alpha=0.4, markersize=5)
        mean = sum(values) / len(values)
        axis.plot([mean, mean], [row - 0.35, row + 0.35], color="black")
    axis.set_yticks(range(len(losses)), list(losses))
    axis.invert_yaxis()
    axis.set_xlim(left=0)
    axis.set_xlabel(xlabel)
    axis.set_title(title, fontsize=11)
    axis.grid(axis="x", alpha=0.3)
    return figure


def profile_figure(profile: Profile, name: str) -> Figure:
    """Mean logit by offset: measured, and predicted from the mean query and key."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    axis = figure.subplots()
    axis.plot(profile.offsets, profile.measured, "o", markersize=4, label="measured mean")
    axis.plot(profile.offsets, profile.predicted, color="black", label="predicted from mean q, k")
    axis.set_xlabel("offset Δ")
    axis.set_ylabel("logit")
    axis.set_title(f"{name}: correlation {profile.correlation:.4f}", fontsize=11)
    axis.legend()
    axis.grid(alpha=0.3)
    return figure
