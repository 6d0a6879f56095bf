"""Text that a model writes itself, to calibrate or train on: from nothing, or from where a text is cut off."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bittern import replay
from bittern.errors import BitternError
from bittern.runtime import attention, native
from bittern.runtime.cache import new_cache
from bittern.weight import naming, round_to_nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from bittern.runtime.decoder import Decoder

Sampled = Callable[[int, int], None]

_TEXTS = (32, 256)  # that a model writes at once, at least and at most
_PIECE = 128  # of a vocabulary
_AT_ONCE = 1 << 20  # scores on a CPU: they stay in its cache
_SCORES, _CACHE = 1 << 23, 2 << 30  # more than the least while they have no more scores, and bytes of cache


def writer(model: PreTrainedModel | Callable[[], PreTrainedModel] | None, chat_template: bool) -> PreTrainedModel:
    """The model that writes its own text."""
    from transformers import PreTrainedModel

    if chat_template:
        raise BitternError("--chat-template: needs a dataset with messages, found --dataset self")
    if model is None:
        raise BitternError("--dataset self: needs the whole model to write the text, found none")
    return model if isinstance(model, PreTrainedModel) else model()


def beginnings(tokenizer: PreTrainedTokenizerBase, count: int) -> Tensor:
    """What texts of a model's own begin with, BOS or for want of it EOS: int64 (count, 1)."""
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise BitternError("--dataset self: the tokenizer has neither a BOS nor an EOS token to begin with")
    return torch.full((count, 1), first)


