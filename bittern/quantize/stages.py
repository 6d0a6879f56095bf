"""Walk all calibration batches through a block together, with a stop before every input that is solved.

Each batch stops where the block is about to multiply a new input; when all have stopped there, the
matrices that read it are solved and replaced, and the batches go on through the quantized ones. So one
pass over the block gives every matrix the inputs that it will really get, and the block's outputs too.
What a batch needs to go on is kept meanwhile, and no more: the frames of its calls name inputs, queries, keys and
values that nothing will read again, and those are emptied.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bittern import model as live
from bittern.errors import BitternError
from bittern.model import Matrix
from bittern.quantize import heap
from bittern.quantize.drift import Drift
from bittern.quantize.hessian import Accumulator, Inputs, check_inputs
from bittern.quantize.leftovers import Local, Reads, empty, storages
from bittern.replay import BlockCall, rounded_once, sixteen_bits

INPUT = ""
"""The block's input, among the places where a residual stream is seen."""

_ADDED = 1e-2
"""What an output and what was added to the stream may differ by, as a share of the output: sums are rounded."""

TRIMMED = 16
"""Batches after which the holes that walks have left are given back: seldom enough to cost nothing."""

_SMALL = 1e-6
"""Root mean square of a tensor below which fp16, whose smallest numbers lie 6e-8 apart, is too coarse for it."""


@dataclass
class Stage:
    """Matrices that read one tensor.

    Attributes:
        matrices: the readers, in the order in which the block calls them.
        norm: the module that puts that tensor out, where it is a norm of the block.
        exact: their input of the unquantized block, one tensor (batch, positions, in_features) per batch that was
            walked through it, as :func:`narrowed`.
        dead: what the calls under way still name when they come there, and nothing reads again: queries and keys.
        stream: where the residual stream is seen that their output is added to: the norm that reads it, or ``INPUT``;
            None where that is nowhere seen, or more than their output is added.
        streams: it in full precision, one tensor (batch, positions, hidden_size) per batch as of ``exact``.
        behind: ``streams`` less the stream of the same batches in :class:`Walks`, where one takes the place of the
            other as batches come by; in bfloat16, more than which a difference does not need.
    """

    matrices: list[Matrix]
    norm: str | None = None
    exact: list[Tensor] = field(default_factory=list)
    dead: set[Local] = field(default_factory=set)
    stream: str | None = None
    streams: list[Tensor] = field(default_factory=list)
    behind: list[Tensor] = field(default_factory=list)


def exact_stages(
    model: nn.Module,
    block: nn.Module,
    matrices: Sequence[Matrix],
    hidden: Sequence[Tensor],
    calls: Sequence[BlockCall],
    rough: bool = False,
    keep: bool = True,
) -> list[Stage] | None:
    """Run the unquantized block and see who reads what.

    Args:
        model: the model that the matrices' names start from.
        block: the block, in memory.
        matrices: those to solve.
        hidden: per batch, fp32 (batch, positions, hidden_size), in full precision; replaced by the block's outputs.
        calls: per batch, how to call the block.
        rough: products in bfloat16.
        keep: what stages hold of each batch, and look for what is dead; False for a block that is not solved again.

    Returns:
        The stages in the order in which the block comes to them; None where it cannot be walked in stages: experts, no
        batch, a matrix that is called more than once or by no batch, batches that come by different ways.
    """
    if not hidden or any(matrix.expert is not None for matrix in matrices):
        return None
    stages: list[Stage] = []
    with rounded_once(block, rough):
        for number, (state, call) in enumerate(zip(hidden, calls, strict=True)):
            reads = None if number else Reads(state)
            if not _walk_exact(model, block, matrices, stages, state, call, reads, rough, keep):
                return None
    called = [matrix for stage in stages for matrix in stage.matrices]
    return stages if sorted(m.label for m in called) == sorted(m.label for m in matrices) else None


