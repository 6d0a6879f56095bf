"""What a quantization will take, before it is begun: seconds, memory, disk, and the bytes of what it makes.

Bytes follow from the plan. Seconds and memory are counts of pieces times what a piece takes, which
:mod:`bittern.quantize.rehearsal` finds out on this machine. A stage of the solver is one line in
:func:`_block_seconds` and, where it holds more than the others, one in :func:`_block_bytes`.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
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
    Cost,
    SolveCosts,
    measured,
    place,
    rehearse_blocks,
    rehearse_shaping,
    rehearse_solver,
    seconds,
)
from bittern.quantize.resume import stored_bytes
from bittern.quantize.solve import Solver
from bittern.quantize.tune import HELD_OUT, MICRO
from bittern.report import peak_memory
from bittern.weight import QuantSpec, round_to_nearest
from bittern.writer import planned_bytes, to_json

Entries = Sequence[tuple[Matrix, QuantSpec]]
"""The matrices of a block that are quantized, and their grids."""

ERRORS = {"seconds": 0.25, "peak_memory_bytes": 0.15, "bytes": 0.01}
"""How far off a prediction may be on the machine that it was made on, as shares."""

_FP32 = 4
_PIECES = 48 * 2**20  # that casting keeps in memory of however large a model
_SAMPLE_BYTES = 4 * 2**20
_TRIED = torch.Size((128, 1024))  # weights that are rounded and packed to try; every group size divides its columns
_HOLES = 1.3  # times what a step of training makes is what the heap takes for it: measured on two models
_GUIDING = 2.5  # forward passes that one with its way back takes, where no gradient of weights is wanted
_FEWEST, _SHARE = 32, 1 / 60  # positions, and share of the run's samples, that are tried with


@dataclass(frozen=True)
class Job:
    """All that a quantization's cost depends on.

    Attributes:
        solver: what solves it: model, plan, stages, device.
        packing: how layers are written.
        kept: name, dtype and shape of each tensor that is cast only, and its name in the checkpoint.
        samples, seqlen, batch_size: calibration windows, their tokens, how many run together; no samples
            mean rounding to nearest.
        tune_tokens: that scales and norms are trained on, where they are.
        beside: bytes of an artifact that only is on the way, which a GGUF file is made of.
    """

    solver: Solver
    packing: Packing
    kept: Sequence[tuple[TensorInfo, str]]
    samples: int
    seqlen: int
    batch_size: int
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
    """

    stages: dict[str, float]
    block_seconds: list[tuple[float, float]]
    peak_memory_bytes: int
    bytes: int
    work_bytes: int

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
        """What a dry run tells: ``prediction``, how far off each figure may be, seconds of every stage, disk space."""
        return {
            "prediction": self.figures,
            "errors": ERRORS,
            "stages": {name: round(value, 6) for name, value in self.stages.items()},
            "work_bytes": self.work_bytes,
            "disk_bytes": self.bytes + self.work_bytes,
        }

    def left(self, finished: Collection[int]) -> float:
        """Seconds of a run that finds these blocks finished."""
        last = max((p for p in range(len(self.block_seconds)) if p not in finished), default=-1)
        spared = sum(
            solve - (run if position < last else 0.0)
            for position, (solve, run) in enumerate(self.block_seconds)
            if position in finished
        )
        return self.seconds - spared


def predict(job: Job, size: int, started: float) -> Prediction:
    """What a run will take.

    Args:
        job: the run.
        size: bytes of what it makes.
        started: when it began, by ``time.monotonic``; what was done since counts, finding out all this too.
    """
    grids = {(matrix.in_features, spec) for block in job.solver.plan.blocks for matrix, spec in block}
    specs = {spec for _, spec in (*grids, *job.solver.plan.outside)}
    read, write = _read_rate(job), {spec: _write_rate(job.packing, spec) for spec in specs}
    rounded = {spec for _, spec in job.solver.plan.outside} if job.samples else specs
    rounding = {spec: _rounding_rate(spec) for spec in rounded}
    blocks: Sequence[BlockCosts] = ()
    if job.samples:
        samples, positions = _tried(job)
        scale = job.seqlen / positions
        if job.exact_samples:
            heap.for_holding()
        own = job.solver
        blocks = rehearse_blocks(own.model, own.sources, own.plan, own.device, samples, positions, own.effort)
        if job.exact_samples:
            heap.for_solving()
        rehearsed = partial(rehearse_solver, rows=_most_rows(own.plan), damp_percent=own.damp_percent)
        solver = {grid: rehearsed(*grid, device=own.device, effort=own.effort) for grid in grids}
        shaping = {
            matrix.out_features: rehearse_shaping(matrix.out_features, spec, own.damp_percent, own.device)
            for matrix, spec in {m.out_features: (m, s) for block in own.plan.blocks for m, s in block}.values()
            if own.effort.guide
        }
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
            held.append(
                _block_bytes(job, position, blocks[position], solver, scale) + _curvature_bytes(job, blocks, position)
            )
        else:
            took["rounding to nearest"] = sum(m.out_features * m.in_features * rounding[spec] for m, spec in entries)
            held.append(_FP32 * (stored + 4 * max((m.out_features * m.in_features for m, _ in entries), default=0)))
        took["writing"] = sum(m.out_features * m.in_features * write[spec].seconds for m, spec in entries)
        for name, value in took.items():
            stages[name] = stages.get(name, 0.0) + value
        again = took["reading"] + (blocks[position].advance.seconds * job.samples * scale if job.samples else 0.0)
        per_block.append((sum(took.values()), again if job.samples else 0.0))
    if job.solver.effort.guide and any(block.walk is not None for block in blocks):
        stages["what tokens and outputs count"] = _guiding_seconds(job, blocks, scale)
        held.append(_guiding_bytes(job, blocks, positions))
    if job.samples and job.solver.effort.tune:
        stages["training of scales and norms"] = _tuning_seconds(job, blocks, scale)
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
    return Prediction(stages, per_block, peak, size, work_bytes(job, job.solver.plan.blocks) + job.beside)


