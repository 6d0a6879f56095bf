"""RoPE in a config, in the words of transformers 5 and in those of the readers that do not know these."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def longrope_turn(config: PreTrainedConfig) -> int | None:
    """The length beyond which LongRoPE turns all keys by other angles than up to it; None for other kinds of RoPE."""
    found = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    kinds = [found, *(each for each in found.values() if isinstance(each, dict))]
    return next(
        (int(each["original_max_position_embeddings"]) for each in kinds if each.get("rope_type") == "longrope"), None
    )


def with_old_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration that says of RoPE what it says in ``rope_parameters`` in the old words too, where there are some.

    transformers 5 writes the new words alone. transformers 4, mlx-lm and exllamav2 know the old ones, ``rope_theta``
    and ``rope_scaling`` at the top level, and take a base of 10000 where they do not find them. What is there stays.
    """
    result = dict(config)
    if isinstance(config.get("text_config"), dict):
        result["text_config"] = with_old_rope(config["text_config"])
    return {**(_old_rope(config) or {}), **result}


def says_old_rope(config: Mapping[str, Any]) -> bool:
    """Whether who reads the old words alone reads what is meant: a base of 10000 need not be said of a Llama."""
    if isinstance(config.get("text_config"), dict) and not says_old_rope(config["text_config"]):
        return False
    old = _old_rope(config)
    if old is None:
        return False
    missing = {key: value for key, value in old.items() if key not in config}
    return not missing or (missing == {"rope_theta": 10000} and config.get("model_type") == "llama")


def _old_rope(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The old words, none where they are there or none are needed; None where there are none for this."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or config.get("rope_scaling") is not None:
        return {}
    old: dict[str, Any] = {}
    if any(isinstance(value, dict) for value in rope.values()):  # by the type of layer
        full, sliding = rope.get("full_attention"), rope.get("sliding_attention")
        if config.get("model_type") != "gemma3_text" or not isinstance(full, dict) or not isinstance(sliding, dict):
            return None
        old["rope_local_base_freq"] = sliding.get("rope_theta")
        rope = full
    old |= {key: rope.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    scaling = {key: value for key, value in rope.items() if key not in old}
    old["rope_scaling"] = scaling if scaling.get("rope_type", "default") != "default" else None
    return {key: value for key, value in old.items() if value is not None}
