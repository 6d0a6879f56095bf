"""Pushing to the Hub and loading from it: the real client against a small Hub of our own, over HTTP on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

import bittern
from bittern.cli import commands
from tests import tiny
from tests.hub_server import Hub, Repo, running

ROOT = Path(__file__).resolve().parents[1]
TOKEN = "hf_0123456789abcdefghijABCDEFGHIJ0123"
OTHER = "hf_ZZZZZZZZZZabcdefghijABCDEFGHIJ9999"  # of somebody who may write nowhere here
CARD = "---\nlicense: apache-2.0\nlanguage:\n- en\n- no\n---\n# Tiny\n"

CLIENT = """
import json, os, sys, tempfile, time
sleep = time.sleep
time.sleep = lambda seconds: sleep(seconds / 100)  # between attempts
from bittern.cli import main
lines, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
for line in lines:
    job = json.loads(line)
    os.environ.pop("HF_TOKEN", None)
    os.environ.update(job["environment"])
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
        try:
            exec(job["code"]) if "code" in job else main(job["arguments"])
            code = 0
        except SystemExit as ended:
            code = ended.code
        sys.stdout.flush(), sys.stderr.flush()
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
    print(json.dumps([code, *texts]), file=answers, flush=True)
"""


CONSTANT = """
from huggingface_hub import constants
constants.{} = {}
"""


SETTINGS = """
import tempfile
from bittern import hub
hub._HEAD, tempfile.tempdir = {head}, {folder}
"""


class Client:
    """A process with the real huggingface_hub, which runs bittern's commands; it waits a hundredth between attempts."""

    def __init__(self, hub: Hub, home: Path) -> None:
        self.home = home
        environment = client_environment(hub, home)
        command = [sys.executable, "-c", CLIENT]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True)

    def job(self, token: str | None, **job: Any) -> tuple[int, str, str]:
        assert self.process.stdin is not None and self.process.stdout is not None
        job["environment"] = {} if token is None else {"HF_TOKEN": token}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        code, out, err = json.loads(self.process.stdout.readline())
        return code, out, err

    def run(self, *arguments: object, token: str | None = TOKEN) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of a command."""
        return self.job(token, arguments=[str(argument) for argument in arguments])

    def push(self, *arguments: object, token: str | None = TOKEN) -> str:
        """stdout of a push that must succeed."""
        code, out, err = self.run("push", *arguments, token=token)
        assert code == 0, err
        return out

    def refused(self, *arguments: object, token: str | None = TOKEN) -> str:
        """The one line on stderr of a push that must fail."""
        code, out, err = self.run("push", *arguments, token=token)
        assert code == 1 and out == "" and err.startswith("error: ") and err.count("\n") == 1, (code, out, err)
        return err.removeprefix("error: ").rstrip("\n")


def client_environment(hub: Hub, home: Path) -> dict[str, str]:
    usual = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    more = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "no_proxy": "127.0.0.1"}
    return usual | more | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # they would stand before an error


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with running() as hub:
        yield hub


@pytest.fixture(scope="module")
def process(server: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    client = Client(server, tmp_path_factory.mktemp("home"))
    yield client
    assert client.process.stdin is not None
    client.process.stdin.close()
    assert client.process.wait(timeout=30) == 0


@pytest.fixture
def hub(server: Hub) -> Hub:
    """The server, empty, with the namespace "me"."""
    server.reset()
    server.tokens = {TOKEN: {"me"}, OTHER: set()}
    return server


@pytest.fixture
def client(process: Client, hub: Hub) -> Client:
    shutil.rmtree(process.home / "hub", ignore_errors=True)
    return process


@pytest.fixture(scope="module")
def source(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.save(tiny.random_model(), tmp_path_factory.mktemp("source") / "tiny", tokenizer)
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    (folder / "LICENSE").write_text("the text of the licence", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact in two shards."""
    folder = tmp_path_factory.mktemp("made") / "tiny-4bit"
    bittern.quantize(source, folder, bits=4, group_size=32, method="rtn", max_shard_size=90_000)
    assert len(list(folder.glob("*.safetensors"))) == 2
    return folder


@pytest.fixture
def artifact(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "tiny-4bit")


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_weights_configuration_and_card_arrive_in_one_commit(hub: Hub, client: Client, artifact: Path) -> None:
    before = contents(artifact)
    out = client.push(artifact, "me/tiny")
    held = hub.files("me/tiny")
    card = held.pop("README.md").decode()
    assert held == before == contents(artifact)
    assert len(hub.repos["me/tiny"].commits) == 2  # the one that it was born with, and ours
    assert hub.repos["me/tiny"].at("main").message == "tiny-4bit, by bittern"  # type: ignore[union-attr]
    assert ModelCard(card).data["license"] == "apache-2.0"
    assert out.startswith(f"me/tiny (public): {len(before) + 1} files sent, 0 there already, 0 deleted")
    assert f"sizes and hashes on the Hub are those of {artifact}" in out
    assert f"{hub.endpoint}/me/tiny/commit/{hub.repos['me/tiny'].heads['main']}" in out


