"""Training of scales and norms: its gradients against torch's own, and what comes of it in an artifact."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import bittern
from bittern.checkpoint import open_checkpoint
from bittern.errors import BitternError
from bittern.evaluate import evaluate, text_windows
from bittern.model import blocks, build, get_weight, load_dense, matrices, weight_map
from bittern.quantize import tune
from bittern.quantize.effort import EFFORTS
from bittern.quantize.plan import Plan, make_plan
from bittern.training.state import read_story
from bittern.training.text import Windows
from bittern.weight import QuantSpec, round_to_nearest
from tests import tiny

OPTIONS = {"bits": 3, "group_size": 32, "nsamples": 24, "seqlen": 32, "batch_size": 4}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    return tiny.save(tiny.random_model(), tmp_path_factory.mktemp("source"), tokenizer)


class Blocks:
    """What tuning asks of a work folder, for a model that is rounded to nearest."""

    def __init__(self, model: PreTrainedModel, plan: Plan) -> None:
        self.layers = [
            [
                ({"layer": name}, round_to_nearest(get_weight(model, matrix)[start:stop].contiguous(), spec))
                for matrix, spec in block
                for name, start, stop in matrix.parts
            ]
            for block in plan.blocks
        ]

    def load(self, position: int) -> Any:
        return self.layers[position]

    def changed(self, position: int) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt2", "mixtral", "gemma2"])
def test_gradients_of_factors_are_those_of_torch(kind: str, tmp_path: Path) -> None:
    extra = {"mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2}, "gemma2": {"head_dim": 16}}.get(kind, {})
    folder = tiny.save(tiny.random_model(kind, **extra), tmp_path / "source")
    ids = torch.randint(4, 200, (2, 16), generator=torch.Generator().manual_seed(1))
    with open_checkpoint(folder) as checkpoint:
        teacher = load_dense(checkpoint)
        student = build(checkpoint.config)
        sources = weight_map(student, checkpoint.tensors)
        prefix, found = blocks(student)
        plan = make_plan([matrices(student, f"{prefix}.{i}", sources) for i in range(len(found))], 3, 32, True)
        work: Any = Blocks(teacher, plan)
        added = tune._added_to_norms(teacher, ids[:1])
        assert set(added.values()) == {1.0 if kind == "gemma2" else 0.0}
        dtypes = {name: info.dtype for name, info in checkpoint.tensors.items()}
        pieces = tune._pieces(teacher, student, sources, plan, work, added, dtypes, torch.device("cpu"))
        tune._follow(student, pieces)
    factors = {name: piece.factor for inside in pieces.values() for name, piece in inside.items()}
    assert any("norm" in name or "ln" in name for name in factors)
    student(input_ids=ids, labels=ids).loss.backward()
    # Once more, with dense weights that torch itself derives from the factors.
    dense = {}
    for name, inside in pieces.items():
        whole = student.get_parameter(name).detach().clone()
        for piece in inside.values():
            if isinstance(piece, tune._Norm):
                whole = (piece.weight + piece.added) * (1 + piece.factor) - piece.added
            else:
                values = piece.steps * (piece.scales * (1 + piece.factor)).unsqueeze(2)
                piece.matrix.view(whole)[piece.rows] = values.flatten(1)
        dense[name] = whole
    loss = torch.func.functional_call(student, dense, kwargs={"input_ids": ids, "labels": ids}).loss
    expected = torch.autograd.grad(loss, list(factors.values()))
    for (name, factor), gradient in zip(factors.items(), expected, strict=True):
        assert factor.grad is not None and float(gradient.abs().max()) > 0, name
        torch.testing.assert_close(factor.grad, gradient, rtol=1e-3, atol=1e-6)


def quantize(source: Path, out: Path, text: Path, **options: Any) -> dict[str, Any]:
    return bittern.quantize(source, out, **{"dataset": str(text), **OPTIONS, **options})


def kill_in_training(source: Path, out: Path, text: Path, **options: Any) -> None:
    """Run until the first point of the curve is told."""

    def killed(point: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, out, text, on_point=killed, **options)


@pytest.fixture
def untuned(monkeypatch: pytest.MonkeyPatch) -> str:
    """The effort whose artifact best begins its training from."""
    monkeypatch.setitem(EFFORTS, "fast", replace(EFFORTS["best"], tune=False))
    return "fast"


def test_best_keeps_the_codes_and_comes_closer(source: Path, text: Path, tmp_path: Path, untuned: str) -> None:
    quantize(source, tmp_path / "fast", text, effort=untuned)
    manifest = quantize(source, tmp_path / "best", text, effort="best", tune_tokens=20_000)
    fast, best = (load_file(tmp_path / name / "model.safetensors") for name in ("fast", "best"))
    differ = {name.rpartition(".")[2] for name in fast if not torch.equal(fast[name], best[name])}
    assert differ == {"scales", "weight"}
    assert torch.equal(fast["model.embed_tokens.weight"], best["model.embed_tokens.weight"])
    tuning = manifest["tuning"]
    assert tuning["refused"] is None and tuning["kl"]["tuned"] < tuning["kl"]["solved"]
    with open_checkpoint(source) as checkpoint:
        windows = text_windows(text, checkpoint.tokenizer(), seqlen=32, windows=40)
        base = load_dense(checkpoint)
    kl = [evaluate(bittern.load(tmp_path / n, device="cpu"), windows, against=base).kl for n in ("fast", "best")]
    assert kl[0] is not None and kl[1] is not None and kl[1] < 0.9 * kl[0]


def test_what_made_it_worse_is_not_taken(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, untuned: str
) -> None:
    quantize(source, tmp_path / "fast", text, effort=untuned)
    monkeypatch.setattr(tune, "LRS", dict.fromkeys(tune.LRS, 3.0))
    manifest = quantize(source, tmp_path / "best", text, effort="best", tune_tokens=4_000)
    assert manifest["tuning"]["refused"] and any("training" in note for note in manifest["notes"])
    fast, best = (load_file(tmp_path / name / "model.safetensors") for name in ("fast", "best"))
    assert all(torch.equal(fast[name], best[name]) for name in fast)


@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_measured_is_what_is_written(
    bits: int, source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scales in fp16 and norms in bf16: at 8 bits they are rounded back to what they were, and that is no gain."""
    held: list[torch.Tensor] = []
    split = tune._split

    def watched(windows: Any) -> Any:
        found = split(windows)
        held.append(found[0])
        return found

    monkeypatch.setattr(tune, "_split", watched)
    bittern.convert(source, tmp_path / "bf16", dtype="bf16")
    tuning = quantize(tmp_path / "bf16", tmp_path / "best", text, effort="best", bits=bits, tune_tokens=4_000)["tuning"]
    with open_checkpoint(tmp_path / "bf16") as checkpoint:
        base = load_dense(checkpoint)
    kl = evaluate(bittern.load(tmp_path / "best", device="cpu", kernels="torch"), held[0], against=base).kl
    assert kl == pytest.approx(tuning["kl"]["solved" if tuning["refused"] else "tuned"], rel=1e-4)
    assert tuning["refused"] is None if bits == 4 else tuning["kl"]["tuned"] >= tuning["kl"]["solved"]


