"""Which loader opens which layout, and the format that a target gets."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bittern.consumers import TARGETS, asks_dequantize, cannot_hold, check_target, choose_format, verdicts
from bittern.errors import BitternError
from bittern.layout import Layout, planned_layout
from bittern.rope import says_old_rope, with_old_rope
from bittern.weight import QuantSpec

PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")
NAMES = [f"model.layers.0.{part}" for part in PARTS]
DOWN = "model.layers.0.mlp.down_proj"
SHAPES = dict.fromkeys(NAMES, (256, 256))
EXPERTS = [f"model.layers.0.block_sparse_moe.experts.{expert}.{part}" for expert in (0, 1) for part in ("w1", "w2")]
FOUR = QuantSpec(4, 128)
README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
CONSUMERS = {"bittern", "transformers", "GPTQModel", "vLLM", "SGLang", "exllamav2", "auto-gptq", "llama.cpp", "mlx"}
GPTQ_LOADERS = CONSUMERS - {"llama.cpp", "mlx"}


def layout(format: str | None, spec: QuantSpec = FOUR, **changes: Any) -> Layout:
    return Layout(**{"format": format, "packed": dict.fromkeys(NAMES, spec), "shapes": SHAPES, **changes})


def grids(**other: QuantSpec) -> dict[str, QuantSpec]:
    """The layers of a block, some with a grid of their own by the last part of their name."""
    return {name: other.get(name.rpartition(".")[2], FOUR) for name in NAMES}


def experts(spec: QuantSpec = FOUR) -> dict[str, Any]:
    names = [*NAMES[:4], *EXPERTS]
    return {"packed": dict.fromkeys(names, spec), "shapes": dict.fromkeys(names, (256, 256))}


def fused_experts() -> dict[str, Any]:
    """Of a checkpoint that keeps all experts of a block in one tensor."""
    names = [*NAMES[:4], *(f"model.layers.0.mlp.experts.gate_up_proj.{expert}" for expert in (0, 1))]
    return {"packed": dict.fromkeys(names, FOUR), "shapes": dict.fromkeys(names, (256, 256))}


def found(made: Layout) -> dict[str, tuple[bool, str]]:
    return {verdict.consumer: (verdict.loads, verdict.reason) for verdict in verdicts(made)}


def loading(made: Layout) -> set[str]:
    return {consumer for consumer, (loads, _) in found(made).items() if loads}


ASYM = QuantSpec(4, 128, False)
LEFT_OUT: dict[str, Any] = {"plain": (DOWN,)}
BOTH_KEYS: dict[str, Any] = {"dynamic": True, "modules": True}


@pytest.mark.parametrize(
    ("made", "refusing"),
    [
        (layout("gptq"), set()),
        (layout("gptq", QuantSpec(3, 128)), {"vLLM", "SGLang", "exllamav2"}),
        (layout("gptq", QuantSpec(2, -1)), {"vLLM", "SGLang", "exllamav2"}),
        (layout("gptq", QuantSpec(8, 128)), {"exllamav2", "auto-gptq"}),
        (layout("gptq", ASYM), {"vLLM", "SGLang", "exllamav2", "GPTQModel", "transformers"}),
        (layout("gptq", ASYM, quantizer=("gptqmodel:7.7.0",)), {"vLLM", "SGLang", "exllamav2"}),
        (layout("gptq_v2"), {"auto-gptq"}),
        (layout("gptq_v2", ASYM), {"vLLM", "SGLang", "auto-gptq", "exllamav2"}),
        (layout("gptq", QuantSpec(4, 16)), {"vLLM", "SGLang"}),
        (layout("gptq", QuantSpec(4, 8)), {"vLLM", "SGLang", "GPTQModel", "transformers"}),
        (layout("gptq", desc_act=True), {"vLLM"}),
        (layout("gptq", QuantSpec(4, -1), desc_act=True), set()),
        (layout("gptq", has_g_idx=False), {"transformers"}),
        (layout("gptq", **experts()), {"transformers"}),
        (layout("gptq", plain=tuple(EXPERTS), **BOTH_KEYS), {"SGLang", "auto-gptq"}),
        (layout("gptq", model_type="gpt2"), {"transformers"}),
        (layout("gptq", packed={**grids(), "lm_head": QuantSpec(4, 128)}), {"transformers", "auto-gptq"}),
        (layout("gptq", tied=True), {"auto-gptq"}),
        (layout("gptq", old_rope=False), {"auto-gptq", "exllamav2"}),
        (layout("gptq", **LEFT_OUT, dynamic=True), {"transformers", "auto-gptq"}),
        (layout("gptq", **LEFT_OUT, modules=True), {"transformers", "GPTQModel", "auto-gptq"}),
        (layout("gptq", **LEFT_OUT, **BOTH_KEYS), {"auto-gptq"}),
        (
            layout("gptq", packed=grids(o_proj=QuantSpec(8, 128)), **BOTH_KEYS),
            {"transformers", "exllamav2", "auto-gptq"},
        ),
        (
            layout("gptq", packed=grids(q_proj=QuantSpec(8, 128)), **BOTH_KEYS),
            {"transformers", "vLLM", "SGLang", "exllamav2", "auto-gptq"},
        ),
        (layout("gptq", shapes={**SHAPES, DOWN: (250, 256)}), {"transformers", "GPTQModel"}),
    ],
)
def test_gptq(made: Layout, refusing: set[str]) -> None:
    assert GPTQ_LOADERS - loading(made) == refusing
    assert not loading(made) & {"llama.cpp", "mlx"}


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (layout("compressed-tensors"), {"transformers", "vLLM", "SGLang"}),
        (layout("compressed-tensors", QuantSpec(8, -1)), {"transformers", "vLLM", "SGLang"}),
        (layout("compressed-tensors", QuantSpec(3, 128)), {"transformers", "vLLM"}),
        (layout("compressed-tensors", packed={**grids(), "lm_head": QuantSpec(8, 128)}), {"transformers", "vLLM"}),
        (layout("compressed-tensors", QuantSpec(2, 128)), {"transformers", "vLLM"}),
        (layout("compressed-tensors", ASYM), {"vLLM", "SGLang"}),
        (layout("compressed-tensors", ASYM, dequantize=True), {"transformers", "vLLM", "SGLang"}),
        (layout("compressed-tensors", QuantSpec(8, 128, False)), {"vLLM"}),
        (layout("compressed-tensors", QuantSpec(3, 128, False), dequantize=True), {"transformers", "vLLM"}),
        (layout("compressed-tensors", QuantSpec(4, 16)), {"transformers", "vLLM"}),
        (layout("compressed-tensors", QuantSpec(4, 8)), {"transformers"}),
        (layout("compressed-tensors", desc_act=True), {"SGLang"}),
        (layout("compressed-tensors", QuantSpec(4, -1), desc_act=True), {"SGLang", "vLLM"}),
        (layout("compressed-tensors", **LEFT_OUT), {"transformers", "vLLM", "SGLang"}),
        (layout("compressed-tensors", plain=(NAMES[0].replace(".0.", ".1."),)), {"transformers", "vLLM", "SGLang"}),
        (layout("compressed-tensors", packed=grids(o_proj=QuantSpec(8, 128))), {"transformers", "vLLM", "SGLang"}),
        (layout("compressed-tensors", packed=grids(o_proj=QuantSpec(8, 128)), dequantize=True), {"vLLM", "SGLang"}),
        (layout("compressed-tensors", packed=grids(up_proj=QuantSpec(8, 128))), {"transformers"}),
        (layout("compressed-tensors", **experts()), {"transformers", "vLLM", "SGLang"}),
        (layout("compressed-tensors", **experts(ASYM), dequantize=True), {"vLLM", "SGLang"}),
        (layout("compressed-tensors", model_type="gpt2"), {"vLLM", "SGLang"}),
        (layout("awq"), {"transformers", "GPTQModel", "vLLM", "SGLang", "mlx"}),
        (layout("awq", ASYM), {"transformers", "GPTQModel", "vLLM", "SGLang", "mlx"}),
        (layout("awq", QuantSpec(4, -1)), {"GPTQModel", "vLLM", "SGLang"}),
        (layout("awq", model_type="starcoder2"), {"GPTQModel", "vLLM", "SGLang", "mlx"}),
        (layout("awq", QuantSpec(4, 16)), {"transformers", "GPTQModel"}),
        (layout("awq", QuantSpec(8, 128)), set()),
        (layout("awq", **LEFT_OUT), {"transformers", "vLLM", "SGLang", "mlx"}),
        (layout("awq", **LEFT_OUT, **BOTH_KEYS), {"transformers", "GPTQModel", "vLLM", "SGLang", "mlx"}),
        (layout("awq", **experts()), {"GPTQModel", "vLLM", "SGLang"}),
        (layout("mlx", QuantSpec(3, 64)), {"mlx"}),
        (layout("mlx", **experts()), {"mlx"}),
        (layout("mlx", model_type="qwen3_moe", **experts()), set()),
        (layout("mlx", old_rope=False), set()),
        (layout("gguf", lost_in_gguf="biases"), {"vLLM", "SGLang", "llama.cpp"}),
        (layout("gguf", QuantSpec(4, 32)), {"transformers", "vLLM", "SGLang", "llama.cpp"}),
        (Layout(format=None), CONSUMERS - {"llama.cpp", "auto-gptq"}),
        (Layout(format=None, safetensors=False), CONSUMERS - {"llama.cpp", "auto-gptq", "exllamav2", "mlx"}),
        (Layout(format="gguf"), {"transformers", "vLLM", "SGLang", "llama.cpp"}),
    ],
)
def test_other_formats(made: Layout, expected: set[str]) -> None:
    assert loading(made) == expected | {"bittern"}


@pytest.mark.parametrize(
    ("made", "consumer", "reason"),
    [
        (layout("gptq", QuantSpec(3, 128)), "vLLM", "3 bits: its GPTQ takes 4 and 8"),
        (layout("gptq", QuantSpec(3, 128)), "SGLang", "3 bits: its GPTQ takes 4 and 8"),
        (layout("gptq_v2", ASYM), "vLLM", "asymmetric: its GPTQ takes symmetric alone"),
        (layout("gptq", QuantSpec(4, 16)), "vLLM", "group_size 16: it takes -1, 32, 64, 128"),
        (layout("gptq", desc_act=True), "vLLM", "act-order"),
        (
            layout("gptq", packed=grids(q_proj=QuantSpec(8, 128)), **BOTH_KEYS),
            "vLLM",
            "it fuses q_proj, k_proj, v_proj",
        ),
        (layout("gptq", packed=grids(up_proj=QuantSpec(8, 128)), **BOTH_KEYS), "SGLang", "it fuses gate_proj, up_proj"),
        (
            layout("gptq", plain=(DOWN, DOWN.replace("down", "up")), packed={NAMES[4]: FOUR}),
            "vLLM",
            "it fuses gate_proj, up_proj",
        ),
        (layout("gptq", packed=grids(o_proj=QuantSpec(8, 128))), "vLLM", "different grids need `dynamic`"),
        (layout("gptq", **experts()), "transformers", "silently wrong logits"),
        (layout("gptq", packed={EXPERTS[0]: FOUR}, plain=(EXPERTS[1],), **BOTH_KEYS), "vLLM", "it fuses all experts"),
        (layout("gptq", packed=grids(o_proj=QuantSpec(8, 128)), **BOTH_KEYS), "transformers", "`dynamic`"),
        (layout("gptq", **LEFT_OUT, dynamic=True), "transformers", f"{DOWN} stay floats"),
        (layout("gptq", packed={"lm_head": QuantSpec(4)}), "transformers", "never replaces lm_head"),
        (layout("compressed-tensors", packed={**grids(), "lm_head": QuantSpec(3)}), "vLLM", "no packed lm_head"),
        (layout("gptq", model_type="gpt2"), "transformers", "Conv1D"),
        (layout("gptq", shapes={DOWN: (250, 256)}), "GPTQModel", f"{DOWN} is 250 x 256"),
        (layout("gptq"), "mlx", "takes no g_idx"),
        (layout("gptq", has_g_idx=False), "mlx", "takes no GPTQ"),
        (layout("gptq"), "llama.cpp", "needs GGUF: bittern convert --format gguf makes it"),
        (layout("gptq", model_type="gpt2"), "llama.cpp", "needs GGUF: model_type: GGUF is written for llama, mistral,"),
        (Layout(format=None, model_type="gpt2"), "llama.cpp", "gemma3_text, found gpt2"),
        (layout("gptq_v2", QuantSpec(8, 64, False)), "llama.cpp", "needs GGUF: GGUF has no type for 8-bit asymmetric"),
        (layout("gptq", shapes={DOWN: (64, 80)}, packed={DOWN: FOUR}), "llama.cpp", "32 columns, found 80 columns"),
        (layout("compressed-tensors", ASYM), "transformers", "`dequantize: true`"),
        (
            layout("compressed-tensors", packed=grids(o_proj=QuantSpec(8, 128)), dequantize=True),
            "transformers",
            "silently wrong logits from `dequantize`",
        ),
        (layout("compressed-tensors", **experts(ASYM), dequantize=True), "transformers", "finds no zeros"),
        (layout("compressed-tensors", QuantSpec(2, 128)), "SGLang", "2 bits: its compressed-tensors takes 4 and 8"),
        (layout("compressed-tensors", QuantSpec(8, 128, False)), "SGLang", "8 bits: its asymmetric"),
        (layout("compressed-tensors"), "GPTQModel", "takes GPTQ and AWQ, this is compressed-tensors"),
        (layout("compressed-tensors"), "vLLM", "Marlin"),
        (layout("compressed-tensors", QuantSpec(3, 128)), "vLLM", "Humming"),
        (layout("compressed-tensors", QuantSpec(4, 256)), "vLLM", "Humming"),
        (layout("awq", **LEFT_OUT), "GPTQModel", f"{DOWN} stay floats"),
        (layout("awq", QuantSpec(4, -1)), "transformers", "silently wrong logits from AWQ with group_size -1"),
        (layout("awq", model_type="bloom"), "transformers", "AWQ of bloom: it wants scales of activations too"),
        (layout("mlx"), "transformers", "no method that it knows"),
        (layout("mlx"), "vLLM", "takes no MLX"),
        (layout("gguf"), "exllamav2", "this is GGUF"),
        (layout("gguf"), "vLLM", "vllm-gguf-plugin"),
        (Layout(format=None), "auto-gptq", "opens GPTQ artifacts alone"),
    ],
)
def test_reasons(made: Layout, consumer: str, reason: str) -> None:
    assert reason in found(made)[consumer][1]


def test_the_activations_that_transformers_scales() -> None:
    from transformers.integrations.awq import AWQ_SCALES_MAPPINGS

    for kind in AWQ_SCALES_MAPPINGS:
        assert not found(layout("awq", model_type=kind))["transformers"][0], kind


def test_everyone_is_asked_about_everything() -> None:
    for name in (None, "gptq", "gptq_v2", "compressed-tensors", "awq", "mlx", "gguf"):
        given = verdicts(layout(name) if name else Layout(format=None))
        assert {verdict.consumer for verdict in given} == CONSUMERS
        assert all(verdict.reason for verdict in given)


CT = "compressed-tensors"
REFUSED = None


@pytest.mark.parametrize(
    ("made", "choices"),
    [  # in the order transformers, vllm, sglang, gptqmodel, llama.cpp, mlx
        (layout(None, QuantSpec(8, 64)), ("gptq", "gptq", "gptq", "gptq", "gguf", "mlx")),
        (layout(None, QuantSpec(4, 64)), ("gptq", "gptq", "gptq", "gptq", "gguf", "mlx")),
        (layout(None, QuantSpec(3, 64)), ("gptq", CT, REFUSED, "gptq", "gguf", "mlx")),
        (layout(None, QuantSpec(2, 64)), ("gptq", CT, REFUSED, "gptq", "gguf", "mlx")),
        (layout(None, QuantSpec(8, 64, False)), ("gptq_v2", CT, REFUSED, "gptq_v2", REFUSED, "mlx")),
        (layout(None, QuantSpec(4, 64, False)), ("gptq_v2", CT, CT, "gptq_v2", "gguf", "mlx")),
        (layout(None, QuantSpec(3, 64, False)), ("gptq_v2", CT, REFUSED, "gptq_v2", "gguf", "mlx")),
        (layout(None, QuantSpec(4, 256)), ("gptq", CT, REFUSED, "gptq", "gguf", "mlx")),
        (layout(None, QuantSpec(4, 16)), ("gptq", CT, REFUSED, "gptq", REFUSED, REFUSED)),
        (layout(None, packed=grids(o_proj=QuantSpec(8, 128))), (CT, "gptq", "gptq", "gptq", "gguf", "mlx")),
        (layout(None, packed=grids(q_proj=QuantSpec(8, 128))), (CT, REFUSED, REFUSED, "gptq", "gguf", "mlx")),
        (layout(None, packed=grids(o_proj=ASYM)), (REFUSED, CT, CT, "gptq_v2", "gguf", "mlx")),
        (layout(None, **LEFT_OUT), ("gptq", "gptq", "gptq", "gptq", "gguf", "mlx")),
        (layout(None, **experts()), (CT, "gptq", "gptq", "gptq", "gguf", "mlx")),
        (layout(None, **experts(ASYM)), (REFUSED, CT, CT, "gptq_v2", "gguf", "mlx")),
        (layout(None, desc_act=True), ("gptq", REFUSED, "gptq", "gptq", REFUSED, REFUSED)),
        (layout(None, model_type="gpt2"), (REFUSED, "gptq", "gptq", "gptq", REFUSED, REFUSED)),
        (layout(None, **fused_experts()), (REFUSED, REFUSED, REFUSED, REFUSED, "gguf", REFUSED)),
        (Layout(format=None), ("safetensors", "safetensors", "safetensors", "safetensors", "gguf", "safetensors")),
    ],
)
def test_the_format_for_a_target(made: Layout, choices: tuple[str | None, ...]) -> None:
    # what the source says of itself plays no part in what is written
    for source in (made, replace(made, format="awq", has_g_idx=False, quantizer=("gptqmodel:7",), dequantize=True)):
        for target, expected in zip(TARGETS, choices, strict=True):
            if expected is REFUSED:
                with pytest.raises(BitternError, match=f"^--target {target}: {TARGETS[target][0]}: "):
                    choose_format(target, source)
            else:
                assert choose_format(target, source) == expected, target
                check_target(target, replace(source, format=expected))


def test_a_refusal_names_the_reasons_and_the_other_targets() -> None:
    with pytest.raises(BitternError) as error:
        choose_format("sglang", layout(None, QuantSpec(3, 64)))
    assert str(error.value) == (
        "--target sglang: gptq: 3 bits: its GPTQ takes 4 and 8; compressed-tensors: 3 bits: its compressed-tensors "
        "takes 4 and 8; these targets take it: transformers, vllm, gptqmodel, llama.cpp, mlx"
    )
    with pytest.raises(BitternError, match=r"^--target: expected one of transformers, vllm, .*, found 'tgi'$"):
        choose_format("tgi", layout(None))
    with pytest.raises(BitternError, match=r"no other target takes it$"):
        choose_format("transformers", layout(None, QuantSpec(4, 7), model_type="gpt2"))


@pytest.mark.parametrize(
    ("target", "made", "message"),
    [
        (
            "vllm",
            layout("gptq", QuantSpec(3, 64)),
            "--target vllm: gptq: 3 bits: its GPTQ takes 4 and 8; compressed-tensors would do",
        ),
        (
            "mlx",
            layout("compressed-tensors"),
            "--target mlx: compressed-tensors: takes no compressed-tensors; mlx would do",
        ),
        ("llama.cpp", layout("gptq", QuantSpec(4, 64)), "bittern convert --format gguf makes it; gguf would do"),
        ("llama.cpp", layout("gptq", model_type="gpt2"), "found gpt2$"),
        ("llama.cpp", Layout(format="safetensors"), "--target llama.cpp: safetensors: needs GGUF"),
        ("transformers", layout("gptq", **experts(ASYM)), "packed experts, which it has fused$"),
    ],
)
def test_a_format_that_a_target_does_not_load(target: str, made: Layout, message: str) -> None:
    with pytest.raises(BitternError, match=message):
        check_target(target, made)


def test_floats_are_for_everybody_but_llama_cpp() -> None:
    for target in TARGETS:
        if target != "llama.cpp":  # whatever the source was
            check_target(target, layout("safetensors", QuantSpec(3, 8), desc_act=True))


def test_rounding_is_left_to_the_writer_when_it_is_allowed() -> None:
    made = layout(None, QuantSpec(8, 64, False))
    with pytest.raises(BitternError, match="no type for 8-bit asymmetric"):
        choose_format("llama.cpp", made)
    assert choose_format("llama.cpp", made, allow_inexact=True) == "gguf"
    with pytest.raises(BitternError, match="act-order"):
        choose_format("llama.cpp", replace(made, desc_act=True), allow_inexact=True)


def test_transformers_dequantizes_what_is_asymmetric() -> None:
    assert asks_dequantize("transformers", layout(None, ASYM))
    assert not asks_dequantize("transformers", layout(None))
    assert not asks_dequantize("vllm", layout(None, ASYM))
    assert not asks_dequantize(None, layout(None, ASYM))


@pytest.mark.parametrize(
    ("name", "made", "reason"),
    [
        ("gptq", layout(None, ASYM), "asymmetric"),
        ("gptq_v2", layout(None, ASYM, desc_act=True), None),
        ("awq", layout(None, desc_act=True), "act-order"),
        ("awq", layout(None, QuantSpec(4, -1), desc_act=True), None),
        ("awq", layout(None, QuantSpec(3, 128)), "4 bits alone, found 3"),
        ("awq", layout(None, packed=grids(o_proj=QuantSpec(4, 64))), "different grids"),
        ("mlx", layout(None, ASYM), None),
        ("gguf", layout(None, packed=grids(o_proj=QuantSpec(8, 64, False))), "8-bit asymmetric"),
        ("gguf", layout(None, model_type="gpt2"), "found gpt2"),
        ("gguf", layout(None, shapes={DOWN: (80, 64)}, packed={DOWN: FOUR}), None),
    ],
)
def test_what_a_format_cannot_hold(name: str, made: Layout, reason: str | None) -> None:
    given = cannot_hold(name, made)
    assert given == reason if reason is None else reason in str(given)


def test_a_plan_is_judged_as_what_it_becomes() -> None:
    names = [*NAMES, DOWN, "model.layers.0.mlp.gate"]
    layers: dict[str, QuantSpec | None] = {**dict.fromkeys(names, QuantSpec(4, 64)), DOWN: None, names[-1]: None}
    config = {"model_type": "qwen3_moe", "rope_parameters": {"rope_theta": 1e4}}
    made = planned_layout(config, layers, dict.fromkeys(names, (128, 64)), tied=True)
    assert made.format is None and made.model_type == "qwen3_moe" and made.tied
    assert made.old_rope  # for the config that is written has it
    assert set(made.packed) == set(made.shapes) == set(NAMES)
    assert made.plain == (DOWN,)  # nobody packs a router
    assert made.dynamic and made.modules  # the config will name what was left out
    assert choose_format("transformers", made) == "gptq"
    whole = planned_layout({}, dict.fromkeys(NAMES, QuantSpec(4, 64)), SHAPES, tied=False)
    assert not whole.dynamic and not whole.modules and whole.plain == ()
    assert set(NAMES) == set(whole.packed)


SCALED = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("kind", "rope"),
    [
        ("llama", {"rope_type": "default", "rope_theta": 5e5}),
        ("llama", LLAMA3),
        ("qwen2", SCALED),
        ("phi", {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}),
        (
            "gemma3_text",
            {"full_attention": SCALED, "sliding_attention": {"rope_type": "default", "rope_theta": 2e4}},
        ),
    ],
)
def test_rope_in_the_old_words_says_the_same(kind: str, rope: dict[str, Any]) -> None:
    """transformers reads both: the new words, the old ones alone, and both together."""
    from transformers import AutoConfig

    new = json.loads(AutoConfig.for_model(kind, rope_parameters=rope, max_position_embeddings=512).to_json_string())
    new = {key: value for key, value in new.items() if value is not None}
    both = with_old_rope(new)
    old = {key: value for key, value in both.items() if key != "rope_parameters"}
    assert both["rope_theta"] == rope.get("full_attention", rope)["rope_theta"] and "rope_theta" not in new
    for words in (new, both, old):
        assert AutoConfig.for_model(**copy.deepcopy(words)).rope_parameters == rope
    assert with_old_rope(both) == both


def test_transformers_reads_the_same_rope_of_every_architecture() -> None:
    from transformers import CONFIG_MAPPING, AutoConfig

    def rope(config: Any) -> list[Any]:
        return [getattr(part, "rope_parameters", None) for part in (config, getattr(config, "text_config", None))]

    seen = 0
    for kind, made in CONFIG_MAPPING.items():
        try:
            words = json.loads(made().to_json_string())
            expected = rope(AutoConfig.for_model(**copy.deepcopy(words)))
        except Exception:
            continue
        seen += any(expected)
        found = rope(AutoConfig.for_model(**copy.deepcopy(with_old_rope(words))))
        assert found == expected, kind
    assert seen > 100


def test_rope_that_is_told_already_is_left_alone() -> None:
    scaling = {"rope_type": "linear", "factor": 2.0}
    told = {"rope_theta": 7.0, "rope_scaling": scaling, "rope_parameters": {"rope_type": "default", "rope_theta": 9.0}}
    assert with_old_rope(told) == told
    inner = {"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 9.0}}}
    assert with_old_rope(inner)["text_config"]["rope_theta"] == 9.0
    for broken in ({}, {"rope_parameters": None}, {"rope_parameters": {"full_attention": 1, "rope_theta": None}}):
        assert with_old_rope(broken) == broken


@pytest.mark.parametrize(
    ("kind", "rope", "said"),
    [
        ("llama", {"rope_theta": 1e4, "rope_type": "default"}, True),
        ("llama", {"rope_theta": 5e5, "rope_type": "default"}, False),
        ("llama", LLAMA3, False),
        ("qwen2", {"rope_theta": 1e4, "rope_type": "default"}, False),
        ("lfm3", {"full_attention": SCALED, "sliding_attention": SCALED}, False),
    ],
)
def test_who_reads_the_old_words_alone(kind: str, rope: dict[str, Any], said: bool) -> None:
    config = {"model_type": kind, "rope_parameters": rope}
    assert says_old_rope(config) == said
    assert says_old_rope(with_old_rope(config)) == (kind != "lfm3")
    whole = {"model_type": "gemma3", "text_config": config}  # of text and pictures
    assert says_old_rope(whole) == said and says_old_rope(with_old_rope(whole)) == (kind != "lfm3")


@pytest.mark.parametrize(
    ("config", "lost"),
    [
        ({"model_type": "llama"}, ""),
        ({"model_type": "llama", "mlp_bias": True}, "biases"),
        ({"model_type": "qwen2", "attention_bias": True}, ""),
        ({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "head_dim": 32}, ""),
        ({"model_type": "qwen2", "hidden_size": 64, "num_attention_heads": 4, "head_dim": 32}, "head_dim"),
        ({"model_type": "qwen3", "hidden_size": 1024, "num_attention_heads": 16, "head_dim": 128}, ""),
        ({"model_type": "qwen3", "hidden_size": 64, "num_attention_heads": 4, "head_dim": 16}, "head_dim"),
        ({"model_type": "qwen3_moe", "moe_intermediate_size": 768}, ""),
        ({"model_type": "qwen3_moe", "moe_intermediate_size": 1536}, "moe_intermediate_size"),
        ({"model_type": "qwen2_moe"}, "gate of shared experts"),
        ({"model_type": "mixtral"}, "experts"),
        ({"model_type": "gemma3_text", "query_pre_attn_scalar": 168}, "query_pre_attn_scalar"),
        ({"model_type": "gpt2", "n_positions": 64}, "n_positions"),
        ({"model_type": "llama", "rope_parameters": LLAMA3}, "scaled RoPE"),
    ],
)
def test_what_the_gguf_reader_of_transformers_loses(config: dict[str, Any], lost: str) -> None:
    assert planned_layout(config, {}, {}, tied=False).lost_in_gguf == lost


def readme_rows() -> list[tuple[str, int, bool, dict[str, str]]]:
    """Format, bits, sym and each loader's cell, of the README's table of what loads where."""
    section = README.split("## What loads where", 1)[1].split("\n## ", 1)[0]
    header, _, *rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    loaders = [name.strip() for name in header[2:]]
    found = []
    for format, grids, *cells in rows:
        answers = dict(zip(loaders, (cell.strip() for cell in cells), strict=True))
        for part in grids.split(";"):
            kinds = [sym for word, sym in (("asym", False), (" sym", True)) if word in part] or [True, False]
            widths = [int(bits) for bits in re.findall(r"\d", part)] or [8, 4, 3, 2]
            found += [(format.strip(), bits, sym, answers) for bits in widths for sym in kinds]
    return found


def test_the_readme_s_table_says_what_the_rules_say() -> None:
    rows = readme_rows()
    assert len(rows) == 33
    for format, bits, sym, answers in rows:
        for group in (32, 64, 128):
            made = layout(format, QuantSpec(bits, group, sym), dequantize="--target" in answers["transformers"])
            opened = {loader.lower() for loader in loading(made)} - {"bittern"}
            assert opened == {loader.lower() for loader, cell in answers.items() if cell != "no"}, (format, bits, sym)
