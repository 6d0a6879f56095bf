"""Checkpoints that are quantized otherwise than bittern reads, and do not say so where transformers looks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import bittern
from bittern.artifact import Artifact, quantization_config
from bittern.checkpoint import open_checkpoint
from bittern.convert.cast import refuse_quantized
from bittern.errors import BitternError
from bittern.inspect import inspect
from tests import tiny

LAYER = "model.layers.0.mlp.up_proj"
MODELOPT = {"producer": {"name": "modelopt", "version": "0.15"}, "quantization": {"quant_algo": "FP8"}}
INT8 = {
    "quant_method": "sparseml",  # its name before it had one
    "format": "int-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel"}}},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    return tiny.save(tiny.random_model(), tmp_path_factory.mktemp("plain") / "model", tokenizer)


def changed(source: Path, out: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    """A copy with some tensors, and some keys of config.json, of its own."""
    out.mkdir()
    stated = json.loads((source / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(stated | config))
    save_file(load_file(source / "model.safetensors") | tensors, out / "model.safetensors", {"format": "pt"})
    return out


def refused(do: Callable[[], object], *words: str) -> None:
    with pytest.raises(BitternError) as caught:
        do()
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def as_fp8() -> dict[str, Tensor]:
    codes = torch.ones(96, 64).to(torch.float8_e4m3fn)
    return {f"{LAYER}.weight": codes, f"{LAYER}.weight_scale": torch.full((96, 1), 1e-3)}


@pytest.mark.parametrize("described", ["modelopt", "compression_config"])
def test_a_description_elsewhere_is_read(described: str, plain: Path, tmp_path: Path) -> None:
    config = {"compression_config": INT8} if described == "compression_config" else {}
    folder = changed(plain, tmp_path / "in", as_fp8(), **config)
    if described == "modelopt":
        (folder / "hf_quant_config.json").write_text(json.dumps(MODELOPT))
    word = "found 'modelopt'" if described == "modelopt" else "expected 'pack-quantized', found 'int-quantized'"
    refused(lambda: bittern.convert(folder, tmp_path / "out"), word)
    refused(lambda: bittern.convert(folder, tmp_path / "out.gguf"), word)
    refused(lambda: bittern.quantize(folder, tmp_path / "out", method="rtn"), "found a quantized model")
    found = inspect(folder)
    assert found["quantization"] == (MODELOPT if described == "modelopt" else INT8)
    (verdict,) = found["loads"]
    assert (verdict["consumer"], verdict["loads"]) == ("bittern", False) and word in verdict["reason"]
    assert found["parameters"] is None and not (tmp_path / "out").exists()


def test_what_config_says_comes_before_other_files(plain: Path, tmp_path: Path) -> None:
    bittern.quantize(plain, tmp_path / "q", method="rtn", group_size=32)
    (tmp_path / "q" / "hf_quant_config.json").write_text(json.dumps(MODELOPT))
    with open_checkpoint(tmp_path / "q") as checkpoint:
        assert quantization_config(checkpoint)[0] == "gptq"


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (as_fp8(), (f"{LAYER}.weight_scale beside it",)),
        ({f"{LAYER}.weight_scale_inv": torch.ones(1, 1)}, (f"{LAYER}.weight_scale_inv beside it",)),
        ({f"{LAYER}.weight_scale_2": torch.tensor(1.0)}, (f"{LAYER}.weight_scale_2 beside it",)),
        ({f"{LAYER}.weight": torch.ones(96, 64, dtype=torch.int8)}, ("found int8",)),
        ({f"{LAYER}.weight": torch.ones(3072, 1, dtype=torch.uint8)}, ("found uint8",)),
        (
            {f"{LAYER}.weight": torch.ones(96, 64).to(torch.float8_e5m2), f"{LAYER}.scale": torch.ones(1, 1)},
            (f"{LAYER}.scale beside it",),
        ),
    ],
)
@pytest.mark.parametrize("headers_only", [False, True])
def test_codes_without_a_description_are_no_weights(
    tensors: dict[str, Tensor], words: tuple[str, ...], headers_only: bool, plain: Path, tmp_path: Path
) -> None:
    folder = changed(plain, tmp_path / "in", tensors)
    if headers_only:  # as bittern.hub.fetch_headers lays a repository out
        path = folder / "model.safetensors"
        data = path.read_bytes()
        path.write_bytes(data[: 8 + int.from_bytes(data[:8], "little")])
        with path.open("ab") as file:
            file.truncate(len(data))
    words = (*words, "model.", "expected a plain weight")
    with open_checkpoint(folder) as checkpoint:
        refused(lambda: Artifact(checkpoint), *words)
        refused(lambda: refuse_quantized(checkpoint), *words)
    refused(lambda: bittern.convert(folder, tmp_path / "out"), *words)
    refused(lambda: bittern.quantize(folder, tmp_path / "out", method="rtn"), *words)
    refused(lambda: inspect(folder), *words)
    assert not (tmp_path / "out").exists()


def test_codes_beside_packed_layers_are_no_weights(plain: Path, tmp_path: Path) -> None:
    bittern.quantize(plain, tmp_path / "q", method="rtn", group_size=32)
    head = torch.ones(256, 64, dtype=torch.int8)
    folder = changed(tmp_path / "q", tmp_path / "in", {"lm_head.weight": head})
    refused(lambda: inspect(folder), "lm_head.weight: expected a plain weight, found int8")


def test_integers_that_are_no_weights_pass(plain: Path, tmp_path: Path) -> None:
    others = {"model.position_ids": torch.arange(8).view(1, 8), "model.kept.scale": torch.ones(2, 2)}
    assert inspect(changed(plain, tmp_path / "in", others))["quantization"] is None


@pytest.mark.parametrize("scales", ["model.layers.0.mlp.act.scales", "h.0.mlp.gelu_impl.scales"])
def test_scaled_activations_of_autoawq(scales: str, plain: Path, tmp_path: Path) -> None:
    bittern.quantize(plain, tmp_path / "q", method="rtn", bits=4, group_size=32, format="awq")
    folder = changed(tmp_path / "q", tmp_path / "in", {scales: torch.ones(96).half()})
    word = f"{scales}: expected scales of packed layers alone, found an activation's"
    for name in ("gptq_v2", "safetensors", "mlx"):
        refused(lambda name=name: bittern.convert(folder, tmp_path / "out", format=name), word)  # type: ignore[misc]
    refused(lambda: bittern.load(folder, device="cpu"), word)
    (verdict,) = inspect(folder)["loads"]
    assert (verdict["consumer"], verdict["loads"]) == ("bittern", False) and word in verdict["reason"]


def reordered(source: Path, out: Path, lost: str, **config: Any) -> Path:
    """A copy whose quantization config has some keys of its own, without the tensors of one suffix."""
    stated = json.loads((source / "config.json").read_text())
    changed(source, out, {}, quantization_config=stated["quantization_config"] | config)
    stored = load_file(out / "model.safetensors")
    left = {name: tensor for name, tensor in stored.items() if not name.endswith(lost)}
    save_file(left, out / "model.safetensors", {"format": "pt"})
    return out


def test_an_order_of_columns_that_is_lost_is_missed(plain: Path, tmp_path: Path) -> None:
    for name, size in (("groups", 32), ("rows", -1)):
        bittern.quantize(plain, tmp_path / name, method="rtn", group_size=size)
    word = f"{LAYER}.g_idx: expected one, for desc_act is true, found none"
    lost = reordered(tmp_path / "groups", tmp_path / "lost", f"{LAYER}.g_idx", desc_act=True)
    refused(lambda: bittern.convert(lost, tmp_path / "out", format="compressed-tensors"), word)
    refused(lambda: inspect(lost), word)
    one = {rf"+:.*\.0\.mlp\.{leaf}_proj": {"desc_act": value} for leaf, value in (("up", True), ("gate", False))}
    own = reordered(tmp_path / "groups", tmp_path / "own", ".g_idx", dynamic=one)
    refused(lambda: inspect(own), word)
    # In order: other layers than one of its own, layers that say so, and rows of one group.
    in_order: list[tuple[str, dict[str, Any]]] = [
        ("groups", {"dynamic": {key: value for key, value in one.items() if "gate" in key}}),
        ("groups", {"desc_act": True, "dynamic": {"+:.*": {"desc_act": False}}}),
        ("rows", {"desc_act": True}),
    ]
    for index, (source, found) in enumerate(in_order):
        assert inspect(reordered(tmp_path / source, tmp_path / str(index), ".g_idx", **found))["loads"]


def test_compressed_tensors_leaves_out_an_order_that_was_never_set(plain: Path, tmp_path: Path) -> None:
    """Version 0.9 did, of layers that no calibration had reached."""
    bittern.quantize(plain, tmp_path / "q", method="rtn", group_size=32, format="compressed-tensors")
    stated = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    stated["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    folder = changed(tmp_path / "q", tmp_path / "in", {}, quantization_config=stated)
    with open_checkpoint(folder) as checkpoint:
        artifact = Artifact(checkpoint)
        assert artifact.scheme is not None and artifact.scheme.any_desc_act
        assert artifact.read(LAYER).g_idx is None


def test_the_first_key_of_compressed_tensors(plain: Path, tmp_path: Path) -> None:
    made, moved = tmp_path / "made", tmp_path / "moved"
    bittern.quantize(plain, made, method="rtn", group_size=32, format="compressed-tensors")
    config = json.loads((made / "config.json").read_text())
    stated = config.pop("quantization_config") | {"quant_method": "sparseml"}
    moved.mkdir()
    (moved / "config.json").write_text(json.dumps(config | {"compression_config": stated}))
    (moved / "model.safetensors").write_bytes((made / "model.safetensors").read_bytes())
    seen = inspect(moved)
    found = seen["quantization"]
    assert (found["method"], found["bits"], found["group_size"]) == ("compressed-tensors", 4, 32)
    loads = {each["consumer"]: each["loads"] for each in seen["loads"]}  # transformers 5.23 reads no such key
    assert (loads["transformers"], loads["vLLM"], loads["bittern"]) == (False, True, True)
    bittern.convert(moved, tmp_path / "gptq", format="gptq")
    bittern.convert(moved, tmp_path / "floats", dtype="fp32")
    with open_checkpoint(made) as one, open_checkpoint(tmp_path / "gptq") as other:
        expected = Artifact(one).read(LAYER).dequantize()
        assert torch.equal(Artifact(other).read(LAYER).dequantize(), expected)
    assert torch.equal(load_file(tmp_path / "floats" / "model.safetensors")[f"{LAYER}.weight"], expected)
    for name, keys in (("gptq", {"quantization_config"}), ("floats", set[str]())):
        said = json.loads((tmp_path / name / "config.json").read_text())
        assert {"quantization_config", "compression_config"} & set(said) == keys
