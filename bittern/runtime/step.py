"""One forward pass of several sequences: tokens in, the logits that choose the next ones out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from bittern.errors import BitternError
from bittern.runtime.cache import new_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from bittern.runtime.decoder import Decoder

Step = Callable[[Sequence[Sequence[int]]], Tensor]
_AHEAD = 4096  # tokens that torch's cache has room for beyond the prompts at first; more of them double it
# Models whose forward takes no positions because distances are all they look at.
_RELATIVE = ("bloom", "mpt")
_PADDED_LAYERS = ("full_attention", "sliding_attention")


def native_decoder(model: PreTrainedModel) -> Decoder | None:
    """What :func:`bittern.load` attached to a model whose tensors still are what they were then."""
    found = cast("Decoder | None", vars(model).get("native_decoder"))
    return found if found is not None and found.fits(model) else None


def can_batch(model: PreTrainedModel) -> bool:
    """Whether sequences of unequal length can be computed side by side."""
    if native_decoder(model) is not None:
        return True
    parameters, config = inspect.signature(model.forward).parameters, model.config.get_text_config(decoder=True)
    placed = "position_ids" in parameters or config.model_type in _RELATIVE
    kinds = getattr(config, "layer_types", None) or ()
    return (
        "attention_mask" in parameters
        and "past_key_values" in parameters
        and placed
        and not model._is_stateful
        and all(kind in _PADDED_LAYERS for kind in kinds)
    )


def make_step(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], rooms: Sequence[int], kv_cache: str | None
) -> Step:
    """A function that appends tokens to sequences.

    Args:
        model: where it computes natively, that is used.
        prompts: what the first call is going to append; later ones append one token or none to each.
        rooms: for each of them, how many tokens may follow.
        kv_cache: how keys and values are kept, as in GenerationOptions.

    Returns:
        From new tokens by sequence to the logits after the last of them, fp32 (sequences, vocabulary) on the CPU;
        rows of sequences without new tokens hold anything.
    """
    turn = longrope_turn(model)
    if turn is not None and len(prompts) == 1:
        return _begun_anew(turn, lambda: _plain_step(model, prompts, rooms, kv_cache))
    return _plain_step(model, prompts, rooms, kv_cache)


def longrope_turn(model: PreTrainedModel) -> int | None:
    """The length beyond which LongRoPE turns all keys by other angles than up to it; None for other kinds of RoPE."""
    config = model.config.get_text_config(decoder=True)
    found = getattr(config, "rope_parameters", None) or {}
    kinds = [found, *(each for each in found.values() if isinstance(each, dict))]
    return next(
        (int(each["original_max_position_embeddings"]) for each in kinds if each.get("rope_type") == "longrope"), None
    )


def _begun_anew(turn: int, make: Callable[[], Step]) -> Step:
    """A step for one sequence that computes all of it once more where it passes ``turn``, as transformers does.

    The keys in the cache were turned by the angles of a short one.
    """
    step = make()
    tokens: list[int] = []

    def forward(new: Sequence[Sequence[int]]) -> Tensor:
        nonlocal step
        before = len(tokens)
        tokens.extend(new[0])
        if not 0 < before <= turn < len(tokens):
            return step(new)
        step = make()
        return step([tokens])

    return forward


def _plain_step(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], rooms: Sequence[int], kv_cache: str | None
) -> Step:
    """As :func:`make_step`, whatever becomes of RoPE."""
    decoder = native_decoder(model)
    if decoder is not None:
        longest = max(len(prompt) + room for prompt, room in zip(prompts, rooms, strict=True))
        cache = decoder.new_cache(len(prompts), longest, cast(Any, kv_cache or "fp32"))
        return lambda tokens: decoder.forward(cache, tokens)
    if kv_cache == "fp32" and model.dtype != torch.float32:
        raise BitternError(f"kv_cache: fp32 is for a model that computes in fp32, found {model.dtype}; leave it out")
    width = max(map(len, prompts))
    capacity = width + max(rooms)
    parameters = inspect.signature(model.forward).parameters
    # State-space models call their cache by another name.
    name = "cache_params" if "cache_params" in parameters else "past_key_values"
    fixed: dict[str, Any] = {name: new_cache(model.config, min(capacity, width + _AHEAD), kv_cache), "use_cache": True}
    if "logits_to_keep" in parameters:
        # A slice of several sequences is not contiguous: in bfloat16, torch would multiply each of its rows with a copy
        # of the head. Indices copy the positions instead.
        fixed["logits_to_keep"] = 1 if len(prompts) == 1 else torch.tensor([-1])
    if len({len(prompt) for prompt in prompts}) == 1:
        return lambda tokens: _last_logits(model, torch.tensor([new or [0] for new in tokens]), fixed)
    return _padded_step(model, prompts, capacity, fixed, "position_ids" in parameters)


def _padded_step(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], capacity: int, fixed: dict[str, Any], placed: bool
) -> Step:
    """Sequences side by side in one batch, the shorter ones filled up on the left."""
    width, used = max(map(len, prompts)), 0
    missing = torch.tensor([width - len(prompt) for prompt in prompts])[:, None]
    columns = torch.arange(capacity)[None]
    mask = (columns >= missing).long().to(model.device)
    positions = (columns - missing).clamp_min(0).to(model.device)

    def step(tokens: Sequence[Sequence[int]]) -> Tensor:
        nonlocal used
        count = max(map(len, tokens))
        ids = torch.tensor([[0] * (count - len(new)) + list(new) for new in tokens])
        start, used = used, used + count
        here = {"position_ids": positions[:, start:used]} if placed else {}
        return _last_logits(model, ids, {**fixed, **here, "attention_mask": mask[:, :used]})

    return step


def _last_logits(model: PreTrainedModel, ids: Tensor, options: dict[str, Any]) -> Tensor:
    logits: Tensor = model(ids.to(model.device), **options).logits[:, -1]
    return logits.float().cpu()
