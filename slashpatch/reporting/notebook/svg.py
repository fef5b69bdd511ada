"""Inline SVG from matplotlib figures, the same bytes each time."""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from ..style import inked

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Stands for the colour of the text around the picture; no figure uses it otherwise.
_INK = "#010203"
_FONT = "DejaVu Sans"
_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
#: What matplotlib writes into a <style> element, which would change the whole page.
_STYLE = (
    "stroke-linejoin:round;stroke-linecap:butt;font-family:sans-serif;max-width:100%;height:auto"
)


def inline_svg(draw: Callable[[], Figure], label: str) -> str:
    """Return what `draw` draws as an <svg> element, whose text has the page's own colour.

    `label` says what the picture shows, for screen readers. Ids begin with a digest of the picture,
    so that different pictures on a page do not share them.
    """
    from matplotlib import rc_context

    file = io.BytesIO()
    options: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "slashpatch",
        "font.family": "sans-serif",
        "font.sans-serif": [_FONT],
    }
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with inked(_INK), rc_context(options), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of glyphs that the font lacks: browsers have others
        draw().savefig(file, format="svg", transparent=True, metadata=metadata)
    root = ElementTree.fromstring(file.getvalue())
    _make_inline(root, hashlib.sha256(file.getvalue()).hexdigest()[:8])
    root.attrib |= {"role": "img", "aria-label": label, "style": _STYLE}
    return ElementTree.tostring(root, encoding="unicode").replace(_INK, "currentColor")


def _make_inline(root: ElementTree.Element, digest: str) -> None:
    """Make an SVG document a short element inside HTML: no namespaces, styles or unused ids."""
    for parent in list(root.iter()):
        for style in parent.findall(f"{_SVG}style"):
            parent.remove(style)
    elements = list(root.iter())
    links = [
        element.get(name, "") for element in elements for name in (f"{_XLINK}href", "clip-path")
    ]
    used = dict.fromkeys(re.findall(r"#([\w.-]+)", " ".join(links)))
    names = {name: f"s{digest}-{index}" for index, name in enumerate(used)}
    for element in elements:
        element.tag = element.tag.removeprefix(_SVG)
        element.text = (element.text or "").strip() or None
        element.tail = None
        attributes = dict(element.attrib)
        element.attrib.clear()
        for name, value in attributes.items():
            if (short := _shortened(name, value, names)) is not None:
                element.attrib[name.removeprefix(_XLINK)] = short
    for name in ("height", "version"):
        root.attrib.pop(name, None)


def _shortened(name: str, value: str, names: Mapping[str, str]) -> str | None:
    """Return an attribute's value with two decimals and new ids; None if it says nothing."""
    if name == "id":
        return names.get(value)
    if name in (f"{_XLINK}href", "clip-path"):
        return re.sub(r"#([\w.-]+)", lambda found: f"#{names[found[1]]}", value)
    if name == "style":
        parts = [part.replace(": ", ":") for part in value.split("; ")]
        return ";".join(part for part in parts if not part.startswith("font-family"))
    if name in ("d", "x", "y", "transform"):
        two = re.sub(r"-?\d+\.\d+", lambda found: f"{float(found[0]):.2f}", value)
        return None if value.startswith("rotate(-0 ") else " ".join(two.split())
    return value
