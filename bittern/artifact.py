"""The packed layers of a checkpoint, whichever format they are stored in.

Runtime, repacking, verifying and inspecting meet here: each asks for a layer by its name and gets a
:class:`~bittern.weight.QuantWeight`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor

from bittern.checkpoint import Checkpoint, TensorInfo, read_json
from bittern.errors import BitternError
from bittern.formats import awq, compressed_tensors, gptq, mlx
from bittern.formats.scheme import PackedLayer, Scheme
from bittern.shards import dtype_name
from bittern.weight import QuantSpec, QuantWeight


class Format(Protocol):
    """What a module of :mod:`bittern.formats` that keeps packed layers in safetensors has."""

    def read_config(self, found: Mapping[str, Any]) -> Scheme:
        """Understand a quantization config."""

    def packed_layers(self, tensors: Iterable[str]) -> list[str]:
        """The packed layers among the tensor names of a checkpoint, in its order."""

    def names(self, layer: str) -> dict[str, str]:
        """Suffix -> tensor name, of all tensors that a packed layer may have; its bias is none of them."""

    def layer_shape(self, layer: str, tensors: Mapping[str, TensorInfo], spec: QuantSpec) -> tuple[int, int]:
        """(out_features, in_features) from the shapes of a layer's tensors."""

    def unpack(self, tensors: Mapping[str, Tensor], layer: PackedLayer, scheme: Scheme) -> QuantWeight:
        """Read one layer back from its tensors by suffix."""


FORMATS: Mapping[str, Format] = {"gptq": gptq, "compressed-tensors": compressed_tensors, "awq": awq, "mlx": mlx}
"""quant_method -> its module."""

CONFIG_KEYS = ("quantization_config", "quantization", "compression_config")
"""Where config.json may keep a quantization config: transformers' key, MLX's, and compressed-tensors' first one."""

_FILES = {"quantize_config.json": "gptq", "hf_quant_config.json": "modelopt"}
"""Files that some quantizers keep it in alone: the oldest GPTQ artifacts, and NVIDIA ModelOpt. Name -> method."""

_SCALES = ("weight_scale", "weight_scale_inv", "weight_scale_2")
"""What the codes of a weight beside them are to be multiplied with; beside 8-bit floats ``scale`` as well."""


class Artifact:
    """A checkpoint and what its quantization config says of it.

    Attributes:
        checkpoint: where the tensors are.
        found: the quantization config as it was found; empty without packed layers, and for GGUF.
        scheme: the same understood; None without one.
        format: "gptq", "gptq_v2", "compressed-tensors", "awq", "mlx", "gguf"; None for a plain checkpoint.
        layers: packed layer -> its shape and grid, in the checkpoint's order.
        plain: the tensors that are no part of a packed layer; biases of packed layers are among them.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Understand a checkpoint from its config and headers alone.

        Raises:
            BitternError: for a quantization that bittern does not read, and for quantized tensors that
                contradict the config or are there without one.
        """
        self.checkpoint = checkpoint
        self.found: Mapping[str, Any] = {}
        self.scheme: Scheme | None = None
        self.format: str | None = None
        self.layers: dict[str, PackedLayer] = {}
        self.plain = dict(checkpoint.tensors)
        if checkpoint.gguf is not None:
            self.format = "gguf"
            self.layers = dict(checkpoint.gguf.layers)
            for layer in self.layers:
                del self.plain[f"{layer}.weight"]
            return
        method, found = quantization_config(checkpoint)
        if method is None:
            refuse_unexplained(checkpoint)
            return
        if method not in FORMATS:
            readable = ", ".join(FORMATS)
            raise BitternError(f"{checkpoint.source}: quant_method: expected one of {readable}, found {method!r}")
        self.found, self._module = found, FORMATS[method]
        self.scheme = read_scheme(method, found, checkpoint.tensors)
        self.format = self.scheme.format
        for layer in self._module.packed_layers(checkpoint.tensors):
            spec = self.scheme.spec(layer)
            if spec is None:
                raise BitternError(f"{layer}: found packed, but the quantization config says that it is skipped")
            for name in self._module.names(layer).values():
                if name in checkpoint.tensors and not checkpoint.tensors[name].numel:
                    raise BitternError(f"{name}: expected values, found shape {checkpoint.tensors[name].shape}")
            out_features, in_features = self._module.layer_shape(layer, checkpoint.tensors, spec)
            if self._module is gptq and self.scheme.permuted(layer):
                gptq.check_order(layer, checkpoint.tensors, in_features, spec)
            self.layers[layer] = PackedLayer(out_features, in_features, spec)
            for name in self._module.names(layer).values():
                self.plain.pop(name, None)
        if not self.layers:
            raise BitternError(f"{checkpoint.source}: its config says {method}, but it holds no packed layer")
        _refuse_scaled(checkpoint.source, self.plain)

    def read(self, layer: str) -> QuantWeight:
        """One packed layer.

        Raises:
            BitternError: naming the tensor whose dtype, shape or values are not what the config says.
        """
        gguf = self.checkpoint.gguf
        if gguf is not None:
            return gguf.read_packed(layer)
        assert self.scheme is not None
        tensors = {suffix: self.checkpoint.read(name) for suffix, name in self.stored(layer).items()}
        try:
            return self._module.unpack(tensors, self.layers[layer], self.scheme)
        except BitternError as error:
            raise BitternError(f"{layer}.{error}") from error

    def stored(self, layer: str) -> dict[str, str]:
        """Suffix -> name of the tensors that a packed layer has here; not for GGUF."""
        return {suffix: name for suffix, name in self._module.names(layer).items() if name in self.checkpoint.tensors}


