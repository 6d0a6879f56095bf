"""Balanced blocks compute what they did, and what is balanced is worth it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import bittern
from bittern.model import Matrix, blocks, matrices, weight_map
from bittern.quantize import balance
from bittern.quantize.balance import Balancer, choose_factor
from bittern.quantize.stages import Stage, exact_stages
from bittern.replay import BlockCall, capture
from bittern.verify import verify
from bittern.weight import QuantSpec, min_max_grid
from tests import tiny

IDS = torch.randint(4, 200, (6, 20), generator=torch.Generator().manual_seed(5))
SPREAD = torch.exp(torch.randn(64, generator=torch.Generator().manual_seed(8)))


def uneven(model: PreTrainedModel) -> PreTrainedModel:
    """With channels of very different sizes behind every norm."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and ("norm" in name or "ln_" in name) and "layers" in name + "layers":
                parameter.mul_(SPREAD[: len(parameter)])
    return model


def first_block(model: PreTrainedModel) -> tuple[Any, list[Matrix], Tensor, list[BlockCall], list[Tensor], list[Stage]]:
    """The blocks; of the first one its matrices, its input and calls, its output in a list, and its stages."""
    prefix, layers = blocks(model)
    found = matrices(model, f"{prefix}.0", weight_map(model, model.state_dict()))
    state, calls = capture(model, layers, IDS)
    exact = [state.clone()]
    stages = exact_stages(model, layers[0], found, exact, calls[:1])
    assert stages is not None
    return layers, found, state, calls, exact, stages


def balance_first_block(
    model: PreTrainedModel, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[Any, float | None], Tensor, Tensor]:
    """What was changed, and the block's outputs before and after."""
    with pytest.MonkeyPatch.context() as patch:  # in fp32, or rounding would hide what is not the same
        for user in (exact_stages, Balancer):
            patch.setattr(sys.modules[user.__module__], "narrowed", lambda x, by=1.0: x / by)
        layers, found, state, calls, exact, stages = first_block(model)
        balancer = Balancer(model, dtype)
        specs = dict.fromkeys(found, QuantSpec(4, 32))
        made = balancer.balance(layers[0], stages, specs, state, calls[0])
        changed, rescaled = made.changed, made.matrices
        after = state.clone()
        again = exact_stages(model, layers[0], found, [after], calls[:1])
    assert again is not None
    for stage, seen in zip(stages, again, strict=True):
        tolerance = 1e-2 if dtype == torch.bfloat16 and any(name.endswith("bias") for name in changed) else 1e-4
        torch.testing.assert_close(stage.exact[0], seen.exact[0], rtol=tolerance, atol=tolerance)
    return changed, rescaled, exact[0], after


