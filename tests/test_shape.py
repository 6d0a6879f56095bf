"""Shaping against a weight-by-weight reference, and what it makes of the expected divergence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bittern.quantize import shape as module
from bittern.quantize.gptq import Factor, factorize, gptq
from bittern.quantize.polish import damp, improve, polish, slopes_of
from bittern.quantize.shape import Shaper, damped
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
    solved, _ = polish(weight, damp(hessian, factor.damping), gptq(weight, factor, spec).weight)
    return weight, hessian, factor, moments(rows, generator), solved


def inputs_of(hessian: Tensor, factor: Factor) -> Tensor:
    return hessian.double() + factor.damping * torch.eye(len(hessian), dtype=torch.float64)


def divergence(weight: Tensor, inputs: Tensor, outputs: Tensor, found: QuantWeight) -> float:
    """tr(G E H E'), in fp64."""
    error = found.dequantize().double() - weight.double()
    return float(torch.trace(outputs.double() @ error @ inputs @ error.T))


def unit_upper(matrix: Tensor) -> Tensor:
    """U of ``matrix = U D U'``, by elimination from the last row on."""
    left, upper = matrix.clone(), torch.eye(len(matrix), dtype=matrix.dtype)
    for last in reversed(range(len(matrix))):
        upper[:last, last] = left[:last, last] / left[last, last]
        left[:last, :last] -= torch.outer(upper[:last, last], left[:last, last])
    return upper


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_sweep_takes_over_all_errors_before(spec: QuantSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian, factor, curvature, solved = problem(spec)
    monkeypatch.setattr(module, "SWEPT", 12)  # a row each
    outputs = damped(curvature)
    # The oracle: one weight after the other, column by column, with factors out of another algorithm, in fp64.
    u, v = unit_upper(inputs_of(hessian, factor)[factor.order][:, factor.order]), unit_upper(outputs.double())
    original = weight.double()[:, factor.order]
    scales, zeros = (each.double()[:, solved.group_index()][:, factor.order] for each in (solved.scales, solved.zeros))
    error, codes = torch.zeros_like(original), torch.zeros_like(original)
    for column in range(24):
        for row in range(12):
            passed = v[: row + 1, row] @ error[: row + 1, : column + 1] @ u[: column + 1, column]
            step = ((original[row, column] - passed) / scales[row, column]).round()
            codes[row, column] = (step + zeros[row, column]).clamp(0, spec.max_code)
            step = codes[row, column] - zeros[row, column]
            error[row, column] = step * scales[row, column] - original[row, column]
    upper = factorize(outputs, 1e-6, act_order=False).upper
    found = Shaper(damp(hessian, factor.damping), factor)._sweep(weight, upper, solved)
    assert torch.equal(found.scales, solved.scales) and found.codes.dtype == torch.uint8
    assert (found.codes[:, factor.order] != codes).float().mean() < 0.01  # a tie here and there


@pytest.mark.parametrize("parts", [1, 5, 12])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_outputs_that_do_not_go_together_are_solved_row_by_row(
    spec: QuantSpec, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, hessian, factor, curvature, solved = problem(spec)
    monkeypatch.setattr(module, "SWEPT", parts)
    shaper, outputs = Shaper(damp(hessian, factor.damping), factor), damped(torch.diag(curvature.diagonal()))
    swept = shaper._sweep(weight, torch.eye(12), solved)
    plain = gptq(weight, factor, spec, grid=(solved.scales.float(), solved.zeros)).weight
    assert (swept.codes != plain.codes).float().mean() < 0.01
    inputs = inputs_of(hessian, factor).float()
    slopes = slopes_of(weight, inputs, plain)
    polished, _, left = shaper._polish(outputs, plain, slopes, module._parts(12, parts))
    assert left == module._parts(12, parts)  # rows that do nothing to each other are worse in no part
    wanted, _ = improve(damp(inputs, 0.0), plain, slopes)
    same = (polished.codes == wanted.codes).all(1)  # scales that round the other way take codes with them
    assert int(same.sum()) >= 9
    torch.testing.assert_close(polished.scales[same], wanted.scales[same], rtol=2e-3, atol=0)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_row_that_is_polished_makes_all_rows_better(spec: QuantSpec) -> None:
    """The target that a row gets is the right one: what is best for it lessens the divergence of all, row by row."""
    weight, hessian, factor, curvature, solved = problem(spec)
    shaper, outputs = Shaper(damp(hessian, factor.damping), factor), damped(curvature)
    inputs = inputs_of(hessian, factor)
    before, slopes = divergence(weight, inputs, outputs, solved), slopes_of(weight, inputs.float(), solved)
    for row in range(12):
        solved, slopes, _ = shaper._polish(outputs, solved, slopes, [slice(row, row + 1)])  # the others stay
        after = divergence(weight, inputs, outputs, solved)
        assert after <= before * (1 + 1e-5)
        before = after
    expected = slopes_of(weight.double(), inputs, solved)
    torch.testing.assert_close(slopes.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_rows_that_spoil_each_other_are_parted_for_good(spec: QuantSpec) -> None:
    weight, hessian, factor, _, solved = problem(spec)
    shaper, outputs = Shaper(damp(hessian, factor.damping), factor), torch.full((12, 12), 0.99).fill_diagonal_(1.0)
    inputs = inputs_of(hessian, factor)
    before, slopes = divergence(weight, inputs, outputs, solved), slopes_of(weight, inputs.float(), solved)
    found, slopes, parts = shaper._polish(outputs, solved, slopes, [slice(0, 12)])
    assert len(parts) > 1 and [row for part in parts for row in range(12)[part]] == list(range(12))
    after = divergence(weight, inputs, outputs, found)
    assert after < before
    again, _, finer = shaper._polish(outputs, found, slopes, parts)
    assert {part.start for part in parts} <= {part.start for part in finer}
    assert divergence(weight, inputs, outputs, again) <= after * (1 + 1e-5)


@pytest.mark.parametrize("rows", [1, 12, 40])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_divergence_falls_as_is_said(spec: QuantSpec, rows: int) -> None:
    weight, hessian, factor, curvature, solved = problem(spec, rows)
    shaped, share, losses = Shaper(damp(hessian, factor.damping), factor).shape(weight, 1e-9 * curvature, solved)
    inputs, outputs = inputs_of(hessian, factor), damped(curvature)
    before, after = (divergence(weight, inputs, outputs, each) for each in (solved, shaped))
    assert share == pytest.approx(after / before, rel=1e-3)
    assert share <= 1 and (rows < 40 or share < 0.95)
    assert shaped.scales.dtype == solved.scales.dtype and torch.equal(shaped.zeros, solved.zeros)
    error = shaped.dequantize().double() - weight.double()
    torch.testing.assert_close(losses.double(), ((error @ inputs) * error).sum(1), rtol=1e-3, atol=0)


def test_outputs_without_curvature_may_be_anything() -> None:
    weight, hessian, factor, curvature, solved = problem(QuantSpec(4, 8))
    shaped, share, _ = Shaper(damp(hessian, factor.damping), factor).shape(weight, torch.zeros_like(curvature), solved)
    assert 0 < share <= 1 and bool(torch.isfinite(shaped.scales.float()).all())
    curvature[3], curvature[:, 3] = 0, 0
    shaped, share, losses = Shaper(damp(hessian, factor.damping), factor).shape(weight, curvature, solved)
    assert share < 1 and bool(torch.isfinite(losses).all())
