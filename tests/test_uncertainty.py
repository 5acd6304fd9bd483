"""Estimators against closed forms and slow loops, on hand-made networks (T5-T14)."""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bayesdiff.checks import UserError
from bayesdiff.laplace.gram import HeadGeometry, head_matrix
from bayesdiff.laplace.posterior import Curvature, HeadPosterior
from bayesdiff.models import GenerativeModel
from bayesdiff.networks import UNet
from bayesdiff.paths import CondOT, VariancePreserving
from bayesdiff.solvers import DDIM, DDPM, Euler, Heun, SampleNoise, integrate
from bayesdiff.uncertainty import Ensemble, Published, Samples, Trajectory

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
class Timed(Trajectory):
    """A trajectory on times of its own."""

    times: tuple[float, ...] = ()

    def steps(self, skip_interval=1):
        times = self.times[::skip_interval]
        times += self.times[-1:] if times[-1] != self.times[-1] else ()
        return self.solver.steps(self.path, self.model.prediction, times)


def start_of(model, solver, count=1, shape=(1, 1, 1), first=None, labels=None, times=None):
    noise = Noise(count, shape, first=first)
    if times is None:
        return Trajectory(model, solver, labels, noise, CPU)
    return Timed(model, solver, labels, noise, CPU, tuple(times))


@torch.no_grad()
def plain(start):
    return integrate(start.field(), start.steps(), start.draw(), start.draw)


# The affine flow dx/dt = m x + f theta of T6 and T7.
M, SCALE, SPREAD = -1.3, 0.9, 0.2


def affine_flow(slope=M):
    net = Hand(lambda x, t, y: slope * x, [[1.0]])
    return model_of(net), only_bias(net.head, (SCALE * SPREAD) ** 2)


def sensitivity(times, slope=M, heun=False):
    total = 0.0
    for start, end in itertools.pairwise(times):
        h = end - start
        z = h * slope
        total = total * (1 + z + heun * z**2 / 2) + h * SCALE * (1 + heun * z / 2)
    return total


@pytest.mark.parametrize(
    ("solver", "value"),
    [(Euler(10), 0.010829410), (Heun(10), (0.2 * 0.50286859) ** 2), (Heun(160), 0.010145801)],
)
def test_ensemble_has_the_shared_weight_variance_of_an_affine_flow(solver, value):
    """T6 and T7; beside the closed form it equals G^2 times the variance of its own draws."""
    model, posterior = affine_flow()
    members = 4000
    samples = Ensemble(members=members)(start_of(model, solver, first=0.7), posterior)
    got = float(samples.variance)
    assert got == pytest.approx(value, rel=4 * math.sqrt(2 / (members - 1)))
    draws = posterior.draw(members, torch.Generator().manual_seed(0))[:, 0, 1] / SCALE
    grid = [k / solver.num_steps for k in range(solver.num_steps + 1)]
    gain = sensitivity(grid, heun=isinstance(solver, Heun))
    assert got == pytest.approx(gain**2 * float(draws.var()), rel=1e-4)
    assert gain**2 * SPREAD**2 == pytest.approx(value, rel=1e-6 if len(grid) == 11 else 1e-4)


def test_without_feedback_the_ensemble_does_not_depend_on_the_number_of_steps():
    """T6, m = 0: s^2 f^2 for every N, where the published recursion gives s^2 f^2 / N."""
    model, posterior = affine_flow(slope=0.0)
    ensembles, published = [], []
    for steps in (1, 4, 16):
        start = start_of(model, Euler(steps), first=0.0)
        ensembles.append(float(Ensemble(members=50)(start, posterior).variance))
        samples = Published(mc_samples=4000)(start_of(model, Euler(steps), first=0.0), posterior)
        published.append(float(samples.variance) * steps)
    assert ensembles == pytest.approx(ensembles[:1] * 3, rel=1e-9)
    assert published == pytest.approx([(SCALE * SPREAD) ** 2] * 3, rel=1e-2)


