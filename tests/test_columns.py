"""Columns rounded in their turn, against the definition in fp64; on a GPU, the kernel against the loop."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import bittern
from bittern.quantize import columns as module
from bittern.quantize.columns import BLOCK_SIZE, _triton, solve_columns
from tests import tiny

SHAPES = [(BLOCK_SIZE, 72, 3), (BLOCK_SIZE, 5, 4), (40, 33, 2), (1, 3, 8), (17, 1024, 8)]


def problem(columns: int, rows: int, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int]:
    draws = torch.Generator().manual_seed(columns * rows)
    originals = torch.randn(columns, rows, generator=draws)
    targets = originals + 0.1 * torch.randn(columns, rows, generator=draws)
    coupling = 0.05 * torch.randn(columns, columns, generator=draws)
    scales = (0.1 + torch.rand(3, rows, generator=draws)) * 4 / 2**bits
    scales *= torch.randint(0, 2, scales.shape, generator=draws) * 2 - 1
    zeros = torch.randint(0, 2**bits, (3, rows), generator=draws).float()
    groups = torch.randint(0, 3, (columns,), generator=draws)
    return targets, originals, coupling, scales, zeros, groups, 2**bits - 1


@pytest.mark.parametrize("kernels", [True, False], ids=["kernel", "loop"])
@pytest.mark.parametrize(("columns", "rows", "bits"), SHAPES)
def test_each_column_is_the_nearest_to_what_those_before_leave_it(
    columns: int, rows: int, bits: int, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernels:
        monkeypatch.setattr(module, "_kernel", lambda _: None)
    targets, originals, coupling, scales, zeros, groups, most = problem(columns, rows, bits)
    given = targets.clone()
    codes, errors = solve_columns(targets, originals, coupling, scales, zeros, groups, most)
    own, zero = scales.double()[groups], zeros.double()[groups]
    torch.testing.assert_close(errors.double(), own * (codes.double() - zero) - originals.double(), rtol=0, atol=1e-6)
    # What each should have become, from everybody's errors at once.
    expected = given.double() - coupling.double().triu(1).T @ errors.double()
    torch.testing.assert_close(targets.double(), expected, rtol=1e-4, atol=1e-4)
    grid = torch.arange(most + 1, dtype=torch.float64).view(-1, 1, 1)
    nearest = ((grid - zero) * own - expected).abs().argmin(0)
    assert (nearest != codes).double().mean() < 0.001  # ties


def test_a_gpu_kernel_that_cannot_be_had_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton is missing, or has no compiler: the loop does it, and says why."""
    monkeypatch.setitem(sys.modules, "bittern.quantize.columns_triton", None)
    with pytest.warns(UserWarning, match=r"solved by torch.*columns_triton"):
        assert _triton.__wrapped__(torch.device("cpu")) is None


@pytest.mark.gpu
@pytest.mark.parametrize(("columns", "rows", "bits"), SHAPES)
def test_the_kernel_is_the_loop(columns: int, rows: int, bits: int) -> None:
    *given, most = problem(columns, rows, bits)
    there = [tensor.cuda() for tensor in given]
    codes, errors = solve_columns(*given, most)  # type: ignore[arg-type, call-arg]
    found, missed = solve_columns(*there, most)  # type: ignore[arg-type, call-arg]
    same = (found.cpu() == codes).all(0)  # a tie that falls otherwise goes on in its row
    assert same.double().mean() > 0.98
    torch.testing.assert_close(missed.cpu()[:, same], errors[:, same], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(there[0].cpu()[:, same], given[0][:, same], rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("effort", ["plain", "fast", "best"])
def test_a_gpu_quantizes_as_well_as_a_cpu(
    effort: str, tokenizer: PreTrainedTokenizerFast, text: Path, tmp_path: Path
) -> None:
    """Every layer's error on its calibration inputs, on both."""
    source = tiny.save(tiny.random_model(), tmp_path / "model", tokenizer)
    losses = []
    for device in ("cpu", "cuda"):
        options: dict[str, Any] = {"dataset": str(text), "nsamples": 16, "seqlen": 32, "bits": 4, "group_size": 32}
        if effort == "best":
            options["tune_tokens"] = 512
        bittern.quantize(source, tmp_path / device, effort=effort, device=device, **options)
        manifest = json.loads((tmp_path / device / "bittern_manifest.json").read_text())
        losses.append([layer["loss"] for layer in manifest["layers"]])
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
