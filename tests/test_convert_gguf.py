"""Writing GGUF: every architecture computes the same when it is read back, metadata, tokenizers, what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import bittern
from bittern.artifact import Artifact
from bittern.checkpoint import open_checkpoint
from bittern.convert.gguf import GgufSummary, check_gguf, write_gguf
from bittern.convert.gguf_model import read_model
from bittern.errors import BitternError
from bittern.formats.gguf_file import GgufFile
from bittern.model import build
from bittern.runtime import attention
from bittern.weight import QuantSpec, QuantWeight
from tests import tiny

gguf = pytest.importorskip("gguf")

IDS = torch.tensor([[0, 5, 6, 7, 8, 9, 10, 40, 80, 100, 3, 4]])
ROPE = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
GEMMA = {"num_hidden_layers": 7, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8}
LLAMA3 = ROPE | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
QWEN3_MOE = {"num_experts": 12, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "wide heads": ("llama", {"head_dim": 32}),
    "linear": ("llama", {"rope_parameters": ROPE | {"rope_type": "linear"}}),
    "yarn": ("llama", {"rope_parameters": ROPE | {"rope_type": "yarn"}}),
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mixtral": ("mixtral", {"num_local_experts": 12, "sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "gemma3": ("gemma3_text", GEMMA | {"tie_word_embeddings": True}),
    "qwen3_moe": ("qwen3_moe", QWEN3_MOE | {"norm_topk_prob": True}),
}


def write(folder: Path, output: Path, **options: Any) -> GgufSummary:
    with open_checkpoint(folder) as checkpoint:
        return write_gguf(Artifact(checkpoint), output, **options)


def fields(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def refused(folder: Path, output: Path, *words: str, **options: Any) -> None:
    with pytest.raises(BitternError) as caught:
        write(folder, output, **options)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert not output.exists()
    assert not list(output.parent.glob(".*.partial"))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture_computes_the_same_when_read_back(family: str, tmp_path: Path) -> None:
    model_type, config = FAMILIES[family]
    model = tiny.random_model(model_type, **config)
    summary = write(tiny.save(model, tmp_path / "m"), tmp_path / "a.gguf", tokenizer=False)
    assert summary.tokenizer == "none"
    back = bittern.load(tmp_path / "a.gguf", kernels="torch")
    assert back.config.model_type == ("llama" if model_type == "mistral" else model_type)
    attention.use(model, kernels=False)  # the same sums in the same order
    with torch.inference_mode():
        expected, found = model(IDS).logits, back(IDS).logits
    assert (expected - found).abs().max() < (2e-6 if family == "gemma3" else 1e-7)  # its norms are stored plus one


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_the_models_above_would_notice_a_lost_scaling(kind: str) -> None:
    plain, scaled = (tiny.random_model("llama", **FAMILIES[name][1]) for name in ("llama", kind))
    with torch.inference_mode():
        assert (plain(IDS).logits - scaled(IDS).logits).abs().max() > 1e-4


def test_experts_are_stacked_by_their_numbers(tmp_path: Path) -> None:
    model = tiny.random_model("mixtral", num_local_experts=12, sliding_window=None)
    write(tiny.save(model, tmp_path / "m"), tmp_path / "a.gguf", tokenizer=False)
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    experts = model.model.layers[1].mlp.experts
    gate, up = experts.gate_up_proj.detach().chunk(2, 1)
    assert np.array_equal(stored["blk.1.ffn_gate_exps.weight"], gate.numpy())
    assert np.array_equal(stored["blk.1.ffn_up_exps.weight"], up.numpy())
    assert np.array_equal(stored["blk.1.ffn_down_exps.weight"], experts.down_proj.detach().numpy())
    found = fields(tmp_path / "a.gguf")
    assert (found["llama.expert_count"], found["llama.expert_used_count"]) == (12, 2)


def test_packed_experts_are_stacked_too(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = tiny.random_model("mixtral", num_local_experts=12, sliding_window=None)
    bittern.quantize(tiny.save(model, tmp_path / "m", tokenizer), tmp_path / "q", bits=4, group_size=32, method="rtn")
    write(tmp_path / "q", tmp_path / "a.gguf")
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    with open_checkpoint(tmp_path / "q") as checkpoint:
        artifact = Artifact(checkpoint)
        for there, here in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
            tensor = stored[f"blk.1.ffn_{there}_exps.weight"]
            assert tensor.tensor_type.name == "Q4_0"
            found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            for expert in (0, 2, 10, 11):
                layer = f"model.layers.1.block_sparse_moe.experts.{expert}.{here}"
                assert np.array_equal(found[expert], artifact.read(layer).dequantize().numpy())


def test_the_factors_of_llama3_are_transformers(tmp_path: Path) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = read_model(tiny.random_model("llama", **FAMILIES["llama3"][1]).config.to_dict())
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config.config, torch.device("cpu"))
    plain = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    factors = config.rope_factors()
    assert factors is not None and factors.max() > 1.5
    torch.testing.assert_close(factors, plain / theirs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny Llama with a tokenizer."""
    return tiny.save(tiny.random_model(), tmp_path_factory.mktemp("models") / "tiny-llama", tokenizer)


