"""Hub ids: against a small server that speaks the Hub's protocol, and against the cache alone."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

ROOT = Path(__file__).resolve().parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = json.dumps({"model_type": "llama"}).encode()


def legacy(folder: Path) -> bytes:
    path = folder / "legacy.bin"
    torch.save({"a": torch.full((3,), 2.0)}, path)
    return path.read_bytes()


def repositories(folder: Path) -> dict[str, dict[str, bytes]]:
    weights = save({"a": torch.full((3,), 1.0)})
    return {
        "org/good": {
            "config.json": CONFIG,
            "model.safetensors": weights,
            "tokenizer.json": b"{}",
            "LICENSE": b"free",
            "pytorch_model.bin": b"not wanted",
            "consolidated.safetensors": b"not wanted",
            "onnx/model.onnx": b"not wanted",
            "original/model.safetensors": b"not wanted",
        },
        "org/gguf": {"README.md": b"# Q4", "q4.gguf": b"not wanted", "q8/q8.gguf": b"not wanted"},
        "org/bare": {"q4.gguf": b"not wanted"},
        "org/configured": {"config.json": CONFIG, "q4.gguf": b"not wanted"},
        "org/adapter": {"adapter_config.json": b"{}", "adapter_model.safetensors": weights},
        "org/words": {"README.md": b"# Words"},
        "org/legacy": {"config.json": CONFIG, "pytorch_model.bin": legacy(folder), "training_args.bin": b"not wanted"},
    }


class Hub(ThreadingHTTPServer):
    """The few endpoints that a download needs."""

    def __init__(self, repos: dict[str, dict[str, bytes]]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos = repos
        self.fetched: list[str] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            parts = parts[2:]
        repo = "/".join(parts[:2])
        if repo == "org/gated":
            return self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
        if repo not in self.server.repos:
            return self.answer(401, b"", {"X-Error-Code": "RepoNotFound"})
        files = self.server.repos[repo]
        what, revision, rest = parts[2], parts[3], "/".join(parts[4:])
        if revision not in ("main", "v1", COMMIT):
            return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if what == "revision":
            siblings = [{"rfilename": name} for name in files]
            return self.answer(200, json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode())
        if what == "tree":
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ]
            return self.answer(200, json.dumps(tree).encode())
        if self.command == "GET":
            self.server.fetched.append(rest)
        etag = hashlib.sha1(files[rest]).hexdigest()
        return self.answer(200, files[rest], {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    server = Hub(repositories(tmp_path))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


OPEN = """
import json, sys
from bittern.checkpoint import open_checkpoint
from bittern.errors import BitternError
for source, revision in json.loads(sys.argv[1]):
    try:
        with open_checkpoint(source, revision, headers_only=sys.argv[2] == "headers") as checkpoint:
            value = [checkpoint.read("a").tolist(), checkpoint.revision, str(checkpoint.folder)]
    except BitternError as error:
        value = str(error)
    print(json.dumps(value))
"""


def opened(
    cache: Path, sources: list[tuple[str, str | None]], *, what: str = "values", **environment: str
) -> list[Any]:
    """What open_checkpoint gives for each source, in a process with this environment; ``what``: values, or headers."""
    usual = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", OPEN, json.dumps(sources), what],
        cwd=ROOT,
        env=usual | environment | {"no_proxy": "127.0.0.1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_downloads_what_a_checkpoint_needs_and_works_offline_afterwards(hub: Hub, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    ids = [("org/good", None), ("org/good", "v1"), ("org/legacy", None)]
    good, same, old = opened(cache, ids, HF_ENDPOINT=hub.endpoint)
    assert good[:2] == same[:2] == [[1, 1, 1], COMMIT]
    assert old[:2] == [[2, 2, 2], COMMIT]
    assert sorted(hub.fetched) == sorted(
        ["config.json", "model.safetensors", "tokenizer.json", "LICENSE", "config.json", "pytorch_model.bin"]
    )
    assert Path(good[2]).is_relative_to(cache)
    hub.repos.clear()  # from here on the server knows nothing
    again = [("org/good", None), ("org/good", COMMIT), ("org/legacy", None), ("org/other", None)]
    good, same, old, other = opened(cache, again, HF_ENDPOINT=hub.endpoint, HF_HUB_OFFLINE="1")
    assert good[:2] == same[:2] == [[1, 1, 1], COMMIT]
    assert old[:2] == [[2, 2, 2], COMMIT]
    assert other == (
        "org/other: no such folder here, the Hub cannot be reached (HF_HUB_OFFLINE is set)"
        " and the cache holds no complete copy"
    )


def test_says_why_a_repository_cannot_be_had(hub: Hub, tmp_path: Path) -> None:
    ids = [("org/missing", None), ("org/gated", None), ("org/good", "v9"), ("no//id", None)]
    missing, gated, revision, no_id = opened(tmp_path / "cache", ids, HF_ENDPOINT=hub.endpoint)
    assert missing.startswith("org/missing: no such folder here, and no such repository on the Hub")
    assert gated.startswith("org/gated: gated, its owner must grant access")
    assert revision == "org/good: the repository has no revision v9"
    assert no_id.startswith("no//id: no such folder")


@pytest.mark.parametrize("what", ["values", "headers"])
def test_says_what_a_repository_is_that_is_no_checkpoint(hub: Hub, tmp_path: Path, what: str) -> None:
    names = ["org/gguf", "org/bare", "org/configured", "org/adapter", "org/words"]
    found = opened(tmp_path / "cache", [(name, None) for name in names], what=what, HF_ENDPOINT=hub.endpoint)
    for name, message in zip(names[:3], found[:3], strict=True):
        assert message == (f"{name}: holds GGUF files alone: download one (`hf download {name} FILE.gguf`) and name it")
    assert found[3] == (
        "org/adapter: expected config.json; found none: it is an adapter, without the model that it adapts"
    )
    assert found[4] == "org/words: expected config.json; found none"
    assert not any(name.endswith(".gguf") for name in hub.fetched)
    offline = opened(tmp_path / "cache", [("org/gguf", None)], what=what, HF_HUB_OFFLINE="1")
    assert offline == ["org/gguf: expected config.json; found none"]


def test_says_that_there_is_no_network(tmp_path: Path) -> None:
    (message,) = opened(tmp_path / "cache", [("org/good", None)], HF_ENDPOINT="http://127.0.0.1:9")
    assert message.startswith("org/good: no such folder here, the Hub cannot be reached (")
    assert "\n" not in message
    assert message.endswith("and the cache holds no complete copy")


def test_a_copy_without_all_its_weights_is_not_taken_for_whole(hub: Hub, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    ((_, _, folder),) = opened(cache, [("org/good", None)], HF_ENDPOINT=hub.endpoint)
    (Path(folder) / "model.safetensors").unlink()
    (message,) = opened(cache, [("org/good", None)], HF_ENDPOINT=hub.endpoint, HF_HUB_OFFLINE="1")
    # huggingface_hub 2 notices by itself; 1 hands out the folder, and the reader notices.
    assert (
        message.startswith("org/good: no such folder here, the Hub cannot be reached (")
        or "expected model.safetensors" in message
    )
