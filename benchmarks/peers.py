"""The tools that bittern is measured against, each in a virtual environment of its own.

``python benchmarks/peers.py setup PEER`` makes one from nothing. Peers pin other versions of torch and
transformers than each other, so none is ever installed beside bittern; what has to run inside a peer's
environment is a script under ``benchmarks/peers``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent / "peers"
DEFAULT_ENVS = Path(os.environ.get("BITTERN_PEERS", Path.home() / ".cache" / "bittern" / "peers"))

# Peer -> what pip installs last, after its requirements in peers/PEER.txt. GPTQModel declares torch >= 2.14.1 but runs
# on 2.13, hence --no-deps. llama-cpp-python is built here; a wheel that pip remembers could be of another BUILD.
PACKAGES = {
    "gptqmodel": ("--no-build-isolation", "--no-deps", "gptqmodel==7.7.0"),
    "llamacpp": ("--no-cache-dir", "llama-cpp-python==0.3.36"),
}
MODULES = {"gptqmodel": "gptqmodel", "llamacpp": "llama_cpp"}

# While it is built. GCC 12 believes that _tile_loadconfig reads 8 of its 64 bytes and drops the stores to the others as
# dead: without the two flags llama.cpp dies of SIGSEGV on a CPU with AMX (its issue 20824).
BUILD = {"llamacpp": {"CMAKE_ARGS": "-DGGML_NATIVE=ON", "CXXFLAGS": "-fno-tree-dse -fno-dse"}}

# For every process of a peer. GPTQModel's pool of threads crashes on two cores unless its size is given.
ENVIRONMENT = {"GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def setup(peer: str, envs: Path) -> Path:
    """Make the environment of ``peer`` under ``envs`` unless it is there; returns its interpreter."""
    folder = envs / peer
    python = folder / "bin" / "python"
    if python.exists():
        return python
    envs.mkdir(parents=True, exist_ok=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    try:
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        environment = {**os.environ, **BUILD.get(peer, {})}
        for arguments in (["-r", str(SCRIPTS / f"{peer}.txt")], PACKAGES[peer]):
            subprocess.run([*pip, *arguments], check=True, env=environment)
        subprocess.run([str(python), "-c", f"import {MODULES[peer]}"], check=True, env={**environment, **ENVIRONMENT})
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # half an environment would pass for a whole one
        raise
    return python


def interpreter(peer: str, envs: Path) -> Path:
    """The Python of an environment that :func:`setup` made; exits with the command that makes it when it is missing."""
    python = envs.resolve() / peer / "bin" / "python"
    if not python.exists():
        sys.exit(f"error: {python} is missing; make it with: python benchmarks/peers.py setup {peer} --envs {envs}")
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["setup"])
    parser.add_argument("peer", choices=sorted(PACKAGES))
    parser.add_argument("--envs", type=Path, default=DEFAULT_ENVS, help="folder of the environments (%(default)s)")
    arguments = parser.parse_args()
    print(setup(arguments.peer, arguments.envs.resolve()))


if __name__ == "__main__":
    main()
