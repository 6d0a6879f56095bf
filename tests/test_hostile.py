"""Files made to harm: each gives one line of error, in little time and memory, and writes nowhere else."""

from __future__ import annotations

import json
import os
import random
import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from bittern.artifact import Artifact
from bittern.checkpoint import Checkpoint, open_checkpoint
from bittern.errors import BitternError, printable
from bittern.formats import awq, compressed_tensors, gptq, mlx
from bittern.formats.gguf_header import check
from bittern.formats.scheme import Scheme
from bittern.inspect import inspect
from bittern.model import build
from bittern.weight import QuantSpec, round_to_nearest
from tests.test_checkpoint import CONFIG, entry, index, llama_weights, make, raw, write_gguf

ESCAPE = "\x1b]0;owned\x07"


def refused(act: Callable[[], Any], *words: str) -> str:
    """The error, which is one line that commands no terminal."""
    with pytest.raises(BitternError) as caught:
        act()
    message = str(caught.value)
    assert message.isprintable(), message
    assert len(message) < 2100
    for word in words:
        assert word in message, message
    return message


def refused_folder(folder: Path, *words: str) -> None:
    refused(lambda: open_checkpoint(folder), *words)


def file_of(folder: Path, text: bytes, data: bytes = b"", length: int | None = None) -> Path:
    """A folder whose safetensors file has this header, or says that it has one of another length."""
    make(folder)
    length = len(text) if length is None else length
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + text + data)
    return folder


@contextmanager
def alarm(seconds: int) -> Iterator[None]:
    """Fail instead of hanging."""
    import signal

    def late(*_: Any) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def _nothing_hangs() -> Iterator[None]:
    with alarm(120):
        yield


# Messages


def test_errors_are_one_harmless_line() -> None:
    assert str(BitternError(f"a: {ESCAPE}\n b\u202e\ud800 ü")) == r"a: \x1b]0;owned\x07 b\u202e\ud800 ü"
    long = printable("x" * 10**6)
    assert len(long) < 2100
    assert "..." in long


# Safetensors


def test_a_safetensors_file_cut_at_any_byte_is_refused(tmp_path: Path) -> None:
    whole = save({"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(4, dtype=torch.int8)})
    folder = make(tmp_path / "c")
    for keep in range(len(whole)):
        (folder / "model.safetensors").write_bytes(whole[:keep])
        refused_folder(folder, "model.safetensors")
    (folder / "model.safetensors").write_bytes(whole)
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.read("a").equal(torch.arange(6.0).view(2, 3))


GOOD = json.dumps({"a": entry("F32", [2], 0, 8)}).encode()


@pytest.mark.parametrize("length", [0, 1, len(GOOD) - 1, len(GOOD) + 9, 99_999_999, 2**31, 2**63, 2**64 - 1])
def test_a_header_length_that_lies_is_refused(tmp_path: Path, length: int) -> None:
    refused_folder(file_of(tmp_path / "c", GOOD, bytes(8), length), "model.safetensors")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"null",
        b"7",
        b'"a"',
        b"{",
        b"{}x",
        b"{" * 10**5,
        b'{"a":' * 10**5 + b"1" + b"}" * 10**5,
        b"[" * 10**5 + b"]" * 10**5,
        b'{"a":null}',
        b'{"a":[]}',
        b'{"a":{}}',
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"more":' + b"[" * 5000 + b"]" * 5000 + b"}}",
        b'{"a":{"dtype":1,"shape":[2],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":["F32"],"shape":[2],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":2,"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":["2"],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":[true,2],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}',
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[-8,0]}}',
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0]}}',
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8,8]}}',
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,18446744073709551616]}}',
        b'{"a":{"dtype":"F32","shape":[1099511627776,1099511627776],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":[0,18446744073709551615,2],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F4","shape":[16],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F6_E2M3","shape":[32],"data_offsets":[0,24]}}',
        b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"\\u0061":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        b'{"__metadata__":{"a":1},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        b'{"__metadata__":[],"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        b'{"\xff":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        GOOD.decode().encode("utf-16-le"),
    ],
    ids=lambda text: repr(text[:48]),
)
def test_a_header_of_the_wrong_form_is_refused(tmp_path: Path, text: bytes) -> None:
    refused_folder(file_of(tmp_path / "c", text, bytes(8)), "model.safetensors")


