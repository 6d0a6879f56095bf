"""The kinds of charts that a report has: bars, lines, points against bits, and cells of a heat map.

They are narrow, for a phone shows them as large as they are, and tell series apart by more than their colour.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from bittern.errors import printable
from bittern.page.svg import COLOURS, STEPS, draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 330
MOST_ROWS, MOST_COLUMNS = 400, 40
"""Of a heat map; what is larger is nothing to look at."""

_SERIES = (("one", (None, None), "o"), ("two", (5, 2), "s"), ("three", (2, 2), "^"), ("four", (6, 2, 1, 2), "D"))
_BAR = 17  # height of a bar
_PLOT = (268, 190)  # of points against bits, about
_TEXT_WIDTH = 29  # of a cell that holds a number


@dataclass(frozen=True)
class Series:
    """Points that belong together, in the order of x.

    Attributes:
        label: what they are.
        points: (x, y).
        names: of the points, where each is something of its own.
    """

    label: str
    points: tuple[tuple[float, float], ...]
    names: tuple[str, ...] = ()


def bars(
    name: str,
    title: str,
    summary: str,
    labels: Sequence[str],
    series: Sequence[tuple[str, Sequence[tuple[float, str]]]],
) -> str:
    """Horizontal bars: of every label one for each series, with its value in words.

    Args:
        labels: of the groups, from the top.
        series: what it is called, and a value with its words for every label; at most two.
    """
    count = len(series)
    largest = max((value for _, values in series for value, _ in values), default=0) or 1

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for position, (label, values) in enumerate(series):
            # A single series is the subject; of two the first is what was before.
            colour = COLOURS[("one", "two")[position] if count > 1 else "two"]
            heights = [row + (position - (count - 1) / 2) * 0.4 for row in range(len(labels))]
            axes.barh(heights, [value for value, _ in values], 0.36 if count > 1 else 0.6, color=colour, label=label)
            for height, (value, words) in zip(heights, values, strict=True):
                axes.text(value + largest * 0.015, height, words, va="center", fontsize=10.5)
        axes.set_yticks(range(len(labels)), [_cut(label) for label in labels])
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.set_xlim(0, largest * 1.28)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        if count > 1:
            figure.legend(loc="outside upper left", ncols=count, handlelength=1, borderpad=0)

    height = len(labels) * (_BAR * count + 12) + 16 + (26 if count > 1 else 0)
    return draw(name, title, summary, (WIDTH, height), paint)


def lines(
    name: str, title: str, summary: str, series: Sequence[Series], x_label: str, y_label: str, markers: bool = False
) -> str:
    """Lines over a common axis, told apart by dashes too."""

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for each, (colour, dashes, marker) in zip(series, _SERIES, strict=False):
            (line,) = axes.plot(
                *zip(*each.points, strict=True), color=COLOURS[colour], linewidth=2, label=_cut(each.label)
            )
            if dashes[0] is not None:
                line.set_dashes([float(length or 0) for length in dashes])
            if markers:
                line.set_marker(marker)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        axes.locator_params(nbins=5)
        _plain_ticks(axes)
        if all(y >= 0 for each in series for _, y in each.points):
            axes.set_ylim(0, 1.08 * max(y for each in series for _, y in each.points) or 1)
        figure.legend(loc="outside upper left", ncols=_abreast(series), handlelength=2.4, borderpad=0)

    return draw(name, title, summary, (WIDTH, 250 + 16 * math.ceil(len(series) / _abreast(series))), paint)


def against_bits(
    name: str,
    title: str,
    summary: str,
    series: Sequence[Series],
    y_label: str,
    words: Callable[[float], str],
    level: tuple[str, float] | None = None,
) -> str:
    """Points over bits per weight, each with its value in words.

    Args:
        series: a text or a task each.
        words: of a value.
        level: a value whose bits are not known: its name, and how high it is.
    """

    bits = [x for each in series for x, _ in each.points]

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for each, (colour, dashes, marker) in zip(series, _SERIES, strict=False):
            (line,) = axes.plot(
                *zip(*each.points, strict=True), color=COLOURS[colour], linewidth=1.5, label=_cut(each.label)
            )
            line.set(marker=marker, markersize=7)
            if len(each.points) < 3:  # between two models there is nothing to read off
                line.set_linestyle("none")
            elif dashes[0] is not None:
                line.set_dashes([float(length or 0) for length in dashes])
        if level is not None:
            axes.axhline(level[1], color=COLOURS["muted"], linewidth=1.2, dashes=(2, 2))
            axes.annotate(
                f"{_cut(level[0])}: {words(level[1])}", (0.99, level[1]), (0, 4), xycoords=("axes fraction", "data"),
                textcoords="offset points", ha="right", fontsize=10.5,
            )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_xlim(min(bits) / 1.35, max(bits) * 1.35)
        ticks = [tick for tick in (1, 2, 3, 4, 6, 8, 16, 32, 64) if min(bits) / 1.35 <= tick <= max(bits) * 1.35]
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.margins(y=0.3)
        _name_points(axes, series, words)
        axes.set_xlabel("bits per weight, without embeddings")
        axes.set_ylabel(y_label)
        axes.locator_params(axis="y", nbins=5)
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        if len(series) > 1:
            figure.legend(loc="outside upper left", ncols=_abreast(series), handlelength=2.4, borderpad=0)

    legend = 16 * math.ceil(len(series) / _abreast(series)) if len(series) > 1 else 0
    return draw(name, title, summary, (WIDTH, 250 + legend), paint)


def cells(
    name: str,
    title: str,
    summary: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[tuple[int, str] | None]],
    row_label: str,
    legend: Sequence[tuple[int, str]] = (),
) -> str | None:
    """A table of coloured cells: a step of the scale and words each, None for one that is empty.

    Args:
        rows, columns: their labels.
        values: of every row, a cell for every column.
        row_label: what the rows are.
        legend: (step, words) to show below.

    Returns:
        None when there are more rows or columns than can be looked at.
    """
    if not 0 < len(rows) <= MOST_ROWS or not 0 < len(columns) <= MOST_COLUMNS:
        return None
    rows, columns = [printable(row) for row in rows], [printable(column) for column in columns]
    height = 22 if len(rows) <= 40 else 12
    with_words = height == 22 and (WIDTH - 60) / len(columns) >= _TEXT_WIDTH
    label_every = 1 if height == 22 else 5
    abreast = 3 if max((len(words) for _, words in legend), default=0) > 9 else 4
    slanted = max(map(len, columns)) * 6.5 > (WIDTH - 60) / len(columns)

    def paint(figure: Figure) -> None:
        from matplotlib.patches import Rectangle

        axes = figure.subplots()
        for y, row in enumerate(values):
            for x, cell in enumerate(row):
                if cell is None:
                    continue
                colour = COLOURS[f"heat-{cell[0]}"]
                axes.add_patch(Rectangle((x + 0.03, y + 0.05), 0.94, 0.9, facecolor=colour, edgecolor="none"))
                if with_words:
                    ink = COLOURS[f"on-heat-{cell[0]}"]
                    axes.text(x + 0.5, y + 0.5, cell[1], color=ink, ha="center", va="center", fontsize=10)
        axes.set_xlim(0, len(columns))
        axes.set_ylim(len(rows), 0)
        axes.set_xticks([x + 0.5 for x in range(len(columns))], columns)
        axes.xaxis.tick_top()
        axes.tick_params(axis="both", length=0)
        if slanted:
            for label in axes.get_xticklabels():
                label.set(rotation=40, ha="left", rotation_mode="anchor")
        shown = range(0, len(rows), label_every)
        axes.set_yticks([y + 0.5 for y in shown], [rows[y] for y in shown])
        axes.set_ylabel(row_label)
        for spine in axes.spines.values():
            spine.set_visible(False)
        if legend:
            shades = [Rectangle((0, 0), 1, 1, facecolor=COLOURS[f"heat-{step}"], label=words) for step, words in legend]
            figure.legend(
                handles=shades,
                loc="outside lower left",
                ncols=abreast,
                handlelength=1,
                columnspacing=1,
                borderpad=0,
            )

    top = 26 + (max(map(len, columns)) * 4.4 if slanted else 0)
    return draw(
        name,
        title,
        summary,
        (WIDTH, len(rows) * height + top + 10 + 18 * math.ceil(len(legend) / abreast)),
        paint,
    )


def steps(values: Sequence[float]) -> list[float]:
    """Bounds between the steps of a scale, as many as make sense: each a fixed ratio above the one before.

    Errors spread over orders of magnitude, so equal ratios show more than equal differences.
    """
    positive = sorted(value for value in values if value > 0)
    if not positive or positive[-1] <= positive[0] * 1.000001:
        return []
    low, high = math.log(positive[0]), math.log(positive[-1])
    return [math.exp(low + (high - low) * step / STEPS) for step in range(1, STEPS)]


def step_of(value: float, bounds: Sequence[float]) -> int:
    """The step of the scale that a value falls on."""
    return sum(value >= bound for bound in bounds)


def ranges(bounds: Sequence[float], low: float, high: float, words: Callable[[float], str]) -> list[tuple[int, str]]:
    """The steps with their ranges in words, for a legend."""
    edges = [low, *bounds, high]
    return [(step, f"{words(first)} to {words(last)}") for step, (first, last) in enumerate(pairwise(edges))]


def _name_points(axes: Axes, series: Sequence[Series], words: Callable[[float], str]) -> None:
    """Put name and value above every point, each higher until it covers no other.

    Where a label comes to lie is estimated, for the layout is not settled before all of them are there.
    """
    low, high = axes.get_xlim()
    bottom, top = axes.get_ylim()
    boxes: list[tuple[float, float, float]] = []  # left, right, bottom
    points = [
        (x, y, f"{_cut(name)}\n{words(y)}" if name else words(y))
        for each in series
        for (x, y), name in zip(each.points, each.names or [""] * len(each.points), strict=True)
    ]
    for x, y, said in sorted(points, key=lambda point: -point[0]):
        at = math.log(x / low) / math.log(high / low)
        width, height = 6.2 * max(map(len, said.split("\n"))), 13 * (1 + said.count("\n"))
        left = at * _PLOT[0] - width / 2
        left = min(max(left, 0), _PLOT[0] - width)  # stays in the picture
        base = _PLOT[1] * (y - bottom) / (top - bottom)
        lift = 8.0
        across = [foot for start, end, foot in boxes if left < end and start < left + width]
        while any(abs(base + lift - foot) < height for foot in across):
            lift += 7
        boxes.append((left, left + width, base + lift))
        axes.annotate(
            said, (x, y), (left + width / 2 - at * _PLOT[0], lift), textcoords="offset points", ha="center",
            va="bottom", fontsize=10.5, linespacing=1.15, annotation_clip=False,
            bbox={"facecolor": COLOURS["card"], "edgecolor": "none", "pad": 1},
            arrowprops={"arrowstyle": "-", "color": COLOURS["muted"], "linewidth": 0.8} if lift > 8 else None,
        )  # fmt: skip


def _abreast(series: Sequence[Series]) -> int:
    """Columns of a legend that holds these."""
    return 2 if max(len(each.label) for each in series) <= 13 else 1


def _cut(name: str) -> str:
    """A name that fits beside its point."""
    name = printable(name)
    return name if len(name) <= 22 else f"{name[:21]}…"


def _plain_ticks(axes: Axes) -> None:
    """Numbers with separators rather than powers and offsets."""
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,.10g}")
