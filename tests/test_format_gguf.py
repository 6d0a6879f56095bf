"""GGUF blocks against literal bytes and against the gguf package's own dequantization; packed layers of files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bittern
from bittern.artifact import Artifact
from bittern.checkpoint import open_checkpoint
from bittern.convert import gguf as writing
from bittern.convert.gguf import write_gguf
from bittern.errors import BitternError
from bittern.formats import gguf as blocks
from bittern.weight import QuantSpec, QuantWeight
from tests import tiny
from tests.test_checkpoint import llama_weights, transformers_name
from tests.test_checkpoint import write_gguf as write_foreign

library = pytest.importorskip("gguf")

ASYM = QuantSpec(4, 32, sym=False)


def random_weight(spec: QuantSpec, rows: int, columns: int, seed: int = 0) -> QuantWeight:
    """Codes, scales of both signs and (asymmetric) zeros, all of their range."""
    generator = torch.Generator().manual_seed(seed)
    groups = spec.groups(columns)
    scales = torch.randn(rows, groups, generator=generator).half()
    codes = torch.randint(spec.max_code + 1, (rows, columns), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(spec.max_code + 1, (rows, groups), generator=generator, dtype=torch.uint8)
    return QuantWeight(codes, scales, torch.full_like(zeros, spec.mid_code) if spec.sym else zeros, spec)


def dequantized(data: np.ndarray[Any, Any], kind: str) -> torch.Tensor:
    """What the gguf package makes of blocks."""
    return torch.from_numpy(library.quants.dequantize(data, library.GGMLQuantizationType[kind]))


def same(a: QuantWeight, b: QuantWeight) -> bool:
    pairs = ((a.codes, b.codes), (a.scales, b.scales), (a.zeros, b.zeros))
    return a.spec == b.spec and all(torch.equal(one, other) for one, other in pairs)


def test_literal_blocks() -> None:
    codes = torch.arange(32, dtype=torch.uint8).view(1, 32) % 16
    two = torch.tensor([[2.0]], dtype=torch.float16)  # 00 40
    eight, three = torch.tensor([[8]], dtype=torch.uint8), torch.tensor([[3]], dtype=torch.uint8)
    nibbles = bytes(17 * j for j in range(16))  # elements j and j + 16 are both j
    assert blocks.pack(QuantWeight(codes, two, eight, QuantSpec(4, 32)), "Q4_0").tobytes() == b"\x00\x40" + nibbles
    minimum = b"\x00\xc6"  # -6
    assert blocks.pack(QuantWeight(codes, two, three, ASYM), "Q4_1").tobytes() == b"\x00\x40" + minimum + nibbles
    low = torch.arange(32, dtype=torch.uint8).view(1, 32) % 8
    four = torch.tensor([[4]], dtype=torch.uint8)
    shifted = bytes(17 * (j % 8 + 4) for j in range(16))
    assert blocks.pack(QuantWeight(low, two, four, QuantSpec(3, -1)), "Q4_0").tobytes() == b"\x00\x40" + shifted
    wide = torch.arange(0, 256, 8, dtype=torch.uint8).view(1, 32)
    middle = torch.tensor([[128]], dtype=torch.uint8)
    signed = bytes((value - 128) % 256 for value in range(0, 256, 8))
    assert blocks.pack(QuantWeight(wide, two, middle, QuantSpec(8, 32)), "Q8_0").tobytes() == b"\x00\x40" + signed


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    sym=st.booleans(),
    group=st.sampled_from([-1, 32, 64, 96]),
    rows=st.integers(1, 5),
    width=st.integers(1, 7),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=60)
def test_what_is_not_refused_keeps_every_weight(
    bits: int, sym: bool, group: int, rows: int, width: int, seed: int
) -> None:
    spec = QuantSpec(bits, group, sym)
    weight = random_weight(spec, rows, 32 * width, seed)
    kind = blocks.kind_for(spec)
    assert (blocks.refuse(spec) is None) == (kind is not None) == (sym or bits < 8)
    if kind is None:
        return
    data = blocks.pack(weight, kind)
    assert data.dtype == np.uint8 and data.shape == (rows, width * blocks.BLOCK_BYTES[kind])
    assert blocks.rounding(weight, kind) == 0
    assert torch.equal(dequantized(data, kind), weight.dequantize())
    back = blocks.unpack(data, kind, spec)
    assert same(back, weight) if sym else torch.equal(back.dequantize(), weight.dequantize())
    assert back.spec == spec and torch.equal(back.scales, weight.scales)
    if kind == "Q5_0":
        return
    own = blocks.unpack(data, kind)  # as a file from elsewhere
    assert own.spec == QuantSpec(8 if bits == 8 else 4, 32)
    assert torch.equal(own.dequantize(), weight.dequantize())


@given(group=st.sampled_from([-1, 32, 64]), rows=st.integers(1, 4), width=st.integers(1, 5), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=30)
def test_q4_1_rounds_as_it_says_and_gives_the_grid_back(group: int, rows: int, width: int, seed: int) -> None:
    spec = QuantSpec(4, group, sym=False)
    weight = random_weight(spec, rows, 32 * width, seed)
    data = blocks.pack(weight, "Q4_1", exact=False)
    assert same(blocks.unpack(data, "Q4_1", spec), weight)
    per_column = weight.scales.float().abs()[:, weight.group_index()]
    moved = ((dequantized(data, "Q4_1") - weight.dequantize()).abs() / per_column).max()
    stated = blocks.rounding(weight, "Q4_1")
    assert moved <= stated + 2e-5  # the package adds in fp32
    assert stated < 0.0074  # 15 * 2**-11


def test_scales_that_fp16_does_not_hold_come_back_rounded() -> None:
    weight = random_weight(ASYM, 64, 64, seed=2)
    wide = QuantWeight(weight.codes, weight.scales.float() * 1.0003, weight.zeros, ASYM)
    data = blocks.pack(wide, "Q4_1", exact=False)
    assert same(blocks.unpack(data, "Q4_1", ASYM), QuantWeight(wide.codes, wide.scales.half(), wide.zeros, ASYM))
    moved = (dequantized(data, "Q4_1") - wide.dequantize()).abs() / wide.scales.abs()[:, wide.group_index()]
    assert float(moved.max()) == pytest.approx(blocks.rounding(wide, "Q4_1"), rel=1e-2)


def test_the_stated_error_is_reached() -> None:
    weight = random_weight(ASYM, 64, 64, seed=1)
    data = blocks.pack(weight, "Q4_1", exact=False)
    moved = (dequantized(data, "Q4_1") - weight.dequantize()).abs() / weight.scales.float().abs()[
        :, weight.group_index()
    ]
    stated = blocks.rounding(weight, "Q4_1")
    assert float(moved.max()) == pytest.approx(stated, rel=1e-2)
    assert 0.002 < stated < 0.0074
    with pytest.raises(BitternError, match="Q4_1 would move points of the grid"):
        blocks.pack(weight, "Q4_1")
    plain = QuantWeight(weight.codes, torch.ones_like(weight.scales), weight.zeros, ASYM)
    assert blocks.rounding(plain, "Q4_1") == 0
    assert torch.equal(dequantized(blocks.pack(plain, "Q4_1"), "Q4_1"), plain.dequantize())


def test_what_no_block_holds() -> None:
    assert blocks.kind_for(QuantSpec(8, 32, sym=False)) is None
    assert blocks.kind_for(QuantSpec(4, 16)) is None
    assert "8-bit asymmetric" in str(blocks.refuse(QuantSpec(8, 32, sym=False)))
    assert "group_size 16" in str(blocks.refuse(QuantSpec(4, 16)))
    assert blocks.refuse(ASYM) is None and (blocks.kind_for(ASYM), blocks.kind_for(ASYM, exact=False)) == (
        "Q5_0",
        "Q4_1",
    )


def refused(weight: QuantWeight, kind: str, words: str) -> None:
    with pytest.raises(BitternError, match=words):
        blocks.pack(weight, kind)


def test_refuses_to_pack() -> None:
    good = random_weight(QuantSpec(4, 32), 2, 64)
    order = torch.arange(64, dtype=torch.int32).flip(0) // 32
    refused(QuantWeight(good.codes, good.scales, good.zeros, good.spec, order), "Q4_0", "act-order")
    refused(random_weight(QuantSpec(4, 16), 2, 64), "Q4_0", "divisible by 32, found 64 and 16")
    refused(random_weight(QuantSpec(4, -1), 2, 48), "Q4_0", "divisible by 32, found 48 and -1")
    refused(QuantWeight(good.codes + 16, good.scales, good.zeros, good.spec), "Q4_0", "codes: expected at most 15")
    refused(random_weight(QuantSpec(8, 32, sym=False), 8, 64), "Q8_0", "Q8_0 holds -128 to 127 steps")
    fine = good.scales.float() * (1 + 2.0**-13)
    refused(QuantWeight(good.codes, fine, good.zeros, good.spec), "Q4_0", "would move points of the grid")
    refused(
        QuantWeight(good.codes, good.scales.float() * 1e6, good.zeros, good.spec), "Q4_0", "scales: expected finite"
    )


def test_refuses_to_unpack_what_it_did_not_pack() -> None:
    weight = random_weight(QuantSpec(4, 32), 2, 128)
    data = blocks.pack(weight, "Q4_0")
    with pytest.raises(BitternError, match="expected one per group of 64 columns"):
        blocks.unpack(data, "Q4_0", QuantSpec(4, 64))
    with pytest.raises(BitternError, match="codes: expected 0 to 7 at 3 bits"):
        blocks.unpack(data, "Q4_0", QuantSpec(3, 32))
    broken = data.copy()
    broken[0, :2] = (0, 0x7C)  # infinity
    with pytest.raises(BitternError, match="scales: expected finite"):
        blocks.unpack(broken, "Q4_0")
    foreign = library.quants.quantize(
        np.random.default_rng(0).normal(size=(2, 64)).astype(np.float32), library.GGMLQuantizationType.Q4_1
    )
    with pytest.raises(BitternError, match="minima"):
        blocks.unpack(foreign, "Q4_1", ASYM)


def test_layers_of_a_foreign_file_stay_packed(tmp_path: Path) -> None:
    path = write_foreign(tmp_path / "tiny.gguf", llama_weights())
    with open_checkpoint(path) as checkpoint:
        artifact = Artifact(checkpoint)
        expected = [transformers_name(f"blk.{block}.ffn_gate").removesuffix(".weight") for block in range(2)]
        assert sorted(artifact.layers) == expected
        for layer in expected:
            assert artifact.layers[layer].spec == QuantSpec(8, 32)
            assert torch.equal(artifact.read(layer).dequantize(), checkpoint.read(f"{layer}.weight"))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A tiny Llama of 4 bits in groups of 64, but 8 bits for v_proj and a block left as it is."""
    folder = tmp_path_factory.mktemp("gguf")
    model = tiny.save(
        tiny.random_model(hidden_size=128, intermediate_size=192, num_hidden_layers=3), folder / "m", tokenizer
    )
    bittern.quantize(
        model, folder / "q", bits=4, group_size=64, method="rtn", layers=[("v_proj", 8)], skip=[r"layers\.2\."]
    )
    return folder / "q"


