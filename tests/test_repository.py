"""The repository tells the truth about itself: README, script, version, metadata."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version as installed_version
from pathlib import Path

import pytest

import bittern

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COVERED_BY_FOLDER = ("tests/", "benchmarks/", "docs/", ".ci/", "csrc/", "bittern/demo/model/")
"""Folders whose files share the phrase of the folder."""


def tracked() -> list[str]:
    """The files of the repository, without what git ignores."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    return [name for name in listing.stdout.splitlines() if (ROOT / name).exists()]


def file_table() -> dict[str, str]:
    """Path -> phrase, from the README's table of files."""
    section = README.split("## Every folder and file", 1)[1].split("\n## ", 1)[0]
    return dict(re.findall(r"^\| `([^`]+)` \| (.+) \|$", section, re.MULTILINE))


def test_every_file_has_a_phrase() -> None:
    table = file_table()
    files = [name for name in tracked() if not name.startswith(COVERED_BY_FOLDER)]
    unnamed = [name for name in files if name not in table and not name.endswith("/__init__.py")]
    assert not unnamed
    folders = {f"{Path(name).parent}/" for name in tracked() if "/" in name}
    known = [folder for folder in folders if not folder.startswith(COVERED_BY_FOLDER)] + list(COVERED_BY_FOLDER)
    assert not [folder for folder in known if folder not in table and folder != "bittern/"]


def test_every_phrase_has_a_file() -> None:
    assert not [name for name in file_table() if not (ROOT / name).exists()]


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"


def test_rows_of_tables_have_as_many_cells_as_their_header() -> None:
    for page in [name for name in tracked() if name.endswith(".md")]:
        header = None
        for number, line in enumerate(read(page).splitlines(), 1):
            cells = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else None
            assert header is None or cells is None or cells == header, f"{page}, line {number}: {line}"
            header = cells if header is None or cells is None else header


def test_the_version_stands_in_one_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "bittern.__version__"}
    writings = [name for name in tracked() if name.endswith(".py") and f'"{bittern.__version__}"' in read(name)]
    assert writings == ["bittern/__init__.py"]


def test_the_installed_version_is_this_one() -> None:
    try:
        installed = installed_version("bittern")
    except ModuleNotFoundError:
        pytest.skip("bittern runs from its source folder and is not installed")
    assert installed == bittern.__version__


def test_the_constraints_pin_every_dependency_exactly() -> None:
    lines = [line for line in read("constraints.txt").splitlines() if line and not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    assert "torch" in pins and "+" not in pins["torch"]
    project = tomllib.loads(read("pyproject.toml"))["project"]
    wanted = [
        *project["dependencies"],
        *(need for extra in project["optional-dependencies"].values() for need in extra),
    ]
    names = {re.split(r"[<>=]", need)[0].lower().replace("_", "-") for need in wanted}
    assert names <= {pin.lower().replace("_", "-") for pin in pins}


def test_the_least_click_has_choices_that_are_no_text() -> None:
    """8.1 has none, and --lm-head-bits and --embed-bits are such."""
    needs = tomllib.loads(read("pyproject.toml"))["project"]["dependencies"]
    (least,) = [need.partition(">=")[2] for need in needs if need.startswith("click")]
    assert tuple(map(int, least.split("."))) >= (8, 2)


def test_dev_says_that_an_environment_is_another_python_s(tmp_path: Path) -> None:
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text("#!/bin/sh\necho 2.7\n")
    python.chmod(0o755)
    shutil.copy(ROOT / "dev", tmp_path)
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run([tmp_path / "dev", "setup"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == f"error: .venv is Python 2.7; remove it to use {sys.executable}\n"


def test_dev_knows_its_commands() -> None:
    shown = subprocess.run([ROOT / "dev", "help"], capture_output=True, text=True, check=True).stdout
    for command in ("setup", "demo", "test", "check", "check-native", "bench"):
        assert re.search(rf"^  {command} ", shown, re.MULTILINE)
    wrong = subprocess.run([ROOT / "dev", "nonsense"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and "usage:" in wrong.stderr
    unknown = subprocess.run([ROOT / "dev", "bench", "nonsense"], capture_output=True, text=True, check=False)
    assert unknown.returncode == 2 and unknown.stderr.startswith("error: expected one of: ")


def test_continuous_integration_runs_the_readme_s_test_command() -> None:
    assert "./dev test" in README and "./dev demo" in README
    assert re.search(r"^\./dev test\b", read(".ci/run"), re.MULTILINE)
    assert all(os.access(ROOT / script, os.X_OK) for script in ("dev", ".ci/run"))


def test_the_commands_and_options_of_the_readme_exist() -> None:
    from bittern.cli import commands

    written = set(re.findall(r"\bbittern ([a-z]+)\b.*-", README)) - {"shrinks"}
    assert set(re.findall(r"^\| `bittern ([a-z]+)", README, re.MULTILINE)) == set(commands.commands)
    assert written <= set(commands.commands) | {"in"}
    options = {name for command in commands.commands.values() for param in command.params for name in param.opts}
    options |= {
        name for command in commands.commands.values() for param in command.params for name in param.secondary_opts
    }
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]+", README)) <= options | {"--help"}


def test_no_module_of_the_package_is_too_long() -> None:
    for name in tracked():
        if not name.startswith("bittern/") or not name.endswith(".py"):
            continue
        source = read(name)
        assert source.count("\n") <= 450, f"{name} is longer than a file here should be"
        assert ast.get_docstring(ast.parse(source)) or not source.strip(), f"{name} does not say what it is"


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")
