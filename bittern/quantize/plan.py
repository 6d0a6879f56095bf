"""Decide what becomes of every tensor, before any work is done."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from bittern import replay
from bittern.checkpoint import TensorInfo
from bittern.errors import BitternError
from bittern.formats.packing import Packing
from bittern.layout import EXPERTS, ROUTER
from bittern.model import Matrix
from bittern.weight import QuantSpec

PACK_MULTIPLE = 32
"""GPTQ files pack 32-bit words along both dimensions."""

GROUP_SIZES = (1024, 512, 256, 128, 64, 32, 16)
"""Group sizes, besides the whole row, that GPTQModel and so transformers load."""

AUTO_GROUP_SIZES = (128, 64, 32)


@dataclass(frozen=True)
class Plan:
    """What is quantized, and how.

    Attributes:
        blocks: for every block, its quantized matrices and their grids.
        layers: grid of every layer of the blocks by checkpoint name, None where it is kept in 16 bits; and of those
            outside that are packed.
        kept: why, for those that are kept.
        outside: embedding and head, where they are packed (see :mod:`bittern.quantize.outside`).
    """

    blocks: list[list[tuple[Matrix, QuantSpec]]] = field(default_factory=list)
    layers: dict[str, QuantSpec | None] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    outside: list[tuple[Matrix, QuantSpec]] = field(default_factory=list)

    @property
    def group_size(self) -> int:
        """The same for every quantized layer."""
        return next(spec.group_size for spec in self.layers.values() if spec is not None)

    @property
    def commonest(self) -> QuantSpec:
        """The grid of most quantized layers."""
        return Counter(spec for spec in self.layers.values() if spec is not None).most_common(1)[0][0]

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of every quantized layer."""
        return {
            name: (stop - start, matrix.in_features)
            for block in (*self.blocks, self.outside)
            for matrix, _ in block
            for name, start, stop in matrix.parts
        }

    def packed_tensors(self, packing: Packing) -> list[TensorInfo]:
        """The tensors that the quantized layers become."""
        grids = {name: spec for name, spec in self.layers.items() if spec is not None}
        return [info for name, shape in self.shapes.items() for info in packing.plan(name, *shape, grids[name])]

    def rough(self, device: torch.device) -> bool:
        """Whether to walk through the blocks with products in bfloat16: where a device does these faster, and what they
        round away, 2 ** -9, is next to nothing beside what quantizing does to every layer of a block.
        """
        coarse = all(spec.bits <= 4 for block in self.blocks for _, spec in block)
        return coarse and replay.fast_in_sixteen_bits(device)

    @property
    def symmetric(self) -> bool:
        """Whether every quantized layer is."""
        return all(spec is None or spec.sym for spec in self.layers.values())


def make_plan(
    blocks: Sequence[Sequence[Matrix]],
    bits: int | Mapping[str, int],
    group_size: int | str,
    sym: bool,
    layer_bits: Sequence[tuple[str, int]] = (),
    skip: Sequence[str] = (),
    outside: Sequence[tuple[Matrix, int]] = (),
) -> Plan:
    """Choose the grid of every matrix.

    Args:
        blocks: the matrices of every block.
        bits, sym: of every layer that nothing else is said of; ``bits`` may be those of each layer by its name.
        group_size: a size, -1, or ``auto``: the largest of 128, 64 and 32 that divides every layer.
        layer_bits: (regular expression, bits): the last one found in a layer's name holds.
        skip: regular expressions; layers with one of them found in their name are kept.
        outside: matrices outside of the blocks, and their bits.

    Raises:
        BitternError: for a pattern that matches nothing, a group size that does not fit, or a model
            in which nothing is left to quantize.
    """
    names = [part for matrices in blocks for matrix in matrices for part, _, _ in matrix.parts]
    overrides = [(_pattern("layer", regex, names), QuantSpec(other)) for regex, other in layer_bits]
    skipped = [_pattern("skip", regex, names) for regex in skip]
    plan = Plan()
    chosen: list[list[tuple[Matrix, int]]] = []
    for matrices in blocks:
        chosen.append([])
        routed = any(EXPERTS.search(part) for matrix in matrices for part, _, _ in matrix.parts)
        for matrix in matrices:
            reason = _why_kept(matrix, skipped)
            if reason is None and routed and all(ROUTER.search(part) for part, _, _ in matrix.parts):
                reason = "a router of experts: nobody reads one packed"
            if reason is not None:
                plan.kept.update({part: reason for part, _, _ in matrix.parts})
                plan.layers.update({part: None for part, _, _ in matrix.parts})
            else:
                chosen[-1].append((matrix, _bits_of(matrix, bits, overrides)))
    _check_whole_parameters(blocks, plan)
    matrices_left = [matrix for block in chosen for matrix, _ in block]
    if not matrices_left:
        raise BitternError("nothing to quantize: every layer is skipped or has a shape that 32 does not divide")
    left = [part for matrix in matrices_left for part, _, _ in matrix.parts]
    for pattern, _ in overrides:
        if not any(pattern.search(name) for name in left):
            raise BitternError(f"--layer {pattern.pattern}: expected layers that are quantized, found only kept ones")
    for matrix, _ in outside:
        reason = _why_kept(matrix, [])
        if reason is not None:
            raise BitternError(f"{matrix.parts[0][0]}: {reason}; leave it in 16 bits")
    size = _fit_group_size(group_size, [*matrices_left, *(matrix for matrix, _ in outside)])
    for block in chosen:
        entries = [(matrix, QuantSpec(layer, size, sym)) for matrix, layer in block]
        plan.blocks.append(entries)
        plan.layers.update({part: spec for matrix, spec in entries for part, _, _ in matrix.parts})
    plan.outside.extend((matrix, QuantSpec(layer, size)) for matrix, layer in outside)
    plan.layers.update({part: spec for matrix, spec in plan.outside for part, _, _ in matrix.parts})
    return plan


