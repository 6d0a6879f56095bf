"""What is in a checkpoint, from its headers and config alone."""

from __future__ import annotations

import json
import os
import re
from collections import Counter, defaultdict
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from bittern.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from bittern.consumers import GptqLayout, Verdict, gptq_consumers, plain_consumers
from bittern.errors import BitternError
from bittern.formats import gptq as gptq_format
from bittern.tokenizer import context_length
from bittern.weight import QuantSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig

KINDS = ("attention", "mlp", "experts", "embeddings", "norms", "other")
_PATTERNS = {  # of a module path, in this order: the last three would match parts of a norm's or an expert's path
    "norms": r"norm[^.]*$|(^|[._])ln[_\d]*\w*$",
    "embeddings": r"embed|lm_head|(^|\.)(wte|wpe|embd|output)$",
    "experts": r"(^|\.)experts($|\.)|block_sparse_moe\.(in|out)put_linear$",
    "attention": r"attn|attention",
    "mlp": r"mlp|moe|feed_forward|ffn|fc[12]|fc_(in|out)$|shared_expert|w[123]$",
}
# A layer's own arithmetic that old checkpoints store: no parameters
_BUFFER = re.compile(r"(masked_bias|inv_freq|rope\.freqs)$|\.attn\.bias$")
_BLOCK_MATRIX = re.compile(r"\.\d+\..*\.weight$")


def inspect(source: str | os.PathLike[str], revision: str | None = None) -> dict[str, Any]:
    """Describe a checkpoint folder, a GGUF file or a Hub id without reading weights.

    Returns:
        A dictionary that JSON holds:

        - ``source``, ``revision``, ``model_type``, ``architectures``, ``context_length`` (None: no limit)
        - ``parameters``: of the model, whatever its packing; None for a packing that is not understood
        - ``bits_per_weight``: ``all`` and ``without_embeddings`` (nor head): stored bits, scales and
          zeros included, per parameter
        - ``bytes``: per kind of layer (``KINDS``) and ``total``
        - ``kv_bytes_per_token``: ``fp16`` and ``fp32``; 0 without attention, None for an unknown architecture
        - ``dtypes``: name -> ``tensors``, ``bytes``
        - ``quantization``: None, or method, bits, group_size, sym, desc_act, checkpoint_format, quantizer,
          ``layers`` (grid -> how many) and ``exceptions`` (layer -> grid, None for one left as floats)
        - ``files``: name -> bytes
        - ``loads``: per consumer ``consumer``, ``loads``, ``reason``

    Raises:
        BitternError: not a checkpoint, or packed tensors that contradict its config.
    """
    with open_checkpoint(source, revision) as checkpoint:
        config = _model_config(checkpoint.config)
        method, found = _quantization_config(checkpoint)
        packed = method == "gptq"
        layout = _gptq_layout(checkpoint, found) if packed else None
        understood = packed or method is None
        parameters = _parameters(checkpoint, layout)
        sizes, total = _sizes(checkpoint)
        return {
            "source": checkpoint.source,
            "revision": checkpoint.revision,
            "model_type": checkpoint.config.get("model_type"),
            "architectures": checkpoint.config.get("architectures") or [],
            "context_length": None if config is None else context_length(config),
            "parameters": sum(parameters.values()) if understood else None,
            "bits_per_weight": _bits_per_weight(parameters, sizes, total) if understood else None,
            "bytes": {**sizes, "total": total},
            "kv_bytes_per_token": None if config is None else _kv_bytes(config),
            "dtypes": _dtypes(checkpoint),
            "quantization": _summary(found, layout) if method else None,
            "files": _files(checkpoint),
            "loads": [asdict(verdict) for verdict in _consumers(checkpoint, method, layout)],
        }


def kind(tensor: str) -> str:
    """The kind of layer, one of ``KINDS``, that a tensor of this name belongs to."""
    module = re.sub(r"\.(weight|bias|qweight|qzeros|scales|g_idx)$", "", tensor)
    return next((name for name, pattern in _PATTERNS.items() if re.search(pattern, module)), "other")


