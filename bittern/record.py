"""What ``bittern eval`` does, and how what it measured gets into the artifact's manifest."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bittern.errors import BitternError, check_utf8
from bittern.evaluate import EvalResult, check_fit, evaluate, read_text, text_windows
from bittern.report import MANIFEST_FILE, file_record
from bittern.schema import LARGEST_FLOAT, problem, read_manifest
from bittern.tasks import TaskResult, evaluate_task, read_task
from bittern.tokenizer import check_same_tokens, wants_bos, window_length
from bittern.writer import explained, replace_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SEQLEN, WINDOWS = 1024, 64

Load = Callable[..., "tuple[PreTrainedModel, PreTrainedTokenizerBase]"]
Bar = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]

_OF_THE_MODEL: dict[str, Any] = {"revision": None, "lm_head_bits": None}  # options that are not the base's
_SETTINGS = ("dtype", "device", "activations", "lm_head_bits")
_SAME = ("what", "sha256", "seqlen", "windows", "questions")  # with the settings: the same measurement


@dataclass
class Measurement:
    """What one call of ``bittern eval`` found.

    Attributes:
        text: figures on the text; None without one.
        tasks: figures of each task; with a base, the base's own under ``base_`` too.
        entries: the same as ``evaluations`` of a manifest has them.
        notes: what a user must be told.
        kernels: what computed, in words.
    """

    text: EvalResult | None = None
    tasks: list[dict[str, Any]] = field(default_factory=list)
    entries: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    kernels: str = ""


def measure(
    load: Load,
    bar: Bar,
    model: str,
    *,
    text: Path | None,
    seqlen: int | None,
    windows: int | None,
    against: str | None,
    tasks: Sequence[Path],
    limit: int | None,
    batch_size: int | None,
    bos: bool = False,
    **place: Any,
) -> Measurement:
    """Measure a model on a text and tasks, and a base beside it.

    Args:
        load: makes a model and its tokenizer of a source and ``place``.
        bar: makes a progress bar of a title.
        model: an artifact, or any checkpoint.
        text, seqlen, windows: the text to predict, and how it is cut; see :func:`bittern.evaluate.text_windows`. By
            default :data:`WINDOWS` of :data:`SEQLEN` tokens, or of the model's whole context where that is shorter.
        against: the base: KL divergence and agreement on the text, and its own figures on everything.
        tasks, limit: files of requests, and how many questions of each.
        batch_size: windows, or requests of a task, at a time; None for one, and eight.
        bos: begin every window of the text with BOS.
        place: how models are loaded; a revision and a packed head are the model's alone.

    Raises:
        BitternError: for files, models and lengths that do not fit; see what this calls.
    """
    found = Measurement()
    if bos and text is None:
        raise BitternError("bos: windows of a text begin with it, and there is no text")
    for name, value in (("seqlen", seqlen), ("windows", windows)):
        if value is not None and text is None:
            raise BitternError(f"{name}: it cuts a text, and there is none")
    windows = windows or WINDOWS
    if against is not None:
        check_utf8("against", against)
    twice = [str(file) for file in dict.fromkeys(tasks) if tasks.count(file) > 1]
    if twice:
        raise BitternError(f"tasks: expected each file once, found {', '.join(twice)} twice")
    if limit is not None and not tasks:
        raise BitternError("limit: it counts the questions of tasks, and there are none")
    if text is not None:
        read_text(text, 1)  # what cannot be read is told before a model is loaded
    for file in tasks:
        read_task(file, limit)
    live, tokenizer = load(model, decoder=False, **place)
    ids = None
    if text is not None:
        seqlen, shorter = window_length(live.config, seqlen, SEQLEN)
        found.notes += shorter
        ids = text_windows(text, tokenizer, seqlen=seqlen, windows=windows, bos=bos)
        check_fit(live, tokenizer, ids)
        if len(ids) < windows:
            found.notes.append(f"{text}: {windows} windows asked for, {len(ids)} found")
        if not bos and wants_bos(live.config, tokenizer):
            found.notes.append(
                "windows begin as the text stands, and Gemma predicts badly without BOS: --bos gives it one"
            )
    base, base_tokenizer = (None, None) if against is None else load(against, decoder=False, **place | _OF_THE_MODEL)
    if ids is not None and base is not None and base_tokenizer is not None:
        check_fit(base, base_tokenizer, ids)
        check_same_tokens(tokenizer, base_tokenizer, ids)
    kernels = str(vars(live)["kernels"])
    settings = {**{name: place.get(name) for name in _SETTINGS}, "kernels": kernels}
    if f"activations {settings['activations']}" not in kernels:  # no layer is packed, so nothing was rounded
        settings["activations"] = "a16"
    about = {"settings": settings, "base": against}
    if text is not None and ids is not None and seqlen is not None:
        with bar("windows") as on_progress:
            found.text = evaluate(live, ids, against=base, batch_size=batch_size or 1, on_progress=on_progress)
        entry = _text_entry(text, seqlen, found.text) | about
        found.entries.append(entry | {"settings": {**settings, "bos": True}} if bos else entry)
    asked: dict[str, Any] = {"limit": limit} | ({} if batch_size is None else {"batch_size": batch_size})
    for file in tasks:
        with bar(file.name) as on_progress:
            result = evaluate_task(live, tokenizer, file, **asked, on_progress=on_progress)
        answer = asdict(result)
        if base is not None and base_tokenizer is not None:
            with bar(f"{file.name}, base") as on_progress:
                base_result = evaluate_task(base, base_tokenizer, file, **asked, on_progress=on_progress)
            answer |= {f"base_{name}": getattr(base_result, name) for name in _figures(base_result)}
        found.tasks.append(answer)
        found.entries.append(_task_entry(file, answer) | about)
    found.kernels = kernels
    return found


def check_recordable(model: str) -> dict[str, Any]:
    """Refuse what has no manifest that can be written, before anything is measured.

    Returns:
        What tells this artifact from one that takes its place: the hashes of its files.

    Raises:
        BitternError: for anything but a folder with a manifest of its own that keeps to the schema.
    """
    folder = Path(model)
    if not folder.is_dir():
        raise BitternError(f"{model}: --record writes into an artifact's folder, and this is none")
    if not (folder / MANIFEST_FILE).is_file():
        raise BitternError(f"{model}: --record writes into {MANIFEST_FILE}, which only what bittern made has")
    if (folder / MANIFEST_FILE).is_symlink():
        raise BitternError(f"{model}: --record changes no file elsewhere, and {MANIFEST_FILE} is a link; copy it first")
    return _files(read_manifest(folder))


def record(model: str, entries: Sequence[dict[str, Any]], files: Mapping[str, Any]) -> None:
    """Put measurements into an artifact's manifest, which is replaced as a whole.

    One of the same text or task with the same settings replaces the older one, unless that was held against
    another base.

    Args:
        model, entries: the artifact, and what was measured of it.
        files: what :func:`check_recordable` said of it before.

    Raises:
        BitternError: see :func:`check_recordable`; for another artifact in its place; and when the disk refuses.
    """
    folder = Path(model)
    check_recordable(model)
    with explained(folder), _alone(folder):
        manifest = read_manifest(folder)
        if _files(manifest) != files:
            raise BitternError(f"{model}: not recorded: expected the files that were measured, found others by now")
        kept = [old for old in manifest.get("evaluations", ()) if not any(_replaces(new, old) for new in entries)]
        manifest["evaluations"] = [*kept, *entries]
        wrong = problem(manifest)
        if wrong is not None:
            raise BitternError(f"{folder / MANIFEST_FILE}: not written: {wrong}")
        replace_file(folder / MANIFEST_FILE, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def _files(manifest: dict[str, Any]) -> dict[str, Any]:
    """Sizes and hashes of an artifact's files; the first schema had none."""
    found: dict[str, Any] = manifest.get("files", {})
    return found


