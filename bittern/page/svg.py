"""A matplotlib figure as an SVG element that lives in a page: its colours, its text, names that nothing else has.

A figure is drawn in :data:`COLOURS`, stand-ins that become CSS variables, so that one chart serves light and dark.
Text stays text. The same figure gives the same bytes.
"""

from __future__ import annotations

import io
import logging
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from bittern.errors import BitternError, printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEPS = 7
"""Steps of the scale of a heat map."""

_NAMES = (
    *("ink", "muted", "rule", "card", "one", "two", "three", "four"),
    *(f"heat-{step}" for step in range(STEPS)),
    *(f"on-heat-{step}" for step in range(STEPS)),
)
COLOURS = {name: f"#0102{number:02x}" for number, name in enumerate(_NAMES)}
"""Name of a CSS variable -> the colour that stands for it while matplotlib draws."""

_STAND_IN = re.compile(r"#0102[0-9a-f]{2}")
_VARIABLES = {colour: f"var(--{name})" for name, colour in COLOURS.items()}
_REFERENCE = re.compile(r"#([\w.-]+)")
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "bittern",
    "text.parse_math": False,  # a layer may be named $x$
    "font.family": ["DejaVu Sans"],  # what matplotlib brings, to lay out by; the page has its own
    "font.size": 11,
    "axes.edgecolor": COLOURS["rule"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.labelsize": 11,
    "axes.linewidth": 1,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "figure.dpi": 72,
    "grid.color": COLOURS["rule"],
    "grid.linewidth": 0.7,
    "text.color": COLOURS["ink"],
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 11,
}


def draw(name: str, title: str, summary: str, size: tuple[float, float], paint: Callable[[Figure], None]) -> str:
    """An SVG element.

    Args:
        name: unique in the page.
        title, summary: what a screen reader says: what is shown, and what it shows.
        size: width and height, in CSS pixels where nothing scales it.
        paint: puts axes, lines and printable text into the figure; XML has no control characters.

    Raises:
        BitternError: when matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BitternError(f"a report needs matplotlib: pip install 'bittern[report]' ({error})") from error

    written = io.BytesIO()
    with _quiet(), matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever a user's own file of styles says
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), layout="constrained")
        paint(figure)
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(written, format="svg", metadata=nothing)
    return _adopt(ET.fromstring(written.getvalue()), name, title, summary)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what matplotlib says of fonts that lack a glyph, or that it looks at fonts for the first time."""
    logger = logging.getLogger("matplotlib")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def _adopt(root: ET.Element, name: str, title: str, summary: str) -> str:
    """What matplotlib wrote, as a part of a page."""
    for parent in list(root.iter()):
        for child in list(parent):
            if _tag(child) in ("metadata", "style"):  # a style here would be one of the whole page
                parent.remove(child)
    used = {found for each in root.iter() for value in each.attrib.values() for found in _REFERENCE.findall(value)}
    for each in root.iter():
        each.tag = _tag(each)
        each.attrib = dict(_attributes(each.attrib, name, used))
        each.tail = None if each.tag != "tspan" else each.tail
        if each.text is not None:
            each.text = printable(each.text) if each.text.strip() else None
    root.attrib = {
        "class": "chart",
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "aria-labelledby": f"{name}-title {name}-summary",
    }
    for position, (tag, text) in enumerate((("title", title), ("desc", summary))):
        element = ET.Element(tag, {"id": f"{name}-{'title' if tag == 'title' else 'summary'}"})
        element.text = printable(text, whole=True)
        root.insert(position, element)
    return ET.tostring(root, encoding="unicode")


def _tag(element: ET.Element) -> str:
    return str(element.tag).rpartition("}")[2]


def _attributes(found: dict[str, Any], name: str, used: set[str]) -> Iterator[tuple[str, str]]:
    """Attributes with variables for colours, and without names that nothing refers to."""
    for key, value in found.items():
        key = key.rpartition("}")[2]
        if key == "id":
            if value in used:
                yield key, f"{name}-{value}"
            continue
        if key in ("href", "clip-path"):
            value = _REFERENCE.sub(lambda match: f"#{name}-{match[1]}", value)
        elif key == "style":
            value = _STAND_IN.sub(lambda match: _VARIABLES[match[0]], value)
            value = re.sub(r"font: ([\d.]+)px [^;]*", r"font-size: \1px", value)
        yield key, value
