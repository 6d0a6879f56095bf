"""Scores a model's answers to questions whose right answers are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bittern.demo.corpus import Question
from bittern.tokenizer import encode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def right_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], batch_size: int = 32
) -> list[bool]:
    """Whether greedy decoding after each prompt would write the right answer, full stop included.

    One pass without decoding: greedy decoding writes a given text exactly when every token of it is
    the most likely one after those before it.
    """
    right: list[bool] = []
    for start in range(0, len(questions), batch_size):
        right += _batch(model, tokenizer, questions[start : start + batch_size])
    return right


def _batch(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]) -> list[bool]:
    # a word never spans the space before the answer, so that prompt and answer can be encoded apart
    prompts = [tokenizer(question.prompt)["input_ids"] for question in questions]
    answers = [encode(tokenizer, question.answer) for question in questions]
    width = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    # padding stands to the right, where a causal model cannot look
    ids = torch.zeros(len(questions), width, dtype=torch.int64)
    wanted = torch.zeros(len(questions), width, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        wanted[row, len(prompt) : len(prompt) + len(answer)] = True
    with torch.inference_mode():
        logits: Tensor = model(ids.to(model.device), use_cache=False).logits
    agreed = logits[:, :-1].argmax(-1).cpu() == ids[:, 1:]
    correct: list[bool] = (agreed | ~wanted[:, 1:]).all(dim=1).tolist()
    return correct
