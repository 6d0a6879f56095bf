"""Output heads that are the embedding once more.

A configuration ties them with ``tie_word_embeddings``; some checkpoints store the head all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from bittern.checkpoint import Checkpoint
from bittern.errors import BitternError

_HEADS = ("lm_head", "embed_out")
_PIECE = 1 << 21  # elements


def tied_tensors(checkpoint: Checkpoint) -> list[str]:
    """Output heads that the configuration ties to the embedding and that equal it, so need not be stored.

    Such a head and the embedding are read once more for this, up to the first difference.
    """
    return [
        head
        for head in tied_heads(checkpoint)
        if any(_is_copy(checkpoint, head, name, exactly=True) for name in checkpoint.tensors if name != head)
    ]


def refuse_untied(checkpoint: Checkpoint) -> None:
    """Refuse a head of its own in a checkpoint whose configuration ties it to the embedding.

    Models are built as the configuration says, so the head would be lost.

    Raises:
        BitternError: naming it.
    """
    for head in tied_heads(checkpoint):
        if not any(_is_copy(checkpoint, head, name, exactly=False) for name in checkpoint.tensors if name != head):
            raise BitternError(
                f"{checkpoint.source}: {head} is no copy of the embedding, but tie_word_embeddings is true; expected"
                " false in config.json, or no such tensor"
            )


def tied_heads(checkpoint: Checkpoint) -> list[str]:
    """Heads that are stored although the configuration ties them."""
    heads = [name for name in checkpoint.tensors if name.removesuffix(".weight").rpartition(".")[2] in _HEADS]
    return heads if heads and ties_embeddings(checkpoint.config) else []


def ties_embeddings(config: Mapping[str, Any]) -> bool:
    """Whether a configuration ties the head to the embedding, by its model type's default where it does not say."""
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and "tie_word_embeddings" in part:
            return bool(part["tie_word_embeddings"])
    from transformers import CONFIG_MAPPING  # heavy, and needed only where config.json leaves it to the default

    kind = str(config.get("model_type"))
    return kind in CONFIG_MAPPING and bool(getattr(CONFIG_MAPPING[kind](), "tie_word_embeddings", False))


def _is_copy(checkpoint: Checkpoint, first: str, second: str, exactly: bool) -> bool:
    """Whether two tensors are the same; or, unless ``exactly``, one is the other in another dtype."""
    one, other = checkpoint.tensors[first], checkpoint.tensors[second]
    if one.shape != other.shape or (exactly and one.dtype != other.dtype):
        return False
    coarser = min(one.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
    for start in range(0, one.numel, _PIECE):
        stop = min(start + _PIECE, one.numel)
        values = (checkpoint.read_elements(name, start, stop).to(coarser).float() for name in (first, second))
        if not torch.equal(*values):
            return False
    return True
