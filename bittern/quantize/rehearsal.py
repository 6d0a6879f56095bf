"""Small pieces of a quantization, done by the functions that do the whole: what they take, and what they hold.

Nothing is read for it. A block gets made-up weights, everything outside of the blocks one number that all its elements
share, and the model calls its blocks with that as it will with the real ones. What the pieces take is then multiplied
(:mod:`bittern.quantize.preflight`), so a solver that gets slower makes the prediction larger by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bittern import model as live
from bittern.model import Matrix, Piece
from bittern.quantize.backward import Visit
from bittern.quantize.balance import Balancer
from bittern.quantize.drift import Drift
from bittern.quantize.effort import Effort
from bittern.quantize.gptq import Factor, factorize, gptq
from bittern.quantize.grid import CHUNK
from bittern.quantize.hessian import collect
from bittern.quantize.plan import Plan
from bittern.quantize.polish import ROUNDS, Damped, damp, polish
from bittern.quantize.sensitivity import output_errors
from bittern.quantize.shape import Shaper, rounds_before
from bittern.quantize.stages import TRIMMED, Walks, exact_stages
from bittern.quantize.stopwatch import Cost, Live, measured, seconds, turns
from bittern.replay import BlockCall, capture, rounded_once, sixteen_bits
from bittern.weight import BITS, QuantSpec, min_max_grid, round_to_nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WIDEST = 2048
"""Columns of a matrix that is solved to find out what it takes; wider ones are extrapolated."""

SHAPED = 1024
"""Rows and columns of a matrix that is shaped to find out what it takes."""

BLOCK_FLOPS = 8e9
"""Of a forward pass that is tried, about: a tenth of a second on one core, of small models the batch of a run."""

MANY, SOME = TRIMMED + 1, TRIMMED // 4 + 1
"""Batches that are walked, without full precision and with it: more than one, for their difference is multiplied by all
of a run, and so many that the memory which is given back meanwhile, and wanted again, is part of it."""

_ROWS = (16, 512)
_NUMBER = 0.02  # a weight's order of magnitude


@dataclass(frozen=True)
class Line:
    """What n of something take: ``fixed + n * each`` seconds."""

    fixed: float
    each: float

    def __call__(self, n: float) -> float:
        return self.fixed + n * self.each


@dataclass(frozen=True)
class WalkCosts:
    """What blocks of one shape take that are walked stage by stage.

    Attributes:
        samples: seconds of walking so many samples through the block, second moments and all.
        exact: seconds for each of those that are walked through the unquantized block too.
        balance: seconds of balancing its channels.
        waiting: for every stage, bytes that each sample holds there, its hidden state with them.
        exact_waiting: bytes that each one holds there whose inputs in full precision are known.
    """

    samples: Line
    exact: float
    balance: float
    waiting: list[float]
    exact_waiting: list[float]


@dataclass(frozen=True)
class BlockCosts:
    """What blocks of one shape take.

    Attributes:
        gather: seconds of gathering the second moments from so many samples; nothing where a walk does that alone.
        advance: of running one sample through the block.
        readers: the matrices that share an input, by :func:`place`.
        held: bytes of the hidden state of one sample, and of how the block is called.
        traced: bytes that one sample's forward pass leaves for its gradient; 0 where none is wanted.
        back: seconds of a sample's way forward, and back by :mod:`bittern.quantize.backward`.
        walk: where it is walked.
    """

    gather: Line
    advance: Cost
    readers: list[list[str]]
    held: tuple[int, int]
    traced: float = 0.0
    back: float = 0.0
    walk: WalkCosts | None = None


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
    effort: Effort,
    sensitivities: bool = False,
) -> list[BlockCosts]:
    """What every block takes; blocks of one shape are tried once.

    Args:
        model, sources, plan, device, effort: as a Solver has them; the model is left as it was.
        samples, positions: to try with.
        sensitivities: measured first, which takes every block's way back and its second moments without a walk.
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
        entries = dict(plan.blocks[position])
        shapes = tuple((key, tuple(value.shape)) for key, value in block.state_dict().items())
        kind = (shapes, tuple(place(matrix, name) for matrix in entries))
        if kind not in found:
            inside = [tensor for tensor in sources if tensor.startswith(f"{name}.")]
            with _made_up(model, inside, device, whole=True):
                given = model, block, name, entries, state, calls[position]
                found[kind] = _rehearse_block(*given, effort, sensitivities, plan.rough(device))
        result.append(found[kind])
    return result


