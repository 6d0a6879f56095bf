"""What a quantization writes: the artifact's tensors from the work folder, its configuration and its manifest."""

from __future__ import annotations

import math
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bittern import model as live
from bittern.artifact import Artifact
from bittern.calibration import CalibrationTokens
from bittern.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from bittern.convert.cast import cast_tensors, cast_values, other_matrices, with_dtype
from bittern.formats.gguf import BLOCK, BLOCK_BYTES, kind_for
from bittern.formats.packing import Packing
from bittern.origin import source_record
from bittern.processes import world
from bittern.quantize.job import Job
from bittern.quantize.outside import write_outside
from bittern.quantize.resume import WorkFolder
from bittern.quantize.solve import Solver
from bittern.quantize.tune import Tuned
from bittern.report import degraded_notes, degraded_reason, make_manifest, with_origin
from bittern.rope import with_old_rope
from bittern.schema import carried
from bittern.size import planned_size, source_size, unchanged_cache
from bittern.weight import QuantSpec
from bittern.writer import CheckpointWriter, planned_bytes, to_json

_WORTH_TELLING = 0.02  # of the blocks' weights that cannot be packed


@dataclass(frozen=True)
class Order:
    """An artifact that is to be made; all about it is settled.

    Attributes:
        job: what solves it, how layers are packed, what is cast only.
        format: its own. Layers of a GGUF file are packed as ``job.packing`` says first.
        output: the folder, or the GGUF file, that appears when it is whole.
        planned: the tensors that are written.
        files: what its configuration files hold, by their names.
        max_shard_size: bytes.
        overwrite: replace what is at ``output``.
        tokens: to calibrate on; None without.
        options: of the run, as the manifest tells them.
        mixed: of an average of bits, see :func:`bittern.quantize.mixed.measure_and_mix`.
    """

    job: Job
    format: str
    output: Path
    planned: Sequence[TensorInfo]
    files: Mapping[str, dict[str, Any]]
    max_shard_size: int
    overwrite: bool
    tokens: CalibrationTokens | None
    options: dict[str, Any]
    mixed: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """Where tensors are written; a GGUF file is made of what lies there, beside it."""
        if self.format != "gguf":
            return self.output
        return self.output.with_name(f".{self.output.name}.quantized")

    @property
    def nbytes(self) -> int:
        """Of the artifact, all but the manifest."""
        if self.format == "gguf":
            return _gguf_bytes(self.job)
        return _folder_bytes(self)


def write_artifact(
    order: Order,
    work: WorkFolder,
    tuned: Tuned | None,
    on_progress: Callable[[dict[str, Any]], None] | None,
    **told: Any,
) -> dict[str, Any]:
    """Write what was solved and trained; when all is there, the artifact appears.

    Args:
        order: what is written.
        work: holds every block.
        tuned: what training has made of scales and norms.
        on_progress: called with the records of layers outside of the blocks.
        told: for the manifest, see :func:`_describe`.

    Returns:
        The manifest.
    """
    solver, packing = order.job.solver, order.job.packing
    blocks = len(solver.plan.blocks)
    changed = {
        piece.name: values[piece.start : piece.stop]
        for position in range(blocks)
        for name, values in work.changed(position).items()
        for piece in solver.sources[name]
    }
    with CheckpointWriter(
        order.folder,
        order.planned,
        max_shard_size=order.max_shard_size,
        overwrite=order.overwrite or order.format == "gguf",
        metadata=packing.metadata,
    ) as writer:
        _write_kept(solver.checkpoint, writer, order.job.kept, changed, tuned)
        records = _write_layers(work, blocks, writer, packing, tuned)
        records += write_outside(solver.checkpoint, solver.sources, solver.plan, writer, packing, on_progress)
        manifest = _describe(order, records, {*changed}, tuned, **told)
        _finish(writer, solver.checkpoint, order.files, manifest)
    if order.format == "gguf":
        _to_gguf(order.folder, order.output, order.overwrite)
    return manifest


