"""Does llama.cpp say what bittern says? Greedy text and perplexity of an artifact and of the GGUF file made of it.

python benchmarks/greedy.py ARTIFACT --text FILE

Both are given the same token ids: ten prompts, 32 new tokens each, and the first windows of a text. llama.cpp opens the
file twice. As it is: its kernels for packed blocks round activations to 8 bits, which moves the logits of a small model
by more than what separates its two likeliest tokens. And with the blocks dequantized by llama.cpp itself into a file of
F32: the same weights without that rounding. The second has to say the same with a perplexity within --tolerance, else
the exit status is 1; the first stands beside it. Where texts part, the margin is how much bittern's own logits prefer
its token to llama.cpp's.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import peers

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

PROMPTS = (
    "The capital of France is",
    "Once upon a time, there was a little girl who",
    "def fibonacci(n):\n",
    "Water boils at a temperature of",
    "The three primary colours are",
    "To make a cup of tea, first",
    "In 1969, the first man",
    "The quick brown fox",
    "A triangle has three sides, and a square has",
    "My favourite season is autumn because",
)
NEW = 32


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, help="folder of a packed checkpoint that GGUF holds exactly")
    parser.add_argument("--text", type=Path, required=True, help="text for the perplexity")
    parser.add_argument("--windows", type=int, default=8, help="of the text (%(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens in a window (%(default)s)")
    parser.add_argument("--tolerance", type=float, default=0.005, help="of the perplexity, relative (%(default)s)")
    parser.add_argument("--activations", choices=["a16", "a8"], default="a16", help="bittern's (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--envs", type=Path, default=peers.DEFAULT_ENVS, help="the peers' environments (%(default)s)")
    parser.add_argument("--work", type=Path, default=Path("build/greedy"), help="the file and logs (%(default)s)")
    return parser.parse_args()


def greedy(model: PreTrainedModel, prompt: list[int]) -> tuple[list[int], list[Tensor]]:
    """bittern's next tokens, and the logits that each was chosen from."""
    import torch

    ids, logits = list(prompt), []
    with torch.inference_mode():
        for _ in range(NEW):
            logits.append(model(input_ids=torch.tensor([ids])).logits[0, -1])
            ids.append(int(logits[-1].argmax()))
    return ids[len(prompt) :], logits


def parting(ours: list[int], logits: list[Tensor], theirs: list[int]) -> str:
    """Where two texts part and by how little, in words."""
    for index, (own, other) in enumerate(zip(ours, theirs, strict=True)):
        if own != other:
            margin = float(logits[index][own] - logits[index][other])
            return f"parts at token {index + 1}, which bittern prefers by {margin:.3f}"
    return f"the same {len(ours)} tokens"


def loss(model: PreTrainedModel, windows: list[list[int]]) -> float:
    """bittern's mean negative log-likelihood of all tokens but each window's first."""
    import torch

    total = 0.0
    with torch.inference_mode():
        for window in windows:
            ids = torch.tensor(window)
            scores = model(input_ids=ids[None]).logits[0, :-1]
            total += float(torch.nn.functional.cross_entropy(scores, ids[1:], reduction="sum"))
    return total / sum(len(window) - 1 for window in windows)


def main() -> None:
    options = arguments()
    import torch

    import bittern
    from bittern.checkpoint import open_checkpoint
    from bittern.tokenizer import encode

    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    file = options.work / f"{options.artifact.name}.gguf"
    bittern.convert(options.artifact, file, format="gguf", overwrite=True)
    with open_checkpoint(options.artifact) as checkpoint:
        tokenizer = checkpoint.tokenizer()
    model = bittern.load(options.artifact, device="cpu", dtype=torch.float32, activations=options.activations)
    tokens = encode(tokenizer, options.text.read_text()[: options.windows * options.length * 8])
    starts = range(0, options.windows * options.length, options.length)
    windows = [tokens[start : start + options.length] for start in starts]
    prompts = [encode(tokenizer, prompt) for prompt in PROMPTS]
    ours = [greedy(model, prompt) for prompt in prompts]
    own_loss = loss(model, windows)
    print(
        f"bittern {options.activations}: perplexity {math.exp(own_loss):.4f} ({len(windows)} x {options.length} tokens)"
    )

    python = peers.interpreter("llamacpp", options.envs)
    threads = {"OMP_NUM_THREADS": str(options.threads)}
    worker = peers.Worker("llamacpp_worker.py", python, options.work / "llamacpp.log", threads)
    plain = file.with_suffix(".f32.gguf")
    worker.ask("quantize", source=str(file), target=str(plain), kind="F32", threads=options.threads)
    for label, path in (("as it is", file), ("dequantized", plain)):
        worker.ask("load", path=str(path), threads=options.threads, context=max(options.length, 128))
        same = 0
        for words, prompt, (tokens, logits) in zip(PROMPTS, prompts, ours, strict=True):
            theirs = worker.ask("decode", ids=prompt, new=NEW)["tokens"]
            same += theirs == tokens
            print(f"  {parting(tokens, logits, theirs)}: {words!r}", flush=True)
        change = math.exp(worker.ask("loss", windows=windows)["loss"] - own_loss) - 1
        print(f"llama.cpp, {label}: {same} of {len(PROMPTS)} texts the same, perplexity {change:+.3%}", flush=True)
    worker.close()
    sys.exit(0 if same == len(PROMPTS) and abs(change) <= options.tolerance else 1)  # of the dequantized file


if __name__ == "__main__":
    main()
