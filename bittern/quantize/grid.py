"""Choose the grid of every group: its scale and, where it is asymmetric, its zero.

Grids are fixed from the original weights before any column is solved. Refitting them to the working
weights, as most GPTQ code does, inflates the scales by what the solver has already moved.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bittern.weight import QuantSpec, min_max_grid, round_scale

COARSE_STEPS = 20
FINE_STEPS = 6
LARGEST_RATIO = 1.05
SMALLEST_RATIO = {2: 0.25, 3: 0.3, 4: 0.4, 8: 0.8}
"""Searched scales, by bits, as a share of the one that covers the whole range of the group."""

CHUNK = {"cpu": 1 << 16, "cuda": 1 << 25}
"""Weights searched at a time; on a CPU the temporaries of a chunk stay in its second-level cache."""


def search_grid(weight: Tensor, spec: QuantSpec, importance: Tensor) -> tuple[Tensor, Tensor]:
    """The grid with the least weighted rounding error ``sum_i importance_i (w^_i - w_i)^2``.

    Scales are searched coarsely, then finely around the best; a least-squares scale for the best
    codes is tried last. A symmetric grid reaches one code further below its zero than above: at 8 and
    4 bits that side is given to the largest weight, at 3 and 2 bits both signs of the scale are tried.
    An asymmetric grid tries every zero (2 and 3 bits) or those next to the min-max zero.

    Args:
        weight: fp32 (out_features, in_features).
        spec: the grid; ``group_size`` divides ``in_features``.
        importance: fp32 (in_features,), positive: the damped diagonal of the Hessian.

    Returns:
        As :func:`min_max_grid`, in no group worse than it; scales may be negative.
    """
    columns = spec.columns_per_group(weight.shape[1])
    rows = max(1, CHUNK.get(weight.device.type, 1 << 18) // weight.shape[1])
    root = importance.sqrt().view(-1, columns)
    chunks = [_search(chunk.reshape(chunk.shape[0], -1, columns), spec, root) for chunk in torch.split(weight, rows)]
    return torch.cat([scales for scales, _ in chunks]), torch.cat([zeros for _, zeros in chunks])


def _search(grouped: Tensor, spec: QuantSpec, root: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`search_grid` for weights (rows, groups, columns) and roots of importances (groups, columns)."""
    widest = _widest_scale(grouped, spec)
    best = _Best(grouped, spec, root, widest)
    best.try_scale(min_max_grid(grouped.flatten(1), spec)[0])
    smallest = SMALLEST_RATIO[spec.bits]
    step = (LARGEST_RATIO - smallest) / (COARSE_STEPS - 1)
    for i in range(COARSE_STEPS):
        best.try_scale(widest * (LARGEST_RATIO - i * step))
    centre = best.scales.clone()
    for i in range(FINE_STEPS):
        best.try_scale(centre + widest * step * (2 * (i + 1) / (FINE_STEPS + 1) - 1))
    best.try_least_squares()
    return best.scales, best.zeros.to(torch.uint8)


def _widest_scale(grouped: Tensor, spec: QuantSpec) -> Tensor:
    """The scale (rows, groups) that covers a group; negative where its largest weight is positive."""
    low, high = grouped.amin(2), grouped.amax(2)
    if spec.sym:
        return torch.where(high > -low, -high, -low) / spec.mid_code
    return (high.clamp_min(0) - low.clamp_max(0)) / spec.max_code


class _Best:
    """The best grid so far of every group in a chunk."""

    def __init__(self, grouped: Tensor, spec: QuantSpec, root: Tensor, widest: Tensor) -> None:
        self.grouped, self.spec, self.root = grouped, spec, root
        self.scales = round_scale(widest)
        self.zeros = torch.full_like(widest, spec.mid_code)
        self.error = torch.full_like(widest, torch.inf)
        self.exact, self.rounded, self.code = (torch.empty_like(grouped) for _ in range(3))

    def try_scale(self, scales: Tensor) -> None:
        """Try a scale per group, fp32 (rows, groups), with the signs or zeros that go with it."""
        scales = round_scale(scales)
        torch.mul(self.grouped, scales.reciprocal().unsqueeze(2), out=self.exact)
        torch.round(self.exact, out=self.rounded)
        if self.spec.sym:
            self._keep(scales, scales, self.spec.mid_code, self.spec.mid_code)
            if self.spec.bits <= 3:
                # A negated scale mirrors the grid: mid_code - 1 steps below the zero, mid_code above.
                self._keep(scales, -scales, self.spec.mid_code - 1, self.spec.mid_code)
        elif self.spec.bits <= 3:
            for zero in range(self.spec.max_code + 1):
                self._keep(scales, scales, zero, zero)
        else:
            lowest = (-self.exact.amin(2).clamp_max(0)).round()
            for shift in (-1, 0, 1):
                zeros = (lowest + shift).clamp(0, self.spec.max_code)
                self._keep(scales, scales, zeros, zeros)

    def _keep(self, scales: Tensor, stored: Tensor, below: int | Tensor, zero: int | Tensor) -> None:
        """Keep a grid with ``below`` codes under its zero where its error is the least, as (stored, zero)."""
        if isinstance(below, Tensor):
            floor = below.unsqueeze(2)
            torch.maximum(self.rounded, -floor, out=self.code)
            torch.minimum(self.code, self.spec.max_code - floor, out=self.code)
        else:
            torch.clamp(self.rounded, -below, self.spec.max_code - below, out=self.code)
        error = torch.linalg.vector_norm(self.code.sub_(self.exact).mul_(self.root), dim=2).mul_(scales.abs())
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scales = torch.where(better, stored, self.scales)
        self.zeros = torch.where(better, torch.as_tensor(zero, dtype=scales.dtype, device=scales.device), self.zeros)

    def try_least_squares(self) -> None:
        """Refit each scale to the codes that it chose; keep it where codes chosen anew are better."""
        floor = self.zeros.unsqueeze(2)
        steps = (self.grouped / self.scales.unsqueeze(2)).round_()
        steps = torch.minimum(torch.maximum(steps, -floor), self.spec.max_code - floor).mul_(self.root)
        fitted = (steps * self.grouped * self.root).sum(2) / steps.square().sum(2).clamp_min(1e-30)
        scales = round_scale(torch.where(fitted == 0, self.scales, fitted))
        torch.mul(self.grouped, scales.reciprocal().unsqueeze(2), out=self.exact)
        torch.round(self.exact, out=self.rounded)
        self._keep(scales, scales, self.zeros, self.zeros)
