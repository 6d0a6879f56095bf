"""convert: casts against torch and numpy, refusals, bounded memory, and a kill at any moment."""

from __future__ import annotations

import json
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import bittern
from bittern.checkpoint import open_checkpoint
from bittern.convert.cast import cast_values, convert
from bittern.errors import BitternError
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CONFIG: dict[str, Any] = {"model_type": "llama", "torch_dtype": "float32", "tie_word_embeddings": False}


def make(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    (folder / "tokenizer.json").write_text("{}")
    save_file(tensors, folder / "model.safetensors")
    return folder


def weights(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model.embed_tokens.weight": torch.randn(40, 16, generator=generator),
        "model.wide.weight": torch.randn(300, 300, generator=generator),  # three blocks
        "model.half.weight": torch.randn(8, 8, generator=generator).half(),
        "model.double.bias": torch.randn(9, generator=generator, dtype=torch.float64),
        "model.ids": torch.arange(7),
        "model.mask": torch.arange(7) > 3,
        "model.scalar": torch.tensor(seed + 0.3),
        "model.empty": torch.zeros(0, 4),
    }


def loads(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("piece", [64, 8 * 2**20])
def test_casts_floats_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, piece: int) -> None:
    monkeypatch.setattr(sys.modules[convert.__module__], "_PIECE_BYTES", piece)
    source = weights()
    folder = make(tmp_path / "in", source, vision_config={"dtype": "float32", "depth": 2})
    seen: list[tuple[str, int, int]] = []
    summary = convert(
        folder, tmp_path / "out", dtype=dtype, max_shard_size=100_000, on_tensor=lambda *event: seen.append(event)
    )
    result = loads(tmp_path / "out")
    assert set(result) == set(source)
    for name, tensor in source.items():
        expected = tensor.to(DTYPES[dtype]) if tensor.is_floating_point() else tensor
        assert result[name].dtype == expected.dtype
        assert result[name].equal(expected)
    name = str(DTYPES[dtype]).removeprefix("torch.")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == CONFIG | {"dtype": name, "torch_dtype": name, "vision_config": {"dtype": name, "depth": 2}}
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert [event[0] for event in seen] == [cast.name for cast in summary.tensors]
    assert seen[-1][1:] == (summary.source_bytes, sum(tensor.nbytes for tensor in source.values()))
    for cast in summary.tensors:
        exact = source[cast.name].double()
        if source[cast.name].is_floating_point() and exact.numel():
            error = ((result[cast.name].double() - exact).abs() / exact.abs()).max().item()
            assert cast.max_relative_error == pytest.approx(error, abs=2e-7)
            assert cast.max_magnitude == pytest.approx(exact.abs().max().item(), rel=1e-6)
        else:
            assert cast.max_relative_error == 0
    assert json.loads(json.dumps(summary.to_dict()))["side_files"] == ["tokenizer.json"]


def test_zeros_cost_nothing_and_underflow_costs_everything() -> None:
    values = torch.tensor([0.0, -0.0, 1.0, -0.5])
    assert cast_values(values, torch.float16)[1].max_relative_error == 0
    cast, report = cast_values(torch.cat([values, torch.tensor([1e-9])]), torch.float16)
    assert cast[-1] == 0
    assert report.max_relative_error == 1
    assert cast_values(values, torch.float32)[1].max_relative_error == 0
    assert cast_values(torch.zeros(70000), torch.bfloat16)[1].max_relative_error == 0


@pytest.mark.parametrize("output", ["out", "out.gguf"])
def test_clamp_is_refused_where_nothing_would_clamp(tmp_path: Path, output: str) -> None:
    bittern.quantize(
        tiny.save(tiny.random_model(), tmp_path / "in"), tmp_path / "made", bits=4, group_size=32, method="rtn"
    )
    source, what = (tmp_path / "made", "packed layers") if output == "out" else (tmp_path / "in", "gguf")
    with pytest.raises(BitternError, match=f"clamp: expected floats of a plain checkpoint .*, found {what}"):
        bittern.convert(source, tmp_path / output, dtype="fp16", clamp=True)


def test_overflow_is_refused_or_clamped_and_counted(tmp_path: Path) -> None:
    tensors = {"fine": torch.full((3,), 65504.0), "big": torch.ones(40_000)}
    tensors["big"][[5, 39_000, 39_001]] = torch.tensor([70000.0, -1e6, 65519.9])  # the last one rounds down to 65504
    folder = make(tmp_path / "in", tensors)
    with pytest.raises(BitternError, match=r"big: its largest magnitude 1e\+06 .* float16; --clamp would change 2 val"):
        convert(folder, tmp_path / "out", dtype="fp16")
    assert not any(path.name != "in" for path in tmp_path.iterdir())
    summary = convert(folder, tmp_path / "out", dtype="fp16", clamp=True)
    assert summary.clamped == summary.to_dict()["clamped"] == 2
    result = loads(tmp_path / "out")["big"]
    assert result[[5, 39_000, 39_001, 0]].tolist() == [65504, -65504, 65504, 1]
    assert summary.worst is not None
    assert summary.worst.name == "big"
    assert summary.worst.max_relative_error == pytest.approx(1 - 65504 / 1e6)
    assert convert(folder, tmp_path / "bf16", dtype="bf16").clamped == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, dtype: str, value: str) -> None:
    tensors = weights()
    tensors["model.wide.weight"][200, [3, 5]] = float(value)
    folder = make(tmp_path / "in", tensors)
    with pytest.raises(BitternError, match=r"model\.wide\.weight: expected finite values, found 2 that are NaN or Inf"):
        convert(folder, tmp_path / "out", dtype=dtype, clamp=True)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_tied_head_is_written_once(tmp_path: Path) -> None:
    table = torch.randn(40, 16)
    tied = {"model.embed_tokens.weight": table, "lm_head.weight": table.clone(), "model.norm.weight": torch.ones(16)}
    untied = tied | {"lm_head.weight": table + 1}
    cases: list[tuple[dict[str, Tensor], dict[str, Any], bool]] = [
        (tied, {"tie_word_embeddings": True}, True),
        (tied, {"tie_word_embeddings": False}, False),
        (untied, {"tie_word_embeddings": True}, False),
    ]
    for number, (tensors, config, dropped) in enumerate(cases):
        out = tmp_path / f"out{number}"
        summary = convert(make(tmp_path / f"in{number}", tensors, **config), out)
        assert summary.tied == (("lm_head.weight",) if dropped else ())
        assert set(loads(out)) == set(tensors) - set(summary.tied)


