"""Whether the header of a GGUF file is honest, before any library believes it.

Layout, little-endian: magic, u32 version, u64 tensor count, u64 metadata count; per metadata entry a
string (u64 length and bytes), a u32 type and the value; per tensor a string, u32 number of dimensions,
u64 each, u32 type, u64 offset; padding to the alignment; the data. Source: ggml's docs/gguf.md.

The gguf package takes every count at its word: it allocates, loops and recurses as a file tells it to.
"""

from __future__ import annotations

import os
from math import prod
from pathlib import Path
from typing import BinaryIO

from bittern.errors import BitternError

_U32, _U64, _STRING, _ARRAY = 4, 10, 8, 9
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, _U32: 4, 5: 4, 6: 4, 7: 1, _U64: 8, 11: 8, 12: 8}  # metadata type -> bytes
_MAX_HEADER_BYTES = 100_000_000  # a vocabulary of 256k takes 10 to 20 million
_MAX_ELEMENTS = 2**22  # of all arrays together: the gguf package makes an object of some 700 bytes for each
_MAX_NAME_BYTES = 65535  # of the specification, for metadata keys
_MAX_DIMENSIONS = 4
_DEFAULT_ALIGNMENT = 32


def check(path: Path) -> None:
    """Judge the header of a GGUF file by the file's size; time and memory are those of reading it once.

    Raises:
        BitternError: naming what is wrong and where: the magic, a version other than 2 or 3, the
            other byte order, counts and lengths that the file is too short for, nested arrays, repeated or
            unreadable names, unknown types, sizes that overflow, offsets that are unaligned, overlap or lie
            beyond the end, an alignment that is no power of two, more blocks than tensors; a part of a split file.
    """
    try:
        if not path.is_file():
            raise BitternError(f"{path}: expected a file, found something else")
        with path.open("rb") as file:
            _Header(path, file).check()
    except OSError as error:
        raise BitternError(f"{path}: cannot be read: {error.strerror}") from error


