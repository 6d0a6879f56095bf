"""What a quantization will take, before it is begun: seconds, memory, disk, and the bytes of what it makes.

Bytes follow from the plan. Seconds and memory are counts of pieces times what a piece takes, which
:mod:`bittern.quantize.rehearsal` finds out on this machine. A stage of the solver is one line in
:func:`_block_seconds` and, where it holds more than the others, one in :func:`_block_bytes`; what passes through the
whole model is in :mod:`bittern.quantize.passes`.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bittern import model as live
from bittern.model import Matrix
from bittern.quantize import heap
from bittern.quantize.drift import learned_from
from bittern.quantize.job import Entries, Job
from bittern.quantize.passes import (
    any_bits,
    guiding_bytes,
    guiding_seconds,
    measuring_bytes,
    measuring_seconds,
    tuning_bytes,
    tuning_seconds,
)
from bittern.quantize.rehearsal import (
    BLOCK_FLOPS,
    BlockCosts,
    SolveCosts,
    rehearse_blocks,
    rehearse_sensitivity,
    rehearse_shaping,
    rehearse_solver,
)
from bittern.quantize.resume import stored_bytes
from bittern.quantize.stopwatch import FP32, Cost, read_rate, resident_memory, rounding_rate, waited, write_rate
from bittern.report import peak_memory
from bittern.weight import QuantSpec

ERRORS = {"seconds": 0.25, "peak_memory_bytes": 0.15, "bytes": 0.01}
"""How far off a prediction may be on the machine that it was made on, as shares."""

_PIECES = 48 * 2**20  # that casting keeps in memory of however large a model
_MEASURING = "what fewer bits of each layer would cost"
_GUIDING, _TUNING = "what tokens and outputs count", "training of scales and norms"
_FEWEST, _SHARE = 32, 1 / 60  # positions, and share of the run's samples, that are tried with


@dataclass(frozen=True)
class Prediction:
    """What a run is expected to take.

    Attributes:
        stages: seconds of each stage; their sum is the run.
        block_seconds: per block, when it is solved, and when it only runs since it is solved already.
        peak_memory_bytes: of the process.
        bytes: of the artifact.
        work_bytes: of finished blocks, and of the artifact that a GGUF file is made of, on the disk beside the output.
        waited: share of the time in which this was found out that was spent waiting for a processor.
    """

    stages: dict[str, float]
    block_seconds: list[tuple[float, float]]
    peak_memory_bytes: int
    bytes: int
    work_bytes: int
    waited: float = 0.0

    @property
    def seconds(self) -> float:
        return sum(self.stages.values())

    @property
    def figures(self) -> dict[str, Any]:
        """What a manifest says."""
        return {
            "seconds": round(self.seconds, 3),
            "peak_memory_bytes": self.peak_memory_bytes,
            "bytes": self.bytes,
        }

    def to_dict(self) -> dict[str, Any]:
        """What a dry run tells: figures, how far off they may be, what was waited, seconds of stages, disk space."""
        return {
            "prediction": self.figures,
            "errors": ERRORS,
            "waited": round(self.waited, 3),
            "stages": {name: round(value, 6) for name, value in self.stages.items()},
            "work_bytes": self.work_bytes,
            "disk_bytes": self.bytes + self.work_bytes,
        }

    def left(self, finished: Collection[int], guided: bool, tuned: float) -> float:
        """Seconds of a run that finds these blocks finished, how outputs count known, and a share of training done."""
        last = max((p for p in range(len(self.block_seconds)) if p not in finished), default=-1)
        spared = sum(
            solve - (run if position < last else 0.0)
            for position, (solve, run) in enumerate(self.block_seconds)
            if position in finished
        )
        known = self.stages.get(_GUIDING, 0.0) if guided else 0.0
        return self.seconds - spared - known - tuned * self.stages.get(_TUNING, 0.0)


def predict(job: Job, size: int, started: float) -> Prediction:
    """What a run will take.

    Args:
        job: the run.
        size: bytes of what it makes.
        started: when it began, by ``time.monotonic``; what was done since counts, finding out all this too.
    """
    began = time.monotonic(), waited()
    grids = {
        (matrix.in_features, spec, matrix in job.solver.effort.shaped(block))
        for block in job.solver.plan.blocks
        for matrix, spec in block
    }
    specs = {spec for _, spec, _ in grids} | {spec for _, spec in job.solver.plan.outside}
    own = job.solver
    read, write = read_rate(own), {spec: write_rate(job.packing, spec) for spec in specs}
    rounded = {spec for _, spec in job.solver.plan.outside} if job.samples else specs
    rounding = {spec: rounding_rate(spec) for spec in rounded}
    blocks: Sequence[BlockCosts] = ()
    if job.samples:
        samples, positions = _tried(job)
        scale = job.seqlen / positions
        if job.exact_samples:
            width = own.model.config.get_text_config(decoder=True).hidden_size
            heap.for_holding(FP32 * samples * positions * width)
        asked = job.measured_samples > 0
        blocks = rehearse_blocks(own.model, own.sources, own.plan, own.device, samples, positions, own.effort, asked)
        if job.exact_samples:
            heap.for_solving()
        rehearsed = partial(rehearse_solver, rows=job.most_rows, damp_percent=own.damp_percent)
        rough = own.plan.rough(own.device)
        solver = {grid: rehearsed(*grid, device=own.device, effort=own.effort, rough=rough) for grid in grids}
        kinds = {
            (matrix.out_features, matrix.in_features, dict(block)[matrix])
            for block in own.plan.blocks
            for matrix in own.effort.shaped(block)
        }
        shaping = {kind: rehearse_shaping(*kind, own.damp_percent, own.device, rough) for kind in kinds}
        choices = {any_bits(width, spec) for width, spec, _ in grids} if asked else ()
        choosing = {each: rehearse_sensitivity(*each, job.most_rows, own.damp_percent, own.device) for each in choices}
    heap.trim()
    base = resident_memory()  # after the libraries have done all that they will be asked for
    stages: dict[str, float] = {"start": 0.0}
    per_block, held = [], [float(_outside_bytes(job)) if job.samples else 0.0]
    for position, entries in enumerate(job.solver.plan.blocks):
        stored = job.parameters(position)
        took = {"reading": FP32 * stored * read}
        if job.samples:
            last = position + 1 == len(job.solver.plan.blocks)
            took |= _block_seconds(job, position, blocks[position], solver, shaping, scale, last)
            held.append(_block_bytes(job, position, blocks[position], solver, scale) + job.curvature_bytes(entries))
        else:
            took["rounding to nearest"] = sum(m.out_features * m.in_features * rounding[spec] for m, spec in entries)
            held.append(FP32 * (stored + 4 * max((m.out_features * m.in_features for m, _ in entries), default=0)))
        took["writing"] = sum(m.out_features * m.in_features * write[spec].seconds for m, spec in entries)
        for name, value in took.items():
            stages[name] = stages.get(name, 0.0) + value
        again = took["reading"] + (blocks[position].advance.seconds * job.samples * scale if job.samples else 0.0)
        per_block.append((sum(took.values()), again if job.samples else 0.0))
    if job.measured_samples:
        stages[_MEASURING] = measuring_seconds(job, blocks, choosing, scale, read)
        solving = [max(_solving_bytes(job, *block, solver), default=0.0) for block in enumerate(blocks)]
        held.append(measuring_bytes(job, blocks, positions, solving))
    if job.samples and any(job.solver.effort.shaped(entries) for entries in job.solver.plan.blocks):
        stages[_GUIDING] = guiding_seconds(job, blocks, scale, read)
        held.append(guiding_bytes(job, blocks, positions))
    if job.samples and job.solver.effort.tune:
        stages[_TUNING] = tuning_seconds(job, blocks, scale)
        held.append(tuning_bytes(job, blocks, positions))
    for matrix, spec in job.solver.plan.outside:
        count = matrix.out_features * matrix.in_features
        each = FP32 * read + rounding[spec] + write[spec].seconds
        stages["embedding and head"] = stages.get("embedding and head", 0.0) + count * each
        held.append(count * (FP32 + write[spec].bytes))
    stages["start"] = time.monotonic() - started
    stages["everything else"] = 2 * read * sum(FP32 * info.numel for info, _ in job.kept)
    pieces = min(_PIECES, 3 * sum(job.solver.checkpoint.tensors[stored].nbytes for _, stored in job.kept))
    held.append(pieces + max(_writing_bytes(entries, write) for entries in job.solver.plan.blocks))
    peak = max(peak_memory(), base + int(max(held)))
    beside = job.work_bytes(job.solver.plan.blocks) + job.beside
    share = (waited() - began[1]) / (time.monotonic() - began[0])
    return Prediction(stages, per_block, peak, size, beside, share)


def _block_seconds(
    job: Job,
    position: int,
    block: BlockCosts,
    solver: Mapping[tuple[int, QuantSpec, bool], SolveCosts],
    shaping: Mapping[tuple[int, int, QuantSpec], float],
    scale: float,
    last: bool,
) -> dict[str, float]:
    """Seconds of every stage of one block: one line a stage."""
    groups = job.groups(position, block)
    shaped = set(job.solver.effort.shaped(job.solver.plan.blocks[position]))
    solves = [
        solver[width, *kind].solve(sum(m.out_features for m, s in members if (s, m in shaped) == kind))
        for width, members in groups
        for kind in dict.fromkeys((spec, matrix in shaped) for matrix, spec in members)
    ]
    forward = block.advance.seconds * scale
    costs = {
        "factorizing": sum(solver[_key(members, shaped)].factorize.seconds for _, members in groups),
        "grids and codes": sum(solves),
    }
    if shaping:
        kinds = [(m.out_features, m.in_features, s) for _, members in groups for m, s in members if m in shaped]
        costs["shaping"] = sum(shaping[kind] for kind in kinds)
    if block.walk is None:
        return {
            "forward passes, second moments": block.gather.fixed + block.gather.each * job.samples * scale,
            **costs,
            "forward passes, quantized": 0.0 if last else forward * job.samples,
        }
    held_out = job.exact_samples - learned_from(job.exact_samples)
    return {
        "forward passes, second moments": block.walk.samples(job.samples * scale),
        # Of what is held out, two products with all matrices.
        "full precision": block.walk.exact * job.exact_samples * scale + 2 * forward * held_out,
        "balancing": block.walk.balance,
        **costs,
    }


def _key(members: Entries, shaped: Collection[Matrix]) -> tuple[int, QuantSpec, bool]:
    """What matrices that share an input are rehearsed as: as the first of them."""
    matrix, spec = members[0]
    return matrix.in_features, spec, matrix in shaped


def _block_bytes(
    job: Job, position: int, block: BlockCosts, solver: Mapping[tuple[int, QuantSpec, bool], SolveCosts], scale: float
) -> float:
    """What the stage of a block that holds most holds, with all that is there meanwhile."""
    if job.solver.device.type != "cpu":
        return float(FP32 * job.parameters(position))  # the rest is in the device's memory
    batch = min(job.batch_size, job.samples) * scale
    groups = job.groups(position, block)
    moments = [FP32 * width**2 for width, _ in groups]
    activations = batch * block.advance.bytes
    solving = _solving_bytes(job, position, block, solver)
    hidden, call = block.held
    if block.walk is None:
        inputs = batch * job.seqlen / scale * FP32 * sum(width for width, _ in groups)
        most = (
            job.samples * hidden * scale
            + max(
                activations + sum(moments) + inputs,  # gathering
                sum(moments) + 2 * max(moments, default=0),  # their mean, and that of experts of all of them
                max((sum(moments[number:]) + each for number, each in enumerate(solving)), default=0),
            )
        )
    else:
        waiting = zip(block.walk.waiting, block.walk.exact_waiting, moments, solving, strict=True)
        most = max(
            (job.samples * each + job.exact_samples * exact) * scale + max(activations + 3 * moment, moment + solve)
            for each, exact, moment, solve in waiting
        )
    codes = stored_bytes([job.solver.plan.blocks[position]])
    rounded = torch.bfloat16.itemsize if block.walk is not None and job.solver.plan.rough(job.solver.device) else 0
    return most + 2 * call * scale + (FP32 + rounded) * job.parameters(position) + codes


def _solving_bytes(
    job: Job, position: int, block: BlockCosts, solver: Mapping[tuple[int, QuantSpec, bool], SolveCosts]
) -> list[float]:
    """What solving holds, for the matrices of a block that share an input."""
    shaped = set(job.solver.effort.shaped(job.solver.plan.blocks[position]))
    return [
        max(
            solver[_key(members, shaped)].factorize.bytes,
            2 * FP32 * width**2 + sum(m.out_features for m, _ in members) * solver[_key(members, shaped)].row_bytes,
        )
        for width, members in job.groups(position, block)
    ]


def _tried(job: Job) -> tuple[int, int]:
    """Samples and positions to rehearse with: some hundredths of a second's worth, and a small part of the run."""
    widest = max(job.parameters(position) for position in range(len(job.solver.plan.blocks)))
    positions = int(min(job.seqlen, max(_FEWEST, 4 * BLOCK_FLOPS / (2 * widest))))
    samples = int(BLOCK_FLOPS / (2 * widest * positions))
    few = int(job.samples * len(job.solver.plan.blocks) * _SHARE)
    return max(1, min(samples, few, job.batch_size, job.samples)), positions


def _outside_bytes(job: Job) -> int:
    """Embeddings in fp32, the largest also as it is stored, and the hidden states that come of them."""
    prefix = f"{live.blocks(job.solver.model)[0]}."
    head = live.output_head(job.solver.model)
    state = job.solver.model.state_dict()
    names = [name for name in job.solver.sources if not name.startswith(prefix) and name.rpartition(".")[0] != head]
    cast = [job.solver.checkpoint.tensors[piece.source] for name in names for piece in job.solver.sources[name]]
    stored = max((info.nbytes for info in cast if info.dtype != torch.float32), default=0)
    width = job.solver.model.config.get_text_config(decoder=True).hidden_size
    wide = FP32 * sum(state[name].numel() for name in names)
    return int(wide + stored + job.samples * job.seqlen * width * FP32)


def _writing_bytes(entries: Entries, write: Mapping[QuantSpec, Cost]) -> float:
    largest = max((m.out_features * m.in_features * write[spec].bytes for m, spec in entries), default=0.0)
    return stored_bytes([entries]) + largest
