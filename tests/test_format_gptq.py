"""formats.gptq against literal bytes, a packer that moves one bit at a time, and lying artifacts."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bittern.errors import BitternError
from bittern.formats import gptq
from bittern.formats.bits import pack_rows, unpack_rows
from bittern.formats.scheme import PackedLayer, Scheme
from bittern.shards import TensorInfo
from bittern.weight import BITS, QuantSpec, QuantWeight


def words_bit_by_bit(values: list[int], bits: int) -> list[int]:
    """Lay the values out as one string of bits, lowest first, and cut it into signed 32-bit words."""
    stream = "".join(format(value, f"0{bits}b")[::-1] for value in values)
    stream += "0" * (-len(stream) % 32)
    unsigned = [int(stream[i : i + 32][::-1], 2) for i in range(0, len(stream), 32)]
    return [word - 2**32 if word >= 2**31 else word for word in unsigned]


def packed_bit_by_bit(weight: QuantWeight, zero_offset: int) -> dict[str, Tensor]:
    """All four tensors, column by column and row by row."""
    bits = weight.spec.bits
    columns = [words_bit_by_bit(row.tolist(), bits) for row in weight.codes]
    zeros = [words_bit_by_bit((group.int() - zero_offset).tolist(), bits) for group in weight.zeros.T]
    size = weight.spec.columns_per_group(weight.in_features)
    return {
        "qweight": torch.tensor(columns, dtype=torch.int32).T,
        "qzeros": torch.tensor(zeros, dtype=torch.int32),
        "scales": weight.scales.T.half(),
        "g_idx": torch.tensor([i // size for i in range(weight.in_features)], dtype=torch.int32),
    }


def random_weight(
    bits: int,
    out_features: int,
    in_features: int,
    group_size: int,
    *,
    sym: bool = False,
    lowest: int = 0,
    seed: int = 0,
) -> QuantWeight:
    generator = torch.Generator().manual_seed(seed)
    spec = QuantSpec(bits, group_size, sym)
    shape = (out_features, spec.groups(in_features))
    zeros = torch.randint(lowest, 2**bits, shape, generator=generator, dtype=torch.uint8)
    return QuantWeight(
        codes=torch.randint(0, 2**bits, (out_features, in_features), generator=generator, dtype=torch.uint8),
        scales=torch.randn(shape, generator=generator).half(),
        zeros=torch.full_like(zeros, spec.mid_code) if sym else zeros,
        spec=spec,
    )


def assert_same(found: QuantWeight, expected: QuantWeight) -> None:
    assert found.spec == expected.spec
    for name in ("codes", "scales", "zeros"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    if found.g_idx is None or expected.g_idx is None:
        assert found.g_idx is expected.g_idx
    else:
        assert torch.equal(found.g_idx, expected.g_idx)


# Worked out on paper: the values 0, 1, 2, ... modulo 2**bits, 32 of them.
GOLDEN = {
    2: ["e4e4e4e4", "e4e4e4e4"],
    3: ["88fac688", "c688fac6", "fac688fa"],
    4: ["76543210", "fedcba98", "76543210", "fedcba98"],
    8: ["03020100", "07060504", "0b0a0908", "0f0e0d0c", "13121110", "17161514", "1b1a1918", "1f1e1d1c"],
}


@pytest.mark.parametrize("bits", BITS)
def test_golden_words(bits: int) -> None:
    values = (torch.arange(32) % 2**bits).to(torch.uint8).unsqueeze(1)
    words = pack_rows(values, bits)
    assert [f"{word & 0xFFFFFFFF:08x}" for word in words[:, 0].tolist()] == GOLDEN[bits]
    assert torch.equal(unpack_rows(words, bits, 32), values)


def test_three_bit_values_10_and_21_straddle_words() -> None:
    for lane, expected in ((10, ["c0000000", "00000001", "00000000"]), (21, ["00000000", "80000000", "00000003"])):
        values = torch.zeros(32, 1, dtype=torch.uint8)
        values[lane] = 7
        words = pack_rows(values, 3)
        assert [f"{word & 0xFFFFFFFF:08x}" for word in words[:, 0].tolist()] == expected


def test_golden_zeros_of_a_symmetric_layer() -> None:
    """The constants that every published symmetric v1 artifact holds: 2**(bits-1) - 1 in each field."""
    for bits, expected in ((2, "55555555"), (4, "77777777"), (8, "7f7f7f7f")):
        packed = gptq.pack(random_weight(bits, 32, 32, -1, sym=True), checkpoint_format="gptq")
        assert {f"{word & 0xFFFFFFFF:08x}" for word in packed["qzeros"].flatten().tolist()} == {expected}
    packed = gptq.pack(random_weight(3, 32, 32, -1, sym=True), checkpoint_format="gptq")
    assert [f"{word & 0xFFFFFFFF:08x}" for word in packed["qzeros"][0].tolist()] == ["db6db6db", "b6db6db6", "6db6db6d"]


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    rows=st.integers(1, 4),
    columns=st.integers(1, 6),
    group=st.sampled_from((-1, 8, 16, 32, 64, 128)),
    version=st.sampled_from((gptq.V1, gptq.V2)),
    sym=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_round_trip_and_bit_by_bit(
    bits: int, rows: int, columns: int, group: int, version: str, sym: bool, seed: int
) -> None:
    in_features, out_features = 32 * columns, 32 * rows
    if group >= in_features or in_features % group:
        group = -1
    lowest = 1 if version == gptq.V1 else 0
    weight = random_weight(bits, out_features, in_features, group, sym=sym, lowest=lowest, seed=seed)
    if not sym:  # both ends of the range
        weight.zeros[0, 0], weight.zeros[-1, -1] = lowest, weight.spec.max_code
    packed = gptq.pack(weight, checkpoint_format=version)
    expected = packed_bit_by_bit(weight, zero_offset=lowest)
    planned = gptq.plan("layer", out_features, in_features, weight.spec)
    assert [info.name for info in planned] == [f"layer.{suffix}" for suffix in packed]
    for info, (suffix, tensor) in zip(planned, packed.items(), strict=True):
        assert torch.equal(tensor, expected[suffix]), suffix
        assert (tuple(tensor.shape), tensor.dtype) == (info.shape, info.dtype)
        assert tensor.is_contiguous()
    assert_same(unpack(packed, weight.spec, in_features, version), weight)


@pytest.mark.parametrize("bits", BITS)
def test_reads_sizes_that_do_not_fill_the_last_word(bits: int) -> None:
    """Never written here, but the layout's ceil() allows them."""
    weight = random_weight(bits, 5, 43, -1)
    tensors = packed_bit_by_bit(weight, zero_offset=0)
    assert_same(unpack(tensors, weight.spec, 43, gptq.V2), weight)


