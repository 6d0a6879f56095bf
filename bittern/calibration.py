"""Calibration tokens: from a local file, from a dataset on the Hub, or from the model itself.

How windows are chosen, so that anybody can make the same ones:

1. The text is tokenized as one stream without special tokens (rows joined by a blank line).
2. The stream is cut into windows of ``seqlen`` tokens that do not overlap. When the tokenizer puts
   BOS before every text by itself, each window is BOS and ``seqlen - 1`` tokens of the stream:
   position 0 is an attention sink, and its massive activations belong there and nowhere else.
3. Of the windows, ``nsamples`` are drawn without replacement by
   ``torch.randperm(windows, generator=torch.Generator().manual_seed(seed))``. What is done with the first
   few of them alone shall not hang on how a corpus is sorted: window i, in the order of the text, gets its
   place by the fraction of i times the golden ratio, which spreads any run of them over the whole.

Of several datasets each gives the same number of windows, and they take turns.

However large the source, only about ``POOL`` windows per sample asked for are read and tokenized: a
larger .txt file in ``nsamples`` pieces spread evenly over it, rows in their order; of a row that is
larger by itself, its beginning.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bittern.errors import BitternError, check_utf8, first_line
from bittern.hub_errors import guarded
from bittern.sampling import Sampled, beginnings, write_on, writer
from bittern.tokenizer import check_vocabulary, encode, leading_bos, rendering

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SEQLEN = 512
"""Tokens in a window, unless told."""

POOL = 8
"""Windows read per window used, at ``BYTES_PER_TOKEN``."""

BYTES_PER_TOKEN = 4
"""What a token of natural text takes; only how much is read depends on it."""

READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}
"""File suffix -> the builder of ``datasets`` that reads it."""

_ROWS_AT_ONCE = 1 << 20  # characters
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[^@]+))?(@(?P<split>.+))?")


@dataclass(frozen=True)
class CalibrationTokens:
    """What a model is calibrated on.

    Attributes:
        ids: int64 (samples, seqlen).
        source: the datasets, as asked for, with commas between them.
        tokens_asked: ``nsamples * seqlen``.
        tokens_found: ``ids.numel()``.
        sha256: of ``ids``, see :func:`tokens_hash`.
        warnings: sentences that the user must see.
    """

    ids: Tensor
    source: str
    tokens_asked: int
    tokens_found: int
    sha256: str
    warnings: tuple[str, ...] = ()


def load_tokens(
    dataset: str | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    nsamples: int,
    seqlen: int,
    seed: int,
    chat_template: bool = False,
    vocab_size: int | None = None,
    model: PreTrainedModel | Callable[[], PreTrainedModel] | None = None,
    on_sampled: Sampled | None = None,
) -> CalibrationTokens:
    """Token windows to calibrate on; the module's docstring says how they are chosen.

    Args:
        dataset: a .txt, .jsonl, .json, .parquet or .arrow file; or a dataset on the Hub as
            ``name[:config][@split]`` (split ``train`` unless named); or ``self``, text that
            ``model`` writes: sampled at temperature 1 from BOS, never stopped at EOS. Or several of them. Of rows the
            column ``text`` is read, else the only one of strings, where there are no conversations; or the one named
            behind a ``#``.
        tokenizer: the model's own.
        nsamples: windows wanted. Fewer found is a warning in the result.
        seqlen: tokens in a window.
        seed: of the choice of windows, or of the sampling.
        chat_template: render the column ``messages`` (or ``conversations``) of every row with the
            tokenizer's chat template.
        vocab_size: of the model; ids beyond it are an error.
        model: for ``self`` alone: the model, or a function that loads it.
        on_sampled: for ``self`` alone: called with the windows that are written and their number, a few at a time.

    Raises:
        BitternError: no file, no dataset, no column, no whole window, a wrong tokenizer.
    """
    if nsamples < 1 or seqlen < 2:
        raise BitternError(f"nsamples, seqlen: expected at least 1 and 2, found {nsamples} and {seqlen}")
    parts: list[Tensor] = []
    warnings: list[str] = []
    for name, count in shares(dataset, nsamples):
        if name == "self":
            ids = write_on(writer(model, chat_template), [beginnings(tokenizer, count)], seqlen, seed, on_sampled)
        else:
            texts = read_texts(
                name,
                budget=POOL * BYTES_PER_TOKEN * count * seqlen,
                pieces=count,
                tokenizer=tokenizer if chat_template else None,
            )
            ids = _choose(_windows(texts, tokenizer, seqlen, name), count, seed)
        if vocab_size is not None:
            check_vocabulary(ids, tokenizer, vocab_size)
        if len(ids) < count:
            warnings.append(
                f"{name}: {count} x {seqlen} = {count * seqlen} calibration tokens asked for, "
                f"{len(ids)} x {seqlen} = {ids.numel()} found"
            )
        parts.append(ids)
    ids = _in_turn(parts)
    return CalibrationTokens(
        ids, dataset_title(dataset), nsamples * seqlen, ids.numel(), tokens_hash(ids), tuple(warnings)
    )


def dataset_names(dataset: str | Sequence[str]) -> tuple[str, ...]:
    """One dataset or several, as a tuple.

    Raises:
        BitternError: for none, for one that is named twice, and for a name that is empty or no UTF-8.
    """
    names = (dataset,) if isinstance(dataset, str) else tuple(dataset)
    for name in names:
        check_utf8("dataset", name)
        if not name:
            raise BitternError("dataset: expected a file, a dataset on the Hub or self, found an empty name")
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if not names or twice:
        raise BitternError(
            f"dataset: expected at least one, each once, found {', '.join(twice) + ' twice' if twice else 'none'}"
        )
    return names


def dataset_title(dataset: str | Sequence[str]) -> str:
    """What messages and manifests call one dataset or several: their names with commas between them."""
    return ", ".join(dataset_names(dataset))


def shares(dataset: str | Sequence[str], count: int) -> list[tuple[str, int]]:
    """How many of ``count`` windows each dataset gives: the same number, or one more for the first ones.

    Raises:
        BitternError: as :func:`dataset_names`, and for fewer windows than datasets.
    """
    names = dataset_names(dataset)
    if count < len(names):
        raise BitternError(
            f"dataset: expected a window of each of {len(names)} at least, found {count} windows asked for"
        )
    return [(name, len(range(index, count, len(names)))) for index, name in enumerate(names)]


def _in_turn(parts: Sequence[Tensor]) -> Tensor:
    """The rows of all, each part's spread evenly over the whole."""
    places = torch.cat([(torch.arange(len(part), dtype=torch.float32) + 0.5) / len(part) for part in parts])
    return torch.cat(list(parts))[places.argsort(stable=True)]