def _replaces(new: dict[str, Any], old: dict[str, Any]) -> bool:
    """Whether a measurement makes an older one useless."""
    settings = all(new["settings"].get(name) == (old.get("settings") or {}).get(name) for name in (*_SETTINGS, "bos"))
    same = settings and all(new.get(name) == old.get(name) for name in _SAME)
    return same and old.get("base") in (None, new["base"])


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No other bittern reads and replaces this manifest meanwhile."""
    place = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(place, fcntl.LOCK_EX)
        yield
    finally:
        os.close(place)


def _text_entry(text: Path, seqlen: int, result: EvalResult) -> dict[str, Any]:
    return {
        "what": "text",
        "name": text.name,
        "sha256": file_record(text)["sha256"],
        "seqlen": seqlen,
        "windows": result.windows,
        "tokens": result.tokens,
        **finite({name: getattr(result, name) for name in ("perplexity", "kl", "top1_agreement", "base_perplexity")}),
    }


def _task_entry(file: Path, answer: dict[str, Any]) -> dict[str, Any]:
    figures = finite({name: value for name, value in answer.items() if name != "task"})
    base = {"base_accuracy": None}  # a key that every task has
    return {"what": "task", "name": answer["task"], "sha256": file_record(file)["sha256"], **base, **figures}


def _figures(result: TaskResult) -> list[str]:
    """The fields of a result that say how good a model is."""
    return [name for name in asdict(result) if name not in ("task", "questions", "truncated")]


def finite(figures: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: None stands for it, and for what a manifest does not take for a number."""
    return {
        name: None if isinstance(value, float) and not abs(value) < LARGEST_FLOAT else value
        for name, value in figures.items()
    }