def quantization_config(checkpoint: Checkpoint) -> tuple[str | None, dict[str, Any]]:
    """The method and its config; (None, {}) where nothing says that a checkpoint is quantized.

    Raises:
        BitternError: for one that is no JSON object.
    """
    config, method = checkpoint.config, None
    found = config.get("quantization_config")
    if found is None and isinstance(config.get("quantization"), dict):
        found = config["quantization"]  # MLX's newer files have both
    if found is None and config.get("compression_config") is not None:
        found, method = config["compression_config"], "compressed-tensors"  # which it did not always call itself
    for name, theirs in _FILES.items():
        path = checkpoint.folder / name
        if found is None and checkpoint.gguf is None and path.is_file():
            found, method = read_json(path), None if theirs == "gptq" else theirs
    if found is None:
        return None, {}
    if not isinstance(found, dict):
        raise BitternError(f"quantization_config: expected an object, found {type(found).__name__}")
    if method is None and ("quant_method" in found or "method" in found):
        method = str(found.get("quant_method", found.get("method")))
    return method or ("mlx" if "quantization" in config else "gptq"), found


def read_scheme(method: str, found: Mapping[str, Any], tensors: Iterable[str]) -> Scheme:
    """Understand the config of one of :data:`FORMATS`, and what else the names of tensors say.

    Raises:
        BitternError: for a quantization that bittern does not read.
    """
    if method == "awq":
        awq.refuse_scaled_activations(tensors)
    return FORMATS[method].read_config(found)


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json that says nothing of a quantization."""
    return {key: value for key, value in config.items() if key not in CONFIG_KEYS}


def refuse_unexplained(checkpoint: Checkpoint) -> None:
    """Refuse quantized tensors in a checkpoint that has no quantization config, from its headers alone.

    Raises:
        BitternError: naming a packed layer, a weight with scales beside it, or one of integers.
    """
    for module in FORMATS.values():
        for layer in module.packed_layers(checkpoint.tensors):
            raise BitternError(
                f"{checkpoint.source}: holds packed layers ({layer}), but neither config.json nor quantize_config.json "
                "has a quantization config"
            )
    _refuse_scaled(checkpoint.source, checkpoint.tensors)


def _refuse_scaled(source: str, plain: Mapping[str, TensorInfo]) -> None:
    """Codes without their scales are no weights, but would be cast like some: off by thousands of times."""
    for name, info in plain.items():
        module, _, leaf = name.rpartition(".")
        if leaf != "weight":
            continue
        scales = (*_SCALES, "scale") if info.dtype.is_floating_point and info.dtype.itemsize == 1 else _SCALES
        beside = next((f"{module}.{scale}" for scale in scales if f"{module}.{scale}" in plain), None)
        if beside is not None:
            raise BitternError(f"{source}: {name}: expected a plain weight, found {beside} beside it, unexplained")
        if len(info.shape) > 1 and not info.dtype.is_floating_point:
            kind = dtype_name(info.dtype)
            raise BitternError(f"{source}: {name}: expected a plain weight, found {kind} without a quantization config")
