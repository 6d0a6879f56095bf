"""Multiple-choice questions and last-word prediction, from files of ready requests.

A file (.jsonl or .jsonl.gz) holds one request per line, as AI2's evaluation suites write them:
``{"request_type": "loglikelihood", "request": {"context", "continuation"}, "doc_id", "idx", "label",
"task_name"}``. The lines of one ``doc_id`` are the choices of one question, ``idx`` is the choice and
``label`` the right one. In a LAMBADA file each document has one line, the right continuation, and
``label`` is a list of words.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bittern.errors import BitternError, check_utf8, first_line
from bittern.rope import longrope_turn
from bittern.tokenizer import check_text, check_vocabulary, context_length, encode, leading_bos

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REPEATS = 1_000_000
"""From this ``doc_id`` on, files repeat every document with a bare context, for another normalisation."""


@dataclass(frozen=True)
class Question:
    """One document: the choices in the order of ``idx`` as (context, continuation), and the right one.

    ``gold`` is None where there is one continuation and nothing to choose (LAMBADA).
    """

    doc_id: int
    choices: tuple[tuple[str, str], ...]
    gold: int | None


@dataclass(frozen=True)
class TaskResult:
    """The outcome of :func:`evaluate_task`.

    Attributes:
        task: ``task_name`` of the file.
        questions: how many were asked.
        accuracy: share whose right choice has the largest log-likelihood; None for last-word files.
        accuracy_normalized: the same per character of the choice, its leading space left out.
        exact_match: share whose continuation is what greedy decoding writes; None for multiple choice.
        perplexity: per continuation (not per token), as LAMBADA's is quoted; None for multiple choice.
        truncated: requests whose context was cut on the left to fit the model.
    """

    task: str
    questions: int
    accuracy: float | None = None
    accuracy_normalized: float | None = None
    exact_match: float | None = None
    perplexity: float | None = None
    truncated: int = 0


@dataclass(frozen=True)
class Scored:
    """One continuation under the model: log-likelihood in nats, whether it is the greedy one, whether it was cut."""

    logp: float
    greedy: bool
    truncated: bool


def read_task(path: str | os.PathLike[str], limit: int | None = None) -> tuple[str, list[Question]]:
    """The task's name and its first ``limit`` questions, in the order of the file.

    Raises:
        BitternError: a line that is no such request, or of another task than those before, and a question without
            its right choice, or with several.
    """
    path = Path(path)
    check_utf8("task", path)
    name, documents = "", dict[int, list[dict[str, Any]]]()
    for line, row in _rows(path):
        try:
            doc_id, choice, label = row["doc_id"], row["idx"], row["label"]
            texts = (row["request"]["context"], row["request"]["continuation"])
        except (KeyError, TypeError) as error:
            raise BitternError(f"{path}, line {line}: expected a request with {first_line(error)}") from error
        if not (
            isinstance(doc_id, int) and isinstance(choice, int) and all(isinstance(t, str) for t in texts) and texts[1]
        ):
            raise BitternError(
                f"{path}, line {line}: expected whole numbers doc_id and idx, a context and a continuation of text"
            )
        for text in texts:
            check_text(text, f"{path}, line {line}")
        named = row.get("task_name", name)
        if not isinstance(named, str):
            raise BitternError(f"{path}, line {line}: expected a task_name of text, found {named!r}")
        if name and named != name:
            raise BitternError(
                f"{path}, line {line}: expected the task_name {name!r} of the lines before, found {named!r}"
            )
        name = named
        if doc_id >= REPEATS or (limit is not None and doc_id not in documents and len(documents) == limit):
            continue
        rows = documents.setdefault(doc_id, [])
        if rows and label != rows[0]["label"]:
            expected = f"the label {rows[0]['label']!r} of the other lines of doc_id {doc_id}"
            raise BitternError(f"{path}, line {line}: expected {expected}, found {label!r}")
        rows.append(row)
    if not documents:
        raise BitternError(f"{path}: expected requests, found none")
    questions = [_question(path, doc_id, rows) for doc_id, rows in documents.items()]
    if len({question.gold is None for question in questions}) > 1:
        raise BitternError(f"{path}: expected questions with choices or last words, found both")
    return name or path.name.removesuffix(".gz").removesuffix(".jsonl"), questions


def evaluate_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str | os.PathLike[str],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    on_progress: Callable[[int, int], None] | None = None,
) -> TaskResult:
    """Ask a model the questions of a file.

    Args:
        model: any causal language model, in eval mode.
        tokenizer: its own.
        path: a file of requests (see the module).
        limit: how many questions, from the first; None for all.
        batch_size: requests per forward pass.
        on_progress: called with the requests done and their number.

    Raises:
        BitternError: as :func:`read_task`; a wrong tokenizer; logits that are not numbers.
    """
    name, questions = read_task(path, limit)
    texts = [choice for question in questions for choice in question.choices]
    scores = iter(loglikelihoods(model, tokenizer, texts, batch_size=batch_size, on_progress=on_progress))
    scored = [(question, [next(scores) for _ in question.choices]) for question in questions]
    truncated = sum(score.truncated for _, row in scored for score in row)
    if all(question.gold is None for question in questions):
        exact = sum(row[0].greedy for _, row in scored) / len(scored)
        nll = -sum(row[0].logp for _, row in scored) / len(scored)
        perplexity = math.exp(nll) if nll < 700 else math.inf
        return TaskResult(name, len(questions), exact_match=exact, perplexity=perplexity, truncated=truncated)
    right = normalized = 0
    for question, row in scored:
        lengths = [len(continuation.lstrip()) or 1 for _, continuation in question.choices]
        right += _argmax([score.logp for score in row]) == question.gold
        normalized += _argmax([score.logp / n for score, n in zip(row, lengths, strict=True)]) == question.gold
    return TaskResult(name, len(questions), right / len(scored), normalized / len(scored), truncated=truncated)


@torch.inference_mode()
def loglikelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[tuple[str, str]],
    *,
    batch_size: int = 8,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Scored]:
    """log p(continuation | context) of each pair, in nats.

    A pair is tokenized as one text and split at the length of its tokenized context, with the
    tokenizer's BOS before it when it uses one. Requests of like length share a batch; padding stands on
    the right, where no causal model looks. Only LongRoPE does: it turns the short by the angles of the long,
    so they share no batch.
    """
    longest = context_length(model.config)
    requests = [_tokens(tokenizer, *pair) for pair in texts]
    for i, (_, count) in enumerate(requests):
        if longest is not None and count > longest:
            raise BitternError(f"request {i}: its continuation has {count} tokens, the model's context is {longest}")
    order = sorted(range(len(texts)), key=lambda i: -len(requests[i][0]))
    result: list[Scored | None] = [None] * len(texts)
    check_vocabulary(
        torch.tensor([max(ids) for ids, _ in requests]), tokenizer, model.config.get_text_config().vocab_size
    )
    turn = longrope_turn(model.config)
    beyond = 0 if turn is None else sum(len(ids) - 1 > turn for ids, _ in requests)
    parts = (order[:beyond], order[beyond:])
    done = 0
    for members in (part[start : start + batch_size] for part in parts for start in range(0, len(part), batch_size)):
        rows = [requests[i][0] if longest is None else requests[i][0][-longest - 1 :] for i in members]
        width = max(map(len, rows)) - 1
        inputs = torch.tensor([row[:-1] + [0] * (width + 1 - len(row)) for row in rows], device=model.device)
        logits: Tensor = model(input_ids=inputs, use_cache=False).logits
        for i, row, line in zip(members, rows, logits, strict=True):
            count = min(requests[i][1], len(row) - 1)
            target = torch.tensor(row[-count:], device=line.device)
            logp = line[len(row) - 1 - count : len(row) - 1].float().log_softmax(dim=-1)
            total = float(logp.gather(1, target[:, None]).double().sum())
            if not math.isfinite(total):
                raise BitternError(f"request {i}: the model's logits give no finite likelihood (NaN or Inf)")
            result[i] = Scored(total, bool((logp.argmax(-1) == target).all()), len(row) < len(requests[i][0]))
        done += len(members)
        if on_progress is not None:
            on_progress(done, len(order))
    return [score for score in result if score is not None]


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Line numbers and parsed lines."""
    line = 0
    try:
        encoding = "utf-8-sig"  # a byte order mark is no JSON
        with gzip.open(path, "rt", encoding=encoding) if path.suffix == ".gz" else path.open(encoding=encoding) as file:
            for line, text in enumerate(file, start=1):
                if text.strip():
                    yield line, json.loads(text)
    except (OSError, EOFError, zlib.error) as error:
        raise BitternError(f"{path}: cannot be read: {first_line(error)}") from error
    except UnicodeDecodeError as error:
        raise BitternError(f"{path}: expected UTF-8 text, found {error}") from error
    except (ValueError, RecursionError) as error:  # too deep, or a number of too many digits, is no JSON either
        raise BitternError(f"{path}, line {line}: expected JSON, found {first_line(error)}") from error


