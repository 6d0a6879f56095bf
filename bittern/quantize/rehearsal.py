"""Small pieces of a quantization, done by the functions that do the whole: what they take, and what they hold.

Nothing is read for it. A block gets made-up weights, everything outside of the blocks one number that all its elements
share, and the model calls its blocks with that as it will with the real ones. What the pieces take is then multiplied
(:mod:`bittern.quantize.preflight`), so a solver that gets slower makes the prediction larger by itself.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bittern import model as live
from bittern.model import Matrix, Piece
from bittern.quantize.gptq import Factor, factorize, gptq
from bittern.quantize.grid import CHUNK
from bittern.quantize.hessian import collect
from bittern.quantize.plan import Plan
from bittern.quantize.polish import polish
from bittern.replay import BlockCall, capture
from bittern.weight import QuantSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WIDEST = 2048
"""Columns of a matrix that is solved to find out what it takes; wider ones are extrapolated."""

BLOCK_FLOPS = 2.5e9
"""Of a forward pass that is tried, about: some hundredths of a second on one core."""

_ROWS = (16, 512)
_SHORT = 0.02  # seconds; what takes less is done three times
_NUMBER = 0.02  # a weight's order of magnitude


@dataclass(frozen=True)
class Cost:
    """Seconds, and the bytes of tensors that are alive at once."""

    seconds: float
    bytes: float

    def times(self, factor: float) -> Cost:
        return Cost(factor * self.seconds, factor * self.bytes)


@dataclass(frozen=True)
class Line:
    """What n of something take: ``fixed + n * each`` seconds."""

    fixed: float
    each: float

    def __call__(self, n: float) -> float:
        return self.fixed + n * self.each


@dataclass(frozen=True)
class BlockCosts:
    """What blocks of one shape take.

    Attributes:
        gather: seconds of gathering the second moments from so many samples.
        advance: of running one sample through the block.
        readers: the matrices that share an input, by :func:`place`.
        held: bytes of the hidden state of one sample, and of how the block is called.
    """

    gather: Line
    advance: Cost
    readers: list[list[str]]
    held: tuple[int, int]


@dataclass(frozen=True)
class SolveCosts:
    """What matrices of one width and grid take, given the second moments of their input.

    Attributes:
        factorize: once for all that share the input.
        solve: seconds for so many rows.
        row_bytes: alive at once for each row.
    """

    factorize: Cost
    solve: Line
    row_bytes: float


def place(matrix: Matrix, prefix: str) -> str:
    """A matrix of a block in a way that holds for all blocks of its shape."""
    return f"{matrix.parameter.removeprefix(prefix)}.{matrix.expert}"


def rehearse_blocks(
    model: PreTrainedModel,
    sources: dict[str, tuple[Piece, ...]],
    plan: Plan,
    device: torch.device,
    samples: int,
    positions: int,
) -> list[BlockCosts]:
    """What every block takes; blocks of one shape are tried once.

    Args:
        model, sources, plan, device: as a Solver has them; the model is left as it was.
        samples, positions: to try with.
    """
    prefix, blocks = live.blocks(model)
    found: dict[Any, BlockCosts] = {}
    result = []
    with _made_up(model, [name for name in sources if not name.startswith(f"{prefix}.")], device, whole=False):
        live.move_buffers(model, device)
        hidden, calls = capture(model, blocks, torch.zeros((samples, positions), dtype=torch.int64, device=device))
    state = _random(hidden.shape, device)
    for position, block in enumerate(blocks):
        name = f"{prefix}.{position}"
        matrices = [matrix for matrix, _ in plan.blocks[position]]
        shapes = tuple((key, tuple(value.shape)) for key, value in block.state_dict().items())
        kind = (shapes, tuple(place(matrix, name) for matrix in matrices))
        if kind not in found:
            inside = [tensor for tensor in sources if tensor.startswith(f"{name}.")]
            with _made_up(model, inside, device, whole=True):
                found[kind] = _rehearse_block(model, block, name, matrices, state, calls[position])
        result.append(found[kind])
    return result


def _rehearse_block(
    model: nn.Module, block: nn.Module, name: str, matrices: Sequence[Matrix], state: Tensor, call: BlockCall
) -> BlockCosts:
    samples = state.shape[0]

    def advance() -> None:
        with torch.no_grad():
            state.clone().copy_(call.run(block, state))

    once = measured(advance)
    given = [tensor for tensor in tree_leaves([call.args, call.kwargs]) if isinstance(tensor, Tensor)]
    held = state[0].nbytes, sum(tensor.nbytes for tensor in given)
    if not matrices:
        return BlockCosts(Line(0.0, 0.0), once.times(1 / samples), [], held)
    found = collect(model, block, matrices, [state], [call])
    one, two = (
        seconds(partial(collect, model, block, matrices, [state] * n, [call] * n), state.device) for n in (1, 2)
    )
    each = max(two - one, 0.0) / samples
    return BlockCosts(
        Line(max(one - each * samples, 0.0), each),
        once.times(1 / samples),
        [[place(matrix, name) for matrix in inputs.matrices] for inputs in found],
        held,
    )


def rehearse_solver(
    width: int, spec: QuantSpec, rows: int, damp_percent: float, device: torch.device, polished: bool
) -> SolveCosts:
    """What solving matrices of ``width`` columns takes, the largest of which has ``rows`` rows."""
    tried = min(width, WIDEST)
    solve_line = partial(_solve_line, spec=spec, rows=rows, device=device, polished=polished)
    hessian, factor, cost = _factor(tried, damp_percent, device)
    solve = solve_line(hessian, factor)
    if tried < width:
        # Each column has a cost of its own; each row one that grows with the columns, and with their square.
        half = solve_line(*_factor(tried // 2, damp_percent, device)[:2])
        square = max(solve.each - 2 * half.each, 0.0) * 2 / tried**2
        linear = solve.each / tried - square * tried
        solve = Line(solve.fixed * width / tried, linear * width + square * width**2)
        cost = Cost(cost.seconds * (width / tried) ** 3, cost.bytes * (width / tried) ** 2)
    return SolveCosts(cost, solve, width * _weight_bytes(spec, device, polished))


def _factor(width: int, damp_percent: float, device: torch.device) -> tuple[Tensor, Factor, Cost]:
    hessian = torch.eye(width, device=device).add_(_NUMBER)
    return hessian, factorize(hessian, damp_percent), measured(lambda: factorize(hessian, damp_percent), device)


def _solve_line(
    hessian: Tensor, factor: Factor, spec: QuantSpec, rows: int, device: torch.device, polished: bool
) -> Line:
    large = min(max(rows, 2), _ROWS[1])
    small = min(_ROWS[0], large // 2)
    weight = _random((large, len(hessian)), device)
    solve = partial(_solve, hessian=hessian, factor=factor, spec=spec, polished=polished)
    one, other = (seconds(partial(solve, weight[:n]), device) for n in (small, large))
    each = max(other - one, 0.0) / (large - small)
    return Line(max(one - each * small, 0.0), each)


def _solve(weight: Tensor, hessian: Tensor, factor: Factor, spec: QuantSpec, polished: bool) -> None:
    solution = gptq(weight, factor, spec)
    if polished:
        polish(weight, hessian, factor.damping, solution.weight)


@lru_cache
def _weight_bytes(spec: QuantSpec, device: torch.device, polished: bool) -> float:
    """What solving holds for each weight: from a narrow matrix, since watching every operation is slow."""
    width = max(128, spec.group_size)
    hessian, factor, _ = _factor(width, 0.01, device)
    few = CHUNK.get(device.type, 1 << 18) // width  # the grid search holds one chunk, however many there are
    peaks = []
    for rows in (few, 2 * few):
        weight = _random((rows, width), device)
        with Live() as tensors:
            _solve(weight, hessian, factor, spec, polished)
        peaks.append(tensors.peak)
    return float(peaks[1] - peaks[0]) / float(few * width)


@contextmanager
def _made_up(model: nn.Module, names: Sequence[str], device: torch.device, whole: bool) -> Iterator[None]:
    """Tensors in the place of those on meta; unless ``whole``, all elements of one are the same element."""
    state = model.state_dict()
    for name in names:
        target = state[name]
        if not target.is_floating_point():
            tensor = torch.zeros(target.shape, dtype=target.dtype, device=device)
        elif whole:
            tensor = _random(target.shape, device)
        else:
            tensor = torch.full((1,) * target.ndim, _NUMBER, device=device).expand(target.shape)
        live.set_tensor(model, name, tensor)
    try:
        yield
    finally:
        live.drop_tensors(model, names)


def _random(shape: Sequence[int], device: torch.device) -> Tensor:
    """Numbers of a weight's size; a million different ones are enough."""
    count = torch.Size(shape).numel()
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(min(count, 1 << 20), generator=generator).mul_(_NUMBER)
    return few.repeat(-(-count // few.numel()))[:count].view(torch.Size(shape)).to(device)


class Live(TorchDispatchMode):
    """Watches tensors that operations make; ``peak`` is the most bytes of them that were alive at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._alive: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        given = {each.untyped_storage()._cdata for each in tree_leaves([args, kwargs]) if isinstance(each, Tensor)}
        self._alive = {reference: size for reference, size in self._alive.items() if not reference.expired()}  # type: ignore[no-untyped-call]
        for each in tree_leaves(output):
            if isinstance(each, Tensor) and each.untyped_storage()._cdata not in given:
                storage = each.untyped_storage()
                self._alive[StorageWeakRef(storage)] = storage.nbytes()  # type: ignore[no-untyped-call]
        self.peak = max(self.peak, sum(self._alive.values()))
        return output


def measured(function: Callable[[], object], device: torch.device | None = None) -> Cost:
    """What a function takes and holds, of tensors that it makes."""
    with Live() as tensors:
        function()
    return Cost(seconds(function, device), tensors.peak)


def seconds(function: Callable[[], object], device: torch.device | None = None) -> float:
    """How long a function takes; the median of three when that is short."""
    took: list[float] = []
    while not took or (took[0] < _SHORT and len(took) < 3):
        began = time.perf_counter()
        function()
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        took.append(time.perf_counter() - began)
    return statistics.median(took)
