"""Schedules of their own for every pixel: against one pixel at a time, and by brute force."""

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hand import (
    CPU,
    LINEAR,
    Hand,
    Noise,
    curved,
    exact_probes,
    model_of,
    posterior_of,
    random_covariance,
    small_unet,
)
from scipy.linalg import hadamard
from torch.nn import functional as F

from bayesdiff.checks import UserError
from bayesdiff.paths import PathCoefficients, VPPerPixel
from bayesdiff.paths.coefficient import matrix
from bayesdiff.paths.fitting import fitted_path
from bayesdiff.solvers import (
    DDIM,
    DDPM,
    RK4,
    DPMSolver1,
    DPMSolver2,
    DPMSolverPP2M,
    Euler,
    Field,
    Heun,
    Midpoint,
    ProbabilityFlow,
    SDEEuler,
    integrate,
    plan,
)
from bayesdiff.solvers.snr import log_snr, time_at
from bayesdiff.solvers.step import check_finite, check_solver
from bayesdiff.studies.repair.alternatives import WAYS, Origin, fresh_noise, resample, weight_draws
from bayesdiff.uncertainty import (
    Ensemble,
    Linearised,
    Published,
    Refined,
    Start,
    TotalVariance,
    starts_of,
)
from bayesdiff.uncertainty.scores.aleatoric import aleatoric
from bayesdiff.uncertainty.scores.likelihood import log_likelihood

SPEEDS = torch.tensor([[[0.4, 1.0], [1.7, 3.0]]], dtype=torch.float64)
PATH = VPPerPixel(speeds=SPEEDS)
SIGNS = torch.from_numpy(hadamard(8)).double()
SOLVERS = [
    *[solver(4) for solver in (Euler, Heun, Midpoint, RK4)],
    *[solver(5) for solver in (DDIM, DPMSolver1, DPMSolver2, ProbabilityFlow, SDEEuler, DDPM)],
    DDIM(5, eta=0.7),
    DDPM(5, variance="small"),
    DPMSolverPP2M(6),
    DPMSolverPP2M(5, grid="log_snr"),
]


def name_of(solver):
    return f"{solver.name}-{solver.grid}"


class Tensors:
    """A path whose numbers are given as tensors, the same for all pixels."""

    def __init__(self, path, shape=(1, 4, 4)):
        self.path, self.shape = path, shape

    def __getattr__(self, name):
        return getattr(self.path, name)

    def coefficients(self, t):
        c = self.path.coefficients(t)
        values = (c.alpha, c.sigma, c.d_alpha, c.d_sigma)
        return PathCoefficients(
            *(v[..., None, None, None].expand(*t.shape, *self.shape) for v in values)
        )


class Even(Noise):
    """One start for all pixels, and draws from there on that all pixels share."""

    def __init__(self, shape):
        super().__init__(1, (1, 1, 1), first=0.4)
        self.whole = (1, *shape)

    def fork(self, number):
        values = itertools.cycle(SIGNS[:, 1:4].T.flatten().tolist())
        return lambda: torch.full(self.whole, next(values), dtype=torch.float64)

    def __call__(self):
        return super().__call__().expand(self.whole)


# Angles and their formulas ------------------------------------------------------------------


