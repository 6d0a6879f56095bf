"""The section about quality: perplexity, KL divergence and accuracy, against bits per weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bittern.page.charts import Series, against_bits
from bittern.page.parts import NOTHING, Chart, Section, Table, figure
from bittern.report import runs
from bittern.story import (
    bits_in_words,
    change_in_words,
    conditions,
    headline,
    kind_of,
    percent,
    short_name,
    source_name,
)

MOST_SERIES = 4
SUBJECT = "this artifact"
_SUBJECT_OF_MANY = "this"  # where there is little room beside a point

_MADE = {"quantize": "quantized", "convert": "cast", "repack": "repacked", "uptrain": "uptrained"}


@dataclass(frozen=True)
class Point:
    """One model on one text or task.

    Attributes:
        test: the text or task with its settings; what has the same can be compared.
        label: of the text or task, as people know it.
        model: in words.
        bits: stored bits per weight without embeddings; None where the manifest does not say.
        found: the measurement as the manifest has it; for a base, its ``base_`` figures under their own names.
        is_base: whether it is what others were held against.
        base: what it was held against; of a base, itself.
    """

    test: tuple[Any, ...]
    label: str
    model: str
    bits: float | None
    found: Mapping[str, Any]
    is_base: bool = False
    base: str | None = None


def quality_section(manifest: Mapping[str, Any], beside: Sequence[Mapping[str, Any]] = ()) -> Section | None:
    """What was measured of the artifact, of what it was made of, and of the artifacts beside it; None without any."""
    points = _points(manifest, SUBJECT)
    for other, name in zip(beside, _names(manifest, beside), strict=True):
        points += _points(other, name)
    points = _without_doubles(points)
    texts = [point for point in points if point.found["what"] == "text"]
    tasks = [point for point in points if point.found["what"] == "task"]
    charts = [
        _chart(texts, "perplexity", "Perplexity against bits", "perplexity", "{:.2f}".format, _text_table(texts)),
        _chart(texts, "kl", "KL divergence against bits", "KL, nats per token", "{:.3g}".format, _kl_table(texts)),
        _chart(tasks, "accuracy", "Accuracy against bits", "share right", percent, _task_table(tasks)),
    ]
    if not points:
        return None
    text = []
    unknown = [point.model for point in points if point.bits is None]
    if unknown:
        names = ", ".join(dict.fromkeys(unknown))
        text.append(f"Bits per weight are not known of: {names}. A dashed line shows how high it stands.")
    tables = [("Texts", _text_table(texts))] if texts and charts[0] is None else []
    tables += [("Tasks", _task_table(tasks))] if tasks and charts[2] is None else []
    drawn = tuple(each for each in charts if each is not None)
    return Section("quality", "Quality", tuple(text), drawn, tuple(tables))


def _names(manifest: Mapping[str, Any], beside: Sequence[Mapping[str, Any]]) -> list[str]:
    """Short names of artifacts that are no two the same: of one source, by their bits alone."""
    source, names = source_name(manifest), list[str]()
    for other in beside:
        same = kind_of(other) == "quantize" and source_name(other) == source
        name = bits_in_words(other) if same else headline(other)
        names.append(name if name not in names else f"{name} ({len(names) + 1})")
    return names


def value_of(point: Point, what: str) -> float | None:
    """A figure of a point: accuracy of a last-word task is how many it gets exactly, a base is no way from itself."""
    if what == "accuracy":
        found = point.found.get("exact_match") if point.found.get("accuracy") is None else point.found["accuracy"]
    elif what == "kl" and point.is_base:
        found = 0.0
    else:
        found = point.found.get(what)
    return None if found is None else float(found)


_TEST = ("what", "sha256", "seqlen", "windows", "questions")


def _points(manifest: Mapping[str, Any], name: str) -> list[Point]:
    """Every measurement in a manifest's chain of runs, and the base of each."""
    chain = runs(dict(manifest))
    sizes = {run["source"]["name"]: _bits(run, "source") for run in chain}
    found = []
    for number, run in enumerate(chain, 1):
        model = name if number == len(chain) else f"{_MADE[kind_of(run)]} {short_name(run['source']['name'])}"
        for entry in run.get("evaluations", ()):
            test, label = (*(entry.get(key) for key in _TEST), conditions(entry)), f"{entry['name']}{conditions(entry)}"
            base = entry.get("base")
            found.append(Point(test, label, model, _bits(run, "output"), entry, base=base))
            if base is not None:
                own = {key.removeprefix("base_"): value for key, value in entry.items() if key.startswith("base_")}
                same = {key: entry.get(key) for key in ("what", "tokens", "questions", "settings")}
                found.append(Point(test, label, short_name(base), sizes.get(base), {**same, **own}, True, base))
    return found


