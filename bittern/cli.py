"""The commands. Only this module and its progress display print, and only this module exits.

Libraries are imported inside the commands, so that ``bittern --help`` does not wait for torch.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from bittern import __version__
from bittern.errors import AlsoFailed, BitternError, describe, notes_of, printable
from bittern.options import (
    DTYPE,
    FORMATS,
    GENERATION,
    NEW_TOKENS,
    Command,
    device_option,
    format_option,
    generation_options,
    json_option,
    lenient,
    load_options,
    output_option,
    output_options,
    push_options,
    quantize_options,
    seqlen_option,
    target_option,
    uptrain_options,
    verbose_option,
)
from bittern.runtime import MOST_THREADS, wait_briefly

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from bittern.runtime.generate import GenerationOptions, GenerationResult

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 done, 1 failed, 2 wrong usage, 130 interrupted; an error is one line on stderr."""
    wait_briefly()
    state = {"verbose": False}
    try:
        code = commands.main(arguments, prog_name="bittern", standalone_mode=False, obj=state)
    except click.UsageError as error:
        command, code = error.ctx.command_path if error.ctx else "bittern", USAGE
        if isinstance(error, click.exceptions.NoArgsIsHelpError):
            _say(error.format_message())
        else:
            _fail(f"{error.format_message()} ('{command} --help' shows the usage)", USAGE)
    except click.Abort as error:
        code = _fail("; ".join(["interrupted", *notes_of(error.__cause__)]), INTERRUPTED)
    except Exception as error:
        if state["verbose"]:
            traceback.print_exc()
        code = FAILED if isinstance(error, AlsoFailed) else _fail(describe(error), FAILED)
    _leave(code or DONE)


def _leave(code: int) -> NoReturn:
    """End this process with an exit code; under torchrun at once, without the interpreter's own end.

    Threads of gloo drop the last tensors when they get to it, and need the GIL for that: one that asks an interpreter
    for it that is ending aborts the process, after all was done (docs/log.md).
    """
    if int(os.environ.get("WORLD_SIZE") or 1) == 1:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _fail(message: str, code: int) -> int:
    print("error: " + printable(" ".join(message.split())), file=sys.stderr)
    return code


def _command(function: Command) -> click.Command:
    """Register a function as a command that also takes --verbose."""
    return commands.command(name=function.__name__.rstrip("_"))(verbose_option(function))


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="bittern")
def commands() -> None:
    """Shrink a language-model checkpoint to 8, 4, 3 or 2 bits, run it, and see what it kept.

    A source is a folder, a GGUF file or a Hub id.
    """


@_command
@click.argument("source")
@output_options("Folder to write, or .gguf file.")
@format_option(FORMATS, "safetensors, plain floats")
@target_option
@click.option(
    "--dtype", type=DTYPE, help="Of floats.  [default: bf16 of floats that become safetensors, else as they are]"
)
@click.option("--allow-inexact", is_flag=True, help="Round what the format cannot hold exactly, and say by how much.")
@click.option("--clamp", is_flag=True, help="Clamp what fp16 cannot hold, and say how many values that were.")
@json_option
def convert(source: str, as_json: bool, **options: Any) -> None:
    """Write SOURCE in another dtype or format, without quantizing anything."""
    from bittern.convert.pipeline import convert as run_pipeline
    from bittern.progress import conversion, share_bar

    with share_bar("converting") as advance:
        summary = run_pipeline(source, on_progress=lambda _, done, total: advance(done, total), **options)
    found = summary.to_dict()
    print(json.dumps(found) if as_json else conversion(summary))
    for note in found.get("notes", ()):
        print(f"note: {note}", file=sys.stderr)


