"""Model cards: what huggingface_hub makes of them, and whether what they say is what the artifact is."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from huggingface_hub.repocard_data import model_index_to_eval_results
from transformers import PreTrainedTokenizerFast

import bittern
from bittern.errors import BitternError
from bittern.inspect import inspect
from bittern.origin import inherited_fields
from bittern.push import push
from bittern.story import conditions, evaluations
from tests import tiny

COMMIT = "0123456789abcdef0123456789abcdef01234567"
EVALUATIONS = [
    {
        "what": "text",
        "name": "test.txt",
        "sha256": "ab" * 32,
        "seqlen": 512,
        "windows": 4,
        "tokens": 2044,
        "perplexity": 6.7312,
        "kl": 0.0591,
        "top1_agreement": 0.913,
        "base": "base",
        "base_perplexity": 6.391,
    },
    {
        "what": "text",
        "name": "test.txt",
        "sha256": "ab" * 32,
        "seqlen": 128,
        "windows": 9,
        "tokens": 1143,
        "perplexity": 8.25,
        "kl": None,
        "top1_agreement": None,
        "base": None,
        "base_perplexity": None,
    },
    {
        "what": "task",
        "name": "org/quiz:easy",
        "sha256": "cd" * 32,
        "questions": 50,
        "accuracy": 0.62,
        "accuracy_normalized": 0.64,
        "base": "base",
        "base_accuracy": 0.66,
    },
    {"what": "task", "name": "stories", "sha256": "ef" * 32, "questions": 20, "accuracy": 0.5, "base": None},
]


@pytest.fixture(scope="module")
def source(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.save(tiny.random_model(), tmp_path_factory.mktemp("source") / "tiny", tokenizer)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def text_file(text: Path) -> Path:
    return text


@pytest.fixture(scope="module")
def packed(source: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "tiny-4bit"
    bittern.quantize(
        *(source, folder),
        bits=4,
        group_size=32,
        dataset=str(text_file),
        nsamples=4,
        seqlen=32,
        seed=7,
        layers=[("down_proj", 8)],
        skip=["layers.1.mlp.up_proj"],
    )
    return folder


@pytest.fixture
def artifact(packed: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "tiny-4bit"
    folder.mkdir()
    for path in packed.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def change(artifact: Path, **more: Any) -> None:
    """Put something into a manifest."""
    path = artifact / "bittern_manifest.json"
    manifest = json.loads(path.read_text())
    for key, value in more.items():
        manifest[key] = manifest[key] | value if isinstance(manifest.get(key), dict) else value
    path.write_text(json.dumps(manifest))


def card_of(artifact: Path, **options: Any) -> str:
    return push(artifact, "me/tiny-4bit", dry_run=True, **options).card


def data_of(card: str) -> dict[str, Any]:
    return dict(ModelCard(card).data.to_dict())  # type: ignore[no-untyped-call]


def test_huggingface_hub_loads_the_card_and_writes_the_same(artifact: Path, tmp_path: Path) -> None:
    change(artifact, source={"name": "org/base", "revision": COMMIT}, evaluations=EVALUATIONS)
    text = card_of(artifact)
    path = tmp_path / "README.md"
    path.write_text(text, encoding="utf-8")
    loaded = ModelCard.load(path)
    assert str(loaded) == text
    data = data_of(text)
    assert {key: data[key] for key in data if key not in ("model-index", "tags", "metrics")} == {
        "license": "apache-2.0",
        "base_model": "org/base",
        "base_model_relation": "quantized",
        "language": "en",
        "pipeline_tag": "text-generation",
        "library_name": "transformers" if inspect(artifact)["loads"][1]["loads"] else "bittern",
        "quantized_by": "me",
    }
    assert data["tags"] == ["bittern", "gptq", "4-bit"]
    assert data["metrics"] == ["perplexity", "accuracy"]


def test_the_text_says_what_the_artifact_is(artifact: Path, text_file: Path) -> None:
    found = inspect(artifact)
    change(artifact, source={"name": "org/base", "revision": COMMIT})
    text = card_of(artifact)
    for grid, count in found["quantization"]["layers"].items():
        assert f"| {count} layers | {grid} |" in text and count > 1
    assert set(found["quantization"]["layers"]) == {"4 bits, group 32, sym", "8 bits, group 32, sym"}
    assert "| method | GPTQ |" in text
    assert f"| calibration | `{text_file.name}`, 128 tokens, windows of 32, seed 7 |" in text
    assert str(text_file.parent) not in text
    assert "| left as floats | 1 layer: --skip layers.1.mlp.up_proj |" in text
    assert "[org/base](https://huggingface.co/org/base) (commit `0123456789ab`), quantized to 4 and 8 bits" in text
    assert f"| without embeddings | {found['bits_per_weight']['without_embeddings']:.4g} |" in text
    assert "| context | 64 tokens |" in text
    assert "Not measured, or not recorded." in text


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors", "awq", "mlx", "safetensors"])
def test_a_command_for_every_loader_that_opens_it_and_a_reason_for_the_others(
    source: Path, tmp_path: Path, format: str
) -> None:
    bittern.quantize(source, tmp_path / "packed", bits=4, group_size=32, method="rtn")
    folder = tmp_path / "packed"
    if format != "gptq":
        folder = tmp_path / "other"
        bittern.convert(tmp_path / "packed", folder, format=format)
    text = card_of(folder)
    loading = text.split("## How to load it")[1].split("\n## ")[0]
    offered = set(re.findall(r"^\*\*([\w.]+)\*\* \(", loading, re.MULTILINE))
    verdicts = {verdict["consumer"]: verdict for verdict in inspect(folder)["loads"]}
    known = {"bittern", "transformers", "vLLM", "SGLang", "GPTQModel", "mlx"}
    # GPTQModel takes floats to quantize them, and runs none
    assert offered == {name for name in known if verdicts[name]["loads"]} - (
        {"GPTQModel"} if format == "safetensors" else set()
    )
    if format == "safetensors":
        assert "quantized to 4 bits and stored as floats by" in text
    refused = dict(re.findall(r"^- ([\w.-]+): (.*)$", loading, re.MULTILINE))
    expected = {name: verdict["reason"] for name, verdict in verdicts.items() if not verdict["loads"]}
    converted = "bittern convert me/tiny-4bit -o tiny-4bit.gguf --target llama.cpp" in loading
    assert converted
    expected.pop("llama.cpp")
    assert refused == expected
    libraries = {name for name in ("transformers", "mlx") if verdicts[name]["loads"]}
    assert data_of(text)["library_name"] in (libraries or {"bittern"})


def test_no_conversion_is_offered_that_would_be_refused(
    source: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    bittern.quantize(source, tmp_path / "packed", bits=8, group_size=32, sym=False, method="rtn")
    text = card_of(tmp_path / "packed")
    assert "bittern convert" not in text.split("## How to load it")[1].split("\n## ")[0]
    assert "- llama.cpp: needs GGUF: GGUF has no type for 8-bit asymmetric codes" in text
    gpt2 = tiny.save(tiny.random_model("gpt2", n_embd=64, n_head=4, n_layer=2), tmp_path / "gpt2", tokenizer)
    bittern.convert(gpt2, tmp_path / "floats", dtype="bf16")
    text = card_of(tmp_path / "floats", license="mit")
    assert "--target llama.cpp" not in text and re.search("^- llama.cpp: needs GGUF: .*, found gpt2$", text, re.M)


def test_three_bits_have_no_way_into_the_loaders_that_refuse_them(source: Path, tmp_path: Path) -> None:
    bittern.quantize(source, tmp_path / "packed", bits=2, group_size=32, sym=False, method="rtn")
    text = card_of(tmp_path / "packed")
    assert "vllm serve" not in text and "- vLLM: 2 bits: its GPTQ takes 4 and 8" in text


def test_evaluations_stand_in_the_text_and_in_the_model_index(artifact: Path) -> None:
    change(artifact, evaluations=EVALUATIONS)
    text = card_of(artifact)
    assert "| test.txt, 4 x 512 tokens | 6.731 | 6.391 | 0.0591 | 91.3 % |" in text
    assert "| test.txt, 9 x 128 tokens | 8.25 | - | - | - |" in text
    assert "| org/quiz:easy, 50 questions | 62.0 % | 66.0 % |" in text
    name, results = model_index_to_eval_results(data_of(text)["model-index"])
    assert name == "tiny-4bit"
    found = {(each.dataset_name, each.dataset_config, each.metric_type): each.metric_value for each in results}
    assert found == {
        ("test.txt", "4 windows of 512 tokens", "perplexity"): 6.7312,
        ("test.txt", "4 windows of 512 tokens", "kl_divergence"): 0.0591,
        ("test.txt", "4 windows of 512 tokens", "top1_agreement"): 0.913,
        ("test.txt", "9 windows of 128 tokens", "perplexity"): 8.25,
        ("org/quiz:easy", None, "accuracy"): 0.62,
        ("org/quiz:easy", None, "accuracy_normalized"): 0.64,
        ("stories", None, "accuracy"): 0.5,
    }
    assert {each.dataset_type for each in results} == {"test.txt", "org/quiz", "stories"}


def test_measurements_with_other_settings_are_told_apart(artifact: Path) -> None:
    text_record, task = EVALUATIONS[0], next(each for each in EVALUATIONS if each["what"] == "task")
    rough = {**text_record, "perplexity": 6.8, "settings": {"activations": "a8", "lm_head_bits": 8}}
    last_word = {**task, "name": "words", "accuracy": None, "exact_match": 0.5, "base_exact_match": 0.75}
    change(artifact, evaluations=[rough, text_record, last_word])
    text = card_of(artifact)
    assert "| test.txt, 4 x 512 tokens (inputs of 8 bits, head in 8 bits) | 6.8 |" in text
    assert "| test.txt, 4 x 512 tokens | 6.731 |" in text
    assert re.search(r"\| words, \d+ questions \| 50\.0 % \| 75\.0 % \|", text)
    _, results = model_index_to_eval_results(data_of(text)["model-index"])
    configs = {each.dataset_config: each.metric_value for each in results if each.metric_type == "perplexity"}
    both = "4 windows of 512 tokens (inputs of 8 bits, head in 8 bits)"
    assert configs == {"4 windows of 512 tokens": 6.7312, both: 6.8}
    assert [conditions(each) for each in evaluations({"evaluations": [rough, text_record]})] == ["", conditions(rough)]


def test_benchmarks_of_the_hub_become_files_that_it_collects(artifact: Path) -> None:
    change(artifact, evaluations=EVALUATIONS)
    summary = push(artifact, "me/tiny-4bit", dry_run=True)
    names = [name for name in summary.files if name.startswith(".eval_results/")]
    assert names == [".eval_results/org_quiz_easy.yaml"]  # "stories" is no dataset of the Hub
    from bittern.card import evaluation_files

    manifest = json.loads((artifact / "bittern_manifest.json").read_text())
    (entry,) = parse_eval_result_entries(yaml.safe_load(evaluation_files(manifest)[names[0]]))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("org/quiz", "easy", 62.0)
    task = next(each for each in EVALUATIONS if each["name"] == "org/quiz:easy")
    rough = {**task, "accuracy": 0.3, "settings": {"activations": "a8"}}  # not how it runs by itself
    assert evaluation_files({"evaluations": [task, rough]}) == evaluation_files({"evaluations": [task]})


def test_a_degraded_artifact_says_so_at_the_top(artifact: Path, tmp_path: Path) -> None:
    reason = "perplexity is 14 % above the source's"
    uptrained = {
        "kind": "uptrain",
        "degraded": reason,
        "training": None,
        "source": {"name": "org/base", "revision": COMMIT},
        "heads": {"num_attention_heads": 6, "source_kv_heads": 6, "num_key_value_heads": 3, "head_dim": 48},
    }
    change(artifact, origin=uptrained)
    text = card_of(artifact)
    body = ModelCard(text).text
    assert body.startswith(f"\n> [!WARNING]\n> This model is degraded: {reason}.\n")
    data = data_of(text)
    assert data["base_model_relation"] == "finetune" and data["base_model"] == "org/base"
    assert {"degraded", "gqa"} <= set(data["tags"])
    assert "| key and value heads | 6 merged into 3 |" in text and "| trained afterwards | no |" in text
    assert "with its attention heads merged into groups and quantized to" in text
    own = tmp_path / "own.md"
    own.write_text("# Mine\n\nFine words.\n")
    summary = push(artifact, "me/tiny-4bit", dry_run=True, card=own)
    assert f"this artifact is degraded, as its card says: {reason}" in summary.notes
    once = summary.card
    assert reason in once.split("# Mine")[0] and once.endswith("# Mine\n\nFine words.\n")
    own.write_text(once)
    assert card_of(artifact, card=own).count(reason) == 1


def test_a_config_that_says_degraded_is_believed(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"bittern": {"degraded": "not trained after conversion"}}))
    bittern.quantize(folder, tmp_path / "packed", bits=4, group_size=32, method="rtn")
    assert "> This model is degraded: not trained after conversion." in card_of(tmp_path / "packed")


def test_a_publisher_s_card_keeps_its_text_to_the_byte(artifact: Path, tmp_path: Path) -> None:
    change(artifact, source={"name": "org/base", "revision": COMMIT}, evaluations=EVALUATIONS)
    own = tmp_path / "card.md"
    text = "\n\n# Ein Modell\n\n---\n\n* eins\n\n\ttab  \n"
    metadata = (
        "tags:\n- mine\n- gptq\nlanguage: de\nwidget:\n- text: Hallo\nquantized_by: nobody\nbase_model: org/mine\n"
        "model-index:\n- name: old\n  results:\n  - task: {type: text-generation}\n    dataset: {name: x, type: x}\n"
        "    metrics:\n    - {type: perplexity, value: 1}\n"
    )
    own.write_text(f"---\n{metadata}---\n{text}", encoding="utf-8")
    card = card_of(artifact, card=own)
    assert ModelCard(card).text == text
    data = data_of(card)
    assert data["tags"] == ["mine", "gptq", "bittern", "4-bit"]
    assert (data["language"], data["base_model"], data["widget"]) == ("de", "org/mine", [{"text": "Hallo"}])
    assert (data["quantized_by"], data["license"]) == ("me", "apache-2.0")
    assert data["model-index"][0]["name"] == "tiny-4bit" and len(data["model-index"][0]["results"]) == 4
    own.write_text(card, encoding="utf-8")
    assert card_of(artifact, card=own) == card  # what was completed once is complete


def test_of_several_bases_on_a_publisher_s_card_the_first_is_the_base(artifact: Path, tmp_path: Path) -> None:
    own = tmp_path / "card.md"
    own.write_text("---\nbase_model:\n- org/one\n- org/two\n---\n# Merged\n", encoding="utf-8")
    data = data_of(card_of(artifact, card=own))
    assert (data["base_model"], data["base_model_relation"]) == (["org/one", "org/two"], "quantized")


def test_what_was_done_before_the_base_is_no_relation_to_it(artifact: Path) -> None:
    heads = {"source_kv_heads": 4, "num_key_value_heads": 2}
    merged = {"kind": "uptrain", "source": {"name": "/home/me/fp32", "revision": None}, "heads": heads}
    change(artifact, source={"name": "me/merged", "revision": COMMIT}, origin=merged)
    text = card_of(artifact)
    assert (data_of(text)["base_model"], data_of(text)["base_model_relation"]) == ("me/merged", "quantized")
    assert "[me/merged](https://huggingface.co/me/merged) (commit `0123456789ab`), quantized to 4 and 8 bits" in text
    merged["source"] = {"name": "org/base", "revision": COMMIT}
    change(artifact, origin=merged)
    text = card_of(artifact)
    assert (data_of(text)["base_model"], data_of(text)["base_model_relation"]) == ("org/base", "finetune")


def test_a_licence_on_a_card_of_ours_counts_as_the_publisher_s(artifact: Path, tmp_path: Path) -> None:
    change(artifact, source={"card": None})
    own = tmp_path / "card.md"
    own.write_text(card_of(artifact, license="mit"), encoding="utf-8")
    assert card_of(artifact, card=own) == own.read_text(encoding="utf-8")
    assert "`mit`, as its publisher states." in own.read_text(encoding="utf-8")


def test_a_card_of_ours_is_made_anew_and_an_edited_one_is_kept(artifact: Path, tmp_path: Path) -> None:
    own = tmp_path / "card.md"
    own.write_text(card_of(artifact), encoding="utf-8")
    change(artifact, evaluations=EVALUATIONS)
    assert "## What it kept\n\n| text" in card_of(artifact, card=own)
    own.write_text(card_of(artifact).replace("# tiny-4bit\n", "# My tiny model\n"), encoding="utf-8")
    change(artifact, evaluations=[])
    kept = card_of(artifact, card=own)
    assert "# My tiny model\n" in kept and "## What it kept\n\n| text" in kept


@pytest.mark.parametrize("words", ["# No metadata", "---\n---\n# Empty", "\ufeff---\nlicense: apache-2.0\n---\n# BOM"])
def test_any_text_will_do_for_a_card(artifact: Path, tmp_path: Path, words: str) -> None:
    own = tmp_path / "card.md"
    own.write_text(words, encoding="utf-8")
    card = card_of(artifact, card=own)
    assert data_of(card)["license"] == "apache-2.0"
    assert ModelCard(card).text.strip() == re.sub(r"(?s)^\ufeff?---.*---\n", "", words)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"---\nlicense: [unclosed\n---\n", "card: its metadata are no YAML"),
        (b"---\n- a\n---\n", "card: its metadata: expected a YAML object, found list"),
        (b"---\nmodel-index: [1]\n---\n# Mine\n", "card: its metadata are not what the Hub expects"),
        (b"\xff\xfe", "expected UTF-8 text"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_card_that_is_none_is_refused(artifact: Path, tmp_path: Path, data: bytes | None, expected: str) -> None:
    own = tmp_path / "card.md"
    if data is not None:
        own.write_bytes(data)
    with pytest.raises(BitternError) as refused:
        card_of(artifact, card=own)
    assert expected in str(refused.value)


def test_the_commands_that_make_it_again_name_no_place_on_this_machine(artifact: Path) -> None:
    first = {"kind": "convert", "source": {}, "command": ["bittern", "convert", "org/base", "-o", "OUT"]}
    last = ["bittern", "quantize", "/home/me/fp32", "-o", "OUT", "--dataset", "~/texts/my wiki.txt", "--skip", "a|b"]
    change(artifact, origin=first, command=last)
    text = card_of(artifact)
    made = text.split("## Made with\n\n```sh\n")[1].split("\n```")[0].splitlines()
    assert made == [
        "bittern convert org/base -o OUT",
        "bittern quantize fp32 -o OUT --dataset 'my wiki.txt' --skip 'a|b'",
    ]
    change(artifact, options={"dataset": ["/home/me/c#/mine.txt", "/home/me/c#/rows.jsonl#body"]})
    assert "| calibration | `mine.txt`, `rows.jsonl#body`" in card_of(artifact)
    near = ["bittern", "quantize", "acme/base", "-o", "OUT", "--dataset", "acme/mails.jsonl#body"]
    near += ["--dataset", "org/data"]
    change(artifact, command=near, source={"name": "acme/base", "revision": None})
    change(artifact, options={"dataset": ["acme/mails.jsonl#body", "org/data"]})
    text = card_of(artifact)
    assert "bittern quantize base -o OUT --dataset 'mails.jsonl#body' --dataset org/data" in text
    assert "| calibration | `mails.jsonl#body`, `org/data`" in text and "acme/" not in text


@pytest.mark.parametrize("named", [".", "..", "./"])
def test_a_source_that_has_no_name_gets_that_of_its_folder(
    named: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(source, tmp_path / "moss")
    (folder / "below").mkdir()
    monkeypatch.chdir(folder / "below" if named == ".." else folder)
    bittern.quantize(named, tmp_path / "packed", bits=4, group_size=32, method="rtn")
    found = inspect(tmp_path / "packed")
    assert found["manifest"]["story"][0].startswith("quantized moss (llama): ")
    assert found["manifest"]["command"][:3] == ["bittern", "quantize", str(folder)]
    text = card_of(tmp_path / "packed")
    assert "\n`moss`, quantized to 4 bits by " in text and "\nbittern quantize moss -o OUT --sym " in text


def test_a_source_whose_name_no_manifest_can_hold(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    bittern.convert(source, tmp_path / "m.gguf")
    file = (tmp_path / "m.gguf").rename(tmp_path / "m\udcff.gguf")
    manifest = bittern.quantize(file, tmp_path / "packed", bits=4, group_size=32, method="rtn")
    assert manifest["source"]["name"] == str(tmp_path / r"m\udcff.gguf")


def test_a_gguf_file_has_the_name_of_the_current_folder(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf = pytest.importorskip("gguf")
    monkeypatch.chdir(source)
    bittern.convert(".", tmp_path / "m.gguf")
    assert gguf.GGUFReader(tmp_path / "m.gguf").fields["general.name"].contents() == source.name


def test_every_dataset_of_the_hub_is_named(artifact: Path) -> None:
    names = ["org/one:en@train#body", "/home/me/mine.txt", "org/two", "me/rows.jsonl#a/b"]
    change(artifact, options={"dataset": names})
    text = card_of(artifact)
    assert data_of(text)["datasets"] == ["org/one", "org/two"]
    assert "| calibration | `org/one:en@train#body`, `mine.txt`, `org/two`, `rows.jsonl#a/b`, 128 tokens" in text
    assert "/home/me" not in text
    change(artifact, options={"dataset": None}, calibration={"source": ", ".join(names)})  # as older ones say it
    assert data_of(card_of(artifact))["datasets"] == ["org/one", "org/two"]


@pytest.mark.parametrize("name", ["acme/mails@2024.jsonl", "acme/a:b.txt#body", "acme/one#two.json", "acme/a, b.txt"])
def test_a_file_is_no_dataset_of_the_hub(artifact: Path, name: str) -> None:
    for asked in (name, [name, "self"]):
        change(artifact, options={"dataset": asked}, calibration={"source": name})
        text = card_of(artifact)
        assert "datasets" not in data_of(text) and "acme" not in text


def test_what_somebody_else_quantized_is_said_to_be_repacked(artifact: Path, tmp_path: Path) -> None:
    (artifact / "bittern_manifest.json").unlink()
    bittern.convert(artifact, tmp_path / "moved", format="compressed-tensors")
    text = card_of(tmp_path / "moved", license="mit")
    assert "`tiny-4bit`, kept at 4 and 8 bits and repacked as compressed-tensors by bittern" in text
    assert "`bittern_manifest.json` has the hash of every file." in text and "quantized to" not in text


def test_a_base_s_licence_is_no_markdown(artifact: Path) -> None:
    name = "x\n\n# INJECTED\n\n[a](https://evil) <script>"
    licence = {"license": "other", "license_name": name, "license_link": "https://example.org/a)\n\n# b"}
    change(artifact, source={"card": licence})
    section = card_of(artifact).split("## Licence\n\n")[1]
    shown = r"x # INJECTED \[a\](https://evil) &lt;script>"
    assert section.startswith(f"[{shown}](https://example.org/a%29%0A%0A#%20b), inherited from")
    change(artifact, source={"card": {"license": "a`\n# b"}})
    assert "\n`a' # b`, inherited from" in card_of(artifact)
    stated = {"license": "mit\n", "license_name": "x\n\n# y", "language": ["en", "d\ne"]}
    assert inherited_fields(stated) == {"license": "mit", "language": ["en"]}


def test_a_manifest_from_elsewhere_breaks_no_table(artifact: Path) -> None:
    change(artifact, notes=["a | b\n\n# headline <b>"], source={"name": "/home/somebody/secret place/model"})
    text = card_of(artifact)
    assert "| note | a \\| b # headline &lt;b> |" in text
    assert "somebody" not in text and "`model`, quantized to" in text
