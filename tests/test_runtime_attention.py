"""runtime.attention against attention written out head by head, and against transformers' eager models."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel

import bittern
from bittern.errors import BitternError
from bittern.runtime import attention, native
from bittern.runtime.cache import new_cache
from bittern.runtime.flash import flash_attention
from bittern.runtime.short_attention import short_attention

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}


def tiny(family: str, **options: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SMALL, **options})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()  # type: ignore[no-untyped-call]
    with torch.no_grad():  # the usual small weights would leave attention almost uniform
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    return model


def by_hand(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """allowed: (batch, heads, queries, keys) booleans."""
    batch, heads, queries, _ = query.shape
    shared = heads // key.shape[1]
    output = torch.empty(batch, queries, heads, value.shape[-1])
    for b in range(batch):
        for h in range(heads):
            for q in range(queries):
                scores = key[b, h // shared] @ query[b, h, q] * scale
                scores[~allowed[b, h, q]] = -torch.inf
                output[b, q, h] = scores.softmax(0) @ value[b, h // shared]
    return output


@pytest.mark.parametrize(("heads", "key_value_heads"), [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (1, 7), (3, 7)])
@pytest.mark.parametrize("mask", [None, "shared", "by head", "added"])
@pytest.mark.parametrize("size", [8, 12], ids=["values like keys", "wider values"])
def test_equals_attention_by_hand(
    heads: int, key_value_heads: int, queries: int, keys: int, mask: str | None, size: int
) -> None:
    generator = torch.Generator().manual_seed(heads + keys)
    query = torch.randn(2, heads, queries, 8, generator=generator)
    key = torch.randn(2, key_value_heads, keys, 8, generator=generator)
    value = torch.randn(2, key_value_heads, keys, size, generator=generator)
    if mask is None:
        # One query sees everything; several are causal, and with more keys the cache is an empty static one.
        allowed = torch.ones(queries, keys, dtype=torch.bool).tril(keys if queries == 1 else 0).expand(2, heads, -1, -1)
        given = None
    else:
        shape = (2, heads if mask == "by head" else 1, queries, keys)
        given = torch.rand(shape, generator=generator) > 0.4
        given[..., 0] = True
        allowed = given.expand(2, heads, -1, -1)
        if mask == "added":
            given = torch.where(given, 0.0, -torch.inf)
    found, weights = attention.attention(nn.Module(), query, key, value, given, scaling=0.3)
    assert weights is None
    torch.testing.assert_close(found, by_hand(query, key, value, allowed, 0.3))


@pytest.mark.parametrize("library", [True, False], ids=["native", "torch"])
def test_autocast_decides_what_comes_out(library: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values are in bfloat16 there, queries and keys in fp32 once they are rotated."""
    if not library:
        monkeypatch.setattr(native, "available", lambda: False)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 5, 8, generator=generator) for heads in (4, 2, 2))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, _ = attention.attention(nn.Module(), query, key, value.bfloat16(), None)
    allowed = torch.ones(5, 5, dtype=torch.bool).tril().expand(1, 4, -1, -1)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), by_hand(query, key, value, allowed, 8**-0.5), rtol=0.05, atol=0.03)


