"""The processes that torchrun starts: how they meet, share work, add up, and fail as one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from bittern import model as live
from bittern.errors import AlsoFailed, BitternError, first_line

WAIT = timedelta(days=2)
"""How long a process waits for one that works alone: the one that converts, reads text, or writes."""


_alone = False


def world() -> tuple[int, int]:
    """The number of this process, and of all of them."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() and not _alone else (0, 1)


@contextmanager
def together(device: str) -> Iterator[torch.device]:
    """The device of this process; under torchrun, it has met the others inside.

    An exception in one of them ends all: the first one raises it, so that it is told once, and every other raises
    AlsoFailed, whether it met the same error or lost the connection to the first.

    Args:
        device: see :func:`bittern.model.pick_device`; of several CUDA devices each process gets its own.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) == 1:
        yield live.pick_device(device)
        return
    try:
        store, rank, size = next(rendezvous("env://", timeout=WAIT))
    except ValueError as error:
        found = f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {first_line(error)}"
        raise BitternError(f"expected the variables that torchrun sets, or none of them: {found}") from error
    try:
        place = live.pick_device(device)
        if place.type == "cuda":
            local, devices = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if local >= devices:
                raise BitternError(
                    f"torchrun: expected a CUDA device for each process of this machine, found {devices};"
                    f" --nproc-per-node {devices}, or --device cpu"
                )
            place = torch.device("cuda", local)
            torch.cuda.set_device(place)
        group = "nccl" if place.type == "cuda" else "gloo"
        dist.init_process_group(group, store=store, rank=rank, world_size=size, timeout=WAIT)
        yield place
    except Exception as error:
        if not _is_first(store):
            raise AlsoFailed("another process has failed, and says why") from error
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _is_first(store: Any) -> bool:
    """Whether no other process has failed before; also where nobody can be asked any more."""
    try:
        return bool(store.add("bittern/failed", 1) == 1)
    except RuntimeError:
        return True


@contextmanager
def alone() -> Iterator[None]:
    """Inside, a process is the only one: what it calls there, the others do not call too."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def add_up(*tensors: Tensor) -> None:
    """Put the sum over all processes, the same bits in each of them, in the place of each tensor."""
    if world()[1] > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def from_first(*tensors: Tensor) -> None:
    """Put what the first process has in the place of each tensor."""
    if world()[1] > 1:
        for tensor in tensors:
            copy = tensor.detach().contiguous()  # a view of a transposed weight is none
            dist.broadcast(copy, 0)
            if copy.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(copy)


def check_same(count: int, what: str) -> None:
    """Refuse to go on where processes differ in a number, before they wait for each other in vain.

    Raises:
        BitternError: with the fewest and the most.
    """
    if world()[1] == 1:
        return
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    ends = torch.tensor([count, -count], device=device)
    dist.all_reduce(ends, dist.ReduceOp.MAX)
    most, least = int(ends[0]), -int(ends[1])
    if most != least:
        raise BitternError(f"torchrun: expected the same in every process, found {least} to {most} {what}")


def share(rows: Tensor) -> Tensor:
    """The rows of this process: every nth."""
    rank, size = world()
    return rows[rank::size]


def share_of(count: int) -> int:
    """How many of the first rows of all are this process's."""
    rank, size = world()
    return len(range(rank, count, size))


def number_of(row: int) -> int:
    """Which row of all this process's row is."""
    rank, size = world()
    return row * size + rank