@pytest.mark.parametrize(
    "name", ["a\0b", "a\nb", ESCAPE, "a\u202eb", "a\u2028b", "x" * 1001, "\x7f"], ids=lambda name: ascii(name[:9])
)
def test_names_that_would_command_a_terminal_are_refused(tmp_path: Path, name: str) -> None:
    refused_folder(raw(tmp_path / "c", {name: entry("U8", [2], 0, 2)}, b"ab"), "printable characters")


@pytest.mark.parametrize("name", ["../../up", "/etc/passwd", "a/b", "..", "", "ключ"])
def test_odd_names_are_names_and_no_paths(tmp_path: Path, name: str) -> None:
    header = {name: entry("U8", [2], 0, 2), "none": entry("F32", [0, 7], 2, 2), "scalar": entry("U8", [], 2, 3)}
    with open_checkpoint(raw(tmp_path / "in" / "c", header, b"abc")) as checkpoint:
        assert checkpoint.read(name).tolist() == [97, 98]
        assert checkpoint.read("none").shape == (0, 7)
        assert checkpoint.read("scalar").item() == 99
        _convert(checkpoint, tmp_path / "in" / "out")
    assert (
        sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
        == ["config.json"] * 2 + ["model.safetensors"] * 2
    )


def _convert(checkpoint: Checkpoint, out: Path) -> None:
    from bittern.writer import CheckpointWriter

    with CheckpointWriter(out, list(checkpoint.tensors.values())) as writer:
        for name in checkpoint.tensors:
            writer.write(name, checkpoint.read(name))
        checkpoint.copy_side_files(writer.folder)
        writer.commit(checkpoint.config)


# The index


def test_an_index_leads_to_files_of_its_folder_alone(tmp_path: Path) -> None:
    folder = make(tmp_path / "c", model={"a": torch.zeros(2)})
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (folder / "folder.safetensors").mkdir()
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    (folder / "folder").symlink_to(tmp_path)
    names = {
        "../outside.safetensors": "leads out",
        f"{tmp_path}/outside.safetensors": "leads out",
        "folder/outside.safetensors": "leads out",
        "c/../../outside.safetensors": "leads out",
        "\0.safetensors": "cannot be found",
        "x" * 300 + ".safetensors": "cannot be found",
        "loop.safetensors": "cannot be found",
        "folder.safetensors": "no file",
        "model.safetensors.index.json": "expected a .safetensors file",
        "config.json": "expected a .safetensors file",
        "": "expected a .safetensors file",
        f"{ESCAPE}.safetensors": "missing",
    }
    for name, reason in names.items():
        index(folder, {"a": name})
        refused_folder(folder, reason)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        '{"weight_map": null}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": ["b"]}}',
        '{"weight_map": ' + "[" * 10**5 + "]" * 10**5 + "}",
        '{"weight_map": {"a": "model-\ud800.safetensors"}}',
        '{"weight_map": {"a": "model.safetensors"}, "n": ' + "9" * 5000 + "}",
        '{"weight_map": {}}',
    ],
    ids=lambda text: ascii(text[:40]),
)
def test_an_index_of_the_wrong_form_is_refused(tmp_path: Path, text: str) -> None:
    folder = make(tmp_path / "c", one={"a": torch.zeros(2)}, two={"b": torch.zeros(2)})
    (folder / "model.safetensors.index.json").write_bytes(text.encode(errors="surrogatepass"))
    refused_folder(folder, "index.json")


# config.json and what else lies in a folder


def config_of(folder: Path, text: str) -> Path:
    make(folder, model={"model.norm.weight": torch.zeros(2)})
    (folder / "config.json").write_bytes(text.encode())
    return folder


@pytest.mark.parametrize(
    "text",
    [
        "",
        "7",
        "null",
        '"llama"',
        "[" * 10**5 + "]" * 10**5,
        '{"a":' * 10**5 + "1" + "}" * 10**5,
        '{"a": ' + "9" * 10**5 + "}",
        '{"model_type": "llama", "name": "\\ud800"}',
        '{"num_hidden_layers": 1000000000}',
        '{"text_config": {"num_hidden_layers": 1000000000}}',
        '{"n_layer": 1e1000, "num_labels": 1000000000}',
        '{"num_local_experts": 1000000000000}',
    ],
    ids=lambda text: text[:40],
)
def test_a_config_that_is_no_config_is_refused(tmp_path: Path, text: str) -> None:
    refused_folder(config_of(tmp_path / "c", text), "config.json")


TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": f"{ESCAPE}\n"},
        {"model_type": ["llama"]},
        {"hidden_size": 10**15},
        {"hidden_size": -64},
        {"hidden_size": 0},
        {"hidden_size": "64"},
        {"hidden_size": None},
        {"hidden_size": float("nan")},
        {"num_hidden_layers": "2"},
        {"num_hidden_layers": [2]},
        {"num_attention_heads": 0},
        {"vocab_size": 10**30},
        {"vocab_size": -1},
        {"pad_token_id": 10**9},
        {"hidden_act": "os.system"},
        {"dtype": "os.system"},
        {"rope_scaling": {"rope_type": "linear", "factor": "a"}},
        {"rope_parameters": {"rope_type": "no\x1bsuch"}},
        {"text_config": {}},
        {"id2label": 5},
    ],
    ids=lambda change: ascii(change)[:50],
)
def test_a_config_that_makes_no_model_is_one_line(change: dict[str, Any]) -> None:
    refused(lambda: build({**TINY, **change}), "config.json")


def test_what_is_no_file_is_refused_before_a_library_waits_for_it(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json", "additional_chat_templates/a.jinja"):
        folder = make(tmp_path / name.replace("/", "-"), model={"a": torch.zeros(2)})
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
        refused_folder(folder, Path(name).name, "a pipe")
        (folder / name).unlink()
        (folder / name).symlink_to("/dev/zero")
        refused_folder(folder, Path(name).name, "a device")
    os.mkfifo(tmp_path / "pipe.gguf")
    refused(lambda: open_checkpoint(tmp_path / "pipe.gguf"), "pipe.gguf")


def test_side_files_neither_come_from_nor_go_to_another_place(tmp_path: Path) -> None:
    secret = tmp_path / "elsewhere"
    secret.mkdir()
    (secret / "key.jinja").write_text("secret")

    def copied(prepare: Callable[[Path], Any], name: str) -> Path:
        folder, target = make(tmp_path / name, model={"a": torch.zeros(2)}), tmp_path / f"{name}-out"
        prepare(folder)
        target.mkdir()
        with open_checkpoint(folder) as checkpoint:
            try:
                checkpoint.copy_side_files(target)
            except BitternError as error:
                assert str(error).isprintable()
                assert "leads out of the folder" in str(error)
        return target

    for name, prepare in {
        "link": lambda folder: (folder / "tokenizer.json").symlink_to("/etc/passwd"),
        "folder": lambda folder: (folder / "additional_chat_templates").symlink_to(secret),
        "inside": lambda folder: (
            (folder / "additional_chat_templates").mkdir()
            or (folder / "additional_chat_templates" / "a.jinja").symlink_to(secret / "key.jinja")
        ),
        "directory": lambda folder: (folder / "tokenizer.model").mkdir(),
        "dangling": lambda folder: (folder / "vocab.json").symlink_to("nowhere"),
    }.items():
        target = copied(prepare, name)
        assert [path for path in target.rglob("*") if path.is_file()] == []
    odd = copied(lambda folder: (folder / f"tokenizer{ESCAPE}\n.json").write_text("x"), "odd")
    assert [path.parent for path in odd.rglob("*")] == [odd]


def test_a_chat_template_neither_reads_files_nor_runs_for_ever(tmp_path: Path, tokenizer: Any) -> None:
    folder = make(tmp_path / "c", model={"a": torch.zeros(2)})
    for template, reason in {
        "{% include '/etc/passwd' %}": "no loader",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}": "unsafe",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}": "unsafe|undefined",
        "{% for a in range(10**9) %}x{% endfor %}": "[Rr]ange",
    }.items():
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        with open_checkpoint(folder) as checkpoint:
            loaded = checkpoint.tokenizer()
        with pytest.raises(Exception, match=reason):
            loaded.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "tokenizer.model"])