def exact(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention of as many queries as keys, by its formula in fp64: (batch, queries, heads, head_dim)."""
    shared = query.shape[1] // key.shape[1]
    key, value = (each.double().repeat_interleave(shared, 1) for each in (key, value))
    behind = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).triu(1)
    scores = (query.double() @ key.mT * scale).masked_fill(behind, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.fixture
def short_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Positions of each call of short_attention."""
    calls: list[int] = []
    wrapped = short_attention

    def counted(query: Tensor, *args: Any) -> Tensor:
        calls.append(query.shape[2])
        return wrapped(query, *args)

    monkeypatch.setattr(attention, "short_attention", counted)
    return calls


@pytest.mark.parametrize(("heads", "key_value_heads"), [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("positions", [5, 128, 300])
@pytest.mark.parametrize(("spread", "bound"), [(0.3, 0.01), (3.0, 0.02)], ids=["flat", "peaked"])
def test_gradients_of_short_windows_in_bfloat16(
    heads: int, key_value_heads: int, positions: int, spread: float, bound: float, short_calls: list[int]
) -> None:
    """Scores are rounded to 2^-9 of themselves, so where they are large, probabilities are off by a percent."""
    generator = torch.Generator().manual_seed(positions)
    query, key, value, wanted = (
        torch.randn(2, count, positions, 16, generator=generator) for count in (heads, *[key_value_heads] * 2, heads)
    )
    query, key, value = (each.bfloat16() for each in (spread * query, key, value))  # what rounding does not change
    leaves = query.float().requires_grad_(), key.float().requires_grad_(), value.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = attention.attention(nn.Module(), leaves[0], leaves[1], leaves[2], None, scaling=0.25)
    assert short_calls == [positions]
    assert found.dtype == torch.bfloat16
    found.backward(wanted.transpose(1, 2).bfloat16())  # type: ignore[no-untyped-call]
    true = [each.double().requires_grad_() for each in (query, key, value)]
    expected = exact(true[0], true[1], true[2], 0.25)
    expected.backward(wanted.transpose(1, 2).bfloat16().double())  # type: ignore[no-untyped-call]
    for mine, theirs in ((found, expected), *((a.grad, b.grad) for a, b in zip(leaves, true, strict=True))):
        assert mine is not None and theirs is not None
        assert float((mine - theirs).detach().norm() / theirs.detach().norm()) < bound
    assert [leaf.grad.dtype for leaf in leaves if leaf.grad is not None] == [leaf.dtype for leaf in leaves]


def test_where_windows_count_as_short(short_calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    states = torch.randn(1, 2, 6, 8)

    def attend(mask: Tensor | None = None, gradients: bool = True, **options: Any) -> None:
        query = states.clone().requires_grad_(gradients)
        attention.attention(nn.Module(), query, states, states, mask, **options)

    with torch.autocast("cpu", torch.bfloat16):
        attend(gradients=False)
        attend(kernels=False)
        attend(torch.ones(1, 1, 6, 6, dtype=torch.bool))
        attend(is_causal=False)
        with torch.no_grad():
            attend()
        monkeypatch.setattr(attention, "LONGEST", 5)
        attend()
    monkeypatch.setattr(attention, "LONGEST", 6)
    attend()  # in fp32
    assert not short_calls
    with torch.autocast("cpu", torch.bfloat16):
        attend()
    assert short_calls == [6]


def test_gradients_pass_through_causal_attention() -> None:
    query, key, value = (torch.randn(1, heads, 5, 8, requires_grad=True) for heads in (4, 2, 2))
    attention.attention(nn.Module(), query, key, value, None)[0].sum().backward()  # type: ignore[no-untyped-call]
    assert all(each.grad is not None for each in (query, key, value))


def test_refuses_what_it_would_ignore() -> None:
    states = torch.zeros(1, 2, 3, 4)
    with pytest.raises(BitternError, match="attention: Linear asks for softcap"):
        attention.attention(nn.Linear(1, 1), states, states, states, None, softcap=30.0)


BIASED = "bittern_alibi" if native.available() else "eager"
OWN: dict[str, tuple[str, dict[str, Any]]] = {
    "grouped": ("llama", {"num_key_value_heads": 2}),
    "multi-head": ("llama", {}),
    "multi-query": ("gpt_bigcode", GPT),
    "learned positions": ("gpt2", GPT),
    "window": ("mistral", {"num_key_value_heads": 2, "sliding_window": 5}),
    "mixed windows": ("gemma3_text", {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5}),
    "unequal heads": (
        "deepseek_v3",
        {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8}
        | {
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
            "first_k_dense_replace": 2,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
}


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("padded", [False, True])
def test_models_compute_what_their_eager_code_does(kind: str, padded: bool) -> None:
    family, options = OWN[kind]
    model = tiny(family, **options)
    ids = torch.randint(97, (2, 19), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :6] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        assert attention.use(model) == attention.NAME == model.config._attn_implementation
        found = model(ids, attention_mask=mask).logits
    seen = mask.bool()
    torch.testing.assert_close(found[seen], expected[seen], atol=1e-4, rtol=1e-4)


ALIBI: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4}),
    "bloom, heads no power of two": ("bloom", {"n_layer": 2, "n_head": 6, "hidden_size": 48}),
    "mpt": ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}),
    "mpt, heads no power of two": ("mpt", {"d_model": 48, "n_heads": 6, "n_layers": 2, "max_seq_len": 64}),
}


@pytest.mark.skipif(not native.available(), reason=f"native runtime: {native.why_not()}")
@pytest.mark.parametrize("kind", ALIBI)
@pytest.mark.parametrize("case", ["plain", "padded", "cached", "single", "gradient"])
def test_linear_biases_without_the_matrix_of_scores(kind: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, options = ALIBI[kind]
    model = tiny(family, **options)
    ids = torch.randint(97, (2, 1 if case == "single" else 19), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if case == "padded":
        mask[0, :6] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
    assert attention.use(model) == "bittern_alibi"
    from bittern.runtime import alibi

    seen: list[int] = []

    def spy(query: Tensor, *arguments: Any, **options: Any) -> Tensor:
        seen.append(query.shape[2])
        return flash_attention(query, *arguments, **options)

    monkeypatch.setattr(alibi, "flash_attention", spy)
    if case == "gradient":
        found = model(ids, attention_mask=mask).logits
        found.sum().backward()
    else:
        with torch.no_grad():
            if case == "cached":
                cache = new_cache(model.config, 19)
                parts = [ids[:, :12], ids[:, 12:13], ids[:, 13:16], ids[:, 16:17], ids[:, 17:]]
                found = torch.cat([model(part, past_key_values=cache, use_cache=True).logits for part in parts], dim=1)
            else:
                found = model(ids, attention_mask=mask).logits
    # Steps of several tokens behind others are left to transformers, and so is what is padded.
    counts = {"plain": [19], "single": [1], "cached": [12, 1, 1]}.get(case, [])
    assert seen == [count for count in counts for _ in range(2)]
    shown = mask.bool()
    torch.testing.assert_close(found[shown], expected[shown], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["window", "mixed windows"])
@pytest.mark.parametrize("where", ["native", "torch", "half"])
def test_windows_are_not_written_out(kind: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if where == "native" and not native.available():
        pytest.skip(f"native runtime: {native.why_not()}")
    if where == "torch":
        monkeypatch.setattr(native, "_load", lambda: (None, "not here"))
    family, options = OWN[kind]
    model = tiny(family, **options)
    if where == "half":
        model = cast(Any, model).bfloat16()
    ids = torch.randint(97, (2, 19), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids).logits
        attention.use(model)
        masks: list[Any] = []
        actual = attention.attention

        def spy(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
            masks.append(mask)
            return actual(module, query, key, value, mask, **kwargs)

        AttentionInterface.register(attention.NAME, spy)
        found = model(ids).logits
    AttentionInterface.register(attention.NAME, actual)
    assert all(mask is None or mask.shape == (1, 1, 0, 5) for mask in masks)
    assert any(mask is not None for mask in masks)
    tolerance = 0.1 if where == "half" else 1e-4
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kind", ["multi-head", "window", "bloom"])
def test_torch_computes_all_of_it_where_no_kernels_are_wanted(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, options = {**OWN, **ALIBI}[kind]
    model = tiny(family, **options)
    model.save_pretrained(tmp_path)
    ids = torch.randint(97, (2, 19), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids).logits

    def refuse(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("the native library was called")

    monkeypatch.setattr(attention, "flash_attention", refuse)
    monkeypatch.setattr("bittern.runtime.alibi.flash_attention", refuse)
    live = bittern.load(tmp_path, device="cpu", kernels="torch")
    with torch.no_grad():
        torch.testing.assert_close(live(ids).logits, expected, atol=1e-4, rtol=1e-4)
        if native.available():
            with pytest.raises(AssertionError, match="native library was called"):
                bittern.load(tmp_path, device="cpu")(ids)


@pytest.mark.parametrize("where", ["native", "torch"])
@pytest.mark.parametrize("queries", [1, 3])
def test_a_window_when_queries_are_left_out(queries: int, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if where == "torch":
        monkeypatch.setattr(native, "_load", lambda: (None, "not here"))
    query, key, value = (torch.randn(2, heads, 9, 8) for heads in (4, 2, 2))
    window = torch.empty(1, 1, 0, 5, dtype=torch.bool)
    module = nn.Linear(1, 1)
    whole, _ = attention.attention(module, query, key, value, window)
    last, _ = attention.attention(module, query[:, :, -queries:], key, value, window[:, :, -queries:])
    torch.testing.assert_close(last, whole[:, -queries:])


@pytest.mark.parametrize("kept", [0, 1])
def test_layers_that_take_keys_from_others_slide_too(kept: int) -> None:
    """Gemma 4 computes its last layers for the tokens alone whose logits are asked for."""
    options = {"num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8, "sliding_window": 5}
    options |= {"num_hidden_layers": 6, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8}
    options |= {"vocab_size_per_layer_input": 97}
    kinds = ["sliding_attention", "full_attention"] * 3
    model = tiny("gemma4_text", **options, layer_types=kinds)
    ids = torch.randint(97, (2, 19), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids).logits
        assert attention.use(model) == attention.NAME
        found = model(ids, logits_to_keep=kept).logits
    torch.testing.assert_close(found, expected[:, -kept:] if kept else expected, atol=1e-4, rtol=1e-4)


def test_chunks_are_no_windows() -> None:
    """Llama 4's chunks have a local size too."""
    config = AutoConfig.for_model("llama", **SMALL)
    config.attention_chunk_size = config.sliding_window = 4
    options: dict[str, Any] = {"batch_size": 1, "q_length": 8, "kv_length": 8, "local_size": 4, "device": "cpu"}
    assert attention._mask(**options, config=config).shape == (1, 1, 8, 8)  # type: ignore[union-attr]
    config.attention_chunk_size = None
    assert attention._mask(**options, config=config).shape == (1, 1, 0, 4)  # type: ignore[union-attr]
    packed = {**options, "allow_is_causal_skip": False}
    assert attention._mask(**packed, config=config).shape == (1, 1, 8, 8)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("family", "options", "expected"),
    [
        ("gemma2", {"num_key_value_heads": 2, "head_dim": 8}, "eager"),
        ("gpt_oss", {"num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2}, "eager"),
        ("bloom", {"n_layer": 2, "n_head": 4}, BIASED),
        ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2}, BIASED),
        ("gptj", {**GPT, "rotary_dim": 4}, "eager"),
        ("falcon", {"alibi": True}, "sdpa"),
        ("deepseek_v32", {"kv_lora_rank": 16, "q_lora_rank": 16, "n_routed_experts": 2, "index_topk": 4}, "sdpa"),
        ("inkling_text", {"num_key_value_heads": 2, "n_routed_experts": 4, "moe_intermediate_size": 16}, "sdpa"),
    ],
)
def test_architectures_that_keep_their_own(family: str, options: dict[str, Any], expected: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SMALL, **options})
    model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    assert attention.use(model) == model.config._attn_implementation == expected
