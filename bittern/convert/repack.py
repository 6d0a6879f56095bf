"""An artifact in another format, or as floats again: layer by layer, and nothing is quantized anew."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from bittern.artifact import Artifact, without_quantization
from bittern.checkpoint import Checkpoint, CheckpointWriter, TensorInfo, open_checkpoint
from bittern.consumers import asks_dequantize
from bittern.convert.cast import (
    DTYPES,
    cast_tensors,
    cast_values,
    other_matrices,
    refuse_values,
    target_dtype,
    with_dtype,
)
from bittern.errors import BitternError
from bittern.fit import fit
from bittern.formats import gptq, mlx
from bittern.formats.packing import Packing
from bittern.layout import layout_of
from bittern.model import Matrix, Piece, stays_fp32
from bittern.origin import lineage, source_record
from bittern.report import repacked_manifest
from bittern.schema import carried, told_by_gguf
from bittern.size import planned_size, source_size, unchanged_cache
from bittern.ties import refuse_untied, tied_heads
from bittern.weight import QuantSpec
from bittern.writer import MAX_SHARD_SIZE, check_output

OnLayer = Callable[[str, int, int], None]
"""Called after each packed layer with its name, its number from 1, and how many there are."""


@dataclass(frozen=True)
class RepackSummary:
    """What :func:`repack` or :func:`dequantize` did.

    Attributes:
        source: as the caller named it.
        output: the folder that was made.
        found, format: the formats before and after; "safetensors" are floats.
        layers: packed layers that were moved.
        error: the largest change of a weight in steps of its grid; 0 when nothing was rounded.
        max_relative_error: the largest relative change of a float by its cast.
        notes: what a user must be told.
        output_bytes: bytes of all values.
        seconds: wall time.
    """

    source: str
    output: str
    found: str
    format: str
    layers: int
    error: float
    max_relative_error: float
    notes: tuple[str, ...]
    output_bytes: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Everything above, ready for JSON."""
        return asdict(self)


def repack(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    format: str,
    dtype: str | None = None,
    allow_inexact: bool = False,
    target: str | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    overwrite: bool = False,
    revision: str | None = None,
    on_layer: OnLayer | None = None,
) -> RepackSummary:
    """Write the packed checkpoint ``source`` to the folder ``output`` in another format.

    Codes, scales and zeros stay what they are, and so do all tensors that are not packed.

    Args:
        source: a folder, a GGUF file or a Hub id with packed layers.
        output: a folder that does not exist yet, unless ``overwrite``.
        format: one of :data:`bittern.formats.packing.FORMATS`.
        dtype: "bf16", "fp16" or "fp32" for what is not packed, and for the scales of compressed-tensors and
            MLX. By default tensors keep theirs (fp16 out of a GGUF file) and scales are fp16.
        allow_inexact: round what the format cannot hold exactly, and state the error.
        target: the consumer that this is for; transformers wants a key of its own for asymmetric layers.
        max_shard_size: bytes of a shard.
        overwrite: replace the checkpoint that is at ``output``.
        revision: of a Hub id.
        on_layer: see :data:`OnLayer`.

    Raises:
        BitternError: for a source without packed layers, a grid that the format cannot hold exactly
            (without ``allow_inexact``), what :func:`bittern.fit.fit` refuses, or an output that
            may not or cannot be written.
    """
    options = {
        "format": format,
        "dtype": dtype,
        "allow_inexact": allow_inexact,
        "target": target,
        "max_shard_size": max_shard_size,
    }
    started = time.monotonic()
    with open_checkpoint(source, revision) as checkpoint:
        contents = _contents(checkpoint)
        artifact = contents.artifact
        check_output(Path(output), checkpoint.path, overwrite)
        _refuse_embeddings(contents, format)
        floats = _floats(artifact, dtype)
        symmetric = all(layer.spec.sym for layer in artifact.layers.values())
        least = mlx.exact_dtype(symmetric) if format == "mlx" and not allow_inexact else torch.float16
        packing = Packing(
            format,
            torch.float32 if floats == torch.float32 else least,
            exact=not allow_inexact,
            damp_percent=_damp_percent(artifact, contents.origin),
            desc_act=artifact.scheme is not None and artifact.scheme.any_desc_act,
            dequantize=format == "compressed-tensors" and asks_dequantize(target, layout_of(artifact)),
        )
        packed = [
            info
            for name, layer in artifact.layers.items()
            for info in packing.plan(name, layer.out_features, layer.in_features, layer.spec)
        ]
        kept = contents.kept_plan(floats)
        config = packing.config(contents.commonest, contents.grids, contents.others)
        plan = [info for info, _ in kept] + packed
        records = []
        with CheckpointWriter(
            output, plan, max_shard_size=max_shard_size, overwrite=overwrite, metadata=packing.metadata
        ) as writer:
            worst = _copy(checkpoint, writer, kept)
            for number, name in enumerate(artifact.layers, 1):
                weight = artifact.read(name)
                for tensor, values in packing.pack(name, weight).items():
                    writer.write(tensor, values)
                error = mlx.rounding(weight, packing.dtype) if format == "mlx" and allow_inexact else 0.0
                records.append({"layer": name, **asdict(weight.spec), "error": error})
                if on_layer is not None:
                    on_layer(name, number, len(artifact.layers))
            if format in (gptq.V1, gptq.V2):  # where GPTQModel and older readers look first
                writer.write_file("quantize_config.json", json.dumps(config["quantization_config"], indent=2) + "\n")
            summary = contents.summary(output, format, max(each["error"] for each in records), worst, plan, started)
            shapes = {name: (layer.out_features, layer.in_features) for name, layer in artifact.layers.items()}
            size = planned_size(plan, [info for info, _ in kept], shapes, tied_heads(checkpoint))
            manifest = _manifest(contents, options, records, summary, size)
            writer.commit({**_plain_config(checkpoint, floats), **config}, manifest)
    return summary


