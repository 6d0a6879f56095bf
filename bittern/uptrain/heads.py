"""The heads of an attention module, and what may be changed about them without changing the function.

Scores are products of rotated queries and keys, outputs are sums of values, so a model computes the same after

- a permutation of heads, with the query heads that read a key head going along;
- a rotation and a positive scale of each pair of dimensions that RoPE turns, of the keys, with the inverse scale and
  the same rotation of the queries: as a complex number, one pair of all positions is multiplied by a constant. Other
  2 x 2 matrices do not commute with RoPE;
- any invertible matrix on the values of a head, with its inverse on the output projection.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bittern import model as live
from bittern.errors import BitternError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PAIRINGS = ("half", "interleaved")
"""Which two dimensions RoPE turns together: i and i + rotary / 2, or 2 i and 2 i + 1."""

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_FUSED = "qkv_proj"
_OUTPUTS = ("o_proj", "dense", "out_proj")
_NORMS = re.compile(r"[qk]_(layer)?norm\.weight")
_NORM_MODULES = re.compile(r"[qk]_(layer)?norm|qk_norm")  # some have no weights


@dataclass(frozen=True)
class Counts:
    """How an attention divides its features.

    Attributes:
        query: num_attention_heads.
        key_value: num_key_value_heads, of which each serves query / key_value neighbouring query heads.
        dim: head_dim.
    """

    query: int
    key_value: int
    dim: int


@dataclass(frozen=True)
class Heads:
    """The projections of one attention, cut into heads, fp64.

    A projection with a bias has it as one more column: its input is then (x, 1).

    Attributes:
        query: (query heads, dim, in_features [+ 1]).
        key, value: (key-value heads, dim, in_features [+ 1]).
        output: (query heads, hidden_size, dim).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor

    @property
    def per_group(self) -> int:
        """Query heads that read one key head."""
        return len(self.query) // len(self.key)


def find_attention(block: nn.Module) -> str | None:
    """The name of the block's module that projects queries, keys and values; None in a block without."""
    for name, module in block.named_modules():
        children = dict(module.named_children())
        if set(_OUTPUTS) & children.keys() and (_FUSED in children or set(_PROJECTIONS) <= children.keys()):
            return str(name)
    return None


def attention_prefixes(model: PreTrainedModel) -> Iterator[str]:
    """What the names of a model's attention parameters begin with, block by block."""
    prefix, blocks = live.blocks(model)
    for index, block in enumerate(blocks):
        name = find_attention(block)
        if name is not None:
            yield f"{prefix}.{index}.{name}."


def check_attention(attention: nn.Module, counts: Counts, name: str) -> None:
    """Refuse an attention with parts that merging heads would not reach.

    Raises:
        BitternError: naming the parameter, or the projection whose shape is not that of ``counts``.
    """
    known = (*_PROJECTIONS, _FUSED, *_OUTPUTS)
    for parameter, tensor in attention.named_parameters():
        norm = _NORMS.fullmatch(parameter) is not None and tuple(tensor.shape) == (counts.dim,)
        if parameter.partition(".")[0] not in known and not norm:
            raise BitternError(
                f"{name}.{parameter}: expected queries, keys, values, an output and norms over head_dim"
                f" {counts.dim}; how this {tuple(tensor.shape)} would follow groups of heads is not known"
            )
    queries, keys = counts.query * counts.dim, counts.key_value * counts.dim
    rows = sum(module.out_features for module in _inputs(attention))
    if rows != queries + 2 * keys or output_projection(attention).in_features != queries:
        raise BitternError(
            f"{name}: expected {queries + 2 * keys} rows of q, k and v, for config.json says {counts.query} query and"
            f" {counts.key_value} key-value heads of {counts.dim}; found {rows}"
        )


def normed(attention: nn.Module) -> bool:
    """Whether queries and keys are normalized after projection, so that no rotation of keys is free."""
    return any(_NORM_MODULES.fullmatch(name) for name, _ in attention.named_children())


def key_projection(attention: nn.Module) -> nn.Module:
    """The module whose input is what queries, keys and values are made of."""
    return _inputs(attention)[-1]


def output_projection(attention: nn.Module) -> nn.Linear:
    """The module that the heads' outputs, (..., query heads * dim), go through."""
    children = dict(attention.named_children())
    return next(children[name] for name in _OUTPUTS if name in children)  # type: ignore[return-value]


def read_heads(attention: nn.Module, counts: Counts) -> Heads:
    """A copy of the projections."""
    stacked = [_with_bias(module) for module in _inputs(attention)]
    if len(stacked) == 1:
        rows = counts.query * counts.dim, counts.key_value * counts.dim, counts.key_value * counts.dim
        stacked = list(torch.split(stacked[0], list(rows)))
    query, key, value = (rows.reshape(-1, counts.dim, rows.shape[1]) for rows in stacked)
    output = output_projection(attention).weight.detach().double()
    return Heads(query, key, value, output.reshape(len(output), -1, counts.dim).transpose(0, 1).contiguous())


