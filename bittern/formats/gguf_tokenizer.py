"""A GGUF file's tokenizer: names of what cuts text into words, and what transformers overlooks in the file.

Names and expressions as in llama.cpp's llama-vocab.cpp.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bittern.errors import BitternError
from bittern.formats.gguf_config import read_field

if TYPE_CHECKING:
    from gguf import GGUFReader
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of tokens."""

_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
GPT2 = _CONTRACTIONS + r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|"
_LLAMA3 = _WORDS + r"\p{N}{1,3}" + _REST
_QWEN2 = _WORDS + r"\p{N}" + _REST
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGITS = r"\p{N}"

PRE_TOKENIZERS: dict[str, tuple[tuple[str, ...], bool]] = {
    "gpt-2": ((GPT2,), False),
    "smollm": ((_DIGITS, GPT2), False),
    "llama-bpe": ((_LLAMA3,), True),
    "smaug-bpe": ((_LLAMA3,), False),
    "qwen2": ((_QWEN2,), False),
    "tekken": ((_TEKKEN,), True),
}
"""Name -> what cuts text into words, one expression after the other, and whether whole words win over merges."""

_ALIASES = {
    **dict.fromkeys(("exaone4", "gigachat", "mpt", "olmo", "phi-2"), "gpt-2"),
    **dict.fromkeys(("codeshell", "command-r", "exaone", "minerva-7b", "refact", "starcoder"), "smollm"),
    **dict.fromkeys(("falcon3", "lfm2", "llama3", "llama-v3", "midm-2.0", "pixtral"), "llama-bpe"),
    **dict.fromkeys(("deepseek-r1-qwen", "hunyuan", "megrez", "stablelm2"), "qwen2"),
    "dbrx": "smaug-bpe",
}
TEMPLATE = "tokenizer.chat_template"
"""Key of the chat template; behind it and a full stop, by :func:`template_name`, those of other names."""
_LEFT_ALONE = ("default", "qwen35", "gpt-4o", "llama4")
"""Those that transformers has a way with and bittern does not."""


def mend_tokenizer(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Make a tokenizer that transformers read from a GGUF file cut text as the file says, and give it all templates.

    transformers 5.23 knows a part of the names of what cuts text into words, and takes any other for GPT-2's; it keeps
    merges where whole words win; respells control and user-defined tokens that are not written in bytes as if they
    were, and so cuts them; puts a space before SentencePiece's text whatever the file says, but none where text begins
    with one or a special token came before; and reads the default alone of several chat templates.

    Raises:
        BitternError: for a name of what cuts text into words that neither knows.
    """
    from gguf import GGUFReader

    reader = GGUFReader(path)

    def stated(key: str) -> Any:
        return read_field(reader, f"tokenizer.ggml.{key}")

    backend: Any = tokenizer.backend_tokenizer
    if stated("model") == "gpt2":
        _respell(tokenizer, backend, stated("tokens"), stated("token_type") or [])
        pre = stated("pre")
        if pre is not None:
            _cut_words(backend, pre)
    if stated("model") == "llama":
        _place_spaces(backend, stated("add_space_prefix") is not False)
    tokenizer.chat_template = _chat_templates(reader)


def _chat_templates(reader: GGUFReader) -> str | dict[str, str] | None:
    """The chat template, or several by name, as transformers has them."""
    found: dict[str, str] = {}
    for key in (key for key in reader.fields if key.startswith(f"{TEMPLATE}.")):
        template = read_field(reader, key)
        if isinstance(template, str):
            found[template_name(key.removeprefix(f"{TEMPLATE}."))] = template
    default = read_field(reader, TEMPLATE)
    if isinstance(default, str):
        return found | {"default": default} if found else default
    return found or None


def template_name(name: str) -> str:
    """The name of a chat template as the package gguf writes it; it becomes that of a file."""
    return re.sub(r"\W", "_", name, flags=re.ASCII)


def _place_spaces(backend: Any, prefix: bool) -> None:
    """Spell spaces as llama.cpp does SentencePiece's; with ``prefix``, one more before all text between tokens."""
    from tokenizers import decoders, normalizers

    spelled = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spelled]) if prefix else spelled
    backend.pre_tokenizer = None
    parts: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefix else parts)


def _cut_words(backend: Tokenizer, pre: str) -> None:
    from tokenizers import Regex, pre_tokenizers

    found = PRE_TOKENIZERS.get(_ALIASES.get(pre, pre))
    if found is None and pre not in _LEFT_ALONE:
        known = ", ".join(sorted({*PRE_TOKENIZERS, *_ALIASES, *_LEFT_ALONE}))
        raise BitternError(f"tokenizer.ggml.pre: expected one of {known}, found {pre}: text would be cut wrongly")
    if found is None:
        return
    patterns, whole_words = found
    cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, last])
    backend.model.ignore_merges = whole_words


def _respell(tokenizer: PreTrainedTokenizerBase, backend: Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Give control and user-defined tokens the spelling of the file, and have them found in text as they are."""
    from tokenizers import AddedToken, models

    vocabulary = backend.get_vocab(with_added_tokens=False)
    whole = [
        (number, token, kind)
        for number, (token, kind) in enumerate(zip(tokens, types, strict=False))
        if kind in (CONTROL, USER_DEFINED) and vocabulary.get(token) != number
    ]
    if not whole:
        return
    spelled = {number: token for token, number in vocabulary.items()}
    spelled |= {number: token for number, token, _ in whole}
    merges = [(left, right) for left, right in json.loads(backend.to_str())["model"]["merges"]]
    backend.model = models.BPE(vocab={token: number for number, token in spelled.items()}, merges=merges)
    for special in (True, False):
        kind = CONTROL if special else USER_DEFINED
        added = [AddedToken(token, normalized=False, special=special) for _, token, its in whole if its == kind]
        tokenizer.add_tokens(added, special_tokens=special)
