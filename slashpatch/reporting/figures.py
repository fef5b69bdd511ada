"""Figures with matplotlib, to be written to files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.files import written_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..effects.result import Result
    from ..scanning.moments import Profile
    from ..scanning.result import Scan


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure in the format of the file's suffix. Raises OutputError."""
    with written_whole(path) as file:
        figure.savefig(file, format=Path(path).suffix[1:], dpi=150)


def scan_figure(scan: Scan, control: Scan | None = None, kappa: float = 0.1) -> Figure:
    """Draw each head's highest slash score over all offsets.

    Cells of heads whose score reaches κ show the offset. `control` is drawn below.
    """
    from matplotlib.figure import Figure

    scans = [scan] if control is None else [scan, control]
    n_layers, n_heads, _ = scan.sums.shape
    height = 1.2 + len(scans) * (0.26 * n_heads + 0.75)
    figure = Figure(figsize=(max(6.0, 0.3 * n_layers + 1.8), height), layout="constrained")
    axes = figure.subplots(len(scans), 1, squeeze=False, sharex=True)[:, 0]
    for axis, shown in zip(axes, scans, strict=True):
        image = _draw_scan(axis, shown, kappa)
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
    """Draw one row for each condition: a dot for each prompt's loss, and a line at their mean."""
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
    """Draw the mean logit by offset: measured, and predicted from mean query and mean key."""
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


def effects_figure(result: Result) -> Figure:
    """Draw a result of `flow`, `copying` or `sweep`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axis = figure.subplots()
    {"flow": _draw_flow, "copying": _draw_lags, "sweep": _draw_sweep}[result.kind](axis, result)
    return figure


def _draw_flow(axis: Axes, result: Result) -> None:
    """Draw flow by offset: one curve for each condition, with its interval."""
    for edit, rows in result.frame.groupby("edit", sort=False):
        (line,) = axis.plot(rows["offset"], rows["flow"], "o-", markersize=3, label=str(edit))
        axis.fill_between(
            rows["offset"], rows["flow_low"], rows["flow_high"], color=line.get_color(), alpha=0.2
        )
    axis.set_xlabel("offset Δ from the replaced token to the prediction")
    axis.set_ylabel("KL divergence (nats)")
    if result.frame["flow"].min() > 0:
        axis.set_yscale("log")
    axis.set_title(f"{result.provenance['model']}: flow by offset", fontsize=11)
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)


def _draw_lags(axis: Axes, result: Result) -> None:
    """Draw how often each lag is copied: a group of bars for each lag, a bar for each condition."""
    groups = list(result.frame.groupby("edit", sort=False))
    width = 0.8 / len(groups)
    for place, (edit, rows) in enumerate(groups):
        at = rows["lag"] + (place - (len(groups) - 1) / 2) * width
        ends = [rows["top1"] - rows["top1_low"], rows["top1_high"] - rows["top1"]]
        axis.bar(at, rows["top1"], width, label=str(edit))
        axis.errorbar(
            at, rows["top1"], [end.clip(lower=0) for end in ends], fmt="none", color="black", lw=1
        )
    axis.set_xticks(sorted(set(result.frame["lag"])))
    axis.set_xlabel("lag in the first copy (1: the next token)")
    axis.set_ylabel("how often it is the likeliest token")
    axis.set_ylim(0, 1)
    axis.set_title(f"{result.provenance['model']}: which token is copied", fontsize=11)
    axis.legend(fontsize=8)
    axis.grid(axis="y", alpha=0.3)


def _draw_sweep(axis: Axes, result: Result) -> None:
    """Draw each head's effect, the largest over offsets; colours are symmetric around zero."""
    frame = result.frame.sort_values("effect", key=abs)
    table = frame.drop_duplicates("name", keep="last").pivot(
        index="head", columns="layer", values="effect"
    )
    most = float(table.abs().max().max()) or 1.0
    image = axis.imshow(
        table.to_numpy(), vmin=-most, vmax=most, cmap="RdBu_r", aspect="auto", origin="upper"
    )
    axis.set_yticks(range(len(table)), [f"H{head}" for head in table.index], fontsize=7)
    step = max(1, len(table.columns) // 15)
    axis.set_xticks(range(0, len(table.columns), step), table.columns[::step])
    axis.set_xlabel("layer")
    axis.figure.colorbar(image, ax=axis, label=f"effect on {result.provenance['metric']}")
    axis.set_title(f"{result.provenance['model']}: effect of the edit at each head", fontsize=11)


def paths_figure(result: Result, top: int = 12) -> Figure:
    """Draw the strongest paths, with their intervals."""
    from matplotlib.figure import Figure

    rows = result.frame.head(top + 1).iloc[::-1]
    figure = Figure(figsize=(7.5, 0.9 + 0.3 * len(rows)), layout="constrained")
    axis = figure.subplots()
    labels = [f"{row.reader} {row.input}".strip() for row in rows.itertuples()]
    ends = [rows["effect"] - rows["low"], rows["high"] - rows["effect"]]
    axis.errorbar(
        rows["effect"],
        range(len(rows)),
        xerr=[end.clip(lower=0) for end in ends],
        fmt="o",
        color="black",
        capsize=2,
    )
    axis.axvline(0, color="grey", lw=0.8)
    axis.set_yticks(range(len(rows)), labels, fontsize=8)
    axis.set_xlabel(f"effect on {rows['metric'].iloc[0]} through this input alone")
    axis.set_title(f"{result.provenance['model']}: {result.provenance['measured'][0]}", fontsize=11)
    axis.grid(axis="x", alpha=0.3)
    return figure
