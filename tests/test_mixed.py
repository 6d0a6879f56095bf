"""Mixed bits: the knapsack against trying everything, sensitivities against measured harm, and the whole job."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import bittern
from bittern import model as live
from bittern.artifact import Artifact
from bittern.checkpoint import open_checkpoint
from bittern.errors import BitternError
from bittern.evaluate import evaluate
from bittern.page.page import make_sections, render
from bittern.quantize import backward, mixed
from bittern.quantize.gptq import factorize, gptq
from bittern.quantize.mixed import choose
from bittern.quantize.plan import make_plan
from bittern.quantize.sensitivity import Group, Sensitivity
from bittern.schema import read_manifest, schema
from bittern.weight import BITS, QuantSpec
from tests import tiny
from tests.test_families import FAMILIES
from tests.test_schema import unknown

SMALL = {"group_size": 32, "nsamples": 12, "seqlen": 32, "batch_size": 4}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    return tiny.save(tiny.random_model(), tmp_path_factory.mktemp("source"), tokenizer)


def run(source: Path, out: Path, text: Path, **options: Any) -> dict[str, Any]:
    return bittern.quantize(source, out, **{"dataset": str(text), **SMALL, **options})


def bits_of(manifest: dict[str, Any]) -> dict[str, int]:
    return {record["layer"].removeprefix("model.layers."): record["bits"] for record in manifest["layers"]}


# The knapsack


def cheapest(weights: list[int], harms: list[dict[int, float]], budget: float) -> float:
    """The least harm by trying every choice."""
    tried = itertools.product(*(sorted(harm) for harm in harms))
    fitting = [bits for bits in tried if sum(map(math.prod, zip(bits, weights, strict=True))) <= budget]
    return min(sum(harm[each] for harm, each in zip(harms, bits, strict=True)) for bits in fitting)


def random_case(seed: int) -> tuple[list[int], list[dict[int, float]], float]:
    """Up to six groups; harm falls with bits in most of them, but need not."""
    random = np.random.default_rng(seed)
    count = int(random.integers(1, 7))
    unit = int(random.choice([1, 7, 1024]))
    weights = [int(each) * unit for each in random.integers(1, 12, count)]
    harms = [
        {bits: float(random.gamma(0.5) * 4.0 ** -(bits * random.integers(0, 2))) for bits in BITS} for _ in weights
    ]
    return weights, harms, float(random.uniform(2, 8)) * sum(weights)


@pytest.mark.parametrize("seed", range(60))
def test_no_choice_of_bits_does_less_harm(seed: int) -> None:
    weights, harms, budget = random_case(seed)
    chosen = choose(weights, harms, budget)
    assert sum(map(math.prod, zip(chosen, weights, strict=True))) <= budget
    harm = sum(each[bits] for each, bits in zip(harms, chosen, strict=True))
    assert harm == pytest.approx(cheapest(weights, harms, budget), rel=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_a_coarse_budget_is_kept_too(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, harms, budget = random_case(seed)
    fine = sum(harm[bits] for harm, bits in zip(harms, choose(weights, harms, budget), strict=True))
    monkeypatch.setattr(mixed, "STATES", 5)
    chosen = choose(weights, harms, budget)
    assert sum(map(math.prod, zip(chosen, weights, strict=True))) <= budget
    assert sum(harm[bits] for harm, bits in zip(harms, chosen, strict=True)) >= fine - 1e-12


def test_the_ends_of_the_range() -> None:
    weights, harms = [5, 3], [{2: 9.0, 3: 4.0, 4: 1.0, 8: 0.0}, {2: 9.0, 3: 4.0, 4: 1.0, 8: 0.0}]
    assert choose(weights, harms, 2.0 * 8) == [2, 2] and choose(weights, harms, 8.0 * 8) == [8, 8]
    weights = [33, 799191]  # too many amounts of bits to tell all apart
    assert choose(weights, harms, 8.0 * sum(weights)) == [8, 8]


# Sensitivities


def measured(source: Path, windows: Tensor) -> list[Group]:
    with open_checkpoint(source) as checkpoint:
        model = live.build(checkpoint.config)
        sources = live.weight_map(model, checkpoint.tensors)
        prefix, blocks = live.blocks(model)
        found = [live.matrices(model, f"{prefix}.{position}", sources) for position in range(len(blocks))]
        planned = make_plan(found, 4, 32, True).blocks
        groups = Sensitivity(model, checkpoint, sources, planned, 0.01, torch.device("cpu")).measure(windows)
        assert all(parameter.is_meta for parameter in model.parameters())
    return groups


def rounded(weight: Tensor, inputs: Tensor) -> Tensor:
    """A matrix at 3 bits, as the solver rounds it for inputs of this second moment."""
    return gptq(weight.detach(), factorize(inputs.float()), QuantSpec(3, 32)).weight.dequantize()


def test_expected_harm_is_near_what_rounding_one_group_does(source: Path) -> None:
    """Each group alone is rounded in an otherwise exact model, and the KL of that is measured."""
    windows = torch.randint(4, 200, (24, 48), generator=torch.Generator().manual_seed(1))
    groups = measured(source, windows)
    assert [[name.rpartition(".")[2] for name in group.layers] for group in groups[:4]] == [
        *(["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"])
    ]
    base = tiny.read_model(source)
    for group in groups:
        assert group.harm[2] > 2 * group.harm[3] > 8 * group.harm[8] > 0
        other = tiny.read_model(source)
        inputs = recorded(base, group.layers[0], windows)
        for name in group.layers:
            weight = other.get_parameter(f"{name}.weight")
            weight.data.copy_(rounded(weight, inputs))
        kl = evaluate(other, windows, against=base).kl
        # Tokens are taken for independent; what attention of a random model averages over them is not quite.
        near = 1.1 if "mlp" in group.layers[0] else 2.5
        assert kl is not None and 1 / near < group.harm[3] / kl < near, (group.layers, group.harm[3], kl)


def test_harm_is_the_formula_computed_on_the_whole_model(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same expectation with all of the model in memory, and gradients of one backward pass through it."""
    monkeypatch.setattr("bittern.replay.fast_in_sixteen_bits", lambda _: False)
    monkeypatch.setattr(backward, "KEPT", torch.float32)
    windows = torch.randint(4, 200, (5, 24), generator=torch.Generator().manual_seed(2))
    group = measured(source, windows)[3]
    name = group.layers[0]
    model = tiny.read_model(source).requires_grad_(False)
    squares = torch.zeros(64, dtype=torch.float64)
    outputs: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda _, __, output: outputs.append(output))
    for index, ids in enumerate(windows):
        embedded = model.get_input_embeddings()(ids[None]).requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits
        drawn = backward.root_of_fisher(logits.detach(), torch.Generator().manual_seed(index))
        squares += torch.autograd.grad(logits, outputs.pop(), drawn)[0][0].double().square().sum(0)
    handle.remove()
    weight = model.get_parameter(f"{name}.weight").detach()
    inputs = recorded(model, name, windows)
    change = (rounded(weight, inputs) - weight).double()
    errors = torch.einsum("oi,ij,oj->o", change, inputs, change)
    assert group.harm[3] == pytest.approx(float(squares @ errors) / 2 / windows.numel(), rel=1e-3)