@_command
@click.argument("source")
@output_options("Folder to write, or .gguf file.")
@quantize_options
@device_option
@json_option
def quantize(source: str, output: Path, as_json: bool, **options: Any) -> None:
    """Quantize SOURCE with GPTQ, or by rounding to nearest. Runs under torchrun too."""
    from bittern import progress
    from bittern.quantize.pipeline import quantize as run_pipeline

    # What was not given is left to the function, the one place that knows its defaults.
    chosen = {name: value for name, value in options.items() if value is not None}
    with progress.layer_rows() as on_progress:
        chosen |= {
            "on_progress": on_progress,
            "on_note": lambda note: _say(f"note: {note}"),
            "on_prediction": lambda prediction: _say(progress.expected(prediction)),
            "on_measured": progress.measured_row,
            "on_weighed": progress.weighed_row,
            "on_sampled": progress.sampled_row,
            "on_point": lambda point: _say(progress.point_row(point)),
        }
        found = run_pipeline(source, output, **chosen)
    if not found:  # a process of torchrun that only helped
        return
    for note in found["notes"]:
        _say(f"note: {note}")
    told = progress.preflight(found) if options["dry_run"] else f"{output}: {progress.quantization(found)}"
    print(json.dumps(found) if as_json else told)


@_command
@click.argument("source")
@output_options("Folder to write.")
@uptrain_options
@device_option
def uptrain(source: str, output: Path, **options: Any) -> None:
    """Give SOURCE fewer key-value heads, and train it back. Runs under torchrun too."""
    from bittern.progress import block_row, point_row, sampled_row, uptraining
    from bittern.uptrain.pipeline import uptrain as run_pipeline

    chosen = {name: value for name, value in options.items() if value is not None}
    chosen["on_block"] = lambda event: _say(block_row(event))
    chosen |= {"on_progress": lambda event: _say(point_row(event)), "on_sampled": sampled_row}
    manifest = run_pipeline(source, output, **chosen)
    if manifest is None:  # a process of torchrun that only helped
        return
    for note in manifest["notes"]:
        _say(f"note: {note}")
    print(f"{output}: {uptraining(manifest)}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@_command
@click.argument("model")
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    help="Text to continue; repeatable. Without it: stdin, or a chat when stdin is a terminal.",
)
@generation_options
@load_options
@json_option
def run(model: str, prompts: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Continue prompts, or chat, with MODEL: an artifact or an unquantized checkpoint."""
    from bittern.report import peak_memory
    from bittern.runtime.generate import GenerationOptions, generate, generate_batch
    from bittern.tokenizer import check_text

    choices = GenerationOptions(**{name: options.pop(name) for name in GENERATION})
    lenient(sys.stdin)
    chat = not prompts and sys.stdin.isatty() and not as_json
    if not prompts and not chat:
        prompts = (sys.stdin.read().rstrip("\n"),)
    prompts = tuple(check_text(prompt, "--prompt or stdin") for prompt in prompts)
    if "" in prompts:
        raise BitternError("--prompt: expected text, found none there nor on stdin")
    started = time.monotonic()
    live, tokenizer = _load(model, **options)
    load_seconds = time.monotonic() - started
    if chat:
        _say_kernels(live)
        _chat(live, tokenizer, choices)
        return
    ids = [tokenizer(prompt, return_tensors="pt")["input_ids"] for prompt in prompts]
    if len(ids) == 1:
        on_text = (lambda _: None) if as_json else _stream
        results = [generate(live, tokenizer, ids[0], _bounded(live, ids, choices), on_text)]
        print(end="" if as_json else "\n", flush=True)
    else:
        results = generate_batch(live, tokenizer, ids, _bounded(live, ids, choices))
    _say_kernels(live)
    if as_json:
        found = [_figures(result) for result in results]
        more = {"load_seconds": load_seconds, "peak_memory_bytes": peak_memory()}
        print(json.dumps({**(found[0] if len(found) == 1 else {"results": found}), **more}))
    elif len(results) > 1:
        for prompt, result in zip(prompts, results, strict=True):
            print(f"> {prompt}\n{result.text}")


def _say_kernels(model: PreTrainedModel) -> None:
    """What computed, and what it leaves out; after the work, for an error is the only line on stderr."""
    from bittern.runtime.generate import not_honoured

    if names := not_honoured(model):
        print(f"note: generation_config.json: {', '.join(names)}: not honoured", file=sys.stderr)
    print(f"kernels: {vars(model)['kernels']}", file=sys.stderr)


def _figures(result: GenerationResult) -> dict[str, Any]:
    from dataclasses import asdict

    return {name: value for name, value in asdict(result).items() if name not in ("token_ids", "finish_reason")}


def _load(
    source: str, dtype: str | None = None, threads: int | None = None, **place: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer."""
    from bittern.checkpoint import open_checkpoint
    from bittern.convert.cast import DTYPES
    from bittern.runtime.load import load

    if threads is not None:
        import torch

        torch.set_num_threads(threads)  # of what the native kernels do not compute
    with open_checkpoint(source, place.get("revision")) as checkpoint:
        tokenizer = checkpoint.tokenizer()
    return load(source, dtype=DTYPES[dtype] if dtype else None, threads=threads, **place), tokenizer


def _bounded(model: PreTrainedModel, prompts: Sequence[Tensor], options: GenerationOptions) -> GenerationOptions:
    """Without --max-new-tokens: what the context holds beside the longest prompt, and NEW_TOKENS at most."""
    from dataclasses import replace

    from bittern.runtime.generate import room_beside

    if options.max_new_tokens is not None:
        return options
    longest = max(ids.shape[-1] for ids in prompts)
    return replace(options, max_new_tokens=room_beside(model, longest, NEW_TOKENS))


def _stream(text: str) -> None:
    print(text, end="", flush=True)


def _chat(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: GenerationOptions) -> None:
    """Answer what is typed until the end of input; a line that cannot be answered costs that line alone."""
    import readline  # noqa: F401  (input() edits lines once it is imported)

    from bittern.runtime.chat import Chat
    from bittern.tokenizer import check_text

    if tokenizer.chat_template is None:
        print("note: this model has no chat template; each line is continued as plain text", file=sys.stderr)
    chat = Chat(model, tokenizer, options, NEW_TOKENS)
    while True:
        try:
            line = check_text(input("> "), "what was typed")
            if line.strip():
                forgotten = chat.answer(line, _stream)
                print(flush=True)
                if forgotten:
                    print("note: the context is full: the oldest turns are forgotten", file=sys.stderr)
        except EOFError:
            print()
            return
        except BitternError as error:
            print(f"error: {error}", file=sys.stderr)


@_command
@click.argument("model")
@click.option("--text", type=click.Path(path_type=Path), help="Text to predict.")
@seqlen_option(1024)
@click.option("--windows", type=click.IntRange(min=1), help="Windows, from the text's start.  [default: 64]")
@click.option("--bos", is_flag=True, help="Begin every window with BOS, without which Gemma predicts badly.")
@click.option("--against", metavar="BASE", help="Also what this model is worth, and how far from it MODEL is.")
@click.option("--tasks", type=click.Path(path_type=Path), multiple=True, help="File of requests. Repeatable.")
@click.option("--limit", type=click.IntRange(min=1), help="Questions of a task, from the first.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Windows, or requests, at a time (1, and 8).")
@click.option("--record", is_flag=True, help="Also put the figures into the artifact's manifest, for its report.")
@load_options
@json_option
def eval_(model: str, record: bool, as_json: bool, **options: Any) -> None:
    """Perplexity of MODEL on a text, multiple-choice tasks, and how far both are from a base."""
    from dataclasses import asdict

    from bittern.progress import figures, share_bar
    from bittern.record import check_recordable, finite, measure
    from bittern.record import record as put

    if options["text"] is None and not options["tasks"]:
        raise click.UsageError("expected --text, --tasks or both")
    files = check_recordable(model) if record else {}
    found = measure(_load, share_bar, model, **options)
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"kernels: {found.kernels}", file=sys.stderr)
    text = {} if found.text is None else asdict(found.text)
    if as_json:
        shown = [json.dumps({"model": model, **finite(text), "tasks": [finite(each) for each in found.tasks]})]
    else:
        shown = [figures(each) for each in ([text] if text else []) + found.tasks]
    print("\n".join(shown))
    if record:  # last: what was measured is shown whatever becomes of the file
        put(model, found.entries, files)


