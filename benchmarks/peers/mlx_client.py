"""mlx-lm on a CPU in float32 for ../interop.py; runs inside its own environment, which has no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.utils import load_model
from protocol import serve


def logits(artifact: str, ids: list[list[int]], output: str) -> dict[str, Any]:
    """What logits.py answers, for a model of mlx."""
    mx.set_default_device(mx.cpu)
    model, _ = load_model(Path(artifact))
    floats = (mx.float16, mx.bfloat16)
    model.update(
        tree_map(lambda array: array.astype(mx.float32) if array.dtype in floats else array, model.parameters())
    )
    found = {str(index): model(mx.array([prompt]))[0] for index, prompt in enumerate(ids)}
    mx.save_safetensors(output, found)
    layers = [layer for _, layer in model.named_modules() if type(layer).__name__.startswith("Quantized")]
    stated = json.loads((Path(artifact) / "config.json").read_text())["quantization_config"]
    awq = stated.get("quant_method") == "awq"  # which it repacks with biases of 16 bits
    return {"kernels": f"{len(layers)} QuantizedLinear", "arithmetic": "fp16" if awq else "fp32"}


if __name__ == "__main__":
    serve({"logits": logits})
