"""A checkpoint folder, quantized or not, as a transformers model ready to run."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from bittern.artifact import Artifact
from bittern.checkpoint import Checkpoint, open_checkpoint
from bittern.errors import BitternError
from bittern.fit import packed_matrices, refuse_unplaced
from bittern.model import (
    Matrix,
    Piece,
    build,
    load_tensors,
    pick_device,
    read_tensor,
    set_tensor,
    weight_map,
)
from bittern.runtime import attention, native
from bittern.runtime.ends import place_ends, plan_ends
from bittern.runtime.linear import NativeMatrix, PackedExperts, QuantLinear, share_inputs
from bittern.runtime.packed import PackedMatrix
from bittern.runtime.step import keeps_nothing
from bittern.ties import refuse_untied
from bittern.weight import QuantWeight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from bittern.runtime.decoder import Decoder

# How far the native decoder's logits may be from the model's, relative to the largest. With inputs of 16 bits they are
# 1e-4 apart, from digits that are rounded to the other side, and 3e-3 in a 2-bit model that hardly works.
TOLERANCE = 1e-2
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class _Place:
    """Where layers go: dtype, device, and settings of the native kernels, or None for torch's operations."""

    dtype: torch.dtype
    device: torch.device
    settings: native.Settings | None

    def pack(self, weight: QuantWeight) -> NativeMatrix | PackedMatrix:
        if self.settings is None:
            return PackedMatrix(weight, self.dtype).to(self.device)
        return NativeMatrix(weight, self.dtype, self.settings)


def load(
    path: str | os.PathLike[str],
    *,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    threads: int | None = None,
    activations: str = "a16",
    lm_head_bits: int | None = None,
    kernels: str = "auto",
    decoder: bool = True,
) -> PreTrainedModel:
    """Load an artifact of bittern, GPTQModel or AutoGPTQ, or a plain checkpoint.

    The result is a normal transformers model in evaluation mode: ``generate``, pipelines and lm-eval
    work on it. Layers that the checkpoint holds packed stay packed (:class:`QuantLinear`,
    :class:`PackedExperts`) and are dequantized when they are used. Its attribute ``kernels`` says in a few
    words how it computes.

    Args:
        path: a folder, a GGUF file or a Hub id.
        device: "cpu", "cuda" or "auto" (CUDA where there is one).
        dtype: of what is not packed, and of the arithmetic: float32, bfloat16, float16 or float64. Default: float32 on
            a CPU, what config.json says on CUDA.
        revision: of a Hub id.
        threads: of the native kernels; None for ``torch.get_num_threads()`` at the time of a call. Torch's own
            operations keep torch's number.
        activations: how the native kernels round the inputs of packed layers: "a16" or "a8" (faster).
        lm_head_bits: 8 packs the output head while loading, rounding to nearest in groups of 32.
        kernels: "native" or "torch" for packed layers and attention; "auto" is native on a CPU where the library was
            built.
        decoder: whether :func:`bittern.runtime.generate.generate` may run the whole model natively.

    Raises:
        BitternError: for an unknown architecture or format, an argument out of range, native kernels that are not
            there, and naming any tensor that is missing, unexpected or of the wrong shape.
    """
    if dtype not in (None, *_DTYPES):
        raise BitternError(f"dtype: expected one of {', '.join(map(str, _DTYPES))}, found {dtype!r}")
    target = pick_device(device)
    settings = _native_settings(target, kernels, native.Settings(activations, threads))
    with open_checkpoint(path, revision) as checkpoint:
        if dtype is None:
            dtype = _stored_dtype(checkpoint.config) if target.type == "cuda" else torch.float32
        place = _Place(dtype, target, settings)
        refuse_untied(checkpoint)
        model = build(checkpoint.config, dtype)
        artifact = Artifact(checkpoint)
        sources = weight_map(model, artifact.plain, artifact.layers)
        layers = packed_matrices(model, sources, artifact)
        refuse_unplaced(model, sources, layers, artifact)
        for _, same in groupby(layers, key=lambda matrix: matrix.parameter):
            _replace(model, list(same), artifact, place)
        embeddings = _packed_embeddings(sources, layers, artifact)
        if embeddings and lm_head_bits is not None:
            raise BitternError(f"lm_head_bits: expected embeddings of floats, found {next(iter(embeddings))} packed")
        stored = bool(layers) and settings is not None and dtype == torch.float32 and not embeddings
        ends = plan_ends(model, stored=stored, head_bits=lm_head_bits)
        replaced = {matrix.parameter for matrix in layers} | ends.parameters | set(embeddings)
        load_tensors(model, checkpoint, sources, (name for name in sources if name not in replaced), dtype, target)
        for name, layer in embeddings.items():
            set_tensor(model, name, artifact.read(layer).dequantize().to(target, dtype))
        model.tie_weights()
        place_ends(model, ends, checkpoint, sources, place.pack, threads)
        model.to(target)  # type: ignore[arg-type]
        share_inputs(model)
        attention.use(model, kernels=settings is not None)
        _finish(model, checkpoint, packed=bool(layers) or lm_head_bits is not None)
    _choose_tier(model, settings, decoder, dtype)
    return model


