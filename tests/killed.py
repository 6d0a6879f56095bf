"""Quantizes over and over, killed at random moments: ``python -m tests.killed SOURCE OUT KILLS SEED OPTIONS``.

A moment is a call that changes the disk, or a solved layer; a write that is killed has written half. Every attempt is a
forked process, so that none pays for imports. Prints, as JSON, what became of each: the moment, and the blocks that
were kept by then.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import bittern
import bittern.quantize.pipeline
from bittern.checkpoint import open_checkpoint
from bittern.model import build

CALLS = ("pwrite", "fsync", "rename", "open", "unlink", "rmdir", "mkdir", "posix_fallocate")


class Moments:
    """Counts moments; the one whose turn it is ends the process."""

    def __init__(self, last: int) -> None:
        self.count, self.last = 0, last

    def layer(self, _: dict[str, Any]) -> None:
        """A layer is solved."""
        self()

    def __call__(self) -> bool:
        """One moment has come; whether the next one is the last."""
        self.count += 1
        if self.count == self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.count == self.last - 1

    def watch(self, name: str) -> None:
        original: Callable[..., Any] = getattr(os, name)

        def watched(*args: Any, **named: Any) -> Any:
            if self() and name == "pwrite":  # the next moment is inside of this call
                original(args[0], memoryview(args[1])[: len(args[1]) // 2], *args[2:])
                self()
            return original(*args, **named)

        setattr(os, name, watched)


def attempt(source: str, out: Path, options: dict[str, Any], last: int) -> int:
    """Quantize in a process of its own that is killed at moment ``last``; the moments of one that was not, else 0."""
    count = out.with_suffix(".count")
    process = os.fork()
    if process == 0:
        torch.set_num_threads(torch.get_num_threads())  # a new pool of threads, before two threads ask for it at once
        moments = Moments(last)
        for name in CALLS:
            moments.watch(name)
        bittern.quantize(source, out, **options, on_progress=moments.layer)
        count.write_text(str(moments.count))
        os._exit(0)
    _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status):
        return 0
    assert os.WEXITSTATUS(status) == 0, "the quantization failed"
    found = int(count.read_text())
    count.unlink()
    return found


def main(source: str, out: Path, kills: int, seed: int, options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    with open_checkpoint(source) as checkpoint:  # what is imported here, no attempt imports again
        build(checkpoint.config)
        checkpoint.tokenizer()
    whole = out.with_suffix(".whole")
    total = attempt(source, whole, options, -1)
    chosen = random.Random(seed)
    story: list[list[int]] = []
    while not out.exists():
        # A part of the whole way, so that kills fall on every stage of it and not all on the first blocks or the last.
        last = chosen.randrange(1, total // 3) if len(story) < kills else -1
        attempt(source, out, options, last)
        story.append([last, len(list(out.parent.glob(f".{out.name}.quantizing/*/block-*.safetensors")))])
    sys.stdout.write(json.dumps({"moments": total, "attempts": story}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), json.loads(sys.argv[5]))
