"""GPTQ safetensors: the layout that AutoGPTQ began and GPTQModel, vLLM, SGLang and transformers read.

Per layer, with K = in_features, N = out_features, G groups and b bits:

========  ==================  =======  ===============================================
tensor    shape               dtype
========  ==================  =======  ===============================================
qweight   [ceil(K*b/32), N]   int32    codes, packed along K
qzeros    [G, ceil(N*b/32)]   int32    zeros, packed along N; ``gptq`` stores zero - 1
scales    [G, N]              float16
g_idx     [K]                 int32    group of each column
========  ==================  =======  ===============================================

Packing is a little-endian bit stream without gaps: value i has bits [i*b, i*b + b). At 3 bits two of
every 32 values straddle words. Checked against GPTQModel 7.7, see docs/formats.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from bittern import __version__
from bittern.errors import BitternError
from bittern.formats.bits import WORD, check_range, describe, exact_scales, pack_rows, unpack_rows, words
from bittern.formats.scheme import PackedLayer, Scheme, wrong_key
from bittern.shards import TensorInfo
from bittern.weight import QuantSpec, QuantWeight

V1 = "gptq"  # stores zero - 1
V2 = "gptq_v2"  # stores zero
SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
# vLLM looks a fused layer up in ``dynamic`` by its own name; it exists when all of its parts share a grid.
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_EXPERT = re.compile(r"(.*\.experts)\.(\d+\.|\w+\.\d+$)")  # or one of a tensor, as bittern.model names it


def names(layer: str) -> dict[str, str]:
    """Suffix -> tensor name of one packed layer."""
    return {suffix: f"{layer}.{suffix}" for suffix in SUFFIXES}


def packed_layers(tensors: Iterable[str]) -> list[str]:
    """The packed layers among the tensor names of a checkpoint, in its order."""
    return [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]


def layer_shape(layer: str, tensors: Mapping[str, TensorInfo], spec: QuantSpec) -> tuple[int, int]:
    """(out_features, in_features) of a packed layer, from the shapes of its tensors.

    Raises:
        BitternError: when they contradict each other or the grid that the config states.
    """
    stored = {suffix: tensors[name] for suffix, name in names(layer).items() if name in tensors}
    for suffix in ("qweight", "qzeros", "scales"):
        if suffix not in stored or len(stored[suffix].shape) != 2:
            found = f"shape {stored[suffix].shape}" if suffix in stored else "none"
            raise BitternError(f"{layer}.{suffix}: expected a tensor of two dimensions, found {found}")
    rows, out_features = stored["qweight"].shape
    # The rows are rounded up; without a g_idx, as in the oldest files, columns come in multiples of 32.
    columns = stored["g_idx"].shape if "g_idx" in stored else (rows * WORD // spec.bits,)
    if len(columns) != 1:
        raise BitternError(f"{layer}.g_idx: expected one dimension, found shape {columns}")
    in_features = columns[0]
    if rows != words(in_features, spec.bits):
        raise BitternError(
            f"{layer}.qweight: expected {words(in_features, spec.bits)} rows ({in_features} columns of {spec.bits}"
            f" bits), found {rows}"
        )
    groups = spec.groups(in_features)
    for suffix, shape in {"qzeros": (groups, words(out_features, spec.bits)), "scales": (groups, out_features)}.items():
        if stored[suffix].shape != shape or not groups:
            raise BitternError(f"{layer}.{suffix}: expected shape {shape}, found {stored[suffix].shape}")
    return out_features, in_features


def check_order(layer: str, tensors: Mapping[str, TensorInfo], in_features: int, spec: QuantSpec) -> None:
    """Refuse a layer of permuted columns whose order is lost: its writers all store one.

    Raises:
        BitternError: naming the tensor.
    """
    if spec.groups(in_features) > 1 and f"{layer}.g_idx" not in tensors:
        raise BitternError(f"{layer}.g_idx: expected one, for desc_act is true, found none")


def plan(layer: str, out_features: int, in_features: int, spec: QuantSpec) -> list[TensorInfo]:
    """Names, dtypes and shapes of the tensors that :func:`pack` will return for a layer.

    Raises:
        BitternError: for a shape or a group size that the format's readers do not take.
    """
    _check_shape(out_features, in_features, spec, layer)
    groups = spec.groups(in_features)
    shapes = {
        "qweight": (torch.int32, (in_features * spec.bits // WORD, out_features)),
        "qzeros": (torch.int32, (groups, out_features * spec.bits // WORD)),
        "scales": (torch.float16, (groups, out_features)),
        "g_idx": (torch.int32, (in_features,)),
    }
    return [TensorInfo(name, *shapes[suffix]) for suffix, name in names(layer).items()]


def pack(weight: QuantWeight, *, checkpoint_format: str) -> dict[str, Tensor]:
    """The tensors of one layer, by suffix. Nothing is rounded: :func:`unpack` gives the same weight.

    Args:
        weight: its scales must be exact in float16.
        checkpoint_format: "gptq" (v1) or "gptq_v2".

    Raises:
        BitternError: for shapes that the format's readers do not take, codes or zeros out of range, a
            zero of 0 in v1, or scales that float16 does not hold.
    """
    spec = weight.spec
    _check_shape(weight.out_features, weight.in_features, spec, "weight")
    check_range(weight)
    scales = exact_scales(weight, torch.float16)
    zeros = weight.zeros
    if _is_v1(checkpoint_format):
        if int(zeros.min()) == 0:
            raise BitternError(f"zeros: {V1!r} cannot store a zero of 0 that all readers agree on; write {V2!r}")
        zeros = zeros - 1
    return {
        "qweight": pack_rows(weight.codes.T.contiguous(), spec.bits),
        "qzeros": pack_rows(zeros, spec.bits).T.contiguous(),
        "scales": scales.T.contiguous(),
        "g_idx": weight.group_index().to(torch.int32),
    }


def unpack(tensors: Mapping[str, Tensor], layer: PackedLayer, scheme: Scheme) -> QuantWeight:
    """Read one layer back.

    The group size follows from g_idx; where there is none, or one group, it is the config's.

    Args:
        tensors: suffix -> tensor; a missing ``g_idx`` means columns in order, as in the oldest files
            (:func:`check_order` has refused it elsewhere).
        layer: shape and grid that headers and config state.
        scheme: of the artifact; its format says whether zeros are stored minus one.

    Raises:
        BitternError: when dtypes, shapes or values contradict each other or the arguments. Of v1, a
            stored zero of all ones is refused too: its writers and readers disagree on what it is.
    """
    for suffix in ("qweight", "qzeros", "scales"):
        if suffix not in tensors or tensors[suffix].ndim != 2:
            raise BitternError(f"{suffix}: expected a tensor of two dimensions, found {describe(tensors.get(suffix))}")
    qweight, qzeros, scales = tensors["qweight"], tensors["qzeros"], tensors["scales"]
    for suffix in ("qweight", "qzeros"):
        if tensors[suffix].dtype != torch.int32:
            raise BitternError(f"{suffix}: expected int32, found {tensors[suffix].dtype}")
    if not scales.is_floating_point() or not bool(torch.isfinite(scales).all()):
        raise BitternError(f"scales: expected finite floats, found {scales.dtype} with others")
    bits, sym, out_features, in_features = layer.spec.bits, layer.spec.sym, layer.out_features, layer.in_features
    groups = scales.shape[0]
    expected = {
        "qweight": (words(in_features, bits), out_features),
        "qzeros": (groups, words(out_features, bits)),
        "scales": (groups, out_features),
    }
    for suffix, shape in expected.items():
        if tuple(tensors[suffix].shape) != shape or groups == 0:
            raise BitternError(f"{suffix}: expected shape {shape}, found {tuple(tensors[suffix].shape)}")
    group_size, g_idx = layer.spec.group_size, None
    if "g_idx" in tensors:
        found, g_idx = _infer_groups(tensors["g_idx"], in_features, groups)
        group_size = group_size if groups == 1 else found  # a whole row, by whichever name the config has for it
    elif layer.spec.groups(in_features) != groups:
        raise BitternError(f"scales: group_size {group_size} makes no {groups} groups of {in_features} columns")

    zeros = unpack_rows(qzeros.T.contiguous(), bits, out_features)
    spec = QuantSpec(bits, group_size, sym)
    if _is_v1(scheme.format):
        if int(zeros.max()) == spec.max_code:
            raise BitternError(
                f"qzeros: found a stored {spec.max_code}, which readers of {V1!r} decode in different ways; "
                f"save the artifact as {V2!r} with the tool that made it"
            )
        zeros = zeros + 1
    if sym and not bool((zeros == spec.mid_code).all()):
        wrong = int(zeros[zeros != spec.mid_code][0])
        raise BitternError(
            f"qzeros: expected {spec.mid_code} everywhere in a symmetric {scheme.format!r} layer, found {wrong}"
        )
    return QuantWeight(
        codes=unpack_rows(qweight, bits, in_features).T,
        scales=scales.T.contiguous() if scales.dtype == torch.float16 else scales.T.to(torch.float32).contiguous(),
        zeros=zeros,
        spec=spec,
        g_idx=g_idx,
    )


def config(
    spec: QuantSpec,
    *,
    checkpoint_format: str,
    layers: Mapping[str, QuantSpec | None],
    damp_percent: float = 0.01,
    desc_act: bool = False,
) -> dict[str, Any]:
    """The object for ``quantization_config`` in config.json and for quantize_config.json.

    Args:
        spec: the grid of most layers.
        checkpoint_format: "gptq" or "gptq_v2".
        layers: every matrix by its checkpoint name, with its grid or None when it was left as it is.
        damp_percent: the damping asked for, between 0 and 1.
        desc_act: whether layers have columns in permuted groups, as others' artifacts may.

    Raises:
        BitternError: for an asymmetric grid in "gptq", or a damp_percent out of range.
    """
    kept = {name: grid for name, grid in layers.items() if grid is not None}
    if _is_v1(checkpoint_format) and not all(grid.sym for grid in (spec, *kept.values())):
        raise BitternError(f"checkpoint_format: asymmetric layers need {V2!r}, found {V1!r}")
    if not 0 < damp_percent < 1:
        raise BitternError(f"damp_percent: expected a value between 0 and 1, found {damp_percent}")
    result: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": spec.bits,
        "group_size": spec.group_size,
        "desc_act": desc_act,
        "sym": spec.sym,
        "lm_head": "lm_head" in kept,
        "checkpoint_format": checkpoint_format,
        "format": checkpoint_format,
        "damp_percent": damp_percent,
        # Of plain effort and of experts: all matrices of a block are calibrated in one pass. Other efforts calibrate on
        # the quantized matrices before; the config is the same for all of them, and readers pass the key over.
        "true_sequential": False,
        "static_groups": True,  # grids are frozen before the solver moves a weight
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"bittern:{__version__}"]},
    }
    inner = {name: grid for name, grid in layers.items() if re.search(r"\.\d+\.", name)}
    told = inner | kept  # a head only where it is packed
    if any(grid != spec for grid in told.values()):
        result["dynamic"] = _dynamic(spec, told)
        result["modules_in_block_to_quantize"] = [_kept_modules(inner)]
    return result


def read_config(found: Mapping[str, Any]) -> Scheme:
    """Understand the quantization config of an artifact, whoever made it.

    Args:
        found: the ``quantization_config`` of config.json, or the whole of quantize_config.json.

    Raises:
        BitternError: naming the key, for anything but GPTQ tensors packed in 32-bit words.
    """
    method = found.get("quant_method", found.get("method", "gptq"))
    if method != "gptq":
        raise wrong_key("quant_method", "'gptq'", method)
    # AutoGPTQ before 0.7 wrote neither of them; newer tools write both.
    checkpoint_format = found.get("checkpoint_format", found.get("format", V1))
    if found.get("is_marlin_format", False):
        checkpoint_format = "marlin"
    _is_v1(checkpoint_format)
    if found.get("pack_dtype", "int32") != "int32":
        raise wrong_key("pack_dtype", "'int32'", found["pack_dtype"])
    for key, kind in {"bits": int, "group_size": int, "sym": bool, "desc_act": bool}.items():
        if type(found.get(key, kind())) is not kind or (key == "bits" and key not in found):
            raise wrong_key(key, kind.__name__, found.get(key))
    meta, dynamic = found.get("meta") or {}, found.get("dynamic") or {}
    for key, value in {"meta": meta, "dynamic": dynamic}.items():
        if not isinstance(value, Mapping):
            raise wrong_key(key, "an object", value)
    quantizer, patterns = meta.get("quantizer") or (), tuple(_patterns(dynamic))
    return Scheme(
        format=checkpoint_format,
        default=QuantSpec(found["bits"], found.get("group_size", 128), found.get("sym", True)),
        overrides=patterns,
        desc_act=found.get("desc_act", False),
        quantizer=tuple(map(str, quantizer)) if isinstance(quantizer, list) else (str(quantizer),) if quantizer else (),
    )


def _patterns(dynamic: Mapping[str, Any]) -> Iterable[tuple[str, Mapping[str, Any] | None]]:
    for key, values in dynamic.items():
        pattern = key.removeprefix("+:").removeprefix("-:")
        yield pattern, None if key.startswith("-:") else values


def _dynamic(spec: QuantSpec, layers: Mapping[str, QuantSpec | None]) -> dict[str, dict[str, Any]]:
    """One pattern for the layers of one module that share a grid other than ``spec``.

    Experts of a block that share one get a pattern that the module of all of them matches too: vLLM asks for that.
    """
    alike = _experts_alike(layers)
    shared: dict[tuple[str, QuantSpec | None], list[str]] = {}
    for name, grid in layers.items():
        if grid != spec:
            match = _EXPERT.match(name)
            parent, _, leaf = name.rpartition(".")
            if match and match[1] in alike:
                shared[match[1], grid] = []
            else:
                shared.setdefault((parent, grid), []).append(leaf)
    result: dict[str, dict[str, Any]] = {}
    for (parent, grid), leaves in shared.items():
        leaves += [fused for fused, parts in _FUSED.items() if set(parts) <= set(leaves)]
        ends = "|".join(re.escape(leaf) for leaf in leaves)
        start = re.escape(parent)
        pattern = rf"^{start}(\.|$)" if not leaves else f"^{start}{re.escape('.') if parent else ''}({ends})$"
        if grid is None:
            result[f"-:{pattern}"] = {}
        else:
            result[f"+:{pattern}"] = {"bits": grid.bits, "group_size": grid.group_size, "sym": grid.sym}
    return result


def _experts_alike(layers: Mapping[str, QuantSpec | None]) -> set[str]:
    """The modules of experts whose layers all share a grid, or are all left out."""
    grids: dict[str, set[QuantSpec | None]] = {}
    for name, grid in layers.items():
        match = _EXPERT.match(name)
        if match:
            grids.setdefault(match[1], set()).add(grid)
    return {module for module, found in grids.items() if len(found) == 1}


def _kept_modules(layers: Mapping[str, QuantSpec | None]) -> list[str]:
    """The quantized layers as name endings: relative to the block where every block agrees."""
    relative = {name: re.sub(r"^.*?\.\d+\.", "", name) for name in layers}
    skipped = {relative[name] for name, grid in layers.items() if grid is None}
    kept = (name for name, grid in layers.items() if grid is not None)
    return list(dict.fromkeys(name if relative[name] in skipped else relative[name] for name in kept))


def _check_shape(out_features: int, in_features: int, spec: QuantSpec, what: str) -> None:
    if out_features % WORD or in_features % WORD or not out_features or not in_features:
        raise BitternError(
            f"{what}: GPTQ needs in_features and out_features divisible by 32, found {in_features} and {out_features}"
        )
    if in_features % spec.columns_per_group(in_features):
        raise BitternError(f"{what}: group_size {spec.group_size} does not divide in_features {in_features}")


def _is_v1(checkpoint_format: str) -> bool:
    if checkpoint_format not in (V1, V2):
        raise BitternError(f"checkpoint_format: expected {V1!r} or {V2!r}, found {checkpoint_format!r}")
    return checkpoint_format == V1


def _infer_groups(g_idx: Tensor, in_features: int, groups: int) -> tuple[int, Tensor | None]:
    """The group size, and the g_idx unless columns are in order."""
    if tuple(g_idx.shape) != (in_features,) or g_idx.dtype not in (torch.int32, torch.int64):
        raise BitternError(f"g_idx: expected int32 of shape ({in_features},), found {describe(g_idx)}")
    if int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
        raise BitternError(f"g_idx: expected groups 0 to {groups - 1}, found {int(g_idx.min())} to {int(g_idx.max())}")
    if groups == 1:
        return -1, None
    group_size = int(torch.bincount(g_idx.long()).max())
    if -(-in_features // group_size) != groups:
        raise BitternError(f"g_idx: puts {group_size} columns in one of the {groups} groups of {in_features} columns")
    in_order = torch.arange(in_features, device=g_idx.device) // group_size
    if not torch.equal(g_idx.long().sort().values, in_order):
        raise BitternError(f"g_idx: expected each of {groups} groups for {group_size} columns, found another number")
    return group_size, None if torch.equal(g_idx.long(), in_order) else g_idx.to(torch.int32)
