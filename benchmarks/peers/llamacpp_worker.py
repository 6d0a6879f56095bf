"""llama.cpp for ../decode.py, ../interop.py, ../greedy.py and ../quality.py, by llama-cpp-python's low-level API.

Commands: load, decode, prefill, quantize, logits, loss.
"""

from __future__ import annotations

import ctypes
import json
import time
from pathlib import Path
from typing import Any

import llama_cpp as llama
import numpy as np
from protocol import serve

_loaded: dict[str, Any] = {}


@llama.llama_log_callback  # type: ignore[untyped-decorator]
def _keep_log(level: int, text: bytes, _: ctypes.c_void_p) -> None:
    _loaded.setdefault("log", []).append(text.decode(errors="replace"))


def begin() -> None:
    """What llama.cpp wants before anything else."""
    llama.llama_log_set(_keep_log, ctypes.c_void_p())
    llama.llama_backend_init()


def load(path: str, threads: int, context: int) -> dict[str, Any]:
    """Map a GGUF file and make a context of that many tokens.

    ``buffers`` are the weight buffers that the load log names, with their sizes: AMX or a repacked layout shows there.
    """
    started = time.perf_counter()
    model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
    if not model:
        errors = [line for line in _loaded["log"][-15:] if "error" in line]
        raise RuntimeError(f"llama.cpp cannot load {path}:\n{''.join(errors or _loaded['log'][-15:])}")
    params = llama.llama_context_default_params()
    params.n_ctx = params.n_batch = context
    params.n_threads = params.n_threads_batch = threads
    if "context" in _loaded:
        llama.llama_free(_loaded.pop("context"))
        llama.llama_model_free(_loaded.pop("model"))
    _loaded["model"], _loaded["context"] = model, llama.llama_init_from_model(model, params)
    _loaded["vocabulary"] = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    seconds = time.perf_counter() - started
    lines = "".join(_loaded["log"]).splitlines()
    return {
        "load_s": seconds,
        "system": llama.llama_print_system_info().decode(),
        "buffers": [line.partition(":")[2].strip() for line in lines if "model buffer size" in line],
    }


def decode(ids: list[int], new: int) -> dict[str, Any]:
    """Greedy tokens after ``ids``: the first one's time is the prefill's, the rate is of the ``new`` - 1 others."""
    llama.llama_memory_clear(llama.llama_get_memory(_loaded["context"]), True)
    started = time.perf_counter()
    tokens = [_step(ids)]
    decoding = time.perf_counter()
    while len(tokens) < new:
        tokens.append(_step(tokens[-1:]))
    seconds = time.perf_counter() - decoding
    return {"tokens": tokens, "prefill_s": decoding - started, "decode_tokens_per_s": (new - 1) / seconds}


def prefill(ids: list[int]) -> dict[str, Any]:
    """Prompt tokens over the time to the first new token."""
    llama.llama_memory_clear(llama.llama_get_memory(_loaded["context"]), True)
    started = time.perf_counter()
    _step(ids)
    return {"tokens_per_s": len(ids) / (time.perf_counter() - started)}


def quantize(source: str, target: str, kind: str, threads: int) -> dict[str, Any]:
    """Write ``source`` again as ``kind``, such as Q4_0, with all else at llama.cpp's default; F32 dequantizes it."""
    params = llama.llama_model_quantize_default_params()
    params.ftype = llama.LLAMA_FTYPE_ALL_F32 if kind == "F32" else getattr(llama, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.allow_requantize = kind == "F32"
    params.nthread = threads
    started = time.perf_counter()
    failed = llama.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params))
    if failed:
        Path(target).unlink(missing_ok=True)
        raise RuntimeError(f"llama_model_quantize: {failed}:\n{''.join(_loaded['log'][-15:])}")
    return {"quantize_s": time.perf_counter() - started}


def logits(artifact: str, ids: list[list[int]], output: str) -> dict[str, Any]:
    """What logits.py answers: the logits of every position of each prompt, as a safetensors file."""
    load(artifact, threads=1, context=max(map(len, ids)))
    found = [_all_logits(prompt) for prompt in ids]
    header, start = {}, 0
    for index, values in enumerate(found):
        header[str(index)] = {"dtype": "F32", "shape": values.shape, "data_offsets": [start, start + values.nbytes]}
        start += values.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    Path(output).write_bytes(len(text).to_bytes(8, "little") + text + b"".join(values.tobytes() for values in found))
    return {"kernels": "llama.cpp", "arithmetic": "8-bit activations"}


def loss(windows: list[list[int]]) -> dict[str, Any]:
    """Mean negative log-likelihood of all tokens but each window's first."""
    total, count = 0.0, 0
    for window in windows:
        values = _all_logits(window)[:-1].astype(np.float64)
        values -= values.max(-1, keepdims=True)
        chosen = np.take_along_axis(values, np.array(window[1:])[:, None], -1)[:, 0]
        total += float((np.log(np.exp(values).sum(-1)) - chosen).sum())
        count += len(window) - 1
    return {"loss": total / count}


def _all_logits(ids: list[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Logits of every position, float32 (tokens, vocabulary), after emptying the context."""
    context = _loaded["context"]
    llama.llama_memory_clear(llama.llama_get_memory(context), True)
    batch = llama.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for index, token in enumerate(ids):
        batch.token[index], batch.pos[index], batch.logits[index] = token, index, 1
        batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
    failed = llama.llama_decode(context, batch)
    llama.llama_batch_free(batch)
    if failed:
        raise RuntimeError(f"llama_decode: {failed}")
    shape = (len(ids), _loaded["vocabulary"])
    return np.ctypeslib.as_array(llama.llama_get_logits(context), shape=shape).copy()


def _step(ids: list[int]) -> int:
    """Append tokens to the context; the likeliest next one. Logits are computed for the last token only."""
    context = _loaded["context"]
    tokens = (llama.llama_token * len(ids))(*ids)  # the batch only points at them
    failed = llama.llama_decode(context, llama.llama_batch_get_one(tokens, len(ids)))
    if failed:
        raise RuntimeError(f"llama_decode: {failed}")
    logits = llama.llama_get_logits_ith(context, -1)
    return int(np.ctypeslib.as_array(logits, shape=(_loaded["vocabulary"],)).argmax())


if __name__ == "__main__":
    begin()
    serve({f.__name__: f for f in (load, decode, prefill, quantize, logits, loss)})
