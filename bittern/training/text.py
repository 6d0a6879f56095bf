"""Windows of tokens to train on, in a file with their hash: a resumed run reads the same ones, or is told.

They take four bytes a token: all of them in memory while they are written, and what is trained on while it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from bittern.calibration import BYTES_PER_TOKEN, read_texts, shares
from bittern.errors import BitternError
from bittern.sampling import Sampled, beginnings, write_on, writer
from bittern.tokenizer import check_vocabulary, encode, leading_bos
from bittern.training.state import read_story, read_tensor, save_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HELD_OUT = 32
"""Windows kept for evaluation when no other text is given, and a tenth of all at most."""

_IDS = "ids"  # key in the file
_PROMPTS = (3 / 16, 6 / 16, 9 / 16)  # of a window that the source goes on from
_SPARE = 1.25  # times the bytes that the tokens should take
_TOGETHER = 16  # windows of a large text file that are read from one place: stories and arguments go on across windows


Rows = np.ndarray[tuple[int, int], np.dtype[np.int32]]
"""Windows, (windows, seqlen): a Python list of their ids would take eight times as much."""


@dataclass(frozen=True)
class Windows:
    """Windows in a file, and the order in which they are trained on.

    Attributes:
        ids: int32 (windows, seqlen).
        seed: of the order.
        own: windows that the teacher has written itself; they are the last.
        sha256: of ``ids``, where these are all of a file.
    """

    ids: Rows
    seed: int
    own: int = 0
    sha256: str = ""

    def take(self, start: int, stop: int) -> Tensor:
        """Windows [start, stop) of :meth:`order`, int64 (stop - start, seqlen)."""
        return self.read(self.order(start, stop))

    def read(self, rows: Tensor) -> Tensor:
        """These rows of ``ids``, int64 (rows, seqlen)."""
        return torch.from_numpy(self.ids[rows.numpy()].astype(np.int64))

    def is_own(self, rows: Tensor) -> Tensor:
        """Which of these rows of ``ids`` the teacher has written itself; bool (rows,)."""
        return rows >= len(self.ids) - self.own

    def order(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of an endless sequence that shows all windows in a new order each time around; int64."""
        count = len(self.ids)
        rows = []
        for around in range(start // count, (stop - 1) // count + 1):
            order = torch.randperm(
                count, generator=torch.Generator().manual_seed((self.seed * 1_000_003 + around) % 2**63)
            )
            rows.append(order[max(start - around * count, 0) : stop - around * count])
        return torch.cat(rows)


def write_windows(
    path: Path,
    dataset: str | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seqlen: int,
    count: int,
    vocab_size: int,
    sampled: int = 0,
    model: PreTrainedModel | Callable[[], PreTrainedModel] | None = None,
    seed: int = 0,
    chat_template: bool = False,
    on_sampled: Sampled | None = None,
) -> int:
    """Tokenize a dataset into ``count`` windows, streamed, and put them into a file.

    Where the tokenizer puts BOS before every text, every second window begins with it and the others begin wherever the
    text stands: attention that rests on BOS must not forget how to do without (docs/log.md has the figures).

    Args:
        path: the file, which appears when it is whole and durable.
        dataset: as in :func:`bittern.calibration.load_tokens`, ``self`` too; of several each gives its share.
        tokenizer: the model's own.
        seqlen: tokens in a window.
        count: windows wanted. Fewer are found in a short text.
        vocab_size: of the model; ids beyond it are an error.
        sampled: of ``count``, windows that ``model`` writes, at temperature 1: it goes on where windows of the dataset
            are cut off, never of those of :func:`kept_apart`; the dataset gives the others.
        model: the source, or a function that loads it; only what is sampled needs it.
        seed: of the sampling.
        chat_template: as in :func:`~bittern.calibration.load_tokens`.
        on_sampled: called with the windows that the source has written and their number.

    Returns:
        The number of windows found.

    Raises:
        BitternError: as :func:`~bittern.calibration.load_tokens`, and when the disk refuses.
    """
    written = []
    own = 0
    for name, wanted in shares(dataset, count - sampled):
        if name == "self":
            own = wanted
        else:
            written += _windows(name, tokenizer, seqlen, wanted, chat_template)
    if own:
        drawn = write_on(writer(model, chat_template), [beginnings(tokenizer, own)], seqlen, seed, on_sampled)
        rows = drawn.numpy().astype(np.int32)
        rows[1::2] = np.roll(rows[1::2], seqlen // 2, axis=1)  # the end of a text, BOS, its beginning
        written.append(rows)
    ids = np.concatenate(written)
    check_vocabulary(torch.from_numpy(ids), tokenizer, vocab_size)
    if sampled:
        prompts = _prompts(ids, sampled, seed)
        drawn = write_on(writer(model, False), prompts, seqlen, seed, on_sampled)
        ids = np.concatenate([ids, drawn.numpy().astype(np.int32)])
    save_state(path, {_IDS: torch.from_numpy(ids)}, None, {"sha256": _hash(ids), "own": own + sampled})
    return len(ids)


def kept_apart(count: int) -> list[int]:
    """Which of ``count`` windows of a dataset are kept to measure on, when there is no other text: spread evenly."""
    spread = max(10, count // HELD_OUT)
    return list(range(spread // 2, count, spread))[:HELD_OUT] or [count - 1]


def _prompts(rows: Rows, count: int, seed: int) -> list[Tensor]:
    """Beginnings of windows for ``count`` texts, of several lengths."""
    kept = sorted(set(range(len(rows))) - set(kept_apart(len(rows)))) or [0]
    chosen = torch.randint(len(kept), (count,), generator=torch.Generator().manual_seed(seed))
    starts = torch.from_numpy(rows[np.array(kept)[chosen.numpy()]].astype(np.int64))
    seqlen = rows.shape[1]
    lengths = [max(1, round(share * seqlen)) for share in _PROMPTS]
    parts = zip(starts.tensor_split(len(lengths)), lengths, strict=True)
    return [part[:, :length] for part, length in parts if len(part)]


def read_windows(path: Path, seed: int) -> Windows:
    """The windows of a file of :func:`write_windows`, mapped.

    Raises:
        BitternError: when they are not what was written.
    """
    story = read_story(path)
    expected, own = story.get("sha256"), story.get("own")
    ids: Rows = read_tensor(path, _IDS).numpy()
    if own is None or _hash(ids) != expected:
        raise BitternError(f"{path}: expected the windows that its header has the hash of, found others")
    return Windows(ids, seed, own, expected)


def find_windows(path: Path, seed: int) -> Windows | None:
    """As :func:`read_windows`; None where there are none, or others than were written."""
    try:
        return read_windows(path, seed)
    except BitternError:
        return None


def _hash(ids: Rows) -> str:
    return hashlib.sha256(np.ascontiguousarray(ids).view(np.uint8).data).hexdigest()


def _windows(
    dataset: str, tokenizer: PreTrainedTokenizerBase, seqlen: int, count: int, chat_template: bool
) -> list[Rows]:
    """Windows text by text; of a text file as much is read as they take, from places all over it."""
    path = Path(dataset)
    budget = round(_SPARE * BYTES_PER_TOKEN * count * seqlen)
    while True:
        found = list(_cut(dataset, tokenizer, seqlen, count, chat_template, budget))
        if sum(map(len, found)) == count or path.suffix != ".txt" or budget >= path.stat().st_size:
            return found
        budget *= 2  # a token of many a script takes more bytes


def _cut(
    dataset: str, tokenizer: PreTrainedTokenizerBase, seqlen: int, count: int, chat_template: bool, budget: int
) -> Iterator[Rows]:
    """At most ``count`` windows, text by text: of ``budget`` bytes of a text file or more, of what rows they take."""
    bos = leading_bos(tokenizer)
    rows = 1 if bos is None else 2  # that share a BOS
    width = rows * seqlen - (bos is not None)
    rest: list[int] = []
    found = 0
    pieces = max(1, count // _TOGETHER)

    def cut(tokens: list[int], width: int) -> Rows:
        array = np.array(tokens, dtype=np.int32).reshape(-1, width)
        return (array if bos is None else np.insert(array, 0, bos, axis=1)).reshape(-1, seqlen)

    template = tokenizer if chat_template else None
    for text in read_texts(dataset, budget=budget, pieces=pieces, tokenizer=template, all_rows=True):
        rest += encode(tokenizer, text)
        whole = min(len(rest) // width, -(-(count - found) // rows))
        if whole:
            windows = cut(rest[: whole * width], width)[: count - found]
            yield windows
            rest, found = rest[whole * width :], found + len(windows)
        if found == count:
            return
    if bos is not None and len(rest) >= seqlen - 1:
        yield cut(rest[: seqlen - 1], seqlen - 1)
        found += 1
    path = Path(dataset)
    if not found and (path.suffix != ".txt" or budget >= path.stat().st_size):
        raise BitternError(f"{dataset}: expected at least one window of {seqlen} tokens, found {len(rest)} tokens")