def _bits(run: Mapping[str, Any], side: str) -> float | None:
    size = run.get("size")
    found = None if not size else size[side]["bits_per_weight"]["without_embeddings"]
    return None if found is None else float(found)


def _without_doubles(points: Sequence[Point]) -> list[Point]:
    """One base for all that were held against it."""
    seen: dict[tuple[Any, ...], Point] = {}
    for number, point in enumerate(points):
        seen.setdefault((point.test, point.model, point.bits) if point.is_base else (number,), point)
    return list(seen.values())


def _chart(
    points: Sequence[Point], what: str, title: str, y_label: str, words: Callable[[float], str], table: Table
) -> Chart | None:
    """Points of every test over bits; None when no point has both."""
    series, level, said = [], None, []
    groups = [(point.test, point.base if what == "kl" else None) for point in points]
    for group in dict.fromkeys(groups):
        members = [point for point, own in zip(points, groups, strict=True) if own == group]
        if all(value_of(point, what) is None for point in members if not point.is_base):
            continue
        several = len({base for test, base in groups if test == group[0] and base is not None}) > 1
        label = members[0].label + (f" against {short_name(group[1])}" if several and group[1] else "")
        known = {(point.bits, value_of(point, what)): point.model for point in members}
        placed = sorted(
            (bits, value, model) for (bits, value), model in known.items() if bits is not None and value is not None
        )
        placed = [each for each in placed if each[0] > 0]
        if placed:
            names = tuple(_SUBJECT_OF_MANY if model == SUBJECT and len(placed) > 2 else model for _, _, model in placed)
            series.append(Series(label, tuple((bits, value) for bits, value, _ in placed), names))
        floating = [point for point in members if point.bits is None and value_of(point, what) is not None]
        if floating and level is None and what != "kl":
            level = (floating[0].model, value_of(floating[0], what) or 0.0)
        said.append(_said(label, what, members, words))
    if not series:
        return None
    more = f" The first {MOST_SERIES} are drawn." if len(series) > MOST_SERIES else ""
    summary = " ".join(said) + more
    svg = against_bits(what, title, summary, series[:MOST_SERIES], y_label, words, level)
    return Chart(what, title, summary, svg, table)


def _said(label: str, what: str, members: Sequence[Point], words: Callable[[float], str]) -> str:
    """One test in a sentence."""
    parts = []
    base = next((value_of(point, what) for point in members if point.is_base), None)
    for point in sorted(members, key=lambda point: not point.is_base):
        value = value_of(point, what)
        if value is None or (what == "kl" and point.is_base):
            continue
        change = f" ({change_in_words(base, value)})" if base and not point.is_base and what == "perplexity" else ""
        parts.append(f"{point.model} {words(value)}{change}")
    return f"{label}: {', '.join(parts)}."


def _text_table(points: Sequence[Point]) -> Table:
    return Table(
        "What was measured on texts",
        ("Model", "Text", "Bits per weight", "Perplexity", "KL", "Top-1 agreement", "Tokens", "Computed with"),
        tuple(
            (
                point.model,
                point.label,
                figure(point.bits, "{:.2f}"),
                figure(point.found.get("perplexity"), "{:.4f}"),
                NOTHING if point.is_base else figure(point.found.get("kl"), "{:.4f}"),
                NOTHING if point.is_base else figure(point.found.get("top1_agreement"), percent),
                figure(point.found.get("tokens")),
                _computed(point),
            )
            for point in points
        ),
        (0, 1, 7),
    )


def _kl_table(points: Sequence[Point]) -> Table:
    return Table(
        "How far from the base, on texts",
        ("Model", "Text", "Against", "Bits per weight", "KL", "Top-1 agreement"),
        tuple(
            (
                point.model,
                point.label,
                NOTHING if point.base is None else short_name(point.base),
                figure(point.bits, "{:.2f}"),
                figure(point.found.get("kl"), "{:.4f}"),
                figure(point.found.get("top1_agreement"), percent),
            )
            for point in points
            if not point.is_base
        ),
        (0, 1, 2),
    )


def _task_table(points: Sequence[Point]) -> Table:
    columns = ("accuracy", "accuracy_normalized", "exact_match")
    return Table(
        "What was measured on tasks",
        ("Model", "Task", "Bits per weight", "Accuracy", "Per character", "Exact match", "Questions", "Computed with"),
        tuple(
            (
                point.model,
                point.label,
                figure(point.bits, "{:.2f}"),
                *(figure(point.found.get(key), percent) for key in columns),
                figure(point.found.get("questions")),
                _computed(point),
            )
            for point in points
        ),
        (0, 1, 7),
    )


def _computed(point: Point) -> str:
    settings = point.found.get("settings") or {}
    return NOTHING if point.is_base else str(settings.get("kernels", NOTHING))
