"""Whether the native runtime keeps what an artifact is worth: perplexity beside torch's arithmetic on the same weights.

    python benchmarks/faithful.py ARTIFACT ... --text wikitext-2-test.txt

The oracle dequantizes with torch and multiplies in float32. Beside it, on the same windows: the native kernels with
inputs of 16 and of 8 bits, and with the output head packed to 8 bits. The native decoder is fed the first windows token
by token, side by side, with each kind of KV cache; its change is from the oracle on those windows.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from quality import machine
from torch import Tensor

import bittern
from bittern.checkpoint import open_checkpoint
from bittern.evaluate import evaluate, text_windows
from bittern.runtime.decoder import Decoder
from bittern.runtime.step import native_decoder

NATIVE: dict[str, dict[str, Any]] = {
    "native a16": {"activations": "a16"},
    "native a8": {"activations": "a8"},
    "native a16, head 8 bits": {"activations": "a16", "lm_head_bits": 8},
}
KVCache = Literal["fp32", "bf16", "int8"]
CACHES: tuple[KVCache, ...] = ("fp32", "bf16", "int8")


def decoded_nll(decoder: Decoder, ids: Tensor, kv_cache: KVCache) -> float:
    """Mean negative log-likelihood, nats per token, of windows (windows, seqlen) that go in one token at a time."""
    cache = decoder.new_cache(len(ids), ids.shape[1], kv_cache)
    total = 0.0
    for position in range(ids.shape[1] - 1):
        logits = decoder.forward(cache, [[int(token)] for token in ids[:, position]])
        chosen = torch.log_softmax(logits.double(), dim=-1).gather(1, ids[:, position + 1 : position + 2])
        total -= float(chosen.sum())
    return total / (ids.shape[0] * (ids.shape[1] - 1))


def rows(path: Path, ids: Tensor, few: Tensor) -> Iterator[tuple[str, float, float]]:
    """How the artifact was computed, its perplexity, and how much that is above the oracle's on the same tokens."""
    oracle = bittern.load(path, device="cpu", kernels="torch")
    base, base_few = evaluate(oracle, ids).nll, evaluate(oracle, few).nll
    yield "torch", float(torch.tensor(base).exp()), 0.0
    del oracle
    for name, options in NATIVE.items():
        model = bittern.load(path, device="cpu", kernels="native", **options)
        nll = evaluate(model, ids).nll
        yield name, float(torch.tensor(nll).exp()), float(torch.tensor(nll - base).expm1())
        decoder = native_decoder(model)
        if name == "native a16" and decoder is not None:
            for kv_cache in CACHES:
                nll = decoded_nll(decoder, few, kv_cache)
                yield (
                    f"decoder a16, {kv_cache} cache",
                    float(torch.tensor(nll).exp()),
                    float(torch.tensor(nll - base_few).expm1()),
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", nargs="+", metavar="ARTIFACT", type=Path)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--seqlen", type=int, default=1024, help="tokens in a window (%(default)s)")
    parser.add_argument("--windows", type=int, default=16, help="(%(default)s)")
    parser.add_argument("--decoded", type=int, default=4, help="windows that the decoder is fed (%(default)s)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    print("| artifact | computed by | perplexity | above torch |\n|---|---|---|---|")
    for path in options.artifacts:
        with open_checkpoint(path) as checkpoint:
            ids = text_windows(options.text, checkpoint.tokenizer(), seqlen=options.seqlen, windows=options.windows)
        for name, perplexity, above in rows(path, ids, ids[: options.decoded]):
            print(f"| {path.name} | {name} | {perplexity:.4f} | {above:+.4%} |", flush=True)
            found.append({"artifact": str(path), "computed_by": name, "perplexity": perplexity, "above": above})
    if options.json:
        shown = {name: str(value) for name, value in vars(options).items()}
        options.json.write_text(json.dumps({"machine": machine(), "options": shown, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
