"""Charts: valid without data and with them, told apart by more than colour, rendered offline."""

import html
import json
import math
import re

import pandas as pd
import pytest
import torch

from slashpatch.reporting.charts import (
    doses,
    effect_rows,
    effects,
    heads,
    pairs,
    palette,
    parts,
    persistence,
    rows,
    training,
    training_rows,
)

from . import samples
from .test_notebook import KINDS, check_report, run

alt = pytest.importorskip("altair", reason="the extra report is not installed")
vlc = pytest.importorskip("vl_convert", reason="the extra report is not installed")


def frames():
    """Each chart with the rows that it draws."""
    scan, control = samples.scan(), samples.scan(seed=1, source="random text")
    head = samples.explanation(of=scan).head
    made = {kind: samples.result(kind) for kind in KINDS}
    runs = [run()]
    diagram = pd.DataFrame(
        [
            {"cone": cone, "frequencies": band, "time_to_slash": steps, "final_score": 0.5}
            for cone, steps in ((0.0, math.inf), (1.0, 40.0))
            for band in ("high", "all")
        ]
    )
    return {
        heads.head_grid: (rows.grid_rows(scan.scores, scan.offsets),),
        heads.score_by_offset: (rows.offset_rows(scan, head, control),),
        heads.logit_by_offset: (rows.profile_rows(scan.profile(head)),),
        pairs.pairs: (rows.pair_rows(scan.require_moments().cosines(head)),),
        pairs.amplitudes: (rows.pair_rows(scan.require_moments().cosines(head)),),
        pairs.phases_of_pairs: (rows.pair_rows(scan.require_moments().cosines(head)),),
        heads.edits_of_explanation: (rows.edit_rows(samples.explanation(of=scan)),),
        effects.forest: (
            effect_rows.forest_rows(made["measure"], "copying"),
            effect_rows.draw_rows(made["measure"], "copying"),
        ),
        effects.flow: (effect_rows.flow_rows(made["flow"]),),
        effects.lags: (effect_rows.lag_rows(made["copying"]),),
        effects.paths: (effect_rows.path_rows(made["paths"]),),
        effects.parts: (effect_rows.part_rows(made["direct"]),),
        persistence.persistence: (persistence.persistence_rows(made["persistence"]),),
        effects.sweep: (effect_rows.sweep_rows(made["sweep"]),),
        effects.screen: (effect_rows.screen_rows(made["screen"]),),
        doses.dose: (effect_rows.dose_rows(made["dose"], "copying"),),
        doses.circuit: (
            effect_rows.circuit_rows(made["circuit"]),
            effect_rows.circuit_draws(made["circuit"]),
        ),
        training.training: (training_rows.training_rows(runs),),
        training.phases: (training_rows.phase_rows(diagram),),
        training.checks: (training_rows.check_rows(check_report()),),
    }


CHARTS = tuple(frames())


@pytest.fixture(scope="module")
def data():
    return frames()


def walk(value):
    """All dicts of a specification."""
    if isinstance(value, dict):
        yield value
    for part in value.values() if isinstance(value, dict) else value:
        if isinstance(part, (dict, list)):
            yield from walk(part)


@pytest.mark.parametrize("chart", CHARTS, ids=lambda chart: chart.__name__)
def test_a_chart_is_valid_before_it_has_data_and_renders_with_them(chart, data):
    names = ("rows", "draws")[: len(data[chart])]
    spec = chart(*map(alt.NamedData, names)).to_dict()
    assert spec["background"] == "transparent"
    assert len(spec["description"]) > 20
    for encoding in (part["encoding"] for part in walk(spec) if "encoding" in part):
        assert "tooltip" in encoding
        for channel, field in encoding.items():
            for of in field if isinstance(field, list) else [field]:
                if channel not in ("x2", "y2") and "field" in of:
                    assert "type" in of
    records = {
        name: parts.source(frame).to_dict()["values"]
        for name, frame in zip(names, data[chart], strict=True)
    }
    for dark in (False, True):
        config = palette.theme(dark)
        named = {**spec, "datasets": records, "config": config}
        full = {**chart(*data[chart]).to_dict(), "config": config}
        drawn = [vlc.vegalite_to_svg(json.dumps(each)) for each in (named, full)]
        first, second = (re.sub(r"(gradient|clip)_?\d+", "", svg) for svg in drawn)
        assert first == second
    titled = chart(*data[chart], title="a title").to_json()
    assert "a title" in vlc.vegalite_to_svg(titled)
    assert vlc.vegalite_to_png(titled).startswith(b"\x89PNG")


@pytest.mark.parametrize("chart", CHARTS, ids=lambda chart: chart.__name__)
def test_a_chart_has_no_colour_of_its_own_and_tells_by_more_than_colour(chart, data):
    spec = chart(*data[chart]).to_dict()
    text = json.dumps({name: part for name, part in spec.items() if name != "datasets"})
    assert not [color for color in palette.CATEGORIES if color in text]
    nominal = [
        part["encoding"]
        for part in walk(spec)
        if part.get("encoding", {}).get("color", {}).get("type") == "nominal"
    ]
    if nominal:
        told = {channel for encoding in nominal for channel in encoding}
        # By shape, dashes, an offset, or the place on an axis whose labels say it.
        assert told & {"shape", "strokeDash", "xOffset"} or chart in (
            pairs.amplitudes,
            training.checks,
        )


@pytest.mark.parametrize("chart", CHARTS, ids=lambda chart: chart.__name__)
def test_a_chart_of_no_rows_is_drawn(chart, data):
    empty = [frame.iloc[:0] for frame in data[chart]]
    assert "<svg" in vlc.vegalite_to_svg(chart(*empty).to_json())


