"""Multiple choice and last words, against the likelihood of each request computed alone in float64."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers import PreTrainedTokenizerFast as Fast

from bittern.errors import BitternError
from bittern.tasks import evaluate_task, loglikelihoods, read_task

WORDS = [f"w{i}" for i in range(1, 60)]
Row = dict[str, Any]


def tiny_tokenizer(adds_bos: bool) -> Fast:
    """Words to ids 1 to 59; 0 is BOS."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, **{w: i for i, w in enumerate(WORDS, 1)}}, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return Fast(tokenizer_object=tokenizer, bos_token="<s>")  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def tokenizer() -> Fast:
    return tiny_tokenizer(adds_bos=True)


def tiny_llama(context: int = 64) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=context,
        initializer_range=0.4,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_llama()


def request(doc_id: int, idx: int, label: Any, context: str | None, continuation: str) -> Row:
    return {
        "request_type": "loglikelihood",
        "doc": {},
        "request": {"context": context, "continuation": continuation},
        "idx": idx,
        "task_name": "herons",
        "doc_id": doc_id,
        "native_id": doc_id,
        "label": label,
    }


def lines(*requests: tuple[int, int, Any, str, str]) -> str:
    return "\n".join(json.dumps(request(*each)) for each in requests)


def write(path: Path, rows: list[Row]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def oracle(model: PreTrainedModel, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """log p of one continuation, token by token, and whether greedy decoding writes it."""
    total, greedy = 0.0, True
    ids = list(context)
    for token in continuation:
        with torch.no_grad():
            logp = model(input_ids=torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
        total, greedy = total + float(logp[token]), greedy and int(logp.argmax()) == token
        ids.append(token)
    return total, greedy


def ids(text: str) -> list[int]:
    return [WORDS.index(word) + 1 for word in text.split()]


def questions() -> list[tuple[str, list[str]]]:
    """Twelve questions with three choices of unlike length in tokens and in characters."""
    draw = torch.Generator().manual_seed(4)

    def some(count: int) -> str:
        return " ".join(WORDS[i] for i in torch.randint(0, 59, (count,), generator=draw).tolist())

    return [(some(3 + n), [" " + some(1 + (n + c) % 4) for c in range(3)]) for n in range(12)]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_accuracies_are_those_of_each_request_alone(
    suffix: str, batch_size: int, tmp_path: Path, model: PreTrainedModel, tokenizer: Fast
) -> None:
    rows, raw, normalized = [], 0, 0
    for doc, (context, choices) in enumerate(questions()):
        gold = doc % 3
        logp = [oracle(model, [0, *ids(context)], ids(choice))[0] for choice in choices]
        raw += max(range(3), key=lambda i: logp[i]) == gold
        normalized += max(range(3), key=lambda i: logp[i] / len(choices[i].strip())) == gold
        # the file's own order is not the order of the choices
        rows += [request(doc, i, gold, context, choices[i]) for i in (2, 0, 1)]
        rows += [request(1_000_000 + doc, i, gold, "w1", choices[i]) for i in range(3)]
    assert raw != normalized  # else the test could not tell them apart
    result = evaluate_task(model, tokenizer, write(tmp_path / f"t{suffix}", rows), batch_size=batch_size)
    assert (result.task, result.questions) == ("herons", 12)
    assert result.accuracy == pytest.approx(raw / 12)
    assert result.accuracy_normalized == pytest.approx(normalized / 12)
    assert (result.exact_match, result.perplexity, result.truncated) == (None, None, 0)


def test_last_words(tmp_path: Path, model: PreTrainedModel, tokenizer: Fast) -> None:
    rows, matches, nll = [], 0, 0.0
    for doc, (context, choices) in enumerate(questions()):
        word = choices[0]
        if doc % 2:  # what the model itself would write
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[0, *ids(context)]])).logits[0, -1]
            word = f" {WORDS[int(logits[1:].argmax())]}"
        logp, greedy = oracle(model, [0, *ids(context)], ids(word))
        matches, nll = matches + greedy, nll - logp
        rows.append(request(doc, 0, [word.strip()], context, word))
    assert 0 < matches < 12
    result = evaluate_task(model, tokenizer, write(tmp_path / "lambada.jsonl", rows))
    assert result.exact_match == pytest.approx(matches / 12)
    assert result.perplexity == pytest.approx(math.exp(nll / 12), rel=1e-5)
    assert (result.accuracy, result.accuracy_normalized) == (None, None)


