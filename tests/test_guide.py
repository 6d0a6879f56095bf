"""What each token and output counts: against the Fisher information as autograd gives it, and where it goes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import bittern
from bittern.checkpoint import open_checkpoint
from bittern.errors import BitternError
from bittern.model import Matrix, blocks, build, load_dense, matrices, weight_map
from bittern.quantize import backward
from bittern.quantize.backward import root_of_fisher
from bittern.quantize.effort import EFFORTS
from bittern.quantize.guide import Guide, find_guides, token_weights
from bittern.quantize.plan import make_plan
from bittern.quantize.solve import Solver
from bittern.replay import logits_after
from tests import tiny

IDS = torch.randint(4, 60, (1, 5), generator=torch.Generator().manual_seed(5))
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the oracles compute, whatever this machine multiplies faster."""
    monkeypatch.setattr("bittern.replay.fast_in_sixteen_bits", lambda _: False)
    monkeypatch.setattr(backward, "KEPT", torch.float32)


@pytest.fixture(scope="module", params=["llama", "gpt2", "phi"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.random_model(request.param, vocab_size=64), tmp_path_factory.mktemp("source"))


def guide_of(source: Path, batches: list[Tensor]) -> Guide:
    """Of all matrices of a checkpoint."""
    with open_checkpoint(source) as checkpoint:
        model = build(checkpoint.config)
        sources = weight_map(model, checkpoint.tensors)
        prefix, found = blocks(model)
        members = [matrices(model, f"{prefix}.{position}", sources) for position in range(len(found))]
        guides = dict(find_guides(model, checkpoint, sources, members, batches, CPU))
        assert all(tensor.device.type == "meta" for tensor in model.state_dict().values())
    for position, each in enumerate(members):
        assert list(guides[position].sizes) == list(guides[position].curvatures) == each
    parts = [guides[position] for position in range(len(members))]
    return Guide(
        {m: sizes for part in parts for m, sizes in part.sizes.items()},
        {m: curvature for part in parts for m, curvature in part.curvatures.items()},
    )


def fisher(source: Path, matrix: Matrix) -> Tensor:
    """Of every position, the trace of the Fisher information of all predictions by the output of a matrix there."""
    with open_checkpoint(source) as checkpoint:
        model = load_dense(checkpoint)
    module = model.get_submodule(matrix.module)

    def logits(moved: Tensor) -> Tensor:
        handle = module.register_forward_hook(lambda _, __, output: output + moved.view_as(output))
        found: Tensor = model(IDS, use_cache=False).logits[0]
        handle.remove()
        return found

    still = torch.zeros(IDS.shape[1], matrix.out_features)
    jacobian: Any = torch.autograd.functional.jacobian
    slopes = jacobian(logits, still)  # predictions, vocabulary, positions, outputs
    p = logits(still).softmax(1).detach()[:, :, None, None]
    variance: Tensor = (p * slopes.square()).sum(1) - (p * slopes).sum(1).square()
    return variance.sum((0, 2))


@pytest.mark.parametrize("logits", [1, 2, 100])
def test_sizes_are_the_fisher_information_on_average(
    source: Path, logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backward, "LOGITS_AT_ONCE", {"cpu": logits})  # there are 5 positions
    draws = 600
    sizes = guide_of(source, [IDS.expand(draws, -1)]).sizes
    for matrix in list(sizes)[:: max(1, len(sizes) // 5)]:
        found = sizes[matrix]
        assert found.mean() == pytest.approx(1.0, rel=1e-4)
        wanted = fisher(source, matrix)
        wanted /= wanted.mean()
        error = (found.std(0) + wanted * found.mean(1).std()) / draws**0.5  # sizes are divided by a mean that errs too
        assert bool(((found.mean(0) - wanted).abs() <= 4 * error + 1e-4).all()), matrix.label


def test_predictions_are_drawn_apart_and_as_often_as_they_are_likely() -> None:
    logits = torch.tensor([[[2.0, 0.0, -1.0, 0.5], [0.0, 0.1, 0.2, -torch.inf]]])
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([root_of_fisher(logits[0], generator).flatten() for _ in range(20_000)])
    wanted = torch.zeros(8, 8)
    for place, p in zip((slice(4), slice(4, 8)), logits[0].softmax(1), strict=True):
        wanted[place, place] = torch.diag(p) - p.outer(p)
    torch.testing.assert_close(draws.T @ draws / len(draws), wanted, rtol=0, atol=0.01)


def test_batches_do_not_decide_what_a_token_counts(source: Path) -> None:
    ids = torch.randint(4, 60, (6, 12), generator=torch.Generator().manual_seed(6))
    one, other = guide_of(source, list(torch.split(ids, 1))), guide_of(source, list(torch.split(ids, 4)))
    for matrix in one.sizes:
        torch.testing.assert_close(one.sizes[matrix], other.sizes[matrix], rtol=1e-3, atol=1e-5)
        curvature = one.curvatures[matrix]
        atol = 1e-5 * float(curvature.abs().max())
        torch.testing.assert_close(curvature, other.curvatures[matrix], rtol=1e-3, atol=atol)


def test_curvatures_are_those_of_the_gradients(source: Path) -> None:
    """Against gradients as autograd keeps them, every token divided by the root of its size."""
    ids = torch.randint(4, 60, (3, 7), generator=torch.Generator().manual_seed(8))
    guide = guide_of(source, [ids])
    with open_checkpoint(source) as checkpoint:
        model = load_dense(checkpoint)
    outputs: dict[str, Tensor] = {}
    for matrix in guide.curvatures:

        def keep(_: Any, __: Any, output: Tensor, name: str = matrix.module) -> None:
            output.requires_grad_() if output.is_leaf else output.retain_grad()
            outputs[name] = output

        model.get_submodule(matrix.module).register_forward_hook(keep)
    logits = model(ids, use_cache=False).logits
    draws = [torch.Generator().manual_seed(window) for window in range(3)]
    logits.backward(torch.stack([root_of_fisher(*each) for each in zip(logits.detach(), draws, strict=True)]))
    for matrix, found in guide.curvatures.items():
        gradient = outputs[matrix.module].grad
        assert gradient is not None
        rows = gradient.reshape(-1, matrix.out_features).double()
        # Some processors make exactly 0 of what a softmax over one key sends back.
        wanted = sum(torch.outer(row, row) / row.norm() for row in rows if row.any()) / len(rows)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()))


def test_sixteen_bits_tell_the_same(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(4, 60, (16, 32), generator=torch.Generator().manual_seed(9))
    exact = guide_of(source, [ids])
    monkeypatch.setattr("bittern.replay.fast_in_sixteen_bits", lambda _: True)
    monkeypatch.setattr(backward, "KEPT", torch.bfloat16)
    found = guide_of(source, [ids])
    differs = False
    for matrix, curvature in exact.curvatures.items():
        error = float((found.curvatures[matrix] - curvature).norm() / curvature.norm())
        assert error < 0.05, matrix.label
        differs |= error > 1e-5
    assert differs


def test_matrices_that_share_an_input_count_alike() -> None:
    q, k, other = (Matrix(name, None, False, 4, 4, ((name, 0, 4),)) for name in "qko")
    sizes = {q: torch.tensor([[1.0, 7.0]]), k: torch.tensor([[3.0, 1.0]])}
    weights = token_weights(sizes, [q, k])
    assert weights is not None and torch.equal(weights, torch.tensor([[2.0, 4.0]]).sqrt())
    assert token_weights(sizes, [q, other]) is None


def test_blocks_of_experts_need_no_pass(tmp_path: Path) -> None:
    model = tiny.random_model("mixtral", num_local_experts=4, num_experts_per_tok=2, vocab_size=64)
    source = tiny.save(model, tmp_path / "source")
    with open_checkpoint(source) as checkpoint:
        model = build(checkpoint.config)
        sources = weight_map(model, checkpoint.tensors)
        prefix, found = blocks(model)
        plan = make_plan([matrices(model, f"{prefix}.{i}", sources) for i in range(len(found))], 3, 32, True)
        solver = Solver(model, checkpoint, sources, plan, 0.01, CPU, EFFORTS["best"])
        assert solver._guide([IDS], (), None) == {}
        assert all(tensor.device.type == "meta" for tensor in model.state_dict().values())


def test_a_gradient_that_is_no_number_is_an_error(tmp_path: Path) -> None:
    model = tiny.random_model(vocab_size=64)
    for name, value in (("gate_proj", 1e30), ("up_proj", 1e-30)):  # their product is about 1
        model.get_parameter(f"model.layers.1.mlp.{name}.weight").data.fill_(value)
    with pytest.raises(BitternError, match=r"layers\.1\.mlp\.up_proj: a gradient of its output is NaN or infinite"):
        guide_of(tiny.save(model, tmp_path / "source"), [IDS])
    model.get_parameter("model.layers.1.mlp.up_proj.weight").data.fill_(1e30)
    with pytest.raises(BitternError, match=r"layers\.1: NaN or infinite output for calibration sample 0"):
        guide_of(tiny.save(model, tmp_path / "other"), [IDS])


def test_best_solves_for_what_counts(
    text: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny.save(tiny.random_model(), tmp_path / "source", tokenizer)
    made: list[dict[str, Tensor]] = []
    for number, (shape, weigh) in enumerate(((False, False), (True, False), (True, True))):
        monkeypatch.setitem(EFFORTS, "fast", replace(EFFORTS["fast"], shape=shape, weigh=weigh))
        out, told = tmp_path / str(number), list[tuple[int, int]]()
        options: dict[str, Any] = {"bits": 3, "group_size": 32, "nsamples": 24, "seqlen": 32, "batch_size": 4}
        options["on_weighed"] = lambda *at, told=told: told.append(at)
        manifest = bittern.quantize(source, out, dataset=str(text), **options)
        for layer in manifest["layers"]:
            rows, columns = layer["shape"]
            share = layer["left"].get("shape")
            assert (share is not None and share <= 1) == (shape and (weigh or rows <= columns)), layer
        blocks = len(told)
        assert told == [(done, blocks) for done in range(1, blocks + 1)] and (blocks > 1) == shape
        made.append(load_file(out / "model.safetensors"))
    packed = [name for name in made[0] if "qweight" in name]
    for one, other in ((0, 1), (1, 2)):
        assert any(not torch.equal(made[one][name], made[other][name]) for name in packed)


@pytest.mark.parametrize(
    ("error", "raised", "words"),
    [
        (torch.OutOfMemoryError("tried to allocate 31 GiB"), torch.OutOfMemoryError, "^tried to allocate"),
        (
            RuntimeError("can't allocate memory"),
            BitternError,
            "one returns .RuntimeError: can't alloc",
        ),
    ],
)
def test_too_little_memory_is_not_an_architecture(
    error: Exception, raised: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits are the largest tensor of all; CUDA and CPU say differently that they do not fit."""
    model: Any = tiny.random_model(vocab_size=64)

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(model.lm_head, "forward", fail)
    with pytest.raises(raised, match=words):
        logits_after(model, model.model.layers, IDS, torch.zeros(1, 5, 64))
