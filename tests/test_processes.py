"""Calibration under torchrun: the same artifact as from one process, and one error for all."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import bittern
from bittern import processes
from bittern.artifact import Artifact
from bittern.checkpoint import open_checkpoint
from bittern.errors import BitternError
from bittern.evaluate import evaluate
from bittern.quantize.drift import learned_from
from bittern.quantize.effort import pick_effort
from tests import tiny

shares = importlib.import_module("bittern.quantize.windows")  # the package has a function of its parent's name
batch_windows = shares.batch_windows

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "bittern"]
PLAIN = ["--group-size", "32", "--device", "cpu"]
OPTIONS = [*PLAIN, "--nsamples", "13", "--seqlen", "32", "--batch-size", "3"]


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random letters: tokens of many kinds, so that second moments have full rank."""
    picks = torch.randint(33, 127, (4000,), generator=torch.Generator().manual_seed(0)).tolist()
    path = tmp_path_factory.mktemp("letters") / "letters.txt"
    path.write_text("".join(map(chr, picks)))
    return path


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    models = {"dense": tiny.random_model(), "experts": tiny.random_model("mixtral", num_local_experts=4)}
    return {name: tiny.save(model, folder / name, tokenizer) for name, model in models.items()}


def launch(launcher: list[str], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [*launcher, "quantize", *map(str, arguments), *(PLAIN if "rtn" in arguments else OPTIONS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=600)


def kill_all(word: str) -> None:
    """Kill -9 every process that has a word in its command line: torchrun's own are in sessions of their own."""
    for found in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if word.encode() in found.read_bytes():
                os.kill(int(found.parent.name), signal.SIGKILL)


def codes(folder: Path) -> dict[str, torch.Tensor]:
    with open_checkpoint(folder) as checkpoint:
        artifact = Artifact(checkpoint)
        return {name: artifact.read(name).codes for name in artifact.layers}


def exact_script(folder: Path) -> Path:
    """The command line with products in fp32, whatever the processor has."""
    script = folder / "exact.py"
    lines = "from bittern import cli, replay", "replay.fast_in_sixteen_bits = lambda _: False"
    script.write_text("\n".join([*lines, "if __name__ == '__main__': cli.main()"]))
    return script


@pytest.mark.parametrize(("name", "bits", "shaped"), [("dense", "2.5", True), ("experts", "4", False)])
def test_two_processes_make_what_one_makes(
    name: str, bits: str, shaped: bool, sources: dict[str, Path], letters: Path, tmp_path: Path
) -> None:
    """In fp32: where bfloat16 is faster, what each batch adds to the moments is rounded to it, and batches differ."""
    manifests: list[dict[str, Any]] = []
    script = exact_script(tmp_path)
    for count, launcher in ((1, [sys.executable, str(script)]), (2, [*TORCHRUN[:-2], str(script)])):
        out = tmp_path / str(count)
        done = launch(launcher, sources[name], "-o", out, "--dataset", letters, "--bits", bits)
        assert done.returncode == 0, done.stderr
        manifests.append(json.loads((out / "bittern_manifest.json").read_text()))
        assert done.stdout.count("layers quantized") == 1
        assert manifests[-1]["measured"]["processes"] == count
    one, two = manifests
    assert one["calibration"] == two["calibration"]
    found, expected = (
        [{**record, "loss": 0, "left": set(record["left"])} for record in manifest["layers"]] for manifest in manifests
    )
    assert found == expected
    for stage, share in one["layers"][0]["left"].items():
        assert two["layers"][0]["left"][stage] == pytest.approx(share, rel=1e-3)
    # Sums of another order differ in their last bits, and where errors are not shaped nothing else does in the layers
    # of the first attention. Where they are, a code that falls on the other side is seen by all rows after its own,
    # which make up for it. All layers after it see a scale that does, by 1 part in 1024: they agree on the whole.
    losses = torch.tensor([[record["loss"] for record in manifest["layers"]] for manifest in manifests])
    first, second = codes(tmp_path / "1"), codes(tmp_path / "2")
    for record, pair in zip(one["layers"][: 3 if shaped else 4], losses.T, strict=False):
        moved = shaped and not torch.equal(first[record["layer"]], second[record["layer"]])
        torch.testing.assert_close(*pair, rtol=0.02 if moved else 1e-3 if shaped else 1e-4, atol=0)
    torch.testing.assert_close(losses[0].log().mean(), losses[1].log().mean(), rtol=0, atol=0.02)
    same = sum(int((first[layer] == second[layer]).sum()) for layer in first)
    assert same / sum(each.numel() for each in first.values()) > (0.8 if shaped else 0.93)
    ids = torch.randint(4, 200, (8, 32), generator=torch.Generator().manual_seed(3))
    ours, theirs, base = (bittern.load(path, device="cpu") for path in (tmp_path / "1", tmp_path / "2", sources[name]))
    apart, *harms = (
        evaluate(one, ids, against=other).kl or 0.0 for one, other in ((ours, theirs), (ours, base), (theirs, base))
    )
    assert harms[0] == pytest.approx(harms[1], rel=0.1) and apart < harms[0] * (1 if shaped else 0.3), (apart, harms)


def test_an_error_of_all_is_told_once(sources: dict[str, Path], text: Path, tmp_path: Path) -> None:
    done = launch(TORCHRUN, sources["dense"], "-o", tmp_path / "out", "--dataset", text, "--skip", "nowhere")
    assert done.returncode != 0 and done.stderr.count("error: ") == 1, done.stderr
    assert "error: --skip nowhere: matches none" in done.stderr


def test_an_error_of_one_ends_the_others(sources: dict[str, Path], text: Path, tmp_path: Path) -> None:
    """Only the first process writes, and finds its output's parent to be a file."""
    (tmp_path / "file").write_text("")
    done = launch(TORCHRUN, sources["dense"], "-o", tmp_path / "file" / "out", "--dataset", text)
    assert done.returncode != 0 and done.stderr.count("error: ") == 1, done.stderr
    assert "cannot be written" in done.stderr


def test_a_dry_run_needs_no_help(sources: dict[str, Path], letters: Path, tmp_path: Path) -> None:
    """The first process rehearses by itself; it waited for the others, which had left."""
    done = launch(TORCHRUN, sources["dense"], "-o", tmp_path / "out", "--dataset", letters, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("peak memory") == 1 and not (tmp_path / "out").exists()


def test_a_process_without_a_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes, "rendezvous", lambda *_, **__: iter([(object(), 1, 2)]))
    monkeypatch.setattr(processes, "_is_first", lambda _: True)
    monkeypatch.setattr("bittern.model.pick_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    few = "expected a CUDA device for each process of this machine, found 1"
    with pytest.raises(BitternError, match=few), processes.together("auto"):
        pass


def test_half_of_what_torchrun_sets_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(BitternError, match=r"WORLD_SIZE is 2, but .*RANK expected"), processes.together("cpu"):
        pass


def test_a_process_without_windows_is_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    short = tiny.write_text(tmp_path / "short.txt", words=40)
    done = launch(TORCHRUN, sources["dense"], "-o", tmp_path / "out", "--dataset", short)
    assert done.returncode != 0
    assert "expected one for each of the 2 processes at least, found 1 windows, 1 of them" in done.stderr, done.stderr


def test_the_first_process_trains_scales_alone(sources: dict[str, Path], letters: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--bits", "3", "--effort", "best", "--tune-tokens", "1k"]
    done = launch(TORCHRUN, sources["dense"], "-o", out, "--dataset", letters, *options)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((out / "bittern_manifest.json").read_text())
    assert manifest["tuning"]["tokens"] == 1024 and manifest["measured"]["processes"] == 2


def test_rounding_to_nearest_needs_no_help(sources: dict[str, Path], tmp_path: Path) -> None:
    outputs = [tmp_path / "1", tmp_path / "2"]
    for out, launcher in zip(outputs, ([sys.executable, "-m", "bittern"], TORCHRUN), strict=True):
        done = launch(launcher, sources["dense"], "-o", out, "--method", "rtn")
        assert done.returncode == 0 and done.stdout.count("layers quantized") == 1, done.stderr
    one, two = ((out / "model.safetensors").read_bytes() for out in outputs)
    assert one == two


def test_blocks_of_a_killed_run_are_given_to_all(sources: dict[str, Path], letters: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    done = launch(TORCHRUN, sources["dense"], "-o", whole, "--dataset", letters)
    assert done.returncode == 0, done.stderr
    command = [*TORCHRUN, "quantize", str(sources["dense"]), "-o", str(out), "--dataset", str(letters), *OPTIONS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    work = tmp_path / ".out.quantizing"
    while not list(work.glob("*/block-00000.safetensors")) and killed.poll() is None:
        time.sleep(0.005)
    kill_all(str(out))
    killed.wait()
    assert work.exists(), "it was faster than the kill"
    for later in work.glob("*/block-00001.safetensors"):  # so that there is something left to solve
        later.unlink()
    done = launch(TORCHRUN, sources["dense"], "-o", out, "--dataset", letters)
    assert done.returncode == 0 and done.stderr.count("goes on from block 2 of 2") == 1, done.stderr
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("windows", "batch_size"), [(128, 8), (13, 3), (3, 8), (1, 8)])
def test_the_shares_of_all_processes_are_all_windows(
    windows: int, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, effort = torch.arange(windows).unsqueeze(1), pick_effort("fast")
    whole = batch_windows(ids, batch_size, effort)
    for size in (1, 2, 3):
        if windows < 4 * size and size > 1:
            continue
        found: dict[str, list[int]] = {"learned": [], "held": [], "others": []}
        for rank in range(size):
            for module in (processes, shares):
                monkeypatch.setattr(module, "world", lambda rank=rank, size=size: (rank, size))
            share = batch_windows(ids, batch_size, effort)
            for part, start, stop in (
                ("learned", 0, share.learned),
                ("held", share.learned, share.exact),
                ("others", share.exact, len(share.batches)),
            ):
                assert start == stop or share.batches[start:stop], part
                found[part] += [int(row) for batch in share.batches[start:stop] for row in batch]
        exact = effort.exact_windows(windows)
        assert sorted(found["learned"]) == list(range(learned_from(exact)))
        assert sorted(found["held"]) == list(range(learned_from(exact), exact))
        assert sorted(found["others"]) == list(range(exact, windows))
    assert max(len(batch) for batch in whole.batches) <= batch_size


@pytest.mark.parametrize(("seqlen", "windows"), [(512, 8), (513, 8), (3000, 2), (1 << 20, 1)])
def test_a_part_of_the_windows_tells_how_outputs_count(
    seqlen: int, windows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4096 tokens at least, over all processes, and a window in each of them."""
    for size in (1, 2, 3):
        counts = []
        for rank in range(size):
            for module in (processes, shares):
                monkeypatch.setattr(module, "world", lambda rank=rank, size=size: (rank, size))
            counts.append(shares.guiding_windows(seqlen))
        assert sum(counts) == max(size, windows) and min(counts) >= 1


def test_too_few_windows_for_the_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "world", lambda: (0, 3))
    with pytest.raises(
        BitternError, match=r"each of the 3 processes at least, found 8 .* 2 of them for full precision"
    ):
        batch_windows(torch.zeros(8, 4, dtype=torch.int64), 8, pick_effort("fast"))


@pytest.mark.parametrize(("processes", "said"), [("1", "said\nended\n"), ("2", "said\n")])
def test_one_process_of_several_ends_without_the_interpreters_end(processes: str, said: str) -> None:
    """Which threads of gloo would abort, after all was done."""
    script = "import atexit; from bittern.cli import _leave; atexit.register(print, 'ended')"
    script += "; print('said'); _leave(3)"
    environment = {**os.environ, "WORLD_SIZE": processes}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (3, said), done.stderr
