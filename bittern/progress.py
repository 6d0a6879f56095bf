"""What the command line shows on stderr while it works; stdout stays free for results."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from bittern.report import peak_memory

if TYPE_CHECKING:
    from bittern.convert.cast import ConvertSummary
    from bittern.convert.gguf import GgufSummary
    from bittern.convert.repack import RepackSummary

NAME_WIDTH = 40


@contextmanager
def layer_rows() -> Iterator[Callable[[dict[str, Any]], None]]:
    """A callback for ``quantize(on_progress=...)``: one row per layer.

    On a terminal the rows scroll above a bar with elapsed time, remaining time and memory; elsewhere every row is a
    plain line that carries them itself. Remaining time assumes that the layers to come cost what those done have cost.
    """
    console = Console(stderr=True, highlight=False)
    started = time.monotonic()
    first: list[float] = []

    def left(event: dict[str, Any]) -> str:
        now = time.monotonic()
        done = int(event["index"])
        if not done:
            first.append(now)
            return "-:--"
        return clock((now - first[0]) / done * (int(event["total"]) - done - 1))

    def plain(event: dict[str, Any]) -> None:
        elapsed = clock(time.monotonic() - started)
        row = f"{layer_row(event)}  {elapsed} elapsed  {left(event)} left  {size(peak_memory())} peak"
        print(row, file=sys.stderr, flush=True)

    if not console.is_terminal:
        yield plain
        return
    columns = (
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]} left  {task.fields[memory]} peak"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("layers", total=None, left="-:--", memory=size(peak_memory()))

        def live(event: dict[str, Any]) -> None:
            bar.console.print(layer_row(event), markup=False, no_wrap=True, overflow="ellipsis")
            done = event["index"] + 1
            bar.update(task, completed=done, total=event["total"], left=left(event), memory=size(peak_memory()))

        yield live


@contextmanager
def share_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A callback ``(done, total)``: a bar on a terminal, nothing elsewhere."""
    console = Console(stderr=True)
    columns = (TextColumn(what, markup=False), BarColumn(bar_width=24), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def layer_row(event: dict[str, Any]) -> str:
    """One layer of the manifest as a row: index, layer, shape, bits, method, loss, damping, tokens, seconds."""
    name = event["layer"]
    if len(name) > NAME_WIDTH:
        name = "…" + name[1 - NAME_WIDTH :]
    out_features, in_features = event["shape"]
    group = "row" if event["group_size"] == -1 else f"g{event['group_size']}"
    loss = "-" if event["loss"] is None else f"{event['loss']:.2e}"
    damp = "-" if event["damp"] is None else f"{event['damp']:g}"
    fields = [
        f"{event['index'] + 1:>{len(str(event['total']))}}/{event['total']}",
        f"{name:<{NAME_WIDTH}}",
        f"{f'{out_features}x{in_features}':>11}",
        f"{event['bits']} bits {group:<4}",
        f"{event['method']:<4}",
        f"loss {loss:<8}",
        f"damp {damp:<5}",
        f"{event['tokens']:>7} tokens",
        f"{event['seconds']:5.1f} s",
    ]
    if event.get("fallback"):
        fields.append(f"fallback: {event['fallback']}")
    return "  ".join(fields)


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def line(value: Any) -> str:
    """Anything from JSON on one line, for people."""
    if isinstance(value, dict):
        items = [f"{name} {line(item)}" for name, item in value.items()]
        return ", ".join(items[:8] + ([f"and {len(items) - 8} more"] if len(items) > 8 else []))
    if isinstance(value, list):
        return ", ".join(map(line, value))
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def figures(found: Mapping[str, Any]) -> str:
    """Measured figures, one a line; those that were not measured are left out."""
    known = {name: f"{value:.4f}" if isinstance(value, float) else value for name, value in found.items()}
    return "\n".join(f"{name.replace('_', ' '):<20} {value}" for name, value in known.items() if value is not None)


def story_lines(manifest: Mapping[str, Any] | None) -> list[str]:
    """What inspect found in a manifest, a line for every sentence."""
    if manifest is None:
        return []
    if "problem" in manifest:
        return [f"{'manifest':<20} {manifest['problem']}"]
    told = [("manifest", f"schema {manifest['schema_version']}"), *(("story", each) for each in manifest["story"])]
    told += [("note", note) for note in manifest["notes"]]
    if manifest["command"] is not None:
        told.append(("command", shlex.join(manifest["command"])))
    return [f"{name:<20} {text}" for name, text in told]


def conversion(summary: ConvertSummary | RepackSummary | GgufSummary) -> str:
    """What a conversion did, in a line or a few."""
    from bittern.convert.cast import ConvertSummary

    if isinstance(summary, ConvertSummary):
        written = f"{len(summary.tensors)} tensors in {summary.dtype}, {size(summary.source_bytes)} ->"
    elif summary.layers:
        moved = f"rounded by up to {summary.error:.2g} steps of the grid" if summary.error else "no weight changed"
        written = f"{summary.layers} packed layers ({moved}),"
    else:
        written = "no packed layers,"
    lines = [f"{summary.output}: {written} {size(summary.output_bytes)}, {summary.seconds:.1f} s"]
    if isinstance(summary, ConvertSummary):
        if summary.worst is not None:
            lines.append(f"largest relative error: {summary.worst.max_relative_error:.2e} in {summary.worst.name}")
        lines += [f"clamped {cast.overflowed} values of {cast.name}" for cast in summary.tensors if cast.overflowed]
    elif summary.max_relative_error:
        lines.append(f"largest relative error of a float: {summary.max_relative_error:.2e}")
    return "\n".join(lines)


def size(count: float) -> str:
    """A number of bytes in decimal units."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
