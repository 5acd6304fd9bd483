"""What stages take is written into the run folder: the truth, once, and of all commands."""

import json
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import Compose, Trained
from test_resume import stop_at

from bayesdiff import pipeline
from bayesdiff.machine import costs
from bayesdiff.machine.costs import kept_by, making, peak_memory
from bayesdiff.models import GenerativeModel
from bayesdiff.networks import UNet
from bayesdiff.runs import callbacks, trainer
from bayesdiff.runs.stage_costs import NAME, Kind, cost_of, records_in
from bayesdiff.storage.artefacts import Artefact
from bayesdiff.storage.checkpoints import read_checkpoint
from bayesdiff.storage.locks import alone, lock_of

TRAINED = ("net.dropout=0.3", "trainer.limit_train_batches=3", "trainer.max_epochs=2",
           "metrics.num_images=0")  # fmt: skip

pytestmark = pytest.mark.usefixtures("without_reports")


def lines_of(folder):
    return [json.loads(line) for line in (folder / NAME).read_text().splitlines()]


@pytest.fixture
def clock(monkeypatch):
    """Time that stands still until a test moves it."""
    now = SimpleNamespace(at=0.0)
    for place in (costs, callbacks):
        watch = SimpleNamespace(perf_counter=lambda: now.at)
        monkeypatch.setattr(place, "time", watch)
    return now


@pytest.fixture
def kept():
    """What is handed over, in order."""
    found: list[tuple[str, dict]] = []
    with kept_by(lambda stage, cost: found.append((stage, cost))):
        yield found


def test_a_piece_is_measured_without_what_is_measured_inside(clock, kept):
    with making("maps"):
        clock.at += 1
        with making("refiner"):
            clock.at += 10
            with making(""):  # a part of the refiner
                clock.at += 100
        clock.at += 2
        with making("classifier"):
            clock.at += 1000
    found = [(stage, cost["seconds"]) for stage, cost in kept]
    assert found == [("refiner", 110), ("classifier", 1000), ("maps", 3)]
    assert all(0.01 < cost["memory"] <= peak_memory() for _, cost in kept)


def test_what_ends_badly_is_not_kept_and_does_not_count_for_what_is_around(clock, kept):
    with making("maps"):
        clock.at += 1
        with pytest.raises(ZeroDivisionError), making("refiner"):
            clock.at += 10
            raise ZeroDivisionError
    assert [(stage, cost["seconds"]) for stage, cost in kept] == [("maps", 1)]


def test_nothing_is_measured_where_nobody_keeps_it(kept):
    with kept_by(None), making("maps"):
        pass
    assert kept == []


def test_an_artefact_is_measured_where_it_is_made_and_not_where_it_is_read(clock, kept, tmp_path):
    def make():
        clock.at += 5
        return {"x": torch.ones(1)}

    for stage in ("maps", "maps", ""):
        Artefact(tmp_path / f"{stage}.npz", "k", stage).arrays(make)
    assert [cost["seconds"] for stage, cost in kept if stage != "waiting"] == [5]


def test_waiting_for_another_process_is_no_work(kept, tmp_path):
    held, done = threading.Event(), threading.Event()

    def other():
        with lock_of(tmp_path / "x").acquire():
            held.set()
            done.wait(5)

    thread = threading.Thread(target=other)
    thread.start()
    held.wait(5)
    threading.Timer(0.3, done.set).start()
    began = time.perf_counter()
    with making("scores"), alone(tmp_path / "x"):
        pass
    whole = time.perf_counter() - began
    thread.join()
    scores = dict(kept)["scores"]["seconds"]
    assert whole > 0.25 and scores < whole / 2


def test_a_run_records_every_stage_once(trained: Trained):
    lines = lines_of(trained.folder)
    by_stage = {line["stage"]: line for line in lines}
    assert len(by_stage) == len(lines)
    assert by_stage.keys() == {
        "training", "curvature", "images", "classifier", "scores", "maps", "image_scores",
        "report",
    }  # fmt: skip
    for line in lines:
        assert line["seconds"] >= 0 and line["memory"] > 0.01 and line["device"]
        assert (line["processes"], line["threads"]) == (1, torch.get_num_threads())
    assert (by_stage["training"]["amount"], by_stage["training"]["unit"]) == (2, "steps")
    assert (by_stage["maps"]["amount"], by_stage["images"]["amount"]) == (4, 12)
    fit = json.loads((trained.folder / "fit.json").read_text())
    assert round(fit["seconds"], 3) == by_stage["training"]["seconds"] > 0


