"""Every logger gets what TensorBoard gets; none is needed, and none can spoil a report."""

import csv
import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import scalars
from lightning.pytorch.loggers import Logger
from omegaconf import OmegaConf
from test_report import CLASSES, HPARAMS, METRICS, board_of, fake

from bayesdiff import pipeline
from bayesdiff.checks import UserError
from bayesdiff.report import board, figures, loggers
from bayesdiff.report.csv_logger import CSVLogger
from bayesdiff.report.loggers import Loggers, check_loggers, entries, log_figure
from bayesdiff.report.pictures import Pictures
from bayesdiff.uncertainty.scores.of_maps_and_images import map_score

CSV = {"_target_": "bayesdiff.report.csv_logger.CSVLogger", "name": "csv", "version": ""}
TENSORBOARD = "lightning.pytorch.loggers.TensorBoardLogger"
MADE = []


class Recording(Logger):
    """Keeps what it is given, as a service would."""

    def __init__(self, save_dir=None, run_name=None, broken=False, refuses=False):
        super().__init__()
        if refuses:
            raise OSError("no account")
        self.save_dir_, self.run_name, self.broken = save_dir, run_name, broken
        self.metrics, self.hyperparameters, self.images, self.ended = [], {}, {}, 0
        self._experiment = self
        MADE.append(self)

    name = property(lambda self: "recording")
    version = property(lambda self: "0")

    def log_metrics(self, metrics, step=None):
        if self.broken:
            raise OSError("no network")
        self.metrics.append((step, metrics))

    def log_hyperparams(self, params, *args, **kwargs):
        self.hyperparameters |= params

    def log_image(self, key, images, step=None):
        self.images[key] = images

    def add_histogram(self, name, values, step):
        self.images[name] = values

    @property
    def experiment(self):
        return self

    def finish(self):
        self.ended += 1


RECORDING = {"_target_": "test_loggers.Recording"}


def report(folder, options, samples=None):
    """A cell's report with these loggers; the figures."""
    to = Loggers(options, folder / "run" / "cell", "run", "cell")
    place = folder / "run" / "cell" / "tensorboard"
    return board.write(place, samples or fake(6), METRICS, HPARAMS, CLASSES, loggers=to)


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch):
    def pictures(_, seen):
        yield "samples/samples", figures.sample_grid(seen.samples.images, None, [])

    monkeypatch.setattr(Pictures, "every", pictures)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (None, []),
        ({}, []),
        (CSV, ["logger"]),
        ([CSV, RECORDING], ["0", "1"]),
        ({"csv": CSV, "mine": RECORDING, "off": None}, ["csv", "mine"]),
    ],
)
def test_one_logger_several_or_none(given, names):
    assert list(entries(OmegaConf.create(given) if given else given)) == names


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("csv", "logger=csv has no _target_"),
        ({"csv": 3}, "logger.csv=3 has no _target_"),
        ({"_target_": "nowhere.Logger"}, "nowhere.Logger cannot be imported"),
    ],
)
def test_what_is_no_logger_is_one_line(given, line):
    with pytest.raises(UserError, match=line):
        check_loggers(given)


def test_a_missing_package_is_one_line_with_the_command(compose, monkeypatch):
    """Before any work, and W&B's own folder beside the script is not taken for it."""

    def version(name):
        raise loggers.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(loggers.metadata, "version", version)
    cfg = compose("logger=wandb")
    with pytest.raises(UserError, match=r"logger=wandb needs .*: pip install wandb$"):
        pipeline.prepare(cfg)
    check_loggers({"csv": CSV})


def test_a_logger_gets_scores_curves_figures_histogram_and_settings(tmp_path):
    samples = fake(6)
    (figure,) = report(tmp_path, {"mine": RECORDING, "tb": {
        "_target_": "lightning.pytorch.loggers.TensorBoardLogger"}}, samples)  # fmt: skip
    made = MADE[-1]
    scores = [metrics for step, metrics in made.metrics if "fid@5k/classifier" in metrics]
    assert len(scores) == 1 and scores[0].keys() == METRICS.keys()
    assert scores[0]["fid@5k/classifier"] == 12.5
    curve = [(s, m["over_t/summed_variance"]) for s, m in made.metrics if "over_t/increment" in m]
    assert [step for step, _ in curve] == list(range(100, 1001, 100))
    assert curve[-1][1] == pytest.approx(float(samples.summed[-1].mean()))
    assert made.images["samples/samples"] == [str(figure)] and figure.is_file()
    torch.testing.assert_close(made.images["uncertainty/score"], map_score(samples, "sum"))
    assert made.hyperparameters == board.flat(HPARAMS)
    assert (made.run_name, made.save_dir_) == ("run/cell", str(tmp_path / "run" / "cell"))
    assert made.ended == 1