def recorded(model: Any, module: str, windows: Tensor) -> Tensor:
    """E[x x'] of a module's input over the windows."""
    seen: list[Tensor] = []
    handle = model.get_submodule(module).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(windows)
    handle.remove()
    x = seen[0].flatten(0, -2).double()
    return x.T @ x / len(x)


@pytest.mark.parametrize("family", ["gpt2", "phi", "mixtral", "gpt_oss", "bloom"])
def test_families_and_their_groups(family: str, tokenizer: PreTrainedTokenizerFast, text: Path, tmp_path: Path) -> None:
    model = tiny.random_model(family, **{"intermediate_size": 96, "num_hidden_layers": 3, **FAMILIES[family]})
    manifest = run(tiny.save(model, tmp_path / "source", tokenizer), tmp_path / "out", text, bits=2.5)
    bits = bits_of(manifest)
    assert 2.25 <= manifest["mixed"]["found"] <= 2.5 and len(set(bits.values())) > 1
    experts: dict[str, set[int]] = {}
    for name, each in bits.items():
        if "expert" in name:
            experts.setdefault(name.partition(".")[0], set()).add(each)
    assert all(len(found) == 1 for found in experts.values()) and bool(experts) is (family in ("mixtral", "gpt_oss"))
    bittern.load(tmp_path / "out", device="cpu")


