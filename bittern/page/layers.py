"""The section about layers: a heat map of errors, one of bits, and a row for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bittern.page.charts import cells, ranges, step_of, steps
from bittern.page.mixed import sensitivity_chart
from bittern.page.parts import NOTHING, Chart, Place, Section, Table, figure, place, share, too_many
from bittern.page.svg import STEPS
from bittern.report import runs

MOST_ROWS = 3000
"""Of the table of all layers."""

STAGES = {
    "balance": ("Balancing of channels", "rounding noise that the grids let expect"),
    "drift": ("Correction for the layers before", "squared error that they cause, on held-out windows"),
    "polish": ("Polishing of codes and scales", "squared error of the layers' outputs"),
    "shape": ("Shaping of errors", "divergence of the predictions that they let expect"),
}
"""Stages of an effort as the manifest names them: what they do, and what they lessen."""


def layer_sections(manifest: Mapping[str, Any]) -> list[Section]:
    """What the last run that chose or moved codes says of its layers; nothing where no run did."""
    chain = runs(dict(manifest))
    quantized = [run for run in chain if "layers" in run]
    moved = [run for run in chain if "repacked" in run]
    if not quantized and not moved:
        return []
    run = (quantized or moved)[-1]
    records: list[dict[str, Any]] = run.get("layers") or run.get("repacked") or []
    kept: dict[str, str] = run.get("kept") or {}
    if not records:
        return []
    text = []
    if manifest["options"].get("format") == "safetensors" and manifest.get("kind") == "repack":
        text.append("The layers are floats again; this is what became of them before.")
    mixed = run.get("mixed")
    charts = [_error_chart(records), _bits_chart(records, kept), sensitivity_chart(mixed) if mixed else None]
    if charts[0] is None:
        text.append(_why_no_error(run, records))
    table = _table(records, run["measured"].get("layer_seconds") or {})
    shown = f"All {len(records)} layers" if len(table.rows) == len(records) else f"The first {len(table.rows)} layers"
    brought = _stage_table(run)
    return [
        Section(
            "layers",
            "Layers",
            tuple(text),
            tuple(chart for chart in charts if chart is not None),
            ((("What each stage brought", brought),) if brought.rows else ()) + ((shown, table),),
        )
    ]


def _why_no_error(run: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    if "layers" not in run:
        return "Which error each layer has is not known: the run that chose the codes left no manifest of bittern."
    if all(record["method"] == "rtn" for record in records):
        return "Layers were rounded to nearest without calibration text, so no error of their outputs was measured."
    return "No error of a layer's output was measured."


def _error_chart(records: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Errors by block and kind of layer; of several experts the worst."""
    known = {record["layer"]: float(record["loss"]) for record in records if record.get("loss") is not None}
    if not known:
        return None
    worst, best = max(known, key=lambda name: known[name]), min(known, key=lambda name: known[name])
    bounds = steps(list(known.values()))
    grid = _grid(known, max)
    rows, columns = _axes(grid, [str(record["layer"]) for record in records])
    values = [
        [
            (step_of(grid[row, column], bounds), share(grid[row, column]).removesuffix(" %"))
            if (row, column) in grid
            else None
            for column in columns
        ]
        for row in rows
    ]
    by_kind: dict[str, list[str]] = {}
    for name in known:
        by_kind.setdefault(place(name)[1], []).append(name)
    means = {kind: sum(known[name] for name in names) / len(names) for kind, names in by_kind.items()}
    largest = max(means, key=lambda kind: means[kind])
    summary = (
        f"Squared error of each layer's output on the calibration tokens, in percent of the squared output: from"
        f" {share(known[best])} in {best} to {share(known[worst])} in {worst}; on average largest in {largest}"
        f" ({share(means[largest])})."
    )
    if any("*" in column for column in columns):
        summary += " Of several experts in a cell the worst is shown."
    low, high = known[best], known[worst]
    legend = ranges(bounds, low, high, lambda value: share(value).removesuffix(" %")) if bounds else []
    title = "Error of each layer, in percent"
    svg = cells("error", title, summary, rows, short_names(columns), values, "block", legend)
    order = sorted(by_kind, key=lambda kind: -means[kind])
    table = Table(
        "Error by kind of layer, the largest mean first",
        ("Kind of layer", "Layers", "Mean", "Largest", "Layer with the largest"),
        tuple(_kind_row(kind, by_kind[kind], known, means[kind]) for kind in order),
        (0, 4),
    )
    return Chart("error", title, summary + too_many(svg), svg, table)


def _kind_row(kind: str, names: Sequence[str], known: Mapping[str, float], mean: float) -> tuple[str, ...]:
    worst = max(names, key=lambda name: known[name])
    return kind, str(len(names)), share(mean), share(known[worst]), worst


