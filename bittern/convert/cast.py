"""A checkpoint in another floating-point dtype, piece by piece.

Memory is a few pieces of 8 MiB whatever the checkpoint's size: each of a few threads reads a piece,
casts it, measures what the cast cost, and writes it to its place.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import reduce
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bittern.artifact import quantization_config, refuse_unexplained
from bittern.checkpoint import Checkpoint, CheckpointWriter, TensorInfo, open_checkpoint
from bittern.errors import BitternError
from bittern.model import Piece, build, stays_fp32, unused_tensors
from bittern.origin import source_record
from bittern.report import base_manifest, with_origin
from bittern.schema import carried, told_by_gguf
from bittern.shards import dtype_name
from bittern.size import count_parameters, planned_size, size_record, stored_bytes
from bittern.ties import tied_heads, tied_tensors
from bittern.writer import MAX_SHARD_SIZE, check_output

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

_PIECE_BYTES = 8 * 2**20
_BLOCK = 2**15 - 1  # elements that stay in the cache, just too few for torch to wake its own threads
_THREADS = 2


@dataclass(frozen=True)
class Cast:
    """What became of one tensor (or of one piece of it).

    Attributes:
        name: the tensor.
        source_dtype: dtype in the source, as in "float32".
        dtype: dtype in the output; integers keep theirs.
        max_relative_error: the largest abs(cast - value) / abs(value) over its non-zero values.
        max_magnitude: the largest abs(value); 0 for what is not floating point.
        overflowed: values too large for ``dtype``; clamp makes each the largest of its sign.
        not_finite: values that are NaN or infinite in the source.
    """

    name: str
    source_dtype: str
    dtype: str
    max_relative_error: float = 0.0
    max_magnitude: float = 0.0
    overflowed: int = 0
    not_finite: int = 0

    def join(self, other: Cast) -> Cast:
        """The same of two pieces together."""
        return Cast(
            self.name,
            self.source_dtype,
            self.dtype,
            max(self.max_relative_error, other.max_relative_error),
            max(self.max_magnitude, other.max_magnitude),
            self.overflowed + other.overflowed,
            self.not_finite + other.not_finite,
        )


@dataclass(frozen=True)
class ConvertSummary:
    """What :func:`convert` did.

    Attributes:
        source: as the caller named it.
        revision: the commit when it came from the Hub.
        output: the folder that was made.
        dtype: "bf16", "fp16" or "fp32".
        tensors: one entry per tensor written, in the order of the source.
        tied: tensors left out because the configuration ties them to an equal one.
        side_files: what was copied besides.
        source_bytes, output_bytes: bytes of all values, as they are stored.
        notes: what a user must be told.
        seconds: wall time.
    """

    source: str
    revision: str | None
    output: str
    dtype: str
    tensors: tuple[Cast, ...]
    tied: tuple[str, ...]
    side_files: tuple[str, ...]
    source_bytes: int
    output_bytes: int
    notes: tuple[str, ...]
    seconds: float

    @property
    def worst(self) -> Cast | None:
        """The tensor with the largest relative error."""
        return max(self.tensors, key=lambda cast: cast.max_relative_error, default=None)

    @property
    def clamped(self) -> int:
        """Values that were clamped, in all tensors."""
        return sum(cast.overflowed for cast in self.tensors)

    def to_dict(self) -> dict[str, Any]:
        """Everything above, ready for JSON."""
        worst = self.worst
        return {
            **asdict(self),
            "clamped": self.clamped,
            "max_relative_error": worst.max_relative_error if worst else 0.0,
            "worst": worst.name if worst else None,
        }


def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    dtype: str = "bf16",
    clamp: bool = False,
    max_shard_size: int = MAX_SHARD_SIZE,
    overwrite: bool = False,
    revision: str | None = None,
    on_tensor: Callable[[str, int, int], None] | None = None,
) -> ConvertSummary:
    """Write the checkpoint ``source`` to the folder ``output`` with its floating-point tensors in ``dtype``.

    Integer and boolean tensors stay as they are; config.json gets the dtype; side files travel along.

    Args:
        source: a folder, a .gguf file or a Hub id.
        output: a folder that does not exist yet, unless ``overwrite``.
        dtype: "bf16", "fp16" or "fp32"; what transformers keeps in fp32 in models of 16 bits stays so.
        clamp: make values that overflow the largest one of ``dtype`` instead of refusing them.
        max_shard_size: bytes of a shard.
        overwrite: replace the checkpoint that is at ``output``.
        revision: of a Hub id.
        on_tensor: called after each tensor with its name, the bytes read so far and in all.

    Raises:
        BitternError: for a source that cannot be read or is quantized, an output that may not or cannot be
            written, values that are NaN, infinite or (without ``clamp``) too large for ``dtype``.
    """
    started = time.monotonic()
    if dtype not in DTYPES:
        raise BitternError(f"dtype: expected one of {', '.join(DTYPES)}, found {dtype}")
    with open_checkpoint(source, revision) as checkpoint:
        refuse_quantized(checkpoint)
        check_output(Path(output), checkpoint.path, overwrite)
        origin, notes = carried(checkpoint)
        tied = tied_tensors(checkpoint)
        kept = [info for info in checkpoint.tensors.values() if info.name not in tied]
        wide = set() if dtype == "fp32" else _stay_fp32(checkpoint)
        plan = [
            TensorInfo(info.name, target_dtype(info.dtype, DTYPES[dtype], info.name in wide), info.shape)
            for info in kept
        ]
        with CheckpointWriter(output, plan, max_shard_size=max_shard_size, overwrite=overwrite) as writer:
            side_files = checkpoint.copy_side_files(writer.folder)
            casts, done, total = [], 0, sum(info.nbytes for info in kept)
            for cast in cast_tensors(checkpoint, writer, [(info, info.name) for info in plan], clamp):
                casts.append(cast)
                done += checkpoint.tensors[cast.name].nbytes
                if on_tensor is not None:
                    on_tensor(cast.name, done, total)
            summary = ConvertSummary(
                source=os.fspath(source),
                revision=checkpoint.revision,
                output=os.fspath(output),
                dtype=dtype,
                tensors=tuple(casts),
                tied=tuple(tied),
                side_files=tuple(side_files),
                source_bytes=sum(stored_bytes(checkpoint).values()),
                output_bytes=sum(info.nbytes for info in plan),
                notes=tuple(notes),
                seconds=time.monotonic() - started,
            )
            options = {"dtype": dtype, "clamp": clamp, "max_shard_size": max_shard_size}
            manifest = _manifest(summary, checkpoint, options, planned_size(plan, plan), origin)
            writer.commit(with_dtype(checkpoint.config, DTYPES[dtype]), manifest)
    return summary


def _stay_fp32(checkpoint: Checkpoint) -> set[str]:
    """Tensors that :func:`bittern.model.stays_fp32`; none of an architecture that transformers does not know."""
    keys = {key for config in (checkpoint.config, checkpoint.config.get("text_config") or {}) for key in config}
    if not any("expert" in key or "moe" in key for key in keys):
        return set()  # no other model has any, and to ask transformers takes seconds
    try:
        model = build(checkpoint.config)
    except BitternError:
        return set()
    return {name for name in checkpoint.tensors if stays_fp32(model, name)}


def cast_values(values: Tensor, dtype: torch.dtype, name: str = "") -> tuple[Tensor, Cast]:
    """Cast a 1-D floating-point tensor and measure what it cost.

    What overflows becomes the largest value of its sign and is counted.
    """
    result = torch.empty(values.numel(), dtype=dtype)
    measured = torch.float64 if values.dtype == torch.float64 else torch.float32
    limit = torch.finfo(dtype).max
    cast = Cast(name, dtype_name(values.dtype), dtype_name(dtype))
    for start in range(0, values.numel(), _BLOCK):
        exact = values[start : start + _BLOCK].to(measured)
        out = result[start : start + _BLOCK]
        out.copy_(exact)
        low, high = (value.item() for value in torch.aminmax(exact))
        magnitude = max(-low, high)
        if not magnitude < float("inf"):  # a NaN is what aminmax returns for a block that holds one
            cast = cast.join(Cast("", "", "", not_finite=int((~exact.isfinite()).sum())))
            continue
        overflowed = 0
        if magnitude > limit:
            overflowed = int(out.isinf().sum())
            out.clamp_(-limit, limit)
        error = 0.0 if values.dtype == dtype else _relative_error(exact, out)
        cast = cast.join(Cast("", "", "", error, magnitude, overflowed))
    return result, cast


def cast_tensors(
    checkpoint: Checkpoint,
    writer: CheckpointWriter | None,
    plan: Sequence[tuple[TensorInfo, str]],
    clamp: bool | None = None,
) -> Iterator[Cast]:
    """Copy tensors from a checkpoint to a writer, cast to their planned dtypes.

    Args:
        writer: None only finds out whether the values fit.
        plan: what to write, and the name of each in the checkpoint.
        clamp: as in :func:`convert`; None where nobody can ask for it.

    Yields:
        The outcome of each tensor, in order.

    Raises:
        BitternError: see :func:`convert`.
    """

    def move(info: TensorInfo, stored: str, start: int, stop: int) -> Cast:
        values = checkpoint.read_elements(stored, start, stop)
        if not values.is_floating_point():
            cast = Cast(info.name, dtype_name(values.dtype), dtype_name(values.dtype))
        else:
            values, cast = cast_values(values, info.dtype, info.name)
        if writer is not None:
            writer.write_elements(info.name, start, values)
        return cast

    def pieces() -> Iterator[tuple[TensorInfo, str, int, int]]:
        for info, stored in plan:
            step = _PIECE_BYTES // checkpoint.tensors[stored].dtype.itemsize
            for start in range(0, max(info.numel, 1), step):
                yield info, stored, start, min(start + step, info.numel)

    for _, same in groupby(_in_order(move, pieces()), key=lambda cast: cast.name):
        cast = reduce(Cast.join, same)
        refuse_values(cast, clamp)
        yield cast


def copied_tensors(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    sources: dict[str, tuple[Piece, ...]],
    replaced: Collection[str],
    dtype: torch.dtype | None,
) -> list[tuple[TensorInfo, str]]:
    """What goes from a checkpoint into one that is made of it, unchanged but for its dtype.

    Args:
        model: of :func:`bittern.model.build`.
        checkpoint: where its weights are.
        sources: of :func:`bittern.model.weight_map`.
        replaced: live names of the parameters that the caller writes itself.
        dtype: of floats, but for those in fp32 that :func:`bittern.model.stays_fp32`; None leaves each as it is.

    Returns:
        Name, dtype and shape of each tensor to write, and its name in the checkpoint.
    """
    kept = [(name, piece) for name, found in sources.items() if name not in replaced for piece in found]
    named = [(name, piece.name, piece.source) for name, piece in kept]
    # What transformers skips when it loads, others use: heads that predict several tokens, for one.
    named += [(name, name, name) for name in unused_tensors(model, sources, checkpoint.tensors)]
    copied = []
    for name, written, stored in named:
        info = checkpoint.tensors[stored]
        wanted = target_dtype(info.dtype, dtype, stays_fp32(model, name))
        copied.append((TensorInfo(written, wanted, info.shape), stored))
    return copied


def other_matrices(
    model: PreTrainedModel, sources: dict[str, tuple[Piece, ...]], infos: Iterable[TensorInfo]
) -> list[str]:
    """Layers among tensors that multiply something, as far as shapes tell: all matrices but embeddings.

    Args:
        model, sources: as of :func:`copied_tensors`.
        infos: tensors of a checkpoint.
    """
    tables = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    known = {
        name for table in tables for piece in sources.get(f"{table}.weight", ()) for name in (piece.name, piece.source)
    }
    matrices = [info.name for info in infos if len(info.shape) == 2 and info.name.endswith(".weight")]
    return [name.removesuffix(".weight") for name in matrices if name not in known]


def _in_order(
    move: Callable[[TensorInfo, str, int, int], Cast], work: Iterable[tuple[TensorInfo, str, int, int]]
) -> Iterator[Cast]:
    """Do pieces of work on a few threads, a few ahead; yields the results in order."""
    pending: deque[Future[Cast]] = deque()
    with ThreadPoolExecutor(_THREADS) as pool:
        for item in work:
            pending.append(pool.submit(move, *item))
            if len(pending) > 2 * _THREADS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _relative_error(exact: Tensor, cast: Tensor) -> float:
    """The largest abs(cast / exact - 1), with nothing lost where both are zero."""
    ratio = torch.div(cast.to(exact.dtype), exact)  # not in place: to() may return cast itself
    low, high = (value.item() for value in torch.aminmax(ratio))
    if low != low:  # 0 / 0
        ratio = ratio.masked_fill_(exact == 0, 1)
        low, high = (value.item() for value in torch.aminmax(ratio))
    return max(1 - low, high - 1)


def refuse_values(cast: Cast, clamp: bool | None) -> None:
    """Raise BitternError for what a cast could not keep; ``clamp`` is the option, None where there is none."""
    if cast.not_finite:
        raise BitternError(f"{cast.name}: expected finite values, found {cast.not_finite} that are NaN or Inf")
    if cast.overflowed and not clamp:
        offer = "" if clamp is None else f"--clamp would change {cast.overflowed} values, "
        raise BitternError(
            f"{cast.name}: its largest magnitude {cast.max_magnitude:g} does not fit {cast.dtype}; {offer}--dtype bf16"
            " would hold them"
        )


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Raise BitternError for a checkpoint whose weights are quantized already, whether it says so or not."""
    method, _ = quantization_config(checkpoint)
    if method is not None:
        raise BitternError(f"{checkpoint.source}: expected floating-point weights, found a quantized model ({method})")
    refuse_unexplained(checkpoint)


