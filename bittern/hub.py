"""What talks to the Hub: a repository into the usual cache, an artifact to it (rows of text come by `datasets`).

Tokens, cache, mirror and offline mode come from where huggingface_hub takes them (HF_TOKEN and the
token that `hf auth login` stores, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE). No token leaves this module: neither in
an error, for servers repeat what they were sent, nor in what huggingface_hub logs.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from bittern.errors import BitternError
from bittern.hub_errors import downloading, guarded, passing, token, told
from bittern.shards import MAX_HEADER_BYTES
from bittern.writer import LICENCE_FILES

if TYPE_CHECKING:
    from huggingface_hub import HfApi

T = TypeVar("T")

_ALWAYS = (
    "*.json",
    "README.md",
    "*.jinja",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "tokenizer*",
    "vocab*",
    "merges*",
    "*.py",
    *LICENCE_FILES,
)
_NEVER = (
    "consolidated*",
    "*.onnx*",
    "onnx/*",
    "original/*",
    "*/*.safetensors",
    "*/*.bin",
    "*/*.json",
    "*/*.py",
    "*/*.txt",
)
_WAITS = (1.0, 3.0)
"""Seconds before each further attempt; huggingface_hub tries single requests for longer than that."""

_HEAD = 100_000
"""Bytes that are fetched of a safetensors file before it is known how long its header is; most are shorter."""

_AT_ONCE = 8
"""Files whose headers are fetched side by side."""


def download(repo_id: str, revision: str | None = None) -> tuple[Path, str | None]:
    """Have a model repository in the local cache, as far as a checkpoint needs it.

    Safetensors are taken where there are some, pytorch_model.bin otherwise. Files that are in the cache
    are not fetched again, and a complete cached copy serves when the Hub cannot be reached.

    Args:
        repo_id: "org/name".
        revision: branch, tag or commit; None is the default branch.

    Returns:
        The folder with the files, and the commit they are of.

    Raises:
        BitternError: for a repository that is missing, private or gated, a missing revision, no network
            and no complete copy, a full disk.
    """
    with guarded():
        folder = _snapshot(repo_id, revision, (*_ALWAYS, "*.safetensors"))
        if not any(folder.glob("*.safetensors")):
            folder = _snapshot(repo_id, folder.name, (*_ALWAYS, "pytorch_model*.bin"))
    return folder, folder.name


def fetch_headers(repo_id: str, revision: str | None, folder: Path) -> Path | None:
    """Lay out a model repository in an empty folder as :func:`download` would, without what takes time and room.

    Of safetensors the header is there and the size: what follows are zeros that take no space on the disk.

    Args:
        repo_id, revision: as of :func:`download`.
        folder: where to.

    Returns:
        The folder that :func:`download` would give, which has the commit's name; None where all is in the cache
        already, or headers alone cannot be had: for want of network, of safetensors, or of a server that sends parts.

    Raises:
        BitternError: as of :func:`download`.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

    if constants.HF_HUB_OFFLINE:
        return None
    with guarded(), downloading(repo_id, revision):
        known = _snapshot(repo_id, revision, _ALWAYS)
        try:
            held = _listing(HfApi(), repo_id, known.name)
        except Exception as error:
            if isinstance(error, HfHubHTTPError) or not passing(error):  # it answers: all weights would come
                raise
            return None
        taken = partial(filter_repo_objects, held, ignore_patterns=list(_NEVER))
        weights = list(taken(allow_patterns=["*.safetensors"]))
        if all(isinstance(try_to_load_from_cache(repo_id, name, revision=known.name), str) for name in weights):
            return None
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            starts = list(pool.map(lambda name: _start(repo_id, known.name, name, held[name].size), weights))
        for name, start in zip(weights, starts, strict=True):
            if start is None:
                return None
            with (folder / name).open("wb") as file:
                file.write(start)
                file.truncate(held[name].size)
        for name in taken(allow_patterns=list(_ALWAYS)):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(known / name, folder / name)
    return known


