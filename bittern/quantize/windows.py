"""Which calibration windows a process has, and what each is for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from bittern.errors import BitternError
from bittern.processes import share, share_of, world
from bittern.quantize.drift import learned_from
from bittern.quantize.effort import Effort
from bittern.quantize.guide import TOKENS

BATCH_TOKENS = {"cpu": 1024, "cuda": 4096}
"""Tokens run together: on a CPU one product of so many rows is as fast as one of more, and holds less memory."""


@dataclass(frozen=True)
class OwnWindows:
    """This process's calibration windows.

    Attributes:
        batches: ids, int64 (samples, positions) each; none at all means rounding to nearest.
        exact: the first so many batches are walked through the unquantized blocks too,
        learned: and the drift's correction is learned from the first so many of these.
    """

    batches: Sequence[Tensor] = ()
    exact: int = 0
    learned: int = 0


def default_batch(seqlen: int, device: torch.device) -> int:
    """How many windows of so many tokens to run together."""
    return max(1, BATCH_TOKENS[device.type] // max(seqlen, 1))


def batch_windows(ids: Tensor, batch_size: int, effort: Effort) -> OwnWindows:
    """This process's share of all calibration windows, in batches.

    Args:
        ids: int64 (windows, positions), the same in every process.
        batch_size: windows in a batch at most.
        effort: decides how many of the windows are walked in full precision too.

    Raises:
        BitternError: when a process would have none of these, or no windows at all.
    """
    exact, size = effort.exact_windows(len(ids)), world()[1]
    if 0 < exact < size or len(ids) < size:
        what = f"windows, {exact} of them for full precision too" if exact else "windows"
        raise BitternError(f"nsamples: expected one for each of the {size} processes at least, found {len(ids)} {what}")
    own = share(ids)
    ends = [0, share_of(learned_from(exact)), share_of(exact), len(own)]
    parts = [list(torch.split(own[start:stop], batch_size)) if stop > start else [] for start, stop in pairwise(ends)]
    learned, held, others = parts
    return OwnWindows([*learned, *held, *others], len(learned) + len(held), len(learned))


def guiding_windows(seqlen: int) -> int:
    """How many of this process's windows tell how outputs count."""
    return share_of(max(world()[1], -(-TOKENS // seqlen)))
