"""Flash attention, for every model that takes its attention from transformers' interface.

Without padding, gradients and dropout a CPU has it from the native library, which leaves out what lies behind a query;
with gradients and products in bfloat16, short windows have that of short_attention.py; all else is torch's SDPA. Keys
and values of grouped heads are never repeated, and a mask is only built for padding and windows.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from bittern.errors import BitternError
from bittern.runtime import native
from bittern.runtime.flash import flash_attention
from bittern.runtime.short_attention import LONGEST, short_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME, TORCH_NAME = "bittern", "bittern_torch"  # the latter leaves the native library alone
# What an architecture may ask of its attention and SDPA cannot do.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "cache", "indices", "block_indices")
# Only transformers' own attention adds biases by position (Inkling), and for it alone, which they know by its name, the
# others mask what their indexers leave out.
_SDPA = ("axk2", "deepseek_v32", "dots3_note", "glm_moe_dsa", "hy_v4", "inkling", "minimax_m3_vl", "mistral_large4")


def use(model: PreTrainedModel, kernels: bool = True) -> str:
    """Give a model this attention if it can have it; the name of the implementation that it ends up with.

    Without ``kernels``, torch computes all of it. Architectures that compute attention themselves (GPT-J, Falcon with
    ALiBi), ask for more than SDPA does (soft caps in Gemma 2, sinks in gpt-oss), add biases by position (Inkling) or
    choose which keys a query sees (DeepSeek-V3.2) keep their own code. BLOOM and MPT get that of alibi.py, where it
    runs.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    config = model.config.get_text_config(decoder=True)
    if config.model_type in ("bloom", "mpt") and kernels and model.device.type == "cpu" and native.available():
        from bittern.runtime import alibi

        alibi.use(model)
        return alibi.NAME
    if getattr(config, "attn_logit_softcapping", None) is not None or not model._supports_sdpa:
        implementation = "eager"
    elif config.model_type.removesuffix("_text") in _SDPA:
        implementation = "sdpa"
    elif model._can_set_attn_implementation():
        implementation = NAME if kernels else TORCH_NAME
        AttentionInterface.register(implementation, attention if kernels else partial(attention, kernels=False))
        AttentionMaskInterface.register(implementation, _mask)
    else:
        implementation = model.config._attn_implementation
    if implementation != model.config._attn_implementation:
        model.set_attn_implementation(implementation)
    return implementation


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    kernels: bool = True,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it.

    Args:
        module: the attention layer; its ``is_causal`` counts when the argument is None.
        query: (batch, heads, queries, head_dim).
        key, value: (batch, key_value_heads, keys, head_dim); key_value_heads divides heads.
        attention_mask: (batch, 1 or heads, queries, keys), boolean (True attends) or added to the scores.
            None means causal, the queries being the last ones, or the first ones of an empty static cache.
            (1, 1, 0, window) stands for a window over the keys, the queries being the last ones: whoever leaves queries
            out (Gemma 4 all but the last) cuts nothing off it.
        dropout, scaling: as in SDPA.
        kernels: whether the native library may compute it.

    Returns:
        (batch, queries, heads, head_dim), and None for the weights that flash attention never has.

    Raises:
        BitternError: when the model asks for something that SDPA does not do.
    """
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise BitternError(f"attention: {type(module).__name__} asks for {name}; load it with its own attention")
    if query.dtype != key.dtype:  # a cache that keeps more than the model computes with
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.to(key.dtype)
        wide = query.to(key.dtype)
        output, _ = attention(module, wide, key, value, attention_mask, dropout, scaling, is_causal, kernels)
        return output.to(query.dtype), None
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    if attention_mask is not None and attention_mask.numel() == 0:
        return _windowed(query, key, value, attention_mask.shape[3], dropout, scaling, kernels), None
    batch, heads, queries, head_dim = query.shape
    key_value_heads = key.shape[1]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = causal and attention_mask is None and queries > 1
    if causal and key.shape[2] > queries:
        key, value = key[:, :, :queries], value[:, :, :queries]
    if causal and kernels and _has_native(query, key, value, dropout):
        return _native(query, key, value, None, scaling), None
    if causal and kernels and _is_short(query, key, value, dropout):
        return short_attention(query, key, value, scaling), None
    if queries == 1:
        # The heads that share keys become the queries of one attention.
        query = query.reshape(batch, key_value_heads, heads // key_value_heads, head_dim)
        if attention_mask is not None and attention_mask.shape[1] != 1:
            attention_mask = attention_mask.reshape(batch, key_value_heads, heads // key_value_heads, -1)
        if query.is_cpu and query.dtype == value.dtype == torch.float32 and attention_mask is None and dropout == 0:
            # SDPA takes up to twice as long over many sequences.
            scores = (query * scaling) @ key.mT
            return (scores.softmax(-1) @ value).reshape(batch, 1, heads, -1), None
    output = functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=dropout,
        is_causal=causal,
        scale=scaling,
        enable_gqa=query.shape[1] != key_value_heads,
    )
    return output.reshape(batch, heads, queries, value.shape[-1]).transpose(1, 2).contiguous(), None


def _mask(
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **options: Any,
) -> Tensor | None:
    """What :func:`attention` takes for a mask: as transformers' sdpa_mask, but a plain window is not written out."""
    from transformers.masking_utils import sdpa_mask

    config = options.get("config")
    window = local_size is not None and local_size == getattr(config, "sliding_window", None)
    window = window and getattr(config, "attention_chunk_size", None) is None  # chunks have a local size too
    unpadded = attention_mask is None or bool(attention_mask.all())
    whole = q_length == kv_length > 1 and int(q_offset) == 0
    if window and unpadded and whole and allow_is_causal_skip and kv_length >= cast(int, local_size):
        return torch.empty(1, 1, 0, cast(int, local_size), dtype=torch.bool, device=options.get("device"))
    mask: Tensor | None = sdpa_mask(
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        **options,
    )
    return mask


def _windowed(
    query: Tensor, key: Tensor, value: Tensor, window: int, dropout: float, scaling: float, kernels: bool
) -> Tensor:
    """Attention to the last ``window`` positions, the own one included: (batch, queries, heads, head_dim)."""
    heads, queries = query.shape[1:3]
    if kernels and _has_native(query, key, value, dropout):
        return _native(query, key, value, window, scaling)
    positions = torch.arange(key.shape[2], device=query.device)
    distances = positions[-queries:, None] - positions
    output = functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=(distances >= 0) & (distances < window),
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=heads != key.shape[1],
    )
    return output.transpose(1, 2).contiguous()


def _has_native(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether the native library computes the causal attention of these."""
    wanted = _wants_gradients(query, key, value)
    return query.is_cpu and key.shape == value.shape and dropout == 0 and not wanted and native.available()


def _is_short(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether the causal attention of these is to be differentiated, of short windows and by products in bfloat16."""
    positions = query.shape[2]
    return (
        query.is_cpu
        and key.shape == value.shape
        and positions == key.shape[2] <= LONGEST
        and dropout == 0
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and _wants_gradients(query, key, value)
    )


def _wants_gradients(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(each.requires_grad for each in tensors)


def _native(query: Tensor, key: Tensor, value: Tensor, window: int | None, scale: float) -> Tensor:
    """It, computed in fp32, in the values' dtype (autocast leaves queries and keys in fp32 where they are rotated).

    Returns:
        (batch, queries, heads, head_dim).
    """
    return flash_attention(query.float(), key.float(), value.float(), scale=scale, window=window).to(value.dtype)
