"""What is in a checkpoint, from its headers and config alone."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from bittern.artifact import FORMATS, Artifact, quantization_config
from bittern.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from bittern.consumers import Verdict, verdicts
from bittern.errors import BitternError
from bittern.layout import EXPERTS, Layout, layout_of
from bittern.tokenizer import context_length

if TYPE_CHECKING:
    from transformers import PretrainedConfig

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
        - ``quantization``: None, or method, format, bits, group_size, sym, desc_act, quantizer, ``layers`` (grid ->
          how many) and ``exceptions`` (layer -> grid, None for one left as floats); one that bittern does not
          read is there in its own words
        - ``files``: name -> bytes
        - ``loads``: per consumer ``consumer``, ``loads``, ``reason``; of a quantization that bittern does not
          read, its own reason alone

    Raises:
        BitternError: not a checkpoint, or packed tensors that contradict its config.
    """
    with open_checkpoint(source, revision) as checkpoint:
        length, cache = _of_config(checkpoint.config)
        method, found = quantization_config(checkpoint)
        unread = _why_unread(method, found)
        artifact = Artifact(checkpoint) if unread is None else None
        layout = None if artifact is None else layout_of(artifact)
        parameters = None if artifact is None else _parameters(artifact)
        sizes = _sizes(checkpoint)
        judged = [Verdict("bittern", False, str(unread))] if layout is None else verdicts(layout)
        return {
            "source": checkpoint.source,
            "revision": checkpoint.revision,
            "model_type": checkpoint.config.get("model_type"),
            "architectures": checkpoint.config.get("architectures") or [],
            "context_length": length,
            "parameters": None if parameters is None else sum(parameters.values()),
            "bits_per_weight": None if parameters is None else _bits_per_weight(parameters, sizes),
            "bytes": {**sizes, "total": sum(sizes.values())},
            "kv_bytes_per_token": cache,
            "dtypes": _dtypes(checkpoint),
            "quantization": _summary(artifact, layout) if artifact and layout else found,
            "files": _files(checkpoint),
            "loads": [asdict(verdict) for verdict in judged],
        }


def kind(tensor: str) -> str:
    """The kind of layer, one of ``KINDS``, that a tensor of this name belongs to."""
    module = _SUFFIX.sub("", tensor)
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


def _of_config(config: dict[str, Any]) -> tuple[int | None, dict[str, int] | None]:
    """Context length and bytes of cache per token, by transformers' view, under which all architectures share names."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = str(config.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        return None, None
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    try:
        parsed: PretrainedConfig = CONFIG_MAPPING[model_type].from_dict(plain)
        elements = kv_elements(parsed)
        return context_length(parsed), {"fp16": 2 * elements, "fp32": 4 * elements}
    except Exception as error:  # of a config that lies, transformers raises whatever comes
        reason = f"{type(error).__name__}: {error}"
        raise BitternError(f"config.json: transformers does not understand this {model_type}: {reason}") from error


def _why_unread(method: str | None, found: Mapping[str, Any]) -> str | None:
    """Why bittern does not understand a quantization, which is then shown as it was found."""
    if method is None:
        return None
    if method not in FORMATS:
        return f"quant_method: expected one of {', '.join(FORMATS)}, found {method!r}"
    try:
        FORMATS[method].read_config(found)
    except BitternError as error:
        return str(error)
    return None


def _parameters(artifact: Artifact) -> Counter[str]:
    """Parameters of the dequantized model, per kind of layer."""
    count: Counter[str] = Counter()
    for name, layer in artifact.layers.items():
        count[kind(name)] += layer.out_features * layer.in_features
    for name, info in artifact.plain.items():
        count[kind(name)] += 0 if _is_buffer(info) else info.numel
    return count


def _is_buffer(info: TensorInfo) -> bool:
    return bool(_BUFFER.search(info.name)) and (len(info.shape) != 1 or not info.name.endswith(".attn.bias"))


def _sizes(checkpoint: Checkpoint) -> dict[str, int]:
    """Bytes per kind, as stored: a GGUF file's tensors show dequantized."""
    sizes = dict.fromkeys(KINDS, 0)
    for name, info in checkpoint.tensors.items():
        sizes[kind(name)] += info.nbytes if checkpoint.gguf is None else checkpoint.gguf.nbytes[name]
    return sizes


def _bits_per_weight(parameters: Counter[str], sizes: dict[str, int]) -> dict[str, float | None]:
    count, total = sum(parameters.values()), sum(sizes.values())
    inner = count - parameters["embeddings"]
    return {
        "all": 8 * total / count if count else None,
        "without_embeddings": 8 * (total - sizes["embeddings"]) / inner if inner else None,
    }


def _dtypes(checkpoint: Checkpoint) -> dict[str, dict[str, int]]:
    result: defaultdict[str, dict[str, int]] = defaultdict(lambda: {"tensors": 0, "bytes": 0})
    for info in checkpoint.tensors.values():
        entry = result[str(info.dtype).removeprefix("torch.")]
        entry["tensors"] += 1
        entry["bytes"] += info.nbytes
    return dict(result)


def _summary(artifact: Artifact, layout: Layout) -> dict[str, Any] | None:
    """What a user asks of a quantization."""
    if not layout.packed:
        return None
    grids = Counter(layout.packed.values())
    # a GGUF file states no grid of its own: what most layers have stands for it
    default = grids.most_common(1)[0][0] if artifact.scheme is None else artifact.scheme.default
    return {
        "method": quantization_config(artifact.checkpoint)[0] or "gguf",
        "format": layout.format,
        "bits": default.bits,
        "group_size": default.group_size,
        "sym": default.sym,
        "desc_act": layout.desc_act,
        "quantizer": list(layout.quantizer),
        "layers": {f"{s.bits} bits, group {s.group_size}, {'sym' if s.sym else 'asym'}": n for s, n in grids.items()},
        "exceptions": {
            **{name: asdict(spec) for name, spec in layout.packed.items() if spec != default},
            **dict.fromkeys(layout.plain),
        },
    }


def _files(checkpoint: Checkpoint) -> dict[str, int]:
    if checkpoint.gguf is not None:
        return {checkpoint.path.name: checkpoint.path.stat().st_size}
    return {path.name: path.stat().st_size for path in sorted(checkpoint.folder.iterdir()) if path.is_file()}
