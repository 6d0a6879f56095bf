"""Which loaders open a checkpoint, and why not: facts of docs/formats.md as plain rules.

A "yes" says that the loader takes this layout; whether it knows the architecture is its own affair. The rules
were read from the sources of transformers 5.23 (with compressed-tensors 0.20), GPTQModel 7.7, vLLM 0.33, SGLang
0.5.23 and mlx-lm 0.32, and from runs of those that need no GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from bittern.errors import BitternError
from bittern.formats import awq, compressed_tensors, gguf, mlx
from bittern.formats.gptq import V1, V2
from bittern.layout import EXPERTS, Layout
from bittern.weight import QuantSpec

TARGETS = {
    "transformers": (V1, V2, "compressed-tensors"),
    "vllm": (V1, "compressed-tensors"),
    "sglang": (V1, "compressed-tensors"),
    "gptqmodel": (V1, V2),
    "llama.cpp": ("gguf",),
    "mlx": ("mlx",),
}
"""What ``--target`` takes -> the formats that it is given, the preferred one first."""

_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # what vLLM and SGLang run as one layer
_MARLIN_GROUPS = (-1, 32, 64, 128)
_HUMMING_GROUPS = (-1, 16, 32, 64, 128, 256, 512, 1024)
_GPTQMODEL_GROUPS = (-1, 16, 32, 64, 128, 256, 512, 1024)
_GPTQMODEL_AWQ_GROUPS = (-1, 16, 32, 64, 128)
_MLX_AWQ_GROUPS = (32, 64, 128)
# Where transformers wants scales of activations beside AWQ's layers (AWQ_SCALES_MAPPINGS), which bittern neither reads
# nor writes: without them it divides by uninitialised memory.
_SCALED_ACTIVATIONS = ("starcoder2", "RefinedWebModel", "falcon", "mpt", "gptj", "gpt_neox", "gpt_bigcode", "bloom")
_NAMES = {
    "compressed-tensors": "compressed-tensors",
    "awq": "AWQ",
    "mlx": "MLX",
    "gguf": "GGUF",
    V1: "GPTQ",
    V2: "GPTQ",
}
_PLAIN = "a plain checkpoint"
_NO_SAFETENSORS = "takes safetensors alone"
_NO_OLD_ROPE = (
    "reads RoPE's base and scaling at the top level of config.json, where they are not; bittern puts them there"
)
_MARLIN = "by its Marlin kernels"


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


def verdicts(layout: Layout) -> list[Verdict]:
    """Who opens a checkpoint."""
    return [Verdict(consumer, *_judge(consumer, layout)) for consumer in _RULES]


def choose_format(target: str, layout: Layout, *, allow_inexact: bool = False) -> str:
    """The format for ``--target``: the first in its order of preference that it loads and that loses nothing.

    Args:
        target: one of :data:`TARGETS`.
        layout: of the source or the plan; its format does not matter. Without packed layers the choice is
            "safetensors", or "gguf" for llama.cpp.
        allow_inexact: leave it to GGUF and MLX to round what they do not hold exactly.

    Raises:
        BitternError: when none does, with the reason for each and the targets that take it.
    """
    formats = _formats(target)
    if not layout.packed:
        return "gguf" if target == "llama.cpp" else "safetensors"
    reasons = {name: _refusal(target, layout, name, allow_inexact) for name in formats}
    for name, reason in reasons.items():
        if reason is None:
            return name
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    others = [other for other in TARGETS if any(_refusal(other, layout, name) is None for name in TARGETS[other])]
    taken = f"these targets take it: {', '.join(others)}" if others else "no other target takes it"
    raise BitternError(f"--target {target}: {listed}; {taken}")


def check_target(target: str, layout: Layout) -> None:
    """Refuse to write the format that a layout names when the target does not load it from there.

    Args:
        target: one of :data:`TARGETS`.
        layout: of the source or the plan, with the format to write; "safetensors" are floats.

    Raises:
        BitternError: with the reason and, when there is one, the format that the target takes.
    """
    _formats(target)
    name = layout.format or "safetensors"
    loads, reason = _judge(_CONSUMERS[target], _written(target, layout, name))
    if loads:
        return
    other = next((other for other in TARGETS[target] if _refusal(target, layout, other) is None), None)
    hint = f"; {other} would do" if layout.packed and other is not None else ""
    raise BitternError(f"--target {target}: {name}: {reason}{hint}")


def asks_dequantize(target: str | None, layout: Layout) -> bool:
    """Whether a compressed-tensors config for this target needs ``dequantize: true``.

    transformers needs it for asymmetric grids; others do not look at it.
    """
    return target == "transformers" and not layout.sym


def cannot_hold(name: str, layout: Layout) -> str | None:
    """Why a format cannot hold a layout without loss, None when it can; of GGUF also by the model and its shapes."""
    if name == "gguf" and (reason := gguf.refuse_model(layout.model_type)) is not None:
        return reason
    if name == V1 and not layout.sym:
        return f"asymmetric: {V1!r} has no zero of 0 that all its readers agree on"
    if name in (V1, V2):
        return None
    if layout.act_order:
        return "columns in act-order, which GPTQ alone stores"
    if name == "awq" and layout.mixed:
        return "layers of different grids: AWQ has one"
    refuse: dict[str, Callable[[QuantSpec], str | None]] = {
        "compressed-tensors": compressed_tensors.refuse,
        "awq": awq.refuse,
        "mlx": lambda spec: mlx.refuse(spec, mlx.exact_dtype(spec.sym)),
        "gguf": gguf.refuse,
    }
    reasons = [*map(refuse[name], set(layout.packed.values()))]
    if name == "gguf":
        reasons += [gguf.refuse_columns(layout.shapes[layer][1]) for layer in layout.packed if layer in layout.shapes]
    return next((reason for reason in reasons if reason is not None), None)


def _formats(target: str) -> tuple[str, ...]:
    if target not in TARGETS:
        raise BitternError(f"--target: expected one of {', '.join(TARGETS)}, found {target!r}")
    return TARGETS[target]


def _refusal(target: str, layout: Layout, name: str, allow_inexact: bool = False) -> str | None:
    """Why a target cannot have a layout in a format, None when it can."""
    rounds = allow_inexact and name in ("gguf", "mlx") and not layout.act_order
    reason = None if rounds else cannot_hold(name, layout)
    if reason is not None:
        return reason
    loads, reason = _judge(_CONSUMERS[target], _written(target, layout, name))
    return None if loads else reason


def _written(target: str, layout: Layout, name: str) -> Layout:
    """The layout as bittern writes it in a format."""
    if name == "safetensors":
        return replace(layout, format=None, packed={}, plain=(), shapes={}, desc_act=False, safetensors=True)
    told = layout.mixed or bool(layout.plain)
    return replace(
        layout,
        format=name,
        has_g_idx=True,
        dynamic=told,  # formats.gptq.config writes both keys when layers differ
        modules=told,
        dequantize=asks_dequantize(target, layout),
        old_key=False,
        quantizer=("bittern",),
    )


def _judge(consumer: str, layout: Layout) -> tuple[bool, str]:
    """What the consumer's rule says, unless layers have names that no other loader knows."""
    if layout.own_names and layout.format not in (None, "gguf") and consumer not in ("bittern", "llama.cpp"):
        return (
            False,
            f"{layout.own_names}: experts of one tensor, which are packed one by one under names of bittern's own",
        )
    return _RULES[consumer](layout)


