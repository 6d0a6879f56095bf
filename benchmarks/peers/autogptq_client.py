"""auto-gptq 0.7.1 for ../interop.py; runs inside its own environment, with transformers 4.40.

What a user has to mend there is mended here: tied embeddings, which it leaves as zeros, are copied by hand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from auto_gptq import AutoGPTQForCausalLM
from logits import serve_logits
from safetensors import safe_open


def load(artifact: str) -> Any:
    """The artifact with its plain torch kernel, in float32."""
    model = AutoGPTQForCausalLM.from_quantized(
        artifact,
        device="cpu",
        use_triton=False,
        disable_exllama=True,
        disable_exllamav2=True,
        torch_dtype=torch.float32,
    ).model.eval()
    if model.config.tie_word_embeddings:
        (weights,) = Path(artifact).glob("*.safetensors")
        with safe_open(weights, "pt") as file:
            model.get_input_embeddings().weight.data = file.get_tensor("model.embed_tokens.weight")
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    return torch.nn.Module.float(model)


if __name__ == "__main__":
    serve_logits(load)
