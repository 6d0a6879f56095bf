"""Greedy decoding with a transformers model in a bare loop, which costs less than its own generate."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache


@torch.inference_mode()
def decode(model: Any, ids: list[int], new: int) -> dict[str, Any]:
    """Greedy tokens after ``ids``: the first one's time is the prefill's, the rate is of the ``new`` - 1 others."""
    cache = DynamicCache(config=model.config)
    started = time.perf_counter()
    token = _next(model, torch.tensor([ids]), cache)
    decoding = time.perf_counter()
    tokens = [int(token)]
    while len(tokens) < new:
        token = _next(model, token, cache)
        tokens.append(int(token))
    seconds = time.perf_counter() - decoding
    return {"tokens": tokens, "prefill_s": decoding - started, "decode_tokens_per_s": (new - 1) / seconds}


@torch.inference_mode()
def prefill(model: Any, ids: list[int]) -> dict[str, Any]:
    """Prompt tokens over the time to the first new token."""
    started = time.perf_counter()
    int(_next(model, torch.tensor([ids]), DynamicCache(config=model.config)))
    return {"tokens_per_s": len(ids) / (time.perf_counter() - started)}


def _next(model: Any, ids: Tensor, cache: DynamicCache) -> Tensor:
    """Append ids, int64 (1, tokens), to the cache; the likeliest next one, (1, 1)."""
    logits: Tensor = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return logits[:, -1:].argmax(-1)
