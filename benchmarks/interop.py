"""Do other runtimes compute what bittern computes? One table: formats x grids x clients, in differences of logits.

python benchmarks/interop.py --model FOLDER --calibration FILE
python benchmarks/interop.py vLLM llama.cpp --model FOLDER --calibration FILE --grids 4-asym mixed
python benchmarks/interop.py --model FOLDER --calibration FILE --others --write docs/interop.md

Every grid is quantized once and converted to every format; each client then opens each artifact of the formats that it
knows, in its own environment (see peers.py; what is not installed is left out and said so), and its logits on fixed
prompts are held against those of ``bittern.load`` on the same artifact, float32 both. ``bittern``'s own column compares
the converted artifact with the one that it was made of. A cell that ``bittern inspect`` promises has to be within
--tolerance, else the exit status is 1. --others has other tools quantize and compares bittern with their own logits.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peers
from measure import measure

if TYPE_CHECKING:
    from torch import Tensor

PROMPTS = (
    "The capital of France is",
    "Once upon a time, there was a little girl who lived in a house near the forest. One day",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
)
COARSE = {"fp16": 0.1, "rounded weights": 0.1, "8-bit activations": 1.0}  # arithmetic -> the largest difference
GRIDS: Mapping[str, tuple[str, ...]] = {
    **{f"{bits}-{sym}": ("--bits", str(bits), f"--{sym}") for bits in (8, 4, 3, 2) for sym in ("sym", "asym")},
    "mixed": ("--bits", "4", "--layer", r".*layers\.0\.=bits:8"),
    "skipped": ("--bits", "4", "--skip", r".*layers\.1\.mlp\.down_proj"),
}
FORMATS: Mapping[str, dict[str, Any]] = {
    "gptq": {"format": "gptq"},
    "gptq_v2": {"format": "gptq_v2"},
    "compressed-tensors": {"format": "compressed-tensors"},
    # fp32: transformers may dequantize to the dtype of the scales
    "compressed-tensors for transformers": {"format": "compressed-tensors", "target": "transformers", "dtype": "fp32"},
    "awq": {"format": "awq"},
    "gguf": {"format": "gguf"},
    "mlx": {"format": "mlx"},
    "mlx, fp32": {"format": "mlx", "dtype": "fp32"},
}
"""Heading of a table -> what ``bittern.convert`` is told."""


@dataclass(frozen=True)
class Client:
    """A runtime that opens artifacts.

    Attributes:
        script: its worker, a file of ``peers``.
        homes: format -> the peer in whose environment it opens that; "" is bittern's own.
        packages: whose versions count.
        checked: what its cells say, beside the numbers.
    """

    script: str
    homes: Mapping[str, str]
    packages: tuple[str, ...]
    checked: str


_FOLDERS = ("gptq", "gptq_v2", "awq")
_COMPRESSED = ("compressed-tensors", "compressed-tensors for transformers")
CLIENTS: Mapping[str, Client] = {
    "transformers": Client(
        "transformers_client.py",
        {**dict.fromkeys(_FOLDERS, "gptqmodel"), **dict.fromkeys((*_COMPRESSED, "gguf"), "compressedtensors")},
        ("transformers",),
        "with optimum and gptqmodel, compressed-tensors, or gguf, as the format needs",
    ),
    "GPTQModel": Client(
        "gptqmodel_client.py", dict.fromkeys(_FOLDERS, "gptqmodel"), ("gptqmodel", "optimum"), "its plain torch kernel"
    ),
    "auto-gptq": Client(
        "autogptq_client.py",
        dict.fromkeys(("gptq", "gptq_v2"), "autogptq"),
        ("auto-gptq", "transformers"),
        "its plain torch kernel; rope_theta and tied embeddings are mended for it",
    ),
    "vLLM": Client(
        "vllm_client.py",
        dict.fromkeys((*_FOLDERS, *_COMPRESSED), "vllm"),
        ("vllm", "compressed-tensors"),
        "its configuration, its schemes and its weight loaders alone: no GPU here, so none of its kernels ran, and "
        "transformers computed the logits from the weights that it had loaded",
    ),
    "llama.cpp": Client(
        "llamacpp_worker.py",
        {"gguf": "llamacpp"},
        ("llama-cpp-python",),
        "rounds activations to 8 bits; `greedy.py` asks whether it says the same",
    ),
    "mlx": Client(
        "mlx_client.py",
        dict.fromkeys(("mlx", "mlx, fp32", *_FOLDERS, *_COMPRESSED), "mlx"),
        ("mlx", "mlx-lm"),
        "mlx-lm on a CPU; it repacks AWQ and rounds -zero * scale to fp16 there",
    ),
}


@dataclass(frozen=True)
class Cell:
    """What one client made of one artifact.

    Attributes:
        difference: largest absolute difference of a logit from bittern's; None when it failed.
        error: its own words when it failed.
        promised: whether ``bittern inspect`` says that it loads this.
        arithmetic: "fp32", or what is coarser than that, of ``COARSE``.
    """

    difference: float | None
    error: str
    promised: bool
    arithmetic: str = "fp32"

    def right(self, tolerance: float) -> bool:
        """Whether the logits are ours as far as the arithmetic allows; NaN is not."""
        return self.difference is not None and self.difference <= COARSE.get(self.arithmetic, tolerance)

    def fails(self, tolerance: float) -> bool:
        """Whether a promise was broken."""
        return self.promised and not self.right(tolerance)

    def text(self, tolerance: float) -> str:
        said = f"{self.difference:.1e}" if self.difference is not None else self.error
        if self.difference is not None and self.arithmetic != "fp32":
            said += f" ({self.arithmetic})"
        if self.fails(tolerance):
            return f"**FAILS: {said}**"
        if self.difference is not None and not self.promised:
            return f"{said} (not promised)" if self.right(tolerance) else f"wrong: {said}"
        return said


@dataclass
class Workers:
    """The clients' processes: one for each script and environment, started when it is first asked for."""

    options: argparse.Namespace
    running: dict[tuple[str, str], peers.Worker] = field(default_factory=dict)

    def installed(self, home: str) -> bool:
        return Path(self.options.envs / home / "bin" / "python").exists()

    def logits(self, script: str, home: str, artifact: Path, ids: list[list[int]]) -> tuple[list[Tensor], str]:
        """A client's logits and its arithmetic; a process that dies of one artifact is started again for the next.

        Raises:
            RuntimeError: in the client's own words.
        """
        from safetensors.torch import load_file

        log: Path = self.options.work / f"{Path(script).stem}-{home}.log"
        if (script, home) not in self.running:
            threads = {"OMP_NUM_THREADS": str(self.options.threads)}
            self.running[script, home] = peers.Worker(script, peers.interpreter(home, self.options.envs), log, threads)
        worker = self.running[script, home]
        output = self.options.work / "logits.safetensors"
        try:
            answer = worker.ask("logits", artifact=str(artifact), ids=ids, output=str(output))
        except RuntimeError:
            if worker.process.poll() is not None:
                self.running.pop((script, home)).close()
            raise
        found = load_file(output)
        output.unlink()
        return [found[str(index)] for index in range(len(ids))], answer["arithmetic"]

    def close(self) -> None:
        for worker in self.running.values():
            worker.close()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clients", nargs="*", metavar="CLIENT", help=f"some of {', '.join(CLIENTS)}; all")
    parser.add_argument(
        "--model", type=Path, required=True, help="folder of an unquantized checkpoint, the smaller the better"
    )
    parser.add_argument("--calibration", required=True, help="a text file")
    parser.add_argument("--grids", nargs="+", choices=list(GRIDS), default=list(GRIDS))
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--group-size", default="32", help="(%(default)s)")
    parser.add_argument("--others", action="store_true", help="artifacts that other tools quantize, too")
    parser.add_argument("--tolerance", type=float, default=1e-2, help="largest difference (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of every process (%(default)s)")
    parser.add_argument("--envs", type=Path, default=peers.DEFAULT_ENVS, help="the clients' environments (%(default)s)")
    parser.add_argument("--work", type=Path, default=Path("build/interop"), help="artifacts and logs (%(default)s)")
    parser.add_argument("--write", type=Path, help="file for the page, such as docs/interop.md")
    options = parser.parse_args()
    unknown = set(options.clients) - set(CLIENTS)
    if unknown:
        parser.error(f"CLIENT: expected some of {', '.join(CLIENTS)}, found {', '.join(unknown)}")
    options.clients = options.clients or list(CLIENTS)
    options.work.mkdir(parents=True, exist_ok=True)
    options.work, options.envs = options.work.resolve(), options.envs.resolve()
    return options


