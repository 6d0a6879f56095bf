"""Two checkpoints of one architecture, compared parameter by parameter whatever each keeps where.

One may hold packed layers and the other floats, one fused experts and the other single ones: both are seen
as rows of the live model's parameters. A layer is in memory at a time, or a piece of a plain tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from bittern import model as live
from bittern.artifact import Artifact
from bittern.checkpoint import Checkpoint
from bittern.errors import BitternError
from bittern.fit import packed_matrices, unplaced_tensors
from bittern.shards import dtype_name
from bittern.weight import QuantWeight

_PIECE = 2**21  # elements of plain tensors that are compared at once
_ROUND_TRIP = 2.0**-22  # llama.cpp's norms of Gemma are one larger than ours, and lose digits on the way
_FLOATS = {"F32", "F16", "BF16"}  # types of GGUF
_NAMED = 5  # names in a message


@dataclass(frozen=True)
class Chunk:
    """Where a checkpoint keeps some rows of a parameter, or a tensor that is none.

    Attributes:
        start, stop: rows of the parameter, flattened to two dimensions.
        width: elements in a row.
        name: the tensor, or the packed layer.
        packed: which of the two.
        transposed: the parameter's rows are the columns of the packed layer.
    """

    start: int
    stop: int
    width: int
    name: str
    packed: bool
    transposed: bool = False


class View:
    """A checkpoint as the rows of its model's parameters.

    Attributes:
        artifact: the checkpoint.
        model: the model on meta.
        chunks: parameter -> its rows, in order. Tied parameters are left out.
        others: tensors and packed layers that are no part of a parameter.
        unplaced: those of them that the architecture has no place for.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Find every parameter in the headers.

        Raises:
            BitternError: for an architecture or format that bittern does not know, and naming a tensor that
                is missing or of another shape than config.json asks for.
        """
        self.artifact = artifact = Artifact(checkpoint)
        self.model = live.build(checkpoint.config)
        sources = live.weight_map(self.model, artifact.plain, artifact.layers)
        matrices = packed_matrices(self.model, sources, artifact)
        self.unplaced = unplaced_tensors(self.model, sources, matrices, artifact)
        self.chunks: dict[str, list[Chunk]] = {}
        state = self.model.state_dict()
        for matrix in matrices:
            first = 0 if matrix.expert is None else matrix.expert * state[matrix.parameter].shape[-2]
            for layer, start, stop in matrix.parts:
                rows, columns = stop - start, matrix.in_features
                if matrix.transposed:
                    rows, columns = columns, rows
                offset = first + (0 if matrix.transposed else start)
                name = layer if layer in artifact.layers or layer in artifact.plain else f"{layer}.weight"
                chunk = Chunk(offset, offset + rows, columns, name, layer in artifact.layers, matrix.transposed)
                self.chunks.setdefault(matrix.parameter, []).append(chunk)
        for parameter, pieces in sources.items():
            if parameter not in self.chunks:
                _, width = _rows(tuple(state[parameter].shape))
                self.chunks[parameter] = [self._chunk(piece.source, piece.start, piece.stop, width) for piece in pieces]
        for parameter, chunks in self.chunks.items():
            for chunk in chunks:
                self._check_shape(chunk, tuple(state[parameter].shape), alone=len(chunks) == 1)
        used = {chunk.name for chunks in self.chunks.values() for chunk in chunks}
        self.others = [name for name in (*artifact.plain, *artifact.layers) if name not in used]
        self._last: tuple[str, QuantWeight] | None = None

    def other(self, name: str) -> Chunk:
        """One of :attr:`others` as a chunk of its own."""
        rows, width = _rows(self.shape(name))
        return Chunk(0, rows, width, name, name in self.artifact.layers)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, or of a packed layer's weight."""
        layer = self.artifact.layers.get(name)
        return self.artifact.plain[name].shape if layer is None else (layer.out_features, layer.in_features)

    def dtype(self, name: str) -> torch.dtype:
        """The stored dtype of a plain tensor."""
        return self.artifact.plain[name].dtype

    def weight(self, layer: str) -> QuantWeight:
        """A packed layer; the one that was read last is kept."""
        if self._last is None or self._last[0] != layer:
            self._last = None  # free it before the next
            self._last = layer, self.artifact.read(layer)
        return self._last[1]

    def rows(self, chunk: Chunk, start: int, stop: int) -> Tensor:
        """Rows of the parameter that lie in a chunk, (stop - start, width)."""
        first, last = start - chunk.start, stop - chunk.start
        if not chunk.packed:
            values = self.artifact.checkpoint.read_elements(chunk.name, first * chunk.width, last * chunk.width)
            return values.view(last - first, chunk.width)
        values = self.weight(chunk.name).dequantize()
        return (values.T if chunk.transposed else values)[first:last]

    def _chunk(self, source: str, start: int, stop: int, width: int) -> Chunk:
        layer = source.removesuffix(".weight")
        packed = source not in self.artifact.plain and layer in self.artifact.layers
        return Chunk(start, stop, width, layer if packed else source, packed)

    def _check_shape(self, chunk: Chunk, parameter: tuple[int, ...], alone: bool) -> None:
        expected: tuple[int, ...] = (chunk.stop - chunk.start, chunk.width)
        if not chunk.packed:
            expected = parameter if alone else expected if len(parameter) > 1 else expected[:1]
        found = self.shape(chunk.name)[:: -1 if chunk.packed and chunk.transposed else 1]
        if found != expected:
            raise BitternError(f"{chunk.name}: config.json asks for shape {expected}, found {found}")


