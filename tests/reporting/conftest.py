"""Pages in a real browser, with the network blocked."""

from pathlib import Path

import pytest


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
