"""The report in a real browser: every view by mouse and keyboard, and nothing is fetched."""

import json

import pytest

from slashpatch.data.heads import Head
from slashpatch.reporting.page.report import report

from . import samples
from .test_notebook import KINDS

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect

VIEWS = ("overview", "head", "text", "effects", "provenance")


def write(folder, **changes):
    parts = {
        "scan": samples.scan(),
        "random": samples.scan(seed=1, moments=False, source="random tokens"),
        "explanations": [samples.explanation()],
        "results": [samples.result(kind) for kind in KINDS],
        "texts": [samples.text()],
    }
    return report(folder / "report.html", **{**parts, **changes})


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write(tmp_path_factory.mktemp("report"))


def shown_view(page):
    return page.evaluate(
        "[...document.querySelectorAll('main > section')]"
        ".filter((section) => !section.hidden).map((section) => section.id.slice(5)).join()"
    )


def rows_of(page, selector):
    """The cells of a table's body as text."""
    return page.eval_on_selector_all(
        f"{selector} tbody tr",
        "rows => rows.map((row) => [...row.children].map((cell) => cell.textContent))",
    )


def test_every_view_by_mouse(path, opened):
    page = opened(path)
    assert shown_view(page) == "overview"
    for name, link in zip(VIEWS[1:], ("Head L1H0", "Text", "Effects", "Provenance"), strict=True):
        page.get_by_role("navigation").get_by_role("link", name=link).click()
        expect(page.locator(f"#view-{name}")).to_be_visible()
        assert shown_view(page) == name
        assert page.evaluate("document.activeElement.tagName") == "H2"
    page.get_by_role("navigation").get_by_role("link", name="Overview").click()
    page.locator('#grid a[href="#L2H3"]').click()
    expect(page.locator("#head-heading")).to_have_text("Head L2H3")


def test_every_view_by_keyboard(path, opened):
    page = opened(path)
    seen = {}
    for _ in range(60):
        page.keyboard.press("Tab")
        href = page.evaluate("document.activeElement.getAttribute('href')")
        if href and href not in seen:
            seen[href] = page.evaluate("document.activeElement.closest('nav, table')?.id ?? ''")
    assert {"#overview", "#L1H0", "#text", "#effects", "#provenance"} <= set(seen)
    page.locator("#grid a[tabindex='0']").focus()
    for key in ("ArrowRight", "ArrowDown", "ArrowDown", "ArrowLeft", "ArrowUp"):
        page.keyboard.press(key)
    page.keyboard.press("Enter")
    expect(page.locator("#head-heading")).to_have_text("Head L1H1")
    assert shown_view(page) == "head"


def test_only_one_cell_of_the_grid_is_a_tab_stop(path, opened):
    page = opened(path)
    page.locator('#grid a[href="#L2H3"]').focus()
    assert page.locator("#grid a[tabindex='0']").count() == 1
    page.keyboard.press("Home")
    assert page.evaluate("document.activeElement.hash") == "#L0H3"
    page.keyboard.press("End")
    page.keyboard.press("ArrowRight")  # stays at the edge
    assert page.evaluate("document.activeElement.hash") == "#L2H3"


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("", "overview"),
        ("#overview", "overview"),
        ("#L2H3", "head"),
        ("#text", "text"),
        ("#text-1-L2H3-12", "text"),
        ("#effects", "effects"),
        ("#provenance", "provenance"),
    ],
)
def test_links_into_the_page(address, name, path, opened):
    page = opened(path, address)
    assert shown_view(page) == name
    assert not page.locator("#failed").is_visible()
    if "12" in address:
        assert page.locator("#token-12").get_attribute("aria-selected") == "true"
        assert page.locator("#text-head option:checked").inner_text() == "L2H3"


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("#L9H0", "There is no head L9H0: the model has layers 0 to 2 with heads 0 to 3."),
        ("#nothing", "names nothing on this page"),
        ("#text-1-L0H0-1", "Text 1 has no head L0H0."),
        ("#text-3-L1H0", "There is no text 3 on this page."),
        ("#text-1-L1H0-99", "Text 1 has 40 tokens."),
        ("#%E0%A4%A", "names nothing on this page"),
    ],
)
def test_links_to_nothing_say_so(address, words, path, opened):
    page = opened(path, address)
    assert words in page.locator("#failed").inner_text()


