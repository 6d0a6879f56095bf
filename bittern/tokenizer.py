"""How text becomes token ids here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bittern.errors import BitternError, first_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of ``text`` alone: no BOS, no EOS, no length warning."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def check_text(text: str, what: str) -> str:
    """The text, unless it was no UTF-8 when it was read: Python hands such bytes on as lone surrogates.

    Raises:
        BitternError: naming what it was.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BitternError(f"{what}: expected UTF-8 text, found other bytes at character {error.start}") from error
    return text


@contextmanager
def rendering(what: str) -> Iterator[None]:
    """Render a chat template within: it is a program, and fails as programs do.

    Raises:
        BitternError: ``what`` was refused, and why.
    """
    from jinja2 import TemplateError

    try:
        yield
    except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        why = f"{type(error).__name__}: {first_line(error)}"
        raise BitternError(f"{what}: {why}") from error


def leading_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The BOS id if the tokenizer puts it before every text by itself, else None.

    Whether a tokenizer merely *has* a BOS token says nothing: SmolLM2 and Qwen2 have one and never
    use it, Llama and Gemma always do and degrade without it.
    """
    ids: list[int] = tokenizer("a", verbose=False)["input_ids"]
    return ids[0] if len(ids) > 1 and ids[0] == tokenizer.bos_token_id else None


def wants_bos(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a model predicts badly where a text does not begin with BOS."""
    return "gemma" in config.model_type and leading_bos(tokenizer) is not None


def window_length(config: PretrainedConfig, asked: int | None, usual: int) -> tuple[int, list[str]]:
    """Tokens of a window: as asked, or the usual ones, or as many as the context holds and a note of that.

    Raises:
        BitternError: for more than the context when they were asked for, naming both.
    """
    context = context_length(config)
    if asked is not None:
        if context is not None and asked > context:
            raise BitternError(f"seqlen {asked}: this model's context is {context} tokens")
        return asked, []
    if context is None or context >= usual:
        return usual, []
    return context, [f"windows of {context} tokens: the model's context is no longer"]


_PADDED_POSITIONS = ("roberta", "camembert", "data2vec-text", "xmod")


def context_length(config: PretrainedConfig) -> int | None:
    """Tokens that a model was made for; None where its config sets no limit (ALiBi, state spaces)."""
    text = config.get_text_config(decoder=True)
    for key in ("max_position_embeddings", "n_positions", "max_seq_len"):
        value = getattr(text, key, None)
        if isinstance(value, int) and value > 0:
            # RoBERTa and its kin count positions from behind that of padding on.
            padded = any(name in text.model_type for name in _PADDED_POSITIONS)
            return value - 1 - (text.pad_token_id or 0) if padded else value
    return None


def check_same_tokens(tokenizer: PreTrainedTokenizerBase, base: PreTrainedTokenizerBase, ids: Tensor) -> None:
    """Refuse ids that mean something else to a base: predictions of different tokens cannot be compared.

    Raises:
        BitternError: naming the first such id and what it is to both.
    """
    for token in ids.unique().tolist():  # type: ignore[no-untyped-call]
        here, there = (each.convert_ids_to_tokens(token) for each in (tokenizer, base))
        if here != there:
            raise BitternError(
                f"--against {base.name_or_path}: token {token} is {there!r} to its tokenizer, {here!r} to the model's"
            )


def check_vocabulary(ids: Tensor, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Refuse ids that the model has no embedding for, the mark of a wrong tokenizer.

    Raises:
        BitternError: naming the tokenizer, the largest id and the size of the model's vocabulary.
    """
    largest = int(torch.max(ids))
    if largest >= vocab_size:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise BitternError(
            f"tokenizer {tokenizer.name_or_path!r} ({len(tokenizer)} tokens) does not fit the model: token {token!r} "
            f"has id {largest}, the model's vocabulary has {vocab_size}"
        )