def _rehearse_block(
    model: nn.Module,
    block: nn.Module,
    name: str,
    entries: dict[Matrix, QuantSpec],
    state: Tensor,
    call: BlockCall,
    effort: Effort,
    sensitivities: bool,
    rough: bool,
) -> BlockCosts:
    samples, matrices = state.shape[0], list(entries)
    sent_back = effort.shape or sensitivities

    def advance() -> None:
        with torch.no_grad():
            state.clone().copy_(call.run(block, state))

    once = measured(advance)
    given = [tensor for tensor in tree_leaves([call.args, call.kwargs]) if isinstance(tensor, Tensor)]
    held = state[0].nbytes, sum(tensor.nbytes for tensor in given)
    traced = _traced(block, state, call) / samples if sent_back else 0.0
    back = seconds(partial(_there_and_back, block, state, call), state.device) / samples if sent_back else 0.0
    if not matrices:
        return BlockCosts(Line(0.0, 0.0), once.times(1 / samples), [], held, traced, back)
    gather = partial(_rehearse_gathering, model, block, matrices, state, call)
    if effort.exact_share:
        stages = exact_stages(model, block, matrices, [state.clone()], [call])
        if stages is not None:
            readers = [[place(matrix, name) for matrix in stage.matrices] for stage in stages]
            with rounded_once(block, rough), sixteen_bits(state.device, rough):
                advance()  # rounds the weights, once for all samples
                once = measured(advance)
            walk = _rehearse_walk(model, block, entries, state, call, effort, rough, once.seconds)
            gathering = gather() if sensitivities else Line(0.0, 0.0)
            return BlockCosts(gathering, once.times(1 / samples), readers, held, traced, back, walk)
    readers = [[place(m, name) for m in inputs.matrices] for inputs in collect(model, block, matrices, [state], [call])]
    return BlockCosts(gather(), once.times(1 / samples), readers, held, traced, back)


def _rehearse_gathering(
    model: nn.Module, block: nn.Module, matrices: Sequence[Matrix], state: Tensor, call: BlockCall
) -> Line:
    gathered = [partial(collect, model, block, matrices, [state] * n, [call] * n) for n in (1, 2)]
    one, two = turns(gathered, state.device)
    each = max(two - one, 0.0) / len(state)
    return Line(max(one - each * len(state), 0.0), each)


def _there_and_back(block: nn.Module, state: Tensor, call: BlockCall) -> None:
    with torch.no_grad(), sixteen_bits(state.device):
        call.run(block, state)
    for _ in Visit(0, block, [state], [call], [state]).send_back():
        pass


def _traced(block: nn.Module, state: Tensor, call: BlockCall) -> int:
    """Bytes of tensors that a block's forward pass leaves for its gradient, its output with them."""
    block.requires_grad_(True)
    with torch.enable_grad(), Live() as tensors:
        output = call.run(block, state)
        alive: int = tensors.alive()
    del output
    block.requires_grad_(False)
    return alive