def test_going_back_shows_the_view_before(path, opened):
    page = opened(path)
    page.locator('#grid a[href="#L2H3"]').click()
    expect(page.locator("#head-heading")).to_have_text("Head L2H3")
    page.get_by_role("button", name="Next slash head").click()
    expect(page.locator("#head-heading")).to_have_text("Head L1H0")
    page.go_back()
    expect(page.locator("#head-heading")).to_have_text("Head L2H3")
    page.go_back()
    expect(page.locator("#view-overview")).to_be_visible()


def set_value(page, selector, value):
    page.eval_on_selector(
        selector,
        "(e, value) => { e.value = value; e.dispatchEvent(new Event('input', {bubbles: true})) }",
        str(value),
    )


@pytest.mark.parametrize(
    ("kappa", "low", "high"), [(0.1, 0, 7), (0.03, 0, 7), (0.03, 1, 3), (0.9, 2, 2)]
)
def test_slash_heads_are_those_of_the_scan(kappa, low, high, path, opened):
    """The page's own counting against Scan.slash_heads."""
    page = opened(path)
    set_value(page, "#kappa", kappa)
    set_value(page, "#from", low)
    set_value(page, "#to", high)
    entries = [entry for entry in samples.scan().slash_heads(kappa) if low <= entry.offset <= high]
    assert f"{len({e.head for e in entries})} of 12 heads" in page.locator("#counts").inner_text()
    if page.locator("#more").is_visible():
        page.locator("#more").click()
    rows = rows_of(page, "#heads")
    expected = [[str(e.head), str(e.offset), f"{round(e.score, 6):.3f}"] for e in entries]
    assert sorted(row[:3] for row in rows) == sorted(expected)
    assert [row[2] for row in rows] == [row[2] for row in expected]  # the highest first
    marked = page.eval_on_selector_all(
        "#grid a", "all => all.filter((a) => a.textContent.trim()).map((a) => a.hash.slice(1))"
    )
    assert sorted(marked) == sorted({str(e.head) for e in entries})


def test_the_grid_shows_what_is_chosen(path, opened):
    page = opened(path)
    cell = page.locator('#grid a[href="#L1H0"]')
    natural, random = samples.scan(), samples.scan(seed=1)
    one, other = float(natural.scores[1, 0, 1]), float(random.scores[1, 0, 1])
    for value, words in (
        ("natural", f"L1H0: {one:.3f} at Δ=1"),
        ("random", f"L1H0: {other:.3f} at Δ=1"),
        ("sweep 0", "L1H0: +5"),
    ):
        page.locator("#value").select_option(value)
        assert cell.get_attribute("aria-label") == words
    page.locator("#value").select_option("difference")
    assert cell.get_attribute("aria-label").startswith("L1H0: ")


def test_the_table_sorts_and_filters(path, opened):
    page = opened(path)
    set_value(page, "#kappa", 0.02)
    scores = [float(row[2]) for row in rows_of(page, "#heads")]
    assert scores == sorted(scores, reverse=True)
    button = page.locator("#heads button[data-key=score]")
    button.click()
    assert float(rows_of(page, "#heads")[0][2]) <= scores[-1]
    assert page.locator("#heads th[aria-sort]").get_attribute("aria-sort") == "ascending"
    page.locator("#heads button[data-key=name]").focus()
    page.keyboard.press("Enter")
    names = [row[0] for row in rows_of(page, "#heads")]
    assert names == sorted(names, key=Head.parse)
    assert page.evaluate("document.activeElement.dataset.key") == "name"
    page.locator("#filter").fill("L1H0 Δ=1")
    assert [row[:2] for row in rows_of(page, "#heads")] == [["L1H0", "1"]]
    page.locator("#filter").fill("L1, made")
    assert {row[0] for row in rows_of(page, "#heads")} == {"L1H0"}
    page.locator("#filter").fill("nothing like it")
    assert rows_of(page, "#heads") == []


