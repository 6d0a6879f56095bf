"""Logits of an artifact by transformers + gptqmodel or by GPTQModel.load; runs inside GPTQModel's environment.

Two ways for each client:

- ``default``: called with the path alone, so the client picks dtype and kernel (bfloat16 on most machines).
- ``fp32``: float32 arithmetic throughout. GPTQModel's plain torch kernel multiplies codes by the dtype of its
  ``scales`` buffer, which stays float16 whatever was asked for, and so rounds every dequantized weight to float16;
  and GPTQModel.load refuses that kernel in float32. So the model is loaded as the client allows and its floating
  tensors are cast afterwards.

Standard output ends with one JSON line {"kernels": {class: count}, "scales": [dtypes]}.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from gptqmodel import BACKEND, GPTQModel
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, GPTQConfig


def load_with_transformers(artifact: str, arithmetic: str) -> Any:
    """The artifact as AutoModelForCausalLM gives it."""
    if arithmetic == "default":
        return AutoModelForCausalLM.from_pretrained(artifact)
    bits = AutoConfig.from_pretrained(artifact).quantization_config["bits"]
    kernel = GPTQConfig(bits=bits, backend="torch")  # transformers takes nothing but the backend from it
    return AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32, quantization_config=kernel)


def load_with_gptqmodel(artifact: str, arithmetic: str) -> Any:
    """The artifact as GPTQModel.load gives it."""
    if arithmetic == "default":
        return GPTQModel.load(artifact, device="cpu").model
    return GPTQModel.load(artifact, device="cpu", dtype=torch.float16, backend=BACKEND.GPTQ_TORCH).model


def quantized_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in model.modules() if isinstance(getattr(module, "scales", None), torch.Tensor)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("--client", choices=["transformers", "gptqmodel"], required=True)
    parser.add_argument("--arithmetic", choices=["default", "fp32"], required=True)
    parser.add_argument(
        "--ids", type=Path, required=True, help="JSON file: a list of prompts, each a list of token ids"
    )
    parser.add_argument("--output", type=Path, required=True, help="safetensors file: prompt number -> logits")
    arguments = parser.parse_args()

    load = load_with_transformers if arguments.client == "transformers" else load_with_gptqmodel
    model = load(arguments.artifact, arguments.arithmetic).eval()
    if arguments.arithmetic == "fp32":
        torch.nn.Module.float(model)  # transformers forbids model.float() on a quantized model
    prompts = json.loads(arguments.ids.read_text())
    with torch.inference_mode():
        logits = {str(index): model(torch.tensor([ids])).logits[0].float() for index, ids in enumerate(prompts)}
    save_file({name: tensor.contiguous() for name, tensor in logits.items()}, arguments.output)
    layers = quantized_layers(model)
    kernels = Counter(type(layer).__name__ for layer in layers)
    print(json.dumps({"kernels": kernels, "scales": sorted({str(layer.scales.dtype) for layer in layers})}), flush=True)


if __name__ == "__main__":
    main()
