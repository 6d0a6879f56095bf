"""Which tensors a GGUF file gets, of which types, and their bytes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bittern.artifact import Artifact
from bittern.convert.cast import DTYPES, cast_values
from bittern.convert.gguf_model import GgufModel, merged_name
from bittern.errors import BitternError
from bittern.fit import Fit
from bittern.formats import gguf as blocks
from bittern.formats.gguf_rope import FREQUENCIES

if TYPE_CHECKING:
    from bittern.formats.gguf_file import GgufFile

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PIECE = 2**21  # elements


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written, from headers alone."""

    name: str
    sources: tuple[str, ...]
    kind: str
    shape: tuple[int, ...]
    packed: bool = False
    heads: int | None = None
    add: float = 0.0
    values: Tensor | None = field(default=None, compare=False)  # those that no checkpoint holds

    @property
    def nbytes(self) -> int:
        if self.kind in FLOATS:
            return prod(self.shape) * FLOATS[self.kind].itemsize
        return prod(self.shape) // blocks.BLOCK * blocks.BLOCK_BYTES[self.kind]


def plan_tensors(
    artifact: Artifact, fitted: Fit, model: GgufModel, tied: list[str], dtype: str | None, allow_inexact: bool
) -> list[PlannedTensor]:
    """Every tensor of the file, in the order of the checkpoint."""
    names = model.names()
    zero = _zero_biases(artifact, fitted)
    found: dict[str, list[str]] = {}
    for name in [*artifact.plain, *(f"{layer}.weight" for layer in artifact.layers)]:
        if name in tied or name in zero or name.endswith("rotary_emb.inv_freq"):
            continue
        there = names.get_name(merged_name(name), try_suffixes=(".weight", ".bias"))
        if there is None:
            raise BitternError(f"{name}: llama.cpp's {model.architecture} has no place for it")
        found.setdefault(there, []).append(name)
    plan = []
    for there, sources in found.items():
        sources.sort(key=_expert)
        layers = [source.removesuffix(".weight") for source in sources]
        packed = [layer for layer in layers if layer in artifact.layers]
        if packed and len(packed) != len(layers):
            raise BitternError(
                f"{there}: expected its experts all packed or none, found {len(packed)} of {len(layers)}"
            )
        if packed:
            kind, shape = _packed_kind(artifact, packed, dtype, allow_inexact)
        else:
            kind, shape = _float_kind(artifact, there, sources, dtype)
        merged = (len(sources), *shape) if ".experts." in sources[0] else shape
        if len(sources) > 1 and merged == shape:
            raise BitternError(f"{there}: expected one tensor for it, found {', '.join(sources)}")
        plan.append(
            PlannedTensor(
                name=there,
                sources=tuple(packed or sources),
                kind=kind,
                shape=merged,
                packed=bool(packed),
                heads=model.heads_to_turn(there),
                add=model.added(there),
            )
        )
    factors = model.rope_factors()
    if factors is not None:
        plan.append(PlannedTensor(FREQUENCIES, (), "F32", tuple(factors.shape), values=factors))
    return plan


def _expert(name: str) -> int:
    """The number of an expert; names in a file's order are not in that of the numbers."""
    found = re.search(r"\.experts\.(\d+)\.", name)
    return int(found.group(1)) if found else 0


def _zero_biases(artifact: Artifact, fitted: Fit) -> set[str]:
    """Biases of zeros that AutoGPTQ gave to layers whose architecture has none."""
    names = {f"{layer}.bias" for layer in artifact.layers} - fitted.tensors
    return {name for name in names if name in artifact.plain and not bool(artifact.checkpoint.read(name).any())}


def _packed_kind(
    artifact: Artifact, layers: list[str], dtype: str | None, allow_inexact: bool
) -> tuple[str, tuple[int, ...]]:
    """The type of packed layers that share a tensor, and the shape of each."""
    found = set()
    for layer in layers:
        info = artifact.layers[layer]
        reason = blocks.refuse(info.spec)
        kind = blocks.kind_for(info.spec, exact=not allow_inexact)
        uneven = blocks.refuse_columns(info.in_features)
        if uneven is not None:
            reason, kind = uneven, None
        if artifact.scheme is not None and artifact.scheme.any_desc_act and info.spec.group_size != -1:
            _refuse_act_order(artifact, layer)
        if reason is not None and not allow_inexact:
            raise BitternError(f"{layer}: not exact in GGUF: {reason} (--allow-inexact rounds)")
        found.add((kind or _name_of(DTYPES[dtype or "fp16"]), (info.out_features, info.in_features)))
    if len(found) > 1:
        raise BitternError(f"{layers[0]}: expected all experts of one type, found {sorted(kind for kind, _ in found)}")
    return found.pop()


