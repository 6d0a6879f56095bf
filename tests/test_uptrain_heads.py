"""Permuting heads, turning keys by RoPE's pairs and mixing values change no logit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from bittern import model as live
from bittern.errors import BitternError
from bittern.uptrain import heads as part
from bittern.uptrain.heads import Counts, Heads
from bittern.uptrain.student import grouped_config, head_counts
from tests import tiny

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 4},
    "llama, grouped": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 4},  # biases of q, k and v
    "phi": {"num_key_value_heads": 4},  # half of each head turns, biases everywhere, attention beside the MLP
    "stablelm": {"num_key_value_heads": 4},  # a quarter turns
    "cohere": {"num_key_value_heads": 4},  # RoPE turns neighbouring dimensions
    "phi3": {"num_key_value_heads": 4},  # q, k and v in one matrix
    "gemma2": {"num_key_value_heads": 4, "head_dim": 16},  # norms after attention
}
ROTARY = {"phi": 8, "stablelm": 4}
TOLERANCE = 1e-4


def make(family: str) -> tuple[PreTrainedModel, Counts]:
    kind = family.split(",")[0]
    model = tiny.random_model(kind, **FAMILIES[family])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
            elif "attn" in name and parameter.ndim == 2:
                parameter.normal_(0, 0.2)  # attention must matter
    kv = model.config.num_key_value_heads
    return model, Counts(4, kv, getattr(model.config, "head_dim", None) or 16)


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    ids = torch.arange(2 * 24).view(2, 24) * 5 % 250
    found: Tensor = model(input_ids=ids).logits
    return found


def edit(model: PreTrainedModel, counts: Counts, change: Any) -> None:
    for block in live.blocks(model)[1]:
        name = part.find_attention(block)
        assert name is not None
        attention = block.get_submodule(name)
        part.write_heads(attention, change(part.read_heads(attention, counts)))


def assert_same(model: PreTrainedModel, before: Tensor) -> None:
    after = logits(model)
    assert float((after - before).norm() / before.norm()) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_logits_stay_after_every_free_change(family: str, seed: int) -> None:
    model, counts = make(family)
    before = logits(model)
    generator = torch.Generator().manual_seed(seed)
    rotary = ROTARY.get(family, counts.dim)
    pairing = "interleaved" if family == "cohere" else "half"

    def change(heads: Heads) -> Heads:
        order = torch.randperm(counts.key_value, generator=generator).tolist()
        angles = 6.28 * torch.rand(counts.key_value, rotary // 2, dtype=torch.float64, generator=generator)
        scales = 0.5 + torch.rand(angles.shape, dtype=torch.float64, generator=generator)
        mix = torch.randn(counts.key_value, counts.dim, counts.dim, dtype=torch.float64, generator=generator)
        orthogonal = torch.linalg.qr(mix).Q
        turned = part.turn_keys(part.permute(heads, order), torch.polar(scales, angles), pairing)
        return part.turn_values(turned, orthogonal)

    edit(model, counts, change)
    assert_same(model, before)


def test_the_other_pairing_does_change_logits() -> None:
    model, counts = make("llama")
    before = logits(model)
    factors = torch.polar(torch.ones(4, 8, dtype=torch.float64), torch.full((4, 8), 1.0, dtype=torch.float64))
    edit(model, counts, lambda heads: part.turn_keys(heads, factors, "interleaved"))
    assert float((logits(model) - before).norm() / before.norm()) > 10 * TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_writing_what_was_read_changes_no_bit(family: str) -> None:
    model, counts = make(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    edit(model, counts, lambda heads: heads)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_pairs_and_rows_are_inverse(family: str) -> None:
    del family
    rows = torch.randn(3, 8, 5, dtype=torch.float64)
    for pairing in part.PAIRINGS:
        assert torch.equal(part.from_pairs(part.to_pairs(rows, pairing), pairing), rows)


@pytest.mark.parametrize(
    ("kind", "config", "reason"),
    [
        ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4}, "no num_key_value_heads"),
        ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}, "no num_key_value_heads"),
        ("gpt_neox", {}, "no num_key_value_heads"),
        ("bloom", {"n_layer": 2, "n_head": 4}, "no num_key_value_heads"),
        ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2}, "no num_key_value_heads"),
        ("gpt_oss", {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}, "sinks"),
        ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}, "q_norm.weight"),
        ("mamba", {"state_size": 4}, "no num_key_value_heads"),
    ],
)
def test_architectures_without_groups_are_refused_in_a_line_that_says_why(
    kind: str, config: dict[str, Any], reason: str
) -> None:
    model = tiny.random_model(kind, **config)
    if "num_key" in reason:
        del model.config.num_key_value_heads  # what tests.tiny gives to every architecture
    with pytest.raises(BitternError, match=reason) as caught:
        head_counts(model, 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wanted", [3, 4, 8, 0])
def test_a_number_that_does_not_divide_is_refused_with_those_that_do(wanted: int) -> None:
    model = tiny.random_model("llama", num_key_value_heads=4)
    with pytest.raises(BitternError, match="can have 1, 2"):
        head_counts(model, wanted)


def test_a_layer_without_rope_is_told_from_those_that_have_it() -> None:
    model = tiny.random_model("smollm3", num_key_value_heads=4, no_rope_layers=[0, 1], vocab_size=64)
    assert pairings(model) == [["half", "interleaved"], ["half"]]


def test_pairs_are_found_where_large_biases_make_scores_coarse() -> None:
    sizes = {"hidden_size": 256, "head_dim": 64, "num_hidden_layers": 1, "vocab_size": 64}
    model = tiny.random_model("qwen2", num_key_value_heads=4, **sizes)
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        for name, parameter in attention.named_parameters():
            parameter.normal_(0, 0.1 if parameter.ndim == 2 else 0.3)
            if name in ("k_proj.bias", "q_proj.bias"):  # on the slowest pair, as trained models have them
                parameter.view(4, 64)[:, 31] += 3000 if name == "k_proj.bias" else 500
                parameter.view(4, 64)[:, 63] -= 1500 if name == "k_proj.bias" else 250
    assert pairings(model) == [["half"]]


def test_attention_that_blocks_share_is_refused() -> None:
    types = ["mamba", "hybrid", "mamba", "hybrid"]
    config: dict[str, Any] = {
        "num_hidden_layers": 4,
        "n_mamba_heads": 2,
        "layers_block_type": types,
        "mamba_d_state": 4,
    }
    model = tiny.random_model("zamba", num_key_value_heads=4, **config)
    with pytest.raises(BitternError, match="shares its weights with another block"):
        head_counts(model, 2)


def pairings(model: PreTrainedModel) -> list[list[str]]:
    """What is found in each layer."""
    from bittern.uptrain.heads import find_pairings

    counts = head_counts(model, 2)
    seen: list[dict[str, Any]] = []
    layers = model.model.layers
    hooks = [
        layer.self_attn.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
        for layer in layers
    ]
    model(input_ids=torch.arange(24)[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    hidden = [kwargs.pop("hidden_states") for kwargs in seen]
    return [
        find_pairings(layer.self_attn, counts, kwargs, state, counts.dim)
        for layer, kwargs, state in zip(layers, seen, hidden, strict=True)
    ]


@pytest.mark.parametrize("stated", [True, False])
def test_heads_of_a_text_config_are_changed_in_it(stated: bool) -> None:
    inner = {"num_attention_heads": 8} if stated else {}
    found = grouped_config({"model_type": "gemma3", "text_config": inner}, 2)
    assert found == {"model_type": "gemma3", "text_config": {**inner, "num_key_value_heads": 2}}
