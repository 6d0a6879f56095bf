"""A manifest as one HTML page that needs nothing else: no network, no script."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import bittern
from bittern.errors import BitternError, printable
from bittern.page.layers import layer_sections
from bittern.page.parts import Section
from bittern.page.quality import quality_section
from bittern.page.sections import (
    environment_section,
    missing_section,
    prediction_section,
    repeat_section,
    size_section,
    warnings_section,
)
from bittern.page.uptraining import uptraining_section
from bittern.report import MANIFEST_FILE, runs
from bittern.schema import check_manifest, read_manifest
from bittern.story import (
    change_in_words,
    conditions,
    duration,
    evaluations,
    headline,
    percent,
    size_in_words,
    sizes,
    summary,
    tell_evaluation,
    tell_run,
    warnings,
)
from bittern.writer import explained, replace_file

_UNIT = re.compile(r"(\d) (%|s|min|h|bytes|[kMGT]B)(?![\w%])")


def write_page(
    artifact: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    beside: Sequence[str | os.PathLike[str]] = (),
    overwrite: bool = False,
) -> list[str]:
    """Write the report of an artifact.

    Args:
        artifact: its folder, or its manifest alone.
        output: the HTML file; it appears when it is whole.
        beside: further artifacts, to compare on the same texts and tasks.
        overwrite: replace what is at ``output``.

    Returns:
        The names of the charts that the page has.

    Raises:
        BitternError: for an artifact without a manifest that keeps to the schema, an output that exists or cannot be
            written, and an environment without what draws.
    """
    out = Path(output)
    if out.suffix not in (".html", ".htm"):
        raise BitternError(f"output {out}: expected a name that ends in .html")
    if os.path.lexists(out) and (not overwrite or not out.is_file()):
        raise BitternError(f"output {out}: it exists already (--overwrite replaces a file)")
    manifest = _read(artifact)
    sections = make_sections(manifest, [_read(other) for other in beside])
    page = render(manifest, sections)
    with explained(out):
        replace_file(out, page)
    return [chart.name for section in sections for chart in section.charts if chart.svg is not None]


def _read(artifact: str | os.PathLike[str]) -> dict[str, Any]:
    path = Path(artifact)
    if not os.fspath(artifact):
        raise BitternError("ARTIFACT: expected a folder, found an empty name")
    if path.suffix == ".json" and path.is_file():
        return check_manifest(path)
    if path.suffix == ".gguf":
        raise BitternError(f"{path}: a GGUF file has no manifest; report on the folder that it was made of")
    if not path.is_dir():
        raise BitternError(f"{path}: expected an artifact's folder, or its {MANIFEST_FILE}")
    if not (path / MANIFEST_FILE).is_file():
        raise BitternError(f"{path}: no {MANIFEST_FILE}, so nothing to report: not written by bittern")
    return read_manifest(path)


def make_sections(manifest: Mapping[str, Any], beside: Sequence[Mapping[str, Any]] = ()) -> list[Section]:
    """The sections of the page, in order, without those that the manifest has nothing for."""
    found = [
        size_section(manifest),
        quality_section(manifest, beside),
        uptraining_section(manifest),
        *layer_sections(manifest),
        prediction_section(manifest),
        warnings_section(manifest),
        _history(manifest),
        environment_section(manifest),
        repeat_section(manifest),
        missing_section(manifest),
    ]
    return [section for section in found if section is not None]


def render(manifest: Mapping[str, Any], sections: Sequence[Section]) -> str:
    """The page. Everything out of the manifest is escaped, but for the charts, whose text matplotlib escapes."""
    try:
        import jinja2
        import markupsafe
    except ImportError as error:
        raise BitternError(f"a report needs Jinja2: pip install 'bittern[report]' ({error})") from error

    here = files("bittern.page")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, finalize=_visible
    )
    environment.filters["chart"] = markupsafe.Markup
    environment.filters["exactly"] = lambda text: markupsafe.escape(printable(text, whole=True))
    template = environment.from_string(here.joinpath("page.html.jinja").read_text(encoding="utf-8"))
    return template.render(
        style=markupsafe.Markup(here.joinpath("page.css").read_text(encoding="utf-8")),
        title=headline(manifest),
        summary=summary(manifest),
        degraded=[run["degraded"] for run in runs(dict(manifest)) if run.get("degraded")],
        facts=_facts(manifest),
        warnings=len(warnings(manifest)),
        sections=sections,
        version=bittern.__version__,
        schema_version=manifest["schema_version"],
    )


def _visible(value: Any) -> Any:
    """Text without characters that hide or turn around what stands beside them; a number keeps its unit beside it."""
    return _UNIT.sub("\\1\N{NO-BREAK SPACE}\\2", printable(value, whole=True)) if type(value) is str else value


def _facts(manifest: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(what, figure, what to hold it against) for the top of the page."""
    found = []
    before, after = sizes(manifest)
    if before is not None and after is not None:
        found.append(
            ("Size", size_in_words(after), f"{size_in_words(before)} before, {change_in_words(before, after)}")
        )
    size = manifest.get("size")
    if size and size["output"]["bits_per_weight"]["without_embeddings"] is not None:
        bits = size["output"]["bits_per_weight"]
        whole = "" if bits["all"] is None else f"{bits['all']:.2f} with embeddings"
        found.append(("Bits per weight", f"{bits['without_embeddings']:.2f}", whole))
    for entry in evaluations(manifest)[:2]:
        found += _measured(entry)
    measured = manifest["measured"]
    found.append(("Time", duration(measured["seconds"]), "of the last run"))
    if measured.get("peak_memory_bytes") is not None:
        found.append(("Peak memory", size_in_words(measured["peak_memory_bytes"]), "of the last run"))
    return found


def _measured(entry: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    name = entry["name"] + conditions(entry)
    if entry["what"] == "text":
        found = []
        value, base = entry.get("perplexity"), entry.get("base_perplexity")
        if value is not None:
            against = "" if base is None else f", base {base:.2f} ({change_in_words(base, value)})"
            found.append(("Perplexity", f"{value:.2f}", f"{name}{against}"))
        if entry.get("kl") is not None:
            found.append(("KL to the base", f"{entry['kl']:.3g}", f"nats per token, {name}"))
        return found
    what, key = ("Exact match", "exact_match") if entry.get("accuracy") is None else ("Accuracy", "accuracy")
    if entry.get(key) is None:
        return []
    base = entry.get(f"base_{key}")
    return [(what, percent(entry[key]), name if base is None else f"{name}, base {percent(base)}")]


def _history(manifest: Mapping[str, Any]) -> Section:
    """Every run in a sentence, and what was measured of each result."""
    items = []
    for number, run in enumerate(runs(dict(manifest)), 1):
        items.append((f"Run {number}", f"{tell_run(run)}."))
        items += [("Measured", f"{tell_evaluation(entry)}.") for entry in run.get("evaluations", ())]
    return Section("history", "What was done", items=tuple(items))
