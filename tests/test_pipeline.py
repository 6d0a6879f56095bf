"""The whole job on a tiny model: what an artifact holds, what is refused, and what a kill leaves behind."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import bittern
from bittern.artifact import Artifact
from bittern.checkpoint import open_checkpoint
from bittern.convert.cast import convert
from bittern.convert.repack import dequantize
from bittern.errors import BitternError
from bittern.evaluate import text_windows
from bittern.quantize.windows import default_batch
from tests import tiny

SMALL = {"bits": 4, "group_size": 32, "nsamples": 6, "seqlen": 32, "batch_size": 4}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tiny.save(tiny.random_model(), tmp_path_factory.mktemp("source"), tokenizer)
    (folder / "LICENSE").write_text("free")
    return folder


def changed(source: Path, folder: Path, name: str, value: float) -> Path:
    """A copy of a checkpoint with one value of one tensor replaced."""
    folder.mkdir()
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    tensors[name].view(-1)[3] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def run(source: Path, out: Path, text: Path, **options: Any) -> dict[str, Any]:
    return bittern.quantize(source, out, **{"dataset": str(text), **SMALL, **options})


def test_the_artifact_holds_everything(source: Path, text: Path, tmp_path: Path) -> None:
    manifest = run(source, tmp_path / "out", text)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "quantize_config.json", "bittern_manifest.json", "model.safetensors"} <= files
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"} <= files
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"] == json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert config["quantization_config"]["checkpoint_format"] == "gptq" and config["dtype"] == "float16"
    assert json.loads((tmp_path / "out" / "bittern_manifest.json").read_text()) == json.loads(json.dumps(manifest))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["model.embed_tokens.weight"].dtype == torch.float16
    assert not any(name.endswith("proj.weight") for name in stored)
    layer = manifest["layers"][0]
    assert layer["layer"] == "model.layers.0.self_attn.q_proj" and layer["shape"] == [64, 64]
    assert layer["method"] == "gptq" and layer["tokens"] == 6 * 32 and 0 < layer["loss"] < 0.1
    assert manifest["calibration"]["tokens_found"] == 6 * 32 and len(manifest["calibration"]["sha256"]) == 64


@pytest.mark.parametrize(("options", "damp"), [({"effort": "plain"}, 0.01), ({}, 0.2), ({"damp_percent": 0.05}, 0.05)])
def test_damping_is_the_effort_s_or_the_user_s(
    options: dict[str, Any], damp: float, source: Path, text: Path, tmp_path: Path
) -> None:
    manifest = run(source, tmp_path / "out", text, **options)
    assert {layer["damp"] for layer in manifest["layers"]} == {manifest["options"]["damp_percent"]} == {damp}
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text())["damp_percent"] == damp


def test_same_seed_same_bytes(source: Path, text: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 7)):
        run(source, tmp_path / name, text, seed=seed)
    for path in (tmp_path / "a").iterdir():
        if path.name != "bittern_manifest.json":
            assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    a, b, c = (json.loads((tmp_path / name / "bittern_manifest.json").read_text()) for name in "abc")
    assert {**a, "measured": None, "prediction": None} == {**b, "measured": None, "prediction": None}
    assert a["calibration"]["sha256"] != c["calibration"]["sha256"]
    assert (tmp_path / "a" / "model.safetensors").read_bytes() != (tmp_path / "c" / "model.safetensors").read_bytes()


def test_torch_s_default_dtype_changes_no_byte(source: Path, text: Path, tmp_path: Path) -> None:
    written = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            run(source, tmp_path / str(dtype), text, effort="best", tune_tokens=1000)
        finally:
            torch.set_default_dtype(torch.float32)
        written.append((tmp_path / str(dtype) / "model.safetensors").read_bytes())
    assert written[0] == written[1] == written[2]


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_more_bits_keep_more(bits: int, sym: bool, source: Path, text: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out", text, bits=bits, sym=sym)
    ids = torch.randint(4, 200, (4, 32), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = tiny.read_model(source)(ids).logits
        found = bittern.load(tmp_path / "out", device="cpu")(ids).logits
    error = float((found - expected).norm() / expected.norm())
    # Random weights have no structure to exploit: about a step over the range of a group.
    bounds = {8: 0.02, 4: 0.25, 3: 0.5, 2: 1.0}
    assert bounds[bits] / 40 < error < bounds[bits]


def test_gptq_keeps_more_than_rounding(source: Path, text: Path, tmp_path: Path) -> None:
    errors = {}
    ids = bittern.load(source, device="cpu")
    with open_checkpoint(source) as checkpoint:
        probe = text_windows(text, checkpoint.tokenizer(), seqlen=32, windows=8)
    with torch.no_grad():
        expected = ids(probe).logits
        for method in ("gptq", "rtn"):
            options: dict[str, Any] = {"bits": 3, "group_size": 32, "method": method}
            if method == "gptq":
                options |= {"dataset": str(text), "nsamples": 64, "seqlen": 32}
            manifest = bittern.quantize(source, tmp_path / method, **options)
            assert {layer["method"] for layer in manifest["layers"]} == {method}
            errors[method] = float((bittern.load(tmp_path / method, device="cpu")(probe).logits - expected).norm())
    assert errors["gptq"] < errors["rtn"]


def test_layers_of_other_bits_and_skipped_ones(source: Path, text: Path, tmp_path: Path) -> None:
    manifest = run(source, tmp_path / "out", text, layers=[("down_proj", 8)], skip=[r"layers\.1\.self_attn"])
    bits = {layer["layer"]: layer["bits"] for layer in manifest["layers"]}
    assert bits["model.layers.0.mlp.down_proj"] == 8 and bits["model.layers.0.mlp.up_proj"] == 4
    assert len(manifest["kept"]) == 4
    stored = load_file(tmp_path / "out" / "model.safetensors")
    original = load_file(source / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(stored[name], original[name].half())
    bittern.load(tmp_path / "out", device="cpu")


def test_a_bf16_source_stays_bf16(source: Path, text: Path, tmp_path: Path) -> None:
    bittern.convert(source, tmp_path / "bf16", dtype="bf16")
    run(tmp_path / "bf16", tmp_path / "out", text)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["model.norm.weight"].dtype == torch.bfloat16
    assert stored["model.layers.0.self_attn.q_proj.scales"].dtype == torch.float16


def test_an_older_checkpoint_without_the_prefix(source: Path, text: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "expected", text)
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            (bare / path.name).write_bytes(path.read_bytes())
    tensors = {name.removeprefix("model."): t for name, t in load_file(source / "model.safetensors").items()}
    save_file(tensors, bare / "model.safetensors", {"format": "pt"})
    run(bare, tmp_path / "out", text)
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("expected", "out"))
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)


def test_several_texts(source: Path, text: Path, tmp_path: Path) -> None:
    """They are named in the manifest and in its command, which makes the same bytes; a dry run says which it left."""
    other = tiny.write_text(tmp_path / "other.txt", words=900)
    shared = [str(text), str(other)]
    manifest = run(source, tmp_path / "out", text, dataset=shared)
    assert manifest["calibration"]["source"] == ", ".join(shared) and manifest["calibration"]["tokens_found"] == 6 * 32
    command = manifest["command"]
    assert [command[at + 1] for at, word in enumerate(command) if word == "--dataset"] == shared
    again = [tmp_path / "again" if word == "OUT" else word for word in command[1:]]
    subprocess.run([sys.executable, "-m", "bittern", *again], check=True, capture_output=True)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again")]
    assert weights[0] == weights[1]
    assert run(source, tmp_path / "one", text)["calibration"]["sha256"] != manifest["calibration"]["sha256"]
    notes = run(source, tmp_path / "dry", text, dataset=[str(text), "org/a", "self"], dry_run=True)["notes"]
    assert [note.split(" was not read")[0] for note in notes] == ["--dataset org/a", "--dataset self"]


def test_self_calibration_needs_no_file(source: Path, tmp_path: Path) -> None:
    manifest = run(source, tmp_path / "out", Path("self"), nsamples=4)
    assert manifest["calibration"]["source"] == "self" and manifest["calibration"]["tokens_found"] == 4 * 32


def test_fewer_tokens_than_asked_for_are_said(source: Path, tmp_path: Path) -> None:
    text = tiny.write_text(tmp_path / "short.txt", words=300)
    manifest = run(source, tmp_path / "out", text, nsamples=500)
    assert any("500 x 32 = 16000 calibration tokens asked for" in note for note in manifest["notes"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, "bits: expected one of 2, 3, 4, 8, found 5"),
        ({"group_size": 128}, "group_size 128: does not divide in_features"),
        ({"method": "awq"}, "method: expected gptq or rtn, found 'awq'"),
        ({"damp_percent": 0.0}, "damp_percent: expected a share between 0 and 1, found 0"),
        ({"dtype": "int8"}, "dtype: expected bf16, fp16 or fp32, found 'int8'"),
        ({"batch_size": 0}, "batch_size: expected at least 1, found 0"),
        ({"effort": "best", "tune_tokens": 0}, "tune_tokens: expected at least 1, found 0"),
        ({"effort": "best", "method": "rtn"}, "effort best: needs --method gptq"),
        ({"method": "rtn"}, r"dataset .*: needs --method gptq; rounding to nearest calibrates and trains nothing"),
        ({"seqlen": 4096, "dry_run": True, "dataset": "no/such"}, "seqlen 4096: this model's context is"),
        ({"tune_tokens": 1000}, "tune_tokens: found 1000, but effort fast trains nothing; expected best"),
        ({"device": "tpu"}, "device: expected auto, cpu or cuda, found 'tpu'"),
        ({"seqlen": 65}, "seqlen 65: this model's context is 64 tokens"),
        ({"skip": ["nowhere"]}, "--skip nowhere: matches none"),
        ({"dataset": "/nowhere/text.txt"}, "/nowhere/text.txt"),
    ],
)
def test_bad_options_are_refused_before_any_work(
    options: dict[str, Any], message: str, source: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(BitternError, match=message):
        run(source, tmp_path / "out", text, **options)
    assert not list(tmp_path.iterdir())


def test_an_empty_text_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(BitternError, match=r"empty\.txt"):
        run(source, tmp_path / "out", tmp_path / "empty.txt")


def test_an_existing_output_is_refused_without_overwrite(source: Path, text: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out", text, bits=8)
    with pytest.raises(BitternError, match="exists already"):
        run(source, tmp_path / "out", text)
    run(source, tmp_path / "out", text, overwrite=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["bits"] == 4
    with pytest.raises(BitternError, match="apart from the source"):
        run(source, source, text, overwrite=True)


def test_a_quantized_source_is_refused(source: Path, text: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out", text)
    with pytest.raises(BitternError, match="quantiz"):
        run(tmp_path / "out", tmp_path / "again", text)


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"]
)
def test_a_weight_that_is_not_a_number_is_named(name: str, source: Path, text: Path, tmp_path: Path) -> None:
    broken = changed(source, tmp_path / "broken", name, float("nan"))
    with pytest.raises(BitternError, match=name.replace(".", r"\.")):
        run(broken, tmp_path / "out", text)
    assert {path.name for path in tmp_path.iterdir()} == {"broken"}  # found before a block is solved


def test_an_activation_that_overflows_is_named_with_its_sample(source: Path, text: Path, tmp_path: Path) -> None:
    broken = changed(source, tmp_path / "broken", "model.layers.0.self_attn.v_proj.weight", 3.3e38)
    for effort, at in (("fast", r"0: NaN or infinite output"), ("plain", r"0\.self_attn\.o_proj: NaN or infinite")):
        with pytest.raises(BitternError, match=rf"model\.layers\.{at}.*calibration sample \d"):
            run(broken, tmp_path / "out", text, skip=["v_proj"], dtype="fp32", effort=effort)
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_what_fp16_cannot_hold_is_named(source: Path, text: Path, tmp_path: Path) -> None:
    broken = changed(source, tmp_path / "broken", "model.norm.weight", 7e4)
    with pytest.raises(BitternError, match=r"model\.norm\.weight.*70000.*bf16"):
        run(broken, tmp_path / "out", text)
    run(broken, tmp_path / "out", text, dtype="bf16")


def test_a_head_of_its_own_that_the_configuration_ties_is_not_lost(
    source: Path, text: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    tied = tiny.save(tiny.random_model(tie_word_embeddings=True), tmp_path / "tied", tokenizer)
    tensors = load_file(tied / "model.safetensors")
    assert "lm_head.weight" not in tensors
    embedding = tensors["model.embed_tokens.weight"]
    for head in (embedding.clone(), embedding.bfloat16()):  # a copy, and one in another dtype
        save_file({**tensors, "lm_head.weight": head}, tied / "model.safetensors", {"format": "pt"})
        run(tied, tmp_path / "out", text, overwrite=True)
        bittern.load(tied, device="cpu")
    other = embedding.clone()
    other[3, 5] += 1
    save_file({**tensors, "lm_head.weight": other}, tied / "model.safetensors", {"format": "pt"})
    for attempt in (
        lambda: run(tied, tmp_path / "lost", text),
        lambda: bittern.load(tied, device="cpu"),
        lambda: bittern.uptrain(tied, tmp_path / "lost", kv_heads=1, dataset=str(text), seqlen=32, nsamples=2),
    ):
        with pytest.raises(BitternError, match=r"lm_head\.weight is no copy of the embedding, but tie"):
            attempt()
    assert not (tmp_path / "lost").exists()


def test_a_wrong_tokenizer_is_refused(source: Path, text: Path, tmp_path: Path) -> None:
    small = tiny.save(tiny.random_model(vocab_size=32, hidden_size=64), tmp_path / "small", tiny.make_tokenizer(text))
    with pytest.raises(BitternError, match="does not fit the model"):
        run(small, tmp_path / "out", text)


def test_a_missing_tensor_is_named(source: Path, text: Path, tmp_path: Path) -> None:
    broken = changed(source, tmp_path / "broken", "model.norm.weight", 1.0)
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.mlp.gate_proj.weight"]
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        BitternError, match=r"model\.layers\.1\.mlp\.gate_proj\.weight: the checkpoint has no such tensor"
    ):
        run(broken, tmp_path / "out", text)


def test_a_config_of_other_shapes_is_refused(source: Path, text: Path, tmp_path: Path) -> None:
    broken = changed(source, tmp_path / "broken", "model.norm.weight", 1.0)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))
    with pytest.raises(BitternError, match=r"config\.json asks for shape"):
        run(broken, tmp_path / "out", text)


def test_extra_tensors_travel_along(source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those too that transformers passes over in silence, as it does with heads of several tokens."""
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"mtp\."])
    extended = changed(source, tmp_path / "extended", "model.norm.weight", 1.0)
    tensors = load_file(extended / "model.safetensors")
    tensors["mtp.head.weight"] = torch.randn(8, 8)
    save_file(tensors, extended / "model.safetensors", {"format": "pt"})
    run(extended, tmp_path / "out", text)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(stored["mtp.head.weight"], tensors["mtp.head.weight"].half())
    bittern.load(tmp_path / "out", device="cpu")