def test_metadata(folder: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    summary = write(folder, tmp_path / "a.gguf", on_tensor=lambda *each: seen.append(each))
    found = fields(tmp_path / "a.gguf")
    expected = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "tiny-llama",
        "general.file_type": 0,
        "general.quantization_version": 2,
        "llama.context_length": 64,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": 256,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
    }
    assert {key: found.get(key) for key in expected} == expected
    assert found["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert not any("quantized_by" in key or "base_model" in key or "grids" in key for key in found)
    size = (tmp_path / "a.gguf").stat().st_size
    assert (summary.output_bytes, summary.architecture, summary.tokenizer) == (size, "llama", "gpt2, gpt-2")
    assert [name for name, _, _ in seen] == [tensor.name for tensor in summary.tensors]
    assert seen[-1][1] == seen[-1][2] < size
    stated = json.loads(json.dumps(summary.to_dict()))
    assert (stated["error"], stated["layers"], stated["max_relative_error"], stated["format"]) == (0, 0, 0, "gguf")


@pytest.mark.parametrize(("dtype", "kind"), [("bf16", "BF16"), ("fp16", "F16"), ("fp32", "F32")])
def test_dtype_is_that_of_matrices(dtype: str, kind: str, folder: Path, tmp_path: Path) -> None:
    summary = write(folder, tmp_path / "a.gguf", dtype=dtype)
    assert (
        0 <= summary.max_relative_error <= {"bf16": 2.0**-8, "fp16": 1, "fp32": 0}[dtype]
    )  # small ones are subnormal in fp16
    assert (summary.max_relative_error > 0) == (dtype != "fp32")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert {kinds.pop(name) for name in list(kinds) if "norm" in name} == {"F32"}
    assert set(kinds.values()) == {kind}
    with open_checkpoint(folder) as source, open_checkpoint(tmp_path / "a.gguf") as found:
        name = "model.layers.1.self_attn.q_proj.weight"
        cast = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
        assert torch.equal(found.read(name), source.read(name).to(cast).float())


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_floats_of_a_gguf_file_stay_as_they_are(
    dtype: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its reader gives them all as float32, those in blocks too."""
    write(folder, tmp_path / "a.gguf", dtype=dtype, tokenizer=False)
    write(tmp_path / "a.gguf", tmp_path / "b.gguf", tokenizer=False)
    first, second = (gguf.GGUFReader(tmp_path / name).tensors for name in ("a.gguf", "b.gguf"))
    assert {tensor.tensor_type.name for tensor in first} == {"F32", {"bf16": "BF16", "fp16": "F16"}[dtype]}
    stored = {tensor.name: (tensor.tensor_type, tensor.data.tobytes()) for tensor in first}
    assert {tensor.name: (tensor.tensor_type, tensor.data.tobytes()) for tensor in second} == stored
    monkeypatch.setattr(GgufFile, "kinds", lambda file, name: {"Q6_K"})
    summary = write(tmp_path / "a.gguf", tmp_path / "c.gguf", tokenizer=False)
    assert {tensor.kind for tensor in summary.tensors} == {"F16", "F32"}
    assert {tensor.kind for tensor in summary.tensors if "norm" in tensor.name} == {"F32"}


def test_the_tokenizer_comes_back(folder: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    summary = write(folder, tmp_path / "a.gguf")
    found = fields(tmp_path / "a.gguf")
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    known = len(tokenizer)
    assert len(tokens) == len(types) == 256
    assert tokens[:known] == tokenizer.convert_ids_to_tokens(list(range(known)))
    assert (tokens[known], tokens[255]) == (f"[PAD{known}]", "[PAD255]")
    assert types == [3] * 4 + [1] * (known - 4) + [5] * (256 - known)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert [note for note in summary.notes if "bytes" in note]  # it was trained on few
    assert found["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]
    with open_checkpoint(tmp_path / "a.gguf") as checkpoint:
        for text in ("stone river", " amber  quiet moss", "<s>seven</s>"):
            assert checkpoint.tokenizer()(text)["input_ids"] == tokenizer(text)["input_ids"]


def byte_level(steps: list[Any], words: list[str], whole: bool = False) -> Tokenizer:
    """A small byte-level BPE; with ``whole``, the last of its words is a token that no merges make."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: number for number, piece in enumerate([*alphabet, *(["Ġquartz"] if whole else [])])}
    merges = []
    for word in words:
        for end in range(2, len(word) + 1):
            merges.append((word[: end - 1], word[end - 1]))
            vocab.setdefault(word[:end], len(vocab))
    made = Tokenizer(models.BPE(vocab=vocab, merges=list(dict.fromkeys(merges)), ignore_merges=whole))
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(name, special=True) for name in ("<s>", "</s>")])
    return made


