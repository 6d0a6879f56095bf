"""formats.compressed_tensors against a packer that moves one bit at a time, the real library, and lying artifacts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from bittern.artifact import Artifact
from bittern.checkpoint import open_checkpoint
from bittern.errors import BitternError
from bittern.formats import compressed_tensors as ct
from bittern.formats import gptq
from bittern.formats.scheme import PackedLayer, Scheme
from bittern.shards import TensorInfo
from bittern.weight import BITS, QuantSpec, QuantWeight, round_to_nearest
from tests import tiny
from tests.test_format_gptq import assert_same, random_weight, words_bit_by_bit


def unpack(tensors: dict[str, Tensor], spec: QuantSpec, out_features: int, in_features: int) -> QuantWeight:
    layer = PackedLayer(out_features, in_features, spec)
    infos = {f"l.{name}": TensorInfo(f"l.{name}", t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    assert ct.layer_shape("l", infos, spec) == (out_features, in_features)
    return ct.unpack(tensors, layer, Scheme("compressed-tensors", spec))


def packed_bit_by_bit(weight: QuantWeight) -> dict[str, Tensor]:
    bits = weight.spec.bits
    rows = [words_bit_by_bit(row.tolist(), bits) for row in weight.codes]
    zeros = [words_bit_by_bit(group.tolist(), bits) for group in weight.zeros.T]
    found = {
        "weight_packed": torch.tensor(rows, dtype=torch.int32),
        "weight_scale": weight.scales,
        "weight_zero_point": torch.tensor(zeros, dtype=torch.int32).T,
        "weight_shape": torch.tensor([weight.out_features, weight.in_features]),
    }
    if weight.spec.sym:
        del found["weight_zero_point"]
    return found


def ten_in_a_word(values: Tensor) -> Tensor:
    """3-bit values as the library packed them before version 0.18: (n, m) -> (n, ceil(m / 10))."""
    rows = []
    for row in values.tolist():
        pieces = [row[i : i + 10] for i in range(0, len(row), 10)]
        rows.append([sum(value << (3 * lane) for lane, value in enumerate(piece)) for piece in pieces])
    return torch.tensor(rows, dtype=torch.int32)


@settings(max_examples=80, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    out_features=st.integers(1, 70),
    groups=st.integers(1, 4),
    group=st.sampled_from((-1, 8, 12, 32, 64, 128)),
    sym=st.booleans(),
    dtype=st.sampled_from((torch.float16, torch.float32)),
    seed=st.integers(0, 2**16),
)
def test_round_trip_and_bit_by_bit(
    bits: int, out_features: int, groups: int, group: int, sym: bool, dtype: torch.dtype, seed: int
) -> None:
    in_features = groups * (32 if group == -1 else group)
    weight = random_weight(bits, out_features, in_features, group, sym=sym, seed=seed)
    if not sym:  # both ends of the range
        weight.zeros[0, 0], weight.zeros[-1, -1] = 0, weight.spec.max_code
    packed = ct.pack(weight, dtype)
    expected = packed_bit_by_bit(weight)
    planned = ct.plan("layer", out_features, in_features, weight.spec, dtype)
    assert [info.name for info in planned] == [f"layer.{suffix}" for suffix in packed]
    for info, (suffix, tensor) in zip(planned, packed.items(), strict=True):
        assert torch.equal(tensor, expected[suffix].to(tensor.dtype)), suffix
        assert (tuple(tensor.shape), tensor.dtype) == (info.shape, info.dtype)
        assert tensor.is_contiguous()
    found = unpack(packed, weight.spec, out_features, in_features)
    assert found.scales.dtype == dtype
    assert_same(QuantWeight(found.codes, found.scales.half(), found.zeros, found.spec, found.g_idx), weight)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_gptq_and_back(bits: int, sym: bool) -> None:
    weight = random_weight(bits, 64, 96, 32, sym=sym)
    before = gptq.pack(weight, checkpoint_format=gptq.V2)
    packed = ct.pack(weight)
    assert torch.equal(packed["weight_packed"], before["qweight"].T)
    if not sym:
        assert torch.equal(packed["weight_zero_point"], before["qzeros"].T)
    after = gptq.pack(unpack(packed, weight.spec, 64, 96), checkpoint_format=gptq.V2)
    assert all(torch.equal(before[suffix], after[suffix]) for suffix in before)


def test_golden_words() -> None:
    """The values 0, 1, 2, ... of each row modulo 2**bits, worked out on paper."""
    golden = {2: "e4e4e4e4", 3: "88fac688", 4: "76543210", 8: "03020100"}
    for bits, expected in golden.items():
        plain = random_weight(bits, 1, 32, -1, sym=True)
        codes = (torch.arange(32) % 2**bits).to(torch.uint8).unsqueeze(0)
        packed = ct.pack(QuantWeight(codes, plain.scales, plain.zeros, plain.spec))
        assert f"{int(packed['weight_packed'][0, 0]) & 0xFFFFFFFF:08x}" == expected


def test_what_others_store() -> None:
    """int8 zeros, zeros in symmetric layers, scales of bfloat16, a g_idx in order or never set."""
    weight = random_weight(4, 24, 96, 32)
    tensors = packed_bit_by_bit(weight)
    signed = (weight.zeros.int() - 8).to(torch.int8)
    assert_same(unpack(tensors | {"weight_zero_point": signed}, weight.spec, 24, 96), weight)
    for g_idx in (torch.arange(96) // 32, torch.full((96,), -1)):
        assert_same(unpack(tensors | {"weight_g_idx": g_idx.int()}, weight.spec, 24, 96), weight)
    bf16 = unpack(tensors | {"weight_scale": weight.scales.bfloat16()}, weight.spec, 24, 96)
    assert torch.equal(bf16.scales, weight.scales.bfloat16().float())

    sym = random_weight(4, 24, 96, 32, sym=True)
    tensors = packed_bit_by_bit(sym)
    for stored in (torch.zeros(24, 3, dtype=torch.int8), packed_bit_by_bit(random_weight(4, 24, 96, 32))):
        if isinstance(stored, dict):
            stored = torch.full_like(stored["weight_zero_point"], -0x77777778)  # 0x88888888
        assert_same(unpack(tensors | {"weight_zero_point": stored}, sym.spec, 24, 96), sym)
    with pytest.raises(BitternError, match="weight_zero_point: expected 8 everywhere in a symmetric layer, found 9"):
        unpack(tensors | {"weight_zero_point": torch.ones(24, 3, dtype=torch.int8)}, sym.spec, 24, 96)


def test_act_order_keeps_its_g_idx() -> None:
    weight = random_weight(4, 16, 96, 32)
    permuted = weight.group_index()[torch.randperm(96, generator=torch.Generator().manual_seed(1))].int()
    found = unpack(packed_bit_by_bit(weight) | {"weight_g_idx": permuted}, weight.spec, 16, 96)
    assert_same(found, QuantWeight(weight.codes, weight.scales, weight.zeros, weight.spec, permuted))
    with pytest.raises(BitternError, match="compressed-tensors stores columns in the order of their groups"):
        ct.pack(found)


@pytest.mark.parametrize("in_features", [64, 96, 288])
def test_three_bits_of_older_libraries(in_features: int) -> None:
    weight = random_weight(3, 40, in_features, 32)
    old = packed_bit_by_bit(weight) | {
        "weight_packed": ten_in_a_word(weight.codes),
        "weight_zero_point": ten_in_a_word(weight.zeros.T).T,
    }
    assert_same(unpack(old, weight.spec, 40, in_features), weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_packed": None}, "weight_packed: expected int32 of shape (32, 8), found none"),
        ({"weight_packed": torch.zeros(32, 9, dtype=torch.int32)}, "weight_packed: expected int32 of shape (32, 8)"),
        ({"weight_packed": torch.zeros(32, 8)}, "found float32 of shape (32, 8)"),
        ({"weight_scale": torch.ones(32, 1)}, "weight_scale: expected float16 or bfloat16 or float32 of shape (32, 2)"),
        ({"weight_scale": torch.full((32, 2), float("inf"))}, "weight_scale: expected finite values"),
        ({"weight_zero_point": None}, "weight_zero_point: expected int32 of shape (4, 2), found none"),
        ({"weight_zero_point": torch.zeros(5, 2, dtype=torch.int32)}, "weight_zero_point: expected int32 of shape"),
        ({"weight_zero_point": torch.full((32, 2), 8, dtype=torch.int8)}, "weight_zero_point: expected -8 to 7 at 4"),
        ({"weight_shape": torch.tensor([32, 63])}, "weight_shape: expected [32, 64], as the shapes"),
        ({"weight_shape": None}, "weight_shape: expected int64 or int32 of shape (2,), found none"),
        ({"weight_g_idx": torch.zeros(64, dtype=torch.int32)}, "weight_g_idx: expected each group for 32 columns"),
        ({"weight_g_idx": torch.zeros(63, dtype=torch.int32)}, "weight_g_idx: expected int32 of shape (64,)"),
    ],
)
def test_refuses_to_read(change: dict[str, Any], message: str) -> None:
    tensors: dict[str, Any] = ct.pack(random_weight(4, 32, 64, 32)) | change
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    spec = QuantSpec(4, 32, sym=False)
    with pytest.raises(BitternError, match=re.escape(message)):
        ct.unpack(present, PackedLayer(32, 64, spec), Scheme("compressed-tensors", spec))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_packed": (32, 9)}, "l.weight_packed: expected as many 4-bit columns as 2 groups of 32 have, found 9"),
        ({"weight_scale": (31, 2)}, "l.weight_scale: expected 32 rows, found 31"),
        ({"weight_scale": (32,)}, "l.weight_scale: expected a tensor of two dimensions, found shape (32,)"),
        ({"weight_packed": (0, 8)}, "l.weight_packed: expected a tensor of two dimensions, found shape (0, 8)"),
    ],
)
def test_refuses_shapes_that_contradict_the_config(change: dict[str, tuple[int, ...]], message: str) -> None:
    infos = {info.name: info for info in ct.plan("l", 32, 64, QuantSpec(4, 32))}
    assert ct.layer_shape("l", infos, QuantSpec(4, 32)) == (32, 64)
    infos |= {f"l.{suffix}": TensorInfo(suffix, torch.int32, shape) for suffix, shape in change.items()}
    with pytest.raises(BitternError, match=re.escape(message)):
        ct.layer_shape("l", infos, QuantSpec(4, 32))


def test_refuses_to_write() -> None:
    plain = random_weight(4, 32, 64, 32)
    for scales, dtype in ((torch.full((32, 2), 0.1), torch.float16), (torch.full((32, 2), 1 / 3), torch.bfloat16)):
        with pytest.raises(BitternError, match=r"scales: expected finite values that b?float16 holds exactly"):
            ct.pack(QuantWeight(plain.codes, scales, plain.zeros, plain.spec), dtype)
    with pytest.raises(BitternError, match="zeros: expected 8 everywhere in a symmetric layer"):
        ct.pack(QuantWeight(plain.codes, plain.scales, plain.zeros, QuantSpec(4, 32)))
    with pytest.raises(BitternError, match="codes: expected at most 15 at 4 bits, found 16"):
        ct.pack(QuantWeight(torch.full_like(plain.codes, 16), plain.scales, plain.zeros, plain.spec))
    with pytest.raises(BitternError, match="q_proj: group_size 64 does not divide in_features 96"):
        ct.plan("q_proj", 32, 96, QuantSpec(4, 64))
    with pytest.raises(BitternError, match="q_proj: one group a row needs in_features that fill words"):
        ct.plan("q_proj", 32, 43, QuantSpec(4, -1))
    with pytest.raises(BitternError, match="dtype: expected float16, bfloat16 or float32 for scales"):
        ct.plan("q_proj", 32, 64, QuantSpec(4, 32), torch.int8)


def layers_of(blocks: int = 2) -> list[str]:
    leaves = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")
    return [f"model.layers.{block}.{leaf}" for block in range(blocks) for leaf in leaves]


def weights_of(spec: QuantSpec) -> dict[str, Any]:
    channel = spec.group_size == -1
    return {
        "num_bits": spec.bits,
        "type": "int",
        "symmetric": spec.sym,
        "strategy": "channel" if channel else "group",
        "group_size": None if channel else spec.group_size,
        "dynamic": False,
    }


def test_config_of_one_grid() -> None:
    spec = QuantSpec(4, 64)
    layers: dict[str, QuantSpec | None] = dict.fromkeys(layers_of(), spec)
    layers["model.layers.1.mlp.down_proj"] = layers["lm_head"] = None
    found = ct.config(spec, layers)
    group = {"targets": ["Linear"], "weights": weights_of(spec), "input_activations": None, "output_activations": None}
    assert found == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["model.layers.1.mlp.down_proj", "lm_head"],
    }
    assert {name: ct.read_config(found).spec(name) for name in layers} == layers
    assert ct.config(spec, dict.fromkeys(layers_of(), spec))["ignore"] == ["lm_head"]
    assert ct.config(spec, {"lm_head": spec})["ignore"] == []
    assert ct.config(spec, layers, dequantize=True)["dequantize"] is True


def test_config_of_several_grids() -> None:
    spec, finer = QuantSpec(4, 64), QuantSpec(8, -1, sym=False)
    layers: dict[str, QuantSpec | None] = dict.fromkeys(layers_of(), spec)
    layers["model.layers.0.mlp.down_proj"] = finer
    layers["model.layers.1.mlp.down_proj"] = None
    for expert in range(2):
        layers[f"model.layers.0.mlp.experts.{expert}.w1"] = finer
        layers[f"model.layers.1.mlp.experts.{expert}.w1"] = finer if expert else spec
    found = ct.config(spec, layers)
    groups = found["config_groups"]
    assert [group["weights"] for group in groups.values()] == [weights_of(spec), weights_of(finer)]
    assert groups["group_0"]["targets"] == [
        *(name for name, grid in layers.items() if grid == spec and "experts" not in name),
        r"re:model\.layers\.1\.mlp\.experts\.0\.w1$",
    ]
    assert groups["group_1"]["targets"] == [
        "model.layers.0.mlp.down_proj",
        r"re:model\.layers\.0\.mlp\.experts\.\d+\.w1$",
        r"re:model\.layers\.1\.mlp\.experts\.1\.w1$",
    ]
    scheme = ct.read_config(found)
    assert {name: scheme.spec(name) for name in layers} == layers
    assert scheme.spec("model.layers.10.self_attn.q_proj") is None  # nothing says what it is
    with pytest.raises(BitternError, match="dequantize: transformers would read all layers by the first of 2 grids"):
        ct.config(spec, layers, dequantize=True)


def llmcompressor() -> dict[str, Any]:
    """What llm-compressor 0.14 writes, as far as it matters."""
    first = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128, "dynamic": False}
    first |= {"actorder": "static", "observer": "memoryless_minmax", "block_structure": None}
    second = {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "channel", "group_size": None}
    return {
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": first, "input_activations": None, "format": "pack-quantized"},
            "group_1": {"targets": ["re:.*down_proj$", "model.layers.0.mlp.up_proj"], "weights": second},
        },
        "format": "pack-quantized",
        "global_compression_ratio": None,
        "ignore": ["lm_head", r"re:.*\.layers\.1\.self_attn\..*"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.17.1",
    }


def test_read_config_of_llmcompressor() -> None:
    found = ct.read_config(llmcompressor())
    assert (found.format, found.default, found.desc_act) == ("compressed-tensors", QuantSpec(4, 128), False)
    assert found.quantizer == ("compressed-tensors:0.17.1",)
    assert found.spec("model.layers.0.self_attn.q_proj") == QuantSpec(4, 128)
    assert found.spec("model.layers.0.mlp.up_proj") == QuantSpec(8, -1, sym=False)
    assert found.spec("model.layers.1.mlp.down_proj") == QuantSpec(8, -1, sym=False)
    assert found.spec("model.layers.1.mlp.up_proj") == QuantSpec(4, 128)
    assert found.spec("model.layers.1.self_attn.q_proj") is None
    assert found.spec("lm_head") is None


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format", "nvfp4-pack-quantized", "format: expected 'pack-quantized', found 'nvfp4-pack-quantized'"),
        ("config_groups.group_1.format", "int-quantized", "format: expected 'pack-quantized', found 'int-quantized'"),
        ("config_groups.group_0.input_activations", {"num_bits": 8}, "bittern quantizes weights alone"),
        ("config_groups.group_0.weights.type", "float", "expected static integers, found 'float"),
        ("config_groups.group_0.weights.num_bits", 5, "config_groups.group_0.weights: bits: expected one of 2, 3, 4"),
        ("config_groups.group_0.weights.strategy", "tensor", "strategy: expected 'group' with a size, or 'channel'"),
        ("config_groups.group_0.weights.group_size", None, "strategy: expected 'group' with a size, or 'channel'"),
        ("config_groups.group_0.weights", None, "config_groups.group_0.weights: expected an object, found None"),
        ("config_groups.group_0.targets", "Linear", "config_groups.group_0.targets: expected a list of names"),
        ("config_groups", {}, "config_groups: expected an object of groups, found {}"),
        ("kv_cache_scheme", {"num_bits": 8}, "kv_cache_scheme: expected none"),
        ("transform_config", {"config_groups": {}}, "transform_config: expected none"),
        ("sparsity_config", {"format": "sparse-bitmask"}, "sparsity_config: expected none"),
        ("ignore", ["re:("], "quantization_config: '(' is no regular expression"),
    ],
)
def test_read_config_refuses(path: str, value: Any, message: str) -> None:
    found = llmcompressor()
    *parents, leaf = path.split(".")
    place = found
    for key in parents:
        place = place[key]
    place[leaf] = value
    with pytest.raises(BitternError, match=re.escape(message)):
        ct.read_config(found)


@pytest.mark.parametrize("size", [[1, 128], {"of": 128}, "128"])
def test_a_size_that_is_no_number_is_refused_without_a_strategy_too(size: Any) -> None:
    found = llmcompressor()
    weights = found["config_groups"]["group_0"]["weights"]
    del weights["strategy"]
    assert ct.read_config(found).default == QuantSpec(4, 128)
    weights["group_size"] = size
    with pytest.raises(BitternError, match=re.escape("expected 'group' with a size, or 'channel', found \"'group' of")):
        ct.read_config(found)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(2, 32), (3, 32), (4, 16), (4, -1), (8, 32)])
def test_the_library_packs_and_unpacks_the_same(bits: int, group: int, sym: bool) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors")
    theirs = pytest.importorskip("compressed_tensors.quantization")
    weight = random_weight(bits, 24, 96, group, sym=sym)
    scheme = theirs.QuantizationScheme(targets=["Linear"], weights=theirs.QuantizationArgs(**weights_of(weight.spec)))
    compressor = compressors.BaseCompressor.get_value_from_registry("pack-quantized")
    packed = ct.pack(weight, torch.float32)
    assert torch.equal(compressor.decompress(packed, scheme)["weight"], weight.dequantize())

    middle = weight.spec.mid_code
    state = {"weight": weight.dequantize(), "weight_scale": weight.scales.float()}
    made = compressor.compress(state | {"weight_zero_point": (weight.zeros.int() - middle).to(torch.int8)}, scheme)
    assert all(torch.equal(packed[suffix], made[suffix]) for suffix in packed)


@pytest.mark.parametrize(
    "specs",
    [
        [QuantSpec(4, 32)],
        [QuantSpec(3, 16)],
        [QuantSpec(8, -1)],
        [QuantSpec(4, 32, sym=False)],
        [QuantSpec(4, 32), QuantSpec(8, -1), QuantSpec(3, 16)],
    ],
    ids=lambda specs: "+".join(f"{spec.bits}{'s' if spec.sym else 'a'}g{spec.group_size}" for spec in specs),
)
def test_transformers_loads_what_is_written(specs: list[QuantSpec], tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    model = tiny.random_model(tie_word_embeddings=False)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    layers: dict[str, QuantSpec | None] = {name: specs[i % len(specs)] for i, name in enumerate(linears)}
    layers["lm_head"] = layers["model.layers.1.mlp.up_proj"] = None
    for name, spec in layers.items():
        if spec is not None:
            weight = round_to_nearest(tensors.pop(f"{name}.weight"), spec)
            tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in ct.pack(weight, torch.float32).items()}
            with torch.no_grad():
                model.get_submodule(name).weight.copy_(weight.dequantize())  # type: ignore[operator]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    found = model.config.to_dict()
    found["quantization_config"] = ct.config(specs[0], layers, dequantize=not specs[0].sym)
    (tmp_path / "config.json").write_text(json.dumps(found))

    with open_checkpoint(tmp_path) as checkpoint:
        artifact = Artifact(checkpoint)
        assert {name: layer.spec for name, layer in artifact.layers.items()} == {
            name: spec for name, spec in layers.items() if spec is not None
        }
        name = "model.layers.0.mlp.down_proj"
        assert torch.equal(artifact.read(name).dequantize(), model.get_submodule(name).weight)  # type: ignore[arg-type]
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        difference = (tiny.read_model(tmp_path)(ids).logits - model(ids).logits).abs().max()
    assert float(difference) < 1e-4
