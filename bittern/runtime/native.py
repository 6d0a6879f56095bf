"""The native CPU kernels, through their C interface (csrc/bittern.h).

The library is found beside this file, where installing the package builds it. Without it everything
here but :func:`available` and :func:`why_not` raises, and layers compute with torch (linear.py).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from bittern.errors import BitternError
from bittern.runtime import MOST_THREADS
from bittern.weight import QuantWeight

ABI = 5
LIBRARY = Path(__file__).with_name("libbittern.so")
# Forces an instruction set, for tests and for bug reports.
VARIABLE = "BITTERN_INSTRUCTIONS"
# In the order of the enum of csrc/bittern.h.
INSTRUCTIONS = ("scalar", "avx2", "avx512", "amx", "neon")
ACTIVATIONS = {"a16": 0, "a8": 1}
TYPES = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3, torch.int8: 4}
MOST_MATRICES = 16
_CODES = 0
_TILE = 16


class Matrix(ctypes.Structure):
    """``bt_matrix``. Whoever makes one keeps the tensors alive that it points into."""

    _fields_ = (
        ("out_features", ctypes.c_int32),
        ("in_features", ctypes.c_int32),
        ("type", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("group_size", ctypes.c_int32),
        ("scale_type", ctypes.c_int32),
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("order", ctypes.c_void_p),
    )


class Columns(ctypes.Structure):
    """``bt_columns``."""

    _fields_ = (
        ("columns", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("max_code", ctypes.c_int32),
        ("targets", ctypes.c_void_p),
        ("originals", ctypes.c_void_p),
        ("coupling", ctypes.c_void_p),
        ("down", ctypes.c_ssize_t),
        ("across", ctypes.c_ssize_t),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("groups", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("errors", ctypes.c_void_p),
    )


class Descent(ctypes.Structure):
    """``bt_descent``."""

    _fields_ = (
        ("rows", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("group_size", ctypes.c_int32),
        ("max_code", ctypes.c_int32),
        ("hessian", ctypes.c_void_p),
        ("inverse", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("slopes", ctypes.c_void_p),
    )


class GroupProducts(ctypes.Structure):
    """``bt_group_products``."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("rows", "columns", "group_size", "type")),
        *((name, ctypes.c_void_p) for name in ("pulls", "steps", "products")),
    )


