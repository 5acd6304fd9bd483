"""Rules of the repository that no linter knows: layers, sizes, docstrings, equal lists."""

import ast
import importlib.util
import re
import subprocess
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from hydra.utils import get_object
from omegaconf import OmegaConf

import bayesdiff

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "bayesdiff"
SOURCES = sorted(PACKAGE.rglob("*.py"))
LAYERS = (
    "checks machine options storage cli data paths likelihoods networks models laplace solvers "
    "uncertainty metrics report pretrained runs studies pipeline sweeps commands"
).split()
LOOSE = {"__init__", "checks", "cli", "pipeline"}


def test_everything_else_has_a_room():
    assert {path.stem for path in PACKAGE.glob("*.py")} == LOOSE


def name_of(source: Path) -> str:
    return source.relative_to(ROOT).as_posix()


def docstring(node: ast.AST) -> str:
    return ast.get_docstring(node, clean=False) or ""


@cache
def parse(source: Path) -> ast.Module:
    return ast.parse(source.read_text(encoding="utf-8"))


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def imported(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything ``tree`` imports, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            relative = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(relative, package) if node.level else relative
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def violations(tree: ast.AST, module: str) -> list[str]:
    """Imports of ``module`` (``bayesdiff.layer...``) from a layer after its own."""
    own = LAYERS.index(module.split(".")[1])
    found = []
    for line, name in imported(tree, module.rpartition(".")[0]):
        parts = name.split(".")
        if parts[0] == "bayesdiff" and len(parts) > 1 and parts[1] in LAYERS[own + 1 :]:
            found.append(f"line {line}: {module} imports {name}")
    return found


def test_a_layer_imports_only_from_those_above():
    found = []
    for source in SOURCES:
        module = ".".join(source.relative_to(ROOT).with_suffix("").parts)
        if module == "bayesdiff.__init__":
            names = [name for _, name in imported(parse(source), "bayesdiff")]
            found += [f"{module} imports {n}" for n in names if n.startswith("bayesdiff")]
        elif module.split(".")[1] not in LAYERS:
            found.append(f"{module} belongs to no layer")
        else:
            found += violations(parse(source), module)
    assert found == []


def test_the_picture_of_the_packages_is_the_list_of_layers():
    picture = (ROOT / "docs" / "extend" / "packages.svg").read_text(encoding="utf-8")
    assert re.findall(r'class="name">(\w+)<', picture) == LAYERS


def test_what_a_contributor_is_shown_is_there():
    shown = ROOT / ".github"
    for page in shown.glob("*.md"):
        for link in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            assert (shown / link).exists(), (page.name, link)
    asked = OmegaConf.load(shown / "ISSUE_TEMPLATE" / "bug.yml").body
    assert {"command", "error", "expected", "log", "config", "versions", "machine"} == {
        part.id for part in asked
    }
    guide = ROOT / "docs" / "extend" / "contributing.md"
    for name in re.findall(r"`(test_\w+\.py)`", guide.read_text(encoding="utf-8")):
        assert (ROOT / "tests" / name).is_file(), name


@pytest.mark.parametrize(
    "code",
    [
        "from bayesdiff.report.table import show",
        "import bayesdiff.report.table",
        "from bayesdiff import report",
        "from ..report import table",
        "def late():\n    from bayesdiff.pipeline import run",
    ],
)
def test_the_import_rule_can_fail(code):
    assert len(violations(ast.parse(code), "bayesdiff.solvers.euler")) == 1
    assert violations(ast.parse("from bayesdiff.laplace.x import y"), "bayesdiff.solvers.e") == []


def writes_to_stdout(tree: ast.AST) -> list[int]:
    """Lines that call ``print`` or make a console that is not on standard error."""
    lines = []
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else None
        name = node.func.id if isinstance(node.func, ast.Name) else name
        # Progress goes to standard error, which leaves a piped table as it is.
        stderr = any(word.arg == "stderr" for word in node.keywords)
        if name == "print" and isinstance(node.func, ast.Name) or name == "Console" and not stderr:
            lines.append(node.lineno)
    return lines


def test_only_the_table_writes_to_standard_output():
    found = {name_of(source): writes_to_stdout(parse(source)) for source in SOURCES}
    assert {name for name, lines in found.items() if lines} <= {"bayesdiff/report/table.py"}
    assert writes_to_stdout(ast.parse("print(1)\nConsole()\nConsole(stderr=True)")) == [1, 2]


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def too_long(source: Path) -> Iterator[str]:
    """What has too many lines: the file, and functions without their docstrings."""
    lines = len(source.read_text(encoding="utf-8").splitlines())
    if lines > 300:
        yield f"{name_of(source)} has {lines} lines"
    for node in (node for node in ast.walk(parse(source)) if isinstance(node, FUNCTIONS)):
        length = node.end_lineno - node.lineno + 1 - len(docstring(node).splitlines())
        if length > 45:
            yield f"{name_of(source)}: {node.name} has {length} lines"


def test_files_and_functions_stay_small():
    assert [each for source in SOURCES for each in too_long(source)] == []


def test_public_functions_and_classes_have_docstrings():
    bare = [
        f"{name_of(source)}: {node.name}"
        for source in SOURCES
        for node in parse(source).body
        if isinstance(node, (*FUNCTIONS, ast.ClassDef))
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert bare == []


def test_no_file_names_a_machine_path():
    # The groups keep this very line from matching.
    machine = re.compile(r"(?<![\w.])/(?:home|root|Users|work|mnt|scratch)/\w")
    made = {".git", ".venv", "outputs", "build", "dist"}
    cache = re.compile(
        r"__pycache__|\.\w+_cache|\.hypothesis|\.egg-info|\.coverage|^docs/(_build|gallery)/"
    )
    binary = {".png", ".pdf", ".npz", ".safetensors", ".ckpt", ".zip"}
    found = []
    for top in (path for path in ROOT.iterdir() if path.name not in made):
        for path in [top, *top.rglob("*")]:
            if path.suffix in binary or cache.search(name_of(path)) or not path.is_file():
                continue
            if machine.search(path.read_text(encoding="utf-8", errors="replace")):
                found.append(name_of(path))
    assert found == []


def test_environment_lists_what_pyproject_lists():
    wanted = project()["dependencies"] + project()["optional-dependencies"]["dev"]
    conda, pip = [], []
    for entry in OmegaConf.to_container(OmegaConf.load(ROOT / "environment.yml"))["dependencies"]:
        pip, conda = (entry["pip"], conda) if isinstance(entry, dict) else (pip, [*conda, entry])
    assert pip == wanted
    assert conda == [f"python{project()['requires-python']}", "pip"]


def test_the_version_is_the_same_everywhere():
    citation = OmegaConf.load(ROOT / "CITATION.cff")
    assert str(citation.version) == project()["version"] == bayesdiff.__version__
    assert citation.license == project()["license"]
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").startswith(f"{citation.license} License")


def make_rules() -> str:
    return (ROOT / "Makefile").read_text(encoding="utf-8")


def test_help_lists_every_target():
    targets = set(re.findall(r"^([a-z][\w-]*):", make_rules(), re.MULTILINE))
    phony = set(re.search(r"^\.PHONY: (.*)$", make_rules(), re.MULTILINE)[1].split())
    assert targets == phony >= set("help setup demo test test-slow lint bench tensorboard".split())
    for command in (["make"], ["make", "help"]):
        shown = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        assert set(re.findall(r"^ +make ([\w-]+) +\S", shown, re.MULTILINE)) == targets


def test_a_second_setup_costs_nothing(tmp_path):
    """With a fresh stamp `make setup` runs nothing; an edited pyproject.toml runs pip again."""
    for name in ("Makefile", "pyproject.toml"):
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")

    def plan() -> str:
        command = ["make", "--dry-run", "setup", "PYTHON=python3.99"]
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout

    assert "python3.99 -m venv .venv" in plan() and "pip install" in plan()
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".ready").touch()
    assert "pip install" not in plan()


def test_continuous_integration_runs_the_linters_and_the_tests():
    script = ROOT / ".ci" / "run"
    lines = script.read_text(encoding="utf-8").splitlines()
    assert script.stat().st_mode & 0o111
    assert "set -euo pipefail" in lines
    assert [line for line in lines if line.startswith("make")] == ["make lint", "make test"]


def test_full_names_in_texts_are_there():
    """What a space says draws and scores it: no import shows these, and no linter sees them."""
    texts = {
        node.value
        for source in SOURCES
        for node in ast.walk(parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    named = {text for text in texts if re.fullmatch(r"bayesdiff(\.\w+)+", text)}
    assert {"bayesdiff.runs.scores.PointScores", "bayesdiff.report.plane.PlaneFigures"} <= named
    assert all(get_object(name) for name in named)
