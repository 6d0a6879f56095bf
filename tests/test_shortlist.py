"""Shortlists: the words whose logits a step computes, and what they stand for."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bittern.training import train
from bittern.training.shortlist import commonest, make_shortlist, only
from bittern.training.text import Windows
from bittern.training.train import Training
from tests import tiny

VOCABULARY = 256


def test_the_commonest_words_are_those_that_counting_gives() -> None:
    ids = np.random.default_rng(0).zipf(1.3, (40, 25)).clip(max=VOCABULARY - 1).astype(np.int32)
    counts = Counter(ids.ravel().tolist())
    expected = sorted(range(VOCABULARY), key=lambda word: (-counts[word], word))
    assert commonest(ids, VOCABULARY, 40).tolist() == expected[:30]


def test_a_shortlist_holds_what_is_common_and_the_steps_own_words_and_stands_for_all() -> None:
    common, ids = torch.arange(24), torch.tensor([[3, 100, 100], [101, 7, 255]])
    chosen = make_shortlist(common, ids, VOCABULARY, 32, seed=1)
    words = chosen.words.tolist()
    assert words == sorted(set(words)) and set(words) >= {*range(24), 100, 101, 255}
    assert len(words) == 24 + 3 + 8
    assert float(chosen.offsets.exp().sum()) == pytest.approx(VOCABULARY)
    certain = torch.isin(chosen.words, torch.cat([common, ids.flatten()]))
    assert torch.equal(chosen.offsets == 0, certain)
    assert torch.equal(chosen.words[chosen.places[ids]], ids)
    assert (chosen.places >= 0).sum() == len(words)
    again, other = (make_shortlist(common, ids, VOCABULARY, 32, seed) for seed in (1, 2))
    assert torch.equal(again.words, chosen.words) and not torch.equal(other.words, chosen.words)


def test_the_sum_of_a_softmax_over_shortlists_is_right_on_average() -> None:
    logits = 2 * torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sums = []
    for seed in range(4000):
        chosen = make_shortlist(torch.arange(32), torch.tensor([[40]]), VOCABULARY, 96, seed)
        sums.append((logits[chosen.words] + chosen.offsets).exp().sum())
    found = torch.stack(sums)
    error = float(found.std()) / math.sqrt(len(found))
    assert abs(float(found.mean() - logits.exp().sum())) < 4 * error
    assert error < 0.01 * float(logits.exp().sum())


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("gemma2", {"final_logit_softcapping": 5.0, "head_dim": 16}),
        ("granite", {"logits_scaling": 8.0}),
        ("cohere", {"logit_scale": 0.5}),
        ("phi", {"partial_rotary_factor": 0.5}),  # its head has a bias
    ],
)
def test_a_model_computes_the_logits_of_the_words_it_is_asked_for(family: str, config: dict[str, Any]) -> None:
    model = tiny.random_model(family, **config)
    ids, words = torch.arange(30).view(2, 15), torch.tensor([1, 8, 9, 200])
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        with only(model, words):
            found = model(input_ids=ids).logits
        with only(model, None):
            assert torch.equal(model(input_ids=ids).logits, whole)
        assert torch.equal(model(input_ids=ids).logits, whole)
    torch.testing.assert_close(found, whole[..., words])


def test_a_shortlist_that_holds_every_word_changes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bittern.replay.fast_in_sixteen_bits", lambda _: False)
    windows = Windows(np.arange(96, dtype=np.int32).reshape(6, 16), seed=0)
    options = Training(1, 1e-3, batch_size=6, micro_batch=3, shortlist=VOCABULARY - 1)
    found = []
    for common in (None, commonest(windows.ids, VOCABULARY, options.shortlist)[1:]):
        student = tiny.random_model("llama", seed=1, tie_word_embeddings=True).requires_grad_(True)
        teacher = tiny.random_model("llama", tie_word_embeddings=True)
        held_out = torch.zeros((1, 16), dtype=torch.int64)
        run = train.Run(student, teacher, dict(student.named_parameters()), windows, 0, held_out, Path("none"), {})
        sums = train._step(run, options, 0, common)
        found.append((sums, [parameter.grad for parameter in student.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)
