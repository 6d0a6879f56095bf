"""GGUF: the blocks of llama.cpp that hold a grid of bittern's own; its files are read in gguf_file.py.

A row is cut into blocks of 32 columns, each with a scale d of its own (fp16); a larger group repeats its scale.

======  =====  ==========================================================  ======================
type    bytes  after d                                                     weight
======  =====  ==========================================================  ======================
Q4_0    18     16 bytes: element j in the low nibble, j + 16 in the high   d * (q - 8)
Q4_1    20     m (fp16), then as Q4_0                                      d * q + m
Q5_0    22     4 bytes: bit j is the fifth of element j; then as Q4_0      d * (q - 16)
Q8_0    34     32 signed bytes                                             d * q
======  =====  ==========================================================  ======================

So Q8_0 holds symmetric 8-bit codes, and Q4_0 symmetric ones of 4, 3 and 2 bits. Of asymmetric grids only code - zero
counts: at 3 and 2 bits that fits Q4_0 too, at 4 bits Q5_0. Q4_1 is smaller than that and rounds the zero. Layouts as
the gguf package has them.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bittern.errors import BitternError
from bittern.formats.bits import check_in_order, check_range
from bittern.weight import QuantSpec, QuantWeight

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma3_text": "gemma3",
}
"""model_type -> llama.cpp's architecture, of the models that GGUF files are written of."""

BLOCK = 32
BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q8_0": 34}
_HALF = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 128}  # steps from zero: -half to half - 1


def kind_for(spec: QuantSpec, *, exact: bool = True) -> str | None:
    """The block type for a grid, None when there is none; without ``exact`` the smallest one, which may round."""
    if refuse(spec) is not None:
        return None
    if spec.bits == 8:
        return "Q8_0"
    if spec.sym or spec.bits < 4:
        return "Q4_0"
    return "Q5_0" if exact else "Q4_1"


def refuse(spec: QuantSpec) -> str | None:
    """Why GGUF cannot hold a grid exactly, and what is nearest; None when it can."""
    if spec.group_size != -1 and spec.group_size % BLOCK:
        return f"GGUF has blocks of 32 columns, found group_size {spec.group_size}; multiples of 32 and -1 are exact"
    if spec.bits == 8 and not spec.sym:
        return "GGUF has no type for 8-bit asymmetric codes; 8-bit symmetric ones are exact"
    return None


def refuse_columns(columns: int) -> str | None:
    """Why GGUF cannot hold packed rows of so many columns, None when it can."""
    return f"GGUF has blocks of {BLOCK} columns, found {columns} columns" if columns % BLOCK else None


def refuse_model(model_type: str) -> str | None:
    """Why no GGUF file is written of a model, None when one is."""
    if model_type in ARCHITECTURES:
        return None
    return f"model_type: GGUF is written for {', '.join(ARCHITECTURES)}, found {model_type}"


def need_packages() -> None:
    """Find what GGUF files are read and written with, before anything is done that they are needed for.

    Raises:
        BitternError: when it is not installed.
    """
    try:
        for name in ("gguf", "sentencepiece"):
            import_module(name)
    except ImportError as error:
        packages = "the packages gguf and sentencepiece: pip install 'bittern[gguf]'"
        raise BitternError(f"GGUF needs {packages} ({error})") from error


def block_spec(kind: str) -> QuantSpec:
    """The grid of "Q4_0" and "Q8_0" blocks themselves: symmetric in groups of 32."""
    return QuantSpec(8 if kind == "Q8_0" else 4, BLOCK)


def rounding(weight: QuantWeight, kind: str) -> float:
    """The largest distance, in steps, of a point of a weight's grid from what blocks of ``kind`` make of it."""
    scales, zeros = weight.scales.double(), weight.zeros.double()
    stored = weight.scales.half().double()
    worst = 0.0
    for code in (0, weight.spec.max_code):  # the distance is linear in the code
        found = stored * code + _minimum(stored, weight.zeros).double() if kind == "Q4_1" else stored * (code - zeros)
        distance = (found - scales * (code - zeros)).abs() / scales.abs()
        worst = max(worst, float(distance.where(scales != 0, 0.0).max()))
    return worst


