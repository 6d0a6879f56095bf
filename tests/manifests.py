"""Manifests for the tests, made by hand as the jobs write them."""

from __future__ import annotations

from typing import Any

from bittern.report import with_origin

HASH = "0123456789abcdef" * 4
VERSIONS = {"bittern": "9.9", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.2"}
MATRICES = {
    "self_attn.q_proj": (96, 96),
    "self_attn.k_proj": (48, 96),
    "self_attn.v_proj": (48, 96),
    "self_attn.o_proj": (96, 96),
    "mlp.gate_proj": (256, 96),
    "mlp.up_proj": (256, 96),
    "mlp.down_proj": (96, 256),
}


def layers(blocks: int = 3, bits: int = 3) -> list[dict[str, Any]]:
    """Records of a small Llama whose errors grow from block to block; down_proj has 8 bits."""
    return [
        {
            "layer": f"model.layers.{block}.{name}",
            "shape": list(shape),
            "bits": 8 if name.endswith("down_proj") else bits,
            "group_size": 32,
            "sym": True,
            "loss": 0.001 * (1 + block) * (1 + position),
            "method": "gptq",
            "damp": 0.01,
            "tokens": 4096,
            "fallback": None,
        }
        for block in range(blocks)
        for position, (name, shape) in enumerate(MATRICES.items())
    ]


def side(parameters: int, total: int) -> dict[str, Any]:
    """One side of ``size``."""
    inner = total // 2
    sizes = {"attention": inner // 2, "mlp": inner - inner // 2, "experts": 0, "embeddings": total - inner}
    return {
        "parameters": parameters,
        "bytes": {**sizes, "norms": 0, "other": 0, "total": total},
        "bits_per_weight": {"all": 8 * total / parameters, "without_embeddings": 16 * inner / parameters},
    }


def evaluations(base: str | None = "models/source") -> list[dict[str, Any]]:
    """A text and two tasks."""
    settings = {"dtype": None, "device": "cpu", "activations": "a16", "lm_head_bits": None, "kernels": "torch"}
    text = {
        "what": "text",
        "name": "held-out.txt",
        "sha256": HASH,
        "seqlen": 256,
        "windows": 30,
        "tokens": 7650,
        "perplexity": 8.07,
        "kl": 0.25,
        "top1_agreement": 0.76,
        "base": base,
        "base_perplexity": 6.39,
        "settings": settings,
    }
    task = {
        "what": "task",
        "name": "arc_easy",
        "sha256": HASH[1:] + "0",
        "questions": 200,
        "accuracy": 0.61,
        "accuracy_normalized": 0.6,
        "exact_match": None,
        "perplexity": None,
        "truncated": 0,
        "base": base,
        "base_accuracy": 0.66,
        "base_accuracy_normalized": 0.64,
        "base_exact_match": None,
        "base_perplexity": None,
        "settings": settings,
    }
    last_word = {
        **task,
        "name": "lambada",
        "sha256": HASH[::-1],
        "accuracy": None,
        "accuracy_normalized": None,
        "exact_match": 0.4,
        "perplexity": 12.5,
        "base_accuracy": None,
        "base_accuracy_normalized": None,
        "base_exact_match": 0.45,
        "base_perplexity": 10.0,
    }
    return [text, task, last_word]


def schema_1() -> dict[str, Any]:
    """What the first bittern wrote."""
    return {
        "schema_version": 1,
        "source": {"name": "models/source", "revision": None, "model_type": "llama"},
        "options": {"bits": 3, "group_size": 32, "sym": True, "method": "gptq", "seed": 0},
        "calibration": {"source": "text.txt", "tokens_asked": 4096, "tokens_found": 4096, "sha256": HASH},
        "layers": layers(),
        "kept": {"model.layers.0.odd": "shape 7 x 96 is no multiple of 32"},
        "notes": ["1 layers are not packed (model.layers.0.mlp.gate: a router of experts)"],
        "versions": VERSIONS,
        "measured": {"seconds": 12.0, "peak_memory_bytes": 5 * 10**8, "layer_seconds": {}, "threads": 2},
    }


def schema_2() -> dict[str, Any]:
    """The same as the second schema has it."""
    files = {"config.json": {"bytes": 700, "sha256": HASH}, "model.safetensors": {"bytes": 10**6, "sha256": HASH}}
    return {**schema_1(), "schema_version": 2, "kind": "quantize", "files": files}


def quantized() -> dict[str, Any]:
    """Everything that a quantization may say."""
    cache = {"fp16": 1152, "fp32": 2304}
    manifest = {
        **schema_2(),
        "schema_version": 3,
        "command": ["bittern", "quantize", "models/source", "-o", "OUT", "--sym", "--bits", "3"],
        "size": {"source": side(400_000, 1_600_000), "output": side(400_000, 300_000)},
        "context_length": 2048,
        "kv_bytes_per_token": {"source": cache, "output": cache},
        "prediction": {"seconds": 10.0, "peak_memory_bytes": 6 * 10**8, "bytes": 310_000},
        "evaluations": evaluations(),
        "stages": {"drift": {"layers": 20, "left": 0.83}, "polish": {"layers": 21, "left": 0.91}},
        "tuning": tuning(),
        "origin": None,
    }
    manifest["layers"][4] |= {"method": "rtn", "damp": None, "loss": None, "fallback": "no calibration token came"}
    manifest["measured"]["machine"] = {"system": "Linux", "processor": "x86_64", "cpus": 2}
    return manifest


def tuning(refused: str | None = None) -> dict[str, Any]:
    """Of effort best: KL from 0.4 to 0.3 on text that was held out."""
    return {
        "tokens": 128_000,
        "steps": 125,
        "held_out_tokens": 4088,
        "perplexity": {"solved": 8.5, "tuned": 8.0},
        "kl": {"solved": 0.4, "tuned": 0.3},
        "curve": [],
        "refused": refused,
    }


def chain() -> dict[str, Any]:
    """A quantization of what was uptrained."""
    return with_origin(quantized(), uptrained())


def uptrained() -> dict[str, Any]:
    """Everything that an uptraining may say."""
    base = quantized()
    curve = [
        {
            "step": step,
            "tokens": 4096 * step,
            "loss": 2.5 - 0.1 * step,
            "kl": 0.5 - 0.04 * step,
            "nll": 2.2 - 0.03 * step,
            "lr": 1e-4,
            "perplexity": None if step % 5 else 9.0 - 0.2 * step,
        }
        for step in range(11)
    ]
    blocks = [
        {
            "layer": f"model.layers.{number}",
            "groups": [[0, 3], [1, 2], [4, 5]],
            "error_mean": 0.9 - 0.1 * number,
            "error_aligned": 0.5 - 0.1 * number,
            "error_solved": 0.3 - 0.05 * number,
            "error_distilled": None if number else 0.1,
        }
        for number in range(3)
    ]
    common = ("schema_version", "source", "notes", "versions", "files", "size", "context_length", "calibration")
    return {
        **{key: base[key] for key in (*common, "evaluations", "origin", "measured")},
        "kind": "uptrain",
        "options": {"kv_heads": 3, "seed": 0},
        "command": ["bittern", "uptrain", "models/source", "-o", "OUT", "--kv-heads", "3"],
        "heads": {"num_attention_heads": 6, "source_kv_heads": 6, "num_key_value_heads": 3, "head_dim": 48},
        "kv_bytes_per_token": {"source": {"fp16": 2304, "fp32": 4608}, "output": {"fp16": 1152, "fp32": 2304}},
        "blocks": blocks,
        "perplexity": {"text": "held-out.txt", "tokens": 7650, "source": 6.39, "converted": 8.4, "trained": 6.6},
        "training": {"tokens": 40_960, "steps": 10, "curve": curve},
        "degraded": "perplexity is 3 % above the source's",
    }
