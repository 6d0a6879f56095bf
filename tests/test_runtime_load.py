"""Artifacts made here by hand, loaded, against transformers on the dequantized weights."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import bittern
from bittern.errors import BitternError
from bittern.formats import gptq
from bittern.runtime import native
from bittern.runtime.flash import flash_attention
from bittern.runtime.linear import NativeMatrix, PackedExperts, QuantLinear
from bittern.runtime.step import make_step, native_decoder
from bittern.weight import QuantSpec, QuantWeight

SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2}
LINEAR = r"layers\.\d+\..*_proj\.weight"


def rounded(matrix: Tensor, spec: QuantSpec, act_order: bool = False) -> QuantWeight:
    """Round to nearest on a grid per group, for matrices of shape (out, in)."""
    rows, columns = matrix.shape
    groups = spec.groups(columns)
    g_idx = None
    if act_order:
        order = torch.randperm(columns, generator=torch.Generator().manual_seed(columns))
        g_idx = (torch.arange(columns) // spec.columns_per_group(columns))[order].int()
    index = QuantWeight(
        torch.zeros(rows, columns, dtype=torch.uint8),
        torch.ones(rows, groups),
        torch.zeros(rows, groups, dtype=torch.uint8),
        spec,
        g_idx,
    ).group_index()
    low, high = torch.zeros(rows, groups), torch.zeros(rows, groups)
    for group in range(groups):
        low[:, group], high[:, group] = matrix[:, index == group].aminmax(dim=1)
    if spec.sym:
        scales = torch.maximum(low.abs(), high.abs()) / spec.mid_code
        zeros = torch.full_like(scales, spec.mid_code)
    else:
        scales = (high - low) / spec.max_code
        zeros = (-low / scales).round().clamp(0, spec.max_code)
    scales = scales.half().float()
    codes = (matrix / scales[:, index] + zeros[:, index]).round().clamp(0, spec.max_code)
    return QuantWeight(codes.to(torch.uint8), scales.half(), zeros.to(torch.uint8), spec, g_idx)


@dataclass
class Made:
    """An artifact, and the plain checkpoint of its dequantized weights."""

    artifact: Path
    plain: Path
    layers: list[str]

    def change(self, tensors: dict[str, Tensor | None] | None = None, **config: Any) -> Path:
        """Replace or remove tensors and keys of config.json."""
        stored = load_file(self.artifact / "model.safetensors") | (tensors or {})
        save_file({n: t for n, t in stored.items() if t is not None}, self.artifact / "model.safetensors")
        file = self.artifact / "config.json"
        found = json.loads(file.read_text()) | config
        file.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))
        return self.artifact

    def oracle(self) -> PreTrainedModel:
        options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(self.plain, **options)
        return model


def make(
    folder: Path,
    family: str = "llama",
    options: dict[str, Any] | None = None,
    *,
    pattern: str = LINEAR,
    spec: QuantSpec | Callable[[str], QuantSpec] = QuantSpec(4, 32),  # noqa: B008 (frozen)
    transposed: bool = False,
    act_order: bool = False,
) -> Made:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SMALL, **(GROUPED if options is None else options)})
    model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms are constants otherwise
            parameter.add_(0.05 * torch.randn_like(parameter))
    made = Made(folder / "artifact", folder / "plain", [])
    model.save_pretrained(made.plain)
    plain = load_file(made.plain / "model.safetensors")
    stored: dict[str, Tensor] = {}
    grids: dict[str, QuantSpec | None] = {}
    version = gptq.V1

    def packed(layer: str, matrix: Tensor) -> Tensor:
        nonlocal version
        grid = spec if isinstance(spec, QuantSpec) else spec(layer)
        version = version if grid.sym else gptq.V2
        grids[layer] = grid
        weight = rounded(matrix, grid, act_order)
        by_layer.append((layer, weight))
        return weight.dequantize()

    by_layer: list[tuple[str, QuantWeight]] = []
    for name, tensor in plain.items():
        if not re.search(f"{pattern}$", name):
            stored[name] = tensor
        elif tensor.ndim == 3:
            experts = [
                packed(f"{name}.{i}", matrix.T if transposed else matrix) for i, matrix in enumerate(tensor.unbind())
            ]
            plain[name] = torch.stack([matrix.T if transposed else matrix for matrix in experts])
        else:
            matrix = packed(name.removesuffix(".weight"), tensor.T if transposed else tensor)
            plain[name] = matrix.T.contiguous() if transposed else matrix
    for layer, weight in by_layer:
        tensors = gptq.pack(weight, checkpoint_format=version)
        stored |= {name: tensors[suffix] for suffix, name in gptq.names(layer).items()}
    made.layers = [layer for layer, _ in by_layer]
    save_file(plain, made.plain / "model.safetensors", {"format": "pt"})
    made.artifact.mkdir()
    save_file(stored, made.artifact / "model.safetensors", {"format": "pt"})
    base = next(iter(grids.values()))
    assert base is not None
    (made.artifact / "config.json").write_text((made.plain / "config.json").read_text())
    made.change(quantization_config=gptq.config(base, checkpoint_format=version, layers=grids))
    return made


# The inputs of a native matrix are rounded to 16 bits; two blocks deep that is a few parts in a hundred thousand.
ROUNDING = 2e-4


def assert_same_logits(found: PreTrainedModel, expected: PreTrainedModel, kernels: str = "torch") -> None:
    ids = torch.randint(3, 96, (2, 17), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        logits, oracle = found(ids).logits, expected(ids).logits
    if kernels == "torch":
        torch.testing.assert_close(logits, oracle, atol=5e-5, rtol=1e-3)
    else:
        assert (logits - oracle).norm(dim=-1).max() <= ROUNDING * oracle.norm(dim=-1).max()


KERNELS = ("torch", pytest.param("native", marks=pytest.mark.skipif(not native.available(), reason=native.why_not())))


CASES: dict[str, dict[str, Any]] = {
    "4 bits": {},
    "2 bits": {"spec": QuantSpec(2, 32)},
    "3 bits": {"spec": QuantSpec(3, 32)},
    "8 bits": {"spec": QuantSpec(8, -1)},
    "asymmetric": {"spec": QuantSpec(3, 32, sym=False)},
    "act-order": {"act_order": True},
    "tied": {"options": {**GROUPED, "tie_word_embeddings": True}},
    "packed head": {"pattern": rf"({LINEAR}|lm_head\.weight)"},
    "mixed and skipped": {
        "pattern": r"layers\.\d+\.(mlp\.(up|down)|self_attn\.[qkv])_proj\.weight",
        "spec": lambda layer: QuantSpec(8, -1) if "down_proj" in layer else QuantSpec(4, 32),
    },
    "biases": {"family": "qwen2"},
    "fused qkv": {"family": "phi3"},
    "Conv1D": {
        "family": "gpt2",
        "options": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
        "pattern": r"h\.\d+\.(attn|mlp)\.c_\w+\.weight",
        "transposed": True,
    },
    "experts apart": {
        "family": "mixtral",
        "options": {**GROUPED, "num_local_experts": 4},
        "pattern": r"(experts\.\d+\.w\d|_proj)\.weight",
        "spec": lambda layer: QuantSpec(3 if layer.endswith("w3") else 4, 32),
    },
    "some of an expert's rows": {
        "family": "mixtral",
        "options": {**GROUPED, "num_local_experts": 4},
        "pattern": r"experts\.\d+\.w1\.weight",
    },
    "experts fused": {
        "family": "gpt_oss",
        "options": {**GROUPED, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
        "pattern": r"experts\.(gate_up|down)_proj",
        "transposed": True,
    },
}


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_dequantized_weights(case: str, kernels: str, tmp_path: Path) -> None:
    made = make(tmp_path, **CASES[case])
    model = bittern.load(made.artifact, device="cpu", kernels=kernels)
    assert_same_logits(model, made.oracle(), kernels)
    assert made.layers
    assert any(isinstance(module, QuantLinear | PackedExperts) for module in model.modules())
    assert not model.training and model.dtype == torch.float32


@pytest.mark.parametrize("kernels", KERNELS)
def test_packed_layers_take_the_memory_of_their_bits(kernels: str, tmp_path: Path) -> None:
    made = make(tmp_path)
    packed, plain = (bittern.load(folder, device="cpu", kernels=kernels) for folder in (made.artifact, made.plain))
    weights = sum(module.weight.numel() for module in packed.modules() if isinstance(module, QuantLinear))
    plain_bytes, packed_bytes = (
        sum(t.nbytes for t in {*model.parameters(), *model.buffers()}) for model in (plain, packed)
    )
    groups = weights // 32
    zeros = groups if kernels == "torch" else 0  # a symmetric grid has none in memory
    assert plain_bytes - packed_bytes == 4 * weights - (weights // 2 + groups * 2 + zeros)


def test_loads_plain_checkpoints(tmp_path: Path) -> None:
    made = make(tmp_path)
    model = bittern.load(made.plain, device="cpu")
    assert_same_logits(model, made.oracle())
    half = bittern.load(made.plain, device="cpu", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 == half.lm_head.weight.dtype
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").exists()


@pytest.mark.parametrize("dtype", ["float16", torch.int8])
def test_refuses_a_dtype_that_is_none_or_that_nothing_computes_in(dtype: Any, tmp_path: Path) -> None:
    with pytest.raises(BitternError, match=r"^dtype: expected one of torch.float32, .*, found .*(float16'|int8)$"):
        bittern.load(tmp_path, device="cpu", dtype=dtype)


def test_artifacts_in_bfloat16(tmp_path: Path) -> None:
    made = make(tmp_path)
    model = bittern.load(made.artifact, device="cpu", dtype=torch.bfloat16)
    expected = made.oracle().bfloat16()
    ids = torch.arange(3, 20).unsqueeze(0)
    with torch.no_grad():
        found = model(ids).logits
        assert found.dtype == torch.bfloat16
        assert torch.equal(model.model.layers[0].mlp.up_proj.weight, expected.model.layers[0].mlp.up_proj.weight)
        torch.testing.assert_close(found.float(), expected(ids).logits.float(), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("found", ["[]", '{"suppress_tokens": 5}', "{", "5"])
def test_a_generation_config_that_is_none_is_named(found: str, tmp_path: Path) -> None:
    made = make(tmp_path)
    (made.artifact / "generation_config.json").write_text(found)
    with pytest.raises(BitternError, match=r"generation_config\.json: "):
        bittern.load(made.artifact, device="cpu")


def test_is_a_transformers_model(tmp_path: Path) -> None:
    made = make(tmp_path)
    settings = {"eos_token_id": [5, 6], "max_length": 30}
    (made.artifact / "generation_config.json").write_text(json.dumps(settings))
    model = bittern.load(made.artifact, device="cpu")
    assert model.generation_config is not None and model.generation_config.eos_token_id == [5, 6]
    assert getattr(model.config, "quantization_config", None) is None
    oracle = made.oracle()
    ids = torch.arange(3, 9).unsqueeze(0)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), oracle.generate(ids, **options))  # type: ignore[operator]
    beams = options | {"num_beams": 3}
    assert torch.equal(model.generate(ids, **beams), oracle.generate(ids, **beams))  # type: ignore[operator]
    with pytest.raises(BitternError, match="save_pretrained: the layers of this model are packed"):
        model.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_autogptq_quirks(tmp_path: Path) -> None:
    """A bias for every layer, zeros or not, and the config in quantize_config.json alone."""
    made = make(tmp_path)
    first, second = made.layers[:2]
    rows = {layer: load_file(made.plain / "model.safetensors")[f"{layer}.weight"].shape[0] for layer in (first, second)}
    bias = torch.linspace(-1, 1, rows[second]).half()
    folder = made.change({f"{first}.bias": torch.zeros(rows[first]).half(), f"{second}.bias": bias})
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    old = {key: config[key] for key in ("bits", "group_size", "desc_act", "sym")}
    (folder / "quantize_config.json").write_text(json.dumps(old))
    made.change(quantization_config=None)
    model = bittern.load(folder, device="cpu")
    oracle = made.oracle()
    oracle.get_submodule(second).bias = torch.nn.Parameter(bias.float())
    assert_same_logits(model, oracle)
    assert model.get_submodule(first).bias is None


def test_biases_of_experts_are_zeros_or_refused(tmp_path: Path) -> None:
    made = make(tmp_path, **CASES["experts apart"])
    name = f"{next(layer for layer in made.layers if 'experts' in layer)}.bias"
    rows = load_file(made.plain / "model.safetensors")[name.replace(".bias", ".weight")].shape[0]
    made.change({name: torch.zeros(rows)})
    assert_same_logits(bittern.load(made.artifact, device="cpu", kernels="torch"), made.oracle())
    made.change({name: torch.ones(rows)})
    with pytest.raises(BitternError, match=r"^model.*experts.0.w1.bias: expected zeros, for experts have no bias here"):
        bittern.load(made.artifact, device="cpu", kernels="torch")


needs_native = pytest.mark.skipif(not native.available(), reason=f"native runtime: {native.why_not()}")


@needs_native
def test_activations_that_nothing_would_round_are_refused(tmp_path: Path) -> None:
    made = make(tmp_path)
    with pytest.raises(BitternError, match=r"^activations: only native kernels on a CPU round inputs to a8"):
        bittern.load(made.artifact, device="cpu", kernels="torch", activations="a8")


@pytest.mark.parametrize("activations", ["a16", "a8"])
def test_the_whole_model_is_native_where_that_fits(activations: str, tmp_path: Path) -> None:
    made = make(tmp_path)
    model = bittern.load(made.artifact, device="cpu", activations=activations)
    assert vars(model)["native_decoder"] is not None
    assert vars(model)["kernels"] == f"native {native.instructions()}, activations {activations}, whole model"
    settings = {module.settings for module in model.modules() if isinstance(module, NativeMatrix)}
    assert settings == {native.Settings(activations)}
    without = bittern.load(made.artifact, device="cpu", decoder=False)
    assert vars(without)["native_decoder"] is None
    assert vars(without)["kernels"].endswith("activations a16, layer by layer (without the decoder for whole models)")
    other = bittern.load(make(tmp_path / "gpt2", **CASES["Conv1D"]).artifact, device="cpu")
    assert vars(other)["native_decoder"] is None
    assert "layer by layer (GPT2LMHeadModel" in vars(other)["kernels"]
    half = bittern.load(made.artifact, device="cpu", dtype=torch.bfloat16)
    assert vars(half)["native_decoder_reason"] == "it computes in float32, not in torch.bfloat16"


@needs_native
def test_a_decoder_that_computes_something_else_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bittern.runtime import decoder

    made = make(tmp_path)
    forward = decoder.Decoder.forward
    monkeypatch.setattr(decoder.Decoder, "forward", lambda *arguments: forward(*arguments) * 1.02)
    with pytest.warns(UserWarning, match="the native decoder is not used: its logits differ .*by 2.0e-02"):
        model = bittern.load(made.artifact, device="cpu")
    assert vars(model)["native_decoder"] is None
    assert "layer by layer (its logits differ" in vars(model)["kernels"]
    assert_same_logits(model, made.oracle(), "native")


@needs_native
def test_a_copy_of_a_model_has_tensors_of_its_own(tmp_path: Path) -> None:
    made = make(tmp_path)
    model = bittern.load(made.artifact, device="cpu")
    other = copy.deepcopy(model)
    assert vars(other)["native_decoder"] is None
    with torch.no_grad():
        for tensor in model.buffers():
            tensor.zero_()
    assert_same_logits(other, made.oracle(), "native")


@needs_native
def test_a_model_that_was_changed_is_computed_as_it_is_now(tmp_path: Path) -> None:
    from bittern.runtime.step import native_decoder

    model = bittern.load(make(tmp_path).artifact, device="cpu")
    assert native_decoder(model) is not None
    head: Any = model.lm_head
    model.lm_head = torch.nn.Linear(head.in_features, head.out_features, bias=False)
    assert native_decoder(model) is None


@needs_native
def test_a_context_too_short_to_compare_in_loads_all_the_same(tmp_path: Path) -> None:
    made = make(tmp_path, options={**GROUPED, "max_position_embeddings": 8})
    with pytest.warns(UserWarning, match="a context of 8 tokens is too short to compare both in"):
        model = bittern.load(made.artifact, device="cpu")
    assert vars(model)["native_decoder"] is None
    assert model(torch.tensor([[1, 2, 3]])).logits.shape[1] == 3


BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a missing tensor": ({"model.norm.weight": None}, {}, r"model\.norm\.weight: the checkpoint has no such tensor"),
    "a missing part": (
        {"model.layers.0.mlp.up_proj.scales": None},
        {},
        r"model\.layers\.0\.mlp\.up_proj\.scales: expected a tensor of two dimensions, found none",
    ),
    "a missing layer": (
        {f"model.layers.1.mlp.up_proj.{suffix}": None for suffix in gptq.SUFFIXES},
        {},
        r"model\.layers\.1\.mlp\.up_proj\.weight: the checkpoint has no such tensor",
    ),
    "an unexpected tensor": (
        {"model.layers.0.mlp.extra.weight": torch.zeros(3)},
        {},
        r"model\.layers\.0\.mlp\.extra\.weight: the checkpoint holds it, but a llama model has no place for it",
    ),
    "a wrong shape": ({"model.norm.weight": torch.ones(63)}, {}, r"model\.norm\.weight: .*\(64,\), found \(63,\)"),
    "a wrong packed shape": (
        {"model.layers.0.mlp.up_proj.qweight": torch.zeros(9, 96, dtype=torch.int32)},
        {},
        r"model\.layers\.0\.mlp\.up_proj\.qweight: expected 8 rows \(64 columns of 4 bits\), found 9",
    ),
    "NaN": ({"model.norm.weight": torch.full((64,), torch.nan)}, {}, r"model\.norm\.weight: .*NaN"),
    "no config": ({}, {"quantization_config": None}, r"holds packed layers \(\S+\), but neither config.json nor"),
    "another format": (
        {},
        {"quantization_config": {"quant_method": "fp8"}},
        "quant_method: expected one of gptq, .* found 'fp8'",
    ),
    "other bits": (
        {},
        {"quantization_config": {"quant_method": "gptq", "bits": 3, "group_size": 32}},
        r"model\.layers\.0\.\S+\.qweight: expected 9 rows \(96 columns of 3 bits\), found 12",
    ),
    "other size": (
        {},
        {"intermediate_size": 160},
        r"gate_proj: config.json asks for shape \(160, 64\), found \(96, 64\)",
    ),
    "an unknown architecture": ({}, {"model_type": "nonesuch"}, "model_type 'nonesuch' is not an architecture"),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses(case: str, tmp_path: Path) -> None:
    tensors, config, message = BAD[case]
    folder = make(tmp_path).change(tensors, **config)
    with pytest.raises(BitternError, match=message):
        bittern.load(folder, device="cpu")


def test_real_artifact_of_the_demo_size(shared: Path) -> None:
    """stories15m as it is: bittern's attention, cache and loader against transformers' own."""
    folder = shared / "data" / "models" / "stories15m"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not at hand")
    model = bittern.load(folder, device="cpu")
    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    ids = torch.randint(3, 32000, (1, 64), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, oracle(ids).logits, atol=1e-3, rtol=1e-3)


def logits_of(model: PreTrainedModel) -> Tensor:
    """After a prompt and two steps, keys and values in 8 bits."""
    ids = torch.randint(3, 96, (40,), generator=torch.Generator().manual_seed(5), device="cpu").tolist()
    step = make_step(model, [ids], [3], "int8")
    with torch.no_grad():
        return torch.cat([step([part]) for part in (ids, [7], [9])])


@pytest.mark.skipif(not native.available(), reason=native.why_not())
@pytest.mark.parametrize("head_bits", [None, 8])
@pytest.mark.parametrize("decoder", [True, False])
def test_torch_s_defaults_change_nothing(decoder: bool, head_bits: int | None, tmp_path: Path) -> None:
    """The library writes fp32 to where it is told, whatever torch's tensors are like by default."""
    artifact = make(tmp_path).artifact
    usual = bittern.load(artifact, device="cpu", decoder=decoder, lm_head_bits=head_bits)
    assert (native_decoder(usual) is not None) == decoder
    expected = logits_of(usual)
    torch.set_default_dtype(torch.float64)
    try:
        model = bittern.load(artifact, device="cpu", decoder=decoder, lm_head_bits=head_bits)
        assert vars(model)["kernels"] == vars(usual)["kernels"]
        found = logits_of(model)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    with torch.device("meta"):
        found = logits_of(usual)
    assert torch.equal(found, expected)


@pytest.mark.skipif(not native.available(), reason=native.why_not())
def test_torch_s_defaults_change_no_attention() -> None:
    query = torch.randn(1, 2, 40, 16, generator=torch.Generator().manual_seed(0))
    expected = flash_attention(query, query, query, scale=0.25)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = flash_attention(query, query, query, scale=0.25)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32 and torch.equal(found, expected)
