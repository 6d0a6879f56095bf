"""Text that a model writes itself, to calibrate or train on: from nothing, or from where a text is cut off."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bittern import replay
from bittern.errors import BitternError
from bittern.runtime import attention
from bittern.runtime.cache import new_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Sampled = Callable[[int, int], None]

_TEXTS = (32, 256)  # that a model writes at once, at least and at most
_PIECE = 128  # of a vocabulary
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

    Where products in bfloat16 are faster than those of the model, a copy in bfloat16 writes.

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
    from transformers import LogitsProcessorList

    kept = None
    if model.dtype == torch.float32 and replay.fast_in_sixteen_bits(model.device):
        model = copy.deepcopy(model).bfloat16()
        implementation = attention.use(model)
        if model.device.type == "cpu" and implementation == attention.NAME:
            kept = torch.float32  # attention of one query is two to three times as fast
    config = model.config.get_text_config(decoder=True)
    cached = 2 * (kept or model.dtype).itemsize * config.num_hidden_layers * config.hidden_size * seqlen  # at most
    together = min(_TEXTS[1], max(_TEXTS[0], min(_SCORES // config.vocab_size, _CACHE // cached)))
    taken = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {}
    if "logits_to_keep" in taken:
        options["logits_to_keep"] = torch.tensor([-1])  # as indices: see runtime/step.py
    total = sum(map(len, prompts))
    texts: list[Tensor] = []
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.inference_mode():
        torch.manual_seed(seed)
        for prompt in (part for each in prompts for part in each.split(together)):  # type: ignore[no-untyped-call]
            prompt = prompt.to(model.device)
            if "past_key_values" in taken and not model._is_stateful:
                options["past_key_values"] = new_cache(model.config, seqlen, kept=kept)
            written = model.generate(  # type: ignore[operator]
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,  # but of one token
                logits_processor=LogitsProcessorList([_draw]),
                repetition_penalty=1.0,
                max_new_tokens=seqlen - prompt.shape[1],
                eos_token_id=None,
                pad_token_id=0,
                **options,
            )
            texts.append(written.cpu())
            if on_sampled is not None:
                on_sampled(sum(map(len, texts)), total)
    return torch.cat(texts)


def _draw(_: Tensor, scores: Tensor) -> Tensor:
    """A one in the place of one token of each row, drawn with its probability by its logits, and zeros.

    By inversion, in two steps: torch.multinomial takes fifteen times as long over a vocabulary of 32000, and sums over
    the whole of it twice as long as those of pieces.
    """
    mass = nn.functional.pad(scores.float().softmax(-1), (0, -scores.shape[1] % _PIECE))
    mass = mass.view(len(mass), -1, _PIECE)
    sums = mass.sum(-1).cumsum(-1)
    if not bool(torch.isfinite(sums[:, -1]).all()):
        raise BitternError("text of the model's own: expected logits, found NaN or infinity")
    point = torch.rand(len(scores), 1, device=scores.device) * sums[:, -1:]
    piece = _reached(sums, point)
    before = nn.functional.pad(sums, (1, 0)).gather(1, piece)
    inside = mass.take_along_dim(piece[..., None], 1).squeeze(1).cumsum(-1)
    drawn = piece * _PIECE + _reached(inside, point - before)
    return torch.zeros_like(scores, dtype=torch.uint8).scatter_(1, drawn, 1)


def _reached(sums: Tensor, points: Tensor) -> Tensor:
    """Of each row of growing sums, the first that is more than the row's point, int64 (rows, 1).

    Points that rounding has brought to the last sum stand for what is just below it, so nothing of no mass is found.
    """
    below = torch.nextafter(sums[:, -1:], torch.zeros_like(points))
    return torch.searchsorted(sums, torch.minimum(points, below), right=True)
