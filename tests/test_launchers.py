"""Whatever starts the cells: the same table, a device each, nothing twice; and Optuna's study."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CONFIGS, ROOT, smallest
from filelock import FileLock
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from joblib.externals.loky.process_executor import TerminatedWorkerError
from omegaconf import OmegaConf, open_dict

from bayesdiff.checks import UserError
from bayesdiff.storage.locks import lock_of, taken
from bayesdiff.sweeps import slots, sweep
from bayesdiff.sweeps.search import Search, distribution

LAUNCHERS = {
    "basic": [],
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "submitit_local": ["hydra/launcher=submitit_local"],
}
KEY = "laplace.prior_precision"


def run_sweep(output_dir: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "sweep.py", "-m", *smallest(output_dir, *overrides)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=1800
    )


def table_of(output_dir: Path) -> list[dict[str, str]]:
    (path,) = output_dir.glob("sweeps/*/sweep.csv")
    rows = list(csv.DictReader(path.open()))
    for row in rows:
        row["folder"] = Path(row["folder"]).name
        del row["seconds"]
    return rows


def compose_sweep(*overrides: str):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return hydra_compose("sweep", list(overrides), return_hydra_config=True)


@pytest.mark.slow
def test_every_launcher_gives_the_same_table(tmp_path):
    tables = {}
    for name, options in LAUNCHERS.items():
        keys = (f"{KEY}=1,10", "model=flow,diffusion", *options)
        done = run_sweep(tmp_path / name, *keys)
        assert done.returncode == 0, done.stderr
        tables[name] = table_of(tmp_path / name)
        assert len(list((tmp_path / name).glob("digits-*/fit.json"))) == 2
        events = list((tmp_path / name).glob("digits-*/tensorboard/events*"))
        assert len([e for e in events if e.name.count("report") == 0]) == 2  # trained once each
    assert len(tables["basic"]) == 4
    assert {row["status"] for row in tables["basic"]} == {"done"}
    assert tables["joblib"] == tables["basic"] == tables["submitit_local"]


@pytest.mark.slow
def test_joblib_runs_cells_over_a_finished_training_and_leaves_failures_apart(trained, tmp_path):
    copy = trained.copy_to(tmp_path)
    before = (copy.folder / "fit.json").stat().st_mtime_ns
    done = run_sweep(tmp_path, f"{KEY}=1,-1", *LAUNCHERS["joblib"])
    assert done.returncode == 1
    assert "error: 1 of 2 cells failed" in done.stderr and "Traceback" not in done.stderr
    assert [row["status"] for row in table_of(tmp_path)] == ["done", "failed"]
    assert (copy.folder / "fit.json").stat().st_mtime_ns == before
    stderr = done.stderr.splitlines()
    assert [line for line in stderr if "fit: done before" in line]  # workers log as configured


def config(launcher: str = "joblib", **more):
    targets = {
        "basic": "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
        "joblib": "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher",
        "local": "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher",
        "slurm": "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher",
    }
    made = {
        "hydra": {
            "launcher": {"_target_": targets[launcher]},
            "sweeper": {"_target_": "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"},
            "overrides": {"task": [], "hydra": []},
        },
        "trainer": {"devices": 1},
        "output_dir": "out",
    }
    return OmegaConf.merge(OmegaConf.create(made), more)


def test_a_missing_plugin_is_one_line_with_the_cure(monkeypatch, capsys):
    monkeypatch.setattr(sweep, "_is_there", lambda module: "joblib" not in module)
    with pytest.raises(SystemExit) as stop:
        sweep.SweepReport().on_multirun_start(config())
    assert "hydra-joblib-launcher" in str(stop.value) and "pip install" in str(stop.value)
    sweep.check_engines(config("basic"))


def test_slurm_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(sweep.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="no srun here"):
        sweep.check_engines(config("slurm"))


def test_no_worker_is_refused():
    with pytest.raises(UserError, match="n_jobs=0 starts no worker"):
        sweep.check_engines(config("joblib", hydra={"launcher": {"n_jobs": 0}}))


def test_several_devices_per_cell_are_refused_with_the_commands_that_work():
    task = ["model=flow,diffusion", f"{KEY}=1,10", "trainer=ddp", "trainer.devices=2"]
    many = config("basic", trainer={"devices": 2}, hydra={"overrides": {"task": task}})
    with pytest.raises(UserError) as error:
        sweep.check_engines(many)
    line = str(error.value)
    assert f"python train.py model=flow {KEY}=1 trainer=ddp trainer.devices=2 " in line
    assert line.endswith(f"python sweep.py -m model=flow,diffusion {KEY}=1,10")


def test_launchers_are_tuned_in_one_place(monkeypatch):
    for launcher, options, expected in [
        ("joblib", {"n_jobs": 3}, "3"),
        ("joblib", {"n_jobs": -1}, None),
        ("slurm", {}, "0"),
    ]:
        monkeypatch.delenv(slots.SLOTS, raising=False)
        sweep.tune(config(launcher, hydra={"launcher": options}))
        assert os.environ.get(slots.SLOTS) == expected
    monkeypatch.setenv(slots.SLOTS, "7")
    sweep.tune(config("joblib", hydra={"launcher": {"n_jobs": 3}}))
    assert os.environ[slots.SLOTS] == "7"
    local = config("local", hydra={"launcher": {"timeout_min": 60}})
    sweep.tune(local)
    assert local.hydra.launcher.timeout_min > 1000
    local.hydra.overrides.hydra = ["hydra.launcher.timeout_min=5"]
    local.hydra.launcher.timeout_min = 5
    sweep.tune(local)
    assert local.hydra.launcher.timeout_min == 5


@pytest.mark.parametrize("name", ["joblib", "submitit_local", "submitit_slurm"])
def test_every_launcher_composes_and_can_be_tuned(name, monkeypatch):
    monkeypatch.setattr(sweep.shutil, "which", lambda program: program)
    monkeypatch.setenv(slots.SLOTS, "")
    cfg = compose_sweep(f"hydra/launcher={name}")
    sweep.check_engines(cfg)
    sweep.tune(cfg)  # the configuration is not closed to it


def test_a_dead_worker_is_one_line():
    assert "goes on" in str(sweep.lost_worker(TerminatedWorkerError("A worker process died.\n\n")))
    assert sweep.lost_worker(ValueError("a mistake")) is None


@pytest.mark.parametrize(
    ("given", "threads", "gpus", "expected"),
    [
        ("", "1", 0, 4), ("", "2", 0, 2), ("", "8", 0, 1), ("", None, 0, 1), ("", "1", 2, 2),
        ("3", "1", 0, 3), ("3", None, 1, 3), ("-1", None, 0, 4), ("0", "1", 2, 0),
    ],
)  # fmt: skip
def test_slots_are_gpus_or_cores_over_threads(given, threads, gpus, expected, monkeypatch):
    monkeypatch.setattr(slots, "cores", lambda: 4)
    monkeypatch.setenv(slots.SLOTS, given)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if threads:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert slots.number_of_slots(gpus) == expected


def test_slots_that_are_no_number_are_one_line(monkeypatch):
    monkeypatch.setenv(slots.SLOTS, "two")
    with pytest.raises(UserError, match="'two'"):
        slots.number_of_slots(0)


@pytest.fixture
def two_gpus(monkeypatch, tmp_path):
    """A machine with two GPUs, of which this process has none yet."""
    monkeypatch.setattr(slots, "_bound", None)
    monkeypatch.setattr(slots, "_POLL", 0.01)
    monkeypatch.setattr(slots.tempfile, "gettempdir", lambda: str(tmp_path / "machine"))
    monkeypatch.setattr(slots, "visible_gpus", lambda: ["4", "7"])
    monkeypatch.delenv(slots.SLOTS, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")


def gpu_slot(gpu: str, number: int) -> FileLock:
    """Of this machine, whichever sweep asks."""
    return lock_of(slots.machine_folder() / f"slot-{slots.platform.node()}-{gpu}-{number}")


def test_a_process_gets_the_gpu_of_a_free_slot_and_keeps_it(two_gpus, tmp_path, monkeypatch):
    other = gpu_slot("4", 0)  # of another sweep
    assert taken(other, 0)
    with slots.device_slot(tmp_path, "auto"):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "7"
    other.release()
    monkeypatch.setenv(slots.SLOTS, "4")
    with slots.device_slot(tmp_path, "auto"):  # slot 0 is free, but CUDA cannot change devices
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "7"
        held = [n for n in range(4) if not taken(gpu_slot("47"[n % 2], n), 0)]
        assert held == [1]


def test_more_workers_than_gpus_share_them(two_gpus, tmp_path, monkeypatch):
    monkeypatch.setenv(slots.SLOTS, "3")
    others = [gpu_slot("4", 0), gpu_slot("7", 1)]
    assert all(taken(lock, 0) for lock in others)
    with slots.device_slot(tmp_path, "auto"):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "4"  # slot 2, of two GPUs


def test_no_slot_where_the_launcher_hands_out_devices(two_gpus, tmp_path, monkeypatch):
    monkeypatch.setenv(slots.SLOTS, "0")
    with slots.device_slot(tmp_path, "auto"):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,7"


SETTINGS = {"n_trials": 8, "n_jobs": 1, "seed": 0, "startup_trials": 3}


def search(folder: Path, monkeypatch, *words: str, **settings: int) -> Search:
    monkeypatch.setenv("BAYESDIFF_SWEEP", str(folder))
    words = words or ("a=interval(0.0, 1.0)", "b=x,y", "c=3")
    cfg = OmegaConf.create({"metrics": {"num_images": 10}})
    return Search.of(words, cfg, **SETTINGS | settings)


class Cells:
    """What the launcher would run: a parabola, best at a=0.3 and b=y; broken where b=x."""

    def __init__(self, stop_at: int = 10**6) -> None:
        self.seen: list[tuple[int, list[str]]] = []
        self.stop_at = stop_at

    def __call__(self, cells: list[list[str]], first: int) -> list[float | None]:
        values: list[float | None] = []
        for number, cell in enumerate(cells, first):
            if number >= self.stop_at:
                raise KeyboardInterrupt
            self.seen.append((number, cell))
            given = dict(word.split("=") for word in cell)
            assert given["c"] == "3"
            values.append(None if given["b"] == "x" else (float(given["a"]) - 0.3) ** 2)
        return values


def trials(one: Search) -> list[tuple]:
    return [(t.number, t.state.name, t.value, t.params) for t in one.study().trials]


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_interrupted_study_continues_as_it_would_have(jobs, tmp_path, monkeypatch):
    whole = search(tmp_path / "whole", monkeypatch, n_jobs=jobs)
    whole.run(Cells())
    stopped = search(tmp_path / "stopped", monkeypatch, n_jobs=jobs)
    with pytest.raises(KeyboardInterrupt):
        stopped.run(Cells(stop_at=4))
    rest = Cells()
    stopped.run(rest)
    assert trials(stopped) == trials(whole) and len(trials(whole)) == 8
    assert [number for number, _ in rest.seen] == list(range(4, 8))
    longer = search(tmp_path / "stopped", monkeypatch, n_trials=9)
    more = Cells()
    longer.run(more)
    assert [number for number, _ in more.seen] == [8]


def test_failed_trials_are_tried_again_when_a_finished_search_is_started_again(
    tmp_path, monkeypatch
):
    one = search(tmp_path, monkeypatch)
    one.run(Cells())
    failed = [cell for _, state, _, cell in trials(one) if state == "FAIL"]
    assert failed and len(trials(one)) == 8
    again = Cells()
    one.run(again)  # they fail again
    cells = [dict(word.split("=") for word in cell) for _, cell in again.seen]
    assert [(float(c["a"]), c["b"]) for c in cells] == [(f["a"], f["b"]) for f in failed]
    stopped = Cells(stop_at=len(trials(one)) + 1)
    with pytest.raises(KeyboardInterrupt):
        one.run(stopped)
    for _ in range(2):  # the rest of that start, and what had failed in it
        one.run(lambda cells, first: [1.0] * len(cells))  # what made them fail is mended
    mended = [cell for _, state, value, cell in trials(one) if value == 1.0]
    assert sorted(map(str, mended)) == sorted(map(str, failed))
    done = Cells()
    one.run(done)
    assert done.seen == []


def test_failed_cells_are_never_the_best(tmp_path, monkeypatch):
    one = search(tmp_path, monkeypatch)
    one.run(Cells())
    states = {params["b"]: state for _, state, _, params in trials(one)}
    assert states == {"x": "FAIL", "y": "COMPLETE"}
    best = min((v, n) for n, state, v, _ in trials(one) if state == "COMPLETE")
    record = OmegaConf.load(tmp_path / "best.json")
    assert record.objective == "fid@" and record.direction == "minimize"
    assert (record.value, record.trial) == best and "b=y" in record.overrides


def test_a_study_without_one_good_cell_has_no_best(tmp_path, monkeypatch):
    one = search(tmp_path, monkeypatch, n_trials=2)
    one.run(lambda cells, first: [None] * len(cells))
    assert not (tmp_path / "best.json").exists()


@pytest.mark.parametrize(
    ("words", "settings", "fragment"),
    [
        (["a=1"], {}, "nothing to search"),
        (["a=interval(0.0, 1.0)"], {"n_trials": 0}, "n_trials"),
        (["a=tag(log, interval(0.0, 1.0))"], {}, "a=tag"),
    ],
)
def test_a_search_that_cannot_work_is_one_line(words, settings, fragment, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=fragment):
        search(tmp_path, monkeypatch, *words, **settings)


def test_a_search_needs_scores(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="metrics.num_images=0"):
        Search.of(["a=1,2"], OmegaConf.create({"metrics": {"num_images": 0}}), **SETTINGS)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("a=interval(0.0, 2.0)", "FloatDistribution(high=2.0, log=False, low=0.0, step=None)"),
        ("a=int(interval(1, 4))", "IntDistribution(high=4, log=False, low=1, step=1)"),
        (
            "a=tag(log, interval(1e-4, 1e-2))",
            "FloatDistribution(high=0.01, log=True, low=0.0001, step=None)",
        ),
        ("a=range(1, 9, step=2)", "IntDistribution(high=7, log=False, low=1, step=2)"),
        ("a=x,y", "CategoricalDistribution(choices=('x', 'y'))"),
    ],
)
def test_spaces_are_written_as_on_the_command_line(word, expected):
    (override,) = OverridesParser.create().parse_overrides([word])
    assert repr(distribution(override)) == expected


def test_the_search_composes():
    cfg = compose_sweep("hparams_search=optuna")
    assert cfg.hydra.sweeper._target_ == "hydra_plugins.bayesdiff_search.OptunaSearch"
    sweep.check_engines(cfg)
    with open_dict(cfg):
        words = [f"{key}={value}" for key, value in cfg.hydra.sweeper.params.items()]
    assert len(OverridesParser.create().parse_overrides(words)) == 2
