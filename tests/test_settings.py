"""Columns of HPARAMS: what every run is asked about, and everything that was overridden."""

from conftest import Compose, Trained, compose_list
from hydra.core.hydra_config import HydraConfig

from bayesdiff import pipeline
from bayesdiff.runs.defaults import leaves
from bayesdiff.runs.settings import typed


def test_standing_columns_and_all_that_differs_from_the_defaults(
    copied: Trained, compose: Compose, monkeypatch
):
    monkeypatch.setattr("bayesdiff.report.board.write", lambda *args, **options: [])
    cfg = compose("uncertainty.skip_interval=3", "callbacks=snapshots", "logger=tensorboard")
    row = pipeline.run(cfg).settings
    expected = {
        "data": "digits", "corruption": None, "model": "flow", "net": "tiny", "path": "cond_ot",
        "lr": 1e-3, "epochs": 1, "batch_size": 128, "seed": 0, "features": "classifier",
        "solver.name": "euler", "uncertainty.name": "ensemble", "uncertainty.skip_interval": 3,
        "trainer.limit_train_batches": 2, "laplace.num_images": 64, "metrics.num_images": 12,
    }  # fmt: skip
    assert {name: row[name] for name in expected} == expected
    aside = ("output_dir", "fit", "logger", "report", "run_dir", "dry_run", "callbacks")
    assert {"output_dir", "fit", "logger.tensorboard.name", "report.pdf"} <= leaves(cfg).keys()
    assert not [name for name in row if name.startswith(aside) or "_target_" in name]


def test_what_is_typed_is_a_column_even_where_it_is_the_default():
    """In a sweep over net.dropout=0.0,0.1 both cells have one."""
    words = [
        "net.dropout=0.0", "+trainer.limit_val_batches=1", "experiment=filtering", "model=flow",
        "filtering.num_images=30", "output_dir=/nowhere/that/is", "~callbacks.progress",
        "uncertainty.times=[0.5]", "trainer=cpu", "report.pdf=false", "callbacks.samples.grids=3",
    ]  # fmt: skip
    cfg = compose_list(words, return_hydra_config=True)
    assert typed(cfg) == {}  # there is no command line
    try:
        HydraConfig.instance().set_config(cfg)
        assert typed(cfg) == {
            "net.dropout": 0.0, "trainer.limit_val_batches": 1, "experiment": "filtering",
            "filtering.num_images": 30, "uncertainty.times": [0.5],
        }  # fmt: skip
    finally:
        HydraConfig.instance().cfg = None
