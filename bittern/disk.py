"""What a system is told about files, where it has the words for it."""

from __future__ import annotations

import errno
import os
import resource
from contextlib import suppress


def open_file(path: str | os.PathLike[str], flags: int, mode: int = 0o644) -> int:
    """As os.open; where that is one file too many, the process gets as many as the system allows it."""
    try:
        return os.open(path, flags, mode)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # macOS says "unlimited" and means fewer
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        return os.open(path, flags, mode)
    except OSError as error:
        if error.errno == errno.EMFILE:
            error.strerror = "too many files are open, ulimit -n allows more"
        raise


def read_ahead(file: int) -> None:
    """Tell the system that an open file will be read from its start to its end; macOS has no word for it."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_SEQUENTIAL)  # twice as far as otherwise


def reserve(file: int, size: int) -> None:
    """Give an open file its size, and where the system can, its place on the disk: a full one is told now."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:
        os.ftruncate(file, size)