def _rehearse_walk(
    model: nn.Module,
    block: nn.Module,
    entries: dict[Matrix, QuantSpec],
    state: Tensor,
    call: BlockCall,
    effort: Effort,
    rough: bool,
    least: float,
) -> WalkCosts:
    """What a block takes that can be walked in stages; tried with the batch ``state``, some times over.

    A batch takes ``least`` seconds at least: differences of small numbers may be anything.
    """

    def walk(batches: int, exact: int, tensors: Live | None = None) -> list[int]:
        """The bytes that are alive when all batches have come to a stage."""
        alive = []
        hidden = [state.clone() for _ in range(batches)]
        in_full = [each.clone() for each in hidden[:exact]]
        stages = exact_stages(model, block, list(entries), in_full, [call] * exact, rough)
        assert stages is not None  # it was walked before
        with Walks(model, block, stages, hidden, [call] * batches, rough) as walks:
            for stage in stages:
                if tensors is None:
                    walks.gather(stage, exact)
                else:
                    for x in walks.inputs(stage):
                        del x
                    alive.append(tensors.alive())
                    stage.exact.clear()
                    stage.behind.clear()
            walks.finish()
        return alive

    one, more, both = turns([partial(walk, *n) for n in ((1, 1), (MANY, 1), (SOME, SOME))], state.device)
    each = max((more - one) / (MANY - 1), least)
    exact = max((both - one) / (SOME - 1) - each, least)
    held = []
    for counts in ((1, 1), (2, 1), (2, 2)):
        with Live() as tensors:
            held.append(walk(*counts, tensors))
    waiting, exact_waiting = (
        [(y - x) / len(state) for x, y in zip(before, after, strict=True)] for before, after in pairwise(held)
    )
    return WalkCosts(
        Line(max(one - each - exact, 0.0), each / len(state)),
        exact / len(state),
        _rehearse_balance(model, block, entries, state, call) if effort.balance else 0.0,
        waiting,
        exact_waiting,
    )


def _rehearse_balance(
    model: nn.Module, block: nn.Module, entries: dict[Matrix, QuantSpec], state: Tensor, call: BlockCall
) -> float:
    stages = exact_stages(model, block, list(entries), [state.clone()], [call])
    assert stages is not None
    balancer = Balancer(model, torch.float32)
    balance = partial(balancer.balance, block, stages, entries, state, call)
    return seconds(balance, state.device)


def rehearse_solver(
    width: int,
    spec: QuantSpec,
    shaped: bool,
    rows: int,
    damp_percent: float,
    device: torch.device,
    effort: Effort,
    rough: bool,
) -> SolveCosts:
    """What solving matrices of ``width`` columns takes, the largest of which has ``rows`` rows.

    They are polished as often as those that are ``shaped`` afterwards, or not.
    """
    rounds = rounds_before(shaped)

    def trial(columns: int) -> tuple[Line, Cost]:
        hessian, factor, cost = _factor(columns, damp_percent, device, rough)
        solve = partial(_solve, hessian=hessian, factor=factor, spec=spec, effort=effort, rounds=rounds)
        line = _line(solve, rows, columns, device)
        if effort.exact_share:
            correct = partial(_correct, hessian=hessian.whole)
            line = Line(line.fixed, line.each + _line(correct, rows, columns, device).each)
            cost = replace(cost, seconds=cost.seconds + seconds(partial(correct, hessian.whole[:1]), device))
        return line, cost

    solve, cost = _at_width(trial, width)
    return SolveCosts(cost, solve, width * _weight_bytes(spec, device, effort))


def rehearse_sensitivity(width: int, spec: QuantSpec, rows: int, damp_percent: float, device: torch.device) -> Line:
    """What all choices of bits take for matrices of ``width`` columns, the largest of which has ``rows`` rows."""

    def trial(columns: int) -> tuple[Line, Cost]:
        hessian, factor, cost = _factor(columns, damp_percent, device, rough=False)

        def measure(weight: Tensor) -> None:
            for bits in BITS:
                output_errors(weight, hessian.whole, factor, replace(spec, bits=bits))

        return _line(measure, rows, columns, device), cost

    line, cost = _at_width(trial, width)
    return Line(cost.seconds + line.fixed, line.each)