def _start(repo_id: str, commit: str, name: str, size: int) -> bytes | None:
    """The first bytes of a safetensors file of so many bytes, its header among them; None from who sends no parts."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        build_hf_headers,
        hf_raise_for_status,
        http_stream_backoff,
    )

    def fetch(start: int, stop: int) -> bytes | None:
        url, seconds = hf_hub_url(repo_id, name, revision=commit), constants.HF_HUB_DOWNLOAD_TIMEOUT
        asked = {**build_hf_headers(), "range": f"bytes={start}-{stop - 1}", "accept-encoding": "identity"}
        with http_stream_backoff("GET", url, headers=asked, timeout=seconds) as answer:
            hf_raise_for_status(answer)
            return bytes(answer.read()) if answer.status_code == HTTPStatus.PARTIAL_CONTENT else None

    found = fetch(0, min(size, _HEAD)) if size else b""
    if found is None:
        return None
    stop = 8 + int.from_bytes(found[:8], "little")
    if len(found) < stop <= min(size, MAX_HEADER_BYTES):  # longer ones are refused by who reads them
        rest = fetch(len(found), stop)
        return None if rest is None else found + rest
    return found


def _snapshot(repo_id: str, revision: str | None, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    with downloading(repo_id, revision):
        return Path(
            snapshot_download(repo_id, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(_NEVER))
        )


@dataclass(frozen=True)
class Upload:
    """A file to publish.

    Attributes:
        name: in the repository.
        content: where it is, or the bytes themselves.
        size, sha256: what the Hub must hold in the end.
    """

    name: str
    content: Path | bytes
    size: int
    sha256: str


@dataclass(frozen=True)
class Published:
    """What :func:`publish` did.

    Attributes:
        url: of the commit, or of the pull request.
        commit: its id.
        pull_request: whether it waits to be merged.
        private: of the repository.
        sent, unchanged, deleted: names of files; unchanged ones were there already.
    """

    url: str
    commit: str
    pull_request: bool
    private: bool
    sent: tuple[str, ...]
    unchanged: tuple[str, ...]
    deleted: tuple[str, ...]


@dataclass(frozen=True)
class _Stored:
    """A file of a repository: of one in LFS the hash of its content, of others git's."""

    size: int
    sha256: str | None
    blob: str


def publish(
    repo_id: str,
    files: Sequence[Upload],
    stale: Callable[[Collection[str], Path | None], Collection[str]],
    *,
    manifest: str,
    message: str,
    private: bool = False,
    create_pr: bool = False,
    revision: str | None = None,
) -> Published:
    """Put files into a model repository in one commit, and read back that the Hub holds them.

    The repository, and the branch, are made where they are missing. A lost connection and a server that fails are
    tried again a few times; large files that arrived before are not sent twice, in this run or the next.

    Args:
        repo_id: "org/name".
        files: everything that belongs to the artifact.
        stale: told the names in the repository, and a copy of its ``manifest`` (None without one), gives those to
            delete in the same commit, or raises to refuse.
        manifest: name of a file that ``stale`` wants to see.
        message: of the commit.
        private: nobody else may see the repository; refused when it is public already.
        create_pr: propose the commit as a pull request.
        revision: branch; None is the default one.

    Raises:
        BitternError: no token or one without the right, a name that is taken, a full quota, a repository that
            changed meanwhile, no connection, or files on the Hub that are not those sent.
    """
    with told(repo_id):
        api = _api()
        is_private = _again(lambda: _prepare(api, repo_id, private, create_pr, revision))
        done = _again(lambda: _commit(api, repo_id, files, stale, manifest, message, create_pr, revision))
        commit, url, sent, deleted = done
        held = _again(lambda: _listing(api, repo_id, commit))
    wrong = [file.name for file in files if not _same(file, held.get(file.name))]
    wrong += [name for name in deleted if name in held]
    if wrong:
        raise BitternError(
            f"{repo_id}: read back from the Hub, {len(wrong)} files are not what was sent ({', '.join(wrong[:3])});"
            " push again"
        )
    unchanged = tuple(file.name for file in files if file.name not in sent)
    proposed = create_pr and bool(sent or deleted)
    return Published(url, commit, proposed, is_private, sent, unchanged, deleted)


def model_card(repo_id: str, revision: str | None = None) -> dict[str, Any] | None:
    """The metadata of a model's card as the Hub shows them, with ``gated`` when its owner grants access.

    Returns:
        None when the Hub does not tell them: no such model, or one that may not be seen.

    Raises:
        BitternError: when it cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    with told(repo_id):
        try:
            info = _again(lambda: HfApi().model_info(repo_id, revision=revision))
        except (RepositoryNotFoundError, RevisionNotFoundError):
            return None
    found: dict[str, Any] = dict(vars(info.card_data)) if info.card_data is not None else {}
    return {**found, "gated": True} if info.gated else found


def file_names(repo_id: str, revision: str | None = None) -> tuple[str, ...]:
    """The names of a repository's files, for an error that tells what it is; none where the Hub does not say."""
    from huggingface_hub import HfApi

    with guarded():
        try:
            return tuple(_listing(HfApi(), repo_id, revision))
        except Exception:  # the error is told without them
            return ()