def dequantize(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    overwrite: bool = False,
    revision: str | None = None,
    on_layer: OnLayer | None = None,
) -> RepackSummary:
    """Write the packed checkpoint ``source`` to the folder ``output`` as a plain one.

    Weights are computed in fp32 and cast; they get the names and the arrangement that the architecture's
    own checkpoints have (fused experts, transposed matrices).

    Args:
        dtype: "bf16", "fp16" or "fp32" of all floats; by default what config.json states.
        source, output, max_shard_size, overwrite, revision, on_layer: as in :func:`repack`.

    Raises:
        BitternError: see :func:`repack`; for values that ``dtype`` cannot hold, and for a bias of a packed layer
            that the model has no place for, unless it is zeros.
    """
    options = {"format": "safetensors", "dtype": dtype, "max_shard_size": max_shard_size}
    started = time.monotonic()
    with open_checkpoint(source, revision) as checkpoint:
        contents = _contents(checkpoint, to_floats=True)
        artifact = contents.artifact
        check_output(Path(output), checkpoint.path, overwrite)
        floats = _floats(artifact, dtype) or _stated_dtype(checkpoint)
        places = contents.places(floats)
        kept = contents.kept_plan(floats)
        plan = [info for info, _ in kept] + list({place.info.name: place.info for place in places.values()}.values())
        records = []
        with CheckpointWriter(output, plan, max_shard_size=max_shard_size, overwrite=overwrite) as writer:
            worst = _copy(checkpoint, writer, kept)
            for number, (name, place) in enumerate(places.items(), 1):
                weight = artifact.read(name)
                values = weight.dequantize()
                values, cast = cast_values((values.T if place.transposed else values).reshape(-1), floats, name)
                refuse_values(cast, None)
                worst = max(worst, cast.max_relative_error)
                writer.write_elements(place.info.name, place.start, values)
                relative_error = cast.max_relative_error
                records.append({"layer": name, **asdict(weight.spec), "max_relative_error": relative_error})
                if on_layer is not None:
                    on_layer(name, number, len(places))
            summary = contents.summary(output, "safetensors", 0.0, worst, plan, started)
            size = planned_size(plan, plan, tied=tied_heads(checkpoint))
            manifest = _manifest(contents, options, records, summary, size)
            writer.commit(_plain_config(checkpoint, floats), manifest)
    return summary


