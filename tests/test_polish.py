"""Polishing against ordinary least squares and a column-by-column reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bittern.quantize import polish as module
from bittern.quantize.columns import BLOCK_SIZE
from bittern.quantize.gptq import factorize, gptq
from bittern.quantize.polish import damp, descend, polish, refit_scales, slopes_of
from bittern.runtime import native
from bittern.weight import QuantSpec, QuantWeight

SPECS = [QuantSpec(bits, group_size, sym) for bits in (2, 3, 4, 8) for group_size in (8, -1) for sym in (True, False)]


def problem(spec: QuantSpec, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, QuantWeight]:
    """A weight, inputs whose second moment is the damped Hessian, that, and GPTQ's solution."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(500, 32, generator=generator) @ torch.randn(32, 32, generator=generator)
    weight, hessian = torch.randn(9, 32, generator=generator), x.T @ x / len(x)
    factor = factorize(hessian, 0.01)
    inputs = torch.cat([x / len(x) ** 0.5, factor.damping**0.5 * torch.eye(32)])
    return weight, inputs, hessian + factor.damping * torch.eye(32), gptq(weight, factor, spec).weight


def row_losses(weight: Tensor, hessian: Tensor, found: Tensor) -> Tensor:
    """The squared error that each row makes of its output, in fp64."""
    error = found.double() - weight.double()
    return ((error @ hessian.double()) * error).sum(1)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_refitted_scales_are_the_least_squares_ones(spec: QuantSpec) -> None:
    weight, inputs, hessian, solved = problem(spec)
    refitted, slopes = refit_scales(damp(hessian, 0.0), solved, slopes_of(weight, hessian, solved))
    assert torch.equal(refitted.codes, solved.codes) and refitted.scales.dtype == solved.scales.dtype
    groups = solved.scales.shape[1]
    steps = (solved.codes.view(9, groups, -1).double() - solved.zeros.unsqueeze(2)).flatten(1)
    found, best, before = (torch.empty(9, dtype=torch.float64) for _ in range(3))
    for row in range(9):
        # The oracle: least squares on the inputs themselves, by another algorithm.
        parts = [
            steps[row].view(groups, -1)[g] @ inputs.double().T.view(groups, -1, len(inputs))[g] for g in range(groups)
        ]
        columns, wanted = torch.stack(parts, 1), inputs.double() @ weight[row].double()
        scales = torch.linalg.lstsq(columns, wanted.unsqueeze(1)).solution.squeeze(1)
        for each, losses in ((scales, best), (refitted.scales[row], found), (solved.scales[row], before)):
            losses[row] = (columns @ each.double() - wanted).square().sum()
    assert bool((found <= before * (1 + 1e-5)).all())
    # fp16 keeps 11 bits of a scale; where the codes are fine, that is most of the loss.
    torch.testing.assert_close(found, best, rtol=0.3 if spec.bits == 8 else 0.01, atol=0)
    expected = slopes_of(weight.double(), hessian.double(), refitted)
    torch.testing.assert_close(slopes.double(), expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("rough", [False, True])
@pytest.mark.parametrize("group", [1, 6, 16, 40])
def test_products_of_groups(group: int, rough: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(group)
    groups, rows = 240 // group, 5
    steps = torch.randint(-8, 8, (rows, groups, group), generator=generator).float()
    moment = torch.randn(240, 240, generator=generator)
    moment = (moment @ moment.T).bfloat16().float()
    pulls = torch.einsum("rgk,gkc->grc", steps, moment.view(groups, group, 240)).contiguous()
    if rough:
        pulls = pulls.bfloat16()
    at = torch.arange(240).view(groups, group)
    expected = torch.empty(rows, groups, groups, dtype=torch.float64)
    for row in range(rows):
        for g in range(groups):
            for h in range(groups):
                expected[row, g, h] = pulls[min(g, h), row, at[max(g, h)]].double() @ steps[row, max(g, h)].double()
    for library in (True, False):
        if not library:
            monkeypatch.setattr(native, "available", lambda: False)
        found = module._products_of_groups(pulls, steps)
        assert torch.equal(found, found.mT)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_each_code_becomes_the_best_for_the_others(spec: QuantSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _, hessian, solved = problem(spec)
    groups = solved.scales.shape[1]
    scales = solved.scales.float().repeat_interleave(32 // groups, 1)
    zeros = solved.zeros.float().repeat_interleave(32 // groups, 1)
    codes = solved.codes.clone()
    for column in range(32):  # every code there is, tried out
        trials = []
        for code in range(spec.max_code + 1):
            tried = codes.clone()
            tried[:, column] = code
            trials.append(row_losses(weight, hessian, (tried - zeros) * scales))
        codes[:, column] = torch.stack(trials).argmin(0).to(torch.uint8)
    begun = slopes_of(weight, hessian, solved)
    for size in (None, BLOCK_SIZE, 5):  # by the kernel, and by products of blocks of columns
        if size is not None:
            monkeypatch.setattr(native, "available", lambda: False)
            monkeypatch.setattr(module, "BLOCK_SIZE", size)
        found, slopes = descend(damp(hessian, 0.0), solved, begun)
        assert (found != codes).float().mean() < 0.005  # a tie here and there
        expected = slopes_of(weight.double(), hessian.double(), replace(solved, codes=found))
        torch.testing.assert_close(slopes.double(), expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_polish_makes_no_row_worse(spec: QuantSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _, hessian, solved = problem(spec)
    polished, loss = polish(weight, damp(hessian, 0.0), solved)
    before = row_losses(weight, hessian, solved.dequantize())
    assert bool((loss <= before * (1 + 1e-4)).all())
    if spec.bits < 8:
        assert float(loss.sum()) < 0.98 * float(before.sum())
    torch.testing.assert_close(loss.double(), row_losses(weight, hessian, polished.dequantize()), rtol=1e-3, atol=0)
    monkeypatch.setattr(module, "REFIT_BYTES", {"cpu": 1})
    monkeypatch.setattr(module, "LEAST_ROWS", 2)
    again = polish(weight, damp(hessian, 0.0), solved)[0]
    assert float((again.codes == polished.codes).float().mean()) > 0.99
    torch.testing.assert_close(
        row_losses(weight, hessian, again.dequantize()).sum(), loss.double().sum(), rtol=0.01, atol=0
    )


def test_a_group_of_zeros_stays_zero() -> None:
    generator = torch.Generator().manual_seed(6)
    weight = torch.randn(4, 16, generator=generator)
    weight[:, 8:] = 0
    hessian = torch.eye(16)
    factor = factorize(hessian, 0.01)
    polished, _ = polish(weight, damp(hessian, factor.damping), gptq(weight, factor, QuantSpec(4, 8)).weight)
    assert bool(torch.isfinite(polished.scales.float()).all())
    assert torch.equal(polished.dequantize()[:, 8:], weight[:, 8:])
