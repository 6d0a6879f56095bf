"""GPTQ as an LDL' sweep: each column takes over the rounding errors of the columns before it.

Sources: Frantar et al. 2022 (GPTQ); Chee et al. 2023 (QuIP), whose LDLQ form is the same rounding.
With ``H + lambda I = U D U'``, U unit upper triangular, and columns taken in order,

    v_j  = w_j - sum_{i<j} (w^_i - w_i) U_ij,    w^_j = Q(v_j),

and the layer loss ``tr((W^ - W) H (W^ - W)')`` is ``sum_j D_j |w^_j - v_j|^2``. One Cholesky
factorization of H replaces the usual Cholesky, inversion and second Cholesky.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bittern.errors import BitternError
from bittern.quantize.columns import BLOCK_SIZE, solve_columns
from bittern.quantize.grid import search_grid
from bittern.weight import QuantSpec, QuantWeight


@dataclass(frozen=True)
class Factor:
    """``H[order][:, order] + damping I = U D U'``.

    Attributes:
        order: int64 (in_features,), columns by falling activity: the most active are solved while
            the most columns are left to take over their error.
        upper: U, unit upper triangular (in_features, in_features).
        pivots: D (in_features,).
        diagonal: of H with damping, in the original order (in_features,); not negative.
        damping: what was added to the diagonal.
        fallback: what had to be done beyond a plain fp32 Cholesky; None if nothing.
    """

    order: Tensor
    upper: Tensor
    pivots: Tensor
    diagonal: Tensor
    damping: float
    fallback: str | None


@dataclass(frozen=True)
class Solution:
    """A quantized matrix and how far it is from the original on the calibration inputs.

    Attributes:
        weight: the result.
        loss: (out_features,), damped squared output error of each row.
        norm: (out_features,), damped squared output of each row; ``loss / norm`` is relative.
    """

    weight: QuantWeight
    loss: Tensor
    norm: Tensor


def factorize(hessian: Tensor, damp_percent: float = 0.01, act_order: bool = True) -> Factor:
    """Order and factorize a Hessian.

    Args:
        hessian: fp32 or fp64 (in_features, in_features), symmetric, the mean of x x'.
        damp_percent: damping as a share of the mean of the diagonal.
        act_order: whether to reorder columns at all.

    Raises:
        BitternError: for NaN or infinite entries.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise BitternError("hessian: holds NaN or infinite entries")
    diagonal = hessian.diagonal().clone()
    # All inputs zero: any positive damping turns the sweep into round-to-nearest.
    damping = damp_percent * float(diagonal.clamp_min(0).mean()) or 1.0
    columns = torch.arange(len(diagonal), device=hessian.device)
    order = diagonal.argsort(descending=True, stable=True) if act_order else columns
    damped = hessian[order][:, order]
    damped.diagonal().add_(damping)
    root, fallback = _upper_root(damped, damping)
    pivots = root.diagonal().clone()
    return Factor(order, root / pivots, pivots.square(), diagonal.clamp_min(0) + damping, damping, fallback)


def _upper_root(matrix: Tensor, floor: float) -> tuple[Tensor, str | None]:
    """Upper triangular R with ``R R' = matrix``, and what it took."""
    lower, info = torch.linalg.cholesky_ex(matrix.flip(0, 1))
    if int(info) == 0:
        return lower.flip(0, 1), None
    wide = matrix.double()
    lower, info = torch.linalg.cholesky_ex(wide.flip(0, 1))
    if int(info) == 0:
        return lower.flip(0, 1).to(matrix.dtype), "factorized in fp64"
    values, vectors = torch.linalg.eigh(wide)
    raised = int((values < floor).sum())
    wide = (vectors * values.clamp_min(floor)) @ vectors.T
    lower = torch.linalg.cholesky((wide + wide.T).flip(0, 1) / 2)
    return lower.flip(0, 1).to(matrix.dtype), f"{raised} eigenvalues raised to the damping"


def gptq(
    weight: Tensor,
    factor: Factor,
    spec: QuantSpec,
    block_size: int = BLOCK_SIZE,
    grid: tuple[Tensor, Tensor] | None = None,
) -> Solution:
    """Quantize a matrix for the inputs that a factor describes.

    Args:
        weight: (out_features, in_features); its rows are solved independently, so matrices that
            share their input may be stacked.
        factor: of the input's Hessian.
        spec: what the grid is like; ``group_size`` divides ``in_features``.
        block_size: see :data:`BLOCK_SIZE`.
        grid: scales and zeros; by default those that :func:`~bittern.quantize.grid.search_grid` finds.

    Returns:
        The result with columns and groups in their original order: nothing at run time pays for
        the order in which they were solved.
    """
    scales, zeros = search_grid(weight.float(), spec, factor.diagonal.float()) if grid is None else grid
    codes, loss = sweep(weight, factor, scales, zeros, spec, block_size)
    ordered = weight[:, factor.order]
    norm = ((ordered @ factor.upper).square() * factor.pivots).sum(1)
    return Solution(QuantWeight(codes, scales.half(), zeros, spec), loss, norm)


def sweep(
    weight: Tensor, factor: Factor, scales: Tensor, zeros: Tensor, spec: QuantSpec, block_size: int = BLOCK_SIZE
) -> tuple[Tensor, Tensor]:
    """The codes alone of :func:`gptq`, uint8 (out_features, in_features), and the loss of each row.

    Works on transposed, so contiguous, columns.
    """
    groups = factor.order // spec.columns_per_group(len(factor.order))
    originals = weight.T[factor.order].contiguous()
    steps_t, zeros_t = scales.T.to(weight.dtype).contiguous(), zeros.T.to(weight.dtype).contiguous()
    errors = torch.empty_like(originals)
    codes = torch.empty(originals.shape, dtype=torch.uint8, device=weight.device)
    loss = torch.zeros(weight.shape[0], dtype=weight.dtype, device=weight.device)
    for start in range(0, len(groups), block_size):
        block = slice(start, min(start + block_size, len(groups)))
        targets = originals[block] - factor.upper[:start, block].T @ errors[:start]
        codes[factor.order[block]], errors[block] = solve_columns(
            targets, originals[block], factor.upper[block, block], steps_t, zeros_t, groups[block], spec.max_code
        )
        missed = targets.sub_(originals[block]).sub_(errors[block])
        loss += factor.pivots[block] @ missed.square_()
    return codes.T.contiguous(), loss