def tokens_hash(ids: Tensor) -> str:
    """SHA-256 of token ids as little-endian int64, row by row."""
    return hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest()


def read_texts(
    dataset: str,
    *,
    budget: int,
    pieces: int,
    tokenizer: PreTrainedTokenizerBase | None,
    all_rows: bool = False,
) -> Iterator[str]:
    """Consecutive texts of a file or of a dataset on the Hub, at least ``budget`` bytes or characters if it has them.

    Args:
        dataset: as in :func:`load_tokens`, without ``self``.
        budget: when to stop; a row of more than that is not one text.
        pieces: how many places of a .txt file larger than ``budget`` are read.
        tokenizer: given when rows are conversations for its chat template.
        all_rows: rows come until there are no more: the caller stops.

    Raises:
        BitternError: as :func:`load_tokens`.
    """
    path, column = split_column(dataset)
    if path.suffix == ".txt" and tokenizer is not None:
        raise BitternError(f"--chat-template: needs rows with messages (.jsonl, .json, .parquet, .arrow), found {path}")
    if path.suffix == ".txt":
        _check_file(path, column)
        return _text_pieces(path, budget, pieces)
    return _joined(_rows(dataset, tokenizer), sys.maxsize if all_rows else budget, budget)


def split_column(dataset: str) -> tuple[Path, str | None]:
    """A dataset's name, as a path, and the column behind its ``#``; a file that has one in its name keeps it."""
    name, mark, column = dataset.rpartition("#")
    return (Path(name), column) if mark and not Path(dataset).exists() else (Path(dataset), None)


def check_files(dataset: str | Sequence[str]) -> None:
    """Refuse the name of a text file that is not there: sooner than where it is read, with a model in memory."""
    for path, column in map(split_column, dataset_names(dataset)):
        if path.suffix == ".txt":
            _check_file(path, column)