def _pattern(option: str, regex: str, names: Sequence[str]) -> re.Pattern[str]:
    try:
        pattern = re.compile(regex)
    except re.error as error:
        raise BitternError(f"--{option} {regex}: expected a regular expression: {error}") from error
    if not any(pattern.search(name) for name in names):
        example = names[0] if names else "none"
        raise BitternError(f"--{option} {regex}: matches none of the model's {len(names)} layers (such as {example})")
    return pattern


def _why_kept(matrix: Matrix, skipped: Sequence[re.Pattern[str]]) -> str | None:
    hits = [[pattern.pattern for pattern in skipped if pattern.search(part)] for part, _, _ in matrix.parts]
    if all(hits):
        return f"--skip {hits[0][0]}"
    if any(hits):
        parts = " and ".join(part for part, _, _ in matrix.parts)
        raise BitternError(f"--skip {max(hits)[0]}: {parts} are one matrix in this model; skip all of it or none")
    shapes = [(stop - start, matrix.in_features) for _, start, stop in matrix.parts]
    if any(rows % PACK_MULTIPLE or columns % PACK_MULTIPLE for rows, columns in shapes):
        return f"shape {shapes[0][0]} x {shapes[0][1]} is no multiple of {PACK_MULTIPLE}"
    return None


def _bits_of(
    matrix: Matrix, bits: int | Mapping[str, int], overrides: Sequence[tuple[re.Pattern[str], QuantSpec]]
) -> int:
    found = {
        next(
            (spec.bits for pattern, spec in reversed(overrides) if pattern.search(part)),
            bits if isinstance(bits, int) else bits[part],
        )
        for part, _, _ in matrix.parts
    }
    if len(found) > 1:
        parts = " and ".join(part for part, _, _ in matrix.parts)
        raise BitternError(f"--layer: {parts} are one matrix in this model and need the same bits, found {found}")
    return found.pop()


def _check_whole_parameters(blocks: Sequence[Sequence[Matrix]], plan: Plan) -> None:
    """A fused parameter of experts is packed as a whole or not at all."""
    kept_of: dict[str, set[bool]] = {}
    for matrices in blocks:
        for matrix in matrices:
            kept_of.setdefault(matrix.parameter, set()).add(matrix.parts[0][0] in plan.kept)
    mixed = [name for name, states in kept_of.items() if len(states) > 1]
    if mixed:
        raise BitternError(f"--skip: {mixed[0]} holds several experts; skip all of them or none")


def _fit_group_size(asked: int | str, matrices: Sequence[Matrix]) -> int:
    widths = {matrix.in_features: matrix.label for matrix in matrices}
    fitting = [size for size in GROUP_SIZES if all(width % size == 0 for width in widths)]
    if asked == "auto":
        for size in AUTO_GROUP_SIZES:
            if size in fitting:
                return size
    if asked == -1 or asked in fitting:
        return int(asked)
    listed = ", ".join(str(size) for size in (*fitting, -1))
    why = "is none that GPTQModel and transformers load"
    for width, label in widths.items():
        if isinstance(asked, int) and asked > 0 and width % asked:
            why = f"does not divide in_features {width} of {label}"
    raise BitternError(f"group_size {asked}: {why}; these fit this model and those who load it: {listed}")
