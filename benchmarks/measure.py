"""What a command costs, seen from outside: ``python benchmarks/measure.py COMMAND ...``.

Wall time from start to exit, imports included, and the largest resident set that the kernel saw.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Measured:
    """One finished command.

    Attributes:
        seconds: wall time.
        peak_rss_bytes: peak resident set, of the largest process where it started others.
        output: its standard output.
    """

    seconds: float
    peak_rss_bytes: int
    output: str


def measure(command: Sequence[str | Path], log: Path, environment: Mapping[str, str] | None = None) -> Measured:
    """Run ``command`` to its end with ``environment`` added to this one; all that it says goes to ``log``.

    This file is run as a launcher between us and the command: a child's peak begins at the resident set of whoever
    forked it, and a benchmark that holds torch would be a floor of some 300 MB under everybody's figure.

    Raises:
        RuntimeError: when the command fails, with the end of its log.
    """
    launcher = [sys.executable, "-S", __file__, *map(str, command)]
    with log.open("w") as errors:
        done = subprocess.run(
            launcher, env={**os.environ, **(environment or {})}, stdout=subprocess.PIPE, stderr=errors, text=True
        )
    output, _, cost = done.stdout.rstrip("\n").rpartition("\n")
    with log.open("a") as file:
        file.write(output)
    if done.returncode != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise RuntimeError(f"{' '.join(map(str, command))}\nended with {done.returncode}; the end of {log}:\n{tail}")
    return Measured(**json.loads(cost), output=output)


def main() -> None:
    """Run the command of the command line; the last line of standard output is its cost as JSON."""
    command = sys.argv[1:]
    if not command:
        sys.exit(f"usage: {sys.argv[0]} COMMAND ...")
    started = time.perf_counter()
    process = os.posix_spawnp(command[0], command, os.environ)
    _, status, resources = os.wait4(process, 0)
    seconds = time.perf_counter() - started
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
    print(json.dumps({"seconds": round(seconds, 3), "peak_rss_bytes": resources.ru_maxrss * unit}), flush=True)
    sys.exit(os.waitstatus_to_exitcode(status) & 0xFF)


if __name__ == "__main__":
    main()
