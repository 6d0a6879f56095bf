"""What the command line shows on stderr while it works; stdout stays free for results."""

from __future__ import annotations

import os
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
    from bittern.push import PushSummary

NAME_WIDTH = 40

_BUSY = 0.1  # of the trials that a prediction is made from: more waiting than that makes it one of the other programs


@contextmanager
def layer_rows() -> Iterator[Callable[[dict[str, Any]], None]]:
    """A callback for ``quantize(on_progress=...)``: one row per layer.

    On a terminal the rows scroll above a bar with elapsed time, remaining time and memory; elsewhere every row is a
    plain line that carries them itself. Remaining time assumes that the layers to come cost what those done have cost.
    """
    console = Console(stderr=True, highlight=False)
    started = time.monotonic()
    first: list[tuple[float, int]] = []

    def left(event: dict[str, Any]) -> str:
        now, index = time.monotonic(), int(event["index"])
        if not first:  # a run that goes on does not begin with 0
            first.append((now, index))
            return "-:--"
        return clock((now - first[0][0]) / (index - first[0][1]) * (int(event["total"]) - index - 1))

    def plain(event: dict[str, Any]) -> None:
        elapsed = clock(time.monotonic() - started)
        row = f"{layer_row(event)}  {elapsed} elapsed  {left(event)} left  {size(peak_memory())} peak"
        print(row, file=sys.stderr, flush=True)

    if not console.is_terminal or os.environ.get("RANK", "0") != "0":  # helpers of torchrun have no rows
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


def measured_row(done: int, total: int) -> None:
    """Say how many blocks' sensitivity is known."""
    print(f"sensitivity: {done}/{total} blocks measured", file=sys.stderr, flush=True)


def weighed_row(done: int, total: int) -> None:
    """Say of how many blocks it is known what their outputs count."""
    print(f"what outputs count: {done}/{total} blocks", file=sys.stderr, flush=True)


def sampled_row(done: int, total: int) -> None:
    """Say how much of its own text a model has written."""
    print(f"text of the source's own: {done}/{total} windows written", file=sys.stderr, flush=True)


def block_row(event: dict[str, Any]) -> str:
    """One block whose heads were merged: groups, and the errors of its output after each stage."""
    stages = [(name, event[f"error_{name}"]) for name in ("mean", "aligned", "solved", "distilled")]
    groups = " ".join("+".join(map(str, group)) for group in event["groups"])
    fields = [
        f"{event['index'] + 1:>{len(str(event['total']))}}/{event['total']}",
        event["layer"],
        f"heads {groups}",
        *(f"{name} {error:.4f}" for name, error in stages if error is not None),
    ]
    return "  ".join(fields)


def point_row(event: dict[str, Any]) -> str:
    """One evaluation of a training run."""
    fields = [
        f"step {event['step']:>{len(str(event['steps']))}}/{event['steps']}",
        f"{event['tokens']:,} tokens",
        f"loss {event['loss']:.4f}",
        f"KL {event['kl']:.4f}",
        f"nll {event['nll']:.4f}",
        *([f"hidden {event['hidden']:.4f}"] if "hidden" in event else []),
        f"lr {event['lr']:.1e}",
        f"perplexity {event['perplexity']:.3f}",
        f"{clock(event['seconds'])} elapsed",
        f"{clock(event['left'])} left",
        f"{size(peak_memory())} peak",
    ]
    return "  ".join(fields)


def uptraining(manifest: dict[str, Any]) -> str:
    """What an uptraining did, in a few lines."""
    heads, cache, perplexity = (manifest[key] for key in ("heads", "kv_bytes_per_token", "perplexity"))
    trained = "" if perplexity["trained"] is None else f", {perplexity['trained']:.3f} after {_trained(manifest)}"
    return (
        f"{heads['source_kv_heads']} -> {heads['num_key_value_heads']} key-value heads,"
        f" {cache['source']['fp16']:,} -> {cache['output']['fp16']:,} bytes of fp16 cache a token,"
        f" {manifest['measured']['seconds']:.1f} s\n"
        f"perplexity on {perplexity['text']}: {perplexity['source']:.3f} -> {perplexity['converted']:.3f}{trained}"
    )


def _trained(manifest: dict[str, Any]) -> str:
    return f"{manifest['training']['tokens']:,} tokens"


def quantization(manifest: Mapping[str, Any]) -> str:
    """What a quantization did, in a line."""
    measured = manifest["measured"]
    return (
        f"{len(manifest['layers'])} layers quantized, {len(manifest['kept'])} kept,"
        f" {measured['seconds']:.1f} s, {size(measured['peak_memory_bytes'])} peak memory"
    )


def expected(prediction: Mapping[str, Any]) -> str:
    """What a run will take, in a line."""
    memory, output = (size(prediction[key]) for key in ("peak_memory_bytes", "bytes"))
    took = clock(prediction["seconds"]) + _disturbed(prediction["waited"])
    return f"expected: {took}, {memory} peak memory, {output} to write"


def _disturbed(waited: float) -> str:
    """What to think of a time that was found out while others had the processors for a share of it."""
    if waited <= _BUSY:
        return ""
    return f" (much less on an idle machine: other programs held it up for {waited:.0%} of its trials)"


def preflight(found: Mapping[str, Any]) -> str:
    """What a dry run found, a line for every figure and every loader."""
    prediction, errors = found["prediction"], found["errors"]
    stages = sorted(found["stages"].items(), key=lambda item: -item[1])
    shares = ", ".join(
        f"{name} {share:.0%}" for name, took in stages if (share := took / prediction["seconds"]) >= 0.01
    )
    took = clock(prediction["seconds"]) + (_disturbed(found["waited"]) or f" (within {errors['seconds']:.0%})")
    rows = [
        ("time", f"{took}: {shares}"),
        ("peak memory", f"{size(prediction['peak_memory_bytes'])} (within {errors['peak_memory_bytes']:.0%})"),
        ("output", f"{size(prediction['bytes'])} of {found['format']} (within {errors['bytes']:.0%})"),
        ("disk", f"{size(found['disk_bytes'])}, {size(found['work_bytes'])} of that only until the output stands"),
    ]
    for verdict in found["loads"]:
        rows.append((verdict["consumer"], f"{_ANSWERS[verdict['loads']]}: {verdict['reason']}"))
    return "\n".join(f"{name:<20} {text}" for name, text in rows)


_ANSWERS = {True: "will load it", False: "will not load it"}


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


def publication(summary: PushSummary) -> str:
    """What a push did, or with --dry-run would do, in a line or a few."""
    done, total = summary.published, size(sum(summary.files.values()))
    if done is None:
        width = max(map(len, summary.files))
        rows = [f"{name:<{width}}  {size(count):>8}" for name, count in summary.files.items()]
        return "\n".join([*rows, f"{summary.repo_id}: would hold these {len(rows)} files, {total}; nothing was sent"])
    what = f"{len(done.sent)} files sent, {len(done.unchanged)} there already, {len(done.deleted)} deleted"
    where = "proposed to" if done.pull_request else "private" if done.private else "public"
    lines = [
        f"{summary.repo_id} ({where}): {what}, {summary.seconds:.1f} s",
        f"{len(summary.files)} files, {total}: sizes and hashes on the Hub are those of {summary.artifact}",
        f"{done.url}",
    ]
    return "\n".join(lines)


def size(count: float) -> str:
    """A number of bytes in decimal units."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
