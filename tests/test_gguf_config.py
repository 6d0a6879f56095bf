"""Configurations out of GGUF files, of architectures that bittern does not write: the model's own logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import bittern
from bittern.checkpoint import open_checkpoint
from bittern.errors import BitternError
from bittern.inspect import inspect
from bittern.runtime import attention
from tests import tiny

gguf = pytest.importorskip("gguf")

IDS = torch.arange(4, 40).view(2, 18)
GEMMA2 = {"num_hidden_layers": 46, "head_dim": 8, "query_pre_attn_scalar": 16, "sliding_window": 8}
Add = Callable[[Any, Any], None]


def rope(theta: float, part: float | None = None) -> dict[str, Any]:
    said = {"rope_type": "default", "rope_theta": theta}
    return {"rope_parameters": said if part is None else said | {"partial_rotary_factor": part}}


def layer_norm(writer: Any, config: Any) -> None:
    names = ("norm_epsilon", "layer_norm_eps", "layer_norm_epsilon")
    writer.add_layer_norm_eps(next(getattr(config, name) for name in names if hasattr(config, name)))


def rms_norm(writer: Any, config: Any) -> None:
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def part_of_heads(writer: Any, config: Any) -> None:
    dim = config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(int(dim * config.rope_parameters["partial_rotary_factor"]))


def window(writer: Any, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window)


def gemma2(writer: Any, config: Any) -> None:
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)


def no_window(writer: Any, _: Any) -> None:
    writer.add_sliding_window(0)


def states(writer: Any, config: Any) -> None:
    writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
    writer.add_ssm_conv_kernel(config.conv_kernel)
    writer.add_ssm_inner_size(config.intermediate_size)
    writer.add_ssm_state_size(config.state_size)
    writer.add_ssm_time_step_rank(config.time_step_rank)
    writer.add_ssm_dt_b_c_rms(False)


def experts(writer: Any, config: Any) -> None:
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if hasattr(config, "shared_expert_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MODELS: dict[str, tuple[str, dict[str, Any], tuple[Add, ...]]] = {
    "base": ("starcoder2", {"sliding_window": None} | rope(1e6), (layer_norm,)),
    "window": ("starcoder2", {"sliding_window": 8, "norm_epsilon": 1e-3}, (layer_norm, window)),
    "part": ("stablelm", {"layer_norm_eps": 1e-3} | rope(1e6, 0.5), (layer_norm, part_of_heads)),
    "part and window": ("phi3", {"sliding_window": 8} | rope(5e4, 0.75), (rms_norm, part_of_heads, window)),
    "no window": ("phi3", {"sliding_window": None}, (rms_norm, no_window)),
    "positions": ("gpt2", {}, (layer_norm,)),
    "states": ("mamba", {"state_size": 8, "intermediate_size": 128}, (states,)),
    "shared": ("qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 64}, (rms_norm, experts)),
    "normed": ("qwen3_moe", EXPERTS | {"head_dim": 16, "norm_topk_prob": True}, (rms_norm, experts)),
    "27B": ("gemma2", GEMMA2 | {"final_logit_softcapping": 5.0}, (rms_norm, gemma2, window)),
    "9B": ("gemma2", GEMMA2 | {"num_hidden_layers": 2, "query_pre_attn_scalar": 8}, (rms_norm, gemma2, window)),
}


def write(model: PreTrainedModel, model_type: str, path: Path, *more: Add) -> Path:
    """A file as llama.cpp's converter makes it of an architecture whose heads it leaves in order."""
    config: Any = model.config
    architecture = model_type.replace("_", "")
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    for attribute, add in {
        "max_position_embeddings": writer.add_context_length,
        "intermediate_size": writer.add_feed_forward_length,
        "num_attention_heads": writer.add_head_count,
        "num_key_value_heads": writer.add_head_count_kv,
    }.items():
        if hasattr(config, attribute):
            add(getattr(config, attribute))
    if getattr(config, "rope_parameters", None):
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{number}" for number in range(config.vocab_size)])
    writer.add_pad_token_id(2)
    for add in more:
        add(writer, config)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    for name, values in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for part, stored in parts(architecture, name, values).items():
            found = names.get_name(part, try_suffixes=(".weight", ".bias"))
            writer.add_tensor(found, stored.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def parts(architecture: str, name: str, values: Tensor) -> dict[str, Tensor]:
    """What the converter makes of a tensor, by names of which gguf knows the equivalent."""
    if architecture == "gemma2" and name.endswith("norm.weight"):
        return {name: values + 1}
    if architecture == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return {name: values.T}
    if name.endswith("A_log"):
        return {name: -values.exp()}
    if name.endswith("conv1d.weight"):
        return {name: values.squeeze(1)}
    if name.endswith("experts.down_proj"):
        return {f"{name}.weight": values}
    if name.endswith("experts.gate_up_proj"):
        pair = zip(("gate_proj", "up_proj"), values.chunk(2, dim=1), strict=True)
        return {f"{name.replace('gate_up_proj', part)}.weight": half for part, half in pair}
    return {name: values}


@pytest.mark.parametrize("name", MODELS)
def test_a_file_computes_what_its_model_does(name: str, tmp_path: Path) -> None:
    model_type, config, more = MODELS[name]
    model = tiny.random_model(model_type, initializer_range=0.2, **config)
    back = bittern.load(write(model, model_type, tmp_path / "a.gguf", *more), kernels="torch")
    attention.use(model, kernels=False)
    with torch.inference_mode():
        expected, found = model(IDS).logits, back(IDS).logits
    assert (expected - found).abs().max() < 1e-5 * expected.abs().max()


def refused(path: Path, words: str) -> None:
    with pytest.raises(BitternError, match=words), open_checkpoint(path):
        pass


def test_a_key_that_nobody_reads_is_refused(tmp_path: Path) -> None:
    model = tiny.random_model("starcoder2", sliding_window=None)

    def scaled(writer: Any, _: Any) -> None:
        writer.add_logit_scale(0.5)

    path = write(model, "starcoder2", tmp_path / "a.gguf", layer_norm, scaled)
    refused(path, r"starcoder2.logit_scale: found 0.5, and what that does to such a model is not known")


def test_a_key_that_says_other_than_the_model_is_refused(tmp_path: Path) -> None:
    def part(writer: Any, _: Any) -> None:
        writer.add_rope_dimension_count(4)

    path = write(tiny.random_model("qwen2"), "qwen2", tmp_path / "a.gguf", rms_norm, part)
    refused(path, r"qwen2.rope.dimension_count: expected 16 of such a model, found 4")

    def windowed(writer: Any, _: Any) -> None:
        writer.add_sliding_window(8)

    path = write(tiny.random_model("qwen2"), "qwen2", tmp_path / "b.gguf", rms_norm, windowed)
    refused(path, r"qwen2.attention.sliding_window: expected 0 of such a model, found 8")


def test_a_factor_without_a_kind_is_linear(tmp_path: Path) -> None:
    path = write(
        tiny.random_model("qwen2"), "qwen2", tmp_path / "a.gguf", rms_norm, lambda w, _: w.add_rope_scaling_factor(4.0)
    )
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.config["rope_parameters"]["rope_type"] == "linear"
        assert checkpoint.config["rope_parameters"]["factor"] == 4.0


@pytest.mark.parametrize("name", ["base", "part and window", "27B"])
def test_says_what_transformers_would_lose(name: str, tmp_path: Path) -> None:
    model_type, config, more = MODELS[name]
    path = write(tiny.random_model(model_type, **config), model_type, tmp_path / "a.gguf", *more)
    said = {verdict["consumer"]: verdict for verdict in inspect(path)["loads"]}
    assert said["bittern"]["loads"] and said["llama.cpp"]["loads"] and not said["transformers"]["loads"]
