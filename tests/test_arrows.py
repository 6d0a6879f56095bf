"""Imports run downwards only (docs/architecture.md)."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "bittern"

ALLOWED = {
    "errors": set[str](),
    "disk": set[str](),
    "rope": set[str](),
    "weight": {"errors"},
    "shards": {"disk", "errors"},
    "hub_errors": {"errors"},
    "hub": {"errors", "hub_errors", "shards", "writer"},
    "tokenizer": {"errors"},
    "replay": {"errors"},
    "report": {"disk"},
    "writer": {"disk", "errors", "report", "rope", "shards"},
    "formats": {"errors", "weight", "shards"},
    "checkpoint": {"errors", "shards", "writer", "formats", "hub"},
    "ties": {"errors", "checkpoint"},
    "schema": {"errors", "report", "checkpoint"},
    "model": {"errors", "weight", "checkpoint"},
    "processes": {"errors", "model"},
    "origin": {"errors", "checkpoint", "report"},
    "licence": {"errors", "origin", "writer"},
    "artifact": {"errors", "weight", "shards", "formats", "checkpoint"},
    "fit": {"errors", "artifact", "model"},
    "layout": {"weight", "artifact", "rope", "ties"},
    "size": {"errors", "shards", "tokenizer", "checkpoint", "artifact", "layout", "ties"},
    "consumers": {"errors", "weight", "formats", "layout"},
    "convert": {
        "disk",
        "rope",
        "origin",
        "errors",
        "weight",
        "shards",
        "fit",
        "formats",
        "checkpoint",
        "writer",
        "tokenizer",
        "artifact",
        "layout",
        "consumers",
        "model",
        "report",
        "schema",
        "size",
        "ties",
    },
    "sampling": {"errors", "replay", "runtime", "weight"},
    "calibration": {"errors", "hub_errors", "tokenizer", "sampling"},
    "training": {
        "errors",
        "tokenizer",
        "calibration",
        "model",
        "processes",
        "evaluate",
        "replay",
        "sampling",
        "writer",
    },
    "quantize": {
        "calibration",
        "sampling",
        "evaluate",
        "training",
        "origin",
        "errors",
        "weight",
        "shards",
        "formats",
        "checkpoint",
        "writer",
        "tokenizer",
        "model",
        "processes",
        "replay",
        "report",
        "convert",
        "artifact",
        "layout",
        "consumers",
        "rope",
        "runtime",
        "schema",
        "size",
        "ties",
    },
    "uptrain": {
        "sampling",
        "formats",
        "calibration",
        "training",
        "errors",
        "origin",
        "checkpoint",
        "writer",
        "tokenizer",
        "model",
        "processes",
        "replay",
        "report",
        "convert",
        "quantize",
        "runtime",
        "evaluate",
        "artifact",
        "schema",
        "size",
        "ties",
    },
    "runtime": {"errors", "weight", "formats", "checkpoint", "artifact", "fit", "tokenizer", "model", "ties", "rope"},
    "evaluate": {"errors", "tokenizer"},
    "tasks": {"errors", "tokenizer", "rope"},
    "story": {"report"},
    "inspect": {
        *("errors", "shards", "checkpoint", "artifact", "layout", "consumers", "report", "schema", "size", "story"),
    },
    "compare": {"errors", "weight", "shards", "checkpoint", "artifact", "fit", "model"},
    "card_text": {"licence", "origin", "report", "story"},
    "card": {"card_text", "errors", "origin", "story"},
    "push": {
        "artifact",
        "card",
        "card_text",
        "checkpoint",
        "consumers",
        "errors",
        "hub",
        "hub_errors",
        "inspect",
        "layout",
        "licence",
        "origin",
        "report",
        "verify",
        "writer",
    },
    "verify": {
        "errors",
        "weight",
        "artifact",
        "checkpoint",
        "compare",
        "model",
        "report",
        "runtime",
        "schema",
        "tokenizer",
    },
    "page": {"errors", "report", "schema", "story", "writer"},
    "record": {"errors", "evaluate", "report", "schema", "tasks", "tokenizer", "writer"},
    "options": {"errors", "runtime"},  # its limits; nothing else stands in that folder's __init__
    "progress": {"report", "convert", "push"},
}
"""Part of the package -> the parts it may import. cli and demo may import everything; nobody imports them."""
ABOVE = {"__init__", "__main__", "cli", "demo"}


def part(path: Path) -> str:
    """The part of the package that a file belongs to: its top-level module or folder."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Full names of all modules that a file imports, anywhere in it; ``from a import b`` counts as a and a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are written in full"
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_what_lies_below_it(path: Path) -> None:
    here = part(path)
    if here in ABOVE:
        return
    assert here in ALLOWED, f"{path.name}: say in this test and in docs/architecture.md where it stands"
    known = {part(file) for file in files()}
    inside = {name.split(".")[1] for name in imports(path) if name.startswith("bittern.")} & known
    assert inside - {here} <= ALLOWED[here]


def test_the_rules_have_no_circle() -> None:
    def below(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"circle: {' -> '.join((*path, name))}"
        for other in ALLOWED.get(name, set()) - {name}:
            below(other, (*path, name))

    for name in ALLOWED:
        below(name, ())


def test_the_weight_knows_torch_alone() -> None:
    foreign = {name.split(".")[0] for name in imports(PACKAGE / "weight.py")} - set(sys.stdlib_module_names)
    assert foreign == {"torch", "bittern"}


def test_only_one_module_uses_the_hub() -> None:
    users = {path: {name for name in imports(path) if name.split(".")[0] == "huggingface_hub"} for path in files()}
    users = {path: names for path, names in users.items() if names and path != PACKAGE / "hub.py"}
    assert set(users) == {PACKAGE / "hub_errors.py", PACKAGE / "card.py"}
    offline = {
        *("errors", "get_token", "ModelCardData", "EvalResult", "EvalResultEntry"),
        *("eval_result_entries_to_yaml", "repocard_data", "eval_results_to_model_index"),
    }
    assert {name.split(".")[-1] for names in users.values() for name in names} == {"huggingface_hub"} | offline


def test_only_the_command_line_prints_and_exits() -> None:
    talkers = set()
    for path in files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.exit", "exit", "click.echo"):
                talkers.add(path.relative_to(PACKAGE).as_posix())
    assert talkers <= {"cli.py", "progress.py", "demo/train.py"}


def test_nothing_heavy_is_imported_for_help() -> None:
    heavy = ("torch", "transformers", "datasets")
    code = f"import sys, bittern, bittern.cli; print([name for name in {heavy} if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["convert", "quantize", "uptrain", "load"])
def test_the_public_functions_are_functions_whatever_was_imported_before(name: str) -> None:
    # Three of them are named as the packages they live in, and importing a package binds its name.
    homes = "bittern.convert.pipeline, bittern.quantize.pipeline, bittern.uptrain.pipeline, bittern.runtime.load"
    code = f"import {homes}; print(bittern.{name}.__module__)"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.stdout.strip().startswith("bittern.")