@pytest.mark.parametrize(
    "data", [b"", b"\x80\x04cos\nsystem\n(S'touch ran'\ntR.", b"[" * 10**5, b"{}", b"\0" * 1000, b'{"model": 7}']
)
def test_a_broken_tokenizer_is_one_line(tmp_path: Path, name: str, data: bytes, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    folder = make(tmp_path / "c", model={"a": torch.zeros(2)})
    (folder / name).write_bytes(data)
    with open_checkpoint(folder) as checkpoint:
        refused(checkpoint.tokenizer, "no tokenizer that transformers loads")
    assert not (tmp_path / "ran").exists()


# pytorch_model.bin


def test_a_bin_file_that_claims_more_than_it_holds_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "c") / "pytorch_model.bin"
    torch.save({"a": torch.zeros(1).expand(10**9, 10**9)}, path)
    refused_folder(path.parent, "tensor a", "more than the file's")
    torch.save({"a": torch.eye(3).to_sparse()}, path)
    refused_folder(path.parent, "tensor a", "plain values")
    torch.save({7: torch.zeros(1)}, path)
    refused_folder(path.parent, "names of tensors")
    torch.save({ESCAPE: torch.zeros(1)}, path)
    refused_folder(path.parent, "printable")


def test_a_bin_file_is_not_unpacked_beyond_its_size(tmp_path: Path) -> None:
    path = make(tmp_path / "c") / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**7))
        archive.writestr("archive/version", "3\n")
    refused_folder(path.parent, "without compression")


@pytest.mark.parametrize(
    "pickled", [b"", b"\x80\x02.", b"\x80\x02K\x01.", b"(" * 1000, b"\x80\x02h\x05.", b"ccollections\nX\n."]
)
def test_a_broken_pickle_is_one_line(tmp_path: Path, pickled: bytes) -> None:
    path = make(tmp_path / "c") / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {"data.pkl": pickled, "version": b"3\n", "byteorder": b"little"}.items():
            archive.writestr(f"archive/{name}", data)
    refused_folder(path.parent, "pytorch_model.bin")


# Quantization configs

LAYER = "model.layers.0.self_attn.q_proj"
GOOD_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}


def packed() -> dict[str, Tensor]:
    weight = round_to_nearest(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)), QuantSpec(4, 32))
    return {f"{LAYER}.{suffix}": t for suffix, t in gptq.pack(weight, checkpoint_format="gptq").items()}


def read_packed(folder: Path, config: Any, tensors: dict[str, Tensor]) -> Tensor:
    save_file(tensors, make(folder) / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": config}))
    with open_checkpoint(folder) as checkpoint:
        return Artifact(checkpoint).read(LAYER).dequantize()


def each(key: str, *values: Any) -> list[dict[str, Any]]:
    return [{key: value} for value in values]


JUNK: list[Any] = [None, -1, "x", ESCAPE, [], ["a"], {}, {"a": 5}, [{}], True, 4.5, float("nan"), 10**15]
LIES: list[dict[str, Any]] = [
    *each("bits", 0, -1, "4", 4.0, 10**9, None, True, [4], float("nan")),
    *each("group_size", 0, -2, 3, "32", 32.0, 10**12, None, True),
    *each("sym", "yes", None, 0),
    *each("quant_method", 5, {}, [], ESCAPE, "awq", "mlx", "compressed-tensors"),
    *each("checkpoint_format", ["gptq"], {}, None, ESCAPE),
    *each("meta", 5, "x", [1]),
    *each("dynamic", 5, "x", [1], {"(": {}}, {"(" * 5000 + ")" * 5000: {}}, {"x" * 10**6: {}}),
    *each("dynamic", {"a{4294967295}": {}}, {"(((a{999}){999}){999}){999}": {}}, {".*": 5}, {".*": "x"}),
    *each("dynamic", {".*": {"bits": "4"}}, {".*": {"bits": 4.0}}, {".*": {"group_size": "x"}}, {".*": {"sym": 1}}),
]


@pytest.mark.parametrize("change", LIES, ids=lambda change: ascii(change)[:50])
def test_a_quantization_config_that_lies_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    refused(lambda: read_packed(tmp_path / "c", GOOD_GPTQ | change, packed()))


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of everything in a JSON object."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], by: Any) -> Any:
    """A copy of a JSON object with another value at a path."""
    result = json.loads(json.dumps(value))
    inner = result
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = by
    return result


@pytest.mark.parametrize("name", ["gptq_v2", "compressed-tensors", "awq", "mlx"])
def test_junk_anywhere_in_a_quantization_config_is_survived(tmp_path: Path, name: str) -> None:
    modules: dict[str, Any] = {"compressed-tensors": compressed_tensors, "awq": awq, "mlx": mlx}
    module, own = (modules[name], {}) if name in modules else (gptq, {"checkpoint_format": name})
    weight = round_to_nearest(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)), QuantSpec(4, 32))
    tensors = {module.names(LAYER)[suffix]: tensor for suffix, tensor in module.pack(weight, **own).items()}
    config = module.config(weight.spec, layers={LAYER: weight.spec, f"{LAYER}.no": None}, **own)
    folder = make(tmp_path / "c", model=tensors)
    opened = 0
    for path in [(), *places(config)]:
        for value in JUNK if path else [config]:
            lie = replaced(config, path, value) if path else config
            keys = ["quantization", "quantization_config"] if name == "mlx" else ["quantization_config"]
            (folder / "config.json").write_text(json.dumps(CONFIG | dict.fromkeys(keys, lie)))
            try:
                with open_checkpoint(folder) as checkpoint:
                    Artifact(checkpoint).read(LAYER)
                opened += 1
            except BitternError as error:
                assert str(error).isprintable()
    assert opened  # at least what is honest


