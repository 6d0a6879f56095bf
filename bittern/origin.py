"""Where a checkpoint comes from: what it was made of, and what its model card says of licence and language.

A job records both under ``source`` of its manifest, because the folder it read may be gone when the artifact is
published. What a source did not say itself, its own manifest may say of what *it* was made of.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bittern.checkpoint import MODEL_ID, contained, read_json
from bittern.errors import BitternError, first_line
from bittern.report import MANIFEST_FILE, degraded_reason

if TYPE_CHECKING:
    from bittern.checkpoint import Checkpoint

CARD_FILE = "README.md"
LICENCE_KEYS = ("license", "license_name", "license_link")
CARD_KEYS = (*LICENCE_KEYS, "language", "pipeline_tag")
"""What is inherited from the card of a base model, by the names that the Hub gives it."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

_METADATA = re.compile(r"\A\s*---[ \t]*\r?\n(?:(.*?)\r?\n)??---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_SNAPSHOT = re.compile(r"models--([^/]+)/snapshots/([0-9a-f]{40})/?\Z")  # a folder of the Hub's cache
_MAX_BYTES = 2_000_000  # of a card
_MAX_ITEMS, _MAX_CHARACTERS = 200, 500  # of a value that is kept


def source_record(checkpoint: Checkpoint, **more: Any) -> dict[str, Any]:
    """``source`` of the manifest of what is made from a checkpoint.

    Args:
        checkpoint: what is read.
        more: what a job says besides.

    Returns:
        ``name`` (:func:`source_name`), ``revision``, ``model_type``, ``card`` (:func:`stated_card`), and ``more``.
    """
    card = checkpoint_card(checkpoint)
    model_type = checkpoint.config.get("model_type")
    name = source_name(checkpoint)
    return {"name": name, "revision": checkpoint.revision, "model_type": model_type, **more, "card": card}


def source_name(checkpoint: Checkpoint) -> str:
    """What a checkpoint is called in what is made of it: as the user named it, unless that (``.``) names nothing.

    Bytes that are no UTF-8, which no manifest can hold, become escapes.
    """
    name = checkpoint.source
    if Path(name).name in ("", ".."):
        name = str(Path(name).resolve())
    return name.encode(errors="backslashreplace").decode()


def checkpoint_card(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """What a checkpoint says of itself under :data:`CARD_KEYS`; None when it says nothing."""
    if checkpoint.gguf is None:
        return stated_card(checkpoint.folder)
    return inherited_fields(checkpoint.gguf.card) or None  # what lies beside the file may be anybody's


def stated_card(folder: Path) -> dict[str, Any] | None:
    """What the card of a checkpoint states under :data:`CARD_KEYS`, and ``gated``; for an artifact, of its base.

    Returns:
        Only what is stated. ``unreadable`` is the reason why a card was not understood. None without a card.
    """
    try:
        own = read_card(contained(folder, CARD_FILE))
    except BitternError as error:  # a link out of the folder
        own = {"unreadable": str(error)}
    if own is not None and "license" in own:
        return own
    try:
        inherited = base_card(read_json(folder / MANIFEST_FILE)) if (folder / MANIFEST_FILE).is_file() else None
    except BitternError:  # whoever carries the manifest on says that it is broken
        inherited = None
    if own is None:
        return inherited
    return {**(inherited or {}), **own}


def read_card(path: Path) -> dict[str, Any] | None:
    """The same of one file, which may be hostile: nothing but short texts and lists of them is kept."""
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"expected at most {_MAX_BYTES} bytes, found {path.stat().st_size}")
        found, _ = split_card(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        return {"unreadable": first_line(error)[:_MAX_CHARACTERS]}
    return inherited_fields(found)


def split_card(text: str) -> tuple[dict[str, Any], str]:
    """The metadata block of a card, empty without one, and the text below it.

    Raises:
        ValueError: when the block is no YAML object.
    """
    import yaml

    match = _METADATA.match(text)
    if match is None:
        return {}, text
    try:
        found = yaml.safe_load(match[1] or "")
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"its metadata are no YAML: {first_line(error)}") from error
    if not isinstance(found, dict | None):
        raise ValueError(f"its metadata: expected a YAML object, found {type(found).__name__}")
    return found or {}, text[match.end() :]


def inherited_fields(found: dict[str, Any]) -> dict[str, Any]:
    """Of a card's metadata, what is inherited from it; texts of one line and lists of them alone."""
    kept: dict[str, Any] = {key: value for key in CARD_KEYS if (value := _plain(found.get(key), key)) is not None}
    if any(str(key).startswith("extra_gated_") for key in found):
        kept["gated"] = True
    return kept


def _plain(value: Any, key: str) -> str | list[str] | None:
    if value is False and key == "language":
        return "no"  # Norwegian, which YAML takes for a truth value
    if isinstance(value, str) and len(value) <= _MAX_CHARACTERS and len(value.strip().splitlines()) == 1:
        return value.strip()
    if isinstance(value, list) and 0 < len(value) <= _MAX_ITEMS:
        texts = [text for item in value if isinstance(text := _plain(item, key), str)]
        return texts or None
    return None


def lineage(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """A manifest and those of what it was made of, the newest first."""
    found: list[dict[str, Any]] = []
    each: Any = manifest
    while isinstance(each, dict):
        found.append(each)
        each = each.get("origin")
    return found


def base_model(manifest: dict[str, Any]) -> tuple[str | None, str | None]:
    """The Hub id of the model that everything began with and its commit; (None, None) where that is not known.

    What the Hub has may have been made elsewhere of what it has not: then that on the Hub is the base.
    """
    return _on_hub(since_base(manifest)[-1]) or (None, None)


def since_base(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The manifests of what was done to :func:`base_model`, the newest first; all where that is not known."""
    whole = lineage(manifest)
    known = [position for position, each in enumerate(whole) if _on_hub(each) is not None]
    return whole[: known[-1] + 1] if known else whole


def _on_hub(manifest: dict[str, Any]) -> tuple[str, str] | None:
    """Hub id and commit of what a run has read, where it came from there; of old models the id has no owner."""
    source = manifest.get("source")
    source = source if isinstance(source, dict) else {}
    name, revision = str(source.get("name")), source.get("revision")
    if isinstance(revision, str) and MODEL_ID.fullmatch(name):
        return name, revision
    match = _SNAPSHOT.search(name)
    return (match[1].replace("--", "/"), match[2]) if match else None


def base_card(manifest: dict[str, Any]) -> dict[str, Any] | None:
    """What the base's card said when it was read: the oldest one that names a licence, else the oldest."""
    sources = [each.get("source") for each in reversed(lineage(manifest))]
    cards = [source["card"] for source in sources if isinstance(source, dict) and isinstance(source.get("card"), dict)]
    return next((card for card in cards if "license" in card), cards[0] if cards else None)


def degraded(manifest: dict[str, Any], config: dict[str, Any]) -> str | None:
    """Why an artifact is known to be worse than it should be, None when nothing says so."""
    reasons = [degraded_reason(config)]
    reasons += [each.get("degraded") for each in lineage(manifest)]
    return next((str(reason) for reason in reasons if reason), None)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an artifact.

    Raises:
        BitternError: when there is none, or none with the hash of every file.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise BitternError(f"{folder}: expected an artifact of bittern, found no {MANIFEST_FILE}")
    manifest = read_json(path)
    if not isinstance(manifest.get("files"), dict):
        raise BitternError(f"{path}: expected the hash of every file, found none; `bittern convert` writes it anew")
    return manifest
