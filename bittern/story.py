"""What a manifest tells, in words: a sentence for every run, one for what was measured, and what is missing.

All of it is computed from a manifest that keeps to the schema; nothing is looked up elsewhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from bittern.report import runs

Words = Callable[[float], str]

METHODS = {"gptq": "GPTQ", "rtn": "round to nearest"}
"""How layers were quantized, as manifests name it: in words."""


def kind_of(run: Mapping[str, Any]) -> str:
    """quantize, convert, repack or uptrain; the first schema had no key for it."""
    return str(run.get("kind", "quantize"))


def short_name(name: str) -> str:
    """A Hub id as it is, of a path its last part."""
    return name if name.count("/") == 1 and not name.startswith((".", "/", "~")) else PurePath(name).name or name


def source_name(manifest: Mapping[str, Any]) -> str:
    """What the first run of a manifest read, in short."""
    return short_name(runs(dict(manifest))[0]["source"]["name"])


def tell(manifest: Mapping[str, Any]) -> list[str]:
    """Sentences: one for every run, the first one first, and one for every measurement of the artifact."""
    told = [tell_run(run) for run in runs(dict(manifest))]
    return told + [tell_evaluation(found) for found in evaluations(manifest)]


def tell_run(run: Mapping[str, Any]) -> str:
    """What one run did, in a sentence without its full stop."""
    name, kind = short_name(run["source"]["name"]), kind_of(run)
    architecture = run["source"].get("model_type")
    subject = f"{name} ({architecture})" if architecture else name
    if kind == "quantize":
        return f"quantized {subject}: {_quantization(run)}{_seconds(run)}"
    if kind == "convert":
        return f"cast {subject} to {run['dtype']}: {_count(len(run['tensors']), 'tensor')}{_seconds(run)}"
    if kind == "repack":
        return f"repacked {subject}: {_repacking(run)}{_seconds(run)}"
    return f"uptrained {subject}: {_uptraining(run)}{_seconds(run)}"


def conditions(found: Mapping[str, Any]) -> str:
    """How a measurement was made where that is not how an artifact runs by itself: "", or " (inputs of 8 bits)"."""
    settings = found.get("settings")
    settings = settings if isinstance(settings, Mapping) else {}
    said = ["inputs of 8 bits"] if settings.get("activations") == "a8" else []
    said += [f"head in {settings['lm_head_bits']} bits"] if settings.get("lm_head_bits") else []
    said += ["windows from BOS"] if settings.get("bos") else []
    said += [f"computed in {settings['dtype']}"] if settings.get("dtype") else []
    return f" ({', '.join(said)})" if said else ""


def evaluations(manifest: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The recorded measurements, first those of the artifact as it runs by itself."""
    return sorted(manifest.get("evaluations", ()), key=lambda found: conditions(found) != "")


def tell_evaluation(found: Mapping[str, Any]) -> str:
    """What one measurement says, in a few words."""
    base = "" if not found.get("base") else f" ({short_name(found['base'])}: \0)"  # the figure goes where \0 is
    if found["what"] == "text":
        said = [_against("perplexity", found.get("perplexity"), found.get("base_perplexity"), base, two_decimals)]
        if found.get("kl") is not None:
            said.append(f"KL {found['kl']:.3g}")
        if found.get("top1_agreement") is not None:
            said.append(f"top-1 agreement {percent(found['top1_agreement'])}")
        return f"{found['name']}{conditions(found)}: {', '.join(said)}, {found['tokens']:,} tokens"
    figure = "exact_match" if found.get("accuracy") is None else "accuracy"
    said = [_against(figure.replace("_", " "), found.get(figure), found.get(f"base_{figure}"), base, percent)]
    return f"{found['name']}{conditions(found)}: {', '.join(said)}, {_count(found['questions'], 'question')}"


