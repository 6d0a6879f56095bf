"""GPTQModel for ../decode.py; runs inside its environment: load (which finds its fastest kernel), decode, prefill."""

from __future__ import annotations

import gc
import time
import traceback
from typing import Any

import torch
import torch_loop
from gptqmodel import BACKEND, GPTQModel
from protocol import serve

# Backend and dtype. GPTQ_TORCH and float16 are several times slower, GPTQ_TORCH_INT8 takes 8 bits only.
KERNELS = [
    ("GPTQ_TORCH_FUSED", torch.bfloat16),
    ("GPTQ_TORCH_FUSED", torch.float32),
    ("GPTQ_TORCH_ATEN", torch.bfloat16),
    ("GPTQ_TORCH_CPU_AVX512", torch.bfloat16),
]

_loaded: dict[str, Any] = {}


def load(path: str, threads: int) -> dict[str, Any]:
    """The artifact with the kernel that decodes fastest; the time is of loading it again, its extension compiled.

    ``tried`` says what each of them reached in tokens/s, or why it does not run here.
    """
    torch.set_num_threads(threads)
    tried: dict[str, float | str] = {}
    speeds = []
    for backend, dtype in KERNELS:
        name = f"{backend} {str(dtype).removeprefix('torch.')}"
        try:
            model = _open(path, backend, dtype)
            torch_loop.decode(model, [1], 8)
            speed = max(torch_loop.decode(model, [1], 32)["decode_tokens_per_s"] for _ in range(2))
        except Exception as error:  # a kernel refuses in many ways
            traceback.print_exc()
            tried[name] = (str(error).strip().splitlines() or [type(error).__name__])[0]
            continue
        tried[name] = speed
        speeds.append((speed, name, backend, dtype))
        del model
        gc.collect()
    if not speeds:
        raise RuntimeError(f"GPTQModel runs {path} with no kernel: {tried}")
    _, name, backend, dtype = max(speeds)
    started = time.perf_counter()
    _loaded["model"] = _open(path, backend, dtype)
    return {"load_s": time.perf_counter() - started, "kernel": name, "tried": tried}


def decode(ids: list[int], new: int) -> dict[str, Any]:
    return torch_loop.decode(_loaded["model"], ids, new)


def prefill(ids: list[int]) -> dict[str, Any]:
    return torch_loop.prefill(_loaded["model"], ids)


def _open(path: str, backend: str, dtype: torch.dtype) -> Any:
    return GPTQModel.load(path, device="cpu", backend=getattr(BACKEND, backend), dtype=dtype).model.eval()


if __name__ == "__main__":
    serve({"load": load, "decode": decode, "prefill": prefill})
