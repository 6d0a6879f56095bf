"""Scaled rotary embeddings as GGUF files tell of them.

llama.cpp has keys for linear and YaRN scaling. Of Llama 3.1's a file has the result alone, the tensor
``rope_freqs.weight``: what each frequency is divided by.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bittern.errors import BitternError

FREQUENCIES = "rope_freqs.weight"


def llama3_factors(rope: dict[str, Any], head_dim: int) -> Tensor:
    """What Llama 3.1's scaling divides each frequency by, fp32 (head_dim / 2,).

    Args:
        rope: transformers' ``rope_parameters`` of rope_type "llama3".
        head_dim: of the model.
    """
    frequencies = rope["rope_theta"] ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # in the context of the training
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)  # 0 for long waves, 1 for short ones
    factors: Tensor = 1 / (smooth + (1 - smooth) / rope["factor"])
    return factors.float()


def yarn_attention(rope: dict[str, Any]) -> float:
    """What transformers multiplies sines and cosines with, for ``rope_parameters`` of rope_type "yarn"."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    mscale, over_all = rope.get("mscale"), rope.get("mscale_all_dim")
    factor = float(rope["factor"])
    return (
        yarn_default(factor, mscale) / yarn_default(factor, over_all) if mscale and over_all else yarn_default(factor)
    )


def yarn_default(factor: float, mscale: float = 1.0) -> float:
    """What llama.cpp multiplies them with by itself, where ``mscale`` is 1."""
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def read_rope(
    field: Callable[[str], Any], frequencies: Tensor | None, theta: float, head_dim: int
) -> dict[str, Any] | None:
    """transformers' ``rope_parameters``; None where nothing is scaled.

    Args:
        field: the value of a key ``rope.scaling.*`` of the file, None for one that it does not have.
        frequencies: the tensor of that name.
        theta: the base.
        head_dim: of the model.

    Raises:
        BitternError: for a scaling of another kind.
    """
    rope: dict[str, Any] = {"rope_theta": theta}
    kind = field("type")
    if frequencies is not None:
        return rope | _llama3(frequencies, theta, head_dim)
    if kind is None and field("factor") not in (None, 0, 1):
        kind = "linear"  # as llama.cpp takes it
    if kind in (None, "none"):
        return None
    if kind not in ("linear", "yarn"):
        raise BitternError(f"rope.scaling.type: expected none, linear or yarn, found {kind}")
    rope |= {"rope_type": kind, "factor": float(field("factor"))}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = int(field("original_context_length"))
        rope["beta_fast"] = float(field("yarn_beta_fast") or 32)
        rope["beta_slow"] = float(field("yarn_beta_slow") or 1)
        if field("attn_factor") is not None:
            rope["attention_factor"] = float(field("attn_factor")) * yarn_default(rope["factor"])
    return rope


def _llama3(frequencies: Tensor, theta: float, head_dim: int) -> dict[str, Any]:
    """The parameters that give these factors: all models have 1 and 4, and were trained with a power of two."""
    factor = float(frequencies.max())
    for exponent in range(4, 21):
        rope = {
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 2**exponent,
        }
        found = llama3_factors(rope, head_dim)
        if factor > 1 and found.shape == frequencies.shape and torch.allclose(found, frequencies, rtol=1e-4, atol=0):
            return rope
    raise BitternError(f"{FREQUENCIES}: expected the factors of Llama 3.1's scaling, found others")
