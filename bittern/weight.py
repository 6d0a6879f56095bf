"""What the integers mean: the one definition that methods, formats and kernels share.

``W[o, i] = scales[o, g(i)] * (codes[o, i] - zeros[o, g(i)])``

A method produces a :class:`QuantWeight`, a format packs and unpacks it, a kernel consumes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from bittern.errors import BitternError

BITS = (2, 3, 4, 8)
LARGEST_SCALE = 65504.0
"""The largest fp16 number."""
SMALLEST_SCALE = 2.0**-24
"""The smallest positive fp16 number: an all-zero group needs some scale."""


@dataclass(frozen=True)
class QuantSpec:
    """The grid of one matrix.

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: input columns that share a scale and a zero; -1 is the whole row.
        sym: zeros fixed at ``2 ** (bits - 1)``. Scales may be negative either way.

    Raises:
        BitternError: for any other value.
    """

    bits: int
    group_size: int = 128
    sym: bool = True

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in BITS:
            raise BitternError(f"bits: expected one of 2, 3, 4, 8, found {self.bits}")
        if type(self.group_size) is not int or (self.group_size != -1 and self.group_size < 1):
            raise BitternError(f"group_size: expected -1 or a positive number, found {self.group_size}")
        if type(self.sym) is not bool:
            raise BitternError(f"sym: expected true or false, found {self.sym}")

    @property
    def max_code(self) -> int:
        """The largest code and zero, ``2 ** bits - 1``."""
        return (1 << self.bits) - 1

    @property
    def mid_code(self) -> int:
        """The zero of a symmetric grid, ``2 ** (bits - 1)``."""
        return 1 << (self.bits - 1)

    def columns_per_group(self, in_features: int) -> int:
        """Columns that share a scale in a matrix of ``in_features`` columns."""
        return in_features if self.group_size == -1 else self.group_size

    def groups(self, in_features: int) -> int:
        """Number of groups in a row of ``in_features`` columns; the last one may be short."""
        return -(-in_features // self.columns_per_group(in_features))


@dataclass(frozen=True)
class QuantWeight:
    """One quantized matrix.

    Attributes:
        codes: uint8 (out_features, in_features), each at most ``spec.max_code``.
        scales: float16 or float32 (out_features, groups); sign is free.
        zeros: uint8 (out_features, groups), each at most ``spec.max_code``.
        spec: the grid.
        g_idx: int32 (in_features,), the group of each column; None means ``i // group_size``.
            Only artifacts made elsewhere with act-order have one.

    Raises:
        BitternError: when shapes and dtypes do not fit each other.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    spec: QuantSpec
    g_idx: Tensor | None = None

    def __post_init__(self) -> None:
        out_features, in_features = self.codes.shape
        expected = (out_features, self.spec.groups(in_features))
        for name, tensor in (("scales", self.scales), ("zeros", self.zeros)):
            if tuple(tensor.shape) != expected:
                raise BitternError(f"{name}: expected shape {expected}, found {tuple(tensor.shape)}")
        for name, tensor in (("codes", self.codes), ("zeros", self.zeros)):
            if tensor.dtype != torch.uint8:
                raise BitternError(f"{name}: expected uint8, found {tensor.dtype}")

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        return self.codes.shape[1]

    def rows(self, which: slice | Tensor) -> QuantWeight:
        """Some of its rows, or all in another order: a slice or indices, int64."""
        return QuantWeight(self.codes[which], self.scales[which], self.zeros[which], self.spec, self.g_idx)

    def group_index(self) -> Tensor:
        """The group of each column, int64 (in_features,)."""
        if self.g_idx is not None:
            return self.g_idx.long()
        columns = torch.arange(self.in_features, device=self.codes.device)
        return columns // self.spec.columns_per_group(self.in_features)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as floats, (out_features, in_features)."""
        even = self.scales.shape[1] * self.spec.columns_per_group(self.in_features) == self.in_features
        g_idx = self.g_idx if self.g_idx is not None or even else self.group_index()
        return dequantize(self.codes, self.scales, self.zeros, g_idx, dtype)