def write_on(
    model: PreTrainedModel, prompts: Sequence[Tensor], seqlen: int, seed: int, on_sampled: Sampled | None = None
) -> Tensor:
    """How a model goes on with texts, at temperature 1 and never stopping at EOS.

    Where the native library computes the whole model, a copy with matrices of 8 bits writes; else, where products in
    bfloat16 are faster than those of the model, a copy in bfloat16.

    Args:
        model: in memory.
        prompts: int64 (texts, tokens) each, less than ``seqlen`` tokens.
        seqlen: tokens of the whole, prompts included.
        seed: of the sampling; nobody else's randomness is touched.
        on_sampled: called with the texts that are written and their number.

    Returns:
        int64 (texts, seqlen), in the order of the prompts.

    Raises:
        BitternError: when its logits are not numbers.
    """
    decoder = _rounded(model)
    kept = torch.bfloat16 if decoder is not None else None
    if decoder is None and model.dtype == torch.float32 and replay.fast_in_sixteen_bits(model.device):
        model = copy.deepcopy(model).bfloat16()
        implementation = attention.use(model)
        if model.device.type == "cpu" and implementation == attention.NAME:
            kept = torch.float32  # attention of one query is two to three times as fast
    config = model.config.get_text_config(decoder=True)
    cached = 2 * (kept or model.dtype).itemsize * config.num_hidden_layers * config.hidden_size * seqlen  # at most
    together = min(_TEXTS[1], max(_TEXTS[0], min(_SCORES // config.vocab_size, _CACHE // cached)))
    total = sum(map(len, prompts))
    texts: list[Tensor] = []
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.inference_mode():
        torch.manual_seed(seed)
        for prompt in (part for each in prompts for part in each.split(together)):  # type: ignore[no-untyped-call]
            if decoder is not None:
                texts.append(_write_natively(decoder, prompt, seqlen))
            else:
                texts.append(_write(model, prompt, seqlen, kept))
            if on_sampled is not None:
                on_sampled(sum(map(len, texts)), total)
    return torch.cat(texts)


def _rounded(model: PreTrainedModel) -> Decoder | None:
    """A native decoder with the model's matrices rounded to 8 bits; None where the library computes no such model."""
    if model.device.type != "cpu" or not native.available():
        return None
    from bittern.runtime.decoder import Unsupported, attach
    from bittern.runtime.ends import small_groups
    from bittern.runtime.linear import NativeMatrix, QuantLinear
    from bittern.runtime.load import attach_checked

    try:
        attach(model)  # before anything is rounded
    except Unsupported:
        return None
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    model = copy.deepcopy(model, shared)
    settings = native.Settings(threads=torch.get_num_threads())
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            with naming(name):
                weight = round_to_nearest(module.weight.detach(), small_groups(8, module.in_features))
            model.set_submodule(name, QuantLinear([NativeMatrix(weight, model.dtype, settings)], module.bias))
    return attach_checked(model, settings)[0]


def _write_natively(decoder: Decoder, prompt: Tensor, seqlen: int) -> Tensor:
    """One batch of :func:`write_on`, (texts, seqlen)."""
    cache = decoder.new_cache(len(prompt), seqlen, "bf16")
    written = [prompt]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # others would wait for more to draw, and keep the library's from their cores
    try:
        for _ in range(prompt.shape[1], seqlen):
            written.append(_draw(decoder.forward(cache, written[-1].tolist())))
    finally:
        torch.set_num_threads(threads)
    return torch.cat(written, 1)


def _write(model: PreTrainedModel, prompt: Tensor, seqlen: int, kept: torch.dtype | None) -> Tensor:
    """As :func:`_write_natively`, by transformers; ``kept`` as in :func:`bittern.runtime.cache.new_cache`."""
    from transformers import LogitsProcessorList

    prompt = prompt.to(model.device)
    taken = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {}
    if "logits_to_keep" in taken:
        options["logits_to_keep"] = torch.tensor([-1])  # as indices: see runtime/step.py
    if "past_key_values" in taken and not model._is_stateful:
        options["past_key_values"] = new_cache(model.config, seqlen, kept=kept)
    written: Tensor = model.generate(  # type: ignore[operator]
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,  # but of one token
        logits_processor=LogitsProcessorList([_only_drawn]),
        repetition_penalty=1.0,
        max_new_tokens=seqlen - prompt.shape[1],
        eos_token_id=None,
        pad_token_id=0,
        **options,
    )
    return written.cpu()


def _only_drawn(_: Tensor, scores: Tensor) -> Tensor:
    """A one in the place of the token of each row that is drawn, and zeros."""
    return torch.zeros_like(scores, dtype=torch.uint8).scatter_(1, _draw(scores), 1)


def _draw(scores: Tensor) -> Tensor:
    """One token of each row, drawn with its probability by its logits; int64 (rows, 1).

    By inversion, in two steps: torch.multinomial takes fifteen times as long over a vocabulary of 32000, and sums over
    the whole of it twice as long as those of pieces.
    """
    rows = max(1, _AT_ONCE // scores.shape[1]) if scores.is_cpu else len(scores)
    drawn = []
    for some in scores.split(rows):  # type: ignore[no-untyped-call]
        mass = some.float().softmax(-1)
        if mass.shape[1] % _PIECE:
            mass = nn.functional.pad(mass, (0, -mass.shape[1] % _PIECE))
        mass = mass.view(len(mass), -1, _PIECE)
        sums = mass.sum(-1).cumsum(-1)
        if not bool(torch.isfinite(sums[:, -1]).all()):
            raise BitternError("text of the model's own: expected logits, found NaN or infinity")
        point = torch.rand(len(some), 1, dtype=torch.float32, device=scores.device) * sums[:, -1:]
        piece = _reached(sums, point)
        before = nn.functional.pad(sums, (1, 0)).gather(1, piece)
        inside = mass.take_along_dim(piece[..., None], 1).squeeze(1).cumsum(-1)
        drawn.append(piece * _PIECE + _reached(inside, point - before))
    return torch.cat(drawn)


def _reached(sums: Tensor, points: Tensor) -> Tensor:
    """Of each row of growing sums, the first that is more than the row's point, int64 (rows, 1).

    Points that rounding has brought to the last sum stand for what is just below it, so nothing of no mass is found.
    """
    below = torch.nextafter(sums[:, -1:], torch.zeros_like(points))
    return torch.searchsorted(sums, torch.minimum(points, below), right=True)
