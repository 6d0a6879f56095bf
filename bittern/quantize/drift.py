"""Let each matrix make up for what quantizing the matrices before it has done.

A layer that gets x~ in the place of x should still give W x (Arai & Ichikawa 2025, QEP; Zhang et al. 2025, Qronos; Li
et al. 2025, GPTAQ). And one whose output is added to a residual stream, which by then is h~ in the place of h, should
see to it that their sum is what it was: what a block has missed stays in the stream, unless the next one brings it
(Lin & Wan 2025, LoaQ). The least-squares answer to both is

    W* = W + alpha (W E[(x - x~) x~'] + E[(h - h~) x~']) (E[x~ x~'] + lambda)^-1,

solved in the place of W. How much of it holds on tokens that it was not made from is measured on windows that are kept
for that: alpha.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bittern.processes import add_up
from bittern.quantize.hessian import add_product

DAMPING = 0.3
"""Of the mean diagonal of the second moment: much more than the solver's, for what the calibration text hardly shows
is not to be changed by what it shows of it."""


HELD_OUT = 2
"""Windows that alpha is measured on, where there are four times as many; a fourth of them where there are fewer."""


def learned_from(exact: int) -> int:
    """How many of the first ``exact`` windows the correction is learned from; the others are held out."""
    return exact - min(HELD_OUT, max(1, exact // 4)) if exact > 1 else exact


class Drift:
    """Moments of how far a quantized path has moved a layer's input, and the stream that its output is added to.

    Under torchrun each process adds its own batches, and all get the correction that all of them give.

    Args:
        exact: the input in full precision, (batch, positions, in_features), per batch.
            Taken out of the list one by one, for they are large.
        learned: the first so many batches are learned from, the others are held out.
        rough: see :class:`bittern.quantize.hessian.Accumulator`.
        stream: where one matrix reads the input and its output is added to a stream: that matrix, W, fp32
            (out_features, in_features), and h - h~, (batch, positions, out_features), per batch, taken out likewise.
    """

    def __init__(
        self, exact: list[Tensor], learned: int, rough: bool = False, stream: tuple[Tensor, list[Tensor]] | None = None
    ) -> None:
        features = exact[0].shape[-1]
        self._exact, self._learned, self._rough = exact, learned, rough
        self._dtype = torch.bfloat16 if rough else torch.float32
        self._stream = None if stream is None else (stream[0].T.to(self._dtype), stream[1])
        rows = features if stream is None else len(stream[0])
        # The sum of (x - x~) x~' or, where that is all that is asked for, of (W (x - x~) + h - h~) x~'.
        self._total = torch.zeros(rows, features, dtype=torch.float32, device=exact[0].device)
        self._tokens = 0
        self._held: list[tuple[Tensor, Tensor]] = []
        # x - x~, for one batch after the other: a new tensor for each would have its pages cleared.
        self._moved = torch.empty(0, dtype=torch.float32, device=exact[0].device)

    def add(self, x: Tensor, root: Tensor | None = None) -> None:
        """Add a batch of the quantized path, in the order of the exact ones; batches after those count nothing.

        What is held out is kept as it is, and must not change.

        Args:
            x: (batch, positions, in_features).
            root: of what each token counts, (batch, positions, 1).
        """
        if not self._exact:
            return
        x = x.float()
        if self._moved.shape != x.shape:
            self._moved = torch.empty_like(x)
        moved = self._moved.copy_(self._exact.pop(0)).sub_(x)
        if self._stream is None:
            missed = moved if self._learned else moved.clone()
        else:
            weight, behind = self._stream
            missed = (moved.to(self._dtype) @ weight).float().add_(behind.pop(0))
        if root is not None:
            missed, x = missed.mul_(root), x * root
        missed, x = missed.flatten(0, -2).to(self._dtype), x.flatten(0, -2).to(self._dtype)
        if not self._learned:
            self._held.append((missed, x))
            return
        self._learned -= 1
        self._tokens += len(x)
        add_product(self._total, missed, x, self._rough)

    def corrected(self, weights: Sequence[Tensor], hessian: Tensor) -> tuple[Tensor, list[float | None]]:
        """W* of matrices that read the input, stacked; W where there was nothing to learn from. To be asked for once.

        With it, for each, the share that is left of the squared error that the drift makes of its output, with the
        stream where it is added to one, in the windows that were held out; None where that is not known.

        Args:
            weights: fp32 (out_features, in_features) each; each has an alpha of its own.
            hessian: E[x~ x~'] over all processes, fp32 (in_features, in_features).
        """
        weight, sizes = torch.cat(list(weights)), [len(each) for each in weights]
        counts = torch.tensor([self._tokens, len(self._held)], device=weight.device)
        add_up(counts)
        tokens, held = counts.tolist()
        if not tokens or not held:
            return weight, [None] * len(sizes)
        add_up(self._total)
        damping = DAMPING * float(hessian.diagonal().mean()) or 1.0
        damped = hessian + damping * torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
        mean = self._total / tokens
        wanted = weight @ mean if self._stream is None else mean
        step = torch.linalg.solve(damped, wanted, left=False)
        agree, power, whole = torch.zeros(3, len(sizes), dtype=torch.float32, device=weight.device)
        exact, added = weight.T.to(self._dtype), step.T.to(self._dtype)
        for missed, x in self._held:
            wanted, given = (missed @ exact if self._stream is None else missed).float(), (x @ added).float()
            agree += torch.stack([part.sum() for part in torch.split(wanted * given, sizes, 1)])
            power += torch.stack([part.sum() for part in torch.split(given.square(), sizes, 1)])
            whole += torch.stack([part.sum() for part in torch.split(wanted.square(), sizes, 1)])
        add_up(agree, power, whole)
        alpha = (agree / power.clamp_min(1e-30)).clamp_(0, 1)
        each: Tensor = alpha.repeat_interleave(torch.tensor(sizes, device=alpha.device)).unsqueeze(1)
        corrected: Tensor = weight + each * step
        left = 1 + alpha * (alpha * power - 2 * agree) / whole
        return corrected, [share if math.isfinite(share) else None for share in left.clamp_min(0).tolist()]
