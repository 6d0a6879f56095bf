"""The solver against brute force, against a short reference, and where it must be exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bittern.errors import BitternError
from bittern.quantize.columns import BLOCK_SIZE
from bittern.quantize.gptq import factorize, gptq
from bittern.quantize.grid import search_grid
from bittern.weight import QuantSpec, round_to_nearest

SPECS = [QuantSpec(bits, group_size, sym) for bits in (2, 3, 4, 8) for group_size in (16, -1) for sym in (True, False)]


def problem(
    rows: int = 12, columns: int = 64, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """A weight and the Hessian of correlated inputs of uneven size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=dtype)
    x = torch.randn(4 * columns, columns, generator=generator, dtype=dtype) * torch.logspace(
        0, -1, columns, dtype=dtype
    )
    x = x @ mixing / columns**0.5
    return torch.randn(rows, columns, generator=generator, dtype=dtype), x.T @ x / len(x)


def quadratic(error: Tensor, hessian: Tensor) -> Tensor:
    return ((error @ hessian) * error).sum(1)


def reference(weight: Tensor, hessian: Tensor, spec: QuantSpec, damp_percent: float) -> Tensor:
    """Classic GPTQ, column by column with the inverse Hessian's Cholesky factor, as in the paper's Algorithm 1."""
    damping = damp_percent * hessian.diagonal().mean()
    scales, zeros = search_grid(weight.float(), spec, (hessian.diagonal() + damping).float())
    order = hessian.diagonal().argsort(descending=True, stable=True)
    damped = hessian + damping * torch.eye(len(hessian), dtype=hessian.dtype)
    inverse = torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order]), upper=True)
    work, codes = weight[:, order].clone(), torch.empty(weight.shape, dtype=torch.uint8)
    for j, column in enumerate(order.tolist()):
        group = column // spec.columns_per_group(weight.shape[1])
        scale, zero = scales[:, group].to(work.dtype), zeros[:, group].to(work.dtype)
        code = (work[:, j] / scale).round().add(zero).clamp(0, spec.max_code)
        codes[:, column] = code.to(torch.uint8)
        error = (work[:, j] - (code - zero) * scale) / inverse[j, j]
        work[:, j:] -= error[:, None] * inverse[j, j:]
    return codes


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_equals_the_paper_column_by_column(spec: QuantSpec) -> None:
    weight, hessian = problem()
    found = gptq(weight, factorize(hessian, 0.01), spec).weight
    assert torch.equal(found.codes, reference(weight, hessian, spec, 0.01))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_codes_do_not_depend_on_the_block_size(spec: QuantSpec) -> None:
    weight, hessian = problem(columns=80)
    factor = factorize(hessian)
    codes = [gptq(weight, factor, spec, block_size).weight.codes for block_size in (1, 7, 64, 1000)]
    assert all(torch.equal(codes[0], other) for other in codes[1:])


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_diagonal_hessian_is_round_to_nearest(spec: QuantSpec) -> None:
    weight, hessian = problem()
    solution = gptq(weight, factorize(torch.diag(hessian.diagonal())), spec)
    grid = solution.weight
    columns = grid.group_index()
    scales, zeros = grid.scales.double()[:, columns], grid.zeros.double()[:, columns]
    nearest = (weight / scales).round().add(zeros).clamp(0, spec.max_code)
    assert torch.equal(grid.codes, nearest.to(torch.uint8))


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_beats_rounding_on_correlated_inputs(bits: int, sym: bool) -> None:
    weight, hessian = problem(rows=64, columns=128)
    spec = QuantSpec(bits, 32, sym)
    solved = gptq(weight, factorize(hessian), spec).weight.dequantize(torch.float64)
    nearest = round_to_nearest(weight, spec).dequantize(torch.float64)
    assert quadratic(solved - weight, hessian).sum() < 0.6 * quadratic(nearest - weight, hessian).sum()


