"""A small Hub for the tests: HTTP on loopback, in memory, with what huggingface_hub asks for a push and a download.

Repositories have branches, commits and pull requests; large files travel by LFS (in one piece or in parts), small ones
inside the commit. A test scripts failures with :meth:`Hub.fail`, and reads in ``log`` what was asked, and in ``sent``
how many bytes were answered.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LARGE = (".safetensors", ".bin", ".gguf", ".png")  # what the Hub's .gitattributes sends to LFS
PART = 1 << 16  # bytes of a part, for files that travel in parts
_NUMBERS = itertools.count()  # of commits; a client remembers what it saw of one, whatever became of the server


@dataclass
class Commit:
    """A state of a repository: name -> content."""

    oid: str
    parent: str | None
    message: str
    files: dict[str, bytes]
    large: set[str]


@dataclass
class Repo:
    """A model repository."""

    private: bool
    gated: bool = False
    heads: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def add(self, ref: str, parent: Commit | None, message: str, files: dict[str, bytes], large: set[str]) -> Commit:
        """A commit at the top of a branch or pull request."""
        before = None if parent is None else parent.oid
        commit = Commit(hashlib.sha1(str(next(_NUMBERS)).encode()).hexdigest(), before, message, files, large)
        self.commits[commit.oid] = commit
        self.heads[ref] = commit.oid
        return commit

    def at(self, revision: str) -> Commit | None:
        return self.commits.get(self.heads.get(revision, revision))

    @property
    def pull_requests(self) -> list[str]:
        return [ref for ref in self.heads if ref.startswith("refs/pr/")]


@dataclass
class Failure:
    """What goes wrong with requests that match, and how many more times."""

    method: str
    path: re.Pattern[str]
    times: int
    status: int | None  # None: the connection breaks
    body: bytes
    headers: dict[str, str]
    before: bool  # False: the request is carried out first


class Hub(ThreadingHTTPServer):
    """The server; ``tokens`` maps a token to the namespaces that it may write to."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.RLock()
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.repos: dict[str, Repo] = {}
        self.tokens: dict[str, set[str]] = {}
        self.store: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.failures: list[Failure] = []
        self.log: list[str] = []
        self.sent: Counter[str] = Counter()
        self.multipart = False
        self.parts_of_files = True
        self.full: str | None = None
        self.corrupt: Callable[[str, bytes], bytes] = lambda name, data: data
        self.meanwhile: Callable[[str], None] = lambda request: None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fail(
        self,
        method: str,
        path: str,
        *,
        status: int | None = None,
        times: int = 1,
        body: bytes = b"",
        headers: dict[str, str] | None = None,
        before: bool = True,
    ) -> None:
        """Let the next requests that match fail."""
        self.failures.append(Failure(method, re.compile(path), times, status, body, headers or {}, before))

    def create(self, name: str, private: bool = False, gated: bool = False, **files: bytes) -> Repo:
        """A repository with its first commit."""
        repo = self.repos[name] = Repo(private, gated)
        start = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}
        named = {key.replace("__", "."): data for key, data in files.items()}
        repo.add("main", None, "initial commit", start | named, {key for key in named if key.endswith(LARGE)})
        return repo

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """What a repository holds, without what it was born with."""
        commit = self.repos[name].at(revision)
        assert commit is not None
        return {key: data for key, data in commit.files.items() if key != ".gitattributes"}

    def asked(self, pattern: str) -> list[str]:
        """The requests that match, as "METHOD path"."""
        return [line for line in self.log if re.search(pattern, line)]


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet."""

    def do_GET(self) -> None:
        self.handle_request()

    do_HEAD = do_POST = do_PUT = do_GET

    def handle_request(self) -> None:
        address = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(address.query).items()}
        path = unquote(address.path)
        with self.server.lock:
            self.server.log.append(f"{self.command} {path}")
            failure = next(
                (
                    each
                    for each in self.server.failures
                    if each.times and each.method == self.command and each.path.search(path)
                ),
                None,
            )
            if failure is not None:
                failure.times -= 1
        if failure is not None and failure.before:
            self.break_down(failure)
            return
        body = self.read_body()
        with self.server.lock:
            self.server.meanwhile(f"{self.command} {path}")
            status, headers, data = self.answer(path, body)
            self.server.sent[f"{self.command} {path}"] += len(data)
        if failure is not None:
            self.break_down(failure)
            return
        self.reply(status, headers, data)

    def break_down(self, failure: Failure) -> None:
        if failure.status is None:
            if self.command == "PUT":  # in the middle of the upload
                self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            self.close_connection = True
            self.connection.close()
            return
        self.read_body()
        body = failure.body.replace(b"{authorization}", self.headers.get("Authorization", "").encode())
        self.reply(failure.status, failure.headers, body)

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            found = b""
            while size := int(self.rfile.readline().strip() or b"0", 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return found
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def reply(self, status: int, headers: dict[str, str], data: bytes) -> None:
        try:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    # What the server knows of the caller.

    def may_write(self, name: str) -> bool:
        return name.split("/")[0] in self.server.tokens.get(self.token, set())

    @property
    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    # The endpoints.

    def answer(self, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        if self.token and self.token not in self.server.tokens:
            return self.error(401, "Invalid credentials in Authorization header")
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.validate(json.loads(body)["content"])
        if match := re.fullmatch(r"/lfs/([0-9a-f]{64})(?:/(\d+))?", path):
            return self.store(match[1], match[2], body)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(.*))?", path):
            return self.model(match[1], match[2] or "", body)
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self.batch(match[1], json.loads(body))
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([0-9a-f]{40}|refs/pr/\d+|[^/]+)/(.+)", path):
            return self.resolve(match[1], match[2], match[3])
        return self.error(404, f"no such endpoint: {path}")

    def json(self, value: Any, status: int = 200) -> tuple[int, dict[str, str], bytes]:
        return status, {"Content-Type": "application/json"}, json.dumps(value).encode()

    def error(self, status: int, message: str, code: str | None = None) -> tuple[int, dict[str, str], bytes]:
        headers = {"X-Error-Message": message, "Content-Type": "application/json"}
        return status, headers | ({"X-Error-Code": code} if code else {}), json.dumps({"error": message}).encode()

    def create(self, asked: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        name = f"{asked['organization']}/{asked['name']}"
        if not self.token:
            return self.error(401, "Invalid username or password.")
        if name in self.server.repos:
            status, headers, _ = self.error(409, "You already created this model repo")
            return status, headers, json.dumps({"url": f"{self.server.endpoint}/{name}"}).encode()
        if not self.may_write(name):
            return self.error(403, f"You don't have the rights to create a model under the namespace {name}")
        self.server.create(name, private=asked.get("visibility") == "private" or bool(asked.get("private")))
        return self.json({"url": f"{self.server.endpoint}/{name}"})

    def validate(self, content: str) -> tuple[int, dict[str, str], bytes]:
        try:
            found = yaml.safe_load(content.split("---")[1])
        except (yaml.YAMLError, IndexError) as error:
            return self.json({"errors": [{"message": str(error)}], "warnings": []}, 400)
        errors = [] if isinstance(found.get("license", ""), str | list) else [{"message": "license must be a string"}]
        return self.json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def model(self, name: str, rest: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and not self.may_write(name)):
            return self.error(404 if self.token else 401, "Repository not found", "RepoNotFound")
        what, _, rest = rest.partition("/")
        if what == "branch":
            return self.branch(name, repo, rest)
        ref = rest or "main"
        commit = repo.at(ref)
        if commit is None:
            return self.error(404, f"Invalid rev id: {ref}", "RevisionNotFound")
        if what in ("", "revision"):
            return self.info(name, repo, commit)
        if what == "tree":
            return self.json([_entry(key, data, key in commit.large) for key, data in commit.files.items()])
        if not self.may_write(name) and "create_pr" not in self.query:
            return self.error(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        if what == "preupload":
            asked = json.loads(body)["files"]
            return self.json({"files": [self.mode(commit, file) for file in asked]})
        if what == "commit":
            return self.commit(name, repo, ref, commit, body)
        return self.error(404, f"no such endpoint: {what}")

    def info(self, name: str, repo: Repo, commit: Commit) -> tuple[int, dict[str, str], bytes]:
        card = commit.files.get("README.md", b"").decode()
        data = yaml.safe_load(card.split("---")[1]) if card.startswith("---") else None
        return self.json(
            {
                "id": name,
                "modelId": name,
                "sha": commit.oid,
                "private": repo.private,
                "gated": "manual" if repo.gated else False,
                "siblings": [{"rfilename": key} for key in commit.files],
                "cardData": data,
                "tags": [],
                "downloads": 0,
            }
        )

    def branch(self, name: str, repo: Repo, branch: str) -> tuple[int, dict[str, str], bytes]:
        if not self.may_write(name):
            return self.error(403, "Forbidden")
        if branch in repo.heads:
            return self.error(409, f"Reference already exists: {branch}")
        repo.heads[branch] = repo.heads["main"]
        return self.json({})

    def mode(self, commit: Commit, file: dict[str, Any]) -> dict[str, Any]:
        name, held = file["path"], commit.files.get(file["path"])
        large = name.endswith(LARGE) or file["size"] > 10_000_000
        oid = None
        if held is not None:
            oid = hashlib.sha256(held).hexdigest() if name in commit.large else _blob(held)
        return {"path": name, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}

    def batch(self, name: str, asked: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        objects = []
        for each in asked["objects"]:
            oid = each["oid"]
            found: dict[str, Any] = {"oid": oid, "size": each["size"]}
            if self.server.full is not None:
                found["error"] = {"code": 507, "message": self.server.full}
            if oid not in self.server.store:
                # as storage does it, the address is its own permission
                url = f"{self.server.endpoint}/lfs/{oid}"
                upload: dict[str, Any] = {"href": f"{url}?X-Amz-Signature=5ecret51gnature"}
                if self.server.multipart:
                    count = -(-each["size"] // PART)
                    upload["header"] = {str(part): f"{url}/{part}" for part in range(1, count + 1)}
                    upload["header"]["chunk_size"] = str(PART)
                found["actions"] = {"upload": upload}
            objects.append(found)
        return self.json({"transfer": "multipart" if self.server.multipart else "basic", "objects": objects})

    def store(self, oid: str, part: str | None, body: bytes) -> tuple[int, dict[str, str], bytes]:
        if part is not None:
            self.server.parts.setdefault(oid, {})[int(part)] = body
            return 200, {"ETag": f'"{hashlib.md5(body).hexdigest()}"'}, b""
        if self.command == "POST":  # all parts have arrived
            pieces = self.server.parts.pop(oid)
            body = b"".join(pieces[number] for number in sorted(pieces))
        if hashlib.sha256(body).hexdigest() != oid:
            return self.error(400, "the content is not of this hash")
        self.server.store[oid] = body
        return self.json({})

    def commit(self, name: str, repo: Repo, ref: str, parent: Commit, body: bytes) -> tuple[int, dict[str, str], bytes]:
        files, large, message = dict(parent.files), set(parent.large), ""
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, parent.oid):
                    return self.error(412, "A commit has happened since. Please refresh and try again.")
            elif line["key"] == "deletedFile":
                if value["path"] not in files:
                    return self.error(404, "A file with this name doesn't exist", "EntryNotFound")
                del files[value["path"]]
                large.discard(value["path"])
            elif line["key"] == "file":
                files[value["path"]] = self.server.corrupt(value["path"], base64.b64decode(value["content"]))
                large.discard(value["path"])
            else:
                if value["oid"] not in self.server.store:
                    return self.error(400, f"LFS object {value['oid']} was not uploaded")
                files[value["path"]] = self.server.corrupt(value["path"], self.server.store[value["oid"]])
                large.add(value["path"])
        created = None
        if "create_pr" in self.query:
            ref = f"refs/pr/{len(repo.pull_requests) + 1}"
            created = f"{self.server.endpoint}/{name}/discussions/{ref.rpartition('/')[2]}"
        made = repo.add(ref, parent, message, files, large)
        url = f"{self.server.endpoint}/{name}/commit/{made.oid}"
        return self.json({"commitUrl": url, "commitOid": made.oid, "pullRequestUrl": created})

    def resolve(self, name: str, revision: str, file: str) -> tuple[int, dict[str, str], bytes]:
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and not self.may_write(name)):
            return self.error(401, "Repository not found", "RepoNotFound")
        if repo.gated and not self.may_write(name):
            return self.error(403, "Access to this model is restricted", "GatedRepo")
        commit = repo.at(revision)
        if commit is None or file not in commit.files:
            code = "RevisionNotFound" if commit is None else "EntryNotFound"
            return self.error(404, "not found", code)
        data = commit.files[file]
        etag = hashlib.sha256(data).hexdigest() if file in commit.large else _blob(data)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        wanted = self.headers.get("Range", "") if self.server.parts_of_files else ""
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", wanted):
            stop = int(match[2]) + 1 if match[2] else len(data)
            part = data[int(match[1]) : stop]
            headers["Content-Range"] = f"bytes {match[1]}-{stop - 1}/{len(data)}"
            return 206, headers, part
        return 200, headers, data


def _blob(data: bytes) -> str:
    """What git calls a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entry(name: str, data: bytes, large: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": _blob(data)}
    if large:
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry


@contextmanager
def running() -> Iterator[Hub]:
    """A server while the block runs."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
