"""What a device is good at."""

import pytest
import torch

from bayesdiff.machine.device import settle_threads


@pytest.mark.parametrize(
    ("device", "values", "own", "set_to"),
    [("cpu", 64, None, [1]), ("cpu", 784, None, []), ("cpu", 64, "2", []), ("cuda", 64, None, [])],
)
def test_small_images_take_one_thread(device, values, own, set_to, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if own:
        monkeypatch.setenv("OMP_NUM_THREADS", own)
    settle_threads(torch.device(device), values)
    assert chosen == set_to
