"""Layers of the native kernels against their dequantized weights: what they compute, how often, and what they keep."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bittern.errors import BitternError
from bittern.runtime import linear, native
from bittern.runtime.linear import (
    NativeMatrix,
    PackedExperts,
    QuantLinear,
    StoredEmbedding,
    StoredLinear,
    native_matrix,
    share_inputs,
)
from bittern.weight import BITS
from tests.test_runtime_linear import SHAPES, random_weight

pytestmark = pytest.mark.skipif(not native.available(), reason=f"native runtime: {native.why_not()}")
# Relative error of an output, by the precision of the inputs: half a step of 2^-15 (2^-7) of the largest of a group,
# which outputs that almost cancel may show several times.
BOUND = {"a16": 2e-4, "a8": 4e-2}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_near(found: Tensor, expected: Tensor, activations: str = "a16") -> None:
    assert found.shape == expected.shape
    assert (found.double() - expected).norm() <= BOUND[activations] * expected.norm()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many matrices each call of the library got."""
    counts: list[int] = []
    actual = native.linear

    def counting(x: Tensor, matrices: Any, *arguments: Any, **options: Any) -> list[Tensor]:
        counts.append(len(matrices))
        return actual(x, matrices, *arguments, **options)

    monkeypatch.setattr(native, "linear", counting)
    yield counts


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("out_features", "in_features", "group_size"), [*SHAPES, (33, 192, 96)])
@pytest.mark.parametrize("act_order", [False, True])
def test_a_matrix_multiplies(bits: int, out_features: int, in_features: int, group_size: int, act_order: bool) -> None:
    weight = random_weight(bits, out_features, in_features, group_size, act_order=act_order)
    columns = weight.group_index()
    expected = (weight.codes.float() - weight.zeros.float()[:, columns]) * weight.scales.float()[:, columns]
    for activations in native.ACTIVATIONS:
        matrix = NativeMatrix(weight, settings=native.Settings(activations, threads=1))
        assert torch.equal(matrix.weight, expected)
        for shape in ((in_features,), (3, in_features), (2, 5, in_features), (0, in_features)):
            x = noise(*shape)
            assert_near(matrix(x), x.double() @ expected.double().T, activations)
        strided = noise(in_features, 4).T
        assert torch.equal(matrix(strided), matrix(strided.contiguous()))


@pytest.mark.parametrize("act_order", [False, True])
def test_many_rows_may_be_multiplied_dequantized(act_order: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(3, 40, 96, 32, act_order=act_order)
    matrix, x = NativeMatrix(weight), noise(6, 96)
    monkeypatch.setitem(linear.PACKED_GEMM_ROWS, native.instructions(), 6)
    monkeypatch.setattr(linear, "_STEP", 96 * 16)  # blocks of 16 rows
    torch.testing.assert_close(matrix(x), functional.linear(x, matrix.weight), rtol=1e-5, atol=1e-4)
    assert_near(matrix(x[:5]), functional.linear(x[:5], matrix.weight).double())


def test_what_a_model_does_with_its_modules() -> None:
    weight = random_weight(4, 32, 64, 32)
    matrix = NativeMatrix(weight).to(torch.bfloat16)
    assert torch.equal(matrix.scales[:, :, :16].transpose(1, 2).reshape(32, 2), weight.scales)
    assert torch.equal(matrix.weight, weight.dequantize().bfloat16())
    x = noise(3, 64)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(matrix(x.to(dtype)), matrix(x.to(dtype).float()).to(dtype))
    other = copy.deepcopy(matrix)
    matrix.codes.zero_()
    assert_near(other(x), x.double() @ weight.dequantize().double().T)
    with pytest.raises(BitternError, match="the layers of this model are packed for the CPU"):
        other.to("meta")
    assert_near(other(x), x.double() @ weight.dequantize().double().T)  # untouched
    with pytest.raises(BitternError, match=r"input: expected 64 features on the CPU, found \(3, 63\)"):
        other(x[:, :63])


def test_gradients_reach_the_input() -> None:
    weight = random_weight(4, 32, 64, 32)
    layer = QuantLinear([NativeMatrix(weight)])
    x = noise(3, 64).requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, weight.dequantize().sum(0).expand(3, 64))