def test_training_that_ends_in_nan_is_not_taken(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "LRS", dict.fromkeys(tune.LRS, 1e30))
    manifest = quantize(source, tmp_path / "best", text, effort="best", tune_tokens=4_000)
    assert "training diverged" in manifest["tuning"]["refused"] and "--lr" not in manifest["tuning"]["refused"]
    assert manifest["tuning"]["kl"]["tuned"] is None and manifest["tuning"]["kl"]["solved"] > 0
    steps = int(re.findall(r"before step (\d+)", manifest["tuning"]["refused"])[0])
    assert manifest["tuning"]["steps"] == steps
    assert manifest["tuning"]["tokens"] < 4_000  # asked for


def test_conversations_are_rendered_for_training_too(
    source: Path, text: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing else of a row is read: an identifier is the only string beside the messages."""
    said = text.read_text().splitlines()
    rows = [{"id": "hare", "messages": [{"role": "user", "content": line}]} for line in said if line]
    chat = tmp_path / "chat.jsonl"
    chat.write_text("\n".join(map(json.dumps, rows)))
    talker = tmp_path / "talker"
    shutil.copytree(source, talker)
    (talker / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    trained: list[torch.Tensor] = []
    split = tune._split

    def watched(windows: Windows) -> Any:
        trained.append(torch.tensor(windows.ids))
        return split(windows)

    monkeypatch.setattr(tune, "_split", watched)
    quantize(talker, tmp_path / "out", chat, effort="best", tune_tokens=4_000, chat_template=True)
    found = set(trained[0].flatten().tolist())
    expected = set(tokenizer(text.read_text(), add_special_tokens=False)["input_ids"])
    assert found <= expected | {tokenizer.bos_token_id} and len(found) > len(expected) / 2


def test_too_little_text_is_told_before_anything_is_solved(source: Path, tmp_path: Path) -> None:
    words = list(tiny.WORDS) * 40
    few = tmp_path / "few.txt"
    few.write_text(" ".join(words[:40]))
    solved: list[Any] = []
    with pytest.raises(BitternError, match="expected two windows of 32 tokens at least to train on, found 1"):
        quantize(source, tmp_path / "out", few, effort="best", on_progress=solved.append)
    assert not solved and [path.name for path in tmp_path.iterdir()] == ["few.txt"]
    few.write_text(" ".join(words[:400]))
    manifest = quantize(source, tmp_path / "out", few, effort="best", tune_tokens=4_000)
    assert any("to train on" in note and "shown more than once" in note for note in manifest["notes"])


def test_a_kill_after_training_loses_nothing_of_it(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"effort": "best", "tune_tokens": 8_000}
    quantize(source, tmp_path / "whole", text, **options)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sys.modules["bittern.quantize.output"], "_write_layers", killed)
        quantize(source, tmp_path / "out", text, **options)
    manifest = quantize(source, tmp_path / "out", text, **options)
    assert manifest["tuning"]["refused"] is None
    whole, out = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(whole[name], out[name]) for name in whole)


def test_a_kill_during_training_changes_no_byte(source: Path, text: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"effort": "best", "tune_tokens": 8_000}
    whole = quantize(source, tmp_path / "whole", text, **options)
    kill_in_training(source, tmp_path / "out", text, **options)
    points: list[int] = []
    out = quantize(source, tmp_path / "out", text, on_point=lambda point: points.append(point["step"]), **options)
    steps = [point["step"] for point in whole["tuning"]["curve"]]
    assert len(steps) > 2 and points == steps[1:] and out["tuning"] == whole["tuning"]
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("damage", ["empty", "torn", "zeroed", "other"])
def test_damaged_windows_are_written_again(source: Path, text: Path, tmp_path: Path, damage: str) -> None:
    """After a loss of power; and where they are others than the state was trained on, training begins again."""
    options: dict[str, Any] = {"effort": "best", "tune_tokens": 4_000}
    whole = quantize(source, tmp_path / "whole", text, **options)
    kill_in_training(source, tmp_path / "out", text, **options)
    (windows,) = tmp_path.glob(".out.quantizing/*/windows-*.safetensors")
    content = windows.read_bytes()
    if damage == "other":
        (path,) = tmp_path.glob(".out.quantizing/*/tuned.safetensors")
        story = {**read_story(path), "windows": "0"}
        save_file(load_file(path), path, {"bittern": json.dumps(story)})
    else:
        zeroed = content[:200] + bytes(len(content) - 200)
        windows.write_bytes({"empty": b"", "torn": content[:-64], "zeroed": zeroed}[damage])
    points: list[int] = []
    out = quantize(source, tmp_path / "out", text, on_point=lambda point: points.append(point["step"]), **options)
    steps = [point["step"] for point in whole["tuning"]["curve"]]
    assert points == (steps if damage == "other" else steps[1:]) and out["tuning"] == whole["tuning"]
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_scales_that_training_makes_too_large_name_their_layer(tmp_path: Path) -> None:
    path, weight = tmp_path / "tuned.safetensors", round_to_nearest(torch.ones(2, 32), QuantSpec(4, 32))
    save_file({"up_proj": torch.full((2, 1), 1e9)}, path)
    with pytest.raises(BitternError, match=r"^up_proj: scales: fp16 holds at most 65504"):
        tune.Tuned({}, 0.0, path, {}).layer("up_proj", weight)


@pytest.mark.parametrize(("bits", "rate"), [(2, 6e-3), (3, 2e-3), (4, 7e-4)])
def test_the_manifest_tells_it(source: Path, text: Path, tmp_path: Path, bits: int, rate: float) -> None:
    quantize(source, tmp_path / "out", text, effort="best", tune_tokens=32 * 64, bits=bits)
    manifest = json.loads((tmp_path / "out" / "bittern_manifest.json").read_text())
    tuning = manifest["tuning"]
    assert tuning["tokens"] == 32 * 64 and tuning["steps"] == tuning["curve"][-1]["step"] == 2
    assert tuning["curve"][0]["lr"] == rate  # all of the warm-up is one step
    assert manifest["options"]["effort"] == "best"
