"""A killed quantization: what goes on, in the same bytes, and what must not."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import bittern
from bittern import replay
from bittern.errors import BitternError
from bittern.quantize.resume import WorkFolder
from bittern.quantize.solve import Layer
from bittern.runtime import native
from bittern.weight import QuantSpec, round_to_nearest
from tests import tiny

SMALL = {"bits": 3, "group_size": 32, "nsamples": 6, "seqlen": 32, "batch_size": 4}
BLOCKS = 4
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    model = tiny.random_model(num_hidden_layers=BLOCKS)
    return tiny.save(model, tmp_path_factory.mktemp("source"), tokenizer)


def run(source: Path, out: Path, text: Path, **options: Any) -> dict[str, Any]:
    return bittern.quantize(source, out, **{"dataset": str(text), **SMALL, **options})


def hashes(folder: Path) -> dict[str, str]:
    """Of every file but the manifest, whose times differ."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "bittern_manifest.json"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def untimed(folder: Path) -> dict[str, Any]:
    manifest = json.loads((folder / "bittern_manifest.json").read_text())
    return {**manifest, "measured": None, "prediction": None}


class Stop(Exception):
    """What ends a run in these tests."""


def stopped(after: int, source: Path, out: Path, text: Path, **options: Any) -> None:
    """A run that ends with an exception once ``after`` layers are solved."""

    def on_progress(event: dict[str, Any]) -> None:
        if event["index"] + 1 >= after:
            raise Stop

    with pytest.raises(Stop):
        run(source, out, text, on_progress=on_progress, **options)


