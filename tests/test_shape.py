"""Shaping against a weight-by-weight reference, and what it makes of the expected divergence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bittern.quantize import shape as module
from bittern.quantize.gptq import Factor, factorize, gptq
from bittern.quantize.polish import descend, polish
from bittern.quantize.shape import Shaper, _Problem, damped
from bittern.weight import QuantSpec, QuantWeight

SPECS = [QuantSpec(bits, group_size, sym) for bits in (2, 3, 4, 8) for group_size in (8, -1) for sym in (True, False)]


def moments(features: int, generator: torch.Generator) -> Tensor:
    x = torch.randn(500, features, generator=generator) @ torch.randn(features, features, generator=generator)
    return x.T @ x / len(x)


def problem(spec: QuantSpec, rows: int = 12) -> tuple[Tensor, Tensor, Factor, Tensor, QuantWeight]:
    """A weight, the Hessian, its factor, the curvature, and the polished solution of GPTQ."""
    generator = torch.Generator().manual_seed(3)
    weight, hessian = torch.randn(rows, 24, generator=generator), moments(24, generator)
    factor = factorize(hessian, 0.01)
    solved, _ = polish(weight, hessian, factor.damping, gptq(weight, factor, spec).weight)
    return weight, hessian, factor, moments(rows, generator), solved


def divergence(weight: Tensor, hessian: Tensor, damping: float, curvature: Tensor, found: QuantWeight) -> float:
    """tr(G E H E'), in fp64."""
    error = found.dequantize().double() - weight.double()
    inputs = hessian.double() + damping * torch.eye(len(hessian), dtype=torch.float64)
    return float(torch.trace(damped(curvature).double() @ error @ inputs @ error.T))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_sweep_takes_over_all_errors_before(spec: QuantSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian, factor, curvature, solved = problem(spec)
    monkeypatch.setattr(module, "PARTS", 12)  # a row each
    made = damped(curvature)
    across = factorize(made, 1e-6)
    # The oracle: one weight after the other, with factors out of another algorithm, in fp64.
    inputs = hessian.double() + factor.damping * torch.eye(24, dtype=torch.float64)
    u, v = (
        unit_upper(each[order][:, order]) for each, order in ((inputs, factor.order), (made.double(), across.order))
    )
    original = weight.double()[across.order][:, factor.order]
    scales, zeros = (
        each.double()[:, solved.group_index()][across.order][:, factor.order] for each in (solved.scales, solved.zeros)
    )
    error, codes = torch.zeros_like(original), torch.zeros_like(original)
    for column in range(24):
        for row in range(12):
            passed = v[: row + 1, row] @ error[: row + 1, : column + 1] @ u[: column + 1, column]
            step = ((original[row, column] - passed) / scales[row, column]).round()
            code = (step + zeros[row, column]).clamp(0, spec.max_code)
            codes[row, column] = code
            error[row, column] = (code - zeros[row, column]) * scales[row, column] - original[row, column]
    for size in (module.BLOCK_SIZE, 5):
        monkeypatch.setattr(module, "BLOCK_SIZE", size)
        found = _Problem(weight, Shaper(hessian, factor)._hessian, factor, made).sweep(solved)
        assert torch.equal(found.scales, solved.scales) and found.codes.dtype == torch.uint8
        assert (found.codes[across.order][:, factor.order] != codes).float().mean() < 0.01  # a tie here and there


def unit_upper(matrix: Tensor) -> Tensor:
    """U of ``matrix = U D U'``, by elimination from the last row on."""
    left, upper = matrix.clone(), torch.eye(len(matrix), dtype=matrix.dtype)
    for last in reversed(range(len(matrix))):
        upper[:last, last] = left[:last, last] / left[last, last]
        left[:last, :last] -= torch.outer(upper[:last, last], left[:last, last])
    return upper


@pytest.mark.parametrize("parts", [1, 5, 12])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_outputs_that_do_not_go_together_are_solved_row_by_row(
    spec: QuantSpec, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, hessian, factor, curvature, solved = problem(spec)
    monkeypatch.setattr(module, "PARTS", parts)
    shaper = Shaper(hessian, factor)
    own = _Problem(weight, shaper._hessian, factor, damped(torch.diag(curvature.diagonal())))
    grid = solved.scales.float(), solved.zeros
    swept = gptq(weight, factor, spec, grid=grid).weight
    assert (own.sweep(solved).codes != swept.codes).float().mean() < 0.01
    assert (own.descend(swept).codes != descend(weight, shaper._hessian, swept)[0]).float().mean() < 0.01


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_each_code_becomes_the_best_for_all_others(spec: QuantSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian, factor, curvature, solved = problem(spec)
    monkeypatch.setattr(module, "PARTS", 12)
    own = _Problem(weight, Shaper(hessian, factor)._hessian, factor, damped(curvature))
    codes = solved.codes.clone()
    scales, zeros = (each.double()[:, solved.group_index()] for each in (solved.scales, solved.zeros))
    inputs, outputs = own.hessian.double(), own.curvature.double()
    for column in range(24):
        for row in own.rows.tolist():  # every code there is, tried out
            tried = codes.double().repeat(spec.max_code + 1, 1, 1)
            tried[:, row, column] = torch.arange(spec.max_code + 1)
            error = (tried - zeros) * scales - weight.double()
            codes[row, column] = int(((outputs @ error) * (error @ inputs)).sum((1, 2)).argmin())
    assert (own.descend(solved).codes != codes).float().mean() < 0.01


@pytest.mark.parametrize("rows", [1, 12, 40])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_divergence_falls_as_is_said(spec: QuantSpec, rows: int) -> None:
    weight, hessian, factor, curvature, solved = problem(spec, rows)
    shaped, share, losses = Shaper(hessian, factor).shape(weight, 1e-9 * curvature, solved)
    before, after = (divergence(weight, hessian, factor.damping, 1e-9 * curvature, each) for each in (solved, shaped))
    assert share == pytest.approx(after / before, rel=1e-3)
    assert share <= 1 and (rows < 40 or share < 0.95)
    assert shaped.scales.dtype == solved.scales.dtype and torch.equal(shaped.zeros, solved.zeros)
    error = shaped.dequantize().double() - weight.double()
    wanted = ((error @ (hessian.double() + factor.damping * torch.eye(24, dtype=torch.float64))) * error).sum(1)
    torch.testing.assert_close(losses.double(), wanted, rtol=1e-3, atol=0)


def test_refitted_scales_are_no_worse_and_nearly_the_best() -> None:
    """Against least squares of all scales at once."""
    spec = QuantSpec(3, 8)
    weight, hessian, factor, curvature, solved = problem(spec)
    own = _Problem(weight, Shaper(hessian, factor)._hessian, factor, damped(curvature))
    swept = own.sweep(solved)
    found = swept
    for _ in range(20):
        found = own.refit(found)
    # Roots of both factors turn it into ordinary least squares, one unknown for each row and group.
    left = torch.linalg.cholesky(own.curvature.double()).T
    right = torch.linalg.cholesky(own.hessian.double())
    steps = swept.codes.double() - swept.zeros.double()[:, swept.group_index()]
    columns = []
    for row in range(12):
        for group in range(3):
            part = torch.zeros_like(steps)
            part[row, 8 * group : 8 * group + 8] = steps[row, 8 * group : 8 * group + 8]
            columns.append((left @ part @ right).flatten())
    wanted = (left @ weight.double() @ right).flatten()
    system = torch.stack(columns, 1)
    best = torch.linalg.lstsq(system, wanted.unsqueeze(1)).solution.squeeze(1)
    least = float((system @ best - wanted).square().sum())
    first, one, many = (own.loss(each) for each in (swept, own.refit(swept), found))
    assert least <= many <= one < first
    assert many - least < 0.2 * (first - least)


def test_outputs_without_curvature_are_left_as_they_are() -> None:
    weight, hessian, factor, curvature, solved = problem(QuantSpec(4, 8))
    shaped, share, _ = Shaper(hessian, factor).shape(weight, torch.zeros_like(curvature), solved)
    assert 0 < share <= 1 and bool(torch.isfinite(shaped.scales.float()).all())
    curvature[3], curvature[:, 3] = 0, 0
    shaped, share, losses = Shaper(hessian, factor).shape(weight, curvature, solved)
    assert share < 1 and bool(torch.isfinite(losses).all())