def test_what_is_there_is_not_recorded_again(copied: Trained, compose: Compose):
    before = (copied.folder / NAME).read_text()
    pipeline.run(compose())
    assert (copied.folder / NAME).read_text() == before
    copied.samples.unlink()
    pipeline.run(compose())
    assert [line["stage"] for line in lines_of(copied.folder)[-1:]] == ["maps"]


@pytest.mark.parametrize("estimator", ["ensemble", "linearised", "refined"])
def test_recorded_evaluations_are_those_of_the_network(
    estimator, copied: Trained, compose: Compose, monkeypatch
):
    seen, real = [], UNet.features

    def features(self, x, *rest):
        seen.append(len(x) if len(x) > 1 else 0)  # checks of shape and memory take one image
        return real(self, x, *rest)

    monkeypatch.setattr(UNet, "features", features)
    words = [f"uncertainty={estimator}", "uncertainty.seed=5", "metrics.num_images=0"]
    pipeline.run(compose(*words))
    new = lines_of(copied.folder)[8:]
    assert sum(line.get("evaluations", 0) for line in new) == sum(seen) > 0


def test_a_resumed_training_counts_all_commands_and_no_lost_step(
    compose: Compose, clock, monkeypatch
):
    """A second for every step; the one that is lost, after the last checkpoint, is made again."""
    real = GenerativeModel.training_step

    def training_step(self, batch, batch_idx):
        clock.at += 1
        return real(self, batch, batch_idx)

    monkeypatch.setattr(GenerativeModel, "training_step", training_step)
    cfg = compose(*TRAINED)
    folder = pipeline.prepare(cfg)[0].folder
    with monkeypatch.context() as patch:
        stop_at(patch, 4, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(cfg)
    assert clock.at == 4 and not (folder / NAME).exists()
    state = read_checkpoint(folder / "checkpoints" / "last.ckpt")["callbacks"]["RunCheckpoints"]
    assert state["cost"]["seconds"] == 3
    clock.at += 1000  # overnight
    pipeline.run(cfg)
    (line,) = [line for line in lines_of(folder) if line["stage"] == "training"]
    assert (line["seconds"], line["amount"]) == (6, 6) and clock.at == 1007
    assert json.loads((folder / "fit.json").read_text())["seconds"] == 6


@pytest.mark.parametrize("why", ["another device", "an older version"])
def test_a_training_whose_parts_do_not_add_up_is_not_recorded(why, compose: Compose, monkeypatch):
    cfg = compose(*TRAINED)
    folder = pipeline.prepare(cfg)[0].folder
    with monkeypatch.context() as patch:
        stop_at(patch, 4, KeyboardInterrupt())
        if why == "another device":
            place = {"device": "x", "processes": 1, "threads": 1}
            patch.setattr(trainer, "machine", lambda *_: place)
        else:
            old = lambda self: {"score": self.score}  # noqa: E731
            patch.setattr(callbacks.RunCheckpoints, "state_dict", old)
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(cfg)
    pipeline.run(cfg)
    assert {"maps", "curvature"} <= {line["stage"] for line in lines_of(folder)}
    assert "training" not in {line["stage"] for line in lines_of(folder)}
    assert json.loads((folder / "fit.json").read_text())["seconds"] is None


def test_lines_that_a_full_disk_cut_are_left_out(tmp_path):
    (tmp_path / NAME).write_text('{"stage": "maps"}\n{"stage": "ima')
    assert records_in([tmp_path, tmp_path / "nothing"]) == [{"stage": "maps"}]


def test_a_cost_is_that_of_the_longest_equal_one_or_scaled():
    place = {"device": "d", "processes": 1, "threads": 2}
    line = {"stage": "maps", "kind": "k", "unit": "images", "amount": 4, "memory": 1.0, **place}
    records = [line | {"seconds": seconds} for seconds in (3.0, 5.0, 4.0)]
    records += [line | {"seconds": 100.0, "amount": 8, "memory": 2.0}]
    kind = Kind("k", 4, "images")
    assert cost_of("maps", kind, place, records).seconds == 5
    other = cost_of("maps", Kind("k", 16, "images"), place, records)
    assert (other.seconds, other.memory, other.scale) == (200, 2, 2)
    assert cost_of("maps", kind, place, records, share=0.5).seconds == 2.5
    for change in ({"device": "e"}, {"threads": 1}, {"processes": 2}):
        assert cost_of("maps", kind, place | change, records) is None
    assert cost_of("images", kind, place, records) is None
    assert cost_of("maps", Kind("l", 4, "images"), place, records) is None
    assert cost_of("maps", Kind("k", 4), place, records) is None
