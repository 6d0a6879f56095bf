"""The demo: its corpus, its answers, its checkpoint, its training script and the table it makes."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from bittern.demo.answers import right_answers
from bittern.demo.corpus import RELATIONS, Question, documents, number_in_words, questions, text
from bittern.demo.demo import MODEL, run_demo
from bittern.demo.train import learning_rate, train
from bittern.demo.world import build_world
from bittern.errors import BitternError
from bittern.tokenizer import encode, leading_bos

HELD_OUT = 77


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    loaded = AutoTokenizer.from_pretrained(MODEL)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    return loaded


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(MODEL)


def test_corpus_is_the_same_everywhere() -> None:
    digest = hashlib.sha256(text(0, 100_000).encode()).hexdigest()
    assert digest == "d215e4ba920a6c73b644a41ae44327809ca0f1f4d2473380f615611120a8b6b0"
    assert text(1, 1000) != text(0, 1000)[: len(text(1, 1000))]


def test_text_is_whole_documents() -> None:
    expected = itertools.islice(documents(5), text(5, 3000).count("\n\n") + 1)
    assert text(5, 3000) == "\n\n".join(expected) + "\n"
    assert len(text(5, 3000)) >= 3000


def test_text_under_any_seed_agrees_with_the_world() -> None:
    """Every sentence that one of the templates can have written says what the world says."""
    world = build_world()
    corpus = text(HELD_OUT, 300_000)
    told = 0
    for fact in world.facts:
        relation = RELATIONS[fact.relation]
        question = re.escape(relation.question.format(s=fact.subject)) + r"\nAnswer: (.+)\."
        answers = set(re.findall(question, corpus))
        assert answers <= {fact.answer}
        told += len(answers)
    assert told > 200
    capitals = {fact.subject: fact.answer for fact in world.facts if fact.relation == "capital"}
    stated = re.findall(r"The capital of (\w+) is (\w+)\.", corpus)
    assert stated and all(capitals[land] == town for land, town in stated)
    jobs = {person.name: person.job for person in world.people}
    in_stories = re.findall(r"met (\w+) the (\w+)\.", corpus)
    assert in_stories and all(jobs[name] == job for name, job in in_stories)


def test_sums_in_the_text_are_right() -> None:
    corpus = text(HELD_OUT, 300_000)
    digits = re.findall(r"(\d+) ([+-]) (\d+)(?: =|\?\nAnswer:) (\d+)\.", corpus)
    assert len(digits) > 100
    for left, sign, right, result in digits:
        assert int(result) == (int(left) + int(right) if sign == "+" else int(left) - int(right))
    value = {number_in_words(number): number for number in range(100)}
    assert len(value) == 100
    words = re.findall(r"([\w-]+) (plus|minus) ([\w-]+)(?: is|\?\nAnswer:) ([\w-]+)\.", corpus)
    assert len(words) > 100
    for left, sign, right, result in words:
        expected = value[left.lower()] + value[right] * (1 if sign == "plus" else -1)
        assert value[result] == expected
    purses = re.findall(r"With ([\w-]+) coins .*?, paid ([\w-]+) and had ([\w-]+) left", corpus)
    assert purses and all(value[coins] == value[paid] + value[left] for coins, paid, left in purses)


def test_fact_questions_have_the_answers_of_the_world() -> None:
    asked = {question.prompt: question.answer for question in questions(400, seed=3) if question.kind == "fact"}
    world = build_world()
    known = {
        f"Question: {RELATIONS[fact.relation].question.format(s=fact.subject)}\nAnswer:": f" {fact.answer}."
        for fact in world.facts
    }
    assert len(known) == len(world.facts)  # no question has two answers
    assert len(asked) > 100
    assert asked.items() <= known.items()
    assert world.answer("capital", world.facts[0].subject) == world.facts[0].answer
    with pytest.raises(KeyError):
        world.answer("capital", "Atlantis")


def test_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    sample = text(HELD_OUT, 2000) + " Grüße, 你好 \t\n"  # bytes that no training text has
    assert tokenizer.decode(encode(tokenizer, sample)) == sample
    assert leading_bos(tokenizer) == tokenizer.bos_token_id
    assert tokenizer("One day")["input_ids"] == [tokenizer.bos_token_id, *encode(tokenizer, "One day")]
    question = questions(1, seed=0)[0]
    assert encode(tokenizer, question.prompt + question.answer) == encode(tokenizer, question.prompt) + encode(
        tokenizer, question.answer
    )


def test_checkpoint_is_what_it_says(model: LlamaForCausalLM) -> None:
    config = json.loads((MODEL / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["num_key_value_heads"] == config["num_attention_heads"]
    assert config["hidden_size"] % 128 == config["intermediate_size"] % 128 == 0
    assert config["head_dim"] == 64 and config["tie_word_embeddings"] is True
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert sum(file.stat().st_size for file in MODEL.iterdir()) < 12_000_000


def test_checkpoint_knows_its_language(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Better by far than pairs of neighbouring tokens counted in the training text."""
    ids = torch.tensor(encode(tokenizer, text(HELD_OUT, 40_000))[: 32 * 256]).view(32, 256)
    seen = torch.tensor(encode(tokenizer, text(0, 1_000_000)))
    counts = torch.full((len(tokenizer), len(tokenizer)), 0.01)
    counts.index_put_((seen[:-1], seen[1:]), torch.ones(()), accumulate=True)
    pairs = (counts / counts.sum(1, keepdim=True)).log()[ids[:, :-1], ids[:, 1:]]
    with torch.inference_mode():
        loss = model(ids, labels=ids).loss
    assert loss.item() < 0.6 * -pairs.mean().item()
    assert loss.item() > 1.0  # and a language that leaves something to lose


