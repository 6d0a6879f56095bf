"""What a quantization will take, before it is begun: seconds, memory, disk, and the bytes of what it makes.

Bytes follow from the plan. Seconds and memory are counts of pieces times what a piece takes, which
:mod:`bittern.quantize.rehearsal` finds out on this machine. A stage of the solver is one line in
:func:`_block_seconds` and, where it holds more than the others, one in :func:`_block_bytes`.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bittern import model as live
from bittern.checkpoint import TensorInfo
from bittern.formats.gguf import BLOCK, BLOCK_BYTES, kind_for
from bittern.formats.packing import Packing
from bittern.model import Matrix
from bittern.quantize import heap
from bittern.quantize.drift import learned_from
from bittern.quantize.plan import Plan
from bittern.quantize.rehearsal import (
    BLOCK_FLOPS,
    BlockCosts,
    SolveCosts,
    place,
    rehearse_blocks,
    rehearse_shaping,
    rehearse_solver,
)
from bittern.quantize.resume import stored_bytes
from bittern.quantize.solve import Solver
from bittern.quantize.stopwatch import Cost, read_rate, resident_memory, rounding_rate, waited, write_rate
from bittern.quantize.tune import HELD_OUT, MICRO, SHORTLIST
from bittern.report import peak_memory
from bittern.weight import QuantSpec
from bittern.writer import planned_bytes, to_json

Entries = Sequence[tuple[Matrix, QuantSpec]]
"""The matrices of a block that are quantized, and their grids."""

ERRORS = {"seconds": 0.25, "peak_memory_bytes": 0.15, "bytes": 0.01}
"""How far off a prediction may be on the machine that it was made on, as shares."""

_FP32 = 4
_PIECES = 48 * 2**20  # that casting keeps in memory of however large a model
_HOLES = 1.3  # times what a step of training makes is what the heap takes for it: measured on two models
_GUIDING, _TUNING = "what tokens and outputs count", "training of scales and norms"
_FEWEST, _SHARE = 32, 1 / 60  # positions, and share of the run's samples, that are tried with


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
    beside: int = 0

    @property
    def exact_samples(self) -> int:
        """Calibration windows that are walked through the unquantized blocks too."""
        return self.solver.effort.exact_windows(self.samples)


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
            heap.for_holding()
        blocks = rehearse_blocks(own.model, own.sources, own.plan, own.device, samples, positions, own.effort)
        if job.exact_samples:
            heap.for_solving()
        rehearsed = partial(rehearse_solver, rows=_most_rows(own.plan), damp_percent=own.damp_percent)
        rough = own.plan.rough(own.device)
        solver = {grid: rehearsed(*grid, device=own.device, effort=own.effort, rough=rough) for grid in grids}
        kinds = {
            (matrix.out_features, matrix.in_features, dict(block)[matrix])
            for block in own.plan.blocks
            for matrix in own.effort.shaped(block)
        }
        shaping = {kind: rehearse_shaping(*kind, own.damp_percent, own.device, rough) for kind in kinds}
    heap.trim()
    base = resident_memory()  # after the libraries have done all that they will be asked for
    stages: dict[str, float] = {"start": 0.0}
    per_block, held = [], [float(_outside_bytes(job)) if job.samples else 0.0]
    for position, entries in enumerate(job.solver.plan.blocks):
        stored = _parameters(job, position)
        took = {"reading": _FP32 * stored * read}
        if job.samples:
            last = position + 1 == len(job.solver.plan.blocks)
            took |= _block_seconds(job, position, blocks[position], solver, shaping, scale, last)
            held.append(_block_bytes(job, position, blocks[position], solver, scale) + _curvature_bytes(job, entries))
        else:
            took["rounding to nearest"] = sum(m.out_features * m.in_features * rounding[spec] for m, spec in entries)
            held.append(_FP32 * (stored + 4 * max((m.out_features * m.in_features for m, _ in entries), default=0)))
        took["writing"] = sum(m.out_features * m.in_features * write[spec].seconds for m, spec in entries)
        for name, value in took.items():
            stages[name] = stages.get(name, 0.0) + value
        again = took["reading"] + (blocks[position].advance.seconds * job.samples * scale if job.samples else 0.0)
        per_block.append((sum(took.values()), again if job.samples else 0.0))
    if job.samples and any(job.solver.effort.shaped(entries) for entries in job.solver.plan.blocks):
        stages[_GUIDING] = _guiding_seconds(job, blocks, scale, read)
        held.append(_guiding_bytes(job, blocks, positions))
    if job.samples and job.solver.effort.tune:
        stages[_TUNING] = _tuning_seconds(job, blocks, scale)
        held.append(_tuning_bytes(job, blocks, positions))
    for matrix, spec in job.solver.plan.outside:
        count = matrix.out_features * matrix.in_features
        each = _FP32 * read + rounding[spec] + write[spec].seconds
        stages["embedding and head"] = stages.get("embedding and head", 0.0) + count * each
        held.append(count * (_FP32 + write[spec].bytes))
    stages["start"] = time.monotonic() - started
    stages["everything else"] = 2 * read * sum(_FP32 * info.numel for info, _ in job.kept)
    pieces = min(_PIECES, 3 * sum(job.solver.checkpoint.tensors[stored].nbytes for _, stored in job.kept))
    held.append(pieces + max(_writing_bytes(entries, write) for entries in job.solver.plan.blocks))
    peak = max(peak_memory(), base + int(max(held)))
    beside = work_bytes(job, job.solver.plan.blocks) + job.beside
    share = (waited() - began[1]) / (time.monotonic() - began[0])
    return Prediction(stages, per_block, peak, size, beside, share)


def work_bytes(job: Job, unsolved: Iterable[Entries]) -> int:
    """What finished blocks, these among them, and training keep on the disk until the output stands."""
    kept = stored_bytes(unsolved)
    if job.samples:
        kept += sum(_curvature_bytes(job, entries) for entries in unsolved)
    if job.samples and job.solver.effort.tune:
        scales = sum(m.out_features * s.groups(m.in_features) for block in job.solver.plan.blocks for m, s in block)
        # Factors and two moments of each, the old ones until the new ones stand; and windows of text.
        kept += 2 * 3 * _FP32 * scales + _FP32 * (job.tune_tokens + HELD_OUT * job.seqlen)
    return kept


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
    groups = _groups(job, position, block)
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


def _guiding_windows(job: Job) -> int:
    """Windows of this process that are sent back through the model."""
    return job.samples if job.solver.effort.weigh else min(job.samples, job.guiding_samples)


def _guiding_seconds(job: Job, blocks: Sequence[BlockCosts], scale: float, read: float) -> float:
    """Forwards and backwards through all blocks, each read twice, and the moments of outputs."""
    inside = sum(_parameters(job, position) for position in range(len(blocks)))
    config = job.solver.model.config.get_text_config(decoder=True)
    head = config.vocab_size * config.hidden_size / inside
    back = sum(block.back for block in blocks) * scale * (1 + 2 / 3 * head)  # the head is not computed twice
    values = sum(_curvature_bytes(job, entries) for entries in job.solver.plan.blocks) / _FP32
    moments = sum(block.advance.seconds for block in blocks) * scale * values / (2 * inside)
    return float(_guiding_windows(job) * (back + moments) + 2 * read * _FP32 * inside)


def _guiding_bytes(job: Job, blocks: Sequence[BlockCosts], positions: int) -> float:
    """States before all blocks in 16 bits; what is outside of the blocks with a window's logits, or a block at work."""
    config = job.solver.model.config.get_text_config(decoder=True)
    tokens = _guiding_windows(job) * job.seqlen
    kept = 2 * tokens * config.hidden_size * len(blocks)
    if job.solver.device.type != "cpu":
        return float(kept)
    prefix, state = f"{live.blocks(job.solver.model)[0]}.", job.solver.model.state_dict()
    outside = _FP32 * sum(state[name].numel() for name in job.solver.sources if not name.startswith(prefix))
    logits = 3 * _FP32 * job.seqlen * config.vocab_size
    batch = min(job.batch_size, job.samples) * job.seqlen
    inside = [
        _FP32 * _parameters(job, position) + 2 * _curvature_bytes(job, entries) + batch * block.traced / positions
        for position, (block, entries) in enumerate(zip(blocks, job.solver.plan.blocks, strict=True))
    ]
    return float(kept + 2 * _FP32 * tokens * config.hidden_size + _HOLES * max(outside + logits, *inside))