def test_the_default_of_the_architecture_decides_where_the_config_is_silent(tmp_path: Path) -> None:
    table = torch.randn(40, 16)
    for kind, dropped in (("gpt2", ("lm_head.weight",)), ("llama", ()), ("no-such-thing", ())):
        folder = make(tmp_path / kind, {"transformer.wte.weight": table, "lm_head.weight": table.clone()})
        (folder / "config.json").write_text(json.dumps({"model_type": kind}))
        assert convert(folder, tmp_path / f"{kind}-out").tied == dropped


def test_what_convert_refuses(tmp_path: Path) -> None:
    folder = make(tmp_path / "in", weights())
    with pytest.raises(BitternError, match="dtype: expected one of bf16, fp16, fp32, found int8"):
        convert(folder, tmp_path / "out", dtype="int8")
    for out in (folder, folder / "inner", tmp_path):
        with pytest.raises(BitternError, match="apart from the source"):
            convert(folder, out, overwrite=True)
    (tmp_path / "out").mkdir()
    with pytest.raises(BitternError, match="exists already"):
        convert(folder, tmp_path / "out")
    quantized = make(tmp_path / "quantized", weights(), quantization_config={"quant_method": "gptq"})
    with pytest.raises(BitternError, match=r"found a quantized model \(gptq\)"):
        convert(quantized, tmp_path / "new")
    packed = make(tmp_path / "packed", {"model.layers.0.mlp.up_proj.qweight": torch.zeros(4, 4, dtype=torch.int32)})
    with pytest.raises(BitternError, match=r"holds packed layers \(model\.layers\.0\.mlp\.up_proj\)"):
        convert(packed, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "packed", "quantized"]


