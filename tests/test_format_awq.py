"""formats.awq against a packer that moves one nibble at a time, literal words, others' configs and lying artifacts."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bittern.errors import BitternError
from bittern.formats import awq, gptq
from bittern.formats.scheme import PackedLayer, Scheme
from bittern.shards import TensorInfo
from bittern.weight import QuantSpec, QuantWeight
from tests.test_format_gptq import assert_same, random_weight


def unpack(tensors: dict[str, Tensor], spec: QuantSpec, out_features: int, in_features: int) -> QuantWeight:
    infos = {f"l.{name}": TensorInfo(f"l.{name}", t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    assert awq.layer_shape("l", infos, spec) == (out_features, in_features)
    return awq.unpack(tensors, PackedLayer(out_features, in_features, spec), Scheme("awq", spec))


def nibbles(row: list[int]) -> list[int]:
    """One row of AWQ words: of eight columns the even ones fill the low half, the odd ones the high half."""
    found = []
    for start in range(0, len(row), 8):
        digits = row[start + 0 : start + 8 : 2] + row[start + 1 : start + 8 : 2]
        word = int("".join(f"{digit:x}" for digit in reversed(digits)), 16)
        found.append(word - 2**32 if word >= 2**31 else word)
    return found


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 6),
    groups=st.integers(1, 4),
    group=st.sampled_from((-1, 16, 32, 64, 128)),
    sym=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_round_trip_and_nibble_by_nibble(rows: int, groups: int, group: int, sym: bool, seed: int) -> None:
    out_features, in_features = 8 * rows, groups * (7 if group == -1 else group)
    weight = random_weight(4, out_features, in_features, group, sym=sym, seed=seed)
    if not sym:  # both ends of the range
        weight.zeros[0, 0], weight.zeros[-1, -1] = 0, 15
    packed = awq.pack(weight)
    expected = {
        "qweight": torch.tensor([nibbles(row) for row in weight.codes.T.tolist()], dtype=torch.int32),
        "qzeros": torch.tensor([nibbles(row) for row in weight.zeros.T.tolist()], dtype=torch.int32),
        "scales": weight.scales.T,
    }
    planned = awq.plan("layer", out_features, in_features, weight.spec)
    assert [info.name for info in planned] == [f"layer.{suffix}" for suffix in packed]
    for info, (suffix, tensor) in zip(planned, packed.items(), strict=True):
        assert torch.equal(tensor, expected[suffix]), suffix
        assert (tuple(tensor.shape), tensor.dtype) == (info.shape, info.dtype)
        assert tensor.is_contiguous()
    assert_same(unpack(packed, weight.spec, out_features, in_features), weight)


def test_golden_word() -> None:
    """Columns 0 to 7 in nibbles 0, 4, 1, 5, 2, 6, 3, 7."""
    plain = random_weight(4, 8, 16, -1, sym=True)
    codes = torch.arange(8, 16, dtype=torch.uint8).unsqueeze(1).repeat(1, 16)
    packed = awq.pack(QuantWeight(codes, plain.scales, plain.zeros, plain.spec))
    assert {f"{word & 0xFFFFFFFF:08x}" for word in packed["qweight"][:, 0].tolist()} == {"fdb9eca8"}
    assert f"{int(packed['qzeros'][0, 0]) & 0xFFFFFFFF:08x}" == "88888888"


@pytest.mark.parametrize("sym", [True, False])
def test_gptq_and_back(sym: bool) -> None:
    weight = random_weight(4, 64, 96, 32, sym=sym)
    before = gptq.pack(weight, checkpoint_format=gptq.V2)
    after = gptq.pack(unpack(awq.pack(weight), weight.spec, 64, 96), checkpoint_format=gptq.V2)
    assert all(torch.equal(before[suffix], after[suffix]) for suffix in before)


def test_symmetric_layers_may_lack_their_zeros() -> None:
    weight = random_weight(4, 16, 64, 32, sym=True)
    packed = awq.pack(weight)
    del packed["qzeros"]
    assert_same(unpack(packed, weight.spec, 16, 64), weight)
    asym = QuantSpec(4, 32, sym=False)
    with pytest.raises(BitternError, match=r"qzeros: expected int32 of shape \(2, 2\), found none"):
        awq.unpack(packed, PackedLayer(16, 64, asym), Scheme("awq", asym))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qweight": None}, "qweight: expected int32 of shape (64, 4), found none"),
        ({"qweight": torch.zeros(64, 5, dtype=torch.int32)}, "qweight: expected int32 of shape (64, 4), found int32"),
        ({"qzeros": torch.zeros(2, 4)}, "qzeros: expected int32 of shape (2, 4), found float32"),
        ({"qzeros": torch.zeros(2, 4, dtype=torch.int32)}, "qzeros: expected 8 everywhere in a symmetric layer"),
        ({"scales": torch.ones(1, 32).half()}, "of shape (2, 32), found float16 of shape (1, 32)"),
        ({"scales": torch.full((2, 32), float("nan")).half()}, "scales: expected finite values"),
    ],
)
def test_refuses_to_read(change: dict[str, Any], message: str) -> None:
    tensors: dict[str, Any] = awq.pack(random_weight(4, 32, 64, 32, sym=True)) | change
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    spec = QuantSpec(4, 32)
    with pytest.raises(BitternError, match=re.escape(message)):
        awq.unpack(present, PackedLayer(32, 64, spec), Scheme("awq", spec))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qweight": (64,)}, "l.qweight: expected two dimensions, found shape (64,)"),
        ({"qzeros": (1, 4)}, "l.qzeros: expected shape (2, 4), found (1, 4)"),
        ({"scales": (2, 31)}, "l.scales: expected shape (2, 32), found (2, 31)"),
        ({"scales": None}, "l.scales: expected shape (2, 32), found none"),
    ],
)
def test_refuses_shapes_that_contradict_the_config(change: dict[str, Any], message: str) -> None:
    spec = QuantSpec(4, 32, sym=False)
    infos = {info.name: info for info in awq.plan("l", 32, 64, spec)}
    for suffix, shape in change.items():
        del infos[f"l.{suffix}"]
        if shape is not None:
            infos[f"l.{suffix}"] = TensorInfo(f"l.{suffix}", torch.int32, shape)
    with pytest.raises(BitternError, match=re.escape(message)):
        awq.layer_shape("l", infos, spec)


def test_refuses_to_write() -> None:
    assert awq.refuse(QuantSpec(4, 128, sym=False)) is None
    assert awq.refuse(QuantSpec(3, 128)) == "AWQ has 4 bits alone, found 3"
    with pytest.raises(BitternError, match="q_proj: AWQ has 4 bits alone, found 8"):
        awq.plan("q_proj", 32, 64, QuantSpec(8, 32))
    with pytest.raises(BitternError, match="q_proj: AWQ's readers take groups of 16, 32, 64, 128 and -1, found 256"):
        awq.plan("q_proj", 32, 512, QuantSpec(4, 256))
    with pytest.raises(BitternError, match="q_proj: AWQ needs out_features divisible by 8, found 33"):
        awq.plan("q_proj", 33, 64, QuantSpec(4, 32))
    with pytest.raises(BitternError, match="q_proj: group_size 64 does not divide in_features 96"):
        awq.plan("q_proj", 32, 96, QuantSpec(4, 64))
    plain = random_weight(4, 32, 64, 32)
    fields: dict[str, Any] = {"codes": plain.codes, "scales": plain.scales, "zeros": plain.zeros, "spec": plain.spec}
    reversed_groups = plain.group_index().flip(0).int()
    for change, message in (
        ({"codes": plain.codes + 16}, "codes: expected at most 15 at 4 bits"),
        ({"scales": torch.full((32, 2), 0.1)}, "scales: expected finite values that float16 holds exactly"),
        ({"g_idx": reversed_groups}, "g_idx: AWQ stores columns in the order of their groups"),
        ({"spec": QuantSpec(4, 32)}, "zeros: expected 8 everywhere in a symmetric layer"),
    ):
        with pytest.raises(BitternError, match=message):
            awq.pack(QuantWeight(**fields | change))


def layers_of() -> dict[str, QuantSpec | None]:
    leaves = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
    return {f"model.layers.{block}.{leaf}": QuantSpec(4, 64) for block in (1, 11) for leaf in leaves}


def test_config() -> None:
    layers = layers_of() | {"model.layers.1.mlp.up_proj": None, "lm_head": None}
    found = awq.config(QuantSpec(4, 64), layers)
    assert found == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 64,
        "zero_point": True,
        "version": "gemm",
        "format": "gemm",
        "modules_to_not_convert": ["model.layers.1.mlp.up_proj", "lm_head"],
        "dynamic": {r"-:^model\.layers\.1\.mlp\.up_proj$": {}, "-:^lm_head$": {}},
        "bittern": {"sym": True},
    }
    read = awq.read_config(found)
    assert read.format == "awq"
    assert {name: read.spec(name) for name in layers} == layers

    asym = QuantSpec(4, 64, sym=False)
    mixed = layers_of() | {"model.layers.1.mlp.up_proj": asym, "lm_head": asym}
    for spec in (asym, QuantSpec(4, 64)):
        found = awq.config(spec, mixed)
        assert (found["modules_to_not_convert"], found["lm_head"]) == (None, True)
        assert {name: awq.read_config(found).spec(name) for name in mixed} == mixed
    assert "bittern" not in awq.config(asym, {"lm_head": asym})


def test_config_refuses() -> None:
    for spec, message in (
        (QuantSpec(8, 64), "model.layers.1.mlp.up_proj: AWQ has 4 bits alone, found 8"),
        (QuantSpec(4, 32), "model.layers.1.mlp.up_proj: AWQ has one group size for all layers, found 32 and 64"),
    ):
        with pytest.raises(BitternError, match=message):
            awq.config(QuantSpec(4, 64), layers_of() | {"model.layers.1.mlp.up_proj": spec})
    with pytest.raises(BitternError, match=r"h\.0\.fc: AWQ's readers would skip h\.0\.fc2 with it"):
        awq.config(QuantSpec(4, 64), {"h.0.fc": None, "h.0.fc2": QuantSpec(4, 64)})


def test_read_config_of_others() -> None:
    autoawq = {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}
    assert awq.read_config(autoawq) == Scheme("awq", QuantSpec(4, 128, sym=False))
    hub = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}
    assert awq.read_config(hub | {"modules_to_not_convert": None}).default == QuantSpec(4, 64, sym=False)
    assert awq.read_config(hub | {"zero_point": False}).default == QuantSpec(4, 64)
    assert awq.read_config(hub | {"dynamic": {"-:.*\\.up_proj$": {}}}).spec("model.layers.0.mlp.up_proj") is None
    skipping = awq.read_config(hub | {"modules_to_not_convert": ["visual", "mlp.gate"]})
    assert skipping.spec("visual.blocks.0.attn.qkv") is None
    assert skipping.spec("model.layers.0.mlp.gate") is None
    assert skipping.spec("model.layers.0.mlp.experts.3.w1") == QuantSpec(4, 64, sym=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method: expected 'awq', found 'gptq'"),
        ({"version": "gemv"}, "version: expected 'gemm', the only layout of AWQ that bittern reads, found 'gemv'"),
        ({"version": "marlin"}, "found 'marlin'"),
        ({"version": "exllama"}, "found 'exllama'"),
        ({"bits": 8}, "bits: expected 4, found 8"),
        ({"group_size": "64"}, "group_size and zero_point: expected an integer and true or false, found ('64', True)"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert: expected a list of names, found 'lm_head'"),
        ({"dynamic": {".*q_proj": {"bits": 8}}}, "dynamic: expected skipped layers alone in AWQ"),
        ({"dynamic": {"-:(": {}}}, "quantization_config: '(' is no regular expression"),
        ({"bittern": {"sym": 1}}, "bittern: expected an object with sym and a list of layers"),
        ({"bittern": []}, "bittern: expected an object with sym and a list of layers, found []"),
    ],
)
def test_read_config_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BitternError, match=re.escape(message)):
        awq.read_config({"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True} | change)


def test_the_config_of_transformers_keeps_every_key_it_knows() -> None:
    from transformers import AwqConfig

    make: Any = AwqConfig.from_dict
    found = make(awq.config(QuantSpec(4, 64), layers_of() | {"lm_head": None}))
    assert (found.bits, found.group_size, found.zero_point, found.format) == (4, 64, True, "gemm")
    assert found.modules_to_not_convert == ["lm_head"]
