"""What a checkpoint is worth: perplexity on text, and how far it is from the model it was made of."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bittern.errors import BitternError, check_utf8
from bittern.tokenizer import check_vocabulary, context_length, encode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CHUNK = 256
"""Positions whose log-probabilities are held in fp32 at once."""

_BYTES_PER_TOKEN = 16  # generous: natural text has 3 to 5 bytes a token
_ROWS = (".jsonl", ".json", ".parquet", ".arrow")  # files of rows, not of text


@dataclass(frozen=True)
class EvalResult:
    """The outcome of :func:`evaluate`.

    Attributes:
        perplexity: ``exp(nll)``.
        nll: mean negative log-likelihood in nats per scored token.
        windows: windows of text.
        tokens: scored tokens: all but the first of each window.
        kl: mean KL(base || model) in nats per scored token; None without a base.
        top1_agreement: share of scored tokens whose most likely token is the base's; None without a base.
        base_perplexity: the base's own perplexity; None without a base.
    """

    perplexity: float
    nll: float
    windows: int
    tokens: int
    kl: float | None = None
    top1_agreement: float | None = None
    base_perplexity: float | None = None


def text_windows(
    path: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seqlen: int,
    windows: int | None = None,
    bos: bool = False,
) -> Tensor:
    """The first non-overlapping windows of a text, int64 (windows, seqlen).

    The text is tokenized as one stream. Fewer windows than asked for come back when it is short: the
    caller says so.

    Args:
        path: a UTF-8 text file.
        tokenizer: the model's own.
        seqlen: tokens in a window, at least 2.
        windows: how many; None for all.
        bos: each is BOS and ``seqlen - 1`` tokens of the text; otherwise it begins as the text stands.

    Raises:
        BitternError: no such file, not UTF-8, shorter than one window, or a tokenizer without BOS.
    """
    path = Path(path)
    if seqlen < 2 or (windows is not None and windows < 1):
        raise BitternError(f"seqlen, windows: expected at least 2 and 1, found {seqlen} and {windows}")
    text = read_text(path, None if windows is None else windows * seqlen * _BYTES_PER_TOKEN)
    if bos and tokenizer.bos_token_id is None:
        raise BitternError(f"bos: the tokenizer {tokenizer.name_or_path!r} has no BOS token")
    ids = encode(tokenizer, text)
    width = seqlen - 1 if bos else seqlen
    count = len(ids) // width
    if count == 0:
        raise BitternError(f"{path}: expected at least one window of {seqlen} tokens, found {len(ids)} tokens")
    count = count if windows is None else min(count, windows)
    found = torch.tensor(ids[: count * width], dtype=torch.int64).view(count, width)
    return torch.cat([torch.full((count, 1), tokenizer.bos_token_id), found], dim=1) if bos else found


def read_text(path: str | os.PathLike[str], characters: int | None) -> str:
    """The beginning of a text file, or all of it.

    Raises:
        BitternError: no such file, rows in the place of text, not UTF-8, its name neither.
    """
    path = Path(path)
    check_utf8("text", path)
    if path.suffix in _ROWS:
        raise BitternError(
            f"{path}: expected a file of plain text, found rows ({path.suffix}): their markup would count"
        )
    try:
        with path.open(encoding="utf-8-sig") as file:  # a byte order mark is no text
            return file.read(characters)
    except OSError as error:
        raise BitternError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BitternError(f"{path}: expected UTF-8 text, found {error}") from error


def check_fit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, windows: Tensor) -> None:
    """Refuse windows, (windows, seqlen), that a model cannot take: too long, or of another tokenizer.

    Raises:
        BitternError: naming the length or the token.
    """
    longest = context_length(model.config)
    if longest is not None and windows.shape[1] > longest:
        raise BitternError(f"seqlen: expected at most {longest}, the model's context length, found {windows.shape[1]}")
    check_vocabulary(windows, tokenizer, model.config.get_text_config(decoder=True).vocab_size)


@torch.inference_mode()
def evaluate(
    model: PreTrainedModel,
    windows: Tensor,
    *,
    against: PreTrainedModel | None = None,
    batch_size: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> EvalResult:
    """Perplexity of ``model`` on token windows, and its distance to ``against``.

    Every window stands alone and its first token is not scored. Both models must be in memory. Their
    logits of one batch are held in the models' dtype; log-probabilities are fp32, a chunk of positions
    at a time, and sums fp64.

    Args:
        model: any causal language model, in eval mode.
        windows: int64 (windows, seqlen).
        against: the base, with the same vocabulary.
        batch_size: windows per forward pass.
        on_progress: called with the windows done and their number.

    Raises:
        BitternError: logits that are not numbers (naming the window), or two different vocabularies.
    """
    total = torch.zeros(4, dtype=torch.float64)  # nll, kl, agreements, nll of the base
    for start in range(0, len(windows), batch_size):
        ids = windows[start : start + batch_size]
        logits = _logits(model, ids)
        base = None if against is None else _logits(against, ids)
        if base is not None and base.shape != logits.shape:
            raise BitternError(
                f"--against: expected a vocabulary of {logits.shape[-1]} tokens as in the model, found {base.shape[-1]}"
            )
        sums = _window_sums(logits, base, ids)
        finite = torch.isfinite(sums[:, :3])  # a base that masks a token of the text with -inf is only infinitely bad
        if not bool(finite.all()):
            window = start + int((~finite).any(dim=1).nonzero()[0])
            what = "KL to the base" if bool(torch.isfinite(sums[window - start, 0])) else "likelihood"
            raise BitternError(f"window {window}: no finite {what}: the logits hold NaN or Inf")
        total += sums.sum(dim=0)
        if on_progress is not None:
            on_progress(start + len(ids), len(windows))
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    nll, kl, agreement, base_nll = (total / tokens).tolist()
    if against is None:
        return EvalResult(_exp(nll), nll, len(windows), tokens)
    return EvalResult(_exp(nll), nll, len(windows), tokens, kl, agreement, _exp(base_nll))


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits that predict ids[:, 1:], (windows, seqlen - 1, vocabulary), in the model's dtype."""
    logits: Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits
    return logits[:, :-1]


def _window_sums(logits: Tensor, base: Tensor | None, ids: Tensor) -> Tensor:
    """Sums over the scored tokens of each window: nll, KL(base || model), agreements, nll of the base; fp64."""
    sums = torch.zeros(len(ids), 4, dtype=torch.float64)  # (windows, 4)
    targets = ids[:, 1:].to(logits.device)
    for start in range(0, logits.shape[1], CHUNK):
        piece = slice(start, start + CHUNK)
        logp = logits[:, piece].float().log_softmax(dim=-1)
        sums[:, 0] -= logp.gather(2, targets[:, piece, None]).double().sum(dim=(1, 2)).cpu()
        if base is not None:
            base_logp = base[:, piece].to(logp.device).float().log_softmax(dim=-1)
            sums[:, 3] -= base_logp.gather(2, targets[:, piece, None]).double().sum(dim=(1, 2)).cpu()
            sums[:, 2] += (logp.argmax(-1) == base_logp.argmax(-1)).sum(dim=1).cpu()
            p = base_logp.exp()
            # tokens that the base masks with -inf count nothing; 0 * inf would be NaN
            terms = p.mul(base_logp.sub_(logp)).masked_fill_(p == 0, 0)
            sums[:, 1] += terms.sum(dim=-1).double().sum(dim=1).cpu()
    return sums
