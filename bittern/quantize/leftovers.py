"""What the calls of a block that is stopped still name, and nothing will read again."""

from __future__ import annotations

from types import CodeType, FrameType
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bittern.replay import BlockCall

Local = tuple[int, CodeType, str]
"""A variable of a call under way: how many calls that one is within :meth:`BlockCall.run`, its code, and the name."""


class Reads(TorchDispatchMode):
    """Sees what is read for the last time before a batch comes to a stage of its block.

    Args:
        state: the block's input. That, and what is made of it, is the batch's own.
    """

    def __init__(self, state: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._own = storages(state)
        self._named: list[dict[Local, Tensor]] = []  # by stages
        self._read: list[set[int]] = []  # what was read after each

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = storages(args, kwargs)
        for after in self._read:
            after |= read
        result = func(*args, **(kwargs or {}))
        self._own |= storages(result) - read
        return result

    def arrive(self, frame: FrameType) -> None:
        """Note what the calls under way name, the innermost of which is ``frame``, when a stage's input has come."""
        self._named.append(self.named(frame))  # and keep it: another's storage could get its number
        self._read.append(set())

    def named(self, frame: FrameType) -> dict[Local, Tensor]:
        """What the calls under way name, the innermost of which is ``frame``, and is the batch's own."""
        return {
            (number, each.f_code, name): value
            for number, each in enumerate(_calls(frame))
            for name, value in each.f_locals.items()
            if isinstance(value, Tensor) and storages(value) <= self._own
        }

    def dead(self) -> list[set[Local]]:
        """For each stage, what was named when its input came and not read since."""
        return [
            {local for local, value in named.items() if not storages(value) & read}
            for named, read in zip(self._named, self._read, strict=True)
        ]


def _calls(frame: FrameType | None) -> list[FrameType]:
    """The calls under way in a block, from :meth:`BlockCall.run` to the innermost, which is given."""
    found: list[FrameType] = []
    while frame is not None and (not found or found[-1].f_code is not BlockCall.run.__code__):
        found.append(frame)
        frame = frame.f_back
    return found[::-1]


def empty(frame: FrameType | None, dead: set[Local]) -> None:
    """Take the elements from variables of calls under way: who reads them nevertheless is told that there are none."""
    for number, each in enumerate(_calls(frame)):
        for name in [name for at, code, name in dead if at == number and code is each.f_code]:
            value = each.f_locals.get(name)
            if isinstance(value, Tensor):
                for tensor in (value, value._base):  # which, of a view, is what it is a view of
                    if tensor is not None:
                        tensor.data = tensor.new_empty(0)


def storages(*trees: Any) -> set[int]:
    """Where the tensors in some arguments have their elements."""
    return {each.untyped_storage()._cdata for each in tree_leaves(trees) if isinstance(each, Tensor)}