def test_parts_are_one_call(calls: list[int]) -> None:
    weights = [random_weight(bits, rows, 64, group) for bits, rows, group in ((4, 32, 32), (3, 16, -1), (8, 5, 32))]
    bias = nn.Parameter(torch.arange(53.0), requires_grad=False)
    layer = QuantLinear([NativeMatrix(weight) for weight in weights], bias)
    whole = torch.cat([weight.dequantize() for weight in weights])
    assert torch.equal(layer.weight, whole)
    x = noise(2, 3, 64)
    assert_near(layer(x), x.double() @ whole.double().T + bias)
    assert calls == [3]


class Attention(nn.Module):
    """Three projections, as they are called everywhere."""

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module

    def __init__(self, inputs: int = 64) -> None:
        super().__init__()
        for seed, (name, rows) in enumerate({"q_proj": 32, "k_proj": 16, "v_proj": 16}.items()):
            weight = random_weight(BITS[seed], rows, inputs, 32)
            setattr(self, name, QuantLinear([NativeMatrix(weight)]))
        share_inputs(self)

    @property
    def layers(self) -> list[QuantLinear]:
        return [self.q_proj, self.k_proj, self.v_proj]  # type: ignore[list-item]

    def alone(self, x: Tensor) -> list[Tensor]:
        return [layer.parts[0](x) for layer in self.layers]


def test_layers_of_one_input_are_one_call(calls: list[int]) -> None:
    module = Attention()
    x, other = noise(5, 64), noise(1, 64, seed=1)
    expected, expected_other = module.alone(x), module.alone(other)
    calls.clear()
    found = [layer(x) for layer in module.layers]
    assert calls == [3]
    found_other = [layer(other) for layer in reversed(module.layers)]
    assert calls == [3, 3]
    again = [layer(x) for layer in module.layers]  # nothing was kept
    assert calls == [3, 3, 3]
    for results, wanted in ((found, expected), (found_other[::-1], expected_other), (again, expected)):
        assert all(torch.equal(y, e) for y, e in zip(results, wanted, strict=True))


def test_results_are_let_go() -> None:
    module = Attention()
    x = noise(5, 64)
    taken = [weakref.ref(layer(x)) for layer in module.layers]
    gc.collect()
    assert all(reference() is None for reference in taken)
    siblings = module.layers[0].siblings
    assert siblings is not None and siblings._left is None
    module.layers[0](x)
    assert siblings._left is not None
    waiting = [weakref.ref(y) for y in siblings._left[2].values()]
    assert len(waiting) == 2 and all(reference() is not None for reference in waiting)
    del x
    gc.collect()
    assert all(reference() is None for reference in waiting)


def test_a_changed_input_is_another_input() -> None:
    module = Attention()
    x = noise(5, 64)
    module.q_proj(x)
    x.mul_(2)
    assert torch.equal(module.k_proj(x), module.alone(x)[1])
    same_values = x.clone()
    assert torch.equal(module.v_proj(same_values), module.alone(x)[2])


def test_inference_mode_has_no_versions(calls: list[int]) -> None:
    module = Attention()
    with torch.inference_mode():
        x = noise(5, 64)
        first = module.q_proj(x)
        x.mul_(2)
        assert torch.equal(module.k_proj(x), module.alone(x)[1])
        assert torch.equal(2 * first, module.q_proj(x))


