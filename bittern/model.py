"""Any transformers decoder, without a file per architecture.

A model is built with its parameters on the meta device, which are then read from a checkpoint by piece. The weights
that activations are multiplied with are described by :class:`Matrix`, whether the architecture keeps them in
``nn.Linear``, in transformers' ``Conv1D`` or as one expert of a fused three-dimensional parameter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bittern.checkpoint import Checkpoint, plain_config
from bittern.errors import BitternError
from bittern.weight import is_finite

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Unless is_decoder is true, each of their tokens sees those behind it, which it should predict.
_ENCODERS = (
    *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"),
    *("rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod"),
)
COMPUTED = re.compile(r"rotary_emb\.inv_freq$|attn\.(masked_)?bias$|attention\.(masked_)?bias$")  # in old checkpoints


@dataclass(frozen=True)
class Piece:
    """Where a checkpoint keeps some rows of a parameter.

    Rows are those of the parameter flattened to two dimensions (all but the last one merged).

    Attributes:
        name: the tensor's name in the architecture's original checkpoints.
        source: its name in the checkpoint at hand; the same unless a prefix is missing there.
        start, stop: the rows ``[start, stop)``.
    """

    name: str
    source: str
    start: int
    stop: int


@dataclass(frozen=True)
class Matrix:
    """One two-dimensional weight, seen as (out_features, in_features).

    Attributes:
        parameter: name of the parameter in the live model.
        expert: index into the first dimension of a fused three-dimensional parameter, else None.
        transposed: the parameter stores (in_features, out_features), as Conv1D and gpt-oss do.
        parts: the checkpoint layers that it is made of, as (layer name, first output row, end row).
            Mixtral's live ``gate_up_proj`` of one expert is the two layers ``w1`` and ``w3``.
    """

    parameter: str
    expert: int | None
    transposed: bool
    out_features: int
    in_features: int
    parts: tuple[tuple[str, int, int], ...]

    @property
    def module(self) -> str:
        """The live module that holds the parameter."""
        return self.parameter.rpartition(".")[0]

    @property
    def label(self) -> str:
        """How messages name it."""
        return self.module if self.expert is None else f"{self.parameter}.{self.expert}"

    def view(self, whole: Tensor) -> Tensor:
        """Itself in its parameter, or in that one's gradient: (out_features, in_features)."""
        selected = whole if self.expert is None else whole[self.expert]
        return selected.T if self.transposed else selected


