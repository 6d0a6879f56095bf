"""A checkpoint described from headers, against the live model it came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from bittern.artifact import Artifact
from bittern.checkpoint import open_checkpoint
from bittern.convert.gguf import write_gguf
from bittern.errors import BitternError
from bittern.formats.packing import FORMATS, Packing
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
    "falcon_h1": (
        "falcon_h1",
        {**GROUPED, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1},
    ),
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
        ("model.layers.0.self_attn.k_proj.weight_packed", "attention"),
        ("model.layers.0.mlp.experts.0.w1.weight_zero_point", "experts"),
        ("model.layers.0.self_attn.o_proj.weight_g_idx", "attention"),
        ("model.norm.weight_scale", "norms"),
        ("lm_head.weight_shape", "embeddings"),
        ("model.embed_tokens.biases", "embeddings"),
        ("backbone.layers.0.mixer.in_proj.weight", "other"),
    ],
)
def test_kinds(name: str, expected: str) -> None:
    assert kind(name) == expected


def quantized(folder: Path, spec: QuantSpec, keep: str | None = None, format: str = "gptq_v2") -> int:
    """An artifact of a tiny Llama; returns the parameters of the model it was made of."""
    model = build("llama", {**GROUPED, "tie_word_embeddings": True})
    model.save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    packing = Packing(format, torch.float16 if spec.sym else torch.float32)
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
        stored.update(packing.pack(layer, weight))
    save_file(stored, folder / "model.safetensors", {"format": "pt", **packing.metadata})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **packing.config(spec, layers)}))
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
        ("group_size", 16, r"qzeros: expected shape \(6, 8\), found \(3, 8\)"),
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
    with pytest.raises(BitternError, match=r"its config says gptq, but it holds no packed layer"):
        inspect(tmp_path / "plain")


@pytest.mark.parametrize(
    ("format", "sym"),
    [(name, sym) for name in FORMATS for sym in (True, False) if sym or name != "gptq"],  # v1 is written symmetric
)
def test_an_artifact_of_each_format(format: str, sym: bool, tmp_path: Path) -> None:
    spec = QuantSpec(4, 32, sym)
    parameters = quantized(tmp_path, spec, keep="layers.1.mlp.down_proj", format=format)
    found = inspect(tmp_path)
    assert found["parameters"] == parameters
    summary = found["quantization"]
    assert summary["format"] == format
    assert summary["method"] == {"gptq_v2": "gptq"}.get(format, format)
    assert summary["layers"] == {f"4 bits, group 32, {'sym' if sym else 'asym'}": 20}
    assert summary["exceptions"] == {"model.layers.1.mlp.down_proj": None}
    stored = load_file(tmp_path / "model.safetensors")
    # what the names say that belongs to attention, in whichever format
    assert found["bytes"]["attention"] == sum(t.nbytes for name, t in stored.items() if "self_attn" in name)
    assert found["bytes"]["mlp"] == sum(t.nbytes for name, t in stored.items() if ".mlp." in name)
    assert found["bytes"]["other"] == 0
    assert found["bytes"]["total"] == sum(t.nbytes for t in stored.values())
    assert verdicts(found)["bittern"]
    assert verdicts(found)["GPTQModel"] == (format in ("gptq", "gptq_v2", "awq"))
    assert verdicts(found)["mlx"] == (format in ("mlx", "awq"))
    json.dumps(found)


@pytest.mark.parametrize(("bits", "stored_bits"), [(8, 8.5), (4, 4.5)])
def test_a_gguf_file(bits: int, stored_bits: float, tmp_path: Path) -> None:
    parameters = quantized(tmp_path / "folder", QuantSpec(bits, 32), keep="layers.1.mlp.down_proj")
    path = tmp_path / "model.gguf"
    with open_checkpoint(tmp_path / "folder") as checkpoint:
        write_gguf(Artifact(checkpoint), path, dtype="fp16", tokenizer=False)
    found = inspect(path)
    assert found["parameters"] == parameters
    assert found["quantization"]["format"] == found["quantization"]["method"] == "gguf"
    assert found["quantization"]["layers"] == {f"{bits} bits, group 32, sym": 20}
    assert found["quantization"]["exceptions"] == {"model.layers.1.mlp.down_proj": None}
    attention = 3 * (2 * 64 * 64 + 2 * 64 * 32)
    assert found["bytes"]["attention"] == attention * stored_bits / 8  # blocks of 32 codes and an fp16 scale
    assert found["bytes"]["embeddings"] == 2 * 128 * 64
    assert found["bytes"]["norms"] == 4 * (2 * 3 + 1) * 64
    assert found["bytes"]["total"] == sum(found["bytes"][name] for name in KINDS) < path.stat().st_size
    assert found["files"] == {"model.gguf": path.stat().st_size}
    assert verdicts(found)["llama.cpp"] and verdicts(found)["transformers"] and not verdicts(found)["exllamav2"]


FP8 = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False},
        }
    },
}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "found 'bitsandbytes'"),
        ({"quant_method": "gptq", "bits": 5}, "bits: expected one of 2, 3, 4, 8, found 5"),
        (FP8, "float"),
    ],
)
def test_a_foreign_quantization_is_not_guessed_at(config: dict[str, Any], reason: str, tmp_path: Path) -> None:
    build("llama", GROUPED).save_pretrained(tmp_path)
    stated = json.loads((tmp_path / "config.json").read_text())
    stated["quantization_config"] = config
    (tmp_path / "config.json").write_text(json.dumps(stated))
    found = inspect(tmp_path)
    assert found["quantization"] == config
    assert (found["parameters"], found["bits_per_weight"]) == (None, None)
    (verdict,) = found["loads"]
    assert (verdict["consumer"], verdict["loads"]) == ("bittern", False)
    assert reason in verdict["reason"]


def test_an_unknown_architecture_is_still_measured(tmp_path: Path) -> None:
    save_file({"layers.0.attn.weight": torch.zeros(8, 8)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "heron"}')
    found = inspect(tmp_path)
    assert (found["parameters"], found["kv_bytes_per_token"], found["context_length"]) == (64, None, None)


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(BitternError):
        inspect(tmp_path)


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


def test_what_tensors_and_config_say_reaches_the_verdicts(tmp_path: Path) -> None:
    quantized(tmp_path / "ct", QuantSpec(4, 32, sym=False), format="compressed-tensors")
    assert not verdicts(inspect(tmp_path / "ct"))["transformers"]
    path = tmp_path / "ct" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["dequantize"] = True
    path.write_text(json.dumps(config))
    assert verdicts(inspect(tmp_path / "ct"))["transformers"]

    quantized(tmp_path / "gptq", QuantSpec(4, 32), format="gptq")
    assert verdicts(inspect(tmp_path / "gptq")) == {
        **dict.fromkeys(("bittern", "transformers", "GPTQModel", "vLLM", "SGLang", "exllamav2"), True),
        **dict.fromkeys(("auto-gptq", "llama.cpp", "mlx"), False),
    }
    path = tmp_path / "gptq" / "model.safetensors"
    stored = {name: tensor for name, tensor in load_file(path).items() if not name.endswith("k_proj.g_idx")}
    save_file(stored, path, {"format": "pt"})
    reasons = {verdict["consumer"]: verdict["reason"] for verdict in inspect(tmp_path / "gptq")["loads"]}
    assert reasons["transformers"] == "aborts without g_idx"
    assert reasons["auto-gptq"] == "loads tied embeddings as zeros"


def test_a_tied_head_that_is_stored_too_is_counted_once(tmp_path: Path) -> None:
    model = build("gemma2", {**GROUPED, "head_dim": 16})
    model.save_pretrained(tmp_path)
    counted = inspect(tmp_path)["parameters"]
    stored = load_file(tmp_path / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    del config["tie_word_embeddings"]  # as on the Hub: of this model type they are tied
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert inspect(tmp_path)["parameters"] == counted == sum(p.numel() for p in model.parameters())
