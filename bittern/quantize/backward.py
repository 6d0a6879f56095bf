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
from itertools import count
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bittern import model as live
from bittern.checkpoint import Checkpoint
from bittern.model import Piece
from bittern.processes import number_of
from bittern.quantize.hessian import check_finite
from bittern.replay import BlockCall, advance, capture_all, logits_after, rounded_once, sixteen_bits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEPT = torch.bfloat16
"""What hidden states are kept in."""

LOGITS_AT_ONCE = {"cpu": 128, "cuda": 1024}
"""Positions whose logits are made together: enough for a product that reads the whole head, and few enough that malloc
keeps their room, where more would be mapped and cleared anew each time. On a GPU only the room counts."""


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
        with rounded_once(block), sixteen_bits(device):
            advance(block, hidden, [each[position] for each in calls])
        check_finite(f"{prefix}.{position}", hidden)
        live.drop_tensors(model, inside[position])
    gradients, windows = [], count()
    with rounded_once(model.get_output_embeddings() or nn.Module()):  # type: ignore[no-untyped-call]
        for batch, state in zip(batches, hidden, strict=True):
            found = [
                _from_logits(model, blocks, ids, own, torch.Generator().manual_seed(number_of(next(windows))))
                for ids, own in zip(torch.split(batch.to(device), 1), torch.split(state, 1), strict=True)
            ]
            gradients.append(torch.cat(found))
    hidden.clear()
    live.drop_tensors(model, outside)
    model.tie_weights()
    for position in reversed(range(len(blocks))):
        live.load_tensors(model, checkpoint, sources, inside[position], device=device)
        states = [state.to(device, torch.float32) for state in kept.pop()]
        yield Visit(position, blocks[position], states, [each[position] for each in calls], gradients)
        live.drop_tensors(model, inside[position])


def _from_logits(
    model: PreTrainedModel, blocks: nn.ModuleList, ids: Tensor, hidden: Tensor, draws: torch.Generator
) -> Tensor:
    """A draw's gradient by the last block's output, some positions after the other: logits are large."""
    most, gradients = LOGITS_AT_ONCE[hidden.device.type], []
    for some, own in zip(torch.split(ids, most, 1), torch.split(hidden, most, 1), strict=True):
        state = own.detach().requires_grad_()
        with torch.enable_grad(), sixteen_bits(state.device):
            logits = logits_after(model, blocks, some, state)
        gradients.append(torch.autograd.grad(logits, state, root_of_fisher(logits.detach(), draws))[0])
    return torch.cat(gradients, 1)


def root_of_fisher(logits: Tensor, draws: torch.Generator) -> Tensor:
    """A random g at the logits with E[g g'] = diag(p) - p p' at every position, and 0 between positions.

    Args:
        logits: (..., positions, vocabulary), of one window: leading dimensions share their draws.
        draws: of that window, in the order of its positions where they come in pieces.
    """
    p = logits.float().softmax(-1)
    signs = [torch.randint(0, 2, (size,), generator=draws).mul_(2).sub_(1).to(p) for size in p.shape[-2:]]
    drawn = p.sqrt().mul_(signs[1]).mul_(signs[0].unsqueeze(1))
    return p.mul_(-drawn.sum(-1, keepdim=True)).add_(drawn).to(logits.dtype)
