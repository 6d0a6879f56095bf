"""The native kernels alone: every instruction set of this machine, every number of bits, beside torch's float32.

    python benchmarks/kernels.py                     # about four minutes; all cores should be idle
    python benchmarks/kernels.py --sets avx512 amx --bits 4 --megabytes 0

One row of x over more weights than any cache holds: GB/s of packed weights, and its share of what reading the same
bytes takes in the same run (the best of several of each, in turns). One row over weights in the cache: G weights/s.
Many rows: GMAC/s, beside F.linear on dequantized float32 weights, with and without the time to dequantize them. All
with one thread but where two are named.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from quality import machine
from torch import Tensor
from torch.nn import functional as F

from bittern.runtime import native

GROUP = 64
COLUMNS = 4096  # of the matrix that no cache holds
CACHED = (1536, 576)  # gate and up of SmolLM2-135M
SECONDS = 0.3  # of repeating what is measured; the best time counts


@dataclass(frozen=True)
class Row:
    """One line of the table; rates of one thread unless said otherwise.

    Attributes:
        instructions, bits, activations: what computed.
        stream: GB/s of weights for one row of x from memory, one thread and two; None where it was not measured.
        probe: GB/s of only reading them.
        cached: G weights/s for one row of x.
        products: GMAC/s by rows of x.
        torch_products: the same of torch in float32, by rows of x: the product alone, and dequantizing before it.
    """

    instructions: str
    bits: int
    activations: str
    stream: tuple[float, float] | None
    probe: tuple[float, float] | None
    cached: float
    products: dict[int, float]
    torch_products: dict[int, tuple[float, float]]


@dataclass(frozen=True)
class Packed:
    """A packed matrix of random weights, with zeros in the middle as most artifacts have them."""

    matrix: native.Matrix
    tensors: tuple[Tensor, Tensor]  # that the matrix points into
    weights: int
    bytes: int


def random_matrix(out_features: int, in_features: int, bits: int) -> Packed:
    """Any bytes are codes, so none are packed."""
    size = native.library().bt_packed_bytes(out_features, in_features, bits, GROUP)
    codes = torch.randint(0, 256, (size,), dtype=torch.uint8)
    scales = torch.full((-(-out_features // 16), in_features // GROUP, 16), 0.01, dtype=torch.float16)
    made = native.matrix(out_features, in_features, bits, GROUP, (codes, scales, None, None))
    return Packed(made, (codes, scales), out_features * in_features, size + scales.numel() * 2)


def best_seconds(call: Callable[[], object]) -> float:
    """The shortest time of ``call``."""
    call()
    best, end = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        started = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - started)
    return best


def stream(packed: Packed, activations: str, threads: int) -> tuple[float, float]:
    """GB/s of one row of x times a matrix, and of reading the matrix: the best of turns."""
    x = torch.randn(1, COLUMNS)
    out = [torch.empty(1, packed.matrix.out_features)]
    codes, context = packed.tensors[0], native.context(threads)
    rate = probe = 0.0
    for _ in range(5):
        probe = max(probe, native.library().bt_read_probe(context, codes.data_ptr(), codes.numel()) / 1e9)
        started = time.perf_counter()
        native.linear(x, [packed.matrix], activations, threads, out)
        rate = max(rate, packed.bytes / (time.perf_counter() - started) / 1e9)
    return rate, probe


def measure(bits: int, sets: list[str], rows: list[int], megabytes: int) -> Iterator[Row]:
    """All rows of the table for one number of bits; the large matrix is shared by them."""
    small = random_matrix(*CACHED, bits)
    large = random_matrix(megabytes * 2**20 * 8 // bits // COLUMNS // 16 * 16, COLUMNS, bits) if megabytes else None
    for instructions in sets:
        os.environ[native.VARIABLE] = instructions
        slow = instructions == "scalar"
        weight = native.dequantize(small.matrix, threads=1)
        context, address = native.context(1), ctypes.addressof(small.matrix)
        dequantizing = best_seconds(
            lambda: native.library().bt_dequantize(context, address, 0, CACHED[0], weight.data_ptr())  # noqa: B023
        )
        alone = {n: best_seconds(lambda: F.linear(x, weight)) for n in rows for x in [torch.randn(n, CACHED[1])]}  # noqa: B023
        macs = {n: n * small.weights / 1e9 for n in rows}
        for activations in native.ACTIVATIONS:
            both = None if large is None or slow else [stream(large, activations, threads) for threads in (1, 2)]
            seconds = {}
            for n in (1, *rows):
                # Sixteen matrices a call for one row, or calling from Python would be half of what is measured.
                count = 16 if n == 1 else 1
                x, out = torch.randn(n, CACHED[1]), [torch.empty(n, CACHED[0])] * count
                call = lambda: native.linear(x, [small.matrix] * count, activations, 1, out)  # noqa: B023, E731
                seconds[n] = best_seconds(call) / count
            yield Row(
                instructions,
                bits,
                activations,
                None if both is None else (both[0][0], both[1][0]),
                None if both is None else (both[0][1], both[1][1]),
                small.weights / seconds[1] / 1e9,
                {n: macs[n] / seconds[n] for n in rows},
                {n: (macs[n] / alone[n], macs[n] / (alone[n] + dequantizing)) for n in rows},
            )


def line(row: Row) -> str:
    """A line of the table."""
    words = [f"{row.instructions:8}{row.bits:2} {row.activations:4}"]
    for i in range(2):
        if row.stream is None or row.probe is None:
            words.append(f"{'-':>14}")
        else:
            words.append(f"{row.stream[i]:7.1f} ({row.stream[i] / row.probe[i]:4.0%})")
    words.append(f"{row.cached:9.1f}")
    for n, rate in row.products.items():
        words.append(f"{rate:9.1f} ({row.torch_products[n][0]:5.1f}, {row.torch_products[n][1]:5.1f})")
    return " ".join(words)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sets", nargs="+", choices=native.instruction_sets(), default=native.instruction_sets())
    parser.add_argument("--bits", nargs="+", type=int, choices=[8, 4, 3, 2], default=[8, 4, 3, 2])
    parser.add_argument("--rows", nargs="+", type=int, default=[4, 32, 512], help="rows of x in the products")
    parser.add_argument("--megabytes", type=int, default=1024, help="of weights to stream; 0 leaves that out")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    about = machine()
    about["load_average"] = os.getloadavg()[0]
    print(f"{about['date'][:10]}, {about['cpu']}, {about['cores']} cores, load {about['load_average']:.1f}, ", end="")
    print(f"torch {about['torch']}")
    print(
        f"group {GROUP}; matrix in the cache {CACHED[0]} x {CACHED[1]}; products: ours (torch fp32, after dequantizing)"
    )
    products = " ".join(f"{f'{n} rows, GMAC/s':>24}" for n in options.rows)
    print(f"{'':15} {'1 thr. GB/s':>14} {'2 thr. GB/s':>14} {'cached G/s':>9} {products}")
    table = []
    for bits in options.bits:
        for row in measure(bits, list(options.sets), options.rows, options.megabytes):
            print(line(row), flush=True)
            table.append(row)
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": about, "rows": [asdict(row) for row in table]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
