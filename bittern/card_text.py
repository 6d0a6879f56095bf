"""The text of a model card, section by section; see :mod:`bittern.card`."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

from bittern.licence import files_among
from bittern.origin import lineage, since_base
from bittern.report import layer_records
from bittern.story import METHODS, conditions, datasets, percent

FILE_SUFFIXES = (".txt", ".json", ".jsonl", ".parquet", ".arrow", ".gz")
"""Of datasets that are files."""

_LOCAL = re.compile(r"[/~]|\.\.?/|[^/]+/[^/]*/")  # begins what is a path on the machine that made it
_SHOWN = 5  # names or notes in a list
_IN_LINKS = "/:?#@!$&'*+,;=%~"  # of what is neither letter nor digit; all else could end a link


@dataclass(frozen=True)
class Facts:
    """What a card is made of.

    Attributes:
        repo_id: where it will stand.
        revision: branch, None for the default one.
        manifest: of the artifact.
        found: what :func:`bittern.inspect.inspect` says of it.
        files: name -> bytes, of all that is published beside the card.
        base_id, base_revision: the model that everything began with, where it is known to be on the Hub.
        base: what its card says (see :func:`bittern.origin.stated_card`); empty where that is not known.
        licence: the licence fields (see :func:`bittern.licence.settle`); empty while it is not known.
        degraded: why the artifact is worse than it should be, None when nothing says so.
        gguf: whether bittern can convert it to GGUF without rounding.
    """

    repo_id: str
    revision: str | None
    manifest: Mapping[str, Any]
    found: Mapping[str, Any]
    files: Mapping[str, int]
    base_id: str | None
    base_revision: str | None
    base: Mapping[str, Any]
    licence: Mapping[str, Any]
    degraded: str | None
    gguf: bool


def card_text(facts: Facts) -> str:
    """Everything below the metadata block."""
    name = PurePosixPath(facts.repo_id).name
    sections = [
        degraded_block(facts.degraded) if facts.degraded else "",
        f"# {name}\n\n{_opening(facts)}",
        _section("What was done", _done(facts)),
        _section("What it kept", _kept(facts)),
        _section("Size and memory", _size(facts)),
        _section("How to load it", _loading(facts)),
        _section("Made with", _commands_run(facts)),
        _section("Licence", _licence(facts)),
    ]
    return "\n" + "\n\n".join(section for section in sections if section) + "\n"


def degraded_block(reason: str) -> str:
    """What stands at the top of the card of an artifact that is worse than it should be."""
    return f"> [!WARNING]\n> This model is degraded: {_plain(reason)}."


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}" if text else ""


def uptrained_since_base(facts: Facts) -> bool:
    """Whether heads were merged since: the base itself may be an uptrained model."""
    return any(run.get("kind") == "uptrain" for run in since_base(dict(facts.manifest)))


def _opening(facts: Facts) -> str:
    """One sentence: what was made of what, by which tool."""
    runs = lineage(dict(facts.manifest))
    base = f"[{facts.base_id}](https://huggingface.co/{facts.base_id})" if facts.base_id else _source_name(runs[-1])
    at = f" (commit `{facts.base_revision[:12]}`)" if facts.base_revision else ""
    version = runs[0].get("versions", {}).get("bittern")
    tool = f"bittern {version}" if version else "bittern"
    quantization, records = facts.found.get("quantization"), layer_records(dict(facts.manifest))
    packed = ""
    if quantization:  # without records by somebody else
        how = "quantized to {} bits" if records else "kept at {} bits and repacked as {}"
        packed = how.format(_bits(facts), quantization["format"])
    if uptrained_since_base(facts):
        what = "with its attention heads merged into groups" + (f" and {packed}" if packed else "")
    elif packed:
        what = packed
    elif records:
        bits = dict.fromkeys(str(each["bits"]) for each in records if "bits" in each)
        what = f"quantized to {' and '.join(bits)} bits and stored as floats"
    else:
        what = f"converted to {runs[0].get('dtype') or 'another format'}"
    recorded = "the record of every layer and the hash of every file" if records else "the hash of every file"
    return f"{base}{at}, {what} by {tool}. `bittern_manifest.json` has {recorded}."


def _source_name(run: Mapping[str, Any]) -> str:
    """A local source by its last name: where it lay is nobody's business."""
    source = run.get("source")
    name = source.get("name") if isinstance(source, Mapping) else None
    return _code(PurePosixPath(str(name)).name) if name else "A model"


