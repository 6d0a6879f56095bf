"""Shared heads in closed form, against what they must do on cases that are known."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from bittern.uptrain import merge
from bittern.uptrain.heads import Heads, permute, turn_keys, turn_values

H, D, F = 6, 8, 20


def random_heads(kv: int = H, seed: int = 0) -> Heads:
    generator = torch.Generator().manual_seed(seed)

    def rows(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    return Heads(rows(H, D, F), rows(kv, D, F), rows(kv, D, F), rows(H, F, D))


def moment() -> Tensor:
    root = torch.randn(F + 1, F + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return root @ root.T


def scores(heads: Heads, rotary: int) -> Tensor:
    """What attention makes of a pair of inputs at a distance that turns pairs: a form for each head, (heads, F, F)."""
    angles = torch.arange(1, rotary // 2 + 1, dtype=torch.float64)
    factors = torch.polar(torch.ones_like(angles), angles).expand(len(heads.query), -1)
    keys = heads.key.repeat_interleave(heads.per_group, 0)
    # Only the queries are turned here: the rotation of a relative distance.
    turned = turn_keys(Heads(keys, heads.query, heads.value, heads.output), factors, "half").key
    found: Tensor = torch.einsum("hdf,hdg->hfg", turned, keys)
    return found


def outputs(heads: Heads) -> Tensor:
    return heads.output @ heads.value.repeat_interleave(heads.per_group, 0)


def disguised_copies(rotary: int) -> tuple[Heads, merge.Groups]:
    """Six heads in three groups whose keys and values are the same but for what is free to choose."""
    base = random_heads(3)
    group_of = [0, 1, 2, 2, 0, 1]
    heads = Heads(random_heads().query, base.key[group_of], base.value[group_of], random_heads().output)
    generator = torch.Generator().manual_seed(2)
    angles = 6 * torch.rand(H, rotary // 2, dtype=torch.float64, generator=generator)
    heads = turn_keys(heads, torch.polar(0.5 + torch.rand(angles.shape, generator=generator).double(), angles), "half")
    return turn_values(heads, torch.randn(H, D, D, dtype=torch.float64, generator=generator)), ((0, 4), (1, 5), (2, 3))


@pytest.mark.parametrize("rotary", [D, D // 2, 0])
def test_heads_that_only_look_different_are_found_and_merged_without_loss(rotary: int) -> None:
    heads, planted = disguised_copies(rotary)
    assert merge.similar(heads, 2, moment(), rotary, "half") == planted
    merged = merge.merge(heads, planted, moment(), rotary, "half")
    assert merged.key.shape == (3, D, F) and merged.value.shape == (3, D, F)
    ordered = permute(heads, [head for group in planted for head in group])
    torch.testing.assert_close(outputs(merged), outputs(ordered), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(scores(merged, rotary), scores(ordered, rotary), rtol=1e-8, atol=1e-8)


def test_pooling_the_same_heads_does_lose() -> None:
    heads, planted = disguised_copies(D)
    ordered = permute(heads, [head for group in planted for head in group])
    assert float((outputs(merge.pool(heads, planted, "mean")) - outputs(ordered)).norm()) > 1


def test_equal_heads_stay_as_they_are() -> None:
    heads = random_heads(1)
    copies = Heads(heads.query, heads.key.expand(H, -1, -1), heads.value.expand(H, -1, -1), heads.output)
    merged = merge.merge(copies, (tuple(range(H)),), moment(), D, "half")
    torch.testing.assert_close(outputs(merged), outputs(copies), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(scores(merged, D), scores(copies, D), rtol=1e-9, atol=1e-9)


def test_no_other_rows_lose_less() -> None:
    """The error is the energy that was said to be lost, and a search from there finds nothing better."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(3, 4, F, dtype=torch.float64, generator=generator)
    importance = torch.randn(3, 4, 4, dtype=torch.float64, generator=generator)
    within = moment()[:F, :F]
    root = torch.linalg.cholesky(within)

    def error(shared: Tensor, maps: Tensor) -> Tensor:
        found: Tensor = (importance @ (rows - maps @ shared) @ root).square().sum()
        return found

    shared, maps, lost = merge.shared_rows(rows, importance, moment())
    least = error(shared, maps)
    assert float(least / (importance @ rows @ root).square().sum()) == pytest.approx(float(lost), rel=1e-9)
    shared, maps = shared.clone().requires_grad_(), maps.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([shared, maps], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        found = error(shared, maps)
        found.backward()  # type: ignore[no-untyped-call]
        return float(found.detach())

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    assert float(error(shared, maps).detach()) >= float(least) * (1 - 1e-9)


def test_pooling_is_the_paper_s() -> None:
    heads = random_heads()
    groups = merge.neighbours(H, 3)
    assert groups == ((0, 1, 2), (3, 4, 5))
    mean = merge.pool(heads, groups, "mean")
    torch.testing.assert_close(mean.key[1], heads.key[3:].mean(0))
    torch.testing.assert_close(mean.value[0], heads.value[:3].mean(0))
    assert torch.equal(merge.pool(heads, groups, "first").key, heads.key[[0, 3]])
    assert torch.equal(mean.query, heads.query) and torch.equal(mean.output, heads.output)


def test_query_heads_follow_their_keys() -> None:
    heads = random_heads(3)  # two query heads each
    pooled = merge.pool(heads, ((2, 0, 1),), "first")
    assert torch.equal(pooled.query, heads.query[[4, 5, 0, 1, 2, 3]]) and torch.equal(pooled.key[0], heads.key[2])


def test_many_heads_are_grouped_without_trying_every_partition(monkeypatch: pytest.MonkeyPatch) -> None:
    heads, planted = disguised_copies(D)
    monkeypatch.setattr(merge, "_MOST_PARTITIONS", 1)
    assert merge.similar(heads, 2, moment(), D, "half") == planted


def test_keys_that_are_normalized_afterwards_are_averaged() -> None:
    heads = random_heads()
    groups = merge.neighbours(H, 2)
    merged = merge.merge(heads, groups, moment(), D, "half", keys_fixed=True)
    torch.testing.assert_close(merged.key[0], heads.key[:2].mean(0))
    assert torch.equal(merged.query, heads.query)


def test_keys_that_may_only_be_averaged_are_grouped_by_what_their_mean_loses() -> None:
    base = random_heads(2)
    # As pairs that may be turned, a head and its opposite are the same; their mean is nothing.
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0]).double()[:, None, None]
    heads = Heads(random_heads().query, signs * base.key[0], base.value[[0] * H], random_heads().output)
    assert merge.similar(heads, 3, moment(), D, "half", keys_fixed=True) == ((0, 2, 4), (1, 3, 5))


def test_sixteen_heads_in_two_groups_are_not_tried_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = merge._lost

    def counted(gram: Tensor, group: Sequence[int], count: int) -> float:
        calls.append(count)
        return real(gram, group, count)

    monkeypatch.setattr(merge, "_lost", counted)
    heads = random_heads(16)
    heads = Heads(heads.key.flip(0), heads.key, heads.value, torch.cat([heads.output] * 3)[:16])
    groups = merge.similar(heads, 8, moment(), D, "half")
    assert sorted(head for group in groups for head in group) == list(range(16))
    assert len(calls) <= 2 * 120  # pairs, of values and of keys
