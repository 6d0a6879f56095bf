"""Blocks walked stage by stage, against the same blocks run whole with the same weights."""

from __future__ import annotations

import ctypes
import math
import sys
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bittern.errors import BitternError
from bittern.model import Matrix, blocks, get_weight, matrices, weight_map
from bittern.quantize.drift import Drift
from bittern.quantize.effort import pick_effort
from bittern.quantize.stages import Stage, Walks, exact_stages, narrowed
from bittern.replay import BlockCall, capture, sixteen_bits
from tests import tiny

IDS = torch.randint(4, 200, (6, 20), generator=torch.Generator().manual_seed(5))


def start(model: PreTrainedModel) -> tuple[list[Matrix], list[Tensor], list[BlockCall]]:
    """The matrices of the first block, and two batches of unequal size before it."""
    prefix, layers = blocks(model)
    found = matrices(model, f"{prefix}.0", weight_map(model, model.state_dict()))
    captured = [capture(model, layers, ids) for ids in torch.split(IDS, [4, 2])]
    return found, [state.clone() for state, _ in captured], [recorded[0] for _, recorded in captured]


def walk(
    model: PreTrainedModel, block: nn.Module, stages: list[Stage], hidden: list[Tensor], calls: list[BlockCall]
) -> None:
    """All batches through a block whose matrices stay as they are."""
    with Walks(model, block, stages, hidden, calls) as walks:
        for stage in stages:
            list(walks.inputs(stage))
        walks.finish()


def names(stage: Any) -> list[str]:
    return [matrix.module.rpartition(".")[2] for matrix in stage.matrices]