def _bits(facts: Facts) -> str:
    """The bits of its layers, the commonest first."""
    grids = _layers(facts)
    return " and ".join(dict.fromkeys(grid.split(" ")[0] for grid, _ in grids.most_common()))


def _layers(facts: Facts) -> Counter[str]:
    quantization = facts.found.get("quantization") or {}
    return Counter(quantization.get("layers") or {})


def _done(facts: Facts) -> str:
    """Method, grids, format, calibration, what was left out and why."""
    runs = lineage(dict(facts.manifest))
    quantization = facts.found.get("quantization")
    quantize = next((run for run in runs if run.get("kind") == "quantize"), None)
    uptrain = next((run for run in runs if run.get("kind") == "uptrain"), None)
    rows: list[tuple[str, str]] = []
    if uptrain is not None:
        rows += _heads(uptrain)
    records = layer_records(dict(facts.manifest))
    if records:
        methods = Counter(str(record.get("method")) for record in records)
        names = [METHODS.get(name, name) for name, _ in methods.most_common()]
        rows.append(("method", " and ".join(names) + (" for some layers" if len(names) > 1 else "")))
        fallbacks = sum(bool(record.get("fallback")) for record in records)
        if fallbacks:
            rows.append(("fallbacks", f"{fallbacks} of {len(records)} layers, see the manifest"))
    if quantization:
        rows += [(_layers_of(count), grid) for grid, count in _layers(facts).most_common()]
        rows.append(("format", quantization["format"]))
    else:
        rows.append(("format", f"safetensors, {', '.join(facts.found['dtypes'])}"))
    if quantize is not None:
        rows.append(("calibration", _calibration(quantize)))
        kept = quantize.get("kept") or {}
        if kept:
            reasons = Counter(str(why) for why in kept.values())
            rows.append(("left as floats", f"{_layers_of(len(kept))}: {_few(reasons)}"))
    notes = [str(note) for run in runs for note in run.get("notes") or ()]
    rows += [("note", note) for note in notes[:_SHOWN]]
    return _table(("what", "how"), rows)