def write_heads(attention: nn.Module, heads: Heads) -> None:
    """Put projections into an attention of their shape."""
    stacked = [heads.query.flatten(0, 1), heads.key.flatten(0, 1), heads.value.flatten(0, 1)]
    modules = _inputs(attention)
    if len(modules) == 1:
        stacked = [torch.cat(stacked)]
    with torch.no_grad():
        for module, rows in zip(modules, stacked, strict=True):
            module.weight.copy_(rows[:, : module.in_features])
            if module.bias is not None:
                module.bias.copy_(rows[:, -1])
        output_projection(attention).weight.copy_(heads.output.transpose(0, 1).flatten(1))


def permute(heads: Heads, order: Sequence[int]) -> Heads:
    """Key-value heads in another order, with their query heads."""
    queries = [head * heads.per_group + member for head in order for member in range(heads.per_group)]
    kept = list(order)
    return Heads(heads.query[queries], heads.key[kept], heads.value[kept], heads.output[queries])


def turn_keys(heads: Heads, factors: Tensor, pairing: str) -> Heads:
    """Multiply pairs of keys by complex numbers, and those of the queries by what keeps every score.

    Args:
        factors: complex (key-value heads, rotary / 2), none of them zero.
        pairing: one of :data:`PAIRINGS`.
    """
    rotary = 2 * factors.shape[1]
    keys = to_pairs(heads.key[:, :rotary], pairing) * factors[..., None]
    inverse = (1 / factors.conj()).repeat_interleave(heads.per_group, 0)
    queries = to_pairs(heads.query[:, :rotary], pairing) * inverse[..., None]
    return replace(
        heads,
        key=torch.cat([from_pairs(keys, pairing), heads.key[:, rotary:]], 1),
        query=torch.cat([from_pairs(queries, pairing), heads.query[:, rotary:]], 1),
    )


def turn_values(heads: Heads, matrices: Tensor) -> Heads:
    """Multiply values by invertible matrices, (key-value heads, dim, dim), and the output by their inverses."""
    inverse = torch.linalg.inv(matrices).repeat_interleave(heads.per_group, 0)
    return replace(heads, value=matrices @ heads.value, output=heads.output @ inverse)


def to_pairs(rows: Tensor, pairing: str) -> Tensor:
    """Real rows (..., rotary, features) as complex ones, (..., rotary / 2, features)."""
    if pairing == "half":
        real, imaginary = rows.chunk(2, -2)
    else:
        real, imaginary = rows[..., 0::2, :], rows[..., 1::2, :]
    return torch.complex(real.contiguous(), imaginary.contiguous())


def from_pairs(rows: Tensor, pairing: str) -> Tensor:
    """The inverse of :func:`to_pairs`."""
    place = -3 if pairing == "half" else -2
    return torch.stack([rows.real, rows.imag], place).flatten(-3, -2)


_EXACT, _FAR, _APART = 1e-3, 0.05, 0.05  # of what an output moves by: as it was; at most, and beside the other pairing


def find_pairings(
    attention: nn.Module, counts: Counts, kwargs: dict[str, Any], hidden: Tensor, rotary: int
) -> list[str]:
    """How RoPE pairs dimensions here, by trying: keys are turned each way, and the right one changes no output.

    Args:
        attention: in memory, with full precision.
        counts: its heads.
        kwargs: what else its block calls it with.
        hidden: fp32 (batch, positions, hidden_size), some input of it.
        rotary: leading dimensions of a head that RoPE turns.

    Returns:
        Those of :data:`PAIRINGS` that leave the output as it was: both where nothing is turned.
    """
    heads = read_heads(attention, counts)
    generator = torch.Generator().manual_seed(0)
    angles = 6.28 * torch.rand(counts.key_value, rotary // 2, dtype=torch.float64, generator=generator)
    factors = torch.polar(torch.ones_like(angles), angles).to(heads.key.device)
    expected = _run(attention, hidden, kwargs)
    errors = {}
    try:
        for pairing in PAIRINGS:
            write_heads(attention, turn_keys(heads, factors, pairing))
            moved = (_run(attention, hidden, kwargs) - expected).norm()
            errors[pairing] = float(moved / expected.norm().clamp_min(1e-30))
    finally:
        write_heads(attention, heads)
    # Large biases make large scores, whose rounding moves the output: then the other pairing moves it far more.
    allowed = max(_EXACT, min(_FAR, _APART * max(errors.values())))
    return [pairing for pairing, error in errors.items() if error <= allowed]


@torch.no_grad()
def _run(attention: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
    output = attention(hidden, **kwargs)
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result


def _inputs(attention: nn.Module) -> list[nn.Linear]:
    children = dict(attention.named_children())
    names = (_FUSED,) if _FUSED in children else _PROJECTIONS
    return [children[name] for name in names]  # type: ignore[misc]


def _with_bias(module: nn.Linear) -> Tensor:
    weight = module.weight.detach().double()
    if module.bias is None:
        return weight
    return torch.cat([weight, module.bias.detach().double()[:, None]], 1)
