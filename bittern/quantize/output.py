"""What a quantization writes: the artifact's tensors from the work folder, its configuration and its manifest."""

from __future__ import annotations

import math
import shutil
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bittern import model as live
from bittern.artifact import Artifact
from bittern.calibration import CalibrationTokens
from bittern.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from bittern.convert.cast import cast_tensors, cast_values, with_dtype
from bittern.formats.packing import Packing
from bittern.origin import source_record
from bittern.quantize.preflight import Job
from bittern.quantize.resume import WorkFolder
from bittern.quantize.solve import Solver
from bittern.quantize.tune import Tuned
from bittern.report import degraded_notes, degraded_reason, make_manifest
from bittern.rope import with_old_rope
from bittern.writer import CheckpointWriter, to_json

_WORTH_TELLING = 0.02  # of the blocks' weights that cannot be packed


def write_kept(
    checkpoint: Checkpoint,
    writer: CheckpointWriter,
    kept: list[tuple[TensorInfo, str]],
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
            writer.write(info.name, cast_values(values, info.dtype, info.name)[0])


def write_layers(
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


def to_gguf(folder: Path, output: Path, overwrite: bool) -> None:
    """The artifact in ``folder`` as a file; the folder goes."""
    from bittern.convert.gguf import write_gguf

    with open_checkpoint(folder) as quantized:
        write_gguf(Artifact(quantized), output, overwrite=overwrite)
    shutil.rmtree(folder)


def describe(
    job: Job,
    options: dict[str, Any],
    tokens: CalibrationTokens | None,
    records: list[dict[str, Any]],
    left_out: list[str],
    seconds: float,
) -> dict[str, Any]:
    """The manifest, but for what only its caller knows."""
    manifest = make_manifest(
        source=source_record(job.solver.checkpoint),
        options=options,
        calibration=_describe_tokens(tokens),
        layers=records,
        kept=job.solver.plan.kept,
        notes=[
            *left_out,
            *(tokens.warnings if tokens else ()),
            *_notes(records, job.solver),
            *degraded_notes(degraded_reason(job.solver.checkpoint.config)),
        ],
        seconds=seconds,
    )
    return manifest | {"stages": _stages(records)}


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


def config_files(checkpoint: Checkpoint, quantization: dict[str, Any], dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """What the configuration files of the artifact hold, by their names."""
    # The writer would put the old words in as well; here they count as bytes that will be written.
    config = {key: value for key, value in with_old_rope(checkpoint.config).items() if key != "torch_dtype"}
    files = {"config.json": {**with_dtype(config, dtype), **quantization}}
    found = quantization["quantization_config"]
    # where GPTQModel and older readers look first
    return files | ({"quantize_config.json": found} if found.get("quant_method") == "gptq" else {})


def finish(
    writer: CheckpointWriter, checkpoint: Checkpoint, files: dict[str, dict[str, Any]], manifest: dict[str, Any]
) -> None:
    """Side files and configuration; with the manifest, the artifact appears."""
    checkpoint.copy_side_files(writer.folder)
    for name, value in files.items():
        if name != "config.json":
            writer.write_file(name, to_json(value))
    writer.commit(files["config.json"], manifest)
