"""Which loaders open a checkpoint, and why not: facts of docs/formats.md as plain rules.

A "yes" says that the loader takes this layout; whether it knows the architecture is its own affair.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bittern.formats.gptq import V1, V2
from bittern.weight import QuantSpec

_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # what vLLM runs as one layer
_GPTQMODEL_GROUPS = (-1, 16, 32, 64, 128, 256, 512, 1024)
_VLLM_GROUPS = (-1, 32, 64, 128)


@dataclass(frozen=True)
class Verdict:
    """Whether one loader opens a checkpoint.

    Attributes:
        consumer: the loader.
        loads: whether it gives the right model.
        reason: why not, or under which conditions.
    """

    consumer: str
    loads: bool
    reason: str


@dataclass(frozen=True)
class GptqLayout:
    """What the rules ask about a GPTQ artifact.

    Attributes:
        packed: packed layer -> its grid.
        plain: matrices inside the decoder blocks that stayed floats.
        shapes: packed layer -> (out_features, in_features).
        checkpoint_format: "gptq" or "gptq_v2".
        desc_act: whether columns are permuted.
        has_g_idx: whether every packed layer stores one.
        dynamic, modules: whether the config has ``dynamic`` and ``modules_in_block_to_quantize``.
        quantizer: who made it, such as ("gptqmodel:7.7.0",).
        model_type: of the config.
        tied: whether the head is the embedding.
        rope_theta: whether config.json has it at its top level.
        experts: whether layers of experts are packed.
    """

    packed: Mapping[str, QuantSpec]
    plain: tuple[str, ...]
    shapes: Mapping[str, tuple[int, int]]
    checkpoint_format: str
    desc_act: bool
    has_g_idx: bool
    dynamic: bool
    modules: bool
    quantizer: tuple[str, ...]
    model_type: str
    tied: bool
    rope_theta: bool
    experts: bool

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


def plain_consumers(stored_as: str) -> list[Verdict]:
    """Who opens a checkpoint that is not quantized: ``stored_as`` is safetensors, bin or gguf."""
    if stored_as == "gguf":
        yes = {
            "llama.cpp": "its own format",
            "transformers": "dequantizes it while loading (needs gguf)",
            "bittern": "as a source: dequantizes it tensor by tensor (needs gguf)",
        }
        return _verdicts(yes, "takes no GGUF")
    yes = {
        "transformers": "a plain checkpoint",
        "bittern": "a plain checkpoint",
        "GPTQModel": "a plain checkpoint, as something to quantize",
        "vLLM": "a plain checkpoint",
        "SGLang": "a plain checkpoint",
    }
    if stored_as == "safetensors":
        yes["exllamav2"] = "a plain checkpoint of an architecture that it has"
    no = {
        "llama.cpp": "needs GGUF: convert_hf_to_gguf.py makes it",
        "auto-gptq": "opens GPTQ artifacts alone",
        "exllamav2": "takes safetensors alone",
    }
    return _verdicts(yes, "", no)


def gptq_consumers(layout: GptqLayout) -> list[Verdict]:
    """Who opens a GPTQ artifact."""
    rules: dict[str, tuple[Callable[[GptqLayout], str | None], str]] = {
        "bittern": (lambda _: None, "any bits, group size and column order"),
        "transformers": (_transformers, "with optimum and gptqmodel installed"),
        "GPTQModel": (_gptqmodel, "GPTQModel.load"),
        "vLLM": (_vllm, "--quantization gptq or its Marlin kernels"),
        "SGLang": (_sglang, "GPTQ of any bits"),
        "exllamav2": (_exllamav2, "4-bit GPTQ"),
        "auto-gptq": (_auto_gptq, "0.7.1, archived, with transformers 4.40"),
        "llama.cpp": (lambda _: "needs GGUF", ""),
    }
    verdicts = []
    for consumer, (rule, condition) in rules.items():
        reason = rule(layout)
        verdicts.append(Verdict(consumer, reason is None, reason or condition))
    return verdicts


def _verdicts(yes: Mapping[str, str], otherwise: str, no: Mapping[str, str] | None = None) -> list[Verdict]:
    order = ("bittern", "transformers", "GPTQModel", "vLLM", "SGLang", "exllamav2", "auto-gptq", "llama.cpp")
    return [Verdict(name, name in yes, yes.get(name) or (no or {}).get(name, otherwise)) for name in order]


def _odd_shape(layout: GptqLayout) -> str | None:
    for name, shape in layout.shapes.items():
        if shape[0] % 32 or shape[1] % 32:
            return f"{name} is {shape[0]} x {shape[1]}: both must be multiples of 32"
    return None


def _few(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _gptqmodel(layout: GptqLayout) -> str | None:
    other = layout.groups - set(_GPTQMODEL_GROUPS)
    if other:
        return f"group_size {min(other)}: it takes {', '.join(map(str, _GPTQMODEL_GROUPS))}"
    if layout.plain and layout.modules and not layout.dynamic:
        return f"{_few(layout.plain)} stay floats, which it reads from `dynamic` alone"
    if layout.mixed and not layout.dynamic:
        return "layers of different grids need `dynamic`"
    if layout.checkpoint_format == V1 and not layout.sym and "gptqmodel" not in " ".join(layout.quantizer):
        return f"takes asymmetric {V1!r} of its own making alone"
    return _odd_shape(layout)


def _transformers(layout: GptqLayout) -> str | None:
    if not layout.has_g_idx:
        return "aborts without g_idx"
    if layout.mixed:
        return "layers of different grids: it fails on `dynamic` that is more than a skip"
    if layout.plain and not layout.modules:
        return f"{_few(layout.plain)} stay floats, which it reads from `modules_in_block_to_quantize` alone"
    if layout.experts:
        return "silently wrong logits from packed experts, which it has fused"
    if layout.model_type == "gpt2":
        return "cannot replace GPT-2's Conv1D"
    if "lm_head" in layout.packed:
        return "never replaces lm_head"
    return _gptqmodel(layout)


def _vllm(layout: GptqLayout) -> str | None:
    if layout.bits - {4, 8}:
        return f"{min(layout.bits - {4, 8})} bits: its GPTQ takes 4 and 8 (others as compressed-tensors)"
    if not layout.sym:
        return "asymmetric: its GPTQ takes symmetric alone (asymmetric as compressed-tensors)"
    if layout.groups - set(_VLLM_GROUPS):
        return f"group_size {min(layout.groups - set(_VLLM_GROUPS))}: it takes {', '.join(map(str, _VLLM_GROUPS))}"
    if layout.desc_act and layout.groups != {-1}:
        return "desc_act with groups"
    return _split_fused(layout)


def _split_fused(layout: GptqLayout) -> str | None:
    """Parts of a layer that vLLM fuses must share a grid."""
    for name in [*layout.packed, *layout.plain]:
        parent, _, leaf = name.rpartition(".")
        for parts in _FUSED:
            if leaf == parts[0] and len({layout.packed.get(f"{parent}.{part}") for part in parts}) > 1:
                return f"{parent}: it fuses {', '.join(parts)}, which have different grids here"
    return None


def _sglang(layout: GptqLayout) -> str | None:
    if layout.experts:
        return "takes no experts through GPTQ"
    for name, spec in layout.packed.items():
        if layout.shapes[name][1] % spec.columns_per_group(layout.shapes[name][1]):
            return f"{name}: group_size {spec.group_size} does not divide {layout.shapes[name][1]}"
    return None


def _exllamav2(layout: GptqLayout) -> str | None:
    if layout.bits != {4}:
        return f"{min(layout.bits - {4})} bits: it takes 4"
    if layout.checkpoint_format == V1 and not layout.sym:
        return f"asymmetric zeros in {V1!r} borrow across fields"
    return None


def _auto_gptq(layout: GptqLayout) -> str | None:
    if layout.checkpoint_format == V2:
        return f"takes {V1!r} alone, this is {V2!r}"
    if layout.mixed or layout.plain:
        return "one grid for every layer of the blocks, none left out"
    if 8 in layout.bits:
        return "its 8-bit CUDA kernels mask zeros to 4 bits"
    if layout.tied:
        return "loads tied embeddings as zeros"
    if not layout.rope_theta:
        return "needs rope_theta at the top level of config.json"
    return None
