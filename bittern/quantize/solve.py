"""Quantize a planned model block by block, with one block in memory.

Every matrix is calibrated on what the quantized matrices before it really give it, in one pass over the block
(see :mod:`bittern.quantize.stages`). Blocks of experts, and all at effort plain, are run twice over the calibration
tokens: once for the inputs of all their matrices, once, quantized, for the inputs of the next block.

What is solved goes into a work folder; blocks that are there already are put in the place of the originals and only
run, once, so that what comes after them is what it would have been.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bittern import model as live
from bittern.checkpoint import Checkpoint
from bittern.model import Matrix, Piece
from bittern.processes import check_same, from_first, world
from bittern.quantize import heap
from bittern.quantize.balance import Balanced, Balancer
from bittern.quantize.drift import Drift
from bittern.quantize.effort import Effort
from bittern.quantize.gptq import factorize, gptq
from bittern.quantize.grid import search_grid
from bittern.quantize.guide import find_guides, token_weights
from bittern.quantize.hessian import Inputs, check_finite, collect
from bittern.quantize.plan import Plan
from bittern.quantize.polish import damp, polish
from bittern.quantize.shape import Shaper, rounds_before
from bittern.quantize.stages import Stage, Walks, exact_stages
from bittern.quantize.windows import OwnWindows, guiding_windows
from bittern.replay import BlockCall, advance, capture_all, rounded_once, sixteen_bits
from bittern.weight import QuantSpec, QuantWeight, min_max_grid, naming, round_to_nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from bittern.quantize.resume import WorkFolder

Curvatures = Callable[[Sequence[Matrix]], dict[Matrix, Tensor]]

Layer = tuple[dict[str, Any], QuantWeight]
"""The manifest's record of a packed layer, and its weight."""

NO_TOKENS = "no calibration token reached it: rounded to nearest"


