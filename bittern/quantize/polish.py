"""Bring a solved matrix closer to what it should be: scales that fit its codes, and codes that fit these.

GPTQ decides on every column once, on scales that were there before; what it gave away is found again in two ways
that take turns, each of which makes the loss of a row ``(w^ - w) (H + lambda I) (w^ - w)'`` smaller or leaves it:

- least squares: with a_g the codes of group g less its zero, and 0 elsewhere, a row's best scales s solve
  ``(A' H A) s = A' H w``;
- coordinate descent: each code in turn becomes the best one for all others as they are,
  ``w^_j <- Q(w^_j - R_j / H_jj)`` with ``R = (W^ - W) H`` (Behdin et al. 2023, QuantEase).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bittern.weight import QuantWeight, round_scale

BLOCK_SIZE = 64
"""Columns that descend between two matrix products; it changes the speed, not the result."""

REFIT_BYTES = 1 << 26
"""Rows whose scales are refitted together fill so much with their systems of equations."""


def polish(weight: Tensor, hessian: Tensor, damping: float, quantized: QuantWeight) -> tuple[QuantWeight, Tensor]:
    """Refit the scales, let the codes descend, and refit the scales again.

    Args:
        weight: what the matrix should be, fp32 (out_features, in_features).
        hessian: fp32 (in_features, in_features), symmetric.
        damping: to be added to its diagonal.
        quantized: as it was solved.

    Returns:
        The matrix with other scales and codes, and the loss of each row, (out_features,).
    """
    hessian = hessian + damping * torch.eye(len(hessian), device=hessian.device)
    quantized = refit_scales(weight, hessian, quantized)
    quantized = replace(quantized, codes=descend(weight, hessian, quantized))
    quantized = refit_scales(weight, hessian, quantized)
    return quantized, row_losses(weight, hessian, quantized.dequantize())


def row_losses(weight: Tensor, hessian: Tensor, found: Tensor) -> Tensor:
    """The squared error that each row makes of its output."""
    error = found - weight
    return ((error @ hessian) * error).sum(1)


def refit_scales(weight: Tensor, hessian: Tensor, quantized: QuantWeight) -> QuantWeight:
    """The least-squares scales of given codes; a row keeps its own where rounding to fp16 makes them worse.

    Args:
        weight: fp32 (out_features, in_features).
        hessian: fp32 (in_features, in_features), damped.
        quantized: codes, and scales whose signs stay.
    """
    scales = quantized.scales.float()
    rows, groups = scales.shape
    steps = (quantized.codes.view(rows, groups, -1) - quantized.zeros.unsqueeze(2).to(weight.dtype)).flatten(1)
    found = [
        _least_squares(weight[part], hessian, steps[part], scales[part])
        for part in _slices(rows, REFIT_BYTES // (8 * groups**2))
    ]
    fitted = torch.cat(found) if found else scales
    fitted = round_scale(torch.where((fitted * scales > 0) & torch.isfinite(fitted), fitted, scales))
    before = row_losses(weight, hessian, _scaled(steps, scales))
    better = row_losses(weight, hessian, _scaled(steps, fitted)) < before
    return replace(quantized, scales=torch.where(better.unsqueeze(1), fitted, scales).to(quantized.scales.dtype))


def _least_squares(weight: Tensor, hessian: Tensor, steps: Tensor, scales: Tensor) -> Tensor:
    by_group = steps.view(*scales.shape, -1)
    right = ((weight @ hessian).view_as(by_group) * by_group).sum(2).double()
    system = torch.empty(*scales.shape, scales.shape[1], dtype=torch.float64, device=weight.device)
    for group, columns in enumerate(_slices(len(hessian), by_group.shape[2])):
        system[:, group] = ((by_group[:, group] @ hessian[columns]).view_as(by_group) * by_group).sum(2)
    diagonal = system.diagonal(dim1=1, dim2=2)
    unused = diagonal == 0  # a group whose codes are all its zero: any scale does
    diagonal[unused], right[unused] = 1.0, scales.double()[unused]
    diagonal *= 1 + 1e-9  # groups of a few codes may be multiples of each other
    solved: Tensor = torch.linalg.solve(system, right.unsqueeze(2)).squeeze(2).float()
    return solved


def _scaled(steps: Tensor, scales: Tensor) -> Tensor:
    return (steps.view(*scales.shape, -1) * scales.unsqueeze(2)).flatten(1)


def _slices(count: int, size: int) -> list[slice]:
    size = max(1, size)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def descend(weight: Tensor, hessian: Tensor, quantized: QuantWeight) -> Tensor:
    """Codes uint8 (out_features, in_features) after each has been chosen once more, column by column.

    Args:
        weight: fp32 (out_features, in_features).
        hessian: fp32 (in_features, in_features), damped: no diagonal entry is 0.
        quantized: where to begin.
    """
    per_group = quantized.spec.columns_per_group(weight.shape[1])
    current = quantized.dequantize()
    slopes = ((current - weight) @ hessian).T.contiguous()  # transposed, so that columns are contiguous
    current, codes = current.T.contiguous(), quantized.codes.T.contiguous()
    scales, zeros = quantized.scales.float().T.contiguous(), quantized.zeros.float().T.contiguous()
    diagonal = hessian.diagonal().tolist()
    for block in _slices(len(hessian), BLOCK_SIZE):
        before, inside = current[block].clone(), hessian[block, block]
        for j in range(block.stop - block.start):
            column = block.start + j
            group = column // per_group
            slope = slopes[column]
            if j:
                slope = slope + inside[j, :j] @ (current[block.start : column] - before[:j])
            code = current[column].sub(slope, alpha=1 / diagonal[column]).div_(scales[group]).round_()
            code.add_(zeros[group]).clamp_(0, quantized.spec.max_code)
            codes[column] = code
            current[column] = code.sub_(zeros[group]).mul_(scales[group])
        slopes.addmm_(hessian[:, block], current[block] - before)
    return codes.T.contiguous()
