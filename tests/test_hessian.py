"""Gathered statistics against inputs recorded by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from bittern.model import Matrix, blocks, matrices, weight_map
from bittern.quantize.hessian import SYRK_PANEL, Accumulator, Inputs, collect
from bittern.quantize.stopwatch import Live
from bittern.replay import capture
from tests import tiny

IDS = torch.randint(4, 200, (6, 20), generator=torch.Generator().manual_seed(5))


def gather(model: PreTrainedModel, position: int = 0) -> list[Inputs]:
    """Statistics of one block over two batches of unequal size."""
    prefix, layers = blocks(model)
    found = matrices(model, f"{prefix}.{position}", weight_map(model, model.state_dict()))
    captured = [capture(model, layers, ids) for ids in torch.split(IDS, [4, 2])]
    hidden, calls = [state for state, _ in captured], [recorded[position] for _, recorded in captured]
    return collect(model, layers[position], found, hidden, calls)


def recorded(model: PreTrainedModel, module: str) -> Tensor:
    """E[x x'] of a module's input over the same tokens, in fp64 and in one forward of the whole model."""
    seen: list[Tensor] = []
    handle = model.get_submodule(module).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(IDS)
    handle.remove()
    x = seen[0].flatten(0, -2).double()
    return x.T @ x / len(x)


def test_equals_inputs_recorded_by_hand() -> None:
    model = tiny.random_model()
    found = gather(model)
    readers = [[matrix.module.rpartition(".")[2] for matrix in inputs.matrices] for inputs in found]
    assert readers == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    for inputs in found:
        assert inputs.tokens == IDS.numel() and inputs.prior == 0
        expected = recorded(model, inputs.matrices[-1].module)
        torch.testing.assert_close(inputs.hessian.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.max()))


def test_hooks_are_gone_afterwards() -> None:
    model = tiny.random_model()
    gather(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("features", [7, SYRK_PANEL, SYRK_PANEL + 9])
def test_panels_make_the_whole_product(features: int) -> None:
    x = torch.randn(40, features, generator=torch.Generator().manual_seed(1))
    accumulator = Accumulator(features, torch.device("cpu"))
    for chunk in x.view(2, 20, features):
        accumulator.add(chunk)
    torch.testing.assert_close(accumulator.mean(), x.T @ x / 40, rtol=1e-4, atol=1e-5)


def moe() -> PreTrainedModel:
    model = tiny.random_model("mixtral", num_local_experts=4, num_experts_per_tok=2)
    model.set_experts_implementation("eager")  # as bittern.model.build does
    return model


def by_expert(found: list[Inputs], leaf: str) -> dict[int, Inputs]:
    picked: dict[int, Inputs] = {}
    for inputs in found:
        matrix: Matrix = inputs.matrices[0]
        if matrix.expert is not None and matrix.parameter.endswith(leaf):
            picked[matrix.expert] = inputs
    return picked


def test_every_expert_is_seen_with_its_own_tokens() -> None:
    found = by_expert(gather(moe()), "gate_up_proj")
    assert set(found) == {0, 1, 2, 3}
    assert sum(inputs.tokens for inputs in found.values()) == 2 * IDS.numel()
    assert all(inputs.prior == 64 / (inputs.tokens + 64) for inputs in found.values())
    assert len({inputs.tokens for inputs in found.values()}) > 1


def test_means_take_the_place_of_sums() -> None:
    """Of a Mixtral with many experts both would not fit."""
    model = tiny.random_model("mixtral", num_local_experts=16, num_experts_per_tok=2, intermediate_size=256)
    model.set_experts_implementation("eager")
    model.requires_grad_(False)
    with Live() as tensors:
        found = gather(model)
    sums = sum(inputs.hessian.nbytes for inputs in found)
    assert tensors.peak < 1.3 * sums


def test_shrunk_hessians_keep_the_mean_of_all_tokens() -> None:
    model = moe()
    found = by_expert(gather(model), "gate_up_proj")
    # Every token reaches two experts, so the pooled second moment is that of the layer's input.
    pooled = recorded(model, "model.layers.0.mlp")
    for inputs in found.values():
        own = (inputs.hessian.double() - inputs.prior * pooled) / (1 - inputs.prior)
        assert float(torch.linalg.eigvalsh((own + own.T) / 2).min()) > -1e-3 * float(pooled.diagonal().mean())


def test_an_expert_without_tokens_gets_the_others_statistics() -> None:
    model = moe()
    router = model.get_parameter("model.layers.0.mlp.gate.weight")
    with torch.no_grad():
        router.zero_()  # ties go to the same two experts for every token
    found = by_expert(gather(model), "gate_up_proj")
    empty = [inputs for inputs in found.values() if inputs.tokens == 0]
    assert len(empty) == 2
    pooled = recorded(model, "model.layers.0.mlp")
    for inputs in empty:
        assert inputs.prior == 1.0
        torch.testing.assert_close(inputs.hessian.double(), pooled, rtol=1e-3, atol=1e-4 * float(pooled.max()))