def test_a_head_shows_everything_that_is_known_of_it(path, opened):
    page = opened(path, "#L1H0")
    text = page.locator("#view-head").inner_text()
    for words in (
        "RoPE-made slash at Δ=1",
        "Rule (ours)",
        "Score by offset",
        "Mean logit by offset",
        "Amplitude and phase by rotary pair",
        "Score under the edits of explain",
        "Effects on copying",
        "Rank of queries and keys",
    ):
        assert words in text, words
    assert page.locator("#view-head svg.marks").count() == 5
    page.evaluate("location.hash = 'L0H1'")
    expect(page.locator("#head-heading")).to_have_text("Head L0H1")
    assert "No verdict: this head was not explained" in page.locator("#view-head").inner_text()


def test_the_tables_of_charts_hold_the_charts_numbers(path, opened):
    page = opened(path, "#L1H0")
    scan = samples.scan()
    figure = page.locator("#view-head figure").first
    figure.locator("summary", has_text="Table of this chart").click()
    expect(figure.locator("tbody tr")).to_have_count(16)
    rows = rows_of(page, "#view-head figure:first-of-type > details")
    natural = [row for row in rows if row[0] == "natural text"]
    expected = [float(score) for score in scan.scores[1, 0]]
    assert [float(row[2]) for row in natural] == pytest.approx(expected, abs=6e-4)
    page.get_by_role("button", name="Next slash head").click()
    assert page.locator("#view-head figure").first.locator("details[open]").count() == 1


def test_every_chart_has_a_caption_and_a_table(path, opened):
    page = opened(path, "#L1H0")
    for view in ("head", "effects"):
        figures = page.locator(f"#view-{view} figure")
        n = figures.count()
        assert n >= 5
        for index in range(n):
            figure = figures.nth(index)
            assert figure.locator("figcaption").text_content().strip()
            assert figure.locator("svg.marks").count() == 1
            assert figure.locator("details summary").first.text_content()


def test_tokens_and_the_keys_that_they_attend_to(path, opened):
    page = opened(path, "#text")
    text = samples.text()
    assert page.locator("#tokens span").count() == len(text.tokens)
    page.locator("#token-12").click()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("location.hash") == "#text-1-L1H0-13"
    rows = rows_of(page, "#keys")
    keys = [(int(k), float(w)) for k, w in zip(text.keys[0, 13], text.weights[0, 13], strict=True)]
    assert [int(row[0]) for row in rows[: len(keys)]] == [key for key, _ in keys]
    weights = [float(row[3]) for row in rows[: len(keys)]]
    assert weights == pytest.approx([weight for _, weight in keys], abs=6e-4)
    assert rows[0][1] == text.tokens[12]
    shaded = page.eval_on_selector_all(
        "#tokens span",
        "all => all.filter((s) => s.style.background).map((s) => Number(s.dataset.token))",
    )
    assert sorted(shaded) == sorted(key for key, _ in keys)
    page.locator("#text-head").select_option(label="L2H3")
    assert "L2H3 at token 13" in page.locator("#keys").inner_text()
    page.locator("#tokens").focus()
    page.keyboard.press("Escape")
    assert page.locator("#tokens span[aria-selected=true]").count() == 0
    assert "shaded by the weight" in page.locator("#keys").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("address", ["", "#L1H0", "#text-1-L1H0-5", "#effects", "#provenance"])
def test_axe_finds_nothing(scheme, address, path, opened):
    from axe_playwright_python.sync_playwright import Axe

    page = opened(path, address, color_scheme=scheme)
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    found = Axe().run(page).response["violations"]
    assert [(v["id"], v["impact"], v["nodes"][0]["html"][:200]) for v in found] == []


def test_colours_follow_the_choice(path, opened):
    page = opened(path, "#L1H0", color_scheme="light")
    drawn = page.locator("#view-head .role-axis-title text").first
    light = drawn.get_attribute("fill")
    page.locator("#theme").select_option("dark")
    expect(page.locator("#view-head svg.marks")).to_have_count(5)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 28)"
    expect(drawn).not_to_have_attribute("fill", light)


