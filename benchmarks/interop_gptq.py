"""Do the other readers of GPTQ artifacts compute what bittern computes? Compares logits, never "it loaded".

python benchmarks/interop_gptq.py ARTIFACT ...
python benchmarks/interop_gptq.py --model FOLDER --calibration FILE --bits 8 4 3 2 --group-size 64

transformers (with optimum and gptqmodel) and GPTQModel.load each open every artifact, in their own environment and a
process a cell, and their logits on fixed prompts are held against those of ``bittern.load``. With fp32 arithmetic no
logit may differ by more than --tolerance, else the exit status is 1. What a client computes when it is called with the
path alone (mostly bfloat16) stands beside it, unjudged. --model makes symmetric and asymmetric artifacts first.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import peers
from measure import measure

if TYPE_CHECKING:
    from torch import Tensor

ENVIRONMENT = "gptqmodel"
CLIENTS = ("transformers", "gptqmodel")
PROMPTS = (
    "The capital of France is",
    "Once upon a time, there was a little girl who lived in a house near the forest. One day",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
)


@dataclass(frozen=True)
class Cell:
    """One artifact in one client.

    Attributes:
        artifact: its folder.
        client: "transformers" or "gptqmodel".
        arithmetic: "fp32", or "default": what the client does when it is called with the path alone.
        kernels: class of the quantized layers -> how many; empty when the client failed.
        difference: largest absolute difference of a logit from bittern's; None when the client failed.
        top1_agreement: share of positions with bittern's most likely token; None when the client failed.
        error: the last line of a client that failed.
    """

    artifact: str
    client: str
    arithmetic: str
    kernels: dict[str, int]
    difference: float | None
    top1_agreement: float | None
    error: str = ""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", nargs="*", help="folders of GPTQ artifacts")
    parser.add_argument("--model", help="folder of an unquantized checkpoint to make artifacts of")
    parser.add_argument("--calibration", help="text for --model")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2], help="for --model")
    parser.add_argument("--group-size", type=int, default=64, help="for --model (%(default)s)")
    parser.add_argument("--tolerance", type=float, default=1e-2, help="largest difference in fp32 (%(default)s)")
    parser.add_argument("--fp32-only", action="store_true", help="leave the clients' defaults out")
    parser.add_argument("--envs", type=Path, default=peers.DEFAULT_ENVS, help="the peers' environments (%(default)s)")
    parser.add_argument("--work", type=Path, default=Path("build/interop"), help="artifacts and logs (%(default)s)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    if bool(options.model) != bool(options.calibration):
        parser.error("--model and --calibration go together")
    if not options.artifacts and not options.model:
        parser.error("expected artifacts, or --model and --calibration")
    return options


def make_artifacts(options: argparse.Namespace) -> list[str]:
    """Artifacts of --model at every number of bits, symmetric and asymmetric, calibrated on few tokens."""
    made = []
    for bits in options.bits:
        for sym in ("sym", "asym"):
            output = options.work / f"{Path(options.model).name}-{bits}bit-{sym}"
            command = [sys.executable, "-m", "bittern", "quantize", options.model, "-o", str(output), "--overwrite"]
            command += ["--bits", str(bits), f"--{sym}", "--group-size", str(options.group_size)]
            command += ["--dataset", options.calibration, "--nsamples", "16", "--seqlen", "256"]
            measure(command, output.with_suffix(".log"))
            made.append(str(output))
    return made


def our_logits(artifact: str, prompts_file: Path) -> list[Tensor]:
    """bittern's fp32 logits on the prompts, (tokens, vocabulary) each; their token ids go to ``prompts_file``."""
    import torch

    import bittern
    from bittern.checkpoint import open_checkpoint
    from bittern.tokenizer import encode

    with open_checkpoint(artifact) as checkpoint:
        tokenizer = checkpoint.tokenizer()
    prompts = [encode(tokenizer, prompt) for prompt in PROMPTS]
    prompts_file.write_text(json.dumps(prompts))
    model = bittern.load(artifact, device="cpu", dtype=torch.float32)
    with torch.inference_mode():
        return [model(input_ids=torch.tensor([prompt])).logits[0] for prompt in prompts]


def compare(
    options: argparse.Namespace, artifact: str, client: str, arithmetic: str, prompts: Path, ours: list[Tensor]
) -> Cell:
    """Run one client on one artifact and hold its logits against ours."""
    import torch
    from safetensors.torch import load_file

    name = f"{Path(artifact).name}-{client}-{arithmetic}"
    logits = options.work / f"{name}.safetensors"
    command: list[str | Path] = [peers.interpreter(ENVIRONMENT, options.envs), peers.SCRIPTS / "gptqmodel_logits.py"]
    command += [artifact, "--client", client, "--arithmetic", arithmetic, "--ids", prompts, "--output", logits]
    try:
        said = measure(command, options.work / f"{name}.log", peers.ENVIRONMENT).output
    except RuntimeError as error:
        return Cell(artifact, client, arithmetic, {}, None, None, str(error).splitlines()[-1])
    theirs = load_file(logits)
    logits.unlink()
    pairs = [(theirs[str(index)], own) for index, own in enumerate(ours)]
    difference = torch.stack([(a - b).abs().max() for a, b in pairs]).max().item()  # NaN if any is
    agreement = sum((a.argmax(-1) == b.argmax(-1)).sum().item() for a, b in pairs) / sum(len(b) for b in ours)
    return Cell(artifact, client, arithmetic, json.loads(said.splitlines()[-1])["kernels"], difference, agreement)


def row(cell: Cell, tolerance: float) -> str:
    """A cell as a line of a Markdown table."""
    kernels = ", ".join(cell.kernels)
    numbers = (
        f"failed: {cell.error} |" if cell.difference is None else f"{cell.difference:.2e} | {cell.top1_agreement:.3f}"
    )
    verdict = "" if cell.arithmetic == "default" else "pass" if passes(cell, tolerance) else "FAIL"
    return f"| {Path(cell.artifact).name} | {cell.client} | {cell.arithmetic} | {kernels} | {numbers} | {verdict} |"


def passes(cell: Cell, tolerance: float) -> bool:
    """Whether a cell holds the promise; NaN does not. A client's defaults are not ours to judge."""
    return cell.arithmetic == "default" or (cell.difference is not None and cell.difference <= tolerance)


def main() -> None:
    options = arguments()
    options.work.mkdir(parents=True, exist_ok=True)
    options.work = options.work.resolve()
    made = make_artifacts(options) if options.model else []
    cells = []
    print("| artifact | client | arithmetic | kernel | max abs diff | top-1 | |\n" + "|---" * 7 + "|")
    for artifact in [*options.artifacts, *made]:
        prompts = options.work / "prompts.json"
        ours = our_logits(artifact, prompts)
        for client in CLIENTS:
            for arithmetic in ("fp32",) if options.fp32_only else ("fp32", "default"):
                cells.append(compare(options, artifact, client, arithmetic, prompts, ours))
                print(row(cells[-1], options.tolerance), flush=True)
    failed = sum(not passes(cell, options.tolerance) for cell in cells)
    judged = sum(cell.arithmetic == "fp32" for cell in cells)
    print(f"\n{judged - failed} of {judged} cells within {options.tolerance} of bittern's logits (fp32 arithmetic)")
    if options.json:
        figures = {"tolerance": options.tolerance, "prompts": PROMPTS, "cells": [asdict(cell) for cell in cells]}
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
