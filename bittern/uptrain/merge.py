"""Fewer key-value heads, in closed form.

Heads that are to share keys need only agree on the subspace that those live in: the query of each is free to read it as
it likes, and so is the output projection of shared values. So heads are not averaged. Of the rows ``B_h`` of the heads
in a group, with an importance ``S_h`` and the second moment ``C`` of the inputs, the shared rows ``B`` and the maps
``T_h`` minimize

    sum_h | S_h (B_h - T_h B) C^(1/2) |^2

which is a truncated singular value decomposition of the stacked ``S_h B_h C^(1/2)`` (Eckart and Young). Three uses:

- values: ``S_h' S_h = O_h' O_h`` with the head's output projection, so what is minimized is the change of the outputs
  for one position; the map goes into ``O_h``. Procrustes alignment with averaging is a special case of it.
- keys under RoPE: one pair of dimensions at a time, as one complex row, since only multiplication by a complex number
  commutes with RoPE. ``|S_h|^2`` is the mean square of the queries that read it; the map goes, conjugated, into these.
- keys that RoPE leaves alone: as values, with the queries in the place of ``O_h``.

Mean pooling and the first head (Ainslie et al. 2023, "GQA: Training Generalized Multi-Query Transformer Models from
Multi-Head Checkpoints") are here to compare with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations, product
from math import comb, factorial

import torch
from torch import Tensor

from bittern.uptrain.heads import Heads, from_pairs, permute, to_pairs

Groups = tuple[tuple[int, ...], ...]
"""Which old key-value heads each new one replaces."""

_MOST_PARTITIONS = 20_000
_MOST_GROUPS = 1_000  # each has eigenvalues of its own


def neighbours(heads: int, size: int) -> Groups:
    """Groups of heads that stand together, as the paper makes them."""
    return tuple(tuple(range(start, start + size)) for start in range(0, heads, size))


def pool(heads: Heads, groups: Groups, how: str) -> Heads:
    """The paper's conversions: keys and values of a group averaged ("mean"), or those of its first head ("first")."""
    ordered = permute(heads, [head for group in groups for head in group])
    size = len(groups[0])
    key, value = (_grouped(rows, size) for rows in (ordered.key, ordered.value))
    if how == "first":
        return replace(ordered, key=key[:, 0], value=value[:, 0])
    return replace(ordered, key=key.mean(1), value=value.mean(1))


def merge(heads: Heads, groups: Groups, moment: Tensor, rotary: int, pairing: str, keys_fixed: bool = False) -> Heads:
    """Keys and values shared within groups, with the smallest change that a closed form can find.

    Args:
        heads: of the source.
        groups: of equal size, each old head once.
        moment: fp64 (in_features + 1, in_features + 1), mean of (x, 1) (x, 1)' over the attention's inputs.
        rotary: leading dimensions of a head that RoPE turns.
        pairing: see :func:`bittern.uptrain.heads.to_pairs`.
        keys_fixed: keys are normalized after projection, so that they may only be averaged.

    Returns:
        Heads of the new count, query heads in the order of the groups.
    """
    ordered = permute(heads, [head for group in groups for head in group])
    size, repeat = len(groups[0]), heads.per_group
    rows, maps, _ = shared_rows(_grouped(ordered.value, size), _grouped(_output_importance(ordered), size), moment)
    output = ordered.output @ maps.flatten(0, 1).repeat_interleave(repeat, 0)
    merged = Heads(ordered.query, rows, rows, output)  # its keys follow
    if keys_fixed:
        return replace(merged, key=_grouped(ordered.key, size).mean(1))
    turned, queries = _merge_turned(ordered, size, moment, rotary, pairing)
    if rotary == ordered.key.shape[1]:
        return replace(merged, key=turned, query=queries)
    free, free_queries = ordered.key[:, rotary:], ordered.query[:, rotary:]
    importance = _query_importance(ordered, rotary, moment)
    rows, maps, _ = shared_rows(_grouped(free, size), _grouped(importance, size), moment)
    free_queries = maps.flatten(0, 1).mT.repeat_interleave(repeat, 0) @ free_queries
    return replace(merged, key=torch.cat([turned, rows], 1), query=torch.cat([queries, free_queries], 1))


