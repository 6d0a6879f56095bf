"""bittern for ../decode.py, by the functions that ``bittern run`` calls: load, decode, prefill, probe."""

from __future__ import annotations

import time
from typing import Any

import torch
import transformers.conversion_mapping  # noqa: F401  (what transformers imports as late as it can: imports, not load)
from protocol import serve
from transformers.models.llama import modeling_llama  # noqa: F401

from bittern.checkpoint import open_checkpoint
from bittern.runtime import native
from bittern.runtime.generate import GenerationOptions, GenerationResult, generate
from bittern.runtime.load import load as load_model

_loaded: dict[str, Any] = {}


def load(path: str, threads: int, lm_head_bits: int | None, activations: str) -> dict[str, Any]:
    """The artifact and its tokenizer."""
    started = time.perf_counter()
    _loaded["model"] = load_model(
        path, device="cpu", threads=threads, lm_head_bits=lm_head_bits, activations=activations
    )
    with open_checkpoint(path) as checkpoint:
        _loaded["tokenizer"] = checkpoint.tokenizer()
    return {"load_s": time.perf_counter() - started, "native": native.available()}


def decode(ids: list[int], new: int) -> dict[str, Any]:
    """Greedy tokens after ``ids``: the rate is of the ``new`` - 1 tokens after the first, text included."""
    result = _generate(ids, new)
    return {
        "tokens": list(result.token_ids),
        "prefill_s": len(ids) / result.prefill_tokens_per_second,
        "decode_tokens_per_s": result.decode_tokens_per_second,
    }


def prefill(ids: list[int]) -> dict[str, Any]:
    """Prompt tokens over the time to the first new token."""
    return {"tokens_per_s": _generate(ids, 1).prefill_tokens_per_second}


def probe(megabytes: int, threads: int) -> dict[str, Any]:
    """How fast this machine reads that much memory now, GB/s; None without the native extension."""
    return {"gb_per_s": native.read_probe(megabytes, threads) if native.available() else None}


def _generate(ids: list[int], new: int) -> GenerationResult:
    options = GenerationOptions(max_new_tokens=new, ignore_eos=True)
    return generate(_loaded["model"], _loaded["tokenizer"], torch.tensor([ids]), options, _silent)


def _silent(text: str) -> None:
    """Text that nobody reads."""


if __name__ == "__main__":
    serve({"load": load, "decode": decode, "prefill": prefill, "probe": probe})