@dataclass
class Solver:
    """Quantizes the blocks of a model of which only buffers are in memory.

    Attributes:
        model: of :func:`bittern.model.build`.
        checkpoint: where its weights are.
        sources: of :func:`bittern.model.weight_map`.
        plan: what to quantize.
        damp_percent: see :func:`bittern.quantize.gptq.factorize`.
        device: where to compute.
        effort: the stages.
        dtype: that what is not quantized is stored in.
        on_weighed: see :func:`bittern.quantize.guide.find_guides`; in the first process alone.
    """

    model: PreTrainedModel
    checkpoint: Checkpoint
    sources: dict[str, tuple[Piece, ...]]
    plan: Plan
    damp_percent: float
    device: torch.device
    effort: Effort
    dtype: torch.dtype = torch.float32
    on_weighed: Callable[[int, int], None] | None = None

    def solve(self, windows: OwnWindows, work: WorkFolder | None) -> Iterator[dict[str, Any]]:
        """Quantize every planned matrix that the work folder lacks, and keep each block there when it is done.

        Under torchrun all processes walk their windows through the blocks; the first one solves, and gives the others
        what came of it.

        Args:
            windows: of this process.
            work: open; None in every process but the first.

        Yields:
            The record of every layer that was solved, block by block; in the first process only.
        """
        prefix, blocks = live.blocks(self.model)
        finished = _finished(work, len(blocks), self.device)
        missing = [position for position in range(len(blocks)) if position not in finished]
        if not missing:
            return
        batches = windows.batches
        sizes = self._guide(batches, finished, work) if batches and self.effort.shape else {}
        if windows.exact:
            heap.for_holding()
        hidden, calls = self._capture(prefix, blocks, batches) if batches else ([], [])
        if windows.exact:
            heap.for_holding(hidden[0].nbytes)
        exact = [state.clone() for state in hidden[: windows.exact]]
        balancer = Balancer(self.model, self.dtype)
        rough = self.plan.rough(self.device)
        for position in range(missing[-1] + 1) if batches else missing:
            name, block = f"{prefix}.{position}", blocks[position]
            inside = [tensor for tensor in self.sources if tensor.startswith(f"{name}.")]
            live.load_tensors(self.model, self.checkpoint, self.sources, inside, device=self.device)
            entries = dict(self.plan.blocks[position])
            block_calls = [batch_calls[position] for batch_calls in calls]
            solved_already = position in finished
            before = exact[0].clone() if exact and self.effort.balance and not solved_already else None
            exact_calls = block_calls[: len(exact)]
            stages = exact_stages(self.model, block, list(entries), exact, exact_calls, rough, keep=not solved_already)
            streams = [] if stages is None else [stage.stream is not None for stage in stages]
            check_same(len(streams) + sum(streams), f"stages of {name}")
            walked_rough = rough and stages is not None
            if stages is None:  # it has not come through this block
                if any(matrix.expert is not None for matrix in entries) and self._walks_after(position, missing):
                    advance(block, exact, exact_calls)
                else:
                    exact.clear()
            if solved_already:
                if work is not None:
                    self._restore(position, work)
                from_first(*block.parameters())
                stages = None
            else:
                balanced = Balanced()
                if stages is not None and before is not None:
                    kept = [matrix for matrix in live.matrices(self.model, name, self.sources) if matrix not in entries]
                    balanced = balancer.balance(block, stages, entries, before, block_calls[0], kept)
                rescaled = {part: left for matrix, left in balanced.matrices.items() for part, _, _ in matrix.parts}
                curvatures = partial(self._curvatures, position, work, balanced.rows)
                solved = []
                for record, weight in self._solve_block(
                    block, entries, stages, sizes, curvatures, windows.learned, hidden, block_calls
                ):
                    record["rescaled"] = record["layer"] in rescaled
                    record["left"] = _known(balance=rescaled.get(record["layer"])) | record["left"]
                    solved.append((record, weight))
                    yield record
                if work is not None:
                    work.save(position, solved, balanced.changed)
            if stages is None and position < missing[-1]:
                with rounded_once(block, walked_rough), sixteen_bits(self.device, walked_rough):
                    advance(block, hidden, block_calls)
            check_finite(name, hidden)
            live.drop_tensors(self.model, inside)
            heap.trim()
        if windows.exact:
            heap.for_solving()

    def _walks_after(self, position: int, missing: Sequence[int]) -> bool:
        """Whether a block without experts is still to come, solved or not: a resumed run walks as one that was not."""
        later = self.plan.blocks[position + 1 : missing[-1] + 1]
        return any(all(matrix.expert is None for matrix, _ in block) for block in later)

    def _guide(
        self, batches: Sequence[Tensor], finished: Collection[int], work: WorkFolder | None
    ) -> dict[Matrix, Tensor]:
        """What each token counts, where that is asked for; how outputs count is kept in the work folder.

        Nothing of blocks of experts, which are not walked in stages.
        """
        matrices = [
            [] if position in finished else self.effort.shaped(block) for position, block in enumerate(self.plan.blocks)
        ]
        guided = torch.tensor([self.guided(work, finished)], dtype=torch.uint8, device=self.device)
        from_first(guided)
        if guided:
            return {}
        if not self.effort.weigh:
            few = torch.cat(list(batches))[: guiding_windows(batches[0].shape[1])]
            batches = torch.split(few, len(batches[0]))
        sizes: dict[Matrix, Tensor] = {}
        told = None if world()[0] else self.on_weighed
        whole = self.model, self.checkpoint, self.sources
        for position, guide in find_guides(*whole, matrices, batches, self.device, told):
            if self.effort.weigh:
                sizes |= guide.sizes
            if work is not None and guide.curvatures:
                work.keep_curvatures(position, guide.curvatures)
        heap.trim()
        return sizes

    def guided(self, work: WorkFolder | None, finished: Collection[int]) -> bool:
        """Whether nothing is to be found out about outputs: the work folder has it, or no block to come asks for it."""
        asking = [p for p, block in enumerate(self.plan.blocks) if p not in finished and self.effort.shaped(block)]
        there = work is not None and all(work.has_curvatures(position) for position in asking)
        return not asking or (there and not self.effort.weigh)

    def _curvatures(
        self, position: int, work: WorkFolder | None, divided: dict[Matrix, Tensor], matrices: Sequence[Matrix]
    ) -> dict[Matrix, Tensor]:
        """How the outputs of some matrices of a block count, whose rows were divided by numbers since."""
        if work is None:
            return {}
        found = {matrix: each.to(self.device) for matrix, each in work.curvatures(position, matrices).items()}
        for matrix in found.keys() & divided.keys():
            found[matrix].mul_(divided[matrix]).mul_(divided[matrix].unsqueeze(1))
        return found

    def help(self, windows: OwnWindows) -> None:
        """What every process of torchrun but the first does while that one solves."""
        for _ in self.solve(windows, None):
            pass

    def _solve_block(
        self,
        block: nn.Module,
        entries: dict[Matrix, QuantSpec],
        stages: list[Stage] | None,
        sizes: dict[Matrix, Tensor],
        curvatures: Curvatures,
        learned: int,
        hidden: list[Tensor],
        calls: list[BlockCall],
    ) -> Iterator[Layer]:
        """The layers of one block; with stages, the hidden states are its outputs afterwards."""
        if not calls or (stages is None and not entries):
            yield from self._to_nearest(entries)
        elif stages is None:
            waiting = collect(self.model, block, list(entries), hidden, calls)
            while waiting:  # of experts there are many: each is freed when it is solved
                yield from self._solve_together(waiting.pop(0), None, entries, curvatures)
        else:
            with Walks(self.model, block, stages, hidden, calls, self.plan.rough(self.device)) as walks:
                heap.trim()
                for stage in stages:
                    inputs, drift = walks.gather(stage, learned, token_weights(sizes, stage.matrices))
                    heap.trim()
                    heap.for_solving()
                    yield from self._solve_together(inputs, drift, entries, curvatures)
                    del inputs, drift
                    heap.for_holding(hidden[0].nbytes)
                    heap.trim()
                walks.finish()

    def _restore(self, position: int, work: WorkFolder) -> None:
        """Put what was solved by an earlier process into the block, as :meth:`_solve_together` does."""
        weights = {record["layer"]: weight for record, weight in work.load(position)}
        for matrix, _ in self.plan.blocks[position]:
            target = live.get_weight(self.model, matrix)
            for name, start, stop in matrix.parts:
                target[start:stop].copy_(weights[name].dequantize())
        for name, values in work.changed(position).items():
            self.model.get_parameter(name).copy_(values)

    def _capture(
        self, prefix: str, blocks: nn.ModuleList, batches: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[list[BlockCall]]]:
        """Per batch, the hidden states before the first block and how each block is called."""
        head = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        in_head = {name for name, module in self.model.named_modules() if module is head}
        outside = [
            name
            for name in self.sources
            if not name.startswith(f"{prefix}.") and name.rpartition(".")[0] not in in_head
        ]
        live.load_tensors(self.model, self.checkpoint, self.sources, outside, device=self.device)
        live.move_buffers(self.model, self.device)
        captured = capture_all(self.model, blocks, batches, self.device)
        live.drop_tensors(self.model, outside)
        return captured

    def _to_nearest(self, entries: dict[Matrix, QuantSpec]) -> Iterator[Layer]:
        outcome = {"method": "rtn", "damp": None, "tokens": 0, "fallback": None}
        for matrix, spec in entries.items():
            began = time.monotonic()
            with naming(matrix.label):
                weight = round_to_nearest(live.get_weight(self.model, matrix), spec)
            yield from layers_of(matrix, weight, None, outcome, time.monotonic() - began)

    def _solve_together(
        self,
        inputs: Inputs,
        drift: Drift | None,
        specs: dict[Matrix, QuantSpec],
        curvatures: Curvatures,
    ) -> Iterator[Layer]:
        """Solve the matrices that share an input, and put the results into the block."""
        weights = [live.get_weight(self.model, matrix) for matrix in inputs.matrices]
        left: list[float | None] = [None] * len(weights)
        if drift is None:
            wanted = torch.cat(weights)
        else:
            wanted, left = drift.corrected(weights, inputs.hessian)
        if world()[0] == 0:
            drifts = dict(zip(inputs.matrices, left, strict=True))
            yield from self._solve(inputs, wanted, specs, drifts, curvatures(inputs.matrices))
        from_first(*weights)

    def _solve(
        self,
        inputs: Inputs,
        wanted: Tensor,
        specs: dict[Matrix, QuantSpec],
        drift: dict[Matrix, float | None],
        curvatures: dict[Matrix, Tensor],
    ) -> Iterator[Layer]:
        """The first process's part of :meth:`_solve_together`.

        Args:
            wanted: what the stacked matrices should be, fp32 (rows of all, in_features).
            drift: what is left of the drift's error, for the record.
            curvatures: of their outputs, where they are known.
        """
        began, rows_of_all = time.monotonic(), len(wanted)
        unseen = inputs.tokens == 0 and inputs.prior == 0
        factor = None if unseen else factorize(inputs.hessian, self.damp_percent, self.effort.act_order)
        outcome = {"method": "gptq", "damp": self.damp_percent, "tokens": inputs.tokens, "fallback": _fallback(inputs)}
        if factor is None:
            outcome |= {"method": "rtn", "damp": None, "fallback": NO_TOKENS}
        elif factor.fallback:
            outcome["fallback"] = "; ".join(filter(None, (factor.fallback, _fallback(inputs))))
        targets = dict(
            zip(inputs.matrices, torch.split(wanted, [m.out_features for m in inputs.matrices]), strict=True)
        )
        rough = self.plan.rough(self.device)
        damped = None if factor is None else damp(inputs.hessian, factor.damping, rough)
        shaper = Shaper(damped, factor) if damped is not None and factor is not None and curvatures else None
        shared = (time.monotonic() - began) / rows_of_all
        for spec in dict.fromkeys(specs[matrix] for matrix in inputs.matrices):
            began = time.monotonic()
            members = [matrix for matrix in inputs.matrices if specs[matrix] == spec]
            stacked = torch.cat([live.get_weight(self.model, matrix) for matrix in members])
            with naming(*(matrix.label for matrix in members)):
                if factor is None:
                    weight, losses = round_to_nearest(stacked, spec), None
                else:
                    search = self.effort.search
                    grid = search_grid(stacked, spec, factor.diagonal) if search else min_max_grid(stacked, spec)
                    whole = len(members) == len(targets)
                    target = wanted if whole else torch.cat([targets[matrix] for matrix in members])
                    solution = gptq(target, factor, spec, grid=grid)
                    weight, loss = solution.weight, solution.loss
                    if damped is not None and self.effort.polish:
                        rounds = rounds_before(all(matrix in curvatures for matrix in members))
                        weight, loss = polish(target, damped, weight, rounds)
                    losses = torch.stack((loss, solution.norm, solution.loss, loss))
            of_row, start = shared + (time.monotonic() - began) / len(stacked), 0
            for matrix in members:
                began, rows = time.monotonic(), slice(start, start + matrix.out_features)
                start = rows.stop
                own, shaped = weight.rows(rows), None
                found = None if losses is None else losses[:, rows]
                if shaper is not None and found is not None and matrix in curvatures:
                    own, shaped, found[0] = shaper.shape(targets[matrix], curvatures[matrix], own)
                live.get_weight(self.model, matrix).copy_(own.dequantize())
                seconds = of_row * matrix.out_features + time.monotonic() - began
                for record, part in layers_of(matrix, own, found, outcome, seconds):
                    record["left"] = _known(drift=drift[matrix]) | record["left"] | _known(shape=shaped)
                    yield record, part