def _merge_turned(heads: Heads, size: int, moment: Tensor, rotary: int, pairing: str) -> tuple[Tensor, Tensor]:
    """The part of keys and queries that RoPE turns, a pair at a time."""
    keys = to_pairs(heads.key[:, :rotary], pairing)
    queries = to_pairs(heads.query[:, :rotary], pairing)
    pairs = _grouped(keys, size).transpose(1, 2)[..., None, :]  # (groups, pairs, size, 1, features)
    energy = _grouped(_pair_energy(heads, queries, moment), size).transpose(1, 2)
    rows, maps, _ = shared_rows(pairs, energy.sqrt()[..., None, None].to(pairs.dtype), moment)
    factors = maps.squeeze((-1, -2)).transpose(1, 2).flatten(0, 1).conj()  # (key-value heads, pairs)
    queries = queries * factors.repeat_interleave(heads.per_group, 0)[..., None]
    return from_pairs(rows.squeeze(-2), pairing), from_pairs(queries, pairing)


def shared_rows(rows: Tensor, importance: Tensor, moment: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows that stand for those of several heads; see the module's text.

    Args:
        rows: ``B_h``, (..., heads, height, features), real or complex.
        importance: ``S_h``, (..., heads, height, height), of the same dtype.
        moment: second moment of the inputs, at least (features, features).

    Returns:
        The shared rows (..., height, features); the maps (..., heads, height, height), ``B_h`` is about map @ shared;
        and the share of the weighted energy that is lost, (...).
    """
    height = rows.shape[-2]
    within = moment[: rows.shape[-1], : rows.shape[-1]].to(rows.dtype)
    weighted = (importance @ rows).flatten(-3, -2)
    gram = weighted @ within @ weighted.mH
    energies, vectors = torch.linalg.eigh(gram)
    kept = energies[..., -height:].clamp_min(1e-12 * energies[..., -1:].clamp_min(1e-300))
    basis = (vectors[..., -height:] / kept.sqrt().unsqueeze(-2).to(rows.dtype)).mH @ weighted  # of unit energy
    maps = rows @ (within @ basis.mH).unsqueeze(-3)
    # A turn that makes the maps as much alike the identity as one for all of them can be, and a scale as of old.
    left, _, right = torch.linalg.svd(maps.mean(-3))
    turn = left @ right
    scale = maps.abs().square().mean((-1, -2, -3)).mul(height).sqrt().clamp_min(1e-30)[..., None, None]
    shared = scale * (turn @ basis)
    lost = 1 - energies[..., -height:].sum(-1) / energies.sum(-1).clamp_min(1e-300)
    return shared, maps @ turn.mH.unsqueeze(-3) / scale.unsqueeze(-3), lost


def similar(heads: Heads, size: int, moment: Tensor, rotary: int, pairing: str, keys_fixed: bool = False) -> Groups:
    """Groups of heads that lose least by sharing: every partition is tried while there are few, else good ones.

    A group costs the energy that its shared keys and values lose, as shares of all heads' energies, keys and values
    counting alike.

    Args:
        heads: of the source.
        size: heads in a group.
        moment, rotary, pairing, keys_fixed: see :func:`merge`.
    """
    count = len(heads.key)
    if size in (1, count):
        return neighbours(count, size)
    grams = [_gram(heads.value, _output_importance(heads), moment)[None]]
    products = heads.key.new_zeros(())
    if keys_fixed:
        within = moment[: heads.key.shape[-1], : heads.key.shape[-1]]
        products = (heads.key @ within).flatten(1) @ heads.key.flatten(1).mT
    else:
        keys = to_pairs(heads.key[:, :rotary], pairing)
        energy = _pair_energy(heads, to_pairs(heads.query[:, :rotary], pairing), moment)
        grams.append(_gram(keys[:, :, None].transpose(0, 1), energy.T.sqrt()[..., None, None].to(keys.dtype), moment))
        if rotary < heads.key.shape[1]:
            importance = _query_importance(heads, rotary, moment)
            grams.append(_gram(heads.key[:, rotary:], importance, moment)[None])
    costs: dict[tuple[int, ...], float] = {}

    def cost(group: tuple[int, ...]) -> float:
        if group not in costs:
            averaged = _lost_by_mean(products, group) if keys_fixed else 0.0
            costs[group] = averaged + sum(_lost(gram, group, count) for gram in grams)
        return costs[group]

    partitions = factorial(count) // (factorial(size) ** (count // size) * factorial(count // size))
    if partitions <= _MOST_PARTITIONS and comb(count, size) <= _MOST_GROUPS:
        return min(_partitions(tuple(range(count)), size), key=lambda groups: sum(map(cost, groups)))
    return _by_pairs(count, size, lambda one, other: cost((min(one, other), max(one, other))))


def _output_importance(heads: Heads) -> Tensor:
    """A square root of what the outputs of each value head's readers make of it, (key-value heads, dim, dim)."""
    return _root(_per_group(heads.output.mT @ heads.output, heads).sum(1))


def _query_importance(heads: Heads, rotary: int, moment: Tensor) -> Tensor:
    """The same of the queries that read the dimensions that RoPE leaves alone."""
    queries = heads.query[:, rotary:]
    within = moment[: queries.shape[-1], : queries.shape[-1]]
    return _root(_per_group(queries @ within @ queries.mT, heads).sum(1))


def _pair_energy(heads: Heads, queries: Tensor, moment: Tensor) -> Tensor:
    """Mean squares of the queries that read each pair of a key head, (key-value heads, pairs)."""
    within = moment[: queries.shape[-1], : queries.shape[-1]].to(queries.dtype)
    energy = ((queries @ within) * queries.conj()).sum(-1).real
    return _per_group(energy, heads).sum(1).clamp_min(1e-30)


def _per_group(values: Tensor, heads: Heads) -> Tensor:
    """Of every query head, as (key-value heads, query heads of each, ...)."""
    return _grouped(values, heads.per_group)


def _grouped(rows: Tensor, size: int) -> Tensor:
    """(heads, ...) as (groups, size, ...)."""
    return rows.reshape(len(rows) // size, size, *rows.shape[1:])


def _root(squares: Tensor) -> Tensor:
    """R with R' R as given, symmetric and positive semidefinite."""
    energies, vectors = torch.linalg.eigh(squares)
    floor = 1e-12 * energies[..., -1:].clamp_min(1e-300)
    root: Tensor = energies.maximum(floor).sqrt()[..., None] * vectors.mT
    return root


def _gram(rows: Tensor, importance: Tensor, moment: Tensor) -> Tensor:
    """Weighted products of all heads' rows, (..., heads * height, heads * height)."""
    weighted = (importance @ rows).flatten(-3, -2)
    return weighted @ moment[: rows.shape[-1], : rows.shape[-1]].to(rows.dtype) @ weighted.mH


def _lost(gram: Tensor, group: Sequence[int], count: int) -> float:
    """What a group loses of the energy in ``gram``, (..., heads * height, heads * height)."""
    height = gram.shape[-1] // count
    index = torch.cat([torch.arange(head * height, (head + 1) * height) for head in group]).to(gram.device)
    inside = gram[..., index[:, None], index]
    lost = torch.linalg.eigvalsh(inside)[..., :-height].sum()
    total = gram.diagonal(dim1=-2, dim2=-1).real.sum().clamp_min(1e-300)
    return float(lost / total)


def _lost_by_mean(products: Tensor, group: Sequence[int]) -> float:
    """What a group loses of all heads' energy where each is replaced by their mean; their products (heads, heads)."""
    inside = products[list(group)][:, list(group)]
    return float((inside.trace() - inside.mean() * len(group)) / products.trace().clamp_min(1e-300))


def _partitions(heads: tuple[int, ...], size: int) -> Iterator[Groups]:
    """Every way to divide heads into groups of one size."""
    if not heads:
        yield ()
        return
    first, others = heads[0], heads[1:]
    for partners in combinations(others, size - 1):
        rest = tuple(head for head in others if head not in partners)
        for groups in _partitions(rest, size):
            yield ((first, *partners), *groups)


def _by_pairs(count: int, size: int, cost: Callable[[int, int], float]) -> Groups:
    """Groups that are cheap by the sum over their pairs: grown one by one, then heads exchanged while that helps."""
    free = list(range(count))
    found: list[list[int]] = []
    while free:
        group = [free.pop(0)]
        while len(group) < size:
            best = min(free, key=lambda head: sum(cost(head, member) for member in group))
            free.remove(best)
            group.append(best)
        found.append(group)

    def joining(head: int, group: Sequence[int], leaving: int) -> float:
        return sum(cost(head, member) - cost(leaving, member) for member in group if member != leaving)

    better = True
    while better:
        better = False
        for first, second in combinations(found, 2):
            for i, j in product(range(size), repeat=2):
                one, other = first[i], second[j]
                if joining(other, first, one) + joining(one, second, other) < -1e-12:
                    first[i], second[j] = other, one
                    better = True
    return tuple(sorted(tuple(sorted(group)) for group in found))
