"""Shape the error of a matrix by what it does to the predictions: rows make up for each other, not only columns.

GPTQ solves every row for itself: it makes ``tr(E H E')`` small, E = W^ - W, as if all directions of the output mattered
alike. Moving an output by d moves the predictions by a KL of ``d' F d / 2``; with G the mean of F over the tokens
(:mod:`bittern.quantize.guide`), and inputs and gradients taken for independent, that is on average

    tr(G E H E') / 2

(Tseng et al. 2025, YAQA). With ``G = V S V'``, V unit upper triangular, it is the sum over rows i of

    S_i p_i H p_i',    p_i = e_i + sum_{k<i} V_ki e_k,

so a row is solved by GPTQ as it always is, for a target that takes over the errors of the rows before it. Afterwards
each row in turn is polished for the target that all others leave it, ``w_i - sum_{k != i} (G_ik / G_ii) e_k``.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bittern.quantize.gptq import Factor, factorize, sweep
from bittern.quantize.polish import ROUNDS as UNSHAPED
from bittern.quantize.polish import Damped, descend, refit_scales, row_losses, slopes_of
from bittern.weight import QuantWeight

DAMPING = 0.3
"""Of the curvature of each output: ten thousands of tokens tell only roughly how outputs go together."""

FLOOR = 0.03
"""Of the mean curvature, for outputs that hardly matter: they are not there to make up for all others."""

SWEPT, POLISHED = 16, 8
"""Rows are solved, and polished, in so many parts, one after the other; those of a part do not see each other's
changes."""

ROUNDS = 2
"""How often all rows are polished at most."""


def rounds_before(shaped: bool) -> int:
    """How often rows are polished for themselves: those that are to be shaped gain nothing by more than one round."""
    return 1 if shaped else UNSHAPED


class Shaper:
    """Shapes matrices that share an input.

    Args:
        hessian: of the input.
        factor: of it.
    """

    def __init__(self, hessian: Damped, factor: Factor) -> None:
        self._hessian, self._factor = hessian, factor

    def shape(self, weight: Tensor, curvature: Tensor, solved: QuantWeight) -> tuple[QuantWeight, float, Tensor]:
        """Solve one again, beginning with the scales that it has.

        Args:
            weight: what the matrix should be, fp32 (out_features, in_features).
            curvature: G up to a factor, fp32 (out_features, out_features), symmetric.
            solved: row by row.

        Returns:
            The matrix with other codes and scales; ``tr(G E H E')`` as a share of what it was; and the loss ``E H E'``
            of each row, fp32 (out_features,). Where the share is not below 1, ``solved`` is what comes back.
        """
        outputs = damped(curvature)
        factor = factorize(outputs, 1e-6)
        order, back = factor.order, factor.order.argsort()  # of the rows, here and in all below
        weight, outputs, given = weight[order], outputs[order][:, order], solved.rows(order)
        best = given, slopes_of(weight, self._hessian.whole, given)
        before = least = _divergence(weight, outputs, *best)
        swept = self._sweep(weight, factor.upper, given)
        found = swept, slopes_of(weight, self._hessian.whole, swept)
        if not _divergence(weight, outputs, *found) < 2 * before:
            found = best  # where outputs go together closely, a sweep in parts may miss
        parts = _parts(len(weight), POLISHED)
        for _ in range(ROUNDS):
            polished, slopes, parts = self._polish(outputs, *found, parts)
            found = polished, slopes
            divergence = _divergence(weight, outputs, *found)
            if not divergence < least:
                break
            best, least = found, divergence
        share = least / before if before > 0 else 1.0
        return best[0].rows(back), share, row_losses(weight, *best)[back]

    def _sweep(self, weight: Tensor, upper: Tensor, given: QuantWeight) -> QuantWeight:
        """New codes on the given grid: each part takes over the errors of those before, by V."""
        errors, codes = torch.empty_like(weight), []
        for part in _parts(len(weight), SWEPT):
            wanted, own = weight[part] - upper[: part.start, part].T @ errors[: part.start], given.rows(part)
            chosen, _ = sweep(wanted, self._factor, own.scales.float(), own.zeros, own.spec)
            errors[part] = replace(own, codes=chosen).dequantize() - weight[part]
            codes.append(chosen)
        return replace(given, codes=torch.cat(codes))

    def _polish(
        self, outputs: Tensor, given: QuantWeight, slopes: Tensor, parts: list[slice]
    ) -> tuple[QuantWeight, Tensor, list[slice]]:
        """New codes and scales: each part for what the others, as they are by then, leave it.

        Of its target a part needs to know the slopes alone, ``G_i E H / G_ii``: from those of all rows no product with
        H is left but those of the polishing itself. A part that is worse for it, since its rows do not see each other's
        changes, is tried again in halves; one row cannot be worse.

        Returns:
            The matrix, its slopes, and the parts that it came to: what had to be halved would have to be again.
        """
        codes, scales, slopes = given.codes.clone(), given.scales.clone(), slopes.clone()
        waiting, done = parts[::-1], []
        while waiting:
            part = waiting.pop()
            own, pulled, together = given.rows(part), outputs[part] @ slopes, outputs[part, part]
            sizes = together.diagonal().unsqueeze(1)
            begun = pulled / sizes
            chosen, ended = descend(self._hessian, own, begun)
            moved, polished = ended - begun, replace(own, codes=chosen)
            better = _gains(polished, own, 2 * pulled + together @ moved)
            if better:
                begun = (pulled + together @ moved) / sizes  # by now, all that the rows do to each other with it
                polished, ended = refit_scales(self._hessian, polished, begun)
                moved += ended - begun
                better = _gains(polished, own, 2 * pulled + together @ moved)
            if better:
                codes[part], scales[part] = polished.codes, polished.scales
                slopes[part] += moved
            elif part.stop - part.start > 1:
                middle = (part.start + part.stop) // 2
                waiting += [slice(middle, part.stop), slice(part.start, middle)]
                continue
            done.append(part)
        return replace(given, codes=codes, scales=scales), slopes, done


def _divergence(weight: Tensor, outputs: Tensor, quantized: QuantWeight, slopes: Tensor) -> float:
    """``tr(G E H E')``."""
    return float(((outputs @ slopes) * (quantized.dequantize() - weight)).sum(dtype=torch.float64))


def _gains(found: QuantWeight, given: QuantWeight, slope: Tensor) -> bool:
    """Whether a step from one to the other, along which the slope is this on average, does not go up."""
    return float((slope * (found.dequantize() - given.dequantize())).sum(dtype=torch.float64)) <= 0


def damped(curvature: Tensor) -> Tensor:
    """A curvature that can be factorized, its diagonal 1 on average.

    Args:
        curvature: fp32 (out_features, out_features), symmetric, of any size, 0 too.
    """
    diagonal = curvature.diagonal()
    least = FLOOR * float(diagonal.mean()) or 1.0
    found = curvature + torch.diag(DAMPING * diagonal + least)
    return found.div_(found.diagonal().mean())


def _parts(rows: int, count: int) -> list[slice]:
    size = -(-rows // count)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
