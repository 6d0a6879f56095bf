"""Quantize a model with AutoRound; runs inside its own environment, see ../peers.py.

Symmetric, written as GPTQ; everything that is not an argument here stays at AutoRound's default.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path

import torch
from auto_round import AutoRound


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the checkpoint")
    parser.add_argument("output", type=Path, help="folder of the artifact")
    parser.add_argument("--calibration", type=Path, required=True, help="JSON file: a list of lists of token ids")
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--device", default="cpu", help="where to calibrate (%(default)s)")
    parser.add_argument("--iters", type=int, help="steps of tuning for each block")
    parser.add_argument("--lr", type=float, help="their size")
    parser.add_argument("--alg-ext", action="store_true", help="its extension of the algorithm, SignRoundV2")
    parser.add_argument("--batch-size", type=int, default=8, help="AutoRound's own default (%(default)s)")
    arguments = parser.parse_args()

    samples = torch.tensor(json.loads(arguments.calibration.read_text()))  # (windows, tokens)
    size = arguments.batch_size
    given = {name: getattr(arguments, name) for name in ("iters", "lr")}
    options = {name: value for name, value in given.items() if value is not None}
    checkpoint, output = str(arguments.model.resolve()), arguments.output.resolve()
    os.chdir(output.parent)  # AutoRound leaves a folder of its own where it is run
    tool = AutoRound(
        checkpoint,
        scheme=f"W{arguments.bits}A16",
        group_size=arguments.group_size,
        dataset=[samples[start : start + size] for start in range(0, len(samples), size)],
        nsamples=len(samples),
        seqlen=samples.shape[1],
        batch_size=size,
        device_map=arguments.device,
        enable_alg_ext=arguments.alg_ext,
        **options,
    )
    partial = output.with_name(output.name + ".partial")
    _, written = tool.quantize_and_save(output_dir=str(partial), format="auto_gptq")
    Path(written if isinstance(written, str) else written[0]).rename(output)  # a folder that it names, in ours
    shutil.rmtree(partial, ignore_errors=True)


if __name__ == "__main__":
    main()