def _write_kept(
    checkpoint: Checkpoint,
    writer: CheckpointWriter,
    kept: Sequence[tuple[TensorInfo, str]],
    changed: dict[str, Tensor],
    tuned: Tuned | None,
) -> None:
    """What is not quantized: as it was, but for what was balanced or trained."""
    trained = tuned.norms if tuned is not None else ()
    others = {*changed, *trained}
    for _ in cast_tensors(checkpoint, writer, [entry for entry in kept if entry[0].name not in others]):
        pass
    for info, stored in kept:
        if info.name in others:
            values = changed.get(info.name)
            values = checkpoint.read(stored).float() if values is None else values
            if tuned is not None and info.name in trained:
                values = tuned.norm(info.name, values)
            writer.write(info.name, cast_values(values.flatten(), info.dtype, info.name)[0].view(info.shape))


def _write_layers(
    work: WorkFolder, blocks: int, writer: CheckpointWriter, packing: Packing, tuned: Tuned | None
) -> list[dict[str, Any]]:
    """Every layer from the work folder into the artifact, a block in memory at a time; their records."""
    records = []
    for position in range(blocks):
        for record, solved in work.load(position):
            weight = solved if tuned is None else tuned.layer(record["layer"], solved)
            for name, tensor in packing.pack(record["layer"], weight).items():
                writer.write(name, tensor)
            records.append(record)
    return records


def _to_gguf(folder: Path, output: Path, overwrite: bool) -> None:
    """The artifact in ``folder`` as a file; the folder goes."""
    from bittern.convert.gguf import write_gguf

    with open_checkpoint(folder) as quantized:
        write_gguf(Artifact(quantized), output, overwrite=overwrite)
    shutil.rmtree(folder)


def _describe(
    order: Order,
    records: list[dict[str, Any]],
    changed: set[str],
    tuned: Tuned | None,
    *,
    began: float,
    resumed: int,
    prediction: dict[str, Any] | None,
    notes: Sequence[str],
) -> dict[str, Any]:
    """The manifest.

    Args:
        order: what was done.
        records: of the layers.
        changed: tensors that are not packed and were balanced.
        tuned: what was trained.
        began: when the run did, by :func:`time.monotonic`; time that was not spent on it is taken out.
        resumed: blocks that an earlier process had finished.
        prediction: what the run was expected to take.
        notes: what a user should know of the text that was trained on.
    """
    solver, tokens = order.job.solver, order.tokens
    origin, left_out = carried(solver.checkpoint)
    manifest = make_manifest(
        source=source_record(solver.checkpoint),
        options=order.options,
        calibration=_describe_tokens(tokens),
        layers=records,
        kept=solver.plan.kept,
        notes=[
            *left_out,
            *notes,
            *(tuned.notes if tuned else ()),
            *(tokens.warnings if tokens else ()),
            *_notes(records, solver),
            *degraded_notes(degraded_reason(solver.checkpoint.config)),
        ],
        seconds=time.monotonic() - began,
    )
    manifest["stages"] = _stages(records)
    floats = [info for info, _ in order.job.kept]
    size = planned_size(order.planned, floats, solver.plan.shapes)
    manifest["size"] = {"source": source_size(Artifact(solver.checkpoint)), "output": size}
    manifest |= unchanged_cache(solver.checkpoint.config)
    manifest["prediction"] = prediction
    if tuned is not None:
        manifest["tuning"] = tuned.record
        changed = changed | set(tuned.norms)
    if changed:
        manifest["changed"] = sorted(changed)
    manifest["measured"]["processes"] = world()[1]
    manifest["measured"] |= order.mixed.get("measured", {})
    if resumed:
        manifest["measured"]["resumed_blocks"] = resumed
    manifest |= {key: value for key, value in order.mixed.items() if key != "measured"}
    return with_origin(manifest, origin)


