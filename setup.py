"""Builds the engine, a Go program with a C ABI, into the package, and the web page where there is Node.js."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import BaseError

ENGINE = Path(__file__).resolve().parent / "engine"
PAGE = Path(__file__).resolve().parent / "page"
LIBRARY = "cipherlm.engine._lattigo"


class BuildEngine(build_ext):
    """Runs ``go build`` where setuptools would run a C compiler."""

    def build_extension(self, ext: Extension) -> None:
        """Build the shared library."""
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        environment = {
            **os.environ,
            "CGO_ENABLED": "1",
            "CC": c_compiler(),
            "GOFLAGS": "-trimpath -buildvcs=false -mod=readonly",
            "GOTOOLCHAIN": "local",
        }
        command = [go(), "build", "-buildmode=c-shared", "-ldflags=-s -w", "-o", str(target), "."]
        print("engine:", shlex.join(command), flush=True)
        if subprocess.run(command, cwd=ENGINE, env=environment, check=False).returncode:
            raise BaseError("the engine did not build: see the messages of `go build` above")
        target.with_suffix(".h").unlink(missing_ok=True)

    def get_ext_filename(self, fullname: str) -> str:
        """Return the library's name: not tied to a version of Python."""
        return os.path.join(*fullname.split(".")) + ".so"


class BuildPage(build_py):
    """Builds the web page before its files are looked for. Without it the package works, but for the page."""

    def run(self) -> None:
        """Build the page, then what setuptools builds."""
        if subprocess.run([sys.executable, str(PAGE / "build.py")], check=False).returncode:
            print(
                "page: CipherLM is installed without its web page (cipherlm page, cipherlm serve --page): "
                "see the line above",
                file=sys.stderr,
                flush=True,
            )
        super().run()


class EngineWheel(bdist_wheel):
    """A wheel for every Python 3 on one platform: the library is loaded with ctypes."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the wheel's tag."""
        return "py3", "none", super().get_tag()[2]


def go() -> str:
    """Return the Go command."""
    found = shutil.which("go")
    if found is None:
        raise BaseError(
            "no Go toolchain: install Go 1.24 or later, or build with isolation to have one brought"
        )
    return found


def c_compiler() -> str:
    """Return the C compiler that cgo is to use."""
    for name in filter(None, (os.environ.get("CC"), "cc", "gcc", "clang")):
        if shutil.which(shlex.split(name)[0]):
            return name
    hint = "xcode-select --install" if sys.platform == "darwin" else "apt-get install gcc libc6-dev"
    raise BaseError(f"no C compiler, which the engine needs to be built: install one ({hint})")


setup(
    ext_modules=[Extension(LIBRARY, sources=[])],
    cmdclass={"build_ext": BuildEngine, "build_py": BuildPage, "bdist_wheel": EngineWheel},
)
