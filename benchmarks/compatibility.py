"""Does bittern work at the ends of the version ranges that pyproject.toml states?

    python benchmarks/compatibility.py --torch 2.13.0 --transformers 5.17.0 --environments ../environments

Makes a virtual environment per combination outside the repository, installs bittern there with every other package at
the version of constraints.txt as far as the two let it, and runs tests. What was tried is recorded in
docs/compatibility.md. TORCH_INDEX names a package index for torch, as for ./dev.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLLOWERS = {"torch", "transformers", "tokenizers", "huggingface-hub", "setuptools"}
"""Packages whose versions the two decide."""
TESTS = ("test_families", "test_checkpoint", "test_convert", "test_cli", "test_evaluate", "test_runtime_*")
"""What touches torch and transformers most."""


def make_environment(folder: Path, torch: str, transformers: str) -> Path:
    """A virtual environment with bittern and its test tools; returns its interpreter."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    kept = [pin for pin in pins if pin.split("==")[0].lower().replace("_", "-") not in FOLLOWERS]
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join([*kept, f"torch=={torch}", f"transformers=={transformers}"]) + "\n")
    environment = {**os.environ, "PIP_CONSTRAINT": str(constraints)}
    if os.environ.get("TORCH_INDEX"):
        environment["PIP_EXTRA_INDEX_URL"] = os.environ["TORCH_INDEX"]
    command = [str(python), "-m", "pip", "install", "--quiet", "--editable", f"{ROOT}[dev,gguf]"]
    subprocess.run(command, env=environment, check=True)
    return python


def main() -> None:
    """Make the environment, print what is in it, run the tests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", required=True)
    parser.add_argument("--transformers", required=True)
    parser.add_argument("--environments", type=Path, required=True, help="folder for the virtual environments")
    parser.add_argument("tests", nargs="*", default=TESTS, help="names of test files without .py")
    options = parser.parse_args()
    folder = options.environments.resolve() / f"torch-{options.torch}-transformers-{options.transformers}"
    python = make_environment(folder, options.torch, options.transformers)
    versions = "import torch, transformers; print('torch', torch.__version__, 'transformers', transformers.__version__)"
    subprocess.run([python, "-c", versions], check=True)
    files = sorted(path for name in options.tests for path in (ROOT / "tests").glob(f"{name}.py"))
    command = [str(python), "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", *map(str, files)]
    sys.exit(subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode)


if __name__ == "__main__":
    main()
