"""Where tensors come from, while malloc is glibc's; elsewhere nothing here does anything.

A tensor that is mapped by itself leaves no hole when it is freed, but the system clears its pages every time: in a
virtual machine a fifth of a run's seconds. One from the heap gets pages that were there before, and beside tensors that
live long it leaves holes of its size. So while tensors are held those that are made most often come from the heap,
which is trimmed meanwhile, wider ones are mapped, and what can be done in small pieces is.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator

from torch import Tensor

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's numbers of these options
_LARGEST = 2**25  # that glibc takes from the heap
_SLACK = 2**12  # what glibc may add to the bytes of a tensor
_MAPPED = 2**20  # the least that is mapped by itself while tensors are held


def for_holding(usual: int = 0) -> None:
    """For tensors that are held for long, made among others that are not; many of either are of ``usual`` bytes."""
    _set(max(_MAPPED, min(usual + _SLACK, _LARGEST)), 2**26)


def for_solving() -> None:
    """For tensors none of which lives long; to be followed by :func:`trim`."""
    _set(_LARGEST, 2**29)


def for_others() -> None:
    """For whatever this process does next: the limits that glibc comes to by itself once it has freed large tensors."""
    _set(_LARGEST, 2**26)
    trim()


def pieces(x: Tensor) -> Iterator[Tensor]:
    """The rows of a tensor, (..., features) to (rows, features) each, so few at a time that in fp32 none is mapped."""
    rows = x.reshape(-1, x.shape[-1])
    few = _MAPPED // (8 * rows.shape[1]) if x.device.type == "cpu" else len(rows)
    for start in range(0, len(rows), max(1, few)):
        yield rows[start : start + max(1, few)]


def trim() -> None:
    """Give freed memory back to the system, that malloc otherwise keeps."""
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(0)


def _set(mapped: int, kept: int) -> None:
    """Have tensors of ``mapped`` bytes mapped by themselves; ``kept`` free bytes may stay at the end of the heap."""
    libc = _libc()
    if libc is not None:
        libc.mallopt(_MMAP_THRESHOLD, mapped)
        libc.mallopt(_TRIM_THRESHOLD, kept)


def _libc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
