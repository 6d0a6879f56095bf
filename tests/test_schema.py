"""The manifest's schema: what bittern writes keeps to it, all of it is documented, and what is wrong is named."""

from __future__ import annotations

import copy
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from transformers import PreTrainedTokenizerFast

import bittern
from bittern.checkpoint import open_checkpoint
from bittern.convert.repack import dequantize, repack
from bittern.errors import BitternError
from bittern.report import MANIFEST_FILE, SCHEMA_VERSION, layer_records, make_manifest, runs
from bittern.schema import carried, problem, read_manifest, schema
from bittern.verify import verify
from tests import tiny
from tests.manifests import quantized, schema_1, schema_2, uptrained

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "manifest.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def made(tokenizer: PreTrainedTokenizerFast, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of every job, each made of the one before where that is possible."""
    folder = tmp_path_factory.mktemp("made")
    source = tiny.save(tiny.random_model(), folder / "source", tokenizer)
    bittern.convert(source, folder / "cast")
    options: dict[str, Any] = {"bits": 4, "group_size": 32, "nsamples": 4, "seqlen": 32}
    bittern.quantize(folder / "cast", folder / "packed", dataset=str(text), **options, layers=[("down_proj", 8)])
    repack(folder / "packed", folder / "repacked", format="compressed-tensors")
    dequantize(folder / "repacked", folder / "floats")
    bittern.convert(folder / "floats", folder / "again", dtype="fp32")
    return folder


