"""Perplexity and distance to a base, against transformers' own loss and formulas in float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from bittern import evaluate as module
from bittern.errors import BitternError
from bittern.evaluate import check_fit, evaluate, read_text, text_windows
from bittern.tokenizer import context_length
from tests import tiny

VOCAB = 97


def tiny_llama(seed: int = 0, vocab_size: int = VOCAB) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.4,  # logits that differ
    )
    return LlamaForCausalLM(config).eval()  # type: ignore[no-any-return, no-untyped-call]


@pytest.fixture
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(0, VOCAB, (5, 33), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Words to ids, w0 to w199, with a BOS before every text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = Tokenizer(models.WordLevel({"<s>": 0, **{f"w{i}": i for i in range(1, 200)}}, unk_token="<s>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>")  # type: ignore[no-untyped-call]


def oracle_nll(model: PreTrainedModel, windows: Tensor) -> float:
    """transformers' own loss, a window at a time."""
    with torch.no_grad():
        losses = [model(input_ids=row[None], labels=row[None]).loss.double() for row in windows]
    return float(torch.stack(losses).mean())


def oracle_kl(base: PreTrainedModel, model: PreTrainedModel, windows: Tensor) -> tuple[float, float]:
    """KL(base || model) from its definition, and top-1 agreement, in float64."""
    with torch.no_grad():
        p, q = (m(input_ids=windows).logits[:, :-1].double().softmax(-1) for m in (base, model))
    return float((p * (p / q).log()).sum(-1).mean()), float((p.argmax(-1) == q.argmax(-1)).double().mean())


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
def test_perplexity_is_transformers_own_loss(batch_size: int, model: LlamaForCausalLM, windows: Tensor) -> None:
    result = evaluate(model, windows, batch_size=batch_size)
    assert result.nll == pytest.approx(oracle_nll(model, windows), rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(result.nll), rel=1e-12)
    assert (result.windows, result.tokens) == (5, 5 * 32)
    assert result.kl is None
    assert result.top1_agreement is None


