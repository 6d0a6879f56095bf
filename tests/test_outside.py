"""Packed embeddings and heads: what readers see, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import bittern
from bittern.artifact import Artifact
from bittern.checkpoint import open_checkpoint
from bittern.cli import main
from bittern.convert.pipeline import convert
from bittern.errors import BitternError
from bittern.verify import verify
from bittern.weight import QuantSpec
from tests import tiny
from tests.test_pipeline import SMALL

HEAD, EMBEDDING = "lm_head", "model.embed_tokens"


@pytest.fixture(scope="module", params=[False, True], ids=["apart", "tied"])
def tied(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def source(tied: bool, tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    model = tiny.random_model(tie_word_embeddings=tied)
    return tiny.save(model, tmp_path_factory.mktemp("source"), tokenizer)


def run(source: Path, output: Path, text: Path, **options: Any) -> dict[str, Any]:
    calibrated = {"group_size": 32} if options.get("method") == "rtn" else {"dataset": str(text), **SMALL}
    return bittern.quantize(source, output, **{**calibrated, **options})


def logits(path: Path) -> torch.Tensor:
    ids = torch.arange(4, 60)[None] % 200
    with torch.no_grad():
        found: torch.Tensor = bittern.load(path, dtype=torch.float32, kernels="torch")(ids).logits
    return found


def put(source: Path, folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    """A copy of a checkpoint with other tensors."""
    model = tiny.read_model(source)
    for name, values in weights.items():
        model.get_parameter(f"{name}.weight").data.copy_(values)
    for path in source.glob("tokenizer*"):
        folder.mkdir(exist_ok=True)
        (folder / path.name).write_bytes(path.read_bytes())
    return tiny.save(model, folder)


def rounded(values: torch.Tensor, group: int = 32) -> torch.Tensor:
    """An 8-bit code of 0 to 255 around 128 per weight, by the largest magnitude of each group: a formula of its own."""
    groups = values.double().reshape(-1, group)
    scale = (2 * groups.abs().amax(1, keepdim=True) / 255).half().double()
    codes = (groups / scale.where(scale != 0, 1)).round().clamp(-128, 127)  # the row of padding is zeros
    return (codes * scale).reshape(values.shape).float()


@pytest.mark.parametrize("format", ["gptq", "gptq_v2", "compressed-tensors", "mlx", "gguf"])
def test_logits_are_those_of_rounded_weights(source: Path, text: Path, tied: bool, tmp_path: Path, format: str) -> None:
    """Packed outside of the blocks is the same as a source whose embedding and head were rounded by hand."""
    options: dict[str, Any] = {"format": format, "method": "rtn", "dtype": "fp32"}
    if format in ("mlx", "gguf"):
        options["embed_bits"] = 8
    if not tied:
        options["lm_head_bits"] = 8
    names = [EMBEDDING] * ("embed_bits" in options) + [HEAD] * (not tied)
    if not names:
        pytest.skip("nothing that this format packs")
    out = tmp_path / ("out.gguf" if format == "gguf" else "out")
    manifest = run(source, out, text, **options)
    model = tiny.read_model(source)
    weights = {name: rounded(model.get_parameter(f"{name}.weight").data) for name in names}
    by_hand = tmp_path / ("hand.gguf" if format == "gguf" else "hand-out")
    plain = {"format": format, "method": "rtn", "dtype": "fp32"}
    run(put(source, tmp_path / "hand", weights), by_hand, text, **plain)
    torch.testing.assert_close(logits(out), logits(by_hand), rtol=1e-4, atol=1e-4)
    if format == "gguf":  # an embedding is read as floats from there
        from gguf import GGUFReader

        kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(out).tensors}
        stored = {EMBEDDING: "token_embd.weight", HEAD: "output.weight"}
        assert {kinds[stored[name]] for name in names} == {"Q8_0"}
    else:
        with open_checkpoint(out) as checkpoint:
            grids = {name: layer.spec for name, layer in Artifact(checkpoint).layers.items()}
        assert {grids[name] for name in names} == {QuantSpec(8, 32)}
    records = {record["layer"]: record for record in manifest["layers"]}
    assert [(records[name]["method"], records[name]["bits"]) for name in names] == [("rtn", 8)] * len(names)


def test_transformers_reads_a_packed_head(tmp_path: Path, text: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    pytest.importorskip("compressed_tensors")
    source = tiny.save(tiny.random_model(tie_word_embeddings=False), tmp_path / "source", tokenizer)
    run(source, tmp_path / "out", text, target="transformers", lm_head_bits=8, dtype="fp32")
    ids = torch.arange(4, 60)[None] % 200
    with torch.no_grad():
        found = tiny.read_model(tmp_path / "out")(ids).logits
    torch.testing.assert_close(found, logits(tmp_path / "out"), rtol=1e-4, atol=1e-4)


def test_repacking_keeps_a_head_of_another_grid(tmp_path: Path, text: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = tiny.save(tiny.random_model(tie_word_embeddings=False), tmp_path / "source", tokenizer)
    run(source, tmp_path / "gptq", text, lm_head_bits=8)
    found = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert found["lm_head"] is True and found["bits"] == 4
    assert found["dynamic"] == {"+:^(lm_head)$": {"bits": 8, "group_size": 32, "sym": True}}
    for before, after in (("gptq", "compressed-tensors"), ("compressed-tensors", "mlx"), ("mlx", "gptq_v2")):
        convert(tmp_path / before, tmp_path / after, format=after)
    convert(tmp_path / "gptq_v2", tmp_path / "again", format="gptq")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "gptq" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("options", [{"lm_head_bits": 8}, {"embed_bits": 8, "format": "mlx"}])
def test_verify_holds_them_to_the_source(
    tmp_path: Path, text: Path, tokenizer: PreTrainedTokenizerFast, options: dict[str, Any]
) -> None:
    source = tiny.save(tiny.random_model(tie_word_embeddings=False), tmp_path / "source", tokenizer)
    run(source, tmp_path / "out", text, **options)
    found = verify(tmp_path / "out", source)
    assert found.passed, found.checks


def test_a_dry_run_counts_what_is_outside(tmp_path: Path, text: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = tiny.save(tiny.random_model(tie_word_embeddings=False), tmp_path / "source", tokenizer)
    found = run(source, tmp_path / "out", text, lm_head_bits=8, dry_run=True)
    run(source, tmp_path / "out", text, lm_head_bits=8)
    files = (path for path in (tmp_path / "out").iterdir() if path.name != "bittern_manifest.json")
    assert found["prediction"]["bytes"] == pytest.approx(sum(path.stat().st_size for path in files), rel=0.01)
    assert found["stages"]["embedding and head"] > 0


def test_what_cannot_be_is_refused_before_any_work(
    tmp_path: Path, text: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    tied = tiny.save(tiny.random_model(tie_word_embeddings=True), tmp_path / "tied", tokenizer)
    apart = tiny.save(tiny.random_model(tie_word_embeddings=False), tmp_path / "apart", tokenizer)
    odd = tiny.save(tiny.random_model(tie_word_embeddings=False, vocab_size=250), tmp_path / "odd", tokenizer)
    for source, options, message in (
        (tied, {"lm_head_bits": 8}, r"lm_head_bits: the head of this model is its embedding"),
        (apart, {"lm_head_bits": 4}, r"lm_head_bits: expected 8, found 4"),
        (apart, {"embed_bits": 8}, r"embed_bits: nothing reads a packed embedding in gptq; gguf and mlx have it"),
        (apart, {"lm_head_bits": 8, "format": "awq", "sym": False}, r"AWQ"),
        (apart, {"lm_head_bits": 8, "target": "sglang", "format": "compressed-tensors"}, r"packed lm_head"),
        (odd, {"lm_head_bits": 8}, r"lm_head: shape 250 x 64 is no multiple of 32"),
    ):
        with pytest.raises(BitternError, match=message):
            run(source, tmp_path / "out", text, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["apart", "odd", "tied"]


def test_the_command_shows_them(
    tmp_path: Path, text: Path, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tiny.save(tiny.random_model(tie_word_embeddings=True), tmp_path / "source", tokenizer)
    command = ["quantize", str(source), "-o", str(tmp_path / "out.gguf"), "--embed-bits", "8", "--dataset", str(text)]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--group-size", "32", "--nsamples", "6", "--seqlen", "32"])
    shown = capsys.readouterr()
    assert ended.value.code == 0, shown.err
    assert "15/15  model.embed_tokens" in shown.err and "15 layers quantized" in shown.out


def test_a_gguf_file_is_overwritten_when_asked(tmp_path: Path, text: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = tiny.save(tiny.random_model(tie_word_embeddings=True), tmp_path / "source", tokenizer)
    out = tmp_path / "out.gguf"
    run(source, out, text, method="rtn")
    before = out.stat().st_size
    with pytest.raises(BitternError, match=r"it exists already \(--overwrite replaces it\)"):
        run(source, out, text, method="rtn", embed_bits=8)
    run(source, out, text, method="rtn", embed_bits=8, overwrite=True)
    assert out.stat().st_size < before
