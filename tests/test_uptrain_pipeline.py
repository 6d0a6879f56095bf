"""`bittern uptrain` from checkpoint to checkpoint: what transformers makes of the result, and what is refused."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import bittern
from bittern import model as live
from bittern.cli import main
from bittern.errors import BitternError
from bittern.page.page import write_page
from bittern.replay import BlockCall
from bittern.report import runs
from bittern.schema import read_manifest
from bittern.training.text import Windows
from bittern.uptrain import pipeline
from bittern.uptrain.heads import Counts
from bittern.uptrain.output import degraded
from bittern.uptrain.pipeline import uptrain
from bittern.uptrain.regroup import Recipe, Stream, block_error, regroup
from bittern.uptrain.student import make_student
from tests import tiny

SHARED = Path(os.environ.get("BITTERN_SHARED", Path(__file__).resolve().parents[2] / "shared"))
MHA = {"num_key_value_heads": 4}
WIDE = {**MHA, "head_dim": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": MHA,
    "mistral": MHA,
    "qwen2": MHA,
    "qwen3": WIDE,
    "gemma2": WIDE,
    "gemma3_text": WIDE,
    "phi": MHA,
    "phi3": MHA,
    "stablelm": MHA,
    "cohere": MHA,
    "mixtral": {**MHA, "num_local_experts": 4},
    "granitemoe": {**MHA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "nemotron": MHA,
    "lfm2": {**MHA, "layer_types": ["conv", "full_attention"]},
}


def make(folder: Path, tokenizer: PreTrainedTokenizerFast, kind: str = "llama", **config: Any) -> Path:
    model = tiny.random_model(kind, **{**FAMILIES[kind], **config})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attn" in name and parameter.ndim == 2:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "LICENSE").write_text("some licence")
    return folder


def run(source: Path, output: Path, words: Path, **options: Any) -> dict[str, Any]:
    manifest = uptrain(source, output, **{"kv_heads": 2, "dataset": str(words), "seqlen": 16, "nsamples": 8, **options})
    assert manifest is not None
    return manifest


@torch.no_grad()
def logits(folder: Path, ids: Tensor) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found: Tensor = model(input_ids=ids).logits
    return found


def test_windows_are_no_longer_than_the_context_unless_asked(
    tmp_path: Path, text: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    source = make(tmp_path / "source", tokenizer, "llama")
    manifest = run(source, tmp_path / "out", text, seqlen=None, tokens=256, batch_size=2, eval_every=1)
    assert manifest["notes"][0] == "windows of 64 tokens: the model's context is no longer"
    assert manifest["calibration"]["tokens_asked"] == 8 * 64 and manifest["options"]["seqlen"] == 64
    assert manifest["training"]["steps"] == 2  # of 2 x 64 tokens


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_converts_and_transformers_loads_it_alone(
    kind: str, tmp_path: Path, text: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    source = make(tmp_path / "source", tokenizer, kind)
    manifest = run(source, tmp_path / "out", text, passes=2)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_key_value_heads"] == 2
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    assert before.keys() == after.keys()
    untouched = [name for name in before if "attn" not in name]
    assert untouched and all(torch.equal(before[name], after[name]) for name in untouched)
    ids = torch.arange(32).view(2, 16)
    ours = bittern.load(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(tmp_path / "out", ids), ours(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    for record in manifest["blocks"]:
        errors = [record[f"error_{stage}"] for stage in ("aligned", "solved", "distilled")]
        assert errors == sorted(errors, reverse=True)
        assert sorted(head for group in record["groups"] for head in group) == [0, 1, 2, 3]


def test_heads_that_are_the_same_are_merged_without_loss(
    tmp_path: Path, text: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """A grouped model, written out with a copy of its keys and values for every query head."""
    grouped = tiny.random_model("llama", num_key_value_heads=2)
    full = tiny.random_model("llama", num_key_value_heads=4)
    state = grouped.state_dict()
    for name, tensor in state.items():
        if "k_proj" in name or "v_proj" in name:
            state[name] = tensor.view(2, 16, -1).repeat_interleave(2, 0).flatten(0, 1)
    full.load_state_dict(state)
    full.save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    manifest = run(tmp_path / "source", tmp_path / "out", text, passes=0)
    assert all(record["groups"] == [[0, 1], [2, 3]] for record in manifest["blocks"])
    ids = torch.arange(32).view(2, 16)
    torch.testing.assert_close(logits(tmp_path / "out", ids), logits(tmp_path / "source", ids), rtol=1e-4, atol=1e-4)
    assert manifest["degraded"].startswith("not trained")


def test_the_cache_shrinks_by_exactly_the_ratio_and_quantizing_goes_on_from_there(
    tmp_path: Path, text: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    source = make(tmp_path / "source", tokenizer)
    manifest = run(source, tmp_path / "out", text, kv_heads=1, passes=1)
    cache = manifest["kv_bytes_per_token"]
    assert cache["source"] == {"fp16": 2 * 2 * 2 * 64, "fp32": 4 * 2 * 2 * 64}
    assert all(4 * cache["output"][dtype] == cache["source"][dtype] for dtype in ("fp16", "fp32"))
    made = bittern.quantize(
        tmp_path / "out", tmp_path / "quantized", bits=4, group_size=32, dataset=str(text), nsamples=4, seqlen=16
    )
    reason = manifest["degraded"]
    assert f"this checkpoint is degraded: {reason}" in made["notes"]
    for folder in ("out", "quantized"):
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert config["bittern"] == {"degraded": reason} and config["num_key_value_heads"] == 1
        assert (tmp_path / folder / "LICENSE").read_text() == "some licence"
    model = bittern.load(tmp_path / "quantized")
    ids = torch.arange(16)[None]
    keys = model(input_ids=ids, use_cache=True).past_key_values.layers[0].keys
    assert keys.shape == (1, 1, 16, 16)


def test_manifest_page_and_card_tell_the_story(
    tmp_path: Path, text: Path, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make(tmp_path / "source", tokenizer)
    run(source, tmp_path / "out", text, passes=1, tokens=256)
    bittern.quantize(tmp_path / "out", tmp_path / "packed", method="rtn", group_size=32)
    for folder, checks in (("out", ["--against", str(tmp_path / "out")]), ("packed", [])):
        manifest = read_manifest(tmp_path / folder)  # held to the schema
        assert [found["kind"] for found in runs(manifest)] == ["uptrain", "quantize"][: 1 if folder == "out" else 2]
        with pytest.raises(SystemExit) as ended:
            main(["verify", str(tmp_path / folder), *checks])
        assert ended.value.code == 0, capsys.readouterr().out
        write_page(tmp_path / folder, tmp_path / f"{folder}.html")
        page = (tmp_path / f"{folder}.html").read_text(encoding="utf-8")
        assert ">Uptraining<" in page and "model.layers.1" in page
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["push", str(tmp_path / "packed"), "me/tiny", "--dry-run", "--license", "mit"])
    card = capsys.readouterr().out
    assert "| key and value heads | 4 merged into 2 |" in card
    command = manifest["origin"]["command"]
    assert command[:2] == ["bittern", "uptrain"] and command[command.index("--kv-heads") + 1] == "2"


def test_the_paper_s_conversions_are_what_they_say(
    tmp_path: Path, text: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    source = make(tmp_path / "source", tokenizer)
    before = load_file(source / "model.safetensors")["model.layers.1.self_attn.k_proj.weight"].view(2, 2, 16, -1)
    for init, expected in (("mean", before.mean(1)), ("first", before[:, 0])):
        run(source, tmp_path / init, text, init=init)
        found = load_file(tmp_path / init / "model.safetensors")["model.layers.1.self_attn.k_proj.weight"]
        torch.testing.assert_close(found, expected.flatten(0, 1))


def test_each_stage_brings_a_block_nearer_to_the_source() -> None:
    teacher = tiny.random_model("llama", num_key_value_heads=4)
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if "attn" in name:
                parameter.normal_(0, 0.2)
    teacher.requires_grad_(False)
    student = make_student(teacher, teacher.config.to_dict(), 1)
    batches = list(torch.split(torch.randint(256, (64, 32), generator=torch.Generator().manual_seed(0)), 8))
    records = list(regroup(teacher, student, batches, Recipe(passes=10), Counts(4, 4, 16)))
    for record in records:
        stages = [record[f"error_{stage}"] for stage in ("mean", "aligned", "solved", "distilled")]
        assert stages == sorted(stages, reverse=True) and stages[3] < 0.98 * stages[1]
    assert [record["layer"] for record in records] == ["model.layers.0", "model.layers.1"]
    assert live.blocks(student)[1][0].self_attn.k_proj.out_features == 16  # type: ignore[union-attr]


def test_an_attention_whose_values_are_zero_is_passed() -> None:
    teacher = tiny.random_model("llama", num_key_value_heads=4)
    teacher.requires_grad_(False)
    teacher.model.layers[1].self_attn.v_proj.weight.zero_()
    student = make_student(teacher, teacher.config.to_dict(), 2)
    batches = list(torch.split(torch.randint(256, (8, 16), generator=torch.Generator().manual_seed(0)), 4))
    records = list(regroup(teacher, student, batches, Recipe(passes=2), Counts(4, 4, 16)))
    assert all(math.isfinite(record["error_distilled"]) for record in records)


@pytest.mark.parametrize("held", [True, False])
def test_what_the_source_wrote_is_known_wherever_it_was_asked_for(held: bool) -> None:
    """Of 100 windows of a text, 100 of the source's own in the place of text, and 30 that go on with both."""
    ids = np.arange(230, dtype=np.int32)[:, None] * np.ones(4, dtype=np.int32)
    text = None if held else torch.zeros(1, 4, dtype=torch.int64)
    given = {"sampled": 120, "seqlen": 4}
    windows, _ = pipeline._split(Windows(ids, 0, own=130), text, given)
    own = windows.is_own(torch.arange(len(windows.ids)))
    assert torch.equal(own, torch.from_numpy(windows.ids[:, 0] >= 100)) and (len(own) < 230) == held