def test_what_is_there_is_neither_sent_nor_committed_again(hub: Hub, client: Client, artifact: Path) -> None:
    client.push(artifact, "me/tiny")
    hub.log.clear()
    out = client.push(artifact, "me/tiny")
    assert "0 files sent" in out and len(hub.repos["me/tiny"].commits) == 2
    assert not hub.asked("^(PUT|POST)")


def test_a_second_push_replaces_what_changed_and_deletes_what_is_gone(
    hub: Hub, client: Client, artifact: Path, source: Path, tmp_path: Path
) -> None:
    client.push(artifact, "me/tiny", "--message", "first")
    repo = hub.repos["me/tiny"]
    files = dict(hub.files("me/tiny"))
    repo.add("main", repo.at("main"), "a picture", files | {"photo.png": b"picture"}, {"photo.png"})
    other = tmp_path / "other"
    bittern.quantize(source, other, bits=8, group_size=32, method="rtn")
    hub.log.clear()
    out = client.push(other, "me/tiny", "--message", "second")
    held = hub.files("me/tiny")
    assert held.pop("photo.png") == b"picture"
    assert held.pop("README.md") != files["README.md"]
    assert held == contents(other)
    assert "3 deleted" in out  # two shards and their index
    assert repo.at("main").message == "second" and len(repo.commits) == 4  # type: ignore[union-attr]
    assert len(hub.asked("^PUT /lfs")) == 1  # the tokenizer and the licence were there already


def test_a_private_repository_is_seen_by_its_owner_alone(hub: Hub, client: Client, artifact: Path) -> None:
    assert client.push(artifact, "me/secret", "--private").startswith("me/secret (private): ")
    assert hub.repos["me/secret"].private
    assert client.run("run", "me/secret", "--prompt", "stone", "--max-new-tokens", 2)[0] == 0
    shutil.rmtree(client.home / "hub")
    code, _, err = client.run("run", "me/secret", "--prompt", "stone", token=None)
    assert code == 1 and "no such repository on the Hub (a private one needs HF_TOKEN)" in err


def test_private_is_not_promised_of_a_public_repository(hub: Hub, client: Client, artifact: Path) -> None:
    hub.create("me/tiny")
    assert "it exists and is public" in client.refused(artifact, "me/tiny", "--private")
    assert not hub.files("me/tiny")


def test_a_pull_request_leaves_the_branch_alone(hub: Hub, client: Client, artifact: Path) -> None:
    hub.create("you/tiny")
    out = client.push(artifact, "you/tiny", "--create-pr", token=OTHER)  # whoever may read may propose
    assert hub.files("you/tiny") == {}
    held = hub.files("you/tiny", "refs/pr/1")
    assert {name for name in held if name != "README.md"} == set(contents(artifact))
    assert out.startswith("you/tiny (proposed to): ") and f"{hub.endpoint}/you/tiny/discussions/1" in out
    code, text, err = client.run("run", "you/tiny", "--revision", "refs/pr/1", "--prompt", "stone", token=OTHER)
    assert code == 0 and text, err


def test_a_proposal_is_taken_up_again_by_its_name(
    hub: Hub, client: Client, artifact: Path, source: Path, tmp_path: Path
) -> None:
    hub.create("me/tiny")
    client.push(artifact, "me/tiny", "--create-pr")
    bittern.quantize(source, tmp_path / "other", bits=8, group_size=32, method="rtn")
    out = client.push(tmp_path / "other", "me/tiny", "--revision", "refs/pr/1", "--json")
    held = hub.files("me/tiny", "refs/pr/1")
    assert b"refs/pr" not in held.pop("README.md") and held == contents(tmp_path / "other")
    assert hub.files("me/tiny") == {} and hub.repos["me/tiny"].pull_requests == ["refs/pr/1"]
    told = json.loads(out)
    assert told["published"]["commit"] == hub.repos["me/tiny"].heads["refs/pr/1"]
    assert set(told["files"]) == {*held, "README.md"} and told["licence"] == {"license": "apache-2.0"}
    assert "no revision refs/pr/2" in client.refused(artifact, "me/tiny", "--revision", "refs/pr/2")


def test_a_pull_request_needs_a_repository(hub: Hub, client: Client, artifact: Path) -> None:
    assert "no such repository to propose a change to" in client.refused(artifact, "me/tiny", "--create-pr")
    assert not hub.repos


def test_a_branch_is_made_and_named_in_the_card(hub: Hub, client: Client, artifact: Path) -> None:
    client.push(artifact, "me/tiny", "--revision", "4bit")
    assert hub.files("me/tiny") == {}
    card = hub.files("me/tiny", "4bit")["README.md"].decode()
    assert "bittern run me/tiny --revision 4bit" in card
    code, out, err = client.run("run", "me/tiny", "--revision", "4bit", "--prompt", "stone", "--max-new-tokens", 2)
    assert code == 0 and out, err


@pytest.mark.parametrize(
    "request_", [("PUT", "^/lfs"), ("GET", "/tree/"), ("POST", "/preupload/"), ("POST", "/batch$")]
)
@pytest.mark.parametrize("status", [None, 503])
def test_a_lost_connection_or_a_failing_server_is_tried_again(
    hub: Hub, client: Client, artifact: Path, request_: tuple[str, str], status: int | None
) -> None:
    hub.fail(*request_, status=status, times=2)
    client.push(artifact, "me/tiny")
    assert not hub.failures[0].times  # they did happen
    held = hub.files("me/tiny")
    assert held.pop("README.md") and held == contents(artifact)
    assert len(hub.repos["me/tiny"].commits) == 2


