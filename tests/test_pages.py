"""What the pages on concepts, on questions and on moving show as code runs or is accepted."""

import re

import pytest
import torch
from conftest import ROOT, compose_list

DOCS = ROOT / "docs"
PAGES = [*sorted((DOCS / "concepts").glob("*.md")), DOCS / "questions.md", DOCS / "moving.md"]
EXAMPLES = [
    pytest.param(block, id=f"{page.stem}-{place}")
    for page in PAGES
    for place, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]
SHOWN = "\n".join(
    re.findall(r"```sh\n(.*?)```", "\n".join(p.read_text() for p in PAGES), re.DOTALL)
)
COMMANDS = sorted(
    set(re.findall(r"^python (train|sweep)\.py (.+)$", SHOWN.replace("\\\n", " "), re.M))
)


@pytest.fixture(autouse=True)
def default_dtype():
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("block", EXAMPLES)
def test_example_runs_and_its_claims_hold(block, tmp_path, monkeypatch):
    if "diffusers" in block:
        pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "example", "exec"), {})


@pytest.mark.parametrize(("script", "words"), COMMANDS, ids=str)
def test_command_is_one_that_hydra_accepts(script, words):
    given = [word for word in words.split("#")[0].split() if word != "-m"]
    if script == "sweep":
        given = [word.split(",")[0] for word in given]
    compose_list(given, script)


def test_there_are_examples_and_commands():
    assert len(EXAMPLES) >= 6 and len(COMMANDS) >= 10
