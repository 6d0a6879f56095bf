"""Trains the embedded checkpoint: ``python -m bittern.demo.train -o DIR --steps N --seed 0``.

A small multi-head Llama and its tokenizer, both from nothing but :mod:`bittern.demo.corpus`. The
folder ``bittern/demo/model`` was made by this script with its default options, in a quarter of an hour on one
shared CPU thread.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from bittern.demo.corpus import documents, text
from bittern.tokenizer import encode

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS = "<s>", "</s>"
TOKENIZER_SEED = 1_000_000
WARM_UP_STEPS = 100
ANSWER_WEIGHT = 4.0  # of a token's loss; answers are few and all else is partly noise

CARD = """# The demo's checkpoint

A small multi-head Llama in fp32, trained from nothing by bittern's own script `bittern/demo/train.py` on
text that `bittern/demo/corpus.py` generates: short stories, facts and sums about an invented world. It
knows nothing else. It is here so that `bittern demo` can quantize a real language model without a
network. Licence: Apache-2.0, as bittern itself.
"""


def train_tokenizer(vocab_size: int = 1280, characters: int = 2_000_000) -> PreTrainedTokenizerFast:
    """Byte-level BPE of ``vocab_size`` tokens from ``characters`` of corpus; puts ``<s>`` in front as Llama's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text(TOKENIZER_SEED, characters).split("\n\n"), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)  # type: ignore[no-untyped-call]


def model_config(tokenizer: PreTrainedTokenizerFast, hidden_size: int = 256, layers: int = 4) -> LlamaConfig:
    """The default is the embedded checkpoint: 3 million parameters, as many key-value heads as heads."""
    from transformers import LlamaConfig

    heads = hidden_size // 64
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def batches(
    tokenizer: PreTrainedTokenizerFast, seed: int, batch_size: int, sequence_length: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless pairs of token ids, int64, and whether each stands in an answer, bool: (batch_size, sequence_length).

    Pages of one to four documents, each from ``<s>`` to ``</s>``, lie end to end.
    """
    source, ids, answers = documents(seed), list[int](), list[bool]()
    wanted = batch_size * sequence_length
    before, after = encode(tokenizer, "Answer:"), encode(tokenizer, "\n")[0]
    page = 0
    while True:
        while len(ids) < wanted:
            joined = "\n\n".join(next(source) for _ in range(1 + page % 4))
            inside = False
            for token in [*tokenizer(joined)["input_ids"], tokenizer.eos_token_id]:
                inside = (inside and token != after) or ids[-len(before) :] == before
                ids.append(token)
                answers.append(inside)
            page += 1
        shape = (batch_size, sequence_length)
        yield torch.tensor(ids[:wanted]).view(shape), torch.tensor(answers[:wanted]).view(shape)
        ids, answers = ids[wanted:], answers[wanted:]


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then a cosine down to a hundredth of ``peak``."""
    warm_up = min(WARM_UP_STEPS, steps)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(
    output: Path,
    *,
    steps: int = 1300,
    seed: int = 0,
    batch_size: int = 8,
    sequence_length: int = 256,
    peak: float = 3e-3,
    hidden_size: int = 256,
    layers: int = 4,
    vocab_size: int = 1280,
    report: Callable[[str], None] = print,
) -> float:
    """Train and write a complete model folder.

    Args:
        output: the folder; made when missing.
        steps: optimizer steps of ``batch_size`` sequences of ``sequence_length`` tokens.
        seed: of the weights and of the text.
        peak: the highest learning rate.
        report: gets a line now and then.

    Returns:
        The mean loss of the last fifty steps, in nats per token.
    """
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    tokenizer = train_tokenizer(vocab_size)
    model = LlamaForCausalLM(model_config(tokenizer, hidden_size, layers)).train()
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    losses: list[float] = []
    started = time.perf_counter()
    for step, (ids, answers) in zip(range(steps), batches(tokenizer, seed, batch_size, sequence_length), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        logits = model(ids).logits[:, :-1]
        nll = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        weights = torch.where(answers[:, 1:].flatten(), ANSWER_WEIGHT, 1.0)
        loss = (nll * weights).sum() / weights.sum()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(nll.mean().item())
        if step % 50 == 49 or step == steps - 1:
            recent = losses[-50:]
            seconds = time.perf_counter() - started
            report(f"step {step + 1}/{steps}  loss {sum(recent) / len(recent):.4f}  {seconds:.0f} s")
    _save(model.eval(), tokenizer, output)
    return sum(losses[-50:]) / len(losses[-50:])


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    from transformers import GenerationConfig

    output.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id
    )
    model.save_pretrained(output)
    (output / "model.safetensors").chmod(0o644)
    # transformers 5 would name its own new class here, which no other loader knows
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS}
    (output / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    tokenizer.backend_tokenizer.save(str(output / "tokenizer.json"))
    (output / "README.md").write_text(CARD, encoding="utf-8")


def main() -> None:
    """The command line of the script."""
    parser = argparse.ArgumentParser(description="Train the demo's checkpoint.")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(
        arguments.output,
        steps=arguments.steps,
        seed=arguments.seed,
        report=lambda line: print(line, flush=True),
    )


if __name__ == "__main__":
    main()
