"""Results of effects, explanations, checks and training runs as HTML."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from ...explaining.result import RULE
from ..charts.rows import edit_rows
from ..checks import check_lines, counts_of
from ..effects import TEXTS, TITLES, effect_cells, headings
from ..explanation_figure import explanation_figure
from ..figures import effects_figure, paths_figure
from ..forest import forest_figure, parts_figure
from ..tables import number
from ..text_run_figure import change_cells, text_run_figure, text_run_title
from ..theory import training_cells, training_figure
from .block import Block, Table
from .svg import inline_svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ...checking.result import Report
    from ...effects.result import Result
    from ...explaining.result import Explanation
    from ...theory import Run
    from ...theory.text.run import TextRun

#: How many rows a table and a forest plot have, and how many remarks are shown.
_ROWS, _FOREST_ROWS, _REMARKS = 12, 10, 6
#: What the provenance of a result has if slashpatch measured it.
_KEYS = {"model", "prompts", "confidence"}
#: What the picture of each kind of result shows.
_PICTURES = {
    "measure": "Effect of each edit with its interval, and of its controls with single draws.",
    "flow": "Flow by offset, a curve with its interval for each edit.",
    "copying": "How often each lag is copied, a group of bars for each lag.",
    "paths": "Effect through one input of one later head, the strongest paths with intervals.",
    "pairs": "Normalized logit difference of each patch with its interval, in both directions.",
    "direct": "Direct effect, total effect and repair of each edit, with intervals.",
    "persistence": "Score on natural text against score on random tokens, with both thresholds.",
    "sweep": "Effect of the edit at each head, as a grid of layers by heads.",
    "dose": "Effect by dose, a curve with its interval as a band, and its controls.",
    "circuit": "Shares of what all heads do, with intervals; ticks are random sets.",
    "screen": "Effects that were run, as a grid; below, estimated against exact effects.",
}


def result_html(result: Result) -> str:
    """Return a result's picture, first rows and remarks."""
    n = len(result.frame)
    if result.kind not in _PICTURES or not set(result.provenance) >= _KEYS:
        return _plain_html(result)
    title, line = headings(result)
    if not n:
        return Block(title, [line, "no rows"]).html()
    shown, rows = effect_cells(result, _ROWS)
    texts = tuple(index for index, name in enumerate(shown) if name in TEXTS)
    names = [TITLES.get(name, name) for name in shown]
    more = f"and {n - _ROWS} more rows: to_dataframe() has them" if n > _ROWS else ""
    left = len(result.remarks) - _REMARKS
    notes = [*result.remarks[:_REMARKS], *([f"and {left} more remarks"] if left > 0 else [])]
    picture = inline_svg(lambda: _figure(result), _PICTURES[result.kind])
    return Block(title, [line], [picture], [Table(names, rows, texts, more=more)], notes).html()


def _plain_html(result: Result) -> str:
    """Return the first rows of a result of another kind, or without provenance."""
    frame = result.frame.head(_ROWS)
    rows = [[str(cell) for cell in row] for row in frame.itertuples(index=False, name=None)]
    table = Table([str(name) for name in frame], rows, tuple(range(len(frame.columns))))
    n = len(result.frame)
    return Block(f"{result.kind}: {n} rows", tables=[table], notes=result.remarks).html()


def _figure(result: Result) -> Figure:
    if result.kind == "measure":
        return forest_figure(result, metrics=3, rows=_FOREST_ROWS)
    if result.kind in ("pairs", "direct"):
        return parts_figure(result, _FOREST_ROWS)
    return paths_figure(result, _ROWS) if result.kind == "paths" else effects_figure(result)