def test_act_order_keeps_its_g_idx() -> None:
    plain = random_weight(4, 32, 96, 32)
    permuted = plain.group_index()[torch.randperm(96, generator=torch.Generator().manual_seed(1))].int()
    weight = QuantWeight(plain.codes, plain.scales, plain.zeros, plain.spec, permuted)
    packed = gptq.pack(weight, checkpoint_format=gptq.V2)
    found = unpack(packed, weight.spec, 96, gptq.V2)
    assert_same(found, weight)
    one_by_one = torch.empty(32, 96)
    for row in range(32):
        for column in range(96):
            group = permuted[column]
            step = float(weight.scales[row, group])
            one_by_one[row, column] = step * (int(weight.codes[row, column]) - int(weight.zeros[row, group]))
    assert torch.equal(found.dequantize(), one_by_one)


def test_last_group_may_be_short_when_reading() -> None:
    weight = random_weight(4, 32, 80, 32)
    tensors = packed_bit_by_bit(weight, zero_offset=0)
    found = unpack(tensors, weight.spec, 80, gptq.V2)
    assert found.spec.group_size == 32
    assert torch.equal(found.dequantize(), weight.dequantize())


def test_g_idx_may_be_missing_and_scales_may_be_bfloat16() -> None:
    weight = random_weight(4, 32, 64, 32)
    packed = gptq.pack(weight, checkpoint_format=gptq.V2)
    del packed["g_idx"]
    assert_same(unpack(packed, weight.spec, 64, gptq.V2), weight)
    packed["scales"] = packed["scales"].bfloat16()
    found = unpack(packed, weight.spec, 64, gptq.V2)
    assert found.scales.dtype == torch.float32
    assert torch.equal(found.scales, packed["scales"].T.float())


def test_last_group_may_be_short_without_a_g_idx() -> None:
    """Though the number of groups divides the columns: 160 are 128 and 32, not twice 80."""
    weight = random_weight(4, 32, 160, 128)
    tensors = packed_bit_by_bit(weight, zero_offset=0)
    del tensors["g_idx"]
    found = unpack(tensors, weight.spec, 160, gptq.V2)
    assert found.spec.group_size == 128
    assert torch.equal(found.dequantize(), weight.dequantize())


