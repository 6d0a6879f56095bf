"""The decode loop against transformers' generate, and the text stream against whole decoding."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import bittern
from bittern import sampling
from bittern.errors import BitternError
from bittern.runtime import attention, cache, native, step
from bittern.runtime.generate import (
    GenerationOptions,
    GenerationResult,
    _Chooser,
    chat_prompt,
    generate,
    generate_batch,
    not_honoured,
)
from bittern.runtime.step import can_batch, make_step, native_decoder
from bittern.runtime.stream import TextStream
from bittern.sampling import write_on

TEXT = "The naïve café owner said: “déjà vu!” 🦆🦆 and the brown duck 🦆 swam away. 東京は夜。" * 3
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "eos_token_id": 1,
}


TURN = 14  # tokens, beyond which LongRoPE takes its long factors
LONGROPE: dict[str, Any] = {
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "original_max_position_embeddings": TURN,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": TURN,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 5.0, 9.0, 17.0],
    },
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with few merges: characters beyond ASCII are several tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator([TEXT], trainer)
    return fast(backend)


def fast(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>"
    )


def tiny(tokenizer: PreTrainedTokenizerFast, family: str = "llama", **options: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SMALL, "vocab_size": len(tokenizer), **options})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(10)
    attention.use(model)
    return model


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    ids: Tensor = tokenizer(text, return_tensors="pt")["input_ids"]
    return ids


def run(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str = "The brown", **options: Any
) -> GenerationResult:
    pieces: list[str] = []
    settings = GenerationOptions(**{"max_new_tokens": 24, "ignore_eos": True, **options})
    result = generate(model, tokenizer, ids_of(tokenizer, prompt), settings, pieces.append)
    assert "".join(pieces) == result.text
    assert all(pieces)
    assert result.new_tokens == len(result.token_ids)
    assert result.prompt_tokens == ids_of(tokenizer, prompt).numel()
    return result


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"num_key_value_heads": 2}),
        ("mistral", {"num_key_value_heads": 2, "sliding_window": 5}),
        ("gemma3_text", {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5, "num_hidden_layers": 7}),
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
        ("bloom", {"n_layer": 2, "n_head": 4}),
        ("mamba", {"state_size": 4}),
        ("phi3", LONGROPE),
        ("xlm", {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "mask_token_id": 5}),
    ],
)
@pytest.mark.parametrize("penalty", [1.0, 1.7])
def test_greedy_is_what_transformers_generates(
    family: str, options: dict[str, Any], penalty: float, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny(tokenizer, family, **options)
    ids = ids_of(tokenizer, "The brown")
    expected = model.generate(  # type: ignore[operator]
        ids, do_sample=False, max_new_tokens=24, repetition_penalty=penalty, eos_token_id=None, pad_token_id=0
    )
    result = run(model, tokenizer, repetition_penalty=penalty)
    assert list(result.token_ids) == expected[0, ids.numel() :].tolist()
    assert result.finish_reason == "length"
    assert result.prefill_tokens_per_second > 0 and result.decode_tokens_per_second > 0


@pytest.mark.parametrize("decoder", [False, True])
def test_the_penalty_of_the_generation_config_is_the_default(
    decoder: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny(tokenizer, num_key_value_heads=2).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.7}), encoding="utf-8")
    model, ids = bittern.load(tmp_path, device="cpu", decoder=decoder), ids_of(tokenizer, "The brown")
    expected = model.generate(ids, do_sample=False, max_new_tokens=24, eos_token_id=None, pad_token_id=0)  # type: ignore[operator]
    assert list(run(model, tokenizer).token_ids) == expected[0, ids.numel() :].tolist()
    assert run(model, tokenizer, repetition_penalty=1.0).token_ids != run(model, tokenizer).token_ids
    model.generation_config.repetition_penalty = -1.0
    with pytest.raises(BitternError, match=r"generation config: repetition_penalty: expected more than 0, found -1\.0"):
        run(model, tokenizer)


def test_what_a_generation_config_asks_for_and_does_not_get(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny(tokenizer)
    assert model.generation_config is not None and not_honoured(model) == []
    idle = {"suppress_tokens": [], "no_repeat_ngram_size": 0, "guidance_scale": 1.0, "temperature": 0.5, "top_k": 5}
    model.generation_config.update(**idle)  # type: ignore[no-untyped-call]
    assert not_honoured(model) == []
    asked = {"forced_eos_token_id": 0, "guidance_scale": 1.5, "no_repeat_ngram_size": 3, "suppress_tokens": [5]}
    asked |= {"num_beams": 4, "stop_strings": ["."]}
    model.generation_config.update(**asked)  # type: ignore[no-untyped-call]
    assert not_honoured(model) == sorted(asked)


def test_ends_at_an_end_of_sequence_token(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny(tokenizer)
    whole = run(model, tokenizer, max_new_tokens=30).token_ids
    last = next(i for i, token in enumerate(whole) if i > 3 and token not in whole[:i])
    assert model.generation_config is not None
    for ends in (whole[last], [1, whole[last]]):
        model.generation_config.eos_token_id = ends
        result = run(model, tokenizer, ignore_eos=False)
        assert result.finish_reason == "eos"
        assert result.token_ids == whole[:last]


@pytest.mark.parametrize("ends", ["5", [1, "x"], {"a": 1}, 2.5])
def test_an_end_that_is_no_token_is_refused(ends: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny(tokenizer)
    model.generation_config.eos_token_id = ends
    with pytest.raises(BitternError, match="eos_token_id: expected the number of a token, or several, found"):
        run(model, tokenizer, ignore_eos=False)


def test_sampling_repeats_with_its_seed(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny(tokenizer)
    options: dict[str, Any] = {"temperature": 1.5, "top_k": 50, "top_p": 0.95}
    first, again, other = (run(model, tokenizer, **options, seed=seed).token_ids for seed in (3, 3, 4))
    assert first == again
    assert first != other
    torch.manual_seed(99)  # the global generator has no part in it
    assert run(model, tokenizer, **options, seed=3).token_ids == first


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-30}])
def test_narrow_sampling_is_greedy(options: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny(tokenizer)
    assert (
        run(model, tokenizer, "The brown", **{"temperature": 2.0, **options}).token_ids
        == run(model, tokenizer).token_ids
    )


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.6}, {"top_k": 4, "top_p": 0.8}])
def test_sampled_frequencies(options: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> None:
    """The first token over many seeds has the probabilities of softmax(logits / T), cut and renormalized."""
    logits = torch.tensor([0.1, 2.0, 1.5, -1.0, 1.0, 0.4])
    temperature, draws = 0.9, 3000
    expected = (logits.double() / temperature).softmax(0).tolist()
    ranked = sorted(range(6), key=lambda i: -expected[i])[: options.get("top_k", 6)]
    mass = sum(expected[i] for i in ranked)
    kept, total = [], 0.0
    for i in ranked:
        if total < options.get("top_p", 1.0):
            kept.append(i)
        total += expected[i] / mass
    share = sum(expected[i] for i in kept)
    chooser = _Chooser([0], GenerationOptions(temperature=temperature, seed=5, **options))
    counts = torch.bincount(torch.tensor([chooser(logits) for _ in range(draws)]), minlength=6).tolist()
    for token in range(6):
        probability = expected[token] / share if token in kept else 0.0
        deviation = (draws * probability * (1 - probability)) ** 0.5
        assert abs(counts[token] - draws * probability) <= 4 * deviation


def test_stop_texts_across_token_borders(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny(tokenizer)
    whole = run(model, tokenizer, max_new_tokens=40)
    assert len(whole.text) > 12
    for start, length in ((3, 1), (4, 5), (6, 6)):
        stop = whole.text[start : start + length]
        result = run(model, tokenizer, max_new_tokens=40, stop=("never in it", stop))
        assert result.text == whole.text[: whole.text.index(stop)]
        assert result.finish_reason == "stop"
    # What only began like a stop text comes out in the end.
    assert run(model, tokenizer, max_new_tokens=40, stop=(whole.text[-2:] + "\0",)).text == whole.text


def streamed(stream: TextStream, ids: list[int]) -> list[str]:
    """The pieces of these tokens; few of them are kept."""
    pieces = []
    for token in ids:
        pieces.append(stream.add(token))
        assert len(stream._ids) < 2 * stream._CONTEXT
    return pieces


@pytest.mark.parametrize("cut", range(40))
def test_stream_gives_whole_characters(cut: int, tokenizer: PreTrainedTokenizerFast) -> None:
    """Also the one that the prompt ends inside."""
    ids = ids_of(tokenizer, TEXT)[0].tolist()
    stream = TextStream(tokenizer, ids[:cut], ())
    pieces = streamed(stream, ids[cut:])
    assert "" in pieces  # some characters are several tokens
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join([str(tokenizer.decode(ids[:cut])).rstrip("\ufffd"), *pieces, stream.finish()]) == TEXT


def test_stream_leaves_special_tokens_and_broken_bytes_out(tokenizer: PreTrainedTokenizerFast) -> None:
    duck = ids_of(tokenizer, "🦆")[0].tolist()
    ids = ids_of(tokenizer, "duck")[0].tolist()
    stream = TextStream(tokenizer, ids, ())
    assert [stream.add(token) for token in (0, *ids, 1, *duck[:-1])][-1] == ""
    assert stream.finish() == ""


@pytest.mark.parametrize(("stop", "text"), [((), " na"), (("a",), " n"), ((" n!",), " na")])
def test_what_stands_before_half_a_character_in_the_end(stop: tuple[str, ...], text: str) -> None:
    """Merges do not keep to characters: one token is a space, two letters and the first byte of a third."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=261, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator([" naï", " naé", " naí"], trainer)
    tokenizer = fast(backend)
    token: Any = tokenizer.convert_tokens_to_ids("ĠnaÃ")
    stream = TextStream(tokenizer, ids_of(tokenizer, "x")[0].tolist(), stop)
    assert stream.add(token) == ""
    assert (stream.finish(), stream.stopped) == (text, text == " n")
    model: Any = tiny(tokenizer, "gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=64)
    with torch.no_grad():  # the token is all that it says
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(model.lm_head.weight[token])
        model.lm_head.weight[token] *= 10
    result = run(model, tokenizer, "x", max_new_tokens=1, stop=stop)
    assert (result.text, result.finish_reason) == (text, "stop" if text == " n" else "length")


def test_sentencepiece_spaces() -> None:
    """Decoders that strip the first space strip none in the middle."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁Once": 3, "▁upon": 4, "▁a": 5, "▁": 6, "time": 7}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = fast(backend)
    stream = TextStream(tokenizer, [1, 3], ())
    assert [stream.add(token) for token in (4, 5, 6, 7)] == [" upon", " a", " ", "time"]
    assert [TextStream(tokenizer, [1], ()).add(3)] == ["Once"]


@pytest.mark.parametrize("length", range(15, 34))
def test_bytes_of_characters_without_a_token(length: int) -> None:
    """One byte too many in front, and ByteFallback makes nothing readable of those behind it."""
    byte = {f"<0x{value:02X}>": value + 3 for value in range(256)}
    backend = Tokenizer(models.BPE(vocab={"<unk>": 0, "<s>": 1, "</s>": 2, **byte}, merges=[], unk_token="<unk>"))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    ids = [value + 3 for value in ("ភាសាខ្មែរ" * 2).encode()]
    stream = TextStream(fast(backend), ids[:length], ())
    pieces = streamed(stream, ids[length:])
    assert "".join(pieces) + stream.finish() == ("ភាសាខ្មែរ" * 2)[length // 3 :]


def test_a_special_token_may_be_what_ends_a_text(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny(tokenizer)
    options: dict[str, Any] = {"max_new_tokens": 40, "ignore_eos": True, "temperature": 5.0}
    tried = ((run(model, tokenizer, seed=seed, stop=("<s>",), **options), seed) for seed in range(99))
    found, seed = next((result, seed) for result, seed in tried if result.finish_reason != "length")
    whole = run(model, tokenizer, seed=seed, **options)
    assert found.finish_reason == "stop" and found.new_tokens < 40 == whole.new_tokens
    assert whole.text.startswith(found.text) and whole.text != found.text


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "prompt: expected at least one token, found none"),
        ("a b c", {"max_new_tokens": 60}, r"5 prompt tokens and 60 new ones do not fit a context of 64"),
        ("a b c" * 20, {"max_new_tokens": 5}, "prompt: 100 tokens leave no room in a context of 64"),
        ("a" * 64, {"max_new_tokens": None}, "prompt: 64 tokens leave no room in a context of 64"),
        ("a", {"max_new_tokens": 0}, "max_new_tokens: expected a whole number of at least 1, found 0"),
        ("a", {"max_new_tokens": 2.5}, r"max_new_tokens: expected a whole number of at least 1, found 2\.5"),
        ("a", {"temperature": -0.5}, r"temperature: expected at least 0, found -0\.5"),
        ("a", {"top_k": 0}, "top_k: expected a whole number of at least 1, found 0"),
        ("a", {"top_p": 1.5}, r"top_p: expected more than 0 and at most 1, found 1\.5"),
        ("a", {"repetition_penalty": 0.0}, r"repetition_penalty: expected more than 0, found 0\.0"),
        ("a", {"stop": ("x", "")}, "stop: expected texts that are not empty"),
        ("a", {"kv_cache": "int4"}, "kv_cache: expected one of fp32, bf16, int8, found 'int4'"),
        ("a", {"stop": "END"}, "stop: expected texts that are not empty, found 'END'"),
        ("a", {"stop": None}, "stop: expected texts that are not empty, found None"),
        ("a", {"stop": (3,)}, r"stop: expected texts that are not empty, found \(3,\)"),
        ("a", {"seed": 2**64}, "seed: expected a whole number of 64 bits, found 18446744073709551616"),
        ("a", {"seed": "0"}, "seed: expected a whole number of 64 bits, found '0'"),
    ],
)
def test_refuses(prompt: str, options: dict[str, Any], message: str, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(BitternError, match=message):
        run(tiny(tokenizer), tokenizer, prompt, **options)


BATCHED: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 5},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5, "num_hidden_layers": 7},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt_neox": {},
    "falcon": {"alibi": True},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4},
    "mamba": {"state_size": 4},
    "phi3": LONGROPE,
    "lfm2": {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
    "bamba": {
        "num_key_value_heads": 2,
        "attn_layer_indices": [1],
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_n_groups": 1,
        "mamba_d_state": 4,
        "mamba_chunk_size": 8,
    },
    "minimax": {"num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2},
    "roberta": {"is_decoder": True},
    "inkling_text": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "d_rel": 4,
        "rel_extent": 16,
        "unpadded_vocab_size": None,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 8,
        "sliding_window_size": 5,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "layer_types": ["hybrid_sliding", "hybrid"],
    },
    "rwkv": {"attention_hidden_size": 32},
    "openai-gpt": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
}
ALONE = ("mamba", "lfm2", "bamba", "minimax", "roberta", "inkling_text", "rwkv", "openai-gpt")


@pytest.mark.parametrize("family", BATCHED)
def test_a_batch_is_what_its_prompts_are_alone(family: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny(tokenizer, family, **BATCHED[family])
    prompts = [ids_of(tokenizer, text) for text in ("The brown", "d", "duck swam away. The na")]
    assert len({prompt.numel() for prompt in prompts}) == 3
    options = GenerationOptions(max_new_tokens=12, ignore_eos=True)
    alone = [generate(model, tokenizer, prompt, options, lambda text: None) for prompt in prompts]
    together = generate_batch(model, tokenizer, prompts, options)
    assert can_batch(model) == (family not in ALONE)
    for one, other in zip(alone, together, strict=True):
        assert (other.token_ids, other.text, other.prompt_tokens) == (one.token_ids, one.text, one.prompt_tokens)


@pytest.mark.parametrize("family", BATCHED)
def test_every_step_sees_what_came_before_it(family: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Its logits are those of the model on all tokens so far, without a cache."""
    model = tiny(tokenizer, family, **BATCHED[family])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.3)  # roundings would grow
        ids = ids_of(tokenizer, "duck swam away. The naïve café")[:, :18]
        prompt, *others = ids[0, :8].tolist(), *ids[0, 8:].tolist()
        forward = make_step(model, [prompt], [len(others)], None)
        found = [forward([prompt])[0], *(forward([[token]])[0] for token in others)]
        for end, logits in enumerate(found, len(prompt)):
            expected = model(ids[:, :end], use_cache=False).logits[0, -1]
            assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()