def test_reported_loss_is_the_quadratic_form() -> None:
    weight, hessian = problem()
    factor = factorize(hessian, 0.01)
    solution = gptq(weight, factor, QuantSpec(3, 16))
    damped = hessian + factor.damping * torch.eye(len(hessian), dtype=hessian.dtype)
    error = solution.weight.dequantize(torch.float64) - weight
    torch.testing.assert_close(solution.loss, quadratic(error, damped))
    torch.testing.assert_close(solution.norm, quadratic(weight, damped))


def test_stacked_rows_are_solved_independently() -> None:
    weight, hessian = problem()
    other, _ = problem(seed=1)
    factor, spec = factorize(hessian), QuantSpec(4, 16)
    together = gptq(torch.cat([weight, other]), factor, spec).weight
    assert torch.equal(together.codes[:12], gptq(weight, factor, spec).weight.codes)
    assert torch.equal(together.codes[12:], gptq(other, factor, spec).weight.codes)


def test_factor_reproduces_the_damped_hessian() -> None:
    _, hessian = problem()
    factor = factorize(hessian, 0.02)
    ordered = hessian[factor.order][:, factor.order] + factor.damping * torch.eye(64, dtype=hessian.dtype)
    torch.testing.assert_close(factor.upper @ torch.diag(factor.pivots) @ factor.upper.T, ordered)
    assert torch.equal(factor.upper, factor.upper.triu()) and bool((factor.upper.diagonal() == 1).all())
    assert bool((hessian.diagonal()[factor.order].diff() <= 0).all())
    assert factor.fallback is None


def test_dead_column_is_rounded_and_disturbs_nobody() -> None:
    weight, hessian = problem()
    hessian[5], hessian[:, 5] = 0, 0
    spec = QuantSpec(8, 16)
    solution = gptq(weight, factorize(hessian), spec)
    found = solution.weight.dequantize(torch.float64)
    assert (found[:, 5] - weight[:, 5]).norm() < 0.05 * weight[:, 5].norm()
    # Its own error weighs only as much as the damping, and no other column takes it over.
    factor = factorize(hessian)
    place = int((factor.order == 5).nonzero())
    assert bool((factor.upper[place, place + 1 :] == 0).all()) and bool((factor.upper[:place, place] == 0).all())


def test_all_inputs_zero_is_round_to_nearest_on_the_grid() -> None:
    weight, hessian = problem()
    solution = gptq(weight, factorize(torch.zeros_like(hessian)), QuantSpec(4, 16))
    assert bool(torch.isfinite(solution.weight.scales).all())
    assert (solution.weight.dequantize(torch.float64) - weight).abs().max() < 0.5


def test_indefinite_hessian_is_floored_and_said() -> None:
    weight, hessian = problem(dtype=torch.float32)
    values, vectors = torch.linalg.eigh(hessian)
    values[:3] = -values.max()
    broken = vectors @ torch.diag(values) @ vectors.T
    factor = factorize((broken + broken.T) / 2)
    assert factor.fallback == "3 eigenvalues raised to the damping"
    assert bool(torch.isfinite(gptq(weight, factor, QuantSpec(4, 16)).loss).all())


def test_not_finite_hessian_is_refused() -> None:
    _, hessian = problem()
    hessian[3, 4] = torch.nan
    with pytest.raises(BitternError, match="NaN or infinite"):
        factorize(hessian)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_round_to_nearest_stays_within_half_a_step(spec: QuantSpec) -> None:
    weight, _ = problem(dtype=torch.float32)
    found = round_to_nearest(weight, spec)
    step = found.scales.float()[:, found.group_index()]
    # Symmetric grids spread 2^b - 1 steps over the range: the largest positive weight may lie half a step out.
    slack = 1.01 if spec.sym else 0.51
    assert bool(((found.dequantize() - weight).abs() <= slack * step).all())


def test_default_block_size_is_what_the_sweep_uses() -> None:
    weight, hessian = problem(columns=192)
    factor, spec = factorize(hessian), QuantSpec(4, 64)
    assert torch.equal(gptq(weight, factor, spec).weight.codes, gptq(weight, factor, spec, BLOCK_SIZE).weight.codes)
