"""Reading: against the safetensors library, torch.save and hand-made GGUF files; and files that lie."""

from __future__ import annotations

import errno
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bittern.checkpoint import Checkpoint, open_checkpoint
from bittern.errors import BitternError
from bittern.shards import DTYPES

CONFIG = {"model_type": "llama", "tie_word_embeddings": False}


def make(folder: Path, **files: dict[str, Tensor]) -> Path:
    """A checkpoint folder of safetensors files; more than one get an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for stem, tensors in files.items():
        save_file(tensors, folder / f"{stem}.safetensors", metadata={"format": "pt"})
    if len(files) > 1:
        index(folder, {name: f"{stem}.safetensors" for stem, tensors in files.items() for name in tensors})
    return folder


def index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def raw(folder: Path, header: dict[str, Any], data: bytes = b"") -> Path:
    """A safetensors file with any header at all."""
    text = json.dumps(header).encode()
    make(folder)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    return folder


def entry(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def assert_reads(checkpoint: Checkpoint, expected: dict[str, Tensor]) -> None:
    assert set(checkpoint.tensors) == set(expected)
    for name, tensor in expected.items():
        info = checkpoint.tensors[name]
        assert (info.dtype, info.shape, info.nbytes) == (tensor.dtype, tuple(tensor.shape), tensor.nbytes)
        read = checkpoint.read(name)
        assert read.dtype == tensor.dtype
        assert read.view(torch.uint8 if read.ndim else read.dtype).equal(
            tensor.view(torch.uint8 if tensor.ndim else tensor.dtype)
        )


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(BitternError) as caught:
        open_checkpoint(folder)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_reads_every_dtype_and_shape_that_the_safetensors_library_writes(tmp_path: Path) -> None:
    noise = torch.randint(0, 256, (6, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tensors = {f"t.{code}": noise.clone().view(dtype) for code, dtype in DTYPES.items() if code != "BOOL"}
    tensors |= {
        "bool": noise > 99,
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 7),
        "cube": torch.rand(2, 3, 5),
    }
    with open_checkpoint(make(tmp_path / "c", model=tensors)) as checkpoint:
        assert checkpoint.config == CONFIG
        assert_reads(checkpoint, tensors)


def test_reads_shards_rows_and_elements(tmp_path: Path) -> None:
    one, two = {"a": torch.rand(7, 4), "b": torch.arange(5)}, {"c": torch.rand(3, 2, 2)}
    with open_checkpoint(make(tmp_path / "c", first=one, second=two)) as checkpoint:
        assert_reads(checkpoint, one | two)
        assert checkpoint.read_rows("a", 2, 5).equal(one["a"][2:5])
        assert checkpoint.read_rows("c", 3, 3).shape == (0, 2, 2)
        assert checkpoint.read_elements("a", 3, 9).equal(one["a"].flatten()[3:9])
        for start, stop in ((-1, 2), (5, 8), (3, 2)):
            with pytest.raises(BitternError, match=f"a: rows {start} to {stop}"):
                checkpoint.read_rows("a", start, stop)
        with pytest.raises(BitternError, match="no tensor nowhere"):
            checkpoint.read("nowhere")


def test_opening_reads_headers_only(tmp_path: Path) -> None:
    folder = make(tmp_path / "c", model={"a": torch.zeros(4)})
    with open_checkpoint(folder) as checkpoint:
        with (folder / "model.safetensors").open("r+b") as file:
            file.seek(-4, 2)
            file.write(struct.pack("<f", 2.5))
        assert checkpoint.read("a").tolist() == [0, 0, 0, 2.5]


def test_a_file_that_shrinks_while_it_is_open_is_named(tmp_path: Path) -> None:
    folder = make(tmp_path / "c", model={"a": torch.zeros(4)})
    with open_checkpoint(folder) as checkpoint:
        with (folder / "model.safetensors").open("r+b") as file:
            file.truncate(90)
        with pytest.raises(BitternError, match="reading tensor a: the file became shorter"):
            checkpoint.read("a")


@pytest.mark.parametrize("keep", [0, 7, 60, -1])
def test_refuses_truncated_files(tmp_path: Path, keep: int) -> None:
    path = make(tmp_path / "c", model={"a": torch.zeros(64)}) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(path.parent, "model.safetensors", "not a whole safetensors file")


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, b"\0" * 12),  # overlap
        ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 12, 20)}, b"\0" * 20),  # hole
        ({"a": entry("F32", [3], 0, 8)}, b"\0" * 8),  # the shape needs 12 bytes
        ({"a": entry("F32", [2], 0, 8)}, b"\0" * 12),  # bytes that belong to nothing
        ({"a": entry("F32", [2**62, 8], 0, 8)}, b"\0" * 8),  # the size overflows
        ({"a": entry("Q9", [2], 0, 8)}, b"\0" * 8),
        ({"a": {"dtype": "F32"}}, b""),
    ],
)
def test_refuses_headers_that_lie(tmp_path: Path, header: dict[str, Any], data: bytes) -> None:
    refused(raw(tmp_path / "c", header, data), "model.safetensors", "not a whole safetensors file")


def test_refuses_giant_headers_and_repeated_names(tmp_path: Path) -> None:
    path = make(tmp_path / "c") / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**40) + b"{}")
    refused(path.parent, "model.safetensors")
    text = b'{"a":%s,"a":%s}' % ((json.dumps(entry("U8", [2], 0, 2)).encode(),) * 2)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0\0")
    refused(path.parent, "model.safetensors")


def test_refuses_a_dtype_without_a_torch_equal(tmp_path: Path) -> None:
    refused(raw(tmp_path / "c", {"a": entry("F4", [2], 0, 1)}, b"\0"), "tensor a", "F4")


@pytest.mark.parametrize("name", ["../outside.safetensors", "{tmp}/outside.safetensors", "link.safetensors"])
def test_refuses_files_outside_of_the_folder(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path / "c", model={"a": torch.zeros(4)})
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (folder / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    name = name.format(tmp=tmp_path)
    index(folder, {"a": name})
    refused(folder, name, "leads out of the folder")


def test_follows_the_links_of_the_hub_cache(tmp_path: Path) -> None:
    repo = tmp_path / "models--org--name"
    tensors = {"a": torch.rand(4)}
    snapshot = make(repo / "snapshots" / "abc", model=tensors)
    (repo / "blobs").mkdir()
    for path in list(snapshot.iterdir()):
        path.rename(repo / "blobs" / f"hash-{path.name}")
        path.symlink_to(Path("../../blobs") / f"hash-{path.name}")
    with open_checkpoint(snapshot) as checkpoint:
        assert_reads(checkpoint, tensors)


def test_refuses_indexes_that_lie(tmp_path: Path) -> None:
    folder = make(tmp_path / "c", one={"a": torch.zeros(2)}, two={"b": torch.zeros(2)})
    index(folder, {"a": "one.safetensors", "b": "one.safetensors"})
    refused(folder, "lists tensor b", "not in its file")
    index(folder, {"a": "one.safetensors", "b": "three.safetensors"})
    refused(folder, "three.safetensors", "missing")
    index(folder, {"b": "one.safetensors"})
    refused(folder, "holds tensor a", "does not list")
    index(folder, {"a": "config.json"})
    refused(folder, "tensor a", ".safetensors file", "config.json")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}')
    refused(folder, "expected a weight_map")
    (folder / "model.safetensors.index.json").write_text("{")
    refused(folder, "model.safetensors.index.json", "expected a JSON file")


def test_refuses_folders_that_are_no_checkpoint(tmp_path: Path) -> None:
    for name in (tmp_path / "nowhere" / "at" / "all", "./nope", "../nope", "-nope", ".nope/nope"):
        with pytest.raises(BitternError, match="no such folder"):
            open_checkpoint(name)
    with pytest.raises(
        BitternError, match=r"SOURCE: expected a folder, a \.gguf file or a Hub id, found an empty name"
    ):
        open_checkpoint("")
    refused(tmp_path, "config.json")
    folder = make(tmp_path / "c")
    refused(folder, "model.safetensors", "found none")
    save_file({"a": torch.zeros(2)}, folder / "adapter_model.safetensors")
    refused(folder, "found none")
    save_file({"a": torch.zeros(2)}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": torch.zeros(2)}, folder / "model-00002-of-00002.safetensors")
    refused(folder, "2 files of safetensors and no index")


def test_says_what_a_folder_is_that_is_no_checkpoint(tmp_path: Path) -> None:
    def message(folder: Path) -> str:
        with pytest.raises(BitternError) as error:
            open_checkpoint(folder)
        return str(error.value)

    folder = tmp_path / "gg"
    folder.mkdir()
    assert message(folder) == f"{folder}: expected config.json; found none"
    (folder / "q8.gguf").touch()
    (folder / "q4.gguf").touch()
    named = f", but GGUF; name the file: {folder}/q4.gguf"
    assert message(folder) == f"{folder}: expected config.json; found none{named}"
    (folder / "config.json").write_text("{}")
    weights = "model.safetensors, its shards and index, or pytorch_model.bin"
    assert message(folder) == f"{folder}: expected {weights}; found none{named}"
    (folder / "adapter_config.json").write_text("{}")
    assert message(folder).endswith("; found none: it is an adapter, without the model that it adapts")
    (folder / "config.json").write_text("[]")
    refused(folder, "expected a JSON object, found list")
    refused(folder / "config.json", "expected a folder or a .gguf file")
    with pytest.raises(BitternError, match="only a Hub id has revisions"):
        open_checkpoint(folder, revision="main")


def test_reads_the_only_file_of_another_quantizer(tmp_path: Path) -> None:
    with open_checkpoint(make(tmp_path / "c", **{"gptq_model-4bit-128g": {"a": torch.ones(2)}})) as checkpoint:
        assert_reads(checkpoint, {"a": torch.ones(2)})


def test_reads_legacy_files_one_and_sharded(tmp_path: Path) -> None:
    base = torch.rand(6, 4)
    one, two = {"a": base.t(), "b": torch.arange(5)}, {"c": torch.rand(3).bfloat16(), "half": base[3:]}
    torch.save(one | two, make(tmp_path / "one") / "pytorch_model.bin")
    folder = make(tmp_path / "sharded")
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate((one, two)):
        torch.save(tensors, folder / f"pytorch_model-{number}.bin")
        weight_map |= dict.fromkeys(tensors, f"pytorch_model-{number}.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for source in (tmp_path / "one", folder):
        with open_checkpoint(source) as checkpoint:
            assert_reads(checkpoint, {name: tensor.contiguous() for name, tensor in (one | two).items()})
            assert checkpoint.read_rows("a", 1, 3).equal(base.t()[1:3])


class Payload:
    """What a hostile pickle would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("ran"),)