def test_text_is_cut_alike_when_read_back(tmp_path: Path) -> None:
    from tokenizers import Regex

    def split(*patterns: str) -> list[Any]:
        parts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
        return [*parts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]

    llama3 = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    digits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    marked = byte_level(split(llama3), ["Ġab"], whole=True)
    marked.add_special_tokens([AddedToken("<\uff5cend\uff5c>", special=True)])
    marked.add_tokens([AddedToken("<a b>", special=False, normalized=False)])
    spaceless = sentencepiece([("a", "b"), ("▁", "a"), ("▁", "ab"), ("▁a", "b")]).backend_tokenizer
    spaceless.normalizer = normalizers.Replace(" ", "▁")
    cases = {
        "smollm": (byte_level(digits, ["ĠĠ", "12"]), ("a  12", "12 12\n  1"), "ĠĠ"),
        "llama-bpe": (marked, (" quartz ab", "ab<\uff5cend\uff5c>", "ab<a b>ab</s>"), "Ġquartz"),
        "default": (spaceless, ("ab ab", " ab", "</s>ab"), "ab"),
    }
    make: Any = PreTrainedTokenizerFast
    for pre, (backend, texts, first) in cases.items():
        unknown = {"unk_token": "<unk>"} if pre == "default" else {}
        tokenizer = make(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", **unknown)
        path = tmp_path / f"{pre}.gguf"
        write(tiny.save(tiny.random_model(vocab_size=len(tokenizer)), tmp_path / pre, tokenizer), path)
        assert fields(path)["tokenizer.ggml.pre"] == pre
        with open_checkpoint(path) as checkpoint:
            back = checkpoint.tokenizer()
            bittern.convert(path, tmp_path / f"{pre}-folder")
        with open_checkpoint(tmp_path / f"{pre}-folder") as checkpoint:
            saved = checkpoint.tokenizer()
        for text in texts:
            expected = tokenizer(text)["input_ids"]
            assert back(text)["input_ids"] == saved(text)["input_ids"] == expected, (pre, text)
            assert back.decode(expected) == tokenizer.decode(expected)
        assert first in tokenizer.convert_ids_to_tokens(tokenizer(texts[0])["input_ids"])


def test_a_file_ends_where_its_source_does_and_takes_nothing_from_beside_it(folder: Path, tmp_path: Path) -> None:
    source = shutil.copytree(folder, tmp_path / "m")
    (source / "generation_config.json").write_text('{"eos_token_id": [1, 7, 9999]}')
    write(source, tmp_path / "a.gguf")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 99}')
    model = bittern.load(tmp_path / "a.gguf", device="cpu")
    assert model.generation_config is not None and model.generation_config.eos_token_id == [1, 7]
    write_again = tmp_path / "b.gguf"
    bittern.convert(tmp_path / "a.gguf", write_again, format="gguf")
    assert fields(write_again)["tokenizer.ggml.eot_token_id"] == 7
    for broken in ("{", "[]"):
        (source / "generation_config.json").write_text(broken)
        refused(source, tmp_path / "c.gguf", "generation_config.json")


