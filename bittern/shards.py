"""One safetensors file: what its header may say, and how its bytes move.

Layout: u64 little-endian header length, a JSON header padded with spaces to 8 bytes, then the data.
Bytes are moved with pread and pwrite into memory of our own: pages of a mapped file would stay in
the resident set, and a checkpoint may be larger than memory.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bittern.disk import open_file, read_ahead
from bittern.errors import BitternError, first_line

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as torch calls it, in manifests, configs and messages: "float32"."""
    return str(dtype).removeprefix("torch.")


MAX_HEADER_BYTES = 100_000_000
"""The safetensors library's own limit."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor without its values: its name in the checkpoint, its stored dtype and its shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: the file and the offset of its first byte."""

    info: TensorInfo
    path: Path
    offset: int


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of the safetensors file at ``path``, in the order of their bytes.

    The safetensors library judges the file first: it refuses truncated files, overlapping offsets,
    holes, shapes that contradict sizes, and giant headers.

    Raises:
        BitternError: for a file that it refuses, what is no file (a pipe would wait for ever), a dtype that
            torch has not, a repeated name.
    """
    if not path.is_file():
        raise BitternError(f"{path}: expected a safetensors file, found none or something else")
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_HEADER_BYTES:  # before the library maps the file, however large that says it is
                raise BitternError(f"{path}: expected a header of at most {MAX_HEADER_BYTES} bytes, found {length}")
            with safe_open(path, framework="pt"):
                pass
            header = json.loads(file.read(length), object_pairs_hook=_no_repeats)
    except (SafetensorError, ValueError, OSError, MemoryError) as error:
        raise BitternError(f"{path}: not a whole safetensors file: {first_line(error)}") from error
    header.pop("__metadata__", None)
    stored = [_stored(path, name, entry, 8 + length) for name, entry in header.items()]
    return {item.info.name: item for item in sorted(stored, key=lambda item: item.offset)}


def header_bytes(tensors: Sequence[TensorInfo], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The bytes before the data of a file that holds ``tensors`` in this order, and each one's file offset."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    offsets, position = {}, 0
    for info in tensors:
        if info.dtype not in _CODES:
            raise BitternError(f"{info.name}: safetensors files have no {info.dtype}")
        end = position + info.nbytes
        entries[info.name] = {"dtype": _CODES[info.dtype], "shape": list(info.shape), "data_offsets": [position, end]}
        offsets[info.name] = position
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise BitternError(
            f"header of {len(tensors)} tensors: expected at most {MAX_HEADER_BYTES} bytes, found {len(text)}"
        )
    base = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: base + offset for name, offset in offsets.items()}


def read_elements(file: int, offset: int, dtype: torch.dtype, count: int) -> Tensor:
    """``count`` elements of ``dtype`` from byte ``offset`` of an open file, as a new 1-D tensor.

    Raises:
        OSError: when the file cannot be read; EOFError when it ends before.
    """
    tensor = torch.empty(count, dtype=dtype, device="cpu")
    view = tensor.view(torch.uint8).numpy().data
    while view:
        done = os.preadv(file, [view], offset)
        if done == 0:
            raise EOFError("the file became shorter while it was read")
        view, offset = view[done:], offset + done
    return tensor


def write_elements(file: int, offset: int, tensor: Tensor) -> None:
    """Write the elements of ``tensor`` (CPU, any shape) at byte ``offset`` of an open file."""
    view = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    while view:
        done = os.pwrite(file, view, offset)
        view, offset = view[done:], offset + done


class SafetensorsFiles:
    """Reads elements straight from safetensors files, each opened once."""

    def __init__(self, stored: Mapping[str, Stored]) -> None:
        self._stored = stored
        self._files: dict[Path, int] = {}
        self._lock = threading.Lock()

    def read(self, name: str, start: int, stop: int) -> Tensor:
        item = self._stored[name]
        with self._lock:
            if item.path not in self._files:
                file = self._files[item.path] = open_file(item.path, os.O_RDONLY)
                read_ahead(file)
            file = self._files[item.path]
        return read_elements(file, item.offset + start * item.info.dtype.itemsize, item.info.dtype, stop - start)

    def close(self) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()


def _stored(path: Path, name: str, entry: dict[str, Any], base: int) -> Stored:
    code = entry["dtype"]
    if code not in DTYPES:
        raise BitternError(f"{path}: tensor {name}: dtype {code} is not one of {', '.join(DTYPES)}")
    info = TensorInfo(name, DTYPES[code], tuple(entry["shape"]))
    return Stored(info, path, base + entry["data_offsets"][0])


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name stands twice in the header")
    return result