def test_legacy_files_run_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = make(tmp_path / "c") / "pytorch_model.bin"
    torch.save({"a": Payload()}, path)
    refused(path.parent, "pytorch_model.bin", "expected tensors alone")
    assert not (tmp_path / "ran").exists()
    torch.save({"state": {"a": torch.zeros(2)}}, path)
    refused(path.parent, "expected a flat dict of tensors")
    torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    refused(path.parent, "since 1.6")
    path.write_bytes(b"no archive")
    refused(path.parent, "expected tensors alone")


def test_a_side_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path / "c", model={"a": torch.zeros(2)})
    (folder / "LICENSE").write_text("free")

    def forbid(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with open_checkpoint(folder) as checkpoint, pytest.raises(BitternError, match="c/LICENSE: cannot be read: Perm"):
        monkeypatch.setattr(Path, "read_bytes", forbid)
        checkpoint.copy_side_files(tmp_path)


def test_side_files_travel_and_nothing_else(tmp_path: Path) -> None:
    folder = make(tmp_path / "c", model={"a": torch.zeros(2)})
    travel = ["LICENSE", "License.txt", "NOTICE.txt", "additional_chat_templates/tools.jinja", "chat_template.jinja"]
    travel += ["generation_config.json", "merges.txt", "preprocessor_config.json", "spiece.model", "tokenizer.json"]
    stay = [
        "README.md",
        "quantize_config.json",
        "optimizer.pt",
        "pytorch_model.bin",
        "training_args.bin",
        ".gitattributes",
    ]
    for name in travel + stay:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    target = tmp_path / "target"
    target.mkdir()
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.copy_side_files(target) == travel
    files = sorted(str(path.relative_to(target)) for path in target.rglob("*") if path.is_file())
    assert files == travel
    assert all((target / name).read_text() == name for name in travel)
    (tmp_path / "secret").write_text("secret")
    (folder / "tokenizer_config.json").symlink_to(tmp_path / "secret")
    with open_checkpoint(folder) as checkpoint, pytest.raises(BitternError, match=r"tokenizer_config\.json leads out"):
        checkpoint.copy_side_files(target)


# GGUF


LLAMA = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 300}
HEADS, KV_HEADS, HEAD = 4, 2, 16