# The rules: one function for each loader, which says whether it opens a layout, and why not or on what condition.


def _bittern(layout: Layout) -> tuple[bool, str]:
    if layout.format == "gguf":
        return True, "Q4_0, Q8_0 and what bittern wrote stay packed, other types become floats (needs gguf)"
    return True, _PLAIN if layout.format is None else "any bits, group size and column order"


def _transformers(layout: Layout) -> tuple[bool, str]:
    if layout.format is None:
        return True, _PLAIN
    if layout.format == "gguf":
        lost = f"its GGUF reader takes no {layout.lost_in_gguf} of this architecture"
        return _answer(
            lost if layout.lost_in_gguf else None, "dequantizes it while loading (needs gguf and accelerate)"
        )
    if layout.format == "mlx":
        return False, "MLX: its config names no method that it knows"
    if layout.model_type == "gpt2":
        return False, "cannot replace GPT-2's Conv1D"
    if layout.format == "compressed-tensors":
        return _answer(_transformers_compressed(layout), "with compressed-tensors 0.18 or newer installed")
    if layout.experts:
        return False, "silently wrong logits from packed experts, which it has fused"
    if "lm_head" in layout.packed:
        return False, "never replaces lm_head"
    if layout.format == "awq":
        return _answer(_transformers_awq(layout) or _gptqmodel_awq(layout), "with gptqmodel installed")
    return _answer(_transformers_gptq(layout) or _gptqmodel_gptq(layout), "with optimum and gptqmodel installed")


def _transformers_awq(layout: Layout) -> str | None:
    if layout.model_type in _SCALED_ACTIVATIONS:
        return f"silently wrong logits from AWQ of {layout.model_type}: it wants scales of activations too"
    if -1 in layout.groups:
        return "silently wrong logits from AWQ with group_size -1"
    return None


def _transformers_gptq(layout: Layout) -> str | None:
    if not layout.has_g_idx:
        return "aborts without g_idx"
    if layout.mixed:
        return "layers of different grids: it fails on `dynamic` that is more than a skip"
    if layout.plain and not layout.modules:
        return f"{_few(layout.plain)} stay floats, which it reads from `modules_in_block_to_quantize` alone"
    return None


