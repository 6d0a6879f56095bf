"""Tier 2: decoders of the Llama family, one native call for every forward pass (csrc/decoder.cpp).

:func:`attach` reads a loaded transformers model and points the library at its weights. Whatever could change the
arithmetic is looked at there: a model type, a config key or a submodule that this file does not know is refused with
a reason, and the model stays with transformers' own code.
"""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import threading
from collections.abc import Callable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from bittern.errors import BitternError, first_line
from bittern.runtime import native
from bittern.runtime.cache import TYPES
from bittern.runtime.linear import native_matrix
from bittern.tokenizer import context_length

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_ACTIVATIONS = {"silu": 0, "swish": 0, "gelu_pytorch_tanh": 1}
# The classes whose code csrc/decoder.cpp computes.
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
# Config keys that this file looks at, here or through the modules that were built from them.
_KNOWN_KEYS = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *(
        "num_key_value_heads",
        "head_dim",
        "hidden_act",
        "hidden_activation",
        "rms_norm_eps",
        "attention_bias",
        "mlp_bias",
    ),
    *("rope_parameters", "max_position_embeddings", "use_sliding_window", "sliding_window", "max_window_layers"),
    *("layer_types", "no_rope_layers", "no_rope_layer_interval", "query_pre_attn_scalar", "attn_logit_softcapping"),
    *("final_logit_softcapping", "use_bidirectional_attention", "tie_word_embeddings"),
}
# Keys that change nothing in a forward pass without training.
_HARMLESS_KEYS = {
    *("initializer_range", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "pretraining_tp"),
    *("attention_dropout", "default_theta"),
}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_NORMS = {"input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"}


class Unsupported(BitternError):
    """A model that only transformers' own code computes; the message says why."""


class _Projection(ctypes.Structure):
    _fields_ = (("matrix", ctypes.c_void_p), ("bias", ctypes.c_void_p))


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Projection) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((f"{name}_norm", ctypes.c_void_p) for name in ("attention", "mlp", "attention_out", "mlp_out", "q", "k")),
        ("window", ctypes.c_int32),
        ("rope", ctypes.c_int32),
    )


class _Decoder(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate")),
        *((name, ctypes.c_int32) for name in ("vocabulary", "activation", "activations")),
        *((name, ctypes.c_float) for name in ("epsilon", "embedding_scale", "attention_scale")),
        *((name, ctypes.c_float) for name in ("attention_cap", "logit_cap")),
        *((name, ctypes.c_void_p) for name in ("embedding", "head", "norm", "layer")),
    )


class _CacheView(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("type", "sequences", "capacity")),
        *((name, ctypes.c_void_p) for name in ("keys", "values", "key_scales", "value_scales")),
    )


class _Rope(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("cos", "sin")),
        *((name, ctypes.c_int32) for name in ("first", "end", "stride", "rotary")),
    )


class Cache:
    """Keys and values of several sequences. Memory is only touched where tokens have been, so room costs nothing.

    Attributes:
        lengths: tokens that each sequence holds.
        capacity: tokens that each may hold.

    Args:
        layers, heads, head_dim: of the model, heads those of keys.
        sequences, capacity: room for how many sequences of how many tokens.
        dtype: "fp32", "bf16", or "int8" with a scale per token and head.
    """

    def __init__(self, layers: int, heads: int, head_dim: int, sequences: int, capacity: int, dtype: str) -> None:
        self.capacity = capacity
        self.lengths = [0] * sequences
        rows = _filled(capacity, 64)
        shape = (layers, sequences, heads, rows, _filled(head_dim, 16))
        stored = TYPES[dtype]
        self._tensors = [torch.empty(shape, dtype=stored, device="cpu") for _ in range(2)]
        if stored == torch.int8:
            self._tensors += [native.floats(*shape[:4]) for _ in range(2)]
        self._pointers = [(ctypes.c_void_p * layers)(*[each.data_ptr() for each in whole]) for whole in self._tensors]
        addresses = [ctypes.addressof(each) for each in self._pointers]
        self.view = _CacheView(native.TYPES[stored], sequences, rows, *addresses, *[None] * (4 - len(addresses)))


