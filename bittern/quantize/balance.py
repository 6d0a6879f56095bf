"""Even out the channels of a layer's input before it is quantized, in a way that costs nothing at run time.

A factor s per channel is multiplied into the columns of the matrices that read a tensor and divided out of what
makes that tensor: the norm before q, k, v and before gate and up; the rows of up before down; those of v before
the output projection. The block computes what it did, but a group's scale is no longer set by columns that hardly
matter (Lin et al. 2023, AWQ). With h the channels' mean squares and v those of their columns,

    s = (h / v) ^ (gamma / 4)

makes the noise of a group equal over its channels at gamma = 1. Gamma is chosen by the expected noise itself,
``sum_j h_j / s_j^2 max_k (w_k s_k)^2`` over the columns k of the group of j.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bittern import model as live
from bittern.model import Matrix
from bittern.processes import add_up
from bittern.quantize.stages import Stage, narrowed
from bittern.replay import BlockCall
from bittern.weight import QuantSpec

GAMMAS = (0.25, 0.5, 0.75, 1.0)
WORTH = 0.98
"""A stage is left as it is where no gamma brings the expected noise below this share of what it was."""

_TOLERANCE = 1e-3  # of what a block adds to its input
_MAKERS = {"down_proj": "up_proj", "o_proj": "v_proj"}  # whose rows make a matrix's input, up to a gate or an average


@dataclass(frozen=True)
class Balanced:
    """What was changed in a block.

    Attributes:
        changed: parameters that are no matrices of a stage, by their live names.
        matrices: those that were, with what is left of the expected noise of those whose columns were.
        rows: what the rows of those were divided by that make another's input, (out_features,).
    """

    changed: dict[str, Tensor] = field(default_factory=dict)
    matrices: dict[Matrix, float | None] = field(default_factory=dict)
    rows: dict[Matrix, Tensor] = field(default_factory=dict)


class Balancer:
    """Balances the blocks of a model.

    Args:
        model: the blocks' parameters are changed while they are in memory.
        dtype: norms are stored in it: what cannot be written exactly is not divided out.
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
    ) -> Balanced:
        """Balance one block, and the full-precision inputs that its stages hold.

        Args:
            block: in memory.
            stages: of :func:`bittern.quantize.stages.exact_stages`.
            specs: grids of its matrices.
            before: a batch of hidden states in front of the block, fp32.
            call: how that batch calls it.

        Returns:
            What was changed: nothing of a block that does not compute the same afterwards, whose channels are
            something else than they seem to be.
        """
        original = {name: parameter.detach().clone() for name, parameter in block.named_parameters()}
        factors: list[Tensor | None] = []
        found = Balanced()
        with torch.no_grad():
            after = call.run(block, before)
            for stage in stages:
                maker = _maker(stage, stages) if stage.norm is None else None
                factor, made, left = self._balance_stage(stage, maker, specs)
                factors.append(factor)
                found.changed.update(made)
                if factor is not None:
                    found.matrices.update(dict.fromkeys(stage.matrices, left))
                    if maker is not None:
                        found.matrices.setdefault(maker)
                        found.rows[maker] = factor.view(self._heads(stage, maker))[:, 0].flatten()
            squares = torch.stack([(call.run(block, before) - after).norm(), (after - before).norm()]).square_()
            add_up(squares)
            error, size = squares.sqrt().tolist()
            if not error < _TOLERANCE * max(size, 1e-30):
                for name, parameter in block.named_parameters():
                    parameter.copy_(original[name])
                return Balanced()
            for stage, factor in zip(stages, factors, strict=True):
                if factor is not None:
                    for number, x in enumerate(stage.exact):
                        stage.exact[number] = narrowed(x / factor)
        return found

    def _balance_stage(
        self, stage: Stage, maker: Matrix | None, specs: dict[Matrix, QuantSpec]
    ) -> tuple[Tensor | None, dict[str, Tensor], float]:
        """The factor of each input channel of a stage, the parameters that were changed beside the matrices, and the
        share that is left of the expected noise.
        """
        weights = [live.get_weight(self.model, matrix) for matrix in stage.matrices]
        squares = (x.flatten(0, -2).float().square().sum(0) for x in stage.exact)
        power = sum(squares, torch.zeros((), device=weights[0].device))
        add_up(power)
        columns = specs[stage.matrices[0]].columns_per_group(weights[0].shape[1])
        if stage.norm is not None:
            factor, left = choose_factor(power, torch.cat(weights), columns)
            found = None if factor is None else self._into_norm(stage.norm, factor)
        elif maker is None:
            return None, {}, 1.0
        else:
            shape = self._heads(stage, maker)
            shared = power.view(shape).mean(1, keepdim=True).expand(-1, shape[1], -1).flatten()
            factor, left = choose_factor(shared, torch.cat(weights), columns, shape)
            found = None if factor is None else self._into_rows(maker, factor, shape)
        if found is None:
            return None, {}, 1.0
        factor, changed = found
        for weight in weights:
            weight.mul_(factor)
        return factor, changed, left

    def _into_norm(self, norm: str, factor: Tensor) -> tuple[Tensor, dict[str, Tensor]] | None:
        module = self.model.get_submodule(norm)
        weight = module.get_parameter("weight")
        divided = (weight / factor).to(self.dtype).float()
        # What is stored decides the factor, so that rounding it changes nothing.
        factor = torch.where((divided == 0) | ~torch.isfinite(divided), 1.0, weight / divided)
        changed = {f"{norm}.{name}": (p / factor).to(self.dtype).float() for name, p in module.named_parameters()}
        if not all(bool(torch.isfinite(values).all()) for values in (factor, *changed.values())):
            return None
        for name, parameter in module.named_parameters():
            parameter.copy_(changed[f"{norm}.{name}"])
        return factor, changed

    def _into_rows(
        self, maker: Matrix, factor: Tensor, shape: tuple[int, int, int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        rows = factor.view(shape)[:, 0].flatten()
        live.get_weight(self.model, maker).div_(rows.unsqueeze(1))
        bias = self.model.get_submodule(maker.module)._parameters.get("bias")
        if bias is None:
            return factor, {}
        bias.copy_((bias / rows).to(self.dtype).float())
        return factor, {f"{maker.module}.bias": bias.detach().clone()}

    def _heads(self, stage: Stage, maker: Matrix) -> tuple[int, int, int]:
        """A stage's channels as (heads, repeats, width): heads that share a value head share its channels too."""
        features = stage.matrices[0].in_features
        repeats = features // maker.out_features
        return -1, repeats, features if repeats == 1 else self._head_dim(maker)

    def _head_dim(self, maker: Matrix) -> int:
        config: Any = self.model.config
        text = config.get_text_config(decoder=True)
        return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def choose_factor(
    power: Tensor, weight: Tensor, columns: int, shared: tuple[int, int, int] | None = None
) -> tuple[Tensor | None, float]:
    """The factor of each channel, None where it is not worth it; and what is left of the expected noise, a share.

    Args:
        power: fp32 (in_features,), squares of the channels, summed.
        weight: fp32 (out_features, in_features), all that reads them.
        columns: in a group.
        shared: (heads, repeats, width) of channels that the repeats have in common.
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
        noise = _noise(power, weight, factor, columns)
        if noise < least:
            least, best = noise, factor
    return best, 1.0 if best is None else least / before


def _noise(power: Tensor, weight: Tensor, factor: Tensor, columns: int) -> float:
    largest = (weight * factor).abs().view(len(weight), -1, columns).amax(2).square().mean(0)
    return float((largest * (power / factor.square()).view(-1, columns).sum(1)).sum())


def _maker(stage: Stage, stages: Sequence[Stage]) -> Matrix | None:
    """The matrix whose rows make a stage's input."""
    reader = stage.matrices[0]
    parent, _, leaf = reader.module.rpartition(".")
    wanted = f"{parent}.{_MAKERS.get(leaf)}"
    for matrix in _all(stages):
        if matrix.module == wanted and len(stage.matrices) == 1 and reader.in_features % matrix.out_features == 0:
            return matrix
    return None


def _all(stages: Sequence[Stage]) -> Iterator[Matrix]:
    for stage in stages:
        yield from stage.matrices