@dataclass(frozen=True)
class _Place:
    """Where a dequantized layer goes: a tensor, from which element, and whether as (in, out)."""

    info: TensorInfo
    start: int
    transposed: bool


def _damp_percent(artifact: Artifact, origin: dict[str, Any] | None) -> float:
    """What layers were damped by, as far as config or manifest say; only GPTQ's configs have a place for it."""
    said = [artifact.found, *(each.get("options") for each in lineage(origin or {}))]
    for options in said:
        found = options.get("damp_percent") if isinstance(options, dict) else None
        if isinstance(found, float) and 0 < found < 1:
            return found
    return Packing.damp_percent


@dataclass(frozen=True)
class _Contents:
    """What a packed checkpoint holds, seen through its architecture.

    Attributes:
        artifact: the packed layers.
        shapes: of the model's parameters.
        sources: see :func:`bittern.model.weight_map`.
        matrices: of the blocks, and a head of its own; parts named as in the checkpoint.
        kept: the tensors that are no part of a packed layer, without zero biases that the model lacks.
        wide: those of the tensors that :func:`bittern.model.stays_fp32`.
        others: matrices among these that are no layers of the blocks, see :func:`bittern.convert.cast.other_matrices`.
        notes: what was left out.
        origin: the source's manifest.
    """

    artifact: Artifact
    shapes: dict[str, tuple[int, ...]]
    sources: dict[str, tuple[Piece, ...]]
    matrices: list[Matrix]
    kept: dict[str, TensorInfo]
    wide: set[str]
    others: list[str]
    notes: list[str]
    origin: dict[str, Any] | None

    @property
    def commonest(self) -> QuantSpec:
        """The grid of most layers."""
        return Counter(layer.spec for layer in self.artifact.layers.values()).most_common(1)[0][0]

    @property
    def grids(self) -> dict[str, QuantSpec | None]:
        """Every matrix by its name in the checkpoint, with its grid or None when it is floats."""
        layers = self.artifact.layers
        names = [part for matrix in self.matrices for part, _, _ in matrix.parts]
        return {name: layers[name].spec if name in layers else None for name in dict.fromkeys([*names, *layers])}

    def kept_plan(self, floats: torch.dtype | None) -> list[tuple[TensorInfo, str]]:
        """What is copied, in which dtype, and its name in the source."""
        return [
            (TensorInfo(name, target_dtype(info.dtype, floats, name in self.wide), info.shape), name)
            for name, info in self.kept.items()
        ]

    def places(self, dtype: torch.dtype) -> dict[str, _Place]:
        """Where the architecture's own checkpoints keep each packed layer."""
        found = {}
        matrix_of = {part: matrix for matrix in self.matrices for part, _, _ in matrix.parts}
        for name, layer in self.artifact.layers.items():
            matrix = matrix_of.get(name)
            transposed = matrix is not None and matrix.transposed
            shape = (layer.out_features, layer.in_features)[:: -1 if transposed else 1]
            tensor, start = f"{name}.weight", 0
            pieces = () if matrix is None else self.sources[matrix.parameter]
            if matrix is not None and matrix.expert is not None and tensor not in (piece.source for piece in pieces):
                if len(pieces) != 1:
                    raise BitternError(
                        f"{name}: {matrix.parameter} is made of {len(pieces)} tensors of several experts"
                    )
                tensor, start, shape = pieces[0].source, matrix.expert * prod(shape), self.shapes[matrix.parameter]
            found[name] = _Place(TensorInfo(tensor, dtype, shape), start, transposed)
        return found

    def summary(
        self,
        output: str | os.PathLike[str],
        format: str,
        error: float,
        worst: float,
        plan: Iterable[TensorInfo],
        started: float,
    ) -> RepackSummary:
        return RepackSummary(
            source=self.artifact.checkpoint.source,
            output=os.fspath(output),
            found=str(self.artifact.format),
            format=format,
            layers=len(self.artifact.layers),
            error=error,
            max_relative_error=worst,
            notes=tuple(self.notes),
            output_bytes=sum(info.nbytes for info in plan),
            seconds=time.monotonic() - started,
        )


