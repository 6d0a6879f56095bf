"""A conversation with a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from bittern.runtime.generate import GenerationOptions, chat_prompt, generate, room_beside
from bittern.tokenizer import check_text, context_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Chat:
    """Questions and answers, as many as the model's context holds.

    Args:
        model, tokenizer: of a checkpoint. Without a chat template each question stands alone, as plain text.
        options: how to write.
        new_tokens: of an answer at most, where ``options`` does not say.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: GenerationOptions, new_tokens: int
    ) -> None:
        self._model, self._tokenizer, self._options = model, tokenizer, options
        self._limit, self._wanted = context_length(model.config), options.max_new_tokens or new_tokens
        self._turns: list[dict[str, str]] = []

    def answer(self, question: str, on_text: Callable[[str], None]) -> bool:
        """Answer a question; whether the oldest turns were forgotten, so that the context has room for that.

        A quarter of the context is kept for the answer, if it is to be so long.

        Args:
            question: what the user says.
            on_text: called with pieces of the answer.

        Raises:
            BitternError: for a question that cannot be answered; the conversation is what it was before it.
        """
        check_text(question, "what was typed")
        if self._tokenizer.chat_template is None:  # each question stands alone
            self._turns = []
        turns = [*self._turns, {"role": "user", "content": question}]
        first = 0
        ids = self._prompt(turns)
        if self._limit is not None:
            while ids.shape[1] + min(self._wanted, self._limit // 4) > self._limit and first < len(turns) - 1:
                first += 2  # a question and its answer
                ids = self._prompt(turns[first:])
        room = room_beside(self._model, ids.shape[1], self._wanted)
        options = replace(self._options, max_new_tokens=room)
        result = generate(self._model, self._tokenizer, ids, options, on_text)
        self._turns = [*turns[first:], {"role": "assistant", "content": result.text}]
        return first > 0

    def _prompt(self, turns: list[dict[str, str]]) -> Tensor:
        if self._tokenizer.chat_template is not None:
            return chat_prompt(self._tokenizer, turns)
        ids: Tensor = self._tokenizer(turns[-1]["content"], return_tensors="pt")["input_ids"]
        return ids
