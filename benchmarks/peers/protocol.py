"""How a worker of ../decode.py is spoken to: JSON lines on its standard input, one JSON line back for each.

Answers go to the file descriptor that its only argument names, as libraries print what they like on the standard ones.
A worker says first, once its imports are done, {"imports_s", "rss_mb", "peak_mb"}. A request is {"command": NAME, and
that command's arguments}; the answer is what the command returned plus "rss_mb" and "peak_mb", or {"error": MESSAGE}.
The end of the input ends the worker.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def process_age() -> float:
    """Seconds since this process began, starting the interpreter included (resolution 10 ms; Linux)."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def memory() -> dict[str, float]:
    """Resident set now and at its peak, in MB (10^6 bytes), pages of mapped files included (Linux)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[key].split()[0]) * 1024 / 1e6 for name, key in (("rss_mb", "VmRSS"), ("peak_mb", "VmHWM"))}


def serve(commands: Mapping[str, Callable[..., dict[str, Any]]]) -> None:
    """Answer requests until the input ends."""
    answers = os.fdopen(int(sys.argv[1]), "w", buffering=1)
    print(json.dumps({"imports_s": process_age(), **memory()}), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {**commands[request.pop("command")](**request), **memory()}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers)