def test_published_has_the_fresh_weight_variance_of_an_affine_flow():
    """T6: s^2 f^2 h^2 ((1 + 2z)^N - 1) / (2z) = 0.001184793, here over 4096 pixels."""
    model, posterior = affine_flow()
    start = start_of(model, Euler(10), shape=(1, 64, 64), first=0.0)
    variance = Published(mc_samples=400)(start, posterior).variance
    z = M / 10
    expected = (SPREAD * SCALE / 10) ** 2 * ((1 + 2 * z) ** 10 - 1) / (2 * z)
    assert expected == pytest.approx(0.001184793, abs=5e-10)
    error = float(variance.std()) / 64
    assert error < 0.003 * expected
    assert float(variance.mean()) == pytest.approx(expected, abs=4 * error)


@pytest.mark.parametrize("skip", [2, 4, 10])
def test_a_coarse_ensemble_is_the_euler_method_on_the_coarse_grid(skip):
    """Members follow times 0, k / N, ..., 1; the image stays on its own grid."""
    model, posterior = affine_flow()
    image = plain(start_of(model, Euler(10), first=0.7))
    samples = Ensemble(members=30, skip_interval=skip)(
        start_of(model, Euler(10), first=0.7), posterior
    )
    assert torch.equal(samples.images, image)
    grid = [*(k / 10 for k in range(0, 10, skip)), 1.0]
    draws = posterior.draw(30, torch.Generator().manual_seed(0))[:, 0, 1] / SCALE
    expected = sensitivity(grid) ** 2 * float(draws.var())
    assert float(samples.variance) == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(samples.times, torch.tensor(grid[1:]))


def test_a_coarse_ensemble_converges_to_the_same_number():
    model, posterior = affine_flow()

    def variance(steps, skip):
        start = start_of(model, Euler(steps), first=0.0)
        return float(Ensemble(members=10, skip_interval=skip)(start, posterior).variance)

    limit = (SCALE * math.expm1(M) / M) ** 2
    draws = posterior.draw(10, torch.Generator().manual_seed(0))[:, 0, 1] / SCALE
    errors = [variance(n, 4) / float(draws.var()) - limit for n in (40, 80, 160)]
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine == pytest.approx(2, abs=0.15)


def test_ensemble_follows_a_multiplicative_weight_beyond_the_linear_regime():
    """T8: v = theta x; moments of (1 + h theta)^N by Gauss-Hermite, near exp(theta) moments."""
    mean, spread, steps, members = 0.3, 0.25, 50, 20_000
    net = Hand(lambda x, t, y: x, [[mean]])
    covariance = torch.tensor([spread**2, 1e-16], dtype=torch.float64).diag()
    start = start_of(model_of(net), Euler(steps), first=1.0)
    got = float(Ensemble(members=members)(start, posterior_of(net.head, covariance)).variance)
    nodes, weights = (torch.from_numpy(v) for v in hermite(60))
    values = (1 + (mean + spread * nodes) / steps) ** steps
    first, second, fourth = ((weights * v).sum() for v in moments(values, weights))
    assert got == pytest.approx(
        float(second), rel=4 * float((fourth / second**2 - 1) / members) ** 0.5
    )
    limit = math.exp(2 * mean + spread**2) * math.expm1(spread**2)
    assert limit == pytest.approx(0.12510, abs=5e-6)
    assert float(second) == pytest.approx(limit, rel=0.02)
    linear = math.exp(2 * mean) * spread**2
    assert linear == pytest.approx(0.11388, abs=5e-6)
    assert got > linear * 1.04
    assert float(first) > 0


def hermite(count):
    """Nodes and weights of the standard normal distribution."""
    from numpy.polynomial.hermite_e import hermegauss

    nodes, weights = hermegauss(count)
    return nodes, weights / weights.sum()


def moments(values, weights):
    centred = values - (weights * values).sum()
    return values, centred**2, centred**4


