"""A checkpoint as a GGUF file without tokenizer, for llama.cpp to quantize: ``to_gguf.py MODEL OUT.gguf``.

Matrices are F16 unless a caller wants others. It serves to measure and not to chat: only ids are ever fed.
``bittern convert`` writes the files that people use.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bittern.artifact import Artifact
from bittern.checkpoint import open_checkpoint
from bittern.convert import gguf


def write_gguf(model: str | Path, out: Path, dtype: str | None = "fp16") -> None:
    """Write a plain checkpoint, matrices in ``dtype`` (None: as stored); the file appears when it is whole."""
    with open_checkpoint(model) as checkpoint:
        gguf.write_gguf(Artifact(checkpoint), out, dtype=dtype, tokenizer=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the checkpoint")
    parser.add_argument("output", type=Path, help="GGUF file to write")
    options = parser.parse_args()
    write_gguf(options.model, options.output)


if __name__ == "__main__":
    main()
