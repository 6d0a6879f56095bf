"""From a prompt to text: prefill, a KV cache, one token at a time, text as soon as it is certain."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from bittern.errors import BitternError
from bittern.tokenizer import check_vocabulary, context_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class GenerationOptions:
    """How to choose tokens and when to end.

    Attributes:
        max_new_tokens: at most this many; None goes on until the model's context is full.
        temperature: 0 takes the likeliest token, above that tokens are sampled.
        top_k: sample among the K likeliest tokens.
        top_p: sample among the likeliest tokens whose probabilities first reach this sum.
        repetition_penalty: divides the positive logits of tokens seen before, multiplies negative ones.
        stop: end before any of these texts.
        seed: of the sampling; the same on every device.
        ignore_eos: go on after an end-of-sequence token.

    Raises:
        BitternError: naming the option that is out of range.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        checks = {
            "max_new_tokens: expected at least 1": self.max_new_tokens is None or self.max_new_tokens >= 1,
            "temperature: expected at least 0": 0 <= self.temperature < float("inf"),
            "top_k: expected at least 1": self.top_k is None or self.top_k >= 1,
            "top_p: expected more than 0 and at most 1": self.top_p is None or 0 < self.top_p <= 1,
            "repetition_penalty: expected more than 0": 0 < self.repetition_penalty < float("inf"),
            "stop: expected texts that are not empty": all(self.stop),
        }
        for message, holds in checks.items():
            if not holds:
                raise BitternError(f"{message}, found {getattr(self, message.partition(':')[0])!r}")


@dataclass(frozen=True)
class GenerationResult:
    """What came of a prompt.

    Attributes:
        text: the continuation, without stop text and without special tokens.
        token_ids: the new tokens, without the end-of-sequence token.
        finish_reason: "eos", "stop" or "length".
        prompt_tokens, new_tokens: their numbers.
        prefill_tokens_per_second: prompt tokens over the time to the first new token.
        decode_tokens_per_second: tokens after the first one over the time they took; 0 if there were none.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: Literal["eos", "stop", "length"]
    prompt_tokens: int
    new_tokens: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: Tensor,
    options: GenerationOptions,
    on_text: Callable[[str], None],
) -> GenerationResult:
    """Continue one prompt.

    Args:
        model: any transformers decoder, from :func:`bittern.load` or not.
        tokenizer: its tokenizer.
        input_ids: int64 (prompt tokens,) or (1, prompt tokens).
        options: how to choose tokens and when to end.
        on_text: called with pieces of the text as they become certain; joined they are the result's text.

    Raises:
        BitternError: for an empty prompt, one that leaves no room in the model's context, tokens
            that the model does not have, or logits that are NaN.
    """
    prompt = input_ids.reshape(-1).tolist()
    room = _room(model, tokenizer, prompt, options)
    step = _step(model, capacity=len(prompt) + room)
    choose = _Chooser(prompt, options)
    stream = _TextStream(tokenizer, prompt, options.stop)
    ends = set() if options.ignore_eos else _eos_ids(model, tokenizer)
    tokens: list[int] = []
    pieces: list[str] = []
    steps = 0

    def show(piece: str) -> None:
        if piece:
            pieces.append(piece)
            on_text(piece)

    started = perf_counter()
    token = choose(step(prompt))
    decoding = perf_counter()
    while True:
        if token in ends:
            reason: Literal["eos", "stop", "length"] = "eos"
            break
        tokens.append(token)
        show(stream.add(token))
        if stream.stopped or len(tokens) == room:
            reason = "stop" if stream.stopped else "length"
            break
        token = choose(step([token]))
        steps += 1
    ended = perf_counter()
    show(stream.finish())
    return GenerationResult(
        text="".join(pieces),
        token_ids=tuple(tokens),
        finish_reason=reason,
        prompt_tokens=len(prompt),
        new_tokens=len(tokens),
        prefill_tokens_per_second=len(prompt) / (decoding - started),
        decode_tokens_per_second=steps / (ended - decoding) if steps else 0.0,
    )


def chat_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> Tensor:
    """Token ids, int64 (1, tokens), that ask the model for the next message of a chat.

    Args:
        tokenizer: one with a chat template.
        messages: dictionaries with ``role`` and ``content``.

    Raises:
        BitternError: when the tokenizer has no chat template, or when that refuses the messages.
    """
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise BitternError(f"{tokenizer.name_or_path}: the tokenizer has no chat template")
    try:
        encoded: Any = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
    except TemplateError as error:
        raise BitternError(f"{tokenizer.name_or_path}: its chat template refuses these messages: {error}") from error
    ids: Tensor = encoded["input_ids"]
    return ids


def _room(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: list[int], options: GenerationOptions
) -> int:
    """How many tokens to generate at most."""
    if not prompt:
        raise BitternError("prompt: expected at least one token, found none")
    check_vocabulary(torch.tensor(prompt), tokenizer, model.config.get_text_config(decoder=True).vocab_size)
    limit = context_length(model.config)
    if limit is None:
        if options.max_new_tokens is None:
            raise BitternError(f"max_new_tokens: a {model.config.model_type} model has no context limit, set a number")
        return options.max_new_tokens
    wanted = options.max_new_tokens or max(1, limit - len(prompt))
    if len(prompt) + wanted > limit:
        raise BitternError(
            f"max_new_tokens: {len(prompt)} prompt tokens and {wanted} new ones do not fit a context of {limit}"
        )
    return wanted


def _step(model: PreTrainedModel, capacity: int) -> Callable[[list[int]], Tensor]:
    """A function that appends tokens to the context and returns the last one's logits, fp32 (vocabulary,) on CPU."""
    from bittern.runtime.cache import new_cache

    parameters = inspect.signature(model.forward).parameters
    # State-space models call their cache by another name.
    name = "cache_params" if "cache_params" in parameters else "past_key_values"
    fixed: dict[str, Any] = {name: new_cache(model.config, capacity), "use_cache": True}
    if "logits_to_keep" in parameters:
        fixed["logits_to_keep"] = 1

    def step(tokens: list[int]) -> Tensor:
        logits: Tensor = model(torch.tensor([tokens], device=model.device), **fixed).logits[0, -1]
        logits = logits.float().cpu()
        if bool(logits.isnan().any()):
            raise BitternError("logits: the model computed NaN")
        return logits

    return step


