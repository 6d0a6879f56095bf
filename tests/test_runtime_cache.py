"""A prompt in steps through the cache gives the logits of the whole prompt at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bittern.errors import BitternError
from bittern.runtime import attention
from bittern.runtime.cache import CompactLayer, PreallocatedLayer, new_cache

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
GPT = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
WINDOW = {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "RoPE, multi-head": ("llama", {}),
    "RoPE, grouped": ("llama", {"num_key_value_heads": 2}),
    "RoPE, multi-query": ("falcon", {}),
    "RoPE in part": ("phi", {}),
    "ALiBi, multi-query": ("falcon", {"alibi": True}),
    "learned, multi-query": ("gpt_bigcode", GPT),
    "learned": ("gpt2", GPT),
    "learned with an offset": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "ALiBi of bloom": ("bloom", {"n_layer": 3, "n_head": 4}),
    "ALiBi of mpt": ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 64}),
    "window": ("mistral", {"num_key_value_heads": 2, "sliding_window": 5}),
    "mixed windows, softcap": ("gemma2", WINDOW),
    "mixed windows": ("gemma3_text", {**WINDOW, "num_hidden_layers": 7}),
    "sinks and windows": ("gpt_oss", {**WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "latent attention": (
        "deepseek_v3",
        {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8}
        | {
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
            "first_k_dense_replace": 3,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "convolutions": ("lfm2", {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention", "conv"]}),
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_with_and_without_cache(kind: str) -> None:
    family, options = FAMILIES[kind]
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SMALL, **options})
    model = AutoModelForCausalLM.from_config(config).eval()  # type: ignore[no-untyped-call]
    attention.use(model)
    ids = torch.randint(97, (1, 23), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
        expected = model(ids, use_cache=False).logits
        cache = new_cache(model.config, capacity=20)  # too small: it must grow
        steps = [ids[:, :9], *(ids[:, i : i + 1] for i in range(9, 23))]
        found = torch.cat([model(step, past_key_values=cache, use_cache=True).logits for step in steps], dim=1)
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)
        # The test would say nothing if the last logits did not depend on what the cache holds.
        alone = model(ids[:, -1:], use_cache=False).logits
    assert (alone[0, -1] - expected[0, -1]).abs().max() > 1e-2


def test_a_model_that_takes_no_cache_but_its_own() -> None:
    config = AutoConfig.for_model("minimax", **SMALL)
    assert type(new_cache(config, 9)).__name__ == "MiniMaxCache"
    with pytest.raises(BitternError, match="to store in int8, found minimax, which takes none but its own"):
        new_cache(config, 9, "int8")


def test_appending_moves_nothing_until_the_room_is_used_up() -> None:
    layer = PreallocatedLayer(6)
    states = torch.randn(1, 2, 9, 4, generator=torch.Generator().manual_seed(0))
    keys, _ = layer.update(states[:, :, :4], states[:, :, :4, :3])
    more, values = layer.update(states[:, :, 4:6], states[:, :, 4:6, :3])
    assert more.data_ptr() == keys.data_ptr()
    assert torch.equal(more, states[:, :, :6]) and torch.equal(values, states[:, :, :6, :3])
    grown, _ = layer.update(states[:, :, 6:], states[:, :, 6:, :3])
    assert grown.data_ptr() != keys.data_ptr()
    assert torch.equal(grown, states) and layer.get_seq_length() == 9


def test_survives_reordering_and_cropping() -> None:
    layer = PreallocatedLayer(8)
    states = torch.randn(3, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    layer.update(states[:, :, :4], states[:, :, :4])
    layer.crop(-1)
    layer.reorder_cache(torch.LongTensor([2, 0, 0]))
    keys, values = layer.update(states[:, :, 4:], states[:, :, 4:])
    expected = torch.cat([states[[2, 0, 0], :, :3], states[:, :, 4:]], dim=2)
    assert torch.equal(keys, expected) and torch.equal(values, expected)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_cache_that_keeps_more_than_the_model_computes_with(family: str, padded: bool) -> None:
    options = {"llama": {"num_key_value_heads": 2}, "mistral": WINDOW}.get(family, {**WINDOW, "num_hidden_layers": 7})
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SMALL, **options})
    model = AutoModelForCausalLM.from_config(config).bfloat16().eval()  # type: ignore[no-untyped-call]
    assert attention.use(model) == attention.NAME
    ids = torch.randint(97, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :2] = 0
    logits = {}
    with torch.no_grad():
        for kept in (None, torch.float32):
            cache = new_cache(config, 9, kept=kept)
            steps = [ids[:, :6], ids[:, 6:7], ids[:, 7:8], ids[:, 8:]]
            found, end = [], 0
            for new in steps:
                end += new.shape[1]
                found.append(model(new, attention_mask=mask[:, :end], past_key_values=cache).logits)
            logits[kept] = torch.cat(found, 1).float()
            whole = [layer for layer in cache.layers if isinstance(layer, PreallocatedLayer)]
            assert {layer.keys.dtype for layer in whole if layer.keys is not None} <= {kept or torch.bfloat16}
            assert whole or family == "mistral"  # whose layers all have windows
    seen = mask.bool()
    torch.testing.assert_close(logits[torch.float32][seen], logits[None][seen], rtol=0.05, atol=0.02)


@pytest.mark.parametrize("stored", ["bf16", "int8"])
def test_compact_layers_round_each_position_by_itself(stored: str) -> None:
    layer = CompactLayer(4, stored)
    states = 10 ** torch.linspace(-3, 3, 9)[:, None] * torch.randn(
        2, 3, 9, 16, generator=torch.Generator().manual_seed(0)
    )
    states[0, 1, 2] = 0
    layer.update(states[:, :, :4], -states[:, :, :4])
    layer.update(states[:, :, 4:8], -states[:, :, 4:8])
    layer.crop(-2)
    layer.reorder_cache(torch.LongTensor([1, 0]))
    keys, values = layer.update(states[[1, 0], :, 6:], -states[[1, 0], :, 6:])
    expected = states[[1, 0]]
    assert layer.get_seq_length() == 9 and keys.dtype == torch.float32
    # Half a step: of 2^-7 of each value, or of the largest of a position over 127 (and fp32's own rounding).
    step = expected.abs() * 2**-7 if stored == "bf16" else expected.abs().amax(-1, keepdim=True) / 127 * 1.0001
    for found, wanted in ((keys, expected), (values, -expected)):
        assert bool(((found - wanted).abs() <= step / 2).all())
    assert layer.keys is not None
    assert layer.keys.element_size() * layer.keys.shape[-1] == {"bf16": 32, "int8": 20}[stored]


def test_a_model_without_full_attention_stores_nothing_smaller() -> None:
    config = AutoConfig.for_model("mistral", num_hidden_layers=2, sliding_window=8)
    with pytest.raises(
        BitternError, match="expected a layer of full attention to store in int8, found none in mistral"
    ):
        new_cache(config, 16, "int8")


def test_another_way_to_store() -> None:
    config = AutoConfig.for_model("llama", **SMALL)
    with pytest.raises(BitternError, match="kv_cache: expected one of fp32, bf16, int8, found 'int4'"):
        new_cache(config, 8, "int4")
    assert all(type(layer) is PreallocatedLayer for layer in new_cache(config, 8, "fp32").layers)
