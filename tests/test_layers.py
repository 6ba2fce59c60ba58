"""Imports go downward only: cli, serving, evaluation, models, linear, schemes, nn, engine, then leaves."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import cipherlm

SOURCE = Path(__file__).parent.parent / "src" / "cipherlm"
LAYERS = ["engine", "nn", "schemes", "linear", "models", "evaluation", "serving", "cli"]


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name: str) -> bool:
    path = SOURCE.parent.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def imports(source: str, module: str, is_package: bool = False) -> Iterator[str]:
    """Yield the modules of this package that ``source`` imports, wherever in the file it does so."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
            names = []
            for alias in node.names:
                full = f"{base}.{alias.name}"
                # A name that the package lends out lives in a layer of its own.
                lent = cipherlm._EXPORTS.get(alias.name) if base == "cipherlm" else None
                names.append(lent or (full if is_module(full) else base))
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == "cipherlm")


def layer(module: str) -> int:
    """Return a rank; the package itself, which has nothing but its version, and leaf utilities are lowest."""
    parts = module.split(".")
    return LAYERS.index(parts[1]) if len(parts) > 1 and parts[1] in LAYERS else -1


def scheme(module: str) -> str | None:
    parts = module.split(".")
    return parts[2] if len(parts) > 2 and parts[1] == "schemes" else None


def upward(module: str, imported: str) -> bool:
    if layer(module) < layer(imported):
        return True
    if layer(module) == -1:  # leaves import nothing of the package, not even each other
        return imported != "cipherlm"
    return None not in (scheme(module), scheme(imported)) and scheme(module) != scheme(imported)


def test_imports_go_downward():
    files = [path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py"]
    wrong = [
        f"{module_name(path)} imports {imported}"
        for path in files
        for imported in imports(path.read_text("utf-8"), module_name(path), path.name == "__init__.py")
        if upward(module_name(path), imported)
    ]
    assert files
    assert not wrong


@pytest.mark.parametrize(
    ("module", "source", "allowed"),
    [
        ("cipherlm.models.config", "from cipherlm.schemes.tfhe.circuit import DEFAULT_P_ERROR", True),
        ("cipherlm.schemes.tfhe.circuit", "from cipherlm.progress import Progress", True),
        ("cipherlm.cli.demo", "from cipherlm import get_encrypted_model, __version__", True),
        ("cipherlm.models.config", "from . import loading", True),
        ("cipherlm.schemes.tfhe.circuit", "def f():\n    import cipherlm.models.loading", False),
        ("cipherlm.schemes.tfhe.circuit", "from cipherlm import load_model", False),
        ("cipherlm.schemes.tfhe.circuit", "from ..ckks import layout", False),
        ("cipherlm.models.config", "from ..evaluation import agreement", False),
        ("cipherlm.progress", "import cipherlm.engine", False),
        ("cipherlm.engine.library", "from cipherlm.schemes import tfhe", False),
    ],
)
def test_the_check_itself(module, source, allowed):
    assert any(upward(module, imported) for imported in imports(source, module)) != allowed


def test_the_package_loads_no_heavy_library():
    heavy = "{'torch', 'transformers', 'concrete'}"
    code = f"import sys, cipherlm, cipherlm.progress; print(*{heavy} & {{*sys.modules}})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""


def test_exports():
    assert set(cipherlm.__all__) == set(cipherlm._EXPORTS)
    for name in cipherlm.__all__:
        assert getattr(cipherlm, name).__name__ == name
    assert set(cipherlm.__all__) <= set(dir(cipherlm))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = cipherlm.nothing


def test_version_is_the_distribution_s():
    text = (SOURCE.parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'^version = "(.+)"$', text, re.MULTILINE)
    assert found is not None
    assert cipherlm.__version__ == found[1]
