"""What is decided about every layer before any work, and how a bad choice is refused."""

from __future__ import annotations

import pytest
import torch

from bittern.errors import BitternError
from bittern.formats.packing import Packing
from bittern.model import Matrix
from bittern.quantize.plan import make_plan
from bittern.weight import QuantSpec


def matrix(name: str, out_features: int = 64, in_features: int = 96) -> Matrix:
    return Matrix(f"{name}.weight", None, False, out_features, in_features, ((name, 0, out_features),))


def expert(index: int) -> Matrix:
    parts = ((f"l.experts.{index}.w1", 0, 32), (f"l.experts.{index}.w3", 32, 64))
    return Matrix("l.experts.gate_up_proj", index, False, 64, 96, parts)


BLOCKS = [[matrix(f"layers.{i}.q"), matrix(f"layers.{i}.down", 96, 128)] for i in range(2)]


def test_every_layer_gets_the_grid_asked_for() -> None:
    plan = make_plan(BLOCKS, 3, 32, False)
    assert set(plan.layers) == {"layers.0.q", "layers.0.down", "layers.1.q", "layers.1.down"}
    assert set(plan.layers.values()) == {QuantSpec(3, 32, False)}
    assert not plan.kept and not plan.symmetric and plan.group_size == 32
    assert [len(block) for block in plan.blocks] == [2, 2]


def test_the_last_matching_layer_option_holds() -> None:
    plan = make_plan(BLOCKS, 4, 32, True, [("down", 8), (r"layers\.1\.down", 3)])
    assert plan.layers["layers.0.down"] == QuantSpec(8, 32)
    assert plan.layers["layers.1.down"] == QuantSpec(3, 32)
    assert plan.layers["layers.0.q"] == QuantSpec(4, 32)


def test_skipped_layers_are_kept_and_say_why() -> None:
    plan = make_plan(BLOCKS, 4, 32, True, skip=[r"\.q$"])
    assert plan.layers["layers.0.q"] is None
    assert plan.kept == {"layers.0.q": r"--skip \.q$", "layers.1.q": r"--skip \.q$"}
    assert len(plan.blocks[0]) == 1


def test_a_shape_that_cannot_be_packed_is_kept() -> None:
    plan = make_plan([[matrix("q"), matrix("gate", 1, 96), matrix("dt", 64, 4)]], 4, 32, True)
    assert plan.kept == {"gate": "shape 1 x 96 is no multiple of 32", "dt": "shape 64 x 4 is no multiple of 32"}


@pytest.mark.parametrize(("widths", "expected"), [((256, 384), 128), ((576, 1536), 64), ((288, 768), 32)])
def test_auto_takes_the_largest_group_that_fits_every_layer(widths: tuple[int, int], expected: int) -> None:
    plan = make_plan([[matrix("a", 64, widths[0]), matrix("b", 64, widths[1])]], 4, "auto", True)
    assert plan.group_size == expected


def test_whole_rows_always_fit() -> None:
    assert make_plan(BLOCKS, 4, -1, True).group_size == -1


@pytest.mark.parametrize(
    ("group_size", "message"),
    [
        (128, r"group_size 128: does not divide in_features 96 of layers\.\d\.q.*: 32, 16, -1$"),
        (48, r"group_size 48: does not divide in_features 128 of layers\.\d\.down.*: 32, 16, -1$"),
        (8, r"group_size 8: is none that GPTQModel and transformers load.*: 32, 16, -1$"),
        (0, r"group_size 0: is none"),
    ],
)
def test_a_group_size_that_does_not_fit_lists_those_that_do(group_size: int, message: str) -> None:
    with pytest.raises(BitternError, match=message):
        make_plan(BLOCKS, 4, group_size, True)


@pytest.mark.parametrize(
    ("layers", "skip", "message"),
    [
        ([("nothing", 8)], (), r"--layer nothing: matches none of the model's 4 layers \(such as layers\.0\.q\)"),
        ((), ["nothing"], r"--skip nothing: matches none"),
        ([("q", 8)], ["q"], r"--layer q: expected layers that are quantized, found only kept ones"),
        ((), ["("], r"--skip \(: expected a regular expression"),
        ([("q", 5)], (), "bits: expected one of 2, 3, 4, 8, found 5"),
        ((), ["."], "nothing to quantize"),
    ],
)
def test_bad_patterns_are_refused(layers: list[tuple[str, int]], skip: list[str], message: str) -> None:
    with pytest.raises(BitternError, match=message):
        make_plan(BLOCKS, 4, 32, True, layers, skip)


def test_what_the_model_fuses_cannot_be_told_apart() -> None:
    with pytest.raises(BitternError, match=r"l\.experts\.0\.w1 and l\.experts\.0\.w3 are one matrix"):
        make_plan([[expert(0), expert(1)]], 4, 32, True, [("w1", 8)])
    with pytest.raises(BitternError, match="skip all of it or none"):
        make_plan([[expert(0), expert(1)]], 4, 32, True, skip=["w3"])
    with pytest.raises(BitternError, match="several experts; skip all of them or none"):
        make_plan([[expert(0), expert(1)]], 4, 32, True, skip=[r"experts\.0\."])


def test_packed_tensors_are_those_of_the_format() -> None:
    plan = make_plan([[expert(0)]], 4, 32, True)
    assert plan.shapes == {f"l.experts.0.{part}": (32, 96) for part in ("w1", "w3")}
    suffixes = {"gptq": ("qweight", "qzeros", "scales", "g_idx"), "mlx": ("weight", "scales", "biases")}
    for format, expected in suffixes.items():
        names = [info.name for info in plan.packed_tensors(Packing(format))]
        assert names == [f"l.experts.0.{part}.{suffix}" for part in ("w1", "w3") for suffix in expected]


@pytest.mark.parametrize(
    ("bits", "eights", "fast", "rough"),
    [
        (4, [], True, True),
        (2, [], True, True),
        (4, [], False, False),
        (8, [], True, False),
        (2, ["q"], True, False),
    ],
)
def test_products_are_rough_where_that_is_faster_and_quantizing_is_rougher(
    bits: int, eights: list[str], fast: bool, rough: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bittern.replay.fast_in_sixteen_bits", lambda _: fast)
    plan = make_plan(BLOCKS, bits, 32, True, [(each, 8) for each in eights], skip=["layers.1.down"])
    assert plan.rough(torch.device("cpu")) is rough
    head = Matrix("lm_head.weight", None, False, 64, 32, (("lm_head", 0, 64),))
    outside = make_plan(BLOCKS, bits, 32, True, [(each, 8) for each in eights], ["layers.1.down"], [(head, 8)])
    assert outside.rough(torch.device("cpu")) is rough  # nobody walks through a head
