"""The grid search against exhaustive search and in the corners of fp16."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from bittern.errors import BitternError
from bittern.quantize.grid import search_grid
from bittern.weight import QuantSpec, min_max_grid, round_scale


def weighted_error(weight: Tensor, importance: Tensor, spec: QuantSpec, scales: Tensor, zeros: Tensor) -> Tensor:
    """Per group, for rounding to nearest on the grid."""
    groups = torch.arange(weight.shape[1]) // spec.columns_per_group(weight.shape[1])
    scale, zero = scales.double()[:, groups], zeros.double()[:, groups]
    codes = (weight.double() / scale).round().add(zero).clamp(0, spec.max_code)
    error = ((codes - zero) * scale - weight.double()).square() * importance.double()
    return error.view(weight.shape[0], scales.shape[1], -1).sum(2)


def sample(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(24, 64, generator=generator) ** 3
    return weight, torch.rand(64, generator=generator) ** 4 + 1e-3


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_is_near_the_best_of_a_dense_search(bits: int, sym: bool) -> None:
    weight, importance = sample()
    spec = QuantSpec(bits, 32, sym)
    found = weighted_error(weight, importance, spec, *search_grid(weight, spec, importance))
    start, zeros = min_max_grid(weight, spec)
    best = torch.full_like(found, torch.inf)
    signs = (1, -1) if sym else (1,)
    choices = [zeros] if sym or bits > 3 else [torch.full_like(zeros, zero) for zero in range(spec.max_code + 1)]
    for ratio, sign, zero in itertools.product(torch.linspace(0.2, 1.2, 301).tolist(), signs, choices):
        scales = round_scale(start * ratio * sign)
        best = torch.minimum(best, weighted_error(weight, importance, spec, scales, zero))
    # Among 256 levels the error is noise around a flat minimum, and 4-bit zeros are only searched near min-max.
    assert found.sum() <= (1.05 if bits < 4 or (bits == 4 and sym) else 1.2) * best.sum()


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_beats_min_max_in_every_group(bits: int, sym: bool) -> None:
    weight, importance = sample(1)
    spec = QuantSpec(bits, 16, sym)
    found = weighted_error(weight, importance, spec, *search_grid(weight, spec, importance))
    plain = weighted_error(weight, importance, spec, *min_max_grid(weight, spec))
    assert bool((found <= plain * (1 + 1e-5)).all()) and found.sum() < 0.8 * plain.sum()


def test_zeros_fit_the_spec() -> None:
    weight, importance = sample()
    for bits, sym in itertools.product((2, 3, 4, 8), (True, False)):
        spec = QuantSpec(bits, 16, sym)
        _, zeros = search_grid(weight + 3, spec, importance)
        assert zeros.dtype == torch.uint8 and int(zeros.max()) <= spec.max_code
        if sym:
            assert bool((zeros == spec.mid_code).all())


@pytest.mark.parametrize("value", [0.0, 1e-7, 0.25, -300.0])
def test_constant_group_is_kept(value: float) -> None:
    weight = torch.full((2, 32), value)
    for bits, sym in itertools.product((2, 3, 4, 8), (True, False)):
        spec = QuantSpec(bits, 16, sym)
        scales, zeros = search_grid(weight, spec, torch.ones(32))
        found = weighted_error(weight, torch.ones(32), spec, scales, zeros)
        assert bool((found <= 16 * (1e-3 * abs(value) + 2e-8) ** 2).all())


def test_barely_active_inputs_still_give_a_grid() -> None:
    weight, _ = sample()
    importance = torch.full((64,), 1e-2)
    importance[:16] = 1.0
    scales, _ = search_grid(weight, QuantSpec(4, 16), importance)
    assert bool((weight.view(24, 4, 16).abs().amax(2) < 9 * scales.abs()).all())


def test_scales_are_what_fp16_holds() -> None:
    weight, importance = sample()
    scales, _ = search_grid(weight * 1e-4, QuantSpec(8, 16), importance)
    assert torch.equal(scales, scales.half().float()) and bool((scales != 0).all())


def test_a_scale_beyond_fp16_is_refused() -> None:
    with pytest.raises(BitternError, match="65504"):
        min_max_grid(torch.full((1, 16), 1e7), QuantSpec(4, 16))
