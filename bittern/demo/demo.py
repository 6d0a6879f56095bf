"""The whole of bittern on a model that comes with it, in under two minutes and without a network.

:func:`run_demo` quantizes the embedded checkpoint at every width with GPTQ and with round-to-nearest,
measures what each kept on text that the model has never seen, and lets the 4-bit artifact write.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from torch import Tensor

from bittern.checkpoint import open_checkpoint
from bittern.demo.answers import right_answers
from bittern.demo.corpus import Question, questions, text
from bittern.errors import BitternError
from bittern.evaluate import evaluate, text_windows
from bittern.inspect import inspect
from bittern.progress import size
from bittern.quantize.pipeline import quantize
from bittern.runtime.generate import GenerationOptions, generate
from bittern.runtime.load import load

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODEL = Path(__file__).parent / "model"
"""The embedded checkpoint, made by :mod:`bittern.demo.train`."""

BITS = (8, 4, 3, 2)
GROUP_SIZE = 128
SEQLEN = 256
CALIBRATION_SAMPLES = 64
CALIBRATION_SEED = 1_000_001
HELD_OUT_SEED = 1_000_002
CHARACTERS_PER_TOKEN = 5  # more than the corpus has, so that the text always suffices
PROMPT = "One cold morning Mirel the"


@dataclass(frozen=True)
class DemoRow:
    """One line of the demo's table.

    Attributes:
        bits: 32 for the checkpoint itself, else the width asked for.
        method: ``fp32``, ``gptq`` or ``rtn`` (round to nearest).
        size_bytes: of all tensors, embeddings included.
        bits_per_weight: stored bits per weight of the blocks: scales and zeros included, embeddings not.
        perplexity: on text that no model was trained or calibrated on.
        kl: mean KL(fp32 || this) in nats per token.
        accuracy: share of questions answered right.
    """

    bits: int
    method: str
    size_bytes: int
    bits_per_weight: float
    perplexity: float
    kl: float
    accuracy: float


@dataclass(frozen=True)
class DemoResult:
    """What the demo found.

    Attributes:
        rows: fp32, then GPTQ and round-to-nearest at each width.
        prompt: the opening given to the 4-bit GPTQ artifact.
        written: how it went on.
        seconds: wall time of everything.
    """

    rows: tuple[DemoRow, ...]
    prompt: str
    written: str
    seconds: float


def demo_table(result: DemoResult) -> Table:
    """What each number of bits kept of the embedded model."""
    numbers = ("size", "bits/weight", "perplexity", "KL to fp32", "answers right")
    table = Table("model", "method", *numbers, box=None, pad_edge=False)
    for column in table.columns[2:]:
        column.justify = "right"
    for row in result.rows:
        table.add_row(
            f"{row.bits} bits",
            row.method,
            size(row.size_bytes),
            f"{row.bits_per_weight:.2f}",
            f"{row.perplexity:.3f}",
            f"{row.kl:.4f}",
            f"{row.accuracy:.1%}",
        )
    return table


@dataclass(frozen=True)
class _Exam:
    """What every model is put to."""

    tokenizer: PreTrainedTokenizerBase
    base: PreTrainedModel
    windows: Tensor
    items: Sequence[Question]


def run_demo(
    output: Path | None = None,
    report: Callable[[str], None] = lambda line: None,
    *,
    bits: Sequence[int] = BITS,
    windows: int = 32,
    items: int = 200,
) -> DemoResult:
    """Quantize the embedded checkpoint at every width by GPTQ and by rounding, and measure what each kept.

    Nothing is downloaded. The command line prints ``rows`` as a table, then ``prompt`` and ``written``.

    Args:
        output: a new folder that keeps the artifacts, ``gptq-4bit`` and so on; None throws them away.
        report: gets one line per step, to show that something happens.
        bits: the widths; text is written at 4 bits, or at the first of these if 4 is not among them.
        windows: windows of 256 held-out tokens that perplexity and KL are measured on.
        items: questions asked.

    Raises:
        BitternError: when ``output`` exists, or anything that
            :func:`bittern.quantize.pipeline.quantize` raises.
    """
    if output is not None and output.exists():
        raise BitternError(f"{output}: expected a folder that does not exist yet")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="bittern-demo-") as scratch:
        work = Path(scratch)
        artifacts = work / "artifacts" if output is None else output
        artifacts.mkdir(parents=True)
        calibration = _corpus_file(work / "calibration.txt", CALIBRATION_SEED, CALIBRATION_SAMPLES)
        taught: dict[str, Any] = {"dataset": str(calibration), "nsamples": CALIBRATION_SAMPLES, "seqlen": SEQLEN}
        report(f"fp32: measuring on {windows} x {SEQLEN} held-out tokens and {items} questions")
        exam = _prepare(work, windows, items)
        rows = [_measure(exam, exam.base, MODEL, 32, "fp32")]
        for width in bits:
            for method in ("gptq", "rtn"):
                report(f"{width} bits, {method}: quantizing and measuring")
                artifact = artifacts / f"{method}-{width}bit"
                quantize(
                    MODEL,
                    artifact,
                    bits=width,
                    group_size=GROUP_SIZE,
                    method=method,
                    device="cpu",
                    **(taught if method == "gptq" else {}),
                )
                rows.append(_measure(exam, _load(artifact), artifact, width, method))
        writer = 4 if 4 in bits else bits[0]
        report(f"{writer} bits, gptq: writing")
        written = _write(artifacts / f"gptq-{writer}bit", exam.tokenizer)
    return DemoResult(tuple(rows), PROMPT, written, time.perf_counter() - started)


def _corpus_file(path: Path, seed: int, windows: int) -> Path:
    path.write_text(text(seed, windows * SEQLEN * CHARACTERS_PER_TOKEN), encoding="utf-8")
    return path


def _load(folder: Path) -> PreTrainedModel:
    # on the CPU in fp32, whatever there is: the figures are then the same for everybody
    return load(folder, device="cpu", dtype=torch.float32)


def _prepare(work: Path, windows: int, items: int) -> _Exam:
    with open_checkpoint(MODEL) as base:
        tokenizer = base.tokenizer()
    held_out = _corpus_file(work / "held-out.txt", HELD_OUT_SEED, windows)
    ids = text_windows(held_out, tokenizer, seqlen=SEQLEN, windows=windows)
    return _Exam(tokenizer, _load(MODEL), ids, questions(items, HELD_OUT_SEED))


def _measure(exam: _Exam, model: PreTrainedModel, folder: Path, bits: int, method: str) -> DemoRow:
    likelihood = evaluate(model, exam.windows, against=exam.base, batch_size=8)
    assert likelihood.kl is not None
    right = right_answers(model, exam.tokenizer, exam.items)
    stored = inspect(folder)
    return DemoRow(
        bits=bits,
        method=method,
        size_bytes=stored["bytes"]["total"],
        bits_per_weight=stored["bits_per_weight"]["without_embeddings"],
        perplexity=likelihood.perplexity,
        kl=likelihood.kl,
        accuracy=sum(right) / len(right),
    )


def _write(folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """What the artifact makes of the prompt: the same for everybody."""
    options = GenerationOptions(max_new_tokens=80, temperature=0.7, top_k=20, seed=0)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    return generate(_load(folder), tokenizer, ids, options, lambda piece: None).text
