"""Networks whose answers are formulas, posteriors made by hand, and noise that can be set."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from bayesdiff.laplace.gradients import gradients
from bayesdiff.laplace.gram import gram
from bayesdiff.laplace.head import HeadGeometry, head_matrix
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.laplace.record import Curvature
from bayesdiff.metrics.neighbours import neighbours
from bayesdiff.models import GenerativeModel
from bayesdiff.networks import UNet
from bayesdiff.paths import CondOT, VariancePreserving
from bayesdiff.solvers import DDIM, DDPM, Euler, Heun, SampleNoise, integrate
from bayesdiff.uncertainty import Start
from bayesdiff.uncertainty.scores.likelihood import Probes

FLOW, LINEAR = CondOT(), VariancePreserving()
CPU = torch.device("cpu")


class Hand(nn.Module):
    """A network whose features are a formula; float64, one weight per feature and a bias."""

    def __init__(self, formula, weights, bias=0.0, kernel=1, patch=1):
        super().__init__()
        self.formula, self.patch = formula, patch
        self.head = nn.Conv2d(len(weights[0]), len(weights), kernel, padding=kernel // 2).double()
        with torch.no_grad():
            rows = torch.tensor(weights, dtype=torch.float64)
            self.head.weight.copy_(rows[..., None, None].expand_as(self.head.weight))
            self.head.bias.fill_(bias)
        self.calls = []

    def features(self, x, t, y=None):
        self.calls.append((len(x), float(t[0])))
        # Times arrive in single precision; the diffusion index is a whole number.
        t = (t.double() * 1000).round() / 1000
        return self.formula(F.pixel_unshuffle(x, self.patch), t.view(-1, 1, 1, 1), y)

    def fold(self, output):
        return F.pixel_shuffle(output, self.patch)


def model_of(net, path=FLOW, prediction="velocity", num_classes=None):
    return GenerativeModel(net, path, prediction, torch.optim.SGD, num_classes).eval()


def posterior_of(head, covariance, structure="full"):
    """A posterior around the head's own weights with this covariance ``(P, P)``."""
    tau = 1e-3 / float(covariance.diagonal().max())
    eye = torch.eye(len(covariance), dtype=torch.float64)
    return HeadPosterior.fit(
        Curvature(
            gram=torch.linalg.inv(covariance) - tau * eye,
            num_images=1,
            draws=1,
            squared_error=1.0,
            num_outputs=1,
            mean=head_matrix(head),
            source="by hand",
            geometry=HeadGeometry.of(head),
        ),
        structure=structure,
        sigma_noise=1.0,
        prior_precision=tau,
    )


def only_bias(head, variance):
    """All weights certain but the bias."""
    sizes = torch.full((head_matrix(head).shape[1],), 1e-12 * variance, dtype=torch.float64)
    sizes[-1] = variance
    return posterior_of(head, sizes.diag())


def random_covariance(size, scale=0.05, seed=0):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, dtype=torch.float64, generator=generator)
    return scale**2 * (root @ root.T / size + 0.1 * torch.eye(size, dtype=torch.float64))


def certain(head):
    """A posterior that has collapsed onto its mean."""
    size = head_matrix(head).shape[1]
    curvature = posterior_of(head, torch.eye(size, dtype=torch.float64)).curvature
    return HeadPosterior(curvature, "full", 1.0, 1e60, 1.0)


class Noise(SampleNoise):
    """The samples' noise in double precision; the start can be set."""

    def __init__(self, count, shape, seed=0, first=None):
        super().__init__(seed, range(count), shape)
        self.first = first

    def __call__(self):
        noise = super().__call__().double()
        if self.first is not None:
            noise, self.first = torch.full_like(noise, self.first), None
        return noise


@dataclass(frozen=True)
class Timed(Start):
    """A trajectory on times of its own."""

    times: tuple[float, ...] = ()

    def steps(self, skip_interval=1):
        times = self.times[::skip_interval]
        times += self.times[-1:] if times[-1] != self.times[-1] else ()
        return self.solver.steps(self.path, self.model.prediction, times)


def start_of(model, solver, count=1, shape=(1, 1, 1), first=None, labels=None, times=None):
    noise = Noise(count, shape, first=first)
    if times is None:
        return Start(model, solver, labels, noise, CPU)
    return Timed(model, solver, labels, noise, CPU, times=tuple(times))


