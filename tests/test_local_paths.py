"""One option, one place: every path is expanded once, and what is no local path is refused."""

import re
from pathlib import Path

import pytest
from conftest import compose_list, smallest
from omegaconf import OmegaConf

from bayesdiff import pipeline
from bayesdiff.checks import UserError
from bayesdiff.options.local_paths import settle
from bayesdiff.sweeps.plan.cells import look


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder of the test's own, and another folder to work in."""
    place = tmp_path / "home"
    place.mkdir()
    monkeypatch.setenv("HOME", str(place))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return place


def test_every_text_that_names_the_home_is_expanded_once(home: Path):
    cfg = OmegaConf.create(
        {
            "output_dir": "~/runs",
            "run_dir": None,
            "data": {"root": "~", "source": {"root": "${data.root}"}},
            "uncertainty": {"members": ["~/a/*.ckpt", "b~/c", 3]},
            "metrics": {"weights_path": "~/w.pt"},
            "filtering": {"encoders": {"clip": "~/clip.pt", "untrained": None}},
            "corruption": "~",
        }
    )
    OmegaConf.set_struct(cfg, True)
    settle(cfg)
    once = OmegaConf.to_container(cfg, resolve=True)
    assert once == {
        "output_dir": f"{home}/runs",
        "run_dir": None,
        "data": {"root": str(home), "source": {"root": str(home)}},
        "uncertainty": {"members": [f"{home}/a/*.ckpt", "b~/c", 3]},
        "metrics": {"weights_path": f"{home}/w.pt"},
        "filtering": {"encoders": {"clip": f"{home}/clip.pt", "untrained": None}},
        "corruption": str(home),
    }
    settle(cfg)
    assert OmegaConf.to_container(cfg, resolve=True) == once


def test_a_run_below_the_home_leaves_all_of_it_there(home: Path):
    result = pipeline.run(
        compose_list(smallest(Path("x"), "output_dir='~/x'", "metrics.num_images=0"))
    )
    assert result.folder.is_relative_to(home / "x")
    assert (result.folder.parent / "checkpoints" / "last.ckpt").is_file()
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("output_dir=", "output_dir= is empty"),
        ("run_dir=''", "run_dir= is empty"),
        ("ckpt_path=' '", "ckpt_path= is empty"),
        ("++data.root=''", "data.root= is empty"),
        ("metrics.weights_path=''", "metrics.weights_path= is empty"),
        ("output_dir=s3://bucket/x", "output_dir=s3://bucket/x is an address"),
        ("run_dir=gs://bucket", "run_dir=gs://bucket is an address"),
        ("++data.root=hdfs://a/b", "data.root=hdfs://a/b is an address"),
        ('output_dir="a\0b"', "NUL character"),
        ("output_dir='~nobody-here/x'", "the home of nobody"),
        ("output_dir=file/below", "file is a file; choose a folder"),
        ("run_dir=file", "file is a file; choose a folder"),
    ],
)
def test_what_is_no_local_path_is_refused_before_any_work(option: str, says: str, home: Path):
    Path("file").write_text("")
    cfg = compose_list(smallest(Path("out"), option))
    with pytest.raises(UserError, match=re.escape(says)):
        pipeline.prepare(cfg)
    assert says in look([], cfg).error
    assert [path.name for path in Path.cwd().iterdir()] == ["file"]


def test_an_address_elsewhere_is_nobodys_business(home: Path):
    """Loggers talk to servers."""
    cfg = OmegaConf.create(
        {"output_dir": "x", "logger": {"save_dir": "http://here", "uri": "a://b"}}
    )
    settle(cfg)
    assert cfg.logger.save_dir == "http://here"
