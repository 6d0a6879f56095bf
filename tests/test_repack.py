"""An artifact moved between formats: the same codes, the same bytes on the way back, the same logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

import bittern
from bittern.artifact import Artifact
from bittern.checkpoint import Checkpoint, open_checkpoint
from bittern.convert import pipeline
from bittern.convert.repack import RepackSummary
from bittern.errors import BitternError
from bittern.formats import mlx
from bittern.formats.packing import FORMATS
from bittern.weight import QuantSpec, QuantWeight, round_to_nearest
from tests import tiny
from tests.test_families import FAMILIES

IDS = torch.arange(4, 40).view(2, 18)
SHAPES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("source") / "model"
    return tiny.save(tiny.random_model(**SHAPES), folder, tokenizer)


def quantized(source: Path, out: Path, **options: Any) -> Path:
    bittern.quantize(source, out, **{"method": "rtn", "group_size": 32, **options})
    return out


def weights(folder: Path) -> dict[str, QuantWeight]:
    with open_checkpoint(folder) as checkpoint:
        artifact = Artifact(checkpoint)
        return {layer: artifact.read(layer) for layer in artifact.layers}


def assert_same(first: dict[str, QuantWeight], second: dict[str, QuantWeight]) -> None:
    assert list(first) == list(second) and first
    for layer, one in first.items():
        other = second[layer]
        assert one.spec == other.spec, layer
        assert torch.equal(one.codes, other.codes), layer
        assert torch.equal(one.zeros, other.zeros), layer
        assert torch.equal(one.scales.float(), other.scales.float()), layer


def logits(folder: Path) -> torch.Tensor:
    model = bittern.load(folder, device="cpu", kernels="torch")
    with torch.no_grad():
        return torch.as_tensor(model(IDS).logits)


def holds(format: str, bits: int, sym: bool) -> bool:
    """What each format holds exactly (docs/formats.md)."""
    if format == "gptq":
        return sym  # its zeros are stored minus one, and a zero of 0 has no form that all readers agree on
    return format != "awq" or bits == 4


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("format", FORMATS)
def test_there_and_back(format: str, bits: int, sym: bool, source: Path, tmp_path: Path) -> None:
    first = quantized(source, tmp_path / "first", bits=bits, sym=sym)
    original = "gptq" if sym else "gptq_v2"
    if not holds(format, bits, sym):
        with pytest.raises(BitternError, match=r"AWQ|gptq_v2"):
            bittern.convert(first, tmp_path / "there", format=format)
        assert not (tmp_path / "there").exists()
        return
    summary = bittern.convert(first, tmp_path / "there", format=format)
    assert isinstance(summary, RepackSummary)
    assert (summary.found, summary.format, summary.layers, summary.error) == (original, format, 14, 0.0)
    assert_same(weights(first), weights(tmp_path / "there"))
    bittern.convert(tmp_path / "there", tmp_path / "back", format=original)
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
    for file in ("config.json", "quantize_config.json"):
        assert json.loads((tmp_path / "back" / file).read_text()) == json.loads((first / file).read_text())
    assert torch.equal(logits(tmp_path / "there"), logits(first))


def test_the_size_of_shards_is_part_of_the_command(source: Path, tmp_path: Path) -> None:
    first = quantized(source, tmp_path / "first")
    for name, format in (("ct", "compressed-tensors"), ("plain", None)):
        bittern.convert(first, tmp_path / name, format=format, max_shard_size=30_000)
        told = json.loads((tmp_path / name / "bittern_manifest.json").read_text())
        assert len(list((tmp_path / name).glob("*.safetensors"))) > 1
        assert told["command"][-2:] == ["--max-shard-size", "30000"]


def test_damping_is_stated_as_the_source_states_it(source: Path, tmp_path: Path) -> None:
    def stated(name: str) -> float:
        return float(json.loads((tmp_path / name / "quantize_config.json").read_text())["damp_percent"])

    first = quantized(source, tmp_path / "first")
    for file, key in (
        ("quantize_config.json", None),
        ("config.json", "quantization_config"),
        ("bittern_manifest.json", "options"),
    ):
        said = json.loads((first / file).read_text())
        (said if key is None else said[key])["damp_percent"] = 0.07
        (first / file).write_text(json.dumps(said))
    bittern.convert(first, tmp_path / "ct", format="compressed-tensors")
    bittern.convert(tmp_path / "ct", tmp_path / "back", format="gptq")
    (tmp_path / "first" / "bittern_manifest.json").unlink()  # others' artifacts have none
    bittern.convert(tmp_path / "first", tmp_path / "v2", format="gptq_v2")
    assert stated("first") == stated("back") == stated("v2") == 0.07
    (tmp_path / "ct" / "bittern_manifest.json").unlink()
    bittern.convert(tmp_path / "ct", tmp_path / "unknown", format="gptq")
    assert stated("unknown") == 0.01


@pytest.mark.parametrize(("bits", "asked"), [(8, {"format": "mlx"}), (4, {"target": "mlx"}), (3, {"format": "mlx"})])
def test_mlx_holds_asymmetric_grids_in_fp32(bits: int, asked: dict[str, str], source: Path, tmp_path: Path) -> None:
    """Its scales alone: other floats stay as they are."""
    first = quantized(source, tmp_path / "first", bits=bits, sym=False, dtype="bf16")
    bittern.convert(first, tmp_path / "there", **asked)  # type: ignore[arg-type]
    stored = load_file(tmp_path / "there" / "model.safetensors")
    assert stored["model.layers.0.mlp.up_proj.scales"].dtype == torch.float32
    assert stored["model.norm.weight"].dtype == torch.bfloat16
    assert_same(weights(first), weights(tmp_path / "there"))


def test_mlx_takes_what_states_rope_in_new_words(source: Path, tmp_path: Path) -> None:
    """bittern adds the old ones to whatever it writes."""
    first = quantized(source, tmp_path / "first", bits=4)
    config = json.loads((first / "config.json").read_text())
    config = {name: value for name, value in config.items() if name not in ("rope_theta", "rope_scaling")}
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 500000.0}
    (first / "config.json").write_text(json.dumps(config))
    bittern.convert(first, tmp_path / "there", target="mlx")
    assert json.loads((tmp_path / "there" / "config.json").read_text())["rope_theta"] == 500000.0


def test_what_is_rounded_is_said_in_steps_of_the_grid(source: Path, tmp_path: Path) -> None:
    first = quantized(source, tmp_path / "first", bits=4, sym=False)
    summary = bittern.convert(first, tmp_path / "there", format="mlx", allow_inexact=True)
    assert isinstance(summary, RepackSummary)
    stored = load_file(tmp_path / "there" / "model.safetensors")
    worst = 0.0
    for layer, weight in weights(first).items():
        scales = weight.scales.double()
        bias = stored[f"{layer}.biases"].double()
        worst = max(worst, float(((bias + weight.zeros * scales) / scales).abs().max()))
    assert 0 < worst < 0.01
    assert summary.error == pytest.approx(worst, rel=1e-5)
    manifest = json.loads((tmp_path / "there" / "bittern_manifest.json").read_text())
    assert max(record["error"] for record in manifest["repacked"]) == summary.error
    assert manifest["origin"]["layers"]  # the story of the run that quantized


@pytest.mark.parametrize("format", ["gptq_v2", "compressed-tensors", "mlx"])
def test_mixed_bits_and_skipped_layers(format: str, source: Path, tmp_path: Path) -> None:
    first = quantized(source, tmp_path / "first", layers=[("down_proj", 8), ("o_proj", 3)], skip=[r"\.0\.mlp"])
    bittern.convert(first, tmp_path / "there", format=format)
    assert_same(weights(first), weights(tmp_path / "there"))
    assert torch.equal(logits(tmp_path / "there"), logits(first))
    bittern.convert(tmp_path / "there", tmp_path / "back", format="gptq")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()


def test_whole_row_groups(source: Path, tmp_path: Path) -> None:
    first = quantized(source, tmp_path / "first", group_size=-1)
    for format in ("compressed-tensors", "awq"):
        bittern.convert(first, tmp_path / format, format=format)
        assert_same(weights(first), weights(tmp_path / format))
    # MLX has groups of at most 128 columns, and repeats the scale.
    bittern.convert(first, tmp_path / "mlx", format="mlx")
    for layer, weight in weights(tmp_path / "mlx").items():
        assert torch.equal(weight.dequantize(), weights(first)[layer].dequantize())


def act_ordered(folder: Path) -> Path:
    """Permute which group each column belongs to, as GPTQModel's desc_act does."""
    stored = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name, tensor in stored.items():
        if name.endswith(".g_idx"):
            stored[name] = tensor[torch.randperm(len(tensor), generator=generator)]
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    for file in ("config.json", "quantize_config.json"):
        found = json.loads((folder / file).read_text())
        found.get("quantization_config", found)["desc_act"] = True
        (folder / file).write_text(json.dumps(found))
    return folder