# Artifacts and our own logits


def quantized(grid: str, options: argparse.Namespace) -> Path:
    """The artifact of a grid that all formats are made of."""
    output: Path = options.work / f"{options.model.name}-{grid}"
    command = [sys.executable, "-m", "bittern", "quantize", options.model, "-o", output, "--overwrite", *GRIDS[grid]]
    command += ["--group-size", options.group_size, "--dataset", options.calibration]
    measure([*command, "--nsamples", "8", "--seqlen", "128"], output.with_suffix(".log"))
    return output


def converted(source: Path, name: str) -> tuple[Path, bool]:
    """``source`` in another format, and whether it had to be rounded.

    Raises:
        BitternError: when the format cannot hold it at all.
    """
    import bittern
    from bittern.errors import BitternError

    output = source.with_name(f"{source.name}-{name.replace(' ', '-')}{'.gguf' if name == 'gguf' else ''}")
    try:
        bittern.convert(source, output, overwrite=True, **FORMATS[name])
        return output, False
    except BitternError:
        bittern.convert(source, output, overwrite=True, allow_inexact=True, **FORMATS[name])
        return output, True


def our_logits(artifact: Path, ids: list[list[int]]) -> list[Tensor]:
    """bittern's logits, (tokens, vocabulary) each, by torch: native kernels round inputs, which would hide trifles."""
    import torch

    from bittern.runtime.load import load

    model = load(artifact, device="cpu", dtype=torch.float32, kernels="torch")
    with torch.inference_mode():
        return [model(input_ids=torch.tensor([prompt])).logits[0] for prompt in ids]


