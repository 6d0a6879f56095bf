"""Let each matrix make up for what quantizing the matrices before it has done to its input.

A layer that gets x~ in the place of x should still give W x. The least-squares answer is

    W* = W + alpha W E[(x - x~) x~'] (E[x~ x~'] + lambda)^-1,

solved in the place of W (Arai & Ichikawa 2025, QEP; Zhang et al. 2025, Qronos; Li et al. 2025, GPTAQ). How
much of it holds on tokens that it was not made from is measured on a batch that is kept for that: alpha.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bittern.quantize.gptq import Factor


class Drift:
    """Moments of how far a quantized path has moved a layer's input.

    Args:
        exact: the input in full precision per batch; the last batch is held out.
    """

    def __init__(self, exact: list[Tensor]) -> None:
        self._exact = [x.reshape(-1, x.shape[-1]) for x in exact]
        self._seen = 0
        self._total = torch.zeros(exact[0].shape[-1], exact[0].shape[-1], device=exact[0].device)
        self._tokens = 0
        self._held: tuple[Tensor, Tensor] | None = None

    def add(self, x: Tensor) -> None:
        """Add a batch of the quantized path, in the order of the exact ones; later batches have none."""
        if self._seen == len(self._exact):
            return
        exact, x = self._exact[self._seen], x.reshape(-1, x.shape[-1])
        self._exact[self._seen] = exact[:0]
        self._seen += 1
        if self._seen == len(self._exact):
            self._held = (exact - x, x.clone())
        else:
            self._total.addmm_((exact - x).T, x)
            self._tokens += len(x)

    def corrected(self, weight: Tensor, factor: Factor, sizes: list[int]) -> Tensor:
        """W* of stacked matrices.

        Args:
            weight: (out_features, in_features).
            factor: of E[x~ x~'].
            sizes: the rows of each matrix: each has an alpha of its own.
        """
        if not self._tokens or self._held is None:
            return weight
        moved, x = self._held
        step = factor.solve(weight @ (self._total / self._tokens))
        wanted, given = moved @ weight.T, x @ step.T
        start = 0
        parts = []
        for size in sizes:
            rows = slice(start, start + size)
            start = rows.stop
            alpha = ((wanted[:, rows] * given[:, rows]).sum() / given[:, rows].square().sum().clamp_min(1e-30)).clamp(0, 1)
            parts.append(weight[rows] + alpha * step[rows])
        return torch.cat(parts)
