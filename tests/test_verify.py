"""bittern.verify on artifacts that are whole, and on ones that were damaged in one way each."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import bittern
from bittern.checkpoint import open_checkpoint
from bittern.convert.pipeline import convert
from bittern.convert.repack import dequantize, repack
from bittern.errors import BitternError
from bittern.report import MANIFEST_FILE, layer_records, make_manifest, repacked_manifest
from bittern.verify import Check, Verification, verify
from tests import tiny
from tests.test_runtime_load import make

SMALL: dict[str, Any] = {"group_size": 32, "method": "rtn"}
CALIBRATED: dict[str, Any] = {"group_size": 32, "nsamples": 4, "seqlen": 32}
Q0, Q1 = (f"model.layers.{index}.self_attn.q_proj" for index in range(2))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    return tiny.save(tiny.random_model(), tmp_path_factory.mktemp("verify") / "source", tokenizer)


@pytest.fixture(scope="module")
def packed(source: Path) -> Path:
    bittern.quantize(source, source.parent / "packed", sym=False, max_shard_size=60_000, **SMALL)
    return source.parent / "packed"


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    """An artifact in several shards that a test may damage."""
    return shutil.copytree(packed, tmp_path / "copy")


def rehash(folder: Path) -> None:
    """Make the manifest right again, as somebody would who wants to hide a change."""
    path = folder / MANIFEST_FILE
    manifest = json.loads(path.read_text())
    manifest["files"] = {
        name: {
            "bytes": (folder / name).stat().st_size,
            "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(),
        }
        for name in manifest["files"]
    }
    path.write_text(json.dumps(manifest))


def change(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Edit the tensors of every shard that holds one of them, and hide it from the hashes."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        edit(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        found = json.loads(index.read_text())
        names = {name: path.name for path in folder.glob("*.safetensors") for name in load_file(path)}
        index.write_text(json.dumps({**found, "weight_map": names}))
    if (folder / MANIFEST_FILE).exists():
        rehash(folder)


def answers(found: Verification) -> dict[str, bool | None]:
    return {check.name: check.passed for check in found.checks}


def failed(found: Verification) -> list[str]:
    assert all("\n" not in check.detail for check in found.checks)
    return [check.name for check in found.checks if check.passed is False]


def check(found: Verification, name: str) -> Check:
    return next(check for check in found.checks if check.name == name)


def test_a_whole_artifact_passes_alone_and_against_its_source(source: Path, packed: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    alone = verify(packed, on_step=lambda *step: steps.append(step))
    asked = ("manifest", "files", "tensors", "values", "logits")
    assert answers(alone) == dict.fromkeys(asked, True) and alone.passed
    assert {name for name, done, total in steps if done == total} == {"files", "values", "logits"}
    found = verify(packed, source)
    assert found.passed and None not in answers(found).values()
    assert "14 layers quantized, largest relative errors: " in check(found, "source values").detail
    assert json.loads(json.dumps(found.to_dict()))["passed"] is True
    assert "top-1" in check(found, "logits").detail


def test_the_worst_layers_are_named_by_their_own_errors(source: Path, packed: Path) -> None:
    plain = dequantize(packed, source.parent / "plain", dtype="fp32", overwrite=True).output
    original, rounded = load_file(source / "model.safetensors"), load_file(Path(plain) / "model.safetensors")
    errors = {
        name.removesuffix(".weight"): float((rounded[name] - original[name]).norm() / original[name].norm())
        for name in original
        if name.endswith("_proj.weight")
    }
    worst = sorted(errors, key=lambda name: -errors[name])[:5]
    named = ", ".join(f"{name} {errors[name]:.4f}" for name in worst)
    assert check(verify(packed, source, logits=False), "source values").detail.endswith(named)


def test_the_hashes_are_those_of_the_files(source: Path, packed: Path, tmp_path: Path) -> None:
    bittern.convert(source, tmp_path / "plain")
    for folder in (packed, tmp_path / "plain"):
        listed = json.loads((folder / MANIFEST_FILE).read_text())["files"]
        assert set(listed) == {path.name for path in folder.iterdir()} - {MANIFEST_FILE}
        for name, record in listed.items():
            data = (folder / name).read_bytes()
            assert record == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


@pytest.mark.parametrize("position", [0.01, 0.5, 0.999])
def test_one_flipped_bit_in_a_shard_is_found(copy: Path, position: float) -> None:
    shard = sorted(copy.glob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[int(position * len(data))] ^= 1
    shard.write_bytes(data)
    found = verify(copy, logits=False)
    assert not found.passed and check(found, "files").detail == f"{shard.name} has another hash"


def test_a_missing_and_a_longer_file_are_named(copy: Path) -> None:
    (copy / "quantize_config.json").unlink()
    (copy / "tokenizer_config.json").write_text("{}" * 100)
    detail = check(verify(copy, logits=False), "files").detail
    assert "quantize_config.json is missing" in detail
    assert "tokenizer_config.json has 200 bytes, expected" in detail


def test_files_beside_the_listed_ones(copy: Path) -> None:
    (copy / "README.md").write_text("a card")
    found = verify(copy, logits=False)
    assert found.passed and "not listed: README.md" in check(found, "files").detail
    save_file({"more": torch.zeros(1)}, copy / "more.safetensors")
    found = verify(copy, logits=False)
    assert failed(found) == ["files"] and check(found, "files").detail == "more.safetensors is not listed"


@pytest.mark.parametrize(
    ("files", "passed", "words"),
    [
        (None, None, "no hashes"),
        ([], False, "expected an object"),
        ({"config.json": 7}, False, "expected an object"),
        ({"../source/config.json": {}}, False, "leads out of the folder"),
        ({"config.json": {"bytes": "many"}}, False, "config.json has"),
    ],
)
def test_a_manifest_that_says_something_else(copy: Path, files: Any, passed: bool | None, words: str) -> None:
    path = copy / MANIFEST_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "files": files}))
    found = check(verify(copy, logits=False), "files")
    assert found.passed is passed and words in found.detail


@pytest.mark.parametrize("content", ["", "[1]", "{", "\x00" * 10])
def test_a_manifest_that_is_no_json_object(copy: Path, content: str) -> None:
    (copy / MANIFEST_FILE).write_text(content)
    assert "files" in failed(verify(copy, logits=False))


def test_swapped_layers_are_found_though_the_hashes_fit(source: Path, packed: Path, copy: Path) -> None:
    stored = {name: tensor for path in packed.glob("*.safetensors") for name, tensor in load_file(path).items()}

    def swap(tensors: dict[str, Tensor]) -> None:
        for mine, other in ((Q0, Q1), (Q1, Q0)):
            for suffix in ("qweight", "qzeros", "scales", "g_idx"):
                if f"{mine}.{suffix}" in tensors:
                    tensors[f"{mine}.{suffix}"] = stored[f"{other}.{suffix}"]

    change(copy, swap)
    assert verify(copy, logits=False).passed  # nothing here knows the layers but their source
    for against in (source, packed):
        found = verify(copy, against, logits=False)
        assert failed(found) == ["source values"]
        assert Q0 in check(found, "source values").detail and Q1 in check(found, "source values").detail


def test_a_dropped_tensor_is_named(source: Path, packed: Path, copy: Path) -> None:
    change(copy, lambda tensors: tensors.pop("model.norm.weight", None))
    found = verify(copy, source)
    assert failed(found) == ["tensors"] and "model.norm.weight" in check(found, "tensors").detail
    assert check(found, "logits").passed is None


def test_an_added_tensor_is_named(source: Path, copy: Path) -> None:
    change(copy, lambda tensors: tensors.update(stranger=torch.zeros(3)) if f"{Q0}.scales" in tensors else None)
    found = verify(copy, source)
    assert failed(found) == ["tensors"] and "no place for stranger" in check(found, "tensors").detail
    assert "only here: stranger" in check(found, "source tensors").detail


def test_modules_beside_the_model_must_travel_along(source: Path, tmp_path: Path) -> None:
    extended = shutil.copytree(source, tmp_path / "extended")
    change(extended, lambda tensors: tensors.update({"mtp.head.weight": torch.randn(8, 8)}))
    bittern.quantize(extended, tmp_path / "out", **SMALL)
    found = verify(tmp_path / "out", extended)
    assert found.passed and "mtp.head.weight" in check(found, "tensors").detail
    change(tmp_path / "out", lambda tensors: tensors["mtp.head.weight"].add_(1))
    found = verify(tmp_path / "out", extended, logits=False)
    assert failed(found) == ["source values"] and "mtp.head.weight" in check(found, "source values").detail
    change(tmp_path / "out", lambda tensors: tensors.pop("mtp.head.weight"))
    found = verify(tmp_path / "out", extended, logits=False)
    assert failed(found) == ["source tensors"] and "missing: mtp.head.weight" in check(found, "source tensors").detail


def test_a_tied_head_may_be_left_out_only_when_it_is_the_embedding(tmp_path: Path) -> None:
    source = tiny.save(tiny.random_model(tie_word_embeddings=True), tmp_path / "source")
    bittern.convert(source, tmp_path / "out", dtype="fp32")
    embedding = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    change(source, lambda tensors: tensors.update({"lm_head.weight": embedding.clone()}))
    found = verify(tmp_path / "out", source, logits=False)
    assert found.passed and "lm_head.weight" in check(found, "source tensors").detail
    change(source, lambda tensors: tensors["lm_head.weight"].add_(1))
    assert failed(verify(tmp_path / "out", source, logits=False)) == ["source tensors"]


def test_an_altered_config_is_found(source: Path, copy: Path) -> None:
    path = copy / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "initializer_range": 0.5, "use_cache": False, "attention_dropout": 0.5}))
    assert failed(verify(copy, source, logits=False)) == ["files"]  # of training alone
    path.write_text(json.dumps({**config, "rms_norm_eps": 0.125}))
    assert failed(verify(copy, source, logits=False)) == ["files", "source config"]
    rehash(copy)
    found = verify(copy, source, logits=False)
    assert failed(found) == ["source config"] and "rms_norm_eps is 0.125" in check(found, "source config").detail
    path.write_text(json.dumps({**config, "intermediate_size": 128}))
    assert "config.json asks for shape" in check(verify(copy, source), "tensors").detail


@pytest.mark.parametrize(
    "config",
    [
        "",
        "[]",
        '{"model_type": "llama"}',
        '{"model_type": "nothing"}',
        '{"model_type": "llama", "hidden_size": "wide"}',
    ],
)
def test_a_broken_config_fails_in_one_line(copy: Path, config: str) -> None:
    (copy / "config.json").write_text(config)
    assert set(failed(verify(copy))) == {"tensors", "files"}


def test_a_truncated_shard_fails_and_nothing_there_is_refused(copy: Path, tmp_path: Path) -> None:
    shard = sorted(copy.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-7])
    assert set(failed(verify(copy))) == {"tensors", "files"}
    with pytest.raises(BitternError, match="nowhere"):
        verify(tmp_path / "nowhere.gguf")
    with pytest.raises(BitternError, match="nowhere"):
        verify(copy, tmp_path / "nowhere.gguf")
    (tmp_path / "empty").mkdir()
    assert failed(verify(tmp_path / "empty")) == ["tensors"]


def test_a_tampered_zero_is_found(packed: Path, copy: Path) -> None:
    name = f"{Q1}.qzeros"
    change(copy, lambda tensors: tensors[name][0, :1].bitwise_xor_(1) if name in tensors else None)
    assert verify(copy, logits=False).passed
    found = verify(copy, packed, logits=False)
    assert failed(found) == ["source values"]
    assert check(found, "source values").detail == f"{Q1}: its weights differ by up to 1 steps of the source's grid"


def test_a_tampered_zero_of_a_symmetric_layer_needs_no_source(source: Path, tmp_path: Path) -> None:
    bittern.quantize(source, tmp_path / "out", **SMALL)
    change(tmp_path / "out", lambda tensors: tensors[f"{Q1}.qzeros"][0, :1].bitwise_xor_(1))
    found = verify(tmp_path / "out")
    assert "values" in failed(found) and f"{Q1}.qzeros: expected 8 everywhere" in check(found, "values").detail


@pytest.mark.parametrize("name", ["model.norm.weight", f"{Q0}.scales"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_named(copy: Path, name: str, value: float) -> None:
    change(copy, lambda tensors: tensors[name].view(-1)[:1].fill_(value) if name in tensors else None)
    found = verify(copy, logits=False)
    assert failed(found) == ["values"] and name.removesuffix(".scales") in check(found, "values").detail


def test_an_act_order_artifact_against_its_floats_and_back(tmp_path: Path) -> None:
    made = make(tmp_path, act_order=True)
    found = verify(made.artifact, made.plain, logits=False)
    assert found.passed and check(found, "files").passed is None
    found = verify(made.plain, made.artifact)
    assert found.passed and "14 packed layers equal" in check(found, "source values").detail
    # The same weights with columns in another order: only g_idx tells.
    name = f"{made.layers[0]}.g_idx"
    change(made.artifact, lambda tensors: tensors.update({name: tensors[name].flip(0)}))
    assert failed(verify(made.plain, made.artifact, logits=False)) == ["source values"]


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_a_converted_checkpoint_against_its_source(source: Path, tmp_path: Path, dtype: str) -> None:
    bittern.convert(source, tmp_path / "out", dtype=dtype)
    found = verify(tmp_path / "out", source)
    assert found.passed and check(found, "source values").detail == "21 plain tensors equal"
    name = "model.layers.1.input_layernorm.weight"
    change(tmp_path / "out", lambda tensors: tensors[name][:1].mul_(1.01))
    found = verify(tmp_path / "out", source, logits=False)
    assert failed(found) == ["source values"] and f"{name}: 1 of 64 values" in check(found, "source values").detail


def test_what_was_clamped_is_the_source_clamped(source: Path, tmp_path: Path) -> None:
    large = shutil.copytree(source, tmp_path / "large")
    change(large, lambda tensors: tensors["model.norm.weight"][:1].fill_(7e4))
    bittern.convert(large, tmp_path / "out", dtype="fp16", clamp=True)
    assert verify(tmp_path / "out", large, logits=False).passed
    manifest = json.loads((tmp_path / "out" / MANIFEST_FILE).read_text())
    assert manifest["kind"] == "convert" and manifest["clamped"] == {"model.norm.weight": 1}
    assert manifest["notes"] == ["1 values in 1 tensors were clamped to what fp16 holds"]


@pytest.mark.parametrize("format", ["gptq_v2", "compressed-tensors", "awq", "mlx", "safetensors"])
def test_a_repacked_artifact_against_what_it_was(packed: Path, tmp_path: Path, format: str) -> None:
    if format == "safetensors":
        dequantize(packed, tmp_path / "out", dtype="fp32")
    else:
        repack(packed, tmp_path / "out", format=format, dtype="fp32" if format == "mlx" else None)
    found = verify(tmp_path / "out", packed)
    assert found.passed, [(each.name, each.detail) for each in found.checks]
    assert "14 packed layers equal" in check(found, "source values").detail
    assert float(check(found, "logits").detail.split()[2]) < 1e-4
    origin = json.loads((packed / MANIFEST_FILE).read_text())
    manifest = json.loads((tmp_path / "out" / MANIFEST_FILE).read_text())
    assert manifest["kind"] == "repack" and layer_records(manifest) == layer_records(origin) != []


def test_a_gguf_file_against_what_it_was_and_back(source: Path, packed: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    sym, file, words = tmp_path / "sym", tmp_path / "out.gguf", " ".join(tiny.WORDS)
    bittern.quantize(source, sym, **SMALL)
    convert(sym, file, format="gguf")
    convert(file, tmp_path / "back", format="gptq")
    for output, against in ((file, sym), (tmp_path / "back", sym), (sym, file)):
        found = verify(output, against, prompt=words)
        assert found.passed, [(each.name, each.detail) for each in found.checks]
        assert "14 packed layers equal, 14 in codes too" in check(found, "source values").detail
    assert check(verify(file, source, prompt=words), "files").passed is None
    convert(source, tmp_path / "plain.gguf", format="gguf", dtype="fp16")
    assert verify(tmp_path / "plain.gguf", source, prompt=words).passed


def test_a_gguf_file_says_what_was_rescaled(source: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    file = tmp_path / "out.gguf"
    bittern.quantize(source, file, dataset=str(text), **CALIBRATED)
    convert(file, tmp_path / "back", format="gptq")
    for output in (file, tmp_path / "back"):
        found = verify(output, source, prompt=" ".join(tiny.WORDS))
        assert "rescaled or trained as the artifact says" in check(found, "source values").detail
        assert found.passed, [(each.name, each.detail) for each in found.checks]


@pytest.mark.parametrize("kind", ["gguf", "folder"])
def test_what_was_rescaled_before_is_not_excused_again(kind: str, source: Path, text: Path, tmp_path: Path) -> None:
    if kind == "gguf":
        pytest.importorskip("gguf")
    first, out = tmp_path / "first", tmp_path / ("out.gguf" if kind == "gguf" else "out")
    manifest = bittern.quantize(source, first, dataset=str(text), **CALIBRATED)
    norm = next(name for name in manifest["changed"] if name.endswith("input_layernorm.weight"))
    convert(first, out, format="gguf" if kind == "gguf" else "compressed-tensors")
    words = " ".join(tiny.WORDS)
    assert verify(out, first, prompt=words).passed
    if kind == "gguf":
        with open_checkpoint(first) as checkpoint:
            values = checkpoint.read(norm).float().numpy().tobytes()
        data = out.read_bytes()
        assert data.count(values) == 1
        out.write_bytes(data.replace(values, (np.frombuffer(values, "f4") * 1.01).astype("f4").tobytes()))
    else:
        tensors = load_file(out / "model.safetensors")
        save_file(tensors | {norm: tensors[norm] * 1.01}, out / "model.safetensors", {"format": "pt"})
    found = verify(out, first, prompt=words)
    assert norm in check(found, "source values").detail and check(found, "source values").passed is False
    convert(first, tmp_path / "floats", format="safetensors")
    bittern.quantize(tmp_path / "floats", tmp_path / "again", **SMALL)  # rounds, and rescales nothing
    detail = check(verify(tmp_path / "again", tmp_path / "floats", prompt=words), "source values").detail
    assert "rescaled or trained" not in detail
    assert "rescaled or trained" in check(verify(tmp_path / "again", source, prompt=words), "source values").detail


def test_logits_of_a_model_that_knows_nothing_any_more(source: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = bittern.quantize(source, out, dataset=str(text), **CALIBRATED)
    norms = [name for name in manifest["changed"] if name.endswith("layernorm.weight")]
    tensors = load_file(out / "model.safetensors")
    damaged = {name: -300 * tensors[name] for name in norms}
    save_file(tensors | damaged, out / "model.safetensors", {"format": "pt"})
    found = check(verify(out, source, prompt=" ".join(tiny.WORDS)), "logits")
    assert found.passed is False and "a model that knows nothing" in found.detail


def test_a_revision_without_a_source_is_that_of_the_artifact(packed: Path) -> None:
    with pytest.raises(BitternError, match="only a Hub id has revisions"):
        verify(packed, revision="main")


def test_a_gguf_file_says_that_it_is_degraded(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    worse, file, back = tmp_path / "worse", tmp_path / "worse.gguf", tmp_path / "back"
    shutil.copytree(source, worse)
    config = json.loads((worse / "config.json").read_text())
    (worse / "config.json").write_text(json.dumps({**config, "bittern": {"degraded": "it was not trained"}}))
    convert(worse, file, format="gguf")
    convert(file, back)
    assert json.loads((back / "config.json").read_text())["bittern"] == {"degraded": "it was not trained"}
    bittern.quantize(file, tmp_path / "packed", **SMALL)
    manifest = json.loads((tmp_path / "packed" / MANIFEST_FILE).read_text())
    assert "this checkpoint is degraded: it was not trained" in manifest["notes"]


def test_another_gguf_file_of_the_same_shape_is_found(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    other = tiny.save(tiny.random_model(seed=1), tmp_path / "other")
    shutil.copy(source / "tokenizer.json", other)
    shutil.copy(source / "tokenizer_config.json", other)
    convert(other, tmp_path / "other.gguf", format="gguf")
    assert failed(verify(tmp_path / "other.gguf", source, logits=False, prompt="moss")) == ["source values"]


FAMILIES = {
    "mixtral": {"num_local_experts": 4},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_and_transposed_weights_are_compared_row_by_row(family: str, tmp_path: Path) -> None:
    source = tiny.save(tiny.random_model(family, **FAMILIES[family]), tmp_path / "source")
    bittern.quantize(source, tmp_path / "packed", **SMALL)
    found = verify(tmp_path / "packed", source, logits=False)
    assert found.passed, [(each.name, each.detail) for each in found.checks]
    worst = float(check(found, "source values").detail.split(",")[1].rpartition(" ")[2])
    assert 0.01 < worst < 0.3  # of 4 bits; a transposed matrix would be above 1
    dequantize(tmp_path / "packed", tmp_path / "plain", dtype="fp32")
    assert verify(tmp_path / "plain", tmp_path / "packed", logits=False).passed
    assert failed(verify(tmp_path / "plain", source, logits=False)) == ["source values"]


def test_logits_that_differ_where_the_weights_do_not(source: Path, tmp_path: Path) -> None:
    """What only the logits see: a setting of the model that its weights do not show."""
    bittern.convert(source, tmp_path / "out", dtype="fp32")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"]["rope_theta"] = 7.0
    path.write_text(json.dumps(config))
    rehash(tmp_path / "out")
    found = verify(tmp_path / "out", source)
    assert failed(found) == ["source config", "logits"]
    assert "0.001 at most" in check(found, "logits").detail


def test_logits_of_a_model_of_zeros_are_all_the_same(source: Path, tmp_path: Path) -> None:
    dead = shutil.copytree(source, tmp_path / "dead")
    change(dead, lambda tensors: tensors["model.norm.weight"].zero_())
    assert "all logits are the same" in check(verify(dead), "logits").detail


def test_another_tokenizer_is_found(source: Path, copy: Path) -> None:
    path = copy / "tokenizer.json"
    found = json.loads(path.read_text())
    found["pre_tokenizer"]["add_prefix_space"] = True
    path.write_text(json.dumps(found))
    rehash(copy)
    assert failed(verify(copy, source, logits=False)) == ["tokenizer"]
    for file in copy.glob("*token*"):
        file.unlink()
    assert "tokenizer" in failed(verify(copy, source, logits=False))
    assert check(verify(source, copy, logits=False), "tokenizer").passed is None  # nothing to hold it against


def test_a_text_of_ones_own(packed: Path) -> None:
    assert "finite on" in check(verify(packed, prompt="quiet river"), "logits").detail
    assert "at least one token" in check(verify(packed, prompt=""), "logits").detail
    with pytest.raises(BitternError, match="prompt: expected a source to compare tokens with, or logits"):
        verify(packed, logits=False, prompt="quiet river")


def test_layer_records_are_found_through_every_repacking() -> None:
    record = {"layer": "a", "bits": 4, "seconds": 1.0}
    options: dict[str, Any] = {"notes": [], "seconds": 1.0}
    first = make_manifest(source={}, options={}, calibration=None, layers=[record], kept={}, **options)
    second = repacked_manifest(first, {}, {}, repacked=[{"layer": "a"}], **options)
    third = repacked_manifest(second, {}, {}, repacked=[], **options)
    assert [layer_records(each) for each in (first, second, third)] == [[{"layer": "a", "bits": 4}]] * 3
    # All that two runs measure differently is in one place.
    assert "measured" not in second["origin"] and second["measured"]["origin"] == first["measured"]
    assert layer_records(repacked_manifest(None, {}, {}, repacked=[], **options)) == []
    assert layer_records({"layers": 7, "origin": [1]}) == layer_records({"origin": None}) == []


def test_converting_twice_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    for name in "ab":
        bittern.convert(source, tmp_path / name)
    manifests = [json.loads((tmp_path / name / MANIFEST_FILE).read_text()) for name in "ab"]
    assert {**manifests[0], "measured": None} == {**manifests[1], "measured": None}
