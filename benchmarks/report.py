"""How large a report is, and how fast it answers a click. Part of `make bench`.

`python benchmarks/report.py` needs Chromium and Playwright, takes about a minute, and writes the
table of docs/costs.md. The model is made up: 32 × 32 heads of 128 dimensions, a text of 4,096
tokens. A time is from the click to the second frame that is painted after it.
"""

import statistics
import sys
import tempfile
from pathlib import Path

from common import machine, write_results, write_table

sys.path.insert(0, str(Path(__file__).parents[1]))

CLICKS = 15
_TIMED = """async (selector) => {
  const start = performance.now();
  document.querySelector(selector).click();
  const frame = () => new Promise((done) => requestAnimationFrame(done));
  await frame(); await frame();
  return performance.now() - start;
}"""


def written(folder):
    """A large report, and its size in bytes."""
    from slashpatch.reporting.page.report import report
    from tests.reporting import samples

    large = {"layers": 32, "heads": 32, "kv": 8, "offsets": range(16)}
    heads = [f"L{layer}H0" for layer in range(8)]
    path = report(
        folder / "report.html",
        scan=samples.scan(**large, d_head=128),
        random=samples.scan(**large, moments=False, seed=1),
        results=[samples.result(k) for k in ("measure", "flow", "copying", "paths", "sweep")],
        texts=[samples.text(4096, heads, top=5, offsets=range(16))],
    )
    return path, path.stat().st_size


def times(path):
    """Milliseconds of each kind of click."""
    from playwright.sync_api import sync_playwright

    from tests.browser import CHROMIUM, FLAGS

    found = {"a head": [], "a token": [], "the slider of κ": []}
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_context(offline=True).new_page()
        page.goto(path.as_uri())
        page.wait_for_selector('html[data-ready="all"]', state="attached")
        for number in range(CLICKS):
            page.evaluate("location.hash = 'overview'")
            page.wait_for_timeout(100)
            found["a head"].append(page.evaluate(_TIMED, f'#grid a[href="#L{number}H{number}"]'))
            page.evaluate("location.hash = 'text'")
            page.wait_for_timeout(100)
            found["a token"].append(page.evaluate(_TIMED, f"#token-{200 * number + 7}"))
            page.evaluate("location.hash = 'overview'")
            page.wait_for_timeout(100)
            moved = f"""async () => {{ const slider = document.getElementById('kappa');
              const start = performance.now();
              slider.value = {0.01 + number / 50};
              slider.dispatchEvent(new Event('input', {{bubbles: true}}));
              const frame = () => new Promise((done) => requestAnimationFrame(done));
              await frame(); await frame(); return performance.now() - start; }}"""
            found["the slider of κ"].append(page.evaluate(moved))
        browser.close()
    return found


def main():
    """Measure, and write results.json and the table of docs/costs.md."""
    with tempfile.TemporaryDirectory() as folder:
        path, size = written(Path(folder))
        found = times(path)
    lines = [f"{machine()['processor']}, Chromium without a GPU; {CLICKS} clicks each.", ""]
    lines += ["| a click on | median | longest |", "|---|---|---|"]
    for name, values in found.items():
        lines.append(f"| {name} | {statistics.median(values):.0f} ms | {max(values):.0f} ms |")
    lines += ["", f"The file has {size / 2**20:.2f} MB."]
    print("\n".join(lines))
    write_table("costs", "report", lines)
    write_results("report", {"bytes": size, "milliseconds": found}, {})


if __name__ == "__main__":
    main()