def _transformers_compressed(layout: Layout) -> str | None:
    if layout.desc_act:
        return "`actorder` that groups columns, which compressed-tensors no longer takes"
    if layout.old_key:
        return "reads `quantization_config` alone, and this one stands under `compression_config`"
    if not layout.sym and layout.experts:
        return "asymmetric experts: it finds no zeros for them"
    if len({spec for name, spec in layout.packed.items() if EXPERTS.search(name)}) > 1:
        return "experts of different grids: it has one for all of them"
    if not layout.sym and not layout.dequantize:
        return "asymmetric: it needs `dequantize: true` in quantization_config"
    if layout.dequantize and layout.mixed:
        return "layers of different grids: silently wrong logits from `dequantize`"
    return None


def _gptqmodel(layout: Layout) -> tuple[bool, str]:
    if layout.format is None:
        return True, "a plain checkpoint, as something to quantize"
    if layout.format in (V1, V2):
        return _answer(_gptqmodel_gptq(layout), "GPTQModel.load")
    if layout.format != "awq":
        return False, f"takes GPTQ and AWQ, this is {_NAMES[layout.format]}"
    skips = None
    if layout.plain and not layout.dynamic:
        skips = f"{_few(layout.plain)} stay floats: silently wrong logits, for it reads that from `dynamic` alone"
    return _answer(_gptqmodel_awq(layout) or skips, "GPTQModel.load")


def _gptqmodel_gptq(layout: Layout) -> str | None:
    if layout.groups - set(_GPTQMODEL_GROUPS):
        return _wrong_group(layout, _GPTQMODEL_GROUPS)
    if layout.plain and layout.modules and not layout.dynamic:
        return f"{_few(layout.plain)} stay floats, which it reads from `dynamic` alone"
    if layout.mixed and not layout.dynamic:
        return "layers of different grids need `dynamic`"
    if layout.format == V1 and not layout.sym and "gptqmodel" not in " ".join(layout.quantizer):
        return f"takes asymmetric {V1!r} of its own making alone"
    for name, shape in layout.shapes.items():
        if shape[0] % 32 or shape[1] % 32:
            return f"{name} is {shape[0]} x {shape[1]}: both must be multiples of 32"
    return None


def _gptqmodel_awq(layout: Layout) -> str | None:
    return _wrong_bits(layout, (4,), "its AWQ") or _wrong_group(layout, _GPTQMODEL_AWQ_GROUPS)


def _vllm(layout: Layout) -> tuple[bool, str]:
    if layout.format == "gguf":
        return True, "with vllm-gguf-plugin installed"
    if layout.act_order:
        return False, "columns in act-order, which it no longer takes"
    if layout.format == "compressed-tensors":
        marlin = layout.bits <= {4, 8} and layout.groups <= set(_MARLIN_GROUPS) and (layout.sym or layout.bits == {4})
        condition = _MARLIN if marlin else "on CUDA, by its Humming kernels"
        head = "its Humming kernels take no packed lm_head" if "lm_head" in layout.packed and not marlin else None
        return _answer(_wrong_group(layout, _HUMMING_GROUPS) or head or _split_fused(layout), condition)
    return _served(layout)


def _sglang(layout: Layout) -> tuple[bool, str]:
    if layout.format == "gguf":
        return True, "of the architectures that it reads from GGUF"
    if layout.format == "compressed-tensors":
        refusal = _wrong_bits(layout, (4, 8), "its compressed-tensors")
        if not layout.sym:
            refusal = refusal or _wrong_bits(layout, (4,), "its asymmetric compressed-tensors")
        if "lm_head" in layout.packed:
            refusal = refusal or "silently wrong logits from a packed lm_head, which it leaves empty"
        return _answer(refusal or _wrong_group(layout, _MARLIN_GROUPS) or _split_fused(layout), _MARLIN)
    if layout.format in (V1, V2) and ((layout.experts and layout.mixed) or any(map(EXPERTS.search, layout.plain))):
        return False, "experts of another grid than the other layers, or none: it reads that from no `dynamic`"
    return _served(layout)


def _served(layout: Layout) -> tuple[bool, str]:
    """GPTQ and AWQ in vLLM and SGLang, which both have Marlin kernels alone for them."""
    if layout.format is None:
        return True, _PLAIN
    if layout.format == "mlx":
        return False, "takes no MLX"
    if layout.format == "awq":
        refusal = _wrong_bits(layout, (4,), "its AWQ")
    else:
        refusal = _wrong_bits(layout, (4, 8), "its GPTQ")
        if not layout.sym:
            refusal = refusal or "asymmetric: its GPTQ takes symmetric alone"
        if layout.mixed and not layout.dynamic:
            refusal = refusal or "layers of different grids need `dynamic`"
    return _answer(refusal or _wrong_group(layout, _MARLIN_GROUPS) or _split_fused(layout), _MARLIN)