def _contents(checkpoint: Checkpoint, to_floats: bool = False) -> _Contents:
    artifact = Artifact(checkpoint)
    if not artifact.layers:
        raise BitternError(f"{checkpoint.source}: expected packed layers, found none; bittern quantize makes them")
    refuse_untied(checkpoint)
    found = fit(artifact)
    expected = found.tensors
    kept, zeros = dict(artifact.plain), []
    for name in [f"{layer}.bias" for layer in artifact.layers]:
        # AutoGPTQ gave every layer a bias; other loaders refuse one that the model has not.
        if name not in kept or name in expected:
            continue
        if not bool(checkpoint.read(name).any()):
            del kept[name]
            zeros.append(name)
        elif to_floats:  # a packed layer takes it, a Linear of the model does not
            kind = found.model.config.model_type
            raise BitternError(f"{name}: expected zeros, for a {kind} model has no place for it, found other values")
    origin, notes = carried(checkpoint)
    return _Contents(
        artifact=artifact,
        shapes={name: tuple(value.shape) for name, value in found.model.state_dict().items()},
        sources=found.sources,
        matrices=found.matrices,
        kept=kept,
        wide={
            piece.source for name, pieces in found.sources.items() if stays_fp32(found.model, name) for piece in pieces
        },
        others=other_matrices(found.model, found.sources, kept.values()),
        notes=[f"{len(zeros)} biases of zeros left out, which the model has no place for"] * bool(zeros) + notes,
        origin=origin,
    )


def _refuse_embeddings(contents: _Contents, format: str) -> None:
    """mlx-lm packs embeddings; elsewhere nothing reads them packed."""
    matrices = {part for matrix in contents.matrices for part, _, _ in matrix.parts}
    other = [name for name in contents.artifact.layers if name not in matrices]
    if other and format != "mlx":
        raise BitternError(
            f"{other[0]}: {format} packs matrices alone, this is none; gguf takes it, safetensors as floats"
        )


def _floats(artifact: Artifact, asked: str | None) -> torch.dtype | None:
    """The dtype of what is not packed, None to keep each tensor's own."""
    if asked is not None:
        if asked not in DTYPES:
            raise BitternError(f"dtype: expected one of {', '.join(DTYPES)}, found {asked}")
        return DTYPES[asked]
    # A GGUF file gives float32 whatever it stores; its scales are fp16, and so are most of its floats.
    return torch.float16 if artifact.format == "gguf" else None


def _stated_dtype(checkpoint: Checkpoint) -> torch.dtype:
    stated = str(checkpoint.config.get("dtype", checkpoint.config.get("torch_dtype")))
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(stated, torch.float16)


def _copy(checkpoint: Checkpoint, writer: CheckpointWriter, kept: list[tuple[TensorInfo, str]]) -> float:
    """Copy side files and what is not packed; the largest relative error of a cast."""
    checkpoint.copy_side_files(writer.folder)
    return max((cast.max_relative_error for cast in cast_tensors(checkpoint, writer, kept)), default=0.0)


def _plain_config(checkpoint: Checkpoint, dtype: torch.dtype | None) -> dict[str, Any]:
    config = without_quantization(checkpoint.config)
    return config if dtype is None else with_dtype(config, dtype)


def _manifest(
    contents: _Contents,
    options: dict[str, Any],
    records: list[dict[str, Any]],
    summary: RepackSummary,
    size: dict[str, Any],
) -> dict[str, Any]:
    checkpoint = contents.artifact.checkpoint
    source = source_record(checkpoint, format=summary.found)
    made = repacked_manifest(
        contents.origin, source, options, repacked=records, notes=list(summary.notes), seconds=summary.seconds
    )
    made |= {"size": {"source": source_size(contents.artifact), "output": size}} | unchanged_cache(checkpoint.config)
    return made | told_by_gguf(checkpoint)