def test_the_schema_is_one() -> None:
    Draft202012Validator.check_schema(schema())
    assert schema()["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema()["$id"].endswith(f":{SCHEMA_VERSION}")
    assert schema()["$defs"]["run"]["properties"]["schema_version"]["enum"] == list(range(1, SCHEMA_VERSION + 1))


@pytest.mark.parametrize("job", ["cast", "packed", "repacked", "floats", "again"])
def test_what_bittern_writes_keeps_to_it_and_has_no_key_that_it_does_not_name(made: Path, job: str) -> None:
    manifest = read_manifest(made / job)
    assert manifest["schema_version"] == SCHEMA_VERSION and problem(manifest) is None
    assert not list(unknown(manifest, schema()["$defs"]["run"], job))
    assert {"size", "command", "measured", "files", "origin"} <= set(manifest)
    found = next(each for each in verify(made / job, logits=False).checks if each.name == "manifest")
    assert found.passed and found.detail.startswith(f"schema {SCHEMA_VERSION}: ")


def test_the_manifests_that_other_tests_are_given_keep_to_it_too() -> None:
    for manifest in (quantized(), uptrained()):
        assert problem(manifest) is None
        assert not list(unknown(manifest, schema()["$defs"]["run"], ""))


def unknown(value: Any, rule: dict[str, Any], where: str) -> Iterator[str]:
    """Keys of a value that the schema does not name."""
    if "$ref" in rule:
        rule = {**schema()["$defs"][rule["$ref"].rpartition("/")[2]], "$ref": None}
    rule = rule.get("then", rule) if "$ref" in rule.get("then", {}) else rule
    if rule.get("$ref"):
        yield from unknown(value, rule, where)
    elif isinstance(value, list):
        for each in value:
            yield from unknown(each, rule.get("items", {}), where)
    elif isinstance(value, dict):
        rest = rule.get("additionalProperties")
        for key, item in value.items():
            if key in rule.get("properties", {}):
                yield from unknown(item, rule["properties"][key], f"{where}/{key}")
            elif isinstance(rest, dict):
                yield from unknown(item, rest, f"{where}/{key}")
            elif "properties" in rule and rest is not True:
                yield f"{where}/{key}"


def rows(rule: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The lines of docs/manifest.md for an object: every key, what it is, what it means."""
    for key, item in rule.get("properties", {}).items():
        name, note = f"{prefix}{key}", item["description"]
        inner = item
        if "$ref" in item:
            inner, kind = {}, ("object" if key == "measured" else item["$ref"].rpartition("/")[2])
        else:
            kinds = item["type"] if isinstance(item["type"], list) else [item["type"]]
            kind = " or ".join(kinds)
        escaped = note.replace("|", "\\|")
        yield f"| `{name}` | {kind} | {escaped} |"
        yield from rows(inner, f"{name}.")
        if isinstance(inner.get("additionalProperties"), dict):
            yield from rows(inner["additionalProperties"], f"{name}.*.")


def test_every_key_is_documented() -> None:
    for name in ("run", "measured", "layer", "group", "repacked", "block", "point", "evaluation"):
        missing = [row for row in rows(schema()["$defs"][name]) if row not in PAGE]
        assert not missing, "\n".join(missing)


def test_nothing_is_documented_that_is_not_there() -> None:
    known = {row for definition in schema()["$defs"].values() for row in rows(definition)}
    assert {line for line in PAGE.splitlines() if line.startswith("| `")} == known


@pytest.mark.parametrize("make", [schema_1, schema_2])
def test_older_manifests_keep_to_it(make: Callable[[], dict[str, Any]]) -> None:
    assert problem(make()) is None


WRONG: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    ("newer", lambda m: m.update(schema_version=4), "schema_version: 4 is of a newer bittern"),
    ("no version", lambda m: m.pop("schema_version"), "expected the key schema_version"),
    ("version of words", lambda m: m.update(schema_version="3"), 'schema_version: expected integer, found "3"'),
    ("kind", lambda m: m.update(kind="shrink"), "kind: expected one of quantize, convert, repack, uptrain"),
    ("no layers", lambda m: m.pop("layers"), "expected the key layers"),
    ("no command", lambda m: m.pop("command"), "expected the key command"),
    ("layer", lambda m: m["layers"][3].update(bits="4"), 'layers/3/bits: expected integer, found "4"'),
    ("shape", lambda m: m["layers"][0].update(shape=[7]), "layers/0/shape: expected minItems 2"),
    ("loss", lambda m: m["layers"][0].update(loss=-1.0), "layers/0/loss: expected minimum 0"),
    ("infinity", lambda m: m["layers"][0].update(loss=float("inf")), "layers/0/loss: expected number or null"),
    ("NaN", lambda m: m["measured"].update(seconds=float("nan")), "measured/seconds: expected number, found NaN"),
    ("huge", lambda m: m["measured"].update(threads=10**400), "measured/threads: expected integer, found a number of"),
    ("hash", lambda m: m["files"].update(a={"bytes": 1, "sha256": "A" * 64}), "files/a/sha256: expected pattern"),
    ("notes", lambda m: m.update(notes="none"), 'notes: expected array, found "none"'),
    ("origin", lambda m: m.update(origin={"source": 7}), "origin"),
    ("long", lambda m: m.update(kind="x" * 10**6), "kind: expected one of"),
]


@pytest.mark.parametrize(("edit", "words"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_what_does_not_keep_to_it_is_one_line(
    edit: Callable[[dict[str, Any]], Any], words: str, tmp_path: Path
) -> None:
    manifest = quantized()
    edit(manifest)
    found = problem(manifest)
    assert found is not None and words in found and "\n" not in found and len(found) < 400
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(BitternError, match=re.escape(MANIFEST_FILE)):
        read_manifest(tmp_path)


def test_a_chain_without_an_end_is_refused() -> None:
    deep: dict[str, Any] = quantized()
    for _ in range(5000):
        deep = {**quantized(), "origin": deep}
    assert problem(deep) == "origin: expected a chain of runs, found one without an end"


def test_verify_names_a_manifest_that_is_wrong(made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made / "packed", tmp_path / "copy"))
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    manifest["layers"][0]["method"] = None
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    found = verify(folder, logits=False)
    assert [each.name for each in found.checks if each.passed is False] == ["manifest"]
    assert "layers/0/method: expected string, found null" in found.checks[0].detail


def test_the_chain_of_runs_is_kept(made: Path) -> None:
    packed, repacked, again = (read_manifest(made / job) for job in ("packed", "repacked", "again"))
    assert [run["kind"] for run in runs(packed)] == ["convert", "quantize"]
    kinds = ["convert", "quantize", "repack", "repack", "convert"]
    assert [run["kind"] for run in runs(again)] == kinds
    assert all(run["measured"]["seconds"] >= 0 and "origin" not in run for run in runs(again))
    assert [Path(run["source"]["name"]).name for run in runs(again)] == [
        *("source", "cast", "packed", "repacked", "floats")
    ]
    assert layer_records(repacked) == layer_records(packed) == packed["layers"] == layer_records(again)
    assert "measured" not in packed["origin"] and packed["origin"]["tensors"]
    first = read_manifest(made / "cast")
    assert packed["measured"]["origin"] == first["measured"] and first["origin"] is None


def test_a_source_s_broken_manifest_is_left_out_and_said(made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made / "cast", tmp_path / "cast"))
    for content in ('{"schema_version": 99}', "[]", "{"):
        (folder / MANIFEST_FILE).write_text(content)
        with open_checkpoint(folder) as checkpoint:
            origin, notes = carried(checkpoint)
        assert origin is None and len(notes) == 1 and notes[0].startswith("the source's manifest is left out: ")
    bittern.convert(folder, tmp_path / "out", dtype="fp16")
    written = read_manifest(tmp_path / "out")
    assert written["origin"] is None and written["notes"] == notes
    with open_checkpoint(made / "source") as checkpoint:
        assert carried(checkpoint) == (None, [])


def test_sizes_are_those_of_the_files(made: Path) -> None:
    from safetensors.torch import load_file

    for job in ("cast", "packed", "repacked", "floats", "again"):
        manifest = read_manifest(made / job)
        stored = load_file(made / job / "model.safetensors")
        size = manifest["size"]
        assert size["output"]["bytes"]["total"] == sum(tensor.nbytes for tensor in stored.values())
        kinds = {name: count for name, count in size["output"]["bytes"].items() if name != "total"}
        assert sum(kinds.values()) == size["output"]["bytes"]["total"]
        assert size["output"]["parameters"] == size["source"]["parameters"] == tiny.random_model().num_parameters()
        from bittern.inspect import inspect

        shown = inspect(made / job)
        assert shown["bytes"] == size["output"]["bytes"]
        assert shown["bits_per_weight"] == size["output"]["bits_per_weight"]
        before = inspect(manifest["source"]["name"])
        assert before["bytes"] == size["source"]["bytes"]
        if job in ("packed", "repacked", "floats"):
            assert manifest["context_length"] == 64
            assert manifest["kv_bytes_per_token"] == dict.fromkeys(("source", "output"), shown["kv_bytes_per_token"])


@pytest.mark.parametrize("job", ["cast", "packed", "repacked", "floats"])
def test_the_command_makes_the_same_again(made: Path, job: str, tmp_path: Path) -> None:
    from bittern import cli

    manifest = read_manifest(made / job)
    arguments = [str(tmp_path / "out") if each == "OUT" else each for each in manifest["command"]]
    assert arguments[0] == "bittern"
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments[1:])
    assert not exit_.value.code
    again = read_manifest(tmp_path / "out")
    differing = {"measured": None, "prediction": None}
    assert {**again, **differing} == {**manifest, **differing}  # with the hash of every file


def test_the_command_names_commit_pattern_and_grid() -> None:
    options = {"bits": 3, "sym": False, "layers": [("down proj", 8)], "skip": ["a", "b"], "revision": "main"}
    made = make_manifest(
        source={"name": "org/model", "revision": "abc"},
        options={**options, "overwrite": True, "chat_template": True, "format": None},
        calibration=None,
        layers=[],
        kept={},
        notes=[],
        seconds=1.0,
    )
    assert shlex.join(made["command"]) == (
        "bittern quantize org/model -o OUT --revision abc --asym --layer 'down proj=bits:8' --bits 3"
        " --skip a --skip b --chat-template"
    )


def test_keys_that_are_not_known_mean_nothing() -> None:
    manifest = copy.deepcopy(quantized())
    manifest["source"]["license"] = "apache-2.0"
    manifest["more"] = {"of": "this"}
    assert problem(manifest) is None
