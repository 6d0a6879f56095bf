"""The configuration of a model out of the metadata of a GGUF file.

transformers knows names for most keys; what it overlooks is added here, what llama.cpp has built in beside its keys
too, and a key that nobody reads is refused: it would change what the model computes. Facts as in llama.cpp's
llama-model.cpp and src/models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bittern.errors import BitternError
from bittern.formats.gguf_rope import FREQUENCIES, read_rope

if TYPE_CHECKING:
    from gguf import GGUFReader

_OVERLOOKED = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
"""Keys that transformers passes over -> attributes of the configurations that have them."""

_SHAPES = (
    *("vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length", "expert_count"),
    *("expert_feed_forward_length", "expert_shared_feed_forward_length", "attention.head_count"),
    *("attention.head_count_kv", "attention.key_length", "attention.value_length"),
)
"""Keys that the tensors' own shapes say once more; a model of others has no place for them."""

_IDLE = ("tensor_data_layout", "pooling_type", "rope.scaling.finetuned", "rope.scaling.original_context_length")
"""Keys that change nothing about logits by themselves."""

_SCALING = ("type", "factor", "attn_factor", "yarn_beta_fast", "yarn_beta_slow")  # rope.scaling.*, of read_rope
_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
_PARTLY_TURNED = ("phi3", "stablelm", "nemotron")  # rotate some columns of a head, by default or in some models


def read_field(reader: GGUFReader, key: str) -> Any:
    """The value of a key, None for one that the file does not have."""
    field = reader.get_field(key)
    return None if field is None else field.contents()


def read_config(parsed: dict[str, Any], reader: GGUFReader, architecture: str) -> tuple[dict[str, Any], nn.Module]:
    """The configuration as config.json would have it, and a model without values, which tells names and shapes.

    Args:
        parsed: what transformers made of the metadata, arguments of a configuration; completed in place.
        reader: of the file.
        architecture: llama.cpp's name of it.

    Raises:
        BitternError: naming a key whose meaning for this model is not known.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    _complete(parsed, reader, architecture)
    config = AutoConfig.for_model(**parsed)
    _account(config, reader, architecture)
    factory: Any = AutoModelForCausalLM
    with torch.device("meta"):
        model: nn.Module = factory.from_config(config)
    stated = {key: value for key, value in config.to_dict().items() if not key.startswith("_")}
    others = (read_field(reader, f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom"))
    ends = list(dict.fromkeys(end for end in (stated.get("eos_token_id"), *others) if isinstance(end, int)))
    if len(ends) > 1:
        stated["eos_token_id"] = ends  # llama.cpp stops at any of them
    return stated | {"architectures": [type(model).__name__], "dtype": "float32"}, model


def _complete(parsed: dict[str, Any], reader: GGUFReader, architecture: str) -> None:
    """Put what transformers overlooks, and what llama.cpp takes for granted, into the arguments.

    Raises:
        BitternError: for a scaled rotary embedding of a kind that is not read here.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    def field(key: str) -> Any:
        return read_field(reader, f"{architecture}.{key}")

    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if architecture == "llama" and field("expert_count"):
        parsed["model_type"] = "mixtral"
    defaults = CONFIG_MAPPING[parsed["model_type"]]()
    head_dim = field("attention.key_length")
    if head_dim is not None and architecture in ("llama", "qwen2", "qwen3"):
        parsed["head_dim"] = int(head_dim)
    epsilon = field("attention.layer_norm_rms_epsilon") or field("attention.layer_norm_epsilon")
    if epsilon is not None:
        parsed[next(name for name in _EPSILONS if hasattr(defaults, name))] = epsilon
    theta = field("rope.freq_base") or 10000.0
    parsed.pop("rope_scaling", None)  # gpt-oss: transformers takes lengths of keys for their values
    dim = parsed.get("head_dim") or parsed.get("hidden_size", 0) // (parsed.get("num_attention_heads") or 1)
    factors = tensors.get(FREQUENCIES)
    frequencies = None if factors is None else torch.tensor(factors.data, dtype=torch.float32)
    scaled = read_rope(lambda key: field(f"rope.scaling.{key}"), frequencies, theta, dim)
    rope: dict[str, Any] = scaled or {"rope_type": "default", "rope_theta": theta}
    turned = field("rope.dimension_count")
    if architecture in _PARTLY_TURNED and turned is not None:
        rope["partial_rotary_factor"] = parsed["partial_rotary_factor"] = int(turned) / dim
    if hasattr(defaults, "rope_parameters"):
        parsed.pop("rope_theta", None)
        parsed["rope_parameters"] = rope
    if architecture == "gemma3":
        local = {"rope_type": "default", "rope_theta": field("rope.freq_base_swa") or 10000.0}
        parsed["rope_parameters"] = {"full_attention": rope, "sliding_attention": local}
    if architecture in ("gemma2", "gemma3"):
        own = parsed["hidden_size"] // parsed["num_attention_heads"]
        large = parsed["num_hidden_layers"] == {"gemma2": 46, "gemma3": 62}[architecture]  # llama.cpp tells the 27B so
        parsed["query_pre_attn_scalar"] = own if large else parsed.get("head_dim", 256)
    for key, name in _OVERLOOKED.items():
        if hasattr(defaults, name) and field(key) is not None:
            parsed[name] = field(key)
    if architecture in ("phi3", "starcoder2"):
        parsed["sliding_window"] = field("attention.sliding_window") or None  # of Phi-4 it is 0: none
    if architecture == "gpt2":
        parsed["n_positions"] = field("context_length")
    if architecture == "llama":
        # A file whose name is "mistral" is parsed as one, with a window of 4096 that the file does not have.
        if "sliding_window" in parsed or parsed.get("model_type") == "mistral":
            parsed["sliding_window"] = None
        if parsed["model_type"] != "mixtral":
            parsed["attention_bias"] = "blk.0.attn_output.bias" in tensors
            parsed["mlp_bias"] = "blk.0.ffn_down.bias" in tensors


