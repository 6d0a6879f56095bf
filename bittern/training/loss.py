"""The loss that trains a student back: its distance to the teacher, and to the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_HELD, _HELD_CPU = 1 << 23, 1 << 20
"""Log-probabilities that are held in fp32 at once; on a CPU so few that they stay in its cache."""


def distillation_loss(
    student: Tensor, teacher: Tensor, targets: Tensor, kl_weight: Tensor, offsets: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean over positions of ``kl_weight * KL(teacher || student) + (1 - kl_weight) * nll``.

    Args:
        student: logits, (positions, words): of the vocabulary, or of a shortlist.
        teacher: logits, the same shape and dtype. They are overwritten: the gradient is kept in their place, so that
            nothing of this size is allocated.
        targets: int64 (positions,), the next tokens, by their places among the words.
        kl_weight: fp32 (positions,), in [0, 1].
        offsets: fp32 (words,), added to both models' logits: see :class:`bittern.training.shortlist.Shortlist`.

    Returns:
        The loss, which can be differentiated by ``student``; the mean KL and the mean nll in nats.
    """
    loss, kl, nll = _Distillation.apply(student, teacher, targets, kl_weight, offsets)  # type: ignore[no-untyped-call]
    return loss, kl, nll


def hidden_error(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Squared distance of hidden states to the teacher's over their squared length, mean over positions and blocks.

    Every block is told what it should have given, at every position and in every dimension; logits say so of the last
    one only (Romero et al. 2015, FitNets, with a loss of each position's own scale: attention sinks are hundreds of
    times as long as other positions).

    Args:
        student, teacher: of each block, (windows, positions, hidden_size).

    Returns:
        fp32 scalar, which can be differentiated by ``student``.
    """
    errors = []
    for found, wanted in zip(student, teacher, strict=True):
        wanted = wanted.float()
        length = wanted.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
        errors.append(((found.float() - wanted).square().sum(-1) / length).mean())
    return torch.stack(errors).mean()


class _Distillation(torch.autograd.Function):
    """Both terms are cross-entropies with fixed targets: the gradient is softmax(student) minus a mixture of them."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, targets: Tensor, kl_weight: Tensor, offsets: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        count = len(targets)
        sums = torch.zeros(3, dtype=torch.float64, device=student.device)
        chunk = max(1, (_HELD_CPU if student.is_cpu else _HELD) // student.shape[1])
        offsets = student.new_zeros(1, dtype=torch.float32) if offsets is None else offsets
        for start in range(0, count, chunk):
            rows = slice(start, start + chunk)
            log_q = (student[rows] + offsets).log_softmax(1)  # in fp32, as they are
            log_p = (teacher[rows] + offsets).log_softmax(1)
            p, share = log_p.exp(), kl_weight[rows, None]
            picked = targets[rows, None]
            # words that the teacher masks with -inf count nothing; 0 * inf would be NaN
            kl = log_p.sub_(log_q).mul_(p).masked_fill_(p == 0, 0).sum(1, keepdim=True)
            nll = -log_q.gather(1, picked)
            sums += torch.cat([share * kl + (1 - share) * nll, kl, nll], 1).double().sum(0)
            gradient = log_q.exp_().sub_(p.mul_(share))
            gradient.scatter_add_(1, picked, share - 1)
            teacher[rows] = gradient.div_(count)
        ctx.gradient = teacher
        loss, mean_kl, mean_nll = (sums / count).float()
        ctx.mark_non_differentiable(mean_kl, mean_nll)
        return loss, mean_kl, mean_nll

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        return ctx.gradient.mul_(grads[0]), None, None, None, None
