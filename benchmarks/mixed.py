"""Averages of bits beside uniform ones, and what foretells the harm of fewer bits.

python benchmarks/mixed.py MODEL --calibration FILE --text FILE --group-size 32 --bits 2 2.5 3 3.0 --seeds 0 1
python benchmarks/mixed.py MODEL --calibration FILE --text FILE --group-size 32 --predictors

The first makes every artifact in a process of its own that is measured from outside, evaluates it against MODEL, and
holds each average against the straight line between the uniform bits around it, in log perplexity. The second rounds
one group of layers at a time in an otherwise exact model, measures the KL of that, and prints how well each predictor,
made from the calibration text alone, agrees with it: the correlation of logarithms, the mean ratio, and the spread of
its logarithm. It holds the model, its layers' inputs and their gradients in memory, so it is for small models.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measure import measure

if TYPE_CHECKING:
    from torch import Tensor

WIDTHS = (2, 3, 4)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the unquantized checkpoint")
    parser.add_argument("--calibration", required=True, help="calibration text")
    parser.add_argument("--text", required=True, help="evaluation text")
    parser.add_argument("--bits", nargs="+", default=["2", "2.5", "3", "3.0"], help="uniform, or averages with a point")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the choice of calibration windows")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--nsamples", type=int, default=128, help="calibration windows (%(default)s)")
    parser.add_argument(
        "--seqlen", type=int, default=256, help="tokens in each, and in those of the text (%(default)s)"
    )
    parser.add_argument("--windows", type=int, default=30, help="evaluation windows (%(default)s)")
    parser.add_argument("--predictors", action="store_true", help="what foretells the harm, instead of artifacts")
    parser.add_argument("--work", type=Path, default=Path("build/mixed"), help="artifacts and logs (%(default)s)")
    parser.add_argument("--reuse", action="store_true", help="take the artifacts that an earlier run left in --work")
    return parser.parse_args()


def make(options: argparse.Namespace, bits: str, seed: int) -> tuple[Path, str]:
    """An artifact, and what making it cost in words."""
    output = options.work / f"{bits}-bits-seed-{seed}"
    if options.reuse and output.is_dir():
        return output, "reused"
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "bittern", "quantize", options.model, "-o", output, "--bits", bits]
    command += ["--dataset", options.calibration, "--seed", str(seed)]
    for name in ("group-size", "nsamples", "seqlen"):
        command += [f"--{name}", str(getattr(options, name.replace("-", "_")))]
    cost = measure(command, output.with_suffix(".log"))
    return output, f"{cost.seconds:.0f} s, {cost.peak_rss_bytes / 1e9:.2f} GB"


def compare(options: argparse.Namespace) -> None:
    """A line per artifact, then every average against the line between its neighbours."""
    import bittern
    from bittern.checkpoint import open_checkpoint
    from bittern.evaluate import evaluate, text_windows
    from bittern.schema import read_manifest

    with open_checkpoint(options.model) as checkpoint:
        tokenizer = checkpoint.tokenizer()
    windows = text_windows(options.text, tokenizer, seqlen=options.seqlen, windows=options.windows)
    base = bittern.load(options.model, device="cpu")
    log_perplexity: dict[tuple[str, int], float] = {}
    print(f"{len(windows)} x {options.seqlen} tokens of {options.text}")
    print("bits  seed  found  perplexity       KL  cost")
    for seed in options.seeds:
        for bits in options.bits:
            output, cost = make(options, bits, seed)
            found = read_manifest(output).get("mixed", {}).get("found", float(bits))
            result = evaluate(bittern.load(output, device="cpu"), windows, against=base)
            log_perplexity[bits, seed] = result.nll
            print(f"{bits:>4}  {seed:>4}  {found:.3f}  {result.perplexity:>10.3f}  {result.kl:.5f}  {cost}", flush=True)
    print(f"full precision: perplexity {result.base_perplexity:.3f}")
    for (bits, seed), found in log_perplexity.items():
        if "." not in bits:
            continue
        low, high = (str(end(float(bits))) for end in (math.floor, math.ceil))
        if (low, seed) in log_perplexity and (high, seed) in log_perplexity:
            share = float(bits) - float(low)
            line = (1 - share) * log_perplexity[low, seed] + share * log_perplexity[high, seed]
            print(f"{bits}, seed {seed}: log perplexity {found:.4f}, on the line {line:.4f}: {found - line:+.4f}")


# What foretells the harm


def rounded(options: argparse.Namespace) -> Iterator[tuple[int, float, dict[str, float]]]:
    """(bits, measured KL, predictions) of every group alone."""
    import torch

    from bittern import model as live
    from bittern.calibration import load_tokens
    from bittern.checkpoint import open_checkpoint
    from bittern.evaluate import evaluate, text_windows
    from bittern.quantize.gptq import factorize, gptq
    from bittern.weight import QuantSpec

    with open_checkpoint(options.model) as checkpoint:
        tokenizer = checkpoint.tokenizer()
        model, base = live.load_dense(checkpoint), live.load_dense(checkpoint)
    ids = load_tokens(
        options.calibration, tokenizer, nsamples=options.nsamples, seqlen=options.seqlen, seed=options.seeds[0]
    ).ids
    text = text_windows(options.text, tokenizer, seqlen=options.seqlen, windows=options.windows)
    _, blocks = live.blocks(model)
    layers = {layer: name for name, layer in blocks.named_modules() if isinstance(layer, torch.nn.Linear)}
    seen = record(model, list(layers), ids)
    groups: dict[tuple[str, int], list[Any]] = {}
    for layer, name in layers.items():
        groups.setdefault((name.rpartition(".")[0], seen[layer][0].data_ptr()), []).append(layer)
    for members in groups.values():
        inputs = seen[members[0]][0].flatten(0, 1)
        hessian = inputs.T @ inputs / len(inputs)
        factor = factorize(hessian)
        for bits in WIDTHS:
            told: dict[str, float] = {}
            before = [layer.weight.detach().clone() for layer in members]
            for layer, weight in zip(members, before, strict=True):
                size = options.group_size if weight.shape[1] % options.group_size == 0 else -1
                change = gptq(weight, factor, QuantSpec(bits, size)).weight.dequantize() - weight
                for name, value in predictions(change, weight, hessian, *seen[layer]).items():
                    told[name] = told.get(name, 0.0) + value
                layer.weight.data += change
            told["relative error"] = told["error"] / told.pop("norm")
            kl = evaluate(model, text, against=base).kl
            assert kl is not None
            for layer, weight in zip(members, before, strict=True):
                layer.weight.data.copy_(weight)
            yield bits, kl, told


def record(model: Any, layers: list[Any], ids: Tensor) -> dict[Any, tuple[Tensor, Tensor, Tensor]]:
    """Inputs of layers, and gradients of their outputs for drawn tokens and for the text's: (windows, tokens, :)."""
    import torch

    inputs: dict[Any, list[Tensor]] = {layer: [] for layer in layers}
    gradients: dict[Any, tuple[list[Tensor], list[Tensor]]] = {layer: ([], []) for layer in layers}
    same: dict[int, Tensor] = {}  # one copy of what several layers read

    def watch(which: int) -> Callable[[Any, Any, Tensor], None]:
        def hook(layer: Any, args: Any, output: Tensor) -> None:
            if which == 0:
                inputs[layer].append(same.setdefault(args[0].data_ptr(), args[0].detach()[0]))
            output.register_hook(  # type: ignore[no-untyped-call]
                lambda gradient: gradients[layer][which].append(gradient.detach()[0].clone())
            )

        return hook

    draws = torch.Generator().manual_seed(0)
    kept = []
    for window in ids:
        for which in (0, 1):
            handles = [layer.register_forward_hook(watch(which)) for layer in layers]
            embedded = model.get_input_embeddings()(window[None]).requires_grad_()
            kept.append(embedded)
            logits = model(inputs_embeds=embedded, use_cache=False).logits[0]
            targets = (
                torch.multinomial(logits.detach().softmax(1), 1, generator=draws)[:-1, 0] if which == 0 else window[1:]
            )
            loss = torch.nn.functional.cross_entropy(logits[:-1], targets, reduction="sum")
            loss.backward()  # type: ignore[no-untyped-call]
            for handle in handles:
                handle.remove()
        same.clear()
    stacked: dict[tuple[int, ...], Tensor] = {}
    found: dict[Any, tuple[Tensor, Tensor, Tensor]] = {}
    for layer in layers:
        key = tuple(each.data_ptr() for each in inputs[layer])
        x = stacked.setdefault(key, torch.stack(inputs[layer]))
        first, second = (torch.stack(each) for each in gradients[layer])
        found[layer] = (x, first, second)
    return found


