"""How much a model is harmed when some of its matrices get fewer bits, foretold by one forward and one backward pass.

While changes are small, the divergence of a model from itself is quadratic in them, with the Fisher information as its
curvature. For a matrix whose outputs y change by dy, and g the gradient by y of the negative log-likelihood of tokens
drawn from the model's own predictions,

    KL per token  ~  1/2 E[(g . dy)^2]  ~  1/2 sum_o E[g_o^2] E[dy_o^2],

where outputs, tokens and matrices are taken for independent. ``E[dy_o^2]`` is the diagonal of (W^ - W) H (W^ - W)',
with W^ as GPTQ solves it on H, the second moment of the inputs in full precision. docs/log.md has how well that holds.

One block is in memory at a time: the hidden states before every block are kept from the way forward, 4 bytes a value,
and on the way back each block is computed once more, for its second moments and its gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bittern import model as live
from bittern.checkpoint import Checkpoint
from bittern.errors import BitternError
from bittern.model import Matrix, Piece
from bittern.processes import add_up, number_of, share
from bittern.quantize.gptq import factorize, gptq
from bittern.quantize.hessian import Inputs, collect, fused_experts
from bittern.replay import BlockCall, capture, logits_after, share_equal
from bittern.weight import QuantSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BITS = (2, 3, 4, 8)
TOKENS = 8192
"""Calibration tokens that sensitivities are measured on, or four windows where these are more."""


@dataclass(frozen=True)
class Group:
    """Matrices that get the same bits: those of one module that read the same input, or all experts of a block.

    vLLM and SGLang run q, k and v as one layer, gate and up as one, and all experts of a block as one.

    Attributes:
        matrices: its members.
        harm: bits -> expected KL of the whole model, in nats per token, when these alone have so few.
    """

    matrices: tuple[Matrix, ...]
    harm: dict[int, float]

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of its layers in the checkpoint."""
        return tuple(name for matrix in self.matrices for name, _, _ in matrix.parts)

    @property
    def weights(self) -> int:
        """How many weights it has."""
        return sum(matrix.out_features * matrix.in_features for matrix in self.matrices)


@dataclass
class Sensitivity:
    """Measures a model of which only buffers are in memory.

    Attributes:
        model: of :func:`bittern.model.build`.
        checkpoint: where its weights are.
        sources: of :func:`bittern.model.weight_map`.
        blocks: the matrices of every block whose bits are to be chosen, with their grids, whose bits do not matter.
        damp_percent: see :func:`bittern.quantize.gptq.factorize`.
        device: where to compute.
        seed: of the tokens that are drawn.
    """

    model: PreTrainedModel
    checkpoint: Checkpoint
    sources: dict[str, tuple[Piece, ...]]
    blocks: Sequence[Sequence[tuple[Matrix, QuantSpec]]]
    damp_percent: float
    device: torch.device
    seed: int = 0

    def measure(self, windows: Tensor, on_block: Callable[[int, int], None] | None = None) -> list[Group]:
        """The groups of all blocks, in the order in which the model reads them.

        Args:
            windows: calibration ids, int64 (windows, positions); under torchrun every process takes its share.
            on_block: called with the blocks that are done and their number.
        """
        prefix, blocks = live.blocks(self.model)
        states, calls, gradients = self._forward(prefix, blocks, windows)
        found: list[list[Group]] = []
        for position in reversed(range(len(blocks))):
            names = self._inside(prefix, position)
            live.load_tensors(self.model, self.checkpoint, self.sources, names, device=self.device)
            entries = dict(self.blocks[position])
            block_calls = [each[position] for each in calls]
            inputs = collect(self.model, blocks[position], list(entries), states[position], block_calls)
            squares = _backward(self.model, blocks[position], list(entries), states.pop(), block_calls, gradients)
            members = [self._harms(each, entries, squares, windows.numel()) for each in inputs]
            found.append(_grouped([(m, h) for harms in members for m, h in harms], inputs))
            live.drop_tensors(self.model, names)
            if on_block is not None:
                on_block(len(found), len(blocks))
        return [group for groups in reversed(found) for group in groups]

    def _inside(self, prefix: str, position: int) -> list[str]:
        return [name for name in self.sources if name.startswith(f"{prefix}.{position}.")]

    def _forward(
        self, prefix: str, blocks: nn.ModuleList, windows: Tensor
    ) -> tuple[list[list[Tensor]], list[list[BlockCall]], list[Tensor]]:
        """Hidden states before each block by window, each window's calls, and the gradients behind the last block."""
        outside = [name for name in self.sources if not name.startswith(f"{prefix}.")]
        live.load_tensors(self.model, self.checkpoint, self.sources, outside, device=self.device)
        self.model.tie_weights()
        live.move_buffers(self.model, self.device)
        states: list[list[Tensor]] = [[]]
        calls: list[list[BlockCall]] = []
        rows = [ids[None].to(self.device) for ids in share(windows)]
        for ids in rows:
            hidden, recorded = capture(self.model, blocks, ids)
            states[0].append(hidden.clone())
            calls.append(share_equal(recorded, calls[0]) if calls else recorded)
        for position, block in enumerate(blocks):
            names = self._inside(prefix, position)
            live.load_tensors(self.model, self.checkpoint, self.sources, names, device=self.device)
            with torch.no_grad():
                pairs = zip(states[-1], calls, strict=True)
                states.append([each[position].run(block, hidden) for hidden, each in pairs])
            live.drop_tensors(self.model, names)
        gradients = []
        for index, (ids, hidden) in enumerate(zip(rows, states.pop(), strict=True)):
            draws = torch.Generator().manual_seed(self.seed + number_of(index))
            gradients.append(_loss_gradient(self.model, blocks, ids, hidden, draws))
        live.drop_tensors(self.model, outside)
        self.model.tie_weights()
        return states, calls, gradients

    def _harms(
        self, inputs: Inputs, grids: dict[Matrix, QuantSpec], squares: dict[Matrix, Tensor], tokens: int
    ) -> list[tuple[Matrix, dict[int, float]]]:
        """Expected harm of the matrices that share an input, each alone, for all bits."""
        members = inputs.matrices
        if inputs.tokens == 0 and inputs.prior == 0:  # what no token reaches changes nothing
            return [(matrix, dict.fromkeys(BITS, 0.0)) for matrix in members]
        factor = factorize(inputs.hessian, self.damp_percent)
        stacked = torch.cat([live.get_weight(self.model, matrix) for matrix in members])
        importance = torch.cat([squares[matrix] for matrix in members])
        harms: list[dict[int, float]] = [{} for _ in members]
        for bits in BITS:
            change = gptq(stacked, factor, replace(grids[members[0]], bits=bits)).weight.dequantize() - stacked
            errors = ((change @ inputs.hessian) * change).sum(1).clamp_min(0).double()
            parts = torch.split(errors * importance / (2 * tokens), [matrix.out_features for matrix in members])
            for harm, matrix, part in zip(harms, members, parts, strict=True):
                harm[bits] = float(part.sum())
                if not harm[bits] < float("inf"):
                    raise BitternError(f"{matrix.label}: its sensitivity is no number: a gradient is NaN or infinite")
        return list(zip(members, harms, strict=True))


