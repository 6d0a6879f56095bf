"""Packed layers against the dequantized weight that their QuantWeight defines."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bittern.runtime.linear import PackedExperts, QuantLinear
from bittern.runtime.packed import _STEP, PackedMatrix
from bittern.weight import BITS, QuantSpec, QuantWeight


def random_weight(
    bits: int, out_features: int, in_features: int, group_size: int, *, act_order: bool = False
) -> QuantWeight:
    generator = torch.Generator().manual_seed(bits + in_features)
    spec = QuantSpec(bits, group_size, sym=False)
    shape = (out_features, spec.groups(in_features))
    g_idx = None
    if act_order:
        columns = torch.arange(in_features) // spec.columns_per_group(in_features)
        g_idx = columns[torch.randperm(in_features, generator=generator)].int()
    return QuantWeight(
        codes=torch.randint(0, 2**bits, (out_features, in_features), generator=generator, dtype=torch.uint8),
        scales=torch.randn(shape, generator=generator).half(),
        zeros=torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8),
        spec=spec,
        g_idx=g_idx,
    )


SHAPES = [(32, 64, 32), (5, 96, -1), (7, 40, 8), (3, 50, 16), (2, 21, 7)]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("out_features", "in_features", "group_size"), SHAPES)
@pytest.mark.parametrize("act_order", [False, True])
def test_holds_the_weight_exactly(
    bits: int, out_features: int, in_features: int, group_size: int, act_order: bool
) -> None:
    weight = random_weight(bits, out_features, in_features, group_size, act_order=act_order)
    expected = (weight.codes.float() - weight.zeros.float()[:, weight.group_index()]) * weight.scales.float()[
        :, weight.group_index()
    ]
    packed = PackedMatrix(weight)
    assert torch.equal(packed.weight, expected)
    x = torch.randn(2, 3, in_features, generator=torch.Generator().manual_seed(0))
    error = (packed(x) - x.double() @ expected.double().T).abs()
    # Every one of in_features products and sums rounds by at most half a unit in fp32's 24 bits.
    assert bool((error <= in_features * 2.0**-24 * (x.abs() @ expected.abs().T)).all())


def test_rows_in_steps_equal_the_whole() -> None:
    in_features = 4096
    weight = random_weight(4, _STEP // in_features * 2 + 3, in_features, 128)
    packed = PackedMatrix(weight)
    x = torch.randn(2, in_features, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(packed(x), x @ weight.dequantize().T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("bits", BITS)
def test_memory_is_bits_per_weight(bits: int) -> None:
    packed = PackedMatrix(random_weight(bits, 64, 256, 64))
    planes = sum(b.nbytes for name, b in packed.named_buffers() if name.startswith("plane"))
    assert planes * 8 == bits * 64 * 256
    assert not list(packed.parameters())


def test_scales_survive_a_change_of_dtype() -> None:
    weight = random_weight(4, 32, 64, 32)
    packed = PackedMatrix(weight).to(torch.bfloat16)
    assert torch.equal(packed.scales, weight.scales)
    assert torch.equal(packed.weight, weight.dequantize().bfloat16())
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert packed(x).dtype == torch.bfloat16
    assert torch.equal(packed(x), x @ weight.dequantize().bfloat16().T)


def test_linear_of_parts_with_bias() -> None:
    first, second = random_weight(4, 32, 64, 32), random_weight(3, 16, 64, -1)
    dense = nn.Linear(64, 8, bias=False)
    bias = nn.Parameter(torch.arange(56.0), requires_grad=False)
    layer = QuantLinear([PackedMatrix(first), dense, PackedMatrix(second)], bias)
    expected = torch.cat([first.dequantize(), dense.weight, second.dequantize()])
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    assert (layer.in_features, layer.out_features) == (64, 56)
    assert torch.equal(layer.weight, expected)
    torch.testing.assert_close(layer(x), x @ expected.T + bias)


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_by_index(transposed: bool) -> None:
    weights = [random_weight(4, 32, 64, 32), random_weight(2, 32, 64, 32)]
    experts = PackedExperts([QuantLinear([PackedMatrix(weight)]) for weight in weights], transposed)
    for index, weight in enumerate(weights):
        expected = weight.dequantize().T if transposed else weight.dequantize()
        assert torch.equal(experts[index], expected)
        assert torch.equal(experts[torch.tensor(index)], expected)
