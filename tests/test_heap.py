"""Whether tensors come from the heap or from the system, by the pages that the system had to clear."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import bittern
from bittern.quantize import heap
from bittern.quantize.stages import Walks
from tests import tiny

CODE = """
import json, resource, torch
from bittern.quantize import heap

def cleared():
    tensors = [torch.ones(2**21) for _ in range(20)]
    del tensors
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**21)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

heap.for_holding()
found = [cleared()]
heap.for_holding(2**23)
found.append(cleared())
heap.trim()
heap.for_solving()
found.append(cleared())
before = resident()
heap.trim()
found.append(before - resident())
heap.for_others()
before = resident()
cleared()
print(json.dumps([*found, resident() - before]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")
def test_what_is_mapped_is_cleared_every_time_and_what_the_heap_keeps_goes_back() -> None:
    """In a process of its own, whose heap nothing before it has filled."""
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", CODE], cwd=root, capture_output=True, text=True, check=True)
    holding, usual, solving, returned, left = json.loads(done.stdout)
    assert holding > 10 * 2**23 // 2**21  # of 4 kB, or of 2 MB each
    assert usual < holding / 3  # the heap has gone back to the system before
    assert solving < holding / 10
    assert returned > 9 * 2**23
    assert left < 9 * 2**23  # 64 MB may stay


@pytest.mark.parametrize("shape", [(2, 700, 1000), (3, 1), (5, 2**19), (0, 4)])
def test_pieces_are_all_rows_and_too_small_to_be_mapped(shape: tuple[int, ...]) -> None:
    x = torch.arange(float(torch.Size(shape).numel())).view(shape)
    found = list(heap.pieces(x.half()))
    assert torch.equal(torch.cat([x[:0].flatten(0, -2), *found]), x.half().flatten(0, -2))
    assert all(len(piece) <= 1 or piece.float().nbytes < 2**20 for piece in found)
    for piece in heap.pieces(x):
        piece.fill_(-1.0)
    assert bool((x == -1).all())  # they are views


def test_what_solving_a_block_has_freed_goes_back_before_the_block_is_walked_to_its_end(
    text: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a block's last matrices there is no other stage that would begin with that."""
    source = tiny.save(tiny.random_model(num_hidden_layers=2), tmp_path / "source", tokenizer)
    order: list[str] = []
    finish = Walks.finish

    def noted(walks: Walks) -> None:
        order.append("finish")
        finish(walks)

    monkeypatch.setattr(heap, "trim", lambda: order.append("trim"))
    monkeypatch.setattr(Walks, "finish", noted)
    bittern.quantize(
        source,
        tmp_path / "out",
        bits=4,
        group_size=32,
        dataset=str(text),
        nsamples=4,
        seqlen=32,
        on_prediction=lambda _: order.clear(),
        on_progress=lambda event: order.append(event["layer"]),
    )
    ends = [position for position, what in enumerate(order) if what == "finish"]
    assert len(ends) == 2
    for end in ends:
        assert order[end - 1] == "trim" and order[end - 2].endswith("down_proj")