class Comparison:
    """What became of a source's tensors in an artifact; names are the artifact's.

    Attributes:
        missing: tensors of the source that the artifact lacks without an excuse.
        excused: those that it may lack: tied to another, computed, or zero biases.
        added: tensors that only the artifact has.
        wrong: tensor -> what is wrong with its values.
        equal: plain tensors that are the source's, after a cast where dtypes differ.
        layers: packed layers that hold the same weights as the source, packed or not.
        same_codes: of them, those whose codes, scales and zeros are the same for each column.
        steps: the largest difference between packed weights in steps of the source's grid.
        errors: layer -> norm of its error over the norm of the source's weights, where those are floats.
        changed: packed layers and tensors that are not meant to be the source's, one by one.
        rounded: whether any value that should be the source's went through a cast that changed it.
    """

    def __init__(
        self,
        output: View,
        source: View,
        inexact: bool = False,
        changed: Collection[str] = (),
        on_step: Callable[[int, int], None] | None = None,
    ) -> None:
        """Compare everything.

        Args:
            output: the artifact.
            source: what it was made of.
            inexact: packed weights may differ from packed ones by half a step.
            changed: tensors and packed layers of the artifact that were trained, or rescaled against each other: only
                their shapes are compared.
            on_step: called with the parameters done and their number.
        """
        self._output, self._source, self._inexact, self._changed = output, source, inexact, changed
        self.changed: set[str] = set()
        self.missing: list[str] = []
        self.excused: list[str] = []
        self.added: list[str] = []
        self.wrong: dict[str, str] = {}
        self.equal: set[str] = set()
        self.layers: set[str] = set()
        self.same_codes: set[str] = set()
        self.steps = 0.0
        self.rounded = False
        self._sums: dict[str, tuple[float, float]] = {}
        for done, (parameter, chunks) in enumerate(output.chunks.items(), 1):
            if parameter in source.chunks:
                self._compare(chunks, source.chunks[parameter])
            else:
                self.added += [chunk.name for chunk in chunks]
            if on_step is not None:
                on_step(done, len(output.chunks))
        for parameter, chunks in source.chunks.items():
            if parameter not in output.chunks:
                self.missing += [chunk.name for chunk in chunks]
        self._compare_others()
        self.errors = {name: _ratio(*sums) for name, sums in self._sums.items()}
        for name, error in self.errors.items():
            if not error < 1:  # NaN too
                self.wrong[name] = f"its relative error is {error:.3g}, and that of zeros would be 1"

    @property
    def worst(self) -> list[tuple[str, float]]:
        """The layers with the largest relative errors."""
        return sorted(self.errors.items(), key=lambda item: -item[1])[:_NAMED]

    def _compare(self, found: list[Chunk], expected: list[Chunk]) -> None:
        """One parameter, or one tensor that is none."""
        if found[-1].stop != expected[-1].stop or found[0].width != expected[0].width:
            shapes = [(chunks[-1].stop, chunks[0].width) for chunks in (expected, found)]
            self.wrong[found[0].name] = f"expected {shapes[0]} rows and columns as in the source, found {shapes[1]}"
            return
        for start, stop, mine, theirs in _overlaps(found, expected):
            if mine.name in self._changed and not theirs.packed:
                self.changed.add(mine.name)
                self.rounded = True
                continue
            if mine.packed and theirs.packed:
                self._compare_packed(start, stop, mine, theirs)
                continue
            step = stop - start if mine.packed or theirs.packed else _rows_at_once(mine.width)
            for first in range(start, stop, step):
                last = min(first + step, stop)
                exact = self._source.rows(theirs, first, last)
                values = self._output.rows(mine, first, last)
                if mine.packed:
                    self._add_error(mine.name, values, exact)
                else:
                    self._compare_plain(mine.name, values, exact, theirs.packed)

    def _compare_packed(self, start: int, stop: int, mine: Chunk, theirs: Chunk) -> None:
        weight, exact = self._output.weight(mine.name), self._source.weight(theirs.name)
        values, wanted = self._output.rows(mine, start, stop), self._source.rows(theirs, start, stop)
        if torch.equal(values, wanted):
            self.layers.add(mine.name)
            if _same_columns(weight, exact):
                self.same_codes.add(mine.name)
            return
        self.rounded = True
        scales = exact.scales.float()[:, exact.group_index()]
        scales = (scales.T if theirs.transposed else scales)[start - theirs.start : stop - theirs.start]
        steps = float(((values - wanted) / scales).abs().nan_to_num(nan=0.0).max())  # 0 / 0: nothing differs there
        self.steps = max(self.steps, steps)
        # A GGUF block has its smallest value in fp16, where the grid has a whole number: half a digit of it.
        allowed = 0.5 if self._inexact else (exact.spec.max_code + 1) * 2.0**-11
        if (self._inexact or self._output.artifact.format == "gguf") and steps <= allowed:
            self.layers.add(mine.name)
        else:
            self.wrong[mine.name] = f"its weights differ by up to {steps:.3g} steps of the source's grid"

    def _compare_plain(self, name: str, values: Tensor, exact: Tensor, packed: bool) -> None:
        if values.dtype != exact.dtype and not (values.is_floating_point() and exact.is_floating_point()):
            self.wrong[name] = f"expected {exact.dtype} as in the source, found {values.dtype}"
            return
        gguf = self._output.artifact.checkpoint.gguf
        # Values of a GGUF file arrive as fp32, in whichever dtype they are stored.
        dtypes = (values.dtype,) if gguf is None else (values.dtype, torch.bfloat16, torch.float16)
        wanted = [_cast(exact, dtype).to(values.dtype) for dtype in dtypes]
        if not any(torch.equal(values, each) for each in wanted):
            if gguf is not None and not gguf.kinds(name) <= _FLOATS:
                self._add_error(name, values, exact)  # a block type of llama.cpp that is no grid of ours
                return
            distance = float((values.double() - exact.double()).abs().max())
            if distance > _ROUND_TRIP or "gguf" not in (self._output.artifact.format, self._source.artifact.format):
                differing = int((values != wanted[0]).sum())
                self.wrong[name] = (
                    f"{differing} of {values.numel()} values are not the source's in {dtype_name(values.dtype)}"
                )
                return
        (self.layers if packed else self.equal).add(name)
        if values.is_floating_point():
            self.rounded |= not torch.equal(values.double(), exact.double())

    def _add_error(self, name: str, values: Tensor, exact: Tensor) -> None:
        self.rounded = True
        wanted = exact.float()
        sums = self._sums.get(name, (0.0, 0.0))
        error, norm = (float(torch.linalg.vector_norm(x, dtype=torch.float64)) for x in (values - wanted, wanted))
        self._sums[name] = sums[0] + error**2, sums[1] + norm**2

    def _compare_others(self) -> None:
        """Tensors that are no part of the model: vision towers, further heads, tied ones, old buffers."""
        left = dict.fromkeys(self._output.others)
        prefix = f"{self._source.model.base_model_prefix}."
        for name in self._source.others:
            match = next((n for n in (name, name.removeprefix(prefix), prefix + name) if n in left), None)
            if match is not None:
                del left[match]
                self._compare([self._output.other(match)], [self._source.other(name)])
            elif self._needless(name):
                self.excused.append(name)
            else:
                self.missing.append(name)
        self.added += left

    def _needless(self, name: str) -> bool:
        """Whether a tensor of the source may be left out."""
        if live.COMPUTED.search(name):
            return True
        view = self._source
        if name.removesuffix(".bias") in view.artifact.layers and name.endswith(".bias"):
            return not bool(view.artifact.checkpoint.read(name).any())  # AutoGPTQ's
        ties = view.model.all_tied_weights_keys
        prefix = f"{view.model.base_model_prefix}."
        parameter = next((ties[n] for n in (name, name.removeprefix(prefix), prefix + name) if n in ties), None)
        if parameter is None or name in view.artifact.layers:
            return False
        other = view.other(name)
        return all(
            other.width == chunk.width
            and other.stop >= stop
            and torch.equal(view.rows(other, first, last), view.rows(chunk, first, last))
            for chunk in view.chunks[parameter]
            for start, stop in [(chunk.start, chunk.stop)]
            for first, last in _pieces(start, stop, _rows_at_once(chunk.width))
        )