def difference(theirs: Iterable[Tensor], ours: Iterable[Tensor]) -> float:
    """The largest absolute difference; NaN if any is."""
    import torch

    return float(torch.stack([(a - b).abs().max() for a, b in zip(theirs, ours, strict=True)]).max())


def promises(artifact: Path) -> dict[str, bool]:
    """Consumer -> whether bittern says that it loads the artifact."""
    from bittern.inspect import inspect

    return {verdict["consumer"]: verdict["loads"] for verdict in inspect(artifact)["loads"]}


def short(error: str) -> str:
    """The last line of an error, for a cell of a table."""
    lines = [line.strip() for line in error.splitlines() if line.strip()] or ["no message"]
    said = [line for line in lines if "For further information" not in line][-1]  # pydantic points to its manual
    words = said.partition(" [type=")[0].replace("|", "\\|").replace("<", "\\<")
    return words if len(words) <= 120 else words[:117] + "..."


# The tables


def row(
    source: Path, name: str, ids: list[list[int]], source_logits: list[Tensor], workers: Workers
) -> dict[str, Cell | str]:
    """Client -> its cell, of one grid in one format; "format" -> how it was written."""
    from bittern.errors import BitternError

    options = workers.options
    try:
        artifact, inexact = converted(source, name)
    except BitternError as refusal:
        return {"written": f"no: {short(str(refusal))}"}
    ours, promised = our_logits(artifact, ids), promises(artifact)
    cells: dict[str, Cell | str] = {"written": "rounded" if inexact else "exactly"}
    cells["bittern"] = Cell(difference(ours, source_logits), "", True, "rounded weights" if inexact else "fp32")
    for client in clients_of(name, options):
        kind = CLIENTS[client]
        if not workers.installed(kind.homes[name]):
            cells[client] = "not installed"
            continue
        loads = promised.get(client, True)
        try:
            theirs, arithmetic = workers.logits(kind.script, kind.homes[name], artifact, ids)
            cells[client] = Cell(
                difference(theirs, ours),
                "",
                loads,
                "rounded weights" if inexact and arithmetic == "fp32" else arithmetic,
            )
        except RuntimeError as error:
            cells[client] = Cell(None, short(str(error)), loads)
    return cells