def build(config: dict[str, Any], dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> PreTrainedModel:
    """Build a causal language model with its parameters on meta and its buffers computed.

    Args:
        config: the parsed config.json; a ``quantization_config`` in it is ignored.
        dtype: dtype of the parameters.
        attention: transformers' implementation of it; architectures that do not have that use their own ("eager").

    Raises:
        BitternError: for an architecture that transformers does not know, a config that it makes no model of, and an
            encoder, which would see what it is to predict.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = str(config.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        raise BitternError(f"config.json: model_type {model_type!r} is not an architecture that transformers knows")
    make: Callable[..., PreTrainedModel] = AutoModelForCausalLM.from_config
    try:
        model_config = CONFIG_MAPPING[model_type].from_dict(plain_config(config))
        if model_type in _ENCODERS and not model_config.is_decoder:
            raise BitternError(f"config.json: expected a decoder, found an encoder ({model_type}, is_decoder false)")
        with _parameters_on_meta(), no_init_weights():
            try:
                model = make(model_config, dtype=dtype, attn_implementation=attention)
            except ValueError as error:
                if "attention implementation" not in str(error) and "attn_implementation" not in str(error):
                    raise BitternError(f"config.json: {model_type} is no causal language model: {error}") from error
                model = make(model_config, dtype=dtype, attn_implementation="eager")
    except BitternError:
        raise
    except Exception as error:  # of a config that lies, transformers and torch raise whatever comes
        reason = f"{type(error).__name__}: {error}"
        raise BitternError(f"config.json: transformers cannot build this {model_type}: {reason}") from error
    model.tie_weights()
    if model._can_set_experts_implementation():
        # Only this implementation reads one expert at a time, by index.
        model.set_experts_implementation("eager")
    model.train(False).requires_grad_(False)
    return model


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Move every parameter to meta as it is registered.

    ``torch.device("meta")`` would take along computed buffers (rotary frequencies), which no checkpoint holds.
    """
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder blocks, the largest list of ``num_hidden_layers`` modules, and its prefix: ``model.layers``."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers  # type: ignore[operator, union-attr]
    lists = [
        (sum(p.numel() for p in module.parameters()), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not lists:
        raise BitternError(f"{type(model).__name__}: no list of {count} blocks found")
    _, name, module = max(lists, key=lambda item: item[0])
    return name, module


def tied_names(model: PreTrainedModel) -> set[str]:
    """Parameters that only repeat another one and that no checkpoint needs to hold."""
    return set(model.all_tied_weights_keys)


def weight_map(
    model: PreTrainedModel, available: Iterable[str], packed: Iterable[str] = ()
) -> dict[str, tuple[Piece, ...]]:
    """Find every parameter and persistent buffer of a model in a checkpoint.

    Transformers renames and fuses tensors when it loads (Mixtral's experts) and undoes that when it saves. That undoing
    is run here once, on row numbers in place of weights: it tells which tensor holds which rows, for any architecture.

    Args:
        model: a model of :func:`build`.
        available: names of the tensors in the checkpoint. A missing or an additional base prefix
            (``transformer.``) is understood, and so are the live names themselves.
        packed: layers that it holds packed; each stands for the tensor of its name with ``.weight``.

    Returns:
        Live name -> pieces in row order. Tied parameters are left out.

    Raises:
        BitternError: naming a tensor that the checkpoint lacks, or an architecture whose stored form
            is not made of whole rows.
    """
    from transformers.core_model_loading import revert_weight_conversion

    present = {*available, *(f"{layer}.weight" for layer in packed)}
    tied = tied_names(model)
    numbers: dict[str, Tensor] = {}
    owners: list[tuple[int, str]] = []
    total = 0
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        shape = tuple(tensor.shape) if tensor.ndim < 2 else (*tensor.shape[:-1], 1)
        rows = torch.Size(shape).numel()
        numbers[name] = torch.arange(total, total + rows).view(shape)
        owners.append((total, name))
        total += rows
    starts = torch.tensor([start for start, _ in owners])

    pieces: dict[str, list[Piece]] = {name: [] for name in numbers}
    for stored, rows_of in revert_weight_conversion(model, dict(numbers)).items():
        flat = rows_of.flatten()
        first, last = int(flat[0]), int(flat[-1])
        start, owner = owners[int(torch.searchsorted(starts, first, right=True)) - 1]
        if last - first + 1 != flat.numel() or not bool((flat.diff() == 1).all()):
            raise BitternError(f"{stored}: {model.config.model_type} checkpoints rearrange its rows")
        pieces[owner].append(Piece(stored, stored, first - start, last - start + 1))

    return {
        name: _locate(sorted(found, key=lambda piece: piece.start), name, numbers[name].numel(), present, model)
        for name, found in pieces.items()
    }


def _locate(pieces: list[Piece], live: str, rows: int, present: set[str], model: PreTrainedModel) -> tuple[Piece, ...]:
    """Give each piece the name that the checkpoint at hand uses."""
    prefix = f"{model.base_model_prefix}."

    def stored_as(name: str) -> str | None:
        candidates = (name, name.removeprefix(prefix), prefix + name)
        return next((candidate for candidate in candidates if candidate in present), None)

    located = [(piece, stored_as(piece.name)) for piece in pieces]
    missing = [piece.name for piece, source in located if source is None]
    if not missing:
        return tuple(Piece(p.name, source, p.start, p.stop) for p, source in located if source is not None)
    fused = stored_as(live)
    if fused is None and len(pieces) > 1:
        # Experts that share one checkpoint tensor are packed one by one under that tensor's name.
        fused = live if f"{live}.0.weight" in present else None
    elif fused is None and f"{missing[0].removesuffix('.weight')}.0.weight" in present:
        return tuple(pieces)
    if fused is None:
        raise BitternError(f"{missing[0]}: the checkpoint has no such tensor, and {live} of the model needs it")
    return (Piece(live, fused, 0, rows),)


def matrices(model: PreTrainedModel, prefix: str, sources: dict[str, tuple[Piece, ...]]) -> list[Matrix]:
    """The matrices of one block in the order in which the block defines them.

    Args:
        model: a model of :func:`build`.
        prefix: the block's name, such as ``model.layers.0``.
        sources: the result of :func:`weight_map`.
    """
    from transformers.pytorch_utils import Conv1D

    found: list[Matrix] = []
    for name, module in model.get_submodule(prefix).named_modules(prefix=prefix):
        if isinstance(module, nn.Linear | Conv1D):
            transposed = isinstance(module, Conv1D)
            shape = tuple(module.weight.shape)
            rows, columns = (shape[1], shape[0]) if transposed else shape
            parameter = f"{name}.weight"
            if parameter not in sources:
                raise BitternError(f"{parameter}: shares its weights with another block, which is not supported")
            pieces = sources[parameter]
            parts = (
                ((_layer(pieces[0].name), 0, rows),)
                if len(pieces) == 1
                else tuple((_layer(piece.name), piece.start, piece.stop) for piece in pieces)
            )
            found.append(Matrix(parameter, None, transposed, rows, columns, parts))
        elif hasattr(module, "is_transposed"):
            for leaf, parameter_ in module.named_parameters(recurse=False):
                if parameter_.ndim == 3:
                    found += _experts(f"{name}.{leaf}", tuple(parameter_.shape), bool(module.is_transposed), sources)
    return found


def stored_matrices(model: PreTrainedModel, sources: dict[str, tuple[Piece, ...]]) -> list[Matrix]:
    """The matrices of all blocks and of an output head of its own, named as the checkpoint at hand names them.

    Args:
        model: a model of :func:`build`.
        sources: the result of :func:`weight_map`.
    """
    here = {name: tuple(Piece(p.source, p.source, p.start, p.stop) for p in pieces) for name, pieces in sources.items()}
    prefix, modules = blocks(model)
    places = [f"{prefix}.{index}" for index in range(len(modules))]
    head = output_head(model)
    if head is not None and f"{head}.weight" in here:
        places.append(head)
    return [matrix for place in places for matrix in matrices(model, place, here)]


def output_head(model: PreTrainedModel) -> str | None:
    """The name of the live module that computes logits; None where the architecture has none."""
    output = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return next((name for name, module in model.named_modules() if module is output), None)


def _layer(tensor: str) -> str:
    return tensor.removesuffix(".weight")


def _experts(
    parameter: str, shape: tuple[int, ...], transposed: bool, sources: dict[str, tuple[Piece, ...]]
) -> list[Matrix]:
    """The experts of a fused parameter of shape (experts, out, in), or (experts, in, out)."""
    experts, height, width = shape
    rows, columns = (width, height) if transposed else (height, width)
    found = []
    for expert in range(experts):
        first, end = expert * height, (expert + 1) * height
        inside = [p for p in sources[parameter] if p.start < end and p.stop > first]
        if len(inside) == 1 and inside[0].stop - inside[0].start > height:
            parts: tuple[tuple[str, int, int], ...] = ((f"{_layer(inside[0].name)}.{expert}", 0, rows),)
        elif transposed and len(inside) > 1:
            raise BitternError(f"{parameter}: its experts are stored transposed and in several tensors each")
        elif transposed:
            parts = ((_layer(inside[0].name), 0, rows),)
        else:
            parts = tuple((_layer(p.name), p.start - first, p.stop - first) for p in inside)
        found.append(Matrix(parameter, expert, transposed, rows, columns, parts))
    return found


def get_weight(model: nn.Module, matrix: Matrix) -> Tensor:
    """A view of the matrix, (out_features, in_features)."""
    return matrix.view(model.get_parameter(matrix.parameter))


def set_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor in the place of a parameter or of a persistent buffer."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[leaf] = tensor


def read_tensor(
    checkpoint: Checkpoint, pieces: tuple[Piece, ...], shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """Read one parameter from its pieces and convert it to ``dtype``.

    Raises:
        BitternError: when the checkpoint's shape is not the model's, or a value is NaN or infinite.
    """
    height = torch.Size(shape[:-1]).numel() if len(shape) > 1 else torch.Size(shape).numel()
    width = shape[-1:] if len(shape) > 1 else ()
    result: Tensor | None = None
    for piece in pieces:
        tensor = checkpoint.read(piece.source)
        rows = (piece.stop - piece.start, *width)
        expected = shape if len(pieces) == 1 else rows
        whole = (rows[0] * shape[0] // max(height, 1), *shape[1:])  # a part of more dimensions than two
        if tuple(tensor.shape) not in (expected, expected if len(pieces) == 1 else whole):
            raise BitternError(f"{piece.source}: config.json asks for shape {expected}, found {tuple(tensor.shape)}")
        if tensor.is_floating_point() and not is_finite(tensor):
            raise BitternError(f"{piece.source}: holds NaN or infinite weights")
        if len(pieces) == 1 and tensor.dtype == dtype:
            return tensor
        if result is None:
            result = torch.empty((height, *width), dtype=dtype)
        result[piece.start : piece.stop] = tensor.reshape(rows)
    assert result is not None
    return result.view(shape)


def stays_fp32(model: PreTrainedModel, name: str) -> bool:
    """Whether transformers keeps a tensor in fp32 in models of 16 bits, by its name: biases of routers, say."""
    return any(part in name for part in model._keep_in_fp32_modules_strict or ())


def load_tensors(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    sources: dict[str, tuple[Piece, ...]],
    names: Iterable[str],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> None:
    """Read parameters and persistent buffers by their live names; integer tensors keep their dtype."""
    state = model.state_dict()
    for name in names:
        target = state[name]
        wanted = dtype if target.is_floating_point() else target.dtype
        if wanted in (torch.float16, torch.bfloat16) and stays_fp32(model, name):
            wanted = torch.float32
        tensor = read_tensor(checkpoint, sources[name], tuple(target.shape), wanted)
        set_tensor(model, name, tensor.to(device))


def drop_tensors(model: nn.Module, names: Iterable[str]) -> None:
    """Free tensors that :func:`load_tensors` read; they are on meta again."""
    for name in names:
        owner, _, leaf = name.rpartition(".")
        tensor = model.get_submodule(owner)._parameters.get(leaf)
        if tensor is not None:
            set_tensor(model, name, tensor.to("meta"))


def move_buffers(model: nn.Module, device: torch.device | str) -> None:
    """Move the computed buffers (rotary frequencies, masks); parameters stay where they are."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type != "meta":
                module._buffers[name] = buffer.to(device)


def load_dense(
    checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """The whole model of an unquantized checkpoint, in memory."""
    model = build(checkpoint.config, dtype)
    sources = weight_map(model, checkpoint.tensors)
    load_tensors(model, checkpoint, sources, sources, dtype, device)
    model.tie_weights()
    move_buffers(model, device)
    return model


def unused_tensors(
    model: PreTrainedModel, sources: dict[str, tuple[Piece, ...]], available: Iterable[str]
) -> list[str]:
    """Checkpoint tensors that the model has no place for: extra modules, but no ties and no computed buffers."""
    used = {piece.source for pieces in sources.values() for piece in pieces}
    prefix = f"{model.base_model_prefix}."
    ties = tied_names(model)
    computed = {name for name, _ in model.named_buffers()}
    known = used | ties | computed | {name.removeprefix(prefix) for name in ties | computed}
    return [name for name in available if name not in known and not COMPUTED.search(name)]


def pick_device(name: str) -> torch.device:
    """The device that ``cpu``, ``cuda`` or ``auto`` (CUDA where there is one) stands for.

    Raises:
        BitternError: for another name, and for ``cuda`` on a machine without.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise BitternError(f"device: expected auto, cpu or cuda, found {name!r}")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise BitternError("device: cuda was asked for, torch finds no CUDA device")
    return torch.device("cuda" if name != "cpu" and available else "cpu")
