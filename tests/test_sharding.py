"""A training that is split over two processes: what one makes, with half of it on each."""

import json
import shutil
from pathlib import Path

import lightning as L
import pytest
import torch
from conftest import ROOT, compose_list, python_in, scalars, smallest, train_py
from torch.distributed.tensor import DTensor

from bayesdiff import pipeline
from bayesdiff.checks import UserError
from bayesdiff.report import board
from bayesdiff.storage.checkpoints import read_checkpoint
from bayesdiff.uncertainty.members.snapshots import read_snapshot, snapshots_of

TWO = ("trainer=fsdp", "trainer.devices=2")
CLIPPED_AT = 0.01
OPTIONS = (
    "trainer.max_epochs=2",
    "callbacks.ema.decay=0.9",
    "model.warmup_steps=2",
    "metrics.num_images=0",
    "+model.optimizer.eps=1",  # or Adam makes whole steps of the rounding of zero gradients
    "model.optimizer.lr=1",
    f"trainer.gradient_clip_val={CLIPPED_AT}",
    "+callbacks.kept._target_=test_sharding.Kept",
    "+callbacks.snapshots._target_=bayesdiff.uncertainty.Snapshots",
    "+callbacks.snapshots.keep=2",
)
PICTURES = (
    "callbacks.samples={_target_:bayesdiff.report.sample_grid.SampleGrid,num_steps:2,rows:1}"
)


class Kept(L.Callback):
    """Notes the first step and what a process holds; keeps the checkpoint of the first epoch."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the step that it begins at."""
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / "begun.json"
            path.write_text(json.dumps(trainer.global_step))

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep what a training that is stopped now would leave."""
        folder = Path(trainer.default_root_dir)
        last = folder / "checkpoints" / "last.ckpt"
        if trainer.current_epoch == 1 and trainer.is_global_zero and last.is_file():
            shutil.copy(last, folder / "first.ckpt")

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Pictures are drawn now, without dropout."""
        assert not pl_module.whole().training

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Weights, averages and optimiser: here, and in all."""
        (optimizer,) = trainer.optimizers
        average = trainer.callbacks[0]._average_model
        states = [v for state in optimizer.state.values() for v in state.values() if v.dim()]
        tensors = [*pl_module.parameters(), *average.parameters(), *states]
        here = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
        held, whole = (sum(t.numel() for t in each) for each in (here, tensors))
        path = Path(trainer.default_root_dir) / f"held-{trainer.global_rank}.json"
        path.write_text(json.dumps([held, whole]))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path]:
    """The same training in one process and in two, which then go on from its middle as well."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("sharding")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(board, "write", lambda *args, **kwargs: [])
        cfg = compose_list(smallest(folder / "one", *OPTIONS))
        one = pipeline.run(cfg).folder.parent
    begun = folder / "two" / one.name
    turns = [
        smallest(folder / "two", *OPTIONS, *TWO, PICTURES),
        smallest(folder / "split", *OPTIONS, *TWO, f"ckpt_path={begun}/first.ckpt"),
    ]
    (folder / "turns.json").write_text(json.dumps(turns))
    done = python_in(folder, ROOT / "tests" / "in_turn.py", str(folder / "turns.json"))
    torch.set_num_threads(threads)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return one, begun


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """Two sets of weights."""
    assert first.keys() == second.keys()
    for name, value in first.items():
        far = float((second[name] - value).abs().max())
        assert far < 1e-6, f"{name}: {far}"


def same_network(one: Path, two: Path) -> None:
    """Averaged and raw weights of two checkpoints."""
    first, second = map(read_checkpoint, (one, two))
    same(first["state_dict"], second["state_dict"])
    same(first["current_model_state"], second["current_model_state"])


def test_the_same_weights_as_in_one_process(runs):
    one, two = runs
    same_network(*(run / "checkpoints" / "last.ckpt" for run in runs))
    start = pipeline.build(compose_list(smallest(one.parent, *OPTIONS))).model.state_dict()
    end = read_checkpoint(two / "checkpoints" / "last.ckpt")["state_dict"]
    assert max((end[name] - value).abs().max() for name, value in start.items()) > 5e-4


def test_gradients_are_clipped_by_the_norm_over_all_parts(runs):
    one, two = (scalars(run / "tensorboard")["train/grad_norm"] for run in runs)
    assert len(one) == 4 and min(one) > CLIPPED_AT
    assert two == pytest.approx(one, rel=1e-5)


def test_each_process_holds_half(runs):
    _, two = runs
    held, whole = zip(
        *(json.loads((two / f"held-{n}.json").read_text()) for n in (0, 1)), strict=True
    )
    assert whole[0] == whole[1] == sum(held)
    assert max(held) < 0.55 * whole[0]


def test_pictures_and_snapshots_are_of_the_whole_network(runs):
    first, second = ([read_snapshot(path) for path in snapshots_of(run)] for run in runs)
    assert len(first) == len(second) == 2
    for one, two in zip(first, second, strict=True):
        same(one, two)
    assert (runs[1] / "figures" / "training.png").is_file()


@pytest.mark.parametrize("name", ["StochasticWeightAveraging", "WeightAveraging"])
def test_averages_that_cannot_be_split_are_refused_before_processes_start(name, tmp_path):
    other = f"+callbacks.swa._target_=lightning.pytorch.callbacks.{name}"
    with pytest.raises(UserError, match="callbacks.swa cannot average.*trainer=ddp"):
        pipeline.prepare(compose_list(smallest(tmp_path, *TWO, other)))


@pytest.mark.parametrize("stopped", [pytest.param("one", marks=pytest.mark.slow), "two"])
def test_a_stopped_training_goes_on_however_it_began(
    runs, stopped, tmp_path, monkeypatch, one_thread
):
    monkeypatch.setattr(board, "write", lambda *args, **kwargs: [])
    begun = runs[["one", "two"].index(stopped)]
    more = [*OPTIONS, f"ckpt_path={begun}/first.ckpt"]
    alone = pipeline.run(compose_list(smallest(tmp_path, *more))).folder.parent
    split = begun.parents[1] / "split" / begun.name
    if stopped == "one":
        done = train_py(tmp_path, *smallest(tmp_path / "split", *more, *TWO))
        assert done.returncode == 0, done.stderr
        split = tmp_path / "split" / begun.name
    for folder in (alone, split):
        assert json.loads((folder / "begun.json").read_text()) == 2  # not from the start
        same_network(runs[0] / "checkpoints" / "last.ckpt", folder / "checkpoints" / "last.ckpt")