def read_text(repo_id: str, name: str, revision: str | None = None) -> str | None:
    """A text file of a repository as it is there now; None when it or the repository is not there.

    A branch that is not there yet begins with what the default branch holds.

    Raises:
        BitternError: when the Hub cannot be reached or refuses.
    """
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    with told(repo_id):
        api = _api()
        try:
            path = _again(lambda: api.hf_hub_download(repo_id, name, revision=revision))
        except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError) as error:
            if passing(error):  # nothing in the cache either, but the Hub was not asked
                raise
            if revision is not None and isinstance(error, RevisionNotFoundError):
                return read_text(repo_id, name)
            return None
        return Path(path).read_text(encoding="utf-8-sig")


def _api() -> HfApi:
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        raise BitternError("the Hub cannot be reached: HF_HUB_OFFLINE is set")
    own = token()
    if own is None:
        raise BitternError("the Hub wants a token that may write: `hf auth login` stores one, HF_TOKEN gives one")
    return HfApi(token=own)


def _prepare(api: HfApi, repo_id: str, private: bool, create_pr: bool, revision: str | None) -> bool:
    """Make the repository and its branch where they are missing; whether it is private."""
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        found = api.model_info(repo_id)
    except RepositoryNotFoundError as error:
        if create_pr:
            raise BitternError("no such repository to propose a change to; without --create-pr it is made") from error
        try:
            api.create_repo(repo_id, private=private or None, repo_type="model")
        except HfHubHTTPError as refused:
            if refused.response.status_code == 409:
                raise BitternError("the name is taken by a repository that this token may not see") from refused
            raise
        found = api.model_info(repo_id)
    if private and not found.private:
        raise BitternError("it exists and is public, --private would not hide it: make it private on the Hub first")
    if revision is not None:
        try:
            api.model_info(repo_id, revision=revision)
        except RevisionNotFoundError as error:
            if create_pr or revision.startswith("refs/"):
                raise BitternError(f"the repository has no revision {revision}") from error
            api.create_branch(repo_id, branch=revision, exist_ok=True)
    return bool(found.private)


def _commit(
    api: HfApi,
    repo_id: str,
    files: Sequence[Upload],
    stale: Callable[[Collection[str], Path | None], Collection[str]],
    manifest: str,
    message: str,
    create_pr: bool,
    revision: str | None,
) -> tuple[str, str, tuple[str, ...], tuple[str, ...]]:
    """One commit of what differs: its id, its address, the names sent and deleted. Done again, it does nothing."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    head = str(api.model_info(repo_id, revision=revision).sha)
    held = _listing(api, repo_id, head)
    known = Path(api.hf_hub_download(repo_id, manifest, revision=head)) if manifest in held else None
    deleted = tuple(sorted(stale(held.keys(), known)))
    adds = [CommitOperationAdd(file.name, file.content) for file in files if not _same(file, held.get(file.name))]
    if not adds and not deleted:
        return head, f"{api.endpoint}/{repo_id}/tree/{revision or 'main'}", (), ()
    api.preupload_lfs_files(repo_id, adds, revision=revision, create_pr=create_pr, free_memory=False)
    try:
        made = api.create_commit(
            repo_id,
            [*(CommitOperationDelete(name, is_folder=False) for name in deleted), *adds],
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
            parent_commit=head,
        )
    except Exception as error:
        if not create_pr or not passing(error):
            raise
        # Done again it would find the same branch as before, and propose the same a second time.
        reason = "the connection was lost while the pull request was made: look at its pull requests, then push again"
        raise BitternError(reason) from error
    sent = tuple(add.path_in_repo for add in adds)
    return made.oid, str(made.pr_url or made.commit_url), sent, deleted


def _listing(api: HfApi, repo_id: str, revision: str | None) -> dict[str, _Stored]:
    from huggingface_hub.hf_api import RepoFile

    held = {}
    for file in api.list_repo_tree(repo_id, recursive=True, revision=revision):
        if isinstance(file, RepoFile):
            lfs = file.lfs
            size, sha256 = (file.size, None) if lfs is None else (lfs.size, lfs.sha256)
            held[file.path] = _Stored(size, sha256, file.blob_id)
    return held


def _same(file: Upload, stored: _Stored | None) -> bool:
    """Whether the Hub holds this content, by size and hash."""
    if stored is None or stored.size != file.size:
        return False
    if stored.sha256 is not None:
        return stored.sha256 == file.sha256
    data = file.content if isinstance(file.content, bytes) else file.content.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    return blob == stored.blob


def _again(step: Callable[[], T]) -> T:
    """A step, tried again after a lost connection or a failure of the server."""
    for wait in _WAITS:
        try:
            return step()
        except BitternError:
            raise
        except Exception as error:
            if not passing(error):
                raise
        time.sleep(wait)
    return step()
