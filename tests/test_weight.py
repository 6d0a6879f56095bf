"""The formula of bittern.weight, one element at a time."""

from __future__ import annotations

import pytest
import torch

from bittern.errors import BitternError
from bittern.weight import BITS, QuantSpec, QuantWeight, naming, round_to_nearest


@pytest.mark.parametrize("bits", BITS)
# Four groups of 32 hold 100 columns, and divide them evenly into what are not the groups.
@pytest.mark.parametrize(("in_features", "group_size"), [(100, 32), (96, 32), (90, 48), (10, -1), (10, 16)])
def test_dequantize_takes_each_column_s_own_group(bits: int, in_features: int, group_size: int) -> None:
    generator = torch.Generator().manual_seed(in_features)
    spec = QuantSpec(bits, group_size, sym=False)
    shape = (3, spec.groups(in_features))
    codes = torch.randint(0, 2**bits, (3, in_features), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)
    scales = torch.randn(shape, generator=generator).half()
    weight = QuantWeight(codes, scales, zeros, spec)
    width = in_features if group_size == -1 else group_size
    for dtype in (torch.float32, torch.float64):
        found = weight.dequantize(dtype)
        assert found.dtype == dtype
        for o in range(3):
            for i in range(in_features):
                expected = scales[o, i // width].item() * (int(codes[o, i]) - int(zeros[o, i // width]))
                assert found[o, i].item() == torch.tensor(expected, dtype=dtype).item()


def test_a_spec_says_what_is_wrong_with_it() -> None:
    with pytest.raises(BitternError, match=r"^bits: expected one of 2, 3, 4, 8, found 5$"):
        QuantSpec(5)
    with pytest.raises(BitternError, match=r"^group_size: expected -1 or a positive number, found 0$"):
        QuantSpec(4, 0)


def test_a_weight_needs_scales_of_its_groups() -> None:
    codes, spec = torch.zeros(2, 100, dtype=torch.uint8), QuantSpec(4, 32)
    with pytest.raises(BitternError, match=r"^scales: expected shape \(2, 4\), found \(2, 3\)$"):
        QuantWeight(codes, torch.ones(2, 3), torch.zeros(2, 4, dtype=torch.uint8), spec)
    with pytest.raises(BitternError, match=r"^zeros: expected uint8, found torch.int32$"):
        QuantWeight(codes, torch.ones(2, 4), torch.zeros(2, 4, dtype=torch.int32), spec)


def test_an_error_of_values_names_their_layer() -> None:
    message = r"^model\.layers\.0\.mlp\.up_proj: scales: fp16 holds at most 65504, found 1\.333e\+06$"
    with pytest.raises(BitternError, match=message), naming("model.layers.0.mlp.up_proj"):
        round_to_nearest(torch.full((1, 16), 1e7), QuantSpec(4, 16))