def clients_of(name: str, options: argparse.Namespace) -> list[str]:
    """The clients that were asked for and that know a format."""
    return [client for client in options.clients if name in CLIENTS[client].homes]


def tables(options: argparse.Namespace, workers: Workers, ids: list[list[int]]) -> tuple[list[str], list[str]]:
    """The tables as lines of Markdown, and the cells that break a promise."""
    sources = {grid: quantized(grid, options) for grid in options.grids}
    logits = {grid: our_logits(source, ids) for grid, source in sources.items()}
    lines, broken = [], []
    for name in options.formats:
        columns = ["written", "bittern", *clients_of(name, options)]
        lines += [f"## {name}", "", f"| bits | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for grid in options.grids:
            cells = row(sources[grid], name, ids, logits[grid], workers)
            shown = []
            for column in columns:
                cell = cells.get(column, "")
                shown.append(cell if isinstance(cell, str) else cell.text(options.tolerance))
                if isinstance(cell, Cell) and cell.fails(options.tolerance):
                    broken.append(f"{name}, {grid}, {column}: {shown[-1]}")
            lines.append(f"| {grid} | {' | '.join(shown)} |")
            print(f"{name}: {lines[-1]}", flush=True)
        lines.append("")
    return lines, broken


# Artifacts of others


@dataclass(frozen=True)
class Maker:
    """A tool that quantizes.

    Attributes:
        home: its environment.
        script, words: what makes an artifact there.
        client: the worker that computes its logits.
    """

    home: str
    script: str
    words: tuple[str, ...]
    client: str


_GROUP = ("--bits", "4", "--group-size", "32")
MAKERS: Mapping[str, Maker] = {
    "GPTQModel": Maker("gptqmodel", "gptqmodel_quantize.py", _GROUP, "gptqmodel_client.py"),
    "GPTQModel, act-order": Maker("gptqmodel", "gptqmodel_quantize.py", (*_GROUP, "--desc-act"), "gptqmodel_client.py"),
    "GPTQModel, asymmetric": Maker("gptqmodel", "gptqmodel_quantize.py", (*_GROUP, "--asym"), "gptqmodel_client.py"),
    "llm-compressor": Maker("llmcompressor", "llmcompressor_quantize.py", _GROUP, "transformers_client.py"),
    "llm-compressor, asymmetric": Maker(
        "llmcompressor", "llmcompressor_quantize.py", (*_GROUP, "--asym"), "transformers_client.py"
    ),
    "auto-gptq, act-order": Maker("autogptq", "autogptq_quantize.py", (*_GROUP, "--desc-act"), "autogptq_client.py"),
    "auto-gptq, asymmetric": Maker("autogptq", "autogptq_quantize.py", (*_GROUP, "--asym"), "autogptq_client.py"),
}


def others(options: argparse.Namespace, workers: Workers, ids: list[list[int]]) -> tuple[list[str], list[str]]:
    """The table of artifacts that other tools made, and the cells that break the promise."""
    lines = ["## Made by others", "", "| artifact, 4 bits | bittern beside its maker's own logits |", "|---|---|"]
    broken = []
    calibration = options.work / "calibration.json"
    calibration.write_text(json.dumps(calibration_ids(options)))
    for label, maker in MAKERS.items():
        if not workers.installed(maker.home):
            lines.append(f"| {label} | not installed |")
            continue
        output = options.work / f"made-{label.replace(', ', '-')}"
        command: list[str | Path] = [
            peers.interpreter(maker.home, options.envs),
            peers.SCRIPTS / maker.script,
            options.model,
            output,
        ]
        try:
            measure(
                [*command, "--calibration", calibration, *maker.words], output.with_suffix(".log"), peers.ENVIRONMENT
            )
            theirs, _ = workers.logits(maker.client, maker.home, output, ids)
            cell = Cell(difference(theirs, our_logits(output, ids)), "", True)
        except Exception as error:  # whatever goes wrong belongs in the table
            cell = Cell(None, short(str(error)), True)
        lines.append(f"| {label} | {cell.text(options.tolerance)} |")
        print(lines[-1], flush=True)
        broken += [f"made by {label}"] if cell.fails(options.tolerance) else []
    return [*lines, ""], broken


def calibration_ids(options: argparse.Namespace) -> list[list[int]]:
    """Eight windows of 128 tokens from the start of the calibration text."""
    tokens = tokenize(options.model, [Path(options.calibration).read_text()[:20000]])[0]
    return [tokens[start : start + 128] for start in range(0, 8 * 128, 128)]


def tokenize(model: Path, texts: Iterable[str]) -> list[list[int]]:
    from bittern.checkpoint import open_checkpoint
    from bittern.tokenizer import encode

    with open_checkpoint(model) as checkpoint:
        tokenizer = checkpoint.tokenizer()
    return [encode(tokenizer, text) for text in texts]


# The page


EXPLAINED = """\
A number is the largest absolute difference of a logit between the client and `bittern.load` on the same artifact, both
in float32 and ours with torch's operations, over {prompts} prompts; up to {tolerance:g} passes. Words are the client's
own when it refused. The column bittern compares our runtime on the converted artifact with the one that it came from.

- `rounded`: the format cannot hold the grid exactly, and `--allow-inexact` was given.
- What is coarser than float32 says so in its cell and passes up to {coarse}.
- `not promised` works and `wrong` loads without an error; `bittern inspect` promises neither.
- `mixed` is 4 bits with one block at 8, `skipped` is 4 bits with one matrix left as floats, both symmetric.

Group size {group}, of {model}."""


def page(options: argparse.Namespace, workers: Workers, tables: Iterable[str]) -> Iterator[str]:
    """docs/interop.md, line by line."""
    from bittern import __version__

    yield from ("# What other runtimes compute from our artifacts", "")
    machine = f"{os.cpu_count()} cores ({platform.machine()})"
    yield f"Made by `{command()}` on {datetime.date.today()}, {machine}, bittern {__version__}."
    yield ""
    yield from EXPLAINED.format(
        prompts=len(PROMPTS),
        tolerance=options.tolerance,
        coarse=", ".join(f"{allowed:g} ({arithmetic})" for arithmetic, allowed in COARSE.items()),
        group=options.group_size,
        model=options.model.name,
    ).splitlines()
    yield ""
    for name in options.clients:
        client = CLIENTS[name]
        homes = dict.fromkeys(home for home in client.homes.values() if workers.installed(home))
        found = "; ".join(
            dict.fromkeys(peers.versions(peers.interpreter(home, options.envs), client.packages) for home in homes)
        )
        yield f"- {name} ({found or 'not installed'}): {client.checked}."
    yield ""
    yield from tables


def command() -> str:
    """This command as somebody else would give it: folders of this machine shortened to their names."""
    words, hidden = [], False
    for word in sys.argv[1:]:
        if word in ("--envs", "--work"):
            hidden = True
        elif hidden:
            hidden = False
        else:
            words.append(Path(word).name if word.startswith("/") else word)
    return " ".join(["python benchmarks/interop.py", *words])


def main() -> None:
    options = arguments()
    ids = tokenize(options.model, PROMPTS)
    workers = Workers(options)
    try:
        lines, broken = tables(options, workers, ids)
        if options.others:
            more, unkept = others(options, workers, ids)
            lines, broken = [*lines, *more], [*broken, *unkept]
        text = "\n".join(page(options, workers, lines)).rstrip() + "\n"
    finally:
        workers.close()
    if options.write:
        options.write.write_text(text)
    else:
        print(text)
    for promise in broken:
        print(f"broken promise: {promise}", file=sys.stderr)
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
