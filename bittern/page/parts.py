"""What a page is made of: sections, figures and tables, as plain values that the template lays out."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

NOTHING = "-"
"""In a cell whose value the manifest does not have."""

Place = tuple[str, str]
"""The block that a layer is in, and what it is in there."""

_BLOCK = re.compile(r"(.*?)\.(\d{1,9})\.(.+)")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class Table:
    """Rows of text; the first cell of each names it.

    Attributes:
        caption: what it holds.
        columns: their heads.
        rows: as many cells each.
        words: columns, by position, that hold words rather than figures.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Chart:
    """A picture and the same as a table.

    Attributes:
        name: unique in the page.
        title: what is shown.
        summary: what it shows, in a sentence or two.
        svg: the picture; None where there is too much to draw, and ``summary`` says so.
        table: its data.
    """

    name: str
    title: str
    summary: str
    svg: str | None
    table: Table


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading.

    Attributes:
        name: unique in the page.
        title: its heading.
        text: paragraphs.
        charts: side by side where there is room.
        tables: (summary, table) to unfold, or open where the summary is empty.
        items: (what, sentence) of a list.
        commands: lines to type.
    """

    name: str
    title: str
    text: tuple[str, ...] = ()
    charts: tuple[Chart, ...] = ()
    tables: tuple[tuple[str, Table], ...] = ()
    items: tuple[tuple[str, str], ...] = ()
    commands: tuple[tuple[str, str], ...] = ()


def figure(value: float | int | None, form: str | Callable[[float], str] = "{:,}") -> str:
    """A value in words, or :data:`NOTHING`."""
    if value is None:
        return NOTHING
    return form.format(value) if isinstance(form, str) else form(value)


def share(value: float | None) -> str:
    """A share as percent with enough figures: 0.75 %, 12 %, 0.0031 %."""
    if value is None:
        return NOTHING
    percent = 100 * value
    digits = 0 if percent >= 10 else 1 if percent >= 1 else 2 if percent >= 0.1 else 3
    return f"{percent:.{digits}f} %" if percent >= 0.01 or percent == 0 else f"{percent:.2g} %"


def place(name: str) -> Place:
    """The block of a layer and its place there; numbers of experts become *."""
    match = _BLOCK.fullmatch(name)
    return (match[2], _NUMBER.sub("*", match[3])) if match else (NOTHING, name)


def too_many(svg: str | None) -> str:
    """A sentence for the summary of a heat map that could not be drawn."""
    return " There are too many blocks or kinds of layers to draw; the table has them." if svg is None else ""