def test_an_artifact_comes_back_as_it_was(quantized: Path, tmp_path: Path) -> None:
    with open_checkpoint(quantized) as source:
        artifact = Artifact(source)
        assert {info.spec.bits for info in artifact.layers.values()} == {4, 8}
        write_gguf(artifact, tmp_path / "a.gguf")
        with open_checkpoint(tmp_path / "a.gguf") as found:
            other = Artifact(found)
            assert other.format == "gguf"
            assert other.layers == artifact.layers
            for layer in artifact.layers:
                assert same(other.read(layer), artifact.read(layer)), layer
    ids = torch.tensor([[0, 5, 9, 30, 40, 7, 100]])
    assert torch.equal(bittern.load(tmp_path / "a.gguf")(ids).logits, bittern.load(quantized)(ids).logits)


def test_without_bitterns_key_blocks_are_grids_of_their_own(
    quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "GRIDS_KEY", "somebody.else")
    with open_checkpoint(quantized) as source:
        artifact = Artifact(source)
        write_gguf(artifact, tmp_path / "a.gguf")
        with open_checkpoint(tmp_path / "a.gguf") as found:
            other = Artifact(found)
            assert {info.spec for info in other.layers.values()} == {QuantSpec(4, 32), QuantSpec(8, 32)}
            for layer in artifact.layers:  # q and k among them, whose rows llama.cpp has in another order
                assert torch.equal(other.read(layer).dequantize(), artifact.read(layer).dequantize()), layer