@_command
@click.argument("path")
@click.option("--revision", help="Branch, tag or commit of a Hub id.")
@json_option
def inspect(path: str, revision: str | None, as_json: bool) -> None:
    """What is in a checkpoint, from its headers alone."""
    from bittern.inspect import inspect as look
    from bittern.progress import line, story_lines

    found = look(path, revision)
    if as_json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        if name not in ("loads", "manifest"):
            print(printable(f"{name.replace('_', ' '):<20} {line(value)}"))
    for told in story_lines(found["manifest"]):
        print(printable(told))
    for verdict in found["loads"]:
        answer = "loads it" if verdict["loads"] else "does not load it"
        print(printable(f"{verdict['consumer']:<20} {answer}: {verdict['reason']}"))


@_command
@click.argument("path")
@click.option("--against", metavar="SRC", help="What it was made of: also compare names, values and logits with it.")
@click.option("--revision", help="Branch, tag or commit of a Hub id: SRC, without it PATH.")
@click.option("--logits/--no-logits", default=True, show_default=True, help="Run the models, each whole in fp32.")
@click.option("--prompt", help="Text to run them on instead of three short ones.")
@click.option("--threads", type=click.IntRange(1, MOST_THREADS), help="CPU threads.  [default: those of torch]")
@json_option
def verify(path: str, as_json: bool, **options: Any) -> int:
    """Check that PATH is whole, and is still what it was made of. Exits with 1 when a check fails."""
    from bittern.progress import share_bar
    from bittern.verify import verify as check

    with share_bar("verifying") as advance:
        found = check(path, on_step=lambda _, done, total: advance(done, total), **options)
    if as_json:
        print(json.dumps(found.to_dict()))
    else:
        for each in found.checks:
            print(f"{_ANSWERS[each.passed]:<8} {each.name:<16} {each.detail}")
    return DONE if found.passed else FAILED


