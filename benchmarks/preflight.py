"""What `bittern quantize --dry-run` predicts beside what the same command then takes, each in a process of its own.

    python benchmarks/preflight.py MODEL[:GROUP_SIZE] ... --dataset wiki.txt --nsamples 16 --seqlen 256 --bits 4 3

Further options are handed to `quantize`: --skip 'layers\\.([3-9]|[12][0-9])\\.' for a few blocks of a larger model.

Prints for every model and width the prediction, the measurement and the latter as a share of the former, and where
the time was expected to go. Also what the run had predicted of itself, which its manifest holds: a machine that is not
idle is another one by then. There, --processor-time with OMP_NUM_THREADS=1 replaces every clock by the time that the
process has computed. Seconds begin when torch is imported.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PROCESSOR_TIME = """
import runpy, sys, time
time.monotonic = time.perf_counter = time.process_time
sys.argv[0] = "bittern"
runpy.run_module("bittern", run_name="__main__")
"""


def command(arguments: list[str], processor_time: bool) -> dict[str, Any]:
    """What a quantization prints as JSON; what it says besides goes on to stderr when it fails."""
    start = ["-c", PROCESSOR_TIME] if processor_time else ["-m", "bittern"]
    whole = [sys.executable, *start, "quantize", *arguments, "--json"]
    done = subprocess.run(whole, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def row(name: str, what: str, predicted: dict[str, Any], measured: dict[str, Any]) -> str:
    """One line of the table."""
    shares = [measured[key] / predicted[key] for key in ("seconds", "peak_memory_bytes", "bytes")]
    return (
        f"| {name} | {what} | {predicted['seconds']:.1f} | {measured['seconds']:.1f} | {shares[0]:.2f}"
        f" | {predicted['peak_memory_bytes'] / 1e6:.0f} | {measured['peak_memory_bytes'] / 1e6:.0f} | {shares[1]:.2f}"
        f" | {predicted['bytes']:,} | {measured['bytes']:,} | {shares[2]:.4f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="folder, with :GROUP_SIZE where it is not 32")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--nsamples", default="16")
    parser.add_argument("--seqlen", default="256")
    parser.add_argument("--bits", nargs="+", default=["4"])
    parser.add_argument("--processor-time", action="store_true", help="what one thread computes, not what it waits")
    options, others = parser.parse_known_args()
    print(f"load before: {os.getloadavg()[0]:.1f}", flush=True)
    print(
        "| model | predicted by | s | s measured | share | MB | MB measured | share | bytes | bytes measured | share |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for given in options.models:
        model, _, group = given.partition(":")
        for bits in options.bits:
            with tempfile.TemporaryDirectory() as folder:
                arguments = [model, "-o", str(Path(folder) / "out"), "--bits", bits, "--group-size", group or "32"]
                arguments += ["--dataset", options.dataset, "--nsamples", options.nsamples, "--seqlen", options.seqlen]
                arguments += others
                dry = command([*arguments, "--dry-run"], options.processor_time)
                manifest = command(arguments, options.processor_time)
            measured = manifest["measured"] | {"bytes": sum(each["bytes"] for each in manifest["files"].values())}
            name = f"{Path(model).name}, {bits} bits"
            print(row(name, "dry run", dry["prediction"], measured))
            print(row(name, "the run", manifest["prediction"], measured), flush=True)
            stages = ", ".join(f"{stage} {took:.1f} s" for stage, took in dry["stages"].items())
            print(f"{name}: {stages}; load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
