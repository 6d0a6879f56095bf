"""Whether a checkpoint is what its config.json says, no more and no less: from headers alone."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from bittern import model as live
from bittern.artifact import Artifact
from bittern.errors import BitternError
from bittern.model import Matrix, Piece

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Fit:
    """A checkpoint seen through its architecture.

    Attributes:
        model: on meta.
        sources: see :func:`bittern.model.weight_map`.
        matrices: of the blocks, and a head of its own; parts named as in the checkpoint.
    """

    model: PreTrainedModel
    sources: dict[str, tuple[Piece, ...]]
    matrices: list[Matrix]

    @property
    def tensors(self) -> set[str]:
        """Names of the checkpoint's tensors that the model has a place for."""
        return {piece.source for pieces in self.sources.values() for piece in pieces}


def unexpected_tensors(
    model: PreTrainedModel, sources: dict[str, tuple[Piece, ...]], available: Iterable[str]
) -> list[str]:
    """Those of :func:`bittern.model.unused_tensors` that transformers does not know to be useless to it."""
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    unused = live.unused_tensors(model, sources, available)
    return [name for name in unused if not any(pattern.search(name) for pattern in ignored)]


def fit(artifact: Artifact) -> Fit:
    """Find every parameter of the architecture, in the shape that config.json asks for, and a place for every tensor.

    Shapes must be exactly those: transformers takes no others, neither a vocabulary that is padded beyond vocab_size.

    Raises:
        BitternError: for an architecture that transformers does not know, and naming a tensor or a packed layer that
            is missing, of another shape, or has no place.
    """
    model = live.build(artifact.checkpoint.config)
    sources = live.weight_map(model, artifact.plain, artifact.layers)
    matrices = live.stored_matrices(model, sources)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    _check_matrices(artifact, matrices, sources)
    placed = {layer for matrix in matrices for layer, _, _ in matrix.parts}
    for parameter, pieces in sources.items():
        for piece in pieces:
            layer = piece.source.removesuffix(".weight")
            rows = piece.stop - piece.start
            if piece.source in artifact.plain:
                _check_tensor(artifact, piece, shapes[parameter], alone=len(pieces) == 1)
            elif layer in artifact.layers and layer not in placed:  # an embedding of MLX
                _check_layer(artifact, layer, (rows, shapes[parameter][-1]))
    refuse_unplaced(model, sources, _packed(matrices, artifact), artifact)
    return Fit(model, sources, matrices)


def packed_matrices(model: PreTrainedModel, sources: dict[str, tuple[Piece, ...]], artifact: Artifact) -> list[Matrix]:
    """The matrices of the model that the checkpoint holds packed, those of one parameter side by side.

    A parameter of which only some rows or experts are packed counts with all of them.
    """
    return _packed(live.stored_matrices(model, sources), artifact) if artifact.layers else []


def unplaced_tensors(
    model: PreTrainedModel, sources: dict[str, tuple[Piece, ...]], packed: list[Matrix], artifact: Artifact
) -> list[str]:
    """Tensors of the checkpoint that the model has no place for; what the model lacks was found by weight_map."""
    used = {part for matrix in packed for part, _, _ in matrix.parts}
    # Float matrices beside packed ones; and AutoGPTQ gave every layer a bias, zeros where the model has none.
    known = {name for layer in used for name in (layer, f"{layer}.weight", f"{layer}.bias")}
    held = [*artifact.plain, *(f"{layer}.weight" for layer in artifact.layers)]
    return unexpected_tensors(model, sources, (name for name in held if name not in known))


def refuse_unplaced(
    model: PreTrainedModel, sources: dict[str, tuple[Piece, ...]], packed: list[Matrix], artifact: Artifact
) -> None:
    """Refuse what the architecture has no place for: whoever reads it elsewhere would pass over it without a word.

    Raises:
        BitternError: naming the first such tensor.
    """
    unplaced = unplaced_tensors(model, sources, packed, artifact)
    if unplaced:
        more, kind = f" and {len(unplaced) - 1} more" if len(unplaced) > 1 else "", model.config.model_type
        raise BitternError(f"{unplaced[0]}{more}: the checkpoint holds it, but a {kind} model has no place for it")


def _packed(matrices: list[Matrix], artifact: Artifact) -> list[Matrix]:
    parameters = {matrix.parameter for matrix in matrices for layer, _, _ in matrix.parts if layer in artifact.layers}
    return [matrix for matrix in matrices if matrix.parameter in parameters]


def _check_matrices(artifact: Artifact, matrices: list[Matrix], sources: dict[str, tuple[Piece, ...]]) -> None:
    """Packed layers; and the experts of one tensor, which are packed one by one or not at all."""
    for matrix in matrices:
        whole = all(piece.source in artifact.plain for piece in sources[matrix.parameter])
        for layer, start, stop in matrix.parts:
            if layer in artifact.layers:
                _check_layer(artifact, layer, (stop - start, matrix.in_features))
            elif not whole and layer not in artifact.plain and f"{layer}.weight" not in artifact.plain:
                raise BitternError(f"{layer}: the checkpoint lacks it, and {matrix.parameter} of the model needs it")


def _check_layer(artifact: Artifact, layer: str, expected: tuple[int, int]) -> None:
    found = (artifact.layers[layer].out_features, artifact.layers[layer].in_features)
    if found != expected:
        raise BitternError(f"{layer}: config.json asks for shape {expected}, found {found}")


def _check_tensor(artifact: Artifact, piece: Piece, parameter: tuple[int, ...], alone: bool) -> None:
    """As :func:`bittern.model.read_tensor` would when it reads it."""
    found, rows = artifact.plain[piece.source].shape, piece.stop - piece.start
    if alone:
        expected = [parameter]
    elif len(parameter) < 2:
        expected = [(rows,)]
    else:  # a part of more dimensions than two may be stored as one
        expected = [(rows, parameter[-1]), (rows * parameter[0] // prod(parameter[:-1]), *parameter[1:])]
    if found not in expected:
        raise BitternError(f"{piece.source}: config.json asks for shape {expected[0]}, found {found}")
