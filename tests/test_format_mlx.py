"""formats.mlx against a packer that moves one bit at a time, mlx and mlx-lm themselves, and lying artifacts."""

from __future__ import annotations

import json
import re
from fractions import Fraction
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
from bittern.formats import gptq, mlx
from bittern.formats.scheme import PackedLayer, Scheme
from bittern.shards import TensorInfo
from bittern.weight import BITS, QuantSpec, QuantWeight, round_to_nearest
from tests import tiny
from tests.test_format_gptq import assert_same, random_weight, words_bit_by_bit


def unpack(tensors: dict[str, Tensor], spec: QuantSpec, out_features: int, in_features: int) -> QuantWeight:
    infos = {f"l.{name}": TensorInfo(f"l.{name}", t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    assert mlx.layer_shape("l", infos, spec) == (out_features, in_features)
    return mlx.unpack(tensors, PackedLayer(out_features, in_features, spec), Scheme("mlx", spec))


def half(weight: QuantWeight) -> QuantWeight:
    return QuantWeight(weight.codes, weight.scales.half(), weight.zeros, weight.spec, weight.g_idx)


@settings(max_examples=80, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    out_features=st.integers(1, 40),
    groups=st.integers(1, 3),
    group=st.sampled_from((-1, 32, 64, 96, 128, 256)),
    sym=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_round_trip_and_bit_by_bit(bits: int, out_features: int, groups: int, group: int, sym: bool, seed: int) -> None:
    in_features = groups * (32 if group == -1 else group)
    weight = random_weight(bits, out_features, in_features, group, sym=sym, seed=seed)
    if not sym:  # both ends of the range
        weight.zeros[0, 0], weight.zeros[-1, -1] = 0, weight.spec.max_code
    dtype = torch.float16 if sym else torch.float32
    assert mlx.refuse(weight.spec, dtype) is None
    packed = mlx.pack(weight, dtype)
    assert mlx.rounding(weight, dtype) == 0.0

    rows = [words_bit_by_bit(row.tolist(), bits) for row in weight.codes]
    assert torch.equal(packed["weight"].view(torch.int32), torch.tensor(rows, dtype=torch.int32))
    block = {-1: 32, 96: 32, 256: 128}.get(group, group)
    for name, one in (
        ("scales", weight.scales.double()),
        ("biases", -(weight.zeros.double() * weight.scales.double())),
    ):
        for column in range(0, in_features, block):
            of = one[:, column // weight.spec.columns_per_group(in_features)]
            assert torch.equal(packed[name][:, column // block].double(), of), name
    planned = mlx.plan("layer", out_features, in_features, weight.spec, dtype)
    assert [info.name for info in planned] == [f"layer.{suffix}" for suffix in packed]
    for info, tensor in zip(planned, packed.values(), strict=True):
        assert (tuple(tensor.shape), tensor.dtype, tensor.is_contiguous()) == (info.shape, info.dtype, True)
    assert_same(half(unpack(packed, weight.spec, out_features, in_features)), weight)


@pytest.mark.parametrize("group", [-1, 64, 256])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_gptq_and_back(bits: int, sym: bool, group: int) -> None:
    weight = random_weight(bits, 64, 512, group, sym=sym)
    before = gptq.pack(weight, checkpoint_format=gptq.V2)
    packed = mlx.pack(weight, torch.float16 if sym else torch.float32)
    after = gptq.pack(unpack(packed, weight.spec, 64, 512), checkpoint_format=gptq.V2)
    assert all(torch.equal(before[suffix], after[suffix]) for suffix in before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", BITS)
def test_what_is_rounded_is_refused_or_measured(bits: int, dtype: torch.dtype) -> None:
    plain = random_weight(bits, 16, 128, 64)
    weight = QuantWeight(plain.codes, plain.scales.bfloat16().float(), plain.zeros, plain.spec)
    name = str(dtype).removeprefix("torch.")
    assert f"{name} rounds" in str(mlx.refuse(weight.spec, dtype))
    packed = mlx.pack(weight, dtype, exact=False)

    worst = Fraction(0)  # in exact arithmetic, over both ends of the codes
    for row in range(16):
        for group in range(2):
            scale = Fraction(float(weight.scales[row, group]))
            bias = Fraction(float(packed["biases"][row, group]))
            worst = max(worst, abs((bias + int(weight.zeros[row, group]) * scale) / scale))
    assert mlx.rounding(weight, dtype) == pytest.approx(float(worst), rel=1e-9)
    if worst == 0:
        mlx.pack(weight, dtype)
    else:
        with pytest.raises(BitternError, match=f"biases: {name} rounds -zero . scale; float32"):
            mlx.pack(weight, dtype)
    if worst < 1 / 8:
        assert_same(unpack(packed, weight.spec, 16, 128), half(weight) if dtype == torch.float16 else weight)


def test_rounded_scales_are_measured_too() -> None:
    weight = QuantWeight(
        torch.zeros(1, 32, dtype=torch.uint8),
        torch.tensor([[1 + 2.0**-12]]),
        torch.full((1, 1), 8, dtype=torch.uint8),
        QuantSpec(4, 32),
    )
    with pytest.raises(BitternError, match="scales: expected finite values that float16 holds exactly"):
        mlx.pack(weight, torch.float16)
    assert mlx.rounding(weight, torch.float16) == pytest.approx(8 * 2.0**-12, rel=1e-3)
    assert mlx.rounding(weight, torch.float32) == 0
    assert float(mlx.pack(weight, torch.float16, exact=False)["biases"]) == -8


def test_what_float32_rounds_has_another_hint() -> None:
    codes, zeros = torch.zeros(1, 32, dtype=torch.uint8), torch.full((1, 1), 7, dtype=torch.uint8)
    weight = QuantWeight(codes, torch.tensor([[1 + 2.0**-23]]), zeros, QuantSpec(4, 32, sym=False))
    with pytest.raises(BitternError, match=r"^biases: float32 rounds -zero \* scale; --allow-inexact lets it$"):
        mlx.pack(weight, torch.float32)
    assert mlx.pack(weight, torch.float32, exact=False)["biases"].dtype == torch.float32


def test_refuses_to_write() -> None:
    assert mlx.refuse(QuantSpec(4, 16), torch.float16) == (
        "MLX has groups of 32, 64 and 128, and their multiples by repeating; found 16"
    )
    with pytest.raises(BitternError, match=r"q_proj: MLX has groups of 32, 64 and 128, .* found 16"):
        mlx.plan("q_proj", 32, 64, QuantSpec(4, 16))
    for in_features, group in ((48, -1), (96, 64), (384, 256)):
        with pytest.raises(BitternError, match=f"q_proj: MLX needs in_features divisible by .* found {in_features}"):
            mlx.plan("q_proj", 32, in_features, QuantSpec(4, group))
    with pytest.raises(BitternError, match="dtype: expected float16, bfloat16 or float32"):
        mlx.plan("q_proj", 32, 64, QuantSpec(4, 64), torch.float64)
    plain = random_weight(4, 32, 64, 32)
    fields: dict[str, Any] = {"codes": plain.codes, "scales": plain.scales, "zeros": plain.zeros, "spec": plain.spec}
    for change, message in (
        ({"codes": plain.codes + 16}, "codes: expected at most 15 at 4 bits"),
        ({"zeros": plain.zeros + 16}, "zeros: expected at most 15 at 4 bits"),
        ({"g_idx": plain.group_index().flip(0).int()}, "g_idx: MLX stores columns in the order of their groups"),
        ({"spec": QuantSpec(4, 32)}, "zeros: expected 8 everywhere in a symmetric layer"),
        ({"scales": torch.zeros(32, 2)}, "scales: expected none of 0, beside which MLX cannot store a zero"),
    ):
        with pytest.raises(BitternError, match=message):
            mlx.pack(QuantWeight(**fields | change), torch.float32)
    big = QuantWeight(plain.codes, torch.full((32, 2), 60000.0), plain.zeros | 8, plain.spec)
    with pytest.raises(BitternError, match="biases: expected values that float16 holds, found larger ones"):
        mlx.pack(big, torch.float16, exact=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(32, 8, dtype=torch.int32)}, "weight: expected uint32 of shape (32, 8), found int32"),
        ({"scales": torch.ones(32, 3)}, "biases: expected float32 of shape (32, 3), found float16 of shape (32, 2)"),
        ({"biases": None}, "biases: expected float16 of shape (32, 2), found none"),
        ({"biases": torch.full((32, 2), float("inf")).half()}, "biases: expected finite values"),
        ({"biases": torch.full((32, 2), 1e4).half()}, "biases: expected -zero * scale with an integer zero from 0 to"),
        ({"biases": torch.zeros(32, 2).half()}, "biases: expected 8 everywhere in a symmetric layer, found 0"),
    ],
)
def test_refuses_to_read(change: dict[str, Any], message: str) -> None:
    tensors: dict[str, Any] = mlx.pack(random_weight(4, 32, 64, 32, sym=True)) | change
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    spec = QuantSpec(4, 32)
    with pytest.raises(BitternError, match=re.escape(message)):
        mlx.unpack(present, PackedLayer(32, 64, spec), Scheme("mlx", spec))


def test_refuses_biases_between_two_zeros_and_unequal_blocks() -> None:
    spec = QuantSpec(4, 64, sym=False)
    packed = mlx.pack(random_weight(4, 8, 64, 64), torch.float32)
    packed["biases"] = -2.5 * packed["scales"]
    with pytest.raises(BitternError, match=r"found a zero of 2\.5; such a layer is no integer grid: mlx_lm"):
        unpack(packed, spec, 8, 64)
    row = QuantSpec(4, -1)
    packed = mlx.pack(random_weight(4, 8, 64, -1, sym=True))
    packed["scales"][3, 1] *= 2
    with pytest.raises(BitternError, match="scales: expected the same value in all blocks of one of the 1 groups"):
        unpack(packed, row, 8, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": (32, 7)}, "l.weight: expected rows of whole 3-bit blocks, found 7 words"),
        ({"weight": (32,)}, "l.weight: expected two dimensions, found shape (32,)"),
        ({"biases": (32, 1)}, "l.biases: expected shape (32, 2), found (32, 1)"),
        ({"scales": (32, 4), "biases": (32, 4)}, "l.scales: expected groups of 32, 64 or 128 that make up 32 of 64"),
        ({"scales": (32, 1), "biases": (32, 1)}, "l.scales: expected groups of 32, 64 or 128 that make up 32 of 64"),
    ],
)
def test_refuses_shapes_that_contradict_the_config(change: dict[str, tuple[int, ...]], message: str) -> None:
    spec = QuantSpec(3, 32)
    infos = {info.name: info for info in mlx.plan("l", 32, 64, spec)}
    infos |= {f"l.{suffix}": TensorInfo(f"l.{suffix}", torch.float16, shape) for suffix, shape in change.items()}
    with pytest.raises(BitternError, match=re.escape(message)):
        mlx.layer_shape("l", infos, spec)


def test_packed_layers_are_those_with_all_three_tensors() -> None:
    names = ["a.weight", "a.scales", "a.biases", "a.bias", "b.weight", "b.bias", "c.qweight", "c.scales", "d.biases"]
    embedding = [f"model.embed_tokens.{suffix}" for suffix in ("biases", "scales", "weight")]
    assert mlx.packed_layers(iter([*names, *embedding])) == ["a", "model.embed_tokens"]


def test_config() -> None:
    spec = QuantSpec(4, 256)
    layers: dict[str, QuantSpec | None] = {
        "model.layers.0.self_attn.q_proj": spec,
        "model.layers.0.self_attn.k_proj": QuantSpec(4, 128),
        "model.layers.0.self_attn.v_proj": QuantSpec(4, 256, sym=False),
        "model.layers.0.mlp.up_proj": QuantSpec(8, -1),
        "model.layers.0.mlp.down_proj": None,
        "lm_head": None,
    }
    found = mlx.config(spec, layers)
    assert {key: value for key, value in found.items() if key != "bittern"} == {
        "group_size": 128,
        "bits": 4,
        "mode": "affine",
        "model.layers.0.mlp.up_proj": {"group_size": 32, "bits": 8, "mode": "affine"},
        "model.layers.0.mlp.down_proj": False,
        "lm_head": False,
    }
    read = mlx.read_config(json.loads(json.dumps(found)))
    assert read.format == "mlx"
    assert {name: read.spec(name) for name in layers} == layers
    with pytest.raises(BitternError, match=r"q_proj: MLX has groups of 32, 64 and 128"):
        mlx.config(spec, {"q_proj": QuantSpec(4, 16)})


def test_read_config_of_mlx_lm() -> None:
    found = mlx.read_config(
        {
            "group_size": 64,
            "bits": 4,
            "mode": "affine",
            "model.layers.0.mlp.up_proj": {"group_size": 32, "bits": 8, "mode": "affine"},
            "model.layers.1.mlp.up_proj": False,
        }
    )
    assert found.default == QuantSpec(4, 64, sym=False)
    assert found.spec("model.layers.0.mlp.up_proj") == QuantSpec(8, 32, sym=False)
    assert found.spec("model.layers.1.mlp.up_proj") is None
    assert found.spec("model.layers.0.mlp.up_projection") == QuantSpec(4, 64, sym=False)
    assert mlx.read_config({"group_size": 64, "bits": 4}).default == QuantSpec(4, 64, sym=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "mxfp4"}, "mode: expected 'affine', found 'mxfp4'"),
        ({"l": {"group_size": 16, "bits": 4, "mode": "nvfp4"}}, "l.mode: expected 'affine', found 'nvfp4'"),
        ({"bits": 6}, "bits: expected one of 2, 3, 4, 8, found 6"),
        ({"bits": None}, "bits and group_size: expected integers, found (None, 64)"),
        ({"l": {"bits": 4}}, "l.bits and group_size: expected integers, found (4, None)"),
        ({"bittern": 1}, "bittern: expected an object, found 1"),
    ],
)
def test_read_config_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BitternError, match=re.escape(message)):
        mlx.read_config({"group_size": 64, "bits": 4} | change)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_mlx_dequantizes_the_same(bits: int, sym: bool, tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core")
    weight = random_weight(bits, 24, 256, -1 if sym else 128, sym=sym)
    weight = QuantWeight(weight.codes, weight.scales.float(), weight.zeros, weight.spec)
    save_file(mlx.pack(weight, torch.float32), tmp_path / "l.safetensors", {"format": "mlx"})
    stored = mx.load(str(tmp_path / "l.safetensors"))
    floats = mx.dequantize(
        stored["weight"], stored["scales"], stored["biases"], group_size=32 if sym else 128, bits=bits
    )
    # mlx adds the bias to scale * code, and rounds in between.
    assert torch.allclose(torch.tensor(floats.tolist()), weight.dequantize(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("bits", BITS)
def test_reads_what_mlx_quantizes(bits: int, name: str) -> None:
    mx = pytest.importorskip("mlx.core")
    values = torch.randn(32, 256, generator=torch.Generator().manual_seed(0)) * 0.05
    made = mx.quantize(mx.array(values.tolist()).astype(getattr(mx, name)), group_size=64, bits=bits)
    words = torch.tensor(made[0].tolist(), dtype=torch.int64).to(torch.uint32)
    scales, biases = (torch.tensor(part.tolist()).to(getattr(torch, name)) for part in made[1:])
    tensors = {"weight": words, "scales": scales, "biases": biases}
    spec = QuantSpec(bits, 64, sym=False)
    if (bits, name) == (8, "bfloat16"):  # half a step is lost in such a file
        with pytest.raises(BitternError, match=r"biases: expected -zero . scale with an integer zero from 0 to 255"):
            unpack(tensors, spec, 32, 256)
        return
    floats = mx.dequantize(made[0], made[1].astype(mx.float32), made[2].astype(mx.float32), group_size=64, bits=bits)
    found = unpack(tensors, spec, 32, 256)
    steps = (found.dequantize() - torch.tensor(floats.tolist())).view(32, 4, 64) / found.scales.float().unsqueeze(2)
    assert float(steps.abs().max()) < 1 / 8


@pytest.mark.parametrize(
    "specs",
    [[QuantSpec(4, 32)], [QuantSpec(3, 64)], [QuantSpec(2, -1)], [QuantSpec(4, 32, sym=False)],
     [QuantSpec(4, 32), QuantSpec(8, -1), QuantSpec(4, 64)]],
    ids=lambda specs: "+".join(f"{spec.bits}{'s' if spec.sym else 'a'}g{spec.group_size}" for spec in specs),
)  # fmt: skip
def test_mlx_lm_loads_what_is_written(specs: list[QuantSpec], tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core")
    utils = pytest.importorskip("mlx_lm.utils")
    model = tiny.random_model(tie_word_embeddings=False, intermediate_size=128)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    layers: dict[str, QuantSpec | None] = {name: specs[i % len(specs)] for i, name in enumerate(linears)}
    layers["lm_head"] = layers["model.layers.1.mlp.up_proj"] = None
    for name, spec in layers.items():
        if spec is not None:
            weight = round_to_nearest(tensors.pop(f"{name}.weight"), spec)
            tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in mlx.pack(weight, torch.float32).items()}
            with torch.no_grad():
                model.get_submodule(name).weight.copy_(weight.dequantize())  # type: ignore[operator]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "mlx"})
    found = model.config.to_dict()
    found["quantization"] = found["quantization_config"] = mlx.config(specs[0], layers)
    (tmp_path / "config.json").write_text(json.dumps(found))

    with open_checkpoint(tmp_path) as checkpoint:
        artifact = Artifact(checkpoint)
        assert {name: layer.spec for name, layer in artifact.layers.items()} == {
            name: spec for name, spec in layers.items() if spec is not None
        }
    loaded, _ = utils.load_model(tmp_path)
    ids = [[3, 5, 7, 11, 13, 17]]
    with torch.no_grad():
        expected = model(torch.tensor(ids)).logits
    difference = (torch.tensor(loaded(mx.array(ids)).astype(mx.float32).tolist()) - expected).abs().max()
    assert float(difference) < 1e-3
