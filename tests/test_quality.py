"""The benchmark of quality: what it compares, what it takes up again, what its tables say. No peer is run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import PreTrainedTokenizerFast

pytest.importorskip("quality", reason="the benchmarks are not beside the tests")

import peers
import picture
import quality
import quality_scores
from quality_recipes import KINDS, STANDARD, TOOLS, command, key, protocol, recipes
from quality_scores import Recorder, Remembered, Text
from quality_table import cost_table, draw, gap_closed, idle, lines, quality_table

import bittern
from bittern.evaluate import evaluate, text_windows
from tests import tiny


def row(label: str, bits: int, perplexity: float, **more: Any) -> dict[str, Any]:
    return {
        "label": label,
        "bits": bits,
        "bits_per_weight": {"without_embeddings": bits + 0.5, "all": bits + 2.0},
        "texts": {"held-out": {"perplexity": perplexity, "kl": perplexity / 100, "top1_agreement": 0.75}},
        "tasks": {},
        "seconds": 100.0,
        "peak_rss_bytes": 2e9,
        "threads": 2,
        "others": 0.02,
        "date": "2026-11-26T02:00:00+00:00",
        **more,
    }


BASE = {
    "label": "unquantized",
    "bits_per_weight": {"all": 32.0},
    "texts": {"held-out": {"perplexity": 10.0, "windows": 3}},
    "tasks": {},
}


def cells(table: str, tool: str) -> list[str]:
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {tool} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_ratios_and_gap_are_to_the_reference_of_the_same_bits() -> None:
    rows = [row("bittern", 4, 12.0), row("GPTQModel", 4, 20.0), row("bittern", 3, 30.0)]
    table = quality_table(rows, BASE, gap=True)
    assert len({line.count("|") for line in table.splitlines()}) == 1
    ours = [line for line in table.splitlines() if line.startswith("| bittern |")]
    assert "12.00 (0.60 x)" in ours[0] and "0.1200 (0.60 x)" in ours[0] and "| 80 % |" in ours[0]
    assert "30.00 |" in ours[1] and " x)" not in ours[1] and "%" not in ours[1]  # nothing to hold it against
    reference = cells(table, "GPTQModel")
    assert "20.00" in reference and "0 %" in reference
    assert cells(table, "unquantized")[3:5] == ["32.00", "10.00"]


def test_a_picture_of_a_document_has_the_figures_of_the_first_table_under_its_heading() -> None:
    text = """# All
## Other
| tool | bits |
## Some model
Prose with a | in it.

| tool | bits | bits per weight | one: perplexity | KL | gap closed | two: perplexity | KL | made |
|---|---|---|---|---|---|---|---|---|
| full precision | | | 10.5 | | | 20 | | |
| bittern, best | 4 | 4.36 | 11.25 | 0.061 | 90 % | 21 | 0.25 | here |
| half measured | 2 | 2.33 | 408257 | 9.7 | | | | there |

