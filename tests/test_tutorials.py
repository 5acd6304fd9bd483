"""Scripts of docs/tutorials: titles, links and configuration words; and, slowly, whole runs."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
from conftest import CONFIGS, ROOT, compose_list

DOCS = ROOT / "docs"
TUTORIALS = DOCS / "tutorials"
SCRIPTS = sorted(TUTORIALS.glob("[0-9]*.py"))
EACH = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)

KEY = r"\+{0,2}[a-z_]+(?:[./]\w+)*"
WORD = re.compile(rf"{KEY}=\S+")
LITERAL = re.compile(r"``(.*?)``", re.DOTALL)
# Hydra's own, which test_launchers composes, and values that stand for the reader's.
ELSEWHERE = ("hydra", "data.root=...")


def prose(script) -> str:
    """Title and text blocks, without the marks of comments."""
    source = script.read_text()
    lines = [line[1:].removeprefix(" ") for line in source.splitlines() if line.startswith("#")]
    return (ast.get_docstring(ast.parse(source)) or "") + "\n\n" + "\n".join(lines)


def words_of_code(script) -> Iterator[str]:
    """Strings that are overrides; an f-string with a placeholder, where it is no choice."""
    tree = ast.parse(script.read_text())
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)
              for part in node.values}  # fmt: skip
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in inside
        ):
            if WORD.fullmatch(node.value):
                yield node.value
        elif isinstance(node, ast.JoinedStr):
            parts = [p.value if isinstance(p, ast.Constant) else "x" for p in node.values]
            word = "".join(map(str, parts))
            if WORD.fullmatch(word) and not (CONFIGS / word.partition("=")[0]).is_dir():
                yield word


def words_of_prose(script) -> Iterator[str]:
    """Overrides in literals and in commands."""
    text = prose(script)
    commands = re.findall(r"^ *python (?:train|sweep)\.py (.*)$", text, re.MULTILINE)
    for said in [*LITERAL.findall(text), *commands]:
        yield from (word for word in said.split() if WORD.fullmatch(word))


def single_values(words) -> list[str]:
    """Each word once for each value that a sweep would give it."""
    found: dict[str, None] = {}
    for word in words:
        key, _, value = word.partition("=")
        swept = value.split(",") if "[" not in value and "(" not in value else [value]
        found |= {f"{key}={each}": None for each in swept}
    return [word for word in found if not word.startswith(ELSEWHERE)]


def own_files(script) -> set[str]:
    """Choices of the YAML files that the script writes itself."""
    written = re.findall(r'"(\w+)/(\w+)\.yaml"', script.read_text())
    return {f"{group}={name}" for group, name in written}


def is_choice(word) -> bool:
    return (CONFIGS / word.partition("=")[0].strip("+")).is_dir()


def composes(*words: str) -> bool:
    try:
        return compose_list(list(words)) is not None
    except Exception:  # whatever Hydra makes of it
        return False


@EACH
def test_every_word_composes(script):
    code, said = (
        [word for word in single_values(words(script)) if word not in own_files(script)]
        for words in (words_of_code, words_of_prose)
    )
    choices = [word for word in [*code, *said] if is_choice(word)]
    # The script's own choices together, one of each group; else some value of the prose needs.
    own = list({word.partition("=")[0]: word for word in code if is_choice(word)}.values())
    assert choices and not [w for w in choices if not (composes(w) or composes(*own, w))]
    for word in [*code, *said]:
        tried = ([*own], [], *([*own, choice] for choice in choices), *([c] for c in choices))
        assert is_choice(word) or any(composes(*some, word) for some in tried), word


@EACH
def test_a_title_and_links_that_exist(script):
    source, text = script.read_text(), prose(script)
    title, underline, *_ = (ast.get_docstring(ast.parse(source)) or "").splitlines()
    assert title and set(underline) == {"="} and len(underline) >= len(title)
    compile(source, str(script), "exec")
    _, _, ending = text.rpartition("What next\n---------\n")
    assert ":doc:" in ending and source.rstrip().splitlines()[-1].startswith("#")
    for target in re.findall(r":doc:`(?:[^`<]*<)?([^`>]+)>?`", text):
        page = DOCS / target.removeprefix("/") if target.startswith("/") else TUTORIALS / target
        gallery = TUTORIALS / target.removeprefix("/gallery/")
        ends = [page.with_suffix(end) for end in (".md", ".rst", ".py")]
        assert any(end.exists() for end in [*ends, gallery.with_suffix(".py")]), target
    for named in re.findall(r"``(experiments/[\w-]+)", text):
        assert (ROOT / named).is_dir(), named


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One for all, as for a reader: those that train the same network share it."""
    return tmp_path_factory.mktemp("tutorials")


@pytest.mark.slow
@EACH
def test_it_runs(script, folder):
    quiet = {
        "MPLBACKEND": "Agg",
        "PYTHONWARNINGS": "ignore:FigureCanvasAgg",
        "OMP_NUM_THREADS": "1",
    }
    environment = {**os.environ, **quiet, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Warning" not in done.stdout + done.stderr