def blocks_left(folder: Path) -> list[Path]:
    return sorted(folder.glob(".out.quantizing/*/block-*.safetensors"))


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "gpt2"])
def test_a_run_that_stopped_goes_on_in_the_same_bytes(
    model_type: str, text: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Experts of fused parameters, transposed matrices, and several layers in one matrix go on too."""
    extra: dict[str, Any] = {
        "llama": {},
        "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
        "gpt2": {"n_embd": 64, "n_layer": BLOCKS, "n_head": 4, "n_positions": 64},
    }[model_type]
    model = tiny.random_model(model_type, num_hidden_layers=BLOCKS, **extra)
    source = tiny.save(model, tmp_path / "source", tokenizer)
    run(source, tmp_path / "whole", text)
    total = len(untimed(tmp_path / "whole")["layers"])
    stopped(total // 2 + 1, source, tmp_path / "out", text)
    assert len(blocks_left(tmp_path)) == BLOCKS // 2
    solved: list[dict[str, Any]] = []
    notes: list[str] = []
    manifest = run(source, tmp_path / "out", text, on_progress=solved.append, on_note=notes.append)
    assert [event["index"] for event in solved] == list(range(total // 2, total))
    assert notes == [f"goes on from block {BLOCKS // 2 + 1} of {BLOCKS}; --no-resume starts over"]
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")
    assert untimed(tmp_path / "out") == untimed(tmp_path / "whole")
    assert manifest["measured"]["resumed_blocks"] == BLOCKS // 2
    assert set(manifest["measured"]["layer_seconds"]) == {layer["layer"] for layer in manifest["layers"]}
    assert {path.name for path in tmp_path.iterdir()} == {"source", "whole", "out"}


def test_a_dense_block_between_experts_is_walked_as_before(
    text: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16, though every block that is missing then has experts."""
    monkeypatch.setattr("bittern.replay.fast_in_sixteen_bits", lambda _: True)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    model = tiny.random_model("qwen3_moe", num_hidden_layers=3, mlp_only_layers=[1], **experts)
    source = tiny.save(model, tmp_path / "source", tokenizer)
    run(source, tmp_path / "whole", text)
    last = [layer["layer"] for layer in untimed(tmp_path / "whole")["layers"]].index("model.layers.2.self_attn.q_proj")
    stopped(last + 2, source, tmp_path / "out", text)
    assert len(blocks_left(tmp_path)) == 2
    run(source, tmp_path / "out", text)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_what_outputs_count_is_found_once(source: Path, text: Path, tmp_path: Path) -> None:
    """Unless it is not what was written."""
    run(source, tmp_path / "whole", text)
    for broken in (False, True):
        out = tmp_path / f"broken-{broken}"
        stopped(8, source, out, text)
        files = sorted(tmp_path.glob(f".{out.name}.quantizing/*/outputs-*.safetensors"))
        assert [path.stem for path in files] == ["outputs-00001", "outputs-00002", "outputs-00003"]
        if broken:
            content = bytearray(files[-1].read_bytes())
            content[-1] ^= 1
            files[-1].write_bytes(content)
        told: list[tuple[int, int]] = []
        run(source, out, text, on_weighed=lambda *at, told=told: told.append(at))
        assert len(told) == (BLOCKS if broken else 0)
        assert hashes(out) == hashes(tmp_path / "whole")


def killed(source: Path, out: Path, options: dict[str, Any], kills: int, seed: int) -> list[list[int]]:
    """What :mod:`tests.killed` tells of its attempts; then ``out`` stands and, uninterrupted, ``out.whole``."""
    command = [sys.executable, "-m", "tests.killed", str(source), str(out), str(kills), str(seed), json.dumps(options)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    attempts: list[list[int]] = json.loads(done.stdout)["attempts"]
    return attempts


def test_kills_at_random_moments_lose_no_block_and_change_no_bit(source: Path, text: Path, tmp_path: Path) -> None:
    attempts = killed(source, tmp_path / "out", {"dataset": str(text), **SMALL}, 10, 0)
    kept = [blocks for _, blocks in attempts[:-1]]
    assert len(kept) >= 5 and kept == sorted(kept) and len(set(kept)) >= 3
    assert hashes(tmp_path / "out") == hashes(tmp_path / "out.whole")
    assert untimed(tmp_path / "out") == untimed(tmp_path / "out.whole")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.whole"}


def test_kills_of_a_real_model(shared: Path, tmp_path: Path) -> None:
    text = shared / "data" / "text" / "calibration" / "wiki.txt"
    options = {"dataset": str(text), "bits": 4, "group_size": 32, "nsamples": 4, "seqlen": 64}
    attempts = killed(shared / "data" / "models" / "stories260k", tmp_path / "out", options, 10, 0)
    assert len(attempts) >= 5
    assert hashes(tmp_path / "out") == hashes(tmp_path / "out.whole")


def test_a_torn_or_altered_block_is_solved_again(source: Path, text: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "whole", text)
    stopped(25, source, tmp_path / "out", text)
    first, second, third = blocks_left(tmp_path)
    first.write_bytes(first.read_bytes()[:-100])
    data = bytearray(second.read_bytes())
    data[-100] ^= 1
    second.write_bytes(data)
    before = third.stat().st_mtime_ns
    notes: list[str] = []
    solved: list[dict[str, Any]] = []
    assert third.exists() and third.stat().st_mtime_ns == before
    run(source, tmp_path / "out", text, on_note=notes.append, on_progress=solved.append)
    assert [note.partition(":")[0].rpartition("/")[2] for note in notes[:2]] == [first.name, second.name]
    assert "not a whole safetensors file" in notes[0] and "expected the values" in notes[1]
    assert {event["layer"].split(".")[2] for event in solved} == {"0", "1", "3"}
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_a_changed_option_starts_over_and_says_which(source: Path, text: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "whole", text, bits=4, damp_percent=0.05)
    stopped(15, source, tmp_path / "out", text)
    notes: list[str] = []
    stopped(8, source, tmp_path / "out", text, bits=4, damp_percent=0.05, on_note=notes.append)
    assert len(notes) == 1 and "holds 2 of 4 blocks of a run that differs" in notes[0]
    assert "(bits 3, now 4, damp_percent 0.2, now 0.05)" in notes[0]
    assert len(blocks_left(tmp_path)) == 3
    run(source, tmp_path / "out", text, bits=4, damp_percent=0.05)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}


def test_an_option_mended_back_goes_on(source: Path, text: Path, tmp_path: Path) -> None:
    stopped(15, source, tmp_path / "out", text)
    stopped(8, source, tmp_path / "out", text, bits=4)
    notes: list[str] = []
    run(source, tmp_path / "out", text, on_note=notes.append)
    assert notes == ["goes on from block 3 of 4; --no-resume starts over"]


def test_options_of_the_writing_alone_go_on(source: Path, text: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "whole", text, format="awq", bits=4)
    stopped(15, source, tmp_path / "out", text, bits=4)
    notes: list[str] = []
    run(source, tmp_path / "out", text, format="awq", bits=4, on_note=notes.append)
    assert notes == ["goes on from block 3 of 4; --no-resume starts over"]
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_a_gguf_file_goes_on(source: Path, text: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "whole.gguf", text)
    stopped(15, source, tmp_path / "out.gguf", text)
    (tmp_path / ".out.gguf.quantized").mkdir()  # what a kill in the midst of the last step leaves
    (tmp_path / ".out.gguf.quantized" / "config.json").write_text("{}")
    solved: list[dict[str, Any]] = []
    run(source, tmp_path / "out.gguf", text, on_progress=solved.append)
    assert [event["index"] for event in solved] == list(range(14, 28))
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"whole.gguf", "out.gguf"}


