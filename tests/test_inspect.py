"""A checkpoint described from headers, against the live model it came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from bittern.consumers import GptqLayout, gptq_consumers
from bittern.errors import BitternError
from bittern.formats import gptq
from bittern.inspect import KINDS, inspect, kind, kv_elements
from bittern.weight import QuantSpec, QuantWeight

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 128,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
GPT = {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 128}
MOE = {**GROUPED, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
DEEPSEEK = {
    **SMALL,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "q_lora_rank": 32,
    "kv_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", GROUPED),
    "gemma3": ("gemma3_text", {**GROUPED, "head_dim": 24}),
    "gpt2": ("gpt2", GPT),
    "gptj": ("gptj", {**GPT, "rotary_dim": 8}),
    "gpt_bigcode": ("gpt_bigcode", GPT),
    "gpt_neox": ("gpt_neox", SMALL),
    "bloom": ("bloom", {"hidden_size": 64, "n_layer": 3, "n_head": 4, "vocab_size": 128}),
    "opt": ("opt", {**SMALL, "ffn_dim": 96, "word_embed_proj_dim": 64}),
    "mpt": ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 3, "vocab_size": 128, "max_seq_len": 64}),
    "falcon": ("falcon", SMALL),
    "falcon_grouped": ("falcon", {**SMALL, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_multi_head": ("falcon", {**SMALL, "multi_query": False}),
    "mixtral": ("mixtral", {**GROUPED, "num_local_experts": 4}),
    "qwen3_moe": ("qwen3_moe", {**MOE, "head_dim": 24, "num_experts": 4}),
    "deepseek_v3": ("deepseek_v3", DEEPSEEK),
    "mamba": ("mamba", {"hidden_size": 64, "num_hidden_layers": 3, "vocab_size": 128, "state_size": 4}),
    "lfm2": ("lfm2", {**GROUPED, "layer_types": ["conv", "full_attention", "conv"]}),
}


def build(model_type: str, options: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **options)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return model.eval()  # type: ignore[no-any-return, no-untyped-call]


def cached_elements(model: PreTrainedModel, tokens: int = 6) -> int:
    """What one token really puts in the cache."""
    with torch.no_grad():
        cache = model(input_ids=torch.ones(1, tokens, dtype=torch.int64), use_cache=True).get("past_key_values")
    layers = [] if cache is None else [layer for layer in cache.layers if hasattr(layer, "keys")]
    return sum(int(layer.keys.numel() + layer.values.numel()) for layer in layers if layer.keys is not None) // tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_checkpoint_is_what_the_live_model_is(family: str, tmp_path: Path) -> None:
    model = build(*FAMILIES[family])
    model.save_pretrained(tmp_path / "model")
    found = inspect(tmp_path / "model")
    # tied ones once; DeepSeek's router keeps a learned bias in a buffer
    parameters = sum({tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}.values())
    assert found["parameters"] == parameters
    assert found["bits_per_weight"] == {"all": 32.0, "without_embeddings": 32.0}
    assert found["bytes"]["total"] == 4 * parameters == sum(found["bytes"][name] for name in KINDS)
    assert found["dtypes"]["float32"]["bytes"] == 4 * parameters
    heads: list[Any] = [model.get_input_embeddings(), model.lm_head]
    embeddings = {id(p): p.numel() for module in heads for p in module.parameters()}
    assert found["bytes"]["embeddings"] >= 4 * sum(embeddings.values())
    cached = cached_elements(model)
    assert found["kv_bytes_per_token"] == {"fp16": 2 * cached, "fp32": 4 * cached}
    assert kv_elements(model.config) == cached
    assert cached > 0 or family == "mamba"
    json.dumps(found)


def test_bytes_of_each_kind(tmp_path: Path) -> None:
    model = build(*FAMILIES["mixtral"])
    model.save_pretrained(tmp_path / "model")
    found = inspect(tmp_path / "model")
    layers, hidden, ffn, experts = 3, 64, 96, 4
    assert found["bytes"] == {
        "attention": 4 * layers * (2 * hidden * hidden + 2 * hidden * hidden // 2),
        "mlp": 4 * layers * experts * hidden,  # the router
        "experts": 4 * layers * experts * 3 * hidden * ffn,
        "embeddings": 4 * 2 * 128 * hidden,
        "norms": 4 * (2 * layers + 1) * hidden,
        "other": 0,
        "total": 4 * sum(p.numel() for p in model.parameters()),
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.embed_tokens.weight", "embeddings"),
        ("lm_head.weight", "embeddings"),
        ("transformer.wpe.weight", "embeddings"),
        ("transformer.word_embeddings_layernorm.bias", "norms"),
        ("model.layers.0.self_attn.q_norm.weight", "norms"),
        ("transformer.h.3.ln_1.weight", "norms"),
        ("transformer.ln_f.weight", "norms"),
        ("model.layers.0.self_attn.q_proj.qweight", "attention"),
        ("transformer.h.0.attn.c_attn.g_idx", "attention"),
        ("model.layers.0.mlp.experts.gate_up_proj.3.scales", "experts"),
        ("model.layers.0.block_sparse_moe.experts.3.w1.weight", "experts"),
        ("model.layers.0.mlp.shared_experts.up_proj.weight", "mlp"),
        ("model.decoder.layers.0.fc1.weight", "mlp"),
        ("model.layers.0.feed_forward.w2.weight", "mlp"),
        ("backbone.layers.0.mixer.in_proj.weight", "other"),
    ],
)
def test_kinds(name: str, expected: str) -> None:
    assert kind(name) == expected


def quantized(folder: Path, spec: QuantSpec, keep: str | None = None, checkpoint_format: str = "gptq_v2") -> int:
    """A GPTQ artifact of a tiny Llama; returns the parameters of the model it was made of."""
    model = build("llama", {**GROUPED, "tie_word_embeddings": True})
    model.save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    layers: dict[str, QuantSpec | None] = {}
    for name in [name for name in stored if "_proj" in name]:
        layer = name.removesuffix(".weight")
        layers[layer] = None if keep and keep in layer else spec
        if layers[layer] is None:
            continue
        out_features, in_features = stored.pop(name).shape
        groups = spec.groups(in_features)
        codes = torch.randint(0, spec.max_code + 1, (out_features, in_features), dtype=torch.uint8)
        zeros = torch.full((out_features, groups), spec.mid_code, dtype=torch.uint8)
        weight = QuantWeight(codes, torch.ones(out_features, groups, dtype=torch.float16), zeros, spec)
        for suffix, tensor in gptq.pack(weight, checkpoint_format=checkpoint_format).items():
            stored[gptq.names(layer)[suffix]] = tensor
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = gptq.config(spec, checkpoint_format=checkpoint_format, layers=layers)
    (folder / "config.json").write_text(json.dumps(config))
    return sum(p.numel() for p in model.parameters())


def verdicts(found: dict[str, Any]) -> dict[str, bool]:
    return {verdict["consumer"]: verdict["loads"] for verdict in found["loads"]}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_an_artifact(bits: int, tmp_path: Path) -> None:
    parameters = quantized(tmp_path, QuantSpec(bits, 32))
    found = inspect(tmp_path)
    assert found["parameters"] == parameters  # of the model, not of the words that hold it
    summary = found["quantization"]
    assert (summary["method"], summary["bits"], summary["group_size"], summary["sym"]) == ("gptq", bits, 32, True)
    assert summary["layers"] == {f"{bits} bits, group 32, sym": 21}
    assert summary["exceptions"] == {}
    stored = load_file(tmp_path / "model.safetensors")
    inner = {name: tensor for name, tensor in stored.items() if "embed" not in name}
    bits_stored = 8 * sum(tensor.nbytes for tensor in inner.values())
    in_embeddings = 128 * 64
    without = found["bits_per_weight"]["without_embeddings"]
    assert without == pytest.approx(bits_stored / (parameters - in_embeddings))
    # scales, zeros and indices on top of the codes, and norms that stay floats
    assert bits + (16 + bits) / 32 < without < bits + (16 + bits) / 32 + 1
    assert found["bits_per_weight"]["all"] == pytest.approx((bits_stored + 32 * in_embeddings) / parameters)
    assert verdicts(found)["vLLM"] == (bits in (4, 8))
    assert verdicts(found)["exllamav2"] == (bits == 4)
    json.dumps(found)


def test_exceptions_are_listed(tmp_path: Path) -> None:
    quantized(tmp_path, QuantSpec(4, 32), keep="layers.1.mlp.down_proj")
    found = inspect(tmp_path)
    assert found["quantization"]["exceptions"] == {"model.layers.1.mlp.down_proj": None}
    assert found["quantization"]["layers"] == {"4 bits, group 32, sym": 20}
    assert verdicts(found)["transformers"]
    assert not verdicts(found)["auto-gptq"]


def test_part_of_a_fused_layer_left_out(tmp_path: Path) -> None:
    quantized(tmp_path, QuantSpec(4, 32), keep="layers.1.self_attn.v_proj")
    (vllm,) = [verdict for verdict in inspect(tmp_path)["loads"] if verdict["consumer"] == "vLLM"]
    assert not vllm["loads"]
    assert vllm["reason"].startswith("model.layers.1.self_attn: it fuses q_proj, k_proj, v_proj")


def test_headers_that_contradict_the_config(tmp_path: Path) -> None:
    quantized(tmp_path, QuantSpec(4, 32))
    path = tmp_path / "config.json"
    good = json.loads(path.read_text())
    for key, value, message in (
        ("bits", 8, r"qweight: expected 24 rows \(96 columns of 8 bits\), found 12"),
        ("group_size", 16, r"scales: expected shape \(6, 64\), found \(3, 64\)"),
        ("bits", 5, r"bits: expected one of 2, 3, 4, 8, found 5"),
        ("dynamic", {"-:.*q_proj": {}}, r"q_proj: found packed, but the quantization config says that it is skipped"),
    ):
        changed = {**good, "quantization_config": {**good["quantization_config"], key: value}}
        path.write_text(json.dumps(changed))
        with pytest.raises(BitternError, match=message):
            inspect(tmp_path)
    build("llama", GROUPED).save_pretrained(tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    config["quantization_config"] = good["quantization_config"]
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    with pytest.raises(BitternError, match=r"its config says GPTQ, but no tensor ends in \.qweight"):
        inspect(tmp_path / "plain")


def test_a_foreign_quantization_is_not_guessed_at(tmp_path: Path) -> None:
    build("llama", GROUPED).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = inspect(tmp_path)
    assert found["quantization"] == {"quant_method": "awq", "bits": 4}
    assert (found["parameters"], found["bits_per_weight"], found["loads"]) == (None, None, [])


def test_an_unknown_architecture_is_still_measured(tmp_path: Path) -> None:
    save_file({"layers.0.attn.weight": torch.zeros(8, 8)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "heron"}')
    found = inspect(tmp_path)
    assert (found["parameters"], found["kv_bytes_per_token"], found["context_length"]) == (64, None, None)


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(BitternError):
        inspect(tmp_path)


LAYOUT: dict[str, Any] = {
    "packed": {f"model.layers.0.self_attn.{part}_proj": QuantSpec(4, 128) for part in "qkv"},
    "plain": (),
    "shapes": {f"model.layers.0.self_attn.{part}_proj": (256, 256) for part in "qkv"},
    "checkpoint_format": "gptq",
    "desc_act": False,
    "has_g_idx": True,
    "dynamic": False,
    "modules": False,
    "quantizer": ("bittern:0.1.0",),
    "model_type": "llama",
    "tied": False,
    "rope_theta": True,
    "experts": False,
}
ALL = {"bittern", "transformers", "GPTQModel", "vLLM", "SGLang", "exllamav2", "auto-gptq"}


def grid(*args: Any) -> dict[str, Any]:
    return {"packed": dict.fromkeys(LAYOUT["packed"], QuantSpec(*args))}


@pytest.mark.parametrize(
    ("change", "refusing"),
    [
        ({}, set()),
        (grid(3, 128), {"vLLM", "exllamav2"}),
        (grid(8, 128), {"exllamav2", "auto-gptq"}),
        (grid(4, 128, False), {"vLLM", "exllamav2", "GPTQModel", "transformers"}),
        ({**grid(4, 128, False), "quantizer": ("gptqmodel:7.7.0",)}, {"vLLM", "exllamav2"}),
        ({**grid(4, 128, False), "checkpoint_format": "gptq_v2"}, {"vLLM", "auto-gptq"}),
        (grid(4, 16), {"vLLM"}),
        (grid(4, 8), {"vLLM", "GPTQModel", "transformers"}),
        (grid(4, 96), {"vLLM", "GPTQModel", "transformers", "SGLang"}),
        ({"desc_act": True}, {"vLLM"}),
        ({**grid(4, -1), "desc_act": True}, set()),
        ({"has_g_idx": False}, {"transformers"}),
        ({"experts": True}, {"transformers", "SGLang"}),
        ({"model_type": "gpt2"}, {"transformers"}),
        ({"tied": True}, {"auto-gptq"}),
        ({"rope_theta": False}, {"auto-gptq"}),
        ({"plain": ("model.layers.0.mlp.down_proj",), "dynamic": True}, {"transformers", "auto-gptq"}),
        ({"plain": ("model.layers.0.mlp.down_proj",), "modules": True}, {"transformers", "GPTQModel", "auto-gptq"}),
        ({"plain": ("model.layers.0.mlp.down_proj",), "modules": True, "dynamic": True}, {"auto-gptq"}),
        (
            {"packed": {**LAYOUT["packed"], "model.layers.0.self_attn.q_proj": QuantSpec(8, 128)}, "dynamic": True},
            {"transformers", "vLLM", "exllamav2", "auto-gptq"},
        ),
    ],
)
def test_rules_of_the_consumers(change: dict[str, Any], refusing: set[str]) -> None:
    found = gptq_consumers(GptqLayout(**{**LAYOUT, **change}))
    assert {verdict.consumer for verdict in found if not verdict.loads} == {*refusing, "llama.cpp"}
    assert {verdict.consumer for verdict in found} == {*ALL, "llama.cpp"}
    assert all(verdict.reason for verdict in found)


def test_who_opens_a_plain_checkpoint(tmp_path: Path) -> None:
    build("llama", GROUPED).save_pretrained(tmp_path)
    no = {name for name, loads in verdicts(inspect(tmp_path)).items() if not loads}
    assert no == {"auto-gptq", "llama.cpp"}


def test_weights_are_not_read(tmp_path: Path) -> None:
    build("llama", GROUPED).save_pretrained(tmp_path)
    expected = inspect(tmp_path)
    path = tmp_path / "model.safetensors"
    header = path.read_bytes()[: 8 + int.from_bytes(path.read_bytes()[:8], "little")]
    size = path.stat().st_size
    with path.open("wb") as file:  # the same header over a hole instead of weights
        file.write(header)
        file.truncate(size)
    assert inspect(tmp_path) == expected


def test_stories15m(shared: Path) -> None:
    found = inspect(shared / "data" / "models" / "stories15m")
    assert found["parameters"] == 15_191_712
    assert found["context_length"] == 256
    assert found["kv_bytes_per_token"]["fp16"] == 2 * 6 * 288 * 2
