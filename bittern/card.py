"""The model card: what an artifact is, what it kept and what loads it, from its manifest and its headers.

The metadata block is the Hub's (huggingface_hub checks it); the text is for people. A card that its publisher wrote
keeps its text, and what it states of licence, base, language and the like.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from bittern.card_text import Facts, card_text, degraded_block, evaluation_records, is_file, uptrained_since_base
from bittern.errors import BitternError, first_line
from bittern.origin import HUB_ID, lineage, split_card
from bittern.story import conditions, datasets

EVALUATIONS = ".eval_results"
"""Folder of the results that the Hub collects for its benchmarks."""

_OURS = ("base_model_relation", "license", "license_name", "license_link", "quantized_by", "model-index", "metrics")
_BENCHMARK = re.compile(rf"(?P<id>{HUB_ID.pattern})(:(?P<task>[\w.-]+))?")


def make_card(facts: Facts) -> str:
    """A whole card; its last line, which readers do not see, tells whether somebody has changed it since."""
    card = _join(card_metadata(facts), card_text(facts))
    return f"{card}\n{_seal(card)}\n"


def is_ours(card: str) -> bool:
    """Whether a card is as :func:`make_card` made it, and so can be made again."""
    card, _, last = card.rstrip("\n").rpartition("\n")
    return last == _seal(card)


def _seal(card: str) -> str:
    digest = hashlib.sha256(card.encode()).hexdigest()[:16]
    return f"<!-- made by bittern, {digest}: a text that is changed is kept by the next push -->"


def update_card(own: str, facts: Facts) -> str:
    """A publisher's card: its text as it is, its metadata completed; metadata alone get our text.

    What is ours to say (relation to the base, licence, results, who quantized it) replaces what stood there; tags
    are added; all else that stood there stays.

    Raises:
        BitternError: for metadata that huggingface_hub does not understand.
    """
    stated, body = own_card(own)
    _join(stated, body)  # what the Hub does not expect is said, though it may be replaced below
    ours = card_metadata(facts)
    merged = {**ours, **stated} | {key: ours[key] for key in _OURS if key in ours}
    for key in ("license_name", "license_link", "model-index", "metrics"):  # of another licence, of other weights
        if key not in ours:
            merged.pop(key, None)
    tags = stated.get("tags") or []
    tags = [tags] if isinstance(tags, str) else tags
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise BitternError(f"card: tags: expected a list of texts, found {tags!r}")
    merged["tags"] = [*tags, *(tag for tag in ours["tags"] if tag not in tags)]
    body = body if body.strip() else card_text(facts)
    if facts.degraded is not None and facts.degraded not in body:
        block = degraded_block(facts.degraded)
        body = body if block in body else f"\n{block}\n{body}"
    return _join(merged, body)


def own_card(own: str) -> tuple[dict[str, Any], str]:
    """The metadata of a publisher's card and the text below them.

    Raises:
        BitternError: when they are no YAML object.
    """
    try:
        return split_card(own)
    except ValueError as error:
        raise BitternError(f"card: {error}") from error


def card_metadata(facts: Facts) -> dict[str, Any]:
    """The metadata block, in the order in which people read it."""
    quantized_by = facts.repo_id.split("/")[0] if _run(facts, "quantize") else None
    results = evaluation_results(facts)
    relation = "finetune" if uptrained_since_base(facts) else "quantized"
    fields = {
        **facts.licence,
        "base_model": facts.base_id,
        "base_model_relation": relation if facts.base_id else None,
        "language": facts.base.get("language"),
        "datasets": _datasets(facts),
        "pipeline_tag": facts.base.get("pipeline_tag", "text-generation"),
        "library_name": _library(facts),
        "tags": _tags(facts),
        "quantized_by": quantized_by,
        "metrics": [name for name in _HUB_METRICS if any(result["metric_type"] == name for result in results)] or None,
        "model-index": _model_index(facts, results),
    }
    return {key: value for key, value in fields.items() if value is not None}


def evaluation_results(facts: Facts) -> list[dict[str, Any]]:
    """The recorded evaluations as arguments of huggingface_hub's EvalResult."""
    found = []
    for record in evaluation_records(facts.manifest):
        name = str(record.get("name"))
        dataset = {"task_type": "text-generation", "dataset_name": name, "dataset_type": _dataset_type(name)}
        if record.get("what") == "text":  # tells apart results on one text with other windows
            dataset["dataset_config"] = f"{record.get('windows')} windows of {record.get('seqlen')} tokens"
        if conditions(record):
            dataset["dataset_config"] = (dataset.get("dataset_config", "") + conditions(record)).strip()
        settings = ("seqlen", "windows", "tokens", "questions", "sha256")
        args = {key: record[key] for key in settings if record.get(key) is not None}
        for key, metric, title in _METRICS:
            value = record.get(key)
            if isinstance(value, int | float) and not isinstance(value, bool):
                found.append(
                    {
                        **dataset,
                        "dataset_args": args,
                        "metric_type": metric,
                        "metric_name": title,
                        "metric_value": value,
                    }
                )
    return found


