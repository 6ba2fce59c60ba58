"""README and docs: links lead somewhere, commands parse, names exist, and examples run."""

import ast
import importlib
import importlib.util
import re
import shlex
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

import cipherlm
from cipherlm.cli import VERBS, verb_parser

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted(DOCS.glob("*.md")),
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RUNNABLE = [ROOT / "README.md", DOCS / "engine.md", DOCS / "modules.md"]
"""Pages whose first Python example stands for itself."""


def blocks(page: Path, language: str) -> list[str]:
    return [code for kind, code in FENCE.findall(page.read_text("utf-8")) if kind == language]


def prose(page: Path) -> str:
    """Return a page without its fenced blocks."""
    return FENCE.sub("", page.read_text("utf-8"))


@cache
def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).lower() for title in titles]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in plain}


def script(path: Path) -> ModuleType:
    """Return a program outside of the package as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def by_name(page: Path) -> str:
    return page.name


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_links_lead_somewhere(page):
    text = prose(page)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    broken = []
    for link in links:
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", path):
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def commands(page: Path) -> Iterator[str]:
    """Yield the commands of a page's blocks, with continued lines joined and comments taken off."""
    for kind, code in FENCE.findall(page.read_text("utf-8")):
        if kind in ("", "bash", "sh"):
            for line in code.replace("\\\n", " ").splitlines():
                command = line.strip().removeprefix("$ ").split("  #")[0].strip()
                if command.startswith("cipherlm ") and not re.search(r"VERB|[|]|  |\.\.\.$", command):
                    yield command
    for line in prose(page).splitlines():
        if line.startswith("    cipherlm "):
            yield line.strip()


def test_commands_are_found():
    assert "cipherlm serve bundle/server" in commands(ROOT / "README.md")
    assert "cipherlm bench linear --geometry gpt2 --json" in commands(DOCS / "performance.md")
    assert len([command for page in PAGES for command in commands(page)]) > 100


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_commands_parse(page):
    for command in commands(page):
        _, verb, *arguments = shlex.split(command)
        verb_parser(verb).parse_args(arguments)  # exits, and says why, where the command is wrong


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_commands_in_sentences_name_verbs_and_options_that_exist(page):
    for span in re.findall(r"`(cipherlm [^`]+)`", prose(page)):
        verb, *words = span.split()[1:]
        assert verb in VERBS or verb in ("VERB", "--help"), span
        if verb in VERBS:
            known = verb_parser(verb).format_help() + _help_of_subcommands(verb, words)
            unknown = [word for word in words if word.startswith("--") and word not in known]
            assert not unknown, span


def _help_of_subcommands(verb: str, words: list[str]) -> str:
    if verb != "bench" or not words:
        return ""
    choices = next(action.choices for action in verb_parser(verb)._actions if action.dest == "benchmark")
    return choices[words[0]].format_help()


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=by_name)
def test_python_examples_name_what_exists(page):
    for code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "cipherlm":
                module = importlib.import_module(str(node.module))
                missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                assert not missing, f"{node.module} has no {', '.join(missing)}"


@pytest.mark.parametrize("page", RUNNABLE, ids=by_name)
def test_examples_run(page, capsys):
    """The first example of a page, simulated where it encrypts a model; the next test encrypts."""
    code = blocks(page, "python")[0]
    exec(compile(code.replace('"execute"', '"simulate"'), str(page), "exec"), {})
    if page == ROOT / "README.md":
        assert "The old man was a man of" in capsys.readouterr().out


@pytest.mark.slow
def test_the_example_of_the_readme_runs_on_ciphertexts(capsys):
    exec(compile(blocks(ROOT / "README.md", "python")[0], "README.md", "exec"), {})
    assert "The old man was a man of" in capsys.readouterr().out


def test_make_bench_measures_the_tables_of_the_readme():
    rows = set(script(ROOT / "benchmarks" / "run.py").ROWS.values())
    measured = set(re.findall(r"`cipherlm (bench [^`]+)` \|$", prose(ROOT / "README.md"), re.MULTILINE))
    assert measured
    assert measured <= rows


def test_tests_that_are_named_exist():
    """The claims of docs/security.md and others name the tests that back them."""
    sources = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "tests").rglob("*.go")]
    sources += [*(ROOT / "engine").rglob("*_test.go"), *(ROOT / "page" / "test").rglob("*.ts")]
    defined = {
        name for path in sources for name in re.findall(r"(?:def|func) (\w+)", path.read_text("utf-8"))
    }
    files = {path.name for path in sources}
    for page in PAGES:
        for span in re.findall(r"`([^`\n]+)`", prose(page)):
            for word in re.findall(r"[\w./]+", span):
                name = word.rpartition("::")[2].rpartition("/")[2]
                if re.fullmatch(r"test_\w+\.py|\w+_test\.go|\w+\.test\.ts", name):
                    assert name in files, f"{page.name}: {name}"
                elif re.fullmatch(r"test_\w+|Test[A-Z]\w+", name):
                    assert name in defined, f"{page.name}: {name}"


def test_files_that_are_named_exist():
    inside = [ROOT, ROOT / "src" / "cipherlm", DOCS]
    roots = "src|tests|engine|page|docs|examples|benchmarks|nn|schemes|models|serving|cli"
    for page in PAGES:
        named = re.findall(rf"`((?:{roots})/[\w./]+)`", prose(page))
        for path in (path for path in named if "NAME" not in path):
            assert any((root / path).exists() for root in inside), f"{page.name}: {path}"


def test_the_reference_of_the_command_line_is_up_to_date():
    assert (DOCS / "cli.md").read_text("utf-8") == script(DOCS / "reference.py").page(), (
        "run: python docs/reference.py"
    )


def test_pictures_are_those_that_the_script_draws():
    for name, drawing in script(DOCS / "pictures.py").pictures():
        assert (DOCS / "images" / f"{name}.svg").read_text("utf-8") == str(drawing), (
            "run: python docs/pictures.py"
        )


@pytest.mark.parametrize("picture", sorted((DOCS / "images").glob("*.svg")), ids=by_name)
def test_pictures_are_svg_without_anything_from_elsewhere(picture):
    root = ElementTree.fromstring(picture.read_text("utf-8"))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.find("{http://www.w3.org/2000/svg}title") is not None
    assert "href" not in picture.read_text("utf-8")


def test_all_places_have_the_same_version():
    version = cipherlm.__version__
    assert f'\nversion = "{version}"\n' in (ROOT / "pyproject.toml").read_text("utf-8")
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text("utf-8")
    changes = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert re.findall(r"^## \[([\d.]+)\] - \d{4}-\d\d-\d\d$", changes, re.MULTILINE)[0] == version
