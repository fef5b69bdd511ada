"""A real browser for the tests of pages, with the network blocked."""

import shutil
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="session")
def browser():
    """Debian's Chromium, driven by Playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no chromium here (apt-get install chromium)")
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield running
        running.close()


class Watched:
    """A page, and everything that went wrong on it."""

    def __init__(self, page):
        self.page = page
        self.complaints = []
        page.on("console", lambda message: self._note(message.type, message.text))
        page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        page.on("dialog", self._dialog)
        page.on("request", self._request)

    def _note(self, kind, text):
        if kind in ("error", "warning"):
            self.complaints.append(f"console {kind}: {text}")

    def _dialog(self, dialog):
        self.complaints.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def _request(self, request):
        if not request.url.startswith(("file:", "data:", "blob:")):
            self.complaints.append(f"request: {request.url}")


@pytest.fixture
def opened(browser):
    """opened(path, hash="", **options): a page from a file, ready; what it complained of fails."""
    contexts, pages = [], []

    def open_page(path, address="", **options):
        context = browser.new_context(offline=True, **options)
        contexts.append(context)
        watched = Watched(context.new_page())
        pages.append(watched)
        watched.page.goto(Path(path).resolve().as_uri() + address)
        watched.page.wait_for_selector('html[data-ready="all"]', state="attached")
        return watched.page

    yield open_page
    for context in contexts:
        context.close()
    assert [complaint for watched in pages for complaint in watched.complaints] == []