def _native_settings(target: torch.device, kernels: str, settings: native.Settings) -> native.Settings | None:
    """The settings when packed layers are to be native, None when torch computes them."""
    if kernels not in ("auto", "torch", "native"):
        raise BitternError(f"kernels: expected auto, torch or native, found {kernels!r}")
    if kernels == "native" and target.type != "cpu":
        raise BitternError(f"kernels: the native ones run on a CPU, the device is {target.type}")
    if kernels == "native":
        native.library()
    if target.type == "cpu" and kernels != "torch" and native.available():
        return settings
    if settings.activations != "a16":
        reason = f"; {native.why_not()}" if native.why_not() else ""
        raise BitternError(
            f"activations: only native kernels on a CPU round inputs to {settings.activations}, and none are in use "
            f"(device {target.type}, kernels {kernels}{reason})"
        )
    return None


def _choose_tier(model: PreTrainedModel, settings: native.Settings | None, decoder: bool, dtype: torch.dtype) -> None:
    """Attach the native decoder where it fits, and say in ``model.kernels`` how the model computes."""
    attached, reason = None, ""
    if settings is None:
        reason = "torch kernels"
    elif not decoder:
        reason = "without the decoder for whole models"
    elif dtype != torch.float32:
        reason = f"it computes in float32, not in {dtype}"
    else:
        attached, reason = attach_checked(model, settings)
    vars(model).update(native_decoder=attached, native_decoder_reason=reason)
    if settings is None:
        why = native.why_not() if model.device.type == "cpu" else ""
        description = f"torch (native runtime: {why})" if why else "torch"
    else:
        whole = "whole model" if attached is not None else f"layer by layer ({reason})"
        rounding = settings.activations == "a16" or any(isinstance(module, NativeMatrix) for module in model.modules())
        activations = settings.activations if rounding else "as they are (no layer is packed)"
        description = f"native {native.instructions()}, activations {activations}, {whole}"
    if keeps_nothing(model):
        description += f"; a {model.config.model_type} keeps nothing: every new token computes the whole text anew"
    vars(model).update(kernels=description)


def attach_checked(model: PreTrainedModel, settings: native.Settings) -> tuple[Decoder | None, str]:
    """The native decoder when it computes what the model does, or None and why not."""
    from bittern.runtime.decoder import Unsupported, attach

    packed = [module for module in model.modules() if isinstance(module, NativeMatrix)]
    fine = native.Settings("a16", settings.threads)  # the roundings of 8 bits would hide mistakes
    try:
        found = attach(model, settings.activations, settings.threads)
        checked = found if settings == fine else attach(model, fine.activations, fine.threads)
    except Unsupported as error:
        return None, str(error)
    try:
        for module in packed:
            module.settings = fine
        checked.check(model, TOLERANCE)
    except Unsupported as error:
        warnings.warn(f"{model.name_or_path}: the native decoder is not used: {error}", stacklevel=4)
        return None, str(error)
    finally:
        for module in packed:
            module.settings = settings
    return found, ""


def _stored_dtype(config: dict[str, Any]) -> torch.dtype:
    stored = config.get("dtype", config.get("torch_dtype"))
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(str(stored), torch.float32)


