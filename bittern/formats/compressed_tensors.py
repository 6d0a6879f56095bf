"""compressed-tensors pack-quantized: what llm-compressor writes, and vLLM and transformers read.

Per layer, with K = in_features, N = out_features, G groups and b bits:

=================  ==================  =====  ==========================================================
tensor             shape               dtype  what
=================  ==================  =====  ==========================================================
weight_packed      [N, ceil(K*b/32)]   int32  codes, packed along K: GPTQ's qweight transposed
weight_scale       [N, G]              float  in the dtype of the model, as a rule
weight_zero_point  [ceil(N*b/32), G]   int32  zeros, packed along N; only in asymmetric layers
weight_shape       [2]                 int64  N, K
=================  ==================  =====  ==========================================================

Others' artifacts also have ``weight_g_idx`` [K] (act-order), zeros in int8 [N, G] less ``2 ** (b - 1)``, zeros
in symmetric layers, and from library versions before 0.18 ten 3-bit values in each word. Written against
compressed-tensors 0.20, checked with it in the tests.
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
    describe,
    exact_scales,
    float_scales,
    pack_rows,
    unpack_rows,
    words,
)
from bittern.formats.scheme import PackedLayer, Scheme, wrong_key
from bittern.shards import TensorInfo
from bittern.weight import QuantSpec, QuantWeight

NAME = "compressed-tensors"
SUFFIXES = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
_FORMAT = "pack-quantized"
_SCALES = (torch.float16, torch.bfloat16, torch.float32)
_LOOSE = 10  # 3-bit values in a word before library version 0.18; the upper two bits stayed empty
_EXPERT = re.compile(r"\.experts\.\d+\.")


def names(layer: str) -> dict[str, str]:
    """Suffix -> tensor name, of all tensors that a packed layer may have."""
    return {suffix: f"{layer}.{suffix}" for suffix in SUFFIXES}


def packed_layers(tensors: Iterable[str]) -> list[str]:
    """The packed layers among the tensor names of a checkpoint, in its order."""
    return [name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")]


def refuse(spec: QuantSpec) -> str | None:
    """Why the format cannot hold a grid exactly: never."""
    return None


def layer_shape(layer: str, tensors: Mapping[str, TensorInfo], spec: QuantSpec) -> tuple[int, int]:
    """(out_features, in_features) of a packed layer, from the shapes of its tensors.

    With one group a row, K is what fills the words; ``weight_shape`` confirms it when the layer is read.

    Raises:
        BitternError: when they contradict each other or the grid that the config states.
    """
    for suffix in ("weight_packed", "weight_scale"):
        found = tensors.get(f"{layer}.{suffix}")
        if found is None or len(found.shape) != 2 or 0 in found.shape:
            shape = "none" if found is None else f"shape {found.shape}"
            raise BitternError(f"{layer}.{suffix}: expected a tensor of two dimensions, found {shape}")
    out_features, width = tensors[f"{layer}.weight_packed"].shape
    rows, groups = tensors[f"{layer}.weight_scale"].shape
    if rows != out_features:
        raise BitternError(f"{layer}.weight_scale: expected {out_features} rows, found {rows}")
    full = width * 32 // spec.bits
    for in_features in (full if spec.group_size == -1 else groups * spec.group_size, full):
        widths = {_height(in_features, spec.bits, loose) for loose in (False, spec.bits == 3)}
        if width in widths and spec.groups(in_features) == groups:
            return out_features, in_features
    raise BitternError(
        f"{layer}.weight_packed: expected as many {spec.bits}-bit columns as {groups} groups of {spec.group_size} have,"
        f" found {width} words a row"
    )


def plan(
    layer: str, out_features: int, in_features: int, spec: QuantSpec, dtype: torch.dtype = torch.float16
) -> list[TensorInfo]:
    """Names, dtypes and shapes of the tensors that :func:`pack` will return for a layer.

    Args:
        dtype: of the scales; readers expect the dtype of the model.

    Raises:
        BitternError: for a shape, a group size or a dtype that the format's readers do not take.
    """
    _check(layer, out_features, in_features, spec, dtype)
    groups = spec.groups(in_features)
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "weight_packed": (torch.int32, (out_features, words(in_features, spec.bits))),
        "weight_scale": (dtype, (out_features, groups)),
        "weight_zero_point": (torch.int32, (words(out_features, spec.bits), groups)),
        "weight_shape": (torch.int64, (2,)),
    }
    if spec.sym:
        del shapes["weight_zero_point"]
    return [TensorInfo(f"{layer}.{suffix}", *shape) for suffix, shape in shapes.items()]


def pack(weight: QuantWeight, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """The tensors of one layer, by suffix. Nothing is rounded: :func:`unpack` gives the same weight.

    Raises:
        BitternError: for shapes that the format's readers do not take, codes or zeros out of range, act-order,
            or scales that ``dtype`` does not hold.
    """
    spec = weight.spec
    _check("weight", weight.out_features, weight.in_features, spec, dtype)
    check_range(weight)
    check_in_order(weight, NAME)
    tensors = {
        "weight_packed": pack_rows(weight.codes.T.contiguous(), spec.bits).T.contiguous(),
        "weight_scale": exact_scales(weight, dtype).contiguous(),
    }
    if spec.sym:
        check_zeros(weight.zeros, spec.bits, "zeros")
    else:
        tensors["weight_zero_point"] = pack_rows(weight.zeros, spec.bits).contiguous()
    return tensors | {"weight_shape": torch.tensor([weight.out_features, weight.in_features])}


def unpack(tensors: Mapping[str, Tensor], layer: PackedLayer, scheme: Scheme) -> QuantWeight:
    """Read one layer back.

    Args:
        tensors: suffix -> tensor; ``weight_zero_point`` may stand in symmetric layers too, ``weight_g_idx`` where
            columns were quantized out of order.
        layer: shape and grid that headers and config state.
        scheme: of the artifact; not needed, the tensors say it all.

    Raises:
        BitternError: when dtypes, shapes or values contradict each other or the arguments.
    """
    spec, shape = layer.spec, (layer.out_features, layer.in_features)
    out_features, in_features = shape
    stored = check_tensor(tensors, "weight_shape", (2,), (torch.int64, torch.int32)).tolist()
    if stored != list(shape):
        raise BitternError(
            f"weight_shape: expected {list(shape)}, as the shapes of the other tensors say, found {stored};"
            " with one group a row, columns must fill their words"
        )
    packed = tensors.get("weight_packed")
    width = packed.shape[1] if packed is not None and packed.ndim == 2 else 0
    loose = spec.bits == 3 and width == _height(in_features, 3, True) != words(in_features, 3)
    packed = check_tensor(
        tensors, "weight_packed", (out_features, _height(in_features, spec.bits, loose)), (torch.int32,)
    )
    scales = check_tensor(tensors, "weight_scale", (out_features, spec.groups(in_features)), _SCALES)
    zeros = _zeros(tensors, layer, loose)
    if spec.sym:
        check_zeros(zeros, spec.bits, "weight_zero_point")
    return QuantWeight(
        codes=_unpack(packed.T.contiguous(), spec.bits, in_features, loose).T,
        scales=float_scales(scales),
        zeros=zeros,
        spec=spec,
        g_idx=_g_idx(tensors.get("weight_g_idx"), in_features, spec),
    )


def config(spec: QuantSpec, layers: Mapping[str, QuantSpec | None], *, dequantize: bool = False) -> dict[str, Any]:
    """The object for ``quantization_config`` in config.json.

    One grid for all is targeted as "Linear", the class. Several grids name each layer: vLLM looks a fused
    layer (qkv_proj) up by class before it looks for its parts, so beside names "Linear" would win.

    Args:
        spec: the grid of most layers.
        layers: every matrix by its checkpoint name, with its grid or None when it was left as it is.
        dequantize: make transformers dequantize while it loads. Asymmetric layers need that with
            transformers 5.23; with several grids it would compute something else, without saying so.

    Raises:
        BitternError: for ``dequantize`` with several grids.
    """
    by_grid: dict[QuantSpec, list[str]] = {spec: []}
    for name, grid in layers.items():
        if grid is not None:
            by_grid.setdefault(grid, []).append(name)
    used = {grid: members for grid, members in by_grid.items() if members} or by_grid
    if dequantize and len(used) > 1:
        raise BitternError(
            f"dequantize: transformers would read all layers by the first of {len(used)} grids; leave it out"
        )
    skipped = [name for name, grid in layers.items() if grid is None]
    if "lm_head" not in layers:
        skipped.append("lm_head")
    groups = {}
    for index, (grid, members) in enumerate(used.items()):
        rest = [name for name in layers if layers[name] != grid]
        groups[f"group_{index}"] = {
            "targets": ["Linear"] if len(used) == 1 else _targets(members, rest),
            "weights": {
                "num_bits": grid.bits,
                "type": "int",
                "symmetric": grid.sym,
                "strategy": "channel" if grid.group_size == -1 else "group",
                "group_size": None if grid.group_size == -1 else grid.group_size,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
        }
    result: dict[str, Any] = {
        "quant_method": NAME,
        "format": _FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": _targets(skipped, [name for name in layers if name not in skipped]),
    }
    return result | ({"dequantize": True} if dequantize else {})


def read_config(found: Mapping[str, Any]) -> Scheme:
    """Understand the quantization config of an artifact, whoever made it.

    Of several targets that fit a layer the readers take its name first, then patterns, then the class.

    Raises:
        BitternError: naming the key, for anything but packed integers, activations that are quantized too, and
            transforms or sparsity that the weights alone do not show.
    """
    for key in ("kv_cache_scheme", "transform_config"):
        if found.get(key):
            raise wrong_key(key, "none", found[key])
    sparsity = found.get("sparsity_config")
    if sparsity and not (isinstance(sparsity, Mapping) and sparsity.get("format") == "dense"):
        raise wrong_key("sparsity_config", "none", sparsity)
    groups = found.get("config_groups")
    if not isinstance(groups, Mapping) or not groups or not all(isinstance(g, Mapping) for g in groups.values()):
        raise wrong_key("config_groups", "an object of groups", groups)
    ranked: list[tuple[int, str, QuantSpec]] = []
    desc_act = False
    for name, group in groups.items():
        form = group.get("format") or found.get("format")
        if form != _FORMAT:
            raise wrong_key("format", repr(_FORMAT), form)
        spec, permuted = _weights(name, group)
        desc_act = desc_act or permuted
        targets = group.get("targets")
        if not isinstance(targets, list) or not targets or not all(isinstance(target, str) for target in targets):
            raise wrong_key(f"config_groups.{name}.targets", "a list of names", targets)
        ranked += [(2 if target == "Linear" else int(target.startswith("re:")), target, spec) for target in targets]
    ignore = found.get("ignore") or []
    if not isinstance(ignore, list) or not all(isinstance(target, str) for target in ignore):
        raise wrong_key("ignore", "a list of names", ignore)
    overrides: list[tuple[str, Mapping[str, Any] | None]] = [(_pattern(target), None) for target in ignore]
    for _, target, spec in sorted(ranked, key=lambda entry: entry[:2]):
        grid = {"bits": spec.bits, "group_size": spec.group_size, "sym": spec.sym}
        overrides.append((_pattern(target), grid))
    version = found.get("version")
    return Scheme(
        format=NAME,
        default=ranked[0][2],
        overrides=(*overrides, ("", None)),  # what no target fits is not quantized
        desc_act=desc_act,
        quantizer=(f"compressed-tensors:{version}",) if version else (),
    )


def _weights(name: str, group: Mapping[str, Any]) -> tuple[QuantSpec, bool]:
    """The grid of a config group, and whether its columns are grouped out of order."""
    where = f"config_groups.{name}"
    for key in ("input_activations", "output_activations"):
        if group.get(key):
            raise wrong_key(f"{where}.{key}", "none: bittern quantizes weights alone", "activations too")
    weights = group.get("weights")
    if not isinstance(weights, Mapping):
        raise wrong_key(f"{where}.weights", "an object", weights)
    if weights.get("type", "int") != "int" or weights.get("dynamic", False):
        raise wrong_key(
            f"{where}.weights", "static integers", f"{weights.get('type')}, dynamic {weights.get('dynamic')}"
        )
    bits, size, sym = weights.get("num_bits"), weights.get("group_size"), weights.get("symmetric", True)
    if type(bits) is not int or type(sym) is not bool:
        raise wrong_key(f"{where}.weights", "num_bits and symmetric", f"{bits!r} and {sym!r}")
    strategy = weights.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    if strategy not in ("group", "channel") or (strategy == "group" and type(size) is not int):
        raise wrong_key(f"{where}.weights.strategy", "'group' with a size, or 'channel'", f"{strategy!r} of {size}")
    try:
        spec = QuantSpec(bits, -1 if strategy == "channel" else size, sym)  # type: ignore[arg-type]
    except BitternError as error:
        raise BitternError(f"quantization_config: {where}.weights: {error}") from error
    return spec, weights.get("actorder") in ("group", "dynamic", True)


def _height(count: int, bits: int, loose: bool) -> int:
    """Words that ``count`` values fill."""
    return -(-count // _LOOSE) if loose else words(count, bits)


def _zeros(tensors: Mapping[str, Tensor], layer: PackedLayer, loose: bool) -> Tensor:
    """uint8 (N, G), from any of the ways that zeros were stored."""
    spec, shape = layer.spec, (layer.out_features, layer.spec.groups(layer.in_features))
    stored = tensors.get("weight_zero_point")
    if stored is None and spec.sym:
        return torch.full(shape, spec.mid_code, dtype=torch.uint8)
    if stored is not None and stored.dtype == torch.int8:
        signed = check_tensor(tensors, "weight_zero_point", shape, (torch.int8,)).to(torch.int16)
        if int(signed.min()) < -spec.mid_code or int(signed.max()) >= spec.mid_code:
            raise BitternError(
                f"weight_zero_point: expected {-spec.mid_code} to {spec.mid_code - 1} at {spec.bits} bits, "
                f"found {int(signed.min())} to {int(signed.max())}"
            )
        return (signed + spec.mid_code).to(torch.uint8)
    height = _height(shape[0], spec.bits, loose)
    packed = check_tensor(tensors, "weight_zero_point", (height, shape[1]), (torch.int32,))
    return _unpack(packed.contiguous(), spec.bits, shape[0], loose)


def _unpack(packed: Tensor, bits: int, count: int, loose: bool) -> Tensor:
    """int32 packed along dimension 0 -> uint8 (count, m)."""
    if not loose:
        return unpack_rows(packed, bits, count)
    shifts = torch.arange(0, _LOOSE * bits, bits, dtype=torch.int32)
    values = torch.bitwise_and(packed.unsqueeze(1) >> shifts.view(1, -1, 1), 2**bits - 1)
    return values.to(torch.uint8).view(-1, packed.shape[1])[:count]


def _g_idx(stored: Tensor | None, in_features: int, spec: QuantSpec) -> Tensor | None:
    """The group of each column, None when they are in order."""
    # -1: never set, so in order. compressed-tensors 0.9 leaves such a one out, whatever actorder says.
    if stored is None or bool((stored == -1).all()):
        return None
    if tuple(stored.shape) != (in_features,) or stored.dtype not in (torch.int32, torch.int64):
        raise BitternError(f"weight_g_idx: expected int32 of shape ({in_features},), found {describe(stored)}")
    in_order = torch.arange(in_features) // spec.columns_per_group(in_features)
    if not torch.equal(stored.long().sort().values, in_order):
        raise BitternError(f"weight_g_idx: expected each group for {spec.group_size} columns, found another number")
    return None if torch.equal(stored.long(), in_order) else stored.to(torch.int32)


def _targets(members: list[str], others: Iterable[str]) -> list[str]:
    """The names of layers; experts as patterns, one for all of a block when they are all members.

    transformers knows the group of fused experts by a pattern that names them.
    """
    apart = {_EXPERT.sub(".experts.*.", name) for name in others}
    result: dict[str, None] = {}
    for name in members:
        merged = _EXPERT.sub(".experts.*.", name)
        if merged != name:
            chosen = name if merged in apart else merged
            name = f"re:{re.escape(chosen)}$".replace(r"experts\.\*", r"experts\.\d+")
        result[name] = None
    return list(result)


def _pattern(target: str) -> str:
    """What a target matches, for :func:`re.match`. Every packed layer counts as a Linear."""
    if target == "Linear":
        return ""
    return target[3:] if target.startswith("re:") else f"{re.escape(target)}$"


def _check(what: str, out_features: int, in_features: int, spec: QuantSpec, dtype: torch.dtype) -> None:
    if dtype not in _SCALES:
        raise BitternError(f"dtype: expected float16, bfloat16 or float32 for scales, found {dtype}")
    if not out_features or not in_features or in_features % spec.columns_per_group(in_features):
        raise BitternError(f"{what}: group_size {spec.group_size} does not divide in_features {in_features}")
    if spec.group_size == -1 and in_features * spec.bits % 32:
        raise BitternError(
            f"{what}: one group a row needs in_features that fill words of 32 bits, found {in_features} of {spec.bits}"
        )
