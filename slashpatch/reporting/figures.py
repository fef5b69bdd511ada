"""Figures with matplotlib: scans, losses, profiles and effects."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.files import written_whole
from .charts.effect_rows import flow_rows, lag_rows, path_rows, screen_rows, sweep_rows
from .charts.effects import WHYS
from .charts.palette import CATEGORIES, DARK_TEXT_FROM, DIVERGING, SCORES
from .charts.rows import grid_rows, tokens_of
from .style import ink, line_style, new_figure, plain_numbers, shortened, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

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
    grids = {tokens_of(each): (each.scores, each.offsets) for each in (scan, control) if each}
    if control is not None and len(grids) < 2:
        grids[f"{tokens_of(control)} (control)"] = (control.scores, control.offsets)
    return grid_figure(
        grids,
        f"{scan.provenance['model']}: highest slash score of each head\n"
        f"(number: its offset Δ, where the score is at least {kappa:g})",
        kappa,
    )


@styled
def grid_figure(
    grids: Mapping[str, tuple[Tensor, Sequence[int]]],
    title: str | None,
    kappa: float = 0.1,
    most_numbers: int | None = None,
) -> Figure:
    """Draw the highest score of each head, one grid below the other.

    Args:
        grids: Scores [layer, head, offset] and their offsets, by the grid's title.
        title: Above all; None for none.
        kappa: Least score of a head whose offset is written.
        most_numbers: How many offsets to write in a grid at most, those of the highest scores.
    """
    n_layers, n_heads, _ = next(iter(grids.values()))[0].shape
    height = (1.2 if title else 0.6) + len(grids) * (0.26 * min(n_heads, 20) + 0.75)
    figure = new_figure(min(max(6.0, 0.3 * n_layers + 1.8), 16.0), height)
    axes = figure.subplots(len(grids), 1, squeeze=False, sharex=True)[:, 0]
    for axis, (name, (scores, offsets)) in zip(axes, grids.items(), strict=True):
        image = _draw_grid(axis, scores, offsets, kappa, most_numbers)
        axis.set_title(shortened(name, 80))
    axes[-1].set_xlabel("layer")
    figure.colorbar(image, ax=axes.tolist(), label="slash score", shrink=0.8, pad=0.01)
    if title:
        first, *rest = title.split("\n")
        figure.suptitle("\n".join([shortened(first, 100), *rest]), fontsize=11)
    return figure


def _draw_grid(
    axis: Axes, scores: Tensor, offsets: Sequence[int], kappa: float, most_numbers: int | None
) -> Any:
    rows = grid_rows(scores, offsets)
    table = rows.pivot(index="head", columns="layer", values="score")
    n_heads, n_layers = table.shape
    image = axis.imshow(
        table.to_numpy(), vmin=0, vmax=1, cmap=SCORES, aspect="auto", interpolation="none"
    )
    strong = rows.query("score >= @kappa").sort_values("score", ascending=False, kind="stable")
    shown = strong.head(len(rows) if most_numbers is None else most_numbers)
    for row in shown.to_dict(orient="records"):
        axis.text(
            row["layer"],
            row["head"],
            str(row["offset"]),
            ha="center",
            va="center",
            fontsize=7 if n_heads <= 20 else 5,
            color="black" if row["score"] > DARK_TEXT_FROM else "white",
        )
    step = max(1, n_heads // 16)
    axis.set_yticks(
        range(0, n_heads, step), [f"H{head}" for head in range(0, n_heads, step)], fontsize=7
    )
    axis.set_xticks(range(0, n_layers, max(1, n_layers // 15)))
    return image


@styled
def losses_figure(
    losses: Mapping[str, Sequence[float]], title: str, xlabel: str = "loss (nats)"
) -> Figure:
    """Draw one row for each condition: a dot for each prompt's loss, and a line at their mean."""
    figure = new_figure(7.5, 0.8 + 0.45 * len(losses))
    axis = figure.subplots()
    for row, values in enumerate(losses.values()):
        axis.plot(values, [row] * len(values), "o", color=CATEGORIES[0], alpha=0.4, markersize=5)
        mean = sum(values) / len(values)
        axis.plot([mean, mean], [row - 0.35, row + 0.35], color=ink())
    axis.set_yticks(range(len(losses)), [shortened(name, 80) for name in losses])
    axis.invert_yaxis()
    axis.set_xlim(left=0)
    axis.set_xlabel(xlabel)
    axis.set_title(title, fontsize=11)
    axis.grid(axis="x", alpha=0.3)
    return figure


