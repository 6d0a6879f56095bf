"""convert against a plain copy of the same bytes: time and peak memory.

    python benchmarks/convert.py --gigabytes 12

Makes synthetic fp32 shards, copies them file by file, converts them to bf16 in a process of its own, and prints
both speeds, their ratio and the converter's peak resident memory. Each run begins with the source out of the page
cache; the copy is timed with and without waiting for the disk, while convert always waits for it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bittern.checkpoint import CheckpointWriter, TensorInfo

ROWS, COLUMNS = 8192, 4096  # 128 MiB of fp32, the size of a layer's matrix
CHILD = """
import sys, time
started = time.perf_counter()
from bittern.convert.cast import convert
imported = time.perf_counter()
summary = convert(sys.argv[1], sys.argv[2], dtype=sys.argv[3])
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))  # kB
print(imported - started, time.perf_counter() - imported, int(peak) * 1024)
"""


def make(folder: Path, gigabytes: float) -> int:
    """A checkpoint of about ``gigabytes`` of normal numbers; bytes of its files."""
    count = max(1, round(gigabytes * 1e9 / (ROWS * COLUMNS * 4)))
    plan = [TensorInfo(f"model.layers.{number}.weight", torch.float32, (ROWS, COLUMNS)) for number in range(count)]
    noise = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    with CheckpointWriter(folder, plan) as writer:
        for number, info in enumerate(plan):
            writer.write(info.name, noise.roll(number, 0))
        writer.commit({"model_type": "llama", "dtype": "float32", "tie_word_embeddings": False})
    return sum(path.stat().st_size for path in folder.iterdir())


def forget(folder: Path) -> None:
    """Write back what is dirty and drop the folder's files from the page cache."""
    os.sync()
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy(source: Path, target: Path) -> tuple[float, float]:
    """Seconds until the copies are made, and until they are on the disk."""
    target.mkdir()
    started = time.perf_counter()
    for path in source.iterdir():
        shutil.copyfile(path, target / path.name)
    made = time.perf_counter() - started
    for path in target.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return made, time.perf_counter() - started


def measure(folder: Path, gigabytes: float, dtype: str) -> dict[str, Any]:
    """Make the source in ``folder``, copy and convert it there."""
    source = folder / "source"
    size = make(source, gigabytes)
    forget(source)
    copied, durable = copy(source, folder / "copy")
    shutil.rmtree(folder / "copy")
    forget(source)
    command = [sys.executable, "-c", CHILD, str(source), str(folder / "converted"), dtype]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    imports, converted, peak = (float(word) for word in output.split())
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}, torch {torch.__version__}",
        "load_average": os.getloadavg()[0],
        "dtype": dtype,
        "source_bytes": size,
        "copy_seconds": copied,
        "durable_copy_seconds": durable,
        "import_seconds": imports,
        "convert_seconds": converted,
        "speed_against_copy": copied / converted,
        "speed_against_durable_copy": durable / converted,
        "peak_rss_bytes": int(peak),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gigabytes", type=float, default=12.0, help="size of the source")
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], default="bf16")
    parser.add_argument(
        "--folder", type=Path, help="where to work; needs 2.5 times the size (default: a temporary folder)"
    )
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        result = measure(Path(folder), options.gigabytes, options.dtype)
    if options.json:
        print(json.dumps(result))
        return
    print(f"{result['date']}, {result['machine']}, load {result['load_average']:.1f}")
    for label, key in (
        ("copy", "copy"),
        ("copy, on the disk", "durable_copy"),
        (f"convert to {options.dtype}", "convert"),
    ):
        seconds = result[f"{key}_seconds"]
        print(f"{label:20} {seconds:7.1f} s  {result['source_bytes'] / seconds / 1e9:6.2f} GB/s")
    print(f"speed against the copy {result['speed_against_copy']:.2f} (target: at least 0.5),", end=" ")
    print(f"against a copy on the disk {result['speed_against_durable_copy']:.2f}")
    print(f"peak resident memory {result['peak_rss_bytes'] / 1e6:.0f} MB (target: under 1000)")


if __name__ == "__main__":
    main()
