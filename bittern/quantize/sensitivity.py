"""How much a model is harmed when some of its matrices get fewer bits, foretold by one forward and one backward pass.

While changes are small, the divergence of a model from itself is quadratic in them, with the Fisher information as its
curvature. For a matrix whose outputs y change by dy, and g the gradient by y of the negative log-likelihood of tokens
drawn from the model's own predictions (:mod:`bittern.quantize.backward`),

    KL per token  ~  1/2 E[(g . dy)^2]  ~  1/2 sum_o E[g_o^2] E[dy_o^2],

where outputs, tokens and matrices are taken for independent. ``E[dy_o^2]`` is the diagonal of (W^ - W) H (W^ - W)',
with W^ as GPTQ solves it on H, the second moment of the inputs in full precision. docs/log.md has how well that holds.
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
from bittern.processes import add_up, share
from bittern.quantize.backward import go_back
from bittern.quantize.gptq import Factor, factorize, gptq
from bittern.quantize.hessian import Inputs, collect, fused_experts
from bittern.weight import BITS, QuantSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
    """

    model: PreTrainedModel
    checkpoint: Checkpoint
    sources: dict[str, tuple[Piece, ...]]
    blocks: Sequence[Sequence[tuple[Matrix, QuantSpec]]]
    damp_percent: float
    device: torch.device

    def measure(self, windows: Tensor, on_block: Callable[[int, int], None] | None = None) -> list[Group]:
        """The groups of all blocks, in the order in which the model reads them.

        Args:
            windows: calibration ids, int64 (windows, positions); under torchrun every process takes its share.
            on_block: called with the blocks that are done and their number.
        """
        rows = torch.split(share(windows), 1)
        found: list[list[Group]] = []
        for visit in go_back(self.model, self.checkpoint, self.sources, rows, self.device):
            entries = dict(self.blocks[visit.position])
            inputs = collect(self.model, visit.block, list(entries), visit.states, visit.calls)
            outputs = _OutputGradients(self.model, list(entries))
            with outputs:
                for _ in visit.send_back():
                    pass
            add_up(*outputs.squares.values())
            members = [self._harms(each, entries, outputs.squares, windows.numel()) for each in inputs]
            found.append(_grouped([(m, h) for harms in members for m, h in harms], inputs))
            if on_block is not None:
                on_block(len(found), len(self.blocks))
        return [group for groups in reversed(found) for group in groups]

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
            errors = output_errors(stacked, inputs.hessian, factor, replace(grids[members[0]], bits=bits)).double()
            parts = torch.split(errors * importance / (2 * tokens), [matrix.out_features for matrix in members])
            for harm, matrix, part in zip(harms, members, parts, strict=True):
                harm[bits] = float(part.sum())
                if not harm[bits] < float("inf"):
                    raise BitternError(f"{matrix.label}: its sensitivity is no number: a gradient is NaN or infinite")
        return list(zip(members, harms, strict=True))


def output_errors(weight: Tensor, hessian: Tensor, factor: Factor, spec: QuantSpec) -> Tensor:
    """E[dy_o^2] of every row of a weight as GPTQ solves it, fp32 (out_features,)."""
    change = gptq(weight, factor, spec).weight.dequantize() - weight
    return ((change @ hessian) * change).sum(1).clamp_min(0)


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
            self.squares[matrix] += gradient.flatten(0, -2).float().square().sum(0)

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