def test_act_order_of_some_layers_is_act_order() -> None:
    base = {"bits": 4, "group_size": 32, "desc_act": False}
    assert not gptq.read_config(base | {"dynamic": {"+:a": {"bits": 8}, "-:b": {}}}).any_desc_act
    some = gptq.read_config(base | {"dynamic": {"-:b": {}, "+:a": {"desc_act": True}}})
    assert some.any_desc_act and [some.permuted(layer) for layer in ("a", "b", "c")] == [True, False, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": torch.full((32, 64), 16, dtype=torch.uint8)}, "codes: expected at most 15 at 4 bits, found 16"),
        ({"scales": torch.full((32, 2), 1e6)}, "scales: expected finite values that float16 holds exactly"),
        ({"scales": torch.full((32, 2), 0.1)}, "scales: expected finite values that float16 holds exactly"),
        ({"scales": torch.full((32, 2), float("nan"))}, "scales: expected finite values that float16 holds exactly"),
        ({"zeros": torch.zeros(32, 2, dtype=torch.uint8)}, "zeros: 'gptq' cannot store a zero of 0"),
    ],
)
def test_refuses_to_write(change: dict[str, Tensor], message: str) -> None:
    plain = random_weight(4, 32, 64, 32, lowest=1)
    fields = {"codes": plain.codes, "scales": plain.scales, "zeros": plain.zeros} | change
    with pytest.raises(BitternError, match=message):
        gptq.pack(QuantWeight(**fields, spec=plain.spec), checkpoint_format=gptq.V1)


@pytest.mark.parametrize(
    ("out_features", "in_features", "group_size", "message"),
    [
        (32, 48, -1, "q_proj: .* divisible by 32, found 48 and 32"),
        (33, 64, -1, "q_proj: .* divisible by 32, found 64 and 33"),
        (32, 96, 64, "q_proj: group_size 64 does not divide in_features 96"),
    ],
)
def test_refuses_to_plan(out_features: int, in_features: int, group_size: int, message: str) -> None:
    with pytest.raises(BitternError, match=message):
        gptq.plan("q_proj", out_features, in_features, QuantSpec(4, group_size))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qweight": None}, "qweight: expected a tensor of two dimensions, found none"),
        ({"qweight": torch.zeros(9, 32, dtype=torch.int32)}, r"qweight: expected shape \(8, 32\), found \(9, 32\)"),
        ({"qweight": torch.zeros(8, 32)}, "qweight: expected int32, found torch.float32"),
        ({"qweight": torch.zeros(8, 64, dtype=torch.int32)}, r"qzeros: expected shape \(2, 8\), found \(2, 4\)"),
        ({"qzeros": torch.zeros(2, 5, dtype=torch.int32)}, r"qzeros: expected shape \(2, 4\), found \(2, 5\)"),
        ({"scales": torch.ones(2, 31).half()}, r"scales: expected shape \(2, 32\), found \(2, 31\)"),
        ({"scales": torch.full((2, 32), float("inf")).half()}, "scales: expected finite"),
        ({"scales": torch.ones(2, 32, dtype=torch.int32)}, "scales: expected finite floats, found torch.int32"),
        ({"g_idx": torch.zeros(64, dtype=torch.int32)}, "g_idx: puts 64 columns in one of the 2 groups"),
        ({"g_idx": torch.full((64,), 2, dtype=torch.int32)}, "g_idx: expected groups 0 to 1, found 2 to 2"),
        ({"g_idx": torch.full((64,), -1, dtype=torch.int32)}, "g_idx: expected groups 0 to 1, found -1 to -1"),
        (
            {"g_idx": (torch.arange(64) >= 31).int()},
            "g_idx: expected each of 2 groups for 33 columns, found another number",
        ),
        ({"g_idx": torch.zeros(63, dtype=torch.int32)}, "g_idx: expected int32 of shape .64,., found int32 of shape"),
        ({"qzeros": torch.full((2, 4), -1, dtype=torch.int32)}, "qzeros: found a stored 15, which readers"),
        ({"qzeros": torch.zeros(2, 4, dtype=torch.int32)}, "qzeros: expected 8 everywhere in a symmetric 'gptq'"),
    ],
)
def test_refuses_to_read(change: dict[str, Any], message: str) -> None:
    tensors: dict[str, Any] = gptq.pack(random_weight(4, 32, 64, 32, sym=True), checkpoint_format=gptq.V1) | change
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    with pytest.raises(BitternError, match=message):
        unpack(present, QuantSpec(4, 32), 64, gptq.V1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qweight": (9, 32)}, r"l\.qweight: expected 8 rows \(64 columns of 4 bits\), found 9"),
        ({"qweight": (8,)}, r"l\.qweight: expected a tensor of two dimensions, found shape \(8,\)"),
        ({"scales": None}, r"l\.scales: expected a tensor of two dimensions, found none"),
        ({"qzeros": (2, 5)}, r"l\.qzeros: expected shape \(2, 4\), found \(2, 5\)"),
        ({"g_idx": (64, 1)}, r"l\.g_idx: expected one dimension, found shape \(64, 1\)"),
        ({"g_idx": (96,)}, r"l\.qweight: expected 12 rows \(96 columns of 4 bits\), found 8"),
    ],
)
def test_refuses_shapes_that_contradict_the_config(change: dict[str, Any], message: str) -> None:
    good = {info.name: info for info in gptq.plan("l", 32, 64, QuantSpec(4, 32))}
    assert gptq.layer_shape("l", good, QuantSpec(4, 32)) == (32, 64)
    for suffix, shape in change.items():
        name = f"l.{suffix}"
        good.pop(name)
        if shape is not None:
            good[name] = TensorInfo(name, torch.int32, shape)
    with pytest.raises(BitternError, match=message):
        gptq.layer_shape("l", good, QuantSpec(4, 32))