def _question(path: Path, doc_id: int, rows: list[dict[str, Any]]) -> Question:
    rows = sorted(rows, key=lambda row: int(row["idx"]))
    choices = tuple((row["request"]["context"], row["request"]["continuation"]) for row in rows)
    label = rows[0]["label"]
    if len(choices) == 1:  # nothing to choose from
        return Question(doc_id, choices, None)
    if [row["idx"] for row in rows] != list(range(len(rows))):
        raise BitternError(f"{path}, doc_id {doc_id}: expected the choices 0 to {len(rows) - 1} once each")
    if not isinstance(label, int) or not 0 <= label < len(rows):
        raise BitternError(f"{path}, doc_id {doc_id}: expected a label below {len(rows)}, found {label!r}")
    return Question(doc_id, choices, label)


def _tokens(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str) -> tuple[list[int], int]:
    """Token ids of a request and how many of them, at its end, are the continuation."""
    bare = context.rstrip()
    continuation = context[len(bare) :] + continuation  # a space belongs to the word that it precedes
    bos = leading_bos(tokenizer)
    if bos is None and not bare:  # something must predict the first token
        bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    start = [] if bos is None else [bos]
    whole, head = encode(tokenizer, bare + continuation), encode(tokenizer, bare)
    count = len(whole) - len(head)
    if count < 1 or not start + head:
        raise BitternError(
            f"request: expected a continuation of at least one token after a context, found {continuation!r}"
        )
    return start + whole, count


def _argmax(values: list[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)