@_command
@click.argument("artifact")
@output_option("[default: report.html]", default="report.html")
@click.option("--beside", metavar="ART", multiple=True, help="Also compare with this artifact. Repeatable.")
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
@json_option
def report(artifact: str, output: Path, beside: tuple[str, ...], overwrite: bool, as_json: bool) -> None:
    """Write a page that tells what was done to ARTIFACT and what it kept, from its manifest alone."""
    from bittern.page.page import write_page
    from bittern.progress import size

    charts = write_page(artifact, output, beside=beside, overwrite=overwrite)
    found = {"output": str(output), "bytes": output.stat().st_size, "charts": charts}
    print(json.dumps(found) if as_json else f"{output}: {len(charts)} charts, {size(output.stat().st_size)}")


_ANSWERS = {True: "ok", False: "FAILED", None: "skipped"}


@_command
@click.argument("artifact")
@click.argument("repo")
@push_options
@json_option
def push(artifact: str, repo: str, as_json: bool, **options: Any) -> None:
    """Publish ARTIFACT with its model card as REPO (org/name) on the Hub."""
    from bittern.progress import publication, share_bar
    from bittern.push import push as run_push

    with share_bar("checking") as advance:
        summary = run_push(artifact, repo, on_step=advance, **options)
    for note in [*summary.notes, *(f"{name} is not pushed: no part of the artifact" for name in summary.left_out)]:
        print(f"note: {note}", file=sys.stderr)
    if as_json:
        print(json.dumps(summary.to_dict()))
        return
    print(publication(summary), file=sys.stderr if options["dry_run"] else sys.stdout)
    if options["dry_run"]:
        print(summary.card, end="")


@_command
@output_option("A new folder that keeps the artifacts.")
def demo(output: Path | None) -> None:
    """Quantize the embedded model at 8, 4, 3 and 2 bits and show what each keeps. Needs no network."""
    from rich.console import Console

    from bittern.demo.demo import demo_table, run_demo

    result = run_demo(output, lambda line: print(line, file=sys.stderr, flush=True))
    Console().print(demo_table(result))
    print(f'\nThe 4-bit artifact goes on from "{result.prompt}":\n{result.prompt}{result.written}')
    print(f"\n{result.seconds:.0f} s")