@pytest.mark.parametrize(
    "kind", ["llama", "qwen2", "phi3", "gpt2", "stablelm", "gemma", "gemma2", "gemma3_text", "phi", "cohere", "falcon"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_block_computes_what_it_did(kind: str, dtype: torch.dtype) -> None:
    model = uneven(tiny.random_model(kind, **({"head_dim": 16} if "gemma" in kind else {})))
    changed, rescaled, before, after = balance_first_block(model, dtype)
    # A bias that is divided is rounded to the stored dtype; norms' weights decide their factors and are exact.
    rounds = dtype == torch.bfloat16 and any(name.endswith("bias") for name in changed)
    torch.testing.assert_close(after, before, rtol=1e-2 if rounds else 1e-4, atol=1e-2 if rounds else 1e-5)
    assert rescaled and any(name.endswith("weight") for name in changed)
    assert all(torch.equal(values, values.to(dtype).float()) for values in changed.values())


def test_shared_value_heads_keep_their_channels() -> None:
    model = tiny.random_model()  # four query heads, two of keys and values
    with torch.no_grad():
        model.get_parameter("model.layers.0.self_attn.v_proj.weight").mul_(SPREAD[:32].unsqueeze(1))
    _, rescaled, before, after = balance_first_block(model, torch.float32)
    assert {matrix.module.rpartition(".")[2] for matrix in rescaled} >= {"v_proj", "o_proj"}
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_rows_were_divided_by_what_is_said() -> None:
    """What makes another matrix's input puts out so much less; shared value heads too."""
    model = uneven(tiny.random_model())
    layers, found, state, calls, _, stages = first_block(model)
    outputs: dict[str, list[Tensor]] = {}
    for matrix in found:
        kept = outputs.setdefault(matrix.module, [])
        model.get_submodule(matrix.module).register_forward_hook(lambda _, __, y, kept=kept: kept.append(y.detach()))
    with torch.no_grad():
        calls[0].run(layers[0], state)
        specs = dict.fromkeys(found, QuantSpec(4, 32))
        made = Balancer(model, torch.float32).balance(layers[0], stages, specs, state, calls[0])
        calls[0].run(layers[0], state)
    assert {matrix.module.rpartition(".")[2] for matrix in made.rows} == {"up_proj", "v_proj"}
    for matrix, divided in made.rows.items():
        before, after = outputs[matrix.module][0], outputs[matrix.module][-1]
        torch.testing.assert_close(after * divided, before, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(after, before, rtol=0.1)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("llama", {"v_proj", "up_proj"}),
        ("phi3", {"qkv_proj", "gate_up_proj"}),
        ("phi", {"v_proj"}),
        ("gemma3_text", {"v_proj", "up_proj"}),
    ],
)
def test_rows_make_up_for_columns_in_fused_matrices_too(kind: str, expected: set[str]) -> None:
    model = tiny.random_model(kind, **({"head_dim": 16} if "gemma" in kind else {}))
    layers, found, state, calls, _, stages = first_block(model)
    with torch.no_grad():
        for matrix in found:
            if matrix.module.rpartition(".")[2] in expected:
                model.get_parameter(matrix.parameter).mul_(torch.exp(torch.randn(matrix.out_features, 1)))
    after = calls[0].run(layers[0], state)
    exact = [state.clone()]
    again = exact_stages(model, layers[0], found, exact, calls[:1])
    assert again is not None and [stage.matrices for stage in again] == [stage.matrices for stage in stages]
    made = Balancer(model, torch.float32).balance(
        layers[0], again, dict.fromkeys(found, QuantSpec(4, 32)), state, calls[0]
    )
    assert {matrix.module.rpartition(".")[2] for matrix in made.rows} == expected
    torch.testing.assert_close(calls[0].run(layers[0], state), after, rtol=1e-4, atol=1e-5)
    for matrix, rows in made.rows.items():
        assert rows.shape == (matrix.out_features,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "leaf"), [("llama", "k_proj"), ("llama", "gate_proj"), ("gpt2", "c_attn")])
def test_what_stays_floats_takes_powers_of_two_along(kind: str, leaf: str, dtype: torch.dtype) -> None:
    model = uneven(tiny.random_model(kind))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    layers, found, state, calls, _, _ = first_block(model)
    kept = [matrix for matrix in found if matrix.module.endswith(leaf)]
    planned = [matrix for matrix in found if matrix not in kept]
    before = {matrix: model.get_parameter(matrix.parameter).clone() for matrix in kept}
    exact = [state.clone()]
    stages = exact_stages(model, layers[0], planned, exact, calls[:1])
    assert stages is not None
    specs = dict.fromkeys(planned, QuantSpec(4, 32))
    made = Balancer(model, dtype).balance(layers[0], stages, specs, state, calls[0], kept)
    tolerance = 1e-2 if kind == "gpt2" and dtype != torch.float32 else 1e-4  # biases are rounded
    torch.testing.assert_close(calls[0].run(layers[0], state), exact[0], rtol=tolerance, atol=tolerance)
    if kind == "llama":  # others read its norm and are quantized
        ratio = made.changed[kept[0].parameter] / before[kept[0]]
        powers = ratio[before[kept[0]].abs() > 2.0**-10].log2()  # the smallest numbers of fp16 have fewer digits
        assert torch.equal(powers, powers.round()) and powers.any()
        assert torch.equal(model.get_parameter(kept[0].parameter), made.changed[kept[0].parameter])
        assert [
            matrix for matrix in made.matrices if matrix.module.rpartition(".")[0] == kept[0].module[: -len(leaf) - 1]
        ]
    else:
        assert not made.changed.keys() & {matrix.parameter for matrix in kept}


