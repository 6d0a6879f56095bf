"""Shape the error of a matrix by what it does to the predictions: rows make up for each other, not only columns.

GPTQ solves every row for itself: it makes ``tr(E H E')`` small, E = W^ - W, as if all directions of the output mattered
alike. Moving an output by d moves the predictions by a KL of ``d' F d / 2``; with G the mean of F over the tokens
(:mod:`bittern.quantize.guide`), and inputs and gradients taken for independent, that is on average

    tr(G E H E') / 2

(Tseng et al. 2025, YAQA). With ``G = V S V'`` and ``H = U D U'``, V and U unit upper triangular, it is
``sum_ij S_i D_j (V' E U)_ij^2``: the sweep of GPTQ in two directions, where each weight takes over the errors of all
those before it in its row, and of all rows before. Then scales and codes are fitted to each other, as in
:mod:`bittern.quantize.polish`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bittern.quantize.gptq import Factor, factorize
from bittern.quantize.polish import least_squares
from bittern.weight import QuantWeight

DAMPING = 0.3
"""Of the curvature of each output: ten thousands of tokens tell only roughly how outputs go together."""

PARTS = 16
"""Rows are rounded in so many parts, one after the other; those of a part do not see each other's rounding."""

BLOCK_SIZE = 64
"""Columns between two matrix products; it changes the speed, not the result."""

ROUNDS = 2
"""How often scales and codes take turns."""


class Shaper:
    """Shapes matrices that share an input.

    Args:
        hessian: of the input, fp32 (in_features, in_features), symmetric.
        factor: of it.
    """

    def __init__(self, hessian: Tensor, factor: Factor) -> None:
        self._factor = factor
        self._hessian = hessian + factor.damping * torch.eye(len(hessian), device=hessian.device)

    def shape(self, weight: Tensor, curvature: Tensor, solved: QuantWeight) -> tuple[QuantWeight, float, Tensor]:
        """Solve one again, on the scales that it has.

        Args:
            weight: what the matrix should be, fp32 (out_features, in_features).
            curvature: G up to a factor, fp32 (out_features, out_features), symmetric.
            solved: row by row.

        Returns:
            The matrix with other codes and scales; ``tr(G E H E')`` as a share of what it was; and the loss ``E H E'``
            of each row, fp32 (out_features,). Where the share is not below 1, ``solved`` is what comes back.
        """
        problem = _Problem(weight, self._hessian, self._factor, damped(curvature))
        before = problem.loss(solved)
        found = problem.sweep(solved)
        for _ in range(ROUNDS):
            found = problem.descend(problem.refit(found))
        found = problem.refit(found)
        share = problem.loss(found) / before if before > 0 else 1.0
        if not share < 1:
            found, share = solved, 1.0
        error = found.dequantize() - weight
        return found, share, ((error @ self._hessian) * error).sum(1).clamp_min_(0)


def damped(curvature: Tensor) -> Tensor:
    """A curvature that can be factorized, its diagonal 1 on average.

    Args:
        curvature: fp32 (out_features, out_features), symmetric, of any size, 0 too.
    """
    diagonal = curvature.diagonal()
    least = 1e-6 * float(diagonal.mean()) or 1.0  # outputs that do not matter may be anything
    found = curvature + torch.diag(DAMPING * diagonal + least)
    return found.div_(found.diagonal().mean())