@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt2", "olmo2"])
@pytest.mark.parametrize("rough", [False, True])
def test_every_matrix_gets_what_the_changed_ones_before_it_give(
    kind: str, rough: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bittern.replay.fast_in_sixteen_bits", lambda _: True)
    model = tiny.random_model(kind)
    block = blocks(model)[1][0]
    found, hidden, calls = start(model)
    exact, before = [state.clone() for state in hidden[:1]], [state.clone() for state in hidden]
    stages = exact_stages(model, block, found, exact, calls[:1], rough)
    assert stages is not None and sorted(m.label for s in stages for m in s.matrices) == sorted(m.label for m in found)
    if kind == "llama":
        assert [names(s) for s in stages] == [
            ["q_proj", "k_proj", "v_proj"],
            ["o_proj"],
            ["gate_proj", "up_proj"],
            ["down_proj"],
        ]
    given: list[Tensor] = []
    handles = [
        model.get_submodule(stage.matrices[0].module).register_forward_pre_hook(lambda _, x: given.append(x[0].clone()))
        for stage in stages
    ]
    with torch.no_grad(), sixteen_bits(before[0].device, rough):
        assert torch.equal(exact[0], calls[0].run(block, before[0]))
    for handle in handles:
        handle.remove()
    assert all(torch.equal(stage.exact[0], narrowed(x)) for stage, x in zip(stages, given, strict=True))
    seen: list[list[Tensor]] = []
    with Walks(model, block, stages, hidden, calls, rough) as walks, torch.no_grad():
        for stage in stages:
            seen.append([x.clone() for x in walks.inputs(stage)])
            for matrix in stage.matrices:
                get_weight(model, matrix).mul_(0.7)
        walks.finish()
    # The block has only changed weights now: run whole, it must give every matrix what it got on the way.
    for number, (state, call) in enumerate(zip(before, calls, strict=True)):
        whole = [state.clone()]
        again = exact_stages(model, block, found, whole, [call], rough)
        assert again is not None and torch.equal(whole[0], hidden[number])
        for stage, inputs in zip(again, seen, strict=True):
            assert torch.equal(stage.exact[0], narrowed(inputs[number]))


@pytest.mark.parametrize("rough", [False, True])
def test_a_block_that_is_solved_already_is_walked_the_same_way_and_keeps_nothing(
    rough: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.random_model()
    block = blocks(model)[1][0]
    found, hidden, calls = start(model)
    kept, walked = ([state.clone() for state in hidden] for _ in range(2))
    stages = exact_stages(model, block, found, kept, calls, rough)
    runs: list[int] = []
    block.register_forward_hook(lambda *_: runs.append(1))
    monkeypatch.setattr(sys.modules[exact_stages.__module__], "narrowed", None)
    again = exact_stages(model, block, found, walked, calls, rough, keep=False)
    assert stages is not None and again is not None and len(runs) == len(calls)
    assert [(s.matrices, s.stream) for s in again] == [(s.matrices, s.stream) for s in stages]
    assert not any(stage.exact or stage.streams for stage in again) and all(stage.exact for stage in stages)
    assert all(torch.equal(*pair) for pair in zip(walked, kept, strict=True))


def test_what_waits_is_16_bits_wide_where_it_fits() -> None:
    x = torch.tensor([[1 / 3, -6e4, 1e-3]])
    assert narrowed(x).dtype == torch.float16
    torch.testing.assert_close(narrowed(x).float(), x, rtol=2**-11, atol=0)
    for wide in (torch.tensor([1.0, 7e4]), torch.tensor([1.0, math.nan]), torch.tensor([2e-8, -1e-6])):
        assert narrowed(wide) is wide
    assert torch.equal(narrowed(x, torch.tensor([2.0, 4.0, 1.0])), (x / torch.tensor([2.0, 4.0, 1.0])).half())
    assert torch.equal(narrowed(x, torch.tensor([1.0, 0.5, 1.0])), x / torch.tensor([1.0, 0.5, 1.0]))
    brain = torch.tensor([7e4]).bfloat16()  # what products in bfloat16 put out
    assert narrowed(brain) is brain
    assert narrowed(brain, torch.tensor([2.0])).dtype == torch.float16


@pytest.mark.parametrize(
    ("kind", "spent", "state"),
    [
        ("llama", [[], [1], [0, 2], [3]], 0),
        ("gpt2", [[], [1], [0, 2], [3]], 0),
        # Phi gives one norm's output to attention and to the perceptron, and adds the block's input at the end.
        ("phi", [[], [], [2], [1, 3]], 2 * 20 * 64),
    ],
)
def test_what_nothing_reads_again_is_emptied(kind: str, spent: list[list[int]], state: int) -> None:
    """Or let go of; 0 is the block's input, n + 1 that of stage n."""
    model = tiny.random_model(kind)
    block = blocks(model)[1][0]
    found, hidden, calls = start(model)
    stages = exact_stages(model, block, found, [hidden[0].clone()], calls[:1])
    assert stages is not None
    heads = {"query_states", "key_states", "value_states"}
    assert [heads & {name for _, _, name in stage.dead} for stage in stages] == [set(), heads, set(), set()]
    whole = calls[1].run(block, hidden[1].clone())
    there = {0: weakref.ref(hidden[1])}
    gone: list[list[int]] = []
    with Walks(model, block, stages, hidden, calls) as walks:
        for number, stage in enumerate(stages):
            for x in walks.inputs(stage):
                there[number + 1] = weakref.ref(x)  # of the second batch, in the end
            del x
            gone.append([])
            for each, ref in list(there.items()):
                tensor = ref()
                if tensor is None or not tensor.numel():
                    gone[-1].append(each)
                    del there[each]
        del tensor
        assert gone == spent and hidden[1].numel() == state
        walks.finish()
    assert torch.equal(hidden[1], whole)


class Keeps(nn.Module):
    """Makes a tensor for the first batch and multiplies all with it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Any:
        if self.kept is None:
            self.kept = torch.full_like(x[:1, :1], 2.0)
        factor, own = self.kept, x.new_ones(1)
        return self.inner(x * factor * own)


@pytest.mark.parametrize("batches", [1, 2])
def test_what_is_made_once_for_all_batches_stays(batches: int) -> None:
    model = tiny.random_model()
    block: Any = blocks(model)[1][0]
    block.mlp = Keeps(block.mlp)
    found, hidden, calls = start(model)
    stages = exact_stages(model, block, found, [state.clone() for state in hidden[:batches]], calls[:batches])
    assert stages is not None
    assert {"factor", "own"} & {name for _, _, name in stages[-1].dead} == {"own"}
    whole = [call.run(block, state.clone()) for state, call in zip(hidden, calls, strict=True)]
    walk(model, block, stages, hidden, calls)
    assert all(map(torch.equal, hidden, whole))


class Unseen(nn.Module):
    """Reads a tensor, after the matrices between, from its address: no operation of torch."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        kept = x * 2
        there = np.ctypeslib.as_array((ctypes.c_float * kept.numel()).from_address(kept.data_ptr()))
        output = self.inner(x)
        return output + float(there[:64].sum())


@pytest.mark.parametrize("batches", [1, 2])
def test_what_kernels_read_that_torch_does_not_see_stays(batches: int) -> None:
    model = tiny.random_model()
    block: Any = blocks(model)[1][0]
    block.mlp = Unseen(block.mlp)
    found, hidden, calls = start(model)
    exact = [state.clone() for state in hidden[:batches]]
    stages = exact_stages(model, block, found, exact, calls[:batches])
    assert stages is not None and not any(stage.dead for stage in stages)
    whole = [call.run(block, state.clone()) for state, call in zip(hidden, calls, strict=True)]
    assert all(map(torch.equal, exact, whole))
    walk(model, block, stages, hidden, calls)
    assert all(map(torch.equal, hidden, whole))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_rough_products_are_near_those_in_fp32_and_end_with_the_walk(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bittern.replay.fast_in_sixteen_bits", lambda _: True)
    model = tiny.random_model(kind)
    block = blocks(model)[1][0]
    found, hidden, calls = start(model)
    gathered, ends = [], []
    for rough in (False, True):
        exact, states = [state.clone() for state in hidden[:1]], [state.clone() for state in hidden]
        stages = exact_stages(model, block, found, exact, calls[:1], rough)
        assert stages is not None
        with Walks(model, block, stages, states, calls, rough) as walks:
            for stage in stages:
                gathered.append((rough, walks.gather(stage, 1)[0].hessian))
                assert not torch.is_autocast_enabled("cpu")
            walks.finish()
        ends.append([*exact, *states])
    for one, other in zip(*ends, strict=True):
        assert other.dtype == torch.float32 and 0 < (one - other).norm() < 0.01 * one.norm()
    exact_moments, rough_moments = ([found for rough, found in gathered if rough is wanted] for wanted in (False, True))
    for one, other in zip(exact_moments, rough_moments, strict=True):
        assert torch.equal(other, other.T) and 0 < (one - other).norm() < 0.01 * one.norm()


@pytest.mark.parametrize(
    ("kind", "streams"),
    [
        ("llama", [None, "", None, "post_attention_layernorm"]),
        ("gpt2", [None, "", None, "ln_2"]),
        ("qwen3", [None, "", None, "post_attention_layernorm"]),
        ("gemma2", [None] * 4),  # norms what it adds
        ("olmo2", [None] * 4),
        ("phi", [None] * 4),  # adds two outputs at once
        ("granite", [None] * 4),  # adds a multiple of it
    ],
)
def test_streams_are_found_where_an_output_is_added_to_them(kind: str, streams: list[str | None]) -> None:
    more = {"residual_multiplier": 2} if kind == "granite" else {}
    model = tiny.random_model(kind, **more)
    prefix, layers = blocks(model)
    found, hidden, calls = start(model)
    exact = [state.clone() for state in hidden]
    stages = exact_stages(model, layers[0], found, exact, calls)
    assert stages is not None
    assert [stage.stream for stage in stages] == [name and f"{prefix}.0.{name}" for name in streams]
    given = [0.9 * state for state in hidden]
    behind: list[list[Tensor]] = []
    wanted: list[list[Tensor]] = []
    for stage in stages:
        if stage.stream is None:
            assert not stage.streams
        elif stage.stream == "":
            assert all(torch.equal(*pair) for pair in zip(stage.streams, hidden, strict=True))
            wanted.append([0.1 * state for state in hidden])
        else:  # what is added to the block's input by then, told by the block's output
            after = [call.run(layers[0], state) for call, state in zip(calls, given, strict=True)]
            inputs = exact_stages(model, layers[0], found, [state.clone() for state in given], calls)
            assert inputs is not None
            last = model.get_submodule(stage.matrices[0].module)
            before = [y - last(x.float()) for y, x in zip(after, inputs[-1].exact, strict=True)]
            wanted.append([full - less for full, less in zip(stage.streams, before, strict=True)])
    with Walks(model, layers[0], stages, given, calls) as walks:
        for stage in stages:
            list(walks.inputs(stage))
            if stage.stream is not None:
                behind.append(stage.behind)
        walks.finish()
    assert not any(stage.streams for stage in stages)
    for one, other in zip(behind, wanted, strict=True):
        for found_one, wanted_one in zip(one, other, strict=True):
            assert found_one.dtype == torch.bfloat16
            torch.testing.assert_close(found_one.float(), wanted_one.detach(), rtol=0.01, atol=1e-4)


def test_blocks_of_experts_are_not_walked() -> None:
    model = tiny.random_model("mixtral", num_local_experts=4, num_experts_per_tok=2)
    found, hidden, calls = start(model)
    assert exact_stages(model, blocks(model)[1][0], found, hidden, calls) is None


def test_few_bits_are_learned_from_more_windows_in_full_precision() -> None:
    for name in ("fast", "best"):
        effort = pick_effort(name)
        assert [effort.at(bits).exact_windows(16) for bits in (2, 2.5, 3, 4, 8)] == [8, 8, 4, 4, 4]
        assert [effort.exact_windows(windows) for windows in (1, 2, 4, 8, 10, 11)] == [1, 2, 2, 2, 2, 3]
    assert pick_effort("plain").at(2).exact_windows(16) == 0


def test_without_a_batch_in_full_precision_there_are_no_stages() -> None:
    model = tiny.random_model()
    assert exact_stages(model, blocks(model)[1][0], start(model)[0], [], []) is None


def test_tokens_count_what_they_are_said_to() -> None:
    model = tiny.random_model()
    block = blocks(model)[1][0]
    found, hidden, calls = start(model)
    stages = exact_stages(model, block, found, [state.clone() for state in hidden[:1]], calls[:1])
    assert stages is not None
    weights = torch.rand(6, 20, generator=torch.Generator().manual_seed(8))
    for stage in stages:
        stage.exact = [0.9 * x for x in stage.exact]
    with Walks(model, block, stages, [state.clone() for state in hidden], calls) as walks:
        inputs = [x.clone() for x in walks.inputs(stages[0])]
    less = stages[0].exact[0] - inputs[0]
    with Walks(model, block, stages, hidden, calls) as walks:
        moments, drift = walks.gather(stages[0], 1, weights)
    whole = torch.cat(inputs)
    wanted = torch.einsum("bp,bpi,bpj->ij", weights, whole, whole)
    assert moments.tokens == 120
    torch.testing.assert_close(moments.hessian, wanted / 120, rtol=1e-4, atol=1e-5)
    moved = torch.einsum("bp,bpi,bpj->ij", weights[:4], less, inputs[0])
    torch.testing.assert_close(drift._total, moved, rtol=1e-4, atol=1e-4)


def test_walks_that_are_given_up_leave_nothing() -> None:
    model = tiny.random_model()
    block = blocks(model)[1][0]
    found, hidden, calls = start(model)
    stages = exact_stages(model, block, found, [hidden[0].clone()], calls[:1])
    assert stages is not None
    with pytest.raises(RuntimeError, match="enough"), Walks(model, block, stages, hidden, calls) as walks:
        list(walks.inputs(stages[0]))
        raise RuntimeError("enough")
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_batch_that_misses_a_stage_is_an_error() -> None:
    model = tiny.random_model()
    block = blocks(model)[1][0]
    found, hidden, calls = start(model)
    stages = exact_stages(model, block, found, [hidden[0].clone()], calls[:1])
    assert stages is not None
    with (
        Walks(model, block, stages, hidden, calls) as walks,
        pytest.raises(BitternError, match=r"o_proj: .* without it"),
    ):
        list(walks.inputs(stages[1]))


def drift_of(given: Tensor, exact: Tensor, batches: int = 4) -> Drift:
    drift = Drift([chunk.unsqueeze(0) for chunk in exact.chunk(batches)], learned=batches - 1)
    for chunk in given.chunk(batches):
        drift.add(chunk.unsqueeze(0))
    return drift


def moments(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def test_what_follows_from_the_input_is_made_up_for() -> None:
    generator = torch.Generator().manual_seed(2)
    given = torch.randn(4000, 24, generator=generator)
    mixing = torch.eye(24) + 0.2 * torch.randn(24, 24, generator=generator)
    weight = torch.randn(10, 24, generator=generator)
    corrected, left = drift_of(given[:2000], given[:2000] @ mixing).corrected(
        torch.split(weight, [4, 6]), moments(given[:2000])
    )
    fresh = given[2000:]
    wanted = fresh @ mixing @ weight.T
    before, after = (fresh @ weight.T - wanted).square().mean(), (fresh @ corrected.T - wanted).square().mean()
    assert after < 0.15 * before
    fourth = slice(1500, 2000)  # what was held out
    for rows, share in zip((slice(0, 4), slice(4, 10)), left, strict=True):
        aim = given[fourth] @ mixing @ weight[rows].T
        errors = [(given[fourth] @ found[rows].T - aim).square().sum() for found in (corrected, weight)]
        assert share == pytest.approx(float(errors[0] / errors[1]), rel=1e-3)


@pytest.mark.parametrize("rough", [False, True])
def test_what_the_stream_has_missed_is_made_up_for(rough: bool) -> None:
    generator = torch.Generator().manual_seed(6)
    given = torch.randn(4000, 24, generator=generator)
    missed = given @ torch.randn(24, 10, generator=generator) + 0.1 * torch.randn(4000, 10, generator=generator)
    mixing = torch.eye(24) + 0.2 * torch.randn(24, 24, generator=generator)
    weight = torch.randn(10, 24, generator=generator)
    roots = torch.rand(4000, 1, generator=generator).sqrt() + 0.5
    learned, fresh = slice(0, 2000), slice(2000, 4000)
    hessian = moments(given[learned] * roots[learned])
    corrected = []
    for with_stream in (False, True):
        chunks = [given[learned] @ mixing, missed[learned].bfloat16()]
        exact, behind = ([chunk.unsqueeze(0) for chunk in whole.chunk(4)] for whole in chunks)
        drift = Drift(exact, 3, rough, (weight, behind) if with_stream else None)
        for x, root in zip(given[learned].chunk(4), roots[learned].chunk(4), strict=True):
            drift.add(x.unsqueeze(0), root.unsqueeze(0))
        assert not exact and (not behind or not with_stream)
        found, (left,) = drift.corrected([weight], hessian)
        assert left is not None and left < (0.1 if with_stream else 0.2)
        corrected.append(found)
    wanted = given[fresh] @ mixing @ weight.T + missed[fresh]  # the sum with the stream is to be what it was
    errors = [(given[fresh] @ found.T - wanted).square().mean() for found in (weight, *corrected)]
    assert errors[2] < 0.15 * min(errors[:2])


def test_batches_that_are_held_out_together_stay_apart() -> None:
    generator = torch.Generator().manual_seed(8)
    given, exact = torch.randn(2, 800, 24, generator=generator)
    exact = given + 0.1 * exact + given.roll(1, 1)
    weight = torch.randn(10, 24, generator=generator)
    found = []
    for chunks in (2, 4):  # half of it is held out: in one batch, or in two
        drift = Drift([each.unsqueeze(0) for each in exact.chunk(chunks)], chunks // 2)
        for x in given.chunk(chunks):
            drift.add(x.unsqueeze(0))
        corrected, (left,) = drift.corrected([weight], moments(given))
        assert left is not None
        found.append((corrected, left))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-4)


def test_noise_is_not_followed() -> None:
    generator = torch.Generator().manual_seed(3)
    given = torch.randn(400, 64, generator=generator)
    exact = given + torch.randn(400, 64, generator=generator)
    weight = torch.randn(8, 64, generator=generator)
    corrected, _ = drift_of(given, exact).corrected([weight], moments(given))
    # An unguarded step would be about a fifth of the weight's length here.
    assert float((corrected - weight).norm() / weight.norm()) < 0.05


def test_one_batch_cannot_be_learned_from_and_held_out() -> None:
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(4))
    weight = torch.ones(3, 8)
    corrected, left = drift_of(x, 2 * x, 1).corrected([weight], moments(x))
    assert torch.equal(corrected, weight) and left == [None]
