"""The whole job: a checkpoint in, a quantized artifact out."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bittern import model as live
from bittern.artifact import Artifact
from bittern.checkpoint import Checkpoint, open_checkpoint
from bittern.consumers import asks_dequantize, cannot_hold, check_target, choose_format
from bittern.convert.cast import DTYPES, cast_tensors, copied_tensors, refuse_quantized
from bittern.convert.pipeline import FORMATS as CONVERT_FORMATS
from bittern.errors import BitternError
from bittern.formats.gptq import V1, V2
from bittern.formats.packing import Packing, check_name, is_gguf
from bittern.layout import planned_layout
from bittern.model import Piece
from bittern.origin import source_record
from bittern.quantize.calibration import CalibrationTokens, load_tokens
from bittern.quantize.mixed import PlanOf, alternating, check_average, free_matrices, mix
from bittern.quantize.plan import Plan, make_plan
from bittern.quantize.sensitivity import BITS, TOKENS, Sensitivity
from bittern.quantize.solve import Solver
from bittern.report import degraded_notes, degraded_reason, make_manifest, with_origin
from bittern.schema import carried
from bittern.size import planned_size, source_size, unchanged_cache
from bittern.tokenizer import context_length
from bittern.weight import QuantSpec
from bittern.writer import MAX_SHARD_SIZE, CheckpointWriter, check_output

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMATS = CONVERT_FORMATS[1:]  # all but plain floats
DEFAULT_DATASET = "allenai/c4:en"
_NO_OPTIONS = ("source", "output", "on_progress", "on_measured")  # arguments that the manifest does not list


def quantize(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    bits: int | float = 4,
    group_size: int | str = 128,
    sym: bool = True,
    method: str = "gptq",
    format: str | None = None,
    target: str | None = None,
    dataset: str = DEFAULT_DATASET,
    nsamples: int = 128,
    seqlen: int = 512,
    seed: int = 0,
    damp_percent: float = 0.01,
    layers: Sequence[tuple[str, int]] = (),
    skip: Sequence[str] = (),
    dtype: str | None = None,
    device: str = "auto",
    batch_size: int = 8,
    chat_template: bool = False,
    max_shard_size: int = MAX_SHARD_SIZE,
    overwrite: bool = False,
    revision: str | None = None,
    on_progress: Callable[[dict[str, Any]], None] | None = None,
    on_measured: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Quantize a checkpoint and write it in the format that its consumers read.

    Args:
        source: a folder, a GGUF file or a Hub id.
        output: the folder to write, for "gguf" a file; it appears when it is whole.
        bits: 8, 4, 3 or 2; or a float, the average that layers of these bits shall have, each as many as it needs
            (see :mod:`bittern.quantize.mixed`): 2.5, and 3.0 is an average too.
        group_size: input columns that share a scale; -1 the whole row, ``auto`` the largest of 128, 64
            and 32 that divides every layer.
        sym: zeros in the middle of the grid (scales are signed), or searched.
        method: ``gptq``, or ``rtn`` (round to nearest, no calibration).
        format: one of :data:`bittern.convert.pipeline.FORMATS` but safetensors. By default "gguf" when ``output``
            ends in .gguf, else "gptq", and "gptq_v2" for asymmetric grids.
        target: the consumer that it is for (see :data:`bittern.consumers.TARGETS`); picks the format when
            none is given, and refuses what that consumer does not load or gets wrong.
        dataset, nsamples, seqlen, seed, chat_template: see :func:`~bittern.quantize.calibration.load_tokens`.
        damp_percent: damping of the Hessian as a share of its mean diagonal, in (0, 1).
        layers: (regular expression, bits) for layers of other bits.
        skip: regular expressions of layers to leave in 16 bits.
        dtype: ``bf16``, ``fp16`` or ``fp32`` for what is not quantized. By default the source's, and
            fp16 for an fp32 source.
        device: ``cpu``, ``cuda`` or ``auto``.
        batch_size: calibration samples run together.
        max_shard_size: bytes.
        overwrite: replace an artifact at ``output``.
        revision: of a Hub id.
        on_progress: called with each layer's record, with ``index`` and ``total``.
        on_measured: where an average is asked for, called with the blocks whose sensitivity is known and their number.

    Returns:
        The manifest, which the artifact also holds.

    Raises:
        BitternError: for anything that a user can mend, before hours are spent wherever it can be known.
    """
    options = {key: value for key, value in locals().items() if key not in _NO_OPTIONS}
    started = time.monotonic()
    _check_options(bits, method, damp_percent, dtype, batch_size)
    place = live.pick_device(device)
    with open_checkpoint(source, revision) as checkpoint:
        refuse_quantized(checkpoint)
        check_output(Path(output), checkpoint.path, overwrite)
        model = live.build(checkpoint.config)
        sources = live.weight_map(model, checkpoint.tensors)
        prefix, blocks = live.blocks(model)
        matrices = [live.matrices(model, f"{prefix}.{position}", sources) for position in range(len(blocks))]
        plan_of = partial(make_plan, matrices, group_size=group_size, sym=sym, layer_bits=layers, skip=skip)
        if isinstance(bits, float):
            check_average(plan_of, bits)
        plan = plan_of(alternating(matrices) if isinstance(bits, float) else bits)
        wanted = "gguf" if format is None and target is None and is_gguf(output) else format
        chosen, packing = _choose_packing(checkpoint, model, plan, wanted, target, damp_percent)
        check_name(output, chosen)
        folder = Path(output)
        if chosen == "gguf":
            from bittern.convert.gguf import check_gguf

            check_gguf(checkpoint, plan.layers, Path(output), overwrite)
            folder = Path(output).with_name(f".{Path(output).name}.quantized")
        kept_dtype = _kept_dtype(checkpoint, dtype)
        solved = {matrix.parameter for block in plan.blocks for matrix, _ in block}
        kept = copied_tensors(model, checkpoint, sources, solved, kept_dtype)
        tokens = None
        if method == "gptq":
            tokens = _calibration(checkpoint, model, dataset, nsamples, seqlen, seed, chat_template)
        batches = [] if tokens is None else list(torch.split(tokens.ids, batch_size))
        mixed: dict[str, Any] = {}
        if isinstance(bits, float) and tokens is not None:
            meter = Sensitivity(model, checkpoint, sources, [], damp_percent, place, seed)
            plan, mixed = _mix(plan_of, meter, tokens.ids, bits, on_measured)
            chosen, packing = _choose_packing(checkpoint, model, plan, chosen, target, damp_percent)
        solver = Solver(model, checkpoint, sources, plan, damp_percent, place)
        planned = [info for info, _ in kept] + plan.packed_tensors(packing)
        origin, left_out = carried(checkpoint)
        output_size = planned_size(planned, [info for info, _ in kept], plan.shapes)
        about = {"size": {"source": source_size(Artifact(checkpoint)), "output": output_size}}
        about |= unchanged_cache(checkpoint.config)
        with CheckpointWriter(
            folder,
            planned,
            max_shard_size=max_shard_size,
            overwrite=overwrite or chosen == "gguf",
            metadata=packing.metadata,
        ) as writer:
            for _ in cast_tensors(checkpoint, writer, kept):
                pass
            records = _solve_and_write(solver, batches, writer, packing, on_progress)
            manifest = make_manifest(
                source=source_record(checkpoint),
                options=options,
                calibration=_describe_tokens(tokens),
                layers=records,
                kept=plan.kept,
                notes=[
                    *left_out,
                    *(tokens.warnings if tokens else ()),
                    *_notes(records, plan),
                    *degraded_notes(degraded_reason(checkpoint.config)),
                ],
                seconds=time.monotonic() - started,
            )
            manifest["measured"] |= mixed.pop("measured", {})
            manifest = with_origin(manifest | about | mixed, origin)
            grid = plan.commonest if isinstance(bits, float) else QuantSpec(bits, plan.group_size, sym)
            quantization = packing.config(grid, _all_layers(model, sources, plan))
            _finish(writer, checkpoint, quantization, manifest, kept_dtype)
    if chosen == "gguf":
        from bittern.convert.gguf import write_gguf

        with open_checkpoint(folder) as quantized:
            write_gguf(Artifact(quantized), Path(output), overwrite=overwrite)
        shutil.rmtree(folder)
    return manifest