def _check_file(path: Path, column: str | None) -> None:
    if not path.is_file():
        raise BitternError(f"{path}: expected a text file, found none")
    if column is not None:
        raise BitternError(f"{path}: expected no column of a .txt file, found {column!r}")


def _text_pieces(path: Path, budget: int, pieces: int) -> Iterator[str]:
    """The whole file when it fits ``budget`` bytes, else ``pieces`` equal parts of that, spread evenly.

    Lines end in \\n whatever the file has, as in the text that ``bittern eval`` predicts.
    """
    size = path.stat().st_size
    length = size if size <= budget else budget // pieces
    with path.open("rb") as file:
        for index in range(1 if size <= budget else pieces):
            file.seek(index * (size - length) // max(pieces - 1, 1))
            raw = file.read(length)
            start = 0  # a piece may begin and end inside a character
            while index > 0 and start < len(raw) and raw[start] & 0xC0 == 0x80:
                start += 1
            encoding = "utf-8" if index else "utf-8-sig"  # a byte order mark is no text
            decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(encoding)(), translate=True)
            try:
                yield decoder.decode(raw[start:], final=length == size)  # else an end may be half a line's
            except UnicodeDecodeError as error:
                raise BitternError(f"{path}: expected UTF-8 text, found {first_line(error)}") from error


def _joined(rows: Iterable[str], budget: int, longest: int) -> Iterator[str]:
    """Rows joined by blank lines into texts worth one call of the tokenizer, until ``budget`` characters.

    Of a row of more than ``longest`` characters no more is taken than what is left of the budget, in several texts.
    """
    waiting: list[str] = []
    size = total = 0
    for row in rows:
        for part in [row] if len(row) <= longest else _parts(row[: budget - total]):
            waiting.append(part)
            size, total = size + len(part), total + len(part)
            if size >= _ROWS_AT_ONCE or total >= budget:
                yield "\n\n".join(waiting)
                waiting, size = [], 0
            if total >= budget:
                return
    if waiting:
        yield "\n\n".join(waiting)


def _parts(row: str) -> Iterator[str]:
    """A long row in texts of their own; the last one may be short, and waits for the rows that follow."""
    return (row[start : start + _ROWS_AT_ONCE] for start in range(0, len(row), _ROWS_AT_ONCE))


