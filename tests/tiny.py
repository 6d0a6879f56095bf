"""Tiny checkpoints for the tests: a tokenizer trained on a few words, and random models that use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

WORDS = ["stone", "river", "amber", "quiet", "lantern", "seven", "harbour", "moss", "copper", "winter"]
LLAMA = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def write_text(path: Path, words: int = 4000) -> Path:
    """A file of ``words`` random words."""
    picks = torch.randint(len(WORDS), (words,), generator=torch.Generator().manual_seed(0)).tolist()
    path.write_text(" ".join(WORDS[i] for i in picks), encoding="utf-8")
    return path


def make_tokenizer(text: Path) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer trained on a file; it knows every byte."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "</s>", "<pad>", "<unk>"]
    tokenizer.train([str(text)], trainers.BpeTrainer(vocab_size=200, special_tokens=special))
    make: Any = PreTrainedTokenizerFast
    made: PreTrainedTokenizerFast = make(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    return made


def random_model(model_type: str = "llama", seed: int = 0, **config: Any) -> PreTrainedModel:
    """A random model in fp32 whose norms are not all ones."""
    made = AutoConfig.for_model(model_type, **{**LLAMA, **config})
    torch.manual_seed(seed)
    build: Any = AutoModelForCausalLM.from_config
    model: PreTrainedModel = build(made)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.train(False)
    return model


def save(
    model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerFast | None = None, **options: Any
) -> Path:
    """A model, and its tokenizer, as a checkpoint folder."""
    model.save_pretrained(folder, **options)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def read_model(folder: Path) -> PreTrainedModel:
    """What transformers makes of a folder, in fp32."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.train(False)
    return model