def pack(weight: QuantWeight, kind: str, *, exact: bool = True) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The blocks of one layer, uint8 (out_features, bytes of a row).

    Args:
        weight: with columns in order, a multiple of 32.
        kind: the block type, a key of ``BLOCK_BYTES``.
        exact: refuse to round scales, and zeros in Q4_1; see :func:`rounding`.

    Raises:
        BitternError: for a grid or a shape that ``kind`` does not hold, act-order, codes out of range, scales
            that fp16 does not hold.
    """
    spec, columns = weight.spec, weight.in_features
    check_in_order(weight, "GGUF")
    if columns % BLOCK or (spec.group_size != -1 and spec.group_size % BLOCK):
        raise BitternError(
            f"weight: {kind} needs columns and groups divisible by 32, found {columns} and {spec.group_size}"
        )
    check_range(weight)
    scales = weight.scales.half()
    if not bool(torch.isfinite(scales).all()):
        raise BitternError("scales: expected finite values that float16 holds, found others")
    if exact and (error := rounding(weight, kind)):
        raise BitternError(f"scales: {kind} would move points of the grid by {error:.2g} steps")
    rows, blocks = weight.out_features, columns // BLOCK
    fields = [_bytes(_repeat(scales, spec, columns))]
    if kind == "Q4_1":
        minimum = _minimum(scales, weight.zeros)  # of the scales as they are stored, or unpack finds no zeros
        if not bool(torch.isfinite(minimum).all()):
            raise BitternError("zeros: Q4_1 stores zero * scale in float16, which does not hold all of them")
        fields.append(_bytes(_repeat(minimum, spec, columns)))
        values = weight.codes.view(rows, blocks, BLOCK)
    else:
        zeros = _repeat(weight.zeros, spec, columns).to(torch.int16)
        steps = weight.codes.view(rows, blocks, BLOCK).to(torch.int16) - zeros.unsqueeze(2)
        half = _HALF[kind]
        if int(steps.min()) < -half or int(steps.max()) >= half:
            raise BitternError(
                f"codes: {kind} holds {-half} to {half - 1} steps from zero, "
                f"found {int(steps.min())} to {int(steps.max())}"
            )
        values = (steps & 0xFF if kind == "Q8_0" else steps + half).to(torch.uint8)
    if kind == "Q5_0":
        fifth = (values >> 4).view(rows, blocks, BLOCK // 8, 8)
        fields.append((fifth << torch.arange(8, dtype=torch.uint8)).sum(3, dtype=torch.uint8))
    if kind != "Q8_0":
        low, high = (values & 15).view(rows, blocks, 2, BLOCK // 2).unbind(2)
        values = low | high << 4
    return torch.cat([*fields, values], 2).view(rows, -1).numpy()


def unpack(data: np.ndarray[Any, Any], kind: str, spec: QuantSpec | None = None) -> QuantWeight:
    """Read blocks back.

    Args:
        data: uint8 (out_features, bytes of a row).
        kind: "Q4_0", "Q8_0", or with a grid any key of ``BLOCK_BYTES``.
        spec: the grid that was packed; None for the block type's own, symmetric in groups of 32.

    Returns:
        What was packed; but asymmetric grids of Q4_0 and Q5_0, whose zeros are in no block, come back with the smallest
        zeros that their codes allow, and the same weights.

    Raises:
        BitternError: for bytes that :func:`pack` does not make of such a grid.
    """
    blocks = torch.from_numpy(np.ascontiguousarray(data)).view(data.shape[0], -1, BLOCK_BYTES[kind])
    rows, columns = blocks.shape[0], blocks.shape[1] * BLOCK
    spec = spec or block_spec(kind)
    scales = _shared(_halves(blocks[:, :, :2]), spec, columns)
    if not bool(torch.isfinite(scales).all()):
        raise BitternError("scales: expected finite ones, found others")
    if kind == "Q8_0":
        steps = blocks[:, :, 2:].view(torch.int8).to(torch.int16)
    else:
        packed = blocks[:, :, -BLOCK // 2 :]
        values = torch.cat([packed & 15, packed >> 4], 2)
        if kind == "Q5_0":
            fifth = blocks[:, :, 2:6].unsqueeze(3) >> torch.arange(8, dtype=torch.uint8) & 1
            values |= fifth.view(values.shape) << 4
        steps = values.to(torch.int16) - _HALF.get(kind, 0)
    if kind == "Q4_1":
        minimum = _shared(_halves(blocks[:, :, 2:4]), spec, columns)
        ratio = -minimum.float() / scales.float()
        zeros = ratio.where(scales != 0, 0.0).nan_to_num_().round_().clamp_(0, spec.max_code).to(torch.uint8)
        if not torch.equal(_minimum(scales, zeros), minimum):
            raise BitternError(f"minima: expected multiples of the scales by 0 to {-spec.max_code}, found others")
        codes = steps
    else:
        zeros = torch.full_like(scales, spec.mid_code, dtype=torch.uint8)
        if not spec.sym:
            lowest = torch.full((rows, zeros.shape[1] * _blocks(spec, columns)), 127, dtype=torch.int16)
            lowest[:, : columns // BLOCK] = steps.amin(2)
            lowest = lowest.view(rows, zeros.shape[1], -1).amin(2)
            zeros = (-lowest).clamp_(0, spec.max_code).to(torch.uint8)
        codes = steps + _repeat(zeros, spec, columns).to(torch.int16).unsqueeze(2)
    low, high = int(codes.min()), int(codes.max())
    if low < 0 or high > spec.max_code:
        raise BitternError(f"codes: expected 0 to {spec.max_code} at {spec.bits} bits, found {low} to {high}")
    return QuantWeight(codes.to(torch.uint8).view(rows, columns), scales, zeros, spec)


def _blocks(spec: QuantSpec, columns: int) -> int:
    """Blocks of a whole group."""
    return spec.columns_per_group(columns) // BLOCK


def _repeat(values: Tensor, spec: QuantSpec, columns: int) -> Tensor:
    """(rows, groups) -> (rows, blocks); the last group may be short."""
    return values.repeat_interleave(_blocks(spec, columns), 1)[:, : columns // BLOCK]


def _shared(values: Tensor, spec: QuantSpec, columns: int) -> Tensor:
    """The inverse of :func:`_repeat`: each group's value, which all of its blocks have."""
    found = values[:, :: _blocks(spec, columns)].contiguous()
    if not torch.equal(_repeat(found, spec, columns).view(torch.int16), values.view(torch.int16)):
        raise BitternError(f"scales: expected one per group of {spec.group_size} columns, found several")
    return found


def _minimum(scales: Tensor, zeros: Tensor) -> Tensor:
    """What Q4_1 stores in a zero's place: fp16 -zero * scale."""
    return (-zeros.double() * scales.double()).half()


def _bytes(values: Tensor) -> Tensor:
    """fp16 (rows, blocks) -> uint8 (rows, blocks, 2)."""
    return values.contiguous().view(torch.uint8).view(*values.shape, 2)


def _halves(values: Tensor) -> Tensor:
    """The inverse of :func:`_bytes`."""
    return values.contiguous().view(torch.float16).squeeze(2)
