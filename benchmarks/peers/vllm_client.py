"""vLLM's own configuration and weight loading for ../interop.py, where there is no GPU; runs in its environment.

vLLM builds its model and fills it by its own weight loaders: which layer gets which scheme, fused layers and their
shards, and what a kernel is given in the end are its own doing. Only its kernels do not run here: one of plain torch
stands in for all of them. Whether a GPU has a kernel for a grid is therefore not checked. Nor does its attention run:
transformers computes the logits from the weights that vLLM holds.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from logits import serve_logits
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.kernels.linear import MPLinearKernel
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization import auto_awq, auto_gptq
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import compressed_tensors_wNa16
from vllm.model_executor.model_loader.utils import initialize_model


class PlainKernel(MPLinearKernel):  # type: ignore[misc]
    """Reads what vLLM hands to its kernels: dense bit streams along ``packed_dim``, scales, and zeros if any."""

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @classmethod
    def can_implement(cls, config: Any) -> tuple[bool, str | None]:
        return True, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Replace the packed weight by a plain one, ``layer.plain``, float32 (out, in)."""
        kind = self.config.weight_type
        packed, scales, zeros = self._get_weight_params(layer)
        codes = _by_output(packed, _unpack(packed.data, packed.packed_dim, kind.size_bits))
        scale = _by_output(scales, scales.data.float())
        zero: Tensor | int = kind.bias
        if self.config.zero_points:
            zero = _by_output(zeros, _unpack(zeros.data, zeros.packed_dim, kind.size_bits)).unsqueeze(2)
        grouped = codes.view(*scale.shape, -1)
        layer.plain = ((grouped - zero) * scale.unsqueeze(2)).view(codes.shape)

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.nn.functional.linear(x, layer.plain, bias)


def load(artifact: str) -> Any:
    """transformers' model with the weights that vLLM's hold after loading, in float32."""
    config = EngineArgs(model=artifact, dtype="float16", max_model_len=128, enforce_eager=True).create_engine_config()
    with set_current_vllm_config(config):
        _start()
        filled = initialize_model(vllm_config=config)
        with safe_open(Path(artifact) / "model.safetensors", "pt") as file:
            filled.load_weights((name, file.get_tensor(name)) for name in sorted(file.keys()))
    for layer in filled.modules():
        if isinstance(layer, LinearBase) and hasattr(layer.quant_method, "process_weights_after_loading"):
            layer.quant_method.process_weights_after_loading(layer)
    plain = AutoConfig.from_pretrained(artifact)
    del plain.quantization_config
    model: Any = AutoModelForCausalLM.from_config(plain, dtype=torch.float32)  # type: ignore[no-untyped-call]
    model.load_state_dict(_unfused(filled, plain.vocab_size), strict=not plain.tie_word_embeddings)
    model.tie_weights()
    model.kernels = _schemes(filled)
    return model.eval()


def _start() -> None:
    """A process group of one, which vLLM's layers ask for their share."""
    if not torch.distributed.is_initialized():
        store = f"file://{tempfile.mkdtemp()}/store"
        init_distributed_environment(1, 0, store, 0, "gloo")
        initialize_model_parallel()


def _unfused(filled: Any, vocabulary: int) -> dict[str, Tensor]:
    """vLLM's weights under the names of the checkpoint."""
    found: dict[str, Tensor] = {}
    for name, layer in filled.named_modules():
        if isinstance(layer, LinearBase):
            weight = layer.plain if hasattr(layer, "plain") else layer.weight.data
            parent, _, leaf = name.rpartition(".")
            parts = filled.packed_modules_mapping.get(leaf, [leaf])
            sizes = layer.output_sizes if len(parts) > 1 else [weight.shape[0]]
            found |= {f"{parent}.{p}.weight": w for p, w in zip(parts, weight.split(sizes), strict=True)}
        elif "norm" in name:
            found[f"{name}.weight"] = layer.weight.data
        elif name in ("model.embed_tokens", "lm_head"):
            found[f"{name}.weight"] = layer.weight.data[:vocabulary]  # the rest is padding
    return found


def _schemes(filled: torch.nn.Module) -> str:
    """The schemes of vLLM's linear layers and how many of each."""
    methods = (getattr(m, "scheme", m.quant_method) for m in filled.modules() if isinstance(m, LinearBase))
    return ", ".join(f"{count} {name}" for name, count in Counter(type(m).__name__ for m in methods).items())


def _by_output(parameter: Any, values: Tensor) -> Tensor:
    """``values`` of a parameter with its outputs first."""
    return values if parameter.output_dim == 0 else values.T.contiguous()


def _unpack(words: Tensor, dimension: int, bits: int) -> Tensor:
    """The values of a little-endian stream of ``bits`` each along a dimension of int32 words, as float32."""
    rows = words.movedim(dimension, -1).contiguous().numpy().view(np.uint8)
    stream = np.unpackbits(rows, axis=-1, bitorder="little")
    values = stream.reshape(*stream.shape[:-1], -1, bits) @ (1 << np.arange(bits))
    return torch.from_numpy(values).float().movedim(-1, dimension)


if __name__ == "__main__":
    for module in (auto_gptq, auto_awq, compressed_tensors_wNa16):
        module.choose_mp_linear_kernel = lambda config: PlainKernel
    auto_gptq.verify_marlin_supported = lambda **grid: None  # it asks what this machine's kernels take
    serve_logits(load)
