"""A Llama with the shapes of TinyLlama-1.1B and random weights, to measure speed on: ``synthetic.py OUT``.

Speed asks for shapes only, and no text of sense is to be expected. float16, 2.2 GB; the tokenizer is a copy.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from bittern.checkpoint import CheckpointWriter, TensorInfo

SHARED = Path(os.environ.get("BITTERN_SHARED", Path(__file__).resolve().parents[2] / "shared"))
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 1,
    "dtype": "float16",
    "eos_token_id": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "max_position_embeddings": 2048,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 22,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}


def tensors() -> list[TensorInfo]:
    """Every tensor of the model, in the order of its layers."""
    hidden, inner, vocabulary = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"]
    keys = CONFIG["num_key_value_heads"] * CONFIG["head_dim"]
    block: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (vocabulary, hidden)}
    for layer in range(CONFIG["num_hidden_layers"]):
        shapes.update({f"model.layers.{layer}.{name}": shape for name, shape in block.items()})
    shapes.update({"model.norm": (hidden,), "lm_head": (vocabulary, hidden)})
    return [TensorInfo(f"{name}.weight", torch.float16, shape) for name, shape in shapes.items()]


def write(out: Path, tokenizer: Path, seed: int) -> None:
    """Write the folder, one tensor in memory at a time: matrices from N(0, 0.02), norms of ones."""
    generator = torch.Generator().manual_seed(seed)
    plan = tensors()
    with CheckpointWriter(out, plan) as writer:
        for info in plan:
            values = torch.ones(info.shape)
            if values.dim() == 2:
                values.normal_(0, 0.02, generator=generator)
            writer.write(info.name, values.half())
        for file in tokenizer.glob("tokenizer*"):
            shutil.copyfile(file, writer.folder / file.name)
        writer.commit(CONFIG)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        default=SHARED / "data" / "models" / "stories15m",
        help="folder with a tokenizer of 32000 tokens (%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    options = parser.parse_args()
    write(options.output, options.tokenizer, options.seed)


if __name__ == "__main__":
    main()
