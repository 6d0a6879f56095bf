"""The tools that bittern is measured against, each in a virtual environment of its own.

``python benchmarks/peers.py setup PEER`` makes one from nothing. Peers pin other versions of torch and
transformers than each other, so none is ever installed beside bittern; what has to run inside a peer's
environment is a script under ``benchmarks/peers``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parent / "peers"
DEFAULT_ENVS = Path(os.environ.get("BITTERN_PEERS", Path.home() / ".cache" / "bittern" / "peers"))

# Peer -> what pip installs last, after its requirements in peers/PEER.txt. GPTQModel and vLLM declare a newer torch but
# run on 2.13, and auto-gptq wants what it never needed, hence --no-deps. llama-cpp-python is built here; a wheel that
# pip remembers could be of another BUILD.
PACKAGES = {
    "autogptq": ("--no-deps", "auto-gptq==0.7.1"),
    "autoround": ("auto-round==0.16.1",),
    "compressedtensors": ("compressed-tensors==0.20.0",),
    "gptqmodel": ("--no-build-isolation", "--no-deps", "gptqmodel==7.7.0"),
    "llamacpp": ("--no-cache-dir", "llama-cpp-python==0.3.36"),
    "llmcompressor": ("llmcompressor==0.14.0.1",),
    "mlx": ("mlx-lm==0.32.2",),
    "vllm": ("--no-deps", "vllm==0.33.0"),
}
MODULES = {
    "autogptq": "auto_gptq",
    "autoround": "auto_round",
    "compressedtensors": "compressed_tensors",
    "gptqmodel": "gptqmodel",
    "llamacpp": "llama_cpp",
    "llmcompressor": "llmcompressor",
    "mlx": "mlx_lm",
    "vllm": "vllm.model_executor.models.llama",
}

# While it is built. GCC 12 believes that _tile_loadconfig reads 8 of its 64 bytes and drops the stores to the others as
# dead: without the two flags llama.cpp dies of SIGSEGV on a CPU with AMX (its issue 20824).
BUILD = {"llamacpp": {"CMAKE_ARGS": "-DGGML_NATIVE=ON", "CXXFLAGS": "-fno-tree-dse -fno-dse"}}

# For every process of a peer. GPTQModel's pool of threads crashes on two cores unless its size is given.
# vLLM looks for a GPU unless it is told not to.
ENVIRONMENT = {
    "GPTQMODEL_CPU_WORKERS": "2",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_TARGET_DEVICE": "cpu",
}


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


class Worker:
    """A process inside a peer's environment that answers requests; see peers/protocol.py.

    Args:
        script: a file of ``peers``.
        python: of the environment.
        log: where all that it prints goes, after what is there.
        environment: added to this process's and to ``ENVIRONMENT``.

    Raises:
        RuntimeError: when it ends before its first answer.
    """

    def __init__(self, script: str, python: Path, log: Path, environment: Mapping[str, str] | None = None) -> None:
        answers, there = os.pipe()
        with log.open("a") as file:
            self.process = subprocess.Popen(
                [python, SCRIPTS / script, str(there)],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=file,
                text=True,
                env={**os.environ, **ENVIRONMENT, **(environment or {})},
                pass_fds=[there],
            )
        os.close(there)
        self.log = log
        self.answers = os.fdopen(answers)
        self.started = self._answer()

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """What the worker answers to a command.

        Raises:
            RuntimeError: when the command failed or the process ended, with its own words.
        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # _answer says how it ended
        return self._answer()

    def close(self) -> None:
        """End it and wait until it has."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.answers.close()

    def _answer(self) -> dict[str, Any]:
        line = self.answers.readline()
        if not line:
            last = (self.log.read_text(errors="replace").strip().splitlines() or [""])[-1]
            raise RuntimeError(f"its process ended with {self.process.wait()}: {last}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer


def versions(python: Path, packages: Sequence[str]) -> str:
    """Name and version of those packages that an environment has."""
    code = "import sys; from importlib.metadata import version\nfor p in sys.argv[1:]: print(p, version(p))"
    done = subprocess.run([python, "-c", code, *packages], check=True, capture_output=True, text=True)
    return ", ".join(done.stdout.splitlines())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["setup"])
    parser.add_argument("peer", choices=sorted(PACKAGES))
    parser.add_argument("--envs", type=Path, default=DEFAULT_ENVS, help="folder of the environments (%(default)s)")
    arguments = parser.parse_args()
    print(setup(arguments.peer, arguments.envs.resolve()))


if __name__ == "__main__":
    main()
