"""Reading GGUF: a file of llama.cpp as the checkpoint that it was made from.

Configuration, tensor names and each architecture's rearrangements (llama's permuted q and k rows, merged
experts, norms stored plus one) are transformers' own, but for Mixtral; here tensors are read one at a time.

Files that bittern wrote say under the key ``bittern.grids`` what the grids were, in JSON: ``default`` and, for the
``layers`` that differ from it, ``bits``, ``group_size`` and ``sym``.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from bittern.errors import BitternError
from bittern.formats.gguf import BLOCK_BYTES, block_spec, refuse, unpack
from bittern.formats.gguf_config import read_config, read_field
from bittern.formats.gguf_rope import FREQUENCIES
from bittern.formats.scheme import PackedLayer
from bittern.shards import TensorInfo, read_elements
from bittern.weight import QuantSpec, QuantWeight

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

Processor = Any  # transformers' TensorProcessor, which has no annotations

GRIDS_KEY = "bittern.grids"
CHANGED_KEY = "bittern.changed"
DEGRADED_KEY = "bittern.degraded"


@dataclass(frozen=True)
class _Stored:
    """A packed layer in a file: its tensor, block type and grid, and the stored row of each row of the model."""

    part: ReaderTensor
    spec: QuantSpec | None
    order: Tensor


class GgufFile:
    """The values of a GGUF file, dequantized to fp32; the tensor that was read last is kept.

    Attributes:
        path: the file.
        layers: the layers whose blocks are grids of bittern's own, which :meth:`read_packed` reads.
        nbytes: tensor -> the bytes that it takes in the file.
        card: what its metadata say of licence and language, by the names that a model card has for it.
        changed: tensors and layers that bittern has rescaled or trained on purpose.
    """

    def __init__(
        self,
        path: Path,
        parts: Mapping[str, list[ReaderTensor]],
        names: Mapping[str, str],
        processor: Processor,
        infos: Mapping[str, TensorInfo],
        packed: Mapping[str, _Stored],
        card: Mapping[str, Any],
        changed: Iterable[str],
    ) -> None:
        self.path = path
        self.card = dict(card)
        self.changed = tuple(changed)
        self._parts = parts
        self._names = names
        self._processor = processor
        self._infos = infos
        self._file = os.open(path, os.O_RDONLY)
        self._lock = threading.Lock()
        self._last: tuple[str, Tensor] | None = None
        self._packed = dict(packed)
        self.nbytes = {name: sum(int(part.n_bytes) for part in stored) for name, stored in parts.items()}
        self.layers: dict[str, PackedLayer] = {}
        for layer, stored in packed.items():
            out_features, in_features = infos[f"{layer}.weight"].shape
            spec = stored.spec or block_spec(stored.part.tensor_type.name)
            self.layers[layer] = PackedLayer(out_features, in_features, spec)

    def read_packed(self, layer: str) -> QuantWeight:
        """One of :attr:`layers`, its rows in the order of the model.

        Raises:
            BitternError: when its blocks are not of the grid that the file states, or cannot be read.
        """
        stored = self._packed[layer]
        try:
            weight = unpack(self._stored(stored.part), stored.part.tensor_type.name, stored.spec)
        except (BitternError, OSError, EOFError) as error:
            raise BitternError(f"{self.path}: {stored.part.name}: {error}") from error
        codes, scales, zeros = (values[stored.order] for values in (weight.codes, weight.scales, weight.zeros))
        return QuantWeight(codes, scales, zeros, weight.spec)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a tensor, flattened."""
        with self._lock:
            if self._last is None or self._last[0] != name:
                self._last = None  # free it before the next
                self._last = name, self._dequantize(name).reshape(-1)
            return self._last[1][start:stop].clone()

    def kinds(self, name: str) -> set[str]:
        """The types that the parts of a tensor are stored in, such as "F16" or "Q4_K"."""
        return {part.tensor_type.name for part in self._parts[name]}

    def close(self) -> None:
        """Let go of the file."""
        self._last = None
        os.close(self._file)

    def _dequantize(self, name: str) -> Tensor:
        from gguf.quants import dequantize

        result: dict[str, Tensor] = {}
        for part in self._parts[name]:
            weights = dequantize(self._stored(part), part.tensor_type)
            done = self._processor.process(
                weights=weights, name=part.name, tensor_key_mapping=self._names, parsed_parameters={"tensors": result}
            )
            if done.name is not None:  # else the processor has put its part of a merged tensor into result
                result[name] = torch.from_numpy(np.ascontiguousarray(done.weights))
        expected = self._infos[name].shape
        if tuple(result[name].shape) == (1, *expected):
            # The processor gives Qwen2-MoE's gate of shared experts an axis that newer files have themselves.
            result[name] = result[name][0]
        if tuple(result[name].shape) != expected:
            raise BitternError(f"{name}: expected shape {expected}, found {tuple(result[name].shape)}")
        return result[name]

    def _stored(self, part: ReaderTensor) -> np.ndarray[Any, Any]:
        data = read_elements(self._file, int(part.data_offset), torch.uint8, int(part.n_bytes)).numpy()
        return data.view(part.data.dtype).reshape(part.data.shape)


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
        config, model = read_config(parsed, reader, architecture)
        processor = _processor(theirs, architecture, parsed)
        names: dict[str, str] = theirs.get_gguf_hf_weights_map(model, processor, architecture)
    except BitternError as error:
        raise BitternError(f"{path}: {error}") from error
    except Exception as error:  # on broken files the two libraries raise whatever comes of them
        reason = " ".join(str(error).split())
        raise BitternError(f"{path}: not a GGUF file that transformers understands: {reason}") from error
    parts = _parts(path, reader.tensors, names)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    missing = [name for name in shapes if name not in parts]
    if missing:
        others = f" (nor for {len(missing) - 1} others)" if len(missing) > 1 else ""
        raise BitternError(f"{path}: holds no tensor for {missing[0]}{others}")
    state = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for name, stored in parts.items():
        found = [tuple(map(int, part.shape[::-1])) for part in stored]
        if sum(map(math.prod, found)) != math.prod(state[name]):
            raise BitternError(f"{path}: {name}: expected shape {state[name]}, found {' and '.join(map(str, found))}")
    infos = {name: TensorInfo(name, torch.float32, state[name]) for name in parts}
    packed = _packed_layers(parts, names, processor, model, _grids(path, reader))
    card = {name: said for name, key in _CARD.items() if (said := read_field(reader, key)) is not None}
    degraded = read_field(reader, DEGRADED_KEY)
    if degraded is not None:
        config["bittern"] = {"degraded": str(degraded)}
    return config, infos, GgufFile(path, parts, names, processor, infos, packed, card, _changed(path, reader))