@pytest.mark.parametrize("before", [True, False])
def test_a_commit_whose_answer_is_lost_is_made_once(hub: Hub, client: Client, artifact: Path, before: bool) -> None:
    hub.fail("POST", "/commit/", before=before)
    client.push(artifact, "me/tiny")
    assert len(hub.repos["me/tiny"].commits) == 2
    assert set(hub.files("me/tiny")) == {*contents(artifact), "README.md"}


def test_a_pull_request_whose_answer_is_lost_is_not_made_twice(hub: Hub, client: Client, artifact: Path) -> None:
    hub.create("me/tiny")
    hub.fail("POST", "/commit/", before=False)
    assert "look at its pull requests" in client.refused(artifact, "me/tiny", "--create-pr")
    assert hub.repos["me/tiny"].pull_requests == ["refs/pr/1"]


def test_an_interrupted_push_is_taken_up_again(hub: Hub, client: Client, artifact: Path) -> None:
    shards = sorted(path for path in artifact.glob("*.safetensors"))
    second = hashlib.sha256(shards[1].read_bytes()).hexdigest()
    hub.fail("PUT", second, times=1000)
    message = client.refused(artifact, "me/tiny")
    assert message.startswith("me/tiny: the connection to the Hub is lost (")
    assert message.endswith("push again; what has arrived is not sent twice")
    assert hub.files("me/tiny") == {}  # nothing that looks like a model
    hub.failures.clear()
    hub.log.clear()
    client.push(artifact, "me/tiny")
    assert hub.asked("^PUT") == [f"PUT /lfs/{second}"]
    assert set(hub.files("me/tiny")) == {*contents(artifact), "README.md"}


def test_large_files_in_parts(hub: Hub, client: Client, artifact: Path) -> None:
    hub.multipart = True
    hub.fail("PUT", "/lfs/.*/1$")
    client.push(artifact, "me/tiny")
    held = hub.files("me/tiny")
    assert held.pop("README.md") and held == contents(artifact)


@pytest.mark.parametrize(
    ("method", "path", "status", "body", "expected"),
    [
        ("GET", "^/api/models/me", 401, b"", "the Hub does not take the token"),
        ("POST", "/repos/create", 403, b"", "it needs to write to me"),
        ("POST", "/repos/create", 409, b'{"error": "taken"}', "the name is taken by a repository that this token may"),
        ("POST", "/preupload/", 403, b"", "it needs to write to me"),
        ("POST", "/batch$", 403, b'{"error": "storage limit reached"}', "no more room for it: storage limit reached"),
        ("PUT", "/lfs/", 507, b"", "no more room for it"),
        ("POST", "/commit/", 402, b'{"error": "upgrade"}', "no more room for it: upgrade; free space or raise the"),
        (
            "POST",
            "/commit/",
            409,
            b'{"error": "being renamed"}',
            "it has changed meanwhile (being renamed): push again",
        ),
        ("POST", "/commit/", 404, b"", "the Hub does not find it"),
        ("POST", "/commit/", 500, b"", "the Hub fails (500): push again later"),
        ("POST", "/preupload/", 429, b"", "too many requests: push again later"),
        ("POST", "/validate-yaml", 400, b'{"errors": [{"message": "bad tag"}], "warnings": []}', "bad tag"),
    ],
)
def test_what_the_hub_refuses_is_one_line_that_says_what_to_do(
    hub: Hub, client: Client, artifact: Path, method: str, path: str, status: int, body: bytes, expected: str
) -> None:
    headers = {"Content-Type": "application/json"}
    if status == 401:
        headers["X-Error-Message"] = "Invalid credentials in Authorization header"
    hub.fail(method, path, status=status, times=1000, body=body, headers=headers)
    message = client.refused(artifact, "me/tiny")
    assert message.startswith("me/tiny: ") and expected in message
    assert "me/tiny" not in hub.repos or hub.files("me/tiny") == {}


def test_a_full_store_is_told_from_a_name_that_sounds_like_it(hub: Hub, client: Client, artifact: Path) -> None:
    hub.full = "Private repository storage limit reached"
    message = client.refused(artifact, "me/tiny")
    assert "the Hub has no more room for it: " in message and "storage limit reached" in message
    hub.full = None
    hub.fail("POST", "/preupload/", status=404)
    assert "the Hub does not find it" in client.refused(artifact, "me/quota-limit-reached")


def test_a_hub_without_xet_says_so(hub: Hub, client: Client, artifact: Path) -> None:
    client.job(None, code=CONSTANT.format("HF_HUB_DISABLE_XET", False))
    try:
        message = client.refused(artifact, "me/tiny")
    finally:
        client.job(None, code=CONSTANT.format("HF_HUB_DISABLE_XET", True))
    assert message.startswith("me/tiny: the upload by xet fails (") and message.endswith("HF_HUB_DISABLE_XET=1")
    assert hub.files("me/tiny") == {}


