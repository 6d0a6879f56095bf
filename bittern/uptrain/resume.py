"""What a killed uptraining goes on from: its windows and its last state, in a hidden sibling of the output."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bittern.calibration import tokens_hash
from bittern.checkpoint import Checkpoint
from bittern.errors import BitternError
from bittern.quantize.resume import change, computed_by, source_hashes
from bittern.training.state import read_story
from bittern.writer import explained, lock_folder

STATE, WINDOWS = "state.safetensors", "windows.safetensors"


@contextmanager
def training_folder(output: Path, rank: int) -> Iterator[Path]:
    """The sibling of the output that holds windows and state until the output stands; one run at a time."""
    output = Path(os.path.abspath(output))  # noqa: PTH100 - as the writer names it
    folder = output.with_name(f".{output.name}.training")
    if rank:
        yield folder
        return
    with explained(output):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(folder, f"output {output}: another bittern is training this")
    with os.fdopen(lock):
        try:
            if not (folder / WINDOWS).exists():  # a kill while the folder was removed
                (folder / STATE).unlink(missing_ok=True)
            yield folder
        finally:
            if not (folder / STATE).exists():  # nothing to go on from
                shutil.rmtree(folder, ignore_errors=True)


def settings_of(
    given: dict[str, Any], checkpoint: Checkpoint, text: Tensor | None, place: torch.device
) -> dict[str, Any]:
    """What must be the same for a state to be gone on from: options, source, text that it is measured on, programs."""
    left_out = ("resume", "overwrite", "max_shard_size", "dtype", "device", "revision")
    return {
        **{key: str(value) for key, value in given.items() if key not in left_out},
        "source": f"{checkpoint.path} {checkpoint.revision}",
        **source_hashes(checkpoint),
        **computed_by(place),
        "tokens of the text to measure on": "none" if text is None else tokens_hash(text),
    }


def check_resumable(state: Path, settings: dict[str, Any], resume: bool) -> None:
    """Remove a state that is not to be gone on from; refuse one that belongs to other options."""
    if not resume:
        state.unlink()
        (state.parent / WINDOWS).unlink(missing_ok=True)
        return
    found = read_story(state).get("settings", {})
    for key, value in settings.items():
        if found.get(key) != value:
            raise BitternError(
                f"{state.parent}: holds a run that differs ({change(key, str(found.get(key)), value)}); what it was"
                " started with goes on with it, --no-resume starts over"
            )
