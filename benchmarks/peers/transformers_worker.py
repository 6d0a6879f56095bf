"""transformers in float32 for ../decode.py; runs in bittern's own environment: load, decode, prefill."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch_loop
from protocol import serve
from transformers import AutoModelForCausalLM

_loaded: dict[str, Any] = {}


def load(path: str, threads: int) -> dict[str, Any]:
    """The unquantized checkpoint, as from_pretrained gives it."""
    torch.set_num_threads(threads)
    started = time.perf_counter()
    _loaded["model"] = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)  # in evaluation mode
    return {"load_s": time.perf_counter() - started}


def decode(ids: list[int], new: int) -> dict[str, Any]:
    return torch_loop.decode(_loaded["model"], ids, new)


def prefill(ids: list[int]) -> dict[str, Any]:
    return torch_loop.prefill(_loaded["model"], ids)


if __name__ == "__main__":
    serve({"load": load, "decode": decode, "prefill": prefill})