def _loss_gradient(
    model: nn.Module, blocks: nn.ModuleList, ids: Tensor, hidden: Tensor, draws: torch.Generator
) -> Tensor:
    """The gradient by the last block's output of -log p, summed over tokens that are drawn from the model's p."""
    hidden = hidden.detach().requires_grad_()
    logits = logits_after(model, blocks, ids, hidden)[0].float()
    drawn = torch.multinomial(logits.detach().softmax(1).cpu(), 1, generator=draws).to(logits.device)
    loss = nn.functional.cross_entropy(logits, drawn[:, 0], reduction="sum")
    return torch.autograd.grad(loss, hidden)[0]


def _backward(
    model: nn.Module,
    block: nn.Module,
    matrices: Sequence[Matrix],
    states: Sequence[Tensor],
    calls: Sequence[BlockCall],
    gradients: list[Tensor],
) -> dict[Matrix, Tensor]:
    """Squared gradients of every output, summed over tokens: matrix -> fp64 (out_features,).

    Args:
        gradients: by window, of the loss by the block's output; those by its input take their place.
    """
    outputs = _OutputGradients(model, matrices)
    with outputs:
        for index, (state, call) in enumerate(zip(states, calls, strict=True)):
            hidden = state.detach().requires_grad_()
            gradients[index] = torch.autograd.grad(call.run(block, hidden), hidden, gradients[index])[0]
    found: dict[Matrix, Tensor] = outputs.squares
    add_up(*found.values())
    return found


class _OutputGradients(TorchFunctionMode):
    """Sees the gradient of what each matrix computes: by hooks of its module, an expert by its fused parameter."""

    def __init__(self, model: nn.Module, matrices: Sequence[Matrix]) -> None:
        super().__init__()
        self.squares: dict[Matrix, Tensor] = {}
        for matrix in matrices:
            device = model.get_parameter(matrix.parameter).device
            self.squares[matrix] = torch.zeros(matrix.out_features, dtype=torch.float64, device=device)
        self.expert_of = fused_experts(model, matrices)
        self.handles = [
            model.get_submodule(matrix.module).register_forward_hook(self._hook(matrix))
            for matrix in matrices
            if matrix.expert is None
        ]

    def _hook(self, matrix: Matrix) -> Any:
        return lambda _, __, output: self._watch(matrix, output)

    def _watch(self, matrix: Matrix, output: Tensor) -> None:
        def add(gradient: Tensor) -> None:
            self.squares[matrix] += gradient.flatten(0, -2).square().sum(0)

        if output.requires_grad:
            output.register_hook(add)  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        matrix = self.expert_of(func, args)
        if matrix is not None:
            self._watch(matrix, output)
        return output

    def __exit__(self, *error: Any) -> None:
        for handle in self.handles:
            handle.remove()
        super().__exit__(*error)  # type: ignore[no-untyped-call]


def _grouped(harms: Sequence[tuple[Matrix, dict[int, float]]], inputs: Sequence[Inputs]) -> list[Group]:
    """The groups of a block, and the sums of their members' harm."""
    reads = {matrix: number for number, each in enumerate(inputs) for matrix in each.matrices}
    groups: dict[tuple[str, int], list[tuple[Matrix, dict[int, float]]]] = {}
    for matrix, harm in harms:
        key = ("experts", 0) if matrix.expert is not None else (matrix.module.rpartition(".")[0], reads[matrix])
        groups.setdefault(key, []).append((matrix, harm))
    return [
        Group(tuple(matrix for matrix, _ in members), {bits: sum(harm[bits] for _, harm in members) for bits in BITS})
        for members in groups.values()
    ]
