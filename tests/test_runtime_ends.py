"""The two ends of a packed model: as the file stores them, or with the head packed, against transformers' float32."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import bittern
from bittern.errors import BitternError
from bittern.runtime import native
from bittern.runtime.linear import NativeMatrix, QuantLinear, StoredEmbedding, StoredLinear
from bittern.runtime.packed import PackedMatrix
from bittern.weight import QuantSpec, round_to_nearest
from tests import tiny

needs_native = pytest.mark.skipif(not native.available(), reason=f"native runtime: {native.why_not()}")
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "tied": {"tie_word_embeddings": True},
    "gemma3_text": {"head_dim": 16},
    "phi": {},  # its head has a bias
    "mamba": {"state_size": 4},  # it would round the head's inputs
}


def artifact(folder: Path, family: str, dtype: torch.dtype, **config: Any) -> Path:
    """A tiny model at 8 bits, what is not packed in ``dtype``."""
    options = {**FAMILIES.get(family, {}), **config}
    model = tiny.random_model("llama" if family == "tied" else family, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
        head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        if head.bias is not None:
            head.bias.copy_(torch.linspace(-1, 1, len(head.bias)))
    halved: Any = model
    source = tiny.save(halved.to(dtype), folder / "source")
    bittern.quantize(source, folder / "out", bits=8, group_size=32, method="rtn", dtype=NAMES[dtype])
    return folder / "out"


def ends(model: PreTrainedModel) -> tuple[Any, Any]:
    return model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[no-untyped-call]


def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.randint(3, 250, (2, 11), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("family", FAMILIES)
def test_stored_ends_change_nothing(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = artifact(tmp_path, family, dtype)
    model = bittern.load(folder, device="cpu")
    embedding, head = ends(model)
    if family == "mamba":
        assert type(embedding) is nn.Embedding and type(head) is nn.Linear
        assert head.weight.dtype == torch.float32
        return
    assert isinstance(embedding, StoredEmbedding) and isinstance(head, StoredLinear)
    assert embedding.weight.dtype == head.weight.dtype == dtype
    assert (embedding.weight.data_ptr() == head.weight.data_ptr()) == (family in ("tied", "gemma3_text"))
    assert model.dtype == torch.float32
    # The same layers with both ends as transformers has them, in float32.
    plain = copy.deepcopy(model)
    theirs = ends(bittern.load(folder, device="cpu", kernels="torch"))
    assert type(theirs[1]) is nn.Linear and theirs[1].weight.dtype == torch.float32
    plain.set_input_embeddings(theirs[0])
    plain.set_output_embeddings(theirs[1])  # type: ignore[no-untyped-call]
    expected = logits(plain)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=float(expected.abs().max()) * 1e-5)


@pytest.mark.parametrize("kernels", [pytest.param("native", marks=needs_native), "torch"])
@pytest.mark.parametrize("family", ["llama", "tied", "phi"])
def test_a_packed_head(family: str, kernels: str, tmp_path: Path) -> None:
    folder = artifact(tmp_path, family, torch.bfloat16)
    plain = bittern.load(folder, device="cpu", kernels="torch")
    model = bittern.load(folder, device="cpu", kernels=kernels, lm_head_bits=8)
    embedding, head = ends(model)
    assert isinstance(head, QuantLinear)
    part = head.parts[0]
    assert isinstance(part, NativeMatrix if kernels == "native" else PackedMatrix) and part.group_size == 32
    weight = ends(plain)[1].weight
    assert torch.equal(head.weight, round_to_nearest(weight, QuantSpec(8, 32)).dequantize())
    error = (head.weight - weight).abs().view(weight.shape[0], -1, 32)
    step = weight.abs().view(weight.shape[0], -1, 32).amax(2, keepdim=True) * 2 / 255
    assert error.max() > 0 and bool((error <= step * 0.57).all())  # half, and the scale as float16
    assert torch.equal(embedding.weight.float(), ends(plain)[0].weight)
    ends(plain)[1].weight = nn.Parameter(head.weight, requires_grad=False)
    expected = logits(plain)
    assert (logits(model) - expected).norm() <= 5e-4 * expected.norm()
    with pytest.raises(BitternError, match="save_pretrained"):
        model.save_pretrained(tmp_path / "again")


def test_what_is_refused(tmp_path: Path) -> None:
    folder = artifact(tmp_path, "llama", torch.float32)
    for options, message in (
        ({"lm_head_bits": 4}, "lm_head_bits: expected 8, found 4"),
        ({"kernels": "fast"}, "kernels: expected auto, torch or native, found 'fast'"),
        ({"activations": "a4"}, "activations: expected one of a16, a8, found 'a4'"),
        ({"threads": 0}, "threads: expected at least 1, found 0"),
    ):
        with pytest.raises(BitternError, match=message):
            bittern.load(folder, device="cpu", **options)


def test_kernels_are_said_and_never_silently_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = artifact(tmp_path, "llama", torch.float32)
    monkeypatch.setattr(native, "_load", lambda: (None, "it was not built"))
    model = bittern.load(folder, device="cpu")
    assert vars(model)["kernels"] == "torch (native runtime: it was not built)"
    assert vars(model)["native_decoder"] is None
    assert not any(isinstance(module, NativeMatrix | StoredLinear) for module in model.modules())
    with pytest.raises(BitternError, match="native runtime: it was not built"):
        bittern.load(folder, device="cpu", kernels="native")


@needs_native
def test_the_number_of_threads_of_the_caller_stays(tmp_path: Path) -> None:
    folder = artifact(tmp_path, "llama", torch.float32)
    before = torch.get_num_threads()
    one, two = (bittern.load(folder, device="cpu", threads=threads) for threads in (1, 2))
    assert torch.get_num_threads() == before
    assert torch.equal(logits(one), logits(two))
    assert {module.settings.threads for module in two.modules() if isinstance(module, NativeMatrix)} == {2}
