"""From a prompt to text: prefill, a KV cache, one token at a time, text as soon as it is certain."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from bittern.errors import BitternError
from bittern.rope import longrope_turn
from bittern.runtime.cache import TYPES
from bittern.runtime.step import can_batch, make_step, native_decoder
from bittern.runtime.stream import TextStream
from bittern.tokenizer import check_vocabulary, context_length, rendering

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Reason = Literal["eos", "stop", "length"]
# Keys of a generation config that change what comes and are not honoured, and their values that change nothing. How
# to sample is for the options alone to say.
_NOT_HONOURED: dict[str, Any] = {
    **dict.fromkeys(("bad_words_ids", "begin_suppress_tokens", "exponential_decay_length_penalty")),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "sequence_bias", "suppress_tokens")),
    **dict.fromkeys(("dola_layers", "penalty_alpha", "stop_strings", "watermarking_config")),
    **dict.fromkeys(("encoder_no_repeat_ngram_size", "min_length", "min_new_tokens", "no_repeat_ngram_size"), 0),
    **dict.fromkeys(("encoder_repetition_penalty", "guidance_scale", "num_beams"), 1),
}


@dataclass(frozen=True)
class GenerationOptions:
    """How to choose tokens and when to end.

    Attributes:
        max_new_tokens: at most this many; None goes on until the model's context is full.
        temperature: 0 takes the likeliest token, above that tokens are sampled.
        top_k: sample among the K likeliest tokens.
        top_p: sample among the likeliest tokens whose probabilities first reach this sum.
        repetition_penalty: divides the positive logits of tokens seen before, multiplies negative ones. None is that of
            the model's generation config, and 1 where it has none.
        stop: end before any of these texts.
        seed: of the sampling; the same on every device.
        ignore_eos: go on after an end-of-sequence token.
        kv_cache: how keys and values are kept: "fp32", "bf16", or "int8" with a scale per position and head. None is
            the dtype that the model computes in.

    Raises:
        BitternError: naming the option that is out of range or of another type.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    stop: tuple[str, ...] = ()
    seed: int = 0
    ignore_eos: bool = False
    kv_cache: str | None = None

    def __post_init__(self) -> None:
        checks = {
            "max_new_tokens: expected a whole number of at least 1": _is_count(self.max_new_tokens),
            "temperature: expected at least 0": 0 <= self.temperature < float("inf"),
            "top_k: expected a whole number of at least 1": _is_count(self.top_k),
            "top_p: expected more than 0 and at most 1": self.top_p is None or 0 < self.top_p <= 1,
            "repetition_penalty: expected more than 0": self.repetition_penalty is None
            or 0 < self.repetition_penalty < float("inf"),
            "stop: expected texts that are not empty": _are_texts(self.stop),
            "seed: expected a whole number of 64 bits": isinstance(self.seed, Integral)
            and -(2**63) <= self.seed < 2**64,
            f"kv_cache: expected one of {', '.join(TYPES)}": self.kv_cache in (None, *TYPES),
        }
        for message, holds in checks.items():
            if not holds:
                raise BitternError(f"{message}, found {getattr(self, message.partition(':')[0])!r}")
        for name in ("top_k", "top_p"):
            if getattr(self, name) is not None and not self.temperature:
                raise BitternError(f"{name}: needs a temperature above 0; at 0 the likeliest token is taken")


def _is_count(value: object) -> bool:
    return value is None or (isinstance(value, Integral) and int(value) >= 1)


def _are_texts(values: object) -> bool:
    if not isinstance(values, Collection) or isinstance(values, str):
        return False
    return all(isinstance(value, str) and value for value in values)


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
            In a batch, both are this sequence's tokens over a time that all of them shared.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: Reason
    prompt_tokens: int
    new_tokens: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float


# Not inference mode: layers that share their input recognize it by its version, which tensors of that mode lack.
@torch.no_grad()
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
    return _generate(model, tokenizer, [_one_prompt(input_ids)], options, on_text)[0]


@torch.no_grad()
def generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Tensor],
    options: GenerationOptions,
) -> list[GenerationResult]:
    """Continue several prompts side by side; the results are those of :func:`generate` one by one, up to rounding.

    Models that cannot be padded (state spaces, convolutions), and prompts that together would leave the context, run
    one after the other.

    Args:
        prompts: int64 (prompt tokens,) or (1, prompt tokens) each, of any lengths.
        model, tokenizer, options: as in :func:`generate`; every sequence is sampled with the same seed.

    Raises:
        BitternError: as :func:`generate`.
    """
    ids = [_one_prompt(prompt) for prompt in prompts]
    rooms = [_room(model, tokenizer, prompt, options) for prompt in ids]
    limit = None if native_decoder(model) is not None else context_length(model.config)
    # Shorter prompts are filled up to the longest one, and go on as long as the one with most room.
    longest = max(map(len, ids)) + max(rooms) if ids else 0
    fits = bool(ids) and (limit is None or longest <= limit)
    turn = longrope_turn(model.config)  # one that is longer has all of them turned as it needs it
    fits = fits and (turn is None or longest <= turn or len(ids) == 1)
    together = [ids] if fits and can_batch(model) else [[prompt] for prompt in ids]
    return [result for some in together for result in _generate(model, tokenizer, some, options, _unheard)]