def work_bytes(job: Job, unsolved: Iterable[Entries]) -> int:
    """What finished blocks, these among them, and training keep on the disk until the output stands."""
    kept = stored_bytes(unsolved)
    if job.samples and job.solver.effort.tune:
        scales = sum(m.out_features * s.groups(m.in_features) for block in job.solver.plan.blocks for m, s in block)
        # Factors and two moments of each, the old ones until the new ones stand; and windows of text.
        kept += 2 * 3 * _FP32 * scales + _FP32 * (job.tune_tokens + HELD_OUT * job.seqlen)
    return kept


def _block_seconds(
    job: Job,
    position: int,
    block: BlockCosts,
    solver: Mapping[tuple[int, QuantSpec], SolveCosts],
    shaping: Mapping[int, float],
    scale: float,
    last: bool,
) -> dict[str, float]:
    """Seconds of every stage of one block: one line a stage."""
    groups = _groups(job, position, block)
    solves = [
        solver[width, spec].solve(sum(m.out_features for m, s in members if s == spec))
        for width, members in groups
        for spec in dict.fromkeys(spec for _, spec in members)
    ]
    forward = block.advance.seconds * scale
    costs = {
        "factorizing": sum(solver[width, members[0][1]].factorize.seconds for width, members in groups),
        "grids and codes": sum(solves),
    }
    if block.walk is None:
        return {
            "forward passes, second moments": block.gather.fixed + block.gather.each * job.samples * scale,
            **costs,
            "forward passes, quantized": 0.0 if last else forward * job.samples,
        }
    matrices = [matrix for _, members in groups for matrix, _ in members]
    held_out = job.exact_samples - learned_from(job.exact_samples)
    return {
        "forward passes, second moments": block.walk.samples(job.samples * scale),
        # Of what is held out, two products with all matrices.
        "full precision": block.walk.exact * job.exact_samples * scale + 2 * forward * held_out,
        "balancing": block.walk.balance,
        **costs,
        **({"shaping": sum(shaping[m.out_features] * m.in_features for m in matrices)} if shaping else {}),
    }


def _guiding_seconds(job: Job, blocks: Sequence[BlockCosts], scale: float) -> float:
    """A forward and a backward pass of the whole model over every window, and the moments of all outputs."""
    inside = sum(_parameters(job, position) for position in range(len(blocks)))
    forward = sum(block.advance.seconds for block in blocks) * scale
    moments = forward * _curvature_bytes(job, blocks) / _FP32 / (2 * inside)
    return job.samples * (_GUIDING * _window_seconds(job, blocks, scale) + moments)


def _guiding_bytes(job: Job, blocks: Sequence[BlockCosts], positions: int) -> float:
    """The model, the moments of all outputs, and of a batch what a forward pass leaves, and its logits' gradient."""
    config = job.solver.model.config.get_text_config(decoder=True)
    whole = sum(_parameters(job, position) for position in range(len(blocks))) + config.vocab_size * config.hidden_size
    batch = min(job.batch_size, job.samples) * job.seqlen
    step = batch * (sum(block.traced for block in blocks) / positions + 3 * _FP32 * config.vocab_size)
    return float(_FP32 * whole + _curvature_bytes(job, blocks) + _HOLES * step)