def _bits_chart(records: Sequence[Mapping[str, Any]], kept: Mapping[str, str]) -> Chart:
    """Bits by block and kind of layer."""
    bits: dict[str, int] = {str(record["layer"]): int(record["bits"]) for record in records}
    grid = _grid({**bits, **dict.fromkeys(kept, 0)}, max)
    rows, columns = _axes(grid, [*bits, *kept])
    distinct = sorted(set(bits.values()))
    step = {0: 0} | {value: _spread(position, len(distinct)) for position, value in enumerate(distinct)}
    values = [
        [
            (step[grid[row, column]], str(grid[row, column] or "float")) if (row, column) in grid else None
            for column in columns
        ]
        for row in rows
    ]
    counts = {value: sum(each == value for each in bits.values()) for value in distinct}
    said = [f"{count} layers have {value} bits" for value, count in counts.items()]
    said += [f"{len(kept)} stay floats"] if kept else []
    summary = f"Bits of each layer's codes, scales and zeros not counted: {', '.join(said)}."
    legend = [(step[value], f"{value} bits") for value in distinct] + ([(0, "floats")] if kept else [])
    title = "Bits of each layer"
    svg = cells("bits", title, summary, rows, short_names(columns), values, "block", legend)
    table = Table(
        title,
        ("Bits", "Layers", "Weights"),
        tuple((str(value), str(count), _weights(records, value)) for value, count in counts.items())
        + ((("float", str(len(kept)), NOTHING),) if kept else ()),
    )
    return Chart("bits", title, summary + too_many(svg), svg, table)


def _weights(records: Sequence[Mapping[str, Any]], bits: int) -> str:
    """How many weights have so many bits; a repacked layer's record has no shape."""
    shapes = [record.get("shape") for record in records if record["bits"] == bits]
    return figure(sum(shape[0] * shape[1] for shape in shapes if shape)) if all(shapes) else NOTHING


def _spread(position: int, count: int) -> int:
    """A step of the scale for one of a few values; the lowest is for floats."""
    return 1 + position * (STEPS - 2) // max(count - 1, 1) if count > 1 else 3


def _table(records: Sequence[Mapping[str, Any]], seconds: Mapping[str, float]) -> Table:
    rows = []
    for record in records[:MOST_ROWS]:
        name, shape, group = str(record["layer"]), record.get("shape"), record["group_size"]
        rows.append(
            (
                name,
                NOTHING if not shape else f"{shape[0]} x {shape[1]}",
                str(record["bits"]),
                "row" if group == -1 else str(group),
                "symmetric" if record["sym"] else "asymmetric",
                str(record.get("method", NOTHING)),
                share(record.get("loss")),
                figure(record.get("damp"), "{:g}"),
                figure(record.get("tokens")),
                figure(seconds.get(name), "{:.2f}"),
            )
        )
    heads = ("Layer", "Shape", "Bits", "Group", "Grid", "Method", "Error", "Damping", "Tokens", "Seconds")
    return Table("Every layer, in the order of the run", heads, tuple(rows), (0, 4, 5))


def _stage_table(run: Mapping[str, Any]) -> Table:
    """What the stages of the effort have left of what they lessen."""
    stages: Mapping[str, Mapping[str, Any]] = run.get("stages") or {}
    rows = [
        (*STAGES.get(name, (name, NOTHING)), share(found["left"]), figure(found["layers"]))
        for name, found in stages.items()
    ]
    tuning = run.get("tuning")
    if tuning:
        solved, tuned = tuning["kl"]["solved"], tuning["kl"]["tuned"]
        known = solved is not None and tuned is not None
        left = "not taken" if tuning["refused"] or solved == 0 else share(tuned / solved if known else None)
        rows.append(("Training of scales and norms", "KL to full precision on held-out text", left, "all"))
    columns = ("Stage", "What it lessens", "Left of it", "Layers")
    return Table("Stages of the effort; of several layers the geometric mean", columns, tuple(rows), (0, 1))


def _grid(values: Mapping[str, Any], join: Callable[[Any, Any], Any]) -> dict[Place, Any]:
    found: dict[Place, Any] = {}
    for name, value in values.items():
        where = place(name)
        found[where] = join(found[where], value) if where in found else value
    return found


def _axes(grid: Mapping[Place, Any], names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Blocks by their numbers, kinds of layers in the order in which layers of these names come."""
    rows = sorted({row for row, _ in grid}, key=lambda row: int(row) if row.isdecimal() else 10**9)
    known = {column for _, column in grid}
    return rows, [column for column in dict.fromkeys(place(name)[1] for name in names) if column in known]


def short_names(names: Sequence[str]) -> list[str]:
    """Names that are as short as they can be and still differ: without ``_proj``, without their path."""
    last = [name.rpartition(".")[2] for name in names]
    for short in ([name.removesuffix("_proj").removesuffix("_lin") for name in last], last):
        if len(set(short)) == len(names):
            names = short
            break
    return [name if len(name) <= 28 else f"…{name[-27:]}" for name in names]
