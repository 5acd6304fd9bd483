"""Nothing is silent for long: estimates, lines without a terminal, and nothing left behind."""

import io
import logging
import re
import sys
import threading
import time

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console
from rich.progress import Progress

from bayesdiff.machine import progress
from bayesdiff.machine.progress import Meter, evaluated, stage, track
from bayesdiff.runs.training_progress import TrainingProgress
from bayesdiff.solvers import Euler


@pytest.fixture
def hasty(monkeypatch, caplog):
    """Lines after hundredths of a second, and what they say."""
    for name, seconds in (("EVERY", 0.1), ("FIRST", 0.02), ("LONG", 0.0), ("_WAKE", 0.005)):
        monkeypatch.setattr(progress, name, seconds)
    caplog.set_level(logging.INFO, "bayesdiff")
    return caplog


def meter(**options) -> Meter:
    return Meter("maps", began=time.monotonic() - 60, **options)


def test_time_left_follows_the_rate_and_the_network_s_evaluations():
    assert meter(total=64).left is None  # nothing is done: nobody knows
    assert meter(total=64, done=16).left == pytest.approx(180, rel=1e-3)
    # A quarter of the first 16 images' evaluations: an estimate before any image is done.
    within = meter(total=64, each=20, size=16, work=80)
    assert within.at == 4 and within.left == pytest.approx(900, rel=1e-3)
    # A training that goes on: what was done before says nothing about the rate.
    assert meter(total=100, start=40, done=60).left == pytest.approx(120, rel=1e-3)
    assert meter(total=64, unit="images", done=16).line() == (
        "maps: 16 of 64 images, 60 s so far, about 3 min left"
    )


def test_evaluations_of_the_items_done_replace_the_expectation():
    one = meter(total=8, each=1000, size=4, work=80)
    one.finish()
    assert (one.done, one.each, one.work) == (4, 20, 0)
    one.work = 40
    assert one.at == 6
    one.work = 4000  # more than expected: the item is still not done
    assert one.at < 8


def test_a_loop_says_an_estimate_and_then_how_far_it_is(hasty):
    for _ in track(range(6), "images", "images", lambda item: 2):
        time.sleep(0.06)
    said = hasty.messages
    assert re.fullmatch(r"images: about \S+ \w+ in all", said[0])
    assert any(
        re.match(r"images: \d+ of 12 images, \S+ s so far, about \S+ s left", s) for s in said
    )
    assert len(said) > 2


def test_one_long_batch_is_not_silent(hasty):
    for _ in track([0], "maps", "images", lambda item: 16, each=20):
        for _ in range(20):
            time.sleep(0.01)
            evaluated(16)
    assert any(re.match(r"maps: [1-9]\d* of 16 images", line) for line in hasty.messages)


def test_work_that_counts_nothing_is_not_silent(hasty):
    with stage("scores", "of 10 images"):
        time.sleep(0.2)
    assert hasty.messages[0] == "scores: of 10 images"
    assert any(line.startswith("scores, ") for line in hasty.messages[1:])


def test_whoever_comes_next_waits_for_his_turn(caplog):
    """An outer stage does not speak as soon as an inner one has ended."""
    caplog.set_level(logging.INFO, "bayesdiff")
    outer, now = Meter("outer", began=time.monotonic() - 60), time.monotonic()
    assert outer.speak(now, now - 1) == now - 1 and caplog.messages == []
    assert outer.speak(now, now - progress.EVERY) == now
    assert caplog.messages == ["outer, 60 s so far"]


def test_short_work_says_nothing(caplog):
    caplog.set_level(logging.INFO, "bayesdiff")
    assert list(track([1, 2, 3], "short")) == [1, 2, 3]
    assert caplog.messages == []


def test_an_error_leaves_nothing_open(hasty):
    def fails():
        with stage("outer"):
            for item in track([1, 2], "inner"):
                raise ValueError(item)

    with pytest.raises(ValueError, match="1"):
        fails()
    assert progress._watch.open == []
    time.sleep(0.1)
    before = len(hasty.messages)
    time.sleep(0.15)
    assert len(hasty.messages) == before
    assert not [t for t in threading.enumerate() if t.name == "progress"]


def test_a_terminal_has_bars_and_no_lines(hasty, monkeypatch):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(progress, "_bars", lambda: _started(Progress(console=console)))
    for _ in track(range(4), "outer"):
        for _ in track(range(3), "inner"):
            time.sleep(0.02)
    assert "outer" in screen.getvalue() and "inner" in screen.getvalue()
    assert [line for line in hasty.messages if " of " in line] == []
    assert progress._watch.bars is None


def _started(bars: Progress) -> Progress:
    bars.start()
    return bars


def test_the_network_counts_its_evaluations_under_whatever_loop_is_open():
    from hand import FLOW, model_of, small_unet

    from bayesdiff.uncertainty import Ensemble, Refined, starts_of

    model = model_of(small_unet()[0], FLOW, "velocity", num_classes=3)
    start = starts_of(model, Euler(4, guidance=2.0), 0, (1, 8, 8), torch.device("cpu"))([0, 1])
    with stage("field") as open_, torch.no_grad():
        start.field()(torch.zeros(2, 1, 8, 8), 0.5)
    assert open_.work == 4 and start.nfe == 8
    # Four steps, 16 members of four each; guided ones take two evaluations.
    assert Ensemble(members=16).evaluations(start) == 8 * 17
    assert Refined(budget=1.0, products=2).evaluations(start) == 8 * (1 + 2 * 2 / 4)


class Line(L.LightningModule):
    """The smallest training."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        time.sleep(0.01)
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def trained(tmp_path, **options) -> None:
    loader = torch.utils.data.DataLoader(torch.ones(10, 1), batch_size=1)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False,
        callbacks=[RichProgressBar(), TrainingProgress()], default_root_dir=tmp_path, **options,
    )  # fmt: skip
    trainer.fit(Line(), loader)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("options", "steps", "epochs"),
    [
        ({"max_epochs": -1, "max_steps": 24}, "of 24 steps", "of 3"),
        ({"max_epochs": 5, "max_steps": 24}, "of 24 steps", "of 3"),
        ({"max_epochs": -1, "max_steps": -1, "max_time": {"milliseconds": 300}}, "", ""),
    ],
    ids=["steps", "both", "time"],
)
def test_epochs_are_counted_whatever_bounds_them(options, steps, epochs, hasty, tmp_path):
    trained(tmp_path, **options)
    at = rf"training: \d+ {steps}, " if steps else "training, "
    pattern = rf"{at}epoch [123] {epochs},.*" if epochs else rf"{at}epoch \d+, .*"
    assert any(re.fullmatch(pattern, line) for line in hasty.messages), hasty.messages


@pytest.mark.filterwarnings("ignore")
def test_a_training_without_a_terminal_has_lines_in_place_of_a_bar(hasty, tmp_path, capsys):
    trained(tmp_path, max_epochs=3)
    assert "training: 30 steps, 10 batches an epoch" in hasty.messages
    pattern = (
        r"training: \d+ of 30 steps, epoch [123] of 3, loss \S+, \S+ s so far, about \S+ s left"
    )
    assert any(re.fullmatch(pattern, line) for line in hasty.messages), hasty.messages
    shown = capsys.readouterr()
    assert "Epoch" not in shown.out + shown.err
    assert progress._watch.open == []
