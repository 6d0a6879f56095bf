"""What each token and each output counts for a matrix: by what moving the output does to the model's predictions.

Moving a token's output z by d moves the distribution of the next tokens by a KL of ``d' F d / 2``, F = E[g g'], where g
is the gradient by z of -log p of tokens drawn from the model's own p (:mod:`bittern.quantize.backward`). So how outputs
go together is told by the mean of g g' over the tokens (Tseng et al. 2025, YAQA), and the error of a token's output
should count by the size of its F (Kim et al. 2025, GuidedQuant, who weight groups of channels; here all outputs of a
matrix together).

Sizes are heavy-tailed, and moments that a few tokens decide do not hold on other text: tokens count by the roots of
their sizes, in g g' too (docs/log.md has the figures).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bittern import replay
from bittern.checkpoint import Checkpoint
from bittern.errors import BitternError
from bittern.model import Matrix, Piece
from bittern.processes import add_up
from bittern.quantize.backward import go_back
from bittern.quantize.hessian import Accumulator

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = 4096
"""Calibration tokens that tell how outputs go together; where tokens are weighed, all of them do."""


@dataclass(frozen=True)
class Guide:
    """What counts in a block, by matrix.

    Attributes:
        sizes: on the CPU, fp32 (windows, positions): squared gradients of each token, 1 on average over all windows.
        curvatures: fp32 (out_features, out_features), E[g g'] with tokens that count by the roots of their sizes, up to
            a factor.
    """

    sizes: dict[Matrix, Tensor]
    curvatures: dict[Matrix, Tensor]


def find_guides(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    sources: dict[str, tuple[Piece, ...]],
    blocks: Sequence[Sequence[Matrix]],
    batches: Sequence[Tensor],
    device: torch.device,
    on_weighed: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[int, Guide]]:
    """One forward and one backward pass over the calibration windows, block by block.

    Args:
        model, checkpoint, sources, device: see :func:`bittern.quantize.backward.go_back`.
        blocks: the matrices of every block to look at, no experts, which see other tokens each.
        batches: ids, int64 (windows, positions) each; under torchrun of this process.
        on_weighed: called with the blocks that are done and their number, ten times or so.

    Yields:
        The blocks from the last to the first, and what is known of the matrices that every batch came through once.

    Raises:
        BitternError: for a gradient that is NaN or infinite.
    """
    shape = torch.Size((sum(len(ids) for ids in batches), batches[0].shape[1]))
    for visit in go_back(model, checkpoint, sources, batches, device):
        seen = _Seen(model, blocks[visit.position], shape, device)
        with seen:
            for index in visit.send_back():
                seen.rows = slice(seen.rows.stop, seen.rows.stop + len(batches[index]))
        whole = [matrix for matrix, calls in seen.calls.items() if calls == len(batches)]
        for matrix in whole:
            _divide_by_mean(seen.sizes[matrix], matrix, device)
            seen.moments[matrix].add_up()
        yield (
            visit.position,
            Guide(
                {matrix: seen.sizes[matrix] for matrix in whole},
                {matrix: seen.moments.pop(matrix).mean() for matrix in whole},
            ),
        )
        done, total = len(blocks) - visit.position, len(blocks)
        if on_weighed is not None and 10 * (done - 1) // total < 10 * done // total:
            on_weighed(done, total)


def _divide_by_mean(sizes: Tensor, matrix: Matrix, device: torch.device) -> None:
    """Their mean over all processes."""
    total = torch.tensor([float(sizes.sum()), sizes.numel()], dtype=torch.float32, device=device)
    add_up(total)
    mean = float(total[0] / total[1])
    if not 0 <= mean < float("inf"):
        raise BitternError(f"{matrix.label}: a gradient of its output is NaN or infinite")
    sizes.div_(mean) if mean else sizes.fill_(1.0)


def token_weights(sizes: Mapping[Matrix, Tensor], matrices: Sequence[Matrix]) -> Tensor | None:
    """What each token counts for matrices that read one input, (windows, positions); None where that is not known."""
    if not all(matrix in sizes for matrix in matrices):
        return None
    return torch.stack([sizes[matrix] for matrix in matrices]).mean(0).sqrt_()


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
        self.sizes = dict(zip(members, torch.zeros(len(members), *shape, dtype=torch.float32), strict=True))
        rough = replay.fast_in_sixteen_bits(device)  # as the products that the gradients come from
        self.moments = {matrix: Accumulator(matrix.out_features, device, rough) for matrix in members}
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
            gradient = gradient.float()
            squares = gradient.square().sum(-1, keepdim=True)
            rows = self.sizes[matrix][self.rows]
            if squares.numel() == rows.numel():
                rows.copy_(squares.view_as(rows))
                self.moments[matrix].add(gradient * squares.clamp_min(1e-30).pow(-0.25))
                self.calls[matrix] += 1

        def watch(_: nn.Module, __: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(note)  # type: ignore[no-untyped-call]

        return watch