def _account(config: Any, reader: GGUFReader, architecture: str) -> None:
    """Refuse a key of the architecture that is not heeded, or says other than the configuration."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    mapping: dict[str, Any] = GGUF_CONFIG_MAPPING
    theirs = mapping.get(config.model_type.removesuffix("_text"), {})
    read = {key for key, name in theirs.items() if name is not None} | {f"rope.scaling.{key}" for key in _SCALING}
    read |= {*_SHAPES, *_IDLE, "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"}
    says = _says(config)
    for key in reader.fields:
        name = key.removeprefix(f"{architecture}.")
        if name == key or (name in read and name not in says):
            continue
        found, expected = read_field(reader, key), says.get(name)
        if expected is None:
            raise BitternError(f"{key}: found {found}, and what that does to such a model is not known")
        if abs(found - expected) > 1e-6 * abs(expected):
            raise BitternError(f"{key}: expected {expected} of such a model, found {found}")


def _says(config: Any) -> dict[str, Any]:
    """Key -> what the configuration has for it, where it has something."""
    rope = getattr(config, "rope_parameters", None) or {}
    full, local = rope.get("full_attention", rope), rope.get("sliding_attention", {})
    heads = getattr(config, "num_attention_heads", None)
    dim = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else None)
    said = {
        "rope.freq_base": full.get("rope_theta"),
        "rope.freq_base_swa": local.get("rope_theta"),
        "rope.dimension_count": int(dim * full.get("partial_rotary_factor", 1.0)) if dim and full else None,
        "attention.sliding_window": getattr(config, "sliding_window", None) or 0,
        "expert_used_count": getattr(config, "num_experts_per_tok", 0),
        "attn_logit_softcapping": getattr(config, "attn_logit_softcapping", None),
        "final_logit_softcapping": getattr(config, "final_logit_softcapping", None),
        "use_parallel_residual": getattr(config, "use_parallel_residual", None),
        "attention.causal": True,
        "ssm.dt_b_c_rms": False,  # norms that FalconMamba has
    }
    return {key: value for key, value in said.items() if value is not None}
