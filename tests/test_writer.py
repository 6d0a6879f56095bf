"""Writing: what the safetensors library reads back; refusals; full, read-only and forbidden places."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from bittern import shards
from bittern.errors import BitternError
from bittern.shards import DTYPES, TensorInfo
from bittern.writer import CheckpointWriter, check_output, shard_names, split

CONFIG = {"model_type": "llama", "name": "naïve"}
Mount = Callable[[str], Path]


def plan_of(tensors: dict[str, Tensor]) -> list[TensorInfo]:
    return [TensorInfo(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def write(out: Path, tensors: dict[str, Tensor], max_shard_size: int = 10**9, overwrite: bool = False) -> Path:
    with CheckpointWriter(out, plan_of(tensors), max_shard_size=max_shard_size, overwrite=overwrite) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.commit(CONFIG)
    return out


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def raw(tensor: Tensor) -> list[int]:
    """The bytes of a tensor, whatever numbers they are: noise has NaNs."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def refused(*words: str) -> Iterator[None]:
    with pytest.raises(BitternError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """Mounts a tmpfs with the given options; skips where that is not allowed."""
    mounted: list[Path] = []

    def mount_tmpfs(options: str) -> Path:
        point = tmp_path / f"mount{len(mounted)}"
        point.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", point], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
        mounted.append(point)
        return point

    try:
        yield mount_tmpfs
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    finally:
        for point in mounted:
            subprocess.run(["umount", point], check=True)


def test_the_safetensors_library_reads_back_what_is_written(tmp_path: Path) -> None:
    noise = torch.randint(0, 256, (6, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tensors = {code: noise.clone().view(dtype) for code, dtype in DTYPES.items() if code not in ("BOOL", "F8_E8M0")}
    tensors |= {
        "odd": noise[0, :3].clone(),
        "bool": noise > 99,
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
    }
    tensors["strided"] = torch.rand(4, 6).t()
    out = write(tmp_path / "out", tensors)
    assert listing(out) == ["config.json", "model.safetensors"]
    assert listing(tmp_path) == ["out"]
    assert json.loads((out / "config.json").read_text()) == CONFIG
    read = load_file(out / "model.safetensors")
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        assert raw(read[name]) == raw(tensor)
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_values_are_aligned_in_a_file_of_mixed_dtypes(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(3), "c": torch.ones(3, dtype=torch.float16)}
    data = (write(tmp_path / "out", tensors) / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    assert {name: header[name]["data_offsets"][0] for name in tensors} == {"b": 0, "c": 12, "a": 18}


def test_shards_and_index(tmp_path: Path) -> None:
    tensors = {f"t{number}": torch.rand(10, number + 1) for number in range(9)}  # 40 to 360 bytes
    out = write(tmp_path / "out", tensors, max_shard_size=400)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert files == shard_names(len(files)) == sorted(set(index["weight_map"].values()))
    for file in files:
        read = load_file(out / file)
        assert {name for name, where in index["weight_map"].items() if where == file} == set(read)
        assert all(read[name].equal(tensors[name]) for name in read)
        assert sum(tensor.nbytes for tensor in read.values()) <= 400


MANY = """
import os, resource, sys, torch
from bittern.checkpoint import open_checkpoint
from bittern.errors import BitternError
from bittern.shards import TensorInfo
from bittern.writer import CheckpointWriter

out, room = sys.argv[1], len(os.listdir("/proc/self/fd")) + 20
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
plan = [TensorInfo(f"t{number}", torch.float32, (4,)) for number in range(100)]

def write(out, start, stop):
    with CheckpointWriter(out, plan, max_shard_size=16) as writer:
        for info in plan:
            writer.write_elements(info.name, start, torch.ones(stop - start))
        writer.commit({"model_type": "llama"})

def read():
    with open_checkpoint(out) as checkpoint:
        assert all(checkpoint.read(info.name).sum() == 4 for info in plan)

resource.setrlimit(resource.RLIMIT_NOFILE, (room, hard))
write(out, 0, 4)
print("raised for the writer:", resource.getrlimit(resource.RLIMIT_NOFILE)[0] > room)
read()
print("raised for the reader:", resource.getrlimit(resource.RLIMIT_NOFILE)[0] > room)
resource.setrlimit(resource.RLIMIT_NOFILE, (room, room))
for refused in (lambda: write(out + "2", 0, 2), read):
    try:
        refused()
    except BitternError as error:
        print(error)
"""


def test_more_shards_than_a_process_may_hold_open(tmp_path: Path) -> None:
    """Whole shards are closed; a reader holds all, which the soft limit is raised for."""
    command = [sys.executable, "-c", MANY, str(tmp_path / "out")]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert shown[:2] == ["raised for the writer: False", "raised for the reader: True"]
    assert "too many files are open: a larger --max-shard-size makes fewer, ulimit -n allows more" in shown[2]
    assert "reading tensor t" in shown[3] and "too many files are open, ulimit -n allows more" in shown[3]


@pytest.mark.parametrize(
    ("sizes", "limit", "expected"),
    [
        ([1, 2, 3], 100, [[1, 2, 3]]),
        ([50, 50, 1], 100, [[50, 50], [1]]),
        ([10, 500, 10], 100, [[10], [500], [10]]),
        ([500], 100, [[500]]),
        ([], 100, [[]]),
    ],
)
def test_split(sizes: list[int], limit: int, expected: list[list[int]]) -> None:
    plan = [TensorInfo(str(number), torch.uint8, (size,)) for number, size in enumerate(sizes)]
    assert [[info.nbytes for info in shard] for shard in split(plan, limit)] == expected


def test_any_order_and_any_pieces_give_the_same_bytes(tmp_path: Path) -> None:
    tensors = {"a": torch.rand(8, 4), "b": torch.rand(5), "c": torch.rand(2, 3, 4)}
    whole = write(tmp_path / "whole", tensors, max_shard_size=130)
    with CheckpointWriter(tmp_path / "pieces", plan_of(tensors), max_shard_size=130) as writer:
        writer.write_elements("c", 5, tensors["c"].flatten()[5:])
        writer.write_elements("a", 24, tensors["a"][6:])
        writer.write("b", tensors["b"])
        writer.write_elements("a", 0, tensors["a"][:6])
        writer.write_elements("c", 0, tensors["c"].flatten()[:5])
        writer.commit(CONFIG)
    assert content(tmp_path / "pieces") == content(whole)


def test_what_contradicts_the_plan_is_refused_and_nothing_stays(tmp_path: Path) -> None:
    plan = [TensorInfo("a", torch.float32, (4, 2)), TensorInfo("b", torch.float32, (3,))]
    with refused("b: only 2 of 3 elements"), CheckpointWriter(tmp_path / "out", plan) as writer:
        with refused("a: expected shape (4, 2), found (2, 4)"):
            writer.write("a", torch.zeros(2, 4))
        with refused("a: expected torch.float32, found torch.float16"):
            writer.write("a", torch.zeros(4, 2).half())
        with refused("a: elements 6 to 10"):
            writer.write_elements("a", 6, torch.zeros(2, 2))
        with refused("nowhere: this tensor is not in the plan"):
            writer.write("nowhere", torch.zeros(1))
        writer.write_elements("a", 2, torch.zeros(2, 2))
        with refused("a: elements 0 to 8 are written twice"):
            writer.write("a", torch.zeros(4, 2))
        writer.write_elements("a", 0, torch.zeros(1, 2))
        writer.write_elements("a", 6, torch.zeros(1, 2))
        writer.write_elements("b", 0, torch.zeros(2))
        writer.commit(CONFIG)
    assert listing(tmp_path) == []
    with refused("names a tensor twice"):
        CheckpointWriter(tmp_path / "out", [plan[0], plan[0]])
    with refused("max_shard_size", "found 0"):
        CheckpointWriter(tmp_path / "out", plan, max_shard_size=0)
    with refused("x: safetensors files have no torch.complex128"):
        CheckpointWriter(tmp_path / "out", [TensorInfo("x", torch.complex128, (1,))])
    assert listing(tmp_path) == []


def test_a_thread_that_still_writes_when_all_is_given_up_writes_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next file that is opened gets the number of one that was closed."""
    began, given_up = threading.Event(), threading.Event()
    write = shards.write_elements

    def slow(*args: Any) -> None:
        began.set()
        assert given_up.wait(30)
        write(*args)

    monkeypatch.setattr("bittern.writer.write_elements", slow)
    out = CheckpointWriter(
        tmp_path / "out", [TensorInfo("a", torch.float32, (4,)), TensorInfo("b", torch.float32, (4,))]
    )
    thread = threading.Thread(target=out.write, args=("a", torch.ones(4)))
    with pytest.raises(BitternError, match="half way"), out:
        thread.start()
        assert began.wait(30)
        raise BitternError("half way")
    others = [(tmp_path / str(number)).open("wb+") for number in range(8)]
    given_up.set()
    thread.join()
    for file in others:
        assert not file.read()
        file.close()
    with pytest.raises(BitternError, match=r"b: written after .*out was given up"):
        out.write("b", torch.ones(4))
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_until_the_commit_nothing_looks_like_a_checkpoint(tmp_path: Path) -> None:
    tensors = {"a": torch.rand(4)}
    with CheckpointWriter(tmp_path / "out", plan_of(tensors)) as writer:
        writer.write("a", tensors["a"])
        writer.write_file("tokenizer.json", "{}")
        assert listing(tmp_path) == [".out.partial"]
        assert sorted(content(writer.folder)) == [".lock", "model.safetensors.partial", "tokenizer.json"]
    assert listing(tmp_path) == []


def test_an_existing_output_needs_overwrite(tmp_path: Path) -> None:
    out = write(tmp_path / "out", {"a": torch.zeros(2)})
    before = content(out)
    with refused("out", "exists already", "--overwrite"):
        write(out, {"a": torch.ones(2)})
    assert content(out) == before
    (out / "merges.txt").write_text("of the old one")
    write(out, {"a": torch.ones(2)}, overwrite=True)
    assert load_file(out / "model.safetensors")["a"].tolist() == [1, 1]
    assert listing(out) == ["config.json", "model.safetensors"]
    assert listing(tmp_path) == ["out"]


@pytest.mark.parametrize("manifest", ['{"files": {"config.json": {}, "model.safetensors": {}}}', '{"of": "old"}', None])
@pytest.mark.parametrize("name", ["runs/log", ".git/HEAD", "notes.txt", "train.py", "data.bin", "eval.csv", "a.json~"])
def test_overwrite_spares_what_a_user_has_put_there(name: str, manifest: str | None, tmp_path: Path) -> None:
    out = write(tmp_path / "out", {"a": torch.ones(2)})
    if manifest is not None:
        (out / "bittern_manifest.json").write_text(manifest)
    (out / "README.md").write_text("a card")
    check_output(out, None, overwrite=True)
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("mine")
    with refused("out", "not overwritten", name.partition("/")[0], "no part of a checkpoint"):
        check_output(out, None, overwrite=True)
    assert (out / name).read_text() == "mine"


def test_overwrite_replaces_checkpoints_of_others(tmp_path: Path) -> None:
    out = write(tmp_path / "out", {"a": torch.ones(2)})
    theirs = """.gitattributes LICENSE LICENCE.txt NOTICE README.md USE_POLICY.md added_tokens.json chat_template.jinja
        configuration_x.py generation_config.json hf_quant_config.json image_processing_x.py merges.txt
        model-00001-of-00002.safetensors model.safetensors.index.json modeling_x.py preprocessor_config.json
        processing_x.py pytorch_model-00001-of-00002.bin pytorch_model.bin q.gguf qwen.tiktoken quantize_config.json
        special_tokens_map.json spiece.model tekken.json tokenization_x.py tokenizer.json tokenizer.model
        tokenizer_config.json training_args.bin vocab.json vocab.txt"""
    for name in theirs.split():
        (out / name).write_text("theirs")
    write(out, {"a": torch.ones(2)}, overwrite=True)
    assert listing(out) == ["config.json", "model.safetensors"]


def test_overwrite_destroys_nothing_but_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(write(tmp_path / "other", {"a": torch.zeros(2)}))
    for name, words in (("home", "no config.json"), ("file", "something else"), ("link", "something else")):
        with refused(name, words):
            write(tmp_path / name, {"a": torch.ones(2)}, overwrite=True)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years"
    assert listing(tmp_path) == ["file", "home", "link", "other"]


def test_the_output_lies_apart_from_the_source(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (tmp_path / "link").symlink_to(source)
    for out in (source, source / "inner", tmp_path, tmp_path / "link", tmp_path / "link" / "inner"):
        with refused("apart from the source"):
            check_output(out, source, overwrite=True)
    check_output(tmp_path / "source2", source, overwrite=False)


def test_one_output_has_one_writer(tmp_path: Path) -> None:
    plan = plan_of({"a": torch.zeros(2)})
    with CheckpointWriter(tmp_path / "out", plan) as writer:
        with refused("another bittern is writing this"):
            CheckpointWriter(tmp_path / "out", plan)
        writer.write("a", torch.zeros(2))
        writer.commit(CONFIG)
    assert sorted(content(tmp_path / "out")) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("name", [".out.partial", ".out.replaced"])
def test_what_a_link_leads_to_is_not_cleared(name: str, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years")
    (tmp_path / name).symlink_to(precious)
    with refused("expected a folder that bittern has made, found a link"):
        write(tmp_path / "out", {"a": torch.zeros(2)})
    assert content(precious) == content(precious) | {"thesis.txt": b"years"} and not (tmp_path / "out").exists()


def test_what_a_killed_writer_left_is_cleared(tmp_path: Path) -> None:
    stale = tmp_path / ".out.partial"
    (stale / "additional_chat_templates").mkdir(parents=True)
    for name in (".lock", "model.safetensors.partial", "config.json", "additional_chat_templates/x.jinja"):
        (stale / name).write_text("stale")
    out = write(tmp_path / "out", {"a": torch.zeros(2)})
    assert sorted(content(out)) == ["config.json", "model.safetensors"]
    # A kill between the two renames of an overwrite: the old checkpoint comes back first.
    out.rename(tmp_path / ".out.replaced")
    with refused("exists already"):
        write(out, {"a": torch.ones(2)})
    assert load_file(out / "model.safetensors")["a"].tolist() == [0, 0]
    assert listing(tmp_path) == ["out"]


def test_too_little_space_is_said_before_work(mount: Mount) -> None:
    point = mount("size=1m")
    free = os.statvfs(point).f_bavail * os.statvfs(point).f_frsize
    with refused("needs 4000000 bytes", f"{free} are available"):
        CheckpointWriter(point / "out", [TensorInfo("a", torch.float32, (1000, 1000))])
    assert listing(point) == []


@pytest.mark.parametrize("size", [900_000, 1_048_576])
def test_a_full_disk_is_one_line_and_nothing_stays(mount: Mount, size: int) -> None:
    point = mount("size=1m")
    with (
        refused("out", "the disk is full"),
        CheckpointWriter(point / "out", [TensorInfo("a", torch.uint8, (size,))]) as w,
    ):
        w.write("a", torch.zeros(size, dtype=torch.uint8))
        w.write_file("tokenizer.json", "x" * 500_000)
        w.commit(CONFIG)
    assert listing(point) == []


def test_a_read_only_target_is_one_line(mount: Mount) -> None:
    point = mount("ro,size=1m")
    for out in (point / "out", point / "deep" / "er" / "out"):
        with refused(str(out), "the file system is read-only"):
            CheckpointWriter(out, [TensorInfo("a", torch.uint8, (4,))])


def test_a_forbidden_target_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "parent").mkdir(mode=0o555)
    with refused("out", "cannot be written: File exists", "/file"):
        (tmp_path / "file").write_text("x")
        CheckpointWriter(tmp_path / "file" / "out", [])
    if os.geteuid() == 0:
        pid = os.fork()
        if pid == 0:  # root may write anywhere, so be nobody
            status = 1
            try:
                for folder in reversed(tmp_path.parents):
                    if folder.stat().st_uid == 0 and str(folder) != "/":
                        folder.chmod(folder.stat().st_mode | 0o011)
                tmp_path.chmod(0o755)
                os.setuid(65534)
                status = int(not forbidden(tmp_path / "parent" / "out"))
            finally:
                os._exit(status)
        assert os.waitpid(pid, 0)[1] == 0
    else:
        assert forbidden(tmp_path / "parent" / "out")


def forbidden(out: Path) -> bool:
    try:
        CheckpointWriter(out, [TensorInfo("a", torch.uint8, (4,))])
    except BitternError as error:
        return "permission denied" in str(error)
    return False
