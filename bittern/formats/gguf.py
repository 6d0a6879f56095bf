"""Reading GGUF: a file of llama.cpp as the checkpoint that it was made from.

Configuration, tensor names and each architecture's rearrangements (llama's permuted q and k rows, merged
experts, norms stored plus one) are transformers' own; here tensors are dequantized one at a time.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bittern.errors import BitternError
from bittern.shards import TensorInfo

if TYPE_CHECKING:
    from gguf import ReaderTensor

Processor = Any  # transformers' TensorProcessor, which has no annotations


class GgufFile:
    """The values of a GGUF file, dequantized to fp32; the tensor that was read last is kept."""

    def __init__(
        self,
        path: Path,
        parts: Mapping[str, list[ReaderTensor]],
        names: Mapping[str, str],
        processor: Processor,
        infos: Mapping[str, TensorInfo],
    ) -> None:
        self._parts = parts
        self._names = names
        self._processor = processor
        self._infos = infos
        self._file = os.open(path, os.O_RDONLY)
        self._lock = threading.Lock()
        self._last: tuple[str, Tensor] | None = None

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a tensor, flattened."""
        with self._lock:
            if self._last is None or self._last[0] != name:
                self._last = None  # free it before the next
                self._last = name, self._dequantize(name).reshape(-1)
            return self._last[1][start:stop].clone()

    def close(self) -> None:
        """Let go of the file."""
        self._last = None
        os.close(self._file)

    def _dequantize(self, name: str) -> Tensor:
        from gguf.quants import dequantize

        result: dict[str, Tensor] = {}
        for part in self._parts[name]:
            stored = np.empty(part.data.shape, part.data.dtype)
            if os.preadv(self._file, [stored.data], part.data_offset) != part.n_bytes:
                raise EOFError("the file became shorter while it was read")
            weights = dequantize(stored, part.tensor_type)
            done = self._processor.process(
                weights=weights, name=part.name, tensor_key_mapping=self._names, parsed_parameters={"tensors": result}
            )
            if done.name is not None:  # else the processor has put its part of a merged tensor into result
                result[name] = torch.from_numpy(np.ascontiguousarray(done.weights))
        expected = self._infos[name].shape
        if tuple(result[name].shape) != expected:
            raise BitternError(f"{name}: expected shape {expected}, found {tuple(result[name].shape)}")
        return result[name]


def open_gguf(path: Path) -> tuple[dict[str, Any], dict[str, TensorInfo], GgufFile]:
    """Open a GGUF file: the configuration, the tensors in the file's order, and their values.

    Raises:
        BitternError: for a file that is broken, of an architecture that transformers does not know, or
            with tensors that its model has no place for (or the reverse).
    """
    from gguf import GGUFReader
    from transformers import modeling_gguf_pytorch_utils

    theirs: Any = modeling_gguf_pytorch_utils
    try:
        reader = GGUFReader(path)
        parsed = theirs.load_gguf_checkpoint(str(path))["config"]
        architecture = theirs.read_field(reader, "general.architecture")[0]
        config, model = _model(parsed)
    except Exception as error:  # on broken files the two libraries raise whatever comes of them
        reason = " ".join(str(error).split())
        raise BitternError(f"{path}: not a GGUF file that transformers understands: {reason}") from error
    processor = theirs.TENSOR_PROCESSORS.get(architecture, theirs.TensorProcessor)(config=parsed)
    names: dict[str, str] = theirs.get_gguf_hf_weights_map(model, processor)
    parts = _parts(path, reader.tensors, names)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    missing = [name for name in shapes if name not in parts]
    if missing:
        raise BitternError(f"{path}: holds no tensor for {missing[0]} (nor for {len(missing) - 1} others)")
    state = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    infos = {name: TensorInfo(name, torch.float32, state[name]) for name in parts}
    return config, infos, GgufFile(path, parts, names, processor, infos)


def _model(parsed: dict[str, Any]) -> tuple[dict[str, Any], torch.nn.Module]:
    """The configuration and a model without values, which tells names and shapes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**parsed)
    factory: Any = AutoModelForCausalLM
    with torch.device("meta"):
        model: torch.nn.Module = factory.from_config(config)
    stated = {key: value for key, value in config.to_dict().items() if not key.startswith("_")}
    return stated | {"architectures": [type(model).__name__], "dtype": "float32"}, model


def _parts(path: Path, tensors: list[ReaderTensor], names: Mapping[str, str]) -> dict[str, list[ReaderTensor]]:
    """The stored tensors that make up each parameter: usually one, two for merged gate and up experts."""
    parts: dict[str, list[ReaderTensor]] = {}
    size = path.stat().st_size
    for tensor in tensors:
        name = names.get(tensor.name) or names.get(tensor.name.removesuffix(".weight"))
        if name is None:
            raise BitternError(f"{path}: transformers' reader has no place for the tensor {tensor.name}")
        if tensor.data_offset + tensor.n_bytes > size:
            raise BitternError(f"{path}: truncated: tensor {tensor.name} ends at {tensor.data_offset + tensor.n_bytes}")
        parts.setdefault(name, []).append(tensor)
    return parts
