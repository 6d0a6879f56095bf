"""The state of a training run in one safetensors file, from which it goes on as if nothing had happened.

The tensors are the trained parameters, Adam's two moments of each and how many steps these have seen; everything else
(step, curve, what was measured before) is JSON in the header. The file is replaced as a whole, so a kill at any moment
leaves the older or the newer. Windows to train on are in such a file, too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from bittern.errors import BitternError, first_line
from bittern.writer import explained, fsync

MOMENTS = ("exp_avg", "exp_avg_sq")
_STEP = "step"  # a parameter that has no gradient in some steps is not updated in these
_STORY = "bittern"  # key in the header


def save_state(
    path: Path,
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer | None,
    story: dict[str, Any],
    write: bool = True,
) -> None:
    """Write the state.

    Args:
        path: the file.
        parameters: what is trained, by name; whole, or shards of them.
        optimizer: Adam with these parameters; None before the first step.
        story: what is to be known besides, as JSON holds it.
        write: False on the processes that only help to put shards together.

    Raises:
        BitternError: when the disk refuses.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        state = {} if optimizer is None else optimizer.state[parameter]
        for key, tensor in (
            ("", parameter.detach()),
            *((key, state[key]) for key in (_STEP, *MOMENTS) if key in state),
        ):
            found = whole(tensor)
            if write:
                tensors[f"{name}:{key}" if key else name] = found.cpu().contiguous()
    if not write:
        return
    partial = path.with_suffix(".partial")
    with explained(path):
        try:
            save_file(tensors, partial, metadata={_STORY: json.dumps(story)})
        except SafetensorError as error:
            raise BitternError(f"{path}: cannot be written: {first_line(error)}") from error
        fsync(partial)
        partial.rename(path)
        fsync(path.parent)


def read_story(path: Path) -> dict[str, Any]:
    """What :func:`save_state` was told to keep besides tensors.

    Raises:
        BitternError: for a file that it has not written.
    """
    try:
        with safe_open(path, framework="pt") as file:
            story: dict[str, Any] = json.loads(file.metadata()[_STORY])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise BitternError(
            f"{path}: expected what training has kept, --no-resume starts over: {first_line(error)}"
        ) from error
    return story


def load_state(
    path: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Put a state into parameters and, of those that had a gradient, into the optimizer.

    Raises:
        BitternError: when the file lacks one of them.
    """
    with safe_open(path, framework="pt") as file, torch.no_grad():
        stored = set(file.keys())
        missing = set(parameters) - stored
        if missing:
            raise BitternError(f"{path}: expected parameter {min(missing)}, found none; --no-resume starts over")
        for name, parameter in parameters.items():
            _fill(parameter, file.get_tensor(name))
            if optimizer is None or f"{name}:{_STEP}" not in stored:  # it had no gradient yet
                continue
            moments = {moment: torch.zeros_like(parameter) for moment in MOMENTS}
            for moment, tensor in moments.items():
                _fill(tensor, file.get_tensor(f"{name}:{moment}"))
            optimizer.state[parameter] = {_STEP: file.get_tensor(f"{name}:{_STEP}"), **moments}


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor of a state, mapped."""
    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor, put together when each process has a part of it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _fill(target: Tensor, values: Tensor) -> None:
    if isinstance(target, DTensor):
        values = distribute_tensor(values.to(target.device), target.device_mesh, target.placements)
    target.copy_(values)
