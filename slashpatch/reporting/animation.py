"""The film of a run on text: every head's attention pattern while the model learns."""

from __future__ import annotations

import math
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, UInt8

from ..data.files import require_output, written_whole
from ..data.progress import progress_over
from ..errors import OutputError, PlotError
from ..scanning.result import require_kappa
from ..theory.text.changes import INDUCTION
from .charts.palette import CATEGORIES, SCORES
from .style import ink, new_figure, styled
from .text_run_figure import curve, eval_loss

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

    from ..theory.text.run import TextRun

#: Colours of slashes, induction, and the two losses.
_SLASH, _INDUCTION, _COPYING, _HELD_OUT = (CATEGORIES[index] for index in (1, 0, 2, 6))
#: How long the last frame stays, in seconds; and pixels per inch.
_LAST, _DPI = 3.0, 100
_NOTE = (
    "attention (query down, key right): random tokens, then the same again\n"
    "framed: a slash at Δ ≥ 1, or induction"
)
#: What the film says when a quantity changes.
_SAYS = {
    "strongest slash": "slash in {head} at Δ = {offset}",
    "slash below induction": "slash in {head} at Δ = {offset}",
    "induction": "{head} finds the earlier copy",
    "copying loss": "the copying loss falls",
}


def save_animation(
    run: TextRun,
    path: str | os.PathLike[str],
    *,
    frames_per_second: float | int = 6,
    kappa: float = 0.3,
    progress: bool | None = None,
) -> None:
    """Write a film of a run on text, a frame for each measured step: .gif, or .mp4 with ffmpeg.

    It shows each head's attention on `<s>` and random tokens that come twice (colours go with the
    square root of the attention), curves of the run up to the step, and what appeared last
    according to `run.changes()`, with the step of half of its change. A head is framed in one
    colour while its prefix matching is 0.2 or more, else in another while its slash score on
    held-out text is κ or more at some offset from 1 on. The last frame stays for three seconds.

    Args:
        run: A finished run.
        path: A file that ends in .gif or .mp4; it is written whole or not at all.
        frames_per_second: From 1 to 50.
        kappa: The threshold κ, from 0 to 1.
        progress: Whether to show a progress bar; None: on a terminal only.

    Raises:
        PlotError: Another number of frames per second, a measured step without patterns, or an .mp4
            file where ffmpeg is not installed.
        OutputError: Another suffix, or a file that cannot be written.
        ScanError: κ outside [0, 1].
    """
    target = require_animation(path)
    require_kappa(kappa)
    if not isinstance(frames_per_second, (int, float)) or not 1 <= frames_per_second <= 50:
        raise PlotError(f"frames_per_second is from 1 to 50; got {frames_per_second!r}")
    rate = float(frames_per_second)
    film = Film(run, kappa)
    steps = progress_over(film.steps, "drawing frames", show=progress)
    with written_whole(target) as file:
        if target.suffix == ".gif":
            _write_gif(file, map(film.frame, steps), rate)
        else:
            _write_mp4(file, film, steps, rate)


def require_animation(path: str | os.PathLike[str]) -> Path:
    """Return the path if a film can be written there; call it before long work.

    Raises OutputError for another suffix or a path that cannot be written, PlotError for an .mp4
    file where ffmpeg is not installed.
    """
    from matplotlib.animation import FFMpegWriter

    target = Path(path)
    require_output(target, (".gif", ".mp4"))
    if target.suffix == ".mp4" and not FFMpegWriter.isAvailable():
        raise PlotError(
            f"cannot write {str(target)!r}: an .mp4 file needs the program ffmpeg, which is not "
            "installed; install it, or choose a name that ends in .gif"
        )
    return target


