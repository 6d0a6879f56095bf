"""Where tensors come from, while malloc is glibc's; elsewhere nothing here does anything.

A tensor that is mapped by itself leaves no hole when it is freed, but the system clears its pages every time: in a
virtual machine a fifth of a run's seconds. One from the heap gets pages that were there before, and beside tensors that
live long it leaves holes of its size.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's numbers of these options
_LARGEST = 2**25  # that glibc takes from the heap


def for_holding() -> None:
    """For tensors that are held for long, made among others that are not."""
    _set(2**20, 2**26)


def for_solving() -> None:
    """For tensors none of which lives long; to be followed by :func:`trim`."""
    _set(_LARGEST, 2**29)


def for_others() -> None:
    """For whatever this process does next: the limits that glibc comes to by itself once it has freed large tensors."""
    _set(_LARGEST, 2**26)
    trim()


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
