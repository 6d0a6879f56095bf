"""The sections about size, memory, prediction, warnings, environment and how to do it again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from bittern.page.charts import Series, bars, lines
from bittern.page.parts import Chart, Section, Table, figure
from bittern.report import repeat_command, runs
from bittern.story import change_in_words, duration, kind_of, short_name, size_in_words, tell_run, warnings

KINDS = ("attention", "mlp", "experts", "embeddings", "norms", "other", "total")
UNLIMITED = 8192
"""Tokens that a chart shows of a context without a limit."""

_LEAST = 1e-6  # of a prediction that something can be a share of
_NAMES = {"mlp": "feed-forward", "embeddings": "embeddings, head"}


def size_section(manifest: Mapping[str, Any]) -> Section | None:
    """Bytes before and after, on the disk and in memory; None where the last run does not say."""
    chain = [run for run in runs(dict(manifest)) if run.get("size")]
    if not chain or "size" not in manifest:
        return None
    before, after = chain[0]["size"]["source"], chain[-1]["size"]["output"]
    kinds = [kind for kind in KINDS if before["bytes"].get(kind) or after["bytes"].get(kind)]
    pairs = [(before["bytes"].get(kind, 0), after["bytes"].get(kind, 0)) for kind in kinds]
    labels = [_NAMES.get(kind, kind) for kind in kinds]
    totals = before["bytes"]["total"], after["bytes"]["total"]
    summary = (
        f"The tensors took {size_in_words(totals[0])} and take {size_in_words(totals[1])}"
        f" ({change_in_words(*totals)}), {_bits(after, 'all')} bits per weight in all and"
        f" {_bits(after, 'without_embeddings')} without embeddings."
    )
    title = "Size before and after"
    svg = bars(
        "size",
        title,
        summary,
        labels,
        [
            ("before", [(pair[0], size_in_words(pair[0])) for pair in pairs]),
            ("after", [(pair[1], size_in_words(pair[1])) for pair in pairs]),
        ],
    )
    table = Table(
        title,
        ("Kind of layer", "Bytes before", "Bytes after", "Change"),
        tuple(
            (label, f"{pair[0]:,}", f"{pair[1]:,}", change_in_words(*pair))
            for label, pair in zip(labels, pairs, strict=True)
        ),
    )
    steps = Table(
        "Size after every run",
        ("What", "Parameters", "Bytes", "Bits per weight", "Without embeddings"),
        (
            _step(short_name(chain[0]["source"]["name"]), before),
            *(_step(tell_run(run), run["size"]["output"]) for run in chain),
        ),
    )
    charts = [Chart("size", title, summary, svg, table), _memory_chart(manifest)]
    drawn = tuple(chart for chart in charts if chart is not None)
    return Section("size", "Size and memory", (), drawn, (("Size after every run", steps),))


def _bits(side: Mapping[str, Any], which: str) -> str:
    return figure(side["bits_per_weight"][which], "{:.2f}")


def _step(name: str, side: Mapping[str, Any]) -> tuple[str, ...]:
    total = f"{side['bytes']['total']:,}"
    return name, f"{side['parameters']:,}", total, _bits(side, "all"), _bits(side, "without_embeddings")


def _memory_chart(manifest: Mapping[str, Any]) -> Chart | None:
    """Weights and cache against the length of the context; None where bytes of the cache are not known."""
    sized = [run for run in runs(dict(manifest)) if run.get("size")]
    cached = [run for run in runs(dict(manifest)) if run.get("kv_bytes_per_token")]
    if not cached:
        return None
    weights = sized[0]["size"]["source"]["bytes"]["total"], sized[-1]["size"]["output"]["bytes"]["total"]
    cache = cached[0]["kv_bytes_per_token"]["source"]["fp16"], cached[-1]["kv_bytes_per_token"]["output"]["fp16"]
    limit = cached[-1].get("context_length")
    longest = limit or UNLIMITED
    lengths = sorted({round(longest * part / 8) for part in (0, 1, 2, 4, 6, 8)})
    totals = [[weight + each * length for length in lengths] for weight, each in zip(weights, cache, strict=True)]
    context = f"{longest:,} tokens, the whole context" if limit else f"{longest:,} tokens (its context has no limit)"
    summary = (
        f"Weights and a 16-bit cache of keys and values at {context}: {size_in_words(totals[0][-1])} before,"
        f" {size_in_words(totals[1][-1])} now. A token adds {size_in_words(cache[1])}"
        + (f", {size_in_words(cache[0])} before." if cache[0] != cache[1] else ", as before.")
    )
    title = "Memory against context length"
    unit, name = next(
        (each for each in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")) if max(map(max, totals)) >= each[0]),
        (1, "bytes"),
    )
    series = [
        Series(label, tuple((float(x), y / unit) for x, y in zip(lengths, values, strict=True)))
        for label, values in zip(("before", "after"), totals, strict=True)
    ]
    svg = lines("memory", title, summary, series, "tokens in the context", name)
    table = Table(
        title,
        ("Tokens", "Weights before", "Cache before", "Together", "Weights after", "Cache after", "Together"),
        tuple(
            (
                f"{length:,}",
                *(
                    size_in_words(value)
                    for weight, each in zip(weights, cache, strict=True)
                    for value in (weight, each * length, weight + each * length)
                ),
            )
            for length in lengths
        ),
    )
    return Chart("memory", title, summary, svg, table)


def prediction_section(manifest: Mapping[str, Any]) -> Section | None:
    """What was predicted, beside what was measured; None without a prediction."""
    predicted: Mapping[str, float] = manifest.get("prediction") or {}
    measured = dict(manifest.get("measured", {}))
    if manifest.get("files"):
        measured["bytes"] = sum(each["bytes"] for each in manifest["files"].values())
    names = {"seconds": ("Time", duration), "peak_memory_bytes": ("Peak memory", size_in_words)}
    names |= {"bytes": ("Size of the output", size_in_words)}
    both = [key for key in names if (predicted.get(key) or 0) > _LEAST and measured.get(key) is not None]
    if not both:
        return None
    ratios = [measured[key] / predicted[key] for key in both]
    labels = [names[key][0] for key in both]
    title = "Measured, as a share of what was predicted"
    summary = "; ".join(
        f"{names[key][0]}: {names[key][1](predicted[key])} predicted, {names[key][1](measured[key])} measured"
        for key in both
    )
    values = [(ratio, f"{100 * ratio:.0f} %") for ratio in ratios]
    svg = bars("prediction", title, f"{summary}.", labels, [("measured", values)])
    table = Table(
        "What was predicted, and what came of it",
        ("What", "Predicted", "Measured", "Share"),
        tuple(
            (names[key][0], names[key][1](predicted[key]), names[key][1](measured[key]), f"{100 * ratio:.0f} %")
            for key, ratio in zip(both, ratios, strict=True)
        ),
    )
    charts = (Chart("prediction", title, f"{summary}.", svg, table),)
    return Section("predicted", "Prediction and measurement", (), charts)


def warnings_section(manifest: Mapping[str, Any]) -> Section:
    """All that went another way than asked."""
    found = warnings(manifest)
    text = () if found else ("Nothing departed from what was asked: no note, no fallback, no layer left out.",)
    return Section("warnings", f"Warnings ({len(found)})" if found else "Warnings", text, items=tuple(found))


def environment_section(manifest: Mapping[str, Any]) -> Section:
    """Where each run ran, and what it took."""
    chain = runs(dict(manifest))
    rows: dict[str, list[str]] = {}

    def put(name: str, number: int, value: object) -> None:
        rows.setdefault(name, [""] * len(chain))[number] = str(value)

    for number, run in enumerate(chain):
        measured, machine = run["measured"], run["measured"].get("machine") or {}
        for name, version in run["versions"].items():
            put(name, number, version)
        if run["options"].get("device"):
            put("device", number, run["options"]["device"])
        if machine:
            where = " ".join(str(machine[key]) for key in ("system", "processor") if machine.get(key))
            put("machine", number, f"{where}, {machine.get('cpus')} processors" if machine.get("cpus") else where)
        if measured.get("threads") is not None:
            put("threads", number, measured["threads"])
        if measured.get("seconds") is not None:
            put("time", number, duration(measured["seconds"]))
        if measured.get("peak_memory_bytes") is not None:
            put("peak memory", number, size_in_words(measured["peak_memory_bytes"]))
        put("manifest", number, f"schema {run['schema_version']}")
    heads = (
        "What",
        *(f"{number}. {kind_of(run)}" if len(chain) > 1 else "Value" for number, run in enumerate(chain, 1)),
    )
    table = Table(
        "Versions, machine, time and memory",
        heads,
        tuple((name, *values) for name, values in rows.items()),
        tuple(range(len(heads))),
    )
    return Section("environment", "Environment", tables=(("", table),))


def repeat_section(manifest: Mapping[str, Any]) -> Section:
    """The command of every run, and the files that it made."""
    chain = runs(dict(manifest))
    commands = []
    for number, run in enumerate(chain, 1):
        known = run.get("command")
        command = known or repeat_command(kind_of(run), run["source"], run["options"])
        how = "" if known else " (put together from its options)"
        which = f"{number}. " if len(chain) > 1 else ""
        commands.append((f"{which}{kind_of(run)}{how}", shlex.join(command)))
    text = ["The same options give the same bytes on the same machine; OUT stands for a folder of your choice."]
    revisions = [run for run in chain if run["source"].get("revision")]
    text += [f"{run['source']['name']} was read at commit {run['source']['revision']}." for run in revisions]
    tables = []
    if manifest.get("files"):
        rows = tuple((name, f"{each['bytes']:,}", each["sha256"]) for name, each in manifest["files"].items())
        tables = [
            (f"All {len(rows)} files and their hashes", Table("Files", ("File", "Bytes", "SHA-256"), rows, (0, 2)))
        ]
    return Section("repeat", "Do it again", tuple(text), tables=tuple(tables), commands=tuple(commands))


def missing_section(manifest: Mapping[str, Any]) -> Section | None:
    """What the page would show had the manifest said it; None where nothing is missing."""
    last, chain = runs(dict(manifest))[-1], runs(dict(manifest))
    found = []
    if "size" not in last:
        found.append(("Size", "bytes and bits per weight before and after; manifests have them from schema 3 on"))
    if not any(run.get("kv_bytes_per_token") for run in chain):
        why = "a cast does not look at the architecture" if kind_of(last) == "convert" else "it is not known"
        found.append(("Cache", f"bytes that a token adds to the cache of keys and values: {why}"))
    if not any(run.get("evaluations") for run in chain) and not last.get("perplexity"):
        found.append(("Quality", "perplexity and accuracy; bittern eval ART --record puts them in"))
    if kind_of(last) == "quantize" and not last.get("prediction"):
        found.append(("Prediction", "what the run was expected to take"))
    if "files" not in last:
        found.append(("Files", "hashes of the files; manifests have them from schema 2 on"))
    if kind_of(last) == "repack" and last.get("origin") is None and len(chain) == 1:
        found.append(("Origin", "the run that chose the codes left no manifest of bittern"))
    if not found:
        return None
    text = ("What the manifest does not say is left out here rather than guessed.",)
    return Section("missing", "Not in this manifest", text, items=tuple(found))