def predictions(
    change: Tensor, weight: Tensor, hessian: Tensor, inputs: Tensor, drawn: Tensor, text: Tensor
) -> dict[str, float]:
    """What each predictor says of one matrix; those of a group add up."""
    errors, norm = ((each @ hessian * each).sum(1) for each in (change, weight))
    products = (inputs @ change.T * drawn).sum(2)
    tokens = products.numel()
    found = {
        "error": errors.sum(),
        "norm": norm.sum(),
        "error x mean squared gradient": errors.sum() * drawn.square().mean() / 2,
        "error x squared gradient by output": (errors * drawn.square().mean((0, 1))).sum() / 2,
        "the same, the text's own tokens": (errors * text.square().mean((0, 1))).sum() / 2,
        "(gradient . change)^2 by token": products.square().mean() / 2,
        "(gradient . change)^2 by window": products.sum(1).square().sum() / tokens / 2,
    }
    return {name: float(value) for name, value in found.items()}


def judge(options: argparse.Namespace) -> None:
    import numpy as np

    found = list(rounded(options))
    print(
        f"{len(found) // len(WIDTHS)} groups; correlation of logarithms, mean ratio to the KL, spread of its logarithm"
    )
    for name in found[0][2]:
        parts = []
        for bits in WIDTHS:
            pairs = np.log([(told[name], kl) for each, kl, told in found if each == bits])
            ratio = pairs[:, 0] - pairs[:, 1]
            parts.append(f"{np.corrcoef(pairs.T)[0, 1]:6.3f} {np.exp(ratio.mean()):8.3g} {ratio.std():6.3f}")
        print(f"{name:<36} " + " | ".join(parts))


def main() -> None:
    options = arguments()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.predictors:
        judge(options)
    else:
        compare(options)


if __name__ == "__main__":
    main()
