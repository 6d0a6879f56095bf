"""The push command: an artifact and its model card to the Hub, checked before and read back after."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bittern import origin
from bittern.artifact import Artifact
from bittern.card import EVALUATIONS, evaluation_files, is_ours, make_card, own_card, update_card
from bittern.card_text import Facts
from bittern.checkpoint import contained, open_checkpoint, read_json
from bittern.consumers import cannot_hold
from bittern.errors import BitternError
from bittern.hub import Published, Upload, model_card, publish, read_text
from bittern.hub_errors import secret
from bittern.inspect import inspect
from bittern.layout import layout_of
from bittern.licence import settle
from bittern.report import MANIFEST_FILE, file_record
from bittern.verify import check_files
from bittern.writer import LICENCE_FILES

_BESIDE = (*LICENCE_FILES, f"{EVALUATIONS}/*.yaml", "*.html", "*.png", "*.svg", "*.jpg", "*.gif")
"""What is published though the manifest does not list it: what a publisher adds to a finished artifact."""
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".safetensors.index.json", ".bin.index.json")
_MAX_TEXT = 50_000_000  # bytes of a file that is looked through for secrets


@dataclass(frozen=True)
class PushSummary:
    """What :func:`push` did, or would do.

    Attributes:
        artifact, repo_id: as the caller named them.
        files: name -> bytes, of all that the artifact is in the repository, its card included.
        left_out: files of the folder that are no part of it.
        card: the text of README.md.
        licence: its licence fields; empty when only the Hub knows the base's and it was not asked.
        notes: what the user must be told.
        published: None without a push.
        seconds: wall time.
    """

    artifact: str
    repo_id: str
    files: Mapping[str, int]
    left_out: tuple[str, ...]
    card: str
    licence: Mapping[str, Any]
    notes: tuple[str, ...]
    published: Published | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Everything above, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _Contents:
    """An artifact that is what its manifest says."""

    folder: Path
    manifest: dict[str, Any]
    config: dict[str, Any]
    found: dict[str, Any]
    gguf: bool
    names: list[str]
    left_out: list[str]


def push(
    artifact: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    create_pr: bool = False,
    revision: str | None = None,
    message: str | None = None,
    license: str | None = None,
    card: str | os.PathLike[str] | None = None,
    dry_run: bool = False,
    on_step: Callable[[int, int], None] | None = None,
) -> PushSummary:
    """Publish an artifact on the Hub: weights, configuration and card in one commit.

    Its files are held against the manifest first. What the Hub has afterwards is compared in size and hash. What an
    earlier push left there and this artifact lacks goes in the same commit.

    Args:
        artifact: a folder that bittern wrote.
        repo_id: "org/name"; made when it is missing.
        private: see :func:`bittern.hub.publish`.
        create_pr: propose the change instead of making it.
        revision: branch to push to; made when it is missing.
        message: of the commit.
        license: an identifier of the Hub, where the base's licence is not known or another one holds.
        card: a model card whose text is kept; by default README.md of the artifact, or what somebody wrote into the
            card in the repository. Without any of them one is made.
        dry_run: make the card and say what would be sent, without the network.
        on_step: called with the files that were checked and their number.

    Raises:
        BitternError: for a folder that is not what its manifest says, an unknown licence, a file that holds a token,
            and all that :func:`bittern.hub.publish` refuses.
    """
    started = time.monotonic()
    if not origin.HUB_ID.fullmatch(repo_id) or "--" in repo_id or ".." in repo_id:
        raise BitternError(f"REPO: expected org/name, found {repo_id!r}")
    if not os.fspath(artifact):
        raise BitternError("ARTIFACT: expected a folder, found an empty name")
    contents = _contents(Path(artifact), on_step)
    files = _uploads(contents)
    own = _chosen_card(contents.folder, card)
    if own is None and not dry_run:
        own = read_text(repo_id, origin.CARD_FILE, revision)
    metadata = {} if own is None else own_card(own)[0]
    if own is not None and is_ours(own):  # nobody's words are lost when it is made anew, but a licence that was stated
        own, metadata = None, {key: metadata[key] for key in origin.LICENCE_KEYS if key in metadata}
    facts, notes = _facts(contents, repo_id, revision, license, metadata, ask=not dry_run)
    text = make_card(facts) if own is None else update_card(own, facts)
    uploads = [*files, *_texts({origin.CARD_FILE: text, **evaluation_files(contents.manifest)})]
    published = None
    if not dry_run:
        published = publish(
            repo_id,
            uploads,
            lambda names, known: _stale({upload.name for upload in uploads}, names, known),
            manifest=MANIFEST_FILE,
            message=message or f"{contents.folder.resolve().name}, by bittern",
            private=private,
            create_pr=create_pr,
            revision=revision,
        )
    return PushSummary(
        artifact=os.fspath(artifact),
        repo_id=repo_id,
        files={upload.name: upload.size for upload in uploads},
        left_out=tuple(contents.left_out),
        card=text,
        licence=facts.licence,
        notes=tuple(notes),
        published=published,
        seconds=time.monotonic() - started,
    )


def _contents(folder: Path, on_step: Callable[[int, int], None] | None) -> _Contents:
    """Check an artifact against its manifest, and choose what of the folder is published."""
    if not folder.is_dir():
        single = "a single file has no manifest to check it against (`hf upload` sends it as it is)"
        raise BitternError(
            f"{folder}: expected an artifact's folder: {single if folder.is_file() else 'there is none'}"
        )
    manifest = origin.read_manifest(folder)
    checked = check_files(folder, lambda _, done, total: on_step(done, total) if on_step else None)
    if not checked.passed:
        raise BitternError(f"{folder}: not what {MANIFEST_FILE} says: {checked.detail}; not pushed")
    with open_checkpoint(folder) as checkpoint:
        layout = layout_of(Artifact(checkpoint))
        config = checkpoint.config
    listed = [*manifest["files"], MANIFEST_FILE]
    beside = {
        path.relative_to(folder).as_posix() for pattern in _BESIDE for path in folder.glob(pattern) if path.is_file()
    }
    names = sorted({*listed, *beside} - {origin.CARD_FILE, *evaluation_files(manifest)})
    inside = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    shown = {path.as_posix() for path in inside if not any(part.startswith(".") for part in path.parts)}
    left_out = sorted(shown - {*names, origin.CARD_FILE})
    return _Contents(folder, manifest, config, inspect(folder), cannot_hold("gguf", layout) is None, names, left_out)


def _chosen_card(folder: Path, card: str | os.PathLike[str] | None) -> str | None:
    """The text of the publisher's card, None when there is none."""
    path = contained(folder, origin.CARD_FILE) if card is None else Path(card)
    if card is None and not path.is_file():
        return None
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise BitternError(f"card {path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BitternError(f"card {path}: expected UTF-8 text, found {error}") from error


def _facts(
    contents: _Contents, repo_id: str, revision: str | None, stated: str | None, metadata: Mapping[str, Any], ask: bool
) -> tuple[Facts, list[str]]:
    """What the card is made of, and what must be said.

    Args:
        contents, repo_id, revision: what is published, and where.
        stated: a licence, as of :func:`push`.
        metadata: of the card that was there before, as far as they count.
        ask: the Hub, for a licence that is not on record.
    """
    recorded, base_revision = origin.base_model(contents.manifest)
    known = origin.base_card(contents.manifest)
    notes: list[str] = []
    if recorded is not None and "license" not in (known or {}) and ask:
        asked = model_card(recorded, base_revision)
        if asked is not None:
            gated = {"gated": True} if asked.get("gated") else {}
            known = {**(known or {}), **origin.inherited_fields(asked), **gated}
    base_id = recorded or _first_text(metadata.get("base_model"))
    licence: dict[str, Any] = {}
    try:
        licence, notes = settle(stated, metadata, known, base_id, contents.names, recorded or "the base")
    except BitternError:
        if ask or recorded is None or "license" in metadata or "license" in (known or {}):
            raise
        notes = [f"the licence is not on record; a push asks the Hub for that of {recorded}"]
    if base_id is None:
        notes.append("which model on the Hub this was made of is not known: base_model in a card's metadata names it")
    degraded = origin.degraded(contents.manifest, contents.config)
    if degraded is not None:
        notes.append(f"this artifact is degraded, as its card says: {degraded}")
    facts = Facts(
        repo_id=repo_id,
        revision=None if revision == "main" or (revision or "").startswith("refs/") else revision,
        manifest=contents.manifest,
        found=contents.found,
        files={name: contents.folder.joinpath(name).stat().st_size for name in contents.names},
        base_id=base_id,
        base_revision=base_revision,
        base=known or {},
        licence=licence,
        degraded=degraded,
        gguf=contents.gguf,
    )
    return facts, notes


def _first_text(value: Any) -> str | None:
    """What a card states once, or first of several."""
    return next((text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)), None)


