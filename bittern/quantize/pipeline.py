"""The whole job: a checkpoint in, a GPTQ artifact out, one block in memory at a time.

Each block is run twice over the calibration tokens: once to gather the inputs of its matrices, once,
quantized, for the inputs of the next block. So every block is calibrated on what the quantized
blocks before it really give it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bittern import model as live
from bittern.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from bittern.errors import BitternError
from bittern.formats import gptq as gptq_format
from bittern.model import Matrix, Piece
from bittern.quantize.calibration import CalibrationTokens, load_tokens
from bittern.quantize.gptq import Solution, factorize, gptq, round_to_nearest
from bittern.quantize.hessian import Inputs, collect
from bittern.quantize.plan import Plan, make_plan
from bittern.replay import BlockCall, capture, share_equal
from bittern.report import MANIFEST_FILE, make_manifest
from bittern.weight import QuantSpec, QuantWeight
from bittern.writer import MAX_SHARD_SIZE, CheckpointWriter, check_output

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEFAULT_DATASET = "allenai/c4:en"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
COPY_ELEMENTS = 1 << 24
"""Elements of an unquantized tensor in memory at a time."""

Progress = Callable[[dict[str, Any]], None]


def quantize(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    bits: int = 4,
    group_size: int | str = 128,
    sym: bool = True,
    method: str = "gptq",
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
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Quantize a checkpoint and write it as a GPTQ artifact.

    Args:
        source: a folder, a GGUF file or a Hub id.
        output: the folder to write; it appears when it is whole.
        bits: 8, 4, 3 or 2.
        group_size: input columns that share a scale; -1 the whole row, ``auto`` the largest of 128, 64
            and 32 that divides every layer.
        sym: zeros in the middle of the grid (scales are signed), or searched.
        method: ``gptq``, or ``rtn`` (round to nearest, no calibration).
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

    Returns:
        The manifest, which the artifact also holds.

    Raises:
        BitternError: for anything that a user can mend, before hours are spent wherever it can be known.
    """
    options = {key: value for key, value in locals().items() if key not in ("source", "output", "on_progress")}
    started = time.monotonic()
    _check_options(bits, method, damp_percent, dtype, batch_size)
    place = live.pick_device(device)
    with open_checkpoint(source, revision) as checkpoint:
        check_output(Path(output), checkpoint.folder, overwrite)
        if "quantization_config" in checkpoint.config:
            found = checkpoint.config["quantization_config"].get("quant_method", "quantized")
            raise BitternError(f"{source}: expected an unquantized checkpoint, found a {found} artifact")
        model = live.build(checkpoint.config)
        sources = live.weight_map(model, checkpoint.tensors)
        prefix, blocks = live.blocks(model)
        found_matrices = [live.matrices(model, f"{prefix}.{i}", sources) for i in range(len(blocks))]
        plan = make_plan(found_matrices, bits, group_size, sym, layers, skip)
        kept_dtype = _kept_dtype(checkpoint, dtype)
        kept = _kept_tensors(model, checkpoint, sources, plan, kept_dtype)
        tokens = None
        if method == "gptq":
            tokens = _calibration(checkpoint, model, dataset, nsamples, seqlen, seed, chat_template)
        packed = [info for _, name, spec, shape in _parts(plan) for info in gptq_format.plan(name, *shape, spec)]
        job = Job(model, checkpoint, sources, prefix, plan, damp_percent, place, on_progress)
        with CheckpointWriter(
            output, [info for info, _ in kept] + packed, max_shard_size=max_shard_size, overwrite=overwrite
        ) as writer:
            for info, stored in kept:
                _copy_tensor(checkpoint, stored, writer, info)
            checkpoint_format = gptq_format.V1 if plan.symmetric else gptq_format.V2
            records = []
            for record, weight in job.solve_all(tokens, batch_size):
                for suffix, tensor in gptq_format.pack(weight, checkpoint_format=checkpoint_format).items():
                    writer.write(gptq_format.names(record["layer"])[suffix], tensor)
                records.append(record)
            notes = [*(tokens.warnings if tokens else ()), *_notes(records, plan)]
            manifest = make_manifest(
                source={"name": str(source), "revision": checkpoint.revision, "model_type": checkpoint.config["model_type"]},
                options=options,
                calibration=_describe_tokens(tokens),
                layers=records,
                kept=plan.kept,
                notes=notes,
                seconds=time.monotonic() - started,
            )
            config = gptq_format.config(
                QuantSpec(bits, next(s.group_size for s in plan.layers.values() if s), sym),
                checkpoint_format=checkpoint_format,
                damp_percent=damp_percent,
                layers=plan.layers,
            )
            _finish(writer, checkpoint, config, manifest, kept_dtype)
    return manifest


