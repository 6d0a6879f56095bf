"""The columns between two matrix products: each is rounded in its turn, and those after it make up for its error.

Both :mod:`bittern.quantize.gptq` and :mod:`bittern.quantize.polish` come down to this loop. A dozen of torch's
operations for every column take far longer to start than to do, so there is one kernel for all of it on the CPU
(csrc/ops.h) and one on GPUs (:mod:`bittern.quantize.columns_triton`); without them the loop below does the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from bittern.runtime import native

BLOCK_SIZE = 64
"""Columns between two matrix products; it changes the speed, not the result."""


def solve_columns(
    targets: Tensor, originals: Tensor, coupling: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor, max_code: int
) -> tuple[Tensor, Tensor]:
    """Round columns to their grid, one after the other.

    Args:
        targets: what the columns should become while none of them has an error, (columns, rows); afterwards what each
            should have become when its turn came.
        originals: what errors are counted from, (columns, rows).
        coupling: (columns, columns): an error e of column j takes ``coupling[j, k] e`` from the target of each column
            k after it. The rest of it is not looked at.
        scales: (groups, rows), of the same dtype as all before.
        zeros: likewise.
        groups: int64 (columns,), where in these a column's are.
        max_code: the largest code.

    Returns:
        Codes, uint8 (columns, rows), and errors ``scale (code - zero) - original``, (columns, rows).
    """
    codes = torch.empty(targets.shape, dtype=torch.uint8, device=targets.device)
    errors = torch.empty_like(targets)
    if kernel := _kernel(targets):
        rows = (targets, originals, scales, zeros, groups, codes, errors)
        assert all(tensor.is_contiguous() for tensor in rows)
        kernel(rows, coupling, max_code)
        return codes, errors
    for j, group in enumerate(groups.tolist()):
        target = targets[j]
        if j:
            target.sub_(errors[:j].T @ coupling[:j, j])
        code = (target / scales[group]).round_().add_(zeros[group]).clamp_(0, max_code)
        codes[j] = code
        torch.sub(code.sub_(zeros[group]).mul_(scales[group]), originals[j], out=errors[j])
    return codes, errors


Kernel = Callable[[Sequence[Tensor], Tensor, int], None]
"""Of targets, originals, scales, zeros, groups, codes and errors, all contiguous; coupling of any strides; max_code."""


def _kernel(targets: Tensor) -> Kernel | None:
    """What does all of that in one call, where there is something."""
    if targets.dtype != torch.float32 or len(targets) > BLOCK_SIZE:
        return None
    if targets.is_cuda:
        return _triton(targets.device)
    return native.solve_columns if targets.device.type == "cpu" and native.available() else None


@cache
def _triton(device: torch.device) -> Kernel | None:
    """The kernel for a GPU, if it runs: Triton wants a C compiler and Python's headers, and not every torch has it."""
    one, integer = torch.ones(1, 1, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    try:
        from bittern.quantize.columns_triton import launch

        launch((one.clone(), one, one, one, integer, one.to(torch.uint8), one.clone()), one, 1)
    except Exception as error:  # whatever stands in its way, torch can do it
        warnings.warn(f"columns are solved by torch, many times slower: Triton's kernel: {error}", stacklevel=2)
        return None
    return launch