class Film:
    """The picture of a run, which can be turned to any measured step.

    Attributes:
        steps: The measured steps.
        figure: The picture.
        caption: The line above all: the step, and what appeared last.
        heads: The axes of each head's pattern, by its name.
    """

    @styled
    def __init__(self, run: TextRun, kappa: float = 0.3) -> None:
        self.steps = run.text.steps
        self._patterns = run.patterns()
        missing = [step for step in self.steps if step not in self._patterns]
        if missing:
            raise PlotError(
                f"the run has no attention patterns of step {missing[0]}, which a film needs; "
                "expected them in its folder 'patterns'"
            )
        self._marks = _marks(run, kappa)
        self._said = _sayings(run.changes())
        n_layers, n_heads = self._patterns[self.steps[0]].shape[:2]
        self.figure = _empty(n_layers, n_heads)
        parts: Any = self.figure.subfigures(1, 2, width_ratios=(5, 3))
        grid, right = parts
        self.caption = self.figure.suptitle("", x=0.012, ha="left", fontsize=12)
        self.heads: dict[str, Axes] = {}
        self._images: dict[str, Any] = {}
        axes = grid.subplots(n_layers, n_heads, squeeze=False)
        for layer, head in np.ndindex(n_layers, n_heads):
            name, axis = f"L{layer}H{head}", axes[layer, head]
            self.heads[name] = axis
            self._images[name] = _draw_pattern(axis, self._patterns[self.steps[0]][layer, head])
        grid.supxlabel(_NOTE, fontsize=8)
        self._curves = _draw_curves(right, run)
        self._lines: list[tuple[Any, Any, Any]] = [
            (line, *line.get_data()) for axis in self._curves for line in axis.lines
        ]
        self._cursors = [axis.axvline(0, color=ink(), lw=1) for axis in self._curves]
        self._color, self._size = ink(), min(8.0, 48 / n_heads)
        self.turn(self.steps[-1])
        self.figure.draw_without_rendering()
        self.figure.set_layout_engine("none")  # nothing moves from frame to frame

    def turn(self, step: int) -> None:
        """Turn the picture to a measured step."""
        for name, axis in self.heads.items():
            layer, head = (int(part) for part in name[1:].split("H"))
            self._images[name].set_data(self._patterns[step][layer, head].sqrt())
            label, color = self._marks[step, name]
            style: Any = {"loc": "left", "fontsize": self._size, "pad": 3}
            axis.set_title(f"{name} {label}".strip(), color=color or self._color, **style)
            for spine in axis.spines.values():
                spine.set(visible=True, color=color or "lightgray", linewidth=2.5 if color else 0.8)
        for line, x, y in self._lines:
            line.set_data(x[x <= step], y[x <= step])
        for cursor in self._cursors:
            cursor.set_xdata([step, step])
        last = [saying for at, saying in self._said if at <= step]
        self.caption.set_text(f"step {step:,}" + (f"   {last[-1]}" if last else ""))

    def frame(self, step: int) -> UInt8[np.ndarray, "height width rgb"]:
        """Return the picture at a measured step."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        self.turn(step)
        canvas = FigureCanvasAgg(self.figure)
        canvas.draw()
        return np.array(canvas.buffer_rgba())[..., :3]


def _marks(run: TextRun, kappa: float) -> dict[tuple[int, str], tuple[str, str]]:
    """Return what is written beside each head's name at each step, and its colour; "" for none."""
    best = run.text.best(1)
    matching = run.text.frame["prefix_matching"]
    marks = {}
    for row, matches in zip(best.to_dict(orient="records"), matching, strict=True):
        mark = ("", "")
        if row["score"] >= kappa:
            mark = (f"Δ={row['offset']}", _SLASH)
        if matches >= INDUCTION:
            mark = ("induction", _INDUCTION)
        marks[row["step"], row["name"]] = mark
    return marks


def _sayings(changes: pd.DataFrame) -> list[tuple[float, str]]:
    """Return the steps at which something appeared, in order, and what the film says then."""
    said: dict[str, float] = {}
    for row in changes.to_dict(orient="records"):
        if row["quantity"] in _SAYS and not math.isnan(row["step"]):
            text = _SAYS[row["quantity"]].format(head=row["head"], offset=row["offset"])
            said.setdefault(text, float(row["step"]))
    ordered = sorted(said.items(), key=lambda item: item[1])
    return [(step, f"{text} (half-way at step {step:,.0f})") for text, step in ordered]