def test_an_unknown_token_and_a_foreign_namespace(hub: Hub, client: Client, artifact: Path) -> None:
    assert "the Hub does not take the token" in client.refused(artifact, "me/tiny", token="hf_expired")
    assert "it needs to write to you" in client.refused(artifact, "you/tiny")
    hub.create("you/there")
    assert "it needs to write to you" in client.refused(artifact, "you/there")
    hub.create("you/secret", private=True)
    assert "the name is taken by a repository that this token may not see" in client.refused(artifact, "you/secret")
    assert client.refused(artifact, "me/tiny", token=None).startswith("me/tiny: the Hub wants a token that may write")


def test_a_repository_that_changed_meanwhile(hub: Hub, client: Client, artifact: Path) -> None:
    repo = hub.create("me/tiny")

    def meanwhile(request: str) -> None:
        if "/commit/" in request:
            repo.add("main", repo.at("main"), "somebody else's", {"notes.txt": b"mine"}, set())

    hub.meanwhile = meanwhile
    assert "it has changed meanwhile (A commit has happened since." in client.refused(artifact, "me/tiny")
    assert hub.files("me/tiny") == {"notes.txt": b"mine"}


def test_somebody_else_s_model_is_not_overwritten(hub: Hub, client: Client, artifact: Path) -> None:
    hub.create("me/original", model__safetensors=b"precious", config__json=b"{}")
    message = client.refused(artifact, "me/original")
    assert "the name is taken: it holds weights that bittern did not push (model.safetensors)" in message
    assert hub.files("me/original") == {"model.safetensors": b"precious", "config.json": b"{}"}


def test_what_the_hub_holds_is_read_back(hub: Hub, client: Client, artifact: Path) -> None:
    hub.corrupt = lambda name, data: data[:-1] + b"?" if name == "model-00002-of-00002.safetensors" else data
    message = client.refused(artifact, "me/tiny")
    assert "1 files are not what was sent (model-00002-of-00002.safetensors)" in message
    hub.corrupt = lambda name, data: data + b" " if name == "config.json" else data
    assert "are not what was sent (config.json" in client.refused(artifact, "me/two")


def test_an_artifact_that_is_not_its_manifest_s_is_not_pushed(hub: Hub, client: Client, artifact: Path) -> None:
    shard = artifact / "model-00001-of-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert "model-00001-of-00002.safetensors has another hash; not pushed" in client.refused(artifact, "me/tiny")
    (artifact / "bittern_manifest.json").unlink()
    assert "found no bittern_manifest.json" in client.refused(artifact, "me/tiny")
    assert "expected an artifact's folder: there is none" in client.refused(artifact / "nothing", "me/tiny")
    assert not hub.log


@pytest.mark.parametrize("name", ["tiny", "me/", "me/tiny/more", "../tiny", "me/ti--ny", "me/.tiny"])
def test_a_repository_has_an_owner_and_a_name(hub: Hub, client: Client, artifact: Path, name: str) -> None:
    assert client.refused(artifact, name) == f"REPO: expected org/name, found {name!r}"
    assert not hub.log


def test_only_the_artifact_is_pushed(hub: Hub, client: Client, artifact: Path) -> None:
    (artifact / ".env").write_text("SECRET=1")
    (artifact / "notes.txt").write_text("mine")
    (artifact / "NOTICE").write_text("of the base")
    (artifact / "report.html").write_text("<html></html>")
    code, _, err = client.run("push", artifact, "me/tiny")
    assert code == 0 and "note: notes.txt is not pushed: no part of the artifact" in err
    held = set(hub.files("me/tiny"))
    assert held == {*contents(artifact), "README.md"} - {".env", "notes.txt"}
    assert "[LICENSE](LICENSE), [NOTICE](NOTICE)" in hub.files("me/tiny")["README.md"].decode()


def test_a_dry_run_needs_no_network_and_prints_the_card(hub: Hub, client: Client, artifact: Path) -> None:
    code, out, err = client.run("push", artifact, "me/tiny", "--dry-run", token=None)
    assert code == 0 and not hub.log
    assert "would hold these" in err and "nothing was sent" in err
    assert all(name in err for name in contents(artifact))
    client.push(artifact, "me/tiny")
    assert hub.files("me/tiny")["README.md"].decode() == out


def test_a_card_of_one_s_own_keeps_its_text(hub: Hub, client: Client, artifact: Path, tmp_path: Path) -> None:
    own = tmp_path / "card.md"
    own.write_text("---\nlanguage: de\ntags: [mine]\n---\n# Mein Modell\n\n| kein | Wort |\n", encoding="utf-8")
    client.push(artifact, "me/tiny", "--card", own)
    card = ModelCard(hub.files("me/tiny")["README.md"].decode())
    assert card.text == "# Mein Modell\n\n| kein | Wort |\n"
    assert (
        card.data["language"] == "de"
        and card.data["license"] == "apache-2.0"
        and card.data["tags"][:2] == ["mine", "bittern"]
    )
    (artifact / "README.md").write_text("# In the folder\n")
    client.push(artifact, "me/tiny")
    assert ModelCard(hub.files("me/tiny")["README.md"].decode()).text == "# In the folder\n"


