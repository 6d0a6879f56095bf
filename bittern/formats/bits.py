"""Streams of b-bit integers in 32-bit words, and what the packers of all formats ask of a weight.

Packing is a little-endian bit stream without gaps: value i has bits [i*b, i*b + b). At 3 bits two of
every 32 values straddle words. GPTQ and compressed-tensors store it as int32, MLX as uint32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bittern.errors import BitternError
from bittern.shards import dtype_name
from bittern.weight import QuantWeight

WORD = 32


def words(count: int, bits: int) -> int:
    """Words that ``count`` values of ``bits`` bits fill, the last one perhaps in part."""
    return -(-count * bits // WORD)


def pack_rows(values: Tensor, bits: int) -> Tensor:
    """Pack along dimension 0: uint8 (n, m), each below ``2 ** bits`` -> int32 (ceil(n * bits / 32), m)."""
    count, width = values.shape
    blocks = -(-count // WORD)
    if count % WORD:
        values = torch.cat([values, values.new_zeros(blocks * WORD - count, width)])
    lanes = values.view(blocks, WORD, width)
    packed = torch.zeros(blocks, bits, width, dtype=torch.int32, device=values.device)
    for lane in range(WORD):
        word, shift = divmod(lane * bits, WORD)
        value = lanes[:, lane].to(torch.int32)
        packed[:, word] |= value << shift
        if shift + bits > WORD:  # the rest of a value that straddles two words
            packed[:, word + 1] |= value >> (WORD - shift)
    return packed.view(blocks * bits, width)[: words(count, bits)]


def unpack_rows(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of :func:`pack_rows`: int32 (ceil(count * bits / 32), m) -> uint8 (count, m)."""
    height, width = packed.shape
    blocks = -(-count // WORD)
    if height != blocks * bits:
        packed = torch.cat([packed, packed.new_zeros(blocks * bits - height, width)])
    packed = packed.view(blocks, bits, width)
    lanes = torch.empty(blocks, WORD, width, dtype=torch.uint8, device=packed.device)
    value = torch.empty_like(packed[:, 0])
    for lane in range(WORD):
        word, shift = divmod(lane * bits, WORD)
        torch.bitwise_right_shift(packed[:, word], shift, out=value)  # keeps the sign, which the mask cuts off
        if shift + bits > WORD:
            value &= 2 ** (WORD - shift) - 1
            value |= packed[:, word + 1] << (WORD - shift)
        lanes[:, lane] = value  # the lower 8 bits of it
    lanes &= 2**bits - 1
    return lanes.view(blocks * WORD, width)[:count]


def check_range(weight: QuantWeight) -> None:
    """Refuse codes and zeros that do not fit the bits of a weight's grid."""
    spec = weight.spec
    for name, values in (("codes", weight.codes), ("zeros", weight.zeros)):
        if int(values.max()) > spec.max_code:
            raise BitternError(
                f"{name}: expected at most {spec.max_code} at {spec.bits} bits, found {int(values.max())}"
            )


def check_zeros(zeros: Tensor, bits: int, name: str) -> None:
    """Refuse zeros of a layer that is said to be symmetric, unless all are ``2 ** (bits - 1)``."""
    middle = 1 << (bits - 1)
    if not bool((zeros == middle).all()):
        raise BitternError(
            f"{name}: expected {middle} everywhere in a symmetric layer, found {int(zeros[zeros != middle][0])}"
        )


def check_in_order(weight: QuantWeight, format: str) -> None:
    """Refuse act-order for a format that has no place for it."""
    if weight.g_idx is not None:
        raise BitternError(
            f"g_idx: {format} stores columns in the order of their groups, found act-order; gptq and gptq_v2 hold it"
        )


def exact_scales(weight: QuantWeight, dtype: torch.dtype) -> Tensor:
    """The scales in ``dtype``, (N, G).

    Raises:
        BitternError: when they are not finite, or rounded by it.
    """
    scales = weight.scales.to(dtype)
    if not bool(torch.isfinite(scales).all()) or not torch.equal(scales.float(), weight.scales.float()):
        hint = "" if dtype == torch.float32 else "; with --dtype fp32, compressed-tensors and MLX hold them"
        raise BitternError(f"scales: expected finite values that {dtype_name(dtype)} holds exactly, found others{hint}")
    return scales


def check_tensor(
    tensors: Mapping[str, Tensor], suffix: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> Tensor:
    """One tensor of a stored layer, of one of ``dtypes`` and of ``shape``; floats also finite.

    Raises:
        BitternError: naming it, what was expected and what was found.
    """
    tensor = tensors.get(suffix)
    if tensor is None or tensor.dtype not in dtypes or tuple(tensor.shape) != shape or 0 in shape:
        expected = " or ".join(map(dtype_name, dtypes))
        raise BitternError(f"{suffix}: expected {expected} of shape {shape}, found {describe(tensor)}")
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise BitternError(f"{suffix}: expected finite values, found others")
    return tensor


def float_scales(scales: Tensor) -> Tensor:
    """Stored scales as a :class:`QuantWeight` has them: float16 as it is, everything else as float32."""
    return (scales if scales.dtype == torch.float16 else scales.to(torch.float32)).contiguous()


def describe(tensor: Tensor | None) -> str:
    """A tensor in an error message."""
    return "none" if tensor is None else f"{dtype_name(tensor.dtype)} of shape {tuple(tensor.shape)}"