def _empty(n_layers: int, n_heads: int) -> Figure:
    figure = new_figure(8, min(max(3.4, 0.6 + 5.0 * n_layers / n_heads), 12))
    figure.set_dpi(_DPI)
    figure.set_facecolor("white")
    return figure


def _draw_pattern(axis: Axes, pattern: Float[Any, "query key"]) -> Any:
    axis.set_xticks([])
    axis.set_yticks([])
    return axis.imshow(pattern, vmin=0, vmax=1, cmap=SCORES, interpolation="none")


def _draw_curves(part: Any, run: TextRun) -> Sequence[Axes]:
    """Draw scores above and losses below, with all their steps."""
    scores, losses = part.subplots(2, 1, sharex=True)
    drawn: set[str] = set()
    for _, change in run.changes().iterrows():
        quantity = change["quantity"]
        if quantity not in _SAYS:
            continue
        slash = f"slash, {change['head']} Δ={change['offset']}"
        label, color, dashes, axis = {
            "strongest slash": (slash, _SLASH, "-", scores),
            "slash below induction": (slash, _SLASH, "--", scores),
            "induction": (f"induction, {change['head']}", _INDUCTION, "-", scores),
            "copying loss": ("repeated random tokens", _COPYING, "-", losses),
        }[quantity]
        if label not in drawn:
            drawn.add(label)
            values = curve(run, change)
            axis.plot(values.index, values, color=color, ls=dashes, label=label)
    held_out = eval_loss(run)
    losses.plot(held_out.index, held_out, color=_HELD_OUT, ls="--", label="held-out text")
    scores.set_title("slash score and prefix matching")
    scores.set_ylim(0, 1.02)
    losses.set_title("loss (nats)")
    losses.set_ylim(0, 1.45 * losses.dataLim.y1)  # the legend stands above the curves
    losses.set_xlim(run.text.steps[0], max(run.text.steps[-1], run.text.steps[0] + 1))
    losses.set_xlabel("training step")
    for axis in (scores, losses):
        axis.grid(alpha=0.3)
        axis.legend(loc="upper left")
    return scores, losses


def _palette() -> Image:
    """Return an image with the colours of all frames: few, so that the file is small."""
    from matplotlib import colormaps
    from matplotlib.colors import to_rgb
    from PIL import Image

    shades = np.linspace(0, 1, 12)[:, None]
    colors = [shades * np.array(to_rgb(color)) + (1 - shades) for color in
              ("black", _SLASH, _INDUCTION, _COPYING, _HELD_OUT)]  # fmt: skip
    table = np.concatenate([colormaps[SCORES](np.linspace(0, 1, 48))[:, :3], *colors])
    image = Image.new("P", (1, 1))
    image.putpalette((255 * table).round().astype(np.uint8).tobytes())
    return image


def _write_gif(
    file: Path, frames: Iterator[UInt8[np.ndarray, "height width rgb"]], rate: float
) -> None:
    from PIL import Image

    palette = _palette()
    none = Image.Dither.NONE
    images = [Image.fromarray(frame).quantize(palette=palette, dither=none) for frame in frames]
    durations = [round(1000 / rate)] * (len(images) - 1) + [round(1000 * _LAST)]
    images[0].save(
        file, format="GIF", save_all=True, append_images=images[1:], duration=durations, loop=0
    )


def _write_mp4(file: Path, film: Film, steps: Iterator[int], rate: float) -> None:
    from matplotlib.animation import FFMpegWriter

    writer = FFMpegWriter(fps=rate)  # type: ignore[arg-type]  # it takes fractions too
    try:
        with writer.saving(film.figure, str(file), _DPI):
            for step in steps:
                film.turn(step)
                writer.grab_frame()
            for _ in range(round(_LAST * rate)):
                writer.grab_frame()
    except (OSError, subprocess.CalledProcessError) as error:
        raise OutputError(f"ffmpeg could not write {str(file)!r}: {error}") from error
