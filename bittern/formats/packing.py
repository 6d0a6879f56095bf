"""Writing packed layers to a folder of safetensors, in the format that a caller names."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bittern.errors import BitternError
from bittern.formats import awq, compressed_tensors, gptq, mlx
from bittern.shards import TensorInfo
from bittern.weight import QuantSpec, QuantWeight

FORMATS = (gptq.V1, gptq.V2, "compressed-tensors", "awq", "mlx")


@dataclass(frozen=True)
class Packing:
    """How layers are written.

    Attributes:
        format: one of ``FORMATS``.
        dtype: of scales in compressed-tensors and MLX; the other formats have float16 alone.
        exact: refuse what the format would round. Of MLX alone scales and biases can be rounded.
        damp_percent, desc_act: what a GPTQ config states.
        dequantize: a compressed-tensors config that makes transformers dequantize while loading.

    Raises:
        BitternError: for another format.
    """

    format: str
    dtype: torch.dtype = torch.float16
    exact: bool = True
    damp_percent: float = 0.01
    desc_act: bool = False
    dequantize: bool = False

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise BitternError(f"format: expected one of {', '.join(FORMATS)}, found {self.format!r}")

    def plan(self, layer: str, out_features: int, in_features: int, spec: QuantSpec) -> list[TensorInfo]:
        """The tensors that a layer becomes.

        Raises:
            BitternError: for a shape or a grid that the format cannot hold or its readers do not take.
        """
        if self.format in (gptq.V1, gptq.V2):
            return gptq.plan(layer, out_features, in_features, spec)
        if self.format == "awq":
            return awq.plan(layer, out_features, in_features, spec)
        reason = mlx.refuse(spec, self.dtype) if self.format == "mlx" and self.exact else None
        if reason is not None:
            raise BitternError(f"{layer}: {reason}")
        if self.format == "mlx":
            return mlx.plan(layer, out_features, in_features, spec, self.dtype)
        return compressed_tensors.plan(layer, out_features, in_features, spec, self.dtype)

    def pack(self, layer: str, weight: QuantWeight) -> dict[str, Tensor]:
        """The tensors of a layer by name.

        Raises:
            BitternError: naming the layer, for what the format cannot hold exactly.
        """
        try:
            if self.format in (gptq.V1, gptq.V2):
                return _named(gptq.names(layer), gptq.pack(weight, checkpoint_format=self.format))
            if self.format == "awq":
                return _named(awq.names(layer), awq.pack(weight))
            if self.format == "mlx":
                return _named(mlx.names(layer), mlx.pack(weight, self.dtype, exact=self.exact))
            return _named(compressed_tensors.names(layer), compressed_tensors.pack(weight, self.dtype))
        except BitternError as error:
            raise BitternError(f"{layer}: {error}") from error

    def config(
        self, spec: QuantSpec, layers: Mapping[str, QuantSpec | None], others: Iterable[str] = ()
    ) -> dict[str, Any]:
        """What config.json gets.

        Args:
            spec: the grid of most layers.
            layers: every matrix by its checkpoint name, with its grid or None when it stays floats.
            others: matrices that are never packed, such as routers of experts. Readers of compressed-tensors and of AWQ
                take every layer of theirs for packed that is not named; those of GPTQ and MLX look.
        """
        named = {**layers, **{name: None for name in others if name not in layers}}
        if self.format in (gptq.V1, gptq.V2):
            found = gptq.config(
                spec,
                checkpoint_format=self.format,
                layers=layers,
                damp_percent=self.damp_percent,
                desc_act=self.desc_act,
            )
            return {"quantization_config": found}
        if self.format == "awq":
            return {"quantization_config": awq.config(spec, named)}
        if self.format == "mlx":
            found = mlx.config(spec, layers)
            return {"quantization": found, "quantization_config": found}
        return {"quantization_config": compressed_tensors.config(spec, named, dequantize=self.dequantize)}

    @property
    def metadata(self) -> dict[str, str]:
        """What the headers of the weight files state besides."""
        return {"format": "mlx"} if self.format == "mlx" else {}


def is_gguf(output: str | os.PathLike[str]) -> bool:
    """Whether an output is named as GGUF files are."""
    return Path(output).suffix == ".gguf"


def check_name(output: str | os.PathLike[str], format: str) -> None:
    """Refuse a folder that is named as a GGUF file, and a GGUF file that is not.

    Raises:
        BitternError: naming both.
    """
    if format == "gguf" and not is_gguf(output):
        raise BitternError(f"output {output}: expected the name of a .gguf file")
    if format != "gguf" and is_gguf(output):
        raise BitternError(f"output {output}: expected a folder for {format}, found the name of a .gguf file")


def _named(names: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {names[suffix]: tensor for suffix, tensor in tensors.items()}