def _finished(work: WorkFolder | None, blocks: int, device: torch.device) -> set[int]:
    """The blocks that the first process has solved already, in every process."""
    marks = torch.zeros(blocks, dtype=torch.uint8, device=device)
    if work is not None:
        marks[list(work.finished)] = 1
    from_first(marks)
    return set(marks.nonzero().flatten().tolist())


def _fallback(inputs: Inputs) -> str | None:
    if inputs.prior <= 0.5:
        return None
    return f"{inputs.tokens} tokens reached it: {inputs.prior:.0%} of its Hessian is the other experts'"


def _known(**shares: float | None) -> dict[str, float]:
    return {stage: share for stage, share in shares.items() if share is not None}


def layers_of(
    matrix: Matrix, weight: QuantWeight, loss: Tensor | None, outcome: dict[str, Any], seconds: float
) -> Iterator[Layer]:
    """The checkpoint layers that a matrix is made of.

    Args:
        loss: (4, out_features), squared output error and squared output of each row, and the error before and after
            it was polished; the record holds ratios of their sums.
        outcome: method, damping, tokens and fallback.
        seconds: that it took; each layer is charged for its rows.
    """
    for name, start, stop in matrix.parts:
        error, norm, solved, polished = (0.0,) * 4 if loss is None else loss[:, start:stop].sum(1).tolist()
        record = {
            "layer": name,
            "shape": [stop - start, matrix.in_features],
            "bits": weight.spec.bits,
            "group_size": weight.spec.group_size,
            "sym": weight.spec.sym,
            "loss": None if loss is None else error / norm if norm > 0 else 0.0,
            "left": {"polish": polished / solved} if solved > 0 and polished != solved else {},
            **outcome,
            "seconds": seconds * (stop - start) / matrix.out_features,
        }
        yield record, weight.rows(slice(start, stop))
