"""The grid of samples during training: bounded however many classes there are."""

import inspect
from functools import partial
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from conftest import CONFIGS
from omegaconf import OmegaConf

from bayesdiff.checks import UserError
from bayesdiff.data.images import ImageData
from bayesdiff.data.module import ImageDataModule
from bayesdiff.models import GenerativeModel
from bayesdiff.networks import UNet
from bayesdiff.paths import CondOT
from bayesdiff.report import figures
from bayesdiff.report.sample_grid import SampleGrid


def model(classes: int | None, **options) -> GenerativeModel:
    net = UNet(1, 4, classes, channels=(8,), blocks=1, attention=False, **options)
    optimizer = partial(torch.optim.AdamW, lr=1e-3)
    return GenerativeModel(net, CondOT(), "velocity", optimizer, num_classes=classes).eval()


@pytest.mark.parametrize(
    ("classes", "rows", "most", "size"),
    [
        (10, 4, 64, 40),
        (16, 4, 64, 64),
        (17, 4, 64, 64),
        (1000, 4, 64, 64),
        (None, 4, 64, 40),
        (3, 2, 5, 4),
        (1000, 7, 64, 63),
        (5, 9, 6, 6),
    ],
)
def test_size_of_a_grid(classes, rows, most, size):
    assert SampleGrid(rows=rows, max_images=most).size(classes) == size


def test_of_many_classes_some_at_even_distances():
    grid = SampleGrid(num_steps=1)
    images, labels = grid.sample(model(1000), (1, 4, 4))
    assert images.shape == (64, 1, 4, 4)
    values, counts = labels.unique(return_counts=True)
    assert len(values) == 16 and counts.tolist() == [4] * 16
    assert set(values.diff().tolist()) <= {62, 63}
    _, few = grid.sample(model(10), (1, 4, 4))
    assert few.tolist() == [i % 10 for i in range(40)]
    assert grid.sample(model(None), (1, 4, 4))[1] is None


@pytest.mark.parametrize(
    ("classes", "rows", "most", "said", "shown"),
    [
        (30, 4, 64, "64 of 64 samples, unselected; 16 of 30 classes, step 7", 64),
        (2, 4, 64, "8 of 8 samples, unselected; step 7", 8),
        (60, 1, 64, "60 of 60 samples, unselected; step 7", 60),
        (None, 2, 64, "20 of 20 samples, unselected; step 7", 20),
        (30, 5, 150, "150 of 150 samples, unselected; step 7", 150),
        (None, 15, 150, "150 of 150 samples, unselected; step 7", 150),
        (3, 90, 70, "70 of 70 samples, unselected; 1 of 3 classes, step 7", 70),
    ],
)
def test_a_grid_shows_what_was_drawn_and_says_it(
    classes, rows, most, said, shown, tmp_path, monkeypatch
):
    made = []
    draw = figures.sample_grid
    monkeypatch.setattr(figures, "sample_grid", lambda *a: made.append(draw(*a)) or made[-1])
    monkeypatch.setattr(figures, "save", lambda figure, path, **options: None)
    labels = None if classes is None else torch.arange(classes)
    images = torch.zeros(classes or 3, 1, 4, 4, dtype=torch.uint8)
    names = tuple(str(i) for i in range(classes or 0))
    data = ImageData.build("n", images, labels, images, labels, names)
    trainer = SimpleNamespace(
        state=SimpleNamespace(fn="fit"),
        global_step=7,
        estimated_stepping_batches=7,
        sanity_checking=False,
        datamodule=SimpleNamespace(data=data),
        default_root_dir=str(tmp_path),
        loggers=[],
    )
    SampleGrid(num_steps=1, rows=rows, max_images=most).on_validation_epoch_start(
        trainer, model(classes)
    )
    (figure,) = made
    words = " ".join(t.get_text() for t in figure.findobj(lambda a: hasattr(a, "get_text")))
    assert said in words
    assert len(figure.axes[0].images) == shown


def small_data():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, 1, 4, 4), dtype=torch.uint8, generator=generator)
    return ImageDataModule(ImageData.build("n", images, None, images, None), batch_size=4)


def trainer_of(tmp_path, *callbacks, **options):
    return L.Trainer(
        accelerator="cpu", callbacks=list(callbacks), logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, default_root_dir=tmp_path,
        **options,
    )  # fmt: skip


@pytest.fixture
def drawn(monkeypatch):
    """Steps at which grids were drawn."""
    steps = []
    draw = lambda self, trainer, model: steps.append(trainer.global_step)  # noqa: E731
    monkeypatch.setattr(SampleGrid, "_draw", draw)
    return steps


# An epoch has two batches.
WHEN = [
    ({"max_epochs": 6}, 3, [4, 8, 12]),
    ({"max_epochs": 2}, 8, [2, 4]),
    ({"max_steps": 5, "max_epochs": -1}, 2, [4, 5]),
    ({"max_steps": 5, "max_epochs": 100}, 2, [4, 5]),
    ({"max_steps": 12, "max_epochs": -1}, 2, [6, 12]),
    ({"max_epochs": 3, "check_val_every_n_epoch": 2}, 8, [4, 6]),
    ({"max_epochs": 2, "val_check_interval": 1}, 2, [2, 4]),
    ({"max_epochs": 4, "accumulate_grad_batches": 2}, 2, [2, 4]),
    ({"max_epochs": 2, "limit_val_batches": 0}, 2, [4]),
]


@pytest.mark.parametrize(("options", "grids", "steps"), WHEN)
def test_grids_are_even_and_one_follows_the_last_step(options, grids, steps, drawn, tmp_path):
    trainer = trainer_of(tmp_path, SampleGrid(grids), **options)
    trainer.fit(model(None), datamodule=small_data())
    assert drawn == steps
    drawn.clear()
    trainer.validate(trainer.lightning_module, datamodule=small_data())
    assert drawn == []


class StopAtEpoch(L.Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = trainer.current_epoch == 1


def test_a_resumed_training_draws_what_is_left(drawn, tmp_path):
    first = trainer_of(tmp_path, SampleGrid(2), StopAtEpoch(), max_epochs=4, min_epochs=1)
    first.fit(model(None), datamodule=small_data())
    assert drawn == [4]
    first.save_checkpoint(tmp_path / "a.ckpt")
    again = trainer_of(tmp_path, SampleGrid(2), max_epochs=4)
    again.fit(model(None), datamodule=small_data(), ckpt_path=tmp_path / "a.ckpt")
    assert drawn == [4, 8]


def test_after_the_last_step_there_is_no_dropout_either():
    net = model(None, dropout=0.5)
    grid = SampleGrid(num_steps=2, max_images=8)
    evaluated, _ = grid.sample(net, (1, 4, 4))
    trained, _ = grid.sample(net.train(), (1, 4, 4))
    assert torch.equal(trained, evaluated) and net.training


def test_a_path_that_no_grid_can_follow_is_refused_before_it_trains(tmp_path):
    own = model(None)
    own.path = type("Own", (CondOT,), {"smooth": False})()
    with pytest.raises(UserError, match="smooth in time.*leave grids out, callbacks.samples=null"):
        trainer_of(tmp_path, SampleGrid(), max_steps=1).fit(own, datamodule=small_data())


def test_the_configuration_lists_the_options_with_their_defaults():
    given = OmegaConf.load(CONFIGS / "callbacks" / "default.yaml").samples
    assert given.pop("_target_") == "bayesdiff.report.sample_grid.SampleGrid"
    parameters = inspect.signature(SampleGrid).parameters
    assert dict(given) == {name: one.default for name, one in parameters.items()}
