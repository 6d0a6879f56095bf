"""MLX affine: what mlx-lm writes and runs on Apple's GPUs, and mlx's CPU build elsewhere.

Per layer, with K = in_features, N = out_features, G groups of 32, 64 or 128 columns and b bits:

======  =============  ======  ============================================================
tensor  shape          dtype
======  =============  ======  ============================================================
weight  [N, K*b / 32]  uint32  codes, packed along K as in :mod:`bittern.formats.bits`
scales  [N, G]         float
biases  [N, G]         float   ``-zero * scale``: a weight is ``scale * code + bias``
======  =============  ======  ============================================================

Symmetric grids are exact in any dtype that holds the scales, since the zero is a power of two; asymmetric ones are
exact in float32. A larger group repeats its scale and bias in blocks; the whole row does in blocks of 32.

config.json has the same object as ``quantization`` and ``quantization_config``. Its key "bittern" says what the
tensors do not: the grids before they were cut into blocks, and which are symmetric. mlx-lm looks layers up by
their names and passes it over. Checked with mlx 0.32 and mlx-lm 0.32.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from bittern.errors import BitternError
from bittern.formats.bits import (
    check_in_order,
    check_range,
    check_tensor,
    check_zeros,
    exact_scales,
    float_scales,
    pack_rows,
    unpack_rows,
)
from bittern.formats.scheme import PackedLayer, Scheme, wrong_key
from bittern.shards import TensorInfo, dtype_name
from bittern.weight import QuantSpec, QuantWeight

SUFFIXES = ("weight", "scales", "biases")
_BLOCKS = (128, 64, 32)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_FARTHEST = 1 / 8  # of a step, that a stored bias may be from an integer zero


def names(layer: str) -> dict[str, str]:
    """Suffix -> tensor name of one packed layer."""
    return {suffix: f"{layer}.{suffix}" for suffix in SUFFIXES}


def packed_layers(tensors: Iterable[str]) -> list[str]:
    """The packed layers among the tensor names of a checkpoint, in its order; mlx-lm packs embeddings too."""
    present = list(tensors)
    known = set(present)
    layers = [name.removesuffix(".weight") for name in present if name.endswith(".weight")]
    return [layer for layer in layers if known.issuperset(names(layer).values())]


def exact_dtype(sym: bool) -> torch.dtype:
    """The dtype of scales and biases that holds grids exactly: fp16 mostly cannot hold the -zero * scale of others."""
    return torch.float16 if sym else torch.float32


def refuse(spec: QuantSpec, dtype: torch.dtype) -> str | None:
    """Why the format cannot hold a grid exactly with scales and biases in ``dtype``; None when it can."""
    if _block(spec) is None:
        return _no_block(spec)
    if not spec.sym and dtype != torch.float32:
        return (
            f"MLX stores -zero * scale, which {dtype_name(dtype)} rounds in asymmetric layers; "
            "float32 scales and biases hold it exactly"
        )
    return None


def layer_shape(layer: str, tensors: Mapping[str, TensorInfo], spec: QuantSpec) -> tuple[int, int]:
    """(out_features, in_features) of a packed layer, from the shapes of its tensors.

    Raises:
        BitternError: when they contradict each other or the grid that the config states.
    """
    shapes = {suffix: tensors[name].shape for suffix, name in names(layer).items()}
    for suffix, shape in shapes.items():
        if len(shape) != 2 or 0 in shape:
            raise BitternError(f"{layer}.{suffix}: expected two dimensions, found shape {shape}")
    out_features, width = shapes["weight"]
    if width % spec.bits:
        raise BitternError(f"{layer}.weight: expected rows of whole {spec.bits}-bit blocks, found {width} words")
    in_features, groups = width * 32 // spec.bits, shapes["scales"][1]
    for suffix in ("scales", "biases"):
        if shapes[suffix] != (out_features, groups):
            raise BitternError(f"{layer}.{suffix}: expected shape {(out_features, groups)}, found {shapes[suffix]}")
    block = in_features // groups
    if in_features % groups or block not in _BLOCKS or spec.columns_per_group(in_features) % block:
        raise BitternError(
            f"{layer}.scales: expected groups of 32, 64 or 128 that make up {spec.columns_per_group(in_features)} of"
            f" {in_features} columns, found {groups} groups"
        )
    return out_features, in_features


def plan(
    layer: str, out_features: int, in_features: int, spec: QuantSpec, dtype: torch.dtype = torch.float16
) -> list[TensorInfo]:
    """Names, dtypes and shapes of the tensors that :func:`pack` will return for a layer.

    Args:
        dtype: of scales and biases.

    Raises:
        BitternError: for a shape, a group size or a dtype that mlx does not have.
    """
    block = _check(layer, out_features, in_features, spec, dtype)
    groups = in_features // block
    return [
        TensorInfo(f"{layer}.weight", torch.uint32, (out_features, in_features * spec.bits // 32)),
        TensorInfo(f"{layer}.scales", dtype, (out_features, groups)),
        TensorInfo(f"{layer}.biases", dtype, (out_features, groups)),
    ]


def pack(weight: QuantWeight, dtype: torch.dtype = torch.float16, *, exact: bool = True) -> dict[str, Tensor]:
    """The tensors of one layer, by suffix.

    Args:
        dtype: of scales and biases.
        exact: refuse what ``dtype`` would round; otherwise :func:`rounding` says what that costs.

    Raises:
        BitternError: for shapes and group sizes that mlx does not have, codes or zeros out of range, act-order,
            scales that overflow, and with ``exact`` scales or biases that are rounded.
    """
    spec = weight.spec
    block = _check("weight", weight.out_features, weight.in_features, spec, dtype)
    check_range(weight)
    check_in_order(weight, "MLX")
    if spec.sym:
        check_zeros(weight.zeros, spec.bits, "zeros")
    scales = exact_scales(weight, dtype) if exact else weight.scales.to(dtype)
    biases = _biases(scales, weight.zeros)
    stored = biases.to(dtype)
    if not bool(torch.isfinite(stored).all() and torch.isfinite(scales).all()):
        raise BitternError(f"biases: expected values that {dtype_name(dtype)} holds, found larger ones")
    if exact and not torch.equal(stored.double(), biases):
        hint = "--allow-inexact lets it" if dtype == torch.float32 else "float32 scales and biases hold it exactly"
        raise BitternError(f"biases: {dtype_name(dtype)} rounds -zero * scale; {hint}")
    if exact and not spec.sym and bool(((scales == 0) & (weight.zeros != spec.mid_code)).any()):
        raise BitternError("scales: expected none of 0, beside which MLX cannot store a zero, found one")
    repeats = spec.columns_per_group(weight.in_features) // block
    return {
        "weight": pack_rows(weight.codes.T.contiguous(), spec.bits).T.contiguous().view(torch.uint32),
        "scales": scales.repeat_interleave(repeats, dim=1),
        "biases": stored.repeat_interleave(repeats, dim=1),
    }


def rounding(weight: QuantWeight, dtype: torch.dtype) -> float:
    """The largest error of a weight that :func:`pack` would store in ``dtype``, in steps of its grid; 0 when exact."""
    exact, scales = weight.scales.double(), weight.scales.to(dtype)
    offset = _biases(scales, weight.zeros).to(dtype).double() + weight.zeros * exact  # the error of code 0
    slope = (scales.double() - exact) * weight.spec.max_code
    worst = torch.maximum(offset.abs(), (offset + slope).abs())  # it is linear in the code
    return float((worst / exact.abs()).masked_fill(exact == 0, 0).max())


def unpack(tensors: Mapping[str, Tensor], layer: PackedLayer, scheme: Scheme) -> QuantWeight:
    """Read one layer back.

    Args:
        tensors: suffix -> tensor.
        layer: shape and grid that headers and config state.
        scheme: of the artifact; not needed, the tensors say it all.

    Raises:
        BitternError: when dtypes, shapes or values contradict each other or the arguments, and for biases that no
            integer zero explains. mlx itself rounds scales after it chose the biases; what is within an eighth of a
            step of an integer zero, and within the rounding of its dtype, counts as that zero.
    """
    spec, out_features, in_features = layer.spec, layer.out_features, layer.in_features
    weight = check_tensor(tensors, "weight", (out_features, in_features * spec.bits // 32), (torch.uint32,))
    blocks = tensors["scales"].shape[-1] if "scales" in tensors and tensors["scales"].ndim == 2 else 0
    scales = check_tensor(tensors, "scales", (out_features, blocks), _FLOATS)
    biases = check_tensor(tensors, "biases", (out_features, blocks), (scales.dtype,))
    groups = spec.groups(in_features)
    if blocks % groups or in_features % blocks:
        raise BitternError(f"scales: expected a multiple of {groups} groups, found {blocks}")
    scales, biases = _merge("scales", scales, groups), _merge("biases", biases, groups)
    zeros = _zeros(scales, biases, spec)
    if spec.sym:
        check_zeros(zeros, spec.bits, "biases")
    codes = unpack_rows(weight.view(torch.int32).T.contiguous(), spec.bits, in_features).T
    return QuantWeight(codes, float_scales(scales), zeros, spec)


def config(spec: QuantSpec, layers: Mapping[str, QuantSpec | None]) -> dict[str, Any]:
    """The object for both ``quantization`` and ``quantization_config`` in config.json.

    Args:
        spec: the grid of most layers.
        layers: every matrix by its checkpoint name, with its grid or None when it was left as it is.

    Raises:
        BitternError: for group sizes that mlx does not have.
    """
    kept = {name: grid for name, grid in layers.items() if grid is not None}
    for name, grid in {"default": spec, **kept}.items():
        if _block(grid) is None:
            raise BitternError(f"{name}: {_no_block(grid)}")
    result: dict[str, Any] = _own(spec)
    for name, layer in layers.items():
        if layer is None:
            result[name] = False
        elif _own(layer) != _own(spec):
            result[name] = _own(layer)
    own = {name: _grid(grid) for name, grid in kept.items() if grid != spec}
    # Bits and group size stand in it because mlx-swift reads every object of the config as a layer's grid.
    return result | {"bittern": _grid(spec) | ({"layers": own} if own else {})}


def read_config(found: Mapping[str, Any]) -> Scheme:
    """Understand the quantization config of an artifact, whoever made it.

    Raises:
        BitternError: naming the key, for a mode other than affine and for grids that bittern does not have.
    """
    own = found.get("bittern")
    if own is not None and not (isinstance(own, Mapping) and isinstance(own.get("layers", {}), Mapping)):
        raise wrong_key("bittern", "an object", own)
    default = _spec("", found)
    if own is not None:
        default = _spec("bittern", own)
    overrides: list[tuple[str, Mapping[str, Any] | None]] = []
    for name, grid in found.items() if own is None else own.get("layers", {}).items():
        if isinstance(grid, Mapping):
            overrides.append((f"{re.escape(name)}$", _grid(_spec(name, grid))))
    overrides += [(f"{re.escape(name)}$", None) for name, grid in found.items() if grid is False]
    return Scheme(format="mlx", default=default, overrides=tuple(overrides))


def _own(spec: QuantSpec) -> dict[str, Any]:
    """What mlx has to know of a grid."""
    return {"group_size": _block(spec), "bits": spec.bits, "mode": "affine"}


def _grid(spec: QuantSpec) -> dict[str, Any]:
    return {"group_size": spec.group_size, "bits": spec.bits, "sym": spec.sym}


def _spec(name: str, grid: Mapping[str, Any]) -> QuantSpec:
    """The grid that an object of the config states; mlx's own are never symmetric by name."""
    where = f"{name}." if name else ""
    if grid.get("mode", "affine") != "affine":
        raise wrong_key(f"{where}mode", "'affine'", grid["mode"])
    bits, size, sym = grid.get("bits"), grid.get("group_size"), grid.get("sym", False)
    if type(bits) is not int or type(size) is not int or type(sym) is not bool:
        raise wrong_key(f"{where}bits and group_size", "integers", (bits, size))
    try:
        return QuantSpec(bits, size, sym)
    except BitternError as error:
        raise BitternError(f"quantization_config: {where}{error}") from error


