"""What each token and each output counts for a matrix: by what moving the output does to the model's predictions.

Moving a token's output z by d moves the distribution of the next tokens by a KL of ``d' F d / 2``, F = E[g g'], where g
is the gradient by z of -log p of tokens drawn from the model's own p. So the error of a token's output should count by
the size of its F (Kim et al. 2025, GuidedQuant, who weight groups of channels; here all outputs of a matrix together),
and how outputs go together is told by the mean of g g' over the tokens (Tseng et al. 2025, YAQA).

What is drawn are not tokens, which is mostly luck, but signs e: with ``g = sum_v e_v sqrt(p_v) (onehot_v - p)`` at the
logits, E[g g'] is the same. Sizes are heavy-tailed all the same, and moments that a few tokens decide do not hold on
other text: tokens count by the roots of their sizes, in g g' too (docs/log.md has the figures).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bittern import model as live
from bittern.checkpoint import Checkpoint
from bittern.errors import BitternError
from bittern.model import Matrix, Piece
from bittern.processes import add_up, number_of
from bittern.quantize.hessian import Accumulator
from bittern.replay import capture, logits_after

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Guide:
    """What counts, by matrix.

    Attributes:
        sizes: on the CPU, fp32 (windows, positions): squared gradients of each token, 1 on average over all windows.
        curvatures: fp32 (out_features, out_features), E[g g'] with tokens that count by the roots of their sizes, up to
            a factor.
    """

    sizes: dict[Matrix, Tensor] = field(default_factory=dict)
    curvatures: dict[Matrix, Tensor] = field(default_factory=dict)


def find_guide(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    sources: dict[str, tuple[Piece, ...]],
    matrices: Iterable[Matrix],
    batches: Sequence[Tensor],
    device: torch.device,
    on_weighed: Callable[[int, int], None] | None = None,
) -> Guide:
    """One forward and one backward pass of the whole model over the calibration windows.

    Under torchrun every process brings its own windows; a window's draws are its own, in whichever process it is.

    Args:
        model: of :func:`bittern.model.build`, nothing in memory; it is loaded whole, and left as it was.
        checkpoint: where its weights are.
        sources: of :func:`bittern.model.weight_map`.
        matrices: those to look at, no experts, which see other tokens each.
        batches: ids, int64 (windows, positions) each.
        device: where to compute.
        on_weighed: called with the windows that are done and their number, ten times or so.

    Returns:
        What is known of the matrices that every batch came through once.

    Raises:
        BitternError: for a gradient that is NaN or infinite.
    """
    live.load_tensors(model, checkpoint, sources, sources, device=device)
    model.tie_weights()
    live.move_buffers(model, device)
    seen = _Seen(model, matrices, torch.Size((sum(len(ids) for ids in batches), batches[0].shape[1])), device)
    with seen:
        _backward(model, batches, device, seen, on_weighed)
    live.drop_tensors(model, sources)
    model.tie_weights()
    for matrix, sizes in seen.sizes.items():
        total = torch.tensor([float(sizes.sum()), sizes.numel()], device=device)
        add_up(total)
        mean = float(total[0] / total[1])
        if not 0 <= mean < float("inf"):
            raise BitternError(f"{matrix.label}: a gradient of its output is NaN or infinite")
        sizes.div_(mean) if mean else sizes.fill_(1.0)
    whole = [matrix for matrix, calls in seen.calls.items() if calls == len(batches)]
    for matrix in whole:
        seen.moments[matrix].add_up()
    return Guide(
        {matrix: seen.sizes[matrix] for matrix in whole},
        {matrix: seen.moments.pop(matrix).mean() for matrix in whole},
    )


def _backward(
    model: PreTrainedModel,
    batches: Sequence[Tensor],
    device: torch.device,
    seen: _Seen,
    on_weighed: Callable[[int, int], None] | None,
) -> None:
    """Send a draw of every prediction back through all blocks."""
    blocks = live.blocks(model)[1]
    total = sum(len(ids) for ids in batches)
    for batch in batches:
        ids = batch.to(device)
        hidden, calls = capture(model, blocks, ids)
        hidden = hidden.detach().clone().requires_grad_()
        state = hidden
        for block, call in zip(blocks, calls, strict=True):
            state = call.run(block, state)
        logits = logits_after(model, blocks, ids, state)
        seen.rows = slice(seen.rows.stop, seen.rows.stop + len(ids))
        torch.autograd.grad(logits, hidden, root_of_fisher(logits.detach(), seen.rows.start))
        if on_weighed is not None and 10 * seen.rows.start // total < 10 * seen.rows.stop // total:
            on_weighed(seen.rows.stop, total)


def token_weights(sizes: Mapping[Matrix, Tensor], matrices: Sequence[Matrix]) -> Tensor | None:
    """What each token counts for matrices that read one input, (windows, positions); None where that is not known."""
    if not all(matrix in sizes for matrix in matrices):
        return None
    return torch.stack([sizes[matrix] for matrix in matrices]).mean(0).sqrt_()


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


class _Seen:
    """Gradients of what some matrices compute.

    Their sizes go into one tensor that is there before: small ones, kept one by one between large ones that are not,
    would leave a heap full of holes.

    Attributes:
        sizes: by matrix, squared gradients summed over its outputs.
        moments: by matrix, of its outputs.
        calls: by matrix, batches that came back through it.
        rows: the windows that come back next.
    """

    def __init__(self, model: nn.Module, matrices: Iterable[Matrix], shape: torch.Size, device: torch.device) -> None:
        self._model = model
        members = list(matrices)
        self.sizes = dict(zip(members, torch.zeros(len(members), *shape), strict=True))
        self.moments = {matrix: Accumulator(matrix.out_features, device) for matrix in members}
        self.calls = dict.fromkeys(members, 0)
        self.rows = slice(0, 0)

    def __enter__(self) -> None:
        self._handles = [
            self._model.get_submodule(matrix.module).register_forward_hook(self._hook(matrix)) for matrix in self.sizes
        ]

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, matrix: Matrix) -> Callable[..., None]:
        def note(gradient: Tensor) -> None:
            squares = gradient.float().square().sum(-1, keepdim=True)
            rows = self.sizes[matrix][self.rows]
            if squares.numel() == rows.numel():
                rows.copy_(squares.view_as(rows))
                self.moments[matrix].add(gradient * squares.clamp_min(1e-30).pow(-0.25))
                self.calls[matrix] += 1

        def watch(_: nn.Module, __: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(note)  # type: ignore[no-untyped-call]

        return watch
