"""What a device is good at, and how many threads work on it."""

import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from torch import nn

from bayesdiff.machine import device as device_
from bayesdiff.machine.device import all_threads, settle_threads
from bayesdiff.metrics.features import extract
from bayesdiff.runs.build import build

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def three_threads(monkeypatch):
    """A process of a command, whose number of threads torch has chosen."""
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(HydraConfig, "initialized", lambda: True)
    monkeypatch.setattr(device_, "_all", None)
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("device", "values", "threads"), [("cpu", 64, 1), ("cpu", 784, 3), ("cuda", 64, 3)]
)
def test_small_images_take_one_thread(device, values, threads):
    settle_threads(torch.device(device), values)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("own", ["environment", "program"])
def test_a_number_of_the_users_own_stays(own, monkeypatch):
    if own == "environment":
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
    else:
        monkeypatch.setattr(HydraConfig, "initialized", lambda: False)
    settle_threads(CPU, 64)
    assert torch.get_num_threads() == 3


def test_the_next_cell_of_one_process_has_what_its_images_take(compose):
    """A sweep over data=digits,mnist, one cell after the other; here larger digits."""
    for overrides, threads in (((), 1), ((), 1), (("data.resize=16",), 3), ((), 1)):
        build(compose(*overrides))
        assert torch.get_num_threads() == threads, overrides


class Enlarges(nn.Module):
    """An extractor that notes how many threads it has."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.threads = nn.Parameter(torch.zeros(1)), []

    def forward(self, images):
        self.threads.append(torch.get_num_threads())
        return torch.zeros(len(images), 2), torch.zeros(len(images), 2)


def test_extractors_that_enlarge_the_images_have_all_threads(compose):
    settle_threads(CPU, 64)
    extractor = Enlarges()
    images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    extract(extractor, images)
    assert extractor.threads == [3] and torch.get_num_threads() == 1
    with pytest.raises(ZeroDivisionError), all_threads():
        _ = 1 / 0
    assert torch.get_num_threads() == 1