def _split_fused(layout: Layout) -> str | None:
    """What they run as one layer must share a grid, or be left out together."""
    grids: dict[tuple[str, str], set[QuantSpec | None]] = {}
    for name in [*layout.packed, *layout.plain]:
        parent, _, leaf = name.rpartition(".")
        whole = [(parent, ", ".join(parts)) for parts in _FUSED if leaf in parts]
        experts = EXPERTS.search(name)
        if experts:
            whole = [(name[: experts.end()].rstrip("."), "all experts")]
        for key in whole:
            grids.setdefault(key, set()).add(layout.packed.get(name))
    for (parent, parts), found in grids.items():
        if len(found) > 1:
            return f"{parent}: it fuses {parts}, which have different grids here"
    return None


def _exllamav2(layout: Layout) -> tuple[bool, str]:
    if layout.format is not None and layout.format not in (V1, V2):
        return False, f"takes GPTQ, this is {_NAMES[layout.format]}"
    if not layout.old_rope:
        return False, _NO_OLD_ROPE
    if layout.format is None:
        return layout.safetensors, f"{_PLAIN} of an architecture that it has" if layout.safetensors else _NO_SAFETENSORS
    if not layout.sym:
        return False, "asymmetric: silently wrong weights in groups whose zero is 0, and in their neighbours"
    return _answer(_wrong_bits(layout, (4,), "it"), "4-bit GPTQ")


def _auto_gptq(layout: Layout) -> tuple[bool, str]:
    refusal = None
    if layout.format is None:
        refusal = "opens GPTQ artifacts alone"
    elif layout.format != V1:
        refusal = f"takes {V1!r} alone, this is {layout.format!r}"
    elif layout.mixed or layout.plain:
        refusal = "one grid for every layer of the blocks, none left out"
    elif "lm_head" in layout.packed:
        refusal = "never replaces lm_head"
    elif 8 in layout.bits:
        refusal = "its 8-bit CUDA kernels mask zeros to 4 bits"
    elif layout.tied:
        refusal = "loads tied embeddings as zeros"
    elif not layout.old_rope:
        refusal = _NO_OLD_ROPE
    return _answer(refusal, "0.7.1, archived, with transformers 4.40")


def _llama_cpp(layout: Layout) -> tuple[bool, str]:
    if layout.format == "gguf":
        return True, "of an architecture that it has"
    return False, f"needs GGUF: {cannot_hold('gguf', layout) or 'bittern convert --format gguf makes it'}"


def _mlx(layout: Layout) -> tuple[bool, str]:
    if layout.format not in (None, "mlx", "awq"):
        found = "no g_idx" if layout.format in (V1, V2) and layout.has_g_idx else f"no {_NAMES[layout.format]}"
        return False, f"takes {found}"
    if not layout.old_rope:
        return False, _NO_OLD_ROPE
    if layout.format is None:
        return layout.safetensors, f"{_PLAIN} of an architecture that it has" if layout.safetensors else _NO_SAFETENSORS
    if layout.format == "mlx":
        refusal = None
        if layout.model_type == "gpt2":
            refusal = "mlx-lm takes no packed layers of GPT-2"
        elif layout.experts and layout.model_type == "qwen3_moe":
            refusal = "mlx-lm takes no packed experts of Qwen3-MoE"
        return _answer(refusal, "mlx-lm, of an architecture that it has")
    if layout.experts:
        return False, "takes no experts through AWQ"
    return _answer(_wrong_bits(layout, (4,), "its AWQ") or _wrong_group(layout, _MLX_AWQ_GROUPS), "mlx-lm repacks it")


_RULES: dict[str, Callable[[Layout], tuple[bool, str]]] = {
    "bittern": _bittern,
    "transformers": _transformers,
    "GPTQModel": _gptqmodel,
    "vLLM": _vllm,
    "SGLang": _sglang,
    "exllamav2": _exllamav2,
    "auto-gptq": _auto_gptq,
    "llama.cpp": _llama_cpp,
    "mlx": _mlx,
}
_CONSUMERS = {name.lower(): name for name in _RULES if name.lower() in TARGETS}


def _answer(refusal: str | None, condition: str) -> tuple[bool, str]:
    return refusal is None, refusal or condition


def _wrong_bits(layout: Layout, taken: tuple[int, ...], what: str) -> str | None:
    other = layout.bits - set(taken)
    return f"{min(other)} bits: {what} takes {' and '.join(map(str, taken))}" if other else None


def _wrong_group(layout: Layout, taken: tuple[int, ...]) -> str | None:
    other = layout.groups - set(taken)
    return f"group_size {min(other)}: it takes {', '.join(map(str, taken))}" if other else None


def _few(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