def test_what_somebody_wrote_into_the_card_on_the_hub_is_kept(
    hub: Hub, client: Client, artifact: Path, source: Path, tmp_path: Path
) -> None:
    client.push(artifact, "me/tiny")
    repo, card = hub.repos["me/tiny"], hub.files("me/tiny")["README.md"]
    bittern.quantize(source, tmp_path / "other", bits=8, group_size=32, method="rtn")
    client.push(tmp_path / "other", "me/tiny")
    made = hub.files("me/tiny")["README.md"]
    assert b"quantized to 4 bits" in card and b"quantized to 8 bits" in made  # a text that is ours is made anew
    edited = made.replace(b"# tiny\n", b"# tiny\n\nA tale of seven stones.\n")
    head = repo.at("main")
    assert head is not None and edited != made
    repo.add("main", head, "edited on the Hub", head.files | {"README.md": edited}, head.large)
    client.push(artifact, "me/tiny")
    held = ModelCard(hub.files("me/tiny")["README.md"].decode())
    assert held.text == ModelCard(edited.decode()).text
    assert "4-bit" in held.data["tags"]  # its metadata are completed


def test_a_new_branch_begins_with_the_card_of_the_default_branch(hub: Hub, client: Client, artifact: Path) -> None:
    card = b"---\nlicense: apache-2.0\n---\n# Mine\n\nA tale of seven stones.\n"
    hub.create("me/tiny", README__md=card)
    client.push(artifact, "me/tiny", "--revision", "4bit")
    assert hub.files("me/tiny") == {"README.md": card}
    held = ModelCard(hub.files("me/tiny", "4bit")["README.md"].decode())
    assert held.text == ModelCard(card.decode()).text and held.data["license"] == "apache-2.0"


def test_a_repository_made_on_the_web_has_a_card_of_metadata_alone(hub: Hub, client: Client, artifact: Path) -> None:
    hub.create("me/tiny", README__md=b"---\nlicense: apache-2.0\n---\n")
    client.push(artifact, "me/tiny")
    held = ModelCard(hub.files("me/tiny")["README.md"].decode())
    assert "## What was done" in held.text and held.data["tags"] == ["bittern", "gptq", "rtn", "4-bit"]


def with_source(artifact: Path, **source: Any) -> None:
    path = artifact / "bittern_manifest.json"
    manifest = json.loads(path.read_text())
    manifest["source"] |= source
    path.write_text(json.dumps(manifest))


def test_the_licence_is_asked_from_the_hub_where_it_is_not_on_record(hub: Hub, client: Client, artifact: Path) -> None:
    head = hub.create("base/model", README__md=b"---\nlicense: mit\nlanguage: fr\n---\n").heads["main"]
    with_source(artifact, name="base/model", revision=head, card=None)
    code, _, err = client.run("push", artifact, "me/tiny", "--dry-run", token=None)
    assert code == 0 and "a push asks the Hub for that of base/model" in err and not hub.log
    client.push(artifact, "me/tiny")
    card = ModelCard(hub.files("me/tiny")["README.md"].decode())
    assert (card.data["license"], card.data["base_model"], card.data["language"]) == ("mit", "base/model", "fr")
    assert card.data["base_model_relation"] == "quantized"


def test_a_licence_that_was_stated_holds_for_the_next_push(
    hub: Hub, client: Client, artifact: Path, tmp_path: Path
) -> None:
    with_source(artifact, card=None)
    assert "license: expected the base's, found none" in client.refused(artifact, "me/tiny")
    client.push(artifact, "me/tiny", "--license", "mit")
    card = hub.files("me/tiny")["README.md"].decode()
    assert "0 files sent" in client.push(artifact, "me/tiny")
    other = tmp_path / "other"
    bittern.convert(artifact, other, format="safetensors")
    client.push(other, "me/tiny")
    made = hub.files("me/tiny")["README.md"].decode()
    assert made != card and "stored as floats" in made  # the rest of a card of ours is made anew
    assert ModelCard(made).data["license"] == "mit" and "`mit`, as its publisher states." in made
    with_source(artifact, card={"license": "apache-2.0"})
    assert "card: license: expected apache-2.0, as of the base, found mit" in client.refused(artifact, "me/tiny")


def test_a_gated_base_without_a_licence_that_is_known(hub: Hub, client: Client, artifact: Path) -> None:
    head = hub.create("base/model", gated=True, README__md=b"---\nlanguage: fr\n---\n").heads["main"]
    with_source(artifact, name="base/model", revision=head, card=None)
    message = client.refused(artifact, "me/tiny")
    assert "license: expected the base's, found none: the card of base/model names none; --license states it" in message
    assert "me/tiny" not in hub.repos
    client.push(artifact, "me/tiny", "--license", "llama3.2")
    assert "The base is gated" in hub.files("me/tiny")["README.md"].decode()


DOWNLOAD = """
from huggingface_hub import snapshot_download
print(snapshot_download("me/tiny"))
"""