def _eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    for holder in (model.generation_config, model.config, tokenizer):
        found = getattr(holder, "eos_token_id", None)
        if found is not None:
            return set(found) if isinstance(found, list) else {found}
    return set()


class _Chooser:
    """The next token from logits, of shape (vocabulary,)."""

    def __init__(self, prompt: list[int], options: GenerationOptions) -> None:
        self._options = options
        self._seen = torch.tensor(sorted(set(prompt)))
        self._generator = torch.Generator().manual_seed(options.seed)

    def __call__(self, logits: Tensor) -> int:
        options = self._options
        if options.repetition_penalty != 1:
            scores = logits[self._seen]
            penalty = options.repetition_penalty
            logits = logits.index_copy(0, self._seen, torch.where(scores > 0, scores / penalty, scores * penalty))
        token = int(logits.argmax()) if options.temperature == 0 else self._sample(logits)
        if options.repetition_penalty != 1:
            self._seen = torch.cat([self._seen, torch.tensor([token])]).unique()  # type: ignore[no-untyped-call]
        return token

    def _sample(self, logits: Tensor) -> int:
        options = self._options
        # Subtracting the largest first keeps a tiny temperature from overflowing.
        logits = (logits - logits.max()) / options.temperature
        if options.top_k is not None and options.top_k < logits.numel():
            kept = logits.topk(options.top_k)
            logits = torch.full_like(logits, -torch.inf).index_copy(0, kept.indices, kept.values)
        probabilities = logits.softmax(dim=0)
        if options.top_p is not None and options.top_p < 1:
            ordered, order = probabilities.sort(descending=True)
            before = ordered.cumsum(dim=0) - ordered
            ordered[before >= options.top_p] = 0
            probabilities = torch.zeros_like(probabilities).index_copy(0, order, ordered)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))


class _TextStream:
    """Tokens in, text out, in pieces that end neither inside a character nor inside a stop text."""

    _CONTEXT = 16  # prompt tokens that the first new ones are decoded after

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: list[int], stop: tuple[str, ...]) -> None:
        self._tokenizer = tokenizer
        self._ids = prompt[-self._CONTEXT :]
        self._read = len(self._ids)  # how many of them the text so far covers
        self._stop = stop
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that has become certain with this token."""
        self._ids.append(token)
        # Tokenizers join words by what stands before them, so new tokens are decoded behind old ones.
        before = self._decode(self._ids[: self._read]).rstrip("\ufffd")
        now = self._decode(self._ids)
        if now.endswith("\ufffd"):  # the first bytes of a character
            return ""
        new = now[len(before) :]
        if new:
            self._ids = self._ids[self._read :]
        self._read = len(self._ids)
        return self._certain(new)

    def finish(self) -> str:
        """What was held back because a stop text could have begun there."""
        rest, self._held = self._held, ""
        return rest

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def _certain(self, new: str) -> str:
        text = self._held + new
        found = [start for start in map(text.find, self._stop) if start >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max(
            (size for stop in self._stop for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0
        )
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]
