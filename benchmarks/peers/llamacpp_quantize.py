"""Quantize a GGUF file with llama.cpp; runs inside the environment of llama-cpp-python, see ../peers.py.

``llamacpp_quantize.py IN.gguf OUT.gguf --kind Q4_K_M``; everything else stays at llama.cpp's default: there is no
calibration, and embeddings are quantized too.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from llamacpp_worker import begin, quantize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="GGUF file of floats")
    parser.add_argument("output", type=Path, help="GGUF file to write")
    parser.add_argument("--kind", required=True, help="a type of llama.cpp, such as Q4_0")
    arguments = parser.parse_args()
    begin()
    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    partial = arguments.output.with_suffix(".partial")
    quantize(arguments.source, str(partial), arguments.kind, threads)
    partial.rename(arguments.output)


if __name__ == "__main__":
    main()
