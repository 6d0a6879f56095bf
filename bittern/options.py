"""What options of several commands look like, and how their values are read."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import click

Command = Callable[..., None]

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
DTYPE = click.Choice(["bf16", "fp16", "fp32"])


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


def regex(value: str) -> str:
    """A regular expression over layer names."""
    try:
        re.compile(value)
    except re.error as error:
        raise click.BadParameter(f"expected a regular expression, found {value!r}: {error}") from error
    return value


def layer_bits(value: str) -> tuple[str, int]:
    """``REGEX=bits:N``, what --layer takes."""
    match = re.fullmatch(r"(.+)=bits:([2348])", value)
    if not match:
        raise click.BadParameter(f"expected REGEX=bits:N with N one of 8, 4, 3, 2, found {value!r}")
    return regex(match[1]), int(match[2])


device_option = click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where to compute."
)
json_option = click.option("--json", "as_json", is_flag=True, help="One line of JSON on stdout.")


def output_options(function: Command) -> Command:
    """The options of the commands that write a checkpoint."""
    for option in (
        click.option("--revision", help="Branch, tag or commit of a Hub id."),
        click.option("--overwrite", is_flag=True, help="Replace an existing output."),
        click.option(
            "--max-shard-size",
            type=byte_size,
            metavar="SIZE",
            default="5GB",
            show_default=True,
            help="Largest weight file.",
        ),
        click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder to write."),
    ):
        function = option(function)
    return function


def load_options(function: Command) -> Command:
    """The options of the commands that load a model whole."""
    for option in (
        device_option,
        click.option("--dtype", type=DTYPE, help="Dtype to compute in."),
        click.option("--revision", help="Branch, tag or commit of a Hub id."),
    ):
        function = option(function)
    return function