| tool | bits |
"""
    rows, base = picture.read(picture.first_table(text, "Some model"))
    assert {name: figures["perplexity"] for name, figures in base["texts"].items()} == {"one": 10.5, "two": 20}
    assert [row["label"] for row in rows] == ["bittern, best"]
    assert lines(rows, "one", "kl") == {"bittern, best": [(4.36, 0.061)]}
    assert lines(rows, "two", "perplexity") == {"bittern, best": [(4.36, 21)]}
    with pytest.raises(SystemExit, match="found 0"):
        picture.first_table(text, "Some")
    with pytest.raises(SystemExit, match="expected a table under '## Some model', found none"):
        picture.first_table(text.replace("\n|", "\n"), "Some model")
    with pytest.raises(SystemExit, match="expected a row 'full precision'"):
        picture.read(picture.first_table(text, "Other"))


def test_the_gap_can_be_overdrawn_and_need_not_exist() -> None:
    assert gap_closed(10, 20, 10) == 1
    assert gap_closed(10, 20, 25) == -0.5
    assert gap_closed(10, 9, 8) is None


def test_a_time_beside_other_work_is_not_shown_and_not_compared() -> None:
    rows = [row("bittern", 4, 12.0, seconds=50.0), row("GPTQModel", 4, 20.0), row("AutoRound", 4, 12.0, others=0.7)]
    table = cost_table(rows)
    assert cells(table, "bittern")[2] == "50 (0.50 x)"
    assert cells(table, "AutoRound")[2] == "not idle"
    rows[1]["others"] = 0.7
    table = cost_table(rows)
    assert cells(table, "bittern")[2] == "50"
    assert "100" not in table
    assert not idle(row("bittern", 4, 12.0, others=None))  # nobody counted


def test_times_on_other_numbers_of_threads_are_not_compared() -> None:
    table = cost_table([row("bittern", 4, 12.0, threads="1"), row("GPTQModel", 4, 20.0)])
    assert cells(table, "bittern")[2] == "100"


def test_a_line_of_the_picture_is_a_tool_by_rising_bits() -> None:
    rows = [
        row("bittern", 4, 12.0),
        row("bittern", 2, 90.0),
        row("llama.cpp Q4_0", 4, 11.0),
        row("llama.cpp Q2_K", 2, 15.0),
    ]
    found = lines(rows, "held-out", "perplexity")
    assert found == {"bittern": [(2.5, 90.0), (4.5, 12.0)], "llama.cpp": [(2.5, 15.0), (4.5, 11.0)]}


def test_the_picture_names_every_tool(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    rows = [row("bittern fast", 4, 12.0), row("GPTQModel", 4, 20.0), row("bittern fast", 3, 15.0)]
    draw(rows, BASE, tmp_path / "quality.svg")
    svg = (tmp_path / "quality.svg").read_text()
    assert svg.startswith("<?xml") and "bittern fast" in svg and "GPTQModel" in svg


def test_every_tool_has_its_script_and_its_environment() -> None:
    assert set(STANDARD) <= set(TOOLS)
    for tool in TOOLS.values():
        if tool.home is not None:
            assert (peers.SCRIPTS / tool.script).exists()
            assert (peers.SCRIPTS / f"{tool.home}.txt").exists()
            assert set(peers.PACKAGES) & set(peers.MODULES) >= {tool.home}


def test_efforts_and_llama_cpp_s_types_are_rows_of_their_own() -> None:
    found = recipes(["bittern", "rtn", "llamacpp"], [4, 2], 64, ["plain", "best"])
    labels = [(recipe.label, recipe.bits) for recipe in found]
    assert labels[:5] == [
        ("bittern plain", 4),
        ("bittern best", 4),
        ("round to nearest", 4),
        ("llama.cpp Q4_0", 4),
        ("llama.cpp Q4_K_M", 4),
    ]
    assert ("llama.cpp Q2_K", 2) in labels
    assert found[1].words == ("--bits", "4", "--group-size", "64", "--effort", "best")
    assert found[3].words == ("--kind", "Q4_0")
    (longer,) = recipes(["bittern"], [2], 32, ["best:512k"])
    assert longer.label == "bittern best, 512k tokens trained"
    assert longer.words[-4:] == ("--effort", "best", "--tune-tokens", "512k")
    (plain,) = recipes(["bittern"], [4], 64)
    assert plain.label == "bittern" and "--effort" not in plain.words


def test_a_reduced_recipe_of_autoround_says_so() -> None:
    (default,) = recipes(["autoround"], [3], 64)
    (reduced,) = recipes(["autoround"], [3], 64, autoround={"iters": "50", "lr": "5e-3"})
    assert default.label == "AutoRound"
    assert reduced.label == "AutoRound iters 50, lr 5e-3"
    assert reduced.words[-4:] == ("--iters", "50", "--lr", "5e-3")


def test_nothing_is_taken_up_that_another_protocol_made(tmp_path: Path) -> None:
    (recipe,) = recipes(["gptqmodel"], [4], 64)
    (rtn,) = recipes(["rtn"], [4], 64)
    told = protocol(recipe, "model", "tokens")
    there = quality.place(recipe, told, tmp_path)
    others = [
        quality.place(other, protocol(other, model, tokens), tmp_path)
        for other, model, tokens in (
            (recipe, "another model", "tokens"),
            (recipe, "model", "other tokens"),
            (recipes(["gptqmodel"], [4], 32)[0], "model", "tokens"),
            (recipes(["gptqmodel"], [3], 64)[0], "model", "tokens"),
            (recipes(["gptqmodel-mse"], [4], 64)[0], "model", "tokens"),
        )
    ]
    assert len({there, *others}) == 6
    assert key(told) == key(json.loads(json.dumps(told)))
    # What is not calibrated does not depend on the tokens.
    assert protocol(rtn, "model", "tokens") == protocol(rtn, "model", "other tokens")

    assert quality.finished(there) is None
    there.mkdir()
    assert quality.finished(there) is None  # a folder that a killed run left
    quality.beside(there, ".json").write_text('{"label": "GPTQModel"}')
    assert quality.finished(there) == {"label": "GPTQModel"}


def test_a_quantizer_s_record_tells_how_and_when(tmp_path: Path) -> None:
    (recipe,) = recipes(["rtn"], [4], 64)
    told = protocol(recipe, "model", "tokens")
    artifact = quality.place(recipe, told, tmp_path)
    quality.beside(artifact, ".scores.json").write_text("{}")  # of an artifact that was here before
    record = quality.make(recipe, told, artifact, ["mkdir", artifact])
    assert quality.finished(artifact) == json.loads(json.dumps(record))
    assert record["label"] == "round to nearest" and record["bits"] == 4 and record["protocol"] == told
    assert record["seconds"] > 0 and record["peak_rss_bytes"] > 0 and "output" not in record
    assert not quality.beside(artifact, ".scores.json").exists()
    with pytest.raises(RuntimeError, match="ended with 1"):
        quality.make(recipe, told, artifact, ["false"])
    assert quality.finished(artifact) is None


def test_each_tool_is_given_the_calibration_in_its_own_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "interpreter", lambda home, envs: envs / home)
    words = {}
    for name in ("bittern", "rtn", "gptqmodel", "llamacpp"):
        recipe = recipes([name], [4], 64)[0]
        words[name] = list(
            map(
                str,
                command(
                    recipe,
                    "model",
                    tmp_path / "out",
                    ids=Path("ids.json"),
                    dataset=["--dataset", "text"],
                    gguf=Path("model.gguf"),
                    envs=Path("envs"),
                ),
            )
        )
    assert words["bittern"][-2:] == ["--dataset", "text"] and "quantize" in words["bittern"]
    assert "--dataset" not in words["rtn"] and words["rtn"][-2:] == ["--method", "rtn"]
    assert words["gptqmodel"][0] == "envs/gptqmodel" and words["gptqmodel"][4:6] == ["--calibration", "ids.json"]
    assert words["llamacpp"][2:] == ["model.gguf", str(tmp_path / "out"), "--kind", "Q4_0"]
    assert set(KINDS) == {8, 4, 3, 2}


def test_remembered_log_probabilities_give_the_figures_of_the_model_itself(tmp_path: Path) -> None:
    """Against the evaluator with both models at hand."""
    vocabulary = 500

    class Model:
        """Logits that depend on the token before."""

        def __init__(self, seed: int, noise: float) -> None:
            self.device = torch.device("cpu")
            self.config = SimpleNamespace(
                vocab_size=vocabulary, get_text_config=lambda decoder: SimpleNamespace(vocab_size=vocabulary)
            )
            table = 4 * torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(0))
            self.table = table + noise * torch.randn(
                vocabulary, vocabulary, generator=torch.Generator().manual_seed(seed)
            )

        def __call__(self, input_ids: torch.Tensor, **_: Any) -> Any:
            return SimpleNamespace(logits=self.table[input_ids])

    base, model = cast(Any, Model(1, 0.0)), cast(Any, Model(2, 0.4))
    windows = torch.randint(0, vocabulary, (6, 400), generator=torch.Generator().manual_seed(3))
    recorder = cast(Any, Recorder(base, tmp_path / "kept.npy", windows))
    alone = evaluate(recorder, windows)
    assert alone.perplexity == evaluate(base, windows).perplexity
    recorder.kept.flush()
    remembered = cast(Any, Remembered(tmp_path / "kept.npy", Text("held-out", windows, "key")))
    live = evaluate(model, windows, against=base)
    kept = evaluate(model, windows, against=remembered)
    assert live.kl is not None and live.kl > 0.01
    assert kept.perplexity == live.perplexity
    assert kept.kl == pytest.approx(live.kl, rel=1e-3)
    assert kept.top1_agreement == pytest.approx(live.top1_agreement, abs=1e-3)
    with pytest.raises(KeyError):
        remembered(input_ids=windows[:1] + 1)


def test_a_table_of_what_is_finished(
    tokenizer: PreTrainedTokenizerFast,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Against the evaluator with both models in memory; scored once, and under its own protocol alone."""
    source, work = tiny.save(tiny.random_model(), tmp_path / "model", tokenizer), tmp_path / "work"
    work.mkdir()
    (recipe,) = recipes(["rtn"], [2], 32)
    told = protocol(recipe, quality.checkpoint_hash(source), "")
    artifact = quality.place(recipe, told, work)
    bittern.quantize(source, artifact, bits=2, group_size=32, method="rtn")
    record = {**row("round to nearest", 2, 0.0), "protocol": told}
    quality.beside(artifact, ".json").write_text(json.dumps(record))

    def run(*more: str) -> Any:
        figures = tmp_path / "figures.json"
        words = ["--calibration", str(text), "--nsamples", "2", "--seqlen", "32", "--windows", "3", "--bits", "2"]
        words += ["--text", f"words={text}", "--eval-seqlen", "32", "--tools", "rtn", "gptqmodel", "--finished"]
        words += ["--work", str(work), "--json", str(figures), *more]
        monkeypatch.setattr(sys, "argv", ["quality.py", str(source), *words])
        quality.main()
        return json.loads(figures.read_text())

    found = run("--group-size", "32")
    (shown,) = found["rows"]  # of the peer there is nothing
    windows = text_windows(text, tokenizer, seqlen=32, windows=3)
    models = [bittern.load(path, device="cpu", dtype=torch.float32, kernels="torch") for path in (artifact, source)]
    live = evaluate(models[0], windows, against=models[1])
    assert shown["texts"]["words"]["perplexity"] == pytest.approx(live.perplexity, rel=1e-6)
    assert shown["texts"]["words"]["kl"] == pytest.approx(live.kl, rel=1e-3)
    assert found["base"]["texts"]["words"]["perplexity"] == pytest.approx(live.base_perplexity, rel=1e-6)
    assert f"| round to nearest | 2 | {shown['bits_per_weight']['without_embeddings']:.2f} |" in capsys.readouterr().out

    def refuse(path: Path) -> None:
        raise AssertionError(f"{path} is scored again")

    monkeypatch.setattr(quality_scores, "_load", refuse)
    assert run("--group-size", "32")["rows"] == found["rows"]
    assert run("--group-size", "16")["rows"] == []
