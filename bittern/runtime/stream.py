"""Generated tokens as text, as soon as it is certain."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextStream:
    """Tokens in, text out, in pieces that end neither inside a character nor inside a stop text.

    Args:
        tokenizer: the model's.
        prompt: tokens before the first one that is added.
        stop: texts that end the stream and do not appear in it.

    Attributes:
        stopped: whether one of them has come.
    """

    _CONTEXT = 16  # prompt tokens that the first new ones are decoded after

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: list[int], stop: tuple[str, ...]) -> None:
        self._tokenizer = tokenizer
        last, first = len(prompt), max(0, len(prompt) - self._CONTEXT)
        # From and up to whole characters, of up to four tokens: one stray byte makes others unreadable.
        places = product(range(last, max(-1, last - 4), -1), range(first, max(-1, first - 4), -1))
        end, start = next((place for place in places if self._whole(prompt, *place)), (last, first))
        self._ids, self._read = prompt[start:], end - start  # the latter is how many of them are out
        # A token that begins a character may begin with other text, which is out too.
        self._out = max(self._decode(prompt[start:end]), self._decode(self._ids).rstrip("\ufffd"), key=len)
        self._stop = stop
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that has become certain with this token."""
        self._ids.append(token)
        # Tokenizers join words by what stands before them, so new tokens are decoded behind old ones.
        now = self._decode(self._ids)
        if now.endswith("\ufffd"):  # the first bytes of a character
            return ""
        new = now[len(self._out) :]
        if new:
            self._ids = self._ids[self._read :]
        self._read, self._out = len(self._ids), self._decode(self._ids)
        return self._certain(new)

    def finish(self) -> str:
        """What was held back: before a character that was never whole, and because a stop text could have begun."""
        new = self._decode(self._ids).rstrip("\ufffd")[len(self._out) :]
        certain = self._certain(new)
        rest, self._held = certain + self._held, ""
        return rest

    def _whole(self, prompt: list[int], end: int, start: int) -> bool:
        text = self._decode(prompt[start:end])
        return not text.endswith("\ufffd") and not (start and text.startswith("\ufffd"))

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def _certain(self, new: str) -> str:
        text = self._held + new
        found = [start for start in map(text.find, self._stop) if start >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max(
            (size for stop in self._stop for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0
        )
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]
