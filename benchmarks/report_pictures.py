"""Takes the pictures of docs/how-to/report.md: a report on the default model, in Chromium.

`make gallery` runs this; it needs Chromium and Playwright.
"""

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
PICTURES = ROOT / "docs" / "pictures"
VIEWS = {"report-overview": ("overview", 640), "report-head": ("L16H0", 1000)}


def main():
    """Write a report, open it, and take a picture of two views."""
    from playwright.sync_api import sync_playwright

    from slashpatch.cli.app import app
    from tests.browser import CHROMIUM, FLAGS

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as started:
        path = Path(folder) / "report.html"
        app(["report", "--out", str(path), "--heads", "4"], standalone_mode=False)
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        for name, (view, height) in VIEWS.items():
            size = {"width": 1160, "height": height}
            page = browser.new_context(offline=True, viewport=size).new_page()
            page.goto(f"{path.as_uri()}#{view}")
            page.wait_for_selector('html[data-ready="all"]', state="attached")
            page.wait_for_timeout(500)  # the charts' last strokes
            page.screenshot(path=PICTURES / f"{name}.png")
        browser.close()


if __name__ == "__main__":
    main()