def test_what_stays_floats_leaves_a_norm_that_adds_one_alone() -> None:
    model = uneven(tiny.random_model("gemma", head_dim=16))
    layers, found, state, calls, _, _ = first_block(model)
    planned = [matrix for matrix in found if not matrix.module.endswith("k_proj")]
    stages = exact_stages(model, layers[0], planned, [state.clone()], calls[:1])
    assert stages is not None
    kept = [matrix for matrix in found if matrix not in planned]
    made = Balancer(model, torch.bfloat16).balance(
        layers[0], stages, dict.fromkeys(planned, QuantSpec(4, 32)), state, calls[0], kept
    )
    assert {name.rpartition(".")[0] for name in made.changed} == {"model.layers.0.post_attention_layernorm"}


def test_an_input_that_cannot_be_balanced_does_not_keep_the_others_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # Its down_proj reads the squares of what up_proj gives: no factor of the one's rows is one of the other's columns.
    model = uneven(tiny.random_model("arcee"))
    monkeypatch.setattr(balance, "WORTH", 10.0)  # every input that is looked at is worth it
    layers, found, state, calls, exact, stages = first_block(model)
    held = {stage.matrices[0]: stage.exact[0].clone() for stage in stages}
    made = Balancer(model, torch.float32).balance(
        layers[0], stages, dict.fromkeys(found, QuantSpec(4, 32)), state, calls[0]
    )
    left = {matrix.module.rpartition(".")[2] for matrix, noise in made.matrices.items() if noise is not None}
    assert left == {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj"}
    assert {matrix.module.rpartition(".")[2] for matrix in made.rows} == {"v_proj"}
    torch.testing.assert_close(calls[0].run(layers[0], state), exact[0], rtol=1e-4, atol=1e-5)
    for stage in stages:
        moved = not torch.equal(stage.exact[0], held[stage.matrices[0]])
        assert moved is (stage.matrices[0].module.rpartition(".")[2] != "down_proj")


def test_a_factor_lessens_the_error_of_rounding() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(96, 64, generator=generator) * SPREAD
    x = torch.randn(500, 64, generator=generator) / SPREAD
    factor, left = choose_factor(x.square().mean(0), weight, 32)
    assert factor is not None and 0 < left < 0.5

    def error(scaled: Tensor, inputs: Tensor) -> float:
        scales, _ = min_max_grid(scaled, QuantSpec(4, 32))
        steps = scales.repeat_interleave(32, 1)
        rounded = (scaled / steps).round().clamp(-8, 7) * steps
        return float((inputs @ (rounded - scaled).T).square().mean())

    assert error(weight * factor, x / factor) < 0.5 * error(weight, x)


def test_even_channels_are_not_touched() -> None:
    generator = torch.Generator().manual_seed(1)
    weight, x = torch.randn(512, 64, generator=generator), torch.randn(4000, 64, generator=generator)
    assert choose_factor(x.square().mean(0), weight, 32) == (None, 1.0)


def test_an_artifact_passes_verification_against_its_source(
    text: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    source = tiny.save(uneven(tiny.random_model()), tmp_path / "source", tokenizer)
    options: dict[str, Any] = {
        "bits": 8,
        "group_size": 32,
        "nsamples": 16,
        "seqlen": 32,
        "batch_size": 4,
        "dataset": str(text),
    }
    manifest = bittern.quantize(source, tmp_path / "out", **options)
    assert manifest["changed"] and any(layer["rescaled"] for layer in manifest["layers"])
    assert verify(tmp_path / "out", source).passed
