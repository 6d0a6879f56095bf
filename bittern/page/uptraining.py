"""The section about uptraining: which heads went together, what each stage left of the error, how training went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bittern.page.charts import Series, bars, cells, lines, ranges, step_of, steps
from bittern.page.parts import NOTHING, Chart, Section, Table, figure, place, share
from bittern.page.svg import STEPS
from bittern.report import runs
from bittern.story import change_in_words

STAGES = {"error_mean": "mean", "error_aligned": "aligned", "error_solved": "solved", "error_distilled": "distilled"}
_HEADS = {"kl": "KL", "nll": "NLL", "lr": "Learning rate"}
MOST_POINTS = 2000
"""Of a curve that is drawn; of a longer one every n-th point is."""


def uptraining_section(manifest: Mapping[str, Any]) -> Section | None:
    """What the last run that uptrained says of itself; None without one."""
    found = [run for run in runs(dict(manifest)) if run.get("kind") == "uptrain"]
    if not found:
        return None
    run = found[-1]
    heads, blocks, training = run["heads"], run["blocks"], run["training"] or {}
    text = [
        f"{heads['num_attention_heads']} query heads of width {heads['head_dim']} in every block shared"
        f" {heads['source_kv_heads']} key and value heads; now they share {heads['num_key_value_heads']}.",
    ]
    if not training:
        text.append("The model was not trained after that.")
    charts = [
        _perplexity(run.get("perplexity") or {}),
        _stages(blocks),
        _groups(blocks, heads["num_attention_heads"]),
        *_curves(training.get("curve") or ()),
    ]
    return Section("uptraining", "Uptraining", tuple(text), tuple(chart for chart in charts if chart is not None))


def _perplexity(found: Mapping[str, Any]) -> Chart | None:
    names = [name for name in ("source", "converted", "trained") if found.get(name) is not None]
    if not names:
        return None
    source = found.get("source")
    words = {name: f"{found[name]:.2f}" for name in names}
    changes = {
        name: "" if not source or name == "source" else f" ({change_in_words(source, found[name])})" for name in names
    }
    where = f" on {found['text']}" if found.get("text") else ""
    summary = f"Perplexity{where}: " + ", ".join(f"{name} {words[name]}{changes[name]}" for name in names) + "."
    title = "Perplexity of source, conversion and training"
    values = [(float(found[name]), words[name]) for name in names]
    svg = bars("stages-perplexity", title, summary, names, [("perplexity", values)])
    table = Table(
        title,
        ("Model", "Perplexity", "Change"),
        tuple((name, f"{found[name]:.4f}", changes[name].strip(" ()") or NOTHING) for name in names),
    )
    return Chart("stages-perplexity", title, summary, svg, table)


def _stages(blocks: Sequence[Mapping[str, Any]]) -> Chart | None:
    keys = [key for key in STAGES if any(block.get(key) is not None for block in blocks)]
    if not keys:
        return None
    values = [float(block[key]) for block in blocks for key in keys if block.get(key) is not None]
    bounds = steps(values)
    grid = [
        [
            None if block.get(key) is None else (step_of(block[key], bounds), share(block[key]).removesuffix(" %"))
            for key in keys
        ]
        for block in blocks
    ]
    means = {
        key: sum(known) / len(known)
        for key in keys
        if (known := [float(block[key]) for block in blocks if block.get(key) is not None])
    }
    summary = (
        "Error of each block's output after each stage, in percent of what the block adds; on average "
        + ", ".join(f"{STAGES[key]} {share(mean)}" for key, mean in means.items())
    )
    title = "Error of each block and stage, in percent"
    legend = ranges(bounds, min(values), max(values), lambda value: share(value).removesuffix(" %")) if bounds else []
    rows, columns = [_row(block) for block in blocks], [STAGES[key] for key in keys]
    svg = cells("stages", title, f"{summary}.", rows, columns, grid, "block", legend)
    table = Table(
        title,
        ("Block", *columns),
        tuple((str(block["layer"]), *(share(block.get(key)) for key in keys)) for block in blocks),
    )
    return Chart("stages", title, f"{summary}.", svg, table)


def _groups(blocks: Sequence[Mapping[str, Any]], count: int) -> Chart | None:
    if not blocks:
        return None
    grid: list[list[tuple[int, str] | None]] = []
    for block in blocks:
        group_of = {head: number for number, group in enumerate(block["groups"]) for head in group}
        shown = min(count, max(group_of, default=-1) + 1, 4096)
        grid.append([(_tone(group_of[h]), str(group_of[h])) if h in group_of else None for h in range(shown)])
    width = max(map(len, grid))
    grid = [row + [None] * (width - len(row)) for row in grid]
    title = "Group of each key and value head of the source"
    summary = "Heads with the same number in a block share one key and value head, whichever heads those were before."
    heads = [str(head) for head in range(width)]
    svg = cells("groups", title, summary, [_row(block) for block in blocks], heads, grid, "block") if width else None
    table = Table(
        title,
        ("Block", "Groups of these heads"),
        tuple((str(b["layer"]), "; ".join(", ".join(map(str, group)) for group in b["groups"])) for b in blocks),
        (0, 1),
    )
    return Chart("groups", title, summary, svg, table)


def _tone(group: int) -> int:
    """Neighbouring groups far apart on the scale."""
    return (group * 3) % STEPS


def _curves(curve: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Losses, and perplexity where it was measured on the way."""
    every = max(1, -(-len(curve) // MOST_POINTS))
    x = "tokens" if all(point.get("tokens") is not None for point in curve) else "step"
    charts = []
    for name, title, keys in (
        ("loss", "Loss during training", ("loss", "kl", "nll")),
        ("training-perplexity", "Perplexity during training", ("perplexity",)),
    ):
        series = []
        for key in keys:
            known = [(float(point[x]), float(point[key])) for point in curve if point.get(key) is not None]
            if len(known) > 1:
                series.append(Series(key.upper() if key in ("kl", "nll") else key, tuple(known[::every])))
        if not series:
            continue
        said = [f"{each.label} from {each.points[0][1]:.3g} to {each.points[-1][1]:.3g}" for each in series]
        summary = f"{title}, over {figure(curve[-1].get(x))} {x if x == 'tokens' else 'steps'}: {', '.join(said)}."
        columns = ("step", "tokens", *keys, "lr")
        rows = [point for point in curve if any(point.get(key) is not None for key in keys)]
        table = Table(
            f"{title}, point by point",
            tuple(_HEADS.get(key, key.capitalize()) for key in columns),
            tuple(tuple(figure(point.get(key), "{:,.6g}") for key in columns) for point in rows[::every]),
        )
        markers = max(len(each.points) for each in series) <= 30
        label = "tokens seen" if x == "tokens" else "steps"
        svg = lines(name, title, summary, series, label, "perplexity" if name != "loss" else "nats per token", markers)
        charts.append(Chart(name, title, summary, svg, table))
    return charts


def _row(block: Mapping[str, Any]) -> str:
    """The number of a block."""
    name = str(block["layer"])
    number = place(f"{name}.x")[0]
    return number if number != NOTHING else name[-12:]