def test_a_changed_source_starts_over(source: Path, text: Path, tmp_path: Path) -> None:
    other = tmp_path / "source"
    other.mkdir()
    for path in source.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    stopped(15, other, tmp_path / "out", text)
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (other / "model.safetensors").write_bytes(data)
    run(other, tmp_path / "whole", text)
    notes: list[str] = []
    run(other, tmp_path / "out", text, on_note=notes.append)
    assert len(notes) == 1 and "(other weight files of the source)" in notes[0]
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_a_source_of_the_same_size_and_time_starts_over(source: Path, text: Path, tmp_path: Path) -> None:
    """Images and archives give all files one time, and two fine-tunes of one base are of one size."""
    other = tmp_path / "source"
    shutil.copytree(source, other)
    weights = other / "model.safetensors"
    os.utime(weights, (0, 0))
    stopped(15, other, tmp_path / "out", text)
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    os.utime(weights, (0, 0))
    notes: list[str] = []
    run(other, tmp_path / "out", text, on_note=notes.append)
    assert len(notes) == 1 and "(other weight files of the source)" in notes[0]


def test_other_calibration_text_and_other_threads_start_over(source: Path, text: Path, tmp_path: Path) -> None:
    stopped(8, source, tmp_path / "out", text)
    notes: list[str] = []
    words = tmp_path / "words.txt"
    words.write_text(text.read_text()[::-1])
    stopped(8, source, tmp_path / "out", words, on_note=notes.append)
    torch.set_num_threads(2)
    try:
        run(source, tmp_path / "out", text, on_note=notes.append)
    finally:
        torch.set_num_threads(1)
    assert ["(other calibration tokens)" in notes[0], "threads 1, now 2" in notes[1]] == [True, True]


