"""Artifacts scored one after the other for quality.py, against what the unquantized model said once.

The unquantized model runs over each text a single time; its log-probabilities stay in --work as float16, 100 MB for
1024 tokens of a vocabulary of 49152. That rounds each by 1 part in 2048 at most, up as often as down: the KL divergence
of some thousand tokens moves by less than a thousandth (tests/test_quality.py).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Text:
    """A text to be scored on.

    Attributes:
        name: its columns in the table.
        windows: int64 (windows, seqlen).
        key: a short hash of the windows.
    """

    name: str
    windows: Tensor
    key: str


def read_text(name: str, path: str, model: str, seqlen: int, windows: int) -> Text:
    """The first windows of a text in the model's tokens."""
    from bittern.checkpoint import open_checkpoint
    from bittern.evaluate import text_windows

    with open_checkpoint(model) as checkpoint:
        ids = text_windows(path, checkpoint.tokenizer(), seqlen=seqlen, windows=windows)
    if len(ids) < windows:
        print(f"warning: {path} has {len(ids)} windows of {seqlen} tokens")
    return Text(name, ids, hash_of(repr(ids.tolist()).encode()))


def hash_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


class Recorder:
    """A model that keeps the log-probabilities of all it is asked, in a file."""

    def __init__(self, model: PreTrainedModel, path: Path, windows: Tensor) -> None:
        import numpy as np

        self.model, self.device = model, model.device
        vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
        needed, free = 2 * windows.numel() * vocabulary, shutil.disk_usage(path.parent).free
        if needed > free:
            raise SystemExit(f"error: {path}: needs {needed / 1e9:.1f} GB, found {free / 1e9:.1f} GB free on its disk")
        shape = (*windows.shape, vocabulary)
        self.kept = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
        self.done = 0

    def __call__(self, input_ids: Tensor, **options: Any) -> Any:
        answer = self.model(input_ids=input_ids, **options)
        self.kept[self.done] = answer.logits[0].float().log_softmax(-1).half().cpu().numpy()
        self.done += 1
        return answer


class Remembered:
    """What a :class:`Recorder` kept, in the place of its model: it answers the windows of that text and no others."""

    def __init__(self, path: Path, text: Text) -> None:
        import numpy as np
        import torch

        self.device = torch.device("cpu")
        self.kept: np.ndarray[Any, Any] = np.load(path, mmap_mode="r")
        self.position = {tuple(window): index for index, window in enumerate(text.windows.tolist())}

    def __call__(self, input_ids: Tensor, **_: Any) -> Any:
        import torch

        logits = torch.from_numpy(self.kept[self.position[tuple(input_ids[0].tolist())]].copy())
        return SimpleNamespace(logits=logits[None])


def score_base(
    model: str, folder: Path, texts: Sequence[Text], tasks: Sequence[Path], limit: int | None, device: str
) -> Any:
    """The unquantized model's own figures, and its log-probabilities for :func:`score`; what is there is kept."""
    record = folder / "scores.json"
    scores = read_scores(record)
    missing = [text for text in texts if text.key not in scores["texts"] or not _kept(folder, text).exists()]
    if not missing and not _unasked(scores, tasks, limit):
        return scores
    live = _load(model, device)
    from bittern.evaluate import evaluate

    for text in missing:
        partial = _kept(folder, text).with_suffix(".partial")
        recorder = Recorder(live, partial, text.windows)
        print(f"unquantized on {text.name} ...", end=" ", flush=True)
        result = evaluate(cast("PreTrainedModel", recorder), text.windows)
        recorder.kept.flush()
        partial.rename(_kept(folder, text))
        print(f"perplexity {result.perplexity:.2f}", flush=True)
        scores["texts"][text.key] = {"perplexity": result.perplexity, "windows": result.windows}
        record.write_text(json.dumps(scores, indent=1))
    _ask(live, model, scores, tasks, limit, record)
    return scores


def score(
    artifact: Path,
    model: str,
    base: Path,
    record: Path,
    texts: Sequence[Text],
    tasks: Sequence[Path],
    limit: int | None,
    device: str,
) -> Any:
    """An artifact's figures on texts and tasks; what its record has is not measured again.

    Args:
        artifact: a folder or a GGUF file.
        model: the unquantized checkpoint, whose tokenizer reads tasks.
        base: the folder that :func:`score_base` filled.
        record: file of the figures.
    """
    from bittern.evaluate import evaluate

    scores = read_scores(record)
    missing = [text for text in texts if text.key not in scores["texts"]]
    if not missing and not _unasked(scores, tasks, limit):
        return scores
    live = _load(artifact, device)
    for text in missing:
        remembered = Remembered(_kept(base, text), text)
        result = evaluate(live, text.windows, against=cast("PreTrainedModel", remembered))
        figures = {"perplexity": result.perplexity, "kl": result.kl, "top1_agreement": result.top1_agreement}
        scores["texts"][text.key] = figures
        record.write_text(json.dumps(scores, indent=1))
    _ask(live, model, scores, tasks, limit, record)
    return scores


def read_scores(record: Path) -> dict[str, Any]:
    """``texts`` by hash of their windows, ``tasks`` by hash of their questions."""
    found: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {"texts": {}, "tasks": {}}
    return found


def task_key(path: Path, limit: int | None) -> str:
    return hash_of(path.read_bytes() + repr(limit).encode())


def _unasked(scores: Mapping[str, Any], tasks: Sequence[Path], limit: int | None) -> bool:
    return any(task_key(path, limit) not in scores["tasks"] for path in tasks)


def _ask(
    live: PreTrainedModel, model: str, scores: dict[str, Any], tasks: Sequence[Path], limit: int | None, record: Path
) -> None:
    """Put accuracies that are missing into a record."""
    from bittern.checkpoint import open_checkpoint
    from bittern.tasks import evaluate_task

    if not _unasked(scores, tasks, limit):
        return
    with open_checkpoint(model) as checkpoint:
        tokenizer: PreTrainedTokenizerBase = checkpoint.tokenizer()
    for path in tasks:
        if task_key(path, limit) in scores["tasks"]:
            continue
        result = evaluate_task(live, tokenizer, path, limit=limit)
        accuracy = result.exact_match if result.accuracy is None else result.accuracy
        scores["tasks"][task_key(path, limit)] = {
            "name": result.task,
            "accuracy": accuracy,
            "questions": result.questions,
        }
        record.write_text(json.dumps(scores, indent=1))


def _load(path: str | Path, device: str) -> PreTrainedModel:
    """A model whose packed layers torch multiplies, dequantized to fp32."""
    import torch

    import bittern

    return bittern.load(path, device=device, dtype=torch.float32, kernels="torch", decoder=False)


def _kept(folder: Path, text: Text) -> Path:
    return folder / f"{text.key}.npy"
