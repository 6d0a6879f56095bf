"""What a run is expected to take: exact where it can be, near where it is measured, and never in the run's way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import bittern
from bittern import model as live
from bittern import progress
from bittern.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from bittern.errors import BitternError
from bittern.model import Piece
from bittern.quantize import pipeline, preflight, rehearsal
from bittern.quantize.effort import pick_effort
from bittern.quantize.job import Job
from bittern.quantize.plan import Plan, make_plan
from bittern.quantize.preflight import Prediction
from bittern.quantize.rehearsal import Line, rehearse_blocks, rehearse_solver
from bittern.quantize.solve import Solver
from bittern.quantize.stopwatch import Live, seconds, turns, waited
from bittern.replay import capture
from bittern.schema import problem
from bittern.weight import QuantSpec
from bittern.writer import CheckpointWriter, planned_bytes
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"bits": 4, "group_size": 32, "nsamples": 6, "seqlen": 32, "batch_size": 4}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tiny.save(tiny.random_model(num_hidden_layers=3), tmp_path_factory.mktemp("source"), tokenizer)
    (folder / "LICENSE").write_text("free")
    return folder


def planned(checkpoint: Checkpoint) -> tuple[PreTrainedModel, dict[str, tuple[Piece, ...]], Plan]:
    """What a rehearsal is given: the model on meta, where its weights are, and 4 bits for all its matrices."""
    model = live.build(checkpoint.config)
    sources = live.weight_map(model, checkpoint.tensors)
    prefix, blocks = live.blocks(model)
    matrices = [live.matrices(model, f"{prefix}.{position}", sources) for position in range(len(blocks))]
    return model, sources, make_plan(matrices, 4, 32, True)


def run(source: Path, out: Path, text: Path, **options: Any) -> dict[str, Any]:
    calibrated = {"group_size": 32} if options.get("method") == "rtn" else {"dataset": str(text), **SMALL}
    return bittern.quantize(source, out, **{**calibrated, **options})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "rtn", "format": "awq"},
        {"bits": 3, "target": "vllm", "layers": [("down_proj", 8)], "skip": [r"layers\.1\.self_attn"]},
        {"max_shard_size": 30_000, "format": "mlx", "dtype": "bf16"},
    ],
)
def test_a_dry_run_knows_every_byte_and_writes_none(
    options: dict[str, Any], source: Path, text: Path, tmp_path: Path
) -> None:
    found = run(source, tmp_path / "out", text, dry_run=True, **options)
    assert list(tmp_path.iterdir()) == []
    manifest = run(source, tmp_path / "out", text, **options)
    written = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    del written["bittern_manifest.json"]
    assert found["prediction"]["bytes"] == manifest["prediction"]["bytes"] == sum(written.values())
    assert found["disk_bytes"] == found["prediction"]["bytes"] + found["work_bytes"]
    assert sum(found["stages"].values()) == pytest.approx(found["prediction"]["seconds"], abs=0.01)
    assert problem(json.loads(json.dumps(manifest))) is None


@pytest.mark.parametrize("average", [2.0, 2.5, 6.0])
def test_a_dry_run_sizes_an_average_of_bits(average: float, source: Path, text: Path, tmp_path: Path) -> None:
    """Before it is known which layers get how many bits: by an even spread of them."""
    found = run(source, tmp_path / "out", text, dry_run=True, bits=average)
    manifest = run(source, tmp_path / "out", text, bits=average)
    layers = {record["layer"]: record for record in manifest["layers"]}
    weights = sum(record["shape"][0] * record["shape"][1] for record in layers.values())
    # 8 bits in one group more or less, of the few that this model has
    assert abs(found["prediction"]["bytes"] - manifest["prediction"]["bytes"]) < 0.05 * weights * average / 8
    assert found["notes"] == []


@pytest.mark.parametrize("effort", ["plain", "fast"])
def test_what_an_average_of_bits_measures_first_is_counted(
    effort: str, source: Path, text: Path, tmp_path: Path
) -> None:
    stage = "what fewer bits of each layer would cost"
    known, unknown = (
        run(source, tmp_path / "out", text, dry_run=True, bits=bits, effort=effort)["stages"] for bits in (3, 3.0)
    )
    assert set(unknown) == set(known) | {stage} and unknown[stage] > 0


def test_what_best_does_beside_is_counted(source: Path, text: Path, tmp_path: Path) -> None:
    beside = {"what tokens and outputs count", "shaping", "training of scales and norms"}
    fast = run(source, tmp_path / "out", text, dry_run=True)["stages"]
    best = run(source, tmp_path / "out", text, dry_run=True, effort="best")["stages"]
    assert set(best) == set(fast) | beside and all(best[stage] > 0 for stage in beside)


def test_training_keeps_its_state_on_the_disk(source: Path, text: Path, tmp_path: Path) -> None:
    options = {"dry_run": True, "tune_tokens": 4096}
    fast, best = (
        run(source, tmp_path / "out", text, **each) for each in ({"dry_run": True}, {**options, "effort": "best"})
    )
    rows = (
        3 * (64 + 2 * 32) * 2 + 3 * 64 * 2 + 3 * 2 * 96 * 2 + 3 * 64 * 3
    )  # groups of 32 in q, k, v, o, gate, up, down
    moments = 3 * 2 * 96**2 * 4  # of the outputs of gate and up, which fast does without
    assert best["work_bytes"] - fast["work_bytes"] == pytest.approx(moments + 24 * rows + 4 * 4096, rel=0.05)


def test_the_work_folder_takes_what_is_said(source: Path, text: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(event: dict[str, Any]) -> None:
        if event["index"] == 14:  # the first layer of the third block
            raise Stop

    found = run(source, tmp_path / "out", text, dry_run=True)
    with pytest.raises(Stop):
        run(source, tmp_path / "out", text, on_progress=stop)

    def kept(kind: str, count: int) -> int:
        files = list(tmp_path.glob(f".out.quantizing/*/{kind}-*.safetensors"))
        assert len(files) == count
        return sum(path.stat().st_size - int.from_bytes(path.read_bytes()[:8], "little") - 8 for path in files)

    norms = 2 * 2 * 64 * 4  # of two blocks, balanced, in fp32
    # Of a finished block the solution, of another how its outputs count.
    assert found["work_bytes"] == (kept("block", 2) - norms) * 3 // 2 + kept("outputs", 1) * 3


def test_who_loads_it_is_told_and_a_target_that_does_not_is_refused(source: Path, text: Path, tmp_path: Path) -> None:
    loads = {each["consumer"]: each["loads"] for each in run(source, tmp_path / "out", text, dry_run=True)["loads"]}
    assert loads["GPTQModel"] and not loads["llama.cpp"]
    with pytest.raises(BitternError, match=r"--target llama\.cpp: gguf: .*8-bit asymmetric"):
        run(source, tmp_path / "out", text, dry_run=True, target="llama.cpp", bits=8, sym=False)


def test_memory_of_a_tiny_model_is_as_predicted(source: Path, text: Path, tmp_path: Path) -> None:
    """In a process of its own, whose peak nothing before it has raised."""
    code = (
        "import json, torch, bittern; torch.set_num_threads(1)\n"
        f"manifest = bittern.quantize({str(source)!r}, {str(tmp_path / 'out')!r}, dataset={str(text)!r}, group_size=32,"
        " nsamples=64, seqlen=64)\n"
        "print(json.dumps([manifest['prediction'], manifest['measured']]))\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    predicted, measured = json.loads(shown.stdout)
    assert measured["peak_memory_bytes"] == pytest.approx(predicted["peak_memory_bytes"], rel=0.15)


def test_a_gguf_file_needs_room_for_what_it_is_made_of(source: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    plain, file = (run(source, tmp_path / name, text, dry_run=True) for name in ("out", "out.gguf"))
    assert file["disk_bytes"] > plain["disk_bytes"] + file["prediction"]["bytes"] / 2
    assert file["disk_bytes"] == file["prediction"]["bytes"] + file["work_bytes"]


def test_the_activations_of_a_long_run_are_counted(source: Path, text: Path, tmp_path: Path) -> None:
    few, many = (
        run(source, tmp_path / "out", text, dry_run=True, nsamples=1 << 20, batch_size=batch, dataset="self")
        for batch in (1, 1 << 18)
    )
    hidden = (1 << 20) * 32 * 64 * 4  # every window, 64 numbers of fp32 a token
    assert few["prediction"]["peak_memory_bytes"] > hidden
    # A batch holds its queries, its MLP and more at once: several hidden states.
    assert many["prediction"]["peak_memory_bytes"] - few["prediction"]["peak_memory_bytes"] > hidden
    assert few["notes"] == ["--dataset self was not read: the time to write it is not counted"]


def test_twice_the_windows_take_twice_the_passes(source: Path, text: Path, tmp_path: Path) -> None:
    """By the counts alone: of one rehearsal, not of two that the machine may disturb."""
    taken: list[dict[str, float]] = []
    with open_checkpoint(source) as checkpoint:
        model, sources, plan = planned(checkpoint)
        cpu = torch.device("cpu")
        plain = pick_effort("plain")
        costs = rehearse_blocks(model, sources, plan, cpu, 2, 32, plain)
        assert not any(tensor.device.type != "meta" for tensor in model.state_dict().values())
        solving = {
            (width, QuantSpec(4, 32), False): rehearse_solver(
                width, QuantSpec(4, 32), False, 96, 0.01, cpu, plain, False
            )
            for width in (64, 96)
        }
        for samples in (100, 200):
            solver = Solver(model, checkpoint, sources, plan, 0.01, cpu, plain)
            job = Job(solver, None, [], samples, 32, 8, 8, 0)  # type: ignore[arg-type]
            taken.append(preflight._block_seconds(job, 0, costs[0], solving, {}, 1.0, False))
        assert preflight._block_seconds(job, 2, costs[2], solving, {}, 1.0, True)["forward passes, quantized"] == 0
    assert costs[0] is costs[1] is costs[2]
    readers = [[name.split(".")[-3] for name in group] for group in costs[0].readers]
    assert readers == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    one, two = taken
    assert two["forward passes, quantized"] == pytest.approx(2 * one["forward passes, quantized"])
    assert two["grids and codes"] == one["grids and codes"] > 0
    assert two["factorizing"] == one["factorizing"] > 0


def test_what_waits_in_a_block_is_counted_stage_by_stage(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama, 8 positions: by hand, in fp32 numbers a position."""
    monkeypatch.setattr("bittern.replay.fast_in_sixteen_bits", lambda _: False)
    with open_checkpoint(source) as checkpoint:
        model, sources, plan = planned(checkpoint)
        costs = rehearse_blocks(model, sources, plan, torch.device("cpu"), 2, 8, pick_effort("fast"))
    walk = costs[0].walk
    assert walk is not None and walk.samples.each > 0 and walk.balance > 0
    hidden, wide = 64, 96
    waiting = [hidden + hidden, hidden + hidden, hidden + hidden, hidden + wide]
    # what the two streams are behind, in 16 bits, and until a batch has passed it the second stream itself
    streams = [hidden // 2 + hidden, hidden // 2 + hidden, hidden // 2, hidden // 2]
    exact = [hidden + sum((hidden, hidden, hidden, wide)[stage:]) // 2 + streams[stage] for stage in range(4)]
    assert walk.waiting == [4 * 8 * each for each in waiting]
    assert walk.exact_waiting == [4 * 8 * each for each in exact]


def test_rounded_weights_are_counted_once_not_for_every_sample(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bittern.replay.fast_in_sixteen_bits", lambda _: True)
    with open_checkpoint(source) as checkpoint:
        model, sources, plan = planned(checkpoint)
        given = model, sources, plan, torch.device("cpu")
        one, four = (rehearse_blocks(*given, samples, 8, pick_effort("fast"))[0].advance for samples in (1, 4))
    assert one.bytes == pytest.approx(four.bytes, rel=0.05)


def test_what_a_forward_pass_leaves_for_its_gradient_is_counted(source: Path) -> None:
    """Against what autograd says that it keeps."""
    with open_checkpoint(source) as checkpoint:
        model, sources, plan = planned(checkpoint)
        costs = rehearse_blocks(model, sources, plan, torch.device("cpu"), 2, 8, pick_effort("best"))
        assert not any(parameter.requires_grad for parameter in model.parameters())
        whole = live.load_dense(checkpoint)
    block, ids = whole.model.layers[1], torch.zeros((2, 8), dtype=torch.int64)
    hidden, calls = capture(whole, whole.model.layers, ids)
    inputs = [each for each in tree_leaves(calls[1].kwargs) if isinstance(each, torch.Tensor)]
    given = {tensor.untyped_storage().data_ptr() for tensor in (*block.parameters(), hidden, *inputs)}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    block.requires_grad_(True)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = calls[1].run(block, hidden)
    made = sum(size for place, size in kept.items() if place not in given)
    assert costs[1].traced * 2 == made + output.nbytes
    assert made > 8 * hidden.nbytes


def test_other_programs_are_noticed() -> None:
    """A process that keeps the only processor busy that this one may use takes half of it away."""
    if not Path("/proc/thread-self/schedstat").exists():
        pytest.skip("this system does not say how long a thread waits")
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:
            before, began, spent = waited(), time.monotonic(), time.thread_time()
            while time.thread_time() - spent < 0.5:
                pass
            share = (waited() - before) / (time.monotonic() - began)
        finally:
            busy.kill()
            busy.wait()
    finally:
        os.sched_setaffinity(0, allowed)
    assert share > 0.2


class Clocks:
    """The two clocks that pieces are timed by, in a test's hands."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall = self.computed = 0.0
        self.calls: list[str] = []
        monkeypatch.setattr(time, "perf_counter", lambda: self.wall)
        monkeypatch.setattr(time, "process_time", lambda: self.computed)

    def piece(self, name: str, computes: float, waits: list[float]) -> Callable[[], None]:
        """One that computes so long on all threads, and waits for each of these when it is called."""
        left = list(waits)

        def call() -> None:
            self.calls.append(name)
            self.wall += computes + left.pop(0)
            self.computed += computes * torch.get_num_threads()

        return call


def test_a_moment_in_which_the_machine_stood_still_is_not_what_a_piece_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop of six seconds in its first time once made a piece of a tenth of a second 48 times as long."""
    clocks = Clocks(monkeypatch)
    assert seconds(clocks.piece("short", 0.125, [6.0, 0.0, 0.5])) == 0.625
    assert clocks.calls == ["short"] * 3


def test_what_computes_for_long_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = Clocks(monkeypatch)
    assert seconds(clocks.piece("long", 1.5, [0.25])) == 1.75
    assert turns([clocks.piece("a", 1.0, [0.0]), clocks.piece("b", 3.0, [0.0])]) == [1.0, 3.0]
    assert clocks.calls == ["long", "a", "b"]


def test_pieces_whose_difference_counts_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a slow moment of both is in both."""
    clocks = Clocks(monkeypatch)
    slow = [0.0, 0.25, 0.25]
    assert turns([clocks.piece("one", 0.5, slow), clocks.piece("three", 0.75, slow)]) == [0.75, 1.0]
    assert clocks.calls == ["one", "three"] * 3


def test_a_time_that_others_disturbed_says_so() -> None:
    figures = {"seconds": 125.0, "peak_memory_bytes": 10**9, "bytes": 10**8}
    assert progress.expected({**figures, "waited": 0.02}).startswith("expected: 2:05, ")
    told = progress.expected({**figures, "waited": 0.48})
    assert told.startswith(
        "expected: 2:05 (much less on an idle machine: other programs held it up for 48% of its trials)"
    )


def test_a_run_that_goes_on_is_spared_what_is_done() -> None:
    stages = {"start": 2.0, "all": 40.0, preflight._GUIDING: 5.0, preflight._TUNING: 8.0}
    prediction = Prediction(stages, [(10.0, 1.0)] * 4, 1, 1, 1)
    assert prediction.left((), False, 0.0) == prediction.seconds == 55
    assert prediction.left({0}, False, 0.0) == 55 - 9
    assert prediction.left({0, 2}, True, 0.0) == 55 - 18 - 5
    assert prediction.left({0, 1, 2, 3}, True, 0.25) == 2 + 6  # nothing has to be run through them
    assert Prediction({"all": 40.0}, [(40.0, 1.0)], 1, 1, 1).left((), True, 1.0) == 40


@pytest.mark.parametrize("effort", ["fast", "best"])
def test_stages_that_an_earlier_process_has_done_are_not_told_again(
    effort: str, source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How outputs count, which fast keeps and best finds again for blocks that are missing; and training."""

    class Stop(Exception):
        pass

    told: list[tuple[bool, float]] = []
    options = {"effort": effort, **({"tune_tokens": 4096} if effort == "best" else {})}

    def killed(**at: Any) -> None:
        with pytest.raises(Stop):
            run(source, tmp_path / "out", text, **options, **at)

    def stop(event: dict[str, Any]) -> None:
        if event.get("index", 7) == 7:  # the first layer of the second block, or a point of training
            raise Stop

    def left(_: Prediction, finished: set[int], guided: bool, tuned: float) -> float:
        told.append((guided, tuned))
        return 0.0

    monkeypatch.setattr(Prediction, "left", left)
    killed(on_progress=stop)
    if effort == "best":
        killed(on_point=stop)
    run(source, tmp_path / "out", text, **options)
    assert told == {"fast": [(False, 0), (True, 0)], "best": [(False, 0), (False, 0), (True, 0.25)]}[effort]


def test_a_wide_matrix_is_extrapolated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes, which no machine disturbs: tried at 64 columns, they are those of 256."""
    cpu = torch.device("cpu")
    whole = rehearse_solver(256, QuantSpec(4, 32), False, 64, 0.01, cpu, pick_effort("fast"), True)
    monkeypatch.setattr(rehearsal, "WIDEST", 64)
    tried = rehearse_solver(256, QuantSpec(4, 32), False, 64, 0.01, cpu, pick_effort("fast"), True)
    assert tried.factorize.bytes == pytest.approx(whole.factorize.bytes, rel=0.05)
    assert tried.row_bytes == whole.row_bytes and tried.solve.fixed > 0
    assert Line(2.0, 0.5)(10) == 7


def test_live_tensors_are_counted_while_they_live() -> None:
    given = torch.zeros(1000)
    with Live() as tensors:
        first = given + 1  # 4000 bytes
        del first
        second = given.double()  # 8000
        view = second[:10]
        del second  # the view keeps it
        third = view.new_zeros(250)  # 2000
        del view, third
        given.add_(1)
    assert tensors.peak == 10_000


def test_what_cannot_be_predicted_is_said_and_done_all_the_same(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("made-up weights are not taken")

    monkeypatch.setattr(pipeline, "predict", fail)
    notes: list[str] = []
    manifest = run(source, tmp_path / "out", text, on_note=notes.append)
    assert notes == ["how long this takes could not be predicted: made-up weights are not taken"]
    assert manifest["prediction"] is None and problem(json.loads(json.dumps(manifest))) is None
    with pytest.raises(RuntimeError):
        run(source, tmp_path / "other", text, dry_run=True)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt2", "gemma3_text", "qwen3"])
def test_architectures_take_made_up_weights(
    model_type: str, text: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    extra: dict[str, Any] = {
        "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
        "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
    }.get(model_type, {"head_dim": 16})
    source = tiny.save(tiny.random_model(model_type, **extra), tmp_path / "source", tokenizer)
    manifest = run(source, tmp_path / "out", text)
    assert manifest["prediction"]["seconds"] > 0
    assert manifest["prediction"]["bytes"] == sum(each["bytes"] for each in manifest["files"].values())


def test_planned_bytes_are_those_of_the_files(tmp_path: Path) -> None:
    plan = [TensorInfo(f"layer.{number}", torch.float16, (number + 1, 8)) for number in range(20)]
    for size in (10**9, 200):
        with CheckpointWriter(tmp_path / "out", plan, max_shard_size=size, overwrite=True) as writer:
            for info in plan:
                writer.write(info.name, torch.zeros(info.shape, dtype=info.dtype))
            writer.commit({"model_type": "llama"})
        files = [path.stat().st_size for path in (tmp_path / "out").iterdir() if path.name.startswith("model")]
        assert (len(files) > 2) == (size == 200)
        assert planned_bytes(plan, size, {}) == sum(files)


def test_the_command_tells_it(source: Path, text: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bittern", "quantize", str(source), "-o", str(tmp_path / "out"), "--bits", "3"]
    command += ["--dataset", str(text), "--group-size", "32", "--nsamples", "6", "--seqlen", "32"]
    dry = subprocess.run([*command, "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "(within 25%)" in dry or "other programs held it up" in dry.splitlines()[0]  # the machine may be busy
    for said in ("(within 15%)", "(within 1%)", "GPTQModel            will load it", "grids and codes"):
        assert said in dry
    assert list(tmp_path.iterdir()) == []
    done = subprocess.run([*command, "--json"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["prediction"]["bytes"] > 0
    assert done.stderr.splitlines()[0].startswith("expected: 0:")
