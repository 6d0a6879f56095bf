"""What ``bittern eval --record`` puts into a manifest: the figures that it prints, whole or not at all."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import bittern
from bittern import cli
from bittern.errors import BitternError
from bittern.evaluate import evaluate, text_windows
from bittern.record import check_recordable, measure, record
from bittern.report import MANIFEST_FILE
from bittern.runtime import native
from bittern.schema import read_manifest
from bittern.story import conditions
from bittern.tasks import evaluate_task
from bittern.verify import verify
from tests import manifests, tiny


@pytest.fixture(scope="module")
def source(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.random_model(), tmp_path_factory.mktemp("source") / "model", tokenizer)


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact without measurements."""
    out = tmp_path_factory.mktemp("made") / "artifact"
    bittern.quantize(source, out, bits=2, group_size=32, method="rtn")
    return out


@pytest.fixture
def artifact(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "artifact")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A multiple-choice file and a last-word file."""
    folder = tmp_path_factory.mktemp("tasks")
    choice, last = folder / "choice.jsonl", folder / "last.jsonl"
    words = tiny.WORDS
    rows: list[dict[str, Any]] = [
        {
            "request": {"context": f"{words[doc]} {words[doc - 3]}", "continuation": f" {words[(doc + at) % 10]}"},
            "doc_id": doc,
            "idx": at,
            "label": doc % 3,
            "task_name": "choice",
        }
        for doc in range(8)
        for at in range(3)
    ]
    choice.write_text("\n".join(json.dumps(row) for row in rows))
    ends = [{**row, "label": ["x"], "task_name": "last"} for row in rows if row["idx"] == 0]
    last.write_text("\n".join(json.dumps(row) for row in ends))
    return [choice, last]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        cli.main(["eval", *map(str, arguments)])
    captured = capsys.readouterr()
    return int(exit_.value.code or 0), captured.out, captured.err


def options(text: Path) -> list[object]:
    return ["--text", text, "--seqlen", 32, "--windows", 4, "--device", "cpu", "--kernels", "torch"]


def test_the_figures_are_recorded_with_the_base_s_own(
    source: Path, artifact: Path, text: Path, tasks: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [*options(text), "--dtype", "fp32", "--against", source, "--tasks", tasks[0], "--tasks", tasks[1]]
    code, out, _ = run(capsys, artifact, *asked, "--record", "--json")
    shown = json.loads(out)
    assert code == 0
    first, choice, last = read_manifest(artifact)["evaluations"]
    sha256 = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in (text, *tasks)}
    assert (first["what"], first["name"], first["sha256"]) == ("text", text.name, sha256[text])
    assert (first["seqlen"], first["windows"], first["tokens"], first["base"]) == (32, 4, 4 * 31, str(source))
    for key in ("perplexity", "kl", "top1_agreement", "base_perplexity"):
        assert first[key] == shown[key]
    # The base by itself, by the same functions: what was recorded of it is its own.
    base = bittern.load(source, device="cpu", dtype=torch.float32, kernels="torch", decoder=False)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    windows = text_windows(text, tokenizer, seqlen=32, windows=4)
    assert first["base_perplexity"] == pytest.approx(evaluate(base, windows).perplexity, rel=1e-6)
    assert first["base_perplexity"] != pytest.approx(first["perplexity"], rel=1e-3)
    for entry, file in zip((choice, last), tasks, strict=True):
        alone = evaluate_task(base, tokenizer, file)
        assert (entry["what"], entry["name"], entry["sha256"]) == ("task", alone.task, sha256[file])
        for key in ("accuracy", "accuracy_normalized", "exact_match"):
            assert entry[f"base_{key}"] == getattr(alone, key)
        assert entry["questions"] == 8
    assert choice["accuracy"] is not None and last["accuracy"] is None and last["exact_match"] is not None
    assert shown["tasks"][0]["base_accuracy"] == choice["base_accuracy"]
    assert first["settings"] | {"kernels": ""} == {
        "dtype": "fp32", "device": "cpu", "activations": "a16", "lm_head_bits": None, "kernels": ""
    }  # fmt: skip


def test_windows_are_no_longer_than_the_context(
    source: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((source / "config.json").read_text())
    short = shutil.copytree(source, tmp_path / "short")
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 48}))
    asked = [short, "--text", text, "--windows", 3, "--device", "cpu", "--json"]
    code, out, err = run(capsys, *asked)
    assert code == 0 and json.loads(out)["tokens"] == 3 * 47
    assert "note: windows of 48 tokens: the model's context is no longer" in err
    code, _, err = run(capsys, *asked, "--seqlen", 49)  # asked for: not shortened
    assert code == 1 and "seqlen 49: this model's context is 48 tokens" in err


def test_infinite_figures_are_null_in_json(
    source: Path, text: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny.random_model()
    model.lm_head.weight.data *= 1e6
    code, out, _ = run(capsys, tiny.save(model, tmp_path / "model", tokenizer), *options(text), "--json")

    def strict(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    assert code == 0 and json.loads(out, parse_constant=strict)["perplexity"] is None
    code, out, _ = run(capsys, tmp_path / "model", *options(text))
    assert code == 0 and "inf" in out


def test_a_base_that_reads_the_text_otherwise_is_refused(
    source: Path, artifact: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(source, tmp_path / "other")
    path = other / "tokenizer.json"
    found = json.loads(path.read_text())
    known = found["model"]["vocab"]
    first, second = sorted(known, key=known.get)[-2:]
    known[first], known[second] = known[second], known[first]
    path.write_text(json.dumps(found))
    code, _, err = run(capsys, artifact, *options(text), "--against", other)
    assert code == 1 and f"--against {other}: token " in err and repr(first) in err and repr(second) in err
    small = tiny.save(tiny.random_model(max_position_embeddings=16), tmp_path / "small")
    for file in source.glob("tokenizer*"):
        shutil.copy(file, small)
    code, _, err = run(capsys, artifact, *options(text), "--against", small)
    assert code == 1 and "seqlen: expected at most 16" in err


def test_a_base_is_measured_on_tasks_alone_too(
    source: Path, artifact: Path, tasks: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, artifact, "--tasks", tasks[0], "--against", source, "--device", "cpu")
    assert code == 0 and "base accuracy " in out
    code, out, _ = run(capsys, artifact, "--tasks", tasks[0], "--device", "cpu")
    assert code == 0 and "base" not in out


def test_the_same_again_replaces_and_another_is_added(
    source: Path, artifact: Path, text: Path, tasks: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def found() -> list[tuple[Any, ...]]:
        entries = read_manifest(artifact)["evaluations"]
        return [(e["name"], e.get("seqlen", e.get("questions")), bool(e["base"])) for e in entries]

    run(capsys, artifact, *options(text), "--record")
    assert found() == [(text.name, 32, False)]
    run(capsys, artifact, *options(text), "--record", "--against", source)
    assert found() == [(text.name, 32, True)]  # it says all that the older one said
    run(capsys, artifact, *options(text), "--record", "--against", source)
    assert found() == [(text.name, 32, True)]
    run(capsys, artifact, *options(text), "--record")
    assert found() == [(text.name, 32, True), (text.name, 32, False)]  # nothing that was known is lost
    run(capsys, artifact, *options(text)[:2], "--seqlen", 16, "--windows", 4, "--record")
    run(capsys, artifact, "--tasks", tasks[0], "--record")
    run(capsys, artifact, "--tasks", tasks[0], "--limit", 4, "--record")
    assert found()[2:] == [(text.name, 16, False), ("choice", 8, False), ("choice", 4, False)]
    run(capsys, artifact, *options(text), "--record", "--dtype", "fp32")
    assert len(found()) == 6
    run(capsys, artifact, *options(text), "--record", "--bos")
    last = read_manifest(artifact)["evaluations"][-1]
    assert len(found()) == 7 and last["settings"]["bos"] and conditions(last) == " (windows from BOS)"


def test_gemma_without_bos_is_told(
    text: Path,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bittern.tokenizer.leading_bos", lambda _: 0)
    for family, told in (("gemma3_text", True), ("llama", False)):
        model = tiny.save(tiny.random_model(family, head_dim=16), tmp_path / family, tokenizer)
        for more in ([], ["--bos"]):
            code, _, err = run(capsys, model, *options(text), *more)
            assert code == 0 and ("Gemma predicts badly without BOS" in err) == (told and not more)
    code, _, err = run(capsys, model, "--tasks", "none.jsonl", "--bos")
    assert code == 1 and "bos: windows of a text begin with it, and there is no text" in err


def test_the_rest_of_the_artifact_stays_as_it_is(
    made: Path, artifact: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, artifact, *options(text), "--record")[0] == 0
    before, after = read_manifest(made), read_manifest(artifact)
    assert {key: value for key, value in after.items() if key != "evaluations"} == before
    assert {path.name for path in artifact.iterdir()} == {path.name for path in made.iterdir()}
    assert verify(artifact, logits=False).passed


def test_files_are_read_before_a_model(tmp_path: Path, tasks: list[Path], text: Path) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise AssertionError("loaded")

    broken = tmp_path / "broken.jsonl.gz"
    broken.write_bytes(gzip.compress(b"{}" * 500)[:-20] + b"\0" * 20)
    good: dict[str, Any] = {"seqlen": 32, "windows": 2, "against": None, "limit": None, "batch_size": None}
    for wrong, message in (
        ({"text": text, "tasks": [*tasks, tmp_path / "typo.jsonl"]}, "typo.jsonl: cannot be read"),
        ({"text": text, "tasks": [broken]}, "broken.jsonl.gz"),
        ({"text": text, "tasks": [*tasks, tasks[0]]}, "tasks: expected each file once, found .*choice.jsonl twice"),
        ({"text": tmp_path / "typo.txt", "tasks": tasks}, "typo.txt: cannot be read"),
        ({"text": text, "tasks": [], "limit": 3}, "limit: it counts the questions of tasks"),
        ({"text": None, "tasks": tasks}, "seqlen: it cuts a text, and there is none"),
        ({"text": None, "tasks": tasks, "seqlen": None}, "windows: it cuts a text, and there is none"),
        ({"text": text, "tasks": [], "against": "\udcff.gguf"}, r"against '\\udcff.gguf': expected a name in UTF-8"),
    ):
        with pytest.raises(BitternError, match=message):
            measure(load, None, "model", **{**good, **wrong})  # type: ignore[arg-type]


def test_without_record_nothing_is_written(artifact: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (artifact / MANIFEST_FILE).read_bytes()
    assert run(capsys, artifact, *options(text))[0] == 0
    assert (artifact / MANIFEST_FILE).read_bytes() == before


def test_what_cannot_be_recorded_is_refused_before_it_is_measured(
    source: Path, artifact: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    link = tmp_path / "link"
    shutil.copytree(artifact, link)
    (link / MANIFEST_FILE).unlink()
    (link / MANIFEST_FILE).symlink_to(artifact / MANIFEST_FILE)
    broken = Path(shutil.copytree(artifact, tmp_path / "broken"))
    (broken / MANIFEST_FILE).write_text('{"schema_version": 2}')
    for model, words in (
        (source, "which only what bittern made has"),
        ("org/model", "this is none"),
        (link, "is a link; copy it first"),
        (broken, "expected the key"),
    ):
        code, out, err = run(capsys, model, "--text", tmp_path / "no.txt", "--record")
        assert code == 1 and out == "" and err.count("\n") == 1 and words in err, err
    assert run(capsys, source, *options(text))[0] == 0  # which is no reason not to measure


def entry(name: str) -> dict[str, Any]:
    return {**manifests.evaluations()[0], "sha256": hashlib.sha256(name.encode()).hexdigest(), "name": name}


def test_nothing_is_lost_when_several_record_at_once(artifact: Path) -> None:
    files = check_recordable(str(artifact))
    threads = [threading.Thread(target=record, args=(str(artifact), [entry(f"{n}.txt")], files)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = {each["name"] for each in read_manifest(artifact)["evaluations"]}
    assert names == {f"{n}.txt" for n in range(16)}


def test_what_took_the_place_of_the_artifact_keeps_its_own_figures(artifact: Path) -> None:
    files = check_recordable(str(artifact))
    manifest = read_manifest(artifact)
    manifest["files"]["model.safetensors"]["sha256"] = "0" * 64
    (artifact / MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(BitternError, match="not recorded: expected the files that were measured, found others"):
        record(str(artifact), [entry("a.txt")], files)
    assert read_manifest(artifact) == manifest


def test_inputs_that_no_layer_rounds_are_recorded_as_they_are(
    source: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not native.available():
        pytest.skip("no native kernels were built")
    bittern.convert(source, tmp_path / "floats")
    asked = [*options(text)[:-2], "--activations", "a8", "--record"]
    for more, expected in (([], "a16"), (["--lm-head-bits", 8], "a8")):
        assert run(capsys, tmp_path / "floats", *asked, *more)[0] == 0
        assert read_manifest(tmp_path / "floats")["evaluations"][-1]["settings"]["activations"] == expected


def test_a_failure_leaves_the_manifest_as_it_was(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, files = (artifact / MANIFEST_FILE).read_bytes(), check_recordable(str(artifact))
    with pytest.raises(BitternError, match="not written: evaluations/0/perplexity"):
        record(str(artifact), [{**entry("a.txt"), "perplexity": "high"}], files)

    def full(path: Path, *_: Any, **__: Any) -> int:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(BitternError, match="the disk is full"):
        record(str(artifact), [entry("a.txt")], files)
    monkeypatch.undo()
    assert (artifact / MANIFEST_FILE).read_bytes() == before
    assert not [name for name in os.listdir(artifact) if name.endswith(".partial")]  # noqa: PTH208
    check_recordable(str(artifact))


def test_no_token_gets_into_manifest_or_report(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    token = "hf_" + "Secret" * 6
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, token)
    out, page = tmp_path / "out", tmp_path / "report.html"
    commands: list[list[object]] = [
        [
            "quantize",
            source,
            "-o",
            out,
            "--bits",
            4,
            "--group-size",
            32,
            "--dataset",
            text,
            "--seqlen",
            32,
            "--verbose",
        ],
        ["eval", out, "--text", text, "--seqlen", 32, "--windows", 2, "--against", source, "--record", "--verbose"],
        ["inspect", out, "--verbose"],
        ["report", out, "-o", page, "--verbose"],
    ]
    for command in commands:
        with pytest.raises(SystemExit) as exit_:
            cli.main([str(each) for each in command])
        assert not exit_.value.code, command
    said = capfd.readouterr()
    everything = [said.out, said.err, page.read_text(), *(p.read_text("latin-1") for p in out.iterdir())]
    assert len(everything) > 6 and "hf_Secret" not in "".join(everything)