_METRICS = (
    ("perplexity", "perplexity", "Perplexity"),
    ("kl", "kl_divergence", "KL divergence from the base, nats per token"),
    ("top1_agreement", "top1_agreement", "Agreement with the base on the likeliest token"),
    ("accuracy", "accuracy", "Accuracy"),
    ("accuracy_normalized", "accuracy_normalized", "Accuracy, choices compared per character"),
    ("exact_match", "exact_match", "Exact match"),
)
"""Key of an evaluation -> the metric's id and what people read."""
_HUB_METRICS = ("perplexity", "accuracy", "exact_match")


def evaluation_files(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Results of benchmarks that the Hub knows, as the files that it collects: name -> YAML.

    The Hub takes results for datasets that are registered there as benchmarks, so a task is such a result when its
    name is a dataset's id, with the benchmark's own name for the task behind a colon where it has several. It has one
    place for a task: the figure is that of the artifact as it runs by itself.
    """
    import yaml
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    files = {}
    for record in evaluation_records(manifest):
        match = _BENCHMARK.fullmatch(str(record.get("name")))
        if record.get("what") != "task" or match is None or not isinstance(record.get("accuracy"), int | float):
            continue
        if conditions(record):
            continue
        notes = f"{record.get('questions')} questions, log-likelihood of the choices, measured by bittern"
        task = match["task"] or "default"
        value = round(100 * record["accuracy"], 4)
        entry = EvalResultEntry(dataset_id=match["id"], task_id=task, value=value, notes=notes)
        slug = re.sub(r"[^\w.-]+", "_", match[0])
        files[f"{EVALUATIONS}/{slug}.yaml"] = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
    return files


def _join(fields: Mapping[str, Any], text: str) -> str:
    """A card out of its two halves; huggingface_hub's own view of the metadata is what is written."""
    from huggingface_hub import ModelCardData

    try:
        block = ModelCardData(**fields).to_yaml()
    except Exception as error:
        raise BitternError(f"card: its metadata are not what the Hub expects: {first_line(error)}") from error
    return f"---\n{block}\n---\n{text}"


def _model_index(facts: Facts, results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    if not results:
        return None
    name = PurePosixPath(facts.repo_id).name
    return eval_results_to_model_index(name, [EvalResult(**result) for result in results])


def _dataset_type(name: str) -> str:
    match = _BENCHMARK.fullmatch(name)
    return match["id"] if match else re.sub(r"[^\w.-]+", "-", PurePosixPath(name).name) or "text"


def _run(facts: Facts, kind: str) -> Mapping[str, Any] | None:
    """The newest run of a kind that the artifact went through."""
    return next((each for each in lineage(dict(facts.manifest)) if each.get("kind") == kind), None)


def _datasets(facts: Facts) -> list[str] | None:
    """What it was calibrated or trained on, of what is on the Hub."""
    asked = [name for run in lineage(dict(facts.manifest)) for name in datasets(run) if not is_file(name)]
    found = [name for name in (re.split("[:@#]", each)[0] for each in asked) if HUB_ID.fullmatch(name)]
    return list(dict.fromkeys(found)) or None


def _library(facts: Facts) -> str:
    """Which library the Hub shows for it."""
    loads = {verdict["consumer"] for verdict in facts.found["loads"] if verdict["loads"]}
    return next((name for name in ("transformers", "mlx") if name in loads), "bittern")


def _tags(facts: Facts) -> list[str]:
    quantization = facts.found.get("quantization")
    tags = ["bittern"]
    if isinstance(quantization, Mapping):
        run = _run(facts, "quantize")
        options = run.get("options") if run else None
        method = options.get("method") if isinstance(options, Mapping) else None
        names = [quantization["format"].removesuffix("_v2"), method, f"{quantization['bits']}-bit"]
        tags += [name for name in names if name]
    if _run(facts, "uptrain"):
        tags.append("gqa")
    if facts.degraded:
        tags.append("degraded")
    return list(dict.fromkeys(tags))
