"""Builds the native runtime into the package; everything else is in pyproject.toml.

Without a C++ compiler the package installs all the same, and says at run time which fallback it uses. There is no build
for Windows, whose threads are others; macOS has one, whose idle threads sleep in steps, for want of a futex.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
# Set by ./dev where there is a compiler: there a failing build is an error.
REQUIRED = "BITTERN_REQUIRE_NATIVE"


def builder() -> ModuleType:
    """csrc/build.py, which belongs to no package."""
    spec = importlib.util.spec_from_file_location("bittern_csrc_build", CSRC / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildNative(build_ext):
    """A library behind a C interface: no Python headers, one file for every version of Python."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name))
        try:
            if sys.platform == "win32":
                raise OSError("there is no build for Windows")
            builder().build(output)
        except (OSError, subprocess.CalledProcessError) as error:
            output.unlink(missing_ok=True)
            if os.environ.get(REQUIRED):
                raise
            self.warn(f"no native runtime, bittern will compute with torch: {error}")

    def copy_extensions_to_source(self) -> None:
        # An editable install. Where nothing was built a library of older sources would be worse than none, and one that
        # a running process has mapped must not be written over.
        for ext in self.extensions:
            (ROOT / self.get_ext_filename(ext.name)).unlink(missing_ok=True)
        super().copy_extensions_to_source()

    def get_outputs(self) -> list[str]:
        return [name for name in super().get_outputs() if Path(name).exists()]


class Wheel(bdist_wheel):
    """One wheel a platform, not one a version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("bittern.runtime.libbittern", [], optional=True)],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
)
