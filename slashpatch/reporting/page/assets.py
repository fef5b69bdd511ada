"""The HTML file itself: template, style, JavaScript, and the compressed data."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from typing import Any

from ...data.files import without_nan
from ...errors import ExtraError
from ..tables import strongest
from .inputs import Inputs
from .provenance_data import definitions, sources
from .shown_text import visible

#: The page's own JavaScript, in the order in which it is joined.
_SCRIPTS = ("elements", "charts", "overview", "head", "text", "effects", "start")
_MODULES = {"altair": "altair", "vl_convert": "vl-convert-python", "jinja2": "jinja2"}


def require_extra() -> None:
    """Raise ExtraError unless the libraries that draw a report are installed."""
    missing = [package for module, package in _MODULES.items() if find_spec(module) is None]
    if missing:
        raise ExtraError(
            f"a report needs {' and '.join(missing)}, not installed here; install with: "
            "pip install 'slashpatch[report]'"
        )


def page(found: Inputs, data: dict[str, Any], title: str | None, command: str | None) -> str:
    """Return the page as text.

    Its content security policy allows two scripts by their checksums, its own and the library of
    charts, and no request at all. Data and library are gzipped, so that the file stays small.
    """
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("slashpatch.reporting.page", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["visible"] = visible
    script, library = _inline(own_script()), vega()
    return environment.get_template("report.html.j2").render(
        title=str(title or data["model"]),
        model=data["model"],
        data=Markup(compressed(data)),
        style=Markup(_own("report.css")),
        script=Markup(script),
        library=Markup(squeezed(library)),
        hashes=[_checksum(part) for part in (script, library)],
        n_results=len(found.results),
        n_texts=len(found.texts),
        first=str(strongest(found.scan, min(1, found.scan.offsets[-1]))[0]),
        sources=sources(found),
        definitions=definitions(),
        command=command,
    )


def compressed(data: dict[str, Any]) -> str:
    """Return JSON values as gzipped JSON in base64; the same values give the same text."""
    # Half a surrogate pair, as in a file name that is no text, has no bytes but has an escape.
    return squeezed(json.dumps(without_nan(data), allow_nan=False, separators=(",", ":")))


def squeezed(text: str) -> str:
    """Return a text gzipped, in base64; the same text gives the same characters."""
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


@cache
def vega() -> str:
    """Return Vega, Vega-Lite and Vega-Embed as one script that sets `window.vegaEmbed`."""
    import vl_convert

    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))


def own_script() -> str:
    """Return the page's own JavaScript: the files of js/ in one function."""
    parts = "\n".join(_own(f"js/{name}.js") for name in _SCRIPTS)
    return f'"use strict";\n(() => {{\n{parts}}})();\n'


def _own(name: str) -> str:
    return (files("slashpatch.reporting.page") / name).read_text(encoding="utf-8")


def _inline(script: str) -> str:
    """Return a script that may stand between script tags: nothing in it ends them."""
    safe = script.replace("\r\n", "\n").replace("</script", "<\\/script")
    return "\n" + safe.replace("<!--", "<\\!--") + "\n"


def _checksum(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