def _heads(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    heads, training = run.get("heads") or {}, run.get("training")
    before, after = heads.get("source_kv_heads"), heads.get("num_key_value_heads")
    rows = [("key and value heads", f"{before} merged into {after}")]
    if isinstance(training, Mapping):
        rows.append(("trained afterwards", f"{_number(training.get('tokens'))} tokens"))
    else:
        rows.append(("trained afterwards", "no"))
    return rows


def _calibration(run: Mapping[str, Any]) -> str:
    found = run.get("calibration")
    if not isinstance(found, Mapping):
        return "none"
    names = ", ".join(_code(_dataset(name)) for name in datasets(run))
    options = run.get("options") or {}
    windows = f", windows of {options['seqlen']}" if options.get("seqlen") else ""
    return f"{names}, {_number(found.get('tokens_found'))} tokens{windows}, seed {options.get('seed')}"


def is_file(dataset: str) -> bool:
    """Whether the name of a dataset is that of a file; behind a # a column may be named."""
    return dataset.endswith(FILE_SUFFIXES) or dataset.rpartition("#")[0].endswith(FILE_SUFFIXES)


def _dataset(name: str) -> str:
    """Of a local file its last name; a dataset of the Hub is org/name. Behind a # a column may be named."""
    path, mark, column = name.rpartition("#")
    if path.endswith(FILE_SUFFIXES):
        return PurePosixPath(path).name + mark + column
    return PurePosixPath(name).name if _LOCAL.match(name) or name.endswith(FILE_SUFFIXES) else name


def evaluation_records(manifest: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The recorded measurements of a manifest that may be anybody's, in their order."""
    found = manifest.get("evaluations")
    return [record for record in found if isinstance(record, Mapping)] if isinstance(found, list) else []


def _kept(facts: Facts) -> str:
    """The recorded evaluations beside the base's."""
    records = evaluation_records(facts.manifest)
    texts = [
        (
            f"{record.get('name')}, {record.get('windows')} x {record.get('seqlen')} tokens{conditions(record)}",
            _figure(record.get("perplexity")),
            _figure(record.get("base_perplexity")),
            _figure(record.get("kl")),
            _share(record.get("top1_agreement")),
        )
        for record in records
        if record.get("what") == "text"
    ]
    tasks = []
    for record in records:
        if record.get("what") == "task":
            name = f"{record.get('name')}, {record.get('questions')} questions{conditions(record)}"
            figure = "exact_match" if record.get("accuracy") is None else "accuracy"
            tasks.append((name, _share(record.get(figure)), _share(record.get(f"base_{figure}"))))
    parts = []
    if texts:
        head = ("text", "perplexity", "of the base", "KL to the base, nats", "top-1 agreement")
        parts.append(_table(head, texts))
    if tasks:
        parts.append(_table(("task", "accuracy", "of the base"), tasks))
    if not parts:
        return "Not measured, or not recorded."
    return "\n\n".join(parts) + "\n\nMeasured by `bittern eval`; the manifest has the hash of each text and task."


def _size(facts: Facts) -> str:
    found = facts.found
    rows = [("files", _bytes(sum(facts.files.values())))]
    if found.get("parameters"):
        rows.append(("parameters", f"{found['parameters'] / 1e6:,.1f} M"))
    bits = found.get("bits_per_weight")
    if bits:
        rows.append(("bits per weight", _figure(bits.get("all"))))
        rows.append(("without embeddings", _figure(bits.get("without_embeddings"))))
    rows.append(("weights", _bytes(found["bytes"]["total"])))
    cache = found.get("kv_bytes_per_token")
    if cache and cache.get("fp16"):
        rows.append(("KV cache, fp16", f"{_bytes(1024 * cache['fp16'])} for 1024 tokens"))
    if found.get("context_length"):
        rows.append(("context", f"{found['context_length']:,} tokens"))
    return _table(("what", "how much"), rows)


def _loading(facts: Facts) -> str:
    """A command for each loader that opens the artifact, and the reason for each that does not."""
    verdicts = {verdict["consumer"]: verdict for verdict in facts.found["loads"]}
    commands = _commands(facts.repo_id, facts.revision)
    if not facts.found.get("quantization"):
        del commands["GPTQModel"]  # it takes floats to quantize them, not to run them
    parts = []
    for consumer, (language, command) in commands.items():
        verdict = verdicts.get(consumer)
        if verdict is not None and verdict["loads"]:
            parts.append(f"**{consumer}** ({_plain(verdict['reason'])})\n\n```{language}\n{command}\n```")
    others = [f"- {name}: {_plain(verdict['reason'])}" for name, verdict in verdicts.items() if not verdict["loads"]]
    if facts.gguf:
        name = PurePosixPath(facts.repo_id).name
        at = f" --revision {facts.revision}" if facts.revision else ""
        command = f"bittern convert {facts.repo_id}{at} -o {name}.gguf --target llama.cpp"
        parts.append(f"**llama.cpp**, from a GGUF file with the same weights\n\n```sh\n{command}\n```")
        others = [line for line in others if not line.startswith("- llama.cpp:")]
    if others:
        parts.append("What does not load it, and why:\n\n" + "\n".join(others))
    return "\n\n".join(parts)


def _commands(repo_id: str, revision: str | None) -> dict[str, tuple[str, str]]:
    """Consumer -> the language and the text of an example, for the names that :mod:`bittern.consumers` has."""
    option = f" --revision {revision}" if revision else ""
    argument = f', revision="{revision}"' if revision else ""
    run = f'bittern run {repo_id}{option} --prompt "Once upon a time"'
    load = f'from Python: import bittern; model = bittern.load("{repo_id}"{argument})'
    auto = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}"{argument})\n'
        f'model = AutoModelForCausalLM.from_pretrained("{repo_id}"{argument})'
    )
    model = f'from gptqmodel import GPTQModel\n\nmodel = GPTQModel.load("{repo_id}"{argument})'
    found = {
        "bittern": ("sh", f"{run}\n\n# {load}"),
        "transformers": ("python", auto),
        "vLLM": ("sh", f"vllm serve {repo_id}{option}"),
        "SGLang": ("sh", f"python -m sglang.launch_server --model-path {repo_id}{option}"),
        "GPTQModel": ("python", model),
    }
    if revision is None:  # mlx-lm's command takes no revision
        found["mlx"] = ("sh", f'mlx_lm.generate --model {repo_id} --prompt "Once upon a time"')
    return found


