"""The commands as a user meets them: what they print, where, and the exit code."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import bittern
from bittern import cli
from bittern.options import byte_size, layer_bits
from bittern.runtime import native

ROOT = Path(__file__).resolve().parents[1]
WORDS = [*("the", "a", "red", "blue", "small", "big", "and", "then"), *("sees", "likes", "finds", "eats")]
WORDS += ["cat", "dog", "bird", "fish", "house", "tree", "river", "stone"]


@dataclass(frozen=True)
class Outcome:
    """What a command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str


Bittern = Callable[..., Outcome]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Bittern:
    """Run a command in this process."""

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(int(exit_.value.code or 0), captured.out, captured.err)

    return call


def spawn(*arguments: object, **options: object) -> subprocess.Popen[str]:
    """Start a command in a process of its own, with SIGINT as a terminal leaves it: a background job ignores it."""
    command = [sys.executable, "-m", "bittern", *map(str, arguments)]
    return subprocess.Popen(  # type: ignore[call-overload, no-any-return]
        command,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        **options,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in fp32 with a tokenizer of twenty words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny"
    vocabulary = {word: i for i, word in enumerate(["<unk>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")  # type: ignore[no-untyped-call]
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    llama = LlamaForCausalLM(config)
    llama.lm_head.weight.data[:2] = 0  # never the likeliest: the special tokens, which are not shown
    llama.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4000 words that the tiny tokenizer knows."""
    file = tmp_path_factory.mktemp("texts") / "text.txt"
    generator = torch.Generator().manual_seed(0)
    choice = torch.randint(len(WORDS), (4000,), generator=generator).tolist()
    file.write_text(" ".join(WORDS[i] for i in choice), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def artifact(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model at 4 bits."""
    folder = tmp_path_factory.mktemp("artifacts") / "tiny-4bit"
    bittern.quantize(model, folder, bits=4, group_size=32, dataset=str(text), nsamples=8, seqlen=32)
    return folder


def quantize_options(text: Path) -> list[object]:
    return ["--group-size", 32, "--dataset", text, "--nsamples", 8, "--seqlen", 32]


def fails(outcome: Outcome, code: int, *parts: str) -> None:
    """One line on stderr that begins with "error: " and holds the parts; nothing on stdout."""
    assert outcome.code == code, outcome
    assert outcome.out == ""
    assert re.fullmatch(r"error: [^\n]+\n", outcome.err), outcome.err
    for part in parts:
        assert part in outcome.err


# Wrong usage


def test_a_command_is_what_is_missing(run: Bittern) -> None:
    found = run()
    assert found.code == 2 and "error" not in found.err
    assert re.search(r"^  quantize +\w", found.err, re.MULTILINE)


def test_stdin_in_any_locale_is_utf_8(run: Bittern, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(b"moss \xff"), encoding="ascii")
    monkeypatch.setattr(sys, "stdin", stream)
    found = run("run", model, "--max-new-tokens", 2)
    assert found.code == 1
    assert found.err == "error: --prompt or stdin: expected UTF-8 text, found other bytes at character 5\n"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], []),
        (["nonsense"], ["nonsense"]),
        (["quantize"], ["SOURCE", "'bittern quantize --help'"]),
        (["quantize", "m"], ["--output"]),
        (["quantize", "m", "-o", "o", "--bits", "5"], ["--bits", "'5'", "8", "4", "3", "2"]),
        (["quantize", "m", "-o", "o", "--bits", "four"], ["--bits", "'four'"]),
        (["quantize", "m", "-o", "o", "--group-size", "0"], ["--group-size", "'0'", "-1", "auto"]),
        (["quantize", "m", "-o", "o", "--group-size", "-2"], ["--group-size", "'-2'"]),
        (["quantize", "m", "-o", "o", "--method", "awq"], ["--method", "gptq", "rtn"]),
        (["quantize", "m", "-o", "o", "--layer", "q_proj"], ["--layer", "REGEX=bits:N", "'q_proj'"]),
        (["quantize", "m", "-o", "o", "--layer", "q_proj=bits:5"], ["--layer", "'q_proj=bits:5'"]),
        (["quantize", "m", "-o", "o", "--layer", "q_(=bits:8"], ["--layer", "regular expression", "'q_('"]),
        (["quantize", "m", "-o", "o", "--skip", "*"], ["--skip", "regular expression", "'*'"]),
        (["quantize", "m", "-o", "o", "--max-shard-size", "5 parsecs"], ["--max-shard-size", "5GB", "'5 parsecs'"]),
        (["quantize", "m", "-o", "o", "--nsamples", "0"], ["--nsamples", "0"]),
        (["quantize", "m", "-o", "o", "--seqlen", "1"], ["--seqlen", "1"]),
        (["quantize", "m", "-o", "o", "--device", "tpu"], ["--device", "auto", "cpu", "cuda"]),
        (["convert", "m", "-o", "o", "--dtype", "int8"], ["--dtype", "bf16", "fp16", "fp32", "'int8'"]),
        (["run", "m", "--temperature", "-1"], ["--temperature"]),
        (["run", "m", "--top-p", "1.5"], ["--top-p"]),
        (["run", "m", "--activations", "a4"], ["--activations", "a16", "a8"]),
        (["run", "m", "--lm-head-bits", "4"], ["--lm-head-bits", "8"]),
        (["run", "m", "--kv-cache", "int4"], ["--kv-cache", "fp32", "bf16", "int8"]),
        (["run", "m", "--threads", "0"], ["--threads"]),
        (["eval", "m", "--kernels", "fast"], ["--kernels", "auto", "native", "torch"]),
        (["eval", "m"], ["--text", "--tasks"]),
        (["eval", "m", "--against", "b"], ["--text", "--tasks"]),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(run: Bittern, arguments: list[str], parts: list[str]) -> None:
    if arguments:
        fails(run(*arguments), 2, *parts)
    else:
        assert run().code == 2


@pytest.mark.parametrize(
    ("written", "count"),
    [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("1.5GiB", 3 * 2**29), ("100 kb", 10**5), ("4096", 4096)],
)
def test_sizes_have_decimal_and_binary_units(written: str, count: int) -> None:
    assert byte_size(written) == count


def test_a_layer_pattern_may_hold_an_equals_sign() -> None:
    assert layer_bits("a=b=bits:3") == ("a=b", 3)


# Sources and outputs


@pytest.mark.parametrize("command", ["convert", "quantize"])
def test_a_missing_source(run: Bittern, tmp_path: Path, command: str) -> None:
    fails(run(command, tmp_path / "none", "-o", tmp_path / "out"), 1, str(tmp_path / "none"), "no such folder")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [("run", "--prompt", "the"), ("eval", "--text", __file__), ("inspect",)])
