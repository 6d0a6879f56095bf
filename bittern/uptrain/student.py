"""The model with fewer key-value heads: whether there can be one, and its parameters before anything is merged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bittern import model as live
from bittern.errors import BitternError
from bittern.uptrain.heads import Counts, attention_prefixes, check_attention, find_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WORKS = "Llama, Mistral, Qwen2, Qwen3, Gemma, Phi and their like do"


def head_counts(model: PreTrainedModel, kv_heads: int) -> Counts:
    """How the source divides its attention, after checking that it can have ``kv_heads`` key-value heads.

    Args:
        model: of :func:`bittern.model.build`; its parameters may be on meta.
        kv_heads: wanted.

    Raises:
        BitternError: an architecture that cannot hold groups, or a number that does not divide the source's.
    """
    config = model.config.get_text_config(decoder=True)
    kind = config.model_type
    names = [find_attention(block) for block in live.blocks(model)[1]]
    heads = getattr(config, "num_key_value_heads", None)
    if not isinstance(heads, int) or not any(names):
        why = "its attention has no separate queries, keys and values of num_key_value_heads heads"
        if heads is None:
            why = "its configuration has no num_key_value_heads, so no loader could read the result"
        raise BitternError(
            f"{kind}: cannot hold grouped heads: {why} ({_WORKS}); to save memory, quantize it, or run it with"
            " --kv-cache int8"
        )
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    counts = Counts(config.num_attention_heads, heads, dim)
    fitting = [number for number in range(1, heads) if heads % number == 0]
    if kv_heads not in fitting:
        allowed = ", ".join(map(str, fitting)) or "none, for it has multi-query attention already"
        raise BitternError(f"--kv-heads {kv_heads}: {kind} with {heads} key-value heads can have {allowed}")
    prefix, blocks = live.blocks(model)
    tied = live.tied_names(model)
    for index, (block, name) in enumerate(zip(blocks, names, strict=True)):
        if name is not None:
            attention, whole = block.get_submodule(name), f"{prefix}.{index}.{name}"
            check_attention(attention, counts, whole)
            shared = next((each for each, _ in attention.named_parameters(whole) if each in tied), None)
            if shared is not None:
                raise BitternError(f"{shared}: shares its weights with another block, which is not supported")
    return counts


def make_student(teacher: PreTrainedModel, config: dict[str, Any], kv_heads: int) -> PreTrainedModel:
    """A model with fewer key-value heads that has the teacher's parameters, the same tensors, outside of attention."""
    student = live.build(grouped_config(config, kv_heads))
    found = student.config.get_text_config(decoder=True).num_key_value_heads
    if found != kv_heads:
        raise BitternError(
            f"{student.config.model_type}: no place in config.json for {kv_heads} key-value heads is known"
        )
    own = teacher.state_dict()
    tied = live.tied_names(student)
    inside = tuple(attention_prefixes(student))
    for name, tensor in student.state_dict().items():
        if name in tied:
            continue
        old = own[name]
        if old.shape != tensor.shape:
            old = torch.zeros(tensor.shape, dtype=old.dtype, device=old.device)
        live.set_tensor(student, name, old.clone() if name.startswith(inside) else old)
    student.tie_weights()
    live.move_buffers(student, teacher.device)
    return student


def trained_parameters(student: PreTrainedModel, trained: str) -> dict[str, nn.Parameter]:
    """The parameters that ``trained`` stands for, by name, made trainable; all others are frozen."""
    prefix = live.blocks(student)[0]
    inside = (
        tuple(attention_prefixes(student)) if trained == "attention" else f"{prefix}." if trained == "blocks" else ""
    )
    parameters = {}
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name.startswith(inside))
        if parameter.requires_grad:
            parameters[name] = parameter
    return parameters


def grouped_config(config: dict[str, Any], kv_heads: int) -> dict[str, Any]:
    """A configuration with another number of key-value heads, where its decoder reads it."""
    text = config.get("text_config")
    if isinstance(text, dict):
        return {**config, "text_config": {**text, "num_key_value_heads": kv_heads}}
    return {**config, "num_key_value_heads": kv_heads}