def _rows(dataset: str, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[str]:
    """The text of every row."""
    from datasets.exceptions import DatasetsError

    path, text_column = split_column(dataset)
    if text_column is not None and tokenizer is not None:
        raise BitternError(f"{dataset}: --chat-template renders messages, found a column {text_column!r} of text named")
    with guarded(), tempfile.TemporaryDirectory(prefix="bittern-") as cache:
        try:
            for number, row in enumerate(_open_rows(path, cache), 1):
                if tokenizer is None and text_column is None:
                    text_column = _text_column(row, dataset)
                found = _row_text(row, f"{dataset}: row {number}", tokenizer, text_column)
                if found:
                    yield found
        except StopIteration as error:  # what datasets raises of an empty file
            raise BitternError(f"{dataset}: expected rows, found none") from error
        except (DatasetsError, OSError, ValueError, KeyError, RuntimeError) as error:
            hint = "" if path.exists() else " (no such file here, so it was looked for on the Hub)"
            raise BitternError(f"{dataset}: cannot be read as a dataset: {first_line(error)}{hint}") from error


def _open_rows(path: Path, cache: str) -> Iterable[dict[str, Any]]:
    """Rows in their order, streamed: a large source is neither copied nor downloaded whole."""
    import datasets

    if path.exists():
        if path.suffix not in READERS:
            known = ", ".join([".txt", *READERS])
            raise BitternError(f"{path}: expected a file of one of the kinds {known}, found {path.suffix or 'none'!r}")
        file_rows: Iterable[dict[str, Any]] = datasets.load_dataset(
            READERS[path.suffix], data_files=str(path), split="train", streaming=True, cache_dir=cache
        )
        return file_rows
    parts = _HUB_NAME.fullmatch(str(path))
    if parts is None or path.suffix in READERS:
        raise BitternError(f"{path}: expected a file or a dataset on the Hub (name[:config][@split]), found neither")
    streaming = not datasets.config.HF_HUB_OFFLINE  # offline, only the other reader finds an earlier download
    hub_rows: Iterable[dict[str, Any]] = datasets.load_dataset(
        parts["name"], parts["config"], split=parts["split"] or "train", streaming=streaming
    )
    return hub_rows


def _text_column(row: dict[str, Any], dataset: str) -> str | None:
    """The column of all rows' text: ``text``, or the only one of text; None where a row without any does not tell."""
    strings = [name for name, value in row.items() if isinstance(value, str)]
    chats = {"messages", "conversations"} & set(row)  # a lone text beside those is an id
    if "text" in row or (len(strings) == 1 and not chats):
        return "text" if "text" in row else strings[0]
    if not strings and not chats and None in row.values():
        return None
    hint = f"; name one behind a #: {dataset}#{strings[0]}" if strings else ""
    hint = "; --chat-template renders messages" if chats else hint
    raise BitternError(f"{dataset}: expected a column 'text' of text, found columns {', '.join(row)}{hint}")


def _row_text(
    row: dict[str, Any], place: str, tokenizer: PreTrainedTokenizerBase | None, text_column: str | None
) -> str | None:
    """None, or an empty text, of a row that holds nothing; ``place`` is what errors call the row."""
    columns = ", ".join(row)
    if tokenizer is not None:
        kept = [row[name] for name in ("messages", "conversations") if name in row]
        if not kept:
            raise BitternError(f"{place}: --chat-template needs a column 'messages', found columns {columns}")
        messages = next((each for each in kept if each), None)  # a conversation may be empty
        return _render(messages, place, tokenizer) if messages else None
    if text_column is None:  # no row so far has any
        return None
    if text_column not in row:
        raise BitternError(f"{place}: expected a column {text_column!r} of text, found columns {columns}")
    value = row[text_column]
    if value is not None and not isinstance(value, str):
        raise BitternError(f"{place}: expected text in column {text_column!r}, found {type(value).__name__}")
    return value


def _render(messages: list[dict[str, Any]], place: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """One conversation through the chat template; the ShareGPT keys ``from`` and ``value`` are understood."""
    if not isinstance(messages, list):
        raise BitternError(f"{place}: expected a list of messages, found {type(messages).__name__}")
    strangers = [message for message in messages if not isinstance(message, dict)]
    if strangers:
        raise BitternError(f"{place}: expected a list of messages, found one of {type(strangers[0]).__name__}")
    if "from" in messages[0]:
        messages = [_from_sharegpt(message, place) for message in messages]
    for message in messages:
        if "role" not in message or not {"content", "tool_calls"} & set(message):  # a template would render nothing
            found = ", ".join(message) or "neither"
            raise BitternError(f"{place}: expected messages with role and content, found {found}")
    if not tokenizer.chat_template:
        raise BitternError(f"--chat-template: the tokenizer {tokenizer.name_or_path!r} has no chat template")
    with rendering(f"{place}: the chat template refuses the conversation"):
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert isinstance(text, str)
    bos = tokenizer.bos_token
    # every window gets its own BOS; one from the template would stand in the middle
    return text.removeprefix(bos) if bos and leading_bos(tokenizer) is not None else text


def _from_sharegpt(turn: dict[str, Any], place: str) -> dict[str, Any]:
    """A turn of ShareGPT's as a message."""
    if not {"from", "value"} <= set(turn):
        raise BitternError(f"{place}: expected turns with from and value, found {', '.join(turn) or 'neither'}")
    roles = {"human": "user", "gpt": "assistant"}
    return {"role": roles.get(str(turn["from"]), turn["from"]), "content": turn["value"]}


def _windows(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, seqlen: int, dataset: str) -> Tensor:
    """All windows of the stream, int64 (windows, seqlen)."""
    bos = leading_bos(tokenizer)
    stream: list[int] = []
    for text in texts:
        stream += encode(tokenizer, text)
    width = seqlen if bos is None else seqlen - 1
    count = len(stream) // width
    if count == 0:
        raise BitternError(f"{dataset}: expected at least one window of {seqlen} tokens, found {len(stream)} tokens")
    ids = torch.tensor(stream[: count * width], dtype=torch.int64).view(count, width)
    return ids if bos is None else torch.cat([torch.full((count, 1), bos), ids], dim=1)


def _choose(windows: Tensor, nsamples: int, seed: int) -> Tensor:
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    chosen = order[:nsamples].sort().values
    places = torch.arange(len(chosen), dtype=torch.float64) * (5**0.5 - 1) / 2 % 1
    return windows[chosen[places.argsort()]]
