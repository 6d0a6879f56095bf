"""Second moments of the inputs of every matrix in a block.

GPTQ needs ``H = E[x x']`` over the calibration tokens for each matrix. Matrices that read the same
tensor (q, k and v; gate and up) share one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bittern.errors import BitternError
from bittern.model import Matrix
from bittern.processes import add_up, check_same, number_of, world
from bittern.replay import BlockCall

SYRK_PANEL = 256
"""Columns per product of the symmetric update: narrower ones leave out more of the lower triangle, and run slower."""


@dataclass
class Inputs:
    """What some matrices of a block read.

    Attributes:
        matrices: the readers.
        hessian: fp32 (in_features, in_features), the mean of x x' over ``tokens``.
        tokens: rows seen; experts of a mixture see different numbers.
        prior: weight in [0, 1] of the block's other experts in ``hessian``; see :func:`shrink_experts`.
    """

    matrices: list[Matrix]
    hessian: Tensor
    tokens: int
    prior: float = 0.0


class Accumulator:
    """The running sum of x x' of one input, upper panels only.

    Args:
        features: of x.
        device: where to sum.
        rough: products in bfloat16, each batch's rounded to it before it is added.
    """

    def __init__(self, features: int, device: torch.device, rough: bool = False) -> None:
        self.total = torch.zeros(features, features, dtype=torch.float32, device=device)
        self.tokens, self.rough = 0, rough

    def add(self, x: Tensor) -> None:
        """Add rows ``x`` of shape (..., features)."""
        x = x.detach().reshape(-1, x.shape[-1]).to(torch.bfloat16 if self.rough else torch.float32)
        for start in range(0, x.shape[1], SYRK_PANEL):
            panel = slice(start, start + SYRK_PANEL)
            add_product(self.total[panel, start:], x[:, panel], x[:, start:], self.rough)
        self.tokens += x.shape[0]

    def add_up(self) -> None:
        """Make it the sum over all processes."""
        count = torch.tensor(self.tokens, device=self.total.device)
        add_up(self.total, count)
        self.tokens = int(count)

    def mean(self) -> Tensor:
        """E[x x'], whole and symmetric; in the place of the sum, for experts are many."""
        mean = self.total.triu_().div_(max(self.tokens, 1))
        return mean.add_(mean.triu(1).T)


def add_product(total: Tensor, x: Tensor, y: Tensor, rough: bool = False) -> None:
    """Add ``x' y``, a sum over rows, to an fp32 total; ``rough``: in bfloat16, the product rounded to it."""
    if rough:
        total.add_(x.bfloat16().T @ y.bfloat16())
    else:
        total.addmm_(x.float().T, y.float())


def collect(
    model: nn.Module,
    block: nn.Module,
    matrices: Sequence[Matrix],
    hidden: Sequence[Tensor],
    calls: Sequence[BlockCall],
) -> list[Inputs]:
    """Run a block over all batches and gather the inputs of its matrices.

    Args:
        model: the model that the matrices' names start from.
        block: the block, in memory.
        matrices: those to gather; the block's others are left alone.
        hidden: per batch, fp32 (batch, positions, hidden_size).
        calls: per batch, how to call the block.

    Under torchrun every process brings its own batches, and all get what all of them have seen.

    Returns:
        One entry per distinct input, in the order in which the block reads them. Matrices that no
        token reached share nothing: their entry has ``tokens == 0``.

    Raises:
        BitternError: naming the matrix and the sample of a NaN or infinite activation.
    """
    recorder = _Recorder(model, matrices)
    with torch.no_grad(), recorder:
        for state, call in zip(hidden, calls, strict=True):
            recorder.begin(state.shape[0])
            with suppress(_AllSeen):
                call.run(block, state)
    return recorder.inputs()


class _AllSeen(Exception):
    """Ends a block's forward when its last input is known: the output, a quarter of the work, is not needed."""


class _Recorder(TorchFunctionMode):
    """Sees what each matrix is multiplied with.

    ``nn.Linear`` and ``Conv1D`` are seen by hooks, experts by :func:`fused_experts`.
    """

    def __init__(self, model: nn.Module, matrices: Sequence[Matrix]) -> None:
        super().__init__()
        self.modules = {m.module: m for m in matrices if m.expert is None}
        self.experts: dict[tuple[str, int], Matrix] = {
            (m.parameter, m.expert): m for m in matrices if m.expert is not None
        }
        self.expert_of = fused_experts(model, matrices)
        self.device = next((model.get_parameter(m.parameter).device for m in matrices), torch.device("cpu"))
        self.leaders: dict[str, list[Matrix]] = {}
        self.followers: set[str] = set()
        self.sums: dict[str | tuple[str, int], Accumulator] = {}
        self.seen: list[tuple[Tensor, str]] = []
        self.first_sample, self.samples = 0, 0
        self.last: str | None = None
        self.handles = [model.get_submodule(name).register_forward_pre_hook(self._hook(name)) for name in self.modules]

    def begin(self, samples: int) -> None:
        """Announce a batch."""
        if self.seen and not self.experts and self.leaders.keys() | self.followers == self.modules.keys():
            self.last = self.seen[-1][1]
        self.first_sample, self.samples = self.first_sample + self.samples, samples
        self.seen = []

    def _hook(self, name: str) -> Any:
        def before(_: nn.Module, args: tuple[Any, ...]) -> None:
            self._linear(name, args[0])

        return before

    def _linear(self, name: str, x: Tensor) -> None:
        if name in self.followers:
            return
        if name not in self.leaders:
            # The tensors in `seen` are held on purpose: a freed one's identity may come back.
            leader = next((other for tensor, other in self.seen if tensor is x), None)
            if leader is not None:
                self.leaders[leader].append(self.modules[name])
                self.followers.add(name)
                return
            self.leaders[name] = [self.modules[name]]
        self.seen.append((x, name))
        self._add(name, self.modules[name], x)
        if name == self.last:
            raise _AllSeen

    def _add(self, key: str | tuple[str, int], matrix: Matrix, x: Tensor) -> None:
        if key not in self.sums:
            self.sums[key] = Accumulator(matrix.in_features, x.device)
        self.sums[key].add(x)
        check_inputs(self.sums[key], x, matrix, self.first_sample, self.samples)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        matrix = self.expert_of(func, args)
        if matrix is not None and matrix.expert is not None:
            self._add((matrix.parameter, matrix.expert), matrix, args[0])
        return func(*args, **(kwargs or {}))

    def __exit__(self, *error: Any) -> None:
        for handle in self.handles:
            handle.remove()
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def totals(self) -> dict[str | tuple[str, int], Accumulator]:
        """What all processes have seen together, experts in the order of the model."""
        own = sum(isinstance(key, str) for key in self.sums)
        if self.experts and world()[1] > 1:
            for expert, matrix in self.experts.items():  # one may have had tokens in another process alone
                self.sums.setdefault(expert, Accumulator(matrix.in_features, self.device))
        order: list[str | tuple[str, int]] = [key for key in self.sums if isinstance(key, str)]
        order += [key for key in self.experts if key in self.sums]
        check_same(own, "inputs of the block's matrices; a matrix that tokens reach in some processes only?")
        for key in order:
            self.sums[key].add_up()
        return {key: self.sums[key] for key in order if self.sums[key].tokens}

    def inputs(self) -> list[Inputs]:
        """Everything seen, then what no token reached."""
        found = []
        for key, accumulator in self.totals().items():
            readers = self.leaders[key] if isinstance(key, str) else [self.experts[key]]
            found.append(Inputs(readers, accumulator.mean(), accumulator.tokens))
        reached = {matrix for inputs in found for matrix in inputs.matrices}
        unreached = [m for m in (*self.modules.values(), *self.experts.values()) if m not in reached]
        for m in unreached:
            nothing = torch.zeros(m.in_features, m.in_features, dtype=torch.float32, device=self.device)
            found.append(Inputs([m], nothing, 0))
        return shrink_experts(found)


def check_finite(name: str, hidden: Sequence[Tensor]) -> None:
    """Refuse hidden states, (batch, positions, hidden_size) each, with NaN or infinity in them.

    Raises:
        BitternError: naming the block that put them out, and the sample.
    """
    first = 0
    for state in hidden:
        if not math.isfinite(float(state.sum())) and not bool(torch.isfinite(state).all()):
            bad = int((~torch.isfinite(state.flatten(1)).all(1)).nonzero()[0])
            raise BitternError(f"{name}: NaN or infinite output for calibration sample {number_of(first + bad)}")
        first += state.shape[0]


def check_inputs(moments: Accumulator, x: Tensor, matrix: Matrix, first: int, samples: int | None = None) -> None:
    """Refuse the moments that a batch has made useless.

    Args:
        moments: with ``x`` added.
        x: the batch's inputs of ``matrix``, (samples, ..., in_features), or those of an expert, (rows, in_features).
        first: number of the batch's first calibration sample, among those of this process.
        samples: in the batch; by default as many as ``x`` has.

    Raises:
        BitternError: naming the matrix and, where it can be known, the sample.
    """
    if bool(torch.isfinite(moments.total.diagonal()).all()):
        return
    samples = len(x) if samples is None else samples
    where = f"samples {number_of(first)} to {number_of(first + samples - 1)}"
    if x.ndim > 2 and x.shape[0] == samples:
        bad = (~torch.isfinite(x.flatten(1)).all(1)).nonzero().flatten()
        # The sum of squares may overflow where no single activation does.
        where = f"sample {number_of(first + int(bad[0]))}" if len(bad) else where
    raise BitternError(f"{matrix.label}: NaN or infinite input activations in calibration {where}")


def fused_experts(model: nn.Module, matrices: Sequence[Matrix]) -> Callable[[Any, Any], Matrix | None]:
    """Tells which expert a call of a torch function multiplies with; None for every other call.

    An expert has no module of its own: an operand that shares storage with a fused parameter names its expert by
    its offset.
    """
    experts = {(m.parameter, m.expert): m for m in matrices if m.expert is not None}
    fused = {name: model.get_parameter(name) for name, _ in experts}
    storages = {p.untyped_storage().data_ptr(): (name, p[0].numel()) for name, p in fused.items()}

    def expert_of(func: Any, args: Any) -> Matrix | None:
        if not storages or len(args) < 2 or getattr(func, "__name__", "") not in ("linear", "matmul", "__matmul__"):
            return None
        weight = args[1]
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            return None
        name, size = storages.get(weight.untyped_storage().data_ptr(), ("", 1))
        return experts.get((name, weight.storage_offset() // size))

    return expert_of


def shrink_experts(found: list[Inputs]) -> list[Inputs]:
    """Lend an expert that saw few tokens the statistics of the experts beside it.

    The Hessian of an expert with n tokens becomes ``(n H + d H_all) / (n + d)``, d being its input
    width: with fewer tokens than dimensions its own is singular. ``prior`` records d / (n + d).
    """
    by_parameter: dict[str, list[Inputs]] = {}
    for inputs in found:
        if inputs.matrices[0].expert is not None:
            by_parameter.setdefault(inputs.matrices[0].parameter, []).append(inputs)
    for group in by_parameter.values():
        total = sum(inputs.tokens for inputs in group)
        if total == 0:
            continue
        pooled = torch.zeros_like(group[0].hessian)
        for inputs in group:
            pooled += inputs.hessian * (inputs.tokens / total)
        for inputs in group:
            inputs.prior = inputs.matrices[0].in_features / (inputs.tokens + inputs.matrices[0].in_features)
            inputs.hessian.lerp_(pooled, inputs.prior)
    return found
