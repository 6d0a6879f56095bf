"""The native library as it is built, installed, packed and refused."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from bittern.errors import BitternError
from bittern.runtime import native

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = "bittern/runtime/libbittern.so"
COMPILER = shutil.which(os.environ.get("CXX", "c++").split()[0])
# Writes an empty file where a compiler would write its result.
STAND_IN = """#!/bin/sh
while [ "$1" != -o ]; do shift; done
: >"$2"
"""
BACKEND = "import sys, setuptools.build_meta as backend; getattr(backend, sys.argv[1])(sys.argv[2])"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what the package is built from, without what a build left in it."""
    pytest.importorskip("setuptools", "80", reason="building a wheel needs setuptools >= 80")
    folder = tmp_path / "source"
    leftovers = shutil.ignore_patterns("__pycache__", "*.so", "*.safetensors")
    for name in ("bittern", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=leftovers)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Where the native library is looked for, in this test alone."""
    path = tmp_path / "libbittern.so"
    monkeypatch.setattr(native, "LIBRARY", path)
    native._load.cache_clear()
    yield path
    native._load.cache_clear()


def surroundings(compiler: str, **variables: str) -> dict[str, str]:
    """The environment of a build, whatever this one asks of builds."""
    kept = {name: value for name, value in os.environ.items() if name != "BITTERN_REQUIRE_NATIVE"}
    return {**kept, "CXX": compiler, **variables}


def build(source: Path, kind: str, compiler: str, **variables: str) -> tuple[Path, str]:
    """A wheel or an sdist, and what was said meanwhile."""
    output = source.parent / "dist"
    output.mkdir(exist_ok=True)
    environment = surroundings(compiler, **variables)
    command = [sys.executable, "-c", BACKEND, f"build_{kind}", str(output)]
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (made,) = output.iterdir()
    return made, done.stderr


def stand_in(folder: Path) -> str:
    path = folder / "stand-in"
    path.write_text(STAND_IN)
    path.chmod(0o755)
    return str(path)


def run_build_script(output: Path, compiler: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "csrc" / "build.py"), str(output)]
    environment = surroundings(compiler)
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler: bittern computes with torch here")
def test_where_there_is_a_compiler_there_is_a_library() -> None:
    assert native.why_not() == ""
    assert native.available()
    assert native.library().bt_abi() == native.ABI


def test_a_wheel_fits_every_python_of_its_platform(source: Path) -> None:
    wheel, _ = build(source, "wheel", stand_in(source.parent))
    name, _, python, abi, platform = wheel.stem.split("-")
    assert (name, python, abi) == ("bittern", "py3", "none")
    assert platform != "any"
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if "libbittern" in name] == [LIBRARY]
    assert not [name for name in names if name.startswith("csrc")]


def test_without_a_compiler_the_package_is_built_all_the_same(source: Path) -> None:
    wheel, said = build(source, "wheel", "/nonexistent/c++")
    assert "no native runtime, bittern will compute with torch: " in said
    assert "/nonexistent/c++" in said
    names = zipfile.ZipFile(wheel).namelist()
    assert "bittern/runtime/native.py" in names
    assert not [name for name in names if "libbittern" in name]
    assert not list(source.rglob("*.so"))


def test_a_source_distribution_has_the_sources(source: Path) -> None:
    (source / "csrc" / "__pycache__").mkdir()
    (source / "csrc" / "__pycache__" / "build.cpython-311.pyc").touch()
    archive, _ = build(source, "sdist", "/nonexistent/c++")
    with tarfile.open(archive) as tar:
        names = {Path(*Path(name).parts[1:]).as_posix() for name in tar.getnames()}
    wanted = {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir() if path.suffix in (".cpp", ".h", ".py")}
    assert wanted <= names
    assert {"setup.py", "pyproject.toml"} <= names
    assert not [name for name in names if name.endswith((".pyc", ".so"))]


def test_an_editable_install_leaves_no_library_of_older_sources(source: Path) -> None:
    def install(compiler: str, **variables: str) -> subprocess.CompletedProcess[str]:
        (source.parent / "dist").mkdir(exist_ok=True)
        command = [sys.executable, "-c", BACKEND, "build_editable", str(source.parent / "dist")]
        environment = surroundings(compiler, **variables)
        return subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=False)

    assert install(stand_in(source.parent)).returncode == 0
    assert (source / LIBRARY).exists()
    assert install("/nonexistent/c++").returncode == 0
    assert not (source / LIBRARY).exists()
    # As ./dev installs where there is a compiler.
    failed = install("false", BITTERN_REQUIRE_NATIVE="1")
    assert failed.returncode != 0 and "non-zero exit status 1" in failed.stderr


def test_every_source_is_compiled_and_every_file_has_a_machine() -> None:
    spec = importlib.util.spec_from_file_location("bittern_csrc_build", ROOT / "csrc" / "build.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    named = {name for sources in script.SOURCES.values() for name in sources}
    assert named == {path.name for path in (ROOT / "csrc").glob("*.cpp")} - {"check.cpp"}
    for name, flags in script.ANY.items():
        assert flags == (), f"{name} runs on every machine and may need no instruction set"


def test_a_failing_build_leaves_nothing_behind(tmp_path: Path) -> None:
    output = tmp_path / "library" / "libbittern.so"
    for compiler, said in (("/nonexistent/c++", "No such file"), ("false", "non-zero exit status 1")):
        failed = run_build_script(output, compiler)
        assert failed.returncode == 1
        assert failed.stderr.startswith("error: ") and said in failed.stderr
        assert not list(tmp_path.rglob("*.so*"))


def test_a_library_that_is_being_replaced_stays_whole(tmp_path: Path) -> None:
    output = tmp_path / "libbittern.so"
    output.write_text("in use")
    with output.open() as opened:
        assert run_build_script(output, stand_in(tmp_path)).returncode == 0
        assert opened.read() == "in use"
    assert output.read_text() == ""
    assert {path.name for path in tmp_path.iterdir()} == {"libbittern.so", "stand-in"}


def test_a_missing_library_says_why(library: Path) -> None:
    assert not native.available()
    assert "not built when bittern was installed" in native.why_not()
    with pytest.raises(BitternError, match=r"^native runtime: it was not built"):
        native.library()


def test_a_broken_library_says_why(library: Path) -> None:
    library.write_text("no library")
    assert not native.available()
    assert str(library) in native.why_not()


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_a_library_of_another_version_is_refused(library: Path, tmp_path: Path) -> None:
    source = tmp_path / "other.cpp"
    source.write_text('extern "C" int bt_abi() { return 99; }\n')
    subprocess.run([str(COMPILER), "-shared", "-fPIC", source, "-o", library], check=True)
    assert not native.available()
    assert native.why_not() == f"{library} has interface 99, expected {native.ABI}; install bittern again"
