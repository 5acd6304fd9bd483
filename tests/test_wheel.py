"""The package away from its checkout: what is in it, where it looks, and a run from elsewhere."""

import importlib
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import CONFIGS, ROOT, SMALLEST

from bayesdiff.commands.start import options_first, with_own_configs
from bayesdiff.options import config_folders
from bayesdiff.options.config_folders import own_configs, shipped_configs

SOURCES = "bayesdiff configs hydra_plugins".split()


def packaged(monkeypatch) -> set[str]:
    """Files that setuptools puts into a wheel, as they are called in the checkout."""
    pytest.importorskip("setuptools", "77")
    from distutils.core import run_setup

    monkeypatch.chdir(ROOT)
    command = run_setup("setup.py", stop_after="init").get_command_obj("build_py")
    command.ensure_finalized()
    command.manifest_files = {}  # else it would write an egg-info here
    modules = {Path(path) for _, _, path in command.find_all_modules()}
    found = {
        Path(file)
        for package in command.packages
        for file in command.find_data_files(package, command.get_package_dir(package))
    }
    return {path.as_posix() for path in modules | found}


def test_a_wheel_has_every_module_and_every_configuration_but_this_machines_own(monkeypatch):
    there = {
        path.relative_to(ROOT).as_posix()
        for source in SOURCES
        for pattern in ("*.py", "*.yaml", ".gitkeep")
        for path in (ROOT / source).rglob(pattern)
        if path.parent != CONFIGS / "local" or path.suffix != ".yaml"
    }
    assert packaged(monkeypatch) == there
    assert {"configs/train.yaml", "configs/solver/euler.yaml", "configs/local/.gitkeep"} <= there


def test_nothing_else_lies_among_the_modules():
    """A file that the package reads would have to be named in setup.py."""
    odd = [p for p in (ROOT / "bayesdiff").rglob("*") if p.is_file() and p.suffix != ".py"]
    assert [path for path in odd if path.parent.name != "__pycache__"] == []


def test_commands_are_functions():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(project["scripts"]) == {"bayesdiff-train", "bayesdiff-sweep"}
    for target in project["scripts"].values():
        module, _, name = target.partition(":")
        assert callable(getattr(importlib.import_module(module), name))


def test_configurations_are_inside_an_installed_package_and_beside_one_in_a_checkout(
    tmp_path, monkeypatch
):
    assert shipped_configs() == CONFIGS
    monkeypatch.setattr(config_folders, "_PACKAGE", tmp_path / "bayesdiff")
    assert shipped_configs.__wrapped__() == tmp_path / "configs"
    (tmp_path / "bayesdiff" / "configs").mkdir(parents=True)
    assert shipped_configs.__wrapped__() == tmp_path / "bayesdiff" / "configs"


def test_a_folder_configs_where_a_command_runs_is_the_users_own(tmp_path, monkeypatch):
    words = ["train.py", "-m", "seed=1"]
    monkeypatch.chdir(tmp_path)
    assert own_configs() is None and with_own_configs(words) == words
    (tmp_path / "configs").mkdir()
    own = str(tmp_path.resolve() / "configs")
    assert with_own_configs(words) == ["train.py", "--config-dir", own, "-m", "seed=1"]
    for given in (["--config-dir", "mine"], ["--config-dir=mine"], ["-cd", "mine"]):
        assert with_own_configs([*words, *given]) == [*words, *given]
    monkeypatch.chdir(ROOT)
    assert own_configs() is None and with_own_configs(words) == words


@pytest.mark.parametrize(
    ("typed", "sorted_"),
    [
        ("a=1 --config-dir mine b=2 -m", "--config-dir mine -m a=1 b=2"),
        ("a=1 -cd mine ~b", "-cd mine a=1 ~b"),
        ("a=1 --cfg job", "--cfg job a=1"),
        ("--info config a=1", "--info config a=1"),
        ("a=1 --info b=2", "--info a=1 b=2"),
        ("a=1 --config-dir=mine b=2", "--config-dir=mine a=1 b=2"),
    ],
)
def test_options_may_stand_anywhere(typed, sorted_):
    assert options_first(["train.py", *typed.split()]) == ["train.py", *sorted_.split()]


def test_compose_takes_it_too(tmp_path, monkeypatch):
    from bayesdiff.pipeline import compose

    for folder, steps in (("configs", 5), ("other", 6)):
        (tmp_path / folder / "solver").mkdir(parents=True)
        text = f"defaults: [euler]\nnum_steps: {steps}\n"
        (tmp_path / folder / "solver" / "mine.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert compose("solver=mine").solver.num_steps == 5
    assert compose("solver=mine", config_dir="other").solver.num_steps == 6


def started(*command: str | Path, cwd: Path, **more: str) -> str:
    """Standard output of a command that succeeds."""
    left = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=left | more,
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_an_installed_package_trains_from_an_empty_directory(tmp_path):
    pytest.importorskip("setuptools", "77")
    source, place, user = (tmp_path / name for name in ("source", "place", "user"))
    for name in SOURCES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file() and path.name != ".git":
            shutil.copy(path, source)
    (source / "configs" / "local" / "default.yaml").write_text("seed: 99\n")
    made = "from setuptools.build_meta import build_sdist; build_sdist('dist')"
    started("-c", made, cwd=source)
    (sdist,) = (source / "dist").iterdir()
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--target", place]
    started("-m", "pip", "install", *options, sdist, cwd=tmp_path)

    (user / "configs" / "solver").mkdir(parents=True)
    text = "_target_: mine.Mine\nnum_steps: 3\n"
    (user / "configs" / "solver" / "mine.yaml").write_text(text)
    text = "from bayesdiff.solvers import Euler\n\n\nclass Mine(Euler):\n    name = 'mine'\n"
    (user / "mine.py").write_text(text)
    more = {"cwd": user, "PYTHONPATH": str(place), "OMP_NUM_THREADS": "1"}
    asked = "from bayesdiff.options.config_folders import shipped_configs as s; print(s())"
    assert Path(started("-c", asked, **more).strip()) == place / "bayesdiff" / "configs"
    swept = started(place / "bin" / "bayesdiff-sweep", "--cfg=job", "solver=mine", **more)
    assert "mine.Mine" in swept and "seed: 0" in swept
    words = [*SMALLEST[:-1], "uncertainty=ensemble", "uncertainty.members=2", "report.pdf=false"]
    words += ["solver=mine", "metrics.num_images=0", "uncertainty.export=png"]
    shown = started(place / "bin" / "bayesdiff-train", *words, **more)
    assert "summed_variance/mean" in shown
    (folder,) = (user / "outputs").glob("digits-flow-*/mine-ensemble-*")
    assert len(list((folder / "png").glob("*-map.png"))) == 4
