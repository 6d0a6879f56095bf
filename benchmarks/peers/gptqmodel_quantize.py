"""Quantize a model with GPTQModel; runs inside GPTQModel's own environment, see ../peers.py.

Everything that is not an argument here stays at GPTQModel's default. Standard output ends with one JSON line:
{"load_seconds", "quantize_seconds", "save_seconds"}.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.quantization.config import GPTAQConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="folder of the checkpoint")
    parser.add_argument("output", type=Path, help="folder of the artifact")
    parser.add_argument("--calibration", type=Path, required=True, help="JSON file: a list of lists of token ids")
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--device", default="cpu", help="where to calibrate (%(default)s)")
    parser.add_argument("--asym", action="store_true")
    parser.add_argument("--desc-act", action="store_true")
    parser.add_argument("--mse", type=float, help="search the scale; the power of the error, 2.4 in its documentation")
    parser.add_argument("--damp-percent", type=float)
    parser.add_argument("--dtype", default="auto", help="of the model while it is calibrated (%(default)s)")
    parser.add_argument("--gptaq", type=float, metavar="ALPHA", help="GPTAQ, 0.25 in its documentation")
    arguments = parser.parse_args()

    options: dict[str, Any] = {}
    if arguments.asym:
        options["sym"] = False
    if arguments.desc_act:
        options["desc_act"] = True
    for name in ("mse", "damp_percent"):
        if getattr(arguments, name) is not None:
            options[name] = getattr(arguments, name)
    if arguments.gptaq is not None:
        options["gptaq"] = GPTAQConfig(alpha=arguments.gptaq)
    samples = json.loads(arguments.calibration.read_text())
    checkpoint, output = str(arguments.model.resolve()), arguments.output.resolve()
    os.chdir(output.parent)  # GPTQModel leaves a folder of logs where it is run
    calibration = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in samples]

    started = time.perf_counter()
    config = QuantizeConfig(bits=arguments.bits, group_size=arguments.group_size, **options)
    dtype = arguments.dtype if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    model = GPTQModel.load(checkpoint, config, device=arguments.device, dtype=dtype)
    loaded = time.perf_counter()
    model.quantize(calibration)
    quantized = time.perf_counter()
    model.save(str(output))
    saved = time.perf_counter()
    seconds = {
        "load_seconds": loaded - started,
        "quantize_seconds": quantized - loaded,
        "save_seconds": saved - quantized,
    }
    print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main()
