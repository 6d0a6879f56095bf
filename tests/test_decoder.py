"""The native decoder against transformers, and its attention against torch's."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from bittern.errors import BitternError
from bittern.runtime import native
from bittern.runtime.decoder import Decoder, Unsupported, attach
from bittern.runtime.flash import flash_attention
from bittern.runtime.linear import NativeMatrix, QuantLinear
from bittern.weight import QuantSpec, QuantWeight
from tests import tiny

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no native library: {native.why_not()}")

SETS = native.instruction_sets() if native.available() else ()
SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 88,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 1e4,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, one head of keys": ("llama", {"num_key_value_heads": 1}),
    "llama, as many heads of keys": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama, odd head": ("llama", {"head_dim": 22, "hidden_act": "gelu_pytorch_tanh"}),
    "linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    "llama3 rope": ("llama", {"rope_parameters": LLAMA3}),
    "yarn rope": ("llama", {"rope_parameters": YARN}),
    "mistral": ("mistral", {"sliding_window": 9}),
    "mistral without window": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2 with windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 16, "attention_bias": True}),
    "smollm3": ("smollm3", {"num_hidden_layers": 4, "tie_word_embeddings": True}),
    "gemma3": (
        "gemma3_text",
        {"num_hidden_layers": 6, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 24},
    ),
    "gemma3 with caps": (
        "gemma3_text",
        {"head_dim": 16, "final_logit_softcapping": 0.2, "attn_logit_softcapping": None},
    ),
}


def make(model_type: str = "llama", seed: int = 0, **config: Any) -> PreTrainedModel:
    """A small random model whose biases are not zero."""
    model = tiny.random_model(model_type, seed, **{**SMALL, **config})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
            elif parameter.ndim == 2:
                parameter.mul_(4)  # so that attention is not nearly uniform
    return model


def ids_of(length: int, seed: int = 1, vocabulary: int = 97) -> list[int]:
    return torch.randint(vocabulary, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.inference_mode()
def reference(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """Logits of every position, (positions, vocabulary)."""
    logits: Tensor = model(torch.tensor([ids]), use_cache=False).logits[0]
    return logits


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def steps(decoder: Decoder, ids: list[int], prompt: int, dtype: Any = "fp32") -> Tensor:
    """Logits after a prompt of some length and after each token that follows it."""
    cache = decoder.new_cache(1, len(ids), dtype)
    parts = [ids[:prompt], *([token] for token in ids[prompt:])]
    return torch.cat([decoder.forward(cache, [part]) for part in parts])


def quantize(model: PreTrainedModel, bits: int = 4, group_size: int = 16) -> None:
    """Round all matrices of the blocks to a random grid, in place."""
    generator = torch.Generator().manual_seed(3)
    for name, module in list(model.model.named_modules()):
        if not isinstance(module, nn.Linear):
            continue
        weight = module.weight.detach()
        groups = -(-weight.shape[1] // group_size)
        size = weight.abs().mean() * 2.0 ** (2 - bits)
        quantized = QuantWeight(
            torch.randint(2**bits, weight.shape, generator=generator, dtype=torch.uint8),
            (torch.rand(weight.shape[0], groups, generator=generator) * size).half(),
            torch.randint(2**bits, (weight.shape[0], groups), generator=generator, dtype=torch.uint8),
            QuantSpec(bits, group_size, sym=False),
        )
        model.model.set_submodule(name, QuantLinear([NativeMatrix(quantized)], module.bias))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family: str) -> None:
    model_type, config = FAMILIES[family]
    model = make(model_type, **config)
    ids = ids_of(30)
    expected = reference(model, ids)[19:]
    assert difference(steps(attach(model), ids, 20), expected) < 1e-5


@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize("family", ["llama with biases", "gemma3"])
def test_every_instruction_set(family: str, instructions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model_type, config = FAMILIES[family]
    monkeypatch.setenv(native.VARIABLE, instructions)
    model = make(model_type, **config)
    ids = ids_of(40)
    assert difference(steps(attach(model), ids, 33), reference(model, ids)[32:]) < 1e-5
    quantize(model)
    assert difference(steps(attach(model), ids, 33), reference(dequantized(model), ids)[32:]) < 1e-3


def dequantized(model: PreTrainedModel) -> PreTrainedModel:
    """Its packed layers as ``nn.Linear`` again, in place."""
    for name, module in list(model.model.named_modules()):
        if isinstance(module, QuantLinear):
            plain = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            plain.weight = nn.Parameter(module.weight, requires_grad=False)
            plain.bias = module.bias  # type: ignore[assignment]
            model.model.set_submodule(name, plain)
    return model


@pytest.mark.parametrize("bits", [8, 3, 2])
def test_packed_layers(bits: int) -> None:
    model = make("qwen2")
    quantize(model, bits)
    decoder, ids = attach(model), ids_of(24)
    found = steps(decoder, ids, 20)
    assert difference(found, reference(dequantized(model), ids)[19:]) < 1e-3


def test_dynamic_rope_follows_the_length() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = make(rope_parameters=rope, max_position_embeddings=16)
    ids = ids_of(40)
    assert difference(steps(attach(model), ids[:30], 30), reference(model, ids[:30])[29:]) < 1e-5
    # Steps beyond the limit turn new tokens faster than old ones, as transformers' own do with a cache.
    past, expected = None, []
    with torch.inference_mode():
        for part in (ids[:12], *([token] for token in ids[12:])):
            out = model(torch.tensor([part]), past_key_values=past, use_cache=True)
            past = out.past_key_values
            expected.append(out.logits[0, -1])
    assert difference(steps(attach(model), ids, 12), torch.stack(expected)) < 1e-5


def test_prompts_of_unequal_length_are_computed_as_alone() -> None:
    model = make("mistral", sliding_window=9)
    decoder = attach(model)
    prompts = [ids_of(length, seed=length) for length in (5, 40, 1, 17)]
    together, alone = decoder.new_cache(4, 64), [decoder.new_cache(1, 64) for _ in prompts]
    for tokens in (prompts, [[3], [], [9, 8, 7], [4]], [[5], [6], [], [1]]):
        found = decoder.forward(together, tokens)
        for index, (cache, part) in enumerate(zip(alone, tokens, strict=True)):
            if part:
                expected = decoder.forward(cache, [part])[0]
                assert difference(found[index], expected) < 1e-6
                assert difference(found[index], reference(model, history(prompts, index, tokens))[-1]) < 1e-5
    assert together.lengths == [7, 41, 4, 19]


def history(prompts: list[list[int]], index: int, tokens: list[list[int]]) -> list[int]:
    """All tokens of a sequence so far, grown as the test goes."""
    if tokens is not prompts:
        prompts[index] = prompts[index] + tokens[index]
    return prompts[index]


def test_long_prompts_go_through_in_chunks() -> None:
    model = make(max_position_embeddings=2048, num_hidden_layers=1)
    decoder = attach(model)
    ids = ids_of(1300)
    cache = decoder.new_cache(2, 2048)
    found = decoder.forward(cache, [ids[:700], ids])  # 512 at a time: cuts both
    expected = reference(model, ids)
    assert difference(found[1], expected[-1]) < 1e-5
    assert difference(found[0], expected[699]) < 1e-5
    parts = decoder.new_cache(1, 2048)
    for start in range(0, len(ids), 333):
        last = decoder.forward(parts, [ids[start : start + 333]])
    assert difference(last[0], found[1]) < 1e-6


def test_cached_bf16() -> None:
    model, ids = make(), ids_of(40)
    decoder = attach(model)
    exact, found = steps(decoder, ids, 30), steps(decoder, ids, 30, "bf16")
    # Keys and values are rounded by at most 2^-9; two layers of scores of a few units pass that on.
    assert 0 < difference(found, exact) < 2**-5


def test_cached_int8() -> None:
    model, ids = make(), ids_of(40)
    decoder = attach(model)
    exact, found = steps(decoder, ids, 30), steps(decoder, ids, 30, "int8")
    # Steps of 1 / 127 of a head's largest element: at most 2^-8 of it, and on average a quarter.
    assert 0 < difference(found, exact) < 2**-4


@pytest.mark.parametrize(("dtype", "bits"), [("bf16", 9), ("int8", 8)])
def test_a_cached_value_is_the_nearest_one(dtype: Any, bits: int) -> None:
    """With one token attention returns its value as cached: the o projection shows it."""
    model = make(num_hidden_layers=1, num_key_value_heads=4)
    with torch.no_grad():
        for parameter in model.model.layers[0].mlp.parameters():
            parameter.zero_()
        model.model.layers[0].self_attn.o_proj.weight.copy_(torch.eye(48))
    seen: list[Tensor] = []
    model.model.layers[0].self_attn.v_proj.register_forward_hook(lambda *call: seen.append(call[2]))
    reference(model, [5])
    value = seen[0].view(4, 12)
    largest = value.abs().amax(dim=1, keepdim=True)
    rounded = value.bfloat16().float() if dtype == "bf16" else (value * 127 / largest).round() * largest / 127
    assert float((rounded - value).abs().max()) <= float(largest.max()) * 2.0**-bits
    model.model.layers[0].self_attn.v_proj.register_forward_hook(lambda *call: rounded.view(1, 1, 48))
    with torch.inference_mode():
        expected = model(torch.tensor([[5]]), use_cache=False).logits[0]
    decoder = attach(model)
    assert difference(decoder.forward(decoder.new_cache(1, 1, dtype), [[5]]), expected) < 1e-5


def test_a_full_cache_is_an_error() -> None:
    decoder = attach(make())
    cache = decoder.new_cache(2, 5)
    decoder.forward(cache, [[1, 2, 3], [1, 2, 3, 4, 5]])
    with pytest.raises(BitternError, match="cache: full, 6 tokens do not fit a capacity of 5"):
        decoder.forward(cache, [[4], [6]])
    assert cache.lengths == [3, 5]
    decoder.forward(cache, [[4, 5], []])
    with pytest.raises(BitternError, match="65 tokens do not fit the model's context of 64"):
        decoder.new_cache(1, 65)
    with pytest.raises(BitternError, match="fp32, bf16, int8, found 'fp8'"):
        decoder.new_cache(1, 4, "fp8")  # type: ignore[arg-type]


def test_bad_tokens_are_errors() -> None:
    decoder = attach(make())
    cache = decoder.new_cache(1, 5)
    for bad in (97, -1):
        with pytest.raises(BitternError, match="expected ids below 97"):
            decoder.forward(cache, [[1, bad]])
    with pytest.raises(BitternError, match="expected those of 1 sequences, found 2"):
        decoder.forward(cache, [[1], [2]])
    assert decoder.forward(cache, [[]]).shape == (1, 97)
    assert cache.lengths == [0]


def test_results_do_not_depend_on_threads() -> None:
    model = make(hidden_size=96, intermediate_size=500, max_position_embeddings=2048)
    quantize(model)
    ids = ids_of(600)
    found = [steps(attach(model, threads=threads), ids, 590) for threads in (1, 2, 8)]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_rounded_inputs() -> None:
    model, ids = make(), ids_of(12)
    quantize(model)
    fine, coarse = (steps(attach(model, activations), ids, 8) for activations in ("a16", "a8"))
    assert 1e-4 < difference(coarse, fine) < 0.1


def test_check() -> None:
    model = make("qwen3", head_dim=16)
    decoder = attach(model)
    assert decoder.check(model, 1e-5) < 1e-5
    with pytest.raises(Unsupported, match="its logits differ from transformers'"):
        decoder.check(make("qwen3", head_dim=16, seed=1), 1e-2)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = math.nan
    with pytest.raises(Unsupported, match="nan"):
        decoder.check(model, 1e-2)


@pytest.mark.parametrize(
    ("model_type", "config", "reason"),
    [
        ("olmo2", {}, "Olmo2ForCausalLM .* not among the decoders"),
        ("llama", {"hidden_act": "relu"}, "activation relu"),
        ("gemma3_text", {"head_dim": 16, "use_bidirectional_attention": True}, "not causal"),
        ("gemma3_text", {"head_dim": 16, "attn_logit_softcapping": 50.0}, "Gemma 3 ignores it"),
        (
            "smollm3",
            {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4},
            "SmolLM3 slides by them",
        ),
    ],
)
def test_models_that_are_left_to_transformers(model_type: str, config: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        attach(make(model_type, **config))


def test_larger_tables_leave_those_in_use_alone() -> None:
    """A call of another thread may still read them."""
    ropes = attach(make())._ropes
    small, held = ropes.tables(0, 10)
    before = [(table.cos, table.sin, table.end) for table in small]
    large, _ = ropes.tables(0, 1000)
    assert large is not small and large[0].end >= 1000
    assert [(table.cos, table.sin, table.end) for table in small] == before
    assert [tensor.data_ptr() for tensor in held] == [before[0][0], before[0][1]]


def test_a_cache_that_memory_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> Tensor:
        raise RuntimeError("can't allocate memory")

    made = attach(make())
    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(BitternError, match=r"cache: 2 x 7 tokens do not fit the memory: .*can't allocate memory"):
        made.new_cache(2, 7)


def test_layers_that_are_left_to_transformers() -> None:
    model = make()
    model.model.layers[1].self_attn.q_norm = nn.LayerNorm(12)
    model.model.layers[1].mlp.adapter = nn.Linear(2, 2)
    with pytest.raises(Unsupported, match="layer 1: mlp has a submodule adapter"):
        attach(model)
    model = make()
    model.model.layers[0].self_attn.k_proj = nn.Sequential(model.model.layers[0].self_attn.k_proj)
    with pytest.raises(Unsupported, match="layer 0: k_proj: Sequential is not one matrix"):
        attach(model)
    with pytest.raises(Unsupported, match="its arithmetic is bfloat16"):
        attach(make().bfloat16())


def naive_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, **options: Any) -> Tensor:
    """In fp64, straight from the definition; (batch, queries, heads, head_dim)."""
    heads, queries, keys = query.shape[1], query.shape[2], key.shape[2]
    key, value = (each.double().repeat_interleave(heads // key.shape[1], dim=1) for each in (key, value))
    scores = query.double() @ key.transpose(2, 3) * scale
    if cap := options.get("cap"):
        scores = cap * torch.tanh(scores / cap)
    distance = torch.arange(keys)[None] - torch.arange(keys - queries, keys)[:, None]
    if (slopes := options.get("slopes")) is not None:
        scores = scores + slopes.double()[:, None, None] * distance
    hidden = distance > 0
    if window := options.get("window"):
        hidden |= distance <= -window
    weights = scores.masked_fill(hidden, -math.inf).softmax(dim=-1)
    return (weights @ value).transpose(1, 2)


@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 2, 2, 1, 1, 16), {}),
        ((2, 4, 2, 70, 70, 24), {}),
        ((1, 6, 2, 1, 700, 64), {}),
        ((2, 6, 1, 3, 600, 80), {"window": 300}),
        ((1, 2, 2, 200, 600, 5), {"window": 33}),
        ((2, 3, 3, 40, 300, 32), {"slopes": torch.tensor([0.5, 0.25, 0.01])}),
        ((1, 4, 1, 1, 530, 128), {"slopes": torch.tensor([0.5, 0.25, 0.1, 0.01])}),
        ((1, 4, 2, 9, 30, 40), {"cap": 2.0}),
        ((1, 130, 1, 2, 90, 16), {}),
    ],
)
def test_flash_attention(
    shape: tuple[int, ...], options: dict[str, Any], instructions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(native.VARIABLE, instructions)
    batch, heads, kv_heads, queries, keys, size = shape
    torch.manual_seed(0)
    query = torch.randn(batch, queries, heads, size).transpose(1, 2)
    key, value = torch.randn(batch, kv_heads, keys, size), torch.randn(batch, keys, kv_heads, size).transpose(1, 2)
    scale = 2 / math.sqrt(size)
    expected = naive_attention(query, key, value, scale, **options)
    found = flash_attention(query, key, value, scale=scale, **options)
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) < 4e-6
    assert torch.equal(found, flash_attention(query, key, value, scale=scale, threads=3, **options))


@pytest.mark.parametrize("instructions", SETS)
def test_exponentials_of_the_softmax(instructions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two keys with scores 0 and x and values 0 and 1: the result is e^x / (1 + e^x)."""
    monkeypatch.setenv(native.VARIABLE, instructions)
    x = torch.linspace(-87, 0, 4001)
    key = torch.stack([torch.zeros_like(x), x])[None, None].permute(0, 3, 2, 1)  # a head for every x
    value = torch.tensor([[0.0], [1.0]]).expand(1, len(x), 2, 1)
    found = flash_attention(torch.ones(1, len(x), 1, 1), key, value, scale=1.0).flatten()
    expected = x.double().exp() / (1 + x.double().exp())
    assert float(((found - expected) / expected).abs().max()) < 5 * 2**-24
    below = flash_attention(
        torch.ones(1, 1, 1, 1), torch.tensor([0.0, -120.0])[None, None, :, None], value[:, :1], scale=1.0
    )
    assert float(below) == 0


