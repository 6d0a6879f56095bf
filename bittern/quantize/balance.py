"""Even out the channels of a layer's input before it is quantized, in a way that costs nothing at run time.

A factor s per channel is multiplied into the columns of the matrices that read a tensor and divided out of what
makes that tensor: the norm before q, k, v and before gate and up; the rows of up before down; those of v before
the output projection. The block computes what it did, but a group's scale is no longer set by columns that hardly
matter (Lin et al. 2023, AWQ). With h the channels' mean squares and v those of their columns,

    s = (h / v) ^ (gamma / 4)

makes the noise of a group equal over its channels at gamma = 1. Gamma is chosen by the expected noise itself,
``sum_j h_j / s_j^2 max_k (w_k s_k)^2`` over the columns k of the group of j.

Matrices that read the same norm and stay floats take the factors along. Those are powers of two then, so that
floats of any width are what they were but for their exponents (fp16's smallest ones, below 2^-14, lose a digit).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bittern import model as live
from bittern.model import Matrix
from bittern.processes import add_up
from bittern.quantize import heap
from bittern.quantize.stages import Stage, narrowed, reading, removed
from bittern.replay import BlockCall
from bittern.weight import QuantSpec

GAMMAS = (0.25, 0.5, 0.75, 1.0)
WORTH = 0.98
"""Inputs are left as they are where no gamma brings the expected noise below this share of what it was."""

_TOLERANCE = 1e-3  # of what a block adds to its input
_MAKERS = {
    "down_proj": ("up_proj", "gate_up_proj"),
    "w2": ("w3",),
    "o_proj": ("v_proj", "qkv_proj"),
    "out_proj": ("v_proj",),
    "dense": ("v_proj",),
}
"""Whose rows make a matrix's input, up to a gate or an average: all of them, or the last ones of what is fused."""