def _uploads(contents: _Contents) -> list[Upload]:
    """The files of the folder, each with what the Hub must hold; none of them with a token inside."""
    uploads = []
    for name in contents.names:
        path = contained(contents.folder, name)
        record = contents.manifest["files"].get(name) or file_record(path)
        uploads.append(Upload(name, path, record["bytes"], record["sha256"]))
        if not name.endswith(_WEIGHTS) and record["bytes"] <= _MAX_TEXT:
            _refuse_secrets(name, path.read_bytes())
    return uploads


def _texts(texts: Mapping[str, str]) -> list[Upload]:
    """The same of what is made here."""
    uploads = []
    for name, text in texts.items():
        data = text.encode()
        _refuse_secrets(name, data)
        uploads.append(Upload(name, data, len(data), hashlib.sha256(data).hexdigest()))
    return uploads


def _refuse_secrets(name: str, data: bytes) -> None:
    if secret(data):
        raise BitternError(f"{name}: holds an access token of the Hub: not pushed; take it out, and revoke the token")


def _stale(ours: Collection[str], names: Collection[str], known: Path | None) -> list[str]:
    """What an earlier push left in a repository; refuses a repository that holds somebody else's model."""
    earlier = set() if known is None else {name for name in _listed(known) if name in names}
    foreign = [name for name in names if name.endswith(_WEIGHTS) and "/" not in name and name not in earlier]
    foreign = [name for name in foreign if known is None or name not in ours]
    if foreign:
        raise BitternError(
            f"the name is taken: it holds weights that bittern did not push ({foreign[0]}); push to another name, or"
            " take them out of there first"
        )
    return sorted(earlier - set(ours))


def _listed(path: Path) -> list[str]:
    """What was pushed with the manifest in a repository, which may be anybody's: an artifact's files, and results."""
    manifest = read_json(path)
    found = manifest.get("files")
    files = [name for name in found if isinstance(name, str)] if isinstance(found, dict) else []
    return [*files, *evaluation_files(manifest)]