def test_flash_attention_of_keys_that_share_memory() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 5, 16), torch.randn(1, 2, 1, 16).expand(1, 2, 5, 16)
    values = torch.randn(1, 2, 5, 32)
    for value in (values[..., :16], values[..., 16:]):
        found = flash_attention(query, key, value, scale=1.0)
        torch.testing.assert_close(found, flash_attention(query, key.contiguous(), value.contiguous(), scale=1.0))
    narrow = values[..., 8:]  # 24 columns in rows of 32
    query, key = torch.randn(1, 2, 5, 24), torch.randn(1, 2, 5, 24)
    expected = flash_attention(query, key, narrow.contiguous(), scale=1.0)
    torch.testing.assert_close(flash_attention(query, key, narrow, scale=1.0), expected)


def test_flash_attention_agrees_with_torch_on_strided_input() -> None:
    torch.manual_seed(0)
    fused = torch.randn(2, 50, 3, 4, 16)  # as a fused projection leaves q, k and v
    query, key, value = (fused[:, :, index].transpose(1, 2) for index in range(3))
    expected = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    found = flash_attention(query, key, value, scale=0.25)
    assert float((found.transpose(1, 2) - expected).abs().max()) < 2e-6


def test_flash_attention_refuses_what_does_not_fit() -> None:
    query, key = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 3, 8)
    for bad in (torch.zeros(1, 3, 3, 8), torch.zeros(1, 2, 2, 8), key.double(), torch.zeros(2, 2, 3, 8)):
        with pytest.raises(BitternError, match="attention: expected float32 on the CPU"):
            flash_attention(query, bad, bad, scale=1.0)
    with pytest.raises(BitternError, match="slopes"):
        flash_attention(query, key, key, scale=1.0, slopes=torch.ones(3))
