"""Running artifacts: weights that stay packed, attention, generation."""

from __future__ import annotations

import os

MOST_THREADS = 256
"""That the native kernels have room for (csrc/pool.h)."""

_TURNS = "10000"  # fewer cost a step of training a tenth, alone on a machine; a tenth of a millisecond


def wait_briefly() -> None:
    """Have the threads of GNU's OpenMP, with which torch computes on Linux, wait awake for a short while only.

    By itself it lets them turn for milliseconds, on a processor that another program's thread would need: two
    programs beside each other then take seven times as long, not twice (docs/log.md). To be called before torch is
    first imported; a user's own OMP_WAIT_POLICY or GOMP_SPINCOUNT stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _TURNS)