def test_a_file_that_lies_about_its_grids(quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_checkpoint(quantized) as source:
        monkeypatch.setattr(writing, "_grids", lambda grids: '{"default": {"bits": 3}, "layers": {}}')
        write_gguf(Artifact(source), tmp_path / "a.gguf")
        monkeypatch.setattr(writing, "_grids", lambda grids: '{"default": {"bits": 5}, "layers": {}}')
        write_gguf(Artifact(source), tmp_path / "b.gguf")
    with open_checkpoint(tmp_path / "a.gguf") as found:
        artifact = Artifact(found)
        with pytest.raises(BitternError, match=r"a.gguf: blk\.\d+\.\w+\.weight: "):
            artifact.read(next(iter(artifact.layers)))
    with pytest.raises(BitternError, match=r"b.gguf: bittern.grids: .*bits: expected one of 2, 3, 4, 8, found 5"):
        open_checkpoint(tmp_path / "b.gguf")


@pytest.mark.parametrize("empty_first", [False, True])
def test_a_part_of_a_split_file_says_so(empty_first: bool, tmp_path: Path) -> None:
    """As llama-gguf-split makes them: the first part has all metadata, and few tensors or none."""
    options = {"split_max_tensors": 1, "small_first_shard": empty_first}
    writer = library.GGUFWriter(tmp_path / "a.gguf", "llama", **options)
    writer.add_block_count(9)
    for number in range(3):
        writer.add_tensor(f"blk.{number}.attn_q.weight", np.zeros((32, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = sorted(tmp_path.glob("a-*.gguf"))
    assert len(parts) == 3 + empty_first
    for number, part in enumerate(parts, 1):
        with pytest.raises(BitternError) as caught:
            open_checkpoint(part)
        told = f"found part {number} of {len(parts)}; llama-gguf-split --merge joins them"
        assert str(caught.value) == f"{part}: expected a whole GGUF file, {told}"