def _walk_exact(
    model: nn.Module,
    block: nn.Module,
    matrices: Sequence[Matrix],
    stages: list[Stage],
    state: Tensor,
    call: BlockCall,
    reads: Reads | None,
    rough: bool,
    keep: bool,
) -> bool:
    """Run one batch through the unquantized block, and add what it gave to the stages; the first batch makes them.

    Args:
        reads: of the first batch, None for the others.
        keep: see :func:`exact_stages`.

    Returns:
        Whether it came by the way of the first.
    """
    seen = _watch(model, block, matrices, state, call, reads, rough)
    # Blocks without a norm in front give their input itself to the first matrices: it is about to be replaced.
    given = storages(state)
    held = [narrowed(x.detach()) for x, _ in seen.inputs] if keep else []
    inputs = [x.clone() if storages(x) & given else x for x in held]
    # where the stream may be seen, in the order in which the block comes there
    points = {INPUT: state} | {
        name: x.detach() for name, x, _ in seen.norms if x.shape == state.shape and not storages(x) & given
    }
    if reads is not None:
        ends = [*points.items(), (INPUT, seen.output)]
        for (x, readers), dead in zip(seen.inputs, reads.dead(), strict=True):
            norm = next((name for name, _, y in seen.norms if y is x), None)
            stages.append(Stage(readers, norm, dead=dead, stream=_stream(readers, ends, seen.outputs)))
        if keep:
            _confirm_dead(model, block, stages, state.clone(), call, seen.output, rough)
    if [stage.matrices for stage in stages] != [readers for _, readers in seen.inputs]:
        return False
    if not {stage.stream for stage in stages if stage.stream is not None} <= points.keys():
        return False
    for stage, x in zip(stages if keep else (), inputs, strict=True):
        stage.exact.append(x)
        if stage.stream is not None:
            there = points[stage.stream]
            stage.streams.append(there.clone() if there is state else there)
    state.copy_(seen.output)
    return True


@dataclass
class _Seen:
    """What was seen of a batch on its way through a block.

    Attributes:
        output: of the block.
        inputs: what matrices read, each with its readers, in the order in which the block came there.
        norms: by their names, what they read and what they put out.
        outputs: of matrices; of the first batch alone.
    """

    output: Tensor
    inputs: list[tuple[Tensor, list[Matrix]]]
    norms: list[tuple[str, Tensor, Tensor]]
    outputs: dict[Matrix, Tensor]


def _watch(
    model: nn.Module,
    block: nn.Module,
    matrices: Sequence[Matrix],
    state: Tensor,
    call: BlockCall,
    reads: Reads | None,
    rough: bool,
) -> _Seen:
    """Run a batch through a block, and look at what comes by."""
    inputs: list[tuple[Tensor, list[Matrix]]] = []
    norms: list[tuple[str, Tensor, Tensor]] = []
    outputs: dict[Matrix, Tensor] = {}

    def note(matrix: Matrix, x: Tensor) -> None:
        if inputs and inputs[-1][0] is x:
            inputs[-1][1].append(matrix)
        else:
            inputs.append((x, [matrix]))
            if reads is not None:
                reads.arrive(sys._getframe())

    with (
        reading(model, matrices, note),
        _after_norms(model, block, norms),
        _after(model, matrices if reads is not None else [], outputs),
        torch.no_grad(),
        sixteen_bits(state.device, rough),
        reads or nullcontext(),
    ):
        output = call.run(block, state)
    return _Seen(output, inputs, norms, outputs)


def _confirm_dead(
    model: nn.Module,
    block: nn.Module,
    stages: Sequence[Stage],
    state: Tensor,
    call: BlockCall,
    output: Tensor,
    rough: bool,
) -> None:
    """Walk a batch again with NaN in the place of what seems dead: where its output changes, something reads it.

    Kernels that are given addresses read what torch does not see. And what the first walk made for all that follow, a
    cache, this one does not make: that is no longer the batch's own.
    """
    reads = Reads(state)
    waiting = {stage.matrices[0]: stage for stage in stages}

    def spoil(matrix: Matrix, _: Tensor) -> None:
        named = reads.named(sys._getframe())
        dead = waiting[matrix].dead
        dead.intersection_update(named)
        for local in dead:
            elements = named[local].untyped_storage()
            torch.empty(0, dtype=torch.uint8, device=state.device).set_(elements).fill_(0xFF)  # NaN in any width

    with reading(model, list(waiting), spoil), torch.no_grad(), sixteen_bits(state.device, rough), reads:
        again = call.run(block, state)
    if not float((again - output).norm()) <= _ADDED * float(output.norm()):
        for stage in stages:
            stage.dead.clear()


