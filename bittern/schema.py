"""Manifests read back: whether one keeps to the schema, and what of a source's is carried on.

The schema is ``manifest.schema.json`` in this package, docs/manifest.md is the same for people.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bittern.checkpoint import contained, read_json
from bittern.errors import BitternError, first_line
from bittern.report import MANIFEST_FILE, SCHEMA_VERSION

if TYPE_CHECKING:
    from bittern.checkpoint import Checkpoint

_LARGEST = 2**63  # of a whole number that is believed
LARGEST_FLOAT = 1e150  # of any other, so that it can be drawn
_SHOWN = 80  # characters of a value in a message


@cache
def schema() -> dict[str, Any]:
    """The schema, parsed."""
    text = files("bittern").joinpath("manifest.schema.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def problem(manifest: dict[str, Any]) -> str | None:
    """What is wrong with a manifest in a few words: where, what was expected, what was found; None when nothing is."""
    version = manifest.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        return f"schema_version: {version} is of a newer bittern, this one knows 1 to {SCHEMA_VERSION}: upgrade bittern"
    try:
        error = next(_validator().iter_errors(manifest), None)
    except RecursionError:
        return "origin: expected a chain of runs, found one without an end"
    if error is None:
        return None
    where = "/".join(str(part)[:_SHOWN] for part in error.absolute_path) or "the manifest"
    return f"{where}: {_explain(error)}"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest in an artifact's folder.

    Raises:
        BitternError: when there is none, or it does not keep to the schema.
    """
    return check_manifest(contained(folder, MANIFEST_FILE))


def check_manifest(path: Path) -> dict[str, Any]:
    """The manifest in a file.

    Raises:
        BitternError: when it cannot be read or does not keep to the schema.
    """
    manifest = read_json(path)
    wrong = problem(manifest)
    if wrong is not None:
        raise BitternError(f"{path}: {wrong}")
    return manifest


def carried(checkpoint: Checkpoint) -> tuple[dict[str, Any] | None, list[str]]:
    """The manifest that a source brings along for ``origin``, and a note when it has one that cannot be carried."""
    if checkpoint.gguf is not None or not (checkpoint.folder / MANIFEST_FILE).is_file():
        return None, []
    try:
        return read_manifest(checkpoint.folder), []
    except BitternError as error:
        return None, [f"the source's manifest is left out: {error}"]


def told_by_gguf(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """What a GGUF source has in the place of such a manifest: ``changed``, where it says so."""
    changed = checkpoint.gguf.changed if checkpoint.gguf is not None else ()
    return {"changed": sorted(changed)} if changed else {}


@cache
def _validator() -> Any:
    """The schema's validator; a number is a believable one, for JSON as Python reads it also has NaN and Infinity."""
    from jsonschema import Draft202012Validator, validators

    def is_number(_: Any, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        return abs(value) < _LARGEST if isinstance(value, int) else abs(value) < LARGEST_FLOAT

    def is_integer(_: Any, value: Any) -> bool:
        return isinstance(value, int) and is_number(_, value)

    types = Draft202012Validator.TYPE_CHECKER.redefine_many({"number": is_number, "integer": is_integer})
    return validators.extend(Draft202012Validator, type_checker=types)(schema())


def _explain(error: Any) -> str:
    """What one error of the jsonschema package says, without the value when that is large."""
    if error.validator == "type":
        wanted = error.validator_value
        names = " or ".join([wanted] if isinstance(wanted, str) else wanted)
        return f"expected {names}, found {_shown(error.instance)}"
    if error.validator == "required":
        missing = [name for name in error.validator_value if name not in error.instance]
        return f"expected the key {missing[0]}, found none"
    if error.validator == "enum":
        return f"expected one of {', '.join(map(str, error.validator_value))}, found {_shown(error.instance)}"
    return f"expected {error.validator} {error.validator_value}, found {_shown(error.instance)}"


def _shown(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else f"a list of {len(value)}"
    if isinstance(value, int) and abs(value) >= _LARGEST:
        return "a number of too many digits"
    text = first_line(ValueError(json.dumps(value)))
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