def _one_prompt(input_ids: Tensor) -> list[int]:
    """The tokens of a tensor that holds one prompt."""
    if input_ids.ndim not in (1, 2) or (input_ids.ndim == 2 and len(input_ids) != 1):
        raise BitternError(
            f"input_ids: expected one prompt, found shape {tuple(input_ids.shape)}; generate_batch takes a list of them"
        )
    ids: list[int] = input_ids.reshape(-1).tolist()
    return ids


def _unheard(text: str) -> None:
    """Text that only the result carries."""


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    options: GenerationOptions,
    on_text: Callable[[str], None],
) -> list[GenerationResult]:
    rooms = [_room(model, tokenizer, prompt, options) for prompt in prompts]
    if options.repetition_penalty is None:
        options = replace(options, repetition_penalty=_stored_penalty(model))
    ends: dict[int, Reason] = {} if options.ignore_eos else dict.fromkeys(_eos_ids(model, tokenizer), "eos")
    ends |= dict.fromkeys(_special_ids(tokenizer, options.stop) - ends.keys(), "stop")
    sequences = [
        _Sequence(tokenizer, prompt, options, room, ends, on_text) for prompt, room in zip(prompts, rooms, strict=True)
    ]
    step = make_step(model, prompts, rooms, options.kv_cache)
    started = perf_counter()
    chosen = [sequence.choose(row) for sequence, row in zip(sequences, step(prompts), strict=True)]
    decoding = perf_counter()
    while True:
        for sequence, token in zip(sequences, chosen, strict=True):
            if sequence.reason is None:
                sequence.add(token)
        if all(sequence.reason is not None for sequence in sequences):
            break
        logits = step([[] if sequence.reason else [sequence.tokens[-1]] for sequence in sequences])
        chosen = [
            0 if sequence.reason else sequence.choose(row) for sequence, row in zip(sequences, logits, strict=True)
        ]
    return [sequence.result(started, decoding) for sequence in sequences]


class _Sequence:
    """One prompt and what has come of it."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: list[int],
        options: GenerationOptions,
        room: int,
        ends: dict[int, Reason],
        on_text: Callable[[str], None],
    ) -> None:
        self.tokens: list[int] = []
        self.reason: Reason | None = None
        self.choose = _Chooser(prompt, options)
        self._stream = TextStream(tokenizer, prompt, options.stop)
        self._prompt, self._room, self._ends, self._on_text = prompt, room, ends, on_text
        self._pieces: list[str] = []
        self._steps = -1
        self._ended = 0.0

    def add(self, token: int) -> None:
        """Take the next token, which may be the last one."""
        self._steps += 1
        if token in self._ends:
            self.reason = self._ends[token]
        else:
            self.tokens.append(token)
            self._show(self._stream.add(token))
            if self._stream.stopped:
                self.reason = "stop"
            elif len(self.tokens) == self._room:
                self.reason = "length"
        if self.reason is not None:
            self._ended = perf_counter()
            self._show(self._stream.finish())
            if self._stream.stopped:  # before a character that was never whole
                self.reason = "stop"

    def result(self, started: float, decoding: float) -> GenerationResult:
        """What came of it, from the times when the prompts began and when their first tokens were there."""
        assert self.reason is not None
        return GenerationResult(
            text="".join(self._pieces),
            token_ids=tuple(self.tokens),
            finish_reason=self.reason,
            prompt_tokens=len(self._prompt),
            new_tokens=len(self.tokens),
            prefill_tokens_per_second=len(self._prompt) / (decoding - started),
            decode_tokens_per_second=self._steps / (self._ended - decoding) if self._steps else 0.0,
        )

    def _show(self, piece: str) -> None:
        if piece:
            self._pieces.append(piece)
            self._on_text(piece)


def chat_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> Tensor:
    """Token ids, int64 (1, tokens), that ask the model for the next message of a chat.

    Args:
        tokenizer: one with a chat template.
        messages: dictionaries with ``role`` and ``content``.

    Raises:
        BitternError: when the tokenizer has no chat template, or when that refuses the messages.
    """
    if tokenizer.chat_template is None:
        raise BitternError(f"{tokenizer.name_or_path}: the tokenizer has no chat template")
    with rendering(f"{tokenizer.name_or_path}: its chat template refuses these messages"):
        encoded: Any = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
    ids: Tensor = encoded["input_ids"]
    return ids


def room_beside(model: PreTrainedModel, prompt_tokens: int, wanted: int) -> int:
    """How many new tokens a model's context holds beside a prompt: ``wanted`` at most, and one at least."""
    limit = context_length(model.config)
    return wanted if limit is None else max(1, min(wanted, limit - prompt_tokens))