@styled
def profile_figure(profile: Profile, name: str) -> Figure:
    """Draw the mean logit by offset: measured, and predicted from mean query and mean key."""
    figure = new_figure(7.5, 3.2)
    axis = figure.subplots()
    draw_profile(axis, profile)
    axis.set_title(f"{name}: correlation {profile.correlation:.4f}", fontsize=11)
    return figure


def draw_profile(axis: Axes, profile: Profile) -> None:
    """Draw a head's mean logit by offset, measured and predicted, on an axis."""
    axis.plot(profile.offsets, profile.measured, "o", markersize=4, label="measured mean")
    axis.plot(profile.offsets, profile.predicted, color=ink(), label="predicted from mean q, k")
    axis.set_xlabel("offset Δ (tokens)")
    axis.set_ylabel("mean logit")
    axis.legend()
    axis.grid(alpha=0.3)


@styled
def effects_figure(result: Result, top: int = 20) -> Figure:
    """Draw a result of any kind; of `measure` (for each metric) and `paths`, the first rows."""
    if result.kind in ("measure", "pairs", "direct"):
        from .forest import forest_figure, parts_figure

        draw = forest_figure if result.kind == "measure" else parts_figure
        return draw(result, rows=top)
    if result.kind == "paths":
        return paths_figure(result, top)
    if result.kind == "persistence":
        from .persistence_figure import persistence_figure

        return persistence_figure(result)
    if result.kind in ("dose", "circuit"):
        from .dose_figure import circuit_figure, dose_figure

        return dose_figure(result) if result.kind == "dose" else circuit_figure(result)
    if result.kind == "screen":
        return _screen_figure(result)
    figure = new_figure(*(_grid_size(result) if result.kind == "sweep" else (7.5, 4.2)))
    axis = figure.subplots()
    {"flow": _draw_flow, "copying": _draw_lags, "sweep": _draw_sweep}[result.kind](axis, result)
    return figure


def _draw_flow(axis: Axes, result: Result) -> None:
    """Draw flow by offset: one curve for each condition, with its interval."""
    frame = flow_rows(result)
    for index, (edit, rows) in enumerate(frame.groupby("edit", sort=False)):
        style = line_style(index)
        axis.plot(rows["offset"], rows["flow"], markersize=4, label=shortened(str(edit)), **style)
        axis.fill_between(
            rows["offset"], rows["low"], rows["high"], color=style["color"], alpha=0.18
        )
    axis.set_xlabel("offset Δ from the replaced token to the prediction (tokens)")
    axis.set_ylabel("KL divergence (nats)")
    if frame["flow"].min() > 0:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(plain_numbers())
        axis.yaxis.set_minor_formatter(plain_numbers())
    axis.set_title(shortened(f"{result.provenance['model']}: flow by offset", 80))
    axis.legend()
    axis.grid(alpha=0.3)


def _draw_lags(axis: Axes, result: Result) -> None:
    """Draw how often each lag is copied: a group of bars for each lag, a bar for each condition."""
    frame = lag_rows(result)
    groups = list(frame.groupby("edit", sort=False))
    width = 0.8 / max(1, len(groups))
    for place, (edit, rows) in enumerate(groups):
        style = line_style(place)
        at = rows["lag"] + (place - (len(groups) - 1) / 2) * width
        ends = [rows["top1"] - rows["low"], rows["high"] - rows["top1"]]
        axis.bar(at, rows["top1"], width, color=style["color"], alpha=0.3)
        axis.errorbar(
            at,
            rows["top1"],
            [end.clip(lower=0) for end in ends],
            fmt=style["marker"],
            color=style["color"],
            markersize=5,
            label=shortened(str(edit)),
        )
    axis.set_xticks(sorted(set(frame["lag"])))
    axis.set_xlabel("lag in the first copy (1: the next token)")
    axis.set_ylabel("share of tokens where it is the likeliest")
    axis.set_ylim(0, 1)
    axis.set_title(shortened(f"{result.provenance['model']}: which token is copied", 80))
    axis.legend()
    axis.grid(axis="y", alpha=0.3)