def test_a_wrong_checkpoint_format_shows_in_symmetric_zeros() -> None:
    packed = gptq.pack(random_weight(4, 32, 64, 32, sym=True), checkpoint_format=gptq.V1)
    with pytest.raises(BitternError, match="expected 8 everywhere in a symmetric 'gptq_v2' layer, found 7"):
        unpack(packed, QuantSpec(4, 32), 64, gptq.V2)
    with pytest.raises(BitternError, match="checkpoint_format: expected 'gptq' or 'gptq_v2', found 'marlin'"):
        unpack(packed, QuantSpec(4, 32), 64, "marlin")


def unpack(tensors: dict[str, Tensor], grid: QuantSpec, in_features: int, version: str) -> QuantWeight:
    """The layer as a config that states ``grid`` describes it."""
    layer = PackedLayer(tensors["qweight"].shape[1] if "qweight" in tensors else 32, in_features, grid)
    return gptq.unpack(tensors, layer, Scheme(version, grid))


def layers_of(*, blocks: int = 2) -> list[str]:
    leaves = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj")
    return [f"model.layers.{block}.{leaf}" for block in range(blocks) for leaf in leaves]


def test_config_of_a_uniform_model() -> None:
    spec = QuantSpec(4, 64)
    layers: dict[str, QuantSpec | None] = dict.fromkeys(layers_of(), spec)
    layers["lm_head"] = None
    found = gptq.config(spec, checkpoint_format="gptq", damp_percent=0.02, layers=layers)
    quantizer = found.pop("meta")["quantizer"]
    assert re.fullmatch(r"bittern:\d+\.\d+\.\d+", quantizer[0]) and len(quantizer) == 1
    assert found == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 64,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "format": "gptq",
        "damp_percent": 0.02,
        "true_sequential": False,
        "static_groups": True,
        "pack_dtype": "int32",
    }


def test_config_of_mixed_and_skipped_layers() -> None:
    spec, finer = QuantSpec(4, 64), QuantSpec(8, 32)
    layers: dict[str, QuantSpec | None] = dict.fromkeys(layers_of(), spec)
    for leaf in ("q_proj", "k_proj", "v_proj"):
        layers[f"model.layers.0.self_attn.{leaf}"] = finer
    layers["model.layers.1.self_attn.q_proj"] = finer
    layers["model.layers.1.mlp.up_proj"] = None
    layers["model.layers.0.self_attn.o_proj"] = layers["model.layers.1.self_attn.o_proj"] = None
    found = gptq.config(spec, checkpoint_format="gptq", layers=layers)

    eight = {"bits": 8, "group_size": 32, "sym": True}
    assert found["dynamic"] == {
        r"+:^model\.layers\.0\.self_attn\.(q_proj|k_proj|v_proj|qkv_proj)$": eight,
        r"-:^model\.layers\.0\.self_attn\.(o_proj)$": {},
        r"+:^model\.layers\.1\.self_attn\.(q_proj)$": eight,
        r"-:^model\.layers\.1\.self_attn\.(o_proj)$": {},
        r"-:^model\.layers\.1\.mlp\.(up_proj)$": {},
    }
    kept = found["modules_in_block_to_quantize"]
    assert kept == [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "model.layers.0.mlp.up_proj"]]
    # As optimum applies it: a layer stays when its name ends with one of them.
    assert {name for name in layers if any(name.endswith(end) for end in kept[0])} == {
        name for name, grid in layers.items() if grid is not None
    }
    read = gptq.read_config(found)
    assert {name: read.spec(name) for name in layers} == layers
    assert read.spec("model.layers.10.self_attn.q_proj") == spec


