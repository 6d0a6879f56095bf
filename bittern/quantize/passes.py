"""What passes through a whole model take, seconds and bytes: sensitivities, what tokens and outputs count, training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from bittern import model as live
from bittern.quantize.backward import LOGITS_AT_ONCE
from bittern.quantize.job import Job
from bittern.quantize.rehearsal import BlockCosts, Line
from bittern.quantize.stopwatch import FP32
from bittern.quantize.tune import HELD_OUT, MICRO, SHORTLIST
from bittern.weight import BITS, QuantSpec

_HOLES = 1.3  # times what a step of training makes is what the heap takes for it: measured on two models


def measuring_seconds(
    job: Job, blocks: Sequence[BlockCosts], choices: Mapping[tuple[int, QuantSpec], Line], scale: float, read: float
) -> float:
    """The way back with every block's second moments, and all choices of bits; those that are fixed count as well."""
    took = _back_seconds(job, blocks, job.measured_samples, scale, read)
    for position, block in enumerate(blocks):
        groups = job.groups(position, block)
        took += block.gather(job.measured_samples * scale) if groups else 0.0
        for width, members in groups:
            rows = sum(matrix.out_features for matrix, _ in members)
            took += choices[any_bits(width, members[0][1])](rows)
    return took


def measuring_bytes(job: Job, blocks: Sequence[BlockCosts], positions: int, solving: Sequence[float]) -> float:
    """The way back, window by window; all second moments of a block, and what ``solving`` one of its matrices takes."""
    moments = [sum(FP32 * width**2 for width, _ in job.groups(*block)) for block in enumerate(blocks)]
    held = [sum(each) for each in zip(moments, solving, strict=True)]
    return _back_bytes(job, blocks, job.measured_samples, 1, positions, held)


def any_bits(width: int, spec: QuantSpec) -> tuple[int, QuantSpec]:
    """What all choices of bits of a matrix are rehearsed as."""
    return width, replace(spec, bits=BITS[0])


def guiding_seconds(job: Job, blocks: Sequence[BlockCosts], scale: float, read: float) -> float:
    """The way back, and the moments of outputs."""
    values = sum(job.curvature_bytes(entries) for entries in job.solver.plan.blocks) / FP32
    moments = sum(block.advance.seconds for block in blocks) * scale * values / (2 * job.inside)
    windows = job.guiding_windows
    return float(_back_seconds(job, blocks, windows, scale, read) + windows * moments)


def guiding_bytes(job: Job, blocks: Sequence[BlockCosts], positions: int) -> float:
    """The way back, and moments of the outputs of all of a block's matrices."""
    windows = job.guiding_windows
    moments = [2 * job.curvature_bytes(entries) for entries in job.solver.plan.blocks]
    return _back_bytes(job, blocks, windows, min(job.batch_size, job.samples), positions, moments)


def _back_seconds(job: Job, blocks: Sequence[BlockCosts], windows: int, scale: float, read: float) -> float:
    """Windows sent forwards and back through all blocks, each of which is read twice."""
    config = job.solver.model.config.get_text_config(decoder=True)
    head = config.vocab_size * config.hidden_size / job.inside
    back = sum(block.back for block in blocks) * scale * (1 + 2 / 3 * head)  # the head is not computed twice
    return float(windows * back + 2 * read * FP32 * job.inside)


def _back_bytes(
    job: Job, blocks: Sequence[BlockCosts], windows: int, batch: int, positions: int, held: Sequence[float]
) -> float:
    """States before all blocks in 16 bits; what is outside of the blocks with some logits, or a block at work.

    Args:
        job, blocks: of the run.
        windows, batch: that are sent back, and how many of them at a time.
        positions: that the blocks were tried with.
        held: what the caller holds of each block besides.
    """
    config = job.solver.model.config.get_text_config(decoder=True)
    tokens = windows * job.seqlen
    kept = 2 * tokens * config.hidden_size * len(blocks)
    if job.solver.device.type != "cpu":
        return float(kept)
    prefix, state = f"{live.blocks(job.solver.model)[0]}.", job.solver.model.state_dict()
    outside = FP32 * sum(state[name].numel() for name in job.solver.sources if not name.startswith(prefix))
    logits = 3 * FP32 * min(job.seqlen, LOGITS_AT_ONCE["cpu"]) * config.vocab_size
    inside = [
        FP32 * job.parameters(position) + own + batch * job.seqlen * block.traced / positions
        for position, (block, own) in enumerate(zip(blocks, held, strict=True))
    ]
    return float(kept + 2 * FP32 * tokens * config.hidden_size + _HOLES * max(outside + logits, *inside))


def tuning_seconds(job: Job, blocks: Sequence[BlockCosts], scale: float) -> float:
    """Four passes over the text and what measures it; a head costs as blocks of its size do."""
    config = job.solver.model.config.get_text_config(decoder=True)
    window = sum(block.advance.seconds for block in blocks) * scale
    passes = ((4 * job.tune_tokens / job.seqlen, _listed(config.vocab_size)), (8 * HELD_OUT, config.vocab_size))
    return float(window * sum(count * (1 + words * config.hidden_size / job.inside) for count, words in passes))


def tuning_bytes(job: Job, blocks: Sequence[BlockCosts], positions: int) -> float:
    """Both models, the codes, and of a step logits, their gradient and what a forward pass leaves, or what measures."""
    config = job.solver.model.config.get_text_config(decoder=True)
    solved = sum(m.in_features * m.out_features for block in job.solver.plan.blocks for m, _ in block)
    whole = job.inside + config.vocab_size * config.hidden_size
    step = MICRO * (sum(block.traced for block in blocks) / positions + 3 * FP32 * _listed(config.vocab_size))
    measuring = 3 * FP32 * job.seqlen * config.vocab_size
    return float(FP32 * (whole + solved) + solved + _HOLES * max(step, measuring))


def _listed(vocab_size: int) -> int:
    """Words whose logits a step of training computes, at most."""
    return min(vocab_size, SHORTLIST + MICRO)
