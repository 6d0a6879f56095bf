"""What an artifact says about its layers, whichever format it is in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from math import prod
from typing import Any

import regex

from bittern.errors import BitternError
from bittern.weight import QuantSpec

_MAX_PATTERN = 10_000  # characters of a pattern, and product of its repetition counts: either costs memory
_NAME = re.compile(r"\^?((?:\w|\\[.-])+)\$")  # a pattern that is one escaped name, as most are
_SECONDS = 1.0  # for one match; patterns that backtrack for ever are as short as any


@dataclass(frozen=True)
class PackedLayer:
    """A packed layer as headers and config describe it.

    Attributes:
        out_features, in_features: of the weight.
        spec: its grid.
    """

    out_features: int
    in_features: int
    spec: QuantSpec


@dataclass(frozen=True)
class Scheme:
    """What the quantization config of an artifact says about its layers.

    Attributes:
        format: "gptq", "gptq_v2", "compressed-tensors", "awq" or "mlx".
        default: the grid of layers that ``overrides`` does not name.
        overrides: (pattern, values) in order, the first whose pattern matches a layer's name from its
            start counts; the values replace bits, group_size or sym, and None leaves the layer floats.
        desc_act: whether columns of layers that ``overrides`` does not name were stored under a permuted ``g_idx``;
            there, the values may have another ``desc_act``.
        quantizer: who made it, such as ("gptqmodel:7.7.0",); empty when it does not say.
    """

    format: str
    default: QuantSpec
    overrides: tuple[tuple[str, Mapping[str, Any] | None], ...] = ()
    desc_act: bool = False
    quantizer: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _, patterns = self._places
        for position in patterns:
            _compiled(self.overrides[position][0])
        for pattern, values in self.overrides:
            if values is not None and not isinstance(values, Mapping):
                raise wrong_key(repr(pattern), "an object", values)

    @property
    def any_desc_act(self) -> bool:
        """Whether any layer's columns are permuted."""
        return self.desc_act or any(values.get("desc_act") is True for _, values in self.overrides if values)

    def permuted(self, layer: str) -> bool:
        """Whether the columns of a layer are."""
        return (self._values(layer) or {}).get("desc_act", self.desc_act) is True

    def spec(self, layer: str) -> QuantSpec | None:
        """The grid of a layer, None for one that is not quantized.

        Raises:
            BitternError: for bits or a group size that bittern does not have, and for a pattern that takes too long.
        """
        values, own = self._values(layer), self.default
        if values is None:
            return None
        return QuantSpec(
            values.get("bits", own.bits), values.get("group_size", own.group_size), values.get("sym", own.sym)
        )

    def _values(self, layer: str) -> Mapping[str, Any] | None:
        """What ``overrides`` has for a layer; empty where it does not name it."""
        names, patterns = self._places
        place = names.get(layer)
        for position in patterns:
            if place is not None and place < position:
                break
            pattern = self.overrides[position][0]
            try:
                matches = _compiled(pattern).match(layer, timeout=_SECONDS)
            except TimeoutError as error:
                raise BitternError(f"quantization_config: matching {pattern!r} with {layer} does not end") from error
            if matches:
                place = position
                break
        return {} if place is None else self.overrides[place][1]

    @cached_property
    def _places(self) -> tuple[dict[str, int], list[int]]:
        """Positions among the overrides: of names, and of patterns, which alone have to be tried one by one.

        Models of many experts have tens of thousands of layers, and configs that name hundreds of them.
        """
        names: dict[str, int] = {}
        patterns = []
        for position, (pattern, _) in enumerate(self.overrides):
            found = _NAME.fullmatch(pattern)
            if found is None:
                patterns.append(position)
            else:
                names.setdefault(re.sub(r"\\(.)", r"\1", found[1]), position)
        return names, patterns


def wrong_key(key: str, expected: str, found: Any) -> BitternError:
    """What is wrong with a key of a quantization config."""
    return BitternError(f"quantization_config: {key}: expected {expected}, found {found!r}")


@cache
def _compiled(pattern: str) -> Any:
    """A pattern that was found in a file, by a library whose matches can be given up."""
    try:
        repeats = prod(max(1, int(count)) for count in re.findall(r"\d+(?=,?\})", pattern[:_MAX_PATTERN]))
        if len(pattern) > _MAX_PATTERN or repeats > _MAX_PATTERN:
            raise BitternError(f"quantization_config: {pattern!r} is too large a regular expression")
        return regex.compile(pattern)
    except (regex.error, ValueError, RecursionError, OverflowError) as error:
        raise BitternError(f"quantization_config: {pattern!r} is no regular expression: {error}") from error