@pytest.mark.parametrize("adds_bos", [True, False])
def test_padding_and_batches_change_no_likelihood(adds_bos: bool) -> None:
    tokenizer = tiny_tokenizer(adds_bos)
    torch.manual_seed(0)
    alibi = BloomForCausalLM(BloomConfig(vocab_size=60, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.4))
    for model in (tiny_llama(), alibi.eval()):  # type: ignore[no-untyped-call]
        pairs = [(context, choice) for context, choices in questions() for choice in choices]
        for (context, choice), found in zip(pairs, loglikelihoods(model, tokenizer, pairs, batch_size=8), strict=True):
            logp, greedy = oracle(model, [0] * adds_bos + ids(context), ids(choice))
            assert found.logp == pytest.approx(logp, abs=1e-4)
            assert (found.greedy, found.truncated) == (greedy, False)


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_longrope_turns_no_short_request_by_the_angles_of_a_long_one(batch_size: int, tokenizer: Fast) -> None:
    turn = 12
    torch.manual_seed(0)
    rope: Row = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": turn}
    factors = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 5.0, 9.0, 17.0]}
    config: Row = {
        "vocab_size": 60,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.4,
        "original_max_position_embeddings": turn,
        "rope_parameters": {**rope, **factors},
    }
    model = LlamaForCausalLM(LlamaConfig(**config))
    pairs = [(context, choice) for context, choices in questions() for choice in choices]
    lengths = [len(ids(context + choice)) for context, choice in pairs]
    assert {turn, turn + 1} <= set(lengths)
    steps: list[tuple[int, int]] = []
    found = loglikelihoods(
        model, tokenizer, pairs, batch_size=batch_size, on_progress=lambda done, total: steps.append((done, total))
    )
    assert steps[-1] == (len(pairs), len(pairs)) and steps == sorted(set(steps))
    for (context, choice), score in zip(pairs, found, strict=True):
        whole = [0, *ids(context), *ids(choice)]
        with torch.no_grad():
            logp = model(input_ids=torch.tensor([whole[:-1]]), use_cache=False).logits[0].log_softmax(-1)
        count = len(ids(choice))
        expected = sum(float(logp[-count + i, token]) for i, token in enumerate(whole[-count:]))
        assert score.logp == pytest.approx(expected, abs=1e-4)


def test_an_empty_context_begins_with_bos(model: PreTrainedModel) -> None:
    (found,) = loglikelihoods(model, tiny_tokenizer(adds_bos=False), [("", "w5 w6")])
    assert found.logp == pytest.approx(oracle(model, [0], [5, 6])[0], abs=1e-4)


def test_a_long_context_is_cut_on_the_left_and_counted(tmp_path: Path, tokenizer: Fast) -> None:
    model = tiny_llama(context=16)
    context = " ".join(WORDS[:40])
    (found,) = loglikelihoods(model, tokenizer, [(context, " w50 w51")])
    assert found.truncated
    assert found.logp == pytest.approx(oracle(model, ids(context)[-15:], [50, 51])[0], abs=1e-4)
    rows = [request(0, i, 0, context if i else "w1", " w2") for i in range(2)]
    assert evaluate_task(model, tokenizer, write(tmp_path / "t.jsonl", rows)).truncated == 1


def test_one_choice_is_no_choice(tmp_path: Path, model: PreTrainedModel, tokenizer: Fast) -> None:
    """Its label says nothing: it is a last word, right when the model would have said it."""
    path = write(tmp_path / "t.jsonl", [request(0, 0, 0, "w1 w2", " w3")])
    found = evaluate_task(model, tokenizer, path)
    assert found.accuracy is None and found.exact_match is not None


def test_a_continuation_longer_than_the_context_is_refused(tmp_path: Path, tokenizer: Fast) -> None:
    path = write(tmp_path / "t.jsonl", [request(0, 0, "x", "w1", " w3" * 9)])
    with pytest.raises(BitternError, match="request 0: its continuation has 9 tokens, the model's context is 8"):
        evaluate_task(tiny_llama(8), tokenizer, path)


