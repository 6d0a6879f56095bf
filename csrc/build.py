"""Compiles the native runtime: ``python csrc/build.py OUTPUT``. Used by setup.py and ``./dev check-native``.

One compiler call per source, since every instruction set has flags of its own, and one to link. No Python header
and no library of torch's is involved, so one build serves every version of both.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent

COMMON = ("-std=c++17", "-O3", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-fopenmp-simd")
WARNINGS = ("-Wall", "-Wextra", "-Wshadow", "-Wno-psabi")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mprefer-vector-width=512")
NEON = ("-march=armv8.2-a+dotprod",)

# Source -> the flags that only it may be compiled with.
ANY = {
    "attention.cpp": (),
    "context.cpp": (),
    "decoder.cpp": (),
    "linear.cpp": (),
    "pack.cpp": (),
    "pool.cpp": (),
    "kernels_scalar.cpp": (),
}
SOURCES: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        **ANY,
        "kernels_avx2.cpp": AVX2,
        "kernels_avx512.cpp": AVX512,
        "kernels_amx.cpp": (*AVX512, "-mamx-tile", "-mamx-int8"),
    },
    "aarch64": {**ANY, "kernels_neon.cpp": NEON},
}
MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}


def build(
    output: Path,
    *,
    compiler: Sequence[str] | None = None,
    machine: str | None = None,
    flags: Sequence[str] = (),
    main: Path | None = None,
) -> None:
    """Compile the sources for ``machine`` and link them.

    Args:
        output: the shared library to write; an executable when ``main`` is given.
        compiler: a C++ compiler's command; default ``$CXX`` or ``c++``.
        machine: x86_64, aarch64, or any other for the scalar kernels alone; default this one.
        flags: for compiling and linking, after the others.
        main: a further source, with a main function.

    Raises:
        OSError: when there is no such compiler.
        subprocess.CalledProcessError: when it fails; its messages have gone to stderr.
    """
    command = list(compiler or shlex.split(os.environ.get("CXX", "c++")))
    name = (machine or platform.machine()).lower()
    sources = {HERE / source: own for source, own in SOURCES.get(MACHINES.get(name, name), ANY).items()}
    if main is not None:
        sources[main] = (f"-I{HERE}",)
    with tempfile.TemporaryDirectory() as folder:

        def compile_one(source: Path) -> Path:
            target = Path(folder) / f"{source.stem}.o"
            subprocess.run(
                [*command, *COMMON, *WARNINGS, *sources[source], *flags, "-c", source, "-o", target], check=True
            )
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, sources))
        output.parent.mkdir(parents=True, exist_ok=True)
        # Renamed into place: a library that is being replaced may be mapped by a running process.
        made = output.with_name(f".{output.name}.{os.getpid()}")
        kind = () if main is not None else ("-shared",)
        subprocess.run([*command, *kind, *objects, *flags, "-lm", "-lpthread", "-o", made], check=True)
        made.replace(output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--machine", help="build for another machine, with CXX set to a cross compiler")
    parser.add_argument("--main", type=Path, help="a source with a main function: build a program")
    parser.add_argument("--flags", default="", help="more flags, such as -fsanitize=address,undefined")
    given = parser.parse_args()
    try:
        build(given.output, machine=given.machine, flags=shlex.split(given.flags), main=given.main)
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: {error}")