@pytest.mark.parametrize("chart", [c for c in CHARTS if c not in (pairs.pairs, training.phases)])
def test_a_chart_fills_its_container_if_asked(chart, data):
    assert chart(*data[chart], width="container").to_dict()["width"] == "container"


def test_kappa_and_the_range_of_effects_are_found_by_vega():
    grid = heads.head_grid(alt.NamedData("rows"), kappa=0.3).to_dict()
    assert {"name": "kappa", "value": 0.3} in grid["params"]
    sweep = effects.sweep(alt.NamedData("others")).to_dict()
    (scale,) = [part["scale"] for part in walk(sweep) if "scale" in part]
    assert "data('others')" in scale["domainMax"]["expr"]
    assert scale["domainMin"]["expr"] == "-" + scale["domainMax"]["expr"]


def test_hostile_texts_are_escaped_in_svg():
    measured = samples.result("measure")
    frame = measured.frame.assign(edit=samples.HOSTILE)
    table = effect_rows.forest_rows(type(measured)("measure", frame), "copying")
    svg = vlc.vegalite_to_svg(effects.forest(table).to_json())
    assert "<script" not in svg
    assert "<img" not in svg


@pytest.mark.parametrize("title", ['x\\" + warn(1) + "', "x\\", "\\u2", samples.HOSTILE])
def test_titles_are_no_expressions(title):
    """Vega-Lite puts titles of axes into expressions; a backslash must not end the text there."""
    for chart, kind, of in (
        (effects.paths, "paths", effect_rows.path_rows),
        (effects.parts, "pairs", effect_rows.part_rows),
        (effects.sweep, "sweep", effect_rows.sweep_rows),
        (effects.screen, "screen", effect_rows.screen_rows),
        (doses.dose, "dose", lambda result: effect_rows.dose_rows(result, "copying")),
        (doses.circuit, "circuit", effect_rows.circuit_rows),
        (effects.forest, "measure", lambda result: effect_rows.forest_rows(result, "copying")),
    ):
        made = chart(of(samples.result(kind)), quantity=title)
        svg = vlc.vegalite_to_svg(made.to_json())
        assert "<script" not in svg
        labels = re.findall(r'aria-label="([^"]*)"', svg)
        whole = title.replace("\\", "\N{SET MINUS}")
        assert any(whole in html.unescape(label) for label in labels)


def test_rows_of_a_grid_are_the_highest_scores():
    scores = torch.tensor([[[0.1, 0.7], [float("nan"), 0.2], [float("nan")] * 2]])
    table = rows.grid_rows(scores, (3, 5))
    assert table["offset"].tolist()[:2] == [5, 5]
    assert table["score"].tolist()[:2] == pytest.approx([0.7, 0.2])
    assert math.isnan(table["score"].iloc[2])


def test_rows_of_a_scan_and_a_control_of_the_same_tokens_differ():
    scan = samples.scan()
    table = rows.offset_rows(scan, samples.explanation().head, scan)
    assert list(dict.fromkeys(table["tokens"])) == ["natural text", "natural text (control)"]


def test_rows_of_a_forest():
    measured = samples.result("measure")
    table = effect_rows.forest_rows(measured, "copying")
    assert table["row"].tolist() == ["KnockOut(L1H0, 1)", "random-heads:2"]
    assert table["effect"].tolist() == pytest.approx([6.0, 0.1])  # 6.0 − 5.9, the draws' mean
    assert table["low"].isna().tolist() == [False, True]
    draws = effect_rows.draw_rows(measured, "copying")
    assert draws["row"].tolist() == ["random-heads:2"] * 2
    assert draws["effect"].tolist() == pytest.approx([0.1, 0.15])
    assert effect_rows.draw_rows(type(measured)("measure", measured.frame), "copying").empty


def test_rows_of_a_forest_of_several_edits_and_controls():
    one = samples.result("measure")
    frames = [
        one.frame.assign(edit=edit, against=["clean", control])
        for edit in ("A", "B")
        for control in ("random-heads:1",)
    ]
    draws = pd.concat([one.tables["draws"].assign(edit=edit) for edit in ("A", "B")])
    both = type(one)("measure", pd.concat(frames, ignore_index=True), {"draws": draws})
    table = effect_rows.forest_rows(both, "copying")
    assert table["row"].tolist() == ["A", "random-heads:1 for A", "B", "random-heads:1 for B"]
    found = effect_rows.draw_rows(both, "copying")
    assert found["row"].tolist() == ["random-heads:1 for A", "random-heads:1 for B"]


def test_rows_of_a_sweep_over_offsets_keep_the_largest_effect():
    swept = samples.result("sweep")
    other = swept.frame.assign(effect=-2.0, offset=2)
    frame = pd.concat([swept.frame.assign(offset=1), other], ignore_index=True)
    table = effect_rows.sweep_rows(type(swept)("sweep", frame))
    assert len(table) == 12
    assert table.set_index("name").loc["L1H0", "effect"] == 5.0
    assert table.set_index("name").loc["L0H1", ["effect", "offset"]].tolist() == [-2.0, 2]


def test_data_without_numbers_become_null():
    frame = pd.DataFrame({"a": [1.0, math.inf, math.nan], "b": ["x", None, "z"]})
    values = parts.source(frame).to_dict()["values"]
    assert [row["a"] for row in values] == [1.0, None, None]


def _luminance(color):
    channels = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize(
    ("colors", "background"),
    [(palette.CATEGORIES[:4], "#FFFFFF"), (palette.DARK_CATEGORIES, "#121212")],
)
def test_categories_stand_out_from_the_background(colors, background):
    """WCAG's contrast of graphics is 3; the later colours of the light palette are weaker."""
    for color in colors:
        bright, dim = sorted([_luminance(color), _luminance(background)], reverse=True)
        assert (bright + 0.05) / (dim + 0.05) > 2.7
