"""A matrix that torch dequantizes when it is used.

It runs on every device, and the native kernels are tested against it. A weight takes ``bits`` of memory, at
3 bits too, plus its share of scales and zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from bittern.weight import QuantWeight

# How the bits of a code are split over planes: 3 bits as 2 + 1, so that every plane divides a byte.
_PLANES = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}
# Weights that a CPU dequantizes at a time: 4 MB in fp32, still in cache when they are multiplied.
_STEP = 2**20


def keep_dtype(module: nn.Module, name: str, before: Tensor) -> None:
    """Undo what ``nn.Module._apply`` did to the dtype of a buffer; its device stays the new one."""
    now = module.get_buffer(name)
    if now.dtype != before.dtype:
        module._buffers[name] = before.to(now.device)


class PackedMatrix(nn.Module):
    """One quantized matrix of shape (out_features, in_features).

    A plane of ``w`` bits holds in byte j of a row the codes j, j + n, j + 2n, ... from the low bits up,
    n being the bytes in a row: unpacking is a shift and a mask over whole rows. Columns are stored
    group by group, so act-order costs one permutation of the input.

    Buffers:
        plane0 (at 3 bits also plane1): uint8 (out_features, columns * w / 8).
        scales: float16 or float32 (out_features, groups); a change of the model's dtype leaves it alone.
        zeros: uint8 (out_features, groups).
        columns: int64 (in_features,), which input column each stored one is; None when in order.

    Args:
        weight: what to hold.
        dtype: what :attr:`weight` is dequantized to; follows later changes of the model's dtype.
    """

    plane0: Tensor
    scales: Tensor
    zeros: Tensor
    columns: Tensor | None
    like: Tensor

    def __init__(self, weight: QuantWeight, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.bits = weight.spec.bits
        self.group_size = weight.spec.columns_per_group(weight.in_features)
        self.out_features, self.in_features = weight.out_features, weight.in_features
        order = None if weight.g_idx is None else torch.argsort(weight.g_idx, stable=True)
        codes = weight.codes if order is None else weight.codes[:, order]
        # Rows are filled up to whole groups and bytes; dequantize() leaves that away again.
        width = weight.scales.shape[1] * self.group_size
        codes = functional.pad(codes, (0, -(-width // 8) * 8 - self.in_features))
        shift = 0
        for index, bits in enumerate(_PLANES[self.bits]):
            self.register_buffer(f"plane{index}", _pack_plane((codes >> shift) & (2**bits - 1), bits))
            shift += bits
        self.register_buffer("scales", weight.scales)
        self.register_buffer("zeros", weight.zeros)
        self.register_buffer("columns", order)
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=codes.device), persistent=False)

    def dequantize(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) as floats, their columns in stored order: (stop - start, in_features).

        Arithmetic is done in ``dtype``, but in fp32 for bf16, whose 8 bits would round the scales.
        """
        work = torch.float32 if dtype == torch.bfloat16 else dtype
        zeros = self.zeros[start:stop].to(work).unsqueeze(2)
        scales = self.scales[start:stop].to(work).unsqueeze(2)
        rows, groups, _ = scales.shape
        width = groups * self.group_size
        codes = self._codes(start, stop)[:, :width].to(work).reshape(rows, groups, self.group_size)
        return codes.sub_(zeros).mul_(scales).view(rows, width)[:, : self.in_features].to(dtype)

    @property
    def weight(self) -> Tensor:
        """The whole matrix as floats, columns in the order of the input: (out_features, in_features)."""
        stored = self.dequantize(self.like.dtype)
        return stored if self.columns is None else stored[:, torch.argsort(self.columns)]

    def forward(self, x: Tensor) -> Tensor:
        """``x @ W.T`` for x of shape (..., in_features)."""
        if self.columns is not None:
            x = x[..., self.columns]
        step = max(1, _STEP // self.in_features) if x.device.type == "cpu" else self.out_features
        if step >= self.out_features:
            return functional.linear(x, self.dequantize(x.dtype))
        parts = [
            functional.linear(x, self.dequantize(x.dtype, start, start + step))
            for start in range(0, self.out_features, step)
        ]
        return torch.cat(parts, dim=-1)

    def _codes(self, start: int, stop: int | None) -> Tensor:
        """Rows [start, stop) of the codes, uint8 (stop - start, stored columns)."""
        if self.bits == 8:
            return self.plane0[start:stop]
        planes = _PLANES[self.bits]
        codes = _unpack_plane(self.plane0[start:stop], planes[0])
        if len(planes) == 2:
            high = _unpack_plane(self.get_buffer("plane1")[start:stop], planes[1])
            codes |= high << planes[0]
        return codes

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        scales = self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        keep_dtype(self, "scales", scales)  # a model in bf16 keeps exact scales
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}"
        )


def _pack_plane(values: Tensor, bits: int) -> Tensor:
    """uint8 (rows, columns) below ``2 ** bits`` -> uint8 (rows, columns * bits / 8)."""
    packed = torch.zeros_like(values[:, : values.shape[1] * bits // 8])
    for index, part in enumerate(values.chunk(8 // bits, dim=1)):
        packed |= part << (index * bits)
    return packed


def _unpack_plane(plane: Tensor, bits: int) -> Tensor:
    """The inverse of :func:`_pack_plane`."""
    rows, width = plane.shape
    values = torch.empty(rows, width * 8 // bits, dtype=torch.uint8, device=plane.device)
    for index in range(8 // bits):
        part = values[:, index * width : (index + 1) * width]
        torch.bitwise_right_shift(plane, index * bits, out=part)
        part &= 2**bits - 1
    return values