def _commands_run(facts: Facts) -> str:
    """The commands that make it again, the first one first; of local paths the last names."""
    lines = []
    for run in reversed(lineage(dict(facts.manifest))):
        command, source = run.get("command"), run.get("source")
        folder = source.get("name") if isinstance(source, Mapping) and not source.get("revision") else None
        if isinstance(command, list) and command:
            parts = [str(part) for part in command]
            shown = [PurePosixPath(part).name or part if part == folder else _dataset(part) for part in parts]
            lines.append(shlex.join(shown))
    return "```sh\n" + "\n".join(" ".join(line.split()) for line in lines) + "\n```" if lines else ""


def _licence(facts: Facts) -> str:
    """Which licence, where it comes from, and where its text is."""
    if not facts.licence:
        return "To be settled."
    licence = facts.licence["license"]
    name = ", ".join(licence) if isinstance(licence, list) else str(licence)
    name = str(facts.licence.get("license_name", name))
    link = facts.licence.get("license_link")
    shown = _link(name, str(link)) if link else _code(name)
    base = f"[{facts.base_id}](https://huggingface.co/{facts.base_id})" if facts.base_id else "its base"
    inherited = facts.base.get("license") == licence
    lines = [f"{shown}, inherited from {base}." if inherited else f"{shown}, as its publisher states."]
    texts = files_among(facts.files)
    if texts:
        lines.append("Its text and notices: " + ", ".join(_link(text, text) for text in texts) + ".")
    if facts.base.get("gated"):
        lines.append("The base is gated: who uses this must have accepted the base's terms.")
    return " ".join(lines)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(map(_cell, row)) + " |" for row in rows)])


def _cell(text: str) -> str:
    return _line(text).replace("|", "\\|")


def _plain(text: str) -> str:
    """What may come from a file, on one line and without a full stop at its end."""
    return _line(text).rstrip(".")


def _line(text: str) -> str:
    """A text on one line, and no HTML."""
    return " ".join(text.split()).replace("<", "&lt;")


def _code(text: str) -> str:
    """A name between backticks, without any of its own."""
    name = " ".join(text.split()).replace("`", "'")
    return f"`{name}`"


def _link(text: str, target: str) -> str:
    """A link that ends where it should, whatever its text and its target hold."""
    shown = re.sub(r"([\\\[\]])", r"\\\1", _line(text))
    return f"[{shown}]({quote(target, _IN_LINKS)})"


def _few(names: Iterable[str]) -> str:
    found = list(names)
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return ", ".join(found[:_SHOWN]) + more


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) and not isinstance(value, bool) else "-"


def _share(value: Any) -> str:
    return percent(value) if isinstance(value, int | float) and not isinstance(value, bool) else "-"


def _layers_of(count: int) -> str:
    return f"{count} layer{'' if count == 1 else 's'}"


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "unknown"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
