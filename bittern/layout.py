"""What loaders ask about a checkpoint: its format, its grids, and what its config says."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bittern.rope import says_old_rope, with_old_rope
from bittern.ties import ties_embeddings
from bittern.weight import QuantSpec

if TYPE_CHECKING:
    from bittern.artifact import Artifact

EXPERTS = re.compile(r"(^|\.)experts($|\.)|block_sparse_moe\.(in|out)put_linear$")
"""Found in the names of layers that are experts."""

ROUTER = re.compile(r"(^|\.)(gate|router)(\.|$)")
"""Found in the names of what chooses experts."""

_UNREAD = {
    "gemma2": ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
    "gemma3_text": ("query_pre_attn_scalar",),
    "gpt2": ("n_positions",),
    "nemotron": ("partial_rotary_factor",),
    "phi3": ("sliding_window", "partial_rotary_factor"),
    "qwen3": ("head_dim",),
    "qwen3_moe": ("moe_intermediate_size",),
    "stablelm": ("rope_theta", "partial_rotary_factor"),
    "starcoder2": ("sliding_window", "rope_theta"),
}
"""model_type -> what transformers' reader of GGUF files leaves at its default."""

_NEVER_READ = {"mixtral": "experts", "qwen2_moe": "gate of shared experts"}  # the gate as converters write it now
"""model_type -> what that reader gets wrong in any such file."""

_IN_A_BLOCK = re.compile(r"\.\d+\..*\.weight$")
_ONE_OF_A_TENSOR = re.compile(r"\.\d+$")  # what bittern.model names it
# norms and embeddings, and routers of experts: nobody packs those
_NEVER_PACKED = re.compile(rf"{ROUTER.pattern}|conv1d$|norm|embed")


@dataclass(frozen=True)
class Layout:
    """What the rules ask about a checkpoint, whichever format it is in.

    Attributes:
        format: "gptq", "gptq_v2", "compressed-tensors", "awq", "mlx", "gguf"; None for one without packed
            layers in safetensors or PyTorch's own files, and for one whose format is still to be chosen.
        packed: packed layer -> its grid.
        plain: matrices inside the decoder blocks that stayed floats.
        shapes: packed layer -> (out_features, in_features).
        desc_act: whether columns are permuted.
        has_g_idx: GPTQ: whether every packed layer stores one.
        dynamic, modules: GPTQ: whether the config has ``dynamic`` and ``modules_in_block_to_quantize``.
        dequantize: compressed-tensors: whether its config asks transformers to dequantize while it loads.
        old_key: compressed-tensors: whether its config stands under ``compression_config``, as the first ones did.
        quantizer: who made it, such as ("gptqmodel:7.7.0",).
        model_type: of the config.
        tied: whether the head is the embedding.
        old_rope: whether config.json says of RoPE what :func:`bittern.rope.with_old_rope` has it say.
        lost_in_gguf: what transformers' reader of GGUF files leaves out of such a model without a word; "" for nothing.
        safetensors: whether its files are safetensors.
    """

    format: str | None
    packed: Mapping[str, QuantSpec] = field(default_factory=dict)
    plain: tuple[str, ...] = ()
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    desc_act: bool = False
    has_g_idx: bool = True
    dynamic: bool = False
    modules: bool = False
    dequantize: bool = False
    old_key: bool = False
    quantizer: tuple[str, ...] = ()
    model_type: str = "llama"
    tied: bool = False
    old_rope: bool = True
    lost_in_gguf: str = ""
    safetensors: bool = True

    @property
    def bits(self) -> set[int]:
        return {spec.bits for spec in self.packed.values()}

    @property
    def groups(self) -> set[int]:
        return {spec.group_size for spec in self.packed.values()}

    @property
    def sym(self) -> bool:
        return all(spec.sym for spec in self.packed.values())

    @property
    def mixed(self) -> bool:
        return len(set(self.packed.values())) > 1

    @property
    def act_order(self) -> bool:
        """Whether columns of one group lie apart; a group of the whole row has no order."""
        return self.desc_act and self.groups != {-1}

    @property
    def own_names(self) -> str | None:
        """An expert that is packed under a name of bittern's own: its checkpoint keeps all of them in one tensor."""
        return next((name for name in self.packed if _ONE_OF_A_TENSOR.search(name)), None)

    @property
    def experts(self) -> bool:
        """Whether layers of experts are packed."""
        return any(EXPERTS.search(name) for name in self.packed)