@dataclass(frozen=True)
class Balanced:
    """What was changed in a block.

    Attributes:
        changed: parameters that are not quantized, by their live names.
        matrices: those that are, with what is left of the expected noise of those whose columns were.
        rows: what the rows of those were divided by that make another's input, (out_features,).
    """

    changed: dict[str, Tensor] = field(default_factory=dict)
    matrices: dict[Matrix, float | None] = field(default_factory=dict)
    rows: dict[Matrix, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Shared:
    """What reads one tensor, and what makes it.

    Attributes:
        stages: whose matrices read it: one, or those of a block whose attention and multilayer perceptron share a norm.
        norm: that puts it out.
        maker: whose last rows do.
        kept: matrices that read it and are not quantized.
        added: what the norm adds to its weight.
    """

    stages: list[Stage]
    norm: str | None
    maker: Matrix | None
    kept: tuple[Matrix, ...] = ()
    added: float = 0.0


@dataclass(frozen=True)
class _Done:
    """A tensor's channels, evened out: by what, what else was changed for it, and what is left of the noise."""

    shared: _Shared
    factor: Tensor
    changed: dict[str, Tensor]
    rows: Tensor | None
    left: float


class Balancer:
    """Balances the blocks of a model.

    Args:
        model: the blocks' parameters are changed while they are in memory.
        dtype: what is not quantized is stored in it: what cannot be written exactly is not divided out of norms.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype

    def balance(
        self,
        block: nn.Module,
        stages: Sequence[Stage],
        specs: dict[Matrix, QuantSpec],
        before: Tensor,
        call: BlockCall,
        kept: Sequence[Matrix] = (),
    ) -> Balanced:
        """Balance one block, and the full-precision inputs that its stages hold.

        Args:
            block: in memory.
            stages: of :func:`bittern.quantize.stages.exact_stages`.
            specs: grids of its matrices.
            before: a batch of hidden states in front of the block, fp32.
            call: how that batch calls it.
            kept: the block's matrices that are not quantized.

        Returns:
            What was changed: nothing for an input without which the block does not compute the same afterwards, whose
            channels are something else than they seem to be.
        """
        with torch.no_grad():
            found, after = self._look(block, stages, before, call, kept)
            size = (after - before).norm()

            def even_out(some: Sequence[_Shared]) -> list[_Done]:
                original = {name: parameter.detach().clone() for name, parameter in block.named_parameters()}
                done = [each for each in (self._even_out(shared, specs) for shared in some) if each is not None]
                if not done:
                    return []
                squares = torch.stack([(call.run(block, before) - after).norm(), size]).square_()
                add_up(squares)
                error, moved = squares.sqrt().tolist()
                if error < _TOLERANCE * max(moved, 1e-30):
                    return done
                for name, parameter in block.named_parameters():
                    parameter.copy_(original[name])
                del original
                return [each for one in done for each in even_out([one.shared])] if len(done) > 1 else []

            return _applied(even_out(found))

    def _look(
        self, block: nn.Module, stages: Sequence[Stage], before: Tensor, call: BlockCall, kept: Sequence[Matrix]
    ) -> tuple[list[_Shared], Tensor]:
        """What can be evened out in a block, in the order in which it comes there; and its output."""
        norms = list(dict.fromkeys(stage.norm for stage in stages if stage.norm is not None))
        readers: dict[str, list[Matrix]] = {name: [] for name in norms}
        with norms_seen(self.model, norms) as seen:

            def note(matrix: Matrix, x: Tensor) -> None:
                for name in (name for name, (output, _) in seen.items() if output is x):
                    readers[name].append(matrix)

            with reading(self.model, kept, note):
                after = call.run(block, before)
        found = [
            _Shared([stage for stage in stages if stage.norm == name], name, None, tuple(readers[name]), seen[name][1])
            for name in norms
        ]
        makers = [(stage, _maker(stage, stages)) for stage in stages if stage.norm is None]
        return found + [_Shared([stage], None, maker) for stage, maker in makers if maker is not None], after

    def _even_out(self, shared: _Shared, specs: dict[Matrix, QuantSpec]) -> _Done | None:
        """Even out one tensor's channels; None where it is not worth it or cannot be written."""
        matrices = list(_all(shared.stages))
        weights = [live.get_weight(self.model, matrix) for matrix in matrices]
        squares = (part.float().square().sum(0) for x in shared.stages[0].exact for part in heap.pieces(x))
        power = sum(squares, torch.zeros((), dtype=torch.float32, device=weights[0].device))
        add_up(power)
        columns = specs[matrices[0]].columns_per_group(weights[0].shape[1])
        rows: Tensor | None = None
        if shared.norm is not None:
            factor, left = choose_factor(power, torch.cat(weights), columns, powers_of_two=bool(shared.kept))
            found = None if factor is None else self._into_norm(shared, factor)
            if found is None:
                return None
            factor, changed = found
        else:
            assert shared.maker is not None
            shape = self._heads(matrices[0], shared.maker)
            power = power.view(shape).mean(1, keepdim=True).expand(-1, shape[1], -1).flatten()
            factor, left = choose_factor(power, torch.cat(weights), columns, shape)
            if factor is None:
                return None
            rows, changed = self._into_rows(shared.maker, factor.view(shape)[:, 0].flatten())
        for weight in weights:
            weight.mul_(factor)
        return _Done(shared, factor, changed, rows, left)

    def _into_norm(self, shared: _Shared, factor: Tensor) -> tuple[Tensor, dict[str, Tensor]] | None:
        """Divide a norm, and multiply what stays floats: the factor that it came to, and what was changed."""
        if shared.kept and shared.added:
            return None  # what is left of a power of two, once one was taken off and it was rounded, is none
        assert shared.norm is not None
        module = self.model.get_submodule(shared.norm)
        weight = module.get_parameter("weight")
        divided = ((weight + shared.added) / factor - shared.added).to(self.dtype).float()
        # What is stored decides the factor, so that rounding it changes nothing.
        usable = torch.isfinite(divided) & (divided + shared.added != 0)
        factor = torch.where(usable, (weight + shared.added) / (divided + shared.added), 1.0)
        changed = {
            f"{shared.norm}.{name}": (p / factor).to(self.dtype).float() for name, p in module.named_parameters()
        }
        changed[f"{shared.norm}.weight"] = torch.where(usable, divided, weight)
        for matrix in shared.kept:
            parameter = self.model.get_parameter(matrix.parameter)
            scaled = parameter * (factor.unsqueeze(1) if matrix.transposed else factor)
            changed[matrix.parameter] = scaled.to(self.dtype).float()
        if not all(bool(torch.isfinite(values).all()) for values in (factor, *changed.values())):
            return None
        for name, values in changed.items():
            self.model.get_parameter(name).copy_(values)
        return factor, changed

    def _into_rows(self, maker: Matrix, factor: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Divide the last rows of a matrix: what each row of it was divided by, and what else was changed."""
        weight = live.get_weight(self.model, maker)
        rows = torch.cat([factor.new_ones(len(weight) - len(factor)), factor])
        weight.div_(rows.unsqueeze(1))
        bias = self.model.get_submodule(maker.module)._parameters.get("bias")
        if bias is None:
            return rows, {}
        bias.copy_((bias / rows).to(self.dtype).float())
        return rows, {f"{maker.module}.bias": bias.detach().clone()}

    def _heads(self, reader: Matrix, maker: Matrix) -> tuple[int, int, int]:
        """A matrix' input channels as (heads, repeats, width): heads that share a value head share its channels too."""
        repeats = reader.in_features // _made(reader, maker)
        return -1, repeats, reader.in_features if repeats == 1 else self._head_dim(maker)

    def _head_dim(self, maker: Matrix) -> int:
        config: Any = self.model.config
        text = config.get_text_config(decoder=True)
        return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def _applied(done: Sequence[_Done]) -> Balanced:
    """What was done, told of the whole block; the inputs of its stages follow."""
    found = Balanced()
    for each in done:
        found.changed.update(each.changed)
        found.matrices.update(dict.fromkeys(_all(each.shared.stages), each.left))
        if each.shared.maker is not None and each.rows is not None:
            found.matrices.setdefault(each.shared.maker)
            found.rows[each.shared.maker] = each.rows
        for stage in each.shared.stages:
            for number, x in enumerate(stage.exact):
                stage.exact[number] = narrowed(x, each.factor)
    return found


@contextmanager
def norms_seen(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, tuple[Tensor, float]]]:
    """Norms by their names, with what they put out within and what they add to their weight: Gemma's one, most nothing.

    The latter is found by calling them once more with weights of zeros and of ones, which are put back.
    """
    found: dict[str, tuple[Tensor, float]] = {}

    def of(name: str) -> Callable[..., None]:
        def note(norm: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            found[name] = output, _added_to_weight(norm, args, kwargs)

        return note

    with removed([model.get_submodule(n).register_forward_hook(of(n), with_kwargs=True) for n in names]):
        yield found


def _added_to_weight(norm: nn.Module, args: Any, kwargs: Any) -> float:
    original = {name: parameter.clone() for name, parameter in norm.named_parameters()}
    outputs = []
    for value in (0.0, 1.0):
        for name, parameter in norm.named_parameters():
            parameter.fill_(value if name == "weight" else 0.0)
        outputs.append(norm.forward(*args, **kwargs))
    for name, parameter in norm.named_parameters():
        parameter.copy_(original[name])
    without, with_one = outputs
    return float((without.norm() / (with_one - without).norm().clamp_min(1e-30)).round())


def choose_factor(
    power: Tensor,
    weight: Tensor,
    columns: int,
    shared: tuple[int, int, int] | None = None,
    powers_of_two: bool = False,
) -> tuple[Tensor | None, float]:
    """The factor of each channel, None where it is not worth it; and what is left of the expected noise, a share.

    Args:
        power: fp32 (in_features,), squares of the channels, summed.
        weight: fp32 (out_features, in_features), all that reads them.
        columns: in a group.
        shared: (heads, repeats, width) of channels that the repeats have in common.
        powers_of_two: and nothing between.
    """
    power = power.clamp_min(1e-6 * float(power.mean()) or 1.0)
    size = weight.square().mean(0)
    if shared is not None:
        size = size.view(shared).mean(1, keepdim=True).expand(-1, shared[1], -1).flatten()
    ratio = power / size.clamp_min(1e-6 * float(size.mean()) or 1.0)
    before = _noise(power, weight, torch.ones_like(power), columns)
    least, best = WORTH * before, None
    for gamma in GAMMAS:
        factor = ratio.pow(gamma / 4)
        factor /= factor.log().mean().exp()
        if powers_of_two:
            factor = factor.log2().round().exp2()
        noise = _noise(power, weight, factor, columns)
        if noise < least:
            least, best = noise, factor
    return best, 1.0 if best is None else least / before


def _noise(power: Tensor, weight: Tensor, factor: Tensor, columns: int) -> float:
    inputs = (power / factor.square()).view(-1, columns).sum(1)
    largest = ((part * factor).abs_().view(len(part), -1, columns).amax(2) for part in heap.pieces(weight))
    return sum(float((each.square_().sum(0) * inputs).sum()) for each in largest) / len(weight)


def _maker(stage: Stage, stages: Sequence[Stage]) -> Matrix | None:
    """The matrix whose rows make a stage's input."""
    reader = stage.matrices[0]
    parent, _, leaf = reader.module.rpartition(".")
    wanted = {f"{parent}.{name}" for name in _MAKERS.get(leaf, ())}
    for matrix in _all(stages):
        made = _made(reader, matrix)
        if matrix.module in wanted and len(stage.matrices) == 1 and made > 0 and reader.in_features % made == 0:
            return matrix
    return None


def _made(reader: Matrix, maker: Matrix) -> int:
    """How many rows of a matrix make another's input: of gate and up in one the second half, of q, k and v the last."""
    leaf = maker.module.rpartition(".")[2]
    if leaf == "gate_up_proj":
        return maker.out_features // 2
    return (maker.out_features - reader.in_features) // 2 if leaf == "qkv_proj" else maker.out_features


def _all(stages: Sequence[Stage]) -> Iterator[Matrix]:
    for stage in stages:
        yield from stage.matrices
