"""One forward pass of several sequences: tokens in, the logits that choose the next ones out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from bittern.errors import BitternError
from bittern.rope import longrope_turn
from bittern.runtime.cache import new_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from bittern.runtime.decoder import Decoder

Step = Callable[[Sequence[Sequence[int]]], Tensor]
_AHEAD = 4096  # tokens that torch's cache has room for beyond the prompts at first; more of them double it
# Models whose forward takes no positions because distances are all they look at.
_RELATIVE = ("bloom", "mpt")
_PADDED_LAYERS = ("full_attention", "sliding_attention")


def native_decoder(model: PreTrainedModel) -> Decoder | None:
    """What :func:`bittern.load` attached to a model whose tensors still are what they were then."""
    found = cast("Decoder | None", vars(model).get("native_decoder"))
    return found if found is not None and found.fits(model) else None


def can_batch(model: PreTrainedModel) -> bool:
    """Whether sequences of unequal length can be computed side by side."""
    if native_decoder(model) is not None:
        return True
    parameters, config = inspect.signature(model.forward).parameters, model.config.get_text_config(decoder=True)
    placed = _takes_positions(model) or config.model_type in _RELATIVE
    kinds = getattr(config, "layer_types", None) or ()
    return (
        "attention_mask" in parameters
        and "past_key_values" in parameters
        and placed
        and not model._is_stateful
        and all(kind in _PADDED_LAYERS for kind in kinds)
    )


def keeps_nothing(model: PreTrainedModel) -> bool:
    """Whether a model has neither cache nor state, so that every step computes all tokens so far."""
    return _cache_name(model) is None and "state" not in inspect.signature(model.forward).parameters


def _cache_name(model: PreTrainedModel) -> str | None:
    """What a model's forward calls its cache, which state spaces have another name for; None where it takes none."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in ("cache_params", "past_key_values") if name in parameters), None)


def _takes_positions(model: PreTrainedModel) -> bool:
    """Whether forward takes positions that begin at 0; RoBERTa and its kin count their own, from elsewhere on."""
    own = any(hasattr(module, "create_position_ids_from_input_ids") for module in model.modules())
    return "position_ids" in inspect.signature(model.forward).parameters and not own


def make_step(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], rooms: Sequence[int], kv_cache: str | None
) -> Step:
    """A function that appends tokens to sequences.

    Args:
        model: where it computes natively, that is used.
        prompts: what the first call is going to append; later ones append one token or none to each.
        rooms: for each of them, how many tokens may follow.
        kv_cache: how keys and values are kept, as in GenerationOptions.

    Returns:
        From new tokens by sequence to the logits after the last of them, fp32 (sequences, vocabulary) on the CPU;
        rows of sequences without new tokens hold anything.

    Raises:
        BitternError: for a way to keep keys and values that the model has no place for.
    """
    turn = longrope_turn(model.config)
    if turn is not None and len(prompts) == 1:
        return _begun_anew(turn, lambda: _plain_step(model, prompts, rooms, kv_cache))
    return _plain_step(model, prompts, rooms, kv_cache)


def _begun_anew(turn: int, make: Callable[[], Step]) -> Step:
    """A step for one sequence that computes all of it once more where it passes ``turn``, as transformers does.

    The keys in the cache were turned by the angles of a short one.
    """
    step = make()
    tokens: list[int] = []

    def forward(new: Sequence[Sequence[int]]) -> Tensor:
        nonlocal step
        before = len(tokens)
        tokens.extend(new[0])
        if not 0 < before <= turn < len(tokens):
            return step(new)
        step = make()
        return step([tokens])

    return forward


def _plain_step(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], rooms: Sequence[int], kv_cache: str | None
) -> Step:
    """As :func:`make_step`, whatever becomes of RoPE."""
    decoder = native_decoder(model)
    if decoder is not None:
        longest = max(len(prompt) + room for prompt, room in zip(prompts, rooms, strict=True))
        cache = decoder.new_cache(len(prompts), longest, cast(Any, kv_cache or "fp32"))
        return lambda tokens: decoder.forward(cache, tokens)
    if kv_cache == "fp32" and model.dtype != torch.float32:
        raise BitternError(f"kv_cache: fp32 is for a model that computes in fp32, found {model.dtype}; leave it out")
    fixed: dict[str, Any] = {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        # A slice of several sequences is not contiguous: in bfloat16, torch would multiply each of its rows with a copy
        # of the head. Indices copy the positions instead.
        fixed["logits_to_keep"] = 1 if len(prompts) == 1 else torch.tensor([-1], device=model.device)
    name = _cache_name(model)
    if name is None:
        if kv_cache not in (None, "fp32"):
            kind = model.config.model_type
            raise BitternError(f"kv_cache: expected a model with keys and values to keep in {kv_cache}, found {kind}")
        return _whole_step(model, len(prompts), fixed) if keeps_nothing(model) else _state_step(model, fixed)
    width = max(map(len, prompts))
    fixed |= {name: new_cache(model.config, width + min(max(rooms), _AHEAD), kv_cache), "use_cache": True}
    return _cached_step(model, prompts, fixed)


def _cached_step(model: PreTrainedModel, prompts: Sequence[Sequence[int]], fixed: dict[str, Any]) -> Step:
    """Sequences side by side in one batch, the shorter ones filled up on the left."""
    width, used = max(map(len, prompts)), 0
    missing = torch.tensor([width - len(prompt) for prompt in prompts], device=model.device)[:, None]
    placed, padded = _takes_positions(model), len(set(map(len, prompts))) > 1

    def step(tokens: Sequence[Sequence[int]]) -> Tensor:
        nonlocal used
        count = max(map(len, tokens))
        ids = torch.tensor([[0] * (count - len(new)) + list(new) for new in tokens], device=model.device)
        start, used = used, used + count
        columns, here = torch.arange(used, device=model.device), dict(fixed)
        if placed:  # of sequences alone too: Bamba, left to itself, begins at 0 in every step
            here["position_ids"] = (columns[start:] - missing).clamp_min(0)
        if padded:
            here["attention_mask"] = (columns >= missing).long()
        return _last_logits(model(ids, **here))

    return step


def _state_step(model: PreTrainedModel, fixed: dict[str, Any]) -> Step:
    """RWKV, whose state is not put into a cache but handed out and taken back; for sequences of one length."""
    state: Any = None

    def step(tokens: Sequence[Sequence[int]]) -> Tensor:
        nonlocal state
        ids = torch.tensor([new or [0] for new in tokens], device=model.device)
        found = model(ids, state=state, use_cache=True, **fixed)
        state = found.state
        return _last_logits(found)

    return step


def _whole_step(model: PreTrainedModel, count: int, fixed: dict[str, Any]) -> Step:
    """Each of ``count`` sequences anew, and whole: for models that keep nothing of what they have computed."""
    sequences: list[list[int]] = [[] for _ in range(count)]

    def step(tokens: Sequence[Sequence[int]]) -> Tensor:
        found = []
        for sequence, new in zip(sequences, tokens, strict=True):
            sequence.extend(new)
            # XLNet and XLM predict in the place of a further token, which transformers knows how to add.
            inputs: dict[str, Any] = cast(Any, model).prepare_inputs_for_generation(
                torch.tensor([sequence], device=model.device), use_cache=False
            )
            found.append(_last_logits(model(**inputs, **fixed)))
        return torch.cat(found)

    return step


def _last_logits(output: Any) -> Tensor:
    logits: Tensor = output.logits[:, -1]
    return logits.float().cpu()
