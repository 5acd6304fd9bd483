"""An estimator stays within its memory by taking fewer images at once; nothing else changes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hand import model_of, posterior_of, random_covariance
from torch import nn

from bayesdiff.checks import UserError
from bayesdiff.laplace.head import head_matrix
from bayesdiff.networks import UNet
from bayesdiff.solvers import Euler, Heun
from bayesdiff.uncertainty import Ensemble, Published, Samples, TotalVariance, starts_of
from bayesdiff.uncertainty.memory import GIB, activation_bytes, images_at_once

SHAPE = (1, 8, 8)


class Counted(nn.Module):
    """Two leaves whose outputs are easily counted: 3 x 8 x 8 and 2 x 8 x 8 floats."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1))
        self.head = nn.Conv2d(3, 2, 1)

    def features(self, x, t, y=None):
        return self.body(x)

    def fold(self, output):
        return output

    def forward(self, x, t, y=None):
        return self.fold(self.head(self.features(x, t, y)))


def test_activations_are_counted_over_all_leaves_of_one_input():
    model = model_of(Counted())
    assert activation_bytes(model, SHAPE) == 4 * (3 + 2) * 64
    assert activation_bytes(model.double(), SHAPE) == 8 * (3 + 2) * 64


def test_counting_leaves_no_trace():
    torch.manual_seed(0)
    model = model_of(UNet(1, 8, num_classes=3, channels=(8, 16), dropout=0.5), num_classes=3)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = activation_bytes(model, SHAPE)
    assert model.net.training and activation_bytes(model, SHAPE) == first > 0
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("estimator", "copies"),
    [
        (Ensemble(members=5, noise_members=0), 6),
        (Ensemble(members=5, noise_members=9), 10),
        (Published(mc_samples=7), 8),
        (TotalVariance(mc_samples=7), 8),
        (TotalVariance(mc_samples=7, covariance="stein"), 15),
    ],
)
def test_estimators_say_how_many_inputs_they_hold(estimator, copies):
    """No evaluation of the network ever sees more inputs per image than that."""
    assert estimator.copies(Heun(3)) == copies
    net = UNet(1, 8, channels=(8, 16), blocks=1)
    posterior = posterior_of(net.head, random_covariance(head_matrix(net.head).shape[1]))
    seen = []
    real = net.features
    net.features = lambda x, t, y=None: (seen.append(len(x)), real(x, t, y))[1]
    starts = starts_of(model_of(net), Heun(3), 0, SHAPE, torch.device("cpu"))
    estimator(starts([0, 1]), posterior)
    assert max(seen) <= 2 * copies


def test_half_the_memory_is_half_the_images_and_never_more_than_asked_for():
    model = model_of(UNet(1, 8, channels=(8, 16)))

    def at_once(**options):
        return images_at_once(Ensemble(**options), Euler(20), model, SHAPE)

    whole = at_once(max_memory=0.5, batch_size=10**9)
    assert at_once(max_memory=0.25, batch_size=10**9) == pytest.approx(whole / 2, abs=1)
    assert at_once(max_memory=0.5, batch_size=7) == 7
    assert at_once(max_memory=0.5, batch_size=10**9, members=33) < 0.52 * whole
    needed = 17 * activation_bytes(model, SHAPE)
    assert 0.5 * GIB / whole > needed


def test_an_image_that_does_not_fit_is_refused_with_what_it_needs():
    model = model_of(UNet(1, 8, channels=(8, 16)))
    ensemble = Ensemble(members=100, max_memory=1e-3)
    with pytest.raises(UserError, match=r"max_memory=0.001 GiB.*needs 0\.\d+ GiB.*raise") as error:
        images_at_once(ensemble, Euler(20), model, SHAPE)
    needed = float(str(error.value).split("needs ")[1].split()[0])
    enough = Ensemble(members=100, max_memory=needed * 1.05)
    assert images_at_once(enough, Euler(20), model, SHAPE) == 1


@pytest.mark.parametrize("estimator", [Ensemble(members=3), TotalVariance(mc_samples=3)])
def test_maps_do_not_depend_on_the_memory(estimator):
    """The same through one batch and through batches of one image."""
    torch.manual_seed(0)
    net = UNet(1, 8, channels=(8, 16), blocks=1)
    posterior = posterior_of(net.head, random_covariance(head_matrix(net.head).shape[1]))
    model = model_of(net)
    real = starts_of(model, Euler(3), 0, SHAPE, torch.device("cpu"))
    needed = estimator.copies(Euler(3)) * activation_bytes(model, SHAPE) / GIB
    found = []
    for room in (100, 1.5):
        options = {**vars(estimator), "max_memory": room * needed}
        part = type(estimator)(**options)
        size = images_at_once(part, Euler(3), model, SHAPE)
        assert size == (1 if room == 1.5 else 64)
        batches = torch.arange(3).split(size)
        found.append(Samples.join([part(real(list(map(int, b))), posterior) for b in batches]))
    for name in ("images", "variance", "summed"):
        one, other = (getattr(samples, name) for samples in found)
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


MEASURE = """
import resource, sys, torch
sys.path.insert(0, {tests!r})
from hand import model_of, posterior_of, random_covariance
from bayesdiff.laplace.head import head_matrix
from bayesdiff.networks import UNet
from bayesdiff.solvers import Euler
from bayesdiff.uncertainty import *
from bayesdiff.uncertainty.memory import images_at_once
torch.set_num_threads(1)
net = UNet(1, 28, num_classes=10, channels=(64, 128), blocks=2, attention=True, patch=2)
posterior = posterior_of(net.head, 1e-4 * torch.eye(head_matrix(net.head).shape[1]).double())
model = model_of(net, num_classes=10)
estimator = {estimator}
starts = starts_of(model, Euler(2), 0, (1, 28, 28), torch.device("cpu"))
estimator.__class__(**{{**vars(estimator), {fewer}}})(starts([0]), posterior)
size = images_at_once(estimator, Euler(2), model, (1, 28, 28))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
parts = [estimator(starts(b.tolist()), posterior) for b in torch.arange({count}).split(size)]
samples = Samples.join(parts)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert len(samples.variance) == {count}
print(size, (after - before) / 2**20)
"""


def measured(count: int, estimator: str, fewer: str) -> tuple[int, float]:
    """Images at once, and GiB of peak memory over that of a process that is ready to sample."""
    code = MEASURE.format(
        tests=str(Path(__file__).parent), count=count, estimator=estimator, fewer=fewer
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=3000
    )
    size, peak = done.stdout.split()
    return int(size), float(peak)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "estimator", "fewer"),
    [
        (1000, "Ensemble(members=16, batch_size=1000, max_memory=4.0)", "'members': 2"),
        (300, "Ensemble(members=16, batch_size=1000, max_memory=1.0)", "'members': 2"),
        (200, "TotalVariance(mc_samples=10, batch_size=1000, max_memory=1.0)", "'mc_samples': 2"),
        (
            100,
            "TotalVariance(covariance='stein', batch_size=1000, max_memory=1.0)",
            "'mc_samples': 2",
        ),
        (100, "Linearised(draws=32, batch_size=1000, max_memory=1.0)", "'draws': 2"),
    ],
)
def test_the_peak_stays_within_max_memory(count, estimator, fewer):
    """Measured on a real network, with more images asked for than fit at once."""
    size, peak = measured(count, estimator, fewer)
    limit = float(estimator.partition("max_memory=")[2].rstrip(")"))
    assert size < count
    assert peak < limit, (size, peak)
