"""Capture what a decoder feeds its blocks, and run the blocks one at a time.

The rest of the model then need not be in memory. Nothing here knows an architecture: the model's own
forward prepares masks and position embeddings, and its blocks are asked to record instead of compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bittern.errors import BitternError, first_line


@dataclass
class BlockCall:
    """The arguments of one block for one batch, without the hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output for a hidden state of shape (batch, positions, hidden_size)."""
        output = block(hidden, *self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple | list) else output  # type: ignore[no-any-return]


_FORMS: tuple[Callable[[Tensor], Any], ...] = (lambda x: x, lambda x: (x,), lambda x: (x, None))
"""What blocks return: the hidden state, in a tuple, or with weights of attention that nobody asked for."""


_OTHER_FORM = (TypeError, IndexError, ValueError, RuntimeError, AttributeError)
"""What a model raises where its blocks return something else than it expects."""


class _AllBlocksSeen(Exception):
    """Ends the model's forward after the last block: norm and lm_head need not exist."""


def capture(model: nn.Module, blocks: nn.ModuleList, ids: Tensor) -> tuple[Tensor, list[BlockCall]]:
    """Run a model up to its first block and record how it calls each one.

    Args:
        model: embeddings and buffers must be in memory, the blocks may be on meta.
        blocks: the decoder blocks of the model.
        ids: int64 (batch, positions).

    Returns:
        The hidden state before the first block, and one call per block.

    Raises:
        BitternError: for a model that changes the hidden state between its blocks, or shares keys among them (Gemma 4).
    """
    for form in _FORMS:
        recorded = _record(model, blocks, ids, form)
        if recorded is not None:
            return recorded
    raise BitternError(
        f"{type(model).__name__}: its blocks are given more of each other than the hidden state that one returns, which"
        " is not supported; only quantize --method rtn does without a walk through them"
    )


def capture_all(
    model: nn.Module, blocks: nn.ModuleList, batches: Sequence[Tensor], device: torch.device
) -> tuple[list[Tensor], list[list[BlockCall]]]:
    """Per batch of ids, the hidden states before the first block, and how each block is called; see :func:`capture`."""
    hidden: list[Tensor] = []
    calls: list[list[BlockCall]] = []
    for ids in batches:
        state, recorded = capture(model, blocks, ids.to(device))
        hidden.append(state.clone())  # the call may hold the original
        calls.append(share_equal(recorded, calls[0]) if calls else recorded)
    return hidden, calls


def advance(block: nn.Module, hidden: Sequence[Tensor], calls: Sequence[BlockCall]) -> None:
    """Replace the hidden states by the block's outputs."""
    with torch.no_grad():
        for state, call in zip(hidden, calls, strict=True):
            # In place: new tensors in the place of old ones would leave holes all over the heap.
            state.copy_(call.run(block, state))


def sixteen_bits(device: torch.device, wanted: bool | None = None) -> AbstractContextManager[None]:
    """Products in bfloat16; unless it is said whether, where that is faster than fp32."""
    enabled = fast_in_sixteen_bits(device) if wanted is None else wanted
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


@contextmanager
def rounded_once(block: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Have :func:`sixteen_bits` round a block's weights when it first meets them, not for every batch.

    They must not change meanwhile: what was rounded is kept until the outermost of such contexts ends, and that of
    tensors alone that may want gradients. So weights want gradients inside, and none afterwards.
    """
    weights = [each for each in block.parameters() if each.is_floating_point()] if wanted else []
    with torch.autocast(weights[0].device.type, enabled=False) if weights else nullcontext():
        for each in weights:
            each.requires_grad_(True)
        try:
            yield
        finally:
            for each in weights:
                each.requires_grad_(False)


def fast_in_sixteen_bits(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 faster than fp32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def _record(
    model: nn.Module, blocks: nn.ModuleList, ids: Tensor, form: Callable[[Tensor], Any]
) -> tuple[Tensor, list[BlockCall]] | None:
    """One recording; None when blocks do not receive what the block before them returned.

    Some architectures return a tuple from their blocks and index or unpack it, which only shows by trying.
    """
    calls: list[BlockCall] = []
    hidden_states: list[Tensor] = []

    def record(*args: Any, **kwargs: Any) -> Any:
        if not args:
            args = (kwargs.pop("hidden_states"),)
        hidden_states.append(args[0])
        calls.append(BlockCall(args[1:], kwargs))
        if len(calls) == len(blocks) or args[0] is not hidden_states[0]:
            raise _AllBlocksSeen
        return form(args[0])

    with _replaced_forward(blocks, record), torch.no_grad():
        try:
            model(ids, use_cache=False)
        except _AllBlocksSeen:
            pass
        except _OTHER_FORM as error:
            if not calls or isinstance(error, torch.OutOfMemoryError):
                raise
            return None
    if len(calls) != len(blocks) or hidden_states[-1] is not hidden_states[0]:
        return None
    return hidden_states[0], calls


def logits_after(model: nn.Module, blocks: nn.ModuleList, ids: Tensor, hidden: Tensor) -> Tensor:
    """What a model makes of the hidden state behind its last block; it can be differentiated by ``hidden``.

    Args:
        model: all but its blocks must be in memory.
        blocks: the decoder blocks of the model.
        ids: int64 (batch, positions).
        hidden: (batch, positions, hidden_size).

    Returns:
        Logits, (batch, positions, vocabulary).

    Raises:
        BitternError: for a model that changes the hidden state between its blocks, or shares keys among them (Gemma 4).
    """
    reason: Exception | None = None
    for form in _FORMS:
        seen: list[Tensor] = []

        def give(*args: Any, seen: list[Tensor] = seen, form: Callable[[Tensor], Any] = form, **kwargs: Any) -> Any:
            seen.append(args[0] if args else kwargs["hidden_states"])
            return form(hidden)

        with _replaced_forward(blocks, give):
            try:
                logits: Tensor = model(ids, use_cache=False).logits
            except _OTHER_FORM as error:
                if not seen or isinstance(error, torch.OutOfMemoryError):
                    raise
                reason = reason or error
                continue
        if all(state is hidden for state in seen[1:]) and logits.shape[:2] == hidden.shape[:2]:
            return logits
    found = "" if reason is None else f" ({type(reason).__name__}: {first_line(reason)})"
    raise BitternError(
        f"{type(model).__name__}: its blocks are given more of each other than the hidden state that one returns{found}"
    ) from reason


@contextmanager
def _replaced_forward(blocks: nn.ModuleList, forward: Callable[..., Any]) -> Iterator[None]:
    for block in blocks:
        block.forward = forward
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def share_equal(new: Any, old: Any) -> Any:
    """``new``, with every tensor that equals its counterpart in ``old`` replaced by that one.

    Masks and position embeddings are the same for every batch: this keeps one copy of them.
    """
    if isinstance(new, Tensor) and isinstance(old, Tensor):
        same = new.shape == old.shape and new.dtype == old.dtype and torch.equal(new, old)
        return old if same else new
    if isinstance(new, BlockCall) and isinstance(old, BlockCall):
        return BlockCall(share_equal(new.args, old.args), share_equal(new.kwargs, old.kwargs))
    if isinstance(new, dict) and isinstance(old, dict):
        return {key: share_equal(value, old.get(key)) for key, value in new.items()}
    if type(new) in (tuple, list) and type(old) is type(new) and len(new) == len(old):
        return type(new)(share_equal(a, b) for a, b in zip(new, old, strict=True))
    return new