class _Header:
    """A walk over the header; every length is checked before it is believed."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._file = file
        self._size = os.fstat(file.fileno()).st_size
        self._end = min(self._size, _MAX_HEADER_BYTES)
        self._at = 0
        self._elements = 0

    def check(self) -> None:
        if self._bytes(4, "the magic") != b"GGUF":
            raise self._wrong("expected it to begin with GGUF")
        version = self._number("the version", _U32)
        if version in (2 << 24, 3 << 24):
            raise self._wrong("its byte order is big-endian, which bittern does not read")
        if version not in (2, 3):
            raise self._wrong(f"version: expected 2 or 3, found {version}")
        tensors, entries = self._number("the tensor count"), self._number("the metadata count")
        self._must_fit(tensors, 8 + 4 + 8 + 4 + 8, f"{tensors} tensors")
        self._must_fit(entries, 8 + 4 + 1, f"{entries} metadata entries")
        alignment = self._metadata(entries, tensors)
        self._tensors(tensors, alignment)

    def _metadata(self, count: int, tensors: int) -> int:
        """Walk over the metadata; the alignment that it states."""
        alignment, seen = _DEFAULT_ALIGNMENT, set[str]()
        numbers: dict[str, int] = {}
        for position in range(count):
            key = self._name(f"metadata entry {position}")
            if key in seen:
                raise self._wrong(f"metadata {key} stands twice")
            seen.add(key)
            kind = self._number(f"the type of {key}", _U32)
            if kind in (_STRING, _ARRAY):
                self._string(key) if kind == _STRING else self._array(key)
                continue
            self._known(kind, key)
            value = int.from_bytes(self._bytes(_WIDTHS[kind], f"the value of {key}"), "little")
            if key == "general.alignment":
                if kind != _U32 or value.bit_count() != 1:
                    raise self._wrong(f"{key}: expected a power of two as uint32, found {value} of type {kind}")
                alignment = value
            if key.endswith((".block_count", "split.no", "split.count")):
                numbers[key] = value
        parts = numbers.get("split.count", 1)
        if parts > 1:  # before the first part, which has all metadata, is judged by what it holds
            number = numbers.get("split.no", 0) + 1
            raise BitternError(
                f"{self._path}: expected a whole GGUF file, found part {number} of {parts}; "
                "llama-gguf-split --merge joins them"
            )
        for key, value in numbers.items():
            if key.endswith("block_count") and value > tensors:  # transformers would build that many
                raise self._wrong(f"{key}: expected at most the {tensors} tensors that it holds, found {value}")
        return alignment

    def _array(self, key: str) -> None:
        kind, count = self._number(f"the type of {key}", _U32), self._number(f"the length of {key}")
        if kind == _ARRAY:
            raise self._wrong(f"metadata {key}: expected values, found an array of arrays")
        self._elements += count
        if self._elements > _MAX_ELEMENTS:
            raise self._wrong(f"metadata {key}: expected at most {_MAX_ELEMENTS} values in arrays, found more")
        if kind == _STRING:
            self._must_fit(count, 8, f"the {count} strings of {key}")
            self._strings(count, key)
        else:
            self._known(kind, key)
            self._must_fit(count, _WIDTHS[kind], f"the {count} values of {key}")
            self._skip(count * _WIDTHS[kind], key)

    def _tensors(self, count: int, alignment: int) -> None:
        spans: dict[str, tuple[int, int]] = {}
        for position in range(count):
            name = self._name(f"tensor {position}")
            if name in spans:
                raise self._wrong(f"tensor {name} stands twice")
            spans[name] = self._tensor(name, alignment)
        data = -(-self._at // alignment) * alignment
        previous, last = 0, "the header"
        for name, (start, size) in sorted(spans.items(), key=lambda item: item[1]):
            if start < previous:
                raise self._wrong(
                    f"tensor {name} begins at {start} of the data, before the end of {last} at {previous}"
                )
            previous, last = start + size, name
            if data + previous > self._size:
                raise self._wrong(f"truncated: tensor {name} ends at byte {data + previous} of {self._size}")

    def _tensor(self, name: str, alignment: int) -> tuple[int, int]:
        """Offset and size of a tensor's data."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        dimensions = self._number(f"the dimensions of {name}", _U32)
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise self._wrong(f"tensor {name}: expected 1 to {_MAX_DIMENSIONS} dimensions, found {dimensions}")
        shape = [self._number(f"the shape of {name}") for _ in range(dimensions)]
        kind, offset = self._number(f"the type of {name}", _U32), self._number(f"the offset of {name}")
        try:
            stored = GGMLQuantizationType(kind)
        except ValueError:
            raise self._wrong(f"tensor {name}: type {kind} is not one that the gguf package knows") from None
        block, width = GGML_QUANT_SIZES[stored]
        size = prod(shape) // block * width
        if not 0 < size <= self._size or shape[0] % block:
            raise self._wrong(f"tensor {name}: shape {shape} of {stored.name} has no place in {self._size} bytes")
        if offset % alignment:
            raise self._wrong(f"tensor {name}: expected an offset that {alignment} divides, found {offset}")
        return offset, size

    def _known(self, kind: int, key: str) -> None:
        if kind not in _WIDTHS:
            raise self._wrong(f"metadata {key}: type {kind} is unknown")

    def _name(self, what: str) -> str:
        length = self._number(f"the name of {what}")
        if length > _MAX_NAME_BYTES:
            raise self._wrong(f"{what}: expected a name of at most {_MAX_NAME_BYTES} bytes, found {length}")
        try:
            return self._bytes(length, f"the name of {what}").decode()
        except UnicodeDecodeError:
            raise self._wrong(f"{what}: its name is not UTF-8") from None

    def _string(self, key: str) -> None:
        self._skip(self._number(f"the length of {key}"), key)

    def _strings(self, count: int, key: str) -> None:
        """Skip strings, by the million: a vocabulary."""
        read, seek, at, end = self._file.read, self._file.seek, self._at, self._end
        for position in range(count):
            at += 8 + int.from_bytes(read(8), "little")
            if at > end:
                raise self._wrong(f"metadata {key}: its string {position} ends at byte {at}, the header at {end}")
            seek(at)
        self._at = at

    def _number(self, what: str, kind: int = _U64) -> int:
        return int.from_bytes(self._bytes(_WIDTHS[kind], what), "little")

    def _bytes(self, count: int, what: str) -> bytes:
        self._must_fit(count, 1, what)
        self._at += count
        return self._file.read(count)

    def _skip(self, count: int, key: str) -> None:
        self._must_fit(count, 1, f"the value of {key}")
        self._at += count
        self._file.seek(self._at)

    def _must_fit(self, count: int, width: int, what: str) -> None:
        if count * width > self._end - self._at:
            limit = "the file ends before" if self._end == self._size else f"the header exceeds {self._end} bytes at"
            raise self._wrong(f"{limit} {what} ({count * width} bytes from byte {self._at})")

    def _wrong(self, reason: str) -> BitternError:
        return BitternError(f"{self._path}: not an honest GGUF file: {reason}")