def _processor(theirs: Any, architecture: str, parsed: dict[str, Any]) -> Processor:
    """What turns tensors as llama.cpp has them into the model's."""
    made = theirs.TENSOR_PROCESSORS.get(architecture, theirs.TensorProcessor)(config=parsed)
    if parsed["model_type"] != "mixtral":
        return made

    class Mixtral(theirs.Qwen2MoeTensorProcessor):  # type: ignore[misc]
        """Experts merged as Qwen2-MoE's are, beside Llama's rows of q and k."""

        def process(self, weights: np.ndarray[Any, Any], name: str, **others: Any) -> Any:
            if ".attn_" in name:
                return made.process(weights, name, **others)
            return super().process(weights, name, **others)

    return Mixtral(config=parsed)


_CARD = {
    "license": "general.license",
    "license_name": "general.license.name",
    "license_link": "general.license.link",
    "language": "general.languages",
}
"""Key of a model card -> where GGUF keeps it."""


def _grids(path: Path, reader: GGUFReader) -> dict[str, Any] | None:
    """What bittern wrote of its grids; None in a file from elsewhere."""
    text = read_field(reader, GRIDS_KEY)
    if text is None:
        return None
    try:
        found = json.loads(text)
        grids = {name: QuantSpec(**values) for name, values in found["layers"].items()}
        default = QuantSpec(**found["default"])
        for spec in (default, *grids.values()):
            if refuse(spec) is not None:
                raise ValueError(refuse(spec))
        return {"default": default, "layers": grids}
    except (ValueError, TypeError, KeyError, AttributeError, BitternError) as error:
        raise BitternError(f"{path}: {GRIDS_KEY}: expected a default grid and those of layers: {error}") from error