def explanation_html(explanation: Explanation) -> str:
    """Return an explanation's verdict, picture, scores under edits and rank measures."""
    score = explanation.natural
    tried = edit_rows(explanation)
    rows = [
        [label, number(value), f"{value / score:.0%}" if score > 0 else "–"]
        for label, value in zip(tried["label"], tried["score"], strict=True)
    ]
    ranks = []
    for part in ("q", "k"):
        cells = [explanation.rank[f"{name}_{part}"] for name in ("r1", "r95", "cone")]
        forms = (".3f", ".0f", ".3f")
        ranks.append(
            [part.upper()]
            + [f"{v:{form}} (> {below:.0%})" for (v, below), form in zip(cells, forms, strict=True)]
        )
    fits = "the layer has no RoPE, so there is no profile by offset"
    if explanation.profile is not None:
        fits = (
            "the profile that mean q and k predict correlates "
            f"{explanation.profile.correlation:.3f} with the measured one and peaks at "
            f"Δ={explanation.profile.predicted_peak}"
        )
    label = "Slash score under each edit"
    label += ", mean logit by offset, amplitude and phase by pair." if explanation.profile else "."
    return Block(
        f"{explanation.head} at Δ={explanation.offset}: {explanation.verdict}",
        [
            f"{explanation.provenance.get('model', '')}: slash score {score:.3f} on the prompts, "
            f"{explanation.random:.3f} on random tokens (κ = {explanation.kappa:g})",
            fits,
        ],
        [inline_svg(lambda: explanation_figure(explanation, titled=False), label)],
        [
            Table(
                ["edit", "score", "share left"],
                rows,
                caption="slash score under edits (freeze: no rotation)",
            ),
            Table(
                ["", "r1", "R95", "mean cosine to the mean"],
                ranks,
                caption="rank measures (> share of heads with a smaller value)",
            ),
            *_why_tables(explanation),
        ],
        [f"Rule (ours): {RULE}"],
    ).html()


def _why_tables(explanation: Explanation) -> list[Table]:
    """Return tables of what the logits depend on, and of what comes from the inputs' axis."""
    tables = []
    shares, origin = explanation.shares, explanation.origin
    if shares is not None:
        beyond = shares.both - shares.position
        cells = [shares.position, shares.curve, beyond, 1 - shares.both]
        caption = (
            f"shares of the logits' variance, {shares.n_offsets} offsets, rows less their mean"
        )
        heading = ["position", "predicted curve", "key token beyond it", "query and key together"]
        tables.append(
            Table(heading, [["–" if cell != cell else f"{cell:.0%}" for cell in cells]],
                  caption=caption)
        )  # fmt: skip
    if origin is not None:
        rows = [
            [label, *(f"{one:.0%}" for one in (part.axis, part.bias, part.rest)),
             f"{part.cosine:.3f}", f"{part.leading:.3f}"]
            for label, part in (("Q", origin.q), ("K", origin.k))
        ]  # fmt: skip
        heading = ["mean", "of the axis", "of the bias", "rest", "cosine", "leading direction"]
        caption = f"origin: the axis has {origin.share:.0%} of the inputs' second moment"
        tables.append(Table(heading, rows, caption=caption))
    return tables


def report_html(report: Report) -> str:
    """Return the outcome of each contract of a model's check."""
    rows = [
        [contract, status, textwrap.shorten(of, 160), detail]
        for contract, status, of, detail in check_lines(report)
    ]
    title = f"Check of {report.provenance['model']}: {counts_of(report)}"
    table = Table(["contract", "outcome", "of", "detail"], rows, (0, 1, 2, 3))
    return Block(title, tables=[table]).html()


def run_html(run: Run, kappa: float = 0.3) -> str:
    """Return a training run's settings, curves and some of its steps."""
    settings = run.settings
    title = f"Training run: {settings.task}, Δ={settings.offset}, step {run.step}"
    line = (
        f"cone {settings.cone:g}, frequencies {settings.frequencies}, {settings.optimizer}, "
        f"{settings.length} tokens, seed {settings.seed}"
    )
    if not run.rows:
        return Block(title, [line, "nothing measured yet"]).html()
    columns, rows = training_cells([run])
    reached = f"the slash passes {kappa:g} after (steps): {run.time_to(kappa):.0f}"
    label = "Slash score and layer 2's attention by training step, and the predicted profile."
    picture = inline_svg(lambda: training_figure([run], kappa), label)
    return Block(title, [line, reached], [picture], [Table(columns, rows, ())]).html()


def text_run_html(run: TextRun) -> str:
    """Return the curves of a run on text, and when they changed."""
    titles, rows = change_cells(run)
    label = "Slash scores, rank one, cone, prefix matching and losses by training step."
    picture = inline_svg(lambda: text_run_figure(run), label)
    return Block(
        text_run_title(run), pictures=[picture], tables=[Table(titles, rows, (0, 1))]
    ).html()