def test_what_was_pushed_is_downloaded_and_runs(
    hub: Hub, client: Client, artifact: Path, source: Path, tmp_path: Path
) -> None:
    client.push(artifact, "me/tiny")
    first = hub.repos["me/tiny"].heads["main"]
    code, out, err = client.job(None, code=DOWNLOAD)
    assert code == 0, err
    folder = Path(out.strip())
    got = contents(folder)
    card = got.pop("README.md")
    assert card == hub.files("me/tiny")["README.md"]
    assert {name: data for name, data in got.items() if name != ".gitattributes"} == contents(artifact)
    local = client.run("run", artifact, "--prompt", "stone river", "--max-new-tokens", 6)
    shutil.rmtree(client.home / "hub")
    remote = client.run("run", "me/tiny", "--prompt", "stone river", "--max-new-tokens", 6)
    assert remote[0] == 0 and remote[1] == local[1] != "\n"
    verified = client.run("verify", "me/tiny", "--no-logits")
    assert verified[0] == 0 and "as bittern_manifest.json has them" in verified[1]

    bittern.quantize(source, tmp_path / "two", bits=2, group_size=32, method="rtn")  # another text
    client.push(tmp_path / "two", "me/tiny")
    moved = client.run("run", "me/tiny", "--prompt", "stone river", "--max-new-tokens", 6)
    pinned = client.run("run", "me/tiny", "--revision", first, "--prompt", "stone river", "--max-new-tokens", 6)
    assert moved[0] == 0 and moved[1] != local[1]
    assert pinned[:2] == local[:2]
    hub.log.clear()
    client.run("run", "me/tiny", "--prompt", "stone river", "--max-new-tokens", 6)
    assert not hub.asked("GET .*safetensors")  # the cache is respected


def test_the_cache_serves_without_a_network(hub: Hub, client: Client, artifact: Path) -> None:
    client.push(artifact, "me/tiny")
    commit = hub.repos["me/tiny"].heads["main"]
    wanted = ["run", "me/tiny", "--prompt", "stone river", "--max-new-tokens", "6"]
    expected = client.run(*wanted)
    hub.repos.clear()
    hub.log.clear()
    environment = client_environment(hub, client.home) | {"HF_HUB_OFFLINE": "1", "HF_TOKEN": TOKEN}
    command = [sys.executable, "-m", "bittern", *wanted, "--revision", commit]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, expected[1]), done.stderr
    client.job(None, code=CONSTANT.format("HF_HUB_OFFLINE", True))
    try:
        assert client.run(*wanted)[:2] == expected[:2]
        assert client.refused(artifact, "me/tiny") == "me/tiny: the Hub cannot be reached: HF_HUB_OFFLINE is set"
    finally:
        client.job(None, code=CONSTANT.format("HF_HUB_OFFLINE", False))
    assert not hub.log


def test_a_repository_is_inspected_from_its_headers_alone(
    hub: Hub, client: Client, artifact: Path, tmp_path: Path
) -> None:
    client.push(artifact, "me/tiny")
    commit = hub.repos["me/tiny"].heads["main"]
    here = json.loads(client.run("inspect", artifact, "--json")[1])
    (tmp_path / "temporary").mkdir()
    client.job(None, code=SETTINGS.format(head=64, folder=repr(str(tmp_path / "temporary"))))
    try:
        code, out, err = client.run("inspect", "me/tiny", "--json")
        assert code == 0, err
        there = json.loads(out)
        assert (there.pop("source"), there.pop("revision")) == ("me/tiny", commit)
        del here["source"], here["revision"], there["files"]["README.md"]
        assert there == here
        for name in (path.name for path in artifact.glob("*.safetensors")):
            header = 8 + int.from_bytes(hub.files("me/tiny")[name][:8], "little")
            assert hub.sent[f"GET /me/tiny/resolve/{commit}/{name}"] == header
        assert not list((tmp_path / "temporary").iterdir())

        hub.fail("GET", ".*00002.*safetensors", status=403, body=b"not this one", times=9)
        code, out, err = client.run("inspect", "me/tiny")
        assert code == 1 and err.count("\n") == 1
        assert err.startswith("error: me/tiny: downloading from the Hub failed: ")
        assert not list((tmp_path / "temporary").iterdir())
        hub.failures.clear()

        hub.sent.clear()
        hub.fail("GET", "^/api/models/me/tiny/tree/", status=500, times=99)
        code, out, err = client.run("inspect", "me/tiny")
        assert code == 1 and err.startswith("error: me/tiny: downloading from the Hub failed: ")
        assert not [request for request in hub.sent if request.endswith(".safetensors")]
        hub.failures.clear()

        client.job(None, code=CONSTANT.format("HF_HUB_OFFLINE", True))  # small files alone are in the cache
        code, out, err = client.run("inspect", "me/tiny")
        assert code == 1 and ("the Hub cannot be reached" in err or "expected model.safetensors" in err)
        client.job(None, code=CONSTANT.format("HF_HUB_OFFLINE", False))
        client.run("verify", "me/tiny", "--no-logits")
        client.job(None, code=CONSTANT.format("HF_HUB_OFFLINE", True))
        code, out, err = client.run("inspect", "me/tiny", "--json")
        assert code == 0 and json.loads(out)["bytes"] == here["bytes"]
    finally:
        client.job(None, code=CONSTANT.format("HF_HUB_OFFLINE", False))
        client.job(None, code=SETTINGS.format(head=100_000, folder=None))