def _changed(path: Path, reader: GGUFReader) -> list[str]:
    """What bittern wrote of the tensors that are not meant to be the source's."""
    found = read_field(reader, CHANGED_KEY) or []
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise BitternError(f"{path}: {CHANGED_KEY}: expected names, found {found!r}")
    return found


def _packed_layers(
    parts: Mapping[str, list[ReaderTensor]],
    names: Mapping[str, str],
    processor: Processor,
    model: nn.Module,
    grids: dict[str, Any] | None,
) -> dict[str, _Stored]:
    """The linear layers of the decoder blocks, and the head, whose blocks are a grid and whose rows stay whole."""
    found: dict[str, _Stored] = {}
    kinds = ("Q4_0", "Q8_0") if grids is None else tuple(BLOCK_BYTES)
    for name, stored in parts.items():
        part, layer = stored[0], name.removesuffix(".weight")
        inside = part.name.startswith("blk.") or part.name == "output.weight"
        if len(stored) != 1 or part.tensor_type.name not in kinds or not inside or layer == name:
            continue
        module = model.get_submodule(layer)
        if not isinstance(module, nn.Linear) or tuple(module.weight.shape) != tuple(map(int, part.shape[::-1])):
            continue
        order = _row_order(part, module.out_features, processor, names)
        if order is not None:
            spec = None if grids is None else grids["layers"].get(layer, grids["default"])
            found[layer] = _Stored(part, spec, order)
    return found


def _check_type(path: Path, tensor: ReaderTensor) -> None:
    """Refuse what the gguf package cannot make floats of."""
    from gguf.constants import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[tensor.tensor_type][1]), dtype=np.uint8), tensor.tensor_type)
    except NotImplementedError:
        kind = tensor.tensor_type.name
        raise BitternError(f"{path}: tensor {tensor.name}: the gguf package cannot dequantize {kind}") from None


def _row_order(part: ReaderTensor, rows: int, processor: Processor, names: Mapping[str, str]) -> Tensor | None:
    """The stored row of each row of the model, or None when the rows do not stay whole.

    The processor is run on row numbers in place of weights.
    """
    numbers = np.arange(rows, dtype=np.float64)[:, None]
    try:
        done = processor.process(
            weights=numbers, name=part.name, tensor_key_mapping=names, parsed_parameters={"tensors": {}}
        )
    except (ValueError, IndexError, KeyError):  # it needs the real columns
        return None
    if done.name is None or done.weights.shape != (rows, 1):
        return None
    order = torch.from_numpy(np.ascontiguousarray(done.weights[:, 0]))
    whole = torch.equal(order.sort().values, torch.arange(rows, dtype=torch.float64))
    return order.long() if whole else None


def _parts(path: Path, tensors: list[ReaderTensor], names: Mapping[str, str]) -> dict[str, list[ReaderTensor]]:
    """The stored tensors that make up each parameter: usually one, two for merged gate and up experts."""
    parts: dict[str, list[ReaderTensor]] = {}
    size = path.stat().st_size
    for tensor in tensors:
        if tensor.name == FREQUENCIES and FREQUENCIES not in names:
            continue  # part of the configuration now
        name = names.get(tensor.name) or names.get(tensor.name.removesuffix(".weight"))
        if name is None:
            raise BitternError(f"{path}: transformers' reader has no place for the tensor {tensor.name}")
        _check_type(path, tensor)
        if tensor.data_offset + tensor.n_bytes > size:
            raise BitternError(f"{path}: truncated: tensor {tensor.name} ends at {tensor.data_offset + tensor.n_bytes}")
        parts.setdefault(name, []).append(tensor)
    return parts
