"""The two ends of a model on a CPU: its input embedding and its output head.

They are most of the bytes of a small model. Read as the file stores them they take half of what float32 takes; the
head may be packed at 8 bits instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from bittern.errors import BitternError
from bittern.model import read_tensor
from bittern.runtime.linear import NativeMatrix, QuantLinear, StoredEmbedding, StoredLinear
from bittern.runtime.packed import PackedMatrix
from bittern.weight import QuantSpec, QuantWeight, is_finite, naming, round_to_nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from bittern.checkpoint import Checkpoint
    from bittern.model import Piece

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_GROUP = 32  # columns that share a scale
_STEP = 2**20  # weights of the head that are packed at a time


@dataclass(frozen=True)
class Ends:
    """Which of the two are replaced, by name of the module; None is left as it is.

    Attributes:
        embedding: becomes a :class:`StoredEmbedding`.
        head: becomes a :class:`StoredLinear`, or packed.
        head_bits: 8 when it becomes packed, else None.
        weight: name of the parameter that holds the head's values: the embedding's when they are tied.
    """

    embedding: str | None
    head: str | None
    head_bits: int | None
    weight: str

    @property
    def parameters(self) -> set[str]:
        """Names of the parameters that are not to be loaded in the usual way."""
        return {f"{name}.weight" for name in (self.embedding, self.head) if name is not None}


def plan_ends(model: PreTrainedModel, *, stored: bool, head_bits: int | None) -> Ends:
    """Decide, on a model of :func:`bittern.model.build`.

    Args:
        model: with its packed layers in place.
        stored: keep what can be kept as the file has it.
        head_bits: 8 to pack the head, or None.

    Raises:
        BitternError: for a head that cannot be packed, or is already.
    """
    names = {module: name for name, module in model.named_modules()}
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    plain_head = type(head) is nn.Linear
    tied = plain_head and head.weight is embedding.weight
    if head_bits is not None and head_bits != 8:
        raise BitternError(f"lm_head_bits: expected 8, found {head_bits}")
    if head_bits is not None and not plain_head:
        found = "packed already" if isinstance(head, QuantLinear) else f"a {type(head).__name__}"
        raise BitternError(f"lm_head_bits: expected a head that is a plain linear layer, found {found}")
    stored = stored and not _asks_for_dtype(model)
    stores_embedding = stored and (type(embedding) is nn.Embedding or _scale(embedding) is not None)
    stores_head = stored and plain_head
    if tied and head_bits is None and not (stores_embedding and stores_head):
        stores_embedding = stores_head = False
    return Ends(
        embedding=names[embedding] if stores_embedding else None,
        head=names[head] if stores_head or head_bits is not None else None,
        head_bits=head_bits,
        weight=f"{names[embedding] if tied else names.get(head)}.weight",
    )


def place_ends(
    model: PreTrainedModel,
    ends: Ends,
    checkpoint: Checkpoint,
    sources: dict[str, tuple[Piece, ...]],
    pack: Callable[[QuantWeight], NativeMatrix | PackedMatrix],
    threads: int | None,
) -> None:
    """Put them in place, in a model whose other parameters are loaded.

    Args:
        pack: makes the matrix of a packed head.
        threads: as in :class:`bittern.runtime.native.Settings`.

    Raises:
        BitternError: for a tensor of the wrong shape, or with values that are not finite.
    """
    weight: Tensor | None = None
    if ends.embedding is not None:
        embedding = cast(nn.Embedding, model.get_submodule(ends.embedding))
        weight = _read(checkpoint, sources[f"{ends.embedding}.weight"], embedding.weight.shape)
        model.set_submodule(ends.embedding, StoredEmbedding(weight, _scale(embedding)))
    if ends.head is None:
        return
    head = cast(nn.Linear, model.get_submodule(ends.head))
    if ends.head_bits is not None:
        packed = _pack_rows(checkpoint, sources[ends.weight], head.out_features, head.in_features, ends.head_bits)
        model.set_submodule(ends.head, QuantLinear([pack(packed)], head.bias))
        return
    tied = ends.weight == f"{ends.embedding}.weight"
    values = weight if tied and weight is not None else _read(checkpoint, sources[ends.weight], head.weight.shape)
    model.set_submodule(ends.head, StoredLinear(values, head.bias, threads))


def small_groups(bits: int, in_features: int) -> QuantSpec:
    """The grid of a matrix that is rounded while loading: groups of 32 columns, or the most below that divide it."""
    return QuantSpec(bits, max(size for size in range(1, _GROUP + 1) if in_features % size == 0))


def _asks_for_dtype(model: PreTrainedModel) -> bool:
    """Whether a model rounds what it gives the head to the dtype of the head's weight, as Mamba does."""
    try:
        return "weight.dtype" in inspect.getsource(type(model).forward)
    except OSError:  # code without its source
        return True


def _scale(embedding: nn.Module) -> Tensor | None:
    """What an embedding like Gemma 3's multiplies its rows with; None for any other class."""
    scaled = type(embedding).__name__.endswith("TextScaledWordEmbedding") and hasattr(embedding, "scalar_embed_scale")
    return cast(Tensor, embedding.embed_scale) if scaled else None


def _read(checkpoint: Checkpoint, pieces: tuple[Piece, ...], shape: torch.Size) -> Tensor:
    """A parameter in the dtype of the file."""
    dtypes = {checkpoint.tensors[piece.source].dtype for piece in pieces}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return read_tensor(checkpoint, pieces, tuple(shape), dtype if dtype in _FLOATS else torch.float32)


def _pack_rows(
    checkpoint: Checkpoint, pieces: tuple[Piece, ...], out_features: int, in_features: int, bits: int
) -> QuantWeight:
    """Round a stored matrix to nearest, a few rows in memory at a time."""
    spec = small_groups(bits, in_features)
    codes = torch.empty(out_features, in_features, dtype=torch.uint8, device="cpu")
    scales = torch.empty(out_features, spec.groups(in_features), dtype=torch.float16, device="cpu")
    step = max(1, _STEP // in_features)
    for piece in pieces:
        found = checkpoint.tensors[piece.source].shape
        if found != (piece.stop - piece.start, in_features):
            expected = (piece.stop - piece.start, in_features)
            raise BitternError(f"{piece.source}: config.json asks for shape {expected}, found {found}")
        for start in range(piece.start, piece.stop, step):
            stop = min(start + step, piece.stop)
            rows = checkpoint.read_rows(piece.source, start - piece.start, stop - piece.start).float()
            if not is_finite(rows):
                raise BitternError(f"{piece.source}: holds NaN or infinite weights")
            with naming(piece.source):
                rounded = round_to_nearest(rows, spec)
            codes[start:stop], scales[start:stop] = rounded.codes, rounded.scales
    return QuantWeight(codes, scales, torch.full_like(scales, spec.mid_code, dtype=torch.uint8), spec)
