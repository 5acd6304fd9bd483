"""Lightning's own options as its users type them: honoured, or refused before any work."""

from datetime import timedelta

import pytest
from conftest import Compose, compose_list
from hydra.errors import HydraException

from bayesdiff import pipeline
from bayesdiff.checks import UserError
from bayesdiff.cli import explain
from bayesdiff.options.trainer import (
    SUPPLIED,
    check_interval,
    check_trainer,
    steps_and_epochs,
    time_limit,
    weighty,
)


def trainer(*overrides: str):
    return compose_list([f"trainer.{one}" for one in overrides]).trainer


def test_options_are_typed_as_in_lightning(compose: Compose):
    typed = ["limit_train_batches=3", "max_time=00:01:00", "accumulate_grad_batches=2"]
    cfg = compose(*(f"trainer.{one}" for one in typed))
    run = pipeline.prepare(cfg)[0]
    assert steps_and_epochs(run.cfg.trainer, 11) == (2, 1.0)


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("trainer.misspelt=1", ["trainer.misspelt", "did you mean trainer.", "--cfg job"]),
        ("trainer.limit_train_batch=1", ["did you mean trainer.limit_train_batches"]),
        ("trainer.default_root_dir=x", ["given by the run itself", "output_dir="]),
        ("trainer.logger=x", ["logger=csv"]),
        ("+trainer.max_steps=1", ["trainer.max_steps is there already", "leave out the +"]),
        ("model.optimiser.lr=1", ["did you mean model.optimizer.lr"]),
        ("callbacks.checkpoint.save_top_k=0", ["last.ckpt is written in any case", "+callbacks."]),
    ],
)
def test_an_unknown_option_names_those_close_to_it(override, fragments):
    with pytest.raises(HydraException) as error:
        compose_list([override])
    line = explain(error.value)
    assert "\n" not in line and all(fragment in line for fragment in fragments), line


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("fast_dev_run=true", ["fast_dev_run", "debug=fdr"]),
        ("barebones=true", ["barebones", "debug=fdr"]),
        ("limit_train_batches=0", ["limit_train_batches=0", "debug=fdr"]),
        ("limit_train_batches=1.5", ["limit_train_batches=1.5", "share"]),
        ("overfit_batches=-1", ["overfit_batches=-1"]),
        ("num_nodes=2", ["num_nodes=2", "one machine"]),
        ("max_time=soon", ["max_time='soon'", "HH:MM:SS"]),
        ("max_time=-5", ["max_time=-5"]),
        ("max_time={days:x}", ["max_time="]),
        ("max_time=nan", ["max_time=nan is no duration"]),
        ("max_time=inf", ["max_time=inf is no duration"]),
        ("max_time={days:1e20}", ["max_time={'days': 1e+20} is no duration"]),
        ("max_time=99999999999:00:00:00", ["is no duration"]),
        ("accumulate_grad_batches=0", ["accumulate_grad_batches"]),
        ("min_epochs=-1", ["min_epochs"]),
        ("profiler=fast", ["trainer does not work", "profiler", "simple"]),
        ("max_steps=0", ["max_steps"]),
        ("val_check_interval=1.5", ["trainer does not work"]),
    ],
)
def test_what_cannot_work_is_refused(override, fragments):
    with pytest.raises(UserError) as error:
        check_trainer(trainer(override))
    line = str(error.value)
    assert "\n" not in line and all(fragment in line for fragment in fragments), line


@pytest.mark.parametrize("name", SUPPLIED)
def test_what_the_run_supplies_is_refused(name):
    with pytest.raises(UserError, match=f"trainer.{name} is given by the run itself"):
        check_trainer(compose_list([f"+trainer.{name}=x"]).trainer)


def test_one_that_lightning_does_not_have_is_refused_with_a_plus_too():
    with pytest.raises(
        UserError, match="no option of Lightning's Trainer; did you mean max_steps"
    ):
        check_trainer(compose_list(["+trainer.max_step=3"]).trainer)


def test_a_validation_beyond_the_epoch_is_refused():
    check_interval(trainer("val_check_interval=5"), batches=5)
    check_interval(trainer("val_check_interval=0.2"), batches=5)
    with pytest.raises(UserError, match="val_check_interval=6 is more than the 5 batches"):
        check_interval(trainer("val_check_interval=6"), batches=5)
    with pytest.raises(UserError, match="val_check_interval=4 is more than the 3 batches"):
        check_interval(trainer("val_check_interval=4", "limit_train_batches=3"), batches=5)
    with pytest.raises(UserError, match="0.1 of 5 batches is none"):
        check_interval(trainer("limit_train_batches=0.1"), batches=5)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("00:01:00", 60), ("01:02:03:04", 93784), (90, 90), ("100:00:01", 360001)],
)
def test_durations(value, seconds):
    assert time_limit(value) == timedelta(seconds=seconds)
    assert time_limit(None) is None and time_limit({"hours": 2}) == timedelta(hours=2)


def test_only_what_changes_the_weights_is_in_the_key():
    def key(*overrides: str, validated: bool = False):
        return weighty(trainer(*overrides), validated)

    assert key() == key(
        "accelerator=cpu", "devices=2", "strategy=ddp", "max_time=10", "profiler=simple",
        "log_every_n_steps=3", "deterministic=true", "limit_val_batches=2", "val_check_interval=3",
    )  # fmt: skip
    for change in ("min_epochs=3", "accumulate_grad_batches=2", "precision=32-true"):
        assert key(change) != key()
    assert key("limit_val_batches=2", validated=True) != key(validated=True)
    unknown = compose_list(["+trainer.of_tomorrow=1"]).trainer
    assert weighty(unknown, validated=False) != key()


def test_steps_are_those_of_the_limit_that_comes_first():
    assert steps_and_epochs(trainer("max_epochs=3"), 10) == (30, 3.0)
    assert steps_and_epochs(trainer("max_epochs=3", "max_steps=100"), 10) == (30, 3.0)
    assert steps_and_epochs(trainer("max_epochs=3", "max_steps=15"), 10) == (15, 1.5)
    assert steps_and_epochs(trainer("max_epochs=2", "accumulate_grad_batches=4"), 10) == (6, 2.0)