def kv_elements(config: PretrainedConfig) -> int:
    """Keys and values that one token adds to the cache of transformers' model, over all layers."""
    text: Any = config.get_text_config(decoder=True)
    heads = getattr(text, "num_attention_heads", None)
    if not heads:
        return 0
    types = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    layers = sum("attention" in name and "linear" not in name for name in types)
    if getattr(text, "kv_lora_rank", None):  # DeepSeek: keys and values share one low-rank state
        return int(layers * (text.kv_lora_rank + text.qk_rope_head_dim))
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    if text.model_type == "falcon":  # its newer form repeats grouped heads before it caches them
        kv_heads = 1 if text.multi_query and not text.new_decoder_architecture else heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return int(layers * 2 * kv_heads * head_dim)


def _model_config(config: dict[str, Any]) -> PretrainedConfig | None:
    """transformers' view, under which all architectures share attribute names; None when it has none."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if config.get("model_type") not in CONFIG_MAPPING:
        return None
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    result: PretrainedConfig = CONFIG_MAPPING[config["model_type"]].from_dict(plain)
    return result


def _kv_bytes(config: PretrainedConfig) -> dict[str, int]:
    elements = kv_elements(config)
    return {"fp16": 2 * elements, "fp32": 4 * elements}


def _quantization_config(checkpoint: Checkpoint) -> tuple[str | None, dict[str, Any]]:
    """The method and its config; (None, {}) for a plain checkpoint."""
    found = checkpoint.config.get("quantization_config")
    path = checkpoint.folder / "quantize_config.json"  # where the oldest artifacts have it alone
    if found is None and checkpoint.gguf_file is None and path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise BitternError(f"{path}: expected JSON, found {error}") from error
    if found is None:
        return None, {}
    if not isinstance(found, dict):
        raise BitternError(f"quantization_config: expected an object, found {type(found).__name__}")
    return found.get("quant_method", found.get("method", "gptq")), found


def _gptq_layout(checkpoint: Checkpoint, found: dict[str, Any]) -> GptqLayout:
    config, quantization = checkpoint.config, gptq_format.read_config(found)
    packed: dict[str, QuantSpec] = {}
    shapes: dict[str, tuple[int, int]] = {}
    for layer in gptq_format.packed_layers(checkpoint.tensors):
        spec = quantization.spec(layer)
        if spec is None:
            raise BitternError(f"{layer}: found packed, but the quantization config says that it is skipped")
        packed[layer], shapes[layer] = spec, _packed_shape(checkpoint, layer, spec)
    if not packed:
        raise BitternError(f"{checkpoint.source}: its config says GPTQ, but no tensor ends in .qweight")
    plain = (name for name, info in checkpoint.tensors.items() if len(info.shape) >= 2 and _BLOCK_MATRIX.search(name))
    left_out = tuple(name.removesuffix(".weight") for name in plain if kind(name) not in ("norms", "embeddings"))
    return GptqLayout(
        packed=packed,
        # routers of experts are no Linear layers in transformers: nobody packs them
        plain=tuple(name for name in left_out if not re.search(r"(^|\.)(gate|router)(\.|$)|conv1d$", name)),
        shapes=shapes,
        checkpoint_format=quantization.checkpoint_format,
        desc_act=quantization.desc_act,
        has_g_idx=all(f"{layer}.g_idx" in checkpoint.tensors for layer in packed),
        dynamic=bool(found.get("dynamic")),
        modules=bool(found.get("modules_in_block_to_quantize")),
        quantizer=quantization.quantizer,
        model_type=str(config.get("model_type")),
        tied=bool(config.get("tie_word_embeddings"))
        and not any(name.startswith("lm_head.") for name in checkpoint.tensors),
        rope_theta="rope_theta" in config or "rope_parameters" not in config,
        experts=any(kind(layer) == "experts" for layer in packed),
    )


def _packed_shape(checkpoint: Checkpoint, layer: str, spec: QuantSpec) -> tuple[int, int]:
    """(out_features, in_features) of a packed layer, from shapes alone."""
    rows, out_features = checkpoint.tensors[f"{layer}.qweight"].shape
    in_features = rows * 32 // spec.bits
    g_idx = checkpoint.tensors.get(f"{layer}.g_idx")
    if g_idx is not None:  # exact; the rows are rounded up
        in_features = g_idx.shape[0]
        wanted = -(-in_features * spec.bits // 32)
        if rows != wanted:
            raise BitternError(
                f"{layer}.qweight: expected {wanted} rows ({in_features} columns of {spec.bits} bits), found {rows}"
            )
    scales = checkpoint.tensors.get(f"{layer}.scales")
    expected = (spec.groups(in_features), out_features)
    if scales is None or scales.shape != expected:
        raise BitternError(f"{layer}.scales: expected shape {expected}, found {scales.shape if scales else None}")
    return out_features, in_features


def _parameters(checkpoint: Checkpoint, layout: GptqLayout | None) -> Counter[str]:
    """Parameters of the dequantized model, per kind of layer."""
    shapes = layout.shapes if layout is not None else {}
    count: Counter[str] = Counter()
    for name, info in checkpoint.tensors.items():
        layer, _, suffix = name.rpartition(".")
        if layer not in shapes or suffix == "bias":
            count[kind(name)] += 0 if _is_buffer(info) else info.numel
        elif suffix == "qweight":
            count[kind(name)] += shapes[layer][0] * shapes[layer][1]
    return count


def _is_buffer(info: TensorInfo) -> bool:
    return bool(_BUFFER.search(info.name)) and (len(info.shape) != 1 or not info.name.endswith(".attn.bias"))


def _sizes(checkpoint: Checkpoint) -> tuple[dict[str, int], int]:
    """Bytes per kind and in total; of a GGUF file, whose tensors show dequantized, the total alone."""
    if checkpoint.gguf_file is not None:
        return {}, (checkpoint.folder / checkpoint.gguf_file).stat().st_size
    sizes = dict.fromkeys(KINDS, 0)
    for name, info in checkpoint.tensors.items():
        sizes[kind(name)] += info.nbytes
    return sizes, sum(sizes.values())


def _bits_per_weight(parameters: Counter[str], sizes: dict[str, int], total: int) -> dict[str, float | None]:
    count = sum(parameters.values())
    inner = count - parameters["embeddings"]
    inner_bytes = total - sizes["embeddings"] if sizes else None
    return {
        "all": 8 * total / count if count else None,
        "without_embeddings": 8 * inner_bytes / inner if inner and inner_bytes is not None else None,
    }


def _dtypes(checkpoint: Checkpoint) -> dict[str, dict[str, int]]:
    result: defaultdict[str, dict[str, int]] = defaultdict(lambda: {"tensors": 0, "bytes": 0})
    for info in checkpoint.tensors.values():
        entry = result[str(info.dtype).removeprefix("torch.")]
        entry["tensors"] += 1
        entry["bytes"] += info.nbytes
    return dict(result)


def _summary(found: dict[str, Any], layout: GptqLayout | None) -> dict[str, Any]:
    """What a user asks of a quantization; of a foreign method, its own words."""
    if layout is None:
        return found
    read = gptq_format.read_config(found)
    default = QuantSpec(read.bits, read.group_size, read.sym)
    grids = Counter(layout.packed.values())
    return {
        "method": "gptq",
        "bits": read.bits,
        "group_size": read.group_size,
        "sym": read.sym,
        "desc_act": read.desc_act,
        "checkpoint_format": read.checkpoint_format,
        "quantizer": list(read.quantizer),
        "layers": {f"{s.bits} bits, group {s.group_size}, {'sym' if s.sym else 'asym'}": n for s, n in grids.items()},
        "exceptions": {
            **{name: asdict(spec) for name, spec in layout.packed.items() if spec != default},
            **dict.fromkeys(layout.plain),
        },
    }


def _files(checkpoint: Checkpoint) -> dict[str, int]:
    if checkpoint.gguf_file is not None:
        return {checkpoint.gguf_file: (checkpoint.folder / checkpoint.gguf_file).stat().st_size}
    return {path.name: path.stat().st_size for path in sorted(checkpoint.folder.iterdir()) if path.is_file()}


def _consumers(checkpoint: Checkpoint, method: str | None, layout: GptqLayout | None) -> list[Verdict]:
    """No verdicts on methods whose layout is not read here."""
    if layout is not None:
        return gptq_consumers(layout)
    if method is not None:
        return []
    if checkpoint.gguf_file is not None:
        return plain_consumers("gguf")
    safetensors = any(checkpoint.folder.glob("*.safetensors"))
    return plain_consumers("safetensors" if safetensors else "bin")
