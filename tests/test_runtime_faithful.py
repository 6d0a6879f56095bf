"""Perplexity of the native kernels beside that of torch on the same dequantized weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import bittern
from bittern.evaluate import evaluate, text_windows
from bittern.runtime import native
from bittern.weight import BITS
from tests import tiny

pytestmark = pytest.mark.skipif(not native.available(), reason=f"native runtime: {native.why_not()}")
BOUNDS = {"a16": 0.0005, "a8": 0.005}


def perplexity(artifact: Path, windows: torch.Tensor, **options: str) -> float:
    return evaluate(bittern.load(artifact, device="cpu", **options), windows, batch_size=4).perplexity  # type: ignore[arg-type]


def assert_faithful(artifact: Path, windows: torch.Tensor) -> None:
    expected = perplexity(artifact, windows, kernels="torch")
    for activations, bound in BOUNDS.items():
        found = perplexity(artifact, windows, kernels="native", activations=activations)
        assert abs(found / expected - 1) <= bound
        assert found != expected  # another computation, not the same one twice


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sym", [True, False])
def test_tiny_models(bits: int, sym: bool, tmp_path: Path, text: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = tiny.save(tiny.random_model(num_hidden_layers=3), tmp_path / "source", tokenizer)
    options = {"dataset": str(text), "nsamples": 6, "seqlen": 32}
    bittern.quantize(source, tmp_path / "out", bits=bits, group_size=32, sym=sym, **options)  # type: ignore[arg-type]
    assert_faithful(tmp_path / "out", text_windows(text, tokenizer, seqlen=64, windows=12))


@pytest.mark.parametrize("bits", BITS)
def test_a_real_model(bits: int, tmp_path: Path, shared: Path) -> None:
    source, stories = shared / "data" / "models" / "stories15m", shared / "data" / "text" / "tinystories"
    if not source.is_dir() or not stories.is_dir():
        pytest.skip(f"{source} or {stories} is not at hand")
    options = {"dataset": str(stories / "train.txt"), "nsamples": 4, "seqlen": 128}
    bittern.quantize(source, tmp_path / "out", bits=bits, group_size=32, **options)  # type: ignore[arg-type]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
    assert_faithful(tmp_path / "out", text_windows(stories / "valid.txt", tokenizer, seqlen=256, windows=4))
