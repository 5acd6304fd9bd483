"""Sweeps: trained once, cells addressed by content, failures kept apart."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CONFIGS, ROOT, smallest
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from bayesdiff.checks import UserError
from bayesdiff.sweeps import report as report_sweep
from bayesdiff.sweeps import sweep

KEY = "laplace.prior_precision"


def run_sweep(home: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """A sweep below the home folder, started elsewhere."""
    words = smallest(Path("x"), "output_dir='~/x'", *overrides)
    return subprocess.run(
        [sys.executable, str(ROOT / "sweep.py"), "-m", *words],
        cwd=home.parent / "work", env=os.environ | {"HOME": str(home), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def table_of(output_dir: Path) -> list[dict[str, str]]:
    (path,) = output_dir.glob("sweeps/*/sweep.csv")
    return list(csv.DictReader(path.open()))


@pytest.fixture(scope="module")
def swept(trained, tmp_path_factory):
    """A sweep with one bad cell, over a training that is there already."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "work").mkdir()
    copy = trained.copy_to(folder / "home" / "x")
    before = (copy.curvature).stat().st_mtime_ns
    done = run_sweep(folder / "home", f"{KEY}=1,10,-1")
    return copy, done, before


def test_a_bad_cell_leaves_the_others_and_a_non_zero_exit(swept):
    copy, done, _ = swept
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: 1 of 3 cells failed") and "got -1" in last
    assert "Traceback" not in done.stderr
    rows = table_of(copy.output_dir)
    assert [row[KEY] for row in rows] == ["1.0", "10.0", "-1.0"]
    assert [row["status"] for row in rows] == ["done", "done", "failed"]


def test_a_sweep_below_the_home_leaves_all_of_it_there(swept, trained):
    """Hydra makes a folder of its own for the sweep, and one for every cell."""
    home = swept[0].output_dir.parent
    assert list((home.parent / "work").iterdir()) == []
    before = {path.name for path in trained.output_dir.iterdir() if path.is_dir()}
    now = {path.name for path in (home / "x").iterdir() if path.is_dir()}
    assert now - before == {"sweeps"} and before


def test_no_second_training_and_no_second_pass(swept):
    copy, _, before = swept
    assert (copy.curvature).stat().st_mtime_ns == before
    assert len(list(copy.output_dir.glob("digits-flow-*"))) == 1
    assert len(list(copy.folder.glob("images-*.npz"))) == 1  # the prior does not move the images


def test_variance_falls_with_the_prior_and_scores_stay(swept):
    rows = table_of(swept[0].output_dir)[:2]
    assert float(rows[0]["summed_variance/mean"]) > float(rows[1]["summed_variance/mean"])
    fid = next(name for name in rows[0] if name.startswith("fid@"))
    assert rows[0][fid] == rows[1][fid]


def test_figure_and_hparams_rows_with_real_metrics(swept):
    copy, _, _ = swept
    assert list(copy.output_dir.glob("sweeps/*/sweep.png"))
    for row in table_of(copy.output_dir)[:2]:
        assert list((Path(row["folder"]) / "tensorboard").glob("events*"))


def test_started_again_only_what_is_missing_runs(swept):
    copy, _, _ = swept
    stamps = {path: path.stat().st_mtime_ns for path in copy.folder.rglob("*.npz")}
    again = run_sweep(copy.output_dir.parent, f"{KEY}=1,10,-1")
    assert again.returncode == 1  # the bad value is still bad
    assert {path: path.stat().st_mtime_ns for path in copy.folder.rglob("*.npz")} == stamps
    assert len(list(copy.output_dir.glob("sweeps/*/sweep.csv"))) == 1


def test_swept_keys_are_those_that_vary():
    rows = [{"overrides": ["a=1", "b=2"]}, {"overrides": ["a=3", "b=2"]}]
    assert report_sweep.swept_keys(rows) == ["a"]
    assert report_sweep.swept_keys(rows[:1]) == ["a", "b"]


def test_failed_rows_have_a_place_in_the_table():
    row = {"overrides": ["a=x"], "status": "failed", "seconds": 1.0, "error": "why"}
    flat = report_sweep.flatten(row, ["a"])
    assert flat == {
        "a": "x", "status": "failed", "seconds": 1.0, "folder": "", "error": "why",
    }  # fmt: skip
    assert json.dumps(flat)


def test_a_glob_stands_for_what_it_matches():
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        assert sweep.expanded("path=glob(vp_*,exclude=*linear)") == "path=vp_cosine,vp_per_pixel"
        every = "path=vp_cosine,vp_linear,vp_per_pixel,vp_scaled_linear"
        assert sweep.expanded("path=glob(vp_*)") == every
        with pytest.raises(UserError, match="matches nothing"):
            sweep.expanded("solver=glob(zz*)")
        for word in ("solver=euler,heun", "+a=interval(0,1)", "~callbacks.samples", "b='x y'"):
            assert sweep.expanded(word) == word


def test_whatever_fails_before_the_cells_ends_the_sweep_in_one_line():
    """Hydra only warns of it: all cells would run, and leave no table."""
    asked = {"overrides": {"task": []}}
    config = OmegaConf.create({"hydra": asked, "output_dir": "${nowhere:out}"})
    with pytest.raises(SystemExit, match="^error: .*nowhere.*output_dir"):
        sweep.SweepReport().on_multirun_start(config)