def _curvature_bytes(job: Job, blocks: Sequence[BlockCosts], first: int = 0) -> float:
    """Moments of the outputs of all matrices from a block on."""
    if not job.solver.effort.guide:
        return 0.0
    pairs = list(zip(blocks, job.solver.plan.blocks, strict=True))[first:]
    return float(sum(_FP32 * m.out_features**2 for block, each in pairs if block.walk is not None for m, _ in each))


def _tuning_seconds(job: Job, blocks: Sequence[BlockCosts], scale: float) -> float:
    """Four passes over the text and what measures it."""
    return _window_seconds(job, blocks, scale) * (4 * job.tune_tokens / job.seqlen + 8 * HELD_OUT)


def _window_seconds(job: Job, blocks: Sequence[BlockCosts], scale: float) -> float:
    """A forward pass of the whole model over a window; a head costs as blocks of its size do."""
    inside = sum(_parameters(job, position) for position in range(len(blocks)))
    config = job.solver.model.config.get_text_config(decoder=True)
    head = config.vocab_size * config.hidden_size / inside
    return float(sum(block.advance.seconds for block in blocks) * scale * (1 + head))


def _tuning_bytes(job: Job, blocks: Sequence[BlockCosts], positions: int) -> float:
    """Both models, the codes, and of a step the logits, their gradient, and what a forward pass leaves for its own."""
    config = job.solver.model.config.get_text_config(decoder=True)
    inside = sum(_parameters(job, position) for position in range(len(blocks)))
    solved = sum(m.in_features * m.out_features for block in job.solver.plan.blocks for m, _ in block)
    whole = inside + config.vocab_size * config.hidden_size
    step = MICRO * (sum(block.traced for block in blocks) / positions + 3 * _FP32 * config.vocab_size)
    return float(_FP32 * (whole + solved) + solved + _HOLES * step)


def _block_bytes(
    job: Job, position: int, block: BlockCosts, solver: Mapping[tuple[int, QuantSpec], SolveCosts], scale: float
) -> float:
    """What the stage of a block that holds most holds, with all that is there meanwhile."""
    if job.solver.device.type != "cpu":
        return float(_FP32 * _parameters(job, position))  # the rest is in the device's memory
    batch = min(job.batch_size, job.samples) * scale
    groups = _groups(job, position, block)
    moments = [_FP32 * width**2 for width, _ in groups]
    activations = batch * block.advance.bytes
    solving = [
        max(
            solver[width, members[0][1]].factorize.bytes,
            2 * _FP32 * width**2 + sum(m.out_features for m, _ in members) * solver[width, members[0][1]].row_bytes,
        )
        for width, members in groups
    ]
    hidden, call = block.held
    if block.walk is None:
        inputs = batch * job.seqlen / scale * _FP32 * sum(width for width, _ in groups)
        most = job.samples * hidden * scale + max(
            activations + sum(moments) + inputs,  # gathering
            2 * sum(moments) + 2 * max(moments, default=0),  # their mean
            sum(moments) + max(solving, default=0),
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


def _read_rate(job: Job) -> float:
    """Seconds for a byte of a weight that is read and made fp32."""
    state = job.solver.model.state_dict()
    sizes = {name: _FP32 * state[name].numel() for name in job.solver.sources}
    fitting = [name for name, size in sizes.items() if size <= _SAMPLE_BYTES] or [min(sizes, key=lambda n: sizes[n])]
    name = max(fitting, key=lambda n: sizes[n])
    shape = tuple(state[name].shape)
    took = seconds(lambda: live.read_tensor(job.solver.checkpoint, job.solver.sources[name], shape, torch.float32))
    return took / float(sizes[name])


def _write_rate(packing: Packing, spec: QuantSpec) -> Cost:
    """What keeping a weight in the work folder and packing it from there take, but for the disk."""
    weight = round_to_nearest(torch.linspace(-1, 1, _TRIED.numel()).view(_TRIED), spec)
    packed = measured(lambda: packing.pack("", weight))
    stored = sum(tensor.nbytes for tensor in packing.pack("", weight).values())
    values = bytes(_SAMPLE_BYTES)
    hashed = seconds(lambda: hashlib.sha256(values)) / _SAMPLE_BYTES
    each = packed.times(1 / _TRIED.numel())
    return Cost(each.seconds + hashed * stored / _TRIED.numel() + 2 * hashed, each.bytes)


def _rounding_rate(spec: QuantSpec) -> float:
    """Seconds for a weight that is rounded to nearest."""
    weight = torch.linspace(-1, 1, _TRIED.numel()).view(_TRIED)
    return seconds(lambda: round_to_nearest(weight, spec)) / float(_TRIED.numel())


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


def resident_memory() -> int:
    """What of this process is in memory now, in bytes; where the system does not say, the most that ever was."""
    if sys.platform != "linux":
        return peak_memory()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
