"""Bring a solved matrix closer to what it should be: scales that fit its codes, and codes that fit these.

GPTQ decides on every column once, on scales that were there before; what it gave away is found again in two ways
that take turns, each of which makes the loss of a row ``(w^ - w) (H + lambda I) (w^ - w)'`` smaller or leaves it:

- least squares: with a_g the codes of group g less its zero, and 0 elsewhere, a row's best scales s solve
  ``(A' H A) s = A' H w``;
- coordinate descent: each code in turn becomes the best one for all others as they are,
  ``w^_j <- Q(w^_j - R_j / H_jj)`` with ``R = (W^ - W) H`` (Behdin et al. 2023, QuantEase).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bittern.quantize.columns import BLOCK_SIZE, solve_columns
from bittern.quantize.hessian import add_product
from bittern.runtime import native
from bittern.weight import LARGEST_SCALE, QuantWeight, round_scale

REFIT_BYTES = {"cpu": 1 << 23, "cuda": 1 << 28}
"""Rows whose scales are refitted together fill so much with their products; on a CPU these stay in its cache."""

LEAST_ROWS = 64
"""That are refitted together, however wide they are."""

ROUNDS = 4
"""How often codes descend and scales are refitted; three times as many bring nothing more (docs/log.md)."""


@dataclass(frozen=True)
class Damped:
    """A Hessian with damping.

    Attributes:
        whole: H + lambda I, fp32 (in_features, in_features), symmetric; no diagonal entry is 0.
        factor: what products are made with: the same, or in bfloat16, which rounds what they give to it.
    """

    whole: Tensor
    factor: Tensor


def damp(hessian: Tensor, damping: float, rough: bool = False) -> Damped:
    """Add damping to the diagonal of a Hessian, fp32 (in_features, in_features); ``rough``: products in bfloat16."""
    whole = hessian + damping * torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    return Damped(whole, whole.bfloat16() if rough else whole)


def polish(weight: Tensor, hessian: Damped, quantized: QuantWeight, rounds: int = ROUNDS) -> tuple[QuantWeight, Tensor]:
    """Refit the scales; then let the codes descend and refit the scales again, a few times.

    Args:
        weight: what the matrix should be, fp32 (out_features, in_features).
        hessian: of the inputs.
        quantized: as it was solved.
        rounds: see :data:`ROUNDS`.

    Returns:
        The matrix with other scales and codes, and the loss of each row, (out_features,).
    """
    quantized, slopes = refit_scales(hessian, quantized, slopes_of(weight, hessian.whole, quantized))
    for _ in range(rounds):
        quantized, slopes = improve(hessian, quantized, slopes)
    return quantized, row_losses(weight, quantized, slopes)


def improve(hessian: Damped, quantized: QuantWeight, slopes: Tensor) -> tuple[QuantWeight, Tensor]:
    """Let the codes descend, and refit the scales.

    Args:
        hessian: of the inputs.
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


def refit_scales(hessian: Damped, quantized: QuantWeight, slopes: Tensor) -> tuple[QuantWeight, Tensor]:
    """The least-squares scales of given codes; a row keeps its own where rounding to fp16 makes them worse.

    What is solved for is how far the scales are to move, ``(A' H A) d = -A' R``: of 8 bits the loss is a millionth of
    the output's square, and would drown in the rounding of a difference of two of these.

    Args:
        hessian: of the inputs.
        quantized: codes, and scales whose signs stay.
        slopes: see :func:`slopes_of`.

    Returns:
        The same codes with their scales, and the slopes that these leave.
    """
    rows, groups = quantized.scales.shape
    at_once = REFIT_BYTES.get(slopes.device.type, 1 << 26) // (4 * groups * slopes.shape[1])
    found = [_refit(hessian, quantized.rows(part), slopes[part]) for part in _slices(rows, max(LEAST_ROWS, at_once))]
    if not found:
        return quantized, slopes
    scales = torch.cat([each for each, _ in found]).to(quantized.scales.dtype)
    return replace(quantized, scales=scales), torch.cat([each for _, each in found])