def test_kill_at_any_moment_leaves_nothing_that_opens(source: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = (
        "import sys, time, bittern\n"
        f"bittern.quantize({str(source)!r}, {str(out)!r}, dataset={str(text)!r}, nsamples=6, seqlen=32, group_size=32,"
        " on_progress=lambda event: (print(event['index'], flush=True), time.sleep(0.05)))\n"
    )
    for stop_after in (0, 5, 13):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) >= stop_after:
                break
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not out.exists()
        left = {path.name for path in tmp_path.rglob("*")}
        assert "config.json" not in left
        assert all(name.startswith(("block-", "outputs-")) for name in left if name.endswith(".safetensors"))
    run(source, out, text)
    assert (out / "config.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("family", "config", "others"),
    [
        (
            "qwen3_moe",
            {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
            ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"],
        ),
        (
            "opt",
            {"word_embed_proj_dim": 32, "ffn_dim": 96, "do_layer_norm_before": False},
            ["model.decoder.project_in", "model.decoder.project_out"],
        ),
    ],
)
@pytest.mark.parametrize("format", ["compressed-tensors", "awq", "gptq"])
def test_matrices_that_are_never_packed_are_named_where_readers_ask(
    family: str, config: dict[str, Any], others: list[str], format: str, tmp_path: Path
) -> None:
    """vLLM takes every Linear for packed that compressed-tensors and AWQ do not name; so does transformers."""
    source = tiny.save(tiny.random_model(family, **config), tmp_path / "source")
    bittern.quantize(source, tmp_path / "made", bits=4, group_size=32, method="rtn")
    bittern.quantize(source, tmp_path / "direct", bits=4, group_size=32, method="rtn", format=format)
    bittern.convert(tmp_path / "made", tmp_path / "repacked", format=format)
    for name in ("direct", "repacked"):
        found = json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        key = {"compressed-tensors": "ignore", "awq": "modules_to_not_convert"}.get(format, "dynamic")
        told = found.get(key) or []
        if format == "gptq":
            assert not told
            continue
        named = {
            other
            for other in others
            for target in told
            if other == target or re.match(target.removeprefix("re:"), other)
        }
        assert named == set(others)
        assert not any("embed_tokens" in target for target in told)
        assert Artifact(open_checkpoint(tmp_path / name)).layers


def test_blocks_behind_those_of_experts_are_walked_in_stages(
    text: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Qwen3-MoE with an MLP in its last block: what drifts in the blocks before it is corrected there."""
    config = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    model = tiny.random_model("qwen3_moe", num_hidden_layers=3, mlp_only_layers=[2], **config)
    source = tiny.save(model, tmp_path / "source", tokenizer)
    manifest = run(source, tmp_path / "out", text, bits=2, nsamples=16)
    drifts = {layer["layer"]: "drift" in layer["left"] for layer in manifest["layers"]}
    assert {name.split(".")[2] for name, drift in drifts.items() if drift} == {"2"}


def test_a_linear_router_of_experts_is_no_layer_to_pack(tmp_path: Path) -> None:
    config: dict[str, Any] = {"num_experts": 32, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    config |= {"num_dense_layers": 1, "num_shared_experts": 1, "layer_types": ["full_attention"] * 2}
    source = tiny.save(tiny.random_model("afmoe", **config), tmp_path / "source")
    manifest = bittern.quantize(source, tmp_path / "out", bits=2, group_size=32, method="rtn")
    assert manifest["kept"] == {"model.layers.1.mlp.router.gate": "a router of experts: nobody reads one packed"}
    assert any(".experts.31." in layer["layer"] for layer in manifest["layers"])


@pytest.mark.parametrize(
    ("options", "format"),
    [
        ({"format": "gptq_v2"}, "gptq_v2"),
        ({"format": "awq"}, "awq"),
        (
            {"format": "compressed-tensors", "bits": 3, "layers": [("o_proj", 8)], "skip": ["down_proj"]},
            "compressed-tensors",
        ),
        ({"format": "mlx", "bits": 2}, "mlx"),
        ({"format": "mlx", "sym": False}, "mlx"),
        ({"target": "vllm"}, "gptq"),
        ({"target": "vllm", "sym": False}, "compressed-tensors"),
        ({"target": "vllm", "bits": 3}, "compressed-tensors"),
        ({"target": "sglang", "bits": 8}, "gptq"),
        ({"target": "gptqmodel", "sym": False}, "gptq_v2"),
        ({"target": "transformers", "bits": 2, "sym": False}, "gptq_v2"),
        ({"target": "mlx"}, "mlx"),
    ],
)
def test_any_format_holds_the_same_weights(options: dict[str, Any], format: str, source: Path, tmp_path: Path) -> None:
    """Straight from the solver, and repacked from the GPTQ artifact of the same run."""
    choices = {"bits": 4, "group_size": 32, "method": "rtn", **options}
    bittern.quantize(source, tmp_path / "out", **choices)
    bittern.quantize(source, tmp_path / "gptq", **{**choices, "format": None, "target": None})
    ours, theirs = (Artifact(open_checkpoint(tmp_path / name)) for name in ("out", "gptq"))
    assert ours.format == format
    assert list(ours.layers) == list(theirs.layers)
    for layer in ours.layers:
        one, other = ours.read(layer), theirs.read(layer)
        assert one.spec == other.spec
        assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("codes", "scales", "zeros"))
    assert (tmp_path / "out" / "quantize_config.json").exists() == str(ours.format).startswith("gptq")
    manifest = json.loads((tmp_path / "out" / "bittern_manifest.json").read_text())
    assert set(manifest["files"]) == {path.name for path in (tmp_path / "out").iterdir()} - {"bittern_manifest.json"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "awq", "bits": 3}, "--format awq: AWQ has 4 bits alone, found 3"),
        ({"format": "gptq", "sym": False}, "--format gptq: asymmetric"),
        ({"format": "exl2"}, r"format: expected one of gptq, .* found 'exl2'"),
        (
            {"target": "vllm", "format": "gptq", "bits": 3},
            r"--target vllm: gptq: 3 bits: .*; compressed-tensors would do",
        ),
        ({"target": "llama.cpp", "bits": 8, "sym": False}, "--target llama.cpp: gguf: .*8-bit asymmetric"),
        ({"target": "ollama"}, "--target: expected one of transformers, .* found 'ollama'"),
    ],
)
def test_refuses_formats_before_any_work(options: dict[str, Any], message: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(BitternError, match=message):
        bittern.quantize(source, tmp_path / "out", **{"group_size": 32, "dataset": "/nonexistent", **options})
    assert not list(tmp_path.iterdir())


def test_gguf_is_written_in_one_go_and_leaves_nothing_else(source: Path, tmp_path: Path) -> None:
    choices: dict[str, Any] = {"group_size": 32, "method": "rtn"}
    bittern.quantize(source, tmp_path / "out" / "model.gguf", target="llama.cpp", **choices)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.gguf"]
    bittern.quantize(source, tmp_path / "model", **choices)
    bittern.convert(tmp_path / "model", tmp_path / "two.gguf")  # the name says what it shall be
    with pytest.raises(BitternError, match=r"one\.gguf: expected a folder for awq"):
        bittern.convert(tmp_path / "model", tmp_path / "one.gguf", format="awq")
    with pytest.raises(BitternError, match=r"one\.gguf: expected a folder for gptq"):
        bittern.quantize(source, tmp_path / "one.gguf", target="vllm", **choices)
    ours, theirs = (Artifact(open_checkpoint(path)) for path in (tmp_path / "out" / "model.gguf", tmp_path / "model"))
    assert list(ours.layers) and set(ours.layers) == set(theirs.layers)
    assert all(torch.equal(ours.read(layer).codes, theirs.read(layer).codes) for layer in ours.layers)
    with pytest.raises(BitternError, match="it exists already"):
        bittern.quantize(source, tmp_path / "two.gguf", format="gguf", dataset="/nonexistent", group_size=32)
    with pytest.raises(BitternError, match=r"expected the name of a \.gguf file"):
        bittern.quantize(source, tmp_path / "folder", format="gguf", dataset="/nonexistent", group_size=32)


def test_windows_are_no_longer_than_the_context_unless_asked(source: Path, text: Path, tmp_path: Path) -> None:
    manifest = run(source, tmp_path / "out", text, seqlen=None)
    assert manifest["calibration"]["tokens_asked"] == 6 * 64 and manifest["options"]["seqlen"] == 64
    assert "windows of 64 tokens: the model's context is no longer" in manifest["notes"]
    for dataset in (text, Path("self")):  # what a dry run reads, and what it does not
        foreseen = run(source, tmp_path / "dry", dataset, seqlen=None, dry_run=True)["notes"]
        assert foreseen.count("windows of 64 tokens: the model's context is no longer") == 1
    told = run(source, tmp_path / "told", text, seqlen=64)
    assert not any("context" in note for note in told["notes"])
    assert len({(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "told")}) == 1


@pytest.mark.parametrize(("device", "seqlen", "windows"), [("cpu", 512, 2), ("cpu", 4096, 1), ("cuda", 512, 8)])
def test_windows_that_run_together_suit_the_device(device: str, seqlen: int, windows: int) -> None:
    assert default_batch(seqlen, torch.device(device)) == windows


def test_the_manifest_says_how_many_windows_ran_together(source: Path, text: Path, tmp_path: Path) -> None:
    asked = run(source, tmp_path / "asked", text)
    by_default = bittern.quantize(
        source, tmp_path / "out", bits=4, group_size=32, nsamples=2, seqlen=32, dataset=str(text)
    )
    found = [manifest["options"]["batch_size"] for manifest in (asked, by_default)]
    assert found == [4, default_batch(32, torch.device("cpu"))]


@pytest.mark.parametrize(
    "option",
    [
        *({"effort": "plain"}, {"dataset": ["a.txt", "b.txt"]}, {"nsamples": 6}, {"seqlen": 32}, {"seed": 1}),
        *({"damp_percent": 0.01}, {"batch_size": 2}, {"chat_template": True}, {"tune_tokens": 1000}),
    ],
)
def test_rounding_refuses_what_calibration_takes(option: dict[str, Any], source: Path, tmp_path: Path) -> None:
    with pytest.raises(BitternError, match=next(iter(option))):
        bittern.quantize(source, tmp_path / "out", method="rtn", group_size=32, **option)
    assert not list(tmp_path.iterdir())


def test_the_manifest_of_rounding_names_no_calibration(source: Path, tmp_path: Path) -> None:
    manifest = bittern.quantize(source, tmp_path / "out", bits=8, method="rtn", group_size=32)
    unused = {"dataset", "effort", "nsamples", "seqlen", "seed", "damp_percent", "tune_tokens", "batch_size"}
    assert not unused & set(manifest["options"]) and manifest["options"]["bits"] == 8
    asked = ["--bits", "8", "--group-size", "32", "--method", "rtn", "--device", "auto"]
    size = ["--max-shard-size", "5000000000"]
    assert manifest["command"] == ["bittern", "quantize", str(source), "-o", "OUT", "--sym", *asked, *size]


def test_the_manifest_says_what_each_stage_brought(source: Path, text: Path, tmp_path: Path) -> None:
    manifest = run(source, tmp_path / "fast", text, bits=3)
    for stage in ("drift", "polish"):
        shares = [layer["left"][stage] for layer in manifest["layers"] if stage in layer["left"]]
        assert manifest["stages"][stage]["layers"] == len(shares) > 0
        assert manifest["stages"][stage]["left"] == pytest.approx(math.prod(shares) ** (1 / len(shares)))
    assert manifest["stages"]["polish"]["left"] < 1
    plain = run(source, tmp_path / "plain", text, bits=3, effort="plain")
    assert plain["stages"] == {} and all(layer["left"] == {} for layer in plain["layers"])


def test_what_transformers_keeps_in_fp32_stays_so(
    text: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Rounded to 16 bits, the biases of this router would send tokens to other experts."""
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1}
    model = tiny.random_model("glm4_moe", **experts, n_shared_experts=1, n_group=1, topk_group=1, head_dim=16)
    bias = 8 + 0.02 * torch.randn(4)
    model.model.layers[1].mlp.gate.e_score_correction_bias.copy_(bias)
    source = tiny.save(model, tmp_path / "source", tokenizer)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    convert(source, tmp_path / "bf16", dtype="bf16")
    run(tmp_path / "bf16", tmp_path / "packed", text, effort="plain")
    dequantize(tmp_path / "packed", tmp_path / "floats", dtype="bf16")
    for folder in ("bf16", "packed", "floats"):
        kept = load_file(tmp_path / folder / "model.safetensors")
        assert kept[name].dtype == torch.float32 and torch.equal(kept[name], bias)
        assert {each.dtype for key, each in kept.items() if "norm" in key} == {torch.bfloat16}
        loaded = bittern.load(tmp_path / folder, device="cpu", dtype=torch.bfloat16).state_dict()
        assert torch.equal(loaded[name], bias) and loaded["model.norm.weight"].dtype == torch.bfloat16
