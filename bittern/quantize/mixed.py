"""Mixed bits: the bits of every layer, chosen so that the model is harmed least at an average that a user asks for.

The average is that of the bits of a code over all quantized weights; scales and zeros come on top, as they do with
uniform bits. Layers that servers run as one share their bits (see :mod:`bittern.quantize.sensitivity`).
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from bittern.errors import BitternError
from bittern.model import Matrix
from bittern.processes import world
from bittern.quantize.plan import Plan
from bittern.quantize.sensitivity import TOKENS, Group, Sensitivity
from bittern.weight import BITS

STATES = 1 << 16
"""Amounts of bits that the knapsack tells apart; budgets that are finer are rounded down to these."""

_INSIDE = re.compile(r"(?<=\.)(\d+\.[^.]+)\..*")
"""What follows the attention or the MLP of a block in the names of their matrices, and these two."""

PlanOf = Callable[[int | Mapping[str, int]], Plan]
"""The plan for the bits of all layers, or of each."""


def alternating(blocks: Sequence[Sequence[Matrix]]) -> dict[str, int]:
    """Bits by layer as mixed as they can come out, block by block: whatever takes this takes every choice."""
    return {
        name: BITS[position % len(BITS)]
        for position, matrices in enumerate(blocks)
        for matrix in matrices
        for name, _, _ in matrix.parts
    }


def free_matrices(plan_of: PlanOf) -> dict[Matrix, bool]:
    """Every quantized matrix, and whether its bits can be chosen: not where --layer fixes them."""
    low, high = ({matrix: spec.bits for block in plan_of(bits).blocks for matrix, spec in block} for bits in (2, 8))
    return {matrix: low[matrix] != high[matrix] for matrix in low}


def check_average(plan_of: PlanOf, average: float) -> None:
    """Refuse an average that no choice of bits reaches.

    Raises:
        BitternError: with what is left for the layers that --layer does not fix.
    """
    _budget(plan_of, average)


def mix(plan_of: PlanOf, groups: Sequence[Group], average: float) -> tuple[Plan, dict[str, Any]]:
    """The plan with the least expected harm, and what the manifest says of the choice.

    Args:
        plan_of: makes the plan.
        groups: of the matrices that are free, with their harm.
        average: bits per quantized weight, at most; layers that --layer fixes count too.

    Raises:
        BitternError: as :func:`check_average`.
    """
    chosen = choose([group.weights for group in groups], [group.harm for group in groups], _budget(plan_of, average))
    bits = {name: each for group, each in zip(groups, chosen, strict=True) for name in group.layers}
    plan = plan_of({**dict.fromkeys(_names(free_matrices(plan_of)), BITS[0]), **bits})
    grids = [(matrix, spec.bits) for block in plan.blocks for matrix, spec in block]
    total = sum(size(matrix) for matrix, _ in grids)
    record = {
        "average": average,
        "found": sum(size(matrix) * each for matrix, each in grids) / total,
        "groups": [
            {
                "layers": list(group.layers),
                "weights": group.weights,
                "bits": each,
                "harm": {str(option): group.harm[option] for option in BITS},
            }
            for group, each in zip(groups, chosen, strict=True)
        ],
    }
    return plan, record


def even_mix(plan_of: PlanOf, average: float) -> Plan:
    """A plan of an average before anything is measured: every weight counts the same, what is run as one is one."""
    parts: dict[str, list[Matrix]] = {}
    for matrix, free in free_matrices(plan_of).items():
        if free:
            parts.setdefault(_INSIDE.sub(r"\1", matrix.module), []).append(matrix)
    sizes = {part: sum(map(size, members)) for part, members in parts.items()}
    harms = {part: {bits: sizes[part] * 4.0**-bits for bits in BITS} for part in parts}
    return mix(plan_of, [Group(tuple(members), harms[part]) for part, members in parts.items()], average)[0]


def measure_and_mix(
    plan_of: PlanOf, meter: Sensitivity, ids: Tensor, average: float, on_measured: Callable[[int, int], None] | None
) -> tuple[Plan, dict[str, Any]]:
    """The plan whose bits are chosen by what a few calibration windows say, and what the manifest gets of that.

    Args:
        plan_of: makes the plan.
        meter: with no blocks yet: those of the plan go in here.
        ids: all calibration windows, int64 (windows, positions); the first few decide.
        average: see :func:`mix`.
        on_measured: see :meth:`bittern.quantize.sensitivity.Sensitivity.measure`.
    """
    began = time.monotonic()
    count = windows_to_measure(*ids.shape)
    windows = ids[:count]
    free = free_matrices(plan_of)
    meter.blocks = [[(matrix, spec) for matrix, spec in block if free[matrix]] for block in plan_of(BITS[0]).blocks]
    plan, record = mix(plan_of, meter.measure(windows, on_measured), average)
    record |= {"windows": count, "tokens": windows.numel()}
    return plan, {"mixed": record, "measured": {"sensitivity_seconds": round(time.monotonic() - began, 3)}}


def windows_to_measure(windows: int, positions: int) -> int:
    """How many of the calibration windows tell what fewer bits would cost, over all processes."""
    return min(windows, max(4, world()[1], TOKENS // positions))


def choose(weights: Sequence[int], harms: Sequence[Mapping[int, float]], budget: float) -> list[int]:
    """Bits for every group so that their harms add up to the least and ``sum(bits * weights) <= budget``.

    A knapsack solved by dynamic programming over amounts of bits: exact while these are no more than :data:`STATES`
    multiples of what all weights share, otherwise up to the rounding of each group's cost.

    Args:
        weights: of each group.
        harms: of each group, for each of the bits that it may have.
        budget: in bits; the fewest bits of all groups fit into it.
    """
    least = [min(harm) for harm in harms]
    spare = budget - sum(bits * count for bits, count in zip(least, weights, strict=True))
    most = sum((max(harm) - bits) * count for harm, bits, count in zip(harms, least, weights, strict=True))
    if spare >= most:
        return [max(harm) for harm in harms]
    unit = max(math.gcd(*weights), math.ceil(max(spare, 0) / STATES))
    states = math.floor(max(spare, 0) / unit + 1e-9) + 1
    best = np.zeros(states)  # the least harm of the groups so far, for an amount of bits that they may take
    taken = []
    for harm, lowest, count in zip(harms, least, weights, strict=True):
        options = sorted(harm)
        trials = np.full((len(options), states), np.inf)
        for row, bits in enumerate(options):
            cost = math.ceil((bits - lowest) * count / unit)
            if cost < states:
                trials[row, cost:] = best[: states - cost] + harm[bits]
        taken.append((options, trials.argmin(0).astype(np.uint8)))
        best = trials.min(0)
    chosen, left = [], states - 1
    for (options, picks), lowest, count in zip(reversed(taken), reversed(least), reversed(weights), strict=True):
        chosen.append(options[picks[left]])
        left -= math.ceil((chosen[-1] - lowest) * count / unit)
    return chosen[::-1]


def size(matrix: Matrix) -> int:
    """The weights of a matrix."""
    return matrix.out_features * matrix.in_features


def _budget(plan_of: PlanOf, average: float) -> float:
    """The bits that the free matrices may have together."""
    free = free_matrices(plan_of)
    fixed = sum(size(m) * spec.bits for block in plan_of(BITS[0]).blocks for m, spec in block if not free[m])
    open_weights = sum(size(matrix) for matrix, is_free in free.items() if is_free)
    if not open_weights:
        raise BitternError(f"--bits {average}: --layer fixes the bits of every layer, so there is nothing to choose")
    budget = average * sum(map(size, free)) - fixed
    if budget < BITS[0] * open_weights:
        raise BitternError(
            f"--bits {average}: the layers that --layer fixes leave {budget / open_weights:.2f} bits a weight for the"
            f" others, expected at least {BITS[0]}"
        )
    return budget


def _names(matrices: Iterable[Matrix]) -> list[str]:
    return [name for matrix in matrices for name, _, _ in matrix.parts]
