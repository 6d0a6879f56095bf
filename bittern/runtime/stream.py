"""Generated tokens as text, as soon as it is certain."""

from __future__ import annotations

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
        start = max(0, len(prompt) - self._CONTEXT)
        # Not inside a character, of up to four tokens: one stray byte makes those behind it unreadable.
        for _ in range(3):
            if start and self._decode(prompt[start:]).startswith("\ufffd"):
                start -= 1
        self._ids = prompt[start:]
        self._read = len(self._ids)  # how many of them the text so far covers
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
        new = now[len(self._before()) :]
        if new:
            self._ids = self._ids[self._read :]
        self._read = len(self._ids)
        return self._certain(new)

    def finish(self) -> str:
        """What was held back: before a character that was never whole, and because a stop text could have begun."""
        new = self._decode(self._ids).rstrip("\ufffd")[len(self._before()) :]
        certain = self._certain(new)
        rest, self._held = certain + self._held, ""
        return rest

    def _before(self) -> str:
        """The text that is already out, of the tokens that are still looked at."""
        return self._decode(self._ids[: self._read]).rstrip("\ufffd")

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