def test_a_dry_run_fetches_no_weights(hub: Hub, client: Client, source: Path, text: Path, tmp_path: Path) -> None:
    repo, weights = published(hub, contents(source))
    options = ["--bits", "4", "--group-size", "32", "--seqlen", "32", "--nsamples", "4"]
    given = ["-o", tmp_path / "out", "--dataset", text, *options]
    client.job(None, code=SETTINGS.format(head=64, folder=None))
    try:
        code, out, err = client.run("quantize", "org/tiny", *given, "--dry-run", "--json")
    finally:
        client.job(None, code=SETTINGS.format(head=100_000, folder=None))
    assert code == 0, err
    found = json.loads(out)
    for name, data in weights.items():
        assert hub.sent[f"GET /org/tiny/resolve/{repo.heads['main']}/{name}"] < len(data) / 2
    (note,) = [note for note in found["notes"] if "were not fetched" in note]
    assert note.startswith("org/tiny: weights of 0.00 GB")
    assert "were not fetched" in "".join(client.run("quantize", "org/tiny", *given, "--dry-run")[1:])
    here = json.loads(client.run("quantize", source, *given, "--dry-run", "--json")[1])
    assert here["prediction"]["bytes"] == found["prediction"]["bytes"] and here["loads"] == found["loads"]
    assert not (tmp_path / "out").exists()
    code, _, err = client.run("quantize", "org/tiny", *given)
    assert code == 0, err
    written = contents(tmp_path / "out")
    del written["bittern_manifest.json"]
    assert sum(map(len, written.values())) == found["prediction"]["bytes"]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["quantize", "--group-size", "48"], "group_size"),
        (["quantize", "--group-size", "32", "--seqlen", "32", "--dataset", "missing.txt"], "missing.txt"),
        (["quantize", "--group-size", "32", "--seqlen", "100000"], "seqlen"),
        (["quantize", "--group-size", "32", "--bits", "3", "--format", "awq"], "--format awq"),
        (["quantize", "--group-size", "32", "there"], "it exists already"),
        (["convert", "--dtype", "fp16", "there"], "it exists already"),
        (["convert", "there.gguf"], "exists already"),
        (["uptrain", "--kv-heads", "3"], "--kv-heads 3"),
        (["uptrain", "--kv-heads", "1", "there"], "it exists already"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_headers_tell_is_refused_before_weights_are_fetched(
    command: list[str], said: str, hub: Hub, client: Client, source: Path, text: Path, tmp_path: Path
) -> None:
    repo, weights = published(hub, contents(source))
    out = tmp_path / next((word for word in command if word.startswith("there")), "out")
    if out.suffix:
        out.touch()
    elif out.name == "there":
        shutil.copytree(source, out)
    given = [word for word in command if not word.startswith("there")]
    if command[0] != "convert" and "--dataset" not in command:
        given += ["--dataset", str(text)]
    client.job(None, code=SETTINGS.format(head=64, folder=None))
    try:
        code, _, err = client.run(given[0], "org/tiny", "-o", out, *given[1:])
    finally:
        client.job(None, code=SETTINGS.format(head=100_000, folder=None))
    assert code == 1 and said in err and err.count("\n") == 1, err
    for name, data in weights.items():
        assert hub.sent[f"GET /org/tiny/resolve/{repo.heads['main']}/{name}"] < len(data) / 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "command",
    [
        ["quantize", "--method", "rtn", "--group-size", "32"],
        ["convert"],
        ["uptrain", "--kv-heads", "1"],
    ],
)
def test_nothing_is_written_into_what_will_be_downloaded(
    command: list[str], hub: Hub, client: Client, source: Path, text: Path
) -> None:
    """The place in the cache counts before the weights are there, not that where the headers lie meanwhile."""
    repo, weights = published(hub, contents(source))
    snapshot = client.home / "hub" / "models--org--tiny" / "snapshots" / repo.heads["main"]
    out = snapshot / "out"
    texts = ["--dataset", text, "--seqlen", "32"] if command[0] == "uptrain" else []
    code, _, err = client.run(command[0], "org/tiny", "-o", out, *command[1:], *texts)
    assert code == 1 and "apart from the source" in err and str(snapshot) in err, err
    assert not out.exists() and not any((snapshot / name).exists() for name in weights)


@pytest.mark.parametrize("parts", [True, False], ids=["parts of files", "whole files only"])
def test_a_repository_becomes_what_a_folder_becomes(
    parts: bool, hub: Hub, client: Client, source: Path, text: Path, tmp_path: Path
) -> None:
    published(hub, contents(source))
    hub.parts_of_files = parts
    given = ["--dataset", text, "--bits", "4", "--group-size", "32", "--seqlen", "32", "--nsamples", "4"]
    made = []
    for name, model in (("first", "org/tiny"), ("second", "org/tiny"), ("third", source)):
        code, _, err = client.run("quantize", model, "-o", tmp_path / name, *given)
        assert code == 0, err
        written = contents(tmp_path / name)
        del written["bittern_manifest.json"]
        made.append(written)
        if name == "first":
            hub.log.clear()
    assert made[0] == made[1] == made[2]
    assert not hub.asked("GET .*safetensors")  # the second time all is in the cache