def test_junk_anywhere_in_a_config_is_survived_by_inspect(tmp_path: Path) -> None:
    folder = make(tmp_path / "c", model={"model.norm.weight": torch.zeros(64)})
    for key in (*TINY, "architectures", "rope_parameters", "head_dim", "dtype", "text_config", "quantization_config"):
        for value in JUNK:
            (folder / "config.json").write_text(json.dumps(TINY | {key: value}))
            try:
                inspect(folder)
            except BitternError as error:
                assert str(error).isprintable()


def test_a_pattern_that_backtracks_for_ever_is_given_up() -> None:
    scheme = Scheme("gptq", QuantSpec(4), overrides=(("(a|a)*(a|a)*(a|a)*b|c", None),))
    refused(lambda: scheme.spec("a" * 1000), "does not end")


@pytest.mark.parametrize(
    ("suffix", "tensor"),
    [
        ("g_idx", torch.full((64,), 7, dtype=torch.int32)),
        ("g_idx", torch.full((64,), -1, dtype=torch.int32)),
        ("g_idx", torch.zeros(10, dtype=torch.int32)),
        ("g_idx", torch.zeros(0, dtype=torch.int32)),
        ("g_idx", torch.zeros(64)),
        ("g_idx", torch.zeros(64, 1, dtype=torch.int32)),
        ("qweight", torch.zeros((), dtype=torch.int32)),
        ("qweight", torch.zeros(8, 0, dtype=torch.int32)),
        ("qweight", torch.zeros(8, 64)),
        ("qweight", torch.zeros(8, 64, dtype=torch.int64)),
        ("qweight", torch.zeros(7, 64, dtype=torch.int32)),
        ("qzeros", torch.zeros(2, 8, dtype=torch.bfloat16)),
        ("qzeros", torch.zeros(8, 2, dtype=torch.int32)),
        ("scales", torch.full((2, 64), float("nan"))),
        ("scales", torch.full((2, 64), float("inf"), dtype=torch.float16)),
        ("scales", torch.ones(2, 64, dtype=torch.int32)),
        ("scales", torch.ones(1, 64)),
    ],
)
def test_packed_tensors_of_the_wrong_form_are_named(tmp_path: Path, suffix: str, tensor: Tensor) -> None:
    refused(lambda: read_packed(tmp_path / "c", GOOD_GPTQ, packed() | {f"{LAYER}.{suffix}": tensor}), LAYER)


