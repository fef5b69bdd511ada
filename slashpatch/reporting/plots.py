"""Each result as a matplotlib figure or as an Altair chart."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import PlotError
from ..scanning.result import require_kappa
from .charts import (
    doses,
    effect_rows,
    effects,
    heads,
    pairs,
    persistence,
    rows,
    training,
    training_rows,
)
from .charts.palette import theme
from .charts.parts import require_altair, source, stacked
from .checks import check_figure
from .emergence_figure import emergence_figure
from .evidence_figure import evidence_figure
from .explanation_figure import explanation_figure
from .figures import effects_figure, grid_figure, scan_figure
from .style import shortened
from .text_run_figure import text_run_figure
from .theory import training_figure

if TYPE_CHECKING:
    from ..checking.result import Report
    from ..claims.result import Evidence
    from ..effects.result import Result
    from ..explaining.result import Explanation
    from ..scanning.emergence_result import Emergence
    from ..scanning.monitor import SlashMonitor
    from ..scanning.result import Scan
    from ..theory import Run
    from ..theory.text.run import TextRun

BACKENDS = ("matplotlib", "altair")


def _drawn(backend: str, figure: Callable[[], Any], chart: Callable[[], Any]) -> Any:
    """Return `figure()` or, on a white background and in the light theme, `chart()`."""
    if backend not in BACKENDS:
        raise PlotError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    if backend == "matplotlib":
        return figure()
    require_altair()
    config = {key: value for key, value in theme().items() if key != "background"}
    return chart().configure(**config).properties(background="white")


def _step() -> Any:
    """Return the width of a grid: as wide as it is high for each head."""
    return require_altair().Step(18)


def plot_scan(scan: Scan, backend: str, control: Scan | None = None, kappa: float = 0.1) -> Any:
    """Return the grid of heads of a scan, and below it that of its control."""
    require_kappa(kappa)
    if control is not None and control.sums.shape[:2] != scan.sums.shape[:2]:
        raise PlotError(
            f"control must be a scan of as many heads as the scan, {tuple(scan.sums.shape[:2])}; "
            f"got {tuple(control.sums.shape[:2])}"
        )

    def chart() -> Any:
        grids = []
        for name, each in (("rows", scan), ("control", control)):
            if each is not None:
                frame = source(rows.grid_rows(each.scores, each.offsets), name)
                title = shortened(f"{each.provenance['model']}, {rows.tokens_of(each)}", 80)
                grids.append(heads.head_grid(frame, kappa=kappa, title=title, width=_step()))
        return grids[0] if control is None else stacked(*grids)

    return _drawn(backend, lambda: scan_figure(scan, control, kappa), chart)


def plot_emergence(
    found: Emergence, backend: str, kappa: float = 0.1, log_steps: bool = False
) -> Any:
    """Return each head's slash score over the steps of training, and the other measures."""
    require_kappa(kappa)
    if found.frame.empty:
        raise PlotError("there are no measurements yet to plot")

    def chart() -> Any:
        title = shortened(f"{found.provenance['model']}: heads over training", 80)
        data = training_rows.emergence_rows(found, kappa)
        return training.emergence(data, kappa=kappa, log_steps=log_steps, title=title)

    return _drawn(backend, lambda: emergence_figure(found, kappa, log_steps), chart)


def plot_text_run(run: TextRun, backend: str, kappa: float = 0.3) -> Any:
    """Return what changed during a run on text; with Altair, its heads on held-out text."""
    require_kappa(kappa)
    if backend == "altair":
        return plot_emergence(run.text, backend, kappa)
    return _drawn(backend, lambda: text_run_figure(run, kappa), lambda: None)


def plot_monitor(monitor: SlashMonitor, backend: str) -> Any:
    """Return the grid of heads that a monitor has seen so far."""
    title = f"so far, {int(monitor.n_rows.max())} rows"

    def chart() -> Any:
        frame = rows.grid_rows(monitor.scores, monitor.offsets)
        return heads.head_grid(frame, kappa=monitor.kappa, title=title, width=_step())

    def figure() -> Any:
        return grid_figure({title: (monitor.scores, monitor.offsets)}, None, monitor.kappa)

    return _drawn(backend, figure, chart)


def plot_explanation(explanation: Explanation, backend: str) -> Any:
    """Return the scores under edits, the mean logit by offset, and each pair's cosine."""

    def chart() -> Any:
        title = f"{explanation.head} at Δ={explanation.offset}: {explanation.verdict}"
        tried = source(rows.edit_rows(explanation), "edits")
        parts: list[Any] = [heads.edits_of_explanation(tried, title=title)]
        if explanation.profile is not None:
            logits = source(rows.profile_rows(explanation.profile), "logits")
            parts.append(heads.logit_by_offset(logits))
            parts.append(pairs.pairs(source(rows.pair_rows(explanation.cosines), "pairs")))
        return stacked(*parts)

    return _drawn(backend, lambda: explanation_figure(explanation), chart)


