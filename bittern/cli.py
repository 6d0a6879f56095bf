"""The commands. Only this module and its progress display print, and only this module exits.

Libraries are imported inside the commands, so that ``bittern --help`` does not wait for torch.
"""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bittern import __version__
from bittern.errors import BitternError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 done, 1 failed, 2 wrong usage, 130 interrupted; an error is one line on stderr."""
    state = {"verbose": False}
    try:
        code = commands.main(arguments, prog_name="bittern", standalone_mode=False, obj=state)
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "bittern"
        code = _fail(f"{error.format_message()} ('{command} --help' shows the usage)", USAGE)
    except click.Abort:
        code = _fail("interrupted", INTERRUPTED)
    except Exception as error:
        if state["verbose"]:
            traceback.print_exc()
        code = _fail(_describe(error), FAILED)
    sys.exit(code or DONE)


def _fail(message: str, code: int) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return code


def _describe(error: Exception) -> str:
    """One line for any exception."""
    if isinstance(error, BitternError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"out of memory: {error}"
    return f"{type(error).__name__}: {error} (unexpected; --verbose shows where)"


def _verbosity(context: click.Context, _: click.Parameter, verbose: bool) -> None:
    """Note --verbose for :func:`main`; without it silence what the libraries say to their developers."""
    context.obj["verbose"] = verbose
    if verbose:
        return
    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


class GroupSize(click.ParamType):
    """``N``, ``-1`` for the whole row, or ``auto``."""

    name = "N|-1|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if isinstance(value, int) or value == "auto":
            return value
        if not re.fullmatch(r"-1|0*[1-9]\d*", value):
            self.fail(f"expected a positive number, -1 for the whole row, or auto, found {value!r}", param, ctx)
        return int(value)


class ByteSize(click.ParamType):
    """A number with an optional unit: ``5GB``, ``500MB``, ``1.5GiB``."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", value)
        if not match or match[2].upper() not in UNITS or float(match[1]) == 0:
            self.fail(f"expected a size such as 5GB, 500MB or 2GiB, found {value!r}", param, ctx)
        return int(float(match[1]) * UNITS[match[2].upper()])


class Regex(click.ParamType):
    """A regular expression over layer names."""

    name = "regex"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            re.compile(value)
        except re.error as error:
            self.fail(f"expected a regular expression, found {value!r}: {error}", param, ctx)
        return str(value)


class LayerBits(click.ParamType):
    """``REGEX=bits:N``, what --layer takes."""

    name = "regex=bits:n"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, int]:
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(.+)=bits:([2348])", value)
        if not match:
            self.fail(f"expected REGEX=bits:N with N one of 8, 4, 3, 2, found {value!r}", param, ctx)
        return Regex().convert(match[1], param, ctx), int(match[2])


Command = Callable[..., None]


def _command(function: Command) -> click.Command:
    """Register a function as a command that also takes --verbose."""
    verbose = click.option(
        "--verbose", is_flag=True, expose_value=False, callback=_verbosity, help="Tracebacks, and what libraries say."
    )
    return commands.command(name=function.__name__.rstrip("_"))(verbose(function))


def _output_options(function: Command) -> Command:
    """The options of the commands that write a checkpoint."""
    for option in (
        click.option("--revision", help="Branch, tag or commit of a Hub id."),
        click.option("--overwrite", is_flag=True, help="Replace an existing output."),
        click.option("--max-shard-size", type=ByteSize(), default="5GB", show_default=True, help="Largest weight file."),
        click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder to write."),
    ):
        function = option(function)
    return function


_device = click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where to compute."
)
_json = click.option("--json", "as_json", is_flag=True, help="One line of JSON on stdout.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="bittern")
def commands() -> None:
    """Shrink a language-model checkpoint to 8, 4, 3 or 2 bits, run it, and see what it kept.

    A source is a folder, a GGUF file or a Hub id.
    """


@_command
@click.argument("source")
@_output_options
@click.option("--dtype", type=click.Choice(["bf16", "fp16", "fp32"]), default="bf16", show_default=True)
@click.option("--clamp", is_flag=True, help="Clamp what fp16 cannot hold, and say how many values that were.")
@_json
def convert(source: str, as_json: bool, **options: Any) -> None:
    """Write SOURCE in another dtype."""
    from bittern.convert.cast import convert as cast
    from bittern.progress import byte_bar

    with byte_bar() as on_tensor:
        summary = cast(source, on_tensor=on_tensor, **options)


@_command
@click.argument("source")
@_output_options
@click.option("--bits", type=click.Choice([8, 4, 3, 2]), default=4, show_default=True)
@click.option(
    "--group-size",
    type=GroupSize(),
    default=128,
    show_default=True,
    help="Input columns that share a scale; -1 is the whole row, auto the largest of 128, 64, 32 that fits every layer.",
)
@click.option("--sym/--asym", default=True, show_default=True, help="Zero in the middle of the grid, or where it is best.")
@click.option("--method", type=click.Choice(["gptq", "rtn"]), default="gptq", show_default=True)
@click.option("--dataset", metavar="D", help="Calibration text: a Hub dataset, a .txt/.jsonl/.parquet/.arrow file, or self.")
@click.option("--nsamples", type=click.IntRange(min=1), default=128, show_default=True, help="Calibration windows.")
@click.option("--seqlen", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens in a window.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--damp-percent", type=float, default=0.01, show_default=True, help="Damping over the mean diagonal of H.")
@click.option("--layer", "layers", type=LayerBits(), multiple=True, help="Other bits for layers whose name matches.")
@click.option("--skip", type=Regex(), multiple=True, help="Leave layers whose name matches unquantized.")
@click.option("--dtype", type=click.Choice(["bf16", "fp16", "fp32"]), help="Dtype of what is not quantized.")
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Windows at a time.")
@click.option("--chat-template", is_flag=True, help="Render the dataset's messages with the model's template.")
@_device
def quantize(source: str, output: Path, **options: Any) -> None:
    """Quantize SOURCE with GPTQ, or by rounding to nearest."""
    from bittern.progress import layer_rows
    from bittern.quantize.pipeline import quantize as run_pipeline

    chosen = {name: value for name, value in options.items() if value is not None}
    with layer_rows() as on_progress:
        manifest = run_pipeline(source, output, on_progress=on_progress, **chosen)