def test_a_missing_model(run: Bittern, tmp_path: Path, command: tuple[str, ...]) -> None:
    name, *options = command
    fails(run(name, tmp_path / "none", *options), 1, str(tmp_path / "none"))


@pytest.mark.parametrize("command", ["convert", "quantize"])
def test_a_folder_that_is_no_checkpoint(run: Bittern, tmp_path: Path, command: str) -> None:
    (tmp_path / "empty").mkdir()
    fails(run(command, tmp_path / "empty", "-o", tmp_path / "out"), 1, "config.json")


@pytest.mark.parametrize("command", ["convert", "quantize"])
def test_an_existing_output_is_kept(run: Bittern, model: Path, tmp_path: Path, command: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    fails(run(command, model, "-o", out), 1, str(out), "exists", "--overwrite")
    fails(run(command, model, "-o", out, "--overwrite"), 1, str(out), "no checkpoint")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "mine.txt").read_text() == "precious"


@pytest.mark.parametrize("command", ["convert", "quantize"])
def test_an_output_where_no_folder_can_be(run: Bittern, model: Path, text: Path, tmp_path: Path, command: str) -> None:
    (tmp_path / "file").write_text("")
    options = quantize_options(text) if command == "quantize" else []
    fails(run(command, model, "-o", tmp_path / "file" / "out", *options), 1, str(tmp_path / "file"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_target(run: Bittern, model: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    fails(run("convert", model, "-o", tmp_path / "out"), 1, "permission denied")


def test_an_artifact_is_no_source(run: Bittern, artifact: Path, tmp_path: Path) -> None:
    fails(run("quantize", artifact, "-o", tmp_path / "out"), 1, "quantized")


@pytest.mark.parametrize(
    "command",
    [
        *(("convert", "", "-o", "out"), ("quantize", "", "-o", "out"), ("inspect", ""), ("verify", "")),
        *(("uptrain", "", "-o", "out", "--kv-heads", "1"), ("report", "", "-o", "out.html")),
        *(("run", "", "--prompt", "the"), ("push", "", "me/tiny", "--dry-run")),
    ],
    ids=lambda command: command[0],
)
def test_an_empty_name_is_not_the_current_folder(
    run: Bittern, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.chdir(shutil.copytree(artifact, tmp_path / "here"))
    fails(run(*command), 1, "expected a folder", "found an empty name")


def test_an_output_has_a_name(run: Bittern, artifact: Path) -> None:
    options: dict[str, list[object]] = {"uptrain": [artifact, "--kv-heads", 1], "demo": []}
    for command in ("convert", "quantize", "uptrain", "report", "demo"):
        given = options.get(command, [artifact])
        fails(run(command, *given, "-o", ""), 2, "'-o' / '--output': expected a name, found none")
        fails(run(command, *given, "-o", "q\udcff"), 1, r"output 'q\udcff': expected a name in UTF-8")


@pytest.mark.parametrize(
    ("command", "what"),
    [
        (["quantize", "-o", "out", "--group-size", "32", "--seqlen", "32", "--dataset"], "dataset"),
        (["uptrain", "-o", "out", "--kv-heads", "1", "--seqlen", "32", "--dataset"], "dataset"),
        (["eval", "--seqlen", "32", "--text"], "text"),
        (["eval", "--tasks"], "task"),
    ],
)
def test_a_name_that_no_manifest_can_hold_is_refused_before_any_work(
    run: Bittern, model: Path, text: Path, tmp_path: Path, command: list[str], what: str
) -> None:
    name = shutil.copy(text, tmp_path / "v\udcff.txt")
    fails(run(command[0], model, *command[1:], name), 1, what, r"v\udcff.txt': expected a name in UTF-8")


@pytest.mark.parametrize("command", ["convert", "quantize"])
def test_a_gguf_file_has_no_shards(run: Bittern, model: Path, tmp_path: Path, command: str) -> None:
    options = ["--max-shard-size", "1GB"] + (["--group-size", "32"] if command == "quantize" else [])
    fails(run(command, model, "-o", tmp_path / "out.gguf", *options), 1, "max_shard_size: a GGUF file is written whole")
    assert not list(tmp_path.iterdir())


def test_a_revision_belongs_to_the_hub(run: Bittern, model: Path, tmp_path: Path) -> None:
    fails(run("convert", model, "-o", tmp_path / "out", "--revision", "main"), 1, "--revision main", "Hub id")


# convert


def test_convert_repacks_and_verify_agrees(run: Bittern, artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shown = run("convert", artifact, "-o", out, "--target", "vllm", "--format", "compressed-tensors")
    assert shown.code == 0 and re.match(rf"{re.escape(str(out))}: \d+ packed layers \(no weight changed\), ", shown.out)
    shown = run("verify", out, "--against", artifact)
    assert shown.code == 0 and shown.err == ""
    answers = dict(line.split()[1::-1] for line in shown.out.splitlines())
    assert answers["files"] == answers["logits"] == "ok" and "FAILED" not in answers.values()
    fails(
        run("convert", artifact, "-o", tmp_path / "no", "--target", "vllm", "--format", "mlx"), 1, "--target vllm: mlx"
    )
    shards = out / "model.safetensors"
    shards.write_bytes(shards.read_bytes()[:-1] + b"x")
    shown = run("verify", out, "--no-logits", "--json")
    assert shown.code == 1 and json.loads(shown.out)["passed"] is False
    fails(run("verify", tmp_path / "nowhere"), 1, "nowhere")
    fails(run("verify", out, "--text", "the"), 2, "--text")
    assert run("verify", out, "--prompt", "the cat", "--against", artifact).code == 1


def test_convert_says_what_it_did(run: Bittern, model: Path, tmp_path: Path) -> None:
    shown = run("convert", model, "-o", tmp_path / "out", "--dtype", "bf16")
    assert shown.code == 0 and shown.err == ""
    assert re.match(rf"{re.escape(str(tmp_path / 'out'))}: \d+ tensors in bf16, .+ -> .+ s\n", shown.out)
    worst = re.search(r"^largest relative error: (\S+) in model\.", shown.out, re.MULTILINE)
    assert worst is not None and 2**-9 < float(worst[1]) <= 2**-8 * 1.001  # bf16 keeps eight significant bits
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_convert_as_json_is_one_line(run: Bittern, model: Path, tmp_path: Path) -> None:
    shown = run("convert", model, "-o", tmp_path / "out", "--dtype", "fp16", "--json")
    assert shown.code == 0 and shown.out.count("\n") == 1
    assert json.loads(shown.out)["dtype"] == "fp16"


def with_value(model: Path, folder: Path, name: str, value: float) -> Path:
    """A copy of the model with one value of one tensor replaced."""
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[7] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_fp16_overflow_names_the_tensor_and_its_maximum(run: Bittern, model: Path, tmp_path: Path) -> None:
    source = with_value(model, tmp_path / "large", "model.layers.1.mlp.up_proj.weight", -1e5)
    out = tmp_path / "out"
    fails(run("convert", source, "-o", out, "--dtype", "fp16"), 1, "model.layers.1.mlp.up_proj.weight", "100000")
    assert not out.exists()
    shown = run("convert", source, "-o", out, "--dtype", "fp16", "--clamp")
    assert shown.code == 0 and "clamped 1 values of model.layers.1.mlp.up_proj.weight" in shown.out


# quantize


def test_quantize_shows_a_row_per_layer(run: Bittern, model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shown = run("quantize", model, "-o", out, *quantize_options(text), "--layer", "q_proj=bits:8", "--skip", "o_proj")
    assert shown.code == 0
    first, *counted = shown.err.splitlines()
    assert re.fullmatch(r"expected: \d+:\d\d( \(much less .*\))?, \d+ MB peak memory, \d+ kB to write", first)
    assert counted[:2] == ["what outputs count: 1/2 blocks", "what outputs count: 2/2 blocks"]
    rows = counted[2:]
    assert len(rows) == 2 * 6  # seven matrices in each of two blocks, o_proj skipped
    assert [int(row.split("/")[0]) for row in rows] == list(range(1, 13))
    for row in rows:
        name, bits = re.search(r"(model\.layers\.\S+) .* (\d) bits g32 +gptq", row).groups()  # type: ignore[union-attr]
        assert bits == ("8" if "q_proj" in name else "4")
        assert re.search(r"loss \S+ .*damp 0\.2 .* 256 tokens .* elapsed .* left .* peak", row)
    manifest = json.loads((out / "bittern_manifest.json").read_text())
    assert len(manifest["layers"]) == 12 and len(manifest["kept"]) == 2
    assert shown.out.startswith(f"{out}: 12 layers quantized, 2 kept, ")


def test_fewer_calibration_tokens_than_asked_for_are_said(
    run: Bittern, model: Path, text: Path, tmp_path: Path
) -> None:
    options = ["--group-size", "auto", "--dataset", text, "--nsamples", 1000, "--seqlen", 64]
    shown = run("quantize", model, "-o", tmp_path / "out", *options)
    assert shown.code == 0
    assert re.search(r"^note: .*1000 x 64 = 64000 calibration tokens asked for.*found$", shown.err, re.MULTILINE)


def test_a_group_size_that_does_not_divide_lists_those_that_fit(
    run: Bittern, model: Path, text: Path, tmp_path: Path
) -> None:
    shown = run("quantize", model, "-o", tmp_path / "out", "--dataset", text, "--group-size", 64)
    fails(shown, 1, "64", "96", "32, 16, -1")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--dataset", "none.txt"], ["none.txt"]),
        (["--layer", "no_such=bits:8"], ["no_such", "none of"]),
        (["--skip", "no_such"], ["no_such", "none of"]),
        (["--skip", "."], ["nothing to quantize"]),
        (["--damp-percent", "0"], ["damp_percent", "0"]),
        (["--seqlen", "32", "--dataset", "self", "--chat-template"], ["--chat-template", "needs rows with messages"]),
        (["--seqlen", "5000"], ["5000"]),
    ],
)
def test_what_quantize_refuses(
    run: Bittern, model: Path, text: Path, tmp_path: Path, options: list[str], parts: list[str]
) -> None:
    shown = run("quantize", model, "-o", tmp_path / "out", *quantize_options(text), *options)
    fails(shown, 1, *parts)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("empty.txt", b"", ["empty.txt"]),
        ("short.txt", b"the cat", ["short.txt", "32"]),
        ("latin.txt", "caf\u00e9 ".encode("latin-1") * 100, ["latin.txt", "UTF-8"]),
        ("broken.jsonl", b'{"text": "the cat"\n', ["broken.jsonl"]),
        ("other.jsonl", b'{"n": 1}\n', ["other.jsonl"]),
        ("text.pdf", b"%PDF", ["text.pdf"]),
    ],
)
def test_calibration_text_that_is_none(
    run: Bittern, model: Path, text: Path, tmp_path: Path, name: str, content: bytes, parts: list[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    shown = run("quantize", model, "-o", tmp_path / "out", *quantize_options(text), "--dataset", tmp_path / name)
    fails(shown, 1, *parts)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(run: Bittern, model: Path, text: Path, tmp_path: Path, value: float) -> None:
    source = with_value(model, tmp_path / "broken", "model.layers.1.self_attn.v_proj.weight", value)
    shown = run("quantize", source, "-o", tmp_path / "out", *quantize_options(text))
    assert shown.code == 1 and not (tmp_path / "out").exists()
    last = shown.err.splitlines()[-1]
    assert last.startswith("error: ") and "model.layers.1.self_attn.v_proj" in last and "NaN" in last


def test_cuda_without_a_cuda_device(run: Bittern, model: Path, text: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    for command in (["quantize", model, "-o", tmp_path / "out"], ["run", model, "--prompt", "the"]):
        fails(run(*command, "--device", "cuda"), 1, "cuda")


# run, eval, inspect


def test_run_writes_text_and_ends_with_the_figures(run: Bittern, artifact: Path) -> None:
    options = ["--prompt", "the cat sees", "--max-new-tokens", 5, "--temperature", 0, "--ignore-eos"]
    plain = run("run", artifact, *options)
    assert plain.code == 0 and re.fullmatch(r"kernels: (native|torch)[^\n]*\n", plain.err) and plain.out.strip()
    shown = run("run", artifact, *options, "--json")
    figures = json.loads(shown.out)
    assert figures["text"].strip() == plain.out.strip()
    assert figures["prompt_tokens"] == 3 and figures["new_tokens"] == 5
    assert set(figures) == {
        *("text", "prompt_tokens", "new_tokens", "load_seconds", "peak_memory_bytes"),
        *("prefill_tokens_per_second", "decode_tokens_per_second"),
    }
    assert figures["peak_memory_bytes"] > 10**7


def test_run_continues_several_prompts(run: Bittern, artifact: Path) -> None:
    prompts, options = ["the cat sees", "a", "the small dog finds a red"], ["--max-new-tokens", 4, "--ignore-eos"]
    alone = [json.loads(run("run", artifact, "--prompt", prompt, *options, "--json").out) for prompt in prompts]
    several = [argument for prompt in prompts for argument in ("--prompt", prompt)]
    shown = json.loads(run("run", artifact, *several, *options, "--json").out)
    assert [found["text"] for found in shown["results"]] == [found["text"] for found in alone]
    assert shown["load_seconds"] > 0 and shown["peak_memory_bytes"] > 10**7
    plain = run("run", artifact, *several, *options)
    expected = "".join(f"> {prompt}\n{found['text']}\n" for prompt, found in zip(prompts, alone, strict=True))
    assert plain.code == 0 and plain.out == expected


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--kernels", "torch"], "kernels: torch\n"),
        (["--activations", "a8", "--threads", 1], "activations a8"),
        (["--lm-head-bits", 8], "kernels: "),
        (["--kv-cache", "int8"], "kernels: "),
        (["--kv-cache", "bf16", "--kernels", "torch"], "kernels: torch\n"),
    ],
)
def test_run_says_what_computes(run: Bittern, artifact: Path, options: list[object], said: str) -> None:
    shown = run("run", artifact, "--prompt", "the cat", "--max-new-tokens", 3, "--ignore-eos", *options)
    assert shown.code == 0 and shown.out.strip()
    assert said in shown.err or not native.available()


@pytest.mark.skipif(not native.available(), reason="no native kernels were built")
def test_activations_that_no_layer_rounds_are_not_claimed(run: Bittern, model: Path) -> None:
    shown = run("run", model, "--prompt", "the cat", "--max-new-tokens", 3, "--activations", "a8")
    assert shown.code == 0 and "activations as they are (no layer is packed)" in shown.err


def test_an_empty_number_of_processes_is_one(run: Bittern, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "")
    assert run("--version").code == 0


def test_run_without_native_kernels(run: Bittern, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_load", lambda: (None, "it was not built"))
    options = ["--prompt", "the cat", "--max-new-tokens", 3]
    shown = run("run", artifact, *options)
    assert shown.code == 0 and shown.err == "kernels: torch (native runtime: it was not built)\n"
    fails(run("run", artifact, *options, "--kernels", "native"), 1, "native runtime: it was not built")


def test_run_takes_unquantized_models_and_stdin(run: Bittern, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--max-new-tokens", 4, "--seed", 3, "--ignore-eos"]
    from_option = run("run", model, "--prompt", "the dog", *options)
    monkeypatch.setattr(sys, "stdin", io.StringIO("the dog\n"))
    from_stdin = run("run", model, *options)
    assert from_option.code == from_stdin.code == 0
    assert from_option.out == from_stdin.out


def test_run_honours_the_penalty_of_the_generation_config_and_names_the_rest(
    run: Bittern, model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(model, tmp_path / "asking")
    asked = {"repetition_penalty": 3.5, "suppress_tokens": [5], "no_repeat_ngram_size": 0, "min_new_tokens": 2}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, **asked}), encoding="utf-8")
    command = ["--prompt", "the cat", "--max-new-tokens", 12, "--ignore-eos"]
    stored, given = run("run", folder, *command), run("run", model, *command, "--repetition-penalty", 3.5)
    plain, undone = run("run", model, *command), run("run", folder, *command, "--repetition-penalty", 1)
    assert stored.out == given.out != plain.out == undone.out
    note = "note: generation_config.json: min_new_tokens, suppress_tokens: not honoured\n"
    assert stored.err == note + given.err and given.err.startswith("kernels: ")


def test_run_without_a_prompt(run: Bittern, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    fails(run("run", model), 1, "--prompt", "stdin")


class Terminal(io.StringIO):
    """A stdin that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_chat_uses_the_template_and_remembers(
    run: Bittern, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = with_value(model, tmp_path / "chatty", "lm_head.weight", 0.0)
    template = "{% for m in messages %}{{ m.content }} then {% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    prompts: list[int] = []
    from bittern.runtime import chat as module
    from bittern.runtime.generate import generate as answer

    def spy(*arguments: object, **options: object) -> object:
        prompts.append(arguments[2].shape[1])  # type: ignore[attr-defined]
        return answer(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "generate", spy)
    monkeypatch.setattr(sys, "stdin", Terminal("the cat\n\nthe dog\n"))
    shown = run("run", folder, "--max-new-tokens", 3, "--ignore-eos")
    assert shown.code == 0
    # "the cat then", and then "the cat then", three new words, "then", "the dog then"
    assert prompts == [3, 3 + 3 + 1 + 3]


def test_a_chat_outlives_a_full_context_and_a_bad_line(
    run: Bittern, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = with_value(model, tmp_path / "chatty", "lm_head.weight", 0.0)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    lines = ["the cat", "Once \udcff", *["the dog"] * 12, "the cat " * 60, "the dog"]
    monkeypatch.setattr(sys, "stdin", Terminal("\n".join(lines)))
    shown = run("run", folder, "--max-new-tokens", 40, "--ignore-eos")
    assert shown.code == 0
    notes = shown.err.splitlines()
    assert notes.count("error: what was typed: expected UTF-8 text, found other bytes at character 5") == 1
    assert sum("the oldest turns are forgotten" in note for note in notes) > 5
    assert sum(note.startswith("error: ") and "leave no room in" in note for note in notes) == 1  # the long line
    assert shown.out.count("> ") == len(lines) + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "the", "--top-p", 0.9], "top_p: needs a temperature above 0"),
        (["--prompt", "the", "--top-k", 5], "top_k: needs a temperature above 0"),
        (["--prompt", "Once \udcff"], "expected UTF-8 text, found other bytes at character 5"),
    ],
)
def test_run_refuses(run: Bittern, model: Path, options: list[Any], message: str) -> None:
    shown = run("run", model, *options)
    assert shown.code == 1 and message in shown.err and len(shown.err.splitlines()) == 1


@pytest.mark.parametrize("options", [["--threads", 257], ["--threads", 100_000], ["--seed", 2**64]])
def test_numbers_that_nothing_takes_are_usage_errors(run: Bittern, model: Path, options: list[Any]) -> None:
    shown = run("run", model, "--prompt", "the", *options)
    assert shown.code == 2 and "is not in the range" in shown.err


def test_eval_against_the_base(run: Bittern, model: Path, artifact: Path, text: Path) -> None:
    options = ["--text", text, "--seqlen", 32, "--windows", 4, "--json"]
    same = json.loads(run("eval", model, *options, "--against", model).out)
    assert same["kl"] == pytest.approx(0, abs=1e-6) and same["top1_agreement"] == 1
    assert same["windows"] == 4 and same["tokens"] == 4 * 31
    other = json.loads(run("eval", artifact, *options, "--against", model).out)
    assert other["kl"] > 1e-6 and other["perplexity"] != same["perplexity"]


def test_eval_says_when_the_text_is_short(run: Bittern, model: Path, text: Path) -> None:
    shown = run("eval", model, "--text", text, "--seqlen", 32, "--windows", 1000)
    assert shown.code == 0 and re.search(r"^perplexity +\d", shown.out, re.MULTILINE)
    assert re.fullmatch(r"note: .*1000 windows asked for, 125 found\nkernels: .*\n", shown.err)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--seqlen", "128"], ["128", "64"]),
        (["--text", "none.txt"], ["none.txt"]),
        (["--tasks", "none.jsonl"], ["none.jsonl"]),
    ],
)
def test_what_eval_refuses(run: Bittern, model: Path, text: Path, options: list[str], parts: list[str]) -> None:
    fails(run("eval", model, "--text", text, "--seqlen", 32, "--windows", 2, *options), 1, *parts)


def test_inspect_as_text_and_as_json(run: Bittern, model: Path, artifact: Path) -> None:
    for path in (model, artifact):
        shown = run("inspect", path)
        assert shown.code == 0 and "LlamaForCausalLM" in shown.out
        assert isinstance(json.loads(run("inspect", path, "--json").out), dict)


# Processes


@pytest.fixture
def slow_quantize(model: Path, text: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A quantize that has finished its first layer and has eleven or more to go."""
    options = ["--group-size", 32, "--dataset", text, "--nsamples", 60, "--seqlen", 64, "--batch-size", 1]
    process = spawn("quantize", model, "-o", tmp_path / "out", *options)
    assert process.stderr is not None
    for begin in ("expected: ", "what outputs count: 1/2", "what outputs count: 2/2"):
        assert process.stderr.readline().startswith(begin)
    assert " 1/14 " in f" {process.stderr.readline()}"
    yield process
    process.kill()
    process.communicate()


def test_a_kill_leaves_nothing_that_looks_finished(slow_quantize: subprocess.Popen[str], tmp_path: Path) -> None:
    slow_quantize.kill()
    slow_quantize.wait()
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("config.json"))
    assert all(path.name.startswith(("block-", "outputs-")) for path in tmp_path.rglob("*.safetensors"))


def test_an_interrupt_is_one_line_and_leaves_finished_blocks_alone(
    slow_quantize: subprocess.Popen[str], tmp_path: Path
) -> None:
    slow_quantize.send_signal(signal.SIGINT)
    _, err = slow_quantize.communicate(timeout=60)
    assert slow_quantize.returncode == 130
    kept = [path.name for path in tmp_path.rglob("*.safetensors")]  # the first block, if it was finished by then
    how = "; finished blocks are kept: the same command goes on from block 2 of 2" if kept else ""
    assert err.splitlines()[-1] == f"error: interrupted{how}" and "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ([".out.quantizing"] if kept else [])
    assert kept in ([], ["block-00000.safetensors"])


def test_a_closed_pipe_is_no_traceback(model: Path) -> None:
    process = spawn("inspect", model, "--json")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    process.wait(timeout=60)
    assert process.stderr.read() == ""


def test_a_traceback_only_with_verbose(model: Path, tmp_path: Path) -> None:
    for verbose in (False, True):
        process = spawn("convert", tmp_path / "none", "-o", tmp_path / "out", *(["--verbose"] if verbose else []))
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1
        assert ("Traceback" in err) is verbose
        assert err.splitlines()[-1].startswith("error: ")


def test_an_unexpected_failure_is_still_one_line(
    run: Bittern, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bittern.convert.pipeline  # noqa: F401

    def broken(*_: object, **__: object) -> None:
        raise ValueError("two\nlines")

    monkeypatch.setattr(sys.modules["bittern.convert.pipeline"], "convert", broken)
    fails(run("convert", model, "-o", tmp_path / "out"), 1, "ValueError: two lines", "--verbose")


def test_the_options_offer_the_formats_that_there_are() -> None:
    """options.py names them again, so that --help does not wait for torch."""
    from bittern import options
    from bittern.convert.pipeline import FORMATS

    assert options.FORMATS == FORMATS


def test_help_and_version(run: Bittern) -> None:
    assert run("--version").out == f"bittern, version {bittern.__version__}\n"
    for command in cli.commands.commands:
        shown = run(command, "--help")
        assert shown.code == 0 and "--verbose" in shown.out


def test_the_help_says_what_an_output_may_be(run: Bittern) -> None:
    for command in ("convert", "quantize"):
        assert "Folder to write, or .gguf file." in run(command, "--help").out
    assert "Folder to write." in run("uptrain", "--help").out and ".gguf" not in run("uptrain", "--help").out


def test_the_defaults_in_the_help_are_the_real_ones(run: Bittern) -> None:
    from bittern.record import SEQLEN, WINDOWS
    from bittern.writer import MAX_SHARD_SIZE

    shown = " ".join(run("eval", "--help").out.split())
    assert f"in a window. [default: {SEQLEN}, or a shorter context]" in shown
    assert f"start. [default: {WINDOWS}]" in shown
    shown = " ".join(run("convert", "--help").out.split())
    assert "of a folder. [default: 5GB]" in shown and byte_size("5GB") == MAX_SHARD_SIZE


def test_the_default_dataset_in_the_help_is_the_real_one(run: Bittern) -> None:
    from bittern.quantize.pipeline import DEFAULT_DATASET

    assert DEFAULT_DATASET in run("quantize", "--help").out


@pytest.mark.parametrize(
    ("own", "found"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
    ids=["neither", "a count", "a policy"],
)
def test_openmp_is_told_before_torch_is_imported(own: dict[str, str], found: str | None) -> None:
    code = """
import os, sys
from bittern import cli
assert "torch" not in sys.modules
try:
    cli.main(["--version"])
except SystemExit:
    print(os.environ.get("GOMP_SPINCOUNT"), "torch" in sys.modules)
"""
    usual = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", code], env=usual | own, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"{found} False"
