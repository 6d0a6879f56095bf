"""The layers of a loaded model: matrices that stay packed, and what stands in the place of ``nn.Linear``.

A packed matrix is a :class:`NativeMatrix` on a CPU with the native library, and a ``PackedMatrix`` of torch
operations anywhere else.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from bittern.errors import BitternError
from bittern.runtime import native
from bittern.runtime.packed import PackedMatrix, keep_dtype
from bittern.weight import QuantWeight

# From how many rows of input on a block of the weight is dequantized and multiplied in fp32 by torch, which is then
# faster than the kernel; None is never. One thread, 4 bits, 2048 x 2048, kernel / torch in ms: scalar 71 / 71 at 64
# rows, 567 / 74 at 512; at 512 rows AVX2 48 / 55 (torch without AVX-512), AVX-512 22 / 48, AMX 9 / 44.
PACKED_GEMM_ROWS: dict[str, int | None] = {"scalar": 64, "avx2": None, "avx512": None, "amx": None, "neon": None}
# The same for stored floats: bfloat16, 16384 x 576, AVX2 18 / 17 at 16 rows, AVX-512 18 / 19 at 32, 32 / 31 at 64.
DENSE_GEMM_ROWS: dict[str, int] = {"scalar": 2, "avx2": 16, "avx512": 48, "amx": 48, "neon": 16}
# Weights that are dequantized at a time: 4 MB in fp32, still in cache when they are multiplied.
_STEP = 2**20
# Names, within one module, of layers that see the same input.
_SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("q_proj", "kv_a_proj_with_mqa"),
)


class NativeMatrix(nn.Module):
    """One quantized matrix of shape (out_features, in_features) for the native kernels, on the CPU only.

    Buffers, as :func:`native.pack` makes them:
        codes: uint8, one-dimensional.
        scales: float16 or float32 (tiles, groups, 16); a change of the model's dtype leaves it alone.
        zeros: uint8 (tiles, groups, 16), or None where the grid is symmetric.
        order: int32 (in_features,), which input column each stored one is; None when in order.

    Args:
        weight: what to hold.
        dtype: what :attr:`weight` is dequantized to; follows later changes of the model's dtype.
        settings: how to compute.

    Raises:
        BitternError: when there is no native library, and later when the module is moved off the CPU.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    order: Tensor | None
    like: Tensor

    def __init__(
        self,
        weight: QuantWeight,
        dtype: torch.dtype = torch.float32,
        settings: native.Settings = native.Settings(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__()
        self.settings = settings
        self.bits = weight.spec.bits
        self.out_features, self.in_features = weight.out_features, weight.in_features
        self.group_size = min(weight.spec.columns_per_group(weight.in_features), weight.in_features)
        for name, buffer in zip(
            ("codes", "scales", "zeros", "order"), native.pack(weight, settings.threads), strict=True
        ):
            self.register_buffer(name, buffer)
        self.register_buffer("like", torch.empty(0, dtype=dtype, device="cpu"), persistent=False)

    @property
    def matrix(self) -> native.Matrix:
        """What the library takes; it points into the present buffers."""
        buffers = (self.codes, self.scales, self.zeros, self.order)
        return native.matrix(self.out_features, self.in_features, self.bits, self.group_size, buffers)

    @property
    def weight(self) -> Tensor:
        """The whole matrix as floats, columns in the order of the input: (out_features, in_features)."""
        stored = native.dequantize(self.matrix, threads=self.settings.threads).to(self.like.dtype)
        return stored if self.order is None else stored[:, torch.argsort(self.order)]

    def forward(self, x: Tensor) -> Tensor:
        """``x @ W.T`` for x of shape (..., in_features), in the dtype of x."""
        return _multiply(x, [[self]])[0]

    def multiply_dequantized(self, x: Tensor, out: Tensor) -> None:
        """``x @ W.T`` in fp32 with torch's GEMM: x (rows, in_features), out (rows, out_features)."""
        x = x if self.order is None else x[:, self.order]
        matrix, step = self.matrix, max(1, _STEP // self.in_features)
        for start in range(0, self.out_features, step):
            stop = min(start + step, self.out_features)
            weight = native.dequantize(matrix, start, stop, self.settings.threads)
            out[:, start:stop] = functional.linear(x, weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if fn(torch.empty(0, dtype=torch.uint8, device="cpu")).device.type != "cpu":
            raise BitternError(
                "device: the layers of this model are packed for the CPU; load it for another device anew"
            )
        scales = self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        keep_dtype(self, "scales", scales)  # a model in bf16 keeps exact scales
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}"
        )


class QuantLinear(nn.Module):
    """Stands in the place of ``nn.Linear`` and of transformers' ``Conv1D``.

    Args:
        parts: the matrix in pieces of rows, almost always one. A checkpoint may keep apart what the
            live model fuses, and may have quantized only some of it.
        bias: (out_features,) or None.
    """

    bias: nn.Parameter | None

    def __init__(
        self, parts: Sequence[NativeMatrix | PackedMatrix | nn.Linear], bias: nn.Parameter | None = None
    ) -> None:
        super().__init__()
        self.in_features = parts[0].in_features
        self.out_features = sum(part.out_features for part in parts)
        self.parts = nn.ModuleList(parts)
        self.register_parameter("bias", bias)
        self.siblings: Siblings | None = None

    @property
    def weight(self) -> Tensor:
        """The dequantized matrix, (out_features, in_features); some architectures multiply by it themselves."""
        return _joined([cast(Tensor, part.weight) for part in self.parts], dim=0)

    @property
    def native_parts(self) -> list[NativeMatrix] | None:
        """The parts, when all of them are for the native kernels."""
        parts = [part for part in self.parts if isinstance(part, NativeMatrix)]
        return parts if len(parts) == len(self.parts) else None

    def forward(self, x: Tensor) -> Tensor:
        """``x @ W.T + bias`` for x of shape (..., in_features)."""
        parts = self.native_parts
        if parts is None:
            y = _joined([part(x) for part in self.parts], dim=-1)
        elif self.siblings is not None:
            y = self.siblings(self, x)
        else:
            y = _multiply(x, [parts])[0]
        return y if self.bias is None else y + self.bias


class Siblings:
    """Layers that are applied to the same tensor one after the other, such as q, k and v: computed in one call.

    The first of them that sees a tensor computes all, the others take what is theirs, once. A result counts for that
    tensor object and its version only, is held as long as the tensor lives, and is let go when it has been taken.
    Layers that leave results unused turn out not to share their input; from then on each computes its own.
    """

    def __init__(self, layers: Sequence[QuantLinear]) -> None:
        self._layers = tuple(layers)
        self._left: tuple[weakref.ref[Tensor], int, dict[int, Tensor]] | None = None
        for layer in layers:
            layer.siblings = self

    def __call__(self, layer: QuantLinear, x: Tensor) -> Tensor:
        """``x @ W.T`` of one of the layers, without its bias."""
        # A tensor of inference mode has no version: a change in place would not be noticed.
        layers, left = self._layers, self._left
        if x.is_inference() or not layers:
            return _multiply(x, [_native(layer)])[0]
        index = layers.index(layer)
        if left is not None and left[0]() is x and left[1] == x._version:
            found = left[2].pop(index, None)
            if found is not None:
                if not left[2]:
                    self._left = None
                return found
        if left is not None:
            self._left, self._layers = None, ()
            return _multiply(x, [_native(layer)])[0]
        results = dict(enumerate(_multiply(x, [_native(each) for each in layers])))
        result = results.pop(index)
        self._left = weakref.ref(x, lambda _: results.clear()), x._version, results
        return result

    def __getstate__(self) -> dict[str, Any]:
        return {"_layers": self._layers, "_left": None}  # a copy of a model starts with nothing to hand out


def share_inputs(model: nn.Module) -> None:
    """Find the layers of a model that see the same input, by their names within one module, and join them."""
    for module in model.modules():
        for names in _SIBLINGS:
            layers = [layer for name in names if isinstance(layer := module._modules.get(name), QuantLinear)]
            parts = [part for layer in layers for part in layer.native_parts or ()]
            whole = all(layer.native_parts for layer in layers)
            same = len({layer.in_features for layer in layers}) == 1
            if len(layers) > 1 and whole and same and len(parts) <= native.MOST_MATRICES:
                Siblings(layers)


class StoredLinear(nn.Linear):
    """``nn.Linear`` on the CPU whose weight keeps the dtype of the file, while results have that of the input.

    Buffers:
        weight: float32, float16 or bfloat16 (out_features, in_features); a change of the model's dtype leaves it alone.

    Args:
        weight: contiguous; another layer may hold the same tensor.
        bias: (out_features,) or None.
        threads: as in :class:`native.Settings`.
    """

    def __init__(self, weight: Tensor, bias: nn.Parameter | None = None, threads: int | None = None) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        _hold(self, weight)
        self.bias = bias  # type: ignore[assignment]
        self.threads = threads

    def forward(self, x: Tensor) -> Tensor:
        """``x @ W.T + bias`` for x of shape (..., in_features)."""
        if not x.is_cpu or _needs_gradient(x):
            return functional.linear(x, self.weight.to(x.dtype), self.bias)
        rows = _rows(x, self.in_features)
        y = native.floats(len(rows), self.out_features)
        if len(rows) < DENSE_GEMM_ROWS[native.instructions()]:
            native.linear(rows, [native.dense_matrix(self.weight)], threads=self.threads, out=[y])
        else:
            step = max(1, _STEP // self.in_features)
            for start in range(0, self.out_features, step):
                block = slice(start, start + step)
                y[:, block] = functional.linear(rows, self.weight[block].float())
        if self.bias is not None:
            y += self.bias
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        weight = self.weight
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        keep_dtype(self, "weight", weight)
        return self


class StoredEmbedding(nn.Embedding):
    """``nn.Embedding`` whose weight keeps the dtype of the file, while results have the model's.

    Buffers:
        weight: float32, float16 or bfloat16 (tokens, features); a change of the model's dtype leaves it alone.

    Args:
        weight: another layer may hold the same tensor.
        scale: what results are multiplied with, rounded to the model's dtype first, as Gemma 3 does; None is 1.
        dtype: of the results; follows later changes of the model's dtype.
    """

    like: Tensor
    scale: Tensor | None

    def __init__(self, weight: Tensor, scale: Tensor | None = None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(weight.shape[0], weight.shape[1], device="meta")
        _hold(self, weight)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("like", torch.empty(0, dtype=dtype, device="cpu"), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Integer ids of any shape -> (..., features)."""
        rows = functional.embedding(ids, self.weight).to(self.like.dtype)
        return rows if self.scale is None else rows * self.scale.to(self.like.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        weight = self.weight
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        keep_dtype(self, "weight", weight)
        return self


class PackedExperts(nn.Module):
    """Stands in the place of the fused three-dimensional parameter of a mixture of experts.

    Transformers' "eager" experts implementation reads one expert at a time, by index; no other works.

    Args:
        experts: one matrix per expert.
        transposed: whether the parameter stored (in_features, out_features), as gpt-oss does.
    """

    def __init__(self, experts: Sequence[QuantLinear], transposed: bool) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.transposed = transposed

    def __getitem__(self, expert: int | Tensor) -> Tensor:
        """One expert's dequantized weight, in the orientation of the parameter."""
        weight = cast(Tensor, self.experts[int(expert)].weight)
        return weight.T if self.transposed else weight


def native_matrix(module: nn.Module) -> native.Matrix | None:
    """The weight of a layer, without its bias, as the native library takes it; None where it has no such form.

    The result points into the layer's tensors and is good as long as they stay where they are.
    """
    if isinstance(module, QuantLinear):
        parts = module.native_parts
        return parts[0].matrix if parts is not None and len(parts) == 1 else None
    if isinstance(module, StoredLinear):
        return native.dense_matrix(module.weight) if module.weight.is_cpu else None
    if type(module) is nn.Linear:
        weight = module.weight
        plain = weight.is_cpu and weight.is_contiguous() and weight.dtype == torch.float32
        return native.dense_matrix(weight) if plain else None
    return None


def _native(layer: QuantLinear) -> list[NativeMatrix]:
    parts = layer.native_parts
    assert parts is not None
    return parts


def _multiply(x: Tensor, layers: Sequence[Sequence[NativeMatrix]]) -> list[Tensor]:
    """``x @ W.T`` of layers, each made of matrices below each other, for one input (..., in_features)."""
    if _needs_gradient(x):
        return [functional.linear(x, _joined([part.weight.to(x.dtype) for part in own], dim=0)) for own in layers]
    parts = [part for own in layers for part in own]
    rows = _rows(x, parts[0].in_features)
    results = [native.floats(len(rows), sum(part.out_features for part in own)) for own in layers]
    out = [
        piece
        for y, own in zip(results, layers, strict=True)
        for piece in torch.split(y, [part.out_features for part in own], dim=1)
    ]
    settings, gemm_rows = parts[0].settings, PACKED_GEMM_ROWS[native.instructions()]
    if gemm_rows is not None and len(rows) >= gemm_rows:
        for part, y in zip(parts, out, strict=True):
            part.multiply_dequantized(rows, y)
    else:
        native.linear(rows, [part.matrix for part in parts], settings.activations, settings.threads, out)
    return [y.view(*x.shape[:-1], y.shape[1]).to(x.dtype) for y in results]


def _needs_gradient(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


def _rows(x: Tensor, in_features: int) -> Tensor:
    """x (..., in_features) as float32 (rows, in_features) for the library, which checks nothing of this."""
    if not x.is_cpu or x.shape[-1] != in_features:
        raise BitternError(f"input: expected {in_features} features on the CPU, found {tuple(x.shape)} on {x.device}")
    rows = x.reshape(-1, in_features).float()
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _hold(module: nn.Linear | nn.Embedding, weight: Tensor) -> None:
    """Make the weight a buffer: transformers takes a model's dtype from its first parameter."""
    del module.weight
    module.register_buffer("weight", weight)


def _joined(tensors: list[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)
