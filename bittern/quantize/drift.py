"""Let each matrix make up for what quantizing the matrices before it has done to its input.

A layer that gets x~ in the place of x should still give W x. The least-squares answer is

    W* = W + alpha W E[(x - x~) x~'] (E[x~ x~'] + lambda)^-1,

solved in the place of W (Arai & Ichikawa 2025, QEP; Zhang et al. 2025, Qronos; Li et al. 2025, GPTAQ). How
much of it holds on tokens that it was not made from is measured on a batch that is kept for that: alpha.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DAMPING = 0.3
"""Of the mean diagonal of the second moment: much more than the solver's, for what the calibration text hardly shows
is not to be changed by what it shows of it."""


class Drift:
    """Moments of how far a quantized path has moved a layer's input.

    Args:
        exact: the input in full precision, (batch, positions, in_features), per batch; the last batch is held out.
            Taken out of the list one by one, for they are large.
    """

    def __init__(self, exact: list[Tensor]) -> None:
        features = exact[0].shape[-1]
        self._exact = exact
        self._total = torch.zeros(features, features, device=exact[0].device)
        self._tokens = 0
        self._held: tuple[Tensor, Tensor] | None = None

    def add(self, x: Tensor) -> None:
        """Add a batch of the quantized path, in the order of the exact ones; batches after those count nothing."""
        if not self._exact:
            return
        x = x.flatten(0, -2)
        moved = self._exact.pop(0).flatten(0, -2) - x
        if self._exact:
            self._total.addmm_(moved.T, x)
            self._tokens += len(x)
        else:
            self._held = moved, x.clone()

    def corrected(self, weight: Tensor, hessian: Tensor, sizes: Sequence[int]) -> Tensor:
        """W* of stacked matrices; W where there was nothing to learn from.

        Args:
            weight: fp32 (out_features, in_features).
            hessian: E[x~ x~'], fp32 (in_features, in_features).
            sizes: the rows of each matrix: each has an alpha of its own.
        """
        if not self._tokens or self._held is None:
            return weight
        moved, x = self._held
        damping = DAMPING * float(hessian.diagonal().mean()) or 1.0
        damped = hessian + damping * torch.eye(len(hessian), device=hessian.device)
        step = torch.linalg.solve(damped, weight @ (self._total / self._tokens), left=False)
        wanted, given = moved @ weight.T, x @ step.T
        agree = torch.stack([part.sum() for part in torch.split(wanted * given, list(sizes), 1)])
        power = torch.stack([part.sum() for part in torch.split(given.square(), list(sizes), 1)])
        alpha = (agree / power.clamp_min(1e-30)).clamp_(0, 1)
        each: Tensor = alpha.repeat_interleave(torch.tensor(sizes, device=alpha.device)).unsqueeze(1)
        corrected: Tensor = weight + each * step
        return corrected
