"""How large a model is: bytes and parameters per kind of layer, bits per weight, and what a token adds to its cache."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from math import prod
from typing import TYPE_CHECKING, Any

from bittern.checkpoint import plain_config
from bittern.errors import BitternError
from bittern.layout import EXPERTS
from bittern.shards import TensorInfo
from bittern.ties import tied_heads
from bittern.tokenizer import context_length

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from bittern.artifact import Artifact
    from bittern.checkpoint import Checkpoint

KINDS = ("attention", "mlp", "experts", "embeddings", "norms", "other")
_PATTERNS = {  # of a module path, in this order: the last three would match parts of a norm's or an expert's path
    "norms": r"norm[^.]*$|(^|[._])ln[_\d]*\w*$",
    "embeddings": r"embed|lm_head|(^|\.)(wte|wpe|embd|output)$",
    "experts": EXPERTS.pattern,
    "attention": r"attn|attention",
    "mlp": r"mlp|moe|feed_forward|ffn|fc[12]|fc_(in|out)$|shared_expert|w[123]$",
}
# A layer's own arithmetic that old checkpoints store: no parameters
_BUFFER = re.compile(r"(masked_bias|inv_freq|rope\.freqs)$|\.attn\.bias$")
_SUFFIX = re.compile(
    r"\.(weight|bias|qweight|qzeros|scales|g_idx|biases|weight_(packed|scale|zero_point|shape|g_idx))$"
)


def kind(tensor: str) -> str:
    """The kind of layer, one of ``KINDS``, that a tensor of this name belongs to."""
    module = _SUFFIX.sub("", tensor)
    return next((name for name, pattern in _PATTERNS.items() if re.search(pattern, module)), "other")


def count_parameters(
    plain: Iterable[TensorInfo], packed: Mapping[str, tuple[int, ...]] | None = None, tied: Collection[str] = ()
) -> Counter[str]:
    """Parameters per kind of layer.

    Args:
        plain: tensors of floats.
        packed: packed layer -> the shape of its matrix.
        tied: tensors that only repeat another, as of :func:`bittern.ties.tied_heads`: no parameters of their own.
    """
    count: Counter[str] = Counter()
    for name, shape in (packed or {}).items():
        count[kind(name)] += prod(shape)
    for info in plain:
        count[kind(info.name)] += 0 if _is_buffer(info) or info.name in tied else info.numel
    return count


def artifact_parameters(artifact: Artifact) -> Counter[str]:
    """Parameters of the dequantized model, per kind of layer."""
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in artifact.layers.items()}
    return count_parameters(artifact.plain.values(), shapes, tied_heads(artifact.checkpoint))


def stored_bytes(checkpoint: Checkpoint) -> dict[str, int]:
    """Bytes per kind, as stored: a GGUF file's tensors show dequantized."""
    gguf = checkpoint.gguf
    stored = checkpoint.tensors.values()
    return sum_bytes((info.name, info.nbytes if gguf is None else gguf.nbytes[info.name]) for info in stored)


def sum_bytes(tensors: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Bytes per kind, of tensors by their names and bytes."""
    sizes = dict.fromkeys(KINDS, 0)
    for name, nbytes in tensors:
        sizes[kind(name)] += nbytes
    return sizes


def bits_per_weight(parameters: Mapping[str, int], sizes: Mapping[str, int]) -> dict[str, float | None]:
    """Stored bits per parameter, scales and zeros included: of ``all``, and ``without_embeddings`` (nor head)."""
    count, total = sum(parameters.values()), sum(sizes.values())
    inner = count - parameters.get("embeddings", 0)
    return {
        "all": 8 * total / count if count else None,
        "without_embeddings": 8 * (total - sizes["embeddings"]) / inner if inner else None,
    }


def size_record(parameters: Mapping[str, int], sizes: Mapping[str, int]) -> dict[str, Any]:
    """One side of ``size`` in a manifest: parameters, bytes per kind and in all, bits per weight."""
    return {
        "parameters": sum(parameters.values()),
        "bytes": {**sizes, "total": sum(sizes.values())},
        "bits_per_weight": bits_per_weight(parameters, sizes),
    }


def source_size(artifact: Artifact) -> dict[str, Any]:
    """:func:`size_record` of a checkpoint, packed or not."""
    return size_record(artifact_parameters(artifact), stored_bytes(artifact.checkpoint))


def planned_size(
    plan: Iterable[TensorInfo],
    plain: Iterable[TensorInfo],
    packed: Mapping[str, tuple[int, ...]] | None = None,
    tied: Collection[str] = (),
) -> dict[str, Any]:
    """:func:`size_record` of what is about to be written.

    Args:
        plan: every tensor of it.
        plain: those that hold floats.
        packed: packed layer -> the shape of its matrix.
        tied: those of them that are the embedding once more.
    """
    return size_record(count_parameters(plain, packed, tied), sum_bytes((info.name, info.nbytes) for info in plan))


def kv_elements(config: PretrainedConfig) -> int:
    """Keys and values that one token adds to the cache of transformers' model, over all layers."""
    text: Any = config.get_text_config(decoder=True)
    heads = getattr(text, "num_attention_heads", None)
    if not heads:
        return 0
    types = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    layers = sum(("attention" in name and "linear" not in name) or name == "hybrid" for name in types)
    layers -= getattr(text, "num_kv_shared_layers", None) or 0  # the last ones use what others have cached
    if getattr(text, "kv_lora_rank", None):  # DeepSeek: keys and values share one low-rank state
        return int(layers * (text.kv_lora_rank + text.qk_rope_head_dim))
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    if text.model_type == "falcon":  # its newer form repeats grouped heads before it caches them
        kv_heads = 1 if text.multi_query and not text.new_decoder_architecture else heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return int(layers * 2 * kv_heads * head_dim)


def cache_size(config: Mapping[str, Any]) -> tuple[int | None, dict[str, int] | None]:
    """Context length and bytes of cache per token, by transformers' view, under which all architectures share names.

    Raises:
        BitternError: for a config that transformers does not understand though it knows the architecture.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = str(config.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        return None, None
    try:
        parsed: PretrainedConfig = CONFIG_MAPPING[model_type].from_dict(plain_config(config))
        length = context_length(parsed)
    except Exception as error:  # of a config that lies, transformers raises whatever comes
        reason = f"{type(error).__name__}: {error}"
        raise BitternError(f"config.json: transformers does not understand this {model_type}: {reason}") from error
    try:
        elements = kv_elements(parsed)
    except Exception:  # layers of several kinds, or other names: not known is better than wrong
        return length, None
    return length, {"fp16": 2 * elements, "fp32": 4 * elements}


def unchanged_cache(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says of context and cache when a job leaves the architecture as it is; null where unknown."""
    try:
        length, cache = cache_size(config)
    except BitternError:  # an architecture whose config has no such names is still quantized
        length, cache = None, None
    return {
        "context_length": length,
        "kv_bytes_per_token": None if cache is None else {"source": cache, "output": cache},
    }


def _is_buffer(info: TensorInfo) -> bool:
    return bool(_BUFFER.search(info.name)) and (len(info.shape) != 1 or not info.name.endswith(".attn.bias"))
