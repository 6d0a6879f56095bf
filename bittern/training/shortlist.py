"""The words whose logits a training step computes, where the vocabulary is large and the model small.

Of a vocabulary of tens of thousands, a text uses few, and the others share what little probability is left. A step
takes the commonest, its own, and some of the rest at random, each of which stands for all that were not drawn
(importance sampling of the softmax's sum: Bengio & Senecal 2003, Jean et al. 2015). So every position is learned from,
for what a share of the positions would cost over all words.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from bittern.training.text import Rows

_COMMON = 0.75  # of a shortlist; the rest of it is drawn
_COUNTED = 1 << 20  # tokens at a time


@dataclass(frozen=True)
class Shortlist:
    """Some words of a vocabulary.

    Attributes:
        words: int64 (count,), ascending.
        offsets: fp32 (count,), what is added to their logits: the logarithm of how many words each stands for.
        places: int64 (vocabulary,), where a word is in ``words``; -1 where it is not.
    """

    words: Tensor
    offsets: Tensor
    places: Tensor


def vocabulary_size(model: PreTrainedModel) -> int:
    """Words whose logits a model computes."""
    return int(_head(model).weight.shape[0])


def commonest(ids: Rows, vocabulary: int, size: int) -> Tensor:
    """The words that a shortlist of this size always holds, commonest first; int64.

    Args:
        ids: of the text, (windows, seqlen).
        vocabulary: words that there are.
        size: of the shortlist.
    """
    counts = np.zeros(vocabulary, dtype=np.int64)
    rows = max(1, _COUNTED // ids.shape[1])
    for start in range(0, len(ids), rows):
        counts += np.bincount(ids[start : start + rows].ravel(), minlength=vocabulary)
    return torch.from_numpy(np.argsort(-counts, kind="stable")[: int(_COMMON * size)].copy())


def make_shortlist(common: Tensor, ids: Tensor, vocabulary: int, size: int, seed: int) -> Shortlist:
    """The common words, those of a step, and others at random.

    Args:
        common: of :func:`commonest`.
        ids: int64, the step's tokens.
        vocabulary: words that there are.
        size: of the shortlist, but for the words of the step that are not common.
        seed: of what is drawn.
    """
    inside = torch.zeros(vocabulary, dtype=torch.bool)
    inside[common] = True
    inside[ids.flatten().cpu()] = True
    rest = (~inside).nonzero().flatten()
    drawn = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed % 2**63))[: size - len(common)]]
    inside[drawn] = True
    offsets = torch.zeros(vocabulary, dtype=torch.float32)
    if len(drawn):
        offsets[drawn] = math.log(len(rest) / len(drawn))
    words = inside.nonzero().flatten()
    places = torch.full((vocabulary,), -1)
    places[words] = torch.arange(len(words))
    return Shortlist(words.to(ids.device), offsets[words].to(ids.device), places.to(ids.device))


@contextmanager
def only(model: PreTrainedModel, words: Tensor | None) -> Iterator[None]:
    """Within it, the model computes the logits of these words, in this order; of all where there are none given."""
    if words is None:
        yield
        return
    head = _head(model)

    def forward(hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden, head.weight[words], None if head.bias is None else head.bias[words])

    head.forward = forward
    try:
        yield
    finally:
        del head.forward


def _head(model: PreTrainedModel) -> Any:
    """The linear layer that computes logits; models scale or bound what it gives afterwards."""
    return model.get_output_embeddings()  # type: ignore[no-untyped-call]
