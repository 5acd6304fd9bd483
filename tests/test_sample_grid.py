"""The grid of samples during training: bounded however many classes there are."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from bayesdiff.data.images import ImageData
from bayesdiff.models import GenerativeModel
from bayesdiff.networks import UNet
from bayesdiff.paths import CondOT
from bayesdiff.report import figures
from bayesdiff.report.sample_grid import SampleGrid, grid_size


def model(classes: int | None) -> GenerativeModel:
    net = UNet(1, 4, classes, channels=(8,), blocks=1, attention=False)
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
    assert grid_size(classes, rows, most) == size


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
    ("classes", "rows", "said", "shown"),
    [
        (30, 4, "64 of 64 samples, unselected; 16 of 30 classes, epoch 1", 64),
        (2, 4, "8 of 8 samples, unselected; epoch 1", 8),
        (60, 1, "60 of 60 samples, unselected; epoch 1", 60),
        (None, 2, "20 of 20 samples, unselected; epoch 1", 20),
    ],
)
def test_a_grid_shows_what_was_drawn_and_says_it(
    classes, rows, said, shown, tmp_path, monkeypatch
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
        current_epoch=0,
        max_epochs=1,
        sanity_checking=False,
        datamodule=SimpleNamespace(data=data),
        default_root_dir=str(tmp_path),
        loggers=[],
    )
    SampleGrid(num_steps=1, rows=rows).on_validation_epoch_start(trainer, model(classes))
    (figure,) = made
    words = " ".join(t.get_text() for t in figure.findobj(lambda a: hasattr(a, "get_text")))
    assert said in words
    assert len(figure.axes[0].images) == shown
