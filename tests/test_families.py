"""Every architecture that docs/architectures.md lists, as a tiny random model, through the whole job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

import bittern
from bittern.formats.gptq import names, packed_layers, read_config, unpack
from bittern.formats.scheme import PackedLayer
from tests import tiny

GPT = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64}
GROUPED = {"num_key_value_heads": 2}
WIDE = {**GROUPED, "head_dim": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "mistral": GROUPED,
    "qwen2": GROUPED,
    "qwen3": WIDE,
    "gemma2": WIDE,
    "gemma3_text": WIDE,
    "phi": {},
    "phi3": GROUPED,
    "gpt2": GPT,
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "gpt_neox": {},
    "bloom": {"n_layer": 3, "n_head": 4},
    "gptj": {**GPT, "rotary_dim": 8},
    "falcon": {},
    "mixtral": {**GROUPED, "num_local_experts": 4},
    "qwen3_moe": {**WIDE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "gpt_bigcode": GPT,
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 3, "max_seq_len": 64},
    "stablelm": GROUPED,
    "cohere": GROUPED,
    "olmoe": {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 32,
        "q_lora_rank": 32,
        "kv_lora_rank": 24,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "first_k_dense_replace": 1,
    },
    "gpt_oss": {**WIDE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "mamba": {"state_size": 4},
    "lfm2": GROUPED,
    "granitemoe": {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "nemotron": GROUPED,
    "olmo2": GROUPED,
    "exaone4": GROUPED,
    "bamba": {
        **GROUPED,
        "attn_layer_indices": [1],
        "mamba_d_state": 8,
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
        "mamba_n_groups": 1,
    },
}


def dequantized(artifact: Path, source: Path, folder: Path) -> Path:
    """The artifact as a plain checkpoint, made without bittern's loader: transformers is the oracle."""
    stored = load_file(artifact / "model.safetensors")
    originals = load_file(source / "model.safetensors")
    config = json.loads((artifact / "config.json").read_text())
    scheme = read_config(config.pop("quantization_config"))
    plain: dict[str, torch.Tensor] = {}
    packed = packed_layers(stored)
    for layer in packed:
        tensors = {suffix: stored.pop(name) for suffix, name in names(layer).items()}
        shape = (tensors["qweight"].shape[1], tensors["g_idx"].numel())
        weight = unpack(tensors, PackedLayer(*shape, scheme.default), scheme).dequantize()
        original = originals.get(f"{layer}.weight")
        if original is not None:
            # GPT-2's Conv1D stores (in, out), which a square matrix does not show.
            plain[f"{layer}.weight"] = weight.T if config["model_type"] == "gpt2" else weight
            continue
        fused, _, expert = layer.rpartition(".")
        name = fused if fused in originals else f"{fused}.weight"
        target = plain.setdefault(name, torch.zeros_like(originals[name]))
        target[int(expert)] = weight if target.shape[1:] == weight.shape else weight.T
    plain.update({name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in stored.items()})
    folder.mkdir()
    save_file(
        {name: tensor.contiguous() for name, tensor in plain.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    assert set(plain) == set(originals)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_family_computes_what_its_codes_say(
    family: str, tmp_path: Path, text: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny.random_model(family, num_hidden_layers=3, **({"num_key_value_heads": 4} | FAMILIES[family]))
    source = tiny.save(model, tmp_path / "source", tokenizer)
    manifest = bittern.quantize(
        source, tmp_path / "out", bits=4, group_size=32, dataset=str(text), nsamples=6, seqlen=32, batch_size=4, seed=1
    )
    plain = dequantized(tmp_path / "out", source, tmp_path / "plain")
    oracle = tiny.read_model(plain)
    model = bittern.load(tmp_path / "out", device="cpu")
    ids = torch.randint(4, 200, (2, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected, found = oracle(ids).logits, model(ids).logits
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-3)
    # What convert writes has the very tensors of the oracle, under the architecture's own names and arrangement.
    bittern.convert(tmp_path / "out", tmp_path / "floats", format="safetensors", dtype="fp32")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "floats", plain))
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    # The comparison would be empty if nothing had been packed, or if packing had changed nothing.
    assert len(manifest["layers"]) >= 6
    assert all(record["tokens"] > 0 or record["fallback"] for record in manifest["layers"])
    original = tiny.read_model(source)
    with torch.no_grad():
        assert (original(ids).logits - expected).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["olmo2", "exaone4", "opt"])
def test_without_a_norm_in_front_fast_is_no_worse_than_plain(
    family: str, tmp_path: Path, text: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Their first matrices read the block's input itself, which its output takes the place of."""
    options = FAMILIES[family] | ({"do_layer_norm_before": False} if family == "opt" else {})
    source = tiny.save(tiny.random_model(family, **options), tmp_path / "source", tokenizer)
    ids = torch.randint(4, 200, (4, 24), generator=torch.Generator().manual_seed(3))
    errors = {}
    with torch.no_grad():
        expected = tiny.read_model(source)(ids).logits
        for effort in ("plain", "fast"):
            out = tmp_path / effort
            options = {"bits": 8, "group_size": 32, "nsamples": 16, "seqlen": 32, "dtype": "fp32"}
            bittern.quantize(source, out, effort=effort, dataset=str(text), **options)
            errors[effort] = float((bittern.load(out, device="cpu", kernels="torch")(ids).logits - expected).norm())
    assert errors["fast"] < 1.5 * errors["plain"]


def test_weights_in_no_linear_layer_are_told(tmp_path: Path, text: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    options = {"num_local_experts": 4, "intermediate_size_mlp": 96, "head_dim": 16}
    source = tiny.save(tiny.random_model("llama4_text", **options), tmp_path / "source", tokenizer)
    manifest = bittern.quantize(source, tmp_path / "out", bits=8, group_size=32, method="rtn")
    (note,) = [note for note in manifest["notes"] if "in no linear layer" in note]
    assert note.endswith("experts.gate_up_proj)") and "stay in 16 bits" in note
    llama = tiny.save(tiny.random_model(), tmp_path / "llama", tokenizer)
    notes = bittern.quantize(llama, tmp_path / "other", bits=8, group_size=32, method="rtn")["notes"]
    assert not any("in no linear layer" in note for note in notes)
