"""Which tokens a model is calibrated on."""

from __future__ import annotations

import hashlib
import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bittern import calibration, sampling
from bittern.calibration import CalibrationTokens, load_tokens
from bittern.errors import BitternError
from bittern.evaluate import read_text
from bittern.runtime import native
from bittern.tokenizer import encode

BOS, EOS = "<s>", "</s>"
CHAT = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}{% endfor %}"


def words(count: int, seed: int = 0) -> str:
    """Text in which every line differs, so that equal windows come from one place."""
    draw = random.Random(seed)
    return "".join(
        f"{i} {' '.join(draw.choices(['heron', 'reed', 'water', 'boom', 'dusk'], k=6))}\n" for i in range(count // 7)
    )


def tiny_tokenizer(adds_bos: bool) -> PreTrainedTokenizerFast:
    """Byte-level BPE, with or without a BOS of its own before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([words(700)], trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, chat_template=CHAT
    )


@pytest.fixture(scope="module")
def plain() -> PreTrainedTokenizerFast:
    return tiny_tokenizer(adds_bos=False)


@pytest.fixture(scope="module")
def with_bos() -> PreTrainedTokenizerFast:
    return tiny_tokenizer(adds_bos=True)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(words(1200), encoding="utf-8")
    return path


def load(dataset: Path | str, tokenizer: PreTrainedTokenizerFast, **options: Any) -> CalibrationTokens:
    options = {"nsamples": 16, "seqlen": 16, "seed": 0, **options}
    return load_tokens(str(dataset), tokenizer, **options)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as a file of the kind that its suffix names, by the writers of ``datasets``."""
    data = datasets.Dataset.from_list(rows)
    if path.suffix == ".parquet":
        data.to_parquet(str(path))
    elif path.suffix == ".arrow":
        data.save_to_disk(str(path.parent / "arrow"))
        next((path.parent / "arrow").glob("*.arrow")).rename(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        data.to_json(str(path))
    return path


def test_windows_are_the_documented_choice(text: Path, plain: PreTrainedTokenizerFast) -> None:
    found = load(text, plain, seed=5)
    stream = plain(text.read_text(encoding="utf-8"))["input_ids"]
    windows = [stream[i : i + 16] for i in range(0, len(stream) - 15, 16)]
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(5))[:16]
    chosen = [windows[i] for i in sorted(order.tolist())]
    golden = (5**0.5 - 1) / 2
    assert found.ids.tolist() == [chosen[i] for i in sorted(range(16), key=lambda i: i * golden % 1)]
    assert found.ids.dtype == torch.int64
    assert (found.tokens_asked, found.tokens_found, found.warnings) == (256, 256, ())
    flat = b"".join(i.to_bytes(8, "little") for row in found.ids.tolist() for i in row)
    assert found.sha256 == hashlib.sha256(flat).hexdigest()


def test_windows_begin_with_bos_where_the_tokenizer_puts_one(text: Path, with_bos: PreTrainedTokenizerFast) -> None:
    ids = load(text, with_bos).ids
    assert ids.shape == (16, 16)
    assert (ids[:, 0] == with_bos.bos_token_id).all()
    assert not (ids[:, 1:] == with_bos.bos_token_id).any()
    whole = text.read_text(encoding="utf-8")
    assert all(str(with_bos.decode(row[1:])) in whole for row in ids)


def test_several_datasets_give_the_same_share_and_take_turns(tmp_path: Path, plain: PreTrainedTokenizerFast) -> None:
    paths = [str(tmp_path / f"{name}.txt") for name in "abc"]
    for path, seed in zip(paths, (1, 2, 3), strict=True):
        Path(path).write_text(words(1200, seed=seed), encoding="utf-8")
    found = load_tokens(paths, plain, nsamples=8, seqlen=16, seed=4)
    alone = [
        load_tokens(path, plain, nsamples=count, seqlen=16, seed=4).ids.tolist()
        for path, count in zip(paths, (3, 3, 2), strict=True)
    ]
    rows = found.ids.tolist()
    of = [next(index for index, part in enumerate(alone) if row in part) for row in rows]
    assert of == [0, 1, 2, 0, 1, 2, 0, 1]
    assert sorted(rows) == sorted(row for part in alone for row in part)
    assert found.source == ", ".join(paths) and found.tokens_asked == found.tokens_found == 8 * 16


def test_a_short_dataset_among_several_is_told(tmp_path: Path, text: Path, plain: PreTrainedTokenizerFast) -> None:
    short = tmp_path / "short.txt"
    short.write_text(words(60), encoding="utf-8")
    found = load_tokens([str(text), str(short)], plain, nsamples=32, seqlen=16, seed=0)
    assert len(found.ids) < 32 and found.tokens_found == found.ids.numel()
    assert len(found.warnings) == 1 and found.warnings[0].startswith(f"{short}: 16 x 16 = 256")


@pytest.mark.parametrize(
    ("names", "nsamples", "message"),
    [
        ([], 4, "expected at least one, each once, found none"),
        (["a.txt", "b.txt", "a.txt"], 4, "expected at least one, each once, found a.txt twice"),
        (["a.txt", "b.txt"], 1, "expected a window of each of 2 at least, found 1"),
    ],
)
def test_datasets_that_cannot_share(
    names: list[str], nsamples: int, message: str, plain: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(BitternError, match=message):
        load_tokens(names, plain, nsamples=nsamples, seqlen=16, seed=0)


def test_the_first_windows_are_of_the_whole_text(tmp_path: Path, plain: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "sorted.txt"
    path.write_text(" ".join(f"{topic} {words(400, seed=topic)}" for topic in range(4)), encoding="utf-8")
    stream = plain(path.read_text(encoding="utf-8"))["input_ids"]
    places = {tuple(stream[i : i + 16]): i / len(stream) for i in range(0, len(stream) - 15, 16)}
    found = [places[tuple(row)] for row in load_tokens(str(path), plain, nsamples=32, seqlen=16, seed=0).ids.tolist()]
    for first in range(0, 32, 8):
        assert {int(4 * place) for place in found[first : first + 8]} == {0, 1, 2, 3}


def test_the_seed_decides(text: Path, plain: PreTrainedTokenizerFast) -> None:
    assert load(text, plain, seed=1).sha256 == load(text, plain, seed=1).sha256
    assert load(text, plain, seed=1).sha256 != load(text, plain, seed=2).sha256


def test_a_large_text_is_read_all_over_and_not_whole(tmp_path: Path, plain: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "large.txt"
    lines = [f"{i:07d} \N{SNOWMAN} \n" for i in range(40_000)]  # pieces begin and end inside characters
    path.write_text("".join(lines), encoding="utf-8")
    budget = calibration.POOL * calibration.BYTES_PER_TOKEN * 8 * 16
    texts = list(calibration.read_texts(str(path), budget=budget, pieces=8, tokenizer=None))
    size = path.stat().st_size
    assert len(texts) == 8
    assert budget - 32 < sum(len(t.encode()) for t in texts) <= budget
    assert texts[0].startswith(lines[0])
    assert texts[-1].endswith(lines[-1])
    starts = [path.read_bytes().index(t.encode()) for t in texts]
    gaps = [b - a for a, b in pairwise(starts)]
    assert max(gaps) - min(gaps) <= 8
    assert min(gaps) > size / 8
    assert load(path, plain, nsamples=8).ids.shape == (8, 16)


def test_lines_end_as_in_the_text_that_is_predicted(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(words(700).replace("\n", "\r\n").encode())
    whole, size = read_text(path, None), path.stat().st_size
    assert whole == words(700)

    def read(budget: int, pieces: int) -> list[str]:
        return list(calibration.read_texts(str(path), budget=budget, pieces=pieces, tokenizer=None))

    assert read(size, 4) == [whole]
    for budget in range(size - 80, size):  # pieces that begin and end at every place of a line
        first, second = read(budget, 2)
        assert whole.startswith(first) and whole.endswith(second)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".arrow"])
def test_rows_are_joined_by_blank_lines(suffix: str, tmp_path: Path, plain: PreTrainedTokenizerFast) -> None:
    rows = [{"text": words(70, seed), "n": seed} for seed in range(6)]
    found = load(write_rows(tmp_path / f"rows{suffix}", rows), plain)
    joined = tmp_path / "joined.txt"
    joined.write_text("\n\n".join(str(row["text"]) for row in rows), encoding="utf-8")
    assert found.sha256 == load(joined, plain).sha256


def test_no_more_rows_are_read_than_the_pool_takes(tmp_path: Path, plain: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "rows.jsonl"
    good = json.dumps({"text": words(700)})
    path.write_text("\n".join([good] * 3 + ['{"text": 7}'] * 3), encoding="utf-8")
    assert load(path, plain, nsamples=1).ids.shape == (1, 16)


def test_a_row_of_a_whole_corpus_is_cut_and_comes_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_ROWS_AT_ONCE", 1000)
    rows = ["heron", words(20_000), "reed", "water"]
    path = write_rows(tmp_path / "rows.jsonl", [{"text": row} for row in rows])

    def read(budget: int, **options: Any) -> list[str]:
        return list(calibration.read_texts(str(path), budget=budget, pieces=4, tokenizer=None, **options))

    texts = read(4096)
    assert max(map(len, texts)) <= 1000 + len("heron\n\n")
    assert "".join(texts) == f"heron\n\n{rows[1][: 4096 - len('heron')]}"
    texts = read(4096, all_rows=True)
    assert max(map(len, texts)) <= 1000 + len("heron\n\n") and "".join(texts) == "\n\n".join(rows)
    assert read(len(rows[1])) == [f"heron\n\n{rows[1]}"]  # not larger than the budget: one text, as ever


def test_a_long_row_costs_what_was_asked_for(
    tmp_path: Path, plain: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"text": words(50_000)}])
    encoded: list[str] = []

    def watched(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
        encoded.append(text)
        return encode(tokenizer, text)

    monkeypatch.setattr(calibration, "encode", watched)
    assert load(path, plain, nsamples=4, seqlen=32).ids.shape == (4, 32)
    assert sum(map(len, encoded)) == calibration.POOL * calibration.BYTES_PER_TOKEN * 4 * 32 < path.stat().st_size / 10


def test_the_only_column_of_text_is_taken(tmp_path: Path, plain: PreTrainedTokenizerFast) -> None:
    one = write_rows(tmp_path / "one.jsonl", [{"id": 1, "body": words(700)}])
    two = write_rows(tmp_path / "two.jsonl", [{"title": "Bittern", "body": words(700)}])
    assert load(one, plain).sha256 == load(f"{two}#body", plain).sha256
    with pytest.raises(
        BitternError,
        match=r"expected a column 'text' of text, found columns (title, body|body, title); .* behind a #: .*two.jsonl#",
    ):
        load(two, plain)
    with pytest.raises(BitternError, match="expected a column 'prose' of text, found columns id, body"):
        load(f"{one}#prose", plain)
    with pytest.raises(BitternError, match="expected text in column 'id', found int"):
        load(f"{one}#id", plain)
    with pytest.raises(BitternError, match="--chat-template renders messages, found a column 'body'"):
        load(f"{two}#body", plain, chat_template=True)


def test_a_text_has_no_columns_and_a_dataset_has_a_name(text: Path, plain: PreTrainedTokenizerFast) -> None:
    with pytest.raises(BitternError, match=r"\.txt: expected no column of a .txt file, found 'body'"):
        load(f"{text}#body", plain)
    for names in ("", ["self", ""]):
        with pytest.raises(BitternError, match=r"dataset: expected a file, .* or self, found an empty name"):
            calibration.dataset_names(names)


def test_a_file_may_have_a_hash_in_its_name(tmp_path: Path, plain: PreTrainedTokenizerFast) -> None:
    path = write_rows(tmp_path / "one#two.jsonl", [{"id": 1, "body": words(700)}])
    assert load(path, plain).sha256 == load(f"{path}#body", plain).sha256


@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_conversations_are_rendered(key: str, tmp_path: Path, with_bos: PreTrainedTokenizerFast) -> None:
    said = words(350)
    if key == "messages":
        talk = [{"role": "user", "content": "Boom?"}, {"role": "assistant", "content": said}]
    else:
        talk = [{"from": "human", "value": "Boom?"}, {"from": "gpt", "value": said}]
    path = write_rows(tmp_path / "chat.jsonl", [{"id": "heron", key: talk}])
    ids = load(path, with_bos, chat_template=True, nsamples=1000, seqlen=64).ids
    stream = encode(with_bos, f"[user]Boom?{EOS}[assistant]{said}{EOS}")
    # BOS stands at the head of every window and nowhere else, though the template writes one too
    windows = {tuple(stream[start : start + 63]) for start in range(0, len(ids) * 63, 63)}
    assert set(map(tuple, ids[:, 1:].tolist())) == windows and len(ids) == len(stream) // 63
    with pytest.raises(BitternError, match=r"expected a column 'text'.*--chat-template renders messages"):
        load(path, with_bos)


def test_a_file_without_rows_is_refused(tmp_path: Path, plain: PreTrainedTokenizerFast) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(BitternError, match=r"empty\.jsonl: expected rows, found none"):
        load(tmp_path / "empty.jsonl", plain)


def test_fewer_tokens_than_asked_for_is_said(text: Path, plain: PreTrainedTokenizerFast) -> None:
    found = load(text, plain, nsamples=100_000)
    assert found.tokens_found == found.ids.numel() < found.tokens_asked == 1_600_000
    (warning,) = found.warnings
    assert "100000 x 16 = 1600000 calibration tokens asked for" in warning
    assert f"{len(found.ids)} x 16 = {found.tokens_found} found" in warning


@pytest.mark.parametrize("natively", [True, False])
def test_the_model_itself_writes(
    natively: bool, with_bos: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "_TEXTS", (32, 32))
    if not natively:
        monkeypatch.setattr(native, "available", lambda: False)
    elif not native.available():
        pytest.skip(f"no native library: {native.why_not()}")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # a bigram model: after token i comes i + 1 (mod 300) or i + 2, equally often
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.nn.functional.normalize(torch.randn(300, 32), dim=1))
        unit = model.model.embed_tokens.weight
        model.lm_head.weight.copy_(40 * (unit.roll(1, 0) + unit.roll(2, 0)) / 32**0.5)
    decoder = sampling._rounded(model)
    assert (decoder is not None) == natively
    if decoder is not None:
        with torch.no_grad():
            expected = model(torch.arange(2, 7)[None]).logits[:, -1]
        logits = decoder.forward(decoder.new_cache(1, 5, "bf16"), [[2, 3, 4, 5, 6]])
        assert (logits - expected).abs().max() < 0.02 * expected.abs().max()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    written: list[tuple[int, int]] = []
    report = lambda done, total: written.append((done, total))  # noqa: E731
    found = load("self", with_bos, model=model, nsamples=40, seqlen=12, seed=3, on_sampled=report)
    assert written == [(32, 40), (40, 40)]
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's randomness is touched
    assert torch.get_num_threads() == threads
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert found.ids.shape == (40, 12)
    assert (found.ids[:, 0] == 0).all()
    steps = (found.ids[:, 1:] - found.ids[:, :-1]) % 300
    assert (steps == 1).float().mean() > 0.3
    assert (steps == 2).float().mean() > 0.3
    assert (found.ids[:, :-1] == 1).any()  # it goes on after EOS
    assert load("self", with_bos, model=lambda: model, nsamples=40, seqlen=12, seed=3).sha256 == found.sha256
    assert load("self", with_bos, model=model, nsamples=40, seqlen=12, seed=4).sha256 != found.sha256
    # settings of the chat, which do not touch what it has learnt
    model.generation_config.update(do_sample=True, temperature=0.01, top_k=1)  # type: ignore[no-untyped-call]
    assert load("self", with_bos, model=model, nsamples=40, seqlen=12, seed=3).sha256 == found.sha256


@pytest.mark.parametrize("words", [7, 128, 300])
def test_words_are_drawn_with_their_probability(words: int) -> None:
    generator = torch.Generator().manual_seed(words)
    logits = 2 * torch.randn(words, generator=generator)
    logits[torch.randperm(words, generator=generator)[: words // 3]] = -torch.inf
    logits[-2:] = -torch.inf  # the last sum is reached before the end
    count = 20_000
    torch.manual_seed(1)
    drawn = sampling._draw(logits.expand(count, -1))
    assert drawn.shape == (count, 1)
    found, expected = drawn.flatten().bincount(minlength=words) / count, logits.softmax(0)
    assert bool((found[expected == 0] == 0).all())
    assert bool(((found - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt() + 1e-12).all())


@pytest.mark.parametrize("point", [0.0, 1 - 2**-24])
def test_the_ends_of_what_is_drawn_from(point: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words that cannot come do not, wherever rounding puts the sums."""
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape, point))
    logits = torch.randn(500, 700, generator=torch.Generator().manual_seed(0))
    logits[:, :200] = logits[:, 450:] = -torch.inf
    drawn = sampling._draw(logits)
    assert torch.equal(drawn, torch.full((500, 1), 449 if point else 200))


def test_a_model_that_writes_no_numbers() -> None:
    with pytest.raises(BitternError, match="expected logits, found NaN or infinity"):
        sampling._draw(torch.tensor([[0.0, 1.0], [0.0, torch.nan]]))


def test_a_wrong_tokenizer_is_named(text: Path, plain: PreTrainedTokenizerFast) -> None:
    largest = int(load(text, plain).ids.max())
    assert load(text, plain, vocab_size=largest + 1).tokens_found == 256
    with pytest.raises(BitternError, match=rf"tokenizer .* has id {largest}, the model's vocabulary has {largest}$"):
        load(text, plain, vocab_size=largest)


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("none.txt", None, {}, r"none.txt: expected a text file, found none"),
        ("none.jsonl", None, {}, r"none.jsonl: expected a file or a dataset on the Hub"),
        ("a.txt#body", None, {}, r"a.txt: expected a text file, found none"),
        ("empty.jsonl", '{"text": ""}\n' * 99, {}, r"expected at least one window of 16 tokens, found 0 tokens"),
        ("a.jsonl", '{"a": 1, "b": 2}', {}, r"expected a column 'text' of text, found columns a, b$"),
        ("short.txt", "heron", {}, r"short.txt: expected at least one window of 16 tokens, found \d+ tokens"),
        ("empty.txt", "", {}, r"empty.txt: expected at least one window of 16 tokens, found 0 tokens"),
        ("latin.txt", b"bl\xe4 " * 99, {}, r"latin.txt: expected UTF-8 text, found .*0xe4"),
        ("broken.jsonl", '{"text": ', {}, r"broken.jsonl: cannot be read as a dataset: \S+"),
        ("table.csv", "a,b", {}, r"table.csv: expected a file of one of the kinds .txt, .jsonl.* found '.csv'"),
        ("a.txt", "heron", {"chat_template": True}, r"--chat-template: needs rows with messages"),
        ("a.jsonl", '{"text": "heron"}', {"chat_template": True}, r"needs a column 'messages', found columns text"),
        *(
            ("a.jsonl", f'{{"messages": {messages}}}', {"chat_template": True}, message)
            for messages, message in [
                ('[{"role": "user", "value": "heron"}]', r"expected messages with role and content, found role, value"),
                ('[{"speaker": "user", "content": "heron"}]', r"role and content, found speaker, content"),
                ('"heron"', r"a.jsonl: row 1: expected a list of messages, found str"),
                ('["heron", "crane"]', r"a.jsonl: row 1: expected a list of messages, found one of str"),
                ('[{"from": "human"}]', r"a.jsonl: row 1: expected turns with from and value, found from$"),
            ]
        ),
        ("a.jsonl", '{"a": "heron", "b": "crane"}', {}, r"expected a column 'text' of text, found columns a, b"),
        ("a.txt", "heron", {"nsamples": 0}, r"expected at least 1 and 2, found 0 and 16"),
        ("a.txt", "heron", {"seqlen": 1}, r"expected at least 1 and 2, found 16 and 1"),
    ],
)
def test_what_is_refused(
    name: str,
    content: str | bytes | None,
    options: dict[str, Any],
    message: str,
    tmp_path: Path,
    plain: PreTrainedTokenizerFast,
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(BitternError, match=message) as caught:
        load(path, plain, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["bittern/no-such-dataset", "no-such-dataset:config@train"])
def test_a_dataset_that_is_not_there(name: str, plain: PreTrainedTokenizerFast) -> None:
    with pytest.raises(BitternError, match=rf"^{name}: cannot be read as a dataset: .*looked for on the Hub") as caught:
        load(name, plain)
    assert "\n" not in str(caught.value)


def test_empty_rows_are_passed_over(tmp_path: Path, plain: PreTrainedTokenizerFast) -> None:
    """The column is that of the first row that tells it, whatever others there are later."""
    whole = write_rows(tmp_path / "whole.jsonl", [{"content": words(300)}])
    rows: list[dict[str, Any]] = [
        {"content": None, "lang": None},
        {"content": words(300), "lang": None},
        {"content": None, "lang": "en"},
    ]
    rows.insert(2, {"content": "", "lang": "en"})
    holes = write_rows(tmp_path / "holes.jsonl", rows)
    assert torch.equal(load(whole, plain).ids, load(holes, plain).ids)
    chat = [{"role": "user", "content": words(300)}]
    whole = write_rows(tmp_path / "chats.jsonl", [{"messages": chat}])
    holes = write_rows(tmp_path / "empty.jsonl", [{"messages": []}, {"messages": chat}, {"messages": []}])
    found = [load(path, plain, chat_template=True).ids for path in (whole, holes)]
    assert torch.equal(*found)


def test_self_needs_a_model_and_something_to_begin_with(plain: PreTrainedTokenizerFast) -> None:
    with pytest.raises(BitternError, match="needs the whole model"):
        load("self", plain)
    with pytest.raises(BitternError, match="needs a dataset with messages"):
        load("self", plain, chat_template=True)


def test_what_a_template_cannot_render_is_told_by_row(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(adds_bos=False)
    tokenizer.chat_template = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}"
    parts = [{"role": "user", "content": [{"type": "text", "text": "Boom?"}]}]
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(json.dumps({"messages": messages}) for messages in ([], parts)))
    with pytest.raises(
        BitternError, match=r"chat.jsonl: row 2: the chat template refuses .*TypeError: .*\"list\""
    ) as caught:
        load(path, tokenizer, chat_template=True)
    assert "\n" not in str(caught.value)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(BitternError, match=r"chat.jsonl: row 2: the chat template refuses .*: roles must alternate$"):
        load(path, tokenizer, chat_template=True)


def test_a_tokenizer_without_a_chat_template(tmp_path: Path) -> None:
    bare = tiny_tokenizer(adds_bos=False)
    bare.chat_template = None
    path = write_rows(tmp_path / "chat.jsonl", [{"messages": [{"role": "user", "content": "Boom?"}]}])
    with pytest.raises(BitternError, match="has no chat template"):
        load(path, bare, chat_template=True)
