"""A KV cache that is allocated once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class PreallocatedLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values as views into buffers that a step only writes its own positions of.

    ``DynamicLayer`` copies the whole cache for every token, ``StaticLayer`` attends to positions that are
    not there yet.

    Args:
        capacity: positions to make room for; more of them double the buffers.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.capacity = capacity
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
            buffer = new.new_empty(*new.shape[:-2], self.capacity, new.shape[-1])
            if length and view is not None:
                buffer[..., :length, :] = view
            self._buffers[index] = buffer
        buffer[..., length:end, :] = new
        return buffer[..., :end, :]


def new_cache(config: PreTrainedConfig, capacity: int) -> DynamicCache:
    """An empty cache for a model, its full-attention layers preallocated.

    Sliding windows and recurrent layers keep transformers' own layers, which are small already.

    Args:
        config: the model's.
        capacity: positions that are going to be used.
    """
    cache = DynamicCache(config=config)
    cache.layers = [PreallocatedLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
