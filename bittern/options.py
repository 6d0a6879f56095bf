"""What options of several commands look like, and how their values are read."""

from __future__ import annotations

import io
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import click

from bittern.errors import check_utf8
from bittern.runtime import MOST_THREADS

Command = Callable[..., int | None]

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
DTYPE = click.Choice(["bf16", "fp16", "fp32"])
NEW_TOKENS = 256  # that are written at most when no number is given


def group_size(value: str | int) -> int | str:
    """``N``, ``-1`` for the whole row, or ``auto``."""
    if isinstance(value, int) or value == "auto":
        return value
    if not re.fullmatch(r"-1|0*[1-9]\d*", value):
        raise click.BadParameter(f"expected a positive number, -1 for the whole row, or auto, found {value!r}")
    return int(value)


def byte_size(value: str) -> int:
    """A number with an optional unit: ``5GB``, ``500MB``, ``1.5GiB``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", value)
    if not match or match[2].upper() not in UNITS or float(match[1]) == 0:
        raise click.BadParameter(f"expected a size such as 5GB, 500MB or 2GiB, found {value!r}")
    return int(float(match[1]) * UNITS[match[2].upper()])


def lenient(stream: TextIO) -> None:
    """Have a stream keep bytes that are no UTF-8 as lone surrogates, which are judged with the text."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(encoding="utf-8", errors="surrogateescape")


