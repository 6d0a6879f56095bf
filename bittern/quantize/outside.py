"""The embedding and an output head of its own, packed in 8 bits.

Both are rounded to nearest: an embedding multiplies no activations that a Hessian could be made of, and at this width a
head loses next to nothing (docs/log.md). A head of its own may be packed in all formats but AWQ, which has 4 bits
alone; an embedding in GGUF and MLX, whose readers take it, and a head that is the embedding goes with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from bittern import model as live
from bittern.checkpoint import Checkpoint
from bittern.errors import BitternError
from bittern.formats.packing import Packing
from bittern.model import Matrix, Piece
from bittern.quantize.plan import Plan
from bittern.quantize.solve import layers_of
from bittern.weight import QuantSpec, QuantWeight, naming, round_to_nearest
from bittern.writer import CheckpointWriter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BITS = 8

_EMBEDDINGS = ("gguf", "mlx")  # formats whose readers take packed ones
_AT_ONCE = 1 << 24  # weights that are rounded together


def outside_matrices(
    model: PreTrainedModel, sources: dict[str, tuple[Piece, ...]], embed_bits: int | None, lm_head_bits: int | None
) -> list[tuple[Matrix, int]]:
    """What is asked for, with its bits.

    Args:
        model: of :func:`bittern.model.build`.
        sources: of :func:`bittern.model.weight_map`.
        embed_bits, lm_head_bits: 8, or None to leave floats.

    Raises:
        BitternError: for other bits, and for a head that is the embedding.
    """
    for option, bits in (("embed_bits", embed_bits), ("lm_head_bits", lm_head_bits)):
        if bits not in (None, BITS):
            raise BitternError(
                f"{option}: expected {BITS}, found {bits}: it is rounded to nearest, and fewer would show"
            )
    found = []
    if embed_bits is not None:
        found.append((_embedding(model, sources), embed_bits))
    if lm_head_bits is not None:
        head = live.output_head(model)
        if head is None or f"{head}.weight" not in sources:
            raise BitternError("lm_head_bits: the head of this model is its embedding; embed_bits packs both at once")
        found += [(matrix, lm_head_bits) for matrix in live.matrices(model, head, sources)]
    return found


def check_embedding(embed_bits: int | None, format: str) -> None:
    """Refuse a packed embedding where nothing reads it.

    Raises:
        BitternError: naming the formats that have one.
    """
    if embed_bits is not None and format not in _EMBEDDINGS:
        raise BitternError(
            f"embed_bits: nothing reads a packed embedding in {format}; {' and '.join(_EMBEDDINGS)} have it"
        )


def write_outside(
    checkpoint: Checkpoint,
    sources: dict[str, tuple[Piece, ...]],
    plan: Plan,
    writer: CheckpointWriter,
    packing: Packing,
    on_progress: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Round and write what stands outside of the blocks; the records of its layers."""
    records: list[dict[str, Any]] = []
    for matrix, spec in plan.outside:
        began = time.monotonic()
        shape = (matrix.out_features, matrix.in_features)
        values = live.read_tensor(checkpoint, sources[matrix.parameter], shape, torch.float32)
        pieces = torch.split(values, max(1, _AT_ONCE // matrix.in_features))
        with naming(matrix.label):
            parts = [round_to_nearest(rows, spec) for rows in pieces]
        del values, pieces
        outcome = {"method": "rtn", "damp": None, "tokens": 0, "fallback": None, "rescaled": False}
        whole = _joined(parts, spec)
        for record, weight in layers_of(matrix, whole, None, outcome, time.monotonic() - began):
            for name, tensor in packing.pack(record["layer"], weight).items():
                writer.write(name, tensor)
            if on_progress is not None:
                total = len(plan.shapes)
                index = total - sum(len(other.parts) for other, _ in plan.outside) + len(records)
                on_progress({**record, "index": index, "total": total})
            records.append(record)
    return records


def _embedding(model: PreTrainedModel, sources: dict[str, tuple[Piece, ...]]) -> Matrix:
    module = model.get_input_embeddings()
    parameter = f"{next(name for name, other in model.named_modules() if other is module)}.weight"
    rows, columns = model.get_parameter(parameter).shape
    (piece,) = sources[parameter]
    return Matrix(parameter, None, False, rows, columns, ((piece.name.removesuffix(".weight"), 0, rows),))


def _joined(parts: list[QuantWeight], spec: QuantSpec) -> QuantWeight:
    codes, scales, zeros = (torch.cat([getattr(part, name) for part in parts]) for name in ("codes", "scales", "zeros"))
    return QuantWeight(codes, scales, zeros, spec)