def _draw_sweep(axis: Axes, result: Result) -> None:
    """Draw each head's effect, the largest over offsets; colours are symmetric around zero.

    Heads that were not run are grey.
    """
    from matplotlib.colors import LinearSegmentedColormap

    rows = sweep_rows(result)
    table = rows.pivot(index="head", columns="layer", values="effect")
    table.columns = table.columns.astype(int)
    most = float(table.abs().max().max()) or 1.0
    image = axis.imshow(
        table.to_numpy(),
        vmin=-most,
        vmax=most,
        cmap=LinearSegmentedColormap.from_list("effects", DIVERGING),
        aspect="auto",
        interpolation="none",
    )
    clear = rows.query("q < 0.05")
    at = clear["layer"].map({layer: place for place, layer in enumerate(table.columns)})
    row = clear["head"].map({head: place for place, head in enumerate(table.index)})
    # All dots are one line with gaps, which stays small in a notebook's SVG.
    dots = np.stack([at - 0.005, at + 0.005, np.full(len(at), np.nan)], axis=-1).ravel()
    axis.plot(dots, np.repeat(row, 3), color="black", lw=2.5, solid_capstyle="round")
    axis.set_yticks(range(len(table)), [f"H{head}" for head in table.index], fontsize=7)
    step = max(1, len(table.columns) // 15)
    axis.set_xticks(range(0, len(table.columns), step), table.columns[::step].astype(str))
    axis.set_xlabel("layer")
    label = f"effect on {shortened(result.provenance['metric'])}"
    axis.figure.colorbar(image, ax=axis, label=label)
    marks = "dot: q < 0.05"
    if bool(table.isna().any(axis=None)):  # a cell of no effect is nearly white as well
        axis.set_facecolor("darkgray")
        marks += "; grey: not run"
    axis.set_title(f"{shortened(result.provenance['model'])}\neffect at each head ({marks})")


def _grid_size(result: Result) -> tuple[float, float]:
    """Return the size in inches of a figure with a grid of layers by heads."""
    layers, heads = (result.frame[name].nunique() for name in ("layer", "head"))
    return min(max(4.5, 0.3 * layers + 2.4), 16.0), 1.5 + 0.26 * min(heads, 20)


def _screen_figure(result: Result) -> Figure:
    """Draw the effects that were run as a grid, and below it estimates against effects."""
    width, height = _grid_size(result)
    figure = new_figure(max(width, 6.0), height + 3.6)
    grid, axis = figure.subplots(2, height_ratios=[height, 3.6])
    _draw_sweep(grid, result)
    rows = screen_rows(result)
    for index, why in enumerate(WHYS):
        part, style = rows[rows["why"] == why], line_style(index)
        ends = [part["effect"] - part["low"], part["high"] - part["effect"]]
        axis.errorbar(
            part["estimate"],
            part["effect"],
            yerr=[end.clip(lower=0) for end in ends],
            fmt=style["marker"],
            color=style["color"],
            markersize=4,
            elinewidth=0.8,
            label=f"{why} ({len(part)})",
        )
    axis.axline((0, 0), slope=1, color="gray", lw=0.8)
    axis.set_xlabel("estimate by the gradient (line: estimate = effect)")
    axis.set_ylabel(f"effect on {shortened(result.provenance['metric'])}")
    axis.legend(title="why it was run")
    axis.grid(alpha=0.3)
    return figure


@styled
def paths_figure(result: Result, top: int = 12) -> Figure:
    """Draw the strongest paths, with their intervals."""
    rows = path_rows(result, top).iloc[::-1]
    figure = new_figure(7.5, 0.9 + 0.3 * max(1, len(rows)))
    axis = figure.subplots()
    ends = [rows["effect"] - rows["low"], rows["high"] - rows["effect"]]
    axis.errorbar(
        rows["effect"],
        range(len(rows)),
        xerr=[end.clip(lower=0) for end in ends],
        fmt="o",
        color=CATEGORIES[0],
        capsize=2,
    )
    axis.axvline(0, color=ink(), lw=0.8, ls="--")
    axis.set_yticks(range(len(rows)), [shortened(label) for label in rows["row"]], fontsize=8)
    metric = ", ".join(dict.fromkeys(result.frame["metric"]))
    axis.set_xlabel(f"effect on {shortened(metric)} through this input alone")
    model, measured = result.provenance["model"], ", ".join(result.provenance["measured"])
    axis.set_title(shortened(f"{model}: {measured}", 80))
    axis.grid(axis="x", alpha=0.3)
    return figure