def test_models_without_a_cache(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    for family, what in (("openai-gpt", "; a openai-gpt keeps nothing: every new token"), ("rwkv", None)):
        tiny(tokenizer, family, **BATCHED[family]).save_pretrained(tmp_path / family)
        model = bittern.load(tmp_path / family, device="cpu")
        kernels = vars(model)["kernels"]
        assert what in kernels if what is not None else "keeps nothing" not in kernels
        for kept in ("bf16", "int8"):
            with pytest.raises(BitternError, match=f"^kv_cache: expected a model with .* in {kept}, found {family}$"):
                run(model, tokenizer, kv_cache=kept)
        assert run(model, tokenizer, kv_cache="fp32").token_ids == run(model, tokenizer).token_ids


def test_minimax_writes_text_of_its_own(tokenizer: PreTrainedTokenizerFast) -> None:
    written = write_on(tiny(tokenizer, "minimax", **BATCHED["minimax"]), [ids_of(tokenizer, "The brown")], 20, 0)
    assert written.shape == (1, 20)


def test_the_head_gets_last_positions_that_lie_side_by_side(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else torch copies the head for every row, in bfloat16: 5 GB for 256 rows of stories15m."""
    monkeypatch.setattr(sampling, "_rounded", lambda model: None)
    model = tiny(tokenizer)
    shapes: list[tuple[int, ...]] = []

    def see(_: torch.nn.Module, args: tuple[torch.Tensor]) -> None:
        assert args[0].is_contiguous()
        shapes.append(tuple(args[0].shape))

    model.lm_head.register_forward_pre_hook(see)
    prompts = [ids_of(tokenizer, text) for text in ("The brown", "d")]
    generate_batch(model, tokenizer, prompts, GenerationOptions(max_new_tokens=3, ignore_eos=True))
    write_on(model, [torch.stack([prompts[0], prompts[0]]).view(2, -1)], prompts[0].numel() + 2, 0)
    assert shapes == [(2, 1, 32)] * 5


def test_sequences_of_a_batch_end_by_themselves(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny(tokenizer)
    prompts = [ids_of(tokenizer, text) for text in ("The brown", "d", "duck swam away")]
    options = GenerationOptions(max_new_tokens=20, ignore_eos=True)
    whole = generate_batch(model, tokenizer, prompts, options)
    stop = whole[1].text[3:5]
    ended = generate_batch(model, tokenizer, prompts, replace(options, stop=(stop,)))
    assert ended[1].finish_reason == "stop" and ended[1].new_tokens < 20
    for one, other in zip(ended, whole, strict=True):
        assert one.text == other.text.partition(stop)[0]
    sampled = replace(options, temperature=1.2, seed=5, repetition_penalty=1.3)
    alone = [generate(model, tokenizer, prompt, sampled, lambda text: None).token_ids for prompt in prompts]
    assert [result.token_ids for result in generate_batch(model, tokenizer, prompts, sampled)] == alone
    assert generate_batch(model, tokenizer, [], options) == []
    filled = generate_batch(model, tokenizer, prompts, replace(options, max_new_tokens=None))
    assert [result.prompt_tokens + result.new_tokens for result in filled] == [64] * 3


@pytest.mark.skipif(not native.available(), reason=f"native runtime: {native.why_not()}")
@pytest.mark.parametrize("kv_cache", [None, "bf16", "int8"])
def test_the_native_decoder_says_what_the_layers_say(
    kv_cache: str | None, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny(tokenizer, num_key_value_heads=2).save_pretrained(tmp_path)
    prompts = [ids_of(tokenizer, text) for text in ("The brown", "d", "duck swam away. The na")]
    options = GenerationOptions(max_new_tokens=12, ignore_eos=True, kv_cache=kv_cache)
    model, layers = (bittern.load(tmp_path, device="cpu", decoder=decoder) for decoder in (True, False))
    assert native_decoder(model) is not None and native_decoder(layers) is None
    monkeypatch.setattr(model, "forward", None)  # it is not called
    alone = [generate(model, tokenizer, prompt, options, lambda text: None).token_ids for prompt in prompts]
    assert [result.token_ids for result in generate_batch(model, tokenizer, prompts, options)] == alone
    filling = replace(options, max_new_tokens=None)  # the shortest prompt has the most room
    filled = generate_batch(model, tokenizer, prompts, filling)
    assert [result.prompt_tokens + result.new_tokens for result in filled] == [64] * 3
    if kv_cache is None:
        assert [
            generate(layers, tokenizer, prompt, options, lambda text: None).token_ids for prompt in prompts
        ] == alone
    assert native_decoder(cast(Any, model).bfloat16()) is None


@pytest.mark.parametrize("decoder", [False, True])
def test_what_longrope_turned_otherwise_is_computed_anew(
    decoder: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Every step says what the model says of the whole sequence, before the turn and behind it."""
    if decoder and not native.available():
        pytest.skip(f"native runtime: {native.why_not()}")
    tiny(tokenizer, **LONGROPE).save_pretrained(tmp_path)
    model = bittern.load(tmp_path, device="cpu", decoder=decoder)
    assert (native_decoder(model) is not None) == decoder
    ids = torch.randint(len(tokenizer), (1, 20), generator=torch.Generator().manual_seed(2))
    prompt, *others = ids[0, :10].tolist(), *ids[0, 10:].tolist()
    forward = make_step(model, [prompt], [10], None)
    with torch.no_grad():
        found = [forward([prompt])[0], *(forward([[token]])[0] for token in others)]
        for end, logits in enumerate(found, 10):
            expected = model(ids[:, :end], use_cache=False).logits[0, -1]
            torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)


def test_room_is_made_when_it_is_needed(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    actual = cache.new_cache

    def watched(config: Any, capacity: int, stored: str | None) -> Any:
        made.append(capacity)
        return actual(config, capacity, stored)

    monkeypatch.setattr(step, "new_cache", watched)
    monkeypatch.setattr(step, "_AHEAD", 4)
    result = run(tiny(tokenizer), tokenizer, max_new_tokens=None)
    assert made == [result.prompt_tokens + 4] and result.prompt_tokens + result.new_tokens == 64


def test_a_prompt_of_a_batch_that_does_not_fit(tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = [ids_of(tokenizer, "d"), ids_of(tokenizer, "a b c" * 12)]
    with pytest.raises(BitternError, match="do not fit a context of 64"):
        generate_batch(tiny(tokenizer), tokenizer, prompts, GenerationOptions(max_new_tokens=30))


@pytest.mark.parametrize(("kv_cache", "bound"), [("bf16", 2**-8), ("int8", 1 / 127)])
def test_smaller_caches(kv_cache: str, bound: float, tokenizer: PreTrainedTokenizerFast) -> None:
    """The logits that a step sees are off by about the rounding of keys and values, and by no more than it."""
    model = tiny(tokenizer, num_key_value_heads=2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.5)
    prompt = ids_of(tokenizer, "duck swam away")[0].tolist()
    found = {}
    for stored in (None, "fp32", kv_cache):
        forward = make_step(model, [prompt], [30], stored)
        with torch.no_grad():
            found[stored] = torch.stack([forward([prompt])[0], *(forward([[token]])[0] for token in (5, 9, 200))])
    assert torch.equal(found["fp32"], found[None])
    error = (found[kv_cache] - found[None]).norm() / found[None].norm()
    assert 1e-6 < error < 8 * bound
    result = run(model, tokenizer, kv_cache=kv_cache)
    assert result.new_tokens == 24


def test_fills_the_context_when_no_number_is_given(tokenizer: PreTrainedTokenizerFast) -> None:
    result = run(tiny(tokenizer), tokenizer, max_new_tokens=None)
    assert result.prompt_tokens + result.new_tokens == 64
    with pytest.raises(BitternError, match="a bloom model has no context limit, set a number"):
        run(tiny(tokenizer, "bloom", n_layer=2, n_head=4, max_position_embeddings=None), tokenizer, max_new_tokens=None)


def test_refuses_another_models_tokenizer_and_nan(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(BitternError, match="does not fit the model"):
        run(tiny(tokenizer, vocab_size=20), tokenizer)
    model = tiny(tokenizer)
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(torch.nan)  # type: ignore[operator]
    with pytest.raises(BitternError, match="logits: the model computed NaN"):
        run(model, tokenizer)
    with pytest.raises(BitternError, match="logits: the model computed inf"):
        run(tiny(tokenizer), tokenizer, repetition_penalty=1e-39)
    two = ids_of(tokenizer, "The brown").expand(2, -1)
    with pytest.raises(BitternError, match="input_ids: expected one prompt, found shape"):
        generate(tiny(tokenizer), tokenizer, two, GenerationOptions(max_new_tokens=1), print)
    with pytest.raises(BitternError, match="input_ids: expected one prompt, found shape"):
        generate_batch(tiny(tokenizer), tokenizer, [two], GenerationOptions(max_new_tokens=1))
    with pytest.raises(BitternError, match="kv_cache: fp32 is for a model that computes in fp32"):
        run(tiny(tokenizer).bfloat16(), tokenizer, kv_cache="fp32")


@pytest.mark.parametrize("temperature", [1e-30, 1e-46, 1e-300])
def test_next_to_no_temperature_is_greedy(temperature: float, tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny(tokenizer)
    assert run(model, tokenizer, temperature=temperature).token_ids == run(model, tokenizer).token_ids


def test_chat_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    with pytest.raises(BitternError, match="the tokenizer has no chat template"):
        chat_prompt(tokenizer, messages)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<s>assistant:{% endif %}"
    )
    try:
        ids = chat_prompt(tokenizer, messages)
        assert tokenizer.decode(ids[0].tolist()) == "<s>user: hi</s><s>assistant: yes</s><s>assistant:"
        assert ids.shape[0] == 1
        with pytest.raises(BitternError, match="its chat template refuses these messages: TemplateError: no system"):
            chat_prompt(tokenizer, [{"role": "system", "content": "x"}])
        for wrong, what in (("messages[0].content + 1", "TypeError"), ("1 / 0", "ZeroDivisionError")):
            tokenizer.chat_template = "{{ " + wrong + " }}"
            with pytest.raises(BitternError, match=f"its chat template refuses these messages: {what}: "):
                chat_prompt(tokenizer, messages)
    finally:
        tokenizer.chat_template = None


def test_a_real_model_tells_a_story(shared: Path) -> None:
    folder = shared / "data" / "models" / "stories15m"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not at hand")
    model = bittern.load(folder, device="cpu")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    result = run(model, tokenizer, "Once upon a time, there was a little girl named", max_new_tokens=40)
    assert result.text.startswith(" Lily. She loved to play")
    whole = tokenizer.decode(
        tokenizer("Once upon a time, there was a little girl named")["input_ids"] + [*result.token_ids]
    )
    assert whole.endswith("named" + result.text)


@pytest.mark.gpu
def test_cuda_says_what_the_cpu_says(shared: Path) -> None:
    folder = shared / "data" / "models" / "stories15m"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not at hand")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    texts = {
        device: run(bittern.load(folder, device=device, dtype=torch.float32), tokenizer, "Once upon a time").text
        for device in ("cpu", "cuda")
    }
    assert texts["cpu"] == texts["cuda"]
