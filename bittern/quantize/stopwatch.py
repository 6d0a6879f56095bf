"""What a function takes and holds, and what reading, rounding and packing a weight take."""

from __future__ import annotations

import hashlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bittern import model as live
from bittern.formats.packing import Packing
from bittern.quantize.leftovers import storages
from bittern.report import peak_memory
from bittern.weight import QuantSpec, round_to_nearest

if TYPE_CHECKING:
    from bittern.quantize.solve import Solver

_ROUNDS = 3
_LONG = 1.0  # seconds that all threads compute; what takes more is done once
FP32 = 4
"""Bytes of a number."""

_SAMPLE_BYTES = 4 * 2**20
_TRIED = torch.Size((128, 1024))  # weights that are rounded and packed to try; every group size divides its columns


@dataclass(frozen=True)
class Cost:
    """Seconds, and the bytes of tensors that are alive at once."""

    seconds: float
    bytes: float

    def times(self, factor: float) -> Cost:
        return Cost(factor * self.seconds, factor * self.bytes)


class Live(TorchDispatchMode):
    """Watches tensors that operations make; ``peak`` is the most bytes of them that were alive at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._alive: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        given = storages(args, kwargs)
        for each in tree_leaves(output):
            if isinstance(each, Tensor) and not storages(each) & given:
                storage = each.untyped_storage()
                self._alive[StorageWeakRef(storage)] = storage.nbytes()  # type: ignore[no-untyped-call]
        self.peak = max(self.peak, self.alive())
        return output

    def alive(self) -> int:
        """Bytes of them that are alive now."""
        expired = [reference for reference in self._alive if reference.expired()]  # type: ignore[no-untyped-call]
        for reference in expired:
            del self._alive[reference]
        return sum(self._alive.values())


def measured(function: Callable[[], object], device: torch.device | None = None) -> Cost:
    """What a function takes and holds, of tensors that it makes."""
    with Live() as tensors:
        function()
    return Cost(seconds(function, device), tensors.peak)


def seconds(function: Callable[[], object], device: torch.device | None = None) -> float:
    """How long a function takes, see :func:`turns`."""
    return turns([function], device)[0]


def turns(functions: Sequence[Callable[[], object]], device: torch.device | None = None) -> list[float]:
    """How long functions take: each the middle of three times, unless they compute for long.

    They take turns, so that a slow moment of the machine is not a difference between them, and the middle is neither
    such a moment nor the luckiest, of which a run of minutes has few. Virtual machines stop for seconds now and then:
    what has only waited does not count as long, or its one time would be multiplied by all that the run does.
    """
    took: list[list[float]] = [[] for _ in functions]
    on_gpu = device is not None and device.type == "cuda"
    threads = 1 if on_gpu else torch.get_num_threads()
    computed = time.process_time()
    for _ in range(_ROUNDS):
        for function, times in zip(functions, took, strict=True):
            began = time.perf_counter()
            function()
            if on_gpu:
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - began)
        if len(took[0]) == 1 and (time.process_time() - computed) / threads >= _LONG * len(functions):
            break
    return [statistics.median(times) for times in took]


def read_rate(solver: Solver) -> float:
    """Seconds for a byte of a weight that is read and made fp32; 0 where none is here."""
    if solver.checkpoint.headers_only:
        return 0.0
    state = solver.model.state_dict()
    sizes = {name: FP32 * state[name].numel() for name in solver.sources}
    fitting = [name for name, size in sizes.items() if size <= _SAMPLE_BYTES] or [min(sizes, key=lambda n: sizes[n])]
    name = max(fitting, key=lambda n: sizes[n])
    shape = tuple(state[name].shape)
    took = seconds(lambda: live.read_tensor(solver.checkpoint, solver.sources[name], shape, torch.float32))
    return took / float(sizes[name])


def write_rate(packing: Packing, spec: QuantSpec) -> Cost:
    """What keeping a weight in the work folder and packing it from there take, but for the disk."""
    weight = round_to_nearest(torch.linspace(-1, 1, _TRIED.numel(), dtype=torch.float32).view(_TRIED), spec)
    packed = measured(lambda: packing.pack("", weight))
    stored = sum(tensor.nbytes for tensor in packing.pack("", weight).values())
    values = bytes(_SAMPLE_BYTES)
    hashed = seconds(lambda: hashlib.sha256(values)) / _SAMPLE_BYTES
    each = packed.times(1 / _TRIED.numel())
    return Cost(each.seconds + hashed * stored / _TRIED.numel() + 2 * hashed, each.bytes)


def rounding_rate(spec: QuantSpec) -> float:
    """Seconds for a weight that is rounded to nearest."""
    weight = torch.linspace(-1, 1, _TRIED.numel(), dtype=torch.float32).view(_TRIED)
    return seconds(lambda: round_to_nearest(weight, spec)) / float(_TRIED.numel())


def resident_memory() -> int:
    """What of this process is in memory now, in bytes; where the system does not say, the most that ever was."""
    if sys.platform != "linux":
        return peak_memory()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def waited() -> float:
    """Seconds for which this thread was ready and others had the processors, so far; 0 where the system does not say.

    From Linux' scheduler statistics (Documentation/scheduler/sched-stats.rst).
    """
    try:
        return int(Path("/proc/thread-self/schedstat").read_text(encoding="ascii").split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0