def _curvature_bytes(job: Job, entries: Entries) -> int:
    """Moments of the outputs of a block's matrices."""
    return sum(_FP32 * matrix.out_features**2 for matrix in job.solver.effort.shaped(entries))


def _tuning_seconds(job: Job, blocks: Sequence[BlockCosts], scale: float) -> float:
    """Four passes over the text and what measures it; a head costs as blocks of its size do."""
    config = job.solver.model.config.get_text_config(decoder=True)
    inside = sum(_parameters(job, position) for position in range(len(blocks)))
    window = sum(block.advance.seconds for block in blocks) * scale
    passes = ((4 * job.tune_tokens / job.seqlen, _listed(config.vocab_size)), (8 * HELD_OUT, config.vocab_size))
    return float(window * sum(count * (1 + words * config.hidden_size / inside) for count, words in passes))


def _listed(vocab_size: int) -> int:
    """Words whose logits a step of training computes, at most."""
    return min(vocab_size, SHORTLIST + MICRO)


def _tuning_bytes(job: Job, blocks: Sequence[BlockCosts], positions: int) -> float:
    """Both models, the codes, and of a step logits, their gradient and what a forward pass leaves, or what measures."""
    config = job.solver.model.config.get_text_config(decoder=True)
    inside = sum(_parameters(job, position) for position in range(len(blocks)))
    solved = sum(m.in_features * m.out_features for block in job.solver.plan.blocks for m, _ in block)
    whole = inside + config.vocab_size * config.hidden_size
    step = MICRO * (sum(block.traced for block in blocks) / positions + 3 * _FP32 * _listed(config.vocab_size))
    measuring = 3 * _FP32 * job.seqlen * config.vocab_size
    return float(_FP32 * (whole + solved) + solved + _HOLES * max(step, measuring))