def datasets(run: Mapping[str, Any]) -> list[str]:
    """What a run was calibrated on, each as asked for; where its options do not say, what stands between commas."""
    options, found = run.get("options"), run.get("calibration")
    if not isinstance(found, Mapping):
        return []
    asked = options.get("dataset") if isinstance(options, Mapping) else None
    if isinstance(asked, list | tuple):
        return [str(name) for name in asked]
    return [asked] if isinstance(asked, str) else str(found.get("source", "?")).split(", ")


def grids(layers: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
    """The grids of layer records in words, and how many layers have each, the commonest first."""
    found = Counter((layer["bits"], layer["group_size"], layer["sym"]) for layer in layers)
    return [(_grid(*grid), count) for grid, count in sorted(found.items(), key=lambda item: (-item[1], item[0]))]


def bits_in_words(run: Mapping[str, Any]) -> str:
    """``3 bits``, or ``2 to 8 bits``, of the layers that a run quantized or moved."""
    bits = sorted({layer["bits"] for layer in run.get("layers") or run.get("repacked") or ()})
    if not bits:
        return "no packed layers"
    return f"{bits[0]} bits" if len(bits) == 1 else f"{bits[0]} to {bits[-1]} bits"


def warnings(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what it is about, sentence) of all that a user must know, of all runs."""
    found: list[tuple[str, str]] = []
    for run in runs(dict(manifest)):
        kind = kind_of(run)
        if run.get("degraded"):
            found.append(("degraded", str(run["degraded"])))
        found += [(kind, note) for note in run["notes"]]
        found += [
            (str(layer["layer"]), str(layer["fallback"])) for layer in run.get("layers", ()) if layer.get("fallback")
        ]
        found += [(name, f"left as floats: {why}") for name, why in (run.get("kept") or {}).items()]
        found += [(name, f"{_count(count, 'value')} clamped") for name, count in (run.get("clamped") or {}).items()]
    return found


def _quantization(run: Mapping[str, Any]) -> str:
    layers = run["layers"]
    methods = Counter(str(layer["method"]) for layer in layers)
    how = " and ".join(METHODS.get(name, name) for name, _ in methods.most_common()) or "nothing quantized"
    kinds = grids(layers)
    if len(kinds) == 1:
        what = f"{_count(len(layers), 'layer')} at {kinds[0][0]}"
    else:
        what = "; ".join(f"{_count(count, 'layer')} at {grid}" for grid, count in kinds[:3])
        what += f" and {len(kinds) - 3} more grids" if len(kinds) > 3 else ""
    kept = f", {_count(len(run['kept']), 'layer')} left as floats" if run["kept"] else ""
    return f"{how}, {what}{kept}{_calibration(run)}"


def _calibration(run: Mapping[str, Any]) -> str:
    found = run.get("calibration")
    if not found or "tokens_found" not in found:
        return ""
    names = ", ".join(map(short_name, datasets(run)))
    return f", calibrated on {_count(found['tokens_found'], 'token')} of {names}"


def _repacking(run: Mapping[str, Any]) -> str:
    moved, options = run["repacked"], run["options"]
    error = max((layer.get("error") or 0 for layer in moved), default=0)
    how = f"rounded by up to {error:.2g} steps of the grid" if error else "no code changed"
    where = {"safetensors": "as floats"}.get(str(options.get("format")), f"in {options.get('format')}")
    return f"{_count(len(moved), 'packed layer')} {where}, {how}"


def _uptraining(run: Mapping[str, Any]) -> str:
    heads, training = run["heads"], run["training"]
    kv = f"{heads['source_kv_heads']} key and value heads became {heads['num_key_value_heads']}"
    trained = "not trained" if not training else f"trained on {_count(training.get('tokens') or 0, 'token')}"
    return f"{kv}{_calibration(run)}, {trained}"


def _against(what: str, value: float | None, base: float | None, words: str, form: Words) -> str:
    if value is None:
        return f"{what} not finite"
    return f"{what} {form(value)}" + ("" if base is None else words.replace("\0", form(base)))


def _grid(bits: int, group_size: int, sym: bool) -> str:
    group = "one group a row" if group_size == -1 else f"groups of {group_size}"
    return f"{bits} bits, {group}, {'symmetric' if sym else 'asymmetric'}"


def _seconds(run: Mapping[str, Any]) -> str:
    seconds = run["measured"].get("seconds")
    return "" if seconds is None else f", {duration(seconds)}"


def duration(seconds: float) -> str:
    """Seconds as people say them: 0.4 s, 12 s, 5 min 20 s, 3 h 5 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60:,} h {minutes % 60} min"


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def headline(manifest: Mapping[str, Any]) -> str:
    """What became of a model, in a few words: ``stories15m at 3 bits``."""
    name, kind = source_name(manifest), kind_of(manifest)
    if kind == "quantize":
        return f"{name} at {bits_in_words(manifest)}"
    if kind == "convert":
        return f"{name} in {manifest['dtype']}"
    if kind == "uptrain":
        return f"{name} with {_count(manifest['heads']['num_key_value_heads'], 'key and value head')}"
    format = manifest["options"].get("format")
    return f"{name} as floats again" if format == "safetensors" else f"{name} at {bits_in_words(manifest)} in {format}"