def _rows(shape: tuple[int, ...]) -> tuple[int, int]:
    """A shape flattened to two dimensions; elements of a vector are rows of one."""
    size = torch.Size(shape).numel()
    return (size, 1) if len(shape) < 2 else (torch.Size(shape[:-1]).numel(), shape[-1])


def _rows_at_once(width: int) -> int:
    return max(1, _PIECE // max(1, width))


def _pieces(start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    for first in range(start, stop, step):
        yield first, min(first + step, stop)


def _overlaps(found: list[Chunk], expected: list[Chunk]) -> Iterator[tuple[int, int, Chunk, Chunk]]:
    """The rows that two lists of chunks cut a parameter into, with the chunk of each that holds them."""
    cuts = sorted({row for chunk in (*found, *expected) for row in (chunk.start, chunk.stop)})
    for start, stop in pairwise(cuts):
        mine, theirs = (next(c for c in chunks if c.start <= start < c.stop) for chunks in (found, expected))
        yield start, stop, mine, theirs


def _same_columns(first: QuantWeight, second: QuantWeight) -> bool:
    """Whether codes are the same, and scales and zeros of every column."""
    if first.codes.shape != second.codes.shape or not torch.equal(first.codes, second.codes):
        return False
    groups = first.group_index(), second.group_index()
    return torch.equal(first.scales.float()[:, groups[0]], second.scales.float()[:, groups[1]]) and torch.equal(
        first.zeros[:, groups[0]], second.zeros[:, groups[1]]
    )


def _cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    """As convert casts: what is too large becomes the largest value of its sign."""
    cast = values.to(dtype)
    if not dtype.is_floating_point or cast.dtype == values.dtype:
        return cast
    limit = torch.finfo(dtype).max
    return torch.where(values.isfinite(), cast.clamp(-limit, limit), cast)


def _ratio(error: float, norm: float) -> float:
    """The relative error from two sums of squares."""
    if norm == 0:
        return 0.0 if error == 0 else float("inf")
    return math.sqrt(error / norm)