def layout_of(artifact: Artifact) -> Layout:
    """The layout of a checkpoint that exists."""
    tensors, config, found = artifact.checkpoint.tensors, artifact.checkpoint.config, artifact.found
    scheme = artifact.scheme
    matrices = [
        name
        for name, info in artifact.plain.items()
        if (len(info.shape) >= 2 and _IN_A_BLOCK.search(name)) or (len(info.shape) >= 3 and EXPERTS.search(name))
    ]
    return Layout(
        format=artifact.format,
        packed={name: layer.spec for name, layer in artifact.layers.items()},
        plain=_left_out(name.removesuffix(".weight") for name in matrices) if artifact.layers else (),
        shapes={name: (layer.out_features, layer.in_features) for name, layer in artifact.layers.items()},
        desc_act=scheme is not None and scheme.any_desc_act,
        has_g_idx=all(f"{name}.g_idx" in tensors for name in artifact.layers),
        dynamic=bool(found.get("dynamic")),
        modules=bool(found.get("modules_in_block_to_quantize")),
        dequantize=bool(found.get("dequantize")),
        old_key=bool(found) and found is config.get("compression_config"),
        quantizer=() if scheme is None else scheme.quantizer,
        tied=not any(name.startswith("lm_head.") for name in tensors) and ties_embeddings(config),
        safetensors=artifact.checkpoint.gguf is None and any(artifact.checkpoint.folder.glob("*.safetensors")),
        **_of_the_model(config),
    )


def planned_layout(
    config: Mapping[str, Any],
    layers: Mapping[str, QuantSpec | None],
    shapes: Mapping[str, tuple[int, int]],
    tied: bool,
) -> Layout:
    """The layout of what is about to be written, its format left open.

    Args:
        config: the parsed config.json.
        layers: every matrix by its checkpoint name, with its grid, or None for one that stays floats.
        shapes: (out_features, in_features) of the layers that are packed, at least.
        tied: whether the head is the embedding.
    """
    packed = {name: spec for name, spec in layers.items() if spec is not None}
    plain = _left_out(name for name, spec in layers.items() if spec is None)
    told = bool(plain) or len(set(packed.values())) > 1
    return Layout(
        format=None,
        packed=packed,
        plain=plain,
        shapes={name: shapes[name] for name in packed},
        dynamic=told,  # formats.gptq.config writes both keys whenever layers differ
        modules=told,
        tied=tied,
        **_of_the_model(with_old_rope(config)),
    )


def _left_out(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(name for name in names if not _NEVER_PACKED.search(name))


def _of_the_model(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model_type": str(config.get("model_type")),
        "old_rope": says_old_rope(config),
        "lost_in_gguf": _lost_in_gguf(config),
    }


def _lost_in_gguf(config: Mapping[str, Any]) -> str:
    """As of transformers 5.23."""
    kind, rope = str(config.get("model_type")), config.get("rope_parameters")
    rope = rope if isinstance(rope, dict) else {}
    full = rope.get("full_attention", rope)
    heads, size, dim = (config.get(key) for key in ("num_attention_heads", "hidden_size", "head_dim"))
    if (isinstance(full, dict) and full.get("rope_type", "default") != "default") or config.get("rope_scaling"):
        return "scaled RoPE"
    if kind == "llama" and (config.get("attention_bias") or config.get("mlp_bias")):
        return "biases"
    if kind == "qwen2" and isinstance(dim, int) and isinstance(heads, int) and dim * heads != size:
        return "head_dim"
    if kind in _NEVER_READ:
        return _NEVER_READ[kind]
    if kind in _UNREAD:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        usual = CONFIG_MAPPING[kind]().to_dict()
        usual, stated = usual | (usual.get("rope_parameters") or {}), {**config, **rope}
        return next((key for key in _UNREAD[kind] if stated.get(key, usual.get(key)) != usual.get(key)), "")
    return ""