# The whole job


def test_an_average_is_kept_and_told(source: Path, text: Path, tmp_path: Path) -> None:
    manifest = run(source, tmp_path / "out", text, bits=2.5)
    told = manifest["mixed"]
    bits = bits_of(manifest)
    sizes = {record["layer"]: math.prod(record["shape"]) for record in manifest["layers"]}
    average = sum(math.prod(r["shape"]) * r["bits"] for r in manifest["layers"]) / sum(sizes.values())
    assert told["average"] == 2.5 and told["found"] == pytest.approx(average) and 2.4 <= average <= 2.5
    for group in told["groups"]:
        assert {bits[name.removeprefix("model.layers.")] for name in group["layers"]} == {group["bits"]}
        assert group["weights"] == sum(sizes[name] for name in group["layers"])
    for block in "01":
        assert len({bits[f"{block}.self_attn.{each}_proj"] for each in "qkv"}) == 1
        assert bits[f"{block}.mlp.gate_proj"] == bits[f"{block}.mlp.up_proj"]
    assert read_manifest(tmp_path / "out")["mixed"] == told
    assert not list(unknown(manifest, schema()["$defs"]["run"], "mixed"))
    assert manifest["command"][manifest["command"].index("--bits") + 1] == "2.5"
    config = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert config["bits"] in bits.values() and config["dynamic"]
    with open_checkpoint(tmp_path / "out") as checkpoint:
        stored = {name: layer.spec.bits for name, layer in Artifact(checkpoint).layers.items()}
    assert stored == {record["layer"]: record["bits"] for record in manifest["layers"]}
    assert bool(torch.isfinite(bittern.load(tmp_path / "out", device="cpu")(torch.tensor([[4, 5, 6]])).logits).all())
    assert "sensitivity_seconds" in manifest["measured"]
    page = render(manifest, make_sections(manifest))
    assert "Asked for were 2.5 bits a weight on average" in page and "q, k, v" in page


def test_a_whole_number_with_a_point_is_an_average_too(source: Path, text: Path, tmp_path: Path) -> None:
    manifest = run(source, tmp_path / "out", text, bits=3.0)
    assert 2.9 <= manifest["mixed"]["found"] <= 3.0 and len(set(bits_of(manifest).values())) > 1
    assert "mixed" not in run(source, tmp_path / "uniform", text, bits=3)


def test_layers_that_are_fixed_count_and_are_not_chosen(source: Path, text: Path, tmp_path: Path) -> None:
    manifest = run(source, tmp_path / "out", text, bits=3.5, layers=[("o_proj", 8)], skip=[r"layers\.0\.mlp"])
    bits = bits_of(manifest)
    assert bits["0.self_attn.o_proj"] == bits["1.self_attn.o_proj"] == 8 and "0.mlp.up_proj" not in bits
    assert 3.2 <= manifest["mixed"]["found"] <= 3.5
    assert not any("o_proj" in name for group in manifest["mixed"]["groups"] for name in group["layers"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1.9}, r"bits: expected an average from 2 to 8, found 1\.9"),
        ({"bits": 8.5}, r"bits: expected an average from 2 to 8, found 8\.5"),
        ({"bits": math.nan}, r"bits: expected an average from 2 to 8, found nan"),
        ({"bits": 2.5, "method": "rtn"}, "bits: 2.5 is an average .* needs --method gptq"),
        ({"bits": 2.5, "layers": [("proj", 3)]}, r"--bits 2.5: --layer fixes the bits of every layer"),
        ({"bits": 2.5, "layers": [("mlp", 3)]}, r"--bits 2.5: the layers that --layer fixes leave 1\.\d\d bits"),
        ({"bits": 2.5, "format": "awq"}, "awq: layers of different grids"),
        ({"bits": 2.5, "target": "sglang"}, "--target sglang: "),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    options: dict[str, Any], message: str, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(BitternError, match=message):
        run(source, tmp_path / "out", tmp_path / "no text is read.txt", **options)


def test_the_command_line_reads_averages() -> None:
    from bittern.options import bits

    assert bits("3") == 3 and isinstance(bits("3"), int)
    assert bits("3.0") == 3.0 and isinstance(bits("3.0"), float) and bits("2.25") == 2.25