def test_pixels_turn_as_an_inflationary_flow_does():
    """theta_i = atan sqrt(gamma / xi_i) with xi_i = 1 / c_i^2 and gamma = tan^2 of one angle."""
    t = torch.linspace(0, 1, 11, dtype=torch.float64, requires_grad=True)
    c = PATH.coefficients(t)
    gamma = ((1 - t) * 0.995 * math.pi / 2).tan().square().view(-1, 1, 1, 1)
    theta = torch.atan((gamma * SPEEDS**2).sqrt())
    torch.testing.assert_close(c.alpha, theta.cos())
    torch.testing.assert_close(c.sigma, theta.sin(), rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(c.alpha**2 + c.sigma**2, torch.ones_like(theta))
    for value, slope in ((c.alpha, c.d_alpha), (c.sigma, c.d_sigma)):
        for place in itertools.product(range(1), range(2), range(2)):
            at = value[(slice(None), *place)].sum()
            (found,) = torch.autograd.grad(at, t, retain_graph=True)
            torch.testing.assert_close(found, slope[(slice(None), *place)])
    assert c.sigma[-1].abs().max() == 0 and 0 < c.alpha[0].min() < 0.05


def test_the_centre_becomes_data_first():
    path = VPPerPixel(slow=0.5, fast=2.0).for_shape((3, 5, 5))
    assert path.speeds.shape == (1, 5, 5)
    assert float(path.speeds[0, 2, 2]) == 0.5 and float(path.speeds[0, 0, 0]) == pytest.approx(2)
    signal = path.coefficients(torch.tensor(0.5)).alpha[0]
    assert signal.argmax() == 12 and signal[2, 2] > signal[2, 3] > signal[0, 0]
    with pytest.raises(UserError, match="for_shape"):
        VPPerPixel().coefficients(torch.tensor(0.5))
    with pytest.raises(UserError, match=r"states here are \(2,\); use path=vp_cosine"):
        VPPerPixel().for_shape((2,))
    with pytest.raises(UserError, match="path.slow"):
        VPPerPixel(slow=0.0)
    with pytest.raises(UserError, match="path.speeds"):
        VPPerPixel(speeds=torch.tensor([[[1.0, 0.0]]]))
    with pytest.raises(UserError, match=r"\(1, 2, 2\) and samples \(1, 8, 8\)"):
        fitted_path(PATH, SimpleNamespace(shape=(1, 8, 8)))
    assert fitted_path(LINEAR, SimpleNamespace(shape=(1, 8, 8))) is LINEAR


@pytest.mark.parametrize("prediction", ["v", "noise", "data", "velocity"])
def test_training_corrupts_every_pixel_by_its_own_angle(prediction):
    torch.manual_seed(0)
    x_1, x_0 = torch.randn(2, 3, 1, 2, 2, dtype=torch.float64)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    angle = (1 - t).view(-1, 1, 1, 1) * 0.995 * math.pi / 2
    theta = torch.atan2(SPEEDS * angle.sin(), angle.cos())
    x_t, target = model_of(curved()[0], PATH, prediction).corrupt(x_1, x_0, t)
    torch.testing.assert_close(x_t, theta.cos() * x_1 + theta.sin() * x_0)
    v = theta.cos() * x_0 - theta.sin() * x_1
    turning = -0.995 * math.pi / 2 * SPEEDS / (angle.cos() ** 2 + (SPEEDS * angle.sin()) ** 2)
    truth = {"v": v, "noise": x_0, "data": x_1, "velocity": turning * v}
    torch.testing.assert_close(target, truth[prediction])


def test_one_number_stands_for_all_pixels_where_one_is_needed():
    t = torch.tensor([0.2, 0.7], dtype=torch.float64)
    single = torch.stack([log_snr(VPPerPixel(speeds=c.view(1)), t) for c in SPEEDS.flatten()])
    torch.testing.assert_close(log_snr(PATH, t), single.mean(0))
    torch.testing.assert_close(time_at(PATH, single.mean(0)), t)
    rows = matrix([[1.0, SPEEDS], [0.5, 2.0]])
    assert rows.shape == (2, 2, 1, 2, 2) and float(rows[1, 1].mean()) == 2
    assert matrix([[1.0, 2.0]]).shape == (1, 2)


# One pixel at a time ------------------------------------------------------------------------


def both(estimator, solver):
    """Samples of all pixels at once, and of each alone, with numbers as coefficients."""
    net, posterior, _ = curved()
    found = []
    for path, shape in [
        (PATH, (1, 2, 2)),
        *((VPPerPixel(speeds=c), (1, 1, 1)) for c in SPEEDS.view(-1, 1, 1, 1)),
    ]:
        start = Start(model_of(net, path, "v"), solver, None, Even(shape), CPU)
        found.append(estimator(start, posterior))
    return found[0], found[1:]


@pytest.mark.parametrize(
    "estimator",
    [
        Ensemble(members=4),
        Linearised(draws=6),
        Linearised(draws="all", derivative="difference"),
        Published(8),
        TotalVariance(8),
        TotalVariance(8, covariance="stein"),
        TotalVariance(8, covariance="antithetic", shared=False, gam2_at="realised"),
    ],
    ids=lambda estimator: f"{estimator.name}",
)
@pytest.mark.parametrize("solver", SOLVERS, ids=name_of)
def test_maps_are_those_of_every_pixel_alone(solver, estimator):
    """The network answers pixel by pixel, so that each could be an image of its own."""
    together, alone = both(estimator, solver)
    for name in ("images", "variance", "sampler_noise"):
        whole, parts = getattr(together, name), [getattr(each, name) for each in alone]
        if whole is None:
            assert parts == [None] * 4
            continue
        assert torch.isfinite(whole).all()
        # Differences are taken over the root mean square of an image.
        rough = name != "images" and "difference" in together.estimator
        truth = torch.stack(parts).flatten()
        tolerance = {"rtol": 2e-2, "atol": 0} if rough else {"rtol": 1e-9, "atol": 1e-14}
        torch.testing.assert_close(whole.flatten(), truth, **tolerance)
    assert together.variance.std() > 0.01 * together.variance.mean()


def test_coarse_members_share_out_the_noise_of_every_pixel():
    ensemble = Ensemble(members=4, skip_interval=2)
    for solver in (SDEEuler(6), DDIM(7, eta=1.0)):
        together, alone = both(ensemble, solver)
        truth = torch.stack([each.variance for each in alone]).flatten()
        torch.testing.assert_close(together.variance.flatten(), truth, rtol=1e-9, atol=0)


# By brute force, where pixels are coupled ---------------------------------------------------


def coupled():
    """Features of 3 x 3 neighbourhoods, and a 3 x 3 head."""
    kernel = torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(1)).double() / 2

    def formula(x, t, y):
        return torch.tanh(F.conv2d(x, kernel, padding=1) + t)

    weights = torch.tensor([[0.3, -0.2]], dtype=torch.float64)
    net = Hand(formula, weights.tolist(), bias=0.1, kernel=3)
    return net, posterior_of(net.head, random_covariance(19))


