"""Training: the loss against autograd, states, resuming after a kill, two processes, divergence."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import PreTrainedTokenizerFast

from bittern.errors import BitternError
from bittern.tokenizer import encode
from bittern.training import state, train
from bittern.training.loss import distillation_loss, hidden_error
from bittern.training.shortlist import commonest
from bittern.training.text import Windows, find_windows, kept_apart, read_windows, write_windows
from bittern.training.train import Training, learning_rate
from bittern.uptrain.pipeline import uptrain
from tests import tiny
from tests.test_calibration import tiny_tokenizer
from tests.test_processes import exact_script

ROOT = Path(__file__).resolve().parents[1]
OPTIONS: dict[str, Any] = {"kv_heads": 1, "seqlen": 16, "nsamples": 8, "init": "first", "batch_size": 4, "lr": 1e-3}
"""From a conversion that leaves much to learn."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("uptrain") / "source"
    model = tiny.random_model("llama", num_key_value_heads=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attn" in name:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(source: Path, output: Path, text: Path, **options: Any) -> dict[str, Any]:
    manifest = uptrain(source, output, dataset=str(text), **{**OPTIONS, **options})
    assert manifest is not None
    return manifest


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0, None])
@pytest.mark.parametrize("raised", [False, True])
def test_the_loss_and_its_gradient_are_those_of_autograd(
    weight: float | None, raised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where positions have weights of their own, where words stand for several, and in pieces of few rows."""
    monkeypatch.setattr("bittern.training.loss._HELD_CPU", 40 * 17)
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(600, generator=generator) if weight is None else torch.full((600,), weight)
    offsets = 2 * torch.rand(40, generator=generator) if raised else None
    student = torch.randn(600, 40, generator=generator, requires_grad=True)
    teacher = 3 * torch.randn(600, 40, generator=generator)
    teacher[:, 7] = -math.inf  # a word that the teacher never says
    targets = torch.randint(7, (600,), generator=generator)
    log_q, log_p = ((each + (0.0 if offsets is None else offsets)).log_softmax(1) for each in (student, teacher))
    kl = (log_p.exp() * (log_p - log_q)).nan_to_num(0.0).sum(1)
    nll = torch.nn.functional.nll_loss(log_q, targets, reduction="none")
    expected = (weights * kl + (1 - weights) * nll).mean()
    (gradient,) = torch.autograd.grad(expected, student)
    found, found_kl, found_nll = distillation_loss(student, teacher.clone(), targets, weights, offsets)
    found.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.stack([found_kl, found_nll]), torch.stack([kl.mean(), nll.mean()]).detach())
    assert student.grad is not None
    torch.testing.assert_close(student.grad, gradient, rtol=1e-4, atol=1e-8)


def test_logits_of_a_piece_are_gone_before_the_next_piece_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.random_model("llama").requires_grad_(True)
    seen: list[StorageWeakRef] = []

    def loss(student: torch.Tensor, teacher: torch.Tensor, *rest: Any) -> Any:
        assert all(reference.expired() for reference in seen)  # type: ignore[no-untyped-call]
        for tensor in (student, teacher):
            seen.append(StorageWeakRef(tensor.untyped_storage()))  # type: ignore[no-untyped-call]
        return distillation_loss(student, teacher, *rest)

    monkeypatch.setattr(train, "distillation_loss", loss)
    windows = Windows(np.arange(96, dtype=np.int32).reshape(6, 16), seed=0)
    parameters = dict(model.named_parameters())
    held_out = torch.zeros((1, 16), dtype=torch.int64)
    run = train.Run(model, tiny.random_model("llama"), parameters, windows, 0, held_out, Path("none"), {})
    train._step(run, Training(1, 1e-3, batch_size=6, micro_batch=2), 0)
    assert len(seen) == 6


def test_parameters_with_a_rate_of_their_own_move_by_it(tmp_path: Path) -> None:
    model = tiny.random_model("llama").requires_grad_(True)
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight", "model.norm.weight"]
    parameters = {name: model.get_parameter(name) for name in names}
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    windows = Windows(np.arange(96, dtype=np.int32).reshape(6, 16), seed=0)
    story: dict[str, Any] = {"step": 0, "curve": [], "perplexity": {"converted": 1e9}}
    teacher, held_out = tiny.random_model("llama", seed=1), torch.arange(16).view(1, 16)
    run = train.Run(model, teacher, parameters, windows, 0, held_out, tmp_path / "state.safetensors", story)
    train.train(run, Training(1, 1e-3, batch_size=2, micro_batch=2, rates={names[1]: 0.1, names[2]: 0.5}))
    moved = [float((parameters[name] - before[name]).detach().abs().max()) for name in names]
    # AdamW's first step is the learning rate, whatever the gradient.
    assert moved[1] == pytest.approx(0.1 * moved[0], rel=1e-2)
    assert moved[2] == pytest.approx(0.5 * moved[0], rel=1e-2)


def test_windows_come_in_a_new_order_each_time_around_and_from_any_place() -> None:
    windows = Windows(np.arange(10, dtype=np.int32).reshape(5, 2), seed=3)
    first, second = windows.take(0, 5), windows.take(5, 10)
    assert sorted(first[:, 0].tolist()) == sorted(second[:, 0].tolist()) == [0, 2, 4, 6, 8]
    assert first.tolist() != second.tolist()
    assert torch.equal(windows.take(3, 8), torch.cat([first[3:], second[:3]]))
    assert not torch.equal(Windows(windows.ids, seed=4).take(0, 5), first)
    assert sorted(Windows(windows.ids, seed=2**63 - 1).take(0, 5)[:, 0].tolist()) == [0, 2, 4, 6, 8]


def test_next_tokens_of_text_that_the_teacher_wrote_are_not_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.random_model("llama").requires_grad_(True)
    weights = []

    def loss(*given: Any) -> Any:
        weights.append(given[3])
        return distillation_loss(*given)

    monkeypatch.setattr(train, "distillation_loss", loss)
    windows = Windows(np.arange(96, dtype=np.int32).reshape(6, 16), seed=0, own=2)
    own = windows.is_own(windows.order(0, 6))
    assert sorted(windows.take(0, 6)[own, 0].tolist()) == [64, 80]
    held_out = torch.zeros((1, 16), dtype=torch.int64)
    parameters = dict(model.named_parameters())
    run = train.Run(model, tiny.random_model("llama"), parameters, windows, 0, held_out, Path("none"), {})
    train._step(run, Training(1, 1e-3, batch_size=6, micro_batch=2, kl_weight=0.25), 0)
    found = torch.cat(weights).view(6, 15)
    assert torch.equal(found, torch.where(own[:, None], 1.0, 0.25).expand(6, 15))


def test_windows_of_a_short_text_are_its_tokens(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    text = tiny.write_text(tmp_path / "short.txt", words=60)
    ids = tokenizer(text.read_text(), add_special_tokens=False)["input_ids"]
    whole = len(ids) // 8
    count = write_windows(tmp_path / "w.safetensors", str(text), tokenizer, seqlen=8, count=1000, vocab_size=256)
    assert count == whole > 2
    assert read_windows(tmp_path / "w.safetensors", 0).ids.tolist() == np.reshape(ids[: 8 * whole], (whole, 8)).tolist()


def test_one_window_of_a_text_whose_tokens_are_long(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """More bytes a token than are read at first: the file is read on."""
    text = tmp_path / "text.txt"
    text.write_text(" lantern harbour" * 200)
    assert write_windows(tmp_path / "w.safetensors", str(text), tokenizer, seqlen=32, count=1, vocab_size=256) == 1


def test_the_source_goes_on_with_a_part_of_the_windows(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    text, path, model = (
        tiny.write_text(tmp_path / "short.txt", words=60),
        tmp_path / "w.safetensors",
        tiny.random_model("llama"),
    )

    def windows(count: int, sampled: int) -> np.ndarray[Any, Any]:
        options: dict[str, Any] = {"seqlen": 8, "vocab_size": 256, "sampled": sampled, "model": model}
        write_windows(path, str(text), tokenizer, count=count, **options)
        return read_windows(path, 0).ids

    plain = windows(1000, 0)  # all that there is
    mixed = windows(1000, 20)
    assert len(mixed) == len(plain) + 20 and (mixed[:-20] == plain).all()
    apart = set(kept_apart(len(plain)))
    beginnings = {
        length: {tuple(row[:length]) for i, row in enumerate(plain.tolist()) if i not in apart} for length in (2, 3, 4)
    }
    written = mixed[-20:].tolist()
    for length, rows in zip((2, 3, 4), (written[:7], written[7:14], written[14:]), strict=True):
        assert all(tuple(row[:length]) in beginnings[length] for row in rows)
    assert not all(tuple(row) in set(map(tuple, plain.tolist())) for row in written)  # and not as the text does
    assert len(set(map(tuple, written))) > 10
    assert (windows(1000, 20) == mixed).all()  # a seed says what
    assert len(windows(1000, 1)) == len(plain) + 1  # less than one of each length
    with pytest.raises(BitternError, match="vocabulary"):  # before the model is asked to go on with them
        write_windows(path, str(text), tokenizer, seqlen=8, count=1000, vocab_size=20, sampled=20, model=model)


def test_several_texts_give_the_same_share_of_the_windows(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [str(tiny.write_text(tmp_path / f"{name}.txt", words=400)) for name in "ab"]
    Path(texts[1]).write_text(Path(texts[0]).read_text()[::-1])
    options: dict[str, Any] = {"seqlen": 8, "vocab_size": 256}
    parts = []
    for text, count in zip(texts, (6, 5), strict=True):
        write_windows(tmp_path / "w.safetensors", text, tokenizer, count=count, **options)
        parts.append(read_windows(tmp_path / "w.safetensors", 0).ids.tolist())
    assert [len(part) for part in parts] == [6, 5]  # however many bytes its tokens take
    assert write_windows(tmp_path / "w.safetensors", texts, tokenizer, count=11, **options) == 11
    assert read_windows(tmp_path / "w.safetensors", 0).ids.tolist() == parts[0] + parts[1]
    model = tiny.random_model("llama")
    assert (
        write_windows(tmp_path / "w.safetensors", [texts[0], "self"], tokenizer, count=11, model=model, **options) == 11
    )
    written = read_windows(tmp_path / "w.safetensors", 0)
    mixed = written.ids
    assert written.own == 5
    assert mixed[:6].tolist() == parts[0] and mixed[6, 0] == tokenizer.bos_token_id


def test_every_second_window_begins_with_bos(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(adds_bos=True)
    path, text = tmp_path / "w.safetensors", tiny.write_text(tmp_path / "text.txt", words=60)
    stream = tokenizer(text.read_text(), add_special_tokens=False)["input_ids"]
    bos, seqlen = tokenizer.bos_token_id, 8
    write_windows(path, str(text), tokenizer, seqlen=seqlen, count=1000, vocab_size=300)
    rows = read_windows(path, 0).ids
    assert (rows[::2, 0] == bos).all() and not (rows[1::2] == bos).any()
    found = [token for token in rows.flatten().tolist() if token != bos]
    assert found == stream[: len(found)] and len(stream) - len(found) < seqlen - 1  # no text is lost
    for count in (2, 3):
        assert write_windows(path, str(text), tokenizer, seqlen=seqlen, count=count, vocab_size=300) == count
        assert (read_windows(path, 0).ids == rows[:count]).all()
    model = tiny.random_model("llama")
    options: dict[str, Any] = {"seqlen": seqlen, "count": 8, "model": model}
    write_windows(path, [str(text), "self"], tokenizer, vocab_size=300, **options)
    assert [row.index(bos) for row in read_windows(path, 0).ids[-4:].tolist()] == [0, seqlen // 2] * 2


def test_the_error_of_hidden_states_is_relative_to_each_position() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = [torch.randn(2, 3, 5, generator=generator) for _ in range(2)]
    teacher[0][:, 0] *= 1000  # an attention sink
    student = [state + 0.1 * torch.randn(state.shape, generator=generator) for state in teacher]
    expected = [
        sum((a - b) ** 2 for a, b in zip(found, wanted, strict=True)) / sum(b * b for b in wanted)
        for new, old in zip(student, teacher, strict=True)
        for found, wanted in zip(new.flatten(0, 1).tolist(), old.flatten(0, 1).tolist(), strict=True)
    ]
    assert hidden_error(student, teacher).item() == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert hidden_error(teacher, teacher) == 0


def test_the_learning_rate_warms_up_and_falls() -> None:
    options = Training(steps=100, lr=1.0)
    rates = [learning_rate(step, options) for step in range(100)]
    top = rates.index(max(rates))
    assert 0 < top < 20 and rates[:top] == sorted(rates[:top]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert max(rates) == 1.0 and rates[-1] < 0.05


def test_a_state_comes_back_and_a_foreign_file_is_refused(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.randn(3, 4))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    parameter.square().sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    path = tmp_path / "state.safetensors"
    state.save_state(path, {"w": parameter}, optimizer, {"step": 1, "word": "grüß"})
    fresh = torch.nn.Parameter(torch.zeros(3, 4))
    again = torch.optim.AdamW([fresh], lr=0.1)
    state.load_state(path, {"w": fresh}, again)
    assert state.read_story(path) == {"step": 1, "word": "grüß"} and torch.equal(fresh, parameter)
    for moment in state.MOMENTS:
        assert torch.equal(again.state[fresh][moment], optimizer.state[parameter][moment])
    idle = torch.nn.Parameter(torch.ones(2))  # of a tower that text does not reach
    state.save_state(path, {"w": parameter, "idle": idle}, optimizer, {"step": 1})
    state.load_state(path, {"w": fresh, "idle": idle}, again)
    assert idle not in again.state and fresh in again.state
    path.write_bytes(b"no state")
    with pytest.raises(BitternError, match="--no-resume"):
        state.read_story(path)


def test_steps_are_those_of_each_parameter(tmp_path: Path) -> None:
    """An expert that no token reaches in a step is not updated in it, and so far from its last mean."""

    def step(parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, *reached: str) -> None:
        for name in reached:
            parameters[name].grad = parameters[name].detach() + 1
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def fresh() -> tuple[dict[str, torch.nn.Parameter], torch.optim.Optimizer]:
        parameters = {name: torch.nn.Parameter(torch.ones(3)) for name in ("often", "seldom")}
        return parameters, torch.optim.AdamW(parameters.values(), lr=0.1)

    parameters, optimizer = fresh()
    for _ in range(5):
        step(parameters, optimizer, "often")
    step(parameters, optimizer, "often", "seldom")
    path = tmp_path / "state.safetensors"
    state.save_state(path, parameters, optimizer, {"step": 6})
    again, other = fresh()
    state.load_state(path, again, other)
    for each in ((parameters, optimizer), (again, other)):
        step(*each, "often", "seldom")
    assert other.state[again["seldom"]]["step"] == 2 and other.state[again["often"]]["step"] == 7
    assert all(torch.equal(again[name], parameters[name]) for name in again)


class Plain(torch.nn.Module):
    """A model that takes no ``logits_to_keep``, as xLSTM's."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def get_output_embeddings(self) -> Any:
        return self.model.get_output_embeddings()

    def forward(self, input_ids: torch.Tensor, use_cache: bool, output_hidden_states: bool) -> Any:
        return self.model(input_ids=input_ids, use_cache=use_cache, output_hidden_states=output_hidden_states)


@pytest.mark.parametrize("shortlist", [0, 32])
def test_a_model_that_computes_all_logits_learns_the_same(shortlist: int) -> None:
    windows = Windows(np.arange(96, dtype=np.int32).reshape(6, 16), seed=0)
    options = Training(1, 1e-3, batch_size=6, micro_batch=2, shortlist=shortlist)
    found = []
    for wrapped in (False, True):
        models: list[Any] = [tiny.random_model("llama", seed=seed).requires_grad_(True) for seed in (0, 1)]
        parameters = dict(models[0].named_parameters())
        if wrapped:
            models = [Plain(model) for model in models]
        student, teacher = models
        run = train.Run(student, teacher, parameters, windows, 0, torch.zeros((1, 16)).long(), Path("none"), {})
        common = commonest(windows.ids, 256, shortlist) if shortlist else None
        found.append((train._step(run, options, 0, common), [each.grad for each in parameters.values()]))
    torch.testing.assert_close(*found)


def damage(path: Path, how: str) -> None:
    """As a loss of power may leave a file."""
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    zeroed = content[:header] + bytes(len(content) - header)
    path.write_bytes(
        {"empty": b"", "torn": content[: header + 40], "zeroed": zeroed, "zeros": bytes(len(content))}[how]
    )


@pytest.mark.parametrize("how", ["empty", "torn", "zeroed", "zeros"])
def test_windows_that_are_not_what_was_written_are_told(
    how: str, tmp_path: Path, text: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "w.safetensors"
    assert find_windows(path, 0) is None
    write_windows(path, str(text), tokenizer, seqlen=8, count=20, vocab_size=256)
    assert find_windows(path, 0) is not None
    damage(path, how)
    assert find_windows(path, 0) is None
    with pytest.raises(BitternError, match=r"w\.safetensors: expected ") as caught:
        read_windows(path, 0)
    assert "\n" not in str(caught.value)


def test_windows_are_durable_before_they_have_their_name(
    tmp_path: Path, text: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, synced = tmp_path / "w.safetensors", list[tuple[str, bool]]()
    monkeypatch.setattr(state, "fsync", lambda each: synced.append((each.name, path.exists())))
    write_windows(path, str(text), tokenizer, seqlen=8, count=20, vocab_size=256)
    assert synced == [("w.partial", False), (tmp_path.name, True)]


def test_windows_of_a_long_row_are_encoded_in_pieces_and_no_further(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bittern.calibration._ROWS_AT_ONCE", 1000)
    row = tiny.write_text(tmp_path / "words.txt", words=4000).read_text()
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": row}))
    encoded: list[str] = []

    def watched(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
        encoded.append(text)
        return encode(tokenizer, text)

    monkeypatch.setattr("bittern.training.text.encode", watched)
    assert write_windows(tmp_path / "w", str(path), tokenizer, seqlen=8, count=40, vocab_size=256) == 40
    assert encoded == [row[start : start + 1000] for start in range(0, 1000 * len(encoded), 1000)]
    assert len("".join(encoded)) < len(row) / 2
    stream = [token for text in encoded for token in encode(tokenizer, text)]
    assert read_windows(tmp_path / "w", 0).ids.flatten().tolist() == stream[: 40 * 8]


@pytest.fixture(scope="module")
def whole(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run that nobody disturbed."""
    output = tmp_path_factory.mktemp("whole") / "out"
    return output, run(source, output, text, tokens=4 * 16 * 30, eval_every=3)


def test_training_brings_the_student_nearer(whole: tuple[Path, dict[str, Any]]) -> None:
    curve = whole[1]["training"]["curve"]
    assert [point["step"] for point in curve] == list(range(3, 31, 3))
    assert curve[-1]["kl"] < curve[0]["kl"]
    assert whole[1]["training"]["tokens"] == 1920


@pytest.mark.parametrize(("init", "lr"), [("aligned", 5e-5), ("mean", 3e-4)])
def test_pooled_heads_are_trained_at_a_higher_rate(
    source: Path, text: Path, tmp_path: Path, init: str, lr: float
) -> None:
    manifest = run(source, tmp_path / "out", text, tokens=64, init=init, lr=None)
    assert manifest["options"]["lr"] == lr
    assert manifest["training"]["curve"][0]["lr"] == lr


def test_a_killed_run_goes_on_to_the_same_bytes_and_curve(
    source: Path, text: Path, whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    command = [sys.executable, "-m", "bittern", "uptrain", str(source), "-o", str(output), "--dataset", str(text)]
    command += ["--kv-heads", "1", "--seqlen", "16", "--nsamples", "8", "--init", "first", "--batch-size", "4"]
    command += ["--lr", "1e-3", "--tokens", "1920", "--eval-every", "3"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    for rows in (1, 3):  # killed after these many rows of training, then killed again
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        seen = 0
        for line in process.stderr:
            seen += line.startswith("step ")
            if seen == rows:
                break
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not output.exists()
    story = state.read_story(tmp_path / ".out.training" / "state.safetensors")
    assert 3 <= story["step"] < 30
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "step  3/30" not in done.stderr  # it went on, it did not start over
    assert (output / "model.safetensors").read_bytes() == (whole[0] / "model.safetensors").read_bytes()
    manifest = json.loads((output / "bittern_manifest.json").read_text())
    assert manifest["training"] == json.loads(json.dumps(whole[1]["training"]))
    assert not (tmp_path / ".out.training").exists()


def stop(_: dict[str, Any]) -> None:
    raise KeyboardInterrupt


def test_damaged_windows_are_written_again_where_they_are_the_same(
    source: Path, text: Path, whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    copy, windows = tmp_path / "text.txt", tmp_path / ".out.training" / "windows.safetensors"
    shutil.copy(text, copy)
    points: list[int] = []

    def note(point: dict[str, Any]) -> None:
        points.append(point["step"])

    def go(on_progress: Any) -> None:
        run(source, tmp_path / "out", copy, tokens=4 * 16 * 30, eval_every=3, on_progress=on_progress)

    with pytest.raises(KeyboardInterrupt):
        go(stop)
    damage(windows, "zeroed")
    copy.write_text(" ".join(reversed(text.read_text().split())))
    for _ in range(2):  # the other windows are whole the second time
        with pytest.raises(
            BitternError, match=r"windows\.safetensors: expected the windows .* found others; --no-resume"
        ):
            go(note)
    shutil.copy(text, copy)
    damage(windows, "torn")
    go(note)
    assert points == list(range(6, 31, 3))
    assert (tmp_path / "out/model.safetensors").read_bytes() == (whole[0] / "model.safetensors").read_bytes()


def test_a_state_without_windows_is_none(source: Path, text: Path, tmp_path: Path) -> None:
    points: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "out", text, tokens=640, eval_every=5, on_progress=stop)
    (tmp_path / ".out.training" / "windows.safetensors").unlink()
    run(
        source, tmp_path / "out", text, tokens=640, eval_every=5, on_progress=lambda point: points.append(point["step"])
    )
    assert points == [5, 10]


def test_a_kill_at_the_end_leaves_no_state(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed = shutil.rmtree

    def killed(path: Any, *args: Any, **options: Any) -> None:
        if str(path).endswith(".training"):
            raise KeyboardInterrupt
        removed(path, *args, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        run(source, tmp_path / "out", text, tokens=640)
    assert (tmp_path / "out" / "config.json").exists()
    left = {path.name for path in (tmp_path / ".out.training").iterdir()}
    assert "windows.safetensors" in left and "state.safetensors" not in left
    assert run(source, tmp_path / "out", text, tokens=640, overwrite=True)["training"]["steps"] == 10


@pytest.mark.parametrize(
    ("module", "name", "told"),
    [
        ("bittern", "__version__", "bittern"),
        ("torch", "__version__", "torch"),
        ("bittern.quantize.resume", "_kernels", "native kernels"),
    ],
)
def test_other_programs_are_not_gone_on_with(
    module: str, name: str, told: str, source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "out", text, tokens=640, on_progress=stop)
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[module], name, "0.0.1" if name == "__version__" else lambda: "none such")
        with pytest.raises(BitternError, match=rf"differs \({told} .*--no-resume starts over"):
            run(source, tmp_path / "out", text, tokens=640)
    run(source, tmp_path / "out", text, tokens=640)


def test_other_options_are_not_gone_on_with(source: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(source, output, text, tokens=640, on_progress=stop)
    with pytest.raises(BitternError, match=r"lr 0\.001, now 0\.002.*--no-resume"):
        run(source, output, text, tokens=640, lr=2e-3)
    with pytest.raises(BitternError, match=r"typo\.txt: expected a text file"):
        run(source, output, tmp_path / "typo.txt", tokens=640, resume=False)
    assert list((tmp_path / f".{output.name}.training").iterdir())  # a slip of the pen costs no state
    manifest = run(source, output, text, tokens=640, lr=2e-3, resume=False)
    assert manifest["training"]["steps"] == 10


@pytest.mark.parametrize("change", ["weights", "config", "text"])
def test_another_source_or_text_in_the_same_place_is_not_gone_on_with(
    change: str, source: Path, text: Path, tmp_path: Path
) -> None:
    copy, held = tmp_path / "copy", tmp_path / "held.txt"
    shutil.copytree(source, copy)
    held.write_text(text.read_text()[:2000])
    with pytest.raises(KeyboardInterrupt):
        uptrain(copy, tmp_path / "out", dataset=str(text), text=held, tokens=640, on_progress=stop, **OPTIONS)
    if change == "weights":
        weights = load_file(copy / "model.safetensors")
        save_file(
            {name: 1.01 * values for name, values in weights.items()}, copy / "model.safetensors", {"format": "pt"}
        )
    elif change == "config":
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    else:
        held.write_text(text.read_text()[1000:3000])
    what = {"weights": "other weight files", "config": "other config.json", "text": "other tokens of the text"}[change]
    with pytest.raises(BitternError, match=f"{what}.*--no-resume"):
        uptrain(copy, tmp_path / "out", dataset=str(text), text=held, tokens=640, **OPTIONS)


def test_seconds_of_a_killed_run_count(source: Path, text: Path, tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(source, tmp_path / "out", text, tokens=640, on_progress=stop)
    before = state.read_story(tmp_path / ".out.training" / "state.safetensors")["seconds"]
    manifest = run(source, tmp_path / "out", text, tokens=640)
    assert manifest["measured"]["seconds"] > before > manifest["measured"]["conversion_seconds"] > 0
    assert "resume" not in manifest["options"]


@pytest.mark.parametrize("rate", [1e3, 1e30])
def test_a_run_that_ends_in_nan_has_diverged(rate: float, source: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(BitternError, match=r"diverged before step .*smaller --lr"):
        run(source, tmp_path / "out", text, tokens=64 * 8, lr=rate, eval_every=4, train="all")


def test_a_run_that_diverges_ends_in_one_line_and_writes_nothing(source: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(BitternError, match=r"diverged before step .*smaller --lr"):
        run(source, tmp_path / "out", text, tokens=64 * 40, lr=100.0, eval_every=4, train="all")
    assert not (tmp_path / "out").exists()


def test_gradients_accumulate_to_those_of_the_whole_batch(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bittern.replay.fast_in_sixteen_bits", lambda _: False)
    curves = []
    for micro in (1, 4):
        manifest = run(source, tmp_path / str(micro), text, tokens=640, micro_batch=micro)
        curves.append([point["loss"] for point in manifest["training"]["curve"]])
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_activation_checkpointing_changes_nothing(source: Path, text: Path, tmp_path: Path) -> None:
    for name, recompute in (("plain", False), ("recomputed", True)):
        run(source, tmp_path / name, text, tokens=640, recompute=recompute)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "recomputed")]
    assert files[0] == files[1]


def test_a_shortlist_of_words_trains_too(source: Path, text: Path, tmp_path: Path) -> None:
    curve = run(source, tmp_path / "out", text, tokens=64 * 30, shortlist=32, eval_every=5)["training"]["curve"]
    assert curve[-1]["kl"] < curve[0]["kl"]


@pytest.mark.parametrize("trained", ["attention", "all"])
def test_what_is_not_trained_keeps_its_bytes(source: Path, text: Path, tmp_path: Path, trained: str) -> None:
    run(source, tmp_path / "out", text, tokens=640, train=trained)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    inside = {name for name in before if "self_attn" in name}
    assert changed == (inside if trained == "attention" else set(before))


def test_two_processes_train_as_one(source: Path, text: Path, tmp_path: Path) -> None:
    """FSDP over two CPU processes: the same curve but for the order of sums, in fp32."""
    script = exact_script(tmp_path)
    arguments = ["uptrain", str(source), "--dataset", str(text), "--kv-heads", "1", "--seqlen", "16", "--nsamples", "8"]
    arguments += ["--init", "first", "--batch-size", "4", "--lr", "1e-3", "--tokens", "640", "--shortlist", "64"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    curves = []
    for name, launcher in (("one", [sys.executable, str(script)]), ("two", torchrun)):
        command = [*launcher, *arguments, "-o", str(tmp_path / name)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        manifest = json.loads((tmp_path / name / "bittern_manifest.json").read_text())
        curves.append([[point[key] for key in ("loss", "perplexity")] for point in manifest["training"]["curve"]])
    assert np.allclose(curves[0], curves[1], rtol=1e-4)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-3)  # Adam: at most lr a step and weight


def test_a_second_run_of_the_same_output_is_refused(source: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    caught: list[BitternError] = []

    def again(_: dict[str, Any]) -> None:
        with pytest.raises(BitternError, match="another bittern") as error:
            run(source, output, text)
        caught.append(error.value)

    run(source, output, text, on_block=again)
    assert caught