def _check_options(bits: int, method: str, damp_percent: float, dtype: str | None, batch_size: int) -> None:
    QuantSpec(bits)
    if method not in ("gptq", "rtn"):
        raise BitternError(f"method: expected gptq or rtn, found {method!r}")
    if not 0 < damp_percent < 1:
        raise BitternError(f"damp_percent: expected a share between 0 and 1, found {damp_percent}")
    if dtype is not None and dtype not in DTYPES:
        raise BitternError(f"dtype: expected bf16, fp16 or fp32, found {dtype!r}")
    if batch_size < 1:
        raise BitternError(f"batch_size: expected at least 1, found {batch_size}")


def _kept_dtype(checkpoint: Checkpoint, asked: str | None) -> torch.dtype:
    """The dtype of what is not quantized."""
    if asked is not None:
        return DTYPES[asked]
    sizes: dict[torch.dtype, int] = {}
    for info in checkpoint.tensors.values():
        if info.dtype.is_floating_point:
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    commonest = max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)
    return commonest if commonest in (torch.float16, torch.bfloat16) else torch.float16


def _kept_tensors(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    sources: dict[str, tuple[Piece, ...]],
    plan: Plan,
    dtype: torch.dtype,
) -> list[tuple[TensorInfo, str]]:
    """What is written without being quantized: its new name, dtype and shape, and its name in the source."""
    quantized = {matrix.parameter for block in plan.blocks for matrix, _ in block}
    named = [
        (piece.name, piece.source) for name, pieces in sources.items() if name not in quantized for piece in pieces
    ]
    named += [(name, name) for name in live.unexpected_tensors(model, sources, checkpoint.tensors)]
    kept = []
    for name, stored in named:
        info = checkpoint.tensors[stored]
        kept.append((TensorInfo(name, dtype if info.dtype.is_floating_point else info.dtype, info.shape), stored))
    return kept


def _copy_tensor(checkpoint: Checkpoint, stored: str, writer: CheckpointWriter, info: TensorInfo) -> None:
    for start in range(0, info.numel, COPY_ELEMENTS):
        values = checkpoint.read_elements(stored, start, min(start + COPY_ELEMENTS, info.numel))
        if values.is_floating_point() and not bool(torch.isfinite(values).all()):
            raise BitternError(f"{stored}: holds NaN or infinite weights")
        cast = values.to(info.dtype)
        if cast.is_floating_point() and not bool(torch.isfinite(cast).all()):
            raise BitternError(
                f"{stored}: largest magnitude {values.abs().max():.6g} does not fit fp16; --dtype bf16 holds it"
            )
        writer.write_elements(info.name, start, cast)


def _calibration(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    dataset: str,
    nsamples: int,
    seqlen: int,
    seed: int,
    chat_template: bool,
) -> CalibrationTokens:
    config = model.config.get_text_config(decoder=True)
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and seqlen > context:
        raise BitternError(f"seqlen {seqlen}: this model's context is {context} tokens")
    return load_tokens(
        dataset,
        checkpoint.tokenizer(),
        nsamples=nsamples,
        seqlen=seqlen,
        seed=seed,
        chat_template=chat_template,
        vocab_size=config.vocab_size,
        model=lambda: live.load_dense(checkpoint),
    )


def _parts(plan: Plan) -> Iterator[tuple[Matrix, str, QuantSpec, tuple[int, int]]]:
    """Every layer that will be packed: its matrix, name, grid and shape."""
    for block in plan.blocks:
        for matrix, spec in block:
            for name, start, stop in matrix.parts:
                yield matrix, name, spec, (stop - start, matrix.in_features)