def _refit(hessian: Damped, quantized: QuantWeight, slopes: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`refit_scales` of some rows: their scales, fp32, and slopes."""
    scales = quantized.scales.float()
    rows, groups = scales.shape
    steps = quantized.codes.view(rows, groups, -1) - quantized.zeros.unsqueeze(2).to(slopes.dtype)
    factor = hessian.factor.view(groups, -1, slopes.shape[1])
    pulls = torch.bmm(steps.transpose(0, 1).to(factor.dtype), factor)  # a_g H of every group
    system = _products_of_groups(pulls, steps).double()
    right = -(slopes.view_as(steps) * steps).sum(2).double()
    diagonal = system.diagonal(dim1=1, dim2=2)
    unused = diagonal == 0  # a group whose codes are all its zero: any scale does
    diagonal[unused], right[unused] = 1.0, 0.0
    diagonal *= 1 + 1e-9  # groups of a few codes may be multiples of each other
    fitted = scales + torch.linalg.solve(system, right.unsqueeze(2)).squeeze(2).float()
    fitted = round_scale(torch.where((fitted * scales > 0) & (fitted.abs() < LARGEST_SCALE), fitted, scales))
    moved = (fitted - scales).double().unsqueeze(2)
    change = (moved * (system @ moved - 2 * right.unsqueeze(2))).sum((1, 2))
    fitted = torch.where((change < 0).unsqueeze(1), fitted, scales)
    moved = (fitted - scales).to(factor.dtype).unsqueeze(1)
    return fitted, torch.bmm(moved, pulls.transpose(0, 1)).squeeze(1).to(slopes.dtype).add_(slopes)


def _products_of_groups(pulls: Tensor, steps: Tensor) -> Tensor:
    """``A' H A`` of every row, fp32 (rows, groups, groups) and symmetric, also where ``a_g H`` was rounded.

    Args:
        pulls: ``a_g H``, (groups, rows, columns).
        steps: the codes less their zeros, fp32 (rows, groups, columns of a group).
    """
    if pulls.device.type == "cpu" and native.available():
        return native.multiply_groups(pulls, steps.flatten(1))
    products = (pulls.to(steps.dtype).view(-1, *steps.shape) * steps).sum(3).transpose(0, 1)
    return products.triu() + products.triu(1).mT


def _slices(count: int, size: int) -> list[slice]:
    size = max(1, size)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def descend(hessian: Damped, quantized: QuantWeight, slopes: Tensor) -> tuple[Tensor, Tensor]:
    """Choose each code once more, column by column.

    On a CPU by a kernel that moves the slopes where a code changes alone, of a solved matrix one in thirty; else by
    products, as if all did.

    Args:
        hessian: of the inputs.
        quantized: where to begin.
        slopes: see :func:`slopes_of`.

    Returns:
        The codes, uint8 (out_features, in_features), and the slopes that they end in, see :func:`slopes_of`.
    """
    if slopes.device.type == "cpu" and native.available():
        codes, slopes = quantized.codes.clone(), slopes.clone(memory_format=torch.contiguous_format)
        grid = quantized.scales.float().contiguous(), quantized.zeros.float().contiguous()
        native.descend(hessian.whole, *grid, codes, slopes, quantized.spec.max_code)
        return codes, slopes
    whole, columns = hessian.whole, len(hessian.whole)
    groups = torch.arange(columns, device=whole.device) // quantized.spec.columns_per_group(columns)
    slopes = slopes.T.clone(memory_format=torch.contiguous_format)  # transposed, so that columns are contiguous
    current = quantized.dequantize().T.contiguous()
    codes = torch.empty_like(current, dtype=torch.uint8)
    scales, zeros = quantized.scales.float().T.contiguous(), quantized.zeros.float().T.contiguous()
    for block in _slices(columns, BLOCK_SIZE):
        inverse = 1 / whole.diagonal()[block]
        codes[block], change = solve_columns(
            current[block] - slopes[block] * inverse.unsqueeze(1),
            current[block],
            whole[block, block] * inverse,
            scales,
            zeros,
            groups[block],
            quantized.spec.max_code,
        )
        add_product(slopes, hessian.factor[block], change, hessian.factor.dtype == torch.bfloat16)
    return codes.T.contiguous(), slopes.T