def _block(spec: QuantSpec) -> int | None:
    """The group of mlx that a grid is written in, None without one.

    The config is one for all layers, so a whole-row group gets the block that divides every row.
    """
    if spec.group_size == -1:
        return 32
    return next((block for block in _BLOCKS if spec.group_size % block == 0), None)


def _biases(scales: Tensor, zeros: Tensor) -> Tensor:
    """``-zero * scale`` without rounding, in float64."""
    return -(zeros.double() * scales.double())


def _zeros(scales: Tensor, biases: Tensor, spec: QuantSpec) -> Tensor:
    """The integer zeros that biases stand for, uint8; the middle where scale and bias are 0."""
    steps = -biases.double() / scales.double()
    steps = torch.where((scales == 0) & (biases == 0), float(spec.mid_code), steps)
    zeros = steps.round()
    tolerance = (zeros.abs() * torch.finfo(scales.dtype).eps).clamp_max(_FARTHEST)
    wrong = ~((steps - zeros).abs() <= tolerance) | (zeros < 0) | (zeros > spec.max_code)
    if bool(wrong.any()):
        raise BitternError(
            f"biases: expected -zero * scale with an integer zero from 0 to {spec.max_code}, found a zero of"
            f" {float(steps[wrong][0]):g}; such a layer is no integer grid: mlx_lm.convert --dequantize gives floats"
        )
    return zeros.to(torch.uint8)


def _merge(name: str, values: Tensor, groups: int) -> Tensor:
    """(N, blocks) -> (N, groups), of blocks that all repeat the value of their group."""
    merged = values.view(values.shape[0], groups, -1)
    if not bool((merged == merged[:, :, :1]).all()):
        raise BitternError(f"{name}: expected the same value in all blocks of one of the {groups} groups, found others")
    return merged[:, :, 0].contiguous()


def _check(what: str, out_features: int, in_features: int, spec: QuantSpec, dtype: torch.dtype) -> int:
    block = _block(spec)
    if dtype not in _FLOATS:
        raise BitternError(f"dtype: expected float16, bfloat16 or float32 for scales and biases, found {dtype}")
    if block is None:
        raise BitternError(f"{what}: {_no_block(spec)}")
    group = max(block, spec.group_size)
    if not out_features or not in_features or in_features % group:
        raise BitternError(f"{what}: MLX needs in_features divisible by the group of {group}, found {in_features}")
    return block


def _no_block(spec: QuantSpec) -> str:
    return f"MLX has groups of 32, 64 and 128, and their multiples by repeating; found {spec.group_size}"