@dataclass
class Job:
    """Solves a planned model block by block."""

    model: PreTrainedModel
    checkpoint: Checkpoint
    sources: dict[str, tuple[Piece, ...]]
    prefix: str
    plan: Plan
    damp_percent: float
    device: torch.device
    on_progress: Progress | None

    def solve_all(
        self, tokens: CalibrationTokens | None, batch_size: int
    ) -> Iterator[tuple[dict[str, Any], QuantWeight]]:
        """Quantize every planned matrix; a record and a weight for each layer that the artifact will hold.

        Without tokens every matrix is rounded to nearest.
        """
        _, blocks = live.blocks(self.model)
        total = sum(1 for _ in _parts(self.plan))
        index = 0
        hidden: list[Tensor] = []
        calls: list[list[BlockCall]] = []
        if tokens is not None:
            hidden, calls = self._capture(blocks, tokens.ids, batch_size)
        for position, block in enumerate(blocks):
            names = [name for name in self.sources if name.startswith(f"{self.prefix}.{position}.")]
            live.load_tensors(self.model, self.checkpoint, self.sources, names, device=self.device)
            entries = self.plan.blocks[position]
            batch_calls = [call[position] for call in calls]
            solved = self._with_data(block, entries, hidden, batch_calls) if tokens else self._to_nearest(entries)
            for record, weight in solved:
                if self.on_progress is not None:
                    self.on_progress({**record, "index": index, "total": total})
                index += 1
                yield record, weight
            if tokens is not None and position + 1 < len(blocks):
                self._advance(block, position, hidden, batch_calls)
            live.drop_tensors(self.model, names)

    def _capture(
        self, blocks: nn.ModuleList, ids: Tensor, batch_size: int
    ) -> tuple[list[Tensor], list[list[BlockCall]]]:
        """Hidden states before the first block and the calls of all blocks, per batch."""
        head = self.model.get_output_embeddings()
        in_head = {name for name, module in self.model.named_modules() if module is head}
        outside = [
            name
            for name in self.sources
            if not name.startswith(f"{self.prefix}.") and name.rpartition(".")[0] not in in_head
        ]
        live.load_tensors(self.model, self.checkpoint, self.sources, outside, device=self.device)
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.device.type != "meta":
                    module._buffers[name] = buffer.to(self.device)
        hidden: list[Tensor] = []
        calls: list[list[BlockCall]] = []
        for batch in ids.split(batch_size):
            state, recorded = capture(self.model, blocks, batch.to(self.device))
            hidden.append(state)
            calls.append(share_equal(recorded, calls[0]) if calls else recorded)
        live.drop_tensors(self.model, outside)
        return hidden, calls

    def _advance(self, block: nn.Module, position: int, hidden: list[Tensor], calls: list[BlockCall]) -> None:
        """Replace the hidden states by the block's outputs."""
        with torch.no_grad():
            for i, call in enumerate(calls):
                hidden[i] = call.run(block, hidden[i])
                if not bool(torch.isfinite(hidden[i]).all()):
                    bad = int((~torch.isfinite(hidden[i].flatten(1)).all(1)).nonzero()[0])
                    sample = i * hidden[0].shape[0] + bad
                    raise BitternError(f"{self.prefix}.{position}: NaN or infinite output at calibration sample {sample}")

    def _to_nearest(self, entries: list[tuple[Matrix, QuantSpec]]) -> Iterator[tuple[dict[str, Any], QuantWeight]]:
        for matrix, spec in entries:
            began = time.monotonic()
            weight = round_to_nearest(live.get_weight(self.model, matrix), spec)
            yield from _records(matrix, weight, None, "rtn", None, 0, None, time.monotonic() - began)

    def _with_data(
        self,
        block: nn.Module,
        entries: list[tuple[Matrix, QuantSpec]],
        hidden: list[Tensor],
        calls: list[BlockCall],
    ) -> Iterator[tuple[dict[str, Any], QuantWeight]]:
        specs = dict(entries)
        for inputs in collect(self.model, block, [matrix for matrix, _ in entries], hidden, calls):
            yield from self._solve(inputs, specs)

    def _solve(
        self, inputs: Inputs, specs: dict[Matrix, QuantSpec]
    ) -> Iterator[tuple[dict[str, Any], QuantWeight]]:
        """Solve the matrices that share an input, and put the results into the block."""
        began = time.monotonic()
        unseen = inputs.tokens == 0 and inputs.prior == 0
        factor = None if unseen else factorize(inputs.hessian, self.damp_percent)
        for spec in dict.fromkeys(specs[matrix] for matrix in inputs.matrices):
            members = [matrix for matrix in inputs.matrices if specs[matrix] == spec]
            stacked = torch.cat([live.get_weight(self.model, matrix) for matrix in members])
            if factor is None:
                solution, fallback = None, "no calibration token reached it: rounded to nearest"
                quantized = round_to_nearest(stacked, spec)
            else:
                solution = gptq(stacked, factor, spec)
                quantized, fallback = solution.weight, factor.fallback
                if inputs.prior > 0.5:
                    seen = f"{inputs.tokens} tokens reached it: {inputs.prior:.0%} of its Hessian is the other experts'"
                    fallback = seen if fallback is None else f"{fallback}; {seen}"
            seconds = (time.monotonic() - began) / len(members)
            start = 0
            for matrix in members:
                rows = slice(start, start + matrix.out_features)
                start = rows.stop
                weight = _rows(quantized, rows)
                live.get_weight(self.model, matrix).copy_(weight.dequantize())
                losses = None if solution is None else torch.stack([solution.loss[rows], solution.norm[rows]])
                used = ("gptq", self.damp_percent) if factor is not None else ("rtn", None)
                yield from _records(matrix, weight, losses, *used, inputs.tokens, fallback, seconds)
            began = time.monotonic()