def test_ends_without_a_generation_config(folder: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    source = edited(folder, tmp_path / "m", None, eos_token_id=[1, 7, 9, 7, 11])
    (source / "generation_config.json").unlink()
    summary = write(source, tmp_path / "a.gguf")
    found = fields(tmp_path / "a.gguf")
    assert [found[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom")] == [1, 7, 9]
    left = [note for note in summary.notes if note.startswith("left out tokens that end a text")]
    assert len(left) == 1 and left[0].endswith(f": {tokenizer.convert_ids_to_tokens(11)}")
    with open_checkpoint(tmp_path / "a.gguf") as checkpoint:
        assert checkpoint.config["eos_token_id"] == [1, 7, 9]


def test_several_chat_templates_come_back(folder: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    source = shutil.copytree(folder, tmp_path / "m")
    (source / "additional_chat_templates").mkdir()
    named = {name: f"{{{{ {name} }}}}" for name in ("tool_use", "rag", "plain", "code")}
    for name, template in named.items():
        (source / "additional_chat_templates" / f"{name}.jinja").write_text(template)
    for default in (None, "{{ messages }}"):
        expected = dict(named)
        if default is not None:
            (source / "chat_template.jinja").write_text(default)
            expected["default"] = default
        write(source, tmp_path / "a.gguf", overwrite=True)
        with open_checkpoint(tmp_path / "a.gguf") as checkpoint:
            assert checkpoint.tokenizer().chat_template == expected
    listed = gguf.GGUFReader(tmp_path / "a.gguf").fields["tokenizer.chat_templates"].contents()
    assert listed == sorted(named)  # in one order in all processes: the same command makes the same bytes
    bittern.convert(tmp_path / "a.gguf", tmp_path / "folder")
    with open_checkpoint(tmp_path / "folder") as checkpoint:
        assert checkpoint.tokenizer().chat_template == expected
        assert "additional_chat_templates/rag.jinja" in checkpoint.side_files()
    manifest = json.loads((tmp_path / "folder" / "bittern_manifest.json").read_text())
    assert "additional_chat_templates/rag.jinja" in manifest["files"]
    data = (tmp_path / "a.gguf").read_bytes()
    (tmp_path / "b.gguf").write_bytes(data.replace(b"chat_template.tool_use", b"chat_template.../../us"))
    with open_checkpoint(tmp_path / "b.gguf") as checkpoint:
        assert set(checkpoint.tokenizer().chat_template or ()) == {"default", "______us", "rag", "plain", "code"}


def test_yarn_with_scales_of_its_own(tmp_path: Path) -> None:
    rope = ROPE | {"rope_type": "yarn", "factor": 16.0}
    for more in (
        {"mscale": 1.0, "mscale_all_dim": 1.0},
        {"mscale": 0.7, "mscale_all_dim": 0.9},
        {"attention_factor": 1.5},
    ):
        model = tiny.random_model("llama", rope_parameters=rope | more, max_position_embeddings=64)
        path = tmp_path / f"{len(more)}{more.get('mscale')}"
        write(tiny.save(model, path), path.with_suffix(".gguf"), tokenizer=False)
        found = bittern.load(path.with_suffix(".gguf"), device="cpu", dtype=torch.float32)
        torch.testing.assert_close(found(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
    odd = tiny.random_model("llama", rope_parameters=rope | {"truncate": False}, max_position_embeddings=64)
    refused(tiny.save(odd, tmp_path / "odd"), tmp_path / "odd.gguf", "truncate false")


def test_a_name_of_what_cuts_words_that_nobody_knows(folder: Path, tmp_path: Path) -> None:
    write(folder, tmp_path / "a.gguf")
    data = (tmp_path / "a.gguf").read_bytes()
    assert data.count(b"gpt-2") == 1
    (tmp_path / "a.gguf").write_bytes(data.replace(b"gpt-2", b"phi-2"))  # which llama.cpp cuts alike
    with open_checkpoint(tmp_path / "a.gguf") as checkpoint, open_checkpoint(folder) as source:
        text = "quiet river amber"
        assert checkpoint.tokenizer()(text)["input_ids"] == source.tokenizer()(text)["input_ids"]
    (tmp_path / "a.gguf").write_bytes(data.replace(b"gpt-2", b"gpt-9"))
    with open_checkpoint(tmp_path / "a.gguf") as checkpoint, pytest.raises(BitternError, match="found gpt-9"):
        checkpoint.tokenizer()


def sentencepiece(merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    """A tokenizer as transformers makes one of a SentencePiece model."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "c"]
    pieces += dict.fromkeys("".join(pair) for pair in merges)
    vocab = {piece: number for number, piece in enumerate(pieces)}
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens([AddedToken(name, special=True) for name in ("<unk>", "<s>", "</s>")])
    make: Any = PreTrainedTokenizerFast
    result: PreTrainedTokenizerFast = make(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    return result


def test_sentencepiece_scores_put_merges_in_their_order(tmp_path: Path) -> None:
    merges = [("a", "b"), ("▁", "a"), ("▁", "ab"), ("▁a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")]
    tokenizer = sentencepiece(merges)
    model = tiny.random_model(vocab_size=len(tokenizer) + 2)
    write(tiny.save(model, tmp_path / "m", tokenizer), tmp_path / "a.gguf")
    found = fields(tmp_path / "a.gguf")
    tokens, types, scores = (found[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type", "scores"))
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.add_space_prefix"]) == ("llama", True)
    assert types == [2, 3, 3, *[6] * 256, *[1] * 9, 5, 5]
    assert len(tokens) == len(tokenizer) + 2
    order = ["ab", "▁a", "▁ab", "bc", "abc"]
    assert sorted(order, key=lambda piece: -scores[tokens.index(piece)]) == order
    incomplete = sentencepiece([merge for merge in merges if merge != ("a", "bc")])
    other = tiny.save(model, tmp_path / "other", incomplete)
    refused(other, tmp_path / "b.gguf", "tokenizer: its merges do not join 'a' and 'bc'")


def test_spaces_are_llama_cpps_when_read_back(tmp_path: Path) -> None:
    """A space goes before text that begins with one too, and after special tokens; llm_tokenizer_spm in llama.cpp."""
    merges = [("▁", "▁"), ("a", "b"), ("▁", "a"), ("▁", "ab"), ("▁a", "b")]
    tokenizer, texts = sentencepiece(merges), ("ab", " a", "  ab  c", "<s>ab</s>a\n", "</s> ab", "", " ")
    strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(strip)
    model, out = tiny.random_model(vocab_size=len(tokenizer)), tmp_path / "a.gguf"
    assert not write(tiny.save(model, tmp_path / "m", tokenizer), out).notes
    bittern.convert(out, tmp_path / "folder")
    for source in (out, tmp_path / "folder"):
        with open_checkpoint(source) as checkpoint:
            back = checkpoint.tokenizer()
        for text in texts:
            ids = tokenizer(text)["input_ids"]
            assert back(text)["input_ids"] == ids, text
            assert back.decode(ids) == tokenizer.decode(ids)
        assert back.decode(back("  ab\n c")["input_ids"]) == "  ab\n c"
    tokenizer.backend_tokenizer.normalizer = None
    for scheme, words in (("first", "with one, and after special tokens, where"), ("always", "with one, where")):
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        summary = write(tiny.save(model, tmp_path / "m", tokenizer), out, overwrite=True)
        assert len(summary.notes) == 1 and words in summary.notes[0]
        with open_checkpoint(out) as checkpoint:
            back = checkpoint.tokenizer()
        for text, alike in (("ab", True), (" a", False), ("</s>ab", scheme == "always")):
            assert (back(text)["input_ids"] == tokenizer(text)["input_ids"]) is alike, (scheme, text)


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)], "smollm"),
        (["llama3"], "smaug-bpe"),
        (["qwen2"], "qwen2"),
        ([pre_tokenizers.ByteLevel(add_prefix_space=True)], None),
        ([pre_tokenizers.Whitespace()], None),
        (["[0-9]+"], None),
    ],
)
def test_the_name_of_what_cuts_words(
    steps: list[Any], name: str | None, folder: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    from tokenizers import Regex

    start = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    end = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    patterns = {"llama3": start + r"\p{N}{1,3}" + end, "qwen2": start + r"\p{N}" + end}
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    parts = [
        part
        for step in steps
        for part in (
            (pre_tokenizers.Split(Regex(patterns.get(step, step)), "isolated"), bytes_alone)
            if isinstance(step, str)
            else (step,)
        )
    ]
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.pre_tokenizer = pre_tokenizers.Sequence(parts)
    make: Any = PreTrainedTokenizerFast
    other = make(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    saved = tiny.save(tiny.random_model(), tmp_path / "m", other)
    if name is None:
        refused(saved, tmp_path / "a.gguf", "tokenizer: ")
    else:
        write(saved, tmp_path / "a.gguf")
        assert fields(tmp_path / "a.gguf")["tokenizer.ggml.pre"] == name


def test_what_the_embedding_has_no_row_for_is_left_out(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = len(tokenizer) - 2
    saved = tiny.save(tiny.random_model(vocab_size=rows), tmp_path / "m", tokenizer)
    summary = write(saved, tmp_path / "a.gguf")
    assert len(fields(tmp_path / "a.gguf")["tokenizer.ggml.tokens"]) == rows
    assert [note for note in summary.notes if note.startswith("left out tokens that have no row")]


def test_chat_template_ends_and_origin(folder: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    from bittern.report import MANIFEST_FILE

    saved = tiny.save(tiny.random_model(), tmp_path / "m", tokenizer)
    (saved / "chat_template.jinja").write_text("{{ messages }}")
    (saved / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 3]}))
    manifest: dict[str, Any] = {"source": {"name": "org/base", "revision": "abc"}}
    (saved / MANIFEST_FILE).write_text(json.dumps(manifest))
    write(saved, tmp_path / "a.gguf")
    found = fields(tmp_path / "a.gguf")
    assert found["tokenizer.chat_template"] == "{{ messages }}"
    assert (found["tokenizer.ggml.eos_token_id"], found["tokenizer.ggml.eot_token_id"]) == (1, 3)
    assert found["general.base_model.0.name"] == "base"
    assert found["general.base_model.0.repo_url"] == "https://huggingface.co/org/base"
    manifest = {"source": {"name": "gpt2", "revision": "abc"}, "origin": {"source": {"name": "/home/me/fp32"}}}
    (saved / MANIFEST_FILE).write_text(json.dumps(manifest))
    write(saved, tmp_path / "a.gguf", overwrite=True)
    found = fields(tmp_path / "a.gguf")
    assert found["general.name"] == found["general.base_model.0.name"] == "gpt2"
    assert found["general.base_model.0.repo_url"] == "https://huggingface.co/gpt2"
    assert "general.base_model.0.organization" not in found


@pytest.mark.parametrize("missing", ["gguf", "sentencepiece"])
def test_says_which_packages_gguf_needs(
    missing: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there.gguf").touch()
    monkeypatch.setitem(sys.modules, missing, None)
    words = r"^GGUF needs the packages gguf and sentencepiece: pip install 'bittern\[gguf\]' \("
    with pytest.raises(BitternError, match=words):
        open_checkpoint(tmp_path / "there.gguf")
    with pytest.raises(BitternError, match=words):
        bittern.convert(folder, tmp_path / "a.gguf")
    with pytest.raises(BitternError, match=words):
        bittern.quantize(folder, tmp_path / "a.gguf", bits=4, group_size=32, method="rtn")
    assert [path.name for path in tmp_path.iterdir()] == ["there.gguf"]


@pytest.mark.parametrize(
    ("model_type", "config", "words"),
    [
        ("gpt2", {"n_embd": 64, "n_head": 4, "n_layer": 2}, "found gpt2"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act: llama.cpp's llama has silu, found gelu"),
        ("qwen3", {"attention_bias": True, "head_dim": 16}, "attention_bias"),
        ("gemma3_text", GEMMA | {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar: llama.cpp's gemma3 has 32"),
        ("gemma3_text", GEMMA | {"layer_types": ["full_attention"] * 7}, "layer_types"),
        ("qwen3_moe", QWEN3_MOE | {"norm_topk_prob": False}, "norm_topk_prob"),
        ("qwen2", {"rope_parameters": LLAMA3}, "rope_type"),
        ("llama", {"rope_parameters": ROPE | {"rope_type": "dynamic"}}, "rope_type: expected one of"),
    ],
)
def test_refuses_what_llama_cpp_would_compute_otherwise(
    model_type: str, config: dict[str, Any], words: str, tmp_path: Path
) -> None:
    saved = tiny.save(tiny.random_model(model_type, **config), tmp_path / "m")
    refused(saved, tmp_path / "a.gguf", words, tokenizer=False)


def test_a_file_that_is_named_mistral_has_no_window_for_it(tmp_path: Path) -> None:
    """transformers takes a llama of that name for a Mistral, whose window is 4096 unless a file says otherwise."""
    source = tiny.save(tiny.random_model("mistral", sliding_window=None), tmp_path / "mistral")
    write(source, tmp_path / "out.gguf", tokenizer=False)
    with open_checkpoint(tmp_path / "out.gguf") as checkpoint:
        assert checkpoint.config.get("sliding_window") is None
        assert build(checkpoint.config).config.sliding_window is None


def test_a_window_that_llama_cpp_does_not_have_shortens_the_context(tmp_path: Path) -> None:
    saved = tiny.save(tiny.random_model("mistral", sliding_window=32), tmp_path / "m")
    summary = write(saved, tmp_path / "a.gguf", tokenizer=False)
    assert summary.notes[0].startswith("context_length is 32 in place of 64")
    assert fields(tmp_path / "a.gguf")["llama.context_length"] == 32


@pytest.fixture(scope="module")
def artifacts(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The tiny Llama on a grid, made once each."""
    home, made = tmp_path_factory.mktemp("artifacts"), dict[tuple[int, int, bool], Path]()

    def make(bits: int, group_size: int = 32, sym: bool = True) -> Path:
        key = (bits, group_size, sym)
        if key not in made:
            made[key] = home / f"{bits}-{group_size}-{sym}"
            bittern.quantize(folder, made[key], bits=bits, group_size=group_size, sym=sym, method="rtn")
        return made[key]

    yield make


@pytest.mark.parametrize(("bits", "sym", "kind"), [(3, True, "Q4_0"), (8, True, "Q8_0"), (2, False, "Q4_0")])
def test_exact_grids_compute_the_same(bits: int, sym: bool, kind: str, artifacts: Any, tmp_path: Path) -> None:
    source = artifacts(bits, sym=sym)
    summary = write(source, tmp_path / "a.gguf")
    assert {tensor.kind for tensor in summary.tensors if tensor.name.startswith("blk.0.ffn_up")} == {kind}
    found = fields(tmp_path / "a.gguf")
    assert json.loads(found["bittern.grids"])["default"] == {"bits": bits, "group_size": 32, "sym": sym}
    assert found["general.quantized_by"].startswith("bittern:")
    with open_checkpoint(source) as one, open_checkpoint(tmp_path / "a.gguf") as other:
        first, second = Artifact(one), Artifact(other)
        assert first.layers == second.layers
        for layer in first.layers:
            assert torch.equal(first.read(layer).dequantize(), second.read(layer).dequantize())
    logits = [bittern.load(path, kernels="torch")(IDS).logits for path in (source, tmp_path / "a.gguf")]
    assert torch.equal(*logits)


def test_grids_that_must_be_rounded(artifacts: Any, tmp_path: Path) -> None:
    four, eight, narrow = artifacts(4, sym=False), artifacts(8, sym=False), artifacts(4, 16)
    out = tmp_path / "a.gguf"
    exact = write(four, out)
    assert exact.error == 0 and {tensor.kind for tensor in exact.tensors if ".ffn_up." in tensor.name} == {"Q5_0"}
    with open_checkpoint(four) as one, open_checkpoint(out) as other:
        for name in Artifact(one).layers:
            assert torch.equal(Artifact(one).read(name).dequantize(), Artifact(other).read(name).dequantize())
    out.unlink()
    refused(eight, out, "self_attn.q_proj: not exact in GGUF: GGUF has no type for 8-bit", "--allow-inexact")
    refused(narrow, out, "group_size 16")
    summary = write(four, out, allow_inexact=True)
    assert 0 < summary.error < 0.0074
    with open_checkpoint(four) as one, open_checkpoint(out) as other:
        first, second = Artifact(one), Artifact(other)
        layer = "model.layers.0.mlp.up_proj"
        assert second.layers == first.layers
        assert torch.equal(first.read(layer).zeros, second.read(layer).zeros)
        assert torch.equal(first.read(layer).codes, second.read(layer).codes)
        moved = (other.read(f"{layer}.weight") - first.read(layer).dequantize()).abs()
        steps = first.read(layer).scales.float().repeat_interleave(32, 1)
        stated = next(tensor.error for tensor in summary.tensors if tensor.sources == (layer,))
        assert float((moved / steps).max()) <= stated + 1e-4
    for source in (eight, narrow):
        summary = write(source, out, allow_inexact=True, overwrite=True)
        assert {tensor.kind for tensor in summary.tensors if tensor.name.endswith("ffn_up.weight")} == {"F16"}
        assert 0 < summary.error < 255 * 2.0**-11
        with open_checkpoint(source) as one, open_checkpoint(out) as other:
            assert not Artifact(other).layers
            values = Artifact(one).read(layer).dequantize()
            assert torch.equal(other.read(f"{layer}.weight"), values.half().float())


def test_scales_that_fp16_does_not_hold(artifacts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Artifact.read

    def finer(self: Artifact, layer: str) -> QuantWeight:
        weight = read(self, layer)
        return QuantWeight(weight.codes, weight.scales.float() * (1 + 2.0**-13), weight.zeros, weight.spec)

    monkeypatch.setattr(Artifact, "read", finer)
    refused(artifacts(4), tmp_path / "a.gguf", "would move points of the grid")
    summary = write(artifacts(4), tmp_path / "a.gguf", allow_inexact=True)
    assert summary.error == pytest.approx(8 * 2.0**-13, rel=1e-3)
    assert summary.layers == 14


def test_what_is_refused_before_quantizing(folder: Path, tmp_path: Path) -> None:
    layer, out = "model.layers.0.mlp.up_proj", tmp_path / "a.gguf"
    with open_checkpoint(folder) as checkpoint:
        check_gguf(checkpoint, {layer: QuantSpec(4, 32), "lm_head": None}, out, False)
        with pytest.raises(BitternError, match=f"{layer}: not exact in GGUF: .* 8-bit"):
            check_gguf(checkpoint, {layer: QuantSpec(8, 32, sym=False)}, out, False)
        out.write_bytes(b"GGUF")
        with pytest.raises(BitternError, match="it exists already"):
            check_gguf(checkpoint, {}, out, False)
    saved = tiny.save(tiny.random_model(), tmp_path / "m")
    with open_checkpoint(saved) as checkpoint, pytest.raises(BitternError, match="no tokenizer"):
        check_gguf(checkpoint, {}, tmp_path / "b.gguf", False)


def test_experts_of_unlike_types_are_refused_before_quantizing(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = tiny.random_model("mixtral", num_local_experts=4, sliding_window=None)
    source = tiny.save(model, tmp_path / "m", tokenizer)
    options: dict[str, Any] = {"bits": 4, "group_size": 32, "method": "rtn"}
    with pytest.raises(BitternError, match=r"one tensor of all experts, expected one type, found Q4_0, Q8_0"):
        bittern.quantize(source, tmp_path / "a.gguf", layers=[(r"experts\.0\.", 8)], dry_run=True, **options)
    bittern.quantize(source, tmp_path / "a.gguf", layers=[(r"experts\.0\.", 3)], **options)


def test_act_order_is_refused_before_anything_is_written(artifacts: Any, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    other = tmp_path / "q"
    shutil.copytree(artifacts(4), other)
    tensors = load_file(other / "model.safetensors")
    name = next(name for name in tensors if name.endswith("down_proj.g_idx"))
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    for file in ("config.json", "quantize_config.json"):
        text = (other / file).read_text()
        (other / file).write_text(text.replace('"desc_act": false', '"desc_act": true'))
    refused(other, tmp_path / "a.gguf", "down_proj", "act-order")


def test_biases_of_zeros_that_no_model_has_are_dropped(artifacts: Any, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    other = tmp_path / "q"
    shutil.copytree(artifacts(4), other)
    tensors = load_file(other / "model.safetensors")
    added = {
        name.replace("qweight", "bias"): torch.zeros(tensors[name].shape[1]).half()
        for name in tensors
        if "qweight" in name
    }
    save_file(tensors | added, other / "model.safetensors", {"format": "pt"})
    summary = write(other, tmp_path / "a.gguf")
    assert not [tensor.name for tensor in summary.tensors if tensor.name.endswith("bias")]


def test_biases_of_zeros_that_a_model_has_stay(tmp_path: Path) -> None:
    model = tiny.random_model("llama", attention_bias=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") and "o_proj" not in name:
                parameter.normal_(0, 0.1)
    bittern.quantize(tiny.save(model, tmp_path / "source"), tmp_path / "q", bits=4, group_size=32, method="rtn")
    write(tmp_path / "q", tmp_path / "a.gguf", tokenizer=False)
    with open_checkpoint(tmp_path / "a.gguf") as checkpoint:
        assert checkpoint.config["attention_bias"] and "model.layers.0.self_attn.o_proj.bias" in checkpoint.tensors


def edited(source: Path, out: Path, without: str | None = None, **config: Any) -> Path:
    """A copy that lacks what begins with a name, or says something else of itself."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, out)
    stored = load_file(out / "model.safetensors")
    kept = {name: tensor for name, tensor in stored.items() if without is None or not name.startswith(without)}
    assert without is None or len(kept) < len(stored)
    save_file(kept, out / "model.safetensors", {"format": "pt"})
    stated = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(stated | config))
    return out


@pytest.mark.parametrize("packed", [False, True])
def test_what_is_not_whole_is_refused(packed: bool, folder: Path, artifacts: Any, tmp_path: Path) -> None:
    source, lost = artifacts(4) if packed else folder, "model.layers.1.mlp.down_proj"
    part = edited(source, tmp_path / "part", lost)
    refused(part, tmp_path / "a.gguf", lost, "the checkpoint has no such tensor")
    norm = edited(source, tmp_path / "norm", "model.norm")
    refused(norm, tmp_path / "a.gguf", "model.norm.weight", "the checkpoint has no such tensor")
    for key, value, name in (
        ("num_key_value_heads", 4, "layers.0.self_attn.k_proj"),  # whose rows would be turned wrongly
        ("intermediate_size", 128, "layers.0.mlp.gate_proj"),
        ("vocab_size", 250, "model.embed_tokens.weight"),  # transformers takes no more rows than that
        ("num_hidden_layers", 3, "layers.2."),
    ):
        other = edited(source, tmp_path / key, None, **{key: value})
        words = ("no such tensor",) if key == "num_hidden_layers" else ("config.json asks for shape", "found (")
        refused(other, tmp_path / "a.gguf", name, *words)
        if not packed:
            with open_checkpoint(other) as checkpoint, pytest.raises(BitternError, match=name):
                check_gguf(checkpoint, {}, tmp_path / "a.gguf", False)


@pytest.mark.parametrize("packed", [False, True])
def test_a_missing_expert_is_refused(packed: bool, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = tiny.random_model("mixtral", num_local_experts=4, sliding_window=None)
    source = tiny.save(model, tmp_path / "m", tokenizer)
    if packed:
        bittern.quantize(source, tmp_path / "q", bits=4, group_size=32, method="rtn")
        source = tmp_path / "q"
    for number, leaf in ((3, "w2"), (1, "w1")):
        lost = f"model.layers.1.block_sparse_moe.experts.{number}.{leaf}"
        part = edited(source, tmp_path / leaf, lost)
        refused(part, tmp_path / "a.gguf", f"{lost}.weight: the checkpoint has no such tensor")


def test_values_that_do_not_fit(folder: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    for value, words in ((1e6, "does not fit float16"), (float("nan"), "NaN or Inf")):
        model = tiny.random_model()
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[3, 4] = value
        saved = tiny.save(model, tmp_path / f"m{value}", tokenizer)
        refused(saved, tmp_path / "a.gguf", "layers.1.mlp.up_proj.weight", words, dtype="fp16")


def test_outputs_that_are_refused(folder: Path, tmp_path: Path) -> None:
    refused(folder, tmp_path / "a.bin", "expected the name of a .gguf file")
    out = tmp_path / "a.gguf"
    write(folder, out)
    before = out.read_bytes()
    with pytest.raises(BitternError, match="it exists already"):
        write(folder, out)
    with pytest.raises(BitternError, match="expected a file apart from the source"):
        write(out, out, overwrite=True)
    (tmp_path / "b.gguf").write_text("notes")
    with pytest.raises(BitternError, match="no GGUF file"):
        write(folder, tmp_path / "b.gguf", overwrite=True)
    with pytest.raises(BitternError, match="dtype: expected one of bf16, fp16, fp32, found fp64"):
        write(folder, tmp_path / "c.gguf", dtype="fp64")

    def stop(name: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(folder, out, overwrite=True, on_tensor=stop)
    assert out.read_bytes() == before
    assert not list(tmp_path.glob(".*"))
    write(folder, out, overwrite=True)
    assert out.read_bytes() == before  # same source, same bytes


def test_one_writer_at_a_time(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.gguf"

    def second(name: str, done: int, total: int) -> None:
        with pytest.raises(BitternError, match="another bittern is writing this"):
            write(folder, out)

    (tmp_path / ".a.gguf.partial").write_bytes(b"left by a killed run" * 10**5)
    summary = write(folder, out, on_tensor=second)
    assert out.stat().st_size == summary.output_bytes


def test_a_folder_without_tokenizer_needs_a_word(tmp_path: Path) -> None:
    saved = tiny.save(tiny.random_model(), tmp_path / "m")
    refused(saved, tmp_path / "a.gguf", "no tokenizer that transformers loads")