class _Problem:
    """Make ``tr(G E H E')`` small.

    Columns are contiguous, so everything is transposed, with the rows in the order in which they are rounded. A part of
    a column takes a handful of tiny operations: to call them is most of what they cost.

    Args:
        weight: fp32 (out_features, in_features).
        hessian: fp32 (in_features, in_features), damped.
        factor: of it.
        curvature: fp32 (out_features, out_features), damped.
    """

    def __init__(self, weight: Tensor, hessian: Tensor, factor: Factor, curvature: Tensor) -> None:
        self.weight, self.hessian, self.factor, self.curvature = weight, hessian, factor, curvature
        outputs = factorize(curvature, 1e-6)
        self.rows, self.across = outputs.order, outputs.upper
        self.size = -(-len(weight) // PARTS)  # of a part

    def loss(self, quantized: QuantWeight) -> float:
        error = quantized.dequantize() - self.weight
        return float(((self.curvature @ error) * (error @ self.hessian)).sum(dtype=torch.float64))

    def sweep(self, quantized: QuantWeight) -> QuantWeight:
        """New codes: column by column, and in each part by part of the rows."""
        upper, columns = self.factor.upper, self.factor.order
        minus = -self.weight[self.rows].T[columns]
        grid = _Grid(quantized, self.rows, self.size)
        groups = quantized.group_index()[columns].tolist()
        strips = [
            strip[: n * self.size].T.contiguous() for n, strip in enumerate(torch.split(self.across, self.size, 1))
        ]
        turned = self.across.T.contiguous()
        steps, passed = torch.empty_like(minus), torch.empty_like(minus)  # passed: E'V, what later columns take over
        error = minus.new_empty(len(self.rows))
        made = torch.split(error, self.size)
        before = [error[: n * self.size] for n in range(len(made))]
        for block in _slices(len(minus)):
            inside = upper[block, block].T.contiguous()
            targets = torch.addmm(minus[block], upper[: block.start, block].T, passed[: block.start]).neg_()
            for j, column in enumerate(range(block.start, block.stop)):
                target = torch.addmv(targets[j], passed[block.start : column].T, inside[j, :j], alpha=-1)
                own, step = torch.split(minus[column], self.size), torch.split(steps[column], self.size)
                scales, lowest, highest = grid.parts[groups[column]]
                for n, wanted in enumerate(torch.split(target, self.size)):
                    if n:
                        wanted = torch.addmv(wanted, strips[n], before[n], alpha=-1)
                    torch.clamp(wanted.div(scales[n]).round_(), lowest[n], highest[n], out=step[n])
                    torch.addcmul(own[n], step[n], scales[n], out=made[n])
                torch.mv(turned, error, out=passed[column])
        return grid.with_steps(steps[columns.argsort()])

    def descend(self, quantized: QuantWeight) -> QuantWeight:
        """New codes: each column once more, part by part of its rows, best for all others as they are."""
        current = quantized.dequantize()[self.rows].T.contiguous()
        slopes = self.hessian @ (current - self.weight[self.rows].T)
        grid = _Grid(quantized, self.rows, self.size)
        groups = quantized.group_index().tolist()
        curvature = self.curvature[self.rows][:, self.rows]
        strips, inverse = torch.split(curvature, self.size), torch.split(curvature.diagonal().reciprocal(), self.size)
        diagonal = self.hessian.diagonal().tolist()
        steps = torch.empty_like(current)
        for block in _slices(len(current)):
            before, inside = current[block].clone(), self.hessian[block, block]
            for j, column in enumerate(range(block.start, block.stop)):
                slope = slopes[column] + inside[j, :j] @ (current[block.start : column] - before[:j])
                value, step = torch.split(current[column], self.size), torch.split(steps[column], self.size)
                scales, lowest, highest = grid.parts[groups[column]]
                for n, own in enumerate(torch.split(slope, self.size)):
                    wanted = torch.addcmul(value[n], strips[n] @ slope, inverse[n], value=-1 / diagonal[column])
                    torch.clamp(wanted.div_(scales[n]).round_(), lowest[n], highest[n], out=step[n])
                    found = step[n] * scales[n]
                    own.add_(found - value[n], alpha=diagonal[column])
                    value[n].copy_(found)
            slopes.addmm_(self.hessian[:, block], current[block] - before)
        return grid.with_steps(steps)

    def refit(self, quantized: QuantWeight) -> QuantWeight:
        """New scales: towards those that each row would have for itself, as far as all rows gain by it."""
        given = quantized.dequantize()
        slopes = self.curvature @ ((given - self.weight) @ self.hessian)
        fitted, _ = least_squares(self.hessian, quantized, slopes / self.curvature.diagonal().unsqueeze(1))
        change = replace(quantized, scales=fitted).dequantize() - given
        bend = float(((self.curvature @ change) * (change @ self.hessian)).sum(dtype=torch.float64))
        if not bend > 0:
            return quantized
        length = min(1.0, max(0.0, -float((slopes * change).sum(dtype=torch.float64)) / bend))
        scales = torch.lerp(quantized.scales.float(), fitted, length).to(quantized.scales.dtype)
        moved = replace(quantized, scales=scales)
        return moved if self.loss(moved) < self.loss(quantized) else quantized


class _Grid:
    """The grid of a matrix whose rows come in another order, and in parts.

    Args:
        quantized: whose scales and zeros.
        rows: the order.
        size: rows in a part.

    Attributes:
        parts: for each group, the parts of its scales, and of the lowest and the highest steps from its zeros.
    """

    def __init__(self, quantized: QuantWeight, rows: Tensor, size: int) -> None:
        self._quantized, self._rows = quantized, rows
        scales = quantized.scales[rows].float().T.contiguous()
        lowest = -quantized.zeros[rows].float().T.contiguous()
        ends = (scales, lowest, lowest + quantized.spec.max_code)
        self.parts = [tuple(torch.split(each, size) for each in group) for group in zip(*ends, strict=True)]

    def with_steps(self, steps: Tensor) -> QuantWeight:
        """The matrix whose codes are so many steps, fp32 (in_features, rows in their order), from its zeros."""
        ordered = torch.empty_like(steps.T)
        ordered[self._rows] = steps.T
        codes = ordered + self._quantized.zeros[:, self._quantized.group_index()]
        return replace(self._quantized, codes=codes.to(torch.uint8))


def _slices(count: int) -> list[slice]:
    return [slice(start, min(start + BLOCK_SIZE, count)) for start in range(0, count, BLOCK_SIZE)]