def test_config_refuses() -> None:
    asym = QuantSpec(4, 64, sym=False)
    with pytest.raises(BitternError, match="asymmetric layers need 'gptq_v2', found 'gptq'"):
        gptq.config(QuantSpec(4, 64), checkpoint_format="gptq", layers={"model.layers.0.fc": asym})
    with pytest.raises(BitternError, match="damp_percent: expected a value between 0 and 1"):
        gptq.config(asym, checkpoint_format="gptq_v2", layers={}, damp_percent=1.5)


def test_read_config_of_other_tools() -> None:
    autogptq = {"bits": 4, "group_size": 128, "damp_percent": 0.01, "desc_act": True, "sym": False}
    assert gptq.read_config(autogptq) == Scheme("gptq", QuantSpec(4, 128, sym=False), desc_act=True)
    gptqmodel = {
        "bits": 3,
        "group_size": -1,
        "desc_act": False,
        "sym": True,
        "quant_method": "gptq",
        "format": "gptq_v2",
        "checkpoint_format": "gptq_v2",
        "meta": {"quantizer": ["gptqmodel:7.7.0"]},
        "dynamic": {r"-:.*down_proj": {}, r".*\.q_proj$": {"bits": 8}},
    }
    found = gptq.read_config(gptqmodel)
    assert (found.default, found.format) == (QuantSpec(3, -1), "gptq_v2")
    assert found.quantizer == ("gptqmodel:7.7.0",)
    assert found.spec("model.layers.0.mlp.down_proj") is None
    assert found.spec("model.layers.0.self_attn.q_proj") == QuantSpec(8, -1)
    assert found.spec("model.layers.0.self_attn.o_proj") == QuantSpec(3, -1)


@pytest.mark.parametrize("other", [QuantSpec(8, 32), None])
@pytest.mark.parametrize(
    ("layer", "single"),
    [("{}.up_proj", r"0\.(up_proj)"), ("up_proj.{}", r"up_proj\.(0)")],
    ids=["own", "in one tensor"],
)
def test_experts_that_are_alike_have_a_pattern_that_their_module_matches(
    layer: str, single: str, other: QuantSpec | None
) -> None:
    """vLLM asks for the module of all experts, GPTQModel for each layer; both by re.match."""
    four = QuantSpec(4, 32)
    names = [f"model.layers.{block}.mlp.experts.{layer.format(n)}" for block in (0, 1, 10) for n in (0, 1)]
    layers = dict.fromkeys(names, four) | dict.fromkeys(names[:2], other) | {names[2]: other}
    layers |= {"model.layers.0.mlp.experts_gate": four}
    found = gptq.config(four, checkpoint_format="gptq", layers=layers)
    patterns = {key[2:]: values for key, values in found["dynamic"].items()}
    assert list(patterns) == [
        r"^model\.layers\.0\.mlp\.experts(\.|$)",
        rf"^model\.layers\.1\.mlp\.experts\.{single}$",
    ]
    asked = [*layers, *(f"model.layers.{block}.mlp.experts" for block in (0, 1, 10))]
    matched = {name for name in asked if any(re.match(pattern, name) for pattern in patterns)}
    assert matched == {*names[:3], "model.layers.0.mlp.experts"}
    read = gptq.read_config(found)
    assert {name: read.spec(name) for name in layers} == layers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "awq"}, "quant_method: expected 'gptq', found 'awq'"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format: expected 'gptq' or 'gptq_v2', found 'marlin'"),
        ({"is_marlin_format": True}, "checkpoint_format: expected 'gptq' or 'gptq_v2', found 'marlin'"),
        ({"pack_dtype": "int64"}, "pack_dtype: expected 'int32', found 'int64'"),
        ({"bits": "4"}, "bits: expected int, found '4'"),
        ({"sym": 1}, "sym: expected bool, found 1"),
        ({"dynamic": {"-:(": {}}}, "quantization_config: '\\(' is no regular expression"),
    ],
)
def test_read_config_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BitternError, match=message):
        gptq.read_config({"bits": 4, "group_size": 32, "sym": True} | change)


def test_read_config_needs_bits() -> None:
    with pytest.raises(BitternError, match="bits: expected int, found None"):
        gptq.read_config({"group_size": 32})
