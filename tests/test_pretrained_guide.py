"""The guide's page on pretrained networks, word by word and offline."""

import re
from pathlib import Path

import pytest
import torch
from conftest import compose_list

pytest.importorskip("diffusers")

from test_network_pipeline import Foreign  # noqa: E402
from test_pretrained_command import of_digits  # noqa: E402

from bayesdiff.data.sources import digits  # noqa: E402
from bayesdiff.pipeline import prepare  # noqa: E402

PAGE = (Path(__file__).parents[1] / "docs" / "guide" / "pretrained.md").read_text(encoding="utf-8")


@pytest.fixture
def here(tmp_path, monkeypatch):
    of_digits().save_pretrained(tmp_path / "pipeline")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_its_lines_run_one_after_the_other(here):
    data = digits()
    torch.manual_seed(0)
    known = {
        "images": data.images[:200], "labels": data.labels[:200].tolist(),
        "my_network": Foreign().eval(),
    }  # fmt: skip
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block, "docs/guide/pretrained.md", "exec"), known)
    assert known["out"].images.shape == known["out"].variance.shape == (3, 1, 8, 8)
    assert len(list((here / "out" / "png").glob("*.png"))) == 6
    assert known["bayes"].posterior is not None


def test_its_commands_are_accepted(here):
    commands = re.findall(r"^    python (train|sweep)\.py (.*)$", PAGE, flags=re.MULTILINE)
    assert [name for name, _ in commands] == ["train", "sweep"]
    for name, words in commands:
        given = [word.split(",")[0] for word in words.split() if word != "-m"]
        if name == "train":
            prepare(compose_list([*given, f"output_dir={here / 'outputs'}"]))
        else:
            compose_list(given, "sweep")