def _refuse_act_order(artifact: Artifact, layer: str) -> None:
    if artifact.read(layer).g_idx is not None:
        raise BitternError(f"{layer}: GGUF stores columns in order, found act-order (desc_act)")


def _float_kind(artifact: Artifact, there: str, sources: list[str], dtype: str | None) -> tuple[str, tuple[int, ...]]:
    """The type of tensors of floats that share one, and the shape of each."""
    infos = [artifact.plain[source] for source in sources]
    for info in infos:
        if not info.dtype.is_floating_point:
            raise BitternError(f"{info.name}: expected floats, found {info.dtype}")
        if info.shape != infos[0].shape:
            raise BitternError(f"{info.name}: expected shape {infos[0].shape} as {infos[0].name}, found {info.shape}")
    if len(infos[0].shape) < 2 or "ffn_gate_inp" in there:  # a router; llama.cpp wants both in F32
        return "F32", infos[0].shape
    if dtype is None and artifact.checkpoint.gguf is not None:
        return _stored_kind(artifact.checkpoint.gguf, sources), infos[0].shape
    return _name_of(infos[0].dtype if dtype is None else DTYPES[dtype]), infos[0].shape


def _stored_kind(file: GgufFile, sources: list[str]) -> str:
    """The type of tensors of a GGUF file, which reads them all as float32; F16 where they are in blocks."""
    kinds = {kind for source in sources for kind in file.kinds(source)}
    if len(kinds) == 1 and kinds <= FLOATS.keys():
        return kinds.pop()
    return "F32" if kinds & FLOATS.keys() else "F16"


def _name_of(dtype: torch.dtype) -> str:
    return next((name for name, known in FLOATS.items() if known == dtype), "F32")


def pieces(
    artifact: Artifact, tensor: PlannedTensor, allow_inexact: bool = False
) -> Iterator[tuple[Tensor, float, float]]:
    """The bytes of a tensor in order.

    Args:
        artifact: where it comes from.
        tensor: of :func:`plan_tensors`.
        allow_inexact: round grids.

    Yields:
        Values; how far they are from a packed layer's, in steps of its grid; their largest relative error by a cast.

    Raises:
        BitternError: for values that are not finite or do not fit, act-order, and grids that would be rounded.
    """
    if tensor.values is not None:
        yield tensor.values, 0.0, 0.0
    for source in tensor.sources:
        if tensor.packed:
            yield *_packed_bytes(artifact, tensor, source, allow_inexact), 0.0
            continue
        info = artifact.plain[source]
        step = info.numel if tensor.heads else _PIECE
        for start in range(0, info.numel, step):
            values = artifact.checkpoint.read_elements(source, start, min(start + step, info.numel))
            if tensor.heads:
                values = values.view(info.shape)[_turned(info.shape[0], tensor.heads)].flatten()
            if tensor.add:
                values = values.float() + tensor.add
            done, error = _cast(values, FLOATS[tensor.kind], source)
            yield done, 0.0, error


def _packed_bytes(artifact: Artifact, tensor: PlannedTensor, layer: str, allow_inexact: bool) -> tuple[Tensor, float]:
    """A packed layer, its rows in llama.cpp's order."""
    weight = artifact.read(layer)
    if weight.g_idx is not None:
        raise BitternError(f"{layer}: GGUF stores columns in order, found act-order (g_idx)")
    if tensor.heads:
        rows = _turned(weight.out_features, tensor.heads)
        weight = weight.rows(rows)
    if tensor.kind in FLOATS:
        exact = weight.dequantize()
        values, _ = _cast(exact.flatten(), FLOATS[tensor.kind], layer)
        steps = weight.scales.float().abs()[:, weight.group_index()]
        moved = (values.view(exact.shape).float() - exact).abs_() / steps
        return values, float(moved.nan_to_num_(0.0).max())
    try:
        packed = blocks.pack(weight, tensor.kind, exact=not allow_inexact)
        return torch.from_numpy(packed), blocks.rounding(weight, tensor.kind) if allow_inexact else 0.0
    except BitternError as problem:
        raise BitternError(f"{layer}: {problem}") from problem


def _turned(rows: int, heads: int) -> Tensor:
    """The model's row for each row of the file; see :meth:`GgufModel.heads_to_turn`."""
    if rows % (2 * heads):
        raise BitternError(f"expected {heads} heads of an even number of rows, found {rows} rows")
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).flatten()


def _cast(values: Tensor, dtype: torch.dtype, name: str) -> tuple[Tensor, float]:
    result, cast = cast_values(values, dtype, name)
    if cast.not_finite:
        raise BitternError(f"{name}: expected finite values, found {cast.not_finite} that are NaN or Inf")
    if cast.overflowed:
        raise BitternError(
            f"{name}: its largest magnitude {cast.max_magnitude:g} does not fit {cast.dtype}; bf16 holds it"
        )
    return result, cast.max_relative_error