def slow_ddim(net, x, times, weights=None):
    """DDIM of a v predictor, pixel by pixel, from the angles themselves."""
    for t, s in itertools.pairwise(times):
        (a, b), (c, d) = (
            (angle.cos(), angle.sin())
            for angle in (
                torch.atan(SPEEDS4 * math.tan(0.995 * math.pi / 2 * (1 - u))) for u in (t, s)
            )
        )
        features = net.features(x, torch.full((len(x),), t))
        head = net.head.weight if weights is None else weights[:-1].view_as(net.head.weight)
        bias = net.head.bias if weights is None else weights[-1:]
        v = F.conv2d(features, head, bias, padding=1)
        x = c * (a * x - b * v) + d * (b * x + a * v)
    return x


SPEEDS4 = torch.logspace(-0.4, 0.5, 16, dtype=torch.float64).view(1, 4, 4)
TIMES = [k / 5 for k in range(6)]


def coupled_start(net, count=2):
    model = model_of(net, VPPerPixel(speeds=SPEEDS4), "v")
    return Start(model, DDIM(5), None, Noise(count, (1, 4, 4)), CPU)


def test_an_ensemble_is_the_spread_of_networks_sampled_one_by_one():
    net, posterior = coupled()
    ensemble = Ensemble(members=5)
    samples = ensemble(coupled_start(net), posterior)
    x_0 = coupled_start(net).initial()
    with torch.no_grad():
        members = [slow_ddim(net, x_0, TIMES, w[0]) for w in ensemble.weights(posterior)]
        torch.testing.assert_close(samples.images, slow_ddim(net, x_0, TIMES))
    torch.testing.assert_close(samples.variance, torch.stack(members).var(0), rtol=1e-9, atol=0)


