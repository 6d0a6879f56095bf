"""Building on meta, finding blocks and weights, and reading them from unusual checkpoints."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bittern import model as live
from bittern.checkpoint import open_checkpoint
from bittern.errors import BitternError
from bittern.fit import unexpected_tensors
from tests import tiny

MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
IDS = torch.randint(4, 200, (2, 12), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("mixtral", MOE),
        ("granitemoe", MOE),
        ("gptj", {"rotary_dim": 8}),
        ("gemma3_text", {"head_dim": 16}),
    ],
)
def test_a_checkpoint_read_piece_by_piece_is_the_model(model_type: str, config: dict[str, Any], tmp_path: Path) -> None:
    original = tiny.random_model(model_type, **config)
    tiny.save(original, tmp_path, max_shard_size="40KB")
    with open_checkpoint(tmp_path) as checkpoint:
        model = live.load_dense(checkpoint)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, original(IDS).logits, rtol=1e-5, atol=1e-5)


def test_build_allocates_no_parameter() -> None:
    config = tiny.random_model().config.to_dict()
    model = live.build({**config, "hidden_size": 4096, "intermediate_size": 16384})
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())


def test_live_experts_are_checkpoint_layers() -> None:
    model = tiny.random_model("mixtral", **MOE)
    sources = live.weight_map(live.build(model.config.to_dict()), _stored_names(model))
    found = live.matrices(model, "model.layers.1", sources)
    assert [m.parts for m in found if m.expert == 2] == [
        (
            ("model.layers.1.block_sparse_moe.experts.2.w1", 0, 96),
            ("model.layers.1.block_sparse_moe.experts.2.w3", 96, 192),
        ),
        (("model.layers.1.block_sparse_moe.experts.2.w2", 0, 64),),
    ]
    gate = next(m for m in found if m.expert == 2)
    assert torch.equal(live.get_weight(model, gate), model.get_parameter(gate.parameter)[2])
    assert not any("gate.weight" in m.parameter for m in found), "the router stays as it is"


def _stored_names(model: Any) -> list[str]:
    from transformers.core_model_loading import revert_weight_conversion

    return list(revert_weight_conversion(model, model.state_dict()))


def test_a_fused_tensor_names_its_experts_by_number() -> None:
    model = tiny.random_model("granitemoe", **MOE)
    found = live.matrices(model, "model.layers.0", live.weight_map(model, _stored_names(model)))
    assert ("model.layers.0.block_sparse_moe.input_linear.3", 0, 192) in [m.parts[0] for m in found]


def test_a_checkpoint_with_live_names_is_understood(tmp_path: Path) -> None:
    original = tiny.random_model("mixtral", **MOE)
    tiny.save(original, tmp_path)
    save_file(dict(original.state_dict()), tmp_path / "model.safetensors", {"format": "pt"})
    with open_checkpoint(tmp_path) as checkpoint:
        model = live.load_dense(checkpoint)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, original(IDS).logits, rtol=1e-5, atol=1e-5)


def test_what_no_checkpoint_of_the_kind_holds_is_unexpected(tmp_path: Path) -> None:
    original = tiny.random_model(tie_word_embeddings=True)
    tiny.save(original, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8), "model.extra": torch.ones(3)}
    model = live.build(original.config.to_dict())
    sources = live.weight_map(model, tensors)
    assert unexpected_tensors(model, sources, tensors | head | old) == ["model.extra"]


def test_unknown_architectures_are_refused() -> None:
    with pytest.raises(BitternError, match="model_type 'nonesuch'"):
        live.build({"model_type": "nonesuch"})
    with pytest.raises(BitternError, match="t5 is no causal language model"):
        live.build({"model_type": "t5"})


# Of what transformers takes for causal language models, those whose config has is_decoder.
DECODERS = (
    *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "gpt_neox", "gpt_neox_japanese", "marian", "mbart"),
    *("mvp", "pegasus", "plbart", "prophetnet", "trocr"),
)
SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "encoder_layers": 1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "embedding_size": 32,
    "input_embedding_size": 32,
    "output_embedding_size": 32,
    "default_language": "en_XX",
    "num_decoder_layers": 2,
    "num_decoder_attention_heads": 4,
    "pronunciation_vocab_size": 9,
    "shape_vocab_size": 9,
}


@pytest.mark.parametrize("declared", [False, True])
@pytest.mark.parametrize("model_type", [*live._ENCODERS, *DECODERS])
def test_what_sees_the_tokens_behind_is_refused(model_type: str, declared: bool) -> None:
    made: Any = CONFIG_MAPPING[model_type]
    known = {field.name for field in dataclasses.fields(made)} | set(made.attribute_map)
    sizes = {name: value for name, value in SMALL.items() if name in known}
    config = made(**sizes, is_decoder=declared)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)  # so that attention is not nearly uniform
        ids = torch.randint(5, 90, (1, 12))
        one, other = (model(ids.index_fill(1, torch.tensor([11]), last), use_cache=False).logits for last in (7, 8))
    looks = bool((one - other)[0, :11].abs().max() > 1e-4 * one.abs().max())
    assert looks == (model_type in live._ENCODERS and not declared)
    stored = {**config.to_dict(), "is_decoder": declared}
    if looks:
        with pytest.raises(BitternError, match=rf"expected a decoder, found an encoder \({model_type}, is_decoder f"):
            live.build(stored)
        with pytest.raises(BitternError, match="expected a decoder"):
            live.build({name: value for name, value in stored.items() if name != "is_decoder"})
    else:
        live.build(stored)


def test_no_family_that_may_be_an_encoder_is_overlooked() -> None:
    declaring = {name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if hasattr(CONFIG_MAPPING[name], "is_decoder")}
    # transformers refuses a Reformer that is none.
    assert declaring == {*live._ENCODERS, *DECODERS, "reformer"}


def test_cuda_is_refused_where_there_is_none() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(BitternError, match="no CUDA device"):
        live.pick_device("cuda")
    assert live.pick_device("auto").type == "cpu"