def dequantize(
    codes: Tensor, scales: Tensor, zeros: Tensor, g_idx: Tensor | None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Evaluate the formula of this module on bare tensors (shapes as in :class:`QuantWeight`).

    Arithmetic is done in ``dtype``; codes minus zeros is exact in any of fp32, fp16 and bf16.
    """
    out_features, in_features = codes.shape
    groups = scales.shape[1]
    if g_idx is None and in_features % groups == 0:
        grouped = codes.view(out_features, groups, in_features // groups).to(dtype)
        grouped = grouped.sub_(zeros.to(dtype).unsqueeze(2)).mul_(scales.to(dtype).unsqueeze(2))
        return grouped.view(out_features, in_features)
    if g_idx is None:
        raise BitternError(f"{groups} groups do not divide {in_features} columns and no g_idx says which is whose")
    columns = g_idx.long()
    return (codes.to(dtype) - zeros.to(dtype)[:, columns]).mul_(scales.to(dtype)[:, columns])


def round_scale(scale: Tensor) -> Tensor:
    """Round scales to what fp16 can hold, away from zero, as fp32.

    Codes are chosen for the rounded scale; rounding afterwards would move every weight.

    Raises:
        BitternError: when a scale is too large for fp16.
    """
    sign = torch.where(scale < 0, -1, 1)  # of two floats it would have torch's default dtype
    rounded = sign * scale.abs().clamp_min(SMALLEST_SCALE).half().float()
    if not bool(torch.isfinite(rounded).all()):
        raise BitternError(f"scales: fp16 holds at most {LARGEST_SCALE:.0f}, found {scale.abs().max():.4g}")
    return rounded


@contextmanager
def naming(*layers: str) -> Iterator[None]:
    """Have errors of what is done within, which knows values alone, name the layers that these belong to.

    Raises:
        BitternError: the same, behind their names.
    """
    try:
        yield
    except BitternError as error:
        raise BitternError(f"{', '.join(layers)}: {error}") from error


def min_max_grid(weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The grid that covers every weight of its group: the textbook choice, used by round-to-nearest.

    Args:
        weight: fp32 (out_features, in_features).
        spec: the grid; ``group_size`` divides ``in_features``.

    Returns:
        scales fp32 (out_features, groups), exactly representable in fp16, and zeros uint8.
    """
    grouped = weight.view(weight.shape[0], -1, spec.columns_per_group(weight.shape[1]))
    if spec.sym:
        scales = round_scale(grouped.abs().amax(2) * 2 / spec.max_code)
        return scales, torch.full_like(scales, spec.mid_code, dtype=torch.uint8)
    low, high = grouped.amin(2).clamp_max(0), grouped.amax(2).clamp_min(0)
    scales = round_scale((high - low) / spec.max_code)
    return scales, (-low / scales).round().clamp(0, spec.max_code).to(torch.uint8)


def round_to_nearest(weight: Tensor, spec: QuantSpec) -> QuantWeight:
    """Round each weight to the nearest point of its group's min-max grid; no data, no error feedback.

    Args:
        weight: (out_features, in_features).
        spec: the grid; ``group_size`` divides ``in_features``.
    """
    weight = weight.float()
    scales, zeros = min_max_grid(weight, spec)
    grouped = weight.view(*scales.shape, -1)
    codes = (grouped / scales.unsqueeze(2)).round_().add_(zeros.unsqueeze(2)).clamp_(0, spec.max_code)
    return QuantWeight(codes.to(torch.uint8).view(weight.shape), scales.half(), zeros, spec)


def is_finite(tensor: Tensor) -> bool:
    """Whether floats hold neither NaN nor infinity; ten times as fast as isfinite().all() and without a copy."""
    if tensor.numel() == 0:
        return True
    if tensor.element_size() == 1:  # torch has no minimum of 8-bit floats
        tensor = tensor.float()
    low, high = tensor.aminmax()  # a NaN anywhere makes both of them NaN
    return bool(torch.isfinite(low) & torch.isfinite(high))
