"""Quantize a model with llm-compressor's GPTQ; runs inside its own environment, see ../peers.py.

Linear layers except lm_head, in groups; all else stays at llm-compressor's default, among that its static act-order.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder of the checkpoint")
    parser.add_argument("output", help="folder of the artifact")
    parser.add_argument("--calibration", type=Path, required=True, help="JSON file: a list of lists of token ids")
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--device", default="cpu", help="where to calibrate (%(default)s)")
    parser.add_argument("--asym", action="store_true")
    parser.add_argument("--observer", help="what finds the scales, such as mse")
    parser.add_argument("--dampening-frac", type=float)
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # it takes a GPU wherever it sees one
    elif not torch.cuda.is_available():
        parser.error(f"--device {arguments.device}: torch sees no GPU here")

    samples = json.loads(arguments.calibration.read_text())
    data = Dataset.from_list([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in samples])
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    weights = {
        "num_bits": arguments.bits,
        "type": "int",
        "symmetric": not arguments.asym,
        "strategy": "group",
        "group_size": arguments.group_size,
    }
    if arguments.observer is not None:
        weights["observer"] = arguments.observer
    damping = {} if arguments.dampening_frac is None else {"dampening_frac": arguments.dampening_frac}
    group = {"targets": ["Linear"], "weights": weights}
    recipe = GPTQModifier(config_groups={"group_0": group}, ignore=["lm_head"], **damping)
    oneshot(
        model=model,
        dataset=data,
        recipe=recipe,
        max_seq_length=max(map(len, samples)),
        num_calibration_samples=len(samples),
    )
    model.save_pretrained(arguments.output, save_compressed=True)
    AutoTokenizer.from_pretrained(arguments.model).save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