@torch.no_grad()
def test_what_fits_only_the_windows_that_it_was_learned_from_is_not_kept() -> None:
    """Two short windows say little; what is learned from one of them must not make other text worse."""
    teacher = tiny.random_model("llama", num_key_value_heads=4)
    for name, parameter in teacher.named_parameters():
        if "attn" in name:
            parameter.normal_(0, 0.1)
    teacher.requires_grad_(False)
    batches = [torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(0))]
    unseen = torch.randint(256, (16, 32), generator=torch.Generator().manual_seed(1))
    wanted = teacher.model(unseen).last_hidden_state
    errors = []
    for passes in (0, 30):
        student = make_student(teacher, teacher.config.to_dict(), 1)
        list(regroup(teacher, student, batches, Recipe(passes=passes), Counts(4, 4, 16)))
        errors.append(float((student.model(unseen).last_hidden_state - wanted).norm() / wanted.norm()))
    assert errors[1] < 1.1 * errors[0], errors


def test_of_a_single_window_nothing_is_learned(tmp_path: Path, text: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    manifest = run(make(tmp_path / "source", tokenizer), tmp_path / "out", text, nsamples=1, passes=5)
    for record in manifest["blocks"]:
        assert record["error_aligned"] is not None
        assert record["error_solved"] is record["error_distilled"] is None
    note = "passes: 5 asked for, none done: what they learn is judged by other calibration windows, and there is one"
    assert note in manifest["notes"]
    others = run(tmp_path / "source", tmp_path / "two", text, nsamples=2, passes=5)["notes"]
    assert not any("passes" in each for each in others)


def test_an_attention_sink_counts_as_any_other_position() -> None:
    generator = torch.Generator().manual_seed(0)
    block = torch.nn.Linear(8, 8, bias=False)
    source, target, state = ([torch.randn(2, 5, 8, generator=generator)] for _ in range(3))
    stream = Stream([BlockCall((), {})], source, target, state)
    error = block_error(block, stream)
    for states in (stream.source, stream.target, stream.state):
        states[0][:, 0] *= 1000
    assert block_error(block, stream) == pytest.approx(error, rel=1e-5)


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path, text: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = make(tmp_path / "source", tokenizer)
    for name in ("one", "two"):
        run(source, tmp_path / name, text, passes=2, tokens=256, batch_size=4)
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("perplexity", "tokens", "reason"),
    [
        ({"source": 10.0, "converted": 10.1, "trained": None}, 0, "not trained after its key-value heads were merged"),
        ({"source": 10.0, "converted": 20.0, "trained": 11.0}, 5, None),
        ({"source": 10.0, "converted": 20.0, "trained": 11.5}, 5, "perplexity is 15% above the source's"),
        (
            {"source": 10.0, "converted": 10.2, "trained": 10.9},
            5,
            "training has raised its perplexity from 10.2 to 10.9",
        ),
        (
            {"source": 10.0, "converted": 10.2, "trained": 11.5},
            5,
            "training has raised its perplexity from 10.2 to 11.5; perplexity is 15% above the source's",
        ),
        (
            {"source": 10.0, "converted": 12.0, "trained": None},
            0,
            "not trained after its key-value heads were merged; perplexity is 20% above the source's",
        ),
    ],
)
def test_what_is_called_degraded(perplexity: dict[str, Any], tokens: int, reason: str | None) -> None:
    assert degraded(perplexity, tokens) == reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_heads": 3}, "can have 1, 2"),
        ({"init": "median"}, "expected aligned, mean or first, found 'median'"),
        ({"group": "random"}, "expected similar or neighbour"),
        ({"seqlen": 100}, "this model's context is 64 tokens"),
        ({"tokens": -1}, "tokens: expected at least 0"),
        ({"sampled": 5}, "sampled: expected at most 0"),
        ({"kl_weight": 2.0}, "kl_weight"),
        ({"kl_weight": math.nan}, "kl_weight"),
        ({"lr": math.nan}, "kl_weight, lr: expected a share and more than 0, found 0.9, nan"),
        ({"lr": math.inf}, "kl_weight, lr: expected a share and more than 0, found 0.9, inf"),
        ({"hidden_weight": -1.0}, "hidden_weight: expected a number of at least 0, found -1.0"),
        ({"hidden_weight": math.nan}, "hidden_weight: expected a number of at least 0, found nan"),
        ({"weight_decay": math.nan}, "weight_decay: expected a number of at least 0, found nan"),
        ({"weight_decay": math.inf}, "weight_decay: expected a number of at least 0, found inf"),
        ({"dtype": "int8"}, "expected bf16, fp16 or fp32"),
        ({"dataset": "missing.txt"}, "missing.txt"),
        ({"text": "missing.txt"}, "missing.txt"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_left(
    options: dict[str, Any], message: str, tmp_path: Path, text: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    source = make(tmp_path / "source", tokenizer)
    with pytest.raises(BitternError, match=message):
        run(source, tmp_path / "out", text, **options)
    with pytest.raises(BitternError, match=r"expected a folder for safetensors, found the name of a \.gguf file"):
        run(source, tmp_path / "out.gguf", text)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_folder_that_one_stands_in_is_an_output(
    tmp_path: Path, text: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, here = make(tmp_path / "source", tokenizer), tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    run(source, Path(), text, overwrite=True)
    assert (here / "model.safetensors").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "source"]


def test_the_command_shows_blocks_points_and_the_label(
    tmp_path: Path, text: Path, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make(tmp_path / "source", tokenizer)
    command = ["uptrain", str(source), "-o", str(tmp_path / "out"), "--kv-heads", "1", "--dataset", str(text)]
    options = ["--batch-size", "4", "--init", "mean"]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--seqlen", "16", "--nsamples", "8", "--tokens", "0.2k", "--sampled", "64", *options])
    shown = capsys.readouterr()
    assert ended.value.code == 0
    assert "1/2  model.layers.0  heads 0+1+2+3  mean 0." in shown.err and "step 4/4  256 tokens" in shown.err
    assert "text of the source's own: 4/4 windows written" in shown.err
    point = re.search(r"loss (\S+)  KL (\S+)  nll (\S+)  hidden (\S+)  lr", shown.err)
    assert point is not None
    loss, kl, nll, hidden = map(float, point.groups())
    assert loss == pytest.approx(0.9 * kl + 0.1 * nll + 10 * hidden, rel=1e-3)
    assert "4 -> 1 key-value heads, 512 -> 128 bytes of fp16 cache a token" in shown.out
    with pytest.raises(SystemExit) as ended:
        main([*command, "--tokens", "many"])
    assert ended.value.code == 2 and "expected a number such as 500000, 500k or 2M" in capsys.readouterr().err


def test_stories15m_keeps_most_of_its_gap() -> None:
    """The real thing, in small: three of six heads, closed forms alone, against mean pooling."""
    folder = SHARED / "data" / "models" / "stories15m"
    if not folder.exists():
        pytest.skip(f"needs {folder}; BITTERN_SHARED names another place")
    from bittern.checkpoint import open_checkpoint
    from bittern.evaluate import evaluate, text_windows

    texts = SHARED / "data" / "text" / "tinystories"
    with open_checkpoint(folder) as checkpoint:
        tokenizer, config = checkpoint.tokenizer(), checkpoint.config
        teacher = live.load_dense(checkpoint)
    batches = list(torch.split(text_windows(texts / "train.txt", tokenizer, seqlen=256, windows=32), 8))
    held_out = text_windows(texts / "valid.txt", tokenizer, seqlen=256, windows=8)
    found = []
    for recipe in (Recipe(init="mean", group="neighbour", passes=0), Recipe(passes=0)):
        student = make_student(teacher, config, 3)
        list(regroup(teacher, student, batches, recipe, Counts(6, 6, 48)))
        found.append(evaluate(student, held_out).nll)
    source = evaluate(teacher, held_out).nll
    assert found[1] - source < 0.25 * (found[0] - source)


def test_a_label_of_the_source_is_kept(tmp_path: Path, text: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    first = make(tmp_path / "source", tokenizer)
    run(first, tmp_path / "two", text, passes=0)
    manifest = run(tmp_path / "two", tmp_path / "one", text, kv_heads=1, passes=0, tokens=64)
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert "not trained after its key-value heads were merged" in manifest["degraded"]
    assert config["bittern"]["degraded"] == manifest["degraded"]
    assert any(manifest["degraded"] in note for note in manifest["notes"])


def test_a_dtype_that_does_not_hold_what_is_not_trained_is_refused_first(
    tmp_path: Path, text: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny.random_model("llama", **MHA)
    with torch.no_grad():
        model.model.norm.weight.fill_(1e5)  # is not trained, and does not fit
    large = tiny.save(model, tmp_path / "large", tokenizer)
    reported: list[Any] = []
    with pytest.raises(BitternError, match=r"model\.norm\.weight: its largest magnitude 100000 does not fit float16"):
        run(large, tmp_path / "out", text, dtype="fp16", on_block=reported.append)
    assert not reported