def plot_report(report: Report, backend: str) -> Any:
    """Return how many checks of each contract passed, failed or were refused."""

    def chart() -> Any:
        title = shortened(str(report.provenance["model"]), 80)
        return training.checks(training_rows.check_rows(report), title=title)

    return _drawn(backend, lambda: check_figure(report), chart)


def plot_run(run: Run, backend: str, kappa: float = 0.3) -> Any:
    """Return slash score and layer 2's attention by training step."""

    def chart() -> Any:
        settings = run.settings
        title = (
            f"{settings.task}, Δ={settings.offset}, cone {settings.cone:g}, seed {settings.seed}"
        )
        return training.training(training_rows.training_rows([run]), kappa=kappa, title=title)

    if not run.rows:
        raise PlotError("the run has no measurements yet; train it before plotting")
    return _drawn(backend, lambda: training_figure([run], kappa), chart)


def plot_result(result: Result, backend: str, top: int = 20) -> Any:
    """Return a forest plot, curves, bars, paths or a grid, by the result's kind."""
    if result.frame.empty:
        raise PlotError(f"this result of {result.kind} has no rows to plot")
    if top < 1:
        raise PlotError(f"top is the number of rows to plot, at least 1; got {top}")
    charts: dict[str, Callable[[], Any]] = {
        "measure": lambda: _forests(result, top),
        "flow": lambda: effects.flow(
            effect_rows.flow_rows(result), log=float(result.frame["flow"].min()) > 0
        ),
        "copying": lambda: effects.lags(effect_rows.lag_rows(result)),
        "paths": lambda: effects.paths(
            effect_rows.path_rows(result, top),
            title=shortened(result.provenance["measured"][0], 60),
        ),
        "pairs": lambda: _parts(result, top),
        "direct": lambda: _parts(result, top),
        "persistence": lambda: persistence.persistence(persistence.persistence_rows(result)),
        "sweep": lambda: effects.sweep(
            effect_rows.sweep_rows(result),
            quantity=f"effect on {shortened(result.provenance['metric'], 24)}",
            width=_step(),
        ),
        "screen": lambda: _screen(result),
        "dose": lambda: _doses(result),
        "circuit": lambda: _circuit(result),
    }
    if result.kind not in charts:
        raise PlotError(
            f"there is no plot of a result of kind {result.kind!r}; expected one of "
            f"{', '.join(charts)}"
        )
    return _drawn(backend, lambda: effects_figure(result, top), charts[result.kind])


def _parts(result: Result, top: int) -> Any:
    """Return the effects of the first things that were patched or edited, several in each row."""
    rows = effect_rows.part_rows(result)
    shown = list(dict.fromkeys(rows["row"]))[:top]
    quantity = shortened(effect_rows.quantity_of(result), 60)
    return effects.parts(rows[rows["row"].isin(shown)], quantity=quantity)


def _doses(result: Result) -> Any:
    """Return the effect by dose, a chart for each metric, one below the other."""
    charts = [
        doses.dose(
            source(effect_rows.dose_rows(result, metric), f"rows{index}"),
            quantity=f"effect on {shortened(metric, 24)}",
        )
        for index, metric in enumerate(effect_rows.metrics_of(result))
    ]
    return charts[0] if len(charts) == 1 else stacked(*charts)


def _circuit(result: Result) -> Any:
    """Return each share of a circuit, with its random sets."""
    draws = effect_rows.circuit_draws(result)
    return doses.circuit(effect_rows.circuit_rows(result), None if draws.empty else draws)


def _screen(result: Result) -> Any:
    """Return the grid of the effects that were run, and below it estimates against effects."""
    quantity = f"effect on {shortened(result.provenance['metric'], 24)}"
    grid = effects.sweep(
        source(effect_rows.sweep_rows(result), "rows0"), quantity=quantity, width=_step()
    )
    compared = effects.screen(source(effect_rows.screen_rows(result), "rows1"), quantity=quantity)
    return stacked(grid, compared)


def _forests(result: Result, top: int) -> Any:
    """Return a forest plot for each metric, one below the other."""
    plots = []
    for index, metric in enumerate(effect_rows.metrics_of(result)):
        shown = effect_rows.forest_rows(result, metric).head(top)
        draws = effect_rows.draw_rows(result, metric)
        draws = draws[draws["row"].isin(shown["row"])]
        plots.append(
            effects.forest(
                source(shown, f"rows{index}"),
                None if draws.empty else source(draws, f"draws{index}"),
                quantity=f"effect on {shortened(metric)} (edited − clean)",
            )
        )
    return plots[0] if len(plots) == 1 else stacked(*plots)


def plot_evidence(found: Evidence, backend: str) -> Any:
    """Return each test's interval against its threshold, claim by claim."""
    if backend == "altair":
        raise PlotError("evidence is drawn by matplotlib only; leave backend out")
    return _drawn(backend, lambda: evidence_figure(found), lambda: None)
