"""A tokenizer as llama.cpp's: pieces, their types, merges or scores, special ids, chat template.

llama.cpp knows two ways of cutting text that Llamas, Qwens and Gemmas use:

- "gpt2": byte-level BPE. The regular expressions that cut text into words are part of llama.cpp and chosen by name.
- "llama": SentencePiece's BPE, which joins neighbours whose joint piece has the best score. transformers has a list of
  merges in its place; a piece's score is made of its first merge, which gives the same cuts wherever the list holds
  every way to join two pieces, as lists made from a SentencePiece model do.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

from bittern.checkpoint import Checkpoint, contained, read_json
from bittern.errors import BitternError
from bittern.formats.gguf_tokenizer import (
    BYTE,
    CONTROL,
    GPT2,
    NORMAL,
    PRE_TOKENIZERS,
    TEMPLATE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    template_name,
)
from bittern.tokenizer import leading_bos

if TYPE_CHECKING:
    from gguf import GGUFWriter

_SPACE = "▁"  # SentencePiece's
_NAMES = {words: name for name, words in PRE_TOKENIZERS.items()} | {(PRE_TOKENIZERS["tekken"][0], False): "tekken"}


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer in llama.cpp's terms.

    Attributes:
        model: "gpt2" or "llama".
        pre: name of the regular expressions; "default" for "llama".
        tokens, types: one per row of the embedding.
        scores: of "llama".
        merges: of "gpt2", as "left right".
        space_prefix: a space is put before text; for "llama".
        ids: "bos", "eos", "eot", "eom", "unk" and "pad" -> id, those that there are.
        add_bos, add_eos: whether every text gets them.
        chat_template: one, or several by name.
        notes: what is not quite the same in llama.cpp.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    space_prefix: bool
    ids: dict[str, int]
    add_bos: bool
    add_eos: bool
    chat_template: str | dict[str, str] | None
    notes: tuple[str, ...]

    def write(self, writer: GGUFWriter) -> None:
        """Add it to a file's metadata."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.model == "llama":
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.space_prefix)
        else:
            writer.add_token_merges(self.merges)
        for name, number in self.ids.items():
            getattr(writer, f"add_{name}_token_id")(number)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        named = self.chat_template or {}
        named = {"default": named} if isinstance(named, str) else named
        # Not in one call of the writer's: it would list the names in another order in each process.
        others = {template_name(name): named[name] for name in sorted(named) if name != "default"}
        for name, template in others.items():
            writer.add_string(f"{TEMPLATE}.{name}", template)
        if others:
            writer.add_array(f"{TEMPLATE}s", list(others))
        if "default" in named:
            writer.add_chat_template(named["default"])