def test_limit_takes_the_first_questions_whole(tmp_path: Path) -> None:
    rows = [request(doc, i, 1, "w1", " w2") for i in range(3) for doc in (7, 5, 9)]  # choices far apart in the file
    name, found = read_task(write(tmp_path / "t.jsonl", rows), limit=2)
    assert name == "herons"
    assert [(q.doc_id, len(q.choices), q.gold) for q in found] == [(7, 3, 1), (5, 3, 1)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"t.jsonl: expected requests, found none"),
        ('{"doc_id": 0', r"t.jsonl, line 1: expected JSON"),
        ('{"doc_id": 0, "idx": 0}', r"t.jsonl, line 1: expected a request with 'label'"),
        ("[1]", r"t.jsonl, line 1: expected a request"),
        (json.dumps(request(0, 0, 0, "a", "")), r"line 1: expected .* a continuation of text"),
        (json.dumps(request(0, 0, 0, None, "b")), r"line 1: expected .* a context and"),
        (lines((0, 1, 0, "a", " b"), (0, 1, 0, "a", " c")), r"doc_id 0: expected the choices 0 to 1 once each"),
        (lines((0, 0, 3, "a", " b"), (0, 1, 3, "a", " c")), r"doc_id 0: expected a label below 2, found 3"),
        (
            lines((0, 0, 1, "a", " b"), (0, 1, 1, "a", " c"), (1, 0, "d", "a", " d")),
            r"t.jsonl: expected questions with choices or last words, found both",
        ),
        (json.dumps({**request(0, 0, 0, "a", " b"), "task_name": None}), r"line 1: expected a task_name of text"),
        (
            lines((0, 0, 0, "a", " b"), (0, 1, 1, "a", " c")),
            r"t.jsonl, line 2: expected the label 0 of the other lines of doc_id 0, found 1",
        ),
        (
            lines((0, 0, 0, "a", " b")) + "\n" + json.dumps({**request(0, 1, 0, "a", " c"), "task_name": "egrets"}),
            r"t.jsonl, line 2: expected the task_name 'herons' of the lines before, found 'egrets'",
        ),
        (
            json.dumps(request(0, 0, 0, "a\ud800", " b")),
            r"line 1: expected UTF-8 text, found other bytes at character 1",
        ),
        (
            json.dumps(request(0, 0, 0, "a", " \udcff")),
            r"line 1: expected UTF-8 text, found other bytes at character 1",
        ),
        ("[" * 100_000, r"t.jsonl, line 1: expected JSON, found maximum recursion"),
        ('{"doc_id": ' + "1" * 5000 + "}", r"t.jsonl, line 1: expected JSON, found Exceeds the limit"),
    ],
)
def test_what_is_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(BitternError, match=message) as caught:
        read_task(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_byte_order_mark_is_passed_over(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"t{suffix}"
    content = ("\ufeff" + lines((0, 0, 1, "a", " b"), (0, 1, 1, "a", " c"))).encode()
    path.write_bytes(gzip.compress(content) if suffix == ".jsonl.gz" else content)
    name, (question,) = read_task(path)
    assert (name, question.gold, len(question.choices)) == ("herons", 1, 2)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(BitternError, match=r"none.jsonl: cannot be read"):
        read_task(tmp_path / "none.jsonl")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 500)[:30])
    with pytest.raises(BitternError, match=r"cut.jsonl.gz"):
        read_task(tmp_path / "cut.jsonl.gz")
    (tmp_path / "plain.jsonl.gz").write_bytes(b"{}\n")
    with pytest.raises(BitternError, match=r"plain.jsonl.gz: cannot be read: Not a gzipped file"):
        read_task(tmp_path / "plain.jsonl.gz")


def test_a_wrong_tokenizer_and_logits_that_are_no_numbers(tokenizer: Fast) -> None:
    config = LlamaConfig(vocab_size=9, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(config)
    with pytest.raises(BitternError, match=r"token 'w50' has id 50, the model's vocabulary has 9"):
        loglikelihoods(model, tokenizer, [("w1", " w50")])
    with torch.no_grad():
        model.model.embed_tokens.weight[3] = math.nan
    with pytest.raises(BitternError, match=r"^request 1: .*NaN"):
        loglikelihoods(model, tokenizer, [("w1", " w2"), ("w3", " w4")])