def test_act_order(source: Path, tmp_path: Path) -> None:
    first = act_ordered(quantized(source, tmp_path / "first"))
    for format in ("compressed-tensors", "awq", "mlx"):
        with pytest.raises(BitternError, match=r"g_idx|act-order|order"):
            bittern.convert(first, tmp_path / "there", format=format)
    bittern.convert(first, tmp_path / "v2", format="gptq_v2")
    assert json.loads((tmp_path / "v2" / "config.json").read_text())["quantization_config"]["desc_act"] is True
    assert torch.equal(logits(tmp_path / "v2"), logits(first))
    bittern.convert(first, tmp_path / "floats", format="safetensors", dtype="fp32")
    torch.testing.assert_close(logits(tmp_path / "floats"), logits(first), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("format", ["awq", "safetensors"])
def test_a_tied_head_that_is_stored(format: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """It counts once; one that is no copy of the embedding is refused, as it is by load."""
    tied = tiny.save(tiny.random_model(**SHAPES, tie_word_embeddings=True), tmp_path / "tied", tokenizer)
    first = quantized(tied, tmp_path / "first")
    stored = load_file(first / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, first / "model.safetensors", {"format": "pt"})
    pipeline.convert(first, tmp_path / "second", format=format)
    size = json.loads((tmp_path / "second" / "bittern_manifest.json").read_text())["size"]
    assert size["output"]["parameters"] == size["source"]["parameters"] > 0
    stored["lm_head.weight"] += 1
    save_file(stored, first / "model.safetensors", {"format": "pt"})
    tries: list[Callable[[], object]] = [
        lambda: pipeline.convert(first, tmp_path / "third", format=format),
        lambda: pipeline.convert(first, tmp_path / "third.gguf"),
        lambda: bittern.load(first),
    ]
    for each in tries:
        with pytest.raises(BitternError, match=r"lm_head\.weight is no copy of the embedding"):
            each()
    assert not list(tmp_path.glob("*third*"))


def test_biases_of_autogptq(source: Path, tmp_path: Path) -> None:
    """Zeros that the model has no place for go; a bias that holds something stays."""
    first = quantized(source, tmp_path / "first")
    stored = load_file(first / "model.safetensors")
    for layer in weights(first):
        stored[f"{layer}.bias"] = torch.zeros(stored[f"{layer}.scales"].shape[1]).half()
    stored["model.layers.1.mlp.up_proj.bias"][3] = 0.5
    save_file(stored, first / "model.safetensors", {"format": "pt"})
    summary = bittern.convert(first, tmp_path / "there", format="compressed-tensors")
    assert isinstance(summary, RepackSummary)
    assert [name for name in load_file(tmp_path / "there" / "model.safetensors") if name.endswith(".bias")] == [
        "model.layers.1.mlp.up_proj.bias"
    ]
    assert summary.notes == ("13 biases of zeros left out, which the model has no place for",)
    assert torch.equal(logits(tmp_path / "there"), logits(first))


def test_a_bias_that_only_a_packed_layer_takes_is_no_float(source: Path, tmp_path: Path) -> None:
    first = quantized(source, tmp_path / "first")
    stored = load_file(first / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.bias"
    stored[name] = torch.full((192,), 0.5).half()
    save_file(stored, first / "model.safetensors", {"format": "pt"})
    with pytest.raises(BitternError, match=f"^{name}: expected zeros, for a llama model has no place for it"):
        bittern.convert(first, tmp_path / "floats", format="safetensors")
    stored[name].zero_()
    save_file(stored, first / "model.safetensors", {"format": "pt"})
    bittern.convert(first, tmp_path / "floats", format="safetensors")
    assert name not in load_file(tmp_path / "floats" / "model.safetensors")


@pytest.mark.parametrize("format", ["gptq_v2", "compressed-tensors", "mlx", "safetensors"])
def test_what_the_model_has_no_place_for(
    format: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere it would be passed over without a word."""
    first = quantized(source, tmp_path / "first")
    stored = load_file(first / "model.safetensors")
    added = {f"model.layers.{block}.mlp.extra.weight": torch.zeros(3) for block in (0, 1)}
    save_file(stored | added, first / "model.safetensors", {"format": "pt"})
    words = r"^model\.layers\.0\.mlp\.extra\.weight and 1 more: the checkpoint holds it, but a llama model has no place"
    with pytest.raises(BitternError, match=words):
        bittern.convert(first, tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()

    # Of a Hub id, before its values are fetched.
    monkeypatch.setattr(Checkpoint, "headers_only", property(lambda _: True))
    for name in ("repack", "dequantize"):
        monkeypatch.delattr(pipeline, name)
    with pytest.raises(BitternError, match=words):
        bittern.convert(first, tmp_path / "out", format=format)


def test_what_transformers_knows_to_be_useless_travels(source: Path, tmp_path: Path) -> None:
    first = quantized(source, tmp_path / "first")
    stored = load_file(first / "model.safetensors")
    old = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file(stored | {old: torch.ones(8)}, first / "model.safetensors", {"format": "pt"})
    bittern.convert(first, tmp_path / "out", format="gptq_v2")
    assert old in load_file(tmp_path / "out" / "model.safetensors")


def test_dequantizes_to_each_dtype(source: Path, tmp_path: Path) -> None:
    first = quantized(source, tmp_path / "first", bits=3, sym=False)
    for dtype, torch_dtype in {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.items():
        summary = bittern.convert(first, tmp_path / dtype, format="safetensors", dtype=dtype)
        stored = load_file(tmp_path / dtype / "model.safetensors")
        for layer, weight in weights(first).items():
            assert torch.equal(stored[f"{layer}.weight"], weight.dequantize().to(torch_dtype))
        assert all(tensor.dtype == torch_dtype for tensor in stored.values())
        config = json.loads((tmp_path / dtype / "config.json").read_text())
        assert "quantization_config" not in config and config["dtype"] == str(torch_dtype).removeprefix("torch.")
        assert isinstance(summary, RepackSummary) and summary.format == "safetensors"
        assert (summary.max_relative_error > 0) == (dtype != "fp32")
    bittern.convert(first, tmp_path / "default")
    assert json.loads((tmp_path / "default" / "config.json").read_text())["dtype"] == "float16"  # as it says itself


def test_refuses(source: Path, tmp_path: Path) -> None:
    with pytest.raises(BitternError, match="expected packed layers, found none; bittern quantize makes them"):
        bittern.convert(source, tmp_path / "out", format="gptq")
    first = quantized(source, tmp_path / "first")
    with pytest.raises(BitternError, match=r"format: expected one of safetensors, gptq, .* found 'exl2'"):
        bittern.convert(first, tmp_path / "out", format="exl2")
    with pytest.raises(BitternError, match="dtype: expected one of bf16, fp16, fp32, found fp8"):
        bittern.convert(first, tmp_path / "out", format="gptq_v2", dtype="fp8")
    with pytest.raises(BitternError, match="expected a folder apart from the source"):
        bittern.convert(first, first, format="gptq_v2", overwrite=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["gptq_v2", "compressed-tensors", "mlx", "safetensors"])
def test_shapes_are_those_of_the_config(format: str, source: Path, tmp_path: Path) -> None:
    first = quantized(source, tmp_path / "first")
    stated = json.loads((first / "config.json").read_text())
    for key, value, name in (
        ("num_key_value_heads", 4, r"model\.layers\.0\.self_attn\.k_proj"),
        ("intermediate_size", 128, r"model\.layers\.0\.mlp\.gate_proj"),
        ("vocab_size", 300, r"model\.embed_tokens\.weight"),
    ):
        (first / "config.json").write_text(json.dumps(stated | {key: value}))
        with pytest.raises(BitternError, match=rf"{name}: config\.json asks for shape \(.*\), found \(.*\)$"):
            bittern.convert(first, tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()


def test_an_expert_that_is_lost_is_missed(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Of those that a checkpoint keeps in one tensor, too: packed, they are on their own."""
    model = tiny.random_model("gpt_oss", **FAMILIES["gpt_oss"])
    first = quantized(tiny.save(model, tmp_path / "model", tokenizer), tmp_path / "first", sym=True)
    stored = load_file(first / "model.safetensors")
    lost = "model.layers.1.mlp.experts.down_proj.2"
    kept = {name: tensor for name, tensor in stored.items() if not name.startswith(f"{lost}.")}
    assert len(kept) < len(stored)
    save_file(kept, first / "model.safetensors", {"format": "pt"})
    for format in ("gptq_v2", "safetensors"):
        with pytest.raises(
            BitternError, match=rf"{lost}: the checkpoint lacks it, and \S+down_proj of the model needs"
        ):
            bittern.convert(first, tmp_path / "out", format=format)


def test_packed_embeddings_of_mlx_lm(source: Path, tmp_path: Path) -> None:
    first = quantized(source, tmp_path / "first")
    bittern.convert(first, tmp_path / "mlx", format="mlx")
    file = tmp_path / "mlx" / "model.safetensors"
    stored = load_file(file)
    table = round_to_nearest(stored.pop("model.embed_tokens.weight").float(), QuantSpec(4, 32))
    for suffix, tensor in mlx.pack(table).items():
        stored[mlx.names("model.embed_tokens")[suffix]] = tensor
    save_file(stored, file, {"format": "mlx"})
    config = json.loads((tmp_path / "mlx" / "config.json").read_text())
    for key in ("quantization", "quantization_config"):
        config[key] = {"group_size": 32, "bits": 4}  # mlx-lm's own words
    (tmp_path / "mlx" / "config.json").write_text(json.dumps(config))
    model = bittern.load(tmp_path / "mlx", device="cpu")
    assert torch.equal(model.get_parameter("model.embed_tokens.weight"), table.dequantize())
    bittern.convert(tmp_path / "mlx", tmp_path / "floats", dtype="fp32")
    assert torch.equal(
        load_file(tmp_path / "floats" / "model.safetensors")["model.embed_tokens.weight"], table.dequantize()
    )
    torch.testing.assert_close(logits(tmp_path / "mlx"), logits(tmp_path / "floats"), atol=1e-5, rtol=1e-4)
    with pytest.raises(BitternError, match=r"lm_head_bits: expected embeddings of floats, found model\.embed_tokens"):
        bittern.load(tmp_path / "mlx", device="cpu", lm_head_bits=8)
    with pytest.raises(BitternError, match=r"model\.embed_tokens: gptq packs matrices alone"):
        bittern.convert(tmp_path / "mlx", tmp_path / "out", format="gptq")


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt2", "gpt_oss"])
def test_experts_and_conv1d_keep_their_names(family: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = tiny.random_model(family, **{"num_key_value_heads": 4, **FAMILIES[family]})
    first = quantized(tiny.save(model, tmp_path / "model", tokenizer), tmp_path / "first", sym=True)
    for format in ("compressed-tensors", "mlx", "awq"):
        bittern.convert(first, tmp_path / format, format=format)
        assert list(weights(tmp_path / format)) == list(weights(first))
        assert torch.equal(logits(tmp_path / format), logits(first))
        bittern.convert(tmp_path / format, tmp_path / f"{format}-back", format="gptq")
        back = tmp_path / f"{format}-back" / "model.safetensors"
        assert back.read_bytes() == (first / "model.safetensors").read_bytes()