def _room(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: list[int], options: GenerationOptions
) -> int:
    """How many tokens to generate at most."""
    if not prompt:
        raise BitternError("prompt: expected at least one token, found none")
    size = model.config.get_text_config(decoder=True).vocab_size
    check_vocabulary(torch.tensor(prompt, device="cpu"), tokenizer, size)
    limit = context_length(model.config)
    if limit is None:
        if options.max_new_tokens is None:
            raise BitternError(f"max_new_tokens: a {model.config.model_type} model has no context limit, set a number")
        return options.max_new_tokens
    if len(prompt) >= limit:
        raise BitternError(f"prompt: {len(prompt)} tokens leave no room in a context of {limit}")
    wanted = options.max_new_tokens or limit - len(prompt)
    if len(prompt) + wanted > limit:
        raise BitternError(
            f"max_new_tokens: {len(prompt)} prompt tokens and {wanted} new ones do not fit a context of {limit}"
        )
    return wanted


def not_honoured(model: PreTrainedModel) -> list[str]:
    """Keys of a model's generation config that change what comes and that :func:`generate` does not honour."""
    found = {name: getattr(model.generation_config, name, None) for name in _NOT_HONOURED}
    return sorted(name for name, value in found.items() if value not in (None, _NOT_HONOURED[name], [], {}))


def _stored_penalty(model: PreTrainedModel) -> float:
    found = getattr(model.generation_config, "repetition_penalty", None)
    if found is not None and not (isinstance(found, int | float) and 0 < found < float("inf")):
        raise BitternError(f"generation config: repetition_penalty: expected more than 0, found {found!r}")
    return 1.0 if found is None else float(found)


def _eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    for holder in (model.generation_config, model.config, tokenizer):
        found = getattr(holder, "eos_token_id", None)
        if found is not None:
            ids = found if isinstance(found, list) else [found]
            if not all(isinstance(each, int) for each in ids):
                raise BitternError(f"eos_token_id: expected the number of a token, or several, found {found!r}")
            return set(ids)
    return set()


def _special_ids(tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> set[int]:
    """Of stop texts that are special tokens: those never come as text."""
    added = tokenizer.added_tokens_decoder if stop else {}
    return {number for number, token in added.items() if token.special and token.content in stop}


class _Chooser:
    """The next token from logits, fp32 (vocabulary,) on the CPU."""

    def __init__(self, prompt: list[int], options: GenerationOptions) -> None:
        self._options, self._penalty = options, options.repetition_penalty or 1.0
        self._seen = torch.tensor(sorted(set(prompt)), device="cpu")
        self._generator = torch.Generator().manual_seed(options.seed)

    def __call__(self, logits: Tensor) -> int:
        penalty = self._penalty
        if penalty != 1:
            scores = logits[self._seen]
            logits = logits.index_copy(0, self._seen, torch.where(scores > 0, scores / penalty, scores * penalty))
        # NumPy's argmax is many times as fast as torch's, and stops at a NaN.
        token = int(logits.numpy().argmax())
        if not bool(logits[token].isfinite()):
            raise BitternError(f"logits: the model computed {str(float(logits[token])).replace('nan', 'NaN')}")
        if self._options.temperature != 0:
            token = self._sample(logits)
        if penalty != 1:
            self._seen = torch.cat([self._seen, self._seen.new_tensor([token])]).unique()  # type: ignore[no-untyped-call]
        return token

    def _sample(self, logits: Tensor) -> int:
        options, tokens = self._options, None
        if options.top_k is not None and options.top_k < logits.numel():
            logits, tokens = logits.topk(options.top_k)
        # The largest is subtracted first, and all divided in float64, so that a tiny temperature overflows nothing.
        probabilities = ((logits - logits.max()).double() / options.temperature).softmax(dim=0)
        if options.top_p is not None and options.top_p < 1:
            probabilities, order = probabilities.sort(descending=True)
            tokens = order if tokens is None else tokens[order]
            before = probabilities.cumsum(dim=0) - probabilities
            probabilities[before >= options.top_p] = 0
        # The inverse of the distribution function; torch.multinomial draws a number for every token.
        cumulative = probabilities.cumsum(dim=0, dtype=torch.float64)
        drawn = torch.rand(1, dtype=torch.float64, generator=self._generator, device="cpu") * cumulative[-1]
        found = min(int(torch.searchsorted(cumulative, drawn, right=True)), len(cumulative) - 1)
        return found if tokens is None else int(tokens[found])
