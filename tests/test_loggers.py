"""Every logger gets what TensorBoard gets; none is needed, and none can spoil a report."""

import csv
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from omegaconf import OmegaConf
from test_report import CLASSES, HPARAMS, METRICS, fake

from bayesdiff.checks import UserError
from bayesdiff.report import board, loggers
from bayesdiff.report.loggers import Loggers, check_loggers, entries

CSV = {"_target_": "lightning.pytorch.loggers.CSVLogger", "name": "csv", "version": ""}
MADE = []


class Recording(Logger):
    """Keeps what it is given, as a service would."""

    def __init__(self, save_dir=None, run_name=None, broken=False):
        super().__init__()
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
    from bayesdiff.report import figures

    def pictures(samples, *_):
        yield "samples/samples", figures.sample_grid(samples.images, None, [])

    monkeypatch.setattr(board, "_pictures", pictures)


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
    from bayesdiff import pipeline

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
    torch.testing.assert_close(made.images["uncertainty/score"], samples.variance.sum((1, 2, 3)))
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
    assert not broken.hyperparameters and whole.hyperparameters and whole.images
    assert list((tmp_path / "run" / "cell" / "tensorboard").iterdir())


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


def test_where_the_curves_are():
    wandb = {"_target_": "lightning.pytorch.loggers.WandbLogger", "project": "mine"}
    tensorboard = {"_target_": "lightning.pytorch.loggers.TensorBoardLogger"}

    def places(options):
        return Loggers(options, Path("out/run/cell"), "run", "cell").places("out")

    assert places(None) == []
    assert places({"tb": tensorboard}) == ["tensorboard --logdir out"]
    assert places({"csv": CSV}) == ["out/run/csv/metrics.csv and out/run/*/csv/metrics.csv"]
    assert places([wandb, RECORDING]) == ["WandbLogger, project mine", "Recording"]
    (sync,) = places([wandb | {"offline": True}])
    assert sync.startswith("wandb sync out/run/wandb/offline-run-*")


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
        assert sum(name in kept.read_bytes() for name in names) >= 3


def test_the_classes_used_here_are_what_lightning_has(tmp_path):
    to = Loggers([CSV, RECORDING], tmp_path / "run", "run", "training")
    kinds = [type(each) for each in to.make(without=TensorBoardLogger)]
    assert kinds == [CSVLogger, Recording]
    assert to.make(without=CSVLogger)[0].run_name == "run"