def count(value: str) -> int:
    """A number with an optional k, M or B for thousands, millions or billions: ``2M``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kMB]?)", value)
    if not match:
        raise click.BadParameter(f"expected a number such as 500000, 500k or 2M, found {value!r}")
    return round(float(match[1]) * {"": 1, "k": 10**3, "M": 10**6, "B": 10**9}[match[2]])


def regex(value: str) -> str:
    """A regular expression over layer names."""
    try:
        re.compile(value)
    except re.error as error:
        raise click.BadParameter(f"expected a regular expression, found {value!r}: {error}") from error
    return value


def bits(value: str) -> int | float:
    """8, 4, 3 or 2 for every layer, or an average of them, which has a decimal point."""
    if value in ("8", "4", "3", "2"):
        return int(value)
    if not re.fullmatch(r"\d+\.\d+", value) or not 2 <= float(value) <= 8:
        raise click.BadParameter(f"expected 8, 4, 3, 2, or an average from 2.0 to 8.0 such as 2.5, found {value!r}")
    return float(value)


def layer_bits(value: str) -> tuple[str, int]:
    """``REGEX=bits:N``, what --layer takes."""
    match = re.fullmatch(r"(.+)=bits:([2348])", value)
    if not match:
        raise click.BadParameter(f"expected REGEX=bits:N with N one of 8, 4, 3, 2, found {value!r}")
    return regex(match[1]), int(match[2])


FORMATS = ("safetensors", "gptq", "gptq_v2", "compressed-tensors", "awq", "mlx", "gguf")
TARGET = click.Choice(["transformers", "vllm", "sglang", "gptqmodel", "llama.cpp", "mlx"])
target_option = click.option(
    "--target", type=TARGET, help="Who shall load it: picks the format, and refuses what this one gets wrong."
)
device_option = click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where to compute."
)
json_option = click.option("--json", "as_json", is_flag=True, help="One line of JSON on stdout.")


def seqlen_option(usual: int) -> Callable[[Command], Command]:
    """``--seqlen``; None where it is not given, for only the model knows its context."""
    help = f"Tokens in a window.  [default: {usual}, or a shorter context]"
    return click.option("--seqlen", type=click.IntRange(min=2), help=help)


def format_option(formats: Sequence[str], default: str) -> Callable[[Command], Command]:
    """``--format`` of a command that writes one of ``formats``, and in words what it writes by default."""
    help = f"What to write.  [default: gguf for OUT.gguf, else {default}]"
    return click.option("--format", type=click.Choice(formats), help=help)


def dataset_option(what: str) -> Callable[[Command], Command]:
    """``--dataset``, one or several; None where none is named, for the function knows its default."""
    return click.option(
        "--dataset",
        metavar="D",
        multiple=True,
        callback=lambda _, __, found: found[0] if len(found) == 1 else found or None,
        help=f"{what}: a Hub dataset, a .txt/.jsonl/.parquet/.arrow file (of rows, file#column), or self; repeatable,"
        " the same share of each."
        "  [default: allenai/c4:en]",
    )


def output_option(help: str, **more: Any) -> Callable[[Command], Command]:
    """``-o``: an empty name would be the current folder, and what has one that is no UTF-8 could not be read back."""
    return click.option("-o", "--output", metavar="PATH", callback=_output, help=help, **more)


def _output(_: click.Context, __: click.Parameter, found: str | None) -> Path | None:
    if found == "":
        raise click.BadParameter("expected a name, found none")
    if found is not None:
        check_utf8("output", found)
    return None if found is None else Path(found)


def output_options(what: str) -> Callable[[Command], Command]:
    """The options of a command that writes a checkpoint, and in words what it writes."""

    def add(function: Command) -> Command:
        for option in (
            click.option("--revision", help="Branch, tag or commit of a Hub id."),
            click.option("--overwrite", is_flag=True, help="Replace an existing output."),
            click.option(
                "--max-shard-size",
                type=byte_size,
                metavar="SIZE",
                help="Largest weight file of a folder.  [default: 5GB]",
            ),
            output_option(what, required=True),
        ):
            function = option(function)
        return function

    return add


def quantize_options(function: Command) -> Command:
    """How layers are quantized and on what; the values are arguments of bittern.quantize."""
    for option in (
        click.option("--resume/--no-resume", default=True, show_default=True, help="Go on with a run that was killed."),
        click.option("--dry-run", is_flag=True, help="Say what it would take and who would load it; writes nothing."),
        click.option("--chat-template", is_flag=True, help="Render the dataset's messages with the model's template."),
        click.option(
            "--batch-size", type=click.IntRange(min=1), help="Windows at a time.  [default: what suits the device]"
        ),
        click.option("--dtype", type=DTYPE, help="Dtype of what is not quantized."),
        click.option(
            "--skip", type=regex, metavar="REGEX", multiple=True, help="Leave layers whose name matches unquantized."
        ),
        click.option(
            "--layer",
            "layers",
            type=layer_bits,
            metavar="REGEX=bits:N",
            multiple=True,
            help="Other bits for layers whose name matches.",
        ),
        click.option(
            "--embed-bits", type=click.Choice([8]), help="Pack the embedding too (gguf, mlx); a tied head with it."
        ),
        click.option("--lm-head-bits", type=click.Choice([8]), help="Pack an output head of its own too."),
        click.option(
            "--damp-percent", type=float, help="Damping over the mean diagonal of H.  [default: 0.2; 0.01 at plain]"
        ),
        click.option("--seed", type=click.IntRange(-(2**63), 2**63 - 1), default=0, show_default=True),
        seqlen_option(512),
        click.option(
            "--nsamples", type=click.IntRange(min=1), default=128, show_default=True, help="Calibration windows."
        ),
        dataset_option("Calibration text"),
        target_option,
        format_option(FORMATS[1:], "gptq, asymmetric gptq_v2"),
        click.option(
            "--effort",
            type=click.Choice(["plain", "fast", "best"]),
            default="fast",
            show_default=True,
            help="plain: classic GPTQ; fast: also corrects drift, evens out channels, polishes; best: also weighs "
            "tokens and outputs and trains scales and norms, which takes several times as long.",
        ),
        click.option(
            "--tune-tokens",
            type=count,
            metavar="N",
            help="Tokens of the dataset that --effort best trains on.  [default: 256k]",
        ),
        click.option("--method", type=click.Choice(["gptq", "rtn"]), default="gptq", show_default=True),
        click.option(
            "--sym/--asym", default=True, show_default=True, help="Zero in the middle of the grid, or where it is best."
        ),
        click.option(
            "--group-size",
            type=group_size,
            metavar="N|-1|auto",
            default=128,
            show_default=True,
            help="Input columns that share a scale; -1: the whole row; auto: the largest of 128, 64, 32 that fits "
            "every layer.",
        ),
        click.option(
            "--bits",
            type=bits,
            metavar="8|4|3|2|AVERAGE",
            default="4",
            show_default=True,
            help="Of every layer's codes; an average such as 2.5 gives each layer as many as it needs.",
        ),
    ):
        function = option(function)
    return function


def push_options(function: Command) -> Command:
    """The options of push; their values are arguments of bittern.push.push."""
    for option in (
        click.option("--dry-run", is_flag=True, help="Print the card and what would be sent; needs no network."),
        click.option(
            "--card",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="A model card of your own; its text is kept.",
        ),
        click.option("--license", metavar="ID", help="The licence, such as apache-2.0, where the base's is not known."),
        click.option("--message", help="Of the commit."),
        click.option("--revision", help="Branch to push to; made when it is missing."),
        click.option("--create-pr", is_flag=True, help="Propose the change as a pull request."),
        click.option("--private", is_flag=True, help="Nobody else may see the repository."),
    ):
        function = option(function)
    return function


def load_options(function: Command) -> Command:
    """The options of the commands that load a model whole; their values are arguments of bittern.load."""
    for option in (
        click.option(
            "--kernels",
            type=click.Choice(["auto", "native", "torch"]),
            default="auto",
            show_default=True,
            help="What computes packed layers: auto is native on a CPU where it was built.",
        ),
        click.option("--lm-head-bits", type=click.Choice([8]), help="Pack the output head while loading."),
        click.option(
            "--activations",
            type=click.Choice(["a16", "a8"]),
            default="a16",
            show_default=True,
            help="Bits that native kernels round the inputs of packed layers to.",
        ),
        click.option("--threads", type=click.IntRange(1, MOST_THREADS), help="CPU threads.  [default: those of torch]"),
        device_option,
        click.option("--dtype", type=DTYPE, help="Dtype to compute in."),
        click.option("--revision", help="Branch, tag or commit of a Hub id."),
    ):
        function = option(function)
    return function


def uptrain_options(function: Command) -> Command:
    """How heads become groups, and how the model is trained back; the values are arguments of bittern.uptrain."""
    for option in (
        click.option("--resume/--no-resume", default=True, show_default=True, help="Go on with a run that was killed."),
        click.option("--dtype", type=DTYPE, help="Dtype of the output.  [default: each tensor keeps its own]"),
        click.option("--seed", type=click.IntRange(-(2**63), 2**63 - 1), default=0, show_default=True),
        click.option("--recompute", is_flag=True, help="Activation checkpointing: less memory, a third more time."),
        click.option("--eval-every", type=click.IntRange(min=1), metavar="STEPS", help="[default: a tenth of all]"),
        click.option(
            "--shortlist",
            type=click.IntRange(min=0),
            default=4096,
            show_default=True,
            help="Words to learn the probabilities of at a step, some for all that are rare; 0 for all words.",
        ),
        click.option(
            "--hidden-weight",
            type=click.FloatRange(min=0),
            default=10.0,
            show_default=True,
            help="Of the error of the hidden states after each block, added to the loss.",
        ),
        click.option("--weight-decay", type=click.FloatRange(min=0), default=0.0, show_default=True),
        click.option(
            "--kl-weight",
            type=click.FloatRange(0, 1),
            default=0.9,
            show_default=True,
            help="Share of the KL to the source in the loss, the rest is of next tokens; all of the source's own text.",
        ),
        click.option(
            "--micro-batch", type=click.IntRange(min=1), default=4, show_default=True, help="Windows at once."
        ),
        click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Windows a step."),
        click.option(
            "--lr",
            type=click.FloatRange(min=0, min_open=True),
            help="The largest.  [default: 5e-5, and 3e-4 with mean or first]",
        ),
        click.option(
            "--train",
            type=click.Choice(["blocks", "all", "attention"]),
            default="blocks",
            show_default=True,
            help="What is trained; all: embeddings and head too.",
        ),
        click.option(
            "--text", type=click.Path(), help="Text to measure on.  [default: windows held out of the dataset]"
        ),
        click.option(
            "--sampled",
            type=count,
            default="0",
            metavar="N",
            help="Of --tokens, what the source writes: it goes on where windows of the dataset are cut off.",
        ),
        click.option(
            "--tokens",
            type=count,
            default="0",
            show_default=True,
            metavar="N",
            help="To train on, as 2M; 0: converts only.",
        ),
        seqlen_option(512),
        click.option(
            "--nsamples", type=click.IntRange(min=1), default=128, show_default=True, help="Windows to convert with."
        ),
        dataset_option("Text"),
        click.option(
            "--passes",
            type=click.IntRange(min=0),
            help="Of layer-wise distillation over these windows.  [default: 12, and 0 with mean or first]",
        ),
        click.option(
            "--group",
            type=click.Choice(["similar", "neighbour"]),
            help="Which heads share.  [default: similar, and neighbour with mean or first]",
        ),
        click.option(
            "--init",
            type=click.Choice(["aligned", "mean", "first"]),
            default="aligned",
            show_default=True,
            help="Shared heads in closed form, averaged, or the first of each group.",
        ),
        click.option(
            "--kv-heads", type=click.IntRange(min=1), required=True, metavar="N", help="Of the output; 1: multi-query."
        ),
    ):
        function = option(function)
    return function


GENERATION = (
    *("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "stop", "seed", "ignore_eos"),
    "kv_cache",
)
"""What :func:`generation_options` gives: the fields of GenerationOptions."""


def generation_options(function: Command) -> Command:
    """The options of a command that writes text."""
    for option in (
        click.option(
            "--kv-cache",
            type=click.Choice(["fp32", "bf16", "int8"]),
            help="How layers of full attention keep keys and values.  [default: in the dtype of the computation]",
        ),
        click.option("--ignore-eos", is_flag=True, help="Go on after the end-of-sequence token."),
        click.option("--seed", type=click.IntRange(-(2**63), 2**63 - 1), default=0, show_default=True),
        click.option("--stop", multiple=True, help="End before this text. Repeatable."),
        click.option(
            "--repetition-penalty",
            type=click.FloatRange(min=0, min_open=True),
            help="Of tokens seen before.  [default: the model's, in generation_config.json, else 1.0]",
        ),
        click.option(
            "--top-p", type=click.FloatRange(0, 1, min_open=True), help="Sample among the likeliest of this mass."
        ),
        click.option("--top-k", type=click.IntRange(min=1), help="Sample among the K likeliest tokens."),
        click.option(
            "--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 is greedy."
        ),
        click.option(
            "--max-new-tokens",
            type=click.IntRange(min=1),
            help=f"[default: {NEW_TOKENS}, or what the context holds]",
        ),
    ):
        function = option(function)
    return function


def _verbosity(context: click.Context, _: click.Parameter, verbose: bool) -> None:
    """Note --verbose for :func:`bittern.cli.main`; without it silence what the libraries say to their developers."""
    context.obj["verbose"] = verbose
    if verbose:
        return
    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


verbose_option = click.option(
    "--verbose", is_flag=True, expose_value=False, callback=_verbosity, help="Tracebacks, and what libraries say."
)