def test_distance_is_the_formula(model: LlamaForCausalLM, windows: Tensor) -> None:
    base = tiny_llama(seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    kl, agreement = oracle_kl(base, model, windows)
    assert kl > 0.01  # the models do differ
    assert 0.1 < agreement < 0.99
    result = evaluate(model, windows, against=base, batch_size=2)
    assert result.kl == pytest.approx(kl, rel=1e-4)
    assert result.top1_agreement == pytest.approx(agreement, abs=1e-12)
    reverse = evaluate(base, windows, against=model).kl
    assert reverse == pytest.approx(oracle_kl(model, base, windows)[0], rel=1e-4)
    assert reverse != pytest.approx(kl, rel=1e-3)  # KL has a direction, and it is the documented one


def test_a_context_whose_positions_begin_behind_padding(tokenizer: PreTrainedTokenizerFast) -> None:
    """RoBERTa's 22 rows of positions are for 20 tokens: its first one is at padding's place and one."""
    model = tiny.random_model("roberta", is_decoder=True, max_position_embeddings=22, pad_token_id=1)
    assert context_length(model.config) == 20
    ids = torch.randint(3, 40, (2, 20), generator=torch.Generator().manual_seed(0))
    check_fit(model, tokenizer, ids)
    assert evaluate(model, ids).tokens == 38
    with pytest.raises(BitternError, match="expected at most 20"):
        check_fit(model, tokenizer, torch.cat([ids, ids[:, :1]], dim=1))


def test_a_model_is_no_way_from_itself(model: LlamaForCausalLM, windows: Tensor) -> None:
    result = evaluate(model, windows, against=model)
    assert (result.kl, result.top1_agreement) == (0.0, 1.0)


def test_the_size_of_chunks_changes_nothing(
    model: LlamaForCausalLM, windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_llama(seed=3)
    whole = evaluate(model, windows, against=base)
    monkeypatch.setattr(module, "CHUNK", 7)
    cut = evaluate(model, windows, against=base)
    assert cut.nll == pytest.approx(whole.nll, rel=1e-12)
    assert cut.kl == pytest.approx(whole.kl, rel=1e-7)
    assert cut.top1_agreement == whole.top1_agreement


def test_tokens_that_both_models_mask_count_nothing(model: LlamaForCausalLM, windows: Tensor) -> None:
    base = tiny_llama(seed=3)
    masked = windows.clamp(max=VOCAB - 2)

    def mask(_module: object, _inputs: object, output: Any) -> None:
        output.logits[..., VOCAB - 1] = -math.inf

    for each in (model, base):
        each.register_forward_hook(mask)
    with torch.no_grad():
        p, q = (m(input_ids=masked).logits[:, :-1, : VOCAB - 1].double().softmax(-1) for m in (base, model))
    expected = float((p * (p / q).log()).sum(-1).mean())
    assert evaluate(model, masked, against=base).kl == pytest.approx(expected, rel=1e-4)


def test_half_precision_logits_are_summed_in_fp32(windows: Tensor) -> None:
    model = tiny_llama()
    model.bfloat16()
    with torch.no_grad():
        logp = model(input_ids=windows).logits[:, :-1].double().log_softmax(-1)
    expected = -float(logp.gather(2, windows[:, 1:, None]).mean())
    assert evaluate(model, windows, batch_size=5).nll == pytest.approx(expected, rel=1e-6)


def test_progress_counts_windows(model: LlamaForCausalLM, windows: Tensor) -> None:
    seen: list[tuple[int, int]] = []
    evaluate(model, windows, batch_size=2, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 5), (4, 5), (5, 5)]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_logits_that_are_no_numbers_name_their_window(
    batch_size: int, model: LlamaForCausalLM, windows: Tensor
) -> None:
    windows = windows.clamp(max=VOCAB - 2)
    windows[3, 10] = VOCAB - 1
    with torch.no_grad():
        model.model.embed_tokens.weight[VOCAB - 1] = math.nan
    with pytest.raises(BitternError, match=r"^window 3: no finite likelihood: .*NaN"):
        evaluate(model, windows, batch_size=batch_size)
    with pytest.raises(BitternError, match=r"^window 3: no finite KL to the base: .*NaN"):
        evaluate(tiny_llama(), windows, against=model, batch_size=batch_size)


def test_another_vocabulary_is_refused(model: LlamaForCausalLM, windows: Tensor) -> None:
    with pytest.raises(BitternError, match=r"--against: expected a vocabulary of 97 tokens .*, found 128"):
        evaluate(model, windows, against=tiny_llama(vocab_size=128))


def test_windows_are_cut_from_the_start_without_bos(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{i}" for i in range(1, 60)), encoding="utf-8")
    assert text_windows(path, tokenizer, seqlen=8, windows=3).tolist() == torch.arange(1, 25).view(3, 8).tolist()
    assert text_windows(path, tokenizer, seqlen=8).shape == (7, 8)
    assert text_windows(path, tokenizer, seqlen=8, windows=100).shape == (7, 8)  # fewer than asked for
    with pytest.raises(BitternError, match=r"text.txt: expected at least one window of 60 tokens, found 59 tokens"):
        text_windows(path, tokenizer, seqlen=60, windows=1)


def test_windows_may_begin_with_bos(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{i}" for i in range(1, 60)), encoding="utf-8")
    tokenizer.bos_token = None
    with pytest.raises(BitternError, match="has no BOS token"):
        text_windows(path, tokenizer, seqlen=8, bos=True)
    tokenizer.bos_token = "w90"
    found = text_windows(path, tokenizer, seqlen=8, windows=3, bos=True)
    assert found[:, 0].tolist() == [90] * 3
    assert found[:, 1:].tolist() == torch.arange(1, 22).view(3, 7).tolist()


def test_what_text_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(BitternError, match=r"none.txt: cannot be read: No such file"):
        text_windows(tmp_path / "none.txt", tokenizer, seqlen=8)
    (tmp_path / "latin.txt").write_bytes(b"bl\xe4 " * 99)
    with pytest.raises(BitternError, match=r"latin.txt: expected UTF-8 text, found .*0xe4"):
        text_windows(tmp_path / "latin.txt", tokenizer, seqlen=8)
    for seqlen, windows in ((1, 4), (8, 0)):
        with pytest.raises(BitternError, match=f"expected at least 2 and 1, found {seqlen} and {windows}"):
            text_windows(tmp_path / "latin.txt", tokenizer, seqlen=seqlen, windows=windows)


def test_windows_must_fit_the_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    check_fit(model, tokenizer, torch.full((2, 64), VOCAB - 1))
    with pytest.raises(BitternError, match=r"seqlen: expected at most 64, the model's context length, found 65"):
        check_fit(model, tokenizer, torch.zeros(2, 65, dtype=torch.int64))
    with pytest.raises(BitternError, match=r"token 'w97' has id 97, the model's vocabulary has 97"):
        check_fit(model, tokenizer, torch.full((2, 64), VOCAB))
    other_name = GPT2LMHeadModel(
        GPT2Config(n_positions=16, n_embd=32, n_layer=1, n_head=2)
    )  # not max_position_embeddings
    with pytest.raises(BitternError, match=r"seqlen: expected at most 16"):
        check_fit(other_name, tokenizer, torch.zeros(2, 17, dtype=torch.int64))


def test_stories15m_on_its_own_text(shared: Path) -> None:
    folder = shared / "data" / "models" / "stories15m"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    windows = text_windows(shared / "data/text/tinystories/valid.txt", tokenizer, seqlen=256, windows=4)
    assert evaluate(model, windows, batch_size=2).nll == pytest.approx(oracle_nll(model, windows), rel=1e-5)


def test_rows_are_no_text(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "heron"}\n' * 99)
    with pytest.raises(BitternError, match=r"rows.jsonl: expected a file of plain text, found rows \(.jsonl\)"):
        text_windows(tmp_path / "rows.jsonl", tokenizer, seqlen=8)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfheron")
    assert read_text(tmp_path / "bom.txt", None) == "heron"
    assert read_text(tmp_path / "bom.txt", 1) == "h"
