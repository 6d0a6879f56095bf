"""BLOOM and MPT without the matrix of all scores: their attention through the native library on a CPU.

Both compute attention themselves and add linear biases (Press et al. 2022). The classes here take the place of
theirs in a loaded model and do the same but for that matrix; with padding, or anywhere but in float32 on a CPU, they
leave the work to transformers' own code.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.models.bloom.modeling_bloom import BloomAttention
from transformers.models.mpt.modeling_mpt import MptAttention

from bittern.runtime.flash import flash_attention

NAME = "bittern_alibi"


class FlashBloomAttention(BloomAttention):
    """BLOOM's attention in linear memory."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        residual: Tensor,
        alibi: Tensor,
        attention_mask: Tensor,
        layer_past: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As transformers calls it; ``alibi`` is (batch * heads, 1, keys)."""
        exact = self.pretraining_tp > 1 and self.slow_but_exact
        if exact or not _plain(hidden_states, attention_mask):
            mask = _additive(hidden_states, attention_mask, alibi.shape[-1])
            theirs: tuple[Tensor, Tensor | None] = super().forward(
                hidden_states, residual, alibi, mask, layer_past, **kwargs
            )
            return theirs
        query, key, value = self._reshape(self.query_key_value(hidden_states))
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        slopes = _slopes(alibi[: self.num_heads, 0])
        output = _attend(query, key, value, self.inv_norm_factor, slopes)
        return residual + self.dense(output), None


class FlashMptAttention(MptAttention):
    """MPT's attention in linear memory."""

    def forward(
        self,
        hidden_states: Tensor,
        position_bias: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As transformers calls it, always with a mask; ``position_bias`` is (heads, 1, longest sequence)."""
        assert attention_mask is not None
        if not _plain(hidden_states, attention_mask):
            before = 0 if past_key_values is None else past_key_values.get_seq_length(self.layer_idx)
            mask = _additive(hidden_states, attention_mask, before + hidden_states.shape[1])
            theirs: tuple[Tensor, Tensor | None] = super().forward(
                hidden_states, position_bias, past_key_values, mask.bool(), **kwargs
            )
            return theirs
        mixed = self.Wqkv(hidden_states)
        if self.clip_qkv:
            mixed = mixed.clamp(min=-self.clip_qkv, max=self.clip_qkv)
        query, key, value = (
            each.unflatten(2, (self.n_heads, self.head_dim)).transpose(1, 2) for each in mixed.chunk(3, dim=2)
        )
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        output = _attend(query, key, value, cast(float, self.softmax_scale), _slopes(position_bias[:, 0]))
        return self.out_proj(output), None


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    BloomAttention: FlashBloomAttention,
    MptAttention: FlashMptAttention,
}


def use(model: PreTrainedModel) -> None:
    """Give a BLOOM or MPT model this attention."""
    AttentionMaskInterface.register(NAME, _mask)
    for module in model.modules():
        if type(module) in _CLASSES:
            module.__class__ = _CLASSES[type(module)]
    model.config._attn_implementation = NAME


def _mask(**options: Any) -> Tensor:
    """What these models' code takes for a mask: floats to add, or nothing at all, (1, 1, 0, 0), for a causal one.

    It cannot be None, on which MPT calls a method.
    """
    if sdpa_mask(**options) is None:
        return torch.empty(1, 1, 0, 0, dtype=options["dtype"], device=options["device"])
    mask: Tensor = eager_mask(**options)
    return mask


def _plain(hidden: Tensor, mask: Tensor) -> bool:
    """Whether the native code computes this call: causal, float32 on a CPU, and no gradient wanted."""
    wanted = torch.is_grad_enabled() and hidden.requires_grad
    return mask.numel() == 0 and hidden.is_cpu and hidden.dtype == torch.float32 and not wanted


def _additive(hidden: Tensor, mask: Tensor, keys: int) -> Tensor:
    """The mask in full, for transformers' own code."""
    if mask.numel():
        return mask
    queries = hidden.shape[1]
    shape, lowest = (1, 1, queries, keys), torch.finfo(hidden.dtype).min
    # Queries are the last keys, but the first ones of an empty static cache.
    offset = keys - queries if queries == 1 else 0
    return torch.full(shape, lowest, dtype=hidden.dtype, device=hidden.device).triu(1 + offset)


def _slopes(biases: Tensor) -> Tensor:
    """What a head's biases (heads, keys) grow by from key to key; with a single key it does not matter."""
    if biases.shape[1] < 2:
        return biases.new_zeros(biases.shape[0])
    return (biases[:, -1] - biases[:, 0]) / (biases.shape[1] - 1)  # neighbours are rounded, and nearly the same


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float, slopes: Tensor) -> Tensor:
    """(batch, heads, queries, head_dim) and as many or more keys -> (batch, queries, heads * head_dim)."""
    queries = query.shape[2]
    if queries > 1:  # more keys are room in an empty static cache
        key, value = key[:, :, :queries], value[:, :, :queries]
    return flash_attention(query, key, value, scale=scale, slopes=slopes).flatten(2)
