"""AutoModelForCausalLM.from_pretrained in float32 for ../interop.py; runs in the environment of whoever helps it.

That is GPTQModel's for gptq and awq, one with compressed-tensors for that format, and bittern's own for GGUF. The
plain torch kernel is named to gptqmodel, and the model's floating tensors are cast, as gptqmodel_client.py says.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from logits import serve_logits
from transformers import AutoConfig, AutoModelForCausalLM


def load(artifact: str) -> Any:
    """The artifact, a folder or a GGUF file, as transformers gives it."""
    path = Path(artifact)
    if path.is_file():
        return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    method = AutoConfig.from_pretrained(artifact).quantization_config["quant_method"]
    model = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32, **_kernel(method, artifact))
    return torch.nn.Module.float(model)


def _kernel(method: str, artifact: str) -> dict[str, Any]:
    """The argument that names a kernel; transformers takes nothing but that from it."""
    from transformers import AwqConfig, GPTQConfig
    from transformers.utils.quantization_config import AwqBackend

    if method == "gptq":
        bits = AutoConfig.from_pretrained(artifact).quantization_config["bits"]
        return {"quantization_config": GPTQConfig(bits=bits, backend="torch")}
    return {"quantization_config": AwqConfig(backend=AwqBackend("torch_awq"))} if method == "awq" else {}


if __name__ == "__main__":
    serve_logits(load)