def test_another_arithmetic_starts_over(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(8, source, tmp_path / "out", text)
    there = replay.fast_in_sixteen_bits(torch.device("cpu"))
    monkeypatch.setattr("bittern.replay.fast_in_sixteen_bits", lambda _: not there)
    notes: list[str] = []
    stopped(8, source, tmp_path / "out", text, on_note=notes.append)
    assert any("bfloat16" in note for note in notes)
    monkeypatch.setattr("bittern.runtime.native.available", lambda: False)
    notes.clear()
    run(source, tmp_path / "out", text, on_note=notes.append)
    assert not native.available() and (not native.LIBRARY.is_file() or any("native kernels" in note for note in notes))


def test_text_behind_the_calibration_tokens_counts_where_it_is_trained_on(
    source: Path, text: Path, tmp_path: Path
) -> None:
    changing = tmp_path / "text.txt"
    options = {"nsamples": 4, "effort": "best", "tune_tokens": 2_000}
    changing.write_text(text.read_text())
    stopped(8, source, tmp_path / "out", changing, **options)
    changing.write_text(text.read_text() + " moss copper winter" * 50)
    notes: list[str] = []
    stopped(8, source, tmp_path / "out", changing, on_note=notes.append, **options)
    assert any("text to train on" in note for note in notes)


def test_no_resume_starts_over(source: Path, text: Path, tmp_path: Path) -> None:
    stopped(15, source, tmp_path / "out", text)
    solved: list[dict[str, Any]] = []
    notes: list[str] = []
    run(source, tmp_path / "out", text, resume=False, on_progress=solved.append, on_note=notes.append)
    assert len(solved) == 7 * BLOCKS and notes == []


def test_an_error_keeps_blocks_and_says_how_to_go_on(source: Path, text: Path, tmp_path: Path) -> None:
    """A full disk while the artifact is written costs no solved block."""
    (tmp_path / ".out.partial").write_text("in the way")
    with pytest.raises(BitternError) as caught:
        run(source, tmp_path / "out", text)
    assert caught.value.__notes__ == [
        "finished blocks are kept: the same command goes on from writing, for all 4 blocks are solved"
    ]
    (tmp_path / ".out.partial").unlink()
    solved: list[dict[str, Any]] = []
    run(source, tmp_path / "out", text, on_progress=solved.append)
    assert solved == []


def test_nothing_is_left_before_a_block_is_finished(source: Path, text: Path, tmp_path: Path) -> None:
    stopped(3, source, tmp_path / "out", text)
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_said_before_any_block(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 150_000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    solved: list[dict[str, Any]] = []
    with pytest.raises(BitternError, match=r"needs \d+ bytes of disk space, 150000 are available"):
        run(source, tmp_path / "out", text, on_progress=solved.append)
    assert solved == [] and list(tmp_path.iterdir()) == []


def test_one_process_at_a_time(source: Path, text: Path, tmp_path: Path) -> None:
    with (
        WorkFolder(tmp_path / "out", {"bits": "4"}, 2),
        pytest.raises(BitternError, match="another bittern is writing this"),
    ):
        run(source, tmp_path / "out", text)
    run(source, tmp_path / "out", text)


def test_ctrl_c_says_how_to_go_on(source: Path, text: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bittern", "quantize", str(source), "-o", str(tmp_path / "out")]
    command += ["--dataset", str(text), "--group-size", "32", "--nsamples", "6", "--seqlen", "32", "--bits", "3"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.lstrip().startswith("10/"):
            process.send_signal(signal.SIGINT)
            break
    said = process.stderr.read().splitlines()
    assert process.wait() in (0, 130)
    if process.returncode == 130:  # it may have been faster than the signal
        assert "error: interrupted; finished blocks are kept: the same command goes on from" in said[-1]


def test_a_block_comes_back_as_it_was(tmp_path: Path) -> None:
    layers: list[Layer] = []
    for seed, spec in enumerate((QuantSpec(2, 32, False), QuantSpec(8, -1), QuantSpec(3, 32))):
        weight = round_to_nearest(torch.randn(32, 96, generator=torch.Generator().manual_seed(seed)), spec)
        record = {"layer": f"l{seed}", "bits": spec.bits, "group_size": spec.group_size, "sym": spec.sym, "loss": 0.1}
        layers.append((record, weight))
    with WorkFolder(tmp_path / "out", {}, 2) as work:
        changed = {"model.layers.1.input_layernorm.weight": torch.linspace(0.5, 2, 64)}
        work.save(1, layers, changed)
        assert all(torch.equal(values, changed[name]) for name, values in work.changed(1).items())
        assert work.changed(1).keys() == changed.keys()
    with WorkFolder(tmp_path / "out", {}, 2) as work:
        assert work.finished == {1} and work.seconds > 0
        for (record, weight), (found_record, found) in zip(layers, work.load(1), strict=True):
            assert record == found_record and weight.spec == found.spec
            assert all(
                torch.equal(getattr(weight, name), getattr(found, name)) for name in ("codes", "scales", "zeros")
            )
        work.remove()
    assert list(tmp_path.iterdir()) == []