def test_all_columns_are_the_jacobian_of_the_whole_sampler():
    net, posterior = coupled()
    samples = Linearised(draws="all")(coupled_start(net), posterior)
    weights = torch.cat([net.head.weight.detach().flatten(), net.head.bias.detach()])
    x_0 = coupled_start(net).initial()
    jacobian = torch.autograd.functional.jacobian(lambda w: slow_ddim(net, x_0, TIMES, w), weights)
    truth = torch.einsum("...p,pq,...q->...", jacobian, posterior.covariance, jacobian)
    torch.testing.assert_close(samples.variance, truth, rtol=1e-8, atol=0)


def test_fewer_products_are_predicted_by_the_answers_of_every_pixel():
    """With a product at every evaluation there is nothing to predict."""
    net, posterior = coupled()

    def starts(numbers):
        return coupled_start(net, len(list(numbers)))

    full = Linearised(draws=4)(starts([0, 1]), posterior).variance
    skipped = Linearised(draws=4, skip_interval=2).fit(starts, posterior)
    left_out = skipped(starts([0, 1]), posterior).variance
    torch.testing.assert_close(left_out, full, rtol=0.3, atol=1e-4)
    rule = replace(skipped.rule, nodes=frozenset(range(1, 5)), correction=torch.ones(5))
    whole = replace(skipped, rule=rule)(starts([0, 1]), posterior).variance
    torch.testing.assert_close(whole, full, rtol=1e-9, atol=0)


# The same number for all pixels -------------------------------------------------------------

PAIRS = [
    (DDIM(6, eta=0.6), "v"),
    (DPMSolver2(4), "noise"),
    (DPMSolverPP2M(6), "data"),
    (SDEEuler(6), "v"),
]


def trajectories(solver, prediction, count=2):
    net, posterior = coupled()
    for path in (LINEAR, Tensors(LINEAR)):
        model = model_of(net, path, prediction)
        yield Start(model, solver, None, Noise(count, (1, 4, 4)), CPU), posterior


@pytest.mark.parametrize(("solver", "prediction"), PAIRS)
def test_tensors_of_one_value_give_what_numbers_give(solver, prediction):
    for estimator in (
        Ensemble(members=3, skip_interval=2),
        Linearised(draws=3),
        Published(4),
        TotalVariance(4, shared=False, skip_interval=2),
    ):
        one, other = (
            estimator(start, posterior) for start, posterior in trajectories(solver, prediction)
        )
        # A middle of dpm2 is a time found in a table that rounds to its nodes.
        near = {"rtol": 1e-5 if solver.name == "dpm2" else 1e-9, "atol": 1e-12}
        torch.testing.assert_close(other.variance, one.variance, **near)
        torch.testing.assert_close(other.images, one.images, **near)


def test_a_refiner_reads_maps_of_tensors_as_those_of_numbers(monkeypatch):
    monkeypatch.setattr("bayesdiff.uncertainty.sensitivities.pilot_images.IMAGES", 4)
    refined = Refined(train_images=20, epochs=1, products=2, derivative="difference")
    net, posterior = small_unet()
    found, keys = [], []
    for path in (LINEAR, Tensors(LINEAR, (1, 8, 8))):
        starts = starts_of(model_of(net, path, "v", 3), DDIM(6), 0, (1, 8, 8), CPU)
        ready = refined.fit(starts, posterior)
        keys.append(refined.key(starts([0]), posterior))
        found.append(ready(starts([0, 1]), posterior).variance)
    torch.testing.assert_close(found[1], found[0], rtol=2e-2, atol=0)
    assert keys[0] != keys[1]


