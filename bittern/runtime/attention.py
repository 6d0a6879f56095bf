"""Flash attention through torch's SDPA, for every model that takes its attention from transformers' interface.

Keys and values of grouped heads are never repeated, and a mask is only built for padding and windows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import functional

from bittern.errors import BitternError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "bittern"
# What an architecture may ask of its attention and SDPA cannot do.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "cache")


def use(model: PreTrainedModel) -> str:
    """Give a model this attention if it can have it; the name of the implementation that it ends up with.

    Architectures that compute attention themselves (BLOOM, MPT, GPT-J, Falcon with ALiBi) or ask for
    more than SDPA does (soft caps in Gemma 2, sinks in gpt-oss) keep their own code.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    config = model.config.get_text_config(decoder=True)
    if getattr(config, "attn_logit_softcapping", None) is not None or not model._supports_sdpa:
        implementation = "eager"
    elif model._can_set_attn_implementation():
        AttentionInterface.register(NAME, attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        implementation = NAME
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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it.

    Args:
        module: the attention layer; its ``is_causal`` counts when the argument is None.
        query: (batch, heads, queries, head_dim).
        key, value: (batch, key_value_heads, keys, head_dim); key_value_heads divides heads.
        attention_mask: (batch, 1 or heads, queries, keys), boolean (True attends) or added to the scores.
            None means causal, the queries being the last ones, or the first ones of an empty static cache.
        dropout, scaling: as in SDPA.

    Returns:
        (batch, queries, heads, head_dim), and None for the weights that flash attention never has.

    Raises:
        BitternError: when the model asks for something that SDPA does not do.
    """
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise BitternError(f"attention: {type(module).__name__} asks for {name}; load it with its own attention")
    batch, heads, queries, head_dim = query.shape
    key_value_heads = key.shape[1]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = causal and attention_mask is None and queries > 1
    if causal and key.shape[2] > queries:
        key, value = key[:, :, :queries], value[:, :, :queries]
    if queries == 1:
        # The heads that share keys become the queries of one attention.
        query = query.reshape(batch, key_value_heads, heads // key_value_heads, head_dim)
        if attention_mask is not None and attention_mask.shape[1] != 1:
            attention_mask = attention_mask.reshape(batch, key_value_heads, heads // key_value_heads, -1)
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
