"""Choose the grid of every group: its scale and, where it is asymmetric, its zero.

Grids are fixed from the original weights before any column is solved. Refitting them to the working
weights, as most GPTQ code does, inflates the scales by what the solver has already moved.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bittern.errors import BitternError
from bittern.weight import QuantSpec

COARSE_STEPS = 20
FINE_STEPS = 6
SMALLEST_RATIO, LARGEST_RATIO = 0.25, 1.05
"""Searched scales as a share of the one that covers the whole range of the group."""

SMALLEST_SCALE = 2.0**-24
"""The smallest positive fp16 number: an all-zero group needs some scale."""

CHUNK = {"cpu": 1 << 18, "cuda": 1 << 25}
"""Weights searched at a time; on a CPU the temporaries of a chunk stay in its second-level cache."""


def round_scale(scale: Tensor) -> Tensor:
    """Round scales to what fp16 can hold, away from zero, as fp32.

    Codes are chosen for the rounded scale; rounding afterwards would move every weight.

    Raises:
        BitternError: when a scale is too large for fp16.
    """
    sign = torch.where(scale < 0, -1.0, 1.0)
    rounded = sign * scale.abs().clamp_min(SMALLEST_SCALE).half().float()
    if not bool(torch.isfinite(rounded).all()):
        raise BitternError(f"scales: fp16 holds at most 65504, found {scale.abs().max():.4g}")
    return rounded


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


def search_grid(weight: Tensor, spec: QuantSpec, importance: Tensor) -> tuple[Tensor, Tensor]:
    """The grid with the least weighted rounding error ``sum_i importance_i (w^_i - w_i)^2``.

    Scales are searched coarsely, then finely around the best; a least-squares scale for the best
    codes is tried last. A symmetric grid reaches one code further below its zero than above, so
    both signs of the scale are tried; an asymmetric one tries every zero (2 and 3 bits) or those
    next to the min-max zero.

    Args:
        weight: fp32 (out_features, in_features).
        spec: the grid; ``group_size`` divides ``in_features``.
        importance: fp32 (in_features,), not negative: the diagonal of the Hessian.

    Returns:
        As :func:`min_max_grid`; scales may be negative.
    """
    columns = spec.columns_per_group(weight.shape[1])
    rows = max(1, CHUNK.get(weight.device.type, 1 << 18) // weight.shape[1])
    # A group whose inputs were never active still deserves a sensible grid.
    importance = (importance + 1e-6 * importance.mean() + 1e-30).view(1, -1, columns)
    found = [_search(chunk.reshape(chunk.shape[0], -1, columns), spec, importance) for chunk in weight.split(rows)]
    return torch.cat([scales for scales, _ in found]), torch.cat([zeros for _, zeros in found])


def _search(grouped: Tensor, spec: QuantSpec, importance: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`search_grid` for weights of shape (rows, groups, columns)."""
    widest = _widest_scale(grouped, spec)
    best = _Best(grouped, spec, importance, widest)
    for ratio in torch.linspace(LARGEST_RATIO, SMALLEST_RATIO, COARSE_STEPS).tolist():
        best.try_scale(widest * ratio)
    step = (LARGEST_RATIO - SMALLEST_RATIO) / (COARSE_STEPS - 1)
    centre = best.scales.abs()
    for offset in torch.linspace(-step, step, FINE_STEPS + 2).tolist()[1:-1]:
        best.try_scale(centre + widest * offset)
    best.try_least_squares()
    return best.scales, best.zeros.to(torch.uint8)


def _widest_scale(grouped: Tensor, spec: QuantSpec) -> Tensor:
    if spec.sym:
        return grouped.abs().amax(2) / spec.mid_code
    return (grouped.amax(2).clamp_min(0) - grouped.amin(2).clamp_max(0)) / spec.max_code


class _Best:
    """The best grid so far of every group in a chunk."""

    def __init__(self, grouped: Tensor, spec: QuantSpec, importance: Tensor, widest: Tensor) -> None:
        self.grouped, self.spec, self.importance = grouped, spec, importance
        self.scales = round_scale(widest)
        self.zeros = torch.full_like(widest, spec.mid_code)
        self.error = torch.full_like(widest, torch.inf)

    def try_scale(self, scales: Tensor) -> None:
        """Try a scale per group, fp32 (rows, groups), with the signs or zeros that go with it."""
        scales = round_scale(scales)
        exact = self.grouped / scales.unsqueeze(2)
        rounded = exact.round()
        if self.spec.sym:
            # A negative scale mirrors the grid: mid_code - 1 steps below the zero, mid_code above.
            self._keep(scales, self.spec.mid_code, exact, rounded)
            self._keep(scales, self.spec.mid_code - 1, exact, rounded, flip=True)
        elif self.spec.bits <= 3:
            for zero in range(self.spec.max_code + 1):
                self._keep(scales, zero, exact, rounded)
        else:
            lowest = (-exact.amin(2).clamp_max(0)).round()
            for shift in (-1, 0, 1):
                self._keep(scales, (lowest + shift).clamp(0, self.spec.max_code), exact, rounded)

    def _keep(self, scales: Tensor, zero: int | Tensor, exact: Tensor, rounded: Tensor, flip: bool = False) -> None:
        """Keep (scale, zero) where its error is the least; ``flip`` stores the mirrored grid."""
        if isinstance(zero, Tensor):
            bound = zero.unsqueeze(2)
            code = torch.minimum(torch.maximum(rounded, -bound), self.spec.max_code - bound)
        else:
            code = rounded.clamp(-zero, self.spec.max_code - zero)
        error = code.sub_(exact).square_().mul_(self.importance).sum(2).mul_(scales.square())
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scales = torch.where(better, -scales if flip else scales, self.scales)
        stored = torch.as_tensor(self.spec.mid_code if flip else zero, dtype=scales.dtype, device=scales.device)
        self.zeros = torch.where(better, stored, self.zeros)

    def try_least_squares(self) -> None:
        """Refit each scale to the codes that it chose; keep it where codes chosen anew are better."""
        zeros = self.zeros.unsqueeze(2)
        steps = (self.grouped / self.scales.unsqueeze(2)).round_()
        steps = torch.minimum(torch.maximum(steps, -zeros), self.spec.max_code - zeros)
        weighted = steps * self.importance
        scales = (weighted * self.grouped).sum(2) / (weighted * steps).sum(2).clamp_min(1e-30)
        scales = round_scale(torch.where(scales == 0, self.scales, scales))
        exact = self.grouped / scales.unsqueeze(2)
        code = torch.minimum(torch.maximum(exact.round(), -zeros), self.spec.max_code - zeros)
        error = code.sub_(exact).square_().mul_(self.importance).sum(2).mul_(scales.square())
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scales = torch.where(better, scales, self.scales)