def gaussian_ddim(count, spread):
    """eps = eps_hat + theta on Gaussian data, updates from index N - 1 to 0 (T9)."""

    def kappa(x, t, y):
        c = LINEAR.coefficients(t)
        return c.sigma / (c.alpha**2 * spread**2 + c.sigma**2) * x

    net = Hand(kappa, [[1.0]])
    times = [1 - (i * 1000 // count + 1) / 1000 for i in reversed(range(count))]
    return model_of(net, LINEAR, "noise"), only_bias(net.head, 1e-4), times


@pytest.mark.parametrize(
    ("count", "spread", "every", "shared", "fifth"),
    [
        (25, 0.5, 2.231e-5, 9.548e-4, 1.615e-2),
        (50, 0.05, 2.903e-7, 1.178e-5, 3.864e-3),
        (50, 0.5, 1.556e-5, 9.947e-4, 7.696e-3),
        (50, 1.0, 5.661e-5, 3.271e-3, 1.042e-2),
    ],
)
def test_ddim_on_gaussian_data_has_the_tabulated_variances(count, spread, every, shared, fifth):
    """T9: the ensemble converges, the published recursion is 40 x too small, skipping inflates."""
    model, posterior, times = gaussian_ddim(count, spread)
    solver = DDIM(count)
    ensemble = Ensemble(members=4000)
    got = ensemble(start_of(model, solver, first=0.4, times=times), posterior)
    assert float(got.variance) == pytest.approx(shared, rel=4 * math.sqrt(2 / 3999))
    for skip, expected in ((1, every), (5, fifth)):
        start = start_of(model, solver, shape=(1, 24, 24), first=0.0, times=times)
        variance = Published(mc_samples=400, skip_interval=skip)(start, posterior).variance
        error = float(variance.std()) / 24
        assert error < 0.02 * expected
        assert float(variance.mean()) == pytest.approx(expected, rel=5e-4, abs=4 * error)


def test_uncertainty_of_the_first_step_alone_is_only_inflated():
    """T14: V = (abar_0 / abar_960) b^2 gam2, which is 537.76 gam2."""
    model, posterior, times = gaussian_ddim(50, 0.5)
    start = start_of(model, DDIM(50), first=0.4, times=times)
    variance = float(Published(skip_interval=49)(start, posterior).variance)
    first = start.steps()[0]
    abar = LINEAR.log_abar[1:].exp()
    gain = float(abar[0] / abar[960]) * first.output[1] ** 2
    assert gain == pytest.approx(537.76, abs=0.005)
    assert variance == pytest.approx(gain * 1e-4, rel=1e-9)


def test_the_published_covariance_is_unbiased_and_noisy():
    """T13: V = 4e-4, kap = gbar = 1, S = 10: relative sd 15.8 per pixel.

    Two Euler steps: the first makes V = h^2 gam2 at mean 1/2, the second adds 2 h Cov.
    """

    def formula(x, t, y):
        return torch.where(t > 0, x - 0.5, 0 * x)

    net = Hand(formula, [[1.0]], bias=1.0)
    posterior = only_bias(net.head, 4 * 4e-4)
    side = 256
    start = start_of(model_of(net), Euler(2), shape=(1, side, side), first=0.0)
    samples = Published(mc_samples=10)(start, posterior)
    torch.testing.assert_close(samples.images, torch.ones_like(samples.images))
    assert float(samples.summed[0]) == pytest.approx(4e-4 * side**2, rel=1e-6)
    relative = (samples.variance - 2 * 4e-4) / 4e-4
    expected = math.sqrt((2 * 4e-4**2 + 4e-4) / 10) / 4e-4
    assert expected == pytest.approx(15.8, abs=0.05)
    assert float(relative.std()) == pytest.approx(expected, rel=0.02)
    assert float(relative.mean()) == pytest.approx(1, abs=4 * expected / side)


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


@pytest.mark.parametrize("skip", [1, 2, 3])
def test_published_equals_its_recursion_written_out(skip):
    """E2 with the same draws, one image, Euler and a posterior with all covariances."""
    net, posterior, covariance = curved()
    size, shape, steps, seed = 7, (1, 3, 2), 5, 3
    start = start_of(model_of(net), Euler(steps), shape=shape)
    samples = Published(mc_samples=size, skip_interval=skip, seed=seed)(start, posterior)

    def g(x, t):
        with torch.no_grad():
            return net.head(net.formula(x, torch.tensor(t, dtype=torch.float64), None))

    def gam2(x, t):
        phi = net.formula(x, torch.tensor(t, dtype=torch.float64), None)
        phi = torch.cat([phi, torch.ones_like(phi[:, :1])], 1)
        return torch.einsum("bphw,pq,bqhw->bhw", phi, covariance, phi)[:, None]

    fresh = Noise(1, shape).fork(seed)
    x = mean = Noise(1, shape)()
    variance, h = torch.zeros_like(x), 1 / steps
    for n in range(steps):
        t, here = n / steps, g(x, n / steps)
        expected, correction = here, 0.0
        if n % skip == 0:
            if n:
                z = [fresh() for _ in range(size)]
                draws = [mean + variance.clamp(min=0).sqrt() * zi for zi in z]
                values = [g(draw, t) for draw in draws]
                expected = sum(values) / size
                products = [(d - mean) * v for d, v in zip(draws, values, strict=True)]
                correction = 2 * h * sum(products) / size
            correction = correction + h**2 * gam2(x, t)
        variance = variance + correction
        mean = mean + h * expected
        x = x + h * here
    torch.testing.assert_close(samples.variance, variance, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(samples.images, x, rtol=1e-12, atol=1e-12)


def test_a_skip_interval_of_one_is_the_full_method():
    net, posterior, _ = curved()
    runs = [
        Published(**options)(start_of(model_of(net), Euler(6), 2, (1, 4, 4)), posterior)
        for options in ({}, {"skip_interval": 1}, {"skip_interval": 2})
    ]
    assert torch.equal(runs[0].variance, runs[1].variance)
    assert not torch.equal(runs[0].variance, runs[2].variance)
    assert torch.equal(runs[0].images, runs[2].images)


@pytest.mark.parametrize("weight", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("kernel", [1, 3])
def test_guidance_takes_the_variance_of_combined_features(weight, kernel):
    """2.10, one Euler step: h^2 phi^T Sigma phi with phi = w phi_c + (1 - w) phi_u."""
    net, posterior, covariance = curved(kernel, patch=2)
    labels = torch.tensor([0, 2])
    solver = Euler(1, guidance=weight)
    start = start_of(model_of(net, num_classes=3), solver, 2, (1, 4, 6), labels=labels)
    samples = Published()(start, posterior)
    x = F.pixel_unshuffle(Noise(2, (1, 4, 6))(), 2)
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    joint = weight * net.formula(x, zero, labels) + (1 - weight) * net.formula(x, zero, None)
    phi = F.unfold(joint, kernel, padding=kernel // 2)
    phi = torch.cat([phi, torch.ones_like(phi[:, :1])], 1)
    dense = torch.einsum("bpn,pq,bqn->bn", phi, covariance, phi).view(2, 1, 2, 3)
    expected = F.pixel_shuffle(dense.expand(-1, 4, -1, -1), 2)
    torch.testing.assert_close(samples.variance, expected, rtol=1e-8, atol=0)
    assert samples.nfe == (1 if weight == 1 else 2)


@pytest.mark.parametrize("estimator", [Ensemble(members=5), Published()])
def test_guidance_by_a_label_that_does_not_matter_changes_no_variance(estimator):
    """T11: with phi_c = phi_u the variance is independent of w, never w^2 + (1 - w)^2 of it."""
    net, posterior, _ = curved()
    body = net.formula
    net.formula = lambda x, t, y: body(x, t, None)
    labels = torch.tensor([0, 2])
    maps = [
        estimator(
            start_of(
                model_of(net, num_classes=3), Euler(4, guidance=w), 2, (1, 3, 3), labels=labels
            ),
            posterior,
        ).variance
        for w in (1.0, 0.0, 7.5)
    ]
    for other in maps[1:]:
        torch.testing.assert_close(other, maps[0], rtol=1e-9, atol=0)


def test_stages_of_heun_meet_the_same_weights():
    """Published, one step: variance of sum b_i g_i, exactly and by brute force over weights."""
    net, posterior, covariance = curved()
    shape = (1, 3, 3)
    start = start_of(model_of(net), Heun(1), shape=shape)
    got = Published()(start, posterior).variance
    x = Noise(1, shape)()
    with torch.no_grad():
        first = net.formula(x, torch.zeros(1).double(), None)
        second = net.formula(x + net.head(first), torch.ones(1).double(), None)
    phi = torch.cat([(first + second) / 2, torch.ones_like(first[:, :1])], 1)
    exact = torch.einsum("bphw,pq,bqhw->bhw", phi, covariance, phi)[:, None]
    torch.testing.assert_close(got, exact, rtol=1e-9, atol=0)
    count = 20_000
    weights = posterior.draw(count, torch.Generator().manual_seed(1))[:, 0]
    stages = [torch.cat([f, torch.ones_like(f[:, :1])], 1) for f in (first, second)]
    values = sum(0.5 * torch.einsum("mp,bphw->mbhw", weights, s) for s in stages)
    ratio = values.var(0)[:, None] / got
    assert (ratio - 1).abs().max() < 5 * math.sqrt(2 / count)


SOLVERS = {
    "euler": (Euler(5), FLOW, "velocity"),
    "euler-guided": (Euler(5, guidance=2.0), FLOW, "velocity"),
    "heun": (Heun(4), FLOW, "velocity"),
    "ddim": (DDIM(6), LINEAR, "v"),
    "ddim-eta": (DDIM(6, eta=0.8), LINEAR, "v"),
    "ddpm": (DDPM(6), LINEAR, "v"),
}


@pytest.mark.parametrize("name", SOLVERS)
@torch.no_grad()
def test_ensemble_equals_sampling_once_per_member(name):
    """The slow truth: put every draw into the head and sample with the same noise."""
    solver, path, prediction = SOLVERS[name]
    net, posterior, _ = curved(kernel=3, patch=2)
    labels, shape, members = torch.tensor([0, 2, 1]), (1, 4, 4), 4
    model = model_of(net, path, prediction, num_classes=3)

    def start():
        return start_of(model, solver, 3, shape, labels=labels)

    fast = Ensemble(members=members, seed=9)(start(), posterior)
    assert torch.equal(fast.images, plain(start()))
    trained = [p.clone() for p in net.head.parameters()]
    images = []
    for draw in posterior.draw(members, torch.Generator().manual_seed(9)):
        net.head.weight.copy_(draw[:, :-1].view_as(net.head.weight))
        net.head.bias.copy_(draw[:, -1])
        images.append(plain(start()))
    for parameter, value in zip(net.head.parameters(), trained, strict=True):
        parameter.copy_(value)
    slow = torch.stack(images).var(0)
    torch.testing.assert_close(fast.variance, slow, rtol=1e-8, atol=1e-16)
    assert (fast.variance > 0).all()
    torch.testing.assert_close(fast.scores, slow.flatten(1).sum(1), rtol=1e-8, atol=0)


def small_unet():
    torch.manual_seed(0)
    net = UNet(1, 8, num_classes=3, channels=(8, 16), blocks=1, patch=2)
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    size = head_matrix(net.head).shape[1]
    return net, posterior_of(net.head, random_covariance(size))


def real_start(net, name):
    solver, path, prediction = SOLVERS[name]
    model = model_of(net, path, prediction, num_classes=3)
    return Trajectory(model, solver, torch.tensor([0, 2]), SampleNoise(1, (4, 7), (1, 8, 8)), CPU)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("estimator", [Ensemble(members=3), Published(mc_samples=2)])
def test_the_shown_image_is_the_models_own_sample(estimator, name):
    """T5: bit for bit, whatever the posterior, the solver and the skip interval."""
    net, posterior = small_unet()
    image = plain(real_start(net, name))
    for skip in (1, 3):
        chosen = type(estimator)(**{**vars(estimator), "skip_interval": skip})
        samples = chosen(real_start(net, name), posterior)
        assert torch.equal(samples.images, image)
        assert samples.variance.shape == image.shape and samples.variance.isfinite().all()
        if isinstance(chosen, Ensemble):
            assert (samples.variance >= 0).all()


@pytest.mark.parametrize("name", SOLVERS)
def test_a_certain_posterior_leaves_no_variance(name):
    """T5: the published total of a stochastic sampler still holds the sampler's own noise."""
    net, _ = small_unet()
    posterior = certain(net.head)
    image = plain(real_start(net, name))
    for estimator in (Ensemble(members=3), Published(mc_samples=3)):
        samples = estimator(real_start(net, name), posterior)
        assert torch.equal(samples.images, image)
        if isinstance(estimator, Ensemble):
            assert samples.variance.max() < 1e-9 and samples.summed.max() < 1e-7
        elif "eta" not in name and name != "ddpm":
            assert not samples.variance.any() and not samples.summed.any()
        else:
            assert samples.summed[-1].min() > 0.1


def test_published_total_of_ancestral_sampling_stays_near_one_on_unit_gaussian_data():
    """T10 without Var(g), as published: V' = 1 - beta^2 / (1 - beta) from V = 1."""
    net = Hand(lambda x, t, y: LINEAR.coefficients(t).sigma * x, [[1.0]])
    times = tuple(k / 50 for k in range(50))
    model = model_of(net, LINEAR, "noise")
    start = start_of(model, DDPM(50), shape=(1, 40, 40), first=0.0, times=times)
    variance = Published(mc_samples=200)(start, certain(net.head)).variance
    expected = 0.0
    for step in start.steps():
        a, b = step.output
        t = torch.tensor(step.times[0], dtype=torch.float64)
        kappa = float(LINEAR.coefficients(t).sigma)
        expected = (a**2 + 2 * a * b * kappa) * max(expected, 0) + step.noise**2
    error = float(variance.std()) / 40
    assert float(variance.mean()) == pytest.approx(expected, abs=5 * error + 1e-3 * expected)


@pytest.mark.parametrize(
    ("solver", "estimator", "nfe"),
    [
        (DDIM(50), Published(mc_samples=10, skip_interval=5), 140),
        (DDIM(50), Published(mc_samples=10), 50 + 49 * 10),
        (DDIM(50), Published(mc_samples=10, skip_interval=50), 50),
        (DDIM(10, guidance=2.0), Published(mc_samples=3), 2 * (10 + 9 * 3)),
        (DDIM(10), Ensemble(members=4), 10 + 1 + 9 * 4),
        (DDIM(10), Ensemble(members=4, skip_interval=5), 10 + 1 + 1 * 4),
        (DDIM(10, guidance=2.0), Ensemble(members=4), 2 * (10 + 1 + 9 * 4)),
        (DDIM(1), Ensemble(members=4), 2),
    ],
)
def test_network_evaluations_are_counted(solver, estimator, nfe):
    """T14, and the ensemble's N + 1 + (N - 1) M: members share their first evaluation."""
    net, posterior, _ = curved()
    model = model_of(net, LINEAR, "v", num_classes=3)
    start = start_of(model, solver, 2, (1, 2, 2), labels=torch.tensor([0, 1]))
    assert estimator(start, posterior).nfe == nfe
    assert sum(size for size, _ in net.calls) == 2 * nfe


def test_members_share_the_features_of_their_first_evaluation():
    net, posterior, _ = curved()
    start = start_of(model_of(net), Heun(2), 3, (1, 2, 2))
    samples = Ensemble(members=5)(start, posterior)
    assert [size for size, _ in net.calls] == [3] * 4 + [3, 15, 15, 15]
    assert samples.nfe == 4 + 1 + 3 * 5


@pytest.mark.parametrize("estimator", [Ensemble(members=6), Published(mc_samples=3)])
def test_maps_do_not_depend_on_how_images_are_batched(estimator):
    """All images meet the same weight draws, and bring their own noise."""
    net, posterior, _ = curved()
    model = model_of(net)

    def run(indices):
        noise = SampleNoise(0, indices, (1, 3, 3))
        return estimator(Trajectory(model, Euler(4), None, Double(noise), CPU), posterior)

    whole = run(range(5))
    joined = Samples.join([run(part) for part in ([0, 1], [2], [3, 4])])
    for name in ("images", "variance", "summed"):
        torch.testing.assert_close(
            getattr(joined, name), getattr(whole, name), rtol=1e-9, atol=1e-18
        )
    assert joined.nfe == whole.nfe and joined.labels is None


class Double:
    """A sample's noise in double precision."""

    def __init__(self, noise):
        self.noise, self.generators = noise, noise.generators

    def fork(self, number):
        return self.noise.fork(number)

    def __call__(self):
        return self.noise().double()


@pytest.mark.parametrize("estimator", [Ensemble(members=4), Published(mc_samples=3)])
def test_the_record_over_time_ends_with_the_map_itself(estimator):
    net, posterior, _ = curved()
    labels = torch.arange(10) % 3
    start = start_of(model_of(net, num_classes=3), Euler(20), 10, (1, 3, 3), labels=labels)
    samples = estimator(start, posterior)
    torch.testing.assert_close(samples.times, torch.arange(1, 21) / 20)
    assert samples.summed.shape == (20, 10)
    torch.testing.assert_close(samples.summed[-1], samples.scores)
    assert samples.frames.shape == samples.frame_variance.shape == (9, 8, 1, 3, 3)
    assert torch.equal(samples.frames[-1], samples.images[:8])
    assert torch.equal(samples.frame_variance[-1], samples.variance[:8])
    assert samples.frame_times[-1] == 1 and set(samples.frame_times.tolist()) <= set(
        samples.times.tolist()
    )
    assert torch.equal(samples.labels, labels)


@pytest.mark.parametrize("skip", [1, 4])
@pytest.mark.parametrize("kind", [Ensemble, Published])
def test_frames_are_the_states_of_the_shown_image(kind, skip):
    """Also where members, or the variance, take coarser steps than the image."""
    net, posterior, _ = curved()
    states = {}
    start = start_of(model_of(net, LINEAR, "v"), DDPM(20), 3, (1, 3, 3))
    with torch.no_grad():
        integrate(
            start.field(),
            start.steps(),
            start.draw(),
            start.draw,
            lambda step, x: states.update({round(step.end, 6): x}),
        )
    start = start_of(model_of(net, LINEAR, "v"), DDPM(20), 3, (1, 3, 3))
    samples = kind(skip_interval=skip)(start, posterior)
    for time, frame in zip(samples.frame_times.tolist(), samples.frames, strict=True):
        assert torch.equal(frame, states[round(time, 6)])
    assert len(samples.frames) == (5 if kind is Ensemble and skip == 4 else 9)


def test_seeds_of_an_estimator_change_maps_and_nothing_else():
    net, posterior, _ = curved()

    def run(estimator):
        return estimator(start_of(model_of(net), Euler(4), 2, (1, 3, 3)), posterior)

    for kind in (Ensemble, Published):
        first, again, other = run(kind(seed=1)), run(kind(seed=1)), run(kind(seed=2))
        assert torch.equal(first.variance, again.variance)
        assert not torch.equal(first.variance, other.variance)
        assert torch.equal(first.images, other.images)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Ensemble(members=1), "uncertainty.members"),
        (lambda: Ensemble(num_images=0), "uncertainty.num_images"),
        (lambda: Ensemble(batch_size=0), "uncertainty.batch_size"),
        (lambda: Ensemble(seed=-1), "uncertainty.seed"),
        (lambda: Published(mc_samples=0), "uncertainty.mc_samples"),
        (lambda: Published(seed=-1), "uncertainty.seed"),
        (lambda: Ensemble(skip_interval=0).check(Euler(4)), "uncertainty.skip_interval"),
        (lambda: Published(skip_interval=5).check(Euler(4)), "uncertainty.skip_interval=5"),
    ],
)
def test_unusable_settings_are_refused_in_one_line(make, named):
    with pytest.raises(UserError, match=named) as refused:
        make()
    assert "\n" not in str(refused.value)
