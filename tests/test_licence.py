"""Under which licence an artifact may be published: from the base's card, through the manifest, to the new card."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from transformers import PreTrainedTokenizerFast

import bittern
from bittern import origin
from bittern.checkpoint import open_checkpoint
from bittern.errors import BitternError
from bittern.hub import download
from bittern.licence import settle
from bittern.push import PushSummary, push
from tests import tiny

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "license: other\nlicense_name: tiny-research\nlicense_link: https://example.org/licence\n"


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.random_model(), tmp_path_factory.mktemp("base") / "base", tokenizer)


def base(model: Path, folder: Path, metadata: str | None, *texts: str) -> Path:
    """A checkpoint with a card and licence files."""
    folder.mkdir()
    for path in model.iterdir():
        shutil.copyfile(path, folder / path.name)
    if metadata is not None:
        (folder / "README.md").write_text(f"---\n{metadata}---\n# Base\n", encoding="utf-8")
    for name in texts:
        (folder / name).write_text(f"the text of {name}", encoding="utf-8")
    return folder


def shown(artifact: Path, **options: Any) -> PushSummary:
    return push(artifact, "me/tiny", dry_run=True, **options)


def licence(card: str) -> dict[str, Any]:
    data = ModelCard(card).data.to_dict()  # type: ignore[no-untyped-call]
    return {key: data[key] for key in origin.LICENCE_KEYS if key in data}


@pytest.mark.parametrize(
    ("metadata", "texts", "stated", "expected"),
    [
        ("license: apache-2.0\n", [], None, {"license": "apache-2.0"}),
        ("license: [apache-2.0, mit]\n", ["LICENSE-APACHE", "LICENSE-MIT"], None, {"license": ["apache-2.0", "mit"]}),
        (
            OTHER,
            ["LICENSE"],
            None,
            {"license": "other", "license_name": "tiny-research", "license_link": "https://example.org/licence"},
        ),
        (
            "license: other\nlicense_name: tiny-research\nlicense_link: LICENSE\n",
            ["LICENSE", "NOTICE", "USE_POLICY.md"],
            None,
            {"license": "other", "license_name": "tiny-research", "license_link": "LICENSE"},
        ),
        (
            "license: other\nlicense_name: tiny-research\n",
            ["LICENSE.md"],
            None,
            {"license": "other", "license_name": "tiny-research", "license_link": "LICENSE.md"},
        ),
        ("license: llama3.2\nextra_gated_prompt: Agree?\n", ["LICENSE.txt"], None, {"license": "llama3.2"}),
        ("license: unknown\n", [], "mit", {"license": "mit"}),
        ("language: en\n", ["LICENSE"], "cc-by-4.0", {"license": "cc-by-4.0"}),
        (None, [], "openrail", {"license": "openrail"}),
        ("license: apache-2.0\n", [], "mit", {"license": "mit"}),
        (OTHER, [], "other", {"license": "other", "license_name": "tiny-research"}),
        ("license: [unclosed\n", [], "mit", {"license": "mit"}),
    ],
)
def test_the_licence_of_the_base_reaches_the_card(
    model: Path, tmp_path: Path, metadata: str | None, texts: list[str], stated: str | None, expected: dict[str, Any]
) -> None:
    bittern.convert(base(model, tmp_path / "base", metadata, *texts), tmp_path / "made")
    summary = shown(tmp_path / "made", license=stated)
    assert licence(summary.card).items() >= expected.items()
    assert summary.licence == licence(summary.card)
    assert set(texts) <= set(summary.files)
    assert all(f"[{name}]({name})" in summary.card for name in texts)
    contradicted = stated == "mit" and metadata == "license: apache-2.0\n"
    assert ("the base is licensed as apache-2.0; this is published as mit" in " ".join(summary.notes)) is contradicted
    assert ("The base is gated" in summary.card) is ("extra_gated" in str(metadata))


@pytest.mark.parametrize(
    ("metadata", "texts", "stated", "expected"),
    [
        (None, [], None, "the base came without a model card; --license states it"),
        ("language: en\n", ["LICENSE"], None, "the card of the base names none; --license states it (read LICENSE)"),
        ("license: unknown\n", [], None, "names none; --license states it"),
        ("license:\n", [], None, "names none; --license states it"),
        ("license: [unclosed\n", [], None, "cannot be read: its metadata are no YAML"),
        ("- a list\n", [], None, "cannot be read: its metadata: expected a YAML object, found list"),
        ("license: other\n", ["LICENSE"], None, "license: other needs license_name (and license_link)"),
        ("license: other\nlicense_name: x\n", [], None, "license: x needs license_link in the metadata of a card"),
        (None, [], "Apache 2.0", "--license: expected an identifier of the Hub such as apache-2.0 or mit, found"),
        (None, [], "other", "license: other needs license_name"),
    ],
)
def test_an_unknown_licence_is_refused(
    model: Path, tmp_path: Path, metadata: str | None, texts: list[str], stated: str | None, expected: str
) -> None:
    bittern.convert(base(model, tmp_path / "base", metadata, *texts), tmp_path / "made")
    with pytest.raises(BitternError) as refused:
        shown(tmp_path / "made", license=stated)
    assert expected in str(refused.value)


def test_a_publisher_s_card_may_state_it_but_not_contradict_the_base(model: Path, tmp_path: Path) -> None:
    bittern.convert(base(model, tmp_path / "base", None), tmp_path / "made")
    card = tmp_path / "card.md"
    card.write_text(f"---\n{OTHER}base_model: org/base\n---\n# Mine\n")
    summary = shown(tmp_path / "made", card=card)
    assert licence(summary.card) == {
        "license": "other",
        "license_name": "tiny-research",
        "license_link": "https://example.org/licence",
    }
    data = ModelCard(summary.card).data
    assert (data["base_model"], data["base_model_relation"]) == ("org/base", "quantized")
    bittern.convert(base(model, tmp_path / "free", "license: apache-2.0\n"), tmp_path / "other")
    with pytest.raises(BitternError, match=r"card: license: expected apache-2\.0, as of the base, found other"):
        shown(tmp_path / "other", card=card)
    summary = shown(tmp_path / "other", card=card, license="other")
    assert licence(summary.card)["license_name"] == "tiny-research"
    assert any("published as other, as --license says" in note for note in summary.notes)


def test_a_relative_link_leads_to_the_base_unless_its_file_travels() -> None:
    fields = {"license": "other", "license_name": "x", "license_link": "terms/LICENCE.pdf"}
    found, _ = settle(None, {}, fields, "org/base", ["model.safetensors"])
    assert found["license_link"] == "https://huggingface.co/org/base/blob/main/terms/LICENCE.pdf"
    found, _ = settle(None, {}, fields, "org/base", ["terms/LICENCE.pdf"])
    assert found["license_link"] == "terms/LICENCE.pdf"
    found, _ = settle(None, {}, {"license": "mit", "license_link": "LICENSE"}, None, [])
    assert found == {"license": "mit"}


def test_the_record_goes_from_artifact_to_artifact(model: Path, tmp_path: Path) -> None:
    metadata = "license: mit\nlanguage: [en, no]\npipeline_tag: text-generation\nextra_gated_fields: {Name: text}\n"
    source = base(model, tmp_path / "base", metadata, "LICENSE")
    bittern.convert(source, tmp_path / "floats", dtype="fp32")
    for path in source.iterdir():
        path.unlink()  # the folder that knew the licence is gone
    source.rmdir()
    bittern.quantize(tmp_path / "floats", tmp_path / "packed", bits=4, group_size=32, method="rtn")
    bittern.convert(tmp_path / "packed", tmp_path / "awq", format="awq")
    bittern.convert(tmp_path / "awq", tmp_path / "again", format="safetensors")
    expected = {"license": "mit", "language": ["en", "no"], "pipeline_tag": "text-generation", "gated": True}
    for name in ("floats", "packed", "awq", "again"):
        manifest = json.loads((tmp_path / name / "bittern_manifest.json").read_text())
        assert manifest["source"]["card"] == expected
        assert licence(shown(tmp_path / name).card) == {"license": "mit"}


def test_a_gguf_file_carries_the_licence_too(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    metadata = OTHER + "language: [en, no]\n"
    bittern.quantize(base(model, tmp_path / "base", metadata), tmp_path / "packed", bits=4, group_size=32, method="rtn")
    bittern.convert(tmp_path / "packed", tmp_path / "packed.gguf")
    with open_checkpoint(tmp_path / "packed.gguf") as checkpoint:
        expected = {**origin.read_card(tmp_path / "base" / "README.md")}  # type: ignore[dict-item]
        assert origin.checkpoint_card(checkpoint) == expected
    bittern.convert(tmp_path / "packed.gguf", tmp_path / "floats", format="safetensors")
    assert licence(shown(tmp_path / "floats").card)["license_name"] == "tiny-research"
    bittern.convert(base(model, tmp_path / "bare", None), tmp_path / "bare.gguf")
    with open_checkpoint(tmp_path / "bare.gguf") as checkpoint:
        assert origin.checkpoint_card(checkpoint) is None


def test_the_base_is_what_everything_began_with(tmp_path: Path) -> None:
    first = {"source": {"name": "org/base", "revision": COMMIT, "card": {"license": "mit"}}}
    second = {"source": {"name": "/somewhere/fp32", "revision": None, "card": {"language": "en"}}, "origin": first}
    third = {"source": {"name": "org/other", "revision": "f" * 40}, "origin": second, "kind": "repack"}
    assert origin.base_model(third) == origin.base_model(first) == ("org/base", COMMIT)
    assert origin.base_card(third) == {"license": "mit"}
    assert [each.get("kind") for each in origin.lineage(third)] == ["repack", None, None]
    assert origin.base_model({"source": {"name": "org/base", "revision": None}}) == (None, None)  # a folder
    cached = f"/home/me/.cache/huggingface/hub/models--org--base/snapshots/{COMMIT}"
    assert origin.base_model({"source": {"name": cached, "revision": None}}) == ("org/base", COMMIT)
    assert origin.base_model({"source": "nonsense"}) == (None, None)
    pushed = {
        "source": {"name": "me/fp32", "revision": COMMIT},
        "origin": {"source": {"name": "fp32", "revision": None}},
    }
    again = {"source": {"name": "/somewhere/packed"}, "origin": pushed}
    assert origin.base_model(again) == ("me/fp32", COMMIT)  # that on the Hub was made of a folder
    assert origin.since_base(again) == [again, pushed]
    assert origin.since_base(third) == [third, second, first]
    local = {"source": {"name": "fp32", "revision": None}}
    assert origin.base_model(local) == (None, None) and origin.since_base(local) == [local]
    assert origin.base_model({"source": {"name": "gpt2", "revision": COMMIT}}) == ("gpt2", COMMIT)  # old, without owner
    cached = f"/home/me/.cache/huggingface/hub/models--gpt2/snapshots/{COMMIT}"
    assert origin.base_model({"source": {"name": cached, "revision": None}}) == ("gpt2", COMMIT)


@pytest.mark.parametrize(
    "text",
    [
        "---\nlicense: &a [" + "x, " * 300 + "x]\nlanguage: [*a, *a]\n---\n",
        "---\nlicense: " + "x" * 600 + "\n---\n",
        "---\n" + "[" * 5000 + "\n---\n",
        "---\nlicense: !!python/object/apply:os.system [touch /tmp/owned]\n---\n",
        "---\nlicense: {a: b}\nlanguage: 7\n---\n",
        "no metadata at all",
        "",
    ],
)
def test_a_hostile_card_gives_nothing(tmp_path: Path, text: str) -> None:
    path = tmp_path / "README.md"
    path.write_text(text)
    found = origin.read_card(path)
    assert found is not None and set(found) <= {"unreadable"}
    json.dumps(found)
    assert not os.path.exists("/tmp/owned")  # noqa: PTH110


def test_a_card_that_is_no_text_or_endless(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_bytes(b"---\nlicense: \xff\n---\n")
    assert "unreadable" in (origin.read_card(path) or {})
    path.write_bytes(b"---\nlicense: mit\n---\n" + b" " * 3_000_000)
    assert "at most" in (origin.read_card(path) or {})["unreadable"]
    assert origin.read_card(tmp_path / "none.md") is None


def test_a_download_brings_the_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []

    def snapshot(repo_id: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
        asked.extend(patterns)
        (tmp_path / "model.safetensors").touch()
        return tmp_path

    monkeypatch.setattr("bittern.hub._snapshot", snapshot)
    download("org/name")
    assert "README.md" in asked