def _stages(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What every stage of the effort has left of what it lessens: layers, and the geometric mean over them."""
    shares: dict[str, list[float]] = {}
    for record in records:
        for stage, share in record["left"].items():
            shares.setdefault(stage, []).append(share)
    return {
        stage: {"layers": len(found), "left": math.exp(statistics.fmean(math.log(max(share, 1e-9)) for share in found))}
        for stage, found in shares.items()
    }


def _notes(records: list[dict[str, Any]], solver: Solver) -> list[str]:
    """What a user must be told of the layers, in a sentence each."""
    notes, plan = _unpacked(solver), solver.plan
    fallbacks = [record for record in records if record["fallback"]]
    if fallbacks:
        example = f"{fallbacks[0]['layer']}: {fallbacks[0]['fallback']}"
        notes.append(f"{len(fallbacks)} of {len(records)} layers needed a fallback ({example})")
    unasked = {name: why for name, why in plan.kept.items() if not why.startswith("--skip")}
    if unasked:
        name, why = next(iter(unasked.items()))
        notes.append(f"{len(unasked)} layers are not packed ({name}: {why})")
    return notes


def _unpacked(solver: Solver) -> list[str]:
    """A sentence where a good part of the blocks is in no linear layer, as the experts of some architectures are."""
    prefix, _ = live.blocks(solver.model)
    planned = {matrix.parameter for block in solver.plan.blocks for matrix, _ in block}
    weights, other = 0, dict[str, int]()
    for name, tensor in solver.model.state_dict().items():
        if name.startswith(f"{prefix}.") and tensor.ndim > 1 and name in solver.sources:
            weights += tensor.numel()
            layers = {piece.name.removesuffix(".weight") for piece in solver.sources[name]}
            if name not in planned and not layers & set(solver.plan.kept):
                other[name] = tensor.numel()
    share = sum(other.values()) / max(weights, 1)
    if share < _WORTH_TELLING:
        return []
    example = max(other, key=lambda name: other[name])
    return [f"{share:.0%} of the blocks' weights are in no linear layer and stay in 16 bits (such as {example})"]


def _describe_tokens(tokens: CalibrationTokens | None) -> dict[str, Any] | None:
    if tokens is None:
        return None
    return {key: value for key, value in asdict(tokens).items() if key not in ("ids", "warnings")}


def config_files(job: Job, grid: QuantSpec, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """What the configuration files of the artifact hold, by their names.

    Args:
        job: what is done.
        grid: of most layers.
        dtype: of what is not quantized.
    """
    solver, checkpoint = job.solver, job.solver.checkpoint
    head = solver.sources.get(f"{live.output_head(solver.model)}.weight", ())
    layers = {piece.name.removesuffix(".weight"): None for piece in head} | solver.plan.layers
    others = other_matrices(solver.model, solver.sources, (info for info, _ in job.kept))
    quantization = job.packing.config(grid, layers, others)
    # The writer would put the old words in as well; here they count as bytes that will be written.
    config = {key: value for key, value in with_old_rope(checkpoint.config).items() if key != "torch_dtype"}
    files = {"config.json": {**with_dtype(config, dtype), **quantization}}
    found = quantization["quantization_config"]
    # where GPTQModel and older readers look first
    return files | ({"quantize_config.json": found} if found.get("quant_method") == "gptq" else {})


def _finish(
    writer: CheckpointWriter, checkpoint: Checkpoint, files: Mapping[str, dict[str, Any]], manifest: dict[str, Any]
) -> None:
    """Side files and configuration; with the manifest, the artifact appears."""
    checkpoint.copy_side_files(writer.folder)
    for name, value in files.items():
        if name != "config.json":
            writer.write_file(name, to_json(value))
    writer.commit(files["config.json"], manifest)


def _folder_bytes(order: Order) -> int:
    """Bytes of an artifact's files, all but the manifest; side files that come out of a GGUF source are not counted."""
    checkpoint = order.job.solver.checkpoint
    beside = sum((checkpoint.folder / name).stat().st_size for name in checkpoint.side_files())
    configs = sum(len(to_json(value).encode()) for value in order.files.values())
    return planned_bytes(order.planned, order.max_shard_size, order.job.packing.metadata) + configs + beside


def _gguf_bytes(job: Job) -> int:
    """Bytes of the tensors of a GGUF file; its header, which holds the vocabulary, is not counted."""
    packed = 0
    for name, (rows, columns) in job.solver.plan.shapes.items():
        spec = job.solver.plan.layers[name]
        kind = None if spec is None else kind_for(spec)
        packed += rows * columns // BLOCK * BLOCK_BYTES[kind] if kind else 0
    vectors = sum(torch.float32.itemsize * info.numel for info, _ in job.kept if len(info.shape) < 2)
    return packed + vectors + sum(info.nbytes for info, _ in job.kept if len(info.shape) > 1)
