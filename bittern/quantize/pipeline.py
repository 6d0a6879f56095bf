"""The whole job: a checkpoint in, a quantized artifact out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bittern import model as live
from bittern.calibration import SEQLEN, CalibrationTokens, dataset_names, load_tokens, split_column
from bittern.checkpoint import Checkpoint, open_checkpoint
from bittern.consumers import asks_dequantize, cannot_hold, check_target, choose_format, verdicts
from bittern.convert.cast import DTYPES, cast_tensors, copied_tensors, refuse_quantized
from bittern.convert.pipeline import FORMATS as CONVERT_FORMATS
from bittern.errors import BitternError, first_line
from bittern.formats import mlx
from bittern.formats.gptq import V1, V2
from bittern.formats.packing import Packing, check_name, is_gguf
from bittern.layout import planned_layout
from bittern.processes import alone, check_same, share_of, together, world
from bittern.quantize import heap
from bittern.quantize.effort import Effort, pick_effort
from bittern.quantize.job import Job
from bittern.quantize.mixed import alternating, check_average, even_mix, measure_and_mix, windows_to_measure
from bittern.quantize.output import Order, config_files, write_artifact
from bittern.quantize.outside import check_embedding, outside_matrices
from bittern.quantize.plan import Plan, make_plan
from bittern.quantize.preflight import predict
from bittern.quantize.resume import WorkFolder, decided_by
from bittern.quantize.sensitivity import Sensitivity
from bittern.quantize.solve import Solver
from bittern.quantize.tune import trained, tune, write_text
from bittern.quantize.windows import OwnWindows, batch_windows, default_batch, guiding_windows
from bittern.runtime import attention
from bittern.sampling import Sampled
from bittern.ties import refuse_untied
from bittern.tokenizer import window_length
from bittern.weight import BITS, QuantSpec
from bittern.writer import MAX_SHARD_SIZE, check_output, check_space

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMATS = CONVERT_FORMATS[1:]  # all but plain floats
DEFAULT_DATASET = "allenai/c4:en"


def quantize(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    bits: int | float = 4,
    group_size: int | str = 128,
    sym: bool = True,
    method: str = "gptq",
    effort: str = "fast",
    tune_tokens: int | None = None,
    format: str | None = None,
    target: str | None = None,
    dataset: str | Sequence[str] = DEFAULT_DATASET,
    nsamples: int = 128,
    seqlen: int | None = None,
    seed: int = 0,
    damp_percent: float | None = None,
    layers: Sequence[tuple[str, int]] = (),
    skip: Sequence[str] = (),
    embed_bits: int | None = None,
    lm_head_bits: int | None = None,
    dtype: str | None = None,
    device: str = "auto",
    batch_size: int | None = None,
    chat_template: bool = False,
    max_shard_size: int = MAX_SHARD_SIZE,
    overwrite: bool = False,
    revision: str | None = None,
    resume: bool = True,
    dry_run: bool = False,
    on_progress: Callable[[dict[str, Any]], None] | None = None,
    on_prediction: Callable[[dict[str, Any]], None] | None = None,
    on_note: Callable[[str], None] | None = None,
    on_point: Callable[[dict[str, Any]], None] | None = None,
    on_measured: Callable[[int, int], None] | None = None,
    on_weighed: Callable[[int, int], None] | None = None,
    on_sampled: Sampled | None = None,
) -> dict[str, Any]:
    """Quantize a checkpoint and write it in the format that its consumers read.

    Under torchrun every process walks its share of the calibration windows through the blocks; the first one does the
    rest, and writes.

    Every finished block is kept beside the output until that stands (see :mod:`bittern.quantize.resume`): after a
    kill at any moment the same call goes on from there, and ends in the same weights.

    Args:
        source: a folder, a GGUF file or a Hub id.
        output: the folder to write, for "gguf" a file; it appears when it is whole.
        bits: 8, 4, 3 or 2; or a float, such as 2.5 or 3.0: the average that layers of these bits shall have, each as
            many as it needs (see :mod:`bittern.quantize.mixed`).
        group_size: input columns that share a scale; -1 the whole row, ``auto`` the largest of 128, 64
            and 32 that divides every layer.
        sym: zeros in the middle of the grid (scales are signed), or searched.
        method: ``gptq``, or ``rtn`` (round to nearest, no calibration).
        format: one of :data:`bittern.convert.pipeline.FORMATS` but safetensors. By default "gguf" when ``output``
            ends in .gguf, else "gptq", and "gptq_v2" for asymmetric grids.
        target: the consumer that it is for (see :data:`bittern.consumers.TARGETS`); picks the format when
            none is given, and refuses what that consumer does not load or gets wrong.
        effort: ``plain`` (classic GPTQ), ``fast``, or ``best``, which trains scales and norms after that.
        tune_tokens: that ``best`` trains on, of the dataset; by default 256k.
        dataset, nsamples, seqlen, seed, chat_template: see :func:`~bittern.calibration.load_tokens`; windows are of
            512 tokens by default, or of a shorter context.
        damp_percent: damping of the Hessian as a share of its mean diagonal, in (0, 1); by default the effort's.
        layers: (regular expression, bits) for layers of other bits.
        skip: regular expressions of layers to leave in 16 bits.
        embed_bits, lm_head_bits: 8 packs the embedding, and a head of its own; None leaves them in 16 bits.
        dtype: ``bf16``, ``fp16`` or ``fp32`` for what is not quantized; by default the source's, of fp32 fp16.
        device: ``cpu``, ``cuda`` or ``auto``.
        batch_size: calibration samples run together; by default what suits the device.
        max_shard_size: bytes.
        overwrite: replace an artifact at ``output``.
        revision: of a Hub id.
        resume: go on with what a killed run with the same options has left; otherwise start over.
        dry_run: only find out what it would take, and who would load the result; nothing is written.
        on_progress: called with the record of each layer that is solved, with ``index`` and ``total``.
        on_point: called with each point of the curve while scales are trained.
        on_prediction: called before the work with what it will take: seconds, bytes of memory at most, bytes to write;
            and the share of the time in which it found that out that others had the processors.
        on_note: called with what a user should know before the work, a sentence each.
        on_measured: where an average is asked for, called with the blocks whose sensitivity is known and their number.
        on_weighed: called with the blocks whose outputs are weighed and their number, ten times or so.
        on_sampled: where the model writes its own text, see :func:`~bittern.calibration.load_tokens`.

    Returns:
        The manifest, which the artifact also holds; empty in a process of torchrun that only helped. For a dry run,
        what it will take (:meth:`bittern.quantize.preflight.Prediction.to_dict`) and who would load it.

    Raises:
        BitternError: for anything that a user can mend, before hours are spent wherever it can be known.
    """
    options = {key: value for key, value in locals().items() if key not in _NO_OPTIONS and not key.startswith("on_")}
    started = time.monotonic()
    with torch.inference_mode(False), together(device) as place, ExitStack() as stack:
        stack.callback(heap.for_others)
        rank = world()[0]
        stages = pick_effort(effort)
        damp_percent = stages.damp_percent if damp_percent is None else damp_percent
        _check_options(bits, method, damp_percent, dtype, batch_size, tune_tokens)
        _check_training(options, stages)
        stages = stages.at(bits)
        tuned_on = stages.tune if tune_tokens is None else tune_tokens

        checkpoint = stack.enter_context(open_checkpoint(source, revision, headers_only=True))
        refuse_quantized(checkpoint)
        if not checkpoint.headers_only:
            refuse_untied(checkpoint)
        if not is_gguf(output):  # of a file, check_gguf is the judge
            check_output(Path(output), checkpoint.path, overwrite)
        model = live.build(checkpoint.config)
        seqlen, shorter = window_length(model.config, seqlen, SEQLEN)
        batch_size = default_batch(seqlen, place) if batch_size is None else batch_size
        options |= {"seqlen": seqlen, "batch_size": batch_size, "damp_percent": damp_percent}
        options["tune_tokens"] = tuned_on if stages.tune else None
        if method == "rtn":
            damp_percent = Packing.damp_percent
            options = {name: value for name, value in options.items() if name not in _OF_CALIBRATION}
        if place.type == "cpu":  # where torch's own takes three times as long
            attention.use(model)
        sources = live.weight_map(model, checkpoint.tensors)
        prefix, blocks = live.blocks(model)
        matrices = [live.matrices(model, f"{prefix}.{position}", sources) for position in range(len(blocks))]
        outside = outside_matrices(model, sources, embed_bits, lm_head_bits)
        plan_of = partial(
            make_plan, matrices, outside=outside, group_size=group_size, sym=sym, layer_bits=layers, skip=skip
        )
        if isinstance(bits, float):
            check_average(plan_of, bits)
        plan = plan_of(alternating(matrices) if isinstance(bits, float) else bits)
        wanted = "gguf" if format is None and target is None and is_gguf(output) else format
        chosen, packing = _choose_packing(checkpoint, model, plan, wanted, target, damp_percent)
        check_name(output, chosen)
        check_embedding(embed_bits, chosen)
        if chosen == "gguf":
            from bittern.convert.gguf import check_gguf

            if max_shard_size != MAX_SHARD_SIZE:
                raise BitternError("max_shard_size: a GGUF file is written whole, without shards")
            check_gguf(checkpoint, plan.layers, Path(output), overwrite)
        kept_dtype = _kept_dtype(checkpoint, dtype)
        solved = {matrix.parameter for block in (*plan.blocks, plan.outside) for matrix, _ in block}
        kept = copied_tensors(model, checkpoint, sources, solved, kept_dtype)

        tokens = None
        unread = [name for name in dataset_names(dataset) if not split_column(name)[0].exists()] if dry_run else []
        if method == "gptq" and not unread:
            told = None if rank else on_sampled
            tokens = _calibration(checkpoint, model, dataset, nsamples, seqlen, seed, chat_template, place, told)
            tokens = replace(tokens, warnings=(*shorter, *tokens.warnings))
        if not dry_run:
            _fetch(checkpoint)
        windows = OwnWindows() if tokens is None else batch_windows(tokens.ids, batch_size, stages)
        mixed: dict[str, Any] = {}
        if isinstance(bits, float):
            if tokens is not None and not dry_run:
                meter = Sensitivity(model, checkpoint, sources, [], damp_percent, place)
                plan, mixed = measure_and_mix(plan_of, meter, tokens.ids, bits, None if rank else on_measured)
            else:
                plan = even_mix(plan_of, bits)
            chosen, packing = _choose_packing(checkpoint, model, plan, chosen, target, damp_percent)
        solver = Solver(model, checkpoint, sources, plan, damp_percent, place, stages, kept_dtype, on_weighed)
        if rank:  # the first process writes and tells, the others help it
            if not dry_run:
                solver.help(windows)
            return {}

        for _ in cast_tensors(checkpoint, None, () if checkpoint.headers_only else kept):
            pass  # what the output cannot hold is refused now
        planned = [info for info, _ in kept] + plan.packed_tensors(packing)
        nbytes = sum(info.nbytes for info in planned)
        beside = nbytes if chosen == "gguf" else 0  # a GGUF file is made of another artifact
        count = 0 if method == "rtn" else nsamples if tokens is None else len(tokens.ids)
        to_measure = share_of(windows_to_measure(count, seqlen)) if isinstance(bits, float) and dry_run else 0
        guiding, samples = guiding_windows(seqlen), share_of(count)
        job = Job(solver, packing, kept, samples, seqlen, batch_size, guiding, tuned_on, to_measure, beside)
        grid = plan.commonest if isinstance(bits, float) else QuantSpec(bits, plan.group_size, sym)
        files = config_files(job, grid, kept_dtype)
        order = Order(job, chosen, Path(output), planned, files, max_shard_size, overwrite, tokens, options, mixed)
        if dry_run:
            with alone():  # the other processes have left
                found = predict(job, order.nbytes, started)
            notes = _dry_notes(checkpoint, tokens, method, unread, shorter)
            return {**found.to_dict(), "format": chosen, "loads": _verdicts(job, chosen), "notes": notes}
        solving = {**options, "effort": stages}
        decided = decided_by(checkpoint, solving, plan.layers, tokens.sha256 if tokens else None, place)
        with WorkFolder(Path(output), decided, len(plan.blocks), resume) as work:
            began, resumed = started - work.seconds, len(work.finished)
            unsolved = [block for position, block in enumerate(plan.blocks) if position not in work.finished]
            check_space(order.folder, beside + nbytes + job.work_bytes(unsolved))
            prediction, notes = _foresee(order, started, work, on_prediction)
            if on_note is not None:
                for note in (*work.notes, *notes):
                    on_note(note)
            tuned, lacks = None, list[str]()
            if tokens is None or not stages.tune:
                _solve(solver, windows, work, on_progress)
            else:
                text = {"tokens": tuned_on, "seqlen": seqlen, "seed": seed}
                vocabulary = model.config.get_text_config(decoder=True).vocab_size
                with alone():
                    lacks = write_text(
                        checkpoint, work, dataset, chat_template, place, on_sampled, vocab_size=vocabulary, **text
                    )
                _solve(solver, windows, work, on_progress)
                with alone():
                    dtypes = {info.name: info.dtype for info, _ in kept}
                    tuned = tune(
                        checkpoint, sources, plan, work, **text, dtypes=dtypes, device=place, on_progress=on_point
                    )
                began -= tuned.seconds
            manifest = write_artifact(
                order, work, tuned, on_progress, began=began, resumed=resumed, prediction=prediction, notes=lacks
            )
            work.remove()
    return manifest


def _fetch(checkpoint: Checkpoint) -> None:
    """Download a checkpoint on the Hub, now that all that its headers tell has been checked."""
    if checkpoint.headers_only:
        checkpoint.fetch()
        refuse_untied(checkpoint)


_NO_OPTIONS = ("source", "output", "resume", "dry_run")
"""Arguments that do not shape the artifact, beside those that are called."""


_OF_CALIBRATION = (
    *("effort", "tune_tokens", "dataset", "nsamples", "seqlen", "seed", "damp_percent", "batch_size", "chat_template"),
)
"""Arguments without effect on rounding to nearest: refused with it, and not told in its manifest."""


def _check_training(given: dict[str, Any], stages: Effort) -> None:
    tune_tokens = given["tune_tokens"]
    if tune_tokens is not None and not stages.tune:
        raise BitternError(
            f"tune_tokens: found {tune_tokens}, but effort {given['effort']} trains nothing; expected best"
        )
    usual = signature(quantize).parameters
    for name in _OF_CALIBRATION if given["method"] == "rtn" else ():
        if given[name] != usual[name].default:
            why = "rounding to nearest calibrates and trains nothing"
            raise BitternError(f"{name} {given[name]}: needs --method gptq; {why}")


def _check_options(
    bits: int | float, method: str, damp_percent: float, dtype: str | None, batch: int | None, tune_tokens: int | None
) -> None:
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
    for name, value in (("batch_size", batch), ("tune_tokens", tune_tokens)):
        if value is not None and value < 1:
            raise BitternError(f"{name}: expected at least 1, found {value}")


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
        mlx.exact_dtype(plan.symmetric) if format == "mlx" else torch.float16,
        damp_percent=damp_percent,
        dequantize=format == "compressed-tensors" and asks_dequantize(target, layout),
    )


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
    dataset: str | Sequence[str],
    nsamples: int,
    seqlen: int,
    seed: int,
    chat_template: bool,
    place: torch.device,
    on_sampled: Sampled | None,
) -> CalibrationTokens:
    def dense() -> PreTrainedModel:
        _fetch(checkpoint)
        return live.load_dense(checkpoint, device=place)

    tokens = load_tokens(
        dataset,
        checkpoint.tokenizer(),
        nsamples=nsamples,
        seqlen=seqlen,
        seed=seed,
        chat_template=chat_template,
        vocab_size=model.config.get_text_config(decoder=True).vocab_size,
        model=dense,
        on_sampled=on_sampled,
    )
    check_same(int(tokens.sha256[:12], 16), "as the start of the calibration tokens' hash")
    return tokens


def _solve(
    solver: Solver, windows: OwnWindows, work: WorkFolder, on_progress: Callable[[dict[str, Any]], None] | None
) -> None:
    """Every block into the work folder, and a word of every layer that was solved for it."""
    total = len(solver.plan.shapes)
    index = sum(len(matrix.parts) for position in work.finished for matrix, _ in solver.plan.blocks[position])
    for record in solver.solve(windows, work):
        if on_progress is not None:
            on_progress({**record, "index": index, "total": total})
        index += 1


def _foresee(
    order: Order,
    started: float,
    work: WorkFolder,
    on_prediction: Callable[[dict[str, Any]], None] | None,
) -> tuple[dict[str, Any] | None, list[str]]:
    """What the manifest says of the prediction, and a note where there is none: that must not end a run."""
    try:
        with alone():
            found = predict(order.job, order.nbytes, started)
        left = found.left(work.finished, order.job.solver.guided(work, work.finished), trained(work))
    except Exception as error:  # of an architecture that does not take made-up weights, whatever comes
        return None, [f"how long this takes could not be predicted: {first_line(error)}"]
    if on_prediction is not None:
        on_prediction({**found.figures, "seconds": left, "waited": found.waited})
    return found.figures, []


def _verdicts(job: Job, format: str) -> list[dict[str, Any]]:
    """Who would load the artifact."""
    tied = bool(live.tied_names(job.solver.model))
    layout = planned_layout(job.solver.checkpoint.config, job.solver.plan.layers, job.solver.plan.shapes, tied)
    return [asdict(each) for each in verdicts(replace(layout, format=format, dequantize=job.packing.dequantize))]


def _dry_notes(
    checkpoint: Checkpoint, tokens: CalibrationTokens | None, method: str, unread: Sequence[str], shorter: Sequence[str]
) -> list[str]:
    """What a dry run did not look at, weights on the Hub and datasets that are no files here among it."""
    known = []
    if checkpoint.headers_only:
        size = sum(info.nbytes for info in checkpoint.tensors.values())
        left_out = "time to download and read them, and the room that they take, are not counted"
        known.append(f"{checkpoint.source}: weights of {size / 1e9:.2f} GB were not fetched: {left_out}")
    if tokens is not None:
        return [*known, *tokens.warnings]
    if method == "rtn":
        return known
    written = "the time to write it is not counted"
    taken = "its windows are taken to be as many as asked"
    unseen = [f"--dataset {name} was not read: {written if name == 'self' else taken}" for name in unread]
    return [*known, *shorter, *unseen]
