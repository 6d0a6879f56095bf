"""A folder of the Llama family as an F16 GGUF file, for llama.cpp to quantize: ``to_gguf.py MODEL OUT.gguf``.

It carries no tokenizer, so it serves to measure and not to chat: only ids are ever fed. Needs bittern's gguf extra.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from bittern.checkpoint import Checkpoint, open_checkpoint

_IN_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(model: str | Path, out: Path) -> None:
    """Write a checkpoint tensor by tensor: matrices as F16, norms as F32. The file appears when it is whole.

    Raises:
        ValueError: when the model is no plain Llama.
    """
    partial = out.with_suffix(".partial")
    with open_checkpoint(model) as checkpoint:
        config = checkpoint.config
        _check(config)
        writer = gguf.GGUFWriter(partial, "llama")
        _add_metadata(writer, config)
        names = {name: _name(name) for name in checkpoint.tensors}
        if config.get("tie_word_embeddings"):
            names.pop("lm_head.weight", None)  # a copy of the embeddings
        for name, there in names.items():
            shape = checkpoint.tensors[name].shape
            kind = torch.float16 if len(shape) == 2 else torch.float32
            numpy_dtype = torch.empty(0, dtype=kind).numpy().dtype
            writer.add_tensor_info(there, shape, numpy_dtype, checkpoint.tensors[name].numel * kind.itemsize)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name in names:
            values = _values(checkpoint, name, config)
            writer.write_tensor_data(values.to(torch.float16 if values.dim() == 2 else torch.float32).numpy())
        writer.close()
    partial.rename(out)


def _check(config: dict[str, Any]) -> None:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", "default")
    if config.get("model_type") != "llama" or config.get("attention_bias") or config.get("mlp_bias"):
        raise ValueError(f"expected a llama without biases, found model_type {config.get('model_type')}")
    if kind != "default":
        raise ValueError(f"rope_type: expected default, found {kind}")


def _add_metadata(writer: Any, config: dict[str, Any]) -> None:
    """What llama.cpp must know of a Llama, and a vocabulary of nameless tokens."""
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or config
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("none")


def _name(name: str) -> str:
    """The GGUF name of a tensor of transformers' Llama."""
    module = name.removesuffix(".weight")
    if module in _OUTSIDE:
        return f"{_OUTSIDE[module]}.weight"
    _, _, number, rest = module.split(".", 3)
    return f"blk.{number}.{_IN_BLOCK[rest]}.weight"


def _values(checkpoint: Checkpoint, name: str, config: dict[str, Any]) -> Tensor:
    """A tensor with the rows of q and k in llama.cpp's order.

    transformers turns row i of a head with row i + head_dim / 2, llama.cpp's "llama" row 2 i with row 2 i + 1.
    """
    values = checkpoint.read(name).float()
    module = name.removesuffix(".weight")
    if not module.endswith(("q_proj", "k_proj")):
        return values
    heads = config["num_attention_heads"]
    if module.endswith("k_proj"):
        heads = config.get("num_key_value_heads") or heads
    rows, columns = values.shape
    halves = values.view(heads, 2, rows // heads // 2, columns)
    return halves.transpose(1, 2).reshape(rows, columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the checkpoint")
    parser.add_argument("output", type=Path, help="GGUF file to write")
    options = parser.parse_args()
    write_gguf(options.model, options.output)


if __name__ == "__main__":
    main()
