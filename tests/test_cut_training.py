"""A training that something cut never counts as finished, and goes on as if nothing had been."""

import json
import os
import signal

import pytest
from lightning.pytorch.callbacks import Callback

from bayesdiff import pipeline
from bayesdiff.checks import UserError
from bayesdiff.runs import training
from bayesdiff.runs.build import build
from bayesdiff.storage.artefacts import read_json
from bayesdiff.storage.checkpoints import read_checkpoint

SETTINGS = (
    "trainer.max_epochs=2",
    "trainer.limit_train_batches=5",
    "model.warmup_steps=3",
    "callbacks.ema.decay=0.9",
    "data.flip=true",
    "net.dropout=0.2",
    "+callbacks.mine._target_=test_cut_training.Stops",
)


class Stops(Callback):
    """Does something when a step is done; what, is no part of its options."""

    at, act = -1, None

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == Stops.at:
            Stops.act(trainer)


def should_stop(trainer):
    trainer.should_stop = True


@pytest.fixture
def stops(monkeypatch):
    def at(step, act=should_stop):
        monkeypatch.setattr(Stops, "at", step)
        monkeypatch.setattr(Stops, "act", staticmethod(act))

    return at


def fit(cfg):
    this, _, _, laplace = pipeline.prepare(cfg)
    return this, training.fit(this, laplace)


def last_of(cfg) -> dict:
    return read_checkpoint(build(cfg).folder / "checkpoints" / "last.ckpt")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[int, str]:
    """Weights of trainings that nothing stopped, by the batches of each step."""
    from conftest import compose_list, smallest

    def weights(every: int) -> str:
        folder = tmp_path_factory.mktemp("whole")
        more = f"trainer.accumulate_grad_batches={every}"
        return fit(compose_list(smallest(folder, *SETTINGS, more)))[1]

    return {every: weights(every) for every in (1, 2)}


@pytest.mark.parametrize(("every", "steps"), [(1, [2, 5, 7]), (2, [2])])
def test_cut_anywhere_it_ends_bit_for_bit_the_same(every, steps, whole, compose, stops):
    """In the middle of an epoch, at its end, and with steps of two batches."""
    cfg = compose(*SETTINGS, f"trainer.accumulate_grad_batches={every}")
    for step in steps:
        stops(step)
        with pytest.raises(UserError, match=f"training cut at {step} of .* of Stops; the same"):
            fit(cfg)
        folder = build(cfg).folder
        assert last_of(cfg)["global_step"] == step
        assert not (folder / "fit.json").exists() and not list(folder.glob("curvature-*"))
    stops(-1)
    assert fit(cfg)[1] == whole[every]


def test_a_time_limit_cuts_and_the_command_without_it_goes_on(whole, compose):
    with pytest.raises(UserError, match="cut at 1 of 10 steps by trainer.max_time; the same"):
        fit(compose(*SETTINGS, "trainer.max_time=0.000001"))
    with pytest.raises(UserError, match="cut at 2 of 10 steps by trainer.max_time"):
        fit(compose(*SETTINGS, "trainer.max_time={microseconds:1}"))  # each command has its own
    assert fit(compose(*SETTINGS))[1] == whole[1]


def test_sigterm_keeps_the_place(whole, compose, stops):
    stops(3, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
    cfg = compose(*SETTINGS)
    with pytest.raises((KeyboardInterrupt, UserError)):
        fit(cfg)
    assert last_of(cfg)["global_step"] in (3, 4)
    stops(-1)
    assert fit(cfg)[1] == whole[1]


def test_an_error_of_a_callback_says_how_far_it_was(compose, stops, caplog):
    stops(7, lambda trainer: 1 / 0)
    cfg = compose(*SETTINGS)
    with pytest.raises(ZeroDivisionError):
        fit(cfg)
    assert "cut at 7 of 10 steps (the checkpoint is that of step 5)" in caplog.text
    assert last_of(cfg)["global_step"] == 5


EARLY = (
    "trainer.max_epochs=6",
    "trainer.limit_train_batches=2",
    "+callbacks.early._target_=lightning.pytorch.callbacks.EarlyStopping",
    "+callbacks.early.monitor=train/loss",
    "+callbacks.early.stopping_threshold=1000",
    "+callbacks.early.verbose=false",
)


def test_a_stopping_rule_ends_a_training(compose, monkeypatch):
    """Also one that was killed before it could say so; and it waits for trainer.min_epochs."""
    cfg = compose(*EARLY, "trainer.min_epochs=3")
    with monkeypatch.context() as patch:
        patch.setattr(training, "write_json", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fit(cfg)
    monkeypatch.setattr(training, "train", lambda *args: pytest.fail("trains again"))
    this, weights = fit(cfg)
    assert json.loads((this.folder / "fit.json").read_text())["weights"] == weights
    assert last_of(cfg)["global_step"] == 6
    assert last_of(cfg)["bayesdiff"]["ended"] == "EarlyStopping"


def test_a_rule_of_ones_own_says_that_it_ended_the_training(compose, stops):
    def end(trainer):
        trainer.should_stop = True
        next(c for c in trainer.callbacks if isinstance(c, Stops)).ended_training = True

    stops(3, end)
    this, _ = fit(compose(*SETTINGS))
    record = read_json(this.folder / "fit.json")
    assert (record["steps"], record["ended_by"]) == (3, "Stops")


def test_what_a_callback_leaves_at_the_very_end_is_what_is_read(compose):
    """Lightning's SWA puts its average in place only after the last epoch."""
    swa = "lightning.pytorch.callbacks.StochasticWeightAveraging"
    options = [f"+callbacks.swa._target_={swa}", "+callbacks.swa.swa_lrs=0.01"]
    options += ["+callbacks.swa.swa_epoch_start=1", "callbacks.ema=null"]
    cfg = compose("trainer.max_epochs=4", *options)
    this, weights = fit(cfg)
    assert last_of(cfg)["global_step"] == 8
    plain, _ = fit(compose("trainer.max_epochs=4", "callbacks.ema=null"))
    assert plain.key != this.key
    assert read_json(this.folder / "fit.json")["weights"] == weights
    head = last_of(cfg)["state_dict"]["net.head.weight"]
    raw = last_of(cfg)["callbacks"]["StochasticWeightAveraging"]
    assert raw["n_averaged"] >= 1 and head.isfinite().all()