@torch.no_grad()
def narrowed(x: Tensor, divisor: Tensor | None = None) -> Tensor:
    """A tensor that waits in full precision, in 16 bits: fp16, unless that cannot hold it.

    What quantizing moves is far above that rounding, as it is above that of bfloat16, which products may have put out.

    Args:
        x: (..., features).
        divisor: fp32 (features,), what its channels are divided by.
    """
    if x.dtype == torch.bfloat16 and divisor is None:
        return x
    half, square = torch.empty(x.shape, dtype=torch.float16, device=x.device), 0.0
    for given, found in zip(heap.pieces(x), heap.pieces(half), strict=True):
        found.copy_(given if divisor is None else given / divisor)
        square += float(torch.linalg.vector_norm(found, dtype=torch.float32)) ** 2  # NaN or infinite if anything is
    if _SMALL**2 * x.numel() <= square < math.inf:
        return half
    return x if divisor is None else x / divisor


def _stream(
    readers: Sequence[Matrix], points: Sequence[tuple[str, Tensor]], outputs: dict[Matrix, Tensor]
) -> str | None:
    """Where the stream is seen that becomes the next one that is seen when their output is added to it."""
    output = outputs.get(readers[0])
    if len(readers) > 1 or output is None:
        return None
    for (name, before), (_, after) in pairwise(points):
        if output.shape == before.shape == after.shape:
            missing = (after - before - output).norm()
            if float(missing) < _ADDED * float(output.norm()):
                return name
    return None


class Walks:
    """All batches on their way through one block; a context manager that gives up those that have not arrived.

    Args:
        model: the model that the matrices' names start from.
        block: the block, in memory; its matrices are replaced between the stages.
        stages: of :func:`exact_stages`.
        hidden: per batch, fp32 (batch, positions, hidden_size).
        calls: per batch, how to call the block.
        rough: products in bfloat16, those of the moments too, see :class:`bittern.quantize.hessian.Accumulator`.
    """

    def __init__(
        self,
        model: nn.Module,
        block: nn.Module,
        stages: Sequence[Stage],
        hidden: Sequence[Tensor],
        calls: Sequence[BlockCall],
        rough: bool = False,
    ) -> None:
        self._model, self._block, self._hidden, self._rough = model, block, hidden, rough
        self._leaders = {stage.matrices[0] for stage in stages}
        self._hooks = reading(model, sorted(self._leaders, key=lambda m: m.label), self._stop)
        self._streams = _streams_seen(model, stages, hidden)
        self._walks = [
            greenlet(lambda state=state, call=call: call.run(block, state))
            for state, call in zip(hidden, calls, strict=True)
        ]

    def __enter__(self) -> Walks:
        self._hooks.__enter__()
        self._streams.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
        self._streams.__exit__(*error)
        for walk in self._walks:
            walk.throw()  # ends those that have not arrived

    def inputs(self, stage: Stage) -> Iterator[Tensor]:
        """Walk each batch up to a stage: its input there, (batch, positions, in_features).

        Stages are to be asked for in their order. A batch's next step begins when its next stage is asked for.

        Raises:
            BitternError: for a batch that comes by another way.
        """
        with rounded_once(self._block, self._rough):
            for number, (state, walk) in enumerate(zip(self._hidden, self._walks, strict=True), 1):
                if number % TRIMMED == 0:
                    heap.trim()
                # Entered and left on this side of the switch: what is solved in between is solved in fp32.
                with torch.no_grad(), sixteen_bits(state.device, self._rough):
                    arrived = walk.switch()
                if walk.dead or arrived[0] != stage.matrices[0]:
                    missed = stage.matrices[0].label
                    raise BitternError(f"{missed}: a calibration batch goes through its block without it")
                empty(walk.gr_frame, stage.dead)
                yield arrived[1]

    def gather(self, stage: Stage, learned: int, weights: Tensor | None = None) -> tuple[Inputs, Drift]:
        """Walk each batch up to a stage: what its matrices read, and how far that is from full precision.

        Args:
            stage: its exact inputs, and what the stream is behind, are used up.
            learned: the first so many batches are learned from, see :class:`bittern.quantize.drift.Drift`.
            weights: what each token counts, (windows, positions); None: all the same.

        Raises:
            BitternError: for NaN and infinity, and as :meth:`inputs` does.
        """
        stream = None if stage.stream is None else (live.get_weight(self._model, stage.matrices[0]), stage.behind)
        drift = Drift(stage.exact, learned, self._rough, stream)
        moments = Accumulator(stage.matrices[0].in_features, stage.exact[0].device, self._rough)
        first = 0
        counts = None if weights is None else weights.flatten()
        for x in self.inputs(stage):
            root = None
            if counts is not None:
                own, counts = counts[: x[..., 0].numel()], counts[x[..., 0].numel() :]
                root = own.view(*x.shape[:-1], 1).sqrt().to(x.device)
            moments.add(x if root is None else x * root)
            check_inputs(moments, x, stage.matrices[0], first)
            drift.add(x, root)
            first += len(x)
        moments.add_up()
        return Inputs(stage.matrices, moments.mean(), moments.tokens), drift

    def finish(self) -> None:
        """Walk each batch to the end of the block, and put the outputs in the place of the hidden states."""
        with rounded_once(self._block, self._rough), torch.no_grad():
            for state, walk in zip(self._hidden, self._walks, strict=True):
                with sixteen_bits(state.device, self._rough):
                    output = walk.switch()
                if state.shape == output.shape:
                    # In place: new tensors in the place of old ones would leave holes all over the heap.
                    state.copy_(output)
                else:
                    state.data = output.to(state.dtype).contiguous()

    def _stop(self, matrix: Matrix, x: Tensor) -> None:
        getcurrent().parent.switch((matrix, x))


