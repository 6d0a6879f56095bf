"""How much each token counts for a matrix: by what moving its output does to the model's predictions.

Moving a token's output z by d moves the distribution of the next tokens by a KL of ``d' F d / 2``, F = E[g g'], where g
is the gradient by z of -log p of tokens drawn from the model's own p. So the error of a token's output should count by
the size of its F (Kim et al. 2025, GuidedQuant, who weight groups of channels; here all outputs of a matrix together).

What is drawn are not tokens, which is mostly luck, but signs e: with ``g = sum_v e_v sqrt(p_v) (onehot_v - p)`` at the
logits, E[g g'] is the same. Sizes are heavy-tailed all the same, and moments that a few tokens decide do not hold on
other text: tokens count by the roots of their sizes (docs/log.md has the figures).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bittern import model as live
from bittern.checkpoint import Checkpoint
from bittern.errors import BitternError
from bittern.model import Matrix, Piece
from bittern.processes import add_up, number_of
from bittern.replay import capture, logits_after

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Sizes = dict[Matrix, list[Tensor]]
"""By matrix, per batch, fp32 (windows, positions): squared gradients, 1 on average over all windows."""


def find_sizes(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    sources: dict[str, tuple[Piece, ...]],
    matrices: Iterable[Matrix],
    batches: Sequence[Tensor],
    device: torch.device,
) -> Sizes:
    """One forward and one backward pass of the whole model over the calibration windows.

    Under torchrun every process brings its own windows; a window's draws are its own, in whichever process it is.

    Args:
        model: of :func:`bittern.model.build`, nothing in memory; it is loaded whole, and left as it was.
        checkpoint: where its weights are.
        sources: of :func:`bittern.model.weight_map`.
        matrices: those to look at; experts, which see other tokens each, are passed over.
        batches: ids, int64 (windows, positions) each.
        device: where to compute.

    Returns:
        Sizes of the matrices that every batch came through once, on the CPU.

    Raises:
        BitternError: for a gradient that is NaN or infinite.
    """
    live.load_tensors(model, checkpoint, sources, sources, device=device)
    model.tie_weights()
    live.move_buffers(model, device)
    found: Sizes = {matrix: [] for matrix in matrices if matrix.expert is None}
    handles = [
        model.get_submodule(matrix.module).register_forward_hook(_watch(sizes)) for matrix, sizes in found.items()
    ]
    try:
        _backward(model, batches, device)
    finally:
        for handle in handles:
            handle.remove()
    live.drop_tensors(model, sources)
    model.tie_weights()
    found = {matrix: sizes for matrix, sizes in found.items() if len(sizes) == len(batches)}
    for matrix, sizes in found.items():
        total = torch.tensor([sum(float(each.sum()) for each in sizes), sum(each.numel() for each in sizes)])
        add_up(total)
        mean = float(total[0] / total[1])
        if not 0 <= mean < float("inf"):
            raise BitternError(f"{matrix.label}: a gradient of its output is NaN or infinite")
        for each in sizes:
            each.div_(mean) if mean else each.fill_(1.0)
    return found


def _backward(model: PreTrainedModel, batches: Sequence[Tensor], device: torch.device) -> None:
    """Send a draw of every prediction back through all blocks."""
    blocks = live.blocks(model)[1]
    first = 0
    for batch in batches:
        ids = batch.to(device)
        hidden, calls = capture(model, blocks, ids)
        hidden = hidden.detach().clone().requires_grad_()
        state = hidden
        for block, call in zip(blocks, calls, strict=True):
            state = call.run(block, state)
        logits = logits_after(model, blocks, ids, state)
        torch.autograd.grad(logits, hidden, root_of_fisher(logits.detach(), first))
        first += len(ids)


def token_weights(sizes: Sizes, matrices: Sequence[Matrix]) -> list[Tensor] | None:
    """What each token counts for matrices that read one input, per batch (windows, positions); None where not known."""
    if not all(matrix in sizes for matrix in matrices):
        return None
    return [torch.stack(each).mean(0).sqrt_() for each in zip(*(sizes[matrix] for matrix in matrices), strict=True)]


def root_of_fisher(logits: Tensor, first: int) -> Tensor:
    """A random g at the logits with E[g g'] = diag(p) - p p' at every position, and 0 between positions.

    Args:
        logits: (windows, positions, vocabulary).
        first: how many windows this process has had before these.
    """
    gradient = logits.float().softmax(-1)
    for window, p in enumerate(gradient):
        draws = torch.Generator().manual_seed(number_of(first + window))
        signs = [torch.randint(0, 2, (count,), generator=draws).mul_(2).sub_(1).to(p) for count in p.shape]
        drawn = p.sqrt().mul_(signs[1]).mul_(signs[0].unsqueeze(1))
        p.mul_(-drawn.sum(1, keepdim=True)).add_(drawn)
    return gradient.to(logits.dtype)


def _watch(sizes: list[Tensor]) -> Callable[..., None]:
    def hook(_: nn.Module, __: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: sizes.append(gradient.float().square().sum(-1).cpu()))  # type: ignore[no-untyped-call]

    return hook