def _at_width(trial: Callable[[int], tuple[Line, Cost]], width: int) -> tuple[Line, Cost]:
    """What a trial says of so many columns; of wide matrices it is told by smaller ones."""
    tried = min(width, WIDEST)
    line, cost = trial(tried)
    if tried < width:
        # Each column has a cost of its own; each row one that grows with the columns, and with their square.
        half, _ = trial(tried // 2)
        square = max(line.each - 2 * half.each, 0.0) * 2 / tried**2
        linear = line.each / tried - square * tried
        line = Line(line.fixed * width / tried, linear * width + square * width**2)
        cost = Cost(cost.seconds * (width / tried) ** 3, cost.bytes * (width / tried) ** 2)
    return line, cost


def rehearse_shaping(
    rows: int, columns: int, spec: QuantSpec, damp_percent: float, device: torch.device, rough: bool
) -> float:
    """Seconds for shaping a matrix."""
    height, width = (min(count, SHAPED) for count in (rows, columns))
    hessian, factor, _ = _factor(width, damp_percent, device, rough)
    curvature = torch.eye(height, dtype=torch.float32, device=device).add_(_NUMBER)
    weight = _random((height, width), device)
    solved = round_to_nearest(weight, replace(spec, group_size=min(spec.group_size, width)))
    took = seconds(lambda: Shaper(hessian, factor).shape(weight, curvature, solved), device)
    # A round takes about three products with the Hessian and two with the curvature.
    return took * rows * columns * (3 * columns + 2 * rows) / (height * width * (3 * width + 2 * height))


def _factor(width: int, damp_percent: float, device: torch.device, rough: bool) -> tuple[Damped, Factor, Cost]:
    hessian = torch.eye(width, dtype=torch.float32, device=device).add_(_NUMBER)
    factor, cost = factorize(hessian, damp_percent), measured(lambda: factorize(hessian, damp_percent), device)
    return damp(hessian, factor.damping, rough), factor, cost


def _line(function: Callable[[Tensor], object], rows: int, columns: int, device: torch.device) -> Line:
    """What a function takes for so many rows of a weight, by two trials with fewer."""
    large = min(max(rows, 2), _ROWS[1])
    small = min(_ROWS[0], large // 2)
    weight = _random((large, columns), device)
    one, other = turns([partial(function, weight[:n]) for n in (small, large)], device)
    each = max(other - one, 0.0) / (large - small)
    return Line(max(one - each * small, 0.0), each)


def _solve(
    weight: Tensor, hessian: Damped, factor: Factor, spec: QuantSpec, effort: Effort, rounds: int = ROUNDS
) -> None:
    solution = gptq(weight, factor, spec, grid=None if effort.search else min_max_grid(weight, spec))
    if effort.polish:
        polish(weight, hessian, solution.weight, rounds)


def _correct(weight: Tensor, hessian: Tensor) -> None:
    """What :class:`Drift` makes of moments; what it does with the windows that it holds out is no part of it."""
    x = torch.zeros(1, 1, len(hessian), dtype=hessian.dtype, device=hessian.device)
    drift = Drift([x, x], 1)
    drift.add(x)
    drift.add(x)
    drift.corrected([weight], hessian)


@lru_cache
def _weight_bytes(spec: QuantSpec, device: torch.device, effort: Effort) -> float:
    """What solving holds for each weight: from a narrow matrix, since watching every operation is slow."""
    width = max(128, spec.group_size)
    hessian, factor, _ = _factor(width, 0.01, device, False)
    few = CHUNK.get(device.type, 1 << 18) // width  # the grid search holds one chunk, however many there are
    peaks = []
    for rows in (few, 2 * few):
        weight = _random((rows, width), device)
        with Live() as tensors:
            _solve(weight, hessian, factor, spec, effort)
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
            tensor = torch.full((1,) * target.ndim, _NUMBER, dtype=torch.float32, device=device).expand(target.shape)
        live.set_tensor(model, name, tensor)
    try:
        yield
    finally:
        live.drop_tensors(model, names)


def _random(shape: Sequence[int], device: torch.device) -> Tensor:
    """Numbers of a weight's size; a million different ones are enough."""
    count = torch.Size(shape).numel()
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(min(count, 1 << 20), generator=generator, dtype=torch.float32).mul_(_NUMBER)
    return few.repeat(-(-count // few.numel()))[:count].view(torch.Size(shape)).to(device)