@contextmanager
def removed(hooks: Sequence[RemovableHandle]) -> Iterator[None]:
    """Remove hooks at the end."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def reading(model: nn.Module, matrices: Sequence[Matrix], call: Any) -> Iterator[None]:
    """Call ``call(matrix, x)`` before a matrix is multiplied with x."""

    def hook(matrix: Matrix) -> Any:
        return lambda _, args: call(matrix, args[0])

    handles = [model.get_submodule(m.module).register_forward_pre_hook(hook(m)) for m in matrices]
    with removed(handles):
        yield


@contextmanager
def _streams_seen(model: nn.Module, stages: Sequence[Stage], hidden: Sequence[Tensor]) -> Iterator[None]:
    """Note how far the batches are behind full precision where the stages' residual streams are seen."""
    handles = []
    for stage in stages:

        def note(_: Any, args: Any, stage: Stage = stage) -> None:
            if stage.streams:  # batches come by in their order, the exact ones first
                stage.behind.append((stage.streams.pop(0) - args[0]).bfloat16())

        if stage.stream == INPUT:
            for state in hidden[: len(stage.streams)]:
                note(None, (state,))
        elif stage.stream is not None:
            handles.append(model.get_submodule(stage.stream).register_forward_pre_hook(note))
    with removed(handles):
        yield


@contextmanager
def _after(model: nn.Module, matrices: Sequence[Matrix], outputs: dict[Matrix, Tensor]) -> Iterator[None]:
    """Note what matrices put out."""

    def hook(matrix: Matrix) -> Any:
        return lambda _, __, output: outputs.update({matrix: output.detach()})

    handles = [model.get_submodule(m.module).register_forward_hook(hook(m)) for m in matrices]
    with removed(handles):
        yield


@contextmanager
def _after_norms(model: nn.Module, block: nn.Module, found: list[tuple[str, Tensor, Tensor]]) -> Iterator[None]:
    """Note the norms of a block by their names in the model, with what they read and what they put out."""
    prefix = next(name for name, module in model.named_modules() if module is block)
    handles = []
    for name, module in block.named_modules():
        weight = module._parameters.get("weight")
        if "norm" in type(module).__name__.lower() and weight is not None and weight.ndim == 1:

            def note(_: nn.Module, args: Any, output: Tensor, name: str = f"{prefix}.{name}") -> None:
                found.append((name, args[0], output))

            handles.append(module.register_forward_hook(note))
    with removed(handles):
        yield