def test_layers_that_do_not_share_stop_computing_for_each_other(calls: list[int]) -> None:
    module = Attention()
    x, other = noise(5, 64), noise(4, 64, seed=1)
    found = [module.q_proj(x), module.k_proj(other), module.v_proj(other)]
    expected = [module.alone(x)[0], *module.alone(other)[1:]]
    assert all(torch.equal(y, e) for y, e in zip(found, expected, strict=True))
    assert calls[:3] == [3, 1, 1]


def test_only_layers_that_fit_are_joined(calls: list[int]) -> None:
    module = Attention()
    module.k_proj = nn.Linear(64, 16)
    module.v_proj = QuantLinear([NativeMatrix(random_weight(4, 16, 96, 32))])
    module.q_proj = QuantLinear([NativeMatrix(random_weight(4, 16, 64, 32))])
    share_inputs(module)
    module.q_proj(noise(2, 64))
    module.v_proj(noise(2, 96))
    assert calls == [1, 1]


def test_a_copy_shares_among_itself(calls: list[int]) -> None:
    module = Attention()
    x = noise(5, 64)
    module.q_proj(x)
    other = copy.deepcopy(module)
    assert other.layers[0].siblings is other.layers[1].siblings is not module.layers[0].siblings
    expected = module.alone(x)
    calls.clear()
    assert all(torch.equal(layer(x), y) for layer, y in zip(other.layers, expected, strict=True))
    assert calls == [3]


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_by_index(transposed: bool) -> None:
    weights = [random_weight(4, 32, 64, 32), random_weight(2, 32, 64, 32)]
    experts = PackedExperts([QuantLinear([NativeMatrix(weight)]) for weight in weights], transposed)
    for index, weight in enumerate(weights):
        expected = weight.dequantize().T if transposed else weight.dequantize()
        assert torch.equal(experts[index], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_stored_ends_compute_in_float32(dtype: torch.dtype, rows: int) -> None:
    weight = noise(70, 48).to(dtype)
    head = StoredLinear(weight, nn.Parameter(noise(70, seed=1), requires_grad=False), threads=1)
    x = noise(2, rows, 48, seed=2)
    expected = functional.linear(x.double(), weight.double(), head.bias.double())
    found = head(x)
    assert found.dtype == torch.float32
    bound = 48 * 2.0**-24 * functional.linear(x.abs(), weight.float().abs(), head.bias.abs())
    assert bool(((found - expected).abs() <= bound).all())
    assert torch.equal(head(x.bfloat16()), head(x.bfloat16().float()).bfloat16())
    ids = torch.tensor([[0, 69, 3]])
    embedding = StoredEmbedding(weight, torch.tensor(6.9))
    assert torch.equal(embedding(ids), weight[ids].float() * 6.9)
    moved = embedding.to(torch.bfloat16)
    assert moved.weight.dtype == head.to(torch.bfloat16).weight.dtype == dtype
    assert moved.weight is not None and moved(ids).dtype == torch.bfloat16
    assert not list(moved.parameters()) and [name for name, _ in head.named_parameters()] == ["bias"]


def test_the_form_of_a_layer_for_the_library() -> None:
    weight = random_weight(4, 32, 64, 32)
    single = QuantLinear([NativeMatrix(weight)])
    for layer in (single, StoredLinear(noise(32, 64).bfloat16()), nn.Linear(64, 32, bias=False)):
        matrix, x = native_matrix(layer), noise(3, 64)
        assert matrix is not None
        torch.testing.assert_close(native.linear(x, [matrix])[0], layer(x), rtol=1e-5, atol=1e-5)
    double = QuantLinear([NativeMatrix(weight), NativeMatrix(weight)])
    conv, half = nn.Conv1d(2, 2, 2), nn.Linear(4, 4).half()
    assert all(native_matrix(layer) is None for layer in (double, conv, half))


def test_settings_are_checked() -> None:
    with pytest.raises(BitternError, match="activations: expected one of a16, a8, found 'a4'"):
        native.Settings("a4")
    with pytest.raises(BitternError, match="threads: expected at least 1, found 0"):
        native.Settings(threads=0)