@pytest.mark.parametrize("place", [1, 4])
@pytest.mark.parametrize(("solver", "prediction"), PAIRS)
def test_alternatives_and_restarts_of_tensors_are_those_of_numbers(solver, prediction, place):
    found = []
    for start, posterior in trajectories(solver, prediction):
        origin = Origin.of(start)
        place = min(place, len(origin.steps) - 2)
        state = origin.states[place]
        drawn = origin.trajectories(weight_draws(posterior, 2, 0), [place])[0]
        region = torch.ones_like(state[:, :1], dtype=torch.bool)
        region[:, :, :2] = False
        middle = origin.middle(place, 0.01 + 0.1 * state.square(), region, drawn)
        z = fresh_noise(start, 2, 0).double()
        ways = [origin.finish(place, resample(way, middle, z), region) for way in WAYS]
        rest = Ensemble(members=2)(origin.restart(place, state), posterior)
        found.append([*ways, rest.variance, rest.images])
    # Noise of restarts is in single precision, and so is its product with a number.
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-7)


def test_matched_renoising_has_the_power_of_the_map_under_many_sigmas():
    net, _ = coupled()
    origin = Origin.of(coupled_start(net, 1))
    state, variance = origin.states[1], torch.full((1, 1, 4, 4), 0.01, dtype=torch.float64)
    region = torch.ones_like(state[:, :1], dtype=torch.bool)
    middle = origin.middle(1, variance, region, state[None])
    z = torch.randn(20_000, 1, 1, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    moved = resample("renoise_matched", middle, z) - state
    assert float(moved.square().sum((1, 2, 3, 4)).mean()) == pytest.approx(0.16, rel=0.02)


def test_aleatoric_scores_of_tensors_are_those_of_numbers():
    one, other = (aleatoric(start, draws=3, rounds=2) for start, _ in trajectories(DDIM(6), "v"))
    torch.testing.assert_close(other.centred, one.centred)
    torch.testing.assert_close(other.variance, one.variance)


def test_the_likelihood_of_gaussian_data_is_known_for_every_pixel():
    """For data N(0, s^2) with the exact v, ln p is that of the normal density, pixel by pixel."""
    spread = torch.tensor([[[0.5, 0.8], [0.3, 1.0]]], dtype=torch.float64)

    class Exact(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.fold = torch.nn.Identity(), lambda x: x
            self.one = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

        def features(self, x, t, y=None):
            c = PATH.coefficients(t[:1].double()[0])
            total = c.alpha**2 * spread**2 + c.sigma**2
            return self.one * c.alpha * c.sigma * (1 - spread**2) / total * x

    images = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(2)).double() * spread
    field = Field(model_of(Exact(), PATH, "v"), None, 3)
    found = log_likelihood(field, images, exact_probes(images), num_steps=40, grid="uniform")
    truth = torch.distributions.Normal(0, spread).log_prob(images).flatten(1).sum(1)
    torch.testing.assert_close(found.log_density, truth, rtol=0, atol=2e-3)


# What is refused, and what is not -----------------------------------------------------------


def test_every_solver_serves_the_path_and_open_steps_are_refused():
    for solver in SOLVERS:
        check_solver(solver, PATH, conditional=False)
        check_finite(solver, "v", plan(solver, PATH, "v"))
    mixed = Tensors(LINEAR, (1, 2, 2))
    mixed.coefficients = lambda t: replace(
        LINEAR.coefficients(t), sigma=torch.tensor([[[0.0, 0.5]]]).expand(*t.shape, 1, 1, 2)
    )
    with pytest.raises(UserError, match="solver=dpm1 has no finite step from t=0 to t=0.5"):
        check_finite(DPMSolver1(2), "v", plan(DPMSolver1(2), mixed, "v"))


def test_single_precision_stays_single():
    net, _ = coupled()
    model = model_of(net.float(), VPPerPixel(speeds=SPEEDS4), "v")
    for solver in (Heun(2), DDPM(3), DPMSolverPP2M(3)):
        noise = torch.randn(1, 1, 4, 4)
        steps = plan(solver, model.path, "v")
        end = integrate(lambda x, t: 0.1 * x, steps, noise, lambda z=noise: z)
        assert end.dtype == torch.float32 and end.isfinite().all()