@torch.no_grad()
def plain(start):
    return integrate(start.field(), start.steps(), start.draw(), start.draw)


# The affine flow dx/dt = m x + f theta of T6 and T7.
M, SCALE, SPREAD = -1.3, 0.9, 0.2


def affine_flow(slope=M):
    net = Hand(lambda x, t, y: slope * x, [[1.0]])
    return model_of(net), only_bias(net.head, (SCALE * SPREAD) ** 2)


def gaussian_ddim(count, spread):
    """eps = eps_hat + theta on Gaussian data, updates from index N - 1 to 0 (T9)."""

    def kappa(x, t, y):
        c = LINEAR.coefficients(t)
        return c.sigma / (c.alpha**2 * spread**2 + c.sigma**2) * x

    net = Hand(kappa, [[1.0]])
    times = [1 - (i * 1000 // count + 1) / 1000 for i in reversed(range(count))]
    return model_of(net, LINEAR, "noise"), only_bias(net.head, 1e-4), times


def curved(kernel=1, patch=1, classes=0):
    """Features that are neither linear nor blind to time and label, with a head of 3 weights."""

    def formula(x, t, y):
        label = 0.0 if y is None else (1 + y.double().view(-1, 1, 1, 1)) / 3
        return torch.cat([torch.tanh(x + t), (1 + label) * torch.sin(2 * x - t)], 1)

    outputs = patch**2
    generator = torch.Generator().manual_seed(4)
    weights = torch.randn(outputs, 2 * outputs, generator=generator, dtype=torch.float64) / 2
    net = Hand(formula, weights.tolist(), bias=0.1, kernel=kernel, patch=patch)
    covariance = random_covariance(head_matrix(net.head).shape[1])
    return net, posterior_of(net.head, covariance), covariance


SOLVERS = {
    "euler": (Euler(5), FLOW, "velocity"),
    "euler-guided": (Euler(5, guidance=2.0), FLOW, "velocity"),
    "heun": (Heun(4), FLOW, "velocity"),
    "ddim": (DDIM(6), LINEAR, "v"),
    "ddim-eta": (DDIM(6, eta=0.8), LINEAR, "v"),
    "ddpm": (DDPM(6), LINEAR, "v"),
}


def small_unet(channels=1):
    torch.manual_seed(0)
    net = UNet(channels, 8, num_classes=3, channels=(8, 16), blocks=1, patch=2)
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    size = head_matrix(net.head).shape[1]
    return net, posterior_of(net.head, random_covariance(size))


def real_start(net, name):
    solver, path, prediction = SOLVERS[name]
    model = model_of(net, path, prediction, num_classes=3)
    shape = (len(net.head.weight) // net.patch**2, 8, 8)
    return Start(model, solver, torch.tensor([0, 2]), SampleNoise(1, (4, 7), shape), CPU)


class Double:
    """A sample's noise in double precision."""

    def __init__(self, noise):
        self.noise, self.generators, self.indices = noise, noise.generators, noise.indices

    def fork(self, number):
        return self.noise.fork(number)

    def copy(self):
        return Double(self.noise.copy())

    def __call__(self):
        return self.noise().double()


@torch.no_grad()
def curvature_of(head, features, residual, source="weights-data-pass"):
    """What a pass over these features would leave."""
    each = gradients(head, features, residual)
    return Curvature(
        gram=gram(head, features),
        num_images=len(features),
        draws=1,
        squared_error=float(residual.square().sum()),
        num_outputs=residual.numel(),
        mean=head_matrix(head),
        source=source,
        geometry=HeadGeometry.of(head),
        squared_gradients=each.square().sum(0),
        gradient=each.sum(0),
    )


def density_coverage(generated, real, k=5):
    """Naeem et al. 2020, section 3."""
    found = neighbours(generated, real, k)
    return float(found.balls.double().mean() / k), float(found.covered.double().mean())


def exact_probes(images):
    """All coordinates, for the exact trace."""
    size = images[0].numel()
    basis = torch.eye(size).view(size, 1, *images.shape[1:])
    return Probes(basis.expand(size, *images.shape), 1.0)
