"""What the clients of ../interop.py share: a request for logits, and what it is to find a quantized layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from protocol import serve
from safetensors.torch import save_file


def serve_logits(load: Callable[[str], Any]) -> None:
    """Answer requests {"command": "logits", "artifact", "ids", "output"} until the input ends.

    ``load`` takes the artifact's folder or file and gives a torch model of transformers' interface. Its logits on each
    list of ``ids`` go to the safetensors file ``output``, float32 (tokens, vocabulary) by number. The answer is
    {"kernels": what computed the quantized layers, "arithmetic": in which precision}.
    """

    def logits(artifact: str, ids: list[list[int]], output: str) -> dict[str, Any]:
        model = load(artifact)
        with torch.inference_mode():
            found = [model(input_ids=torch.tensor([prompt])).logits[0].float() for prompt in ids]
        save_file({str(index): tensor.contiguous() for index, tensor in enumerate(found)}, output)
        names = kernels(model)
        # GPTQModel's plain kernel for AWQ takes nothing but 16 bits, whatever the dtype of its buffers and inputs.
        return {"kernels": names, "arithmetic": "fp16" if "AwqTorchLinear" in names else "fp32"}

    torch.set_num_threads(1)
    serve({"logits": logits})


def kernels(model: torch.nn.Module) -> str:
    """The classes of the quantized layers and how many of each."""
    if hasattr(model, "kernels"):
        return str(model.kernels)
    marks = ("scales", "weight_scale")
    layers = [
        layer for layer in model.modules() if any(isinstance(getattr(layer, m, None), torch.Tensor) for m in marks)
    ]
    counts = Counter(type(layer).__name__ for layer in layers)
    return ", ".join(f"{count} {name}" for name, count in counts.items())
