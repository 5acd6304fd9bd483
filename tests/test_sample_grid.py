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
from bayesdiff.report.callback import SampleGrid, grid_size


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


@pytest.mark.parametrize(("classes", "said"), [(30, "16 of 30 classes, epoch 1"), (4, "epoch 1")])
def test_the_caption_says_how_many_classes(classes, said, tmp_path, monkeypatch):
    captions = []
    monkeypatch.setattr(figures, "sample_grid", lambda *args: captions.append(args[-1]))
    monkeypatch.setattr(figures, "save", lambda figure, path: None)
    labels = torch.arange(classes)
    images = torch.zeros(classes, 1, 4, 4, dtype=torch.uint8)
    names = tuple(str(i) for i in range(classes))
    data = ImageData.build("n", images, labels, images, labels, names)
    trainer = SimpleNamespace(
        current_epoch=0,
        max_epochs=1,
        sanity_checking=False,
        datamodule=SimpleNamespace(data=data),
        default_root_dir=str(tmp_path),
        loggers=[],
    )
    SampleGrid(num_steps=1).on_validation_epoch_start(trainer, model(classes))
    (caption,) = captions
    assert caption.startswith(said)
