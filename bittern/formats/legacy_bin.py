"""Reading pytorch_model.bin, what torch.save wrote before there was safetensors: tensors alone, never code."""

from __future__ import annotations

import threading
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from bittern.errors import BitternError, first_line
from bittern.shards import DTYPES, Stored, TensorInfo


def read_bin(path: Path) -> dict[str, Stored]:
    """The tensors of a file.

    Raises:
        BitternError: for a file in torch's oldest form, and one that holds anything but plain tensors that
            are no larger than the file.
    """
    return {
        name: Stored(TensorInfo(name, value.dtype, tuple(value.shape)), path, 0) for name, value in _load(path).items()
    }


class BinFiles:
    """Reads elements from legacy pytorch_model.bin files.

    One file is mapped at a time, and mapped anew after every 256 MiB, for the pages that were read stay
    in the resident set as long as the mapping lives.
    """

    _MAPPED_BYTES = 256 * 2**20

    def __init__(self, stored: Mapping[str, Stored]) -> None:
        self._stored = stored
        self._lock = threading.Lock()
        self._path: Path | None = None
        self._state: dict[str, Tensor] = {}
        self._read_bytes = 0

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a tensor, flattened, in memory of their own."""
        item = self._stored[name]
        with self._lock:
            if self._path != item.path or self._read_bytes > self._MAPPED_BYTES:
                self._state = {}  # unmap before mapping again
                self._path, self._state, self._read_bytes = item.path, _load(item.path), 0
            self._read_bytes += (stop - start) * item.info.dtype.itemsize
            return self._state[name].reshape(-1)[start:stop].clone()

    def close(self) -> None:
        """Let go of the file."""
        self._path, self._state = None, {}


def _load(path: Path) -> dict[str, Tensor]:
    """The mapped tensors of a file that torch.save wrote; nothing but tensors is ever unpickled."""
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:  # the values themselves are mapped, the rest is unpacked into memory
            if sum(item.file_size for item in archive.infolist()) > size:
                raise BitternError(f"{path}: expected an archive without compression, as torch.save writes it")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except BitternError:
        raise
    except Exception as error:  # on a broken pickle, torch raises whatever comes of it
        reason = first_line(error)
        raise BitternError(f"{path}: expected tensors alone, as torch.save writes them since 1.6: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise BitternError(f"{path}: expected a flat dict of tensors")
    for name, value in state.items():
        if not isinstance(name, str):
            raise BitternError(f"{path}: expected names of tensors, found {name!r}")
        if value.layout != torch.strided or value.dtype not in DTYPES.values() or value.device.type != "cpu":
            raise BitternError(f"{path}: tensor {name}: expected plain values, found {value.dtype}, {value.layout}")
        if value.nbytes > size:  # one value, repeated by a stride of 0
            raise BitternError(f"{path}: tensor {name}: its {value.nbytes} bytes are more than the file's {size}")
    return state