def read_vocabulary(checkpoint: Checkpoint, rows: int) -> Vocabulary:
    """Translate a checkpoint's tokenizer.

    Args:
        checkpoint: with a tokenizer that transformers loads.
        rows: of the embedding. Missing pieces are filled in as unused ones, and those beyond are left out.

    Raises:
        BitternError: for a tokenizer that llama.cpp would not follow.
    """
    tokenizer: Any = checkpoint.tokenizer()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refused(f"expected one that the tokenizers library holds, found {type(tokenizer).__name__}")
    found = json.loads(backend.to_str())
    model = found["model"]
    if model["type"] != "BPE":
        raise _refused(f"expected a BPE model, found {model['type']}")
    merges = [tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    notes: list[str] = []
    space_prefix, scores, pre = False, [], "default"
    tokens, types = _tokens(found, rows, notes)
    if model.get("byte_fallback"):
        space_prefix = _check_spaces(found, notes)
        scores = _scores(tokens, types, merges)
    else:
        pre = _pre_tokenizer(found, notes)
    start: list[int] = tokenizer("a", verbose=False)["input_ids"]
    ids = _special_ids(checkpoint, tokenizer, tokens, notes)
    if "eos" not in ids:
        raise _refused("expected an end-of-text token, found none")
    return Vocabulary(
        model="llama" if model.get("byte_fallback") else "gpt2",
        pre=pre,
        tokens=tokens,
        types=types,
        scores=scores,
        merges=[" ".join(pair) for pair in merges],
        space_prefix=space_prefix,
        ids=ids,
        add_bos=leading_bos(tokenizer) is not None,
        add_eos=len(start) > 1 and start[-1] == ids["eos"],
        chat_template=tokenizer.chat_template,
        notes=tuple(notes),
    )


def _refused(reason: str) -> BitternError:
    return BitternError(f"tokenizer: {reason}")


def _tokens(found: dict[str, Any], rows: int, notes: list[str]) -> tuple[list[str], list[int]]:
    """The piece and the type of every id."""
    fallback = bool(found["model"].get("byte_fallback"))
    pieces: dict[int, tuple[str, int]] = {}
    for token, number in found["model"]["vocab"].items():
        byte = fallback and re.fullmatch(r"<0x[0-9A-F]{2}>", token)
        pieces[number] = token, BYTE if byte else NORMAL
    for added in found["added_tokens"]:
        token, number = added["content"], added["id"]
        if added["special"]:
            pieces[number] = token, CONTROL
        elif not (fallback and _SPACE in token and number in pieces):  # spaces as merges make them
            pieces[number] = token, USER_DEFINED
        if added["lstrip"] or added["rstrip"]:
            notes.append(f"the spaces around {token!r} stay, where transformers drops them")
    unknown = found["model"].get("unk_token")
    if fallback and unknown is not None:
        number = found["model"]["vocab"][unknown]
        pieces[number] = unknown, UNKNOWN
    beyond = [token for number, (token, _) in sorted(pieces.items()) if number >= rows]
    if beyond:
        notes.append(f"left out tokens that have no row in the embedding: {', '.join(beyond)}")
    filled = [pieces.get(number, (f"[PAD{number}]", UNUSED)) for number in range(rows)]
    return [token for token, _ in filled], [kind for _, kind in filled]


def _steps(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """A normalizer or a pre-tokenizer as the list of its steps."""
    if part is None:
        return []
    return [step for one in part[key] for step in _steps(one, key)] if part["type"] == "Sequence" else [part]


def _pre_tokenizer(found: dict[str, Any], notes: list[str]) -> str:
    """llama.cpp's name for what cuts text into words."""
    from tokenizers import pre_tokenizers

    for step in _steps(found["normalizer"], "normalizers"):
        if step["type"] != "NFC":
            raise _refused(f"llama.cpp has no normalizer {step['type']} for byte-level BPE")
        notes.append("text is not brought into NFC form before it is cut into tokens, as transformers does")
    patterns: list[str] = []
    byte_level = False
    for step in _steps(found["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            byte_level = True
            patterns += [GPT2] if step["use_regex"] else []
        elif step["type"] == "Digits" and step["individual_digits"]:
            patterns.append(r"\p{N}")
        elif step["type"] == "Split" and (step["behavior"], step["invert"]) in (("Isolated", False), ("Removed", True)):
            patterns.append(step["pattern"].get("Regex", step["pattern"].get("String")))
        else:
            raise _refused(f"llama.cpp has nothing like the pre-tokenizer {json.dumps(step, ensure_ascii=False)}")
    name = _NAMES.get((tuple(patterns), bool(found["model"].get("ignore_merges"))))
    if name is None or not byte_level:
        raise _refused(f"none of llama.cpp's that bittern knows cuts text into words as this one does: {patterns}")
    missing = set(pre_tokenizers.ByteLevel.alphabet()) - set(found["model"]["vocab"])
    if missing:
        notes.append(f"{len(missing)} of 256 bytes have no token; llama.cpp drops them from text")
    return name


def _check_spaces(found: dict[str, Any], notes: list[str]) -> bool:
    """Whether a space is put before text, for a tokenizer whose spaces are SentencePiece's."""
    prefix = replaced = False
    for step in _steps(found["normalizer"], "normalizers"):
        if step["type"] == "Prepend" and step["prepend"] == _SPACE:
            prefix = True
        elif step["type"] == "Replace" and (step["pattern"], step["content"]) == ({"String": " "}, _SPACE):
            replaced = True
        else:
            raise _refused(f"llama.cpp has nothing like the normalizer {json.dumps(step, ensure_ascii=False)}")
    for step in _steps(found["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "Metaspace" and step["replacement"] == _SPACE:
            replaced, scheme = True, step["prepend_scheme"]
            if scheme != "never" and not prefix:
                prefix = True
                after = ", and after special tokens," if scheme == "first" else ","
                notes.append(f"a space is put before text that begins with one{after} where transformers puts none")
        elif not (
            replaced and step["type"] == "Split" and step["pattern"] == {"String": " "}
        ):  # finds none, as Gemma's
            raise _refused(f"llama.cpp has nothing like the pre-tokenizer {json.dumps(step, ensure_ascii=False)}")
    if not replaced:
        raise _refused(f"expected spaces written as {_SPACE}, found them as they are")
    return prefix


def _scores(tokens: list[str], types: list[int], merges: list[tuple[str, ...]]) -> list[float]:
    """A score per piece: minus the place of its first merge, so that better ones are joined first."""
    first: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        first.setdefault("".join(pair), rank)
    known, listed = {token for token, kind in zip(tokens, types, strict=True) if kind == NORMAL}, set(merges)
    for token in known:
        for cut in range(1, len(token)):
            pair = token[:cut], token[cut:]
            if pair[0] in known and pair[1] in known and pair not in listed:
                raise _refused(f"its merges do not join {pair[0]!r} and {pair[1]!r}; llama.cpp would, to {token!r}")
    return [-1e6 if kind != NORMAL else -float(first.get(token, 0)) for token, kind in zip(tokens, types, strict=True)]


def _is_id(found: Any, rows: int) -> TypeGuard[int]:
    return isinstance(found, int) and not isinstance(found, bool) and 0 <= found < rows


def _special_ids(checkpoint: Checkpoint, tokenizer: Any, tokens: list[str], notes: list[str]) -> dict[str, int]:
    """Ids of the tokens that have a part in generation; what ends a text is what transformers would stop at."""
    rows, stated = len(tokens), None
    if checkpoint.gguf is None and (checkpoint.folder / "generation_config.json").is_file():
        stated = read_json(contained(checkpoint.folder, "generation_config.json")).get("eos_token_id")
    if stated is None:
        stated = checkpoint.config.get("eos_token_id")
    ends = [end for end in (stated if isinstance(stated, list) else [stated]) if _is_id(end, rows)]
    ids: dict[str, int] = {}
    for name in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is None:
            number = checkpoint.config.get(f"{name}_token_id")
        if _is_id(number, rows):
            ids[name] = number
    ids.setdefault("eos", ends[0]) if ends else None
    others = list(dict.fromkeys(end for end in ends if end != ids.get("eos")))
    ids.update(zip(("eot", "eom"), others, strict=False))  # llama.cpp stops at any of them
    if len(others) > 2:
        more = ", ".join(tokens[end] for end in others[2:])
        notes.append(f"left out tokens that end a text, for GGUF has places for three: {more}")
    return ids