def _rows(weight: QuantWeight, rows: slice) -> QuantWeight:
    return QuantWeight(weight.codes[rows], weight.scales[rows], weight.zeros[rows], weight.spec)


def _records(
    matrix: Matrix,
    weight: QuantWeight,
    losses: Tensor | None,
    method: str,
    damp: float | None,
    tokens: int,
    fallback: str | None,
    seconds: float,
) -> Iterator[tuple[dict[str, Any], QuantWeight]]:
    """One record and weight for each checkpoint layer that a matrix is made of.

    ``loss`` is the squared error of the layer's outputs over their squares, on the calibration inputs.
    """
    for name, start, stop in matrix.parts:
        part = _rows(weight, slice(start, stop))
        loss = None
        if losses is not None:
            error, norm = losses[:, start:stop].sum(1).tolist()
            loss = error / norm if norm > 0 else 0.0
        record = {
            "layer": name,
            "shape": [stop - start, matrix.in_features],
            "bits": part.spec.bits,
            "group_size": part.spec.group_size,
            "sym": part.spec.sym,
            "method": method,
            "damp": damp,
            "loss": loss,
            "tokens": tokens,
            "fallback": fallback,
            "seconds": seconds,
        }
        yield record, part


def _notes(records: list[dict[str, Any]], plan: Plan) -> list[str]:
    """What a user must be told of the layers, in a sentence each."""
    notes = []
    fallbacks = [record for record in records if record["fallback"]]
    if fallbacks:
        first = fallbacks[0]
        notes.append(f"{len(fallbacks)} of {len(records)} layers needed a fallback ({first['layer']}: {first['fallback']})")
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
    quantization_config: dict[str, Any],
    manifest: dict[str, Any],
    dtype: torch.dtype,
) -> None:
    checkpoint.copy_side_files(writer.folder)
    writer.write_file("quantize_config.json", json.dumps(quantization_config, indent=2) + "\n")
    writer.write_file(MANIFEST_FILE, json.dumps(manifest, indent=2) + "\n")
    config = {key: value for key, value in checkpoint.config.items() if key != "torch_dtype"}
    writer.commit({**config, "dtype": str(dtype).removeprefix("torch."), "quantization_config": quantization_config})
