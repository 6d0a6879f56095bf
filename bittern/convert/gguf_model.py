"""A model's configuration and tensor names in llama.cpp's terms.

Names come from the gguf package. What llama.cpp has built in, and no file can say, is checked here: a model that
differs from it is refused. Facts as in llama.cpp's convert_hf_to_gguf.py and src/models.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from bittern.artifact import without_quantization
from bittern.errors import BitternError
from bittern.formats.gguf import ARCHITECTURES, refuse_model
from bittern.formats.gguf_rope import llama3_factors, yarn_attention, yarn_default

if TYPE_CHECKING:
    from gguf import GGUFWriter, TensorNameMap

_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class GgufModel:
    """A model as llama.cpp sees it.

    Attributes:
        architecture: llama.cpp's name.
        config: transformers' configuration.
        notes: what is not quite the same in llama.cpp.
    """

    architecture: str
    config: Any
    notes: list[str] = field(default_factory=list)

    @property
    def head_dim(self) -> int:
        return int(getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads)

    @property
    def kv_heads(self) -> int:
        return int(getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads)

    @property
    def rope(self) -> dict[str, Any]:
        """The rotary embedding of full attention."""
        found: dict[str, Any] = self.config.rope_parameters
        return dict(found.get("full_attention", found))

    def names(self) -> TensorNameMap:
        """From checkpoint names to the file's."""
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        architecture = next(key for key, name in MODEL_ARCH_NAMES.items() if name == self.architecture)
        return get_tensor_name_map(architecture, self.config.num_hidden_layers)

    def heads_to_turn(self, name: str) -> int | None:
        """Heads of a tensor of the file whose rows llama.cpp has in another order than transformers.

        transformers turns row i of a head together with row i + head_dim / 2, llama.cpp's "llama" row 2 i with
        row 2 i + 1.
        """
        if self.architecture == "llama" and ".attn_q." in name:
            return int(self.config.num_attention_heads)
        if self.architecture == "llama" and ".attn_k." in name:
            return self.kv_heads
        return None

    def added(self, name: str) -> float:
        """What llama.cpp expects to be added to a tensor: Gemma multiplies with 1 + weight, llama.cpp with weight."""
        return 1.0 if self.architecture == "gemma3" and name.endswith("norm.weight") else 0.0

    def rope_factors(self) -> Tensor | None:
        """What each frequency is divided by, fp32 (head_dim / 2,), where Llama 3.1's scaling is used."""
        return llama3_factors(self.rope, self.head_dim) if self.rope["rope_type"] == "llama3" else None

    def write(self, writer: GGUFWriter) -> None:
        """Add all but names, tokenizer and tensors to a file's metadata."""
        config = self.config
        writer.add_context_length(self._context())
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(self.kv_heads)
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(self.head_dim)
        self._write_rope(writer)
        if self.architecture == "gemma3":
            writer.add_sliding_window(config.sliding_window)
        experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
        if experts:
            writer.add_expert_count(experts)
            writer.add_expert_used_count(config.num_experts_per_tok)
        if self.architecture == "qwen3moe":
            writer.add_expert_feed_forward_length(config.moe_intermediate_size)

    def _context(self) -> int:
        context = int(self.config.max_position_embeddings)
        window = getattr(self.config, "sliding_window", None)
        if self.architecture == "gemma3" or window is None or window >= context:
            return context
        if "sliding_attention" in (getattr(self.config, "layer_types", None) or ["sliding_attention"]):
            return int(window)  # llama.cpp has no window here, and within it none is needed
        return context

    def _write_rope(self, writer: GGUFWriter) -> None:
        from gguf import RopeScalingType

        rope = self.rope
        writer.add_rope_freq_base(float(rope["rope_theta"]))
        if rope["rope_type"] == "linear":
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(float(rope["factor"]))
        if rope["rope_type"] == "yarn":
            factor = float(rope["factor"])
            context = rope.get("original_max_position_embeddings") or self.config.max_position_embeddings
            writer.add_rope_scaling_type(RopeScalingType.YARN)
            writer.add_rope_scaling_factor(factor)
            writer.add_rope_scaling_orig_ctx_len(int(context))
            writer.add_rope_scaling_yarn_beta_fast(float(rope.get("beta_fast") or 32))
            writer.add_rope_scaling_yarn_beta_slow(float(rope.get("beta_slow") or 1))
            more = yarn_attention(rope) / yarn_default(factor)  # llama.cpp multiplies it with its own
            if more != 1:
                writer.add_rope_scaling_attn_factors(more)


def read_model(config: dict[str, Any]) -> GgufModel:
    """Understand a config.json.

    Raises:
        BitternError: naming the key, for a model that llama.cpp does not have or has otherwise.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = str(config.get("model_type"))
    reason = refuse_model(kind)
    if reason is not None:
        raise BitternError(reason)
    model = GgufModel(ARCHITECTURES[kind], CONFIG_MAPPING[kind].from_dict(without_quantization(config)))
    _check(model)
    context, stated = model._context(), model.config.max_position_embeddings
    if context != stated:
        model.notes.append(
            f"context_length is {context} in place of {stated}: llama.cpp has no sliding window for this architecture"
        )
    return model


def merged_name(name: str) -> str:
    """The name under which a file keeps an expert's matrix together with those of the others."""
    return _EXPERT.sub(".experts.", name)


def _check(model: GgufModel) -> None:
    """Refuse what llama.cpp's own code for the architecture would compute otherwise."""
    config, architecture = model.config, model.architecture
    gemma = architecture == "gemma3"
    expected: dict[str, Any] = {
        "hidden_activation" if gemma else "hidden_act": "gelu_pytorch_tanh" if gemma else "silu"
    }
    if architecture != "llama":
        expected |= {"mlp_bias": False}
    if architecture not in ("llama", "qwen2"):
        expected |= {"attention_bias": False}
    if architecture == "qwen3moe":
        expected |= {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
    if gemma:
        layers = config.num_hidden_layers
        scalar = config.hidden_size // config.num_attention_heads if layers == 62 else model.head_dim
        types = ["full_attention" if (number + 1) % 6 == 0 else "sliding_attention" for number in range(layers)]
        expected |= {
            "query_pre_attn_scalar": scalar,
            "layer_types": types,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "use_bidirectional_attention": False,
        }
        local = config.rope_parameters["sliding_attention"]
        found = (local["rope_type"], local["rope_theta"])
        if found != ("default", 10000.0):
            raise BitternError(
                f"rope_parameters: llama.cpp's gemma3 has local frequencies of base 10000, found {found}"
            )
    for key, value in expected.items():
        found = getattr(config, key, value)
        if found != value:
            raise BitternError(f"{key}: llama.cpp's {architecture} has {value}, found {found}")
    kind, known = (
        model.rope["rope_type"],
        ["default", "linear", "yarn", *(["llama3"] if architecture == "llama" else [])],
    )
    if kind not in known or (gemma and kind == "yarn"):
        raise BitternError(f"rope_type: expected one of {', '.join(known)} for {architecture}, found {kind}")
    if kind == "yarn" and model.rope.get("truncate") is False:
        raise BitternError("rope_parameters: llama.cpp's YaRN rounds its range of dimensions, found truncate false")
    if model.rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise BitternError(f"partial_rotary_factor: expected 1, found {model.rope['partial_rotary_factor']}")
