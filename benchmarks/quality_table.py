"""The tables and the picture of quality.py, from its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quality_recipes import REFERENCE

Row = Mapping[str, Any]
IDLE = 0.1
"""Cores that others may keep busy while a time is measured."""

HIGHEST = 20
"""Times the unquantized model's perplexity, above which the picture says no more: nothing works there."""


def idle(row: Row) -> bool:
    """Whether nothing else ran while the artifact was made, as far as is known."""
    others = row.get("others")
    return others is not None and others <= IDLE


def references(rows: Sequence[Row]) -> dict[int, Row]:
    """Bits -> the row that ratios at those bits are to."""
    return {row["bits"]: row for row in rows if row["label"] == REFERENCE}


def ratio(row: Row, reference: Row | None, value: Any, other: Any) -> str:
    """How a figure compares with the reference's, in brackets; nothing without one, and of the reference itself."""
    if reference is None or reference is row or value is None or not other:
        return ""
    return f" ({value / other:.2f} x)"


def gap_closed(base: float, reference: float, found: float) -> float | None:
    """Share of the reference's loss of perplexity that a row does not have; None where the reference lost nothing."""
    return (reference - found) / (reference - base) if reference > base else None


def quality_table(rows: Sequence[Row], base: Row, gap: bool) -> str:
    """Bits and figures on every text and task, as Markdown; in brackets what they are to the reference's."""
    texts, tasks = list(base["texts"]), list(base["tasks"])
    titles = ["tool", "bits", "bits/weight", "with embeddings"]
    for name in texts:
        titles += [f"{name}: perplexity", "KL", "top-1", *(["gap closed"] if gap else [])]
    table = [[*titles, *tasks], [base["label"], "", "", f"{base['bits_per_weight']['all']:.2f}"]]
    for name in texts:
        table[-1] += [f"{base['texts'][name]['perplexity']:.2f}", "", "", *([""] if gap else [])]
    table[-1] += [f"{base['tasks'][name]['accuracy']:.3f}" for name in tasks]
    others = references(rows)
    for row in rows:
        reference, bits = others.get(row["bits"]), row["bits_per_weight"]
        cells = [row["label"], str(row["bits"]), f"{bits['without_embeddings']:.2f}", f"{bits['all']:.2f}"]
        for name in texts:
            here, there = row["texts"][name], reference["texts"][name] if reference else {}
            for figure, digits in (("perplexity", 2), ("kl", 4)):
                compared = ratio(row, reference, here[figure], there.get(figure))
                cells.append(f"{here[figure]:.{digits}f}{compared}")
            cells.append(f"{here['top1_agreement']:.3f}")
            if gap:
                closed = None
                if reference:
                    closed = gap_closed(base["texts"][name]["perplexity"], there["perplexity"], here["perplexity"])
                cells.append("" if closed is None else f"{100 * closed:.0f} %")
        table.append([*cells, *(f"{row['tasks'][name]['accuracy']:.3f}" for name in tasks)])
    return markdown(table)


def cost_table(rows: Sequence[Row]) -> str:
    """What making each artifact took, as Markdown; a time beside other work is not shown."""
    table = [["tool", "bits", "seconds", "peak RSS, GB", "threads", "made"]]
    others = references(rows)
    for row in rows:
        reference = others.get(row["bits"])
        seconds = "not idle"
        if idle(row):
            fair = reference is not None and idle(reference) and reference["threads"] == row["threads"]
            seconds = f"{row['seconds']:.0f}"
            seconds += ratio(row, reference, row["seconds"], reference["seconds"]) if reference and fair else ""
        rss = f"{row['peak_rss_bytes'] / 1e9:.2f}"
        rss += ratio(row, reference, row["peak_rss_bytes"], reference["peak_rss_bytes"]) if reference else ""
        table.append([row["label"], str(row["bits"]), seconds, rss, str(row["threads"]), row["date"][:16]])
    return markdown(table)


def markdown(table: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([lines[0], "|---" * len(table[0]) + "|", *lines[1:]])


def lines(rows: Sequence[Row], text: str, figure: str) -> dict[str, list[tuple[float, float]]]:
    """Tool -> (bits per weight, figure) of its artifacts, from few bits to many; llama.cpp's types are one line."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        label = "llama.cpp" if row["label"].startswith("llama.cpp") else row["label"]
        point = (row["bits_per_weight"]["without_embeddings"], row["texts"][text][figure])
        found.setdefault(label, []).append(point)
    return {label: sorted(points) for label, points in found.items()}


def draw(rows: Sequence[Row], base: Row, path: Path) -> None:
    """Perplexity and KL over bits per weight, a row of panels for each text and a line for each tool."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        """Writes 0.04, not 4e-02, where it writes anything."""

        def __call__(self, value: float, place: int | None = None) -> str:
            return f"{value:g}" if super().__call__(value, place) else ""

    names = list(base["texts"])
    figure, panels = pyplot.subplots(len(names), 2, figsize=(11, 1.2 + 4 * len(names)), squeeze=False)
    for name, pair in zip(names, panels, strict=True):
        for panel, (key, title) in zip(pair, (("perplexity", "perplexity"), ("kl", "KL, nats a token")), strict=True):
            for index, (label, points) in enumerate(lines(rows, name, key).items()):
                panel.plot(*zip(*points, strict=True), label=label, **_look(label, index))
            panel.set_yscale("log")
            panel.yaxis.set_major_formatter(Plain())
            panel.yaxis.set_minor_formatter(Plain(minor_thresholds=(2, 0.4)))
            said = f"{name}: {title}"
            if key == "perplexity":
                own = base["texts"][name][key]
                panel.axhline(own, color="#555555", linewidth=1, dashes=(2, 2))
                if any(row["texts"][name][key] > HIGHEST * own for row in rows):
                    panel.set_ylim(0.9 * own, HIGHEST * own)
                    said += f" (up to {HIGHEST} x the unquantized one)"
            panel.set_title(said, fontsize=10)
            panel.set_xlabel("bits per weight, embeddings left out", fontsize=9)
            panel.spines[["top", "right"]].set_visible(False)
            panel.grid(axis="y", linewidth=0.4)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=min(4, len(labels)), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.06 + 0.02 * (len(labels) // 4), 1, 1))
    figure.savefig(path)


def _look(label: str, index: int) -> dict[str, Any]:
    """bittern's lines are thick and of its colour; the others are told apart by colour, dash and mark."""
    marks = "osD^vPX*"
    if label.startswith("bittern"):
        return {"color": "#1f6f8b", "linewidth": 2.2, "marker": marks[index % len(marks)], "markersize": 5}
    families = {"GPTQModel": "#8a8a8a", "llm-compressor": "#6a9a3f", "llama.cpp": "#e07a3f", "AutoRound": "#8e5ea2"}
    colour = next((colour for family, colour in families.items() if label.startswith(family)), "#c9a227")
    dashes = ["-", "--", ":", "-."][index % 4]
    return {
        "color": colour,
        "linewidth": 1.2,
        "linestyle": dashes,
        "marker": marks[index % len(marks)],
        "markersize": 4,
    }
