"""Send what moves a model's predictions back through its blocks, with one block in memory at a time.

On the way forward the hidden states before every block are kept, in 16 bits; on the way back each block is computed
once more from them. What is sent back from the logits is g with E[g g'] the Fisher information of the predictions: not
that of tokens that are drawn, which is mostly luck, but of signs e, ``g = sum_v e_v sqrt(p_v) (onehot_v - p)``, for
which E[g g'] is the same.

Where a processor multiplies bfloat16 faster than fp32, it does: what is found are averages over thousands of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bittern import model as live
from bittern.checkpoint import Checkpoint
from bittern.model import Piece
from bittern.processes import number_of
from bittern.quantize.hessian import check_finite
from bittern.replay import BlockCall, advance, capture_all, logits_after, sixteen_bits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEPT = torch.bfloat16
"""What hidden states are kept in."""


@dataclass
class Visit:
    """A block on the way back, its weights in memory.

    Attributes:
        position: which one.
        block: the module.
        states: per batch, what it is given, fp32 (batch, positions, hidden_size).
        calls: per batch, how it is called.
        gradients: per batch, by the block's output; by its input once they are sent through.
    """

    position: int
    block: nn.Module
    states: list[Tensor]
    calls: list[BlockCall]
    gradients: list[Tensor]

    def send_back(self) -> Iterator[int]:
        """Send each batch back through the block; hooks of what is inside see its gradients.

        Yields:
            Each batch's number, before it is sent.
        """
        for index, (state, call) in enumerate(zip(self.states, self.calls, strict=True)):
            yield index
            given = state.detach().requires_grad_()
            with torch.enable_grad(), sixteen_bits(state.device):
                output = call.run(self.block, given)
            self.gradients[index] = torch.autograd.grad(output, given, self.gradients[index])[0]


def go_back(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    sources: dict[str, tuple[Piece, ...]],
    batches: Sequence[Tensor],
    device: torch.device,
) -> Iterator[Visit]:
    """Run a model forwards over some windows, and go back block by block.

    Under torchrun every process brings its own windows; a window's draws are its own, in whichever process it is.

    Args:
        model: of :func:`bittern.model.build`, nothing in memory; it is left so.
        checkpoint: where its weights are.
        sources: of :func:`bittern.model.weight_map`.
        batches: ids, int64 (windows, positions) each.
        device: where to compute.

    Yields:
        Every block, from the last to the first; the caller has to send all batches through.

    Raises:
        BitternError: naming the block and the sample of a NaN or infinite hidden state.
    """
    prefix, blocks = live.blocks(model)
    inside = [[name for name in sources if name.startswith(f"{prefix}.{p}.")] for p in range(len(blocks))]
    outside = [name for name in sources if not name.startswith(f"{prefix}.")]
    live.load_tensors(model, checkpoint, sources, outside, device=device)
    model.tie_weights()
    live.move_buffers(model, device)
    hidden, calls = capture_all(model, blocks, batches, device)
    kept = []
    for position, block in enumerate(blocks):
        kept.append([state.to("cpu", KEPT, copy=True) for state in hidden])
        live.load_tensors(model, checkpoint, sources, inside[position], device=device)
        with sixteen_bits(device):
            advance(block, hidden, [each[position] for each in calls])
        check_finite(f"{prefix}.{position}", hidden)
        live.drop_tensors(model, inside[position])
    gradients, first = [], 0
    for batch, state in zip(batches, hidden, strict=True):
        ids = batch.to(device)
        windows = [slice(index, index + 1) for index in range(len(ids))]  # logits are large
        found = [_from_logits(model, blocks, ids[own], state[own], first + own.start) for own in windows]
        gradients.append(torch.cat(found))
        first += len(ids)
    hidden.clear()
    live.drop_tensors(model, outside)
    model.tie_weights()
    for position in reversed(range(len(blocks))):
        live.load_tensors(model, checkpoint, sources, inside[position], device=device)
        states = [state.to(device, torch.float32) for state in kept.pop()]
        yield Visit(position, blocks[position], states, [each[position] for each in calls], gradients)
        live.drop_tensors(model, inside[position])


def _from_logits(model: nn.Module, blocks: nn.ModuleList, ids: Tensor, hidden: Tensor, first: int) -> Tensor:
    """A draw's gradient by the last block's output."""
    hidden = hidden.detach().requires_grad_()
    with torch.enable_grad(), sixteen_bits(hidden.device):
        logits = logits_after(model, blocks, ids, hidden)
    return torch.autograd.grad(logits, hidden, root_of_fisher(logits.detach(), first))[0]


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