def test_real_checkpoints_stay_loadable(tmp_path: Path, shared: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = shared / "data" / "models" / "stories260k"
    convert(source, tmp_path / "out", dtype="bf16", max_shard_size=200_000)
    reference = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    ids = torch.tensor([AutoTokenizer.from_pretrained(tmp_path / "out").encode("Once upon a time")])
    with torch.no_grad():
        assert model(ids).logits.equal(reference(ids).logits)


# Size, memory, kills


def sparse(folder: Path, tensors: int, numel: int) -> Path:
    """A checkpoint of fp32 zeros that takes no room on the disk."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    header = {
        f"t{number}": {"dtype": "F32", "shape": [numel], "data_offsets": [4 * numel * number, 4 * numel * (number + 1)]}
        for number in range(tensors)
    }
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + 4 * numel * tensors)
    return folder


CHILD = """
import sys
from bittern.convert.cast import convert
convert(sys.argv[1], sys.argv[2], on_tensor=lambda name, done, total: print(name, flush=True))
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak.split()[1]) * 1024)
"""


def child(source: Path, out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, source, out], cwd=ROOT, stdout=subprocess.PIPE, text=True, bufsize=1
    )


def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    peaks = []
    for size in (2**10, 64 * 2**20):  # 8 kB and 512 MiB in two tensors
        source = sparse(tmp_path / f"in{size}", 2, size)
        process = child(source, tmp_path / f"out{size}")
        output, _ = process.communicate()
        assert process.returncode == 0
        peaks.append(int(output.split()[-1]))
    assert peaks[1] - peaks[0] < 100e6


def opens(folder: Path) -> bool:
    """Whether anything in a folder looks like a model to a loader."""
    return (folder / "config.json").exists() or any(folder.glob("*.safetensors"))


@pytest.mark.parametrize("moment", ["folder", "halfway"])
def test_kill_9_leaves_nothing_that_opens(tmp_path: Path, moment: str) -> None:
    source, out = sparse(tmp_path / "in", 24, 2 * 2**20), tmp_path / "out"  # 192 MB
    partial = tmp_path / ".out.partial"
    process = child(source, out)
    assert process.stdout is not None
    if moment == "folder":
        while not partial.exists() and process.poll() is None:
            time.sleep(0.001)
    else:
        for _ in range(12):
            process.stdout.readline()
    process.kill()
    process.wait()
    process.stdout.close()
    assert process.returncode == -signal.SIGKILL
    assert partial.exists()
    assert not out.exists()
    assert not opens(partial)
    convert(source, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    assert len(loads(out)) == 24


# Forks a convert for every call to the file system that names its place, and kills it just before that
# call. In a process of its own, for torch's thread pool does not outlive a fork.
KILLER = """
import os, shutil, signal, sys
from pathlib import Path
from bittern.convert.cast import convert

source, old, places, overwrite = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4] == "True"
for event in range(1000):
    place = places / f"place{event}"
    place.mkdir(parents=True)
    if overwrite:
        shutil.copytree(old, place / "out")
    pid = os.fork()
    if pid == 0:
        left = event

        def hook(name, arguments):
            global left
            if name in ("os.remove", "os.rmdir") or any(str(place) in str(argument) for argument in arguments):
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1

        sys.addaudithook(hook)  # open, mkdir, rename, remove, rmdir, scandir...
        convert(source, place / "out", dtype="fp32", overwrite=overwrite)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    assert status in (0, signal.SIGKILL), status
    if status == 0:
        break
"""


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_kill_at_any_moment_leaves_old_or_new_or_nothing(tmp_path: Path, overwrite: bool) -> None:
    old, new = weights(1), weights(2)
    source, before = make(tmp_path / "in", new), make(tmp_path / "old", old)
    arguments = [str(argument) for argument in (source, before, tmp_path / "places", overwrite)]
    subprocess.run([sys.executable, "-c", KILLER, *arguments], cwd=ROOT, check=True)
    places = sorted((tmp_path / "places").iterdir(), key=lambda place: int(place.name.removeprefix("place")))
    assert len(places) > 20
    for place in places:
        out = place / "out"
        for folder in (path for path in place.iterdir() if (path / "config.json").exists()):
            with open_checkpoint(folder) as checkpoint:  # whatever opens is whole
                expected = old if checkpoint.read("model.scalar").equal(old["model.scalar"]) else new
                assert checkpoint.read("model.wide.weight").equal(expected["model.wide.weight"])
                assert set(checkpoint.tensors) == set(expected)
        if overwrite or not out.exists():  # the same command again
            convert(source, out, dtype="fp32", overwrite=overwrite)
        assert loads(out)["model.wide.weight"].equal(new["model.wide.weight"])
        assert [path.name for path in place.iterdir()] == ["out"]