def test_hostile_text_stays_text(tmp_path, opened):
    bad = {"model": samples.HOSTILE}
    measured = samples.result("measure", **bad)
    measured.frame["edit"] = samples.HOSTILE
    tokens = [samples.HOSTILE, "</span>", "\u202e", "\x00", "&amp;", "\n", "a"]
    page = opened(
        write(
            tmp_path,
            scan=samples.scan(source=samples.HOSTILE, **bad),
            random=None,
            explanations=[samples.explanation(**bad)],
            results=[measured],
            texts=[samples.text(tokens=tokens, **bad)],
            title=samples.HOSTILE,
            command=f"slashpatch report -m '{samples.HOSTILE}'",
        )
    )
    for address in ("#L1H0", "#text-1-L1H0-2", "#effects", "#provenance", "#overview"):
        page.evaluate("(address) => { location.hash = address }", address)
    assert (
        page.evaluate("document.scripts.length") == 4
    )  # data and library, both packed, the library unpacked, and our own
    assert page.locator("img").count() == 0
    assert "<script>alert(1)</script>" in page.locator("h1").inner_text()
    assert "⟨U+202E⟩" in page.title()
    assert page.locator("#token-0").text_content().startswith("<script>alert(1)</script>")
    assert page.locator("#token-2").text_content() == "⟨U+202E⟩"
    assert page.locator("#token-3").text_content() == "⟨U+0000⟩"
    assert page.locator("#tokens span").count() == len(tokens)
    assert "<script>alert(1)" in page.locator("#view-effects").text_content()


def test_the_policy_forbids_scripts_that_are_not_the_pages(path, browser):
    context = browser.new_context(offline=True)
    page = context.new_page()
    page.goto(path.resolve().as_uri())
    page.evaluate(
        "document.body.append("
        "Object.assign(document.createElement('script'), {textContent: 'window.ran = 1'}))"
    )
    assert page.evaluate("window.ran") is None
    context.close()


def test_parts_that_are_missing_leave_no_gaps(tmp_path, opened):
    page = opened(report(tmp_path / "bare.html", scan=samples.scan(moments=False)))
    links = page.get_by_role("navigation").get_by_role("link")
    assert links.all_inner_texts() == ["Overview", "Head L1H0", "Provenance"]
    page.locator('#grid a[href="#L1H0"]').click()
    expect(page.locator("#view-head")).to_contain_text("made without moments")
    assert page.locator("#value option").all_inner_texts() == ["score on natural text"]


def test_without_intervals_and_without_any_slash_head(tmp_path, opened):
    one = samples.scan(n=1, layers=1, heads=2)
    page = opened(report(tmp_path / "one.html", scan=one, kappa=1.0), "#L0H1")
    assert "one prompt, so no interval" in page.locator("#view-head").inner_text()
    page.get_by_role("button", name="Next slash head").click()
    assert shown_view(page) == "head"
    page.evaluate("location.hash = ''")
    expect(page.locator("#counts")).to_contain_text("0 of 2 heads")


def test_all_sections_are_printed(path, opened):
    page = opened(path)
    page.emulate_media(media="print")
    for name in VIEWS:
        assert page.locator(f"#view-{name}").is_visible(), name
    assert len(page.pdf()) > 10_000


def test_the_data_can_be_saved(path, opened):
    page = opened(path, "#provenance")
    with page.expect_download() as download:
        page.locator("#download").click()
    data = json.loads(download.value.path().read_text())
    assert data["model"] == "tiny/model"
    assert data["shape"] == [3, 4]


def test_a_click_touches_few_elements(tmp_path, opened):
    """In large pages a choice changes what it must and no more; benchmarks/report.py has times."""
    tokens = [f" w{i}" for i in range(4096)]
    page = opened(
        report(
            tmp_path / "large.html",
            scan=samples.scan(32, 32, moments=False),
            texts=[samples.text(tokens=tokens)],
        ),
        "#text",
    )
    page.evaluate(
        """() => { window.touched = 0;
        new MutationObserver((all) => { window.touched += all.length })
          .observe(document.querySelector('#tokens'),
            {subtree: true, attributes: true, childList: true}) }"""
    )
    page.locator("#token-2000").click()
    first = page.evaluate("window.touched")  # the shading of the diagonal goes away, once
    page.locator("#token-2003").click()
    assert page.evaluate("window.touched") - first < 30
    assert page.locator("#grid a").count() == 1024