def _manifest(
    summary: ConvertSummary,
    checkpoint: Checkpoint,
    options: dict[str, Any],
    size: dict[str, Any],
    origin: dict[str, Any] | None,
) -> dict[str, Any]:
    """What the output says of its making; see :mod:`bittern.report`.

    Context and cache are left out: they are not changed, and to know them takes transformers, which is large.
    """
    notes = list(summary.notes)
    clamped = {cast.name: cast.overflowed for cast in summary.tensors if cast.overflowed}
    if clamped:
        notes.append(f"{summary.clamped} values in {len(clamped)} tensors were clamped to what {summary.dtype} holds")
    made = base_manifest(
        "convert",
        source_record(checkpoint),
        options,
        notes=notes,
        seconds=summary.seconds,
    )
    counted = count_parameters(checkpoint.tensors.values(), tied=tied_heads(checkpoint))
    source = size_record(counted, stored_bytes(checkpoint))
    made |= {
        "size": {"source": source, "output": size},
        "dtype": summary.dtype,
        "tensors": {
            cast.name: {
                "source_dtype": cast.source_dtype,
                "dtype": cast.dtype,
                "max_relative_error": cast.max_relative_error,
            }
            for cast in summary.tensors
        },
        "clamped": clamped,
        "tied": list(summary.tied),
    }
    return with_origin(made | told_by_gguf(checkpoint), origin)


def with_dtype(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A copy of a configuration that states ``dtype`` at the top and wherever a part of it states one."""
    result = dict(config)
    for key, value in config.items():
        if isinstance(value, dict):
            result[key] = with_dtype(value, dtype) if "dtype" in value or "torch_dtype" in value else value
        elif key == "torch_dtype":
            result[key] = dtype_name(dtype)
    return result | {"dtype": dtype_name(dtype)}


def target_dtype(source: torch.dtype, dtype: torch.dtype | None, wide: bool = False) -> torch.dtype:
    """What a tensor becomes when floats are to have another dtype: None leaves it, and ``wide`` leaves fp32."""
    if dtype is None or not source.is_floating_point or (wide and source == torch.float32):
        return source
    return dtype
