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

from bittern.quantize.columns import BLOCK_SIZE, solve_columns
from bittern.weight import LARGEST_SCALE, QuantWeight, round_scale

REFIT_BYTES = 1 << 26
"""Rows whose scales are refitted together fill so much with their systems of equations."""

ROUNDS = 4
"""How often codes descend and scales are refitted; three times as many bring nothing more (docs/log.md)."""


def polish(
    weight: Tensor, hessian: Tensor, damping: float, quantized: QuantWeight, rounds: int = ROUNDS
) -> tuple[QuantWeight, Tensor]:
    """Refit the scales; then let the codes descend and refit the scales again, a few times.

    Args:
        weight: what the matrix should be, fp32 (out_features, in_features).
        hessian: fp32 (in_features, in_features), symmetric.
        damping: to be added to its diagonal.
        quantized: as it was solved.
        rounds: see :data:`ROUNDS`.

    Returns:
        The matrix with other scales and codes, and the loss of each row, (out_features,).
    """
    hessian = hessian + damping * torch.eye(len(hessian), device=hessian.device)
    quantized, slopes = refit_scales(hessian, quantized, slopes_of(weight, hessian, quantized))
    for _ in range(rounds):
        quantized, slopes = improve(hessian, quantized, slopes)
    return quantized, row_losses(weight, quantized, slopes)


def improve(hessian: Tensor, quantized: QuantWeight, slopes: Tensor) -> tuple[QuantWeight, Tensor]:
    """Let the codes descend, and refit the scales.

    Args:
        hessian: fp32 (in_features, in_features), damped: no diagonal entry is 0.
        quantized: where to begin.
        slopes: see :func:`slopes_of`; they tell all that has to be known of the target.

    Returns:
        The matrix with other codes and scales, and its slopes.
    """
    codes, slopes = descend(hessian, quantized, slopes)
    return refit_scales(hessian, replace(quantized, codes=codes), slopes)


def slopes_of(weight: Tensor, hessian: Tensor, quantized: QuantWeight) -> Tensor:
    """``R = (W^ - W) H``, fp32 (out_features, in_features): half the gradient of the loss by the weights."""
    return (quantized.dequantize() - weight) @ hessian


def row_losses(weight: Tensor, quantized: QuantWeight, slopes: Tensor) -> Tensor:
    """``(w^ - w) H (w^ - w)'`` of each row, (out_features,)."""
    return ((quantized.dequantize() - weight) * slopes).sum(1).clamp_min_(0)


def refit_scales(hessian: Tensor, quantized: QuantWeight, slopes: Tensor) -> tuple[QuantWeight, Tensor]:
    """The least-squares scales of given codes; a row keeps its own where rounding to fp16 makes them worse.

    What is solved for is how far the scales are to move, ``(A' H A) d = -A' R``: of 8 bits the loss is a millionth of
    the output's square, and would drown in the rounding of a difference of two of these.

    Args:
        hessian: fp32 (in_features, in_features), damped.
        quantized: codes, and scales whose signs stay.
        slopes: see :func:`slopes_of`.

    Returns:
        The same codes with their scales, and the slopes that these leave.
    """
    fitted, change = least_squares(hessian, quantized, slopes)
    scales = torch.where((change < 0).unsqueeze(1), fitted, quantized.scales.float())
    refitted = replace(quantized, scales=scales.to(quantized.scales.dtype))
    return refitted, slopes.addmm(refitted.dequantize() - quantized.dequantize(), hessian)


def least_squares(hessian: Tensor, quantized: QuantWeight, slopes: Tensor) -> tuple[Tensor, Tensor]:
    """What :func:`refit_scales` weighs: scales as they can be stored, fp32 (out_features, groups), and by how much they
    change the loss of each row, fp32 (out_features,).
    """
    scales = quantized.scales.float()
    rows, groups = scales.shape
    steps = (quantized.codes.view(rows, groups, -1) - quantized.zeros.unsqueeze(2).to(slopes.dtype)).flatten(1)
    found = [
        _least_squares(hessian, steps[part], scales[part], slopes[part])
        for part in _slices(rows, REFIT_BYTES // (8 * groups**2))
    ]
    if not found:
        return scales, scales.new_zeros(rows)
    return torch.cat([each for each, _ in found]), torch.cat([each for _, each in found])


def _least_squares(hessian: Tensor, steps: Tensor, scales: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
    by_group = steps.view(*scales.shape, -1)
    right = -(slopes.view_as(by_group) * by_group).sum(2).double()
    system = torch.empty(*scales.shape, scales.shape[1], dtype=torch.float64, device=scales.device)
    for group, columns in enumerate(_slices(len(hessian), by_group.shape[2])):
        system[:, group] = ((by_group[:, group] @ hessian[columns]).view_as(by_group) * by_group).sum(2)
    diagonal = system.diagonal(dim1=1, dim2=2)
    unused = diagonal == 0  # a group whose codes are all its zero: any scale does
    diagonal[unused], right[unused] = 1.0, 0.0
    diagonal *= 1 + 1e-9  # groups of a few codes may be multiples of each other
    fitted = scales + torch.linalg.solve(system, right.unsqueeze(2)).squeeze(2).float()
    fitted = round_scale(torch.where((fitted * scales > 0) & (fitted.abs() < LARGEST_SCALE), fitted, scales))
    moved = (fitted - scales).double().unsqueeze(2)
    change = (moved * (system @ moved - 2 * right.unsqueeze(2))).sum((1, 2))
    return fitted, change.float()


def _slices(count: int, size: int) -> list[slice]:
    size = max(1, size)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def descend(hessian: Tensor, quantized: QuantWeight, slopes: Tensor) -> tuple[Tensor, Tensor]:
    """Choose each code once more, column by column.

    Args:
        hessian: fp32 (in_features, in_features), damped: no diagonal entry is 0.
        quantized: where to begin.
        slopes: see :func:`slopes_of`.

    Returns:
        The codes, uint8 (out_features, in_features), and the slopes that they end in, see :func:`slopes_of`.
    """
    columns = len(hessian)
    groups = torch.arange(columns, device=hessian.device) // quantized.spec.columns_per_group(columns)
    slopes = slopes.T.clone(memory_format=torch.contiguous_format)  # transposed, so that columns are contiguous
    current = quantized.dequantize().T.contiguous()
    codes = torch.empty_like(current, dtype=torch.uint8)
    scales, zeros = quantized.scales.float().T.contiguous(), quantized.zeros.float().T.contiguous()
    for block in _slices(columns, BLOCK_SIZE):
        inverse = 1 / hessian.diagonal()[block]
        codes[block], change = solve_columns(
            current[block] - slopes[block] * inverse.unsqueeze(1),
            current[block],
            hessian[block, block] * inverse,
            scales,
            zeros,
            groups[block],
            quantized.spec.max_code,
        )
        slopes.addmm_(hessian[:, block], change)
    return codes.T.contiguous(), slopes.T
