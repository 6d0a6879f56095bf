"""The output of an uptraining: its manifest, its label, and its tensors."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bittern import model as live
from bittern.artifact import Artifact
from bittern.checkpoint import Checkpoint, TensorInfo
from bittern.convert.cast import (
    DTYPES,
    cast_tensors,
    cast_values,
    copied_tensors,
    refuse_values,
    target_dtype,
    with_dtype,
)
from bittern.model import stays_fp32
from bittern.origin import source_record
from bittern.report import base_manifest, degraded_notes, degraded_reason, with_origin
from bittern.schema import carried
from bittern.size import cache_size, planned_size, source_size
from bittern.training.state import read_tensor
from bittern.training.train import Run
from bittern.uptrain.heads import Counts
from bittern.uptrain.student import grouped_config
from bittern.writer import CheckpointWriter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEGRADED = 1.10
"""A result whose perplexity is more than this times the source's is labelled degraded."""


def degraded(perplexity: dict[str, Any], tokens: int) -> str | None:
    """Why a result must be labelled so, in a sentence; None when it need not.

    Args:
        perplexity: ``source``, ``converted`` and ``trained`` (None without training).
        tokens: that it was trained on.
    """
    final = perplexity["trained"] if tokens else perplexity["converted"]
    above = final / perplexity["source"] - 1
    beyond = f"perplexity is {above:.0%} above the source's" if above > DEGRADED - 1 else ""
    untrained = "" if tokens else "not trained after its key-value heads were merged"
    risen = f"training has raised its perplexity from {perplexity['converted']:.6g} to {final:.6g}"
    worsened = risen if final > perplexity["converted"] else ""
    return "; ".join(filter(None, (untrained, worsened, beyond))) or None


def make_manifest(
    story: dict[str, Any],
    checkpoint: Checkpoint,
    counts: Counts,
    kv_heads: int,
    given: dict[str, Any],
    seconds: float,
) -> dict[str, Any]:
    curve = story["curve"]
    perplexity = {**story["perplexity"], "trained": curve[-1]["perplexity"] if curve else None}
    reasons = (degraded_reason(checkpoint.config), degraded(perplexity, given["tokens"]))
    reason = "; ".join(dict.fromkeys(filter(None, reasons))) or None
    origin, left_out = carried(checkpoint)
    length, cache = cache_size(checkpoint.config)
    notes = [*left_out, *story["notes"], *degraded_notes(reason)]
    options = {**given, "text": None if given["text"] is None else str(given["text"])}
    manifest = base_manifest(
        "uptrain",
        source_record(checkpoint),
        {key: value for key, value in options.items() if key != "resume"},
        notes=notes,
        seconds=seconds,
    )
    manifest["measured"]["conversion_seconds"] = round(story["conversion_seconds"], 3)
    manifest |= {
        "heads": {
            "num_attention_heads": counts.query,
            "source_kv_heads": counts.key_value,
            "num_key_value_heads": kv_heads,
            "head_dim": counts.dim,
        },
        "context_length": length,
        "kv_bytes_per_token": {
            "source": cache,
            "output": cache_size(grouped_config(checkpoint.config, kv_heads))[1],
        },
        "calibration": story["calibration"],
        "blocks": story["blocks"],
        "perplexity": perplexity,
        "training": {"tokens": curve[-1]["tokens"], "steps": curve[-1]["step"], "curve": curve} if curve else None,
        "degraded": reason,
    }
    return with_origin(manifest, origin)


def check_dtype(checkpoint: Checkpoint, model: PreTrainedModel, trained: Collection[str], dtype: str) -> None:
    """Refuse a dtype that does not hold what stays as it is; training may take hours.

    Raises:
        BitternError: naming the tensor.
    """
    sources = live.weight_map(model, checkpoint.tensors)
    for _ in cast_tensors(checkpoint, None, copied_tensors(model, checkpoint, sources, trained, DTYPES[dtype])):
        pass


def write_output(
    state: Path,
    checkpoint: Checkpoint,
    run: Run,
    output: Path,
    manifest: dict[str, Any],
    dtype: str | None,
    max_shard_size: int,
    overwrite: bool,
) -> None:
    """The output: what was trained from the state, everything else from the source."""
    sources = live.weight_map(run.teacher, checkpoint.tensors)
    kept = copied_tensors(run.teacher, checkpoint, sources, set(run.parameters), DTYPES[dtype] if dtype else None)
    shapes = {name: tuple(parameter.shape) for name, parameter in run.parameters.items()}
    planned: list[TensorInfo] = []
    moves: list[tuple[str, int, int, TensorInfo]] = []
    for name in run.parameters:
        pieces = sources[name]
        for piece in pieces:
            stored = checkpoint.tensors[piece.source].dtype
            shape = shapes[name] if len(pieces) == 1 else (piece.stop - piece.start, *shapes[name][-1:])
            wanted = target_dtype(stored, DTYPES[dtype] if dtype else None, stays_fp32(run.student, name))
            info = TensorInfo(piece.name, wanted, shape)
            planned.append(info)
            moves.append((name, piece.start, piece.stop, info))
    config = grouped_config(checkpoint.config, manifest["heads"]["num_key_value_heads"])
    if dtype is not None:
        config = with_dtype(config, DTYPES[dtype])
    if manifest["degraded"]:
        config["bittern"] = {"degraded": manifest["degraded"]}
    plan = [info for info, _ in kept] + planned
    manifest["size"] = {"source": source_size(Artifact(checkpoint)), "output": planned_size(plan, plan)}
    with CheckpointWriter(output, plan, max_shard_size=max_shard_size, overwrite=overwrite) as writer:
        for _ in cast_tensors(checkpoint, writer, kept):
            pass
        for name, start, stop, info in moves:
            tensor = read_tensor(state, name)
            if tuple(tensor.shape) != info.shape:
                tensor = tensor.flatten(0, -2)[start:stop]
            values, cast = cast_values(tensor.flatten(), info.dtype, info.name)
            refuse_values(cast, None)
            writer.write(info.name, values.view(info.shape))
        checkpoint.copy_side_files(writer.folder)
        writer.commit(config, manifest)
