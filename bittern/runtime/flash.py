"""Flash attention by the native library, also with ALiBi (csrc/attention.cpp)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from bittern.errors import BitternError
from bittern.runtime import native


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("batch", "heads", "kv_heads", "queries", "keys", "head_dim", "window")),
        *((name, ctypes.c_float) for name in ("scale", "cap")),
        *((name, ctypes.c_void_p) for name in ("slopes", "q", "k", "v", "out")),
        *((f"{name}_strides", ctypes.c_ssize_t * 3) for name in ("q", "k", "v", "out")),
    )


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    window: int | None = None,
    slopes: Tensor | None = None,
    cap: float | None = None,
    threads: int | None = None,
) -> Tensor:
    """Causal attention in memory that is linear in the length.

    Args:
        query: float32 (batch, heads, queries, head_dim) on the CPU: the last positions of the keys'.
        key, value: float32 (batch, key_value_heads, keys, head_dim); key_value_heads divides heads.
        scale: of the products of queries and keys.
        window: keys that a query sees, its own included; None for all before it.
        slopes: ALiBi: float32 (heads,), each times (key position - query position) is added to the scores.
        cap: scores become ``cap * tanh(score / cap)``, before ALiBi.
        threads: None for ``torch.get_num_threads()``.

    Returns:
        float32 (batch, queries, heads, head_dim).

    Raises:
        BitternError: for shapes or types that do not fit, or without the native library.
    """
    batch, heads, queries, head_dim = query.shape
    kv_heads, keys = key.shape[1:3]
    fit = key.shape == value.shape == (batch, kv_heads, keys, head_dim) and heads % kv_heads == 0 and keys >= queries
    if not fit or any(each.dtype != torch.float32 or not each.is_cpu for each in (query, key, value)):
        raise BitternError(
            "attention: expected float32 on the CPU, keys like queries, found "
            + ", ".join(f"{tuple(each.shape)} {each.dtype} on {each.device}" for each in (query, key, value))
        )
    if slopes is not None and (slopes.shape != (heads,) or slopes.dtype != torch.float32):
        raise BitternError(f"slopes: expected float32 ({heads},), found {slopes.dtype} {tuple(slopes.shape)}")
    slopes = None if slopes is None else slopes.contiguous()
    query, key, value = (each if _readable(each) else each.contiguous() for each in (query, key, value))
    out = native.floats(batch, queries, heads, head_dim)
    call = _Call(
        *(batch, heads, kv_heads, queries, keys, head_dim, window or 0, scale, cap or 0.0),
        None if slopes is None else slopes.data_ptr(),
        *(each.data_ptr() for each in (query, key, value, out)),
        *((ctypes.c_ssize_t * 3)(*each.stride()[:3]) for each in (query, key, value, out.transpose(1, 2))),
    )
    native.check(native.library().bt_attention(native.context(threads), ctypes.byref(call)), "bt_attention")
    return out


def _readable(rows: Tensor) -> bool:
    """Whether the library can read rows where they lie: it takes those further apart than their size for padded to a
    multiple of 16, and those no distance apart for a cache's.
    """
    size, apart = rows.shape[3], rows.stride(2)
    return rows.stride(3) == 1 and apart > 0 and (apart == size or size % 16 == 0)