def llama_weights() -> dict[str, Tensor]:
    """GGUF's name -> a weight as transformers has it; exact in fp16."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).half().float()

    hidden, inner = LLAMA["hidden_size"], LLAMA["intermediate_size"]
    weights = {"token_embd": random(LLAMA["vocab_size"], hidden), "output_norm": random(hidden)}
    weights["output"] = random(LLAMA["vocab_size"], hidden)
    for layer in range(LLAMA["num_hidden_layers"]):
        shapes = {
            "attn_norm": (hidden,),
            "ffn_norm": (hidden,),
            "attn_q": (HEADS * HEAD, hidden),
            "attn_k": (KV_HEADS * HEAD, hidden),
            "attn_v": (KV_HEADS * HEAD, hidden),
            "attn_output": (hidden, HEADS * HEAD),
            "ffn_gate": (inner, hidden),
            "ffn_up": (inner, hidden),
            "ffn_down": (hidden, inner),
        }
        weights |= {f"blk.{layer}.{name}": random(*shape) for name, shape in shapes.items()}
    return weights


NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def transformers_name(name: str) -> str:
    prefix, _, last = name.rpartition(".")
    return (f"model.layers.{prefix.split('.')[1]}." if prefix else "") + NAMES[last] + ".weight"


def write_gguf(path: Path, weights: dict[str, Tensor], architecture: str = "llama") -> Path:
    """A GGUF file as llama.cpp makes one: rows of q and k interleaved per head, some tensors quantized."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(LLAMA["num_hidden_layers"])
    writer.add_context_length(64)
    writer.add_embedding_length(LLAMA["hidden_size"])
    writer.add_feed_forward_length(LLAMA["intermediate_size"])
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    alphabet = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256))] + [
        chr(256 + code) for code in range(68)
    ]
    tokens = ["<unk>", "<s>", "</s>", *alphabet, "ab", "cd"]
    tokens += [f"<extra{number}>" for number in range(LLAMA["vocab_size"] - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a b", "c d"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, weight in weights.items():
        array = weight.numpy()
        for part, heads in (("attn_q", HEADS), ("attn_k", KV_HEADS)):
            if name.endswith(part):
                array = array.reshape(heads, 2, HEAD // 2, -1).swapaxes(1, 2).reshape(array.shape)
        if name.endswith(("attn_q", "ffn_up")):
            array = array.astype(np.float16)
        if name.endswith("ffn_gate"):
            quantized = gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"{name}.weight", quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(f"{name}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_reads_a_gguf_llama(tmp_path: Path) -> None:
    weights = llama_weights()
    path = write_gguf(tmp_path / "tiny.gguf", weights)
    with open_checkpoint(path) as checkpoint:
        assert set(checkpoint.tensors) == {transformers_name(name) for name in weights}
        for name, weight in weights.items():
            read = checkpoint.read(transformers_name(name))
            if name.endswith("ffn_gate"):  # Q8_0: half a step of a block of 32, whose scale is rounded to fp16
                step = weight.view(-1, 32).abs().amax(1, keepdim=True) / 127
                assert ((read - weight).view(-1, 32).abs() <= 0.57 * step).all()
            else:
                assert read.equal(weight), name
        name = "model.layers.1.self_attn.q_proj.weight"
        assert checkpoint.read_rows(name, 3, 9).equal(weights["blk.1.attn_q"][3:9])
        assert checkpoint.config["architectures"] == ["LlamaForCausalLM"]
        assert {key: checkpoint.config[key] for key in LLAMA} == LLAMA
        assert checkpoint.config["num_key_value_heads"] == KV_HEADS
        assert checkpoint.config["tie_word_embeddings"] is False
        (tmp_path / "side").mkdir()
        assert "tokenizer.json" in checkpoint.copy_side_files(tmp_path / "side")
        assert checkpoint.tokenizer()("cab", add_special_tokens=False)["input_ids"] == [3 + ord("c") - 33, 3 + 256]


def test_a_gguf_reads_as_transformers_loads_it(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers needs accelerate to load a GGUF file")
    from transformers import AutoModelForCausalLM

    path = write_gguf(tmp_path / "tiny.gguf", llama_weights())
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    with open_checkpoint(path) as checkpoint:
        assert_reads(checkpoint, model.state_dict())


def test_refuses_gguf_files_that_lie(tmp_path: Path) -> None:
    weights = llama_weights()
    whole = write_gguf(tmp_path / "whole.gguf", weights).read_bytes()
    path = tmp_path / "broken.gguf"
    for keep in (0, 3, 20, 400, len(whole) - 4096):
        path.write_bytes(whole[:keep])
        refused(path, "broken.gguf")
    refused(write_gguf(tmp_path / "a.gguf", weights, architecture="no-such-thing"), "a.gguf", "no-such-thing")
    del weights["blk.1.attn_v"]
    refused(write_gguf(tmp_path / "b.gguf", weights), "holds no tensor for model.layers.1.self_attn.v_proj.weight")
    weights |= {"blk.1.attn_v": torch.zeros(32, 64), "rope_freqs": torch.ones(8)}
    refused(write_gguf(tmp_path / "c.gguf", weights), "rope_freqs.weight")
