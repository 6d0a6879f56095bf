"""AWQ gemm: the layout of AutoAWQ, which transformers, GPTQModel, vLLM and SGLang read. 4 bits alone.

Per layer, with K = in_features, N = out_features and G groups:

=======  ==========  =======  ============================================
tensor   shape       dtype
=======  ==========  =======  ============================================
qweight  [K, N / 8]  int32    codes, packed along N
qzeros   [G, N / 8]  int32    zeros as they are, packed along N
scales   [G, N]      float16
=======  ==========  =======  ============================================

Nibble i of word c holds column ``8c + (0, 2, 4, 6, 1, 3, 5, 7)[i]``. Any 4-bit grid of GPTQ fits, but the config
has no word for a symmetric one: its ``zero_point: false`` takes qzeros away, which AutoAWQ's own kernels need.
Symmetric layers are written with their zeros of 8, and a key "bittern", which readers pass over, says that they
are symmetric, so that repacking back gives the same config. transformers 5.23 and GPTQModel 7.7 load such files
(checked); vLLM and SGLang pick their keys by name. Skipped layers stand there twice, as GPTQModel knows ``dynamic``
and the others ``modules_to_not_convert``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from bittern.errors import BitternError
from bittern.formats.bits import check_in_order, check_range, check_tensor, check_zeros, exact_scales, float_scales
from bittern.formats.scheme import PackedLayer, Scheme, wrong_key
from bittern.shards import TensorInfo
from bittern.weight import QuantSpec, QuantWeight

SUFFIXES = ("qweight", "qzeros", "scales")
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word holds this one of its eight columns
_GROUP_SIZES = (-1, 16, 32, 64, 128)


def names(layer: str) -> dict[str, str]:
    """Suffix -> tensor name of one packed layer."""
    return {suffix: f"{layer}.{suffix}" for suffix in SUFFIXES}


def packed_layers(tensors: Iterable[str]) -> list[str]:
    """The packed layers among the tensor names of a checkpoint, in its order."""
    return [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]


def refuse_scaled_activations(tensors: Iterable[str]) -> None:
    """Refuse the scales that AutoAWQ gave the activations of some MLPs: the weights after them compensate for these.

    Raises:
        BitternError: naming the first of them.
    """
    found = next((name for name in tensors if name.endswith((".act.scales", ".gelu_impl.scales"))), None)
    if found is not None:
        raise BitternError(
            f"{found}: expected scales of packed layers alone, found an activation's, which bittern does not apply"
        )


def refuse(spec: QuantSpec) -> str | None:
    """Why the format cannot hold a grid exactly, or its readers do not take it; None when all is well."""
    if spec.bits != 4:
        return f"AWQ has 4 bits alone, found {spec.bits}"
    if spec.group_size not in _GROUP_SIZES:
        return f"AWQ's readers take groups of 16, 32, 64, 128 and -1, found {spec.group_size}"
    return None


def layer_shape(layer: str, tensors: Mapping[str, TensorInfo], spec: QuantSpec) -> tuple[int, int]:
    """(out_features, in_features) of a packed layer, from the shapes of its tensors.

    Raises:
        BitternError: when they contradict each other or the grid that the config states.
    """
    qweight = tensors[f"{layer}.qweight"].shape
    if len(qweight) != 2 or 0 in qweight:
        raise BitternError(f"{layer}.qweight: expected two dimensions, found shape {qweight}")
    in_features, out_features = qweight[0], qweight[1] * 8
    groups = spec.groups(in_features)
    expected = {"qzeros": (groups, qweight[1]), "scales": (groups, out_features)}
    for suffix, shape in expected.items():
        stored = tensors.get(f"{layer}.{suffix}")
        if stored is None and suffix == "qzeros" and spec.sym:
            continue
        if stored is None or stored.shape != shape:
            found = "none" if stored is None else stored.shape
            raise BitternError(f"{layer}.{suffix}: expected shape {shape}, found {found}")
    return out_features, in_features


def plan(layer: str, out_features: int, in_features: int, spec: QuantSpec) -> list[TensorInfo]:
    """Names, dtypes and shapes of the tensors that :func:`pack` will return for a layer.

    Raises:
        BitternError: for a grid or a shape that the format's readers do not take.
    """
    _check(layer, out_features, in_features, spec)
    groups = spec.groups(in_features)
    return [
        TensorInfo(f"{layer}.qweight", torch.int32, (in_features, out_features // 8)),
        TensorInfo(f"{layer}.qzeros", torch.int32, (groups, out_features // 8)),
        TensorInfo(f"{layer}.scales", torch.float16, (groups, out_features)),
    ]


def pack(weight: QuantWeight) -> dict[str, Tensor]:
    """The tensors of one layer, by suffix. Nothing is rounded: :func:`unpack` gives the same weight.

    Raises:
        BitternError: for a grid or a shape that the format's readers do not take, codes or zeros out of range,
            act-order, or scales that float16 does not hold.
    """
    _check("weight", weight.out_features, weight.in_features, weight.spec)
    check_range(weight)
    check_in_order(weight, "AWQ")
    if weight.spec.sym:
        check_zeros(weight.zeros, 4, "zeros")
    return {
        "qweight": _pack_columns(weight.codes.T),
        "qzeros": _pack_columns(weight.zeros.T),
        "scales": exact_scales(weight, torch.float16).T.contiguous(),
    }


def unpack(tensors: Mapping[str, Tensor], layer: PackedLayer, scheme: Scheme) -> QuantWeight:
    """Read one layer back.

    Args:
        tensors: suffix -> tensor; without ``qzeros`` in a symmetric layer all zeros are 8.
        layer: shape and grid that headers and config state.
        scheme: of the artifact; not needed, the tensors say it all.

    Raises:
        BitternError: when dtypes, shapes or values contradict each other or the arguments.
    """
    spec, out_features, in_features = layer.spec, layer.out_features, layer.in_features
    groups = spec.groups(in_features)
    qweight = check_tensor(tensors, "qweight", (in_features, out_features // 8), (torch.int32,))
    scales = check_tensor(tensors, "scales", (groups, out_features), (torch.float16, torch.bfloat16, torch.float32))
    if "qzeros" in tensors or not spec.sym:
        qzeros = check_tensor(tensors, "qzeros", (groups, out_features // 8), (torch.int32,))
        zeros = _unpack_columns(qzeros).T.contiguous()
    else:
        zeros = torch.full((out_features, groups), spec.mid_code, dtype=torch.uint8)
    if spec.sym:
        check_zeros(zeros, 4, "qzeros")
    return QuantWeight(_unpack_columns(qweight).T, float_scales(scales.T), zeros, spec)


def config(spec: QuantSpec, layers: Mapping[str, QuantSpec | None]) -> dict[str, Any]:
    """The object for ``quantization_config`` in config.json.

    Args:
        spec: the grid of most layers.
        layers: every matrix by its checkpoint name, with its grid or None when it was left as it is.

    Raises:
        BitternError: for bits or group sizes other than ``spec``'s, which the config has one of, and for a layer
            left as it is whose name is a part of a packed one's: readers skip by parts of names.
    """
    kept = {name: grid for name, grid in layers.items() if grid is not None}
    skipped = [name for name, grid in layers.items() if grid is None]
    for name, grid in {"default": spec, **kept}.items():
        reason = refuse(grid)
        if reason is None and grid.group_size != spec.group_size:
            reason = f"AWQ has one group size for all layers, found {grid.group_size} and {spec.group_size}"
        if reason is not None:
            raise BitternError(f"{name}: {reason}")
    for name in skipped:
        longer = next((other for other in kept if name in other), None)
        if longer is not None:
            raise BitternError(f"{name}: AWQ's readers would skip {longer} with it, whose name holds its name")
    result: dict[str, Any] = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": spec.group_size,
        "zero_point": True,
        "version": "gemm",
        "format": "gemm",
        "modules_to_not_convert": skipped or None,
    }
    if skipped:  # the same for GPTQModel, which passes over modules_to_not_convert
        result["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in skipped}
    if "lm_head" in kept:
        result["lm_head"] = True
    unlike = [name for name, grid in kept.items() if grid.sym != spec.sym]
    if spec.sym or unlike:
        result["bittern"] = {"sym": spec.sym} | ({"unlike": unlike} if unlike else {})
    return result


def read_config(found: Mapping[str, Any]) -> Scheme:
    """Understand the quantization config of an artifact, whoever made it.

    ``modules_to_not_convert`` names layers by any part of their names, as in AutoAWQ.

    Raises:
        BitternError: naming the key, for anything but 4-bit gemm tensors.
    """
    method = found.get("quant_method", found.get("method", "awq"))
    if method != "awq":
        raise wrong_key("quant_method", "'awq'", method)
    version = str(found.get("version") or found.get("format") or found.get("checkpoint_format") or "gemm")
    if version.lower() != "gemm":
        raise wrong_key("version", "'gemm', the only layout of AWQ that bittern reads", version)
    dynamic = found.get("dynamic") or {}
    if not isinstance(dynamic, Mapping) or not all(key.startswith("-:") for key in dynamic):
        raise wrong_key("dynamic", "skipped layers alone in AWQ", dynamic)
    bits, size = found.get("bits", found.get("w_bit")), found.get("group_size", found.get("q_group_size", 128))
    zero_point = found.get("zero_point", True)
    if bits != 4:
        raise wrong_key("bits", "4", bits)
    if type(size) is not int or type(zero_point) is not bool:
        raise wrong_key("group_size and zero_point", "an integer and true or false", (size, zero_point))
    skipped = found.get("modules_to_not_convert") or []
    if not isinstance(skipped, list) or not all(isinstance(part, str) for part in skipped):
        raise wrong_key("modules_to_not_convert", "a list of names", skipped)
    own = found.get("bittern", {})
    sym, unlike = (own.get("sym", not zero_point), own.get("unlike", [])) if isinstance(own, Mapping) else (None, None)
    if type(sym) is not bool or not isinstance(unlike, list) or not all(isinstance(name, str) for name in unlike):
        raise wrong_key("bittern", "an object with sym and a list of layers", own)
    overrides: list[tuple[str, Mapping[str, Any] | None]] = [(f".*{re.escape(part)}", None) for part in skipped]
    overrides += [(key.removeprefix("-:"), None) for key in dynamic]
    overrides += [(f"{re.escape(name)}$", {"sym": not sym}) for name in unlike]
    return Scheme(format="awq", default=QuantSpec(4, size, sym), overrides=tuple(overrides))


def _pack_columns(values: Tensor) -> Tensor:
    """uint8 (n, 8m), each below 16 -> int32 (n, m)."""
    lanes = values.reshape(values.shape[0], -1, 8).to(torch.int32)
    packed = torch.zeros(lanes.shape[:2], dtype=torch.int32)
    for nibble, column in enumerate(_ORDER):
        packed |= lanes[:, :, column] << (4 * nibble)
    return packed


def _unpack_columns(packed: Tensor) -> Tensor:
    """The inverse of :func:`_pack_columns`."""
    lanes = torch.empty(*packed.shape, 8, dtype=torch.uint8)
    for nibble, column in enumerate(_ORDER):
        lanes[:, :, column] = (packed >> (4 * nibble)) & 15
    return lanes.view(packed.shape[0], -1)


def _check(what: str, out_features: int, in_features: int, spec: QuantSpec) -> None:
    reason = refuse(spec)
    if reason is not None:
        raise BitternError(f"{what}: {reason}")
    if out_features % 8 or not out_features or not in_features:
        raise BitternError(f"{what}: AWQ needs out_features divisible by 8, found {out_features}")
    if in_features % spec.columns_per_group(in_features):
        raise BitternError(f"{what}: group_size {spec.group_size} does not divide in_features {in_features}")
