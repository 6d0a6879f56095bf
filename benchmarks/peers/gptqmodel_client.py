"""GPTQModel.load for ../interop.py; runs inside GPTQModel's environment.

Its plain torch kernel multiplies codes by the dtype of its ``scales`` buffer, which stays float16 whatever was asked
for and so rounds every dequantized weight to float16, and GPTQModel.load refuses that kernel in float32. So the model
is loaded as the client allows and its floating tensors are cast afterwards. The kernel that it takes by itself in
float32 is no help: it is wrong for asymmetric 4-bit artifacts, GPTQModel's own included.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from gptqmodel import BACKEND, GPTQModel
from logits import serve_logits


def load(artifact: str) -> Any:
    """The artifact with the plain torch kernel, in float32."""
    config = json.loads((Path(artifact) / "config.json").read_text())
    awq = config["quantization_config"]["quant_method"] == "awq"
    backend = BACKEND.AWQ_TORCH if awq else BACKEND.GPTQ_TORCH
    model = GPTQModel.load(artifact, device="cpu", dtype=torch.float16, backend=backend).model.eval()
    return torch.nn.Module.float(model)  # transformers forbids model.float() on a quantized model


if __name__ == "__main__":
    serve_logits(load)
