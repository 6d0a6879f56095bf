"""A model's attention regrouped, one block after the other, each taught by the block that it replaces.

For every block of the source:

1. :func:`observe`: the inputs of its attention on calibration text, and what the block makes of them;
2. the heads that lose least by sharing are grouped and merged (:mod:`bittern.uptrain.merge`);
3. :func:`lesson`: the output projection once more, by least squares on what the merged heads give;
4. :func:`distill`: queries, keys, values and output trained on the output of the source's attention.

The new block gets the hidden states that the new blocks before it make, and is to give those of the source: errors of
earlier blocks are corrected as far as attention can. Every stage is kept only where it makes the error of the block's
output smaller, on windows that neither lesson nor distillation learns from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bittern import model as live
from bittern.errors import BitternError
from bittern.quantize.drift import learned_from
from bittern.quantize.hessian import Accumulator
from bittern.replay import BlockCall, advance, capture_all
from bittern.training.train import cosine
from bittern.uptrain import merge as closed
from bittern.uptrain.heads import (
    PAIRINGS,
    Counts,
    find_attention,
    find_pairings,
    key_projection,
    normed,
    output_projection,
    read_heads,
    write_heads,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RIDGE = 1e-4
"""Of the least squares for the output projection, as a share of the mean diagonal."""

_UNKNOWN_ROPE = (
    "{}: turning keys and queries by RoPE's pairs changes the output, or cannot be tried, so its rotary embedding is"
    " none of those known; --init mean --group neighbour does without"
)

UNSEEN = 1e-6
"""Energy, as a share of the mean, of directions that calibration text never takes: heads keep what they can there."""

_WARMUP = 10  # steps


@dataclass(frozen=True)
class Recipe:
    """How heads become groups.

    Attributes:
        init: "aligned" (merged in closed form), "mean" or "first".
        group: "similar" or "neighbour".
        passes: times that layer-wise distillation sees what it learns from; 0 leaves out the least squares too.
        lr: largest learning rate of that distillation.
        seed: of the order of batches.
    """

    init: str = "aligned"
    group: str = "similar"
    passes: int = 12
    lr: float = 2e-3
    seed: int = 0


@dataclass
class Stream:
    """One block and what goes through it.

    Attributes:
        calls: how the model calls it, per batch.
        source: hidden states that the source's block gets, per batch, fp32 (windows, positions, hidden_size).
        target: those that it gives.
        state: those that the new block gets.
        learned: the first so many batches are learned from, on the others errors are measured.
    """

    calls: list[BlockCall]
    source: list[Tensor]
    target: list[Tensor]
    state: list[Tensor]
    learned: int = 0

    def weights(self, index: int) -> Tensor:
        """What a squared error at each position of a batch counts, (windows, positions, 1).

        Hidden states are normalized before they are used, so an error matters by their length, and attention sinks are
        hundreds of times as long as other positions.
        """
        return 1 / self.target[index].square().mean(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def regroup(
    teacher: PreTrainedModel, student: PreTrainedModel, batches: Sequence[Tensor], recipe: Recipe, counts: Counts
) -> Iterator[dict[str, Any]]:
    """Give the student's attention its heads, block by block; all else it has already.

    Args:
        teacher: the source, whole and in memory.
        student: the same model with fewer key-value heads; what is not attention equals the teacher's.
        batches: calibration ids, int64 (windows, positions) each. With a single window there is nothing to measure
            errors on but what would be learned from, so neither lesson nor distillation runs.
        recipe: how.
        counts: heads of the teacher.

    Yields:
        A record per block with attention: ``layer``, ``groups``, and as shares of what the source's block adds to its
        input, the errors of the output with pooled heads (``error_mean``), merged ones, after the least squares and
        after distillation; None where a stage did not run.

    Raises:
        BitternError: naming the block whose hidden states are not numbers, or whose RoPE is not understood.
    """
    prefix, blocks = live.blocks(teacher)
    new_blocks = live.blocks(student)[1]
    size = counts.key_value // student.config.get_text_config(decoder=True).num_key_value_heads
    batches, learned = _held_apart(batches)
    source, calls = capture_all(teacher, blocks, batches, teacher.device)
    state = [state.clone() for state in source]
    for position, (block, new) in enumerate(zip(blocks, new_blocks, strict=True)):
        name = f"{prefix}.{position}"
        stream = Stream([recorded[position] for recorded in calls], source, [], state, learned)
        attention = find_attention(block)
        observed = observe(block, attention, stream, name)
        if attention is not None:
            record = _regroup_block(block, new, attention, stream, observed, recipe, counts, size, name)
            yield {"layer": name, **record}
        advance(new, state, stream.calls)
        source = stream.target


def _held_apart(batches: Sequence[Tensor]) -> tuple[list[Tensor], int]:
    """The same windows in batches of which the first are learned from and the others are not, and how many are."""
    windows, size = torch.cat(list(batches)), len(batches[0])
    count = learned_from(len(windows)) if len(windows) > 1 else 0
    parts = (windows[:count], windows[count:])
    return [batch for part in parts for batch in torch.split(part, size) if len(batch)], -(-count // size)


@dataclass
class Lesson:
    """What :func:`lesson` found for an attention to learn.

    Attributes:
        calls: how its block calls it, per batch that is learned from.
        inputs: its inputs, likewise.
        targets: the outputs that are wanted, likewise.
        error: of the block's output, see :func:`block_error`, with the output projection solved.
    """

    calls: list[BlockCall]
    inputs: list[Tensor]
    targets: list[Tensor]
    error: float


@dataclass
class Observed:
    """What :func:`observe` saw of an attention.

    Attributes:
        moment: fp64 (in_features + 1, in_features + 1), mean of (x, 1) (x, 1)' over its inputs, damped.
        hidden: its input of the first batch.
        kwargs: what else it was called with then.
        outputs: its outputs, per batch.
    """

    moment: Tensor
    hidden: Tensor
    kwargs: dict[str, Any]
    outputs: list[Tensor]


def observe(block: nn.Module, attention: str | None, stream: Stream, name: str) -> Observed | None:
    """Run the source's block over all batches; its outputs become ``stream.target``.

    Returns:
        What its attention saw; None for a block without.
    """
    found: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []
    inputs: list[Tensor] = []
    handles = []
    if attention is not None:
        module = block.get_submodule(attention)
        handles = [
            module.register_forward_hook(lambda _, *call: found.append(call), with_kwargs=True),
            key_projection(module).register_forward_pre_hook(lambda _, args: inputs.append(args[0])),
        ]
    sums: Accumulator | None = None
    outputs: list[Tensor] = []
    first: tuple[Tensor, dict[str, Any]] | None = None
    try:
        with torch.no_grad():
            for hidden, call in zip(stream.source, stream.calls, strict=True):
                target = call.run(block, hidden)
                _check_finite(target, name)
                stream.target.append(target)
                if attention is None:
                    continue
                args, kwargs, output = found.pop()
                outputs.append(output[0] if isinstance(output, tuple) else output)
                rows = inputs.pop().flatten(0, -2)
                sums = sums or Accumulator(rows.shape[1] + 1, rows.device)
                sums.add(torch.cat([rows, rows.new_ones(len(rows), 1)], 1))
                kwargs = dict(kwargs)
                first = first or (args[0] if args else kwargs.pop("hidden_states"), kwargs)
    finally:
        for handle in handles:
            handle.remove()
    if sums is None or first is None:
        return None
    moment = sums.mean().double()
    moment.diagonal().add_(UNSEEN * moment.diagonal().mean())
    return Observed(moment, *first, outputs)


def _regroup_block(
    block: nn.Module,
    new: nn.Module,
    attention: str,
    stream: Stream,
    observed: Observed | None,
    recipe: Recipe,
    counts: Counts,
    size: int,
    name: str,
) -> dict[str, Any]:
    """Heads for one block; its record without its name."""
    assert observed is not None
    module, target = block.get_submodule(attention), new.get_submodule(attention)
    heads = read_heads(module, counts)
    neighbours = closed.neighbours(counts.key_value, size)
    keys_fixed = normed(module)
    rotary, pairing = _rotary(module, observed, counts, keys_fixed, recipe, name)
    groups = neighbours
    if recipe.group == "similar":
        groups = closed.similar(heads, size, observed.moment, rotary, pairing, keys_fixed)
    write_heads(target, closed.pool(heads, neighbours, "mean"))
    record: dict[str, Any] = {"groups": [list(group) for group in groups], "error_mean": block_error(new, stream)}
    record |= dict.fromkeys(("error_aligned", "error_solved", "error_distilled"))
    if recipe.init == "aligned":
        write_heads(target, closed.merge(heads, groups, observed.moment, rotary, pairing, keys_fixed))
        record["error_aligned"] = block_error(new, stream)
        if record["error_aligned"] > record["error_mean"]:
            write_heads(target, closed.pool(heads, neighbours, "mean"))
            record["groups"] = [list(group) for group in neighbours]
    elif recipe.init == "first" or groups != neighbours:
        write_heads(target, closed.pool(heads, groups, recipe.init))
    if recipe.passes and stream.learned:
        taught = lesson(new, attention, stream, observed.outputs)
        record["error_solved"] = taught.error
        record["error_distilled"] = distill(new, attention, stream, taught, recipe)
    return record


def _rotary(
    attention: nn.Module, observed: Observed, counts: Counts, keys_fixed: bool, recipe: Recipe, name: str
) -> tuple[int, str]:
    """The dimensions that RoPE turns, and how it pairs them."""
    embeddings = observed.kwargs.get("position_embeddings")
    wanted = not keys_fixed and (recipe.init == "aligned" or recipe.group == "similar")
    if embeddings is None:
        if wanted and any("rotary" in each for each, _ in attention.named_modules()):
            raise BitternError(_UNKNOWN_ROPE.format(name))
        return 0, PAIRINGS[0]
    if not isinstance(embeddings, tuple) or len(embeddings) != 2:
        raise BitternError(
            f"{name}: expected position embeddings of cosines and sines, found {type(embeddings).__name__}"
        )
    rotary = int(embeddings[0].shape[-1])
    if not wanted:
        return rotary, PAIRINGS[0]
    pairings = find_pairings(attention, counts, observed.kwargs, observed.hidden, rotary) if rotary else []
    if len(pairings) > 1 and rotary > 2:
        return 0, PAIRINGS[0]  # a layer without RoPE, which is given the embeddings as the others are
    if not pairings:
        raise BitternError(_UNKNOWN_ROPE.format(name))
    return rotary, pairings[0]


@torch.no_grad()
def block_error(block: nn.Module, stream: Stream) -> float:
    """The error of the new block's output over what the source's block adds to its input, on batches that are not
    learned from; each position counts as :meth:`Stream.weights` says."""
    wrong = whole = 0.0
    for index in range(stream.learned, len(stream.calls)):
        output = stream.calls[index].run(block, stream.state[index])
        root = stream.weights(index).sqrt()
        wrong += float(((output - stream.target[index]) * root).double().square().sum())
        whole += float(((stream.target[index] - stream.source[index]) * root).double().square().sum())
    return math.sqrt(wrong / whole) if whole > 0 else math.sqrt(wrong)


@torch.no_grad()
def lesson(block: nn.Module, attention: str, stream: Stream, outputs: Sequence[Tensor]) -> Lesson:
    """What the new attention gets, and what it should give; and its output projection solved for that.

    Wanted are the source's outputs; where attention is added to the hidden states as it is, better also what these have
    drifted from the source's. Which of both holds for this architecture shows in the block's output: each is solved by
    ridge least squares (drawn towards the projection as it was, not towards zero), and the better one stays, if it is
    better than the projection as it was.

    Args:
        block: the new block.
        attention: name of its attention.
        stream: what goes through it.
        outputs: of the source's attention, per batch.
    """
    module = block.get_submodule(attention)
    projection = output_projection(module)
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    features: list[Tensor] = []
    handles = [
        module.register_forward_pre_hook(lambda _, *call: found.append(call), with_kwargs=True),
        projection.register_forward_pre_hook(lambda _, args: features.append(args[0])),
    ]
    learned = slice(stream.learned)
    outputs, states = list(outputs[learned]), stream.state[learned]
    drifted = [
        output + source - state for output, source, state in zip(outputs, stream.source[learned], states, strict=True)
    ]
    width, height = projection.in_features, projection.out_features
    gram = torch.zeros(width, width, dtype=torch.float64, device=projection.weight.device)
    sums = gram.new_zeros(2, width, height)
    bias = 0.0 if projection.bias is None else projection.bias
    calls: list[BlockCall] = []
    inputs: list[Tensor] = []
    try:
        batches = zip(stream.calls[learned], states, outputs, drifted, strict=True)
        for index, (call, state, *targets) in enumerate(batches):
            call.run(block, state)
            rows = features.pop().flatten(0, -2)
            weighted = (rows * stream.weights(index).flatten(0, -2)).T
            gram += (weighted @ rows).double()
            for total, target in zip(sums, targets, strict=True):
                total += (weighted @ (target - bias).flatten(0, -2)).double()
            args, kwargs = found.pop()
            kwargs = dict(kwargs)
            inputs.append(args[0] if args else kwargs.pop("hidden_states"))
            calls.append(BlockCall(args[1:], kwargs))
    finally:
        for handle in handles:
            handle.remove()
    damping = RIDGE * (float(gram.diagonal().mean()) or 1.0)  # values that are all zero teach nothing
    gram.diagonal().add_(damping)
    before = projection.weight.detach().clone()
    errors, solutions = [block_error(block, stream)], [before]
    for total in sums:
        solutions.append(torch.linalg.solve(gram, total + damping * before.T.double()).T.to(before.dtype))
        projection.weight.copy_(solutions[-1])
        errors.append(block_error(block, stream))
    projection.weight.copy_(solutions[min(range(3), key=lambda index: errors[index])])
    return Lesson(calls, inputs, drifted if errors[2] < errors[1] else outputs, min(errors))


def distill(block: nn.Module, attention: str, stream: Stream, lesson: Lesson, recipe: Recipe) -> float:
    """Train the attention's projections on the outputs that are wanted of it: mean squared error, Adam, cosine.

    Returns:
        The error that remains, see :func:`block_error`; when training has made it no smaller, what was there stays.
    """
    module = block.get_submodule(attention)
    parameters = list(module.parameters())
    before = [parameter.detach().clone() for parameter in parameters]
    count = len(lesson.calls)
    generator = torch.Generator().manual_seed(recipe.seed)
    order = [index for _ in range(recipe.passes) for index in torch.randperm(count, generator=generator).tolist()]
    optimizer = torch.optim.Adam(parameters, lr=recipe.lr, betas=(0.9, 0.98))
    module.requires_grad_(True)
    with torch.enable_grad():
        for step, index in enumerate(order):
            optimizer.param_groups[0]["lr"] = recipe.lr * min(1.0, (step + 1) / _WARMUP) * cosine(step / len(order))
            output = lesson.calls[index].run(module, lesson.inputs[index])
            loss = ((output - lesson.targets[index]).square() * stream.weights(index)).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    module.requires_grad_(False)
    optimizer.zero_grad(set_to_none=True)
    error = block_error(block, stream)
    if error < lesson.error:
        return error
    with torch.no_grad():
        for parameter, old in zip(parameters, before, strict=True):
            parameter.copy_(old)
    return lesson.error


def _check_finite(hidden: Tensor, name: str) -> None:
    if not bool(torch.isfinite(hidden).all()):
        bad = int((~torch.isfinite(hidden.flatten(1)).all(1)).nonzero()[0])
        raise BitternError(f"{name}: NaN or infinite output for window {bad} of a calibration batch")