@pytest.mark.parametrize(
    "command",
    [["convert"], ["convert", "--format", "gguf"], ["uptrain", "--kv-heads", "1", "--seqlen", "32", "--nsamples", "4"]],
)
def test_values_are_fetched_where_they_are_needed(
    command: list[str], hub: Hub, client: Client, source: Path, text: Path, tmp_path: Path
) -> None:
    published(hub, contents(source))
    texts = ["--dataset", text, "--text", text] if command[0] == "uptrain" else []
    written = []
    for model in ("org/tiny", source):
        out = tmp_path / f"from {'folder' if model == source else 'hub'}{'.gguf' if 'gguf' in command else ''}"
        code, _, err = client.run(command[0], model, "-o", out, *command[1:], *texts)
        assert code == 0, err
        written.append(out.read_bytes() if out.is_file() else contents(out)["model.safetensors"])
    assert written[0][-50_000:] == written[1][-50_000:]  # a GGUF file's header names the source


@pytest.mark.parametrize("same", [True, False])
def test_a_stored_tied_head_is_compared_when_its_values_are_there(
    same: bool, hub: Hub, client: Client, source: Path, tmp_path: Path
) -> None:
    """Headers do not tell whether it is a copy: a dry run does not ask, the run does."""
    folder = shutil.copytree(source, tmp_path / "tied")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone() + (0 if same else 1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    published(hub, contents(folder))
    given = ["quantize", "org/tiny", "-o", tmp_path / "out", "--method", "rtn", "--group-size", "32"]
    code, _, err = client.run(*given, "--dry-run")
    assert code == 0, err
    code, _, err = client.run(*given)
    if same:
        assert code == 0, err
    else:
        assert code == 1 and "lm_head.weight is no copy of the embedding" in err and not (tmp_path / "out").exists()


def published(hub: Hub, files: dict[str, bytes]) -> tuple[Repo, dict[str, bytes]]:
    """The repository org/tiny with these files, and the safetensors of them."""
    repo = hub.create("org/tiny")
    weights = {name: data for name, data in files.items() if name.endswith(".safetensors")}
    repo.add("main", repo.at("main"), "weights", files, set(weights))
    return repo, weights


SECRETS = (TOKEN, "5ecret51gnature")
"""The token, and what permits an upload in the address of LFS storage."""

TWO_PUSHES = """
import sys
from bittern.cli import main
for repo in ("me/refused", "me/tiny"):
    try:
        main(["push", sys.argv[1], repo, "--verbose"])
    except SystemExit as ended:
        print(repo, "ended with", ended.code)
"""


def test_no_secret_reaches_a_terminal_a_log_or_a_file(hub: Hub, client: Client, artifact: Path, tmp_path: Path) -> None:
    home, page = tmp_path / "home", tmp_path / "report.html"
    hub.fail("PUT", "/lfs/", times=1)  # is logged with its address
    body = b'{"error": "cannot take {authorization} here"}'
    headers = {"Content-Type": "application/json", "X-HF-Warning": f"topic; you sent {TOKEN}"}
    hub.fail("POST", "/commit/", status=403, body=body, headers=headers)
    environment = client_environment(hub, home) | {"HF_TOKEN": TOKEN, "HF_DEBUG": "1", "HF_HUB_VERBOSITY": "debug"}
    command = [sys.executable, "-c", TWO_PUSHES, str(artifact)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    out, err = done.stdout, done.stderr
    assert "me/refused ended with 1" in out and "me/tiny ended with 0" in out, err
    assert "/preupload/" in err and "Traceback" in err  # requests were logged, and the error with all that led to it
    assert "error: me/refused: the token may not do this (cannot take Bearer [hidden] here)" in err
    assert "you sent [hidden]" in err and "?[hidden]" in err
    found = {"stdout": out, "stderr": err}
    found |= {f"hub/{name}": data.decode("latin-1") for name, data in hub.files("me/tiny").items()}
    for folder in (artifact, home):
        found |= {str(path): path.read_bytes().decode("latin-1") for path in folder.rglob("*") if path.is_file()}
    if "report" in commands.commands:
        assert client.run("report", artifact, "-o", page)[0] == 0
        found["report"] = page.read_text(encoding="utf-8")
    assert {"hub/README.md", "hub/bittern_manifest.json"} <= set(found)
    assert not [name for name, text in found.items() if any(secret in text for secret in SECRETS)]


def test_a_file_with_a_token_is_not_pushed(hub: Hub, client: Client, artifact: Path, tmp_path: Path) -> None:
    card = tmp_path / "card.md"
    card.write_text(f"---\ntags: [x]\n---\n# Mine\n\nexport HF_TOKEN={OTHER}\n")
    message = client.refused(artifact, "me/tiny", "--card", card)
    assert message.startswith("README.md: holds an access token of the Hub: not pushed") and OTHER not in message
    (artifact / "NOTICE").write_text(f"log in with {TOKEN}")
    assert client.refused(artifact, "me/tiny").startswith("NOTICE: holds an access token of the Hub")
    assert not hub.log