def summary(manifest: Mapping[str, Any]) -> str:
    """The whole story in two or three sentences."""
    last = runs(dict(manifest))[-1]
    told = tell_run(last)
    sentences = [f"{told[0].upper()}{told[1:]}."]
    before, after = sizes(manifest)
    if before and after:
        sentences.append(f"{size_in_words(before)} became {size_in_words(after)}, {_times(before, after)}.")
    sentences += [f"{_quality(found)}." for found in evaluations(manifest)[:1]]
    found = manifest.get("perplexity")
    if found and not manifest.get("evaluations"):
        now = found.get("converted") if found.get("trained") is None else found["trained"]
        sentences.append(f"{_went('Perplexity', found.get('text', 'text'), found.get('source'), now, two_decimals)}.")
    return " ".join(sentences)


def sizes(manifest: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Bytes of the tensors before the first run that says so, and after the last one."""
    known = [run["size"] for run in runs(dict(manifest)) if run.get("size")]
    if not known or "size" not in manifest:
        return None, None
    return known[0]["source"]["bytes"]["total"], known[-1]["output"]["bytes"]["total"]


def size_in_words(count: float) -> str:
    """Bytes in decimal units with three figures: 812 bytes, 21.2 MB, 1.37 GB."""
    if count < 1000:
        return f"{count:.0f} bytes"
    units = ("kB", "MB", "GB", "TB")
    power = 1
    while power < len(units) and count / 1000**power >= 999.5:
        power += 1
    value = count / 1000**power
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {units[power - 1]}"


def two_decimals(value: float) -> str:
    """A perplexity: ``8.07``."""
    return f"{value:.2f}"


def percent(value: float) -> str:
    """A share: ``75.9 %``."""
    return f"{100 * value:.1f} %"


def change_in_words(before: float, after: float) -> str:
    """A relative change: ``+26.3 %``."""
    return f"{100 * (after / before - 1):+.1f} %" if before else "from nothing"


def _times(before: int, after: int) -> str:
    if not after or not before or before == after:
        return "no less" if before == after else "nothing to compare"
    return f"{before / after:.2f} times smaller" if before > after else f"{after / before:.2f} times larger"


def _quality(found: Mapping[str, Any]) -> str:
    if found["what"] == "text":
        name, value, base, form = "Perplexity", found.get("perplexity"), found.get("base_perplexity"), two_decimals
    elif found.get("accuracy") is None:
        name, value, base, form = "Exact match", found.get("exact_match"), found.get("base_exact_match"), percent
    else:
        name, value, base, form = "Accuracy", found.get("accuracy"), found.get("base_accuracy"), percent
    return _went(name, found["name"], base, value, form)


def _went(what: str, where: str, base: float | None, value: float | None, form: Words) -> str:
    if value is None:
        return f"{what} on {where} is not finite"
    if base is None:
        return f"{what} on {where} is {form(value)}"
    before, after = form(base), form(value)
    return f"{what} on {where} went from {before} to {after} ({change_in_words(base, value)})"
