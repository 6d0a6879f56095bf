"""Whether a checkpoint is whole, and what its config.json says it is: from headers alone."""

from __future__ import annotations

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


def fit(artifact: Artifact) -> Fit:
    """Find every parameter of the architecture, in the shape that config.json asks for.

    Shapes must be exactly those: transformers takes no others, neither a vocabulary that is padded beyond vocab_size.

    Raises:
        BitternError: for an architecture that transformers does not know, and naming a tensor or a packed layer that
            is missing or of another shape.
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
    return Fit(model, sources, matrices)


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
