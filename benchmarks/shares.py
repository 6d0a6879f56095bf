"""Where quantizing spends its time: the share of matrix products, of attention, of factorizations, and of what is left.

    python benchmarks/shares.py MODEL --calibration wiki.txt --group-size 64 --bits 4
    ... --fp32        # as on a processor without instructions for bfloat16

Quantizes MODEL up to a block. Of the blocks from another one on, torch's profiler sees every second; from the others is
known how long a block takes without it. A block begins here when its first layer is solved, so every part of one is
seen as often as the others. The profiler takes time itself, by the operation: of products, which are few and large,
nothing that counts, so their share is right, and of small ones much, so theirs are what they take at most.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

from quality import machine
from torch.profiler import ProfilerActivity, profile, record_function

import bittern
from bittern import replay
from bittern.runtime import attention, native

KINDS = {
    "products": r"aten::(mm|addmm|bmm|baddbmm|addmv|mv|addbmm)|mkldnn.*linear|multiply_groups",
    "attention": r"flash_attention|short_attention|aten::_?scaled_dot_product",
    "factorizations": r"cholesky|linalg_(lu|solve|eigh)|triangular",
    "columns": r"solve_columns|descend",
    "casts and copies": r"aten::(copy_|_to_copy|to|clone|contiguous|cat|index|fill_|zero_)$",
    "sums": r"aten::(sum|mean|norm|linalg_vector_norm|amax|max|min|cumsum)$",
    "elementwise": r"aten::",
}
"""What an operation belongs to: the first that its name fits."""

NATIVE = (
    (native, ("solve_columns", "descend", "multiply_groups")),
    (attention, ("flash_attention", "short_attention")),
)


class Finished(Exception):
    """Ends a quantization of which enough was seen."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the unquantized checkpoint")
    parser.add_argument("--calibration", required=True, help="calibration text")
    parser.add_argument("--bits", type=int, default=4, help="(%(default)s)")
    parser.add_argument("--group-size", type=int, default=64, help="(%(default)s)")
    parser.add_argument("--effort", default="fast", help="(%(default)s)")
    parser.add_argument("--nsamples", type=int, default=128, help="calibration windows (%(default)s)")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens in each (%(default)s)")
    parser.add_argument("--blocks", type=int, nargs=2, default=(4, 24), help="the first, and that behind the last")
    parser.add_argument("--fp32", action="store_true", help="no products in bfloat16")
    parser.add_argument("--operations", type=int, default=0, metavar="N", help="print the N that take longest too")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args()


def named(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same, seen by the profiler under its own name."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with record_function(function.__name__):
            return function(*args, **kwargs)

    return call


@dataclass
class Seen:
    """Blocks with the profiler and without it, their seconds, and those of every operation in the former."""

    blocks: Counter[bool] = field(default_factory=Counter)
    seconds: defaultdict[bool, float] = field(default_factory=lambda: defaultdict(float))
    operations: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))


def watch(options: argparse.Namespace) -> Seen:
    """Quantize, and see every second block."""
    seen = Seen()
    current, began, profiler = -1, 0.0, None
    first, last = options.blocks

    def turn(block: int) -> None:
        """From one block to the next."""
        nonlocal current, began, profiler
        if current >= first:
            took = time.perf_counter() - began
            if profiler is not None:
                profiler.stop()
                for event in profiler.key_averages():
                    seen.operations[event.key] += event.self_cpu_time_total / 1e6
            seen.blocks[profiler is not None] += 1
            seen.seconds[profiler is not None] += took
        if block >= last:
            raise Finished
        current, profiler = block, None
        if block >= first and (block - first) % 2:
            profiler = profile(activities=[ProfilerActivity.CPU])
            profiler.start()
        began = time.perf_counter()

    def progress(record: dict[str, Any]) -> None:
        found = re.search(r"\.(\d+)\.", record["layer"])
        if found is not None and int(found[1]) > current:
            turn(int(found[1]))

    with tempfile.TemporaryDirectory() as work, suppress(Finished):
        bittern.quantize(
            options.model,
            Path(work) / "out",
            bits=options.bits,
            group_size=options.group_size,
            effort=options.effort,
            dataset=options.calibration,
            nsamples=options.nsamples,
            seqlen=options.seqlen,
            device="cpu",
            on_progress=progress,
        )
    if len(seen.blocks) < 2:
        raise SystemExit(f"--blocks: expected two blocks from {first} on at least, with one behind them")
    return seen


def main() -> None:
    options = arguments()
    for module, names in NATIVE:
        for name in names:
            setattr(module, name, named(getattr(module, name)))
    if options.fp32:
        replay.fast_in_sixteen_bits = lambda device: False
    seen = watch(options)
    plain, profiled = (seen.seconds[kind] / seen.blocks[kind] for kind in (False, True))
    operations = {name: took / seen.blocks[True] / plain for name, took in seen.operations.items()}
    shares: dict[str, float] = defaultdict(float)
    for name, share in operations.items():
        kind = next((kind for kind, names in KINDS.items() if re.search(names, name)), "other operations")
        shares[kind] += share
    about = machine()
    if options.json:
        print(json.dumps({"seconds": plain, "profiled": profiled, "shares": shares, "machine": about}))
        return
    how = f"{options.bits} bits, {options.effort}, {options.nsamples} x {options.seqlen} tokens"
    print(f"{options.model}, {how}{', fp32' if options.fp32 else ''}:")
    print(f"{plain:.2f} s a block ({seen.blocks[False]}), {profiled:.2f} with the profiler ({seen.blocks[True]})")
    for kind, share in sorted(shares.items(), key=lambda entry: -entry[1]):
        print(f"{share:6.1%}  {kind}")
    for name, share in sorted(operations.items(), key=lambda entry: -entry[1])[: options.operations]:
        print(f"{share:8.1%}  {name}")
    print(f"{about['date'][:10]}, {about['cpu']}, {about['threads']} threads, torch {about['torch']}")


if __name__ == "__main__":
    main()
