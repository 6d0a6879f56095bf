"""A KV cache that is allocated once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from bittern.errors import BitternError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


class PreallocatedLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values as views into buffers that a step only writes its own positions of.

    ``DynamicLayer`` copies the whole cache for every token, ``StaticLayer`` attends to positions that are
    not there yet.

    Args:
        capacity: positions to make room for; more of them double the buffers.
        kept: what they are kept and handed out in; by default as they come.
    """

    def __init__(self, capacity: int, kept: torch.dtype | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.capacity, self.kept = capacity, kept
        self._buffers: dict[int, Tensor] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (batch, heads, new positions, head_dim); all positions so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        end = length + key_states.shape[-2]
        if end > self.capacity:
            self.capacity = 2 * end
        self.keys = self._append(0, self.keys, key_states, length, end)
        self.values = self._append(1, self.values, value_states, length, end)
        return self.keys, self.values

    def _append(self, index: int, view: Tensor | None, new: Tensor, length: int, end: int) -> Tensor:
        buffer = self._buffers.get(index)
        # Whoever reorders or crops a cache puts other tensors in the place of the views.
        if buffer is None or view is None or view.data_ptr() != buffer.data_ptr() or end > buffer.shape[-2]:
            buffer = new.new_empty(*new.shape[:-2], self.capacity, new.shape[-1], dtype=self.kept)
            if length and view is not None:
                buffer[..., :length, :] = view
            self._buffers[index] = buffer
        buffer[..., length:end, :] = new
        return buffer[..., :end, :]


class CompactLayer(PreallocatedLayer):  # type: ignore[no-untyped-call]
    """Keys and values stored in 16 or 8 bits, and handed out in their own dtype.

    Every step makes them anew from what is stored, for one layer at a time: this saves memory, not time.

    Args:
        capacity: as in :class:`PreallocatedLayer`.
        stored: "bf16", or "int8" with a scale for every position of every head.
    """

    def __init__(self, capacity: int, stored: str) -> None:
        super().__init__(capacity)
        self.stored = stored

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (batch, heads, new positions, head_dim); all positions so far, rounded."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = super().update(_compress(key_states, self.stored), _compress(value_states, self.stored))
        return _expand(keys, self.stored, key_states.dtype), _expand(values, self.stored, value_states.dtype)


def _compress(states: Tensor, stored: str) -> Tensor:
    """(..., head_dim) as bfloat16, or as int8 (..., head_dim + 4): the last four bytes are the float32 scale."""
    if stored == "bf16":
        return states.bfloat16()
    scale = (states.float().abs().amax(dim=-1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    codes = (states.float() / scale).round().to(torch.int8)
    return torch.cat([codes, scale.view(torch.int8)], dim=-1)


def _expand(compact: Tensor, stored: str, dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`_compress`, as far as there is one."""
    if stored == "bf16":
        return compact.to(dtype)
    scale = compact[..., -4:].contiguous().view(torch.float32)
    return (compact[..., :-4] * scale).to(dtype)


def _empty_cache(config: PreTrainedConfig) -> DynamicCache:
    """transformers' cache for a model, or the only one that the model takes, whose layers come as they are used."""
    if config.get_text_config(decoder=True).model_type != "minimax":
        return DynamicCache(config=config)
    from transformers.models.minimax.modeling_minimax import MiniMaxCache

    return MiniMaxCache()  # type: ignore[no-untyped-call]


def new_cache(
    config: PreTrainedConfig, capacity: int, stored: str | None = None, kept: torch.dtype | None = None
) -> DynamicCache:
    """An empty cache for a model, its full-attention layers preallocated.

    Sliding windows and recurrent layers keep transformers' own layers, which are small already. MiniMax takes no cache
    but its own.

    Args:
        config: the model's.
        capacity: positions that are going to be used.
        stored: how full-attention layers store keys and values: "bf16", "int8", or as they come (None, "fp32").
        kept: without ``stored``, what these layers keep and hand out keys and values in, whatever they come in.

    Raises:
        BitternError: for another way to store them, and for layers that cannot be stored so.
    """
    if stored is not None and stored not in TYPES:
        raise BitternError(f"kv_cache: expected one of {', '.join(TYPES)}, found {stored!r}")
    compact = stored in ("bf16", "int8")
    cache = _empty_cache(config)
    if compact and type(cache) is not DynamicCache:
        raise BitternError(
            f"kv_cache: expected a model that takes transformers' cache, to store in {stored}, found "
            f"{config.model_type}, which takes none but its own"
        )
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            made = CompactLayer(capacity, str(stored)) if compact else PreallocatedLayer(capacity, kept)
            cache.layers[index] = made
    if compact and not any(isinstance(layer, CompactLayer) for layer in cache.layers):
        raise BitternError(
            f"kv_cache: expected a layer of full attention to store in {stored}, found none in {config.model_type}"
        )
    return cache