def _packed_embeddings(
    sources: dict[str, tuple[Piece, ...]], layers: list[Matrix], artifact: Artifact
) -> dict[str, str]:
    """Parameter -> packed layer, of what is packed and no matrix: mlx-lm packs embeddings. They run as floats."""
    matrices = {matrix.parameter for matrix in layers}
    named = {name: pieces[0].source.removesuffix(".weight") for name, pieces in sources.items() if len(pieces) == 1}
    return {name: layer for name, layer in named.items() if name not in matrices and layer in artifact.layers}


def _replace(model: PreTrainedModel, same: list[Matrix], artifact: Artifact, place: _Place) -> None:
    """Put packed layers in the place of one parameter: a Linear's, a Conv1D's or a fused one of experts."""
    first = same[0]
    filled = [QuantLinear([_part(matrix, part, artifact, place) for part in matrix.parts]) for matrix in same]
    if first.expert is not None:
        for matrix in same:
            if _stored_bias(matrix, artifact) is not None:
                layer = matrix.parts[0][0]
                raise BitternError(f"{layer}.bias: expected zeros, for experts have no bias here, found other values")
        owner, leaf = model.get_submodule(first.module), first.parameter.rpartition(".")[2]
        del owner._parameters[leaf]
        owner.add_module(leaf, PackedExperts(filled, first.transposed))
        return
    bias = model.get_submodule(first.module).bias
    if bias is None and (values := _stored_bias(first, artifact)) is not None:
        bias = nn.Parameter(values.to(place.device, place.dtype), requires_grad=False)
    filled[0].register_parameter("bias", bias)  # type: ignore[arg-type]
    model.set_submodule(first.module, filled[0])


def _stored_bias(matrix: Matrix, artifact: Artifact) -> Tensor | None:
    """Biases beside packed layers of a model that has none, fp32 (out_features,); None when they are zeros.

    AutoGPTQ gave every layer one.
    """
    names = {layer: f"{layer}.bias" for layer, _, _ in matrix.parts if f"{layer}.bias" in artifact.plain}
    if not names:
        return None
    found = [
        artifact.checkpoint.read(names[layer]).float()
        if layer in names
        else torch.zeros(stop - start, dtype=torch.float32, device="cpu")
        for layer, start, stop in matrix.parts
    ]
    values = torch.cat(found)
    return values if bool(values.any()) else None


def _part(
    matrix: Matrix, part: tuple[str, int, int], artifact: Artifact, place: _Place
) -> NativeMatrix | PackedMatrix | nn.Linear:
    """Rows of a matrix that are one layer of the checkpoint, packed there or not."""
    layer, start, stop = part
    shape = (stop - start, matrix.in_features)
    if layer in artifact.layers:
        weight = artifact.read(layer)
        found = (weight.out_features, weight.in_features)
        if found != shape:
            raise BitternError(f"{layer}: config.json asks for shape {shape}, found {found}")
        return place.pack(weight)
    name = f"{layer}.weight" if f"{layer}.weight" in artifact.plain else layer
    dense = nn.Linear(matrix.in_features, stop - start, bias=False, device="meta")
    values = read_tensor(artifact.checkpoint, (Piece(name, name, 0, stop - start),), shape, place.dtype)
    dense.weight = nn.Parameter(values.to(place.device), requires_grad=False)
    return dense


def _finish(model: PreTrainedModel, checkpoint: Checkpoint, packed: bool) -> None:
    """What from_pretrained would also set, and what a packed model must not do."""
    from transformers import GenerationConfig

    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise BitternError(f"{missing[0]}: the checkpoint has no values for it")
    model.name_or_path = model.config._name_or_path = checkpoint.source
    # What lies beside a GGUF file is not its own.
    if checkpoint.gguf is None and (checkpoint.folder / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
        except (OSError, ValueError, TypeError, AttributeError) as error:  # whatever stands there instead of settings
            raise BitternError(f"{checkpoint.folder}/generation_config.json: {error}") from error
    if packed:
        model.save_pretrained = _refuse_to_save  # type: ignore[method-assign]


def _refuse_to_save(*args: Any, **kwargs: Any) -> NoReturn:
    raise BitternError("save_pretrained: the layers of this model are packed; copy the folder it was loaded from")
