"""runtime.attention against attention written out head by head, and against transformers' eager models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from bittern.errors import BitternError
from bittern.runtime import attention

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}


def tiny(family: str, **options: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SMALL, **options})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()  # type: ignore[no-untyped-call]
    with torch.no_grad():  # the usual small weights would leave attention almost uniform
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    return model


def by_hand(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """allowed: (batch, heads, queries, keys) booleans."""
    batch, heads, queries, _ = query.shape
    shared = heads // key.shape[1]
    output = torch.empty(batch, queries, heads, value.shape[-1])
    for b in range(batch):
        for h in range(heads):
            for q in range(queries):
                scores = key[b, h // shared] @ query[b, h, q] * scale
                scores[~allowed[b, h, q]] = -torch.inf
                output[b, q, h] = scores.softmax(0) @ value[b, h // shared]
    return output


@pytest.mark.parametrize(("heads", "key_value_heads"), [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (1, 7), (3, 7)])
@pytest.mark.parametrize("mask", [None, "shared", "by head", "added"])
def test_equals_attention_by_hand(heads: int, key_value_heads: int, queries: int, keys: int, mask: str | None) -> None:
    generator = torch.Generator().manual_seed(heads + keys)
    query = torch.randn(2, heads, queries, 8, generator=generator)
    key = torch.randn(2, key_value_heads, keys, 8, generator=generator)
    value = torch.randn(2, key_value_heads, keys, 12, generator=generator)
    if mask is None:
        # One query sees everything; several are causal, and with more keys the cache is an empty static one.
        allowed = torch.ones(queries, keys, dtype=torch.bool).tril(keys if queries == 1 else 0).expand(2, heads, -1, -1)
        given = None
    else:
        shape = (2, heads if mask == "by head" else 1, queries, keys)
        given = torch.rand(shape, generator=generator) > 0.4
        given[..., 0] = True
        allowed = given.expand(2, heads, -1, -1)
        if mask == "added":
            given = torch.where(given, 0.0, -torch.inf)
    found, weights = attention.attention(nn.Module(), query, key, value, given, scaling=0.3)
    assert weights is None
    torch.testing.assert_close(found, by_hand(query, key, value, allowed, 0.3))


def test_refuses_what_it_would_ignore() -> None:
    states = torch.zeros(1, 2, 3, 4)
    with pytest.raises(BitternError, match="attention: Linear asks for softcap"):
        attention.attention(nn.Linear(1, 1), states, states, states, None, softcap=30.0)


OWN: dict[str, tuple[str, dict[str, Any]]] = {
    "grouped": ("llama", {"num_key_value_heads": 2}),
    "multi-head": ("llama", {}),
    "multi-query": ("gpt_bigcode", GPT),
    "learned positions": ("gpt2", GPT),
    "window": ("mistral", {"num_key_value_heads": 2, "sliding_window": 5}),
    "mixed windows": ("gemma3_text", {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5}),
    "unequal heads": (
        "deepseek_v3",
        {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8}
        | {
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
            "first_k_dense_replace": 2,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
}


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("padded", [False, True])
def test_models_compute_what_their_eager_code_does(kind: str, padded: bool) -> None:
    family, options = OWN[kind]
    model = tiny(family, **options)
    ids = torch.randint(97, (2, 19), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :6] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        assert attention.use(model) == attention.NAME == model.config._attn_implementation
        found = model(ids, attention_mask=mask).logits
    seen = mask.bool()
    torch.testing.assert_close(found[seen], expected[seen], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "options", "expected"),
    [
        ("gemma2", {"num_key_value_heads": 2, "head_dim": 8}, "eager"),
        ("gpt_oss", {"num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2}, "eager"),
        ("bloom", {"n_layer": 2, "n_head": 4}, "eager"),
        ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2}, "eager"),
        ("gptj", {**GPT, "rotary_dim": 4}, "eager"),
        ("falcon", {"alibi": True}, "sdpa"),
    ],
)
def test_architectures_that_keep_their_own(family: str, options: dict[str, Any], expected: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SMALL, **options})
    model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    assert attention.use(model) == model.config._attn_implementation == expected