def test_a_csv_file_has_the_scores_and_the_names_of_the_figures(tmp_path):
    (figure,) = report(tmp_path, {"csv": CSV})
    folder = tmp_path / "run" / "cell" / "csv"
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [row["fid@5k/classifier"] for row in rows if row["fid@5k/classifier"]] == ["12.5"]
    assert sum(bool(row["over_t/increment"]) for row in rows) == 10
    kept = OmegaConf.load(folder / "hparams.yaml")
    assert kept["figures/samples/samples"] == str(figure) and kept["model.name"] == "flow"


def test_a_logger_that_fails_is_named_and_costs_nothing_else(tmp_path, caplog):
    report(tmp_path, [RECORDING | {"broken": True}, RECORDING])
    broken, whole = MADE[-2:]
    assert "Recording failed (OSError: no network)" in caplog.text
    assert not broken.images and broken.ended == 1  # it got no more, and holds no run open
    assert whole.hyperparameters == board.flat(HPARAMS) and "samples/samples" in whole.images
    shown = scalars(tmp_path / "run" / "cell" / "tensorboard")
    assert {"fid@5k/classifier", "over_t/increment"} <= shown.keys()


def test_a_logger_that_cannot_be_made_leaves_the_others_their_report(tmp_path, caplog):
    report(tmp_path, [RECORDING | {"refuses": True}, RECORDING])
    assert "Recording failed" in caplog.text and "no account" in caplog.text
    assert MADE[-1].images and MADE[-1].ended == 1


def test_a_report_that_fails_leaves_no_run_open(tmp_path, monkeypatch):
    """The next cell of this process would write into it."""

    def pictures(*_):
        raise RuntimeError("no font")

    monkeypatch.setattr(Pictures, "every", pictures)
    with pytest.raises(RuntimeError, match="no font"):
        report(tmp_path, [RECORDING])
    assert MADE[-1].metrics and MADE[-1].ended == 1


def test_a_resumed_training_goes_on_with_its_csv_curve_and_a_report_begins_anew(tmp_path):
    def log(kind, steps):
        (logger,) = Loggers(CSV, tmp_path / "run", "run", kind).begin({"seed": 0})
        for step in steps:
            logger.log_metrics({f"{kind}/loss": float(step)}, step=step)
        logger.finalize("success")
        with (tmp_path / "run" / "csv" / "metrics.csv").open() as file:
            return list(csv.DictReader(file))

    assert len(log("training", range(4))) == 4
    rows = log("training", (2, 3, 4))  # the checkpoint was of step 2
    assert [int(row["step"]) for row in rows] == [0, 1, 2, 3, 4]
    assert [float(row["training/loss"]) for row in rows] == [0, 1, 2, 3, 4]
    rows = log("cell", [0])
    assert [(row["step"], row["cell/loss"]) for row in rows] == [("0", "0.0")]
    assert "training/loss" not in rows[0]


def test_a_logger_that_is_added_to_a_finished_cell_gets_its_report_once(copied, compose):
    finished = copied.cell / "metrics.json"
    before = json.loads(finished.read_text())
    assert before["loggers"] == []
    first = len(MADE)
    added = ["logger=[tensorboard,csv]", "+logger.mine._target_=test_loggers.Recording"]
    result = pipeline.run(compose(*added))
    assert result.folder == copied.cell and len(MADE) == first + 1 and MADE[-1].images
    assert MADE[-1].metrics[0][1].keys() == before["metrics"].keys()
    rows = list(csv.DictReader((copied.cell / "csv" / "metrics.csv").open()))
    assert sum(bool(row.get("nfe")) for row in rows) == 1
    # The training was finished before, so that it has no CSV file.
    there = f"{copied.folder}/*/csv/metrics.csv"
    assert result.curves == (f"tensorboard --logdir {copied.output_dir}", there, "Recording")
    assert pipeline.run(compose(*added)).curves == result.curves and len(MADE) == first + 1
    assert len(json.loads(finished.read_text())["loggers"]) == 2
    shown = pipeline.run(compose("report.pdf=true", *added))
    assert (shown.folder / "figures" / "samples.pdf").is_file() and len(MADE) == first + 2


def test_studies_write_to_all_loggers(tmp_path):
    to = Loggers(RECORDING, tmp_path / "filtering", "run", "filtering")
    curves = {"evidence": [(1.0, 2.0), (10.0, None), (100.0, 3.0)]}
    board.write_study(tmp_path / "tb", {"z": 1.5}, curves, [], to, {"seeds": [0, 1]})
    made = MADE[-1]
    assert made.metrics == [(0, {"z": 1.5}), (0, {"evidence": 2.0}), (20, {"evidence": 3.0})]
    assert made.hyperparameters == {"seeds": "[0, 1]"} and made.run_name == "run/filtering"


