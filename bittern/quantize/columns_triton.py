"""The loop of :mod:`bittern.quantize.columns` as one kernel: each program takes a few rows through all columns.

The targets of a program's rows stay in registers, (columns, rows); a column is taken out of them by a masked sum.
Everything is IEEE fp32, division and rounding to the nearest even too; only sums come in another order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bittern.quantize.columns import BLOCK_SIZE

ROWS = 16
"""Of a program, which is one warp: no barriers, and a matrix of a thousand rows has enough programs."""


def launch(tensors: Sequence[Tensor], coupling: Tensor, max_code: int) -> None:
    """A :data:`bittern.quantize.columns.Kernel`."""
    targets, originals, scales, zeros, groups, codes, errors = tensors
    columns, rows = targets.shape
    with torch.cuda.device(targets.device):
        _columns[(triton.cdiv(rows, ROWS),)](
            targets,
            originals,
            coupling,
            scales,
            zeros,
            groups,
            codes,
            errors,
            rows,
            *coupling.stride(),
            max_code,
            columns,
            PADDED=BLOCK_SIZE,
            ROWS=ROWS,
            num_warps=1,
        )


@triton.jit  # type: ignore[untyped-decorator]
def _columns(
    targets: Any,
    originals: Any,
    coupling: Any,
    scales: Any,
    zeros: Any,
    groups: Any,
    codes: Any,
    errors: Any,
    rows: Any,
    down: Any,
    across: Any,
    max_code: Any,
    columns: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, PADDED)
    real = row < rows
    cells = column.to(tl.int64)[:, None] * rows + row[None, :]
    known = (column < columns)[:, None] & real[None, :]
    wanted = tl.load(targets + cells, mask=known, other=0.0)
    at = row.to(tl.int64)
    for j in range(columns):
        group = tl.load(groups + j)
        scale = tl.load(scales + group * rows + row, mask=real, other=1.0)
        zero = tl.load(zeros + group * rows + row, mask=real, other=0.0)
        original = tl.load(originals + at, mask=real, other=0.0)
        pull = tl.load(coupling + j * down + column * across, mask=column < columns, other=0.0)
        target = tl.sum(tl.where(column[:, None] == j, wanted, 0.0), axis=0)
        code = tl.div_rn(target, scale)
        code = tl.minimum(tl.maximum(code, -1024.0), 1024.0)  # further than any grid reaches, and exact in what follows
        code = (code + 12582912.0) - 12582912.0  # 1.5 * 2**23: to the nearest even
        code = tl.minimum(tl.maximum(code + zero, 0.0), max_code)
        error = (code - zero) * scale - original
        tl.store(codes + at, code.to(tl.uint8), mask=real)
        tl.store(errors + at, error, mask=real)
        wanted -= tl.where(column[:, None] > j, pull[:, None] * error[None, :], 0.0)
        at += rows
    tl.store(targets + cells, wanted, mask=known)