def _check_options(bits: int | float, method: str, damp_percent: float, dtype: str | None, batch_size: int) -> None:
    if not isinstance(bits, float):
        QuantSpec(bits)
    elif not BITS[0] <= bits <= BITS[-1]:
        raise BitternError(f"bits: expected an average from {BITS[0]} to {BITS[-1]}, found {bits}")
    if method not in ("gptq", "rtn"):
        raise BitternError(f"method: expected gptq or rtn, found {method!r}")
    if isinstance(bits, float) and method != "gptq":
        raise BitternError(f"bits: {bits} is an average of what calibration text decides on: needs --method gptq")
    if not 0 < damp_percent < 1:
        raise BitternError(f"damp_percent: expected a share between 0 and 1, found {damp_percent}")
    if dtype is not None and dtype not in DTYPES:
        raise BitternError(f"dtype: expected bf16, fp16 or fp32, found {dtype!r}")
    if batch_size < 1:
        raise BitternError(f"batch_size: expected at least 1, found {batch_size}")


def _mix(
    plan_of: PlanOf, meter: Sensitivity, ids: Tensor, average: float, on_measured: Callable[[int, int], None] | None
) -> tuple[Plan, dict[str, Any]]:
    """The plan whose bits are chosen, and what the manifest gets of that.

    Args:
        meter: with no blocks yet: those of the plan go in here.
        ids: all calibration windows; a few spread evenly over them decide.
    """
    began = time.monotonic()
    count = min(len(ids), max(4, TOKENS // ids.shape[1]))
    windows = ids[torch.arange(count) * len(ids) // count]
    free = free_matrices(plan_of)
    meter.blocks = [[(m, spec) for m, spec in block if free[m]] for block in plan_of(BITS[0]).blocks]
    plan, record = mix(plan_of, meter.measure(windows, on_measured), average)
    record |= {"windows": count, "tokens": windows.numel()}
    return plan, {"mixed": record, "measured": {"sensitivity_seconds": round(time.monotonic() - began, 3)}}


def _choose_packing(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    plan: Plan,
    format: str | None,
    target: str | None,
    damp_percent: float,
) -> tuple[str, Packing]:
    """The format as asked, the target's favourite, or GPTQ; and how layers are packed in it.

    Those of a GGUF file are packed as GPTQ first, for that writer reads artifacts.
    """
    if format is not None and format not in FORMATS:
        raise BitternError(f"format: expected one of {', '.join(FORMATS)}, found {format!r}")
    layout = planned_layout(checkpoint.config, plan.layers, plan.shapes, bool(live.tied_names(model)))
    own = V1 if plan.symmetric else V2
    if target is not None and format is None:
        format = choose_format(target, layout)
    elif target is not None:
        check_target(target, replace(layout, format=format))
    format = format or own
    reason = cannot_hold(format, layout)
    if reason is not None:
        raise BitternError(f"--format {format}: {reason}")
    return format, Packing(
        own if format == "gguf" else format,
        torch.float32 if format == "mlx" and not plan.symmetric else torch.float16,
        damp_percent=damp_percent,
        dequantize=format == "compressed-tensors" and asks_dequantize(target, layout),
    )


def _all_layers(
    model: PreTrainedModel, sources: dict[str, tuple[Piece, ...]], plan: Plan
) -> dict[str, QuantSpec | None]:
    """The grid of every matrix; an output head of its own stays floats."""
    head = sources.get(f"{live.output_head(model)}.weight", ())
    return {**plan.layers, **{piece.name.removesuffix(".weight"): None for piece in head}}


def _kept_dtype(checkpoint: Checkpoint, asked: str | None) -> torch.dtype:
    """The dtype of what is not quantized: as asked, or what most of the source has if that is 16 bits wide."""
    if asked is not None:
        return DTYPES[asked]
    sizes: dict[torch.dtype, int] = {}
    for info in checkpoint.tensors.values():
        if info.dtype.is_floating_point:
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    commonest = max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)
    return commonest if commonest in (torch.float16, torch.bfloat16) else torch.float16


def _calibration(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    dataset: str,
    nsamples: int,
    seqlen: int,
    seed: int,
    chat_template: bool,
) -> CalibrationTokens:
    context = context_length(model.config)
    if context is not None and seqlen > context:
        raise BitternError(f"seqlen {seqlen}: this model's context is {context} tokens")
    return load_tokens(
        dataset,
        checkpoint.tokenizer(),
        nsamples=nsamples,
        seqlen=seqlen,
        seed=seed,
        chat_template=chat_template,
        vocab_size=model.config.get_text_config(decoder=True).vocab_size,
        model=lambda: live.load_dense(checkpoint),
    )


def _solve_and_write(
    solver: Solver,
    batches: list[Tensor],
    writer: CheckpointWriter,
    packing: Packing,
    on_progress: Callable[[dict[str, Any]], None] | None,
) -> list[dict[str, Any]]:
    """Write each layer as soon as it is solved; the records of all."""
    total = sum(grid is not None for grid in solver.plan.layers.values())
    records: list[dict[str, Any]] = []
    for record, weight in solver.solve(batches):
        for name, tensor in packing.pack(record["layer"], weight).items():
            writer.write(name, tensor)
        if on_progress is not None:
            on_progress({**record, "index": len(records), "total": total})
        records.append(record)
    return records


def _notes(records: list[dict[str, Any]], plan: Plan) -> list[str]:
    """What a user must be told of the layers, in a sentence each."""
    notes = []
    fallbacks = [record for record in records if record["fallback"]]
    if fallbacks:
        example = f"{fallbacks[0]['layer']}: {fallbacks[0]['fallback']}"
        notes.append(f"{len(fallbacks)} of {len(records)} layers needed a fallback ({example})")
    unasked = {name: why for name, why in plan.kept.items() if not why.startswith("--skip")}
    if unasked:
        name, why = next(iter(unasked.items()))
        notes.append(f"{len(unasked)} layers stay in 16 bits because of their shape ({name}: {why})")
    return notes


def _describe_tokens(tokens: CalibrationTokens | None) -> dict[str, Any] | None:
    if tokens is None:
        return None
    return {key: value for key, value in asdict(tokens).items() if key not in ("ids", "warnings")}


def _finish(
    writer: CheckpointWriter,
    checkpoint: Checkpoint,
    quantization: dict[str, Any],
    manifest: dict[str, Any],
    dtype: torch.dtype,
) -> None:
    checkpoint.copy_side_files(writer.folder)
    if (
        quantization["quantization_config"].get("quant_method") == "gptq"
    ):  # where GPTQModel and older readers look first
        writer.write_file("quantize_config.json", json.dumps(quantization["quantization_config"], indent=2) + "\n")
    config = {key: value for key, value in checkpoint.config.items() if key != "torch_dtype"}
    writer.commit({**config, "dtype": str(dtype).removeprefix("torch."), **quantization}, manifest)
