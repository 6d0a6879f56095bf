"""GGUF files of llama.cpp's own converter: what bittern reads of them, and how the ones that it writes differ.

python benchmarks/gguf_files.py LLAMA_CPP

LLAMA_CPP is a checkout of llama.cpp, whose converter needs nothing that bittern's environment lacks (with its extra
"gguf"). Tiny random models of every architecture that transformers reads from GGUF are converted in fp32. Read: the
largest difference of a logit between the model and ``bittern.load`` of the file, relative to the largest logit, or why
bittern refused it. Written, where bittern writes the architecture: tensors that are other than the converter's, and
keys of the model that say other than its own. The exit status is 1 when logits or tensors differ.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CONVERTER = Path(__file__).resolve().parent / "peers" / "llamacpp_convert.py"
TOLERANCE = 1e-5
TOKENS = 70  # in the tokenizer; of Gemma the converter drops the rows beyond
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
WIDE = {"initializer_range": 0.2}  # so that attention is no mere mean
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
PART = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8, "vocab_size": TOKENS}
FALCON = {"alibi": False, "bias": False, "ffn_hidden_size": 256}
FULL = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}
SLIDING = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, scaled RoPE of Llama 3": (
        "llama",
        {"rope_parameters": LLAMA3 | {"low_freq_factor": 1.0, "high_freq_factor": 4.0}},
    ),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, wide heads": ("llama", {"head_dim": 32}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mixtral": ("mixtral", {**LOCAL, "sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2, YaRN": ("qwen2", {"rope_parameters": YARN}),
    "qwen2_moe": ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 64}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "norm_topk_prob": True, "head_dim": 16}),
    "gemma2": ("gemma2", GEMMA),
    "gemma3_text": ("gemma3_text", {**GEMMA, "num_hidden_layers": 6}),
    "gemma3_text, scaled": ("gemma3_text", {**GEMMA, "num_hidden_layers": 6, "rope_parameters": FULL | SLIDING}),
    "phi3": ("phi3", {"sliding_window": None}),
    "phi3, window": ("phi3", {"sliding_window": 8}),
    "starcoder2": ("starcoder2", {"sliding_window": None}),
    "stablelm": ("stablelm", {}),
    "stablelm, parallel": ("stablelm", {"use_qkv_bias": True, "use_parallel_residual": True, "rope_parameters": PART}),
    "nemotron": ("nemotron", {}),
    "gpt2": ("gpt2", {"n_ctx": 64}),
    "bloom": ("bloom", {}),
    "falcon": ("falcon", {**FALCON, "new_decoder_architecture": False, "num_kv_heads": 1}),
    "falcon, grouped": ("falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "mamba": ("mamba", {"state_size": 8, "intermediate_size": 128}),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "minimax_m2": ("minimax_m2", {**LOCAL, "head_dim": 16, "rotary_dim": 8}),
    "gpt_oss": ("gpt_oss", {**LOCAL, "head_dim": 16, "sliding_window": 8}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, metavar="LLAMA_CPP", help="with convert_hf_to_gguf.py")
    parser.add_argument("--only", nargs="*", default=list(MODELS), help="some of the models")
    options = parser.parse_args()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "gguf"))
    print(f"{versions}\n\n| model | bittern reads | bittern writes |\n|---|---|---|")
    failed = False
    for name in options.only:
        with tempfile.TemporaryDirectory() as work:
            read, written = compare(name, options.checkout, Path(work))
        failed |= read.startswith("WRONG") or written.startswith("WRONG")
        print(f"| {name} | {read} | {written} |", flush=True)
    sys.exit(failed)


def compare(name: str, checkout: Path, work: Path) -> tuple[str, str]:
    """What is to be said of a model: of its file read, and of the one that bittern writes."""
    kind, changes = MODELS[name]
    model = random_model(kind, changes)
    folder, theirs, ours = work / "model", work / "theirs.gguf", work / "ours.gguf"
    save(model, folder)
    command = [sys.executable, str(CONVERTER), str(checkout), str(folder), str(theirs)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        return f"the converter failed: {done.stderr.strip().splitlines()[-1]}", ""
    return reads(model, theirs), writes(kind, folder, theirs, ours)


def random_model(kind: str, changes: dict[str, Any]) -> Any:
    """A tiny model in fp32 with no norm of ones and no bias of zeros."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    make: Any = AutoModelForCausalLM.from_config
    model = make(AutoConfig.for_model(kind, **{**SIZES, **WIDE, **changes}))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def save(model: Any, folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "</s>", "<pad>"]
    words = ["stone river amber quiet lantern seven harbour moss copper winter"]
    tokenizer.train_from_iterator(
        words, trainers.BpeTrainer(vocab_size=TOKENS, special_tokens=special, show_progress=False)
    )
    make: Any = PreTrainedTokenizerFast
    make(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>").save_pretrained(folder)
    model.save_pretrained(folder)


def reads(model: Any, path: Path) -> str:
    """How far the logits of the file are from the model's, or why it was refused."""
    import torch

    import bittern
    from bittern.errors import BitternError

    ids = torch.arange(4, 40).view(2, 18)
    try:
        found = bittern.load(path, device="cpu", dtype=torch.float32, kernels="torch")
    except BitternError as error:
        return f"no: {str(error).removeprefix(f'{path}: ')}"
    with torch.inference_mode():
        expected = model(ids).logits
        apart = float((found(ids).logits - expected).abs().max() / expected.abs().max())
    return f"{'' if apart <= TOLERANCE else 'WRONG: '}{apart:.1e}"


def writes(kind: str, folder: Path, theirs: Path, ours: Path) -> str:
    """What bittern's file has otherwise, or why it writes none."""
    import numpy as np
    from gguf import GGUFReader

    import bittern
    from bittern.errors import BitternError

    try:
        with contextlib.redirect_stdout(sys.stderr):
            bittern.convert(folder, ours, format="gguf", dtype="fp32")
    except BitternError as error:
        return "no" if f"found {kind}" in str(error) else f"no: {error}"
    first, second = GGUFReader(theirs), GGUFReader(ours)
    tensors = [{tensor.name: tensor.data for tensor in reader.tensors} for reader in (first, second)]
    same = tensors[0].keys() == tensors[1].keys()
    if not same or not all(np.array_equal(data, tensors[1][name]) for name, data in tensors[0].items()):
        return "WRONG: other tensors"
    fields = [{key: field.contents() for key, field in reader.fields.items()} for reader in (first, second)]
    other = sorted(key for key in fields[0].keys() & fields[1].keys() if fields[0][key] != fields[1][key])
    other = [key for key in other if not key.startswith(("GGUF.", "general.", "tokenizer."))]
    return "the same tensors and keys" if not other else f"the same tensors, other {', '.join(other)}"


if __name__ == "__main__":
    main()