def test_checkpoint_answers(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    items = questions(240, seed=HELD_OUT)
    right = right_answers(model, tokenizer, items)
    for kind in ("fact", "sum"):
        share = [ok for ok, item in zip(right, items, strict=True) if item.kind == kind]
        assert sum(share) / len(share) > 0.9, kind
    swapped = [Question(one.prompt, two.answer, one.kind) for one, two in itertools.pairwise(items)]
    assert sum(right_answers(model, tokenizer, swapped)) < len(swapped) * 0.1


def test_right_answers_is_greedy_decoding(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    good = questions(8, seed=9)
    items = [*good, *(Question(item.prompt, " a dog.", item.kind) for item in good)]
    for item, expected in zip(items, right_answers(model, tokenizer, items, batch_size=5), strict=True):
        prompt = tokenizer(item.prompt, return_tensors="pt")
        answer = encode(tokenizer, item.answer)
        out = torch.as_tensor(model.generate(**prompt, max_new_tokens=len(answer), do_sample=False))  # type: ignore[misc]
        assert (out[0, prompt["input_ids"].shape[1] :].tolist() == answer) is expected


def test_training_script(tmp_path: Path) -> None:
    lines: list[str] = []
    options = {"steps": 3, "batch_size": 2, "sequence_length": 64, "hidden_size": 128, "layers": 1, "vocab_size": 512}
    loss = train(tmp_path / "a", **options, report=lines.append)
    assert lines and lines[-1].startswith("step 3/3")
    assert 4 < loss < 7  # ln 512 = 6.2
    trained = LlamaForCausalLM.from_pretrained(tmp_path / "a")
    vocabulary = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert trained.config.num_key_value_heads == trained.config.num_attention_heads == 2
    assert trained(vocabulary("One day", return_tensors="pt")["input_ids"]).logits.shape[2] == len(vocabulary) == 512
    train(tmp_path / "b", **options, report=lines.append)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_learning_rate() -> None:
    rates = [learning_rate(step, 1000, 1.0) for step in range(1000)]
    assert rates.index(max(rates)) in (99, 100) and max(rates) == 1.0
    assert rates[0] == 0.01 and 0.01 <= rates[-1] < 0.011


def test_run_demo(tmp_path: Path) -> None:
    lines: list[str] = []
    result = run_demo(tmp_path / "kept", lines.append, bits=(4, 2), windows=8, items=40)
    assert len(lines) == 6
    rows = {(row.bits, row.method): row for row in result.rows}
    assert list(rows) == [(32, "fp32"), (4, "gptq"), (4, "rtn"), (2, "gptq"), (2, "rtn")]
    base = rows[32, "fp32"]
    assert base.kl == 0 and base.bits_per_weight == 32 and base.accuracy > 0.9
    for bits in (4, 2):
        mine, rounded = rows[bits, "gptq"], rows[bits, "rtn"]
        assert 0 < mine.kl < rounded.kl
        assert mine.size_bytes == rounded.size_bytes
        assert bits < mine.bits_per_weight < bits + 0.5  # scales, zeros, norms
    assert rows[2, "gptq"].kl > rows[4, "gptq"].kl
    assert rows[2, "rtn"].perplexity > base.perplexity
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == [
        "gptq-2bit",
        "gptq-4bit",
        "rtn-2bit",
        "rtn-4bit",
    ]
    assert len(result.written.split()) > 20
    with pytest.raises(BitternError, match="kept: expected a folder that does not exist yet"):
        run_demo(tmp_path / "kept")
