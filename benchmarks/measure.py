"""What a command costs, seen from outside: ``python benchmarks/measure.py COMMAND ...``.

Wall time from start to exit, imports included, the largest resident set that the kernel saw, and how much of the
machine others used meanwhile: a time that was measured beside them is worth nothing.
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
        cpu_seconds: processor time of it and the processes it waited for.
        others: cores that everything else kept busy, on average over the run; None where nobody counts (not Linux).
    """

    seconds: float
    peak_rss_bytes: int
    output: str
    cpu_seconds: float
    others: float | None


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


def busy_seconds() -> float | None:
    """Seconds that all cores together have worked since the machine started, what its host took away included."""
    counts = Path("/proc/stat")
    if not counts.exists():
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, counts.read_text().split()[1:9])  # between: idle, iowait
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Run the command of the command line; the last line of standard output is its cost as JSON."""
    command = sys.argv[1:]
    if not command:
        sys.exit(f"usage: {sys.argv[0]} COMMAND ...")
    started, busy = time.perf_counter(), busy_seconds()
    process = os.posix_spawnp(command[0], command, os.environ)
    _, status, resources = os.wait4(process, 0)
    seconds, own, now = time.perf_counter() - started, resources.ru_utime + resources.ru_stime, busy_seconds()
    others = None if busy is None or now is None else max(0.0, (now - busy - own) / seconds)
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
    cost = {"seconds": round(seconds, 3), "peak_rss_bytes": resources.ru_maxrss * unit, "cpu_seconds": round(own, 3)}
    print(json.dumps({**cost, "others": others}), flush=True)
    sys.exit(os.waitstatus_to_exitcode(status) & 0xFF)


if __name__ == "__main__":
    main()
