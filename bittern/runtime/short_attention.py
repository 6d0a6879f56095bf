"""Causal attention of short windows that can be differentiated, by products in bfloat16 on a CPU.

Flash attention computes the probabilities again for the gradient, in fp32 and a few rows at a time. While windows are
short they fit into memory, and products of many windows and heads at once take a third of its time. Scores are rounded:
the gradients of heads whose scores are about ten are off by 1 %, about thirty by 2 % (flash attention: by .5 %).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LONGEST = 1024
"""Positions. The probabilities that are kept for the gradient grow with their square."""

_ROWS = 128  # queries at a time: keys behind the last of them are left out


def short_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """``softmax(scale * query key' + causal mask) value``; scores and probabilities are rounded to bfloat16.

    Args:
        query: (batch, heads, positions, head_dim).
        key, value: (batch, key_value_heads, positions, head_dim); key_value_heads divides heads.
        scale: of the products of queries and keys.

    Returns:
        bfloat16 (batch, positions, heads, head_dim).
    """
    output: Tensor = _ShortAttention.apply(query, key, value, scale)  # type: ignore[no-untyped-call]
    return output


class _ShortAttention(torch.autograd.Function):
    """Query heads that share keys are the rows of one product."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        batch, heads, positions, head_dim = query.shape
        groups = batch * key.shape[1]
        ctx.scale, ctx.shapes, ctx.dtypes = scale, (query.shape, key.shape), (query.dtype, key.dtype, value.dtype)
        queries = (query * scale).bfloat16().reshape(groups, -1, positions, head_dim)
        keys, values = (each.bfloat16().reshape(groups, positions, head_dim) for each in (key, value))
        output = queries.new_empty(queries.shape)
        kept = []
        with torch.autocast("cpu", enabled=False):  # it would compute the softmax in fp32
            for rows in _pieces(positions):
                piece = queries[:, :, rows].flatten(1, 2)
                scores = torch.bmm(piece, keys[:, : rows.stop].mT)
                each = scores.view(groups, -1, rows.stop - rows.start, rows.stop)
                each[..., rows] += _behind(rows, scores)
                probabilities = scores.softmax(-1)
                kept.append(probabilities)
                output[:, :, rows] = torch.bmm(probabilities, values[:, : rows.stop]).view_as(output[:, :, rows])
        ctx.save_for_backward(queries, keys, values, output, *kept)
        return output.view(batch, heads, positions, head_dim).transpose(1, 2).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        queries, keys, values, output, *kept = ctx.saved_tensors
        gradients = gradient.transpose(1, 2).bfloat16().reshape(queries.shape)
        shares = (gradients.float() * output).sum(-1, keepdim=True).bfloat16()
        found = torch.empty_like(queries)
        key_sum, value_sum = (torch.zeros_like(each, dtype=torch.float32) for each in (keys, values))
        for rows, probabilities in zip(_pieces(queries.shape[2]), kept, strict=True):
            piece, behind = gradients[:, :, rows].flatten(1, 2), slice(rows.stop)
            value_sum[:, behind] += torch.bmm(probabilities.mT, piece)
            scores = torch.bmm(piece, values[:, behind].mT)
            scores.sub_(shares[:, :, rows].flatten(1, 2)).mul_(probabilities)
            found[:, :, rows] = torch.bmm(scores, keys[:, behind]).view_as(found[:, :, rows])
            key_sum[:, behind] += torch.bmm(scores.mT, queries[:, :, rows].flatten(1, 2))
        query_shape, key_shape = ctx.shapes
        by_query, by_key, by_value = ctx.dtypes
        return (
            (found.float() * ctx.scale).view(query_shape).to(by_query),
            key_sum.view(key_shape).to(by_key),
            value_sum.view(key_shape).to(by_value),
            None,
        )


def _pieces(positions: int) -> Iterator[slice]:
    for start in range(0, positions, _ROWS):
        yield slice(start, min(start + _ROWS, positions))


def _behind(rows: slice, like: Tensor) -> Tensor:
    """What is added to the scores of keys among these rows: minus infinity behind each query."""
    size = rows.stop - rows.start
    return like.new_full((size, size), -torch.inf).triu(1)
