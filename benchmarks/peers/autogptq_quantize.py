"""Quantize a model with auto-gptq 0.7.1; runs inside its own environment, see ../peers.py.

It asks for CUDA although nothing here needs it, so the model is handed to its class and its device renamed. Its
transformers wants rope_theta at the top level of config.json and gets it by hand.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from auto_gptq import BaseQuantizeConfig
from auto_gptq.modeling import _base
from auto_gptq.modeling.auto import GPTQ_CAUSAL_LM_MODEL_MAP
from transformers import AutoConfig, AutoModelForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="folder of the checkpoint")
    parser.add_argument("output", type=Path, help="folder of the artifact")
    parser.add_argument("--calibration", type=Path, required=True, help="JSON file: a list of lists of token ids")
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--asym", action="store_true")
    parser.add_argument("--desc-act", action="store_true")
    arguments = parser.parse_args()

    samples = json.loads(arguments.calibration.read_text())
    examples = [{"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids))} for ids in samples]
    grid = BaseQuantizeConfig(
        bits=arguments.bits, group_size=arguments.group_size, sym=not arguments.asym, desc_act=arguments.desc_act
    )
    config = AutoConfig.from_pretrained(arguments.model)
    config.rope_theta = getattr(config, "rope_parameters", {}).get("rope_theta", config.rope_theta)
    plain: Any = AutoModelForCausalLM.from_pretrained(arguments.model, config=config, torch_dtype=torch.float32)
    model = GPTQ_CAUSAL_LM_MODEL_MAP[config.model_type](plain.eval(), False, grid)
    _base.CUDA_0 = torch.device("cpu")  # where it moves the blocks
    torch.cuda.synchronize = lambda *_: None  # called whatever the device
    model.quantize(examples, use_triton=False, cache_examples_on_gpu=False)
    model.save_quantized(arguments.output, use_safetensors=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(arguments.model / name, arguments.output / name)


if __name__ == "__main__":
    main()