class Decoder:
    """A transformers model's weights, computed with by the native library. Made by :func:`attach`.

    It points into the model's tensors: they must stay where they are.
    """

    def __init__(self, model: PreTrainedModel, activations: str, threads: int | None) -> None:
        config = model.config
        # The library's pointers stay good whatever becomes of the model.
        self._keep: list[Any] = [each.detach() for each in chain(model.parameters(), model.buffers())]
        self._places = _places(model)
        self._threads = threads
        self._limit = context_length(config)
        self._ropes = _Ropes(model)
        self.vocab_size = int(config.vocab_size)
        body, head = cast(Any, model.model), cast(Any, model.get_output_embeddings())  # type: ignore[no-untyped-call]
        layers = list(body.layers[: config.num_hidden_layers])
        attention = layers[0].self_attn
        self._shape = (len(layers), config.num_key_value_heads, attention.head_dim)
        made = (_Layer * len(layers))(*[self._layer(layer, index, config) for index, layer in enumerate(layers)])
        self._keep.append(made)
        self._view = _Decoder(
            len(layers),
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            attention.head_dim,
            config.intermediate_size,
            self.vocab_size,
            _ACTIVATIONS[_activation(config)],
            native.ACTIVATIONS[activations],
            _epsilon(body.norm),
            config.hidden_size**0.5 if config.model_type == "gemma3_text" else 1.0,
            attention.scaling,
            0.0,  # a cap of scores: no class among these has one
            getattr(config, "final_logit_softcapping", None) or 0.0,
            self._address(native.dense_matrix(_floats("embed_tokens", body.embed_tokens.weight))),
            self._address(_matrix("lm_head", head)),
            self._norm(body.norm),
            ctypes.addressof(made),
        )

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # a copy of the model has other tensors, and no decoder

    def new_cache(self, sequences: int, capacity: int, dtype: Literal["fp32", "bf16", "int8"] = "fp32") -> Cache:
        """An empty cache.

        Args:
            sequences: how many are going to be computed side by side.
            capacity: tokens that each of them may reach.
            dtype: of what is stored.

        Raises:
            BitternError: for a capacity beyond the model's context, or an unknown dtype.
        """
        if dtype not in TYPES:
            raise BitternError(f"cache: expected one of {', '.join(TYPES)}, found {dtype!r}")
        if sequences < 1 or capacity < 1:
            raise BitternError(f"cache: expected room for something, found {sequences} sequences of {capacity} tokens")
        if self._limit is not None and capacity > self._limit and not self._ropes.dynamic:
            raise BitternError(f"cache: {capacity} tokens do not fit the model's context of {self._limit}")
        try:
            return Cache(*self._shape, sequences, capacity, dtype)
        except RuntimeError as error:  # of torch: no memory
            room = f"{sequences} x {capacity} tokens"
            raise BitternError(
                f"cache: {room} do not fit the memory: {first_line(error)}; max_new_tokens makes it smaller"
            ) from error

    def forward(self, cache: Cache, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Append tokens to sequences, all of them in one pass.

        Args:
            cache: from :meth:`new_cache` of this decoder.
            tokens: for every sequence of the cache its new tokens, maybe none.

        Returns:
            float32 (sequences, vocabulary): the logits after the last token of each sequence; rows of sequences
            without new tokens hold anything.

        Raises:
            BitternError: when a sequence has no room left, or for a token that the model does not have.
        """
        counts = [len(new) for new in tokens]
        if len(counts) != len(cache.lengths):
            raise BitternError(f"tokens: expected those of {len(cache.lengths)} sequences, found {len(counts)}")
        lengths = [length + count for length, count in zip(cache.lengths, counts, strict=True)]
        end = max(length for length, count in zip(lengths, counts, strict=True) if count) if any(counts) else 0
        if end > cache.capacity:
            raise BitternError(f"cache: full, {end} tokens do not fit a capacity of {cache.capacity}")
        flat = list(chain.from_iterable(tokens))
        active = [index for index, count in enumerate(counts) if count]
        if not active:
            return native.floats(len(counts), self.vocab_size)
        if min(flat) < 0 or max(flat) >= self.vocab_size:
            raise BitternError(f"tokens: expected ids below {self.vocab_size}, found {min(flat)} to {max(flat)}")
        first = min(cache.lengths[index] for index in active)
        logits = native.floats(len(active), self.vocab_size)
        ropes, _held = self._ropes.tables(first, end)
        integers = ctypes.c_int32
        status = native.library().bt_forward(
            native.context(self._threads),
            ctypes.byref(self._view),
            ctypes.byref(cache.view),
            ropes,
            (integers * len(flat))(*flat),
            (integers * len(counts))(*counts),
            (integers * len(counts))(*cache.lengths),
            logits.data_ptr(),
        )
        native.check(status, "bt_forward")
        cache.lengths = lengths
        if len(active) == len(counts):
            return logits
        spread = native.floats(len(counts), self.vocab_size)
        spread[active] = logits
        return spread

    def fits(self, model: PreTrainedModel) -> bool:
        """Whether a model has the very tensors, all of them and no others, that this decoder was made from."""
        return self._places == _places(model)

    @torch.inference_mode()
    def check(self, model: PreTrainedModel, tolerance: float) -> float:
        """Send a few tokens through the model and through this decoder: a prompt of eight, then two steps.

        Args:
            model: the one that this decoder was made from.
            tolerance: the largest difference to accept.

        Returns:
            The largest difference of two logits, relative to the largest logit of the model.

        Raises:
            Unsupported: when that is more than ``tolerance``, or not a number.
        """
        ids = [(index * 7919 + 11) % self.vocab_size for index in range(10)]
        if self._limit is not None and self._limit < len(ids):
            raise Unsupported(f"a context of {self._limit} tokens is too short to compare both in")
        expected = model(torch.tensor([ids], device="cpu"), use_cache=False).logits[0, 7:].float()
        cache = self.new_cache(1, len(ids))
        found = torch.cat([self.forward(cache, [part]) for part in (ids[:8], ids[8:9], ids[9:])])
        difference = float((found - expected).abs().max() / expected.abs().max())
        if not difference <= tolerance:
            raise Unsupported(f"its logits differ from transformers' by {difference:.1e} of the largest one")
        return difference

    def _layer(self, layer: Any, index: int, config: PreTrainedConfig) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        for name, module, known in (
            ("the layer", layer, {"self_attn", "mlp", *_NORMS}),
            ("self_attn", attention, _ATTENTION),
            ("mlp", mlp, _MLP),
        ):
            unknown = {child for child, _ in module.named_children()} - known
            if unknown:
                raise Unsupported(f"layer {index}: {name} has a submodule {min(unknown)} that is not known here")
        sources = [(attention, f"{name}_proj") for name in "qkvo"]
        sources += [(mlp, f"{name}_proj") for name in ("gate", "up", "down")]
        projections = [self._projection(f"layer {index}: {name}", getattr(module, name)) for module, name in sources]
        sandwiched = hasattr(layer, "pre_feedforward_layernorm")
        return _Layer(
            *projections,
            self._norm(layer.input_layernorm),
            self._norm(layer.pre_feedforward_layernorm if sandwiched else layer.post_attention_layernorm),
            self._norm(layer.post_attention_layernorm) if sandwiched else None,
            self._norm(layer.post_feedforward_layernorm) if sandwiched else None,
            self._norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
            self._norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
            _window(attention, config),
            self._ropes.table_of(index) if getattr(attention, "use_rope", True) else -1,
        )

    def _projection(self, name: str, module: nn.Module) -> _Projection:
        matrix = self._address(_matrix(name, module))
        bias = cast("Tensor | None", module.bias)
        return _Projection(matrix, None if bias is None else self._held(bias.detach().float().contiguous()))

    def _norm(self, module: nn.Module) -> int:
        weight = cast(Tensor, module.weight).detach().float()
        # Gemma stores what is added to one.
        return self._held(1.0 + weight if type(module).__name__ == "Gemma3RMSNorm" else weight.contiguous())

    def _held(self, tensor: Tensor) -> int:
        self._keep.append(tensor)
        return tensor.data_ptr()

    def _address(self, matrix: native.Matrix) -> int:
        self._keep.append(matrix)
        return ctypes.addressof(matrix)


def _places(model: PreTrainedModel) -> list[tuple[int, torch.dtype]]:
    return [(each.data_ptr(), each.dtype) for each in chain(model.parameters(), model.buffers())]


class _Ropes:
    """Tables of cosines and sines from the model's own rotary module, so that every type of them is honoured.

    Args:
        model: of whose ``rotary_emb`` a copy is used: it changes its state with the lengths it sees.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        module = cast(Any, model.model).rotary_emb
        self._module: Callable[..., tuple[Tensor, Tensor]] = copy.deepcopy(module)
        config = model.config
        by_layer = isinstance(module.rope_type, dict)
        kinds = list(module.rope_type) if by_layer else [None]
        self._tables = [kinds.index(kind) if by_layer else 0 for kind in getattr(config, "layer_types", None) or [None]]
        self._kinds = [{"layer_type": kind} if by_layer else {} for kind in kinds]
        types = list(module.rope_type.values()) if by_layer else [module.rope_type]
        # These choose their frequencies by the longest sequence of a call, longrope between two sets.
        self.dynamic = any("dynamic" in each for each in types)
        self._moving = self.dynamic or "longrope" in types
        self._lock = threading.Lock()
        self._end = 0
        self._made: tuple[ctypes.Array[_Rope], list[Tensor]] | None = None

    def table_of(self, layer: int) -> int:
        """Which table a layer uses."""
        return self._tables[layer] if len(self._kinds) > 1 else 0

    def tables(self, first: int, end: int) -> tuple[ctypes.Array[_Rope], list[Tensor]]:
        """Tables for new tokens at positions [first, end), and the tensors that they point into: another thread may
        have larger ones made meanwhile.
        """
        with self._lock:
            if not self._moving and self._made is not None and end <= self._end:
                return self._made
            if self._moving:
                ids = torch.arange(first, end, device="cpu")
            else:  # for more positions than asked, or every step would make them anew
                ids = torch.arange(max(2 * self._end, end, 256), device="cpu")
                self._end = len(ids)
            made, keep = (_Rope * len(self._kinds))(), []
            for table, kind in zip(made, self._kinds, strict=True):
                cos, sin = (each[0].contiguous() for each in self._module(native.floats(0), ids[None], **kind))
                keep += [cos, sin]
                table.cos, table.sin = cos.data_ptr(), sin.data_ptr()
                table.first, table.end = int(ids[0]), int(ids[-1]) + 1
                table.stride = table.rotary = cos.shape[1]
            self._made = made, keep
            return self._made


def attach(model: PreTrainedModel, activations: str = "a16", threads: int | None = None) -> Decoder:
    """A native decoder for a loaded model.

    Args:
        model: a transformers model on the CPU, its layers packed or not.
        activations: how the inputs of packed matrices are rounded, "a16" or "a8".
        threads: None for ``torch.get_num_threads()`` at the time of a call.

    Raises:
        Unsupported: when the native code does not compute what this model computes, saying why.
        BitternError: when there is no native library.
    """
    native.library()
    config = model.config
    if _CLASSES.get(config.model_type) != type(model).__name__:
        raise Unsupported(f"{type(model).__name__} ({config.model_type}) is not among the decoders known here")
    base = {field.name for field in dataclasses.fields(type(config).__mro__[1])}
    own = {field.name for field in dataclasses.fields(cast(Any, config))} - base
    unknown = own - _KNOWN_KEYS - _HARMLESS_KEYS
    if unknown:
        raise Unsupported(f"config key {min(unknown)} of {config.model_type} is not known here")
    if model.dtype != torch.float32:
        raise Unsupported(f"its arithmetic is {str(model.dtype).removeprefix('torch.')}, not float32")
    if _activation(config) not in _ACTIVATIONS:
        raise Unsupported(f"activation {_activation(config)} is not among {', '.join(_ACTIVATIONS)}")
    if getattr(config, "use_bidirectional_attention", None):
        raise Unsupported("use_bidirectional_attention: attention is not causal")
    if config.model_type == "gemma3_text" and getattr(config, "attn_logit_softcapping", None) is not None:
        raise Unsupported("attn_logit_softcapping: transformers' Gemma 3 ignores it")
    if config.model_type == "smollm3" and not config.use_sliding_window and "sliding_attention" in config.layer_types:
        raise Unsupported("layer_types: transformers' SmolLM3 slides by them, its attention layers do not know")
    if config.model_type == "mistral" and getattr(config, "layer_types", None) is not None:
        raise Unsupported("layer_types: transformers' Mistral ignores them")
    return Decoder(model, activations, threads)


def _activation(config: PreTrainedConfig) -> str:
    return str(getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None))


def _epsilon(norm: nn.Module) -> float:
    return float(cast(float, getattr(norm, "variance_epsilon", None) or getattr(norm, "eps", 0.0)))


def _window(attention: nn.Module, config: PreTrainedConfig) -> int:
    """Keys that a query of this layer sees; 0 for all."""
    found = config.sliding_window if config.model_type == "mistral" else getattr(attention, "sliding_window", None)
    return int(found) if found is not None else 0


def _matrix(name: str, module: nn.Module) -> native.Matrix:
    found = native_matrix(module)
    if found is None:
        raise Unsupported(f"{name}: {type(module).__name__} is not one matrix that the native library reads")
    return found


def _floats(name: str, weight: Tensor) -> Tensor:
    if not weight.is_cpu or not weight.is_contiguous() or weight.dtype not in native.TYPES:
        raise Unsupported(f"{name}: expected contiguous floats on the CPU, found {weight.dtype} on {weight.device}")
    return weight.detach()


def _filled(size: int, unit: int) -> int:
    return -(-size // unit) * unit
