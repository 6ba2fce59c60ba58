"""Build every mutant of the engine and see that the tests of its encryption fail on it.

Example: python tests/mutants/run.py --only fresh-no-error

A mutant is a patch of the engine, of Lattigo or of sessions, in this directory. It computes right results, or
nearly right ones; what it breaks is what hides them, or bounds their error. The first lines say what that is
and which tests must notice: a file of tests/encryption, or a test of engine/core where its name begins with
Test.

Engine, package and Lattigo are copied to a scratch directory; the tree is never touched. It is an error if a
patch does not apply, if a mutant does not build, or if a test fails on the engine as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LIBRARY = "github.com/tuneinsight/lattigo/v6"
TESTS = "tests/encryption"
PYTEST = ["-m", "not slow", "-x", "-q", "--tb=line", "-p", "no:cacheprovider"]


class MutantError(Exception):
    """A mutant that is neither killed nor alive."""


@dataclass(frozen=True)
class Mutant:
    """A patch, with what its first lines say."""

    name: str
    breaks: str
    tests: str
    patch: Path

    @classmethod
    def read(cls, patch: Path) -> Mutant:
        head = dict(re.findall(r"^(Breaks|Tests): (.+)$", patch.read_text(), re.MULTILINE))
        return cls(patch.stem, head["Breaks"], head["Tests"], patch)


class Scratch:
    """A copy of what the engine is built of and tested with."""

    def __init__(self, root: Path) -> None:
        self.root = root
        ignored = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
        for name in ("engine", "src", TESTS):
            shutil.copytree(ROOT / name, root / name, ignore=ignored)
        files = (
            "pyproject.toml",
            "setup.py",
            "README.md",
            "LICENSE",
            "tests/conftest.py",
            "tests/scratch.py",
        )
        for name in files:
            shutil.copy(ROOT / name, root / name)
        self.environment = os.environ | {
            # Go may be one that was installed beside Python.
            "PATH": os.pathsep.join([os.environ["PATH"], str(Path(sys.executable).parent)]),
            "PYTHONPATH": str(root / "src"),
            "GIT_CEILING_DIRECTORIES": str(root.parent),
            "COLUMNS": "500",  # pytest cuts off what is wider
        }
        library = json.loads(self._run(["go", "mod", "download", "-json", LIBRARY], "engine"))["Dir"]
        shutil.copytree(library, root / "lattigo", copy_function=shutil.copyfile)
        for path in [root / "lattigo", *(root / "lattigo").rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)  # Go's own copies cannot be written
        self._run(["go", "mod", "edit", f"-replace={LIBRARY}=../lattigo"], "engine")

    def _try(self, command: list[str], directory: str = ".") -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(
                command,
                cwd=self.root / directory,
                env=self.environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                check=False,
            )
        except FileNotFoundError as error:
            raise MutantError(f"{command[0]} is not on the PATH") from error

    def _run(self, command: list[str], directory: str = ".") -> str:
        done = self._try(command, directory)
        if done.returncode:
            raise MutantError(f"{' '.join(command)}\n{done.stdout[-3000:]}")
        return done.stdout

    def apply(self, mutant: Mutant, *options: str) -> None:
        self._run(["git", "apply", *options, str(mutant.patch)])

    def build(self) -> None:
        self._run([sys.executable, "setup.py", "build_ext", "--inplace"])

    def test(self, tests: str) -> str | None:
        """Return the name of a test that fails, or nothing where all pass."""
        if tests.startswith("Test"):
            command, directory = ["go", "test", "-run", f"^({tests})$", "./core"], "engine"
            pattern = r"^--- FAIL: (\w+)"
        else:
            command, directory = [sys.executable, "-m", "pytest", *PYTEST, tests], "."
            pattern = r"^(?:FAILED|ERROR) \S*::(\S+) - (?:AssertionError|assert)"  # fixtures assert, too
        done = self._try(command, directory)
        if done.returncode == 0:
            return None
        failed = re.search(pattern, done.stdout, re.MULTILINE)
        if done.returncode != 1 or failed is None:
            raise MutantError(f"tests neither pass nor fail:\n{done.stdout[-3000:]}")
        return failed[1]

    def killer(self, mutant: Mutant) -> str | None:
        """Return the test that fails on a mutant, if one does."""
        self.apply(mutant)
        try:
            if mutant.tests.startswith("Test"):
                return self.test(mutant.tests)
            self.build()
            return self.test(f"{TESTS}/{mutant.tests}")
        finally:
            self.apply(mutant, "--reverse")


def main() -> int:
    description, example, _ = __doc__.split("\n\n", 2)
    parser = argparse.ArgumentParser(description=description, epilog=example)
    parser.add_argument("--only", metavar="NAME", action="append", help="this mutant; may be given again")
    parser.add_argument("--list", action="store_true", help="print the mutants and build none")
    options = parser.parse_args()
    mutants = {patch.stem: Mutant.read(patch) for patch in sorted(HERE.glob("*.patch"))}
    if unknown := set(options.only or ()) - set(mutants):
        parser.error(f"no mutant is called {', '.join(sorted(unknown))}; --list prints the names")
    chosen = [mutants[name] for name in options.only or mutants]
    width = max(len(mutant.name) for mutant in chosen)
    if options.list:
        for mutant in chosen:
            print(f"{mutant.name:{width}}  {mutant.breaks}")
        return 0
    alive = 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as directory:
        print(f"{len(chosen)} mutants; first the engine as it is", flush=True)
        scratch = Scratch(Path(directory))
        scratch.build()
        for tests in {TESTS, *(mutant.tests for mutant in chosen if mutant.tests.startswith("Test"))}:
            if failed := scratch.test(tests):
                raise MutantError(f"{failed} fails on the engine as it is")
        for number, mutant in enumerate(chosen, 1):
            start = time.monotonic()
            try:
                killer = scratch.killer(mutant)
                verdict = f"killed by {killer}" if killer else f"ALIVE: {mutant.breaks}"
            except MutantError as error:
                killer, verdict = None, f"ERROR: {error}"
            alive += killer is None
            seconds = time.monotonic() - start
            print(f"{number:3}/{len(chosen)}  {seconds:3.0f} s  {mutant.name:{width}}  {verdict}", flush=True)
    print(f"{len(chosen) - alive} of {len(chosen)} mutants killed")
    return 1 if alive else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MutantError as problem:
        sys.exit(f"mutants: {problem}")