def test_names_are_short_enough_for_a_service():
    long = Loggers(None, Path("out") / ("r" * 100) / ("c" * 90), "r" * 100, "cell")
    assert long.name == "c" * 90
    assert Loggers(None, Path("out/run"), "run", "training").name == "run"


def test_where_the_curves_are(tmp_path):
    wandb = {"_target_": "lightning.pytorch.loggers.WandbLogger", "project": "mine"}
    tensorboard = {"_target_": "lightning.pytorch.loggers.TensorBoardLogger"}

    def places(options, served=()):
        cell = Loggers(options, tmp_path / "run" / "cell", "run", "cell", frozenset(served))
        return [place.replace(str(tmp_path), "out") for place in cell.places("out")]

    assert places(None) == []
    assert places({"tb": tensorboard}) == ["tensorboard --logdir out"]
    offline = wandb | {"offline": True}
    assert places([CSV, wandb, RECORDING, offline]) == []  # none of them is there
    for place in ("run", "run/cell"):
        (tmp_path / place / "csv").mkdir(parents=True)
        (tmp_path / place / "csv" / "metrics.csv").write_text("step\n")
        (tmp_path / place / "wandb" / "offline-run-1").mkdir(parents=True)
    assert places({"csv": CSV}) == ["out/run/csv/metrics.csv and out/run/*/csv/metrics.csv"]
    (sync,) = places([offline])
    assert sync == "wandb sync out/run/wandb/offline-run-* out/run/*/wandb/offline-run-*"
    had = [loggers._name(each) for each in (wandb, RECORDING)]
    assert places([wandb, RECORDING], had) == ["WandbLogger, project mine", "Recording"]


def test_wandb_offline_keeps_a_run_for_every_report(tmp_path, monkeypatch):
    """Two cells in one process are two runs; scores and pictures are in them."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    options = OmegaConf.load(Path(__file__).parents[1] / "configs" / "logger" / "wandb.yaml")
    options.wandb.offline = True
    seen = []
    init = wandb.init
    monkeypatch.setattr(wandb, "init", lambda **given: seen.append(init(**given)) or seen[-1])
    for place in ("one", "two"):
        report(tmp_path / place, options)
    assert wandb.run is None and len({run.id for run in seen}) == 2
    assert {(run.name, run.group, run.job_type) for run in seen} == {("run/cell", "run", "cell")}
    for place in ("one", "two"):
        (folder,) = (tmp_path / place / "run" / "cell" / "wandb").glob("offline-run-*")
        assert list(folder.rglob("samples_*.png"))
        (kept,) = folder.glob("*.wandb")
        # Its blocks may end inside a name.
        names = (b"fid@5k/classifier", b"over_t/increment", b"is@5k/classifier", b"model.name")
        end = time.monotonic() + 60  # W&B's own process writes the file after the run has ended
        while sum(name in kept.read_bytes() for name in names) < 3:
            assert time.monotonic() < end
            time.sleep(0.1)


def test_a_trainings_loggers_get_place_names_and_hyperparameters(tmp_path):
    to = Loggers([CSV, RECORDING], tmp_path / "run", "run", "training")
    of_csv, mine = to.begin({"seed": 3})
    assert isinstance(of_csv, CSVLogger) and Path(of_csv.log_dir) == tmp_path / "run" / "csv"
    assert (mine.run_name, mine.save_dir_) == ("run", str(tmp_path / "run"))
    assert mine.hyperparameters == {"seed": 3}
    of_csv.log_metrics({"train/loss": 1.0}, step=0)
    of_csv.finalize("success")
    assert OmegaConf.load(tmp_path / "run" / "csv" / "hparams.yaml").seed == 3


def test_a_callback_shows_its_figure_to_every_logger(tmp_path):
    to = Loggers([CSV, RECORDING, {"_target_": TENSORBOARD}], tmp_path, tmp_path.name, "training")
    trainer = SimpleNamespace(default_root_dir=tmp_path, loggers=to.begin({}), global_step=7)
    log_figure(trainer, "uncertainty/validation", figures.sample_grid(fake(3).images, None, []))
    saved = tmp_path / "figures" / "validation.png"
    assert MADE[-1].images == {"uncertainty/validation": [str(saved)]} and saved.is_file()
    trainer.loggers[-1].experiment.flush()
    assert board_of(trainer.loggers[-1].log_dir).Images("uncertainty/validation")[0].step == 7