@dataclass(frozen=True)
class Settings:
    """How the native layers of a model compute.

    Attributes:
        activations: how the inputs of a packed matrix are rounded: "a16" (16 bits) or "a8" (8 bits per 32 columns).
        threads: None for ``torch.get_num_threads()`` at the time of a call.

    Raises:
        BitternError: for other values.
    """

    activations: str = "a16"
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.activations not in ACTIVATIONS:
            raise BitternError(f"activations: expected one of {', '.join(ACTIVATIONS)}, found {self.activations!r}")
        if self.threads is not None and self.threads < 1:
            raise BitternError(f"threads: expected at least 1, found {self.threads}")


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why it cannot be used."""
    if not LIBRARY.is_file():
        return None, "it was not built when bittern was installed (no C++ compiler?)"
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        return None, str(error)
    if (found := library.bt_abi()) != ABI:
        return None, f"{LIBRARY} has interface {found}, expected {ABI}; install bittern again"
    pointer, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_ssize_t
    signatures = {
        "bt_has": (integer, [integer]),
        "bt_best": (integer, []),
        "bt_open": (integer, [integer, integer, pointer]),
        "bt_packed_bytes": (ctypes.c_int64, [integer] * 4),
        "bt_pack": (integer, [pointer, *[integer] * 4, pointer, size, size, pointer]),
        "bt_dequantize": (integer, [pointer, pointer, integer, integer, pointer]),
        "bt_linear": (integer, [pointer, pointer, integer, integer, integer, pointer, size, pointer, pointer]),
        "bt_attention": (integer, [pointer, pointer]),
        "bt_forward": (integer, [pointer] * 8),
        "bt_solve_columns": (integer, [pointer, pointer]),
        "bt_descend": (integer, [pointer, pointer]),
        "bt_multiply_groups": (integer, [pointer, pointer]),
        "bt_read_probe": (ctypes.c_double, [pointer, pointer, ctypes.c_size_t]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library, ""


def available() -> bool:
    """Whether the native library is there and fits this version of bittern."""
    return _load()[0] is not None


def why_not() -> str:
    """Why the native library cannot be used; empty when it can."""
    return _load()[1]


def library() -> ctypes.CDLL:
    """The loaded library.

    Raises:
        BitternError: when there is none.
    """
    found, reason = _load()
    if found is None:
        raise BitternError(f"native runtime: {reason}")
    return found


def instruction_sets() -> tuple[str, ...]:
    """Those that this machine runs, simplest first."""
    return tuple(name for index, name in enumerate(INSTRUCTIONS) if library().bt_has(index))


def instructions() -> str:
    """The instruction set in use: what ``BITTERN_INSTRUCTIONS`` says, otherwise the best one.

    Raises:
        BitternError: when the variable names one that this machine does not run.
    """
    forced = os.environ.get(VARIABLE)
    if forced is None:
        return _best()
    if forced not in instruction_sets():
        raise BitternError(f"{VARIABLE}: expected one of {', '.join(instruction_sets())}, found {forced!r}")
    return forced


@cache
def _best() -> str:
    return INSTRUCTIONS[library().bt_best()]


@cache
def _context(threads: int, name: str, process: int) -> int:
    context = ctypes.c_void_p()
    check(library().bt_open(threads, INSTRUCTIONS.index(name), ctypes.byref(context)), "bt_open")
    assert context.value is not None
    return context.value


def context(threads: int | None = None) -> int:
    """The handle of the process's threads, made once.

    Args:
        threads: by default ``torch.get_num_threads()``; :data:`MOST_THREADS` at most.
    """
    return _context(min(threads or torch.get_num_threads(), MOST_THREADS), instructions(), os.getpid())


def check(status: int, function: str) -> None:
    """Raise for an error code of the library.

    Raises:
        BitternError: naming the function and what its code means.
    """
    reasons = {-1: "bad argument", -2: "no memory", -3: "no thread can be started", -4: "not supported on this machine"}
    if status < 0:
        raise BitternError(f"native runtime: {function}: {reasons.get(status, status)}")


def floats(*shape: int) -> Tensor:
    """Room for what the library writes: float32 on the CPU, whatever torch's defaults are, of any values."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def pack(weight: QuantWeight, threads: int | None = None) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """A weight in the order in which the kernels read it (csrc/kernels.h).

    Args:
        weight: on the CPU. With a ``g_idx`` its columns are stored group by group.
        threads: as in :class:`Settings`.

    Returns:
        codes: uint8, one-dimensional.
        scales: float16 or float32 (tiles, groups, 16), rows beyond the last one zero.
        zeros: uint8 (tiles, groups, 16), or None where all are ``spec.mid_code``.
        order: int32 (in_features,), which input column each stored one is; None when in order.
    """
    spec, out_features, in_features = weight.spec, weight.out_features, weight.in_features
    group_size = min(spec.columns_per_group(in_features), in_features)
    codes, order = weight.codes, None
    if weight.g_idx is not None:
        order = torch.argsort(weight.g_idx, stable=True)
        codes = codes[:, order]
    size = library().bt_packed_bytes(out_features, in_features, spec.bits, group_size)
    packed = torch.empty(size, dtype=torch.uint8, device="cpu")
    status = library().bt_pack(
        context(threads),
        out_features,
        in_features,
        spec.bits,
        group_size,
        codes.data_ptr(),
        codes.stride(0),
        codes.stride(1),
        packed.data_ptr(),
    )
    check(status, "bt_pack")
    zeros = None if bool((weight.zeros == spec.mid_code).all()) else _tiled(weight.zeros)
    return packed, _tiled(weight.scales), zeros, None if order is None else order.to(torch.int32)


def matrix(
    out_features: int,
    in_features: int,
    bits: int,
    group_size: int,
    packed: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
) -> Matrix:
    """What the library takes for a packed matrix; the caller keeps the tensors alive."""
    codes, scales, zeros, order = packed
    return Matrix(
        out_features,
        in_features,
        _CODES,
        bits,
        group_size,
        TYPES[scales.dtype],
        codes.data_ptr(),
        scales.data_ptr(),
        None if zeros is None else zeros.data_ptr(),
        None if order is None else order.data_ptr(),
    )


def dense_matrix(weight: Tensor) -> Matrix:
    """What the library takes for a contiguous matrix of floats; the caller keeps the tensor alive."""
    out_features, in_features = weight.shape
    return Matrix(out_features, in_features, TYPES[weight.dtype], 0, 0, 0, weight.data_ptr(), None, None, None)


def linear(
    x: Tensor,
    matrices: Sequence[Matrix],
    activations: str = "a16",
    threads: int | None = None,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """``x @ W.T`` for matrices that share their input.

    Args:
        x: float32 (rows, in_features) on the CPU, its rows contiguous.
        matrices: at most :data:`MOST_MATRICES`.
        activations, threads: as in :class:`Settings`.
        out: where to write, float32 (rows, out_features) each, their rows contiguous; None makes them.

    Returns:
        float32 (rows, out_features) each.
    """
    rows = x.shape[0]
    results = [floats(rows, m.out_features) for m in matrices] if out is None else list(out)
    count = len(matrices)
    status = library().bt_linear(
        context(threads),
        (ctypes.c_void_p * count)(*[ctypes.addressof(m) for m in matrices]),
        count,
        ACTIVATIONS[activations],
        rows,
        x.data_ptr(),
        x.stride(0),
        (ctypes.c_void_p * count)(*[y.data_ptr() for y in results]),
        (ctypes.c_ssize_t * count)(*[y.stride(0) for y in results]),
    )
    check(status, "bt_linear")
    return results


def dequantize(m: Matrix, start: int = 0, stop: int | None = None, threads: int | None = None) -> Tensor:
    """Rows [start, stop) as float32, columns in stored order."""
    stop = m.out_features if stop is None else stop
    out = floats(stop - start, m.in_features)
    check(library().bt_dequantize(context(threads), ctypes.addressof(m), start, stop, out.data_ptr()), "bt_dequantize")
    return out


def solve_columns(tensors: Sequence[Tensor], coupling: Tensor, max_code: int) -> None:
    """``bt_solve_columns``.

    Args:
        tensors: contiguous: targets and originals, float32 (columns, rows); scales and zeros, float32 (groups, rows);
            groups, int64 (columns,); codes, uint8, and errors, float32 (columns, rows).
        coupling: float32 (columns, columns), of any strides.
        max_code: the largest code.
    """
    assert all(tensor.dtype in (torch.float32, torch.int64, torch.uint8) for tensor in (*tensors, coupling))
    targets, originals, *others = (tensor.data_ptr() for tensor in tensors)
    shape, strides = tensors[0].shape, coupling.stride()
    call = Columns(*shape, max_code, targets, originals, coupling.data_ptr(), *strides, *others)
    check(library().bt_solve_columns(context(), ctypes.addressof(call)), "bt_solve_columns")


def descend(hessian: Tensor, scales: Tensor, zeros: Tensor, codes: Tensor, slopes: Tensor, max_code: int) -> None:
    """``bt_descend``; all tensors contiguous.

    Args:
        hessian: float32 (columns, columns), symmetric, no diagonal entry 0.
        scales, zeros: float32 (rows, groups).
        codes: uint8 (rows, columns), changed in place.
        slopes: float32 (rows, columns), changed in place.
        max_code: the largest code.
    """
    inverse = 1 / hessian.diagonal()
    tensors = hessian, inverse, scales, zeros, codes, slopes
    assert all(tensor.is_contiguous() for tensor in tensors)
    assert all(tensor.dtype == torch.float32 for tensor in tensors if tensor is not codes)
    rows, columns = codes.shape
    call = Descent(rows, columns, columns // scales.shape[1], max_code, *(tensor.data_ptr() for tensor in tensors))
    check(library().bt_descend(context(), ctypes.addressof(call)), "bt_descend")


def multiply_groups(pulls: Tensor, steps: Tensor) -> Tensor:
    """``bt_multiply_groups``; both contiguous.

    Args:
        pulls: float32 or bfloat16 (groups, rows, columns).
        steps: float32 (rows, columns).

    Returns:
        float32 (rows, groups, groups), symmetric.
    """
    groups, rows, columns = pulls.shape
    assert pulls.is_contiguous() and steps.is_contiguous() and steps.shape == (rows, columns)
    assert steps.dtype == torch.float32
    products = floats(rows, groups, groups)
    tensors = (tensor.data_ptr() for tensor in (pulls, steps, products))
    call = GroupProducts(rows, columns, columns // groups, TYPES[pulls.dtype], *tensors)
    check(library().bt_multiply_groups(context(), ctypes.addressof(call)), "bt_multiply_groups")
    return products


def read_probe(megabytes: int, threads: int) -> float:
    """GB/s of reading that many megabytes with all threads: the bound of every memory-bound kernel."""
    data = torch.ones(megabytes * 2**20, dtype=torch.uint8, device="cpu")
    rates = [library().bt_read_probe(context(threads), data.data_ptr(), data.numel()) for _ in range(3)]
    return float(max(rates)) / 1e9


def _tiled(values: Tensor) -> Tensor:
    """(out_features, groups) -> (tiles, groups, 16), filled up with zeros."""
    rows, groups = values.shape
    tiles = -(-rows // _TILE)
    filled = values.new_zeros(tiles * _TILE, groups)
    filled[:rows] = values
    return filled.view(tiles, _TILE, groups).transpose(1, 2).contiguous()
