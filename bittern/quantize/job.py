"""All that a quantization's cost depends on, and what its parts come to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bittern import model as live
from bittern.checkpoint import TensorInfo
from bittern.formats.packing import Packing
from bittern.model import Matrix
from bittern.quantize.rehearsal import BlockCosts, place
from bittern.quantize.resume import stored_bytes
from bittern.quantize.solve import Solver
from bittern.quantize.stopwatch import FP32
from bittern.quantize.tune import HELD_OUT
from bittern.weight import QuantSpec

Entries = Sequence[tuple[Matrix, QuantSpec]]
"""The matrices of a block that are quantized, and their grids."""


@dataclass(frozen=True)
class Job:
    """All that a quantization's cost depends on.

    Attributes:
        solver: what solves it: model, plan, stages, device.
        packing: how layers are written.
        kept: name, dtype and shape of each tensor that is cast only, and its name in the checkpoint.
        samples, seqlen, batch_size: calibration windows, their tokens, how many run together; no samples
            mean rounding to nearest. Of this process, as all of these are.
        guiding_samples: of these, that tell how outputs count.
        tune_tokens: that scales and norms are trained on, where they are.
        measured_samples: that are to tell what fewer bits of each layer would cost; 0 where that is known.
        beside: bytes of an artifact that only is on the way, which a GGUF file is made of.
    """

    solver: Solver
    packing: Packing
    kept: Sequence[tuple[TensorInfo, str]]
    samples: int
    seqlen: int
    batch_size: int
    guiding_samples: int
    tune_tokens: int
    measured_samples: int = 0
    beside: int = 0

    @property
    def exact_samples(self) -> int:
        """Calibration windows that are walked through the unquantized blocks too."""
        return self.solver.effort.exact_windows(self.samples)

    @property
    def guiding_windows(self) -> int:
        """Windows of this process that are sent back to see what tokens and outputs count."""
        return self.samples if self.solver.effort.weigh else min(self.samples, self.guiding_samples)

    @property
    def most_rows(self) -> int:
        """Of a matrix."""
        return max(matrix.out_features for block in self.solver.plan.blocks for matrix, _ in block)

    def parameters(self, position: int) -> int:
        """Of a block."""
        return sum(tensor.numel() for tensor in live.blocks(self.solver.model)[1][position].state_dict().values())

    @property
    def inside(self) -> int:
        """Parameters of all blocks."""
        return sum(self.parameters(position) for position in range(len(self.solver.plan.blocks)))

    def curvature_bytes(self, entries: Entries) -> int:
        """Moments of the outputs of a block's matrices."""
        return sum(FP32 * matrix.out_features**2 for matrix in self.solver.effort.shaped(entries))

    def groups(self, position: int, block: BlockCosts) -> list[tuple[int, list[tuple[Matrix, QuantSpec]]]]:
        """The matrices of a block that share an input, and its width."""
        prefix = f"{live.blocks(self.solver.model)[0]}.{position}"
        there = {place(matrix, prefix): (matrix, spec) for matrix, spec in self.solver.plan.blocks[position]}
        members = [[there[name] for name in readers] for readers in block.readers]
        return [(each[0][0].in_features, each) for each in members]

    def work_bytes(self, unsolved: Iterable[Entries]) -> int:
        """What finished blocks, these among them, and training keep on the disk until the output stands."""
        kept = stored_bytes(unsolved)
        if self.samples:
            kept += sum(self.curvature_bytes(entries) for entries in unsolved)
        if self.samples and self.solver.effort.tune:
            grids = [(matrix, spec) for block in self.solver.plan.blocks for matrix, spec in block]
            scales = sum(matrix.out_features * spec.groups(matrix.in_features) for matrix, spec in grids)
            # Factors and two moments of each, the old ones until the new ones stand; and windows of text.
            kept += 2 * 3 * FP32 * scales + FP32 * (self.tune_tokens + HELD_OUT * self.seqlen)
        return kept