def _block_bytes(
    job: Job, position: int, block: BlockCosts, solver: Mapping[tuple[int, QuantSpec, bool], SolveCosts], scale: float
) -> float:
    """What the stage of a block that holds most holds, with all that is there meanwhile."""
    if job.solver.device.type != "cpu":
        return float(_FP32 * _parameters(job, position))  # the rest is in the device's memory
    batch = min(job.batch_size, job.samples) * scale
    groups = _groups(job, position, block)
    shaped = set(job.solver.effort.shaped(job.solver.plan.blocks[position]))
    moments = [_FP32 * width**2 for width, _ in groups]
    activations = batch * block.advance.bytes
    solving = [
        max(
            solver[_key(members, shaped)].factorize.bytes,
            2 * _FP32 * width**2 + sum(m.out_features for m, _ in members) * solver[_key(members, shaped)].row_bytes,
        )
        for width, members in groups
    ]
    hidden, call = block.held
    if block.walk is None:
        inputs = batch * job.seqlen / scale * _FP32 * sum(width for width, _ in groups)
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
    return most + 2 * call * scale + _FP32 * _parameters(job, position) + codes


def _groups(job: Job, position: int, block: BlockCosts) -> list[tuple[int, list[tuple[Matrix, QuantSpec]]]]:
    """The matrices of a block that share an input, and its width."""
    prefix = f"{live.blocks(job.solver.model)[0]}.{position}"
    there = {place(matrix, prefix): (matrix, spec) for matrix, spec in job.solver.plan.blocks[position]}
    groups = [[there[name] for name in readers] for readers in block.readers]
    return [(members[0][0].in_features, members) for members in groups]


def _tried(job: Job) -> tuple[int, int]:
    """Samples and positions to rehearse with: some hundredths of a second's worth, and a small part of the run."""
    widest = max(_parameters(job, position) for position in range(len(job.solver.plan.blocks)))
    positions = int(min(job.seqlen, max(_FEWEST, 4 * BLOCK_FLOPS / (2 * widest))))
    samples = int(BLOCK_FLOPS / (2 * widest * positions))
    few = int(job.samples * len(job.solver.plan.blocks) * _SHARE)
    return max(1, min(samples, few, job.batch_size, job.samples)), positions


def _most_rows(plan: Plan) -> int:
    return max(matrix.out_features for block in plan.blocks for matrix, _ in block)


def _parameters(job: Job, position: int) -> int:
    """Parameters of a block."""
    return sum(tensor.numel() for tensor in live.blocks(job.solver.model)[1][position].state_dict().values())


def _outside_bytes(job: Job) -> int:
    """Embeddings in fp32, the largest also as it is stored, and the hidden states that come of them."""
    prefix = f"{live.blocks(job.solver.model)[0]}."
    head = live.output_head(job.solver.model)
    state = job.solver.model.state_dict()
    names = [name for name in job.solver.sources if not name.startswith(prefix) and name.rpartition(".")[0] != head]
    cast = [job.solver.checkpoint.tensors[piece.source] for name in names for piece in job.solver.sources[name]]
    stored = max((info.nbytes for info in cast if info.dtype != torch.float32), default=0)
    width = job.solver.model.config.get_text_config(decoder=True).hidden_size
    wide = _FP32 * sum(state[name].numel() for name in names)
    return int(wide + stored + job.samples * job.seqlen * width * _FP32)


def _writing_bytes(entries: Entries, write: Mapping[QuantSpec, Cost]) -> float:
    largest = max((m.out_features * m.in_features * write[spec].bytes for m, spec in entries), default=0.0)
    return stored_bytes([entries]) + largest


def artifact_bytes(
    job: Job, planned: Sequence[TensorInfo], max_shard_size: int, files: Iterable[dict[str, Any]]
) -> int:
    """Bytes of an artifact's files, all but the manifest.

    Args:
        job: what will be done; side files that come out of a GGUF source are not counted.
        planned, max_shard_size: as of :class:`bittern.writer.CheckpointWriter`.
        files: what the configuration files hold.
    """
    beside = sum((job.solver.checkpoint.folder / name).stat().st_size for name in job.solver.checkpoint.side_files())
    configs = sum(len(to_json(value).encode()) for value in files)
    return planned_bytes(planned, max_shard_size, job.packing.metadata) + configs + beside


def gguf_bytes(job: Job) -> int:
    """Bytes of the tensors of a GGUF file; its header, which holds the vocabulary, is not counted."""
    packed = 0
    for name, (rows, columns) in job.solver.plan.shapes.items():
        spec = job.solver.plan.layers[name]
        kind = None if spec is None else kind_for(spec)
        packed += rows * columns // BLOCK * BLOCK_BYTES[kind] if kind else 0
    return packed + sum(info.nbytes if len(info.shape) > 1 else _FP32 * info.numel for info, _ in job.kept)