@pytest.mark.parametrize(("rows", "columns"), [(0, 0), (0, 32), (32, 0)])
def test_a_packed_layer_without_values_is_refused(tmp_path: Path, rows: int, columns: int) -> None:
    shapes = {"qweight": (columns // 8, rows), "qzeros": (1, rows // 8), "scales": (1, rows)}
    tensors = {f"{LAYER}.{s}": torch.zeros(shape, dtype=torch.int32) for s, shape in shapes.items()}
    refused(lambda: read_packed(tmp_path / "c", GOOD_GPTQ | {"group_size": -1}, tensors), LAYER)


# GGUF


def string(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


def gguf_bytes(
    metadata: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
    data: bytes = bytes(256),
) -> bytes:
    """A GGUF file from bare entries; ``counts`` is what it says of tensors and metadata."""
    told = (len(tensors), len(metadata)) if counts is None else counts
    header = b"GGUF" + struct.pack("<IQQ", version, *told) + b"".join([*metadata, *tensors])
    return header + bytes(-len(header) % 32) + data


def u32(key: bytes, value: int, kind: int = 4) -> bytes:
    return string(key) + struct.pack("<II", kind, value)


def array(key: bytes, kind: int, count: int, data: bytes = b"") -> bytes:
    return string(key) + struct.pack("<IIQ", 9, kind, count) + data


def tensor_info(
    name: bytes, shape: Sequence[int], kind: int = 0, offset: int = 0, dimensions: int | None = None
) -> bytes:
    count = len(shape) if dimensions is None else dimensions
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", count, *shape, kind, offset)


def test_an_honest_gguf_header_passes(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    strings = array(b"list", 8, 2, string(b"a") + string(b"\xff"))
    metadata = [u32(b"general.alignment", 64), strings, array(b"empty", 5, 0), array(b"n", 2, 3, bytes(6))]
    tensors = [tensor_info(b"a", [3, 5], offset=64), tensor_info(b"q", [32, 1], kind=2)]
    header = b"GGUF" + struct.pack("<IQQ", 2, 2, 4) + b"".join(metadata + tensors)
    path.write_bytes(header + bytes(-len(header) % 64) + bytes(64 + 60))
    check(path)
    path.write_bytes(path.read_bytes()[:-1])
    refused(lambda: check(path), "truncated: tensor a")


LYING = {
    "no magic": (b"GGML" + bytes(100), "begin with GGUF"),
    "version 1": (gguf_bytes(version=1), "version"),
    "version 0": (gguf_bytes(version=0), "version"),
    "big-endian": (gguf_bytes(version=3 << 24), "byte order"),
    "tensor count": (gguf_bytes(counts=(2**63, 0)), f"{2**63} tensors"),
    "metadata count": (gguf_bytes(counts=(0, 2**64 - 1)), "metadata entries"),
    "key length": (gguf_bytes([string(b"a", 2**63)]), "metadata entry 0"),
    "long key": (gguf_bytes([u32(b"a" * 70000, 1)]), "at most 65535"),
    "key not UTF-8": (gguf_bytes([u32(b"\xff", 1)]), "not UTF-8"),
    "string length": (gguf_bytes([string(b"a") + struct.pack("<I", 8) + string(b"b", 2**64 - 1)]), "ends before"),
    "value type": (gguf_bytes([u32(b"a", 1, kind=13)]), "type 13"),
    "array type": (gguf_bytes([array(b"a", 77, 1)]), "type 77"),
    "array length": (gguf_bytes([array(b"a", 0, 2**62)]), "values in arrays"),
    "array length that fits no file": (gguf_bytes([array(b"a", 12, 10**6)]), "1000000 values"),
    "strings": (gguf_bytes([array(b"a", 8, 10**6)]), "1000000 strings"),
    "array of arrays": (
        gguf_bytes([string(b"a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 10**4]),
        "of arrays",
    ),
    "key twice": (gguf_bytes([u32(b"a", 1), u32(b"a", 2)]), "twice"),
    "blocks": (gguf_bytes([u32(b"llama.block_count", 10**9)]), "block_count"),
    "alignment 0": (gguf_bytes([u32(b"general.alignment", 0)]), "power of two"),
    "alignment 48": (gguf_bytes([u32(b"general.alignment", 48)]), "power of two"),
    "alignment float": (gguf_bytes([u32(b"general.alignment", 32, kind=6)]), "power of two"),
    "alignment beyond": (gguf_bytes([u32(b"general.alignment", 2**31)], [tensor_info(b"a", [1])]), "truncated"),
    "tensor twice": (gguf_bytes(tensors=[tensor_info(b"a", [8]), tensor_info(b"a", [8], offset=32)]), "twice"),
    "tensor name": (gguf_bytes(tensors=[tensor_info(b"\x1b[2J\xff", [8])]), "not UTF-8"),
    "no dimension": (gguf_bytes(tensors=[tensor_info(b"a", [])]), "dimensions"),
    "dimensions": (gguf_bytes(tensors=[tensor_info(b"a", [1] * 5)]), "dimensions"),
    "dimension count": (gguf_bytes(tensors=[tensor_info(b"a", [1], dimensions=2**32 - 1)]), "dimensions"),
    "size 0": (gguf_bytes(tensors=[tensor_info(b"a", [4, 0])]), "shape"),
    "size overflows": (gguf_bytes(tensors=[tensor_info(b"a", [2**32, 2**32])]), "shape"),
    "part of a block": (gguf_bytes(tensors=[tensor_info(b"a", [31], kind=2)]), "shape"),
    "tensor type": (gguf_bytes(tensors=[tensor_info(b"a", [8], kind=999)]), "type 999"),
    "removed type": (gguf_bytes(tensors=[tensor_info(b"a", [8], kind=4)]), "type 4"),
    "unaligned": (gguf_bytes(tensors=[tensor_info(b"a", [8], offset=4)]), "offset"),
    "beyond the end": (gguf_bytes(tensors=[tensor_info(b"a", [8], offset=2**63)]), "truncated"),
    "overlap": (
        gguf_bytes(tensors=[tensor_info(b"a", [16]), tensor_info(b"b", [8], offset=32)]),
        "before the end of a",
    ),
}


@pytest.mark.parametrize("name", LYING)
def test_a_gguf_header_that_lies_is_refused(tmp_path: Path, name: str) -> None:
    data, word = LYING[name]
    path = tmp_path / "a.gguf"
    path.write_bytes(data)
    refused(lambda: check(path), "a.gguf", word)
    pytest.importorskip("gguf")
    refused(lambda: open_checkpoint(path), "a.gguf")


def test_what_lies_beside_a_gguf_file_is_not_its_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "in" / "additional_chat_templates").mkdir(parents=True)
    (tmp_path / "in" / "additional_chat_templates" / "default.jinja").write_text("theirs")
    templates = [{"name": "../../up", "template": "x"}]
    (tmp_path / "in" / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    os.mkfifo(tmp_path / "in" / "tokenizer.json")
    path = write_gguf(tmp_path / "in" / "a.gguf", llama_weights())
    (tmp_path / "out").mkdir()
    with open_checkpoint(path) as checkpoint:
        checkpoint.copy_side_files(tmp_path / "out")
        assert checkpoint.tokenizer().chat_template is None
    written = sorted(path.name for path in (tmp_path / "out").rglob("*"))
    assert written == ["tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


# Any byte


def mutations(data: bytes, header: int, count: int, seed: int) -> Iterator[bytes]:
    """Copies of a file with one to four bytes of its header changed, or some left out or doubled."""
    numbers = random.Random(seed)
    for _ in range(count):
        changed = bytearray(data)
        for _ in range(numbers.choice((1, 1, 2, 4))):
            at = numbers.randrange(min(header, len(changed)))
            step = numbers.randrange(4)
            if step == 0:
                changed[at] = numbers.randrange(256)
            elif step == 1:
                changed[at : at + 8] = numbers.choice((b"\0" * 8, b"\xff" * 8, struct.pack("<Q", 2**63)))
            elif step == 2:
                del changed[at : at + numbers.randrange(1, 9)]
            else:
                changed[at:at] = changed[at : at + numbers.randrange(1, 9)]
        yield bytes(changed)


def survive(path: Path, data: bytes) -> bool:
    """Whether a file opens and reads; anything but a BitternError of one line fails the test."""
    path.write_bytes(data)
    try:
        with open_checkpoint(path if path.suffix == ".gguf" else path.parent) as checkpoint:
            for name in list(checkpoint.tensors)[:2]:
                checkpoint.read(name)
        return True
    except BitternError as error:
        assert str(error).isprintable()
        return False


def test_any_change_of_a_safetensors_header_is_survived(tmp_path: Path) -> None:
    path = make(tmp_path / "c", model={"a": torch.zeros(3, 4), "b.c": torch.ones(5)}) / "model.safetensors"
    whole = path.read_bytes()
    results = [survive(path, data) for data in mutations(whole, int.from_bytes(whole[:8], "little") + 8, 600, 1)]
    assert 0 < sum(results) < 300  # names may change


def test_any_change_of_an_index_is_survived(tmp_path: Path) -> None:
    folder = make(tmp_path / "c", one={"a": torch.zeros(3)}, two={"b": torch.ones(5)})
    path = folder / "model.safetensors.index.json"
    whole = path.read_bytes()
    results = [survive(path, data) for data in mutations(whole, len(whole), 600, 2)]
    assert 0 < sum(results) < 300


def test_any_change_of_a_gguf_header_is_survived(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", llama_weights())
    whole = path.read_bytes()
    assert survive(path, whole)
    first = whole.index(b"output_norm.weight") - 60  # the last metadata and the first tensors
    changed = [*mutations(whole[:800], 800, 200, 3), *mutations(whole[first:], 1500, 200, 4)]
    files = [data + whole[800:] for data in changed[:200]] + [whole[:first] + data for data in changed[200:]]
    honest = []
    for data in files:
        path.write_bytes(data)
        try:
            check(path)
            honest.append(data)
        except BitternError as error:
            assert str(error).isprintable()
    assert 20 < len(honest) < 300
    for data in honest[:: len(honest) // 6]:  # what the check lets through must not surprise the libraries
        survive(path, data)


# Giants

GIANTS = """
import resource, sys, time
from pathlib import Path
import gguf, torch, transformers.modeling_gguf_pytorch_utils
from bittern.checkpoint import open_checkpoint
from bittern.errors import BitternError
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28,) * 2)
for source in sys.argv[1:]:
    try:
        open_checkpoint(source)
        print("opened")
    except BitternError as error:
        print(error)
print(time.process_time())
"""


def test_giants_cost_neither_memory_nor_time(tmp_path: Path) -> None:
    pytest.importorskip("gguf")

    def sparse(path: Path, start: bytes) -> Path:
        with path.open("wb") as file:
            file.write(start)
            file.truncate(2**40)
        return path

    header = sparse(make(tmp_path / "header") / "model.safetensors", struct.pack("<Q", 2**40)).parent
    listed = make(tmp_path / "index", one={"a": torch.zeros(1)}, two={"b": torch.zeros(1)})
    sparse(listed / "model.safetensors.index.json", b"{")
    configured = make(tmp_path / "config", one={"a": torch.zeros(1)})
    sparse(configured / "config.json", b"{")
    strings = sparse(tmp_path / "strings.gguf", gguf_bytes([array(b"a", 8, 2**23)]))
    values = sparse(tmp_path / "values.gguf", gguf_bytes([array(b"a", 0, 2**39)]))
    tensors = sparse(tmp_path / "tensors.gguf", gguf_bytes(counts=(2**34, 0)))
    expected = {
        header: "header of at most",
        listed: "index.json: expected at most",
        configured: "config.json: expected at most",
        strings: "values in arrays",
        values: "values in arrays",
        tensors: "the header exceeds",
    }
    done = subprocess.run(
        [sys.executable, "-c", GIANTS, *map(str, expected)], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr[-500:]
    *said, seconds = done.stdout.splitlines()
    for message, words in zip(said, expected.values(), strict=True):
        assert words in message
    assert float(seconds) < 30  # of which importing the libraries takes most


def test_names_among_patterns_count_in_their_order_and_are_not_tried() -> None:
    """The first override that fits counts, whether it is a name or a pattern; names are looked up."""
    words = ["a", "b-1", "c"]
    names = [f"model.{x}.{y}" for x in words for y in words]
    drawn = random.Random(0)
    for _ in range(200):
        overrides: list[tuple[str, dict[str, Any] | None]] = []
        for _ in range(drawn.randrange(8)):
            name = drawn.choice(names)
            pattern = drawn.choice([f"{re.escape(name)}$", f"^{re.escape(name)}$", f".*{name[-2:]}$", "model.a", ""])
            overrides.append((pattern, drawn.choice([None, {"bits": drawn.choice([2, 3, 8])}])))
        scheme = Scheme("gptq", QuantSpec(4, 32), overrides=tuple(overrides))
        for name in names:
            first = next((values for pattern, values in overrides if re.match(pattern, name)), {})
            assert scheme.spec(name) == (None if first is None else QuantSpec(first.get("bits", 4), 32))


def test_tens_of_thousands_of_named_layers_need_no_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"model.layers.{layer}.mlp.experts.{expert}.w1" for layer in range(40) for expert in range(256)]
    scheme = Scheme("mlx", QuantSpec(4), overrides=tuple((f"{re.escape(name)}$", {"bits": 8}) for name in names))
    monkeypatch.setattr("bittern.formats.scheme._compiled", lambda pattern: pytest.fail(pattern))
    assert {scheme.spec(name) for name in names} == {QuantSpec(8)} and scheme.spec("lm_head") == QuantSpec(4)
