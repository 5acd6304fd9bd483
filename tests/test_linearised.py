"""Linearised sensitivities against dense derivatives and closed forms (T5-T9, T11)."""

import math
from dataclasses import replace

import pytest
import torch
from hand import (
    CPU,
    FLOW,
    LINEAR,
    SCALE,
    SPREAD,
    Double,
    Hand,
    M,
    affine_flow,
    certain,
    curved,
    gaussian_ddim,
    model_of,
    only_bias,
    plain,
    posterior_of,
    random_covariance,
    real_start,
    small_unet,
    start_of,
)
from hand import SOLVERS as REAL
from sklearn.datasets import load_digits
from torch import nn

from bayesdiff.checks import UserError
from bayesdiff.data.spaces import to_model_range
from bayesdiff.laplace.curvature import fit_curvature
from bayesdiff.laplace.head import head_matrix
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.models import GenerativeModel
from bayesdiff.networks import UNet
from bayesdiff.solvers import (
    DDIM,
    DDPM,
    RK4,
    DPMSolver1,
    DPMSolver2,
    DPMSolverPP2M,
    Euler,
    Heun,
    Midpoint,
    ProbabilityFlow,
    SampleNoise,
    SDEEuler,
    integrate,
)
from bayesdiff.solvers.flow import RungeKutta
from bayesdiff.uncertainty import (
    Ensemble,
    Linearised,
    Published,
    Samples,
    Start,
    TotalVariance,
    starts_of,
)
from bayesdiff.uncertainty.members.ensemble import _SALT
from bayesdiff.uncertainty.sensitivities.linearised import directions, evaluations, follow
from bayesdiff.uncertainty.sensitivities.pilot_images import FIRST, IMAGES, Pilot
from bayesdiff.uncertainty.sensitivities.predicted_products import Memory, spread_nodes
from bayesdiff.uncertainty.sensitivities.products import PRODUCTS

SOLVERS = {
    "euler": (Euler(4), FLOW, "velocity"),
    "euler-guided": (Euler(4, guidance=2.5), FLOW, "velocity"),
    "midpoint": (Midpoint(3), FLOW, "velocity"),
    "heun": (Heun(3), FLOW, "v"),
    "rk4-guided": (RK4(2, guidance=0.5), FLOW, "velocity"),
    "ddim": (DDIM(5), LINEAR, "noise"),
    "ddim-eta": (DDIM(5, eta=0.7), LINEAR, "v"),
    "ddpm": (DDPM(5), LINEAR, "v"),
    "ddpm-small": (DDPM(5, variance="small"), LINEAR, "data"),
    "dpm1": (DPMSolver1(5), LINEAR, "noise"),
    "dpm2": (DPMSolver2(3, r1=0.3), LINEAR, "v"),
    "dpmpp_2m": (DPMSolverPP2M(5), LINEAR, "v"),
    "dpmpp_2m-guided": (DPMSolverPP2M(5, guidance=3.0, grid="log_snr"), LINEAR, "data"),
    "sde": (SDEEuler(5), LINEAR, "v"),
    "pf_ode": (ProbabilityFlow(5), LINEAR, "noise"),
}
STOCHASTIC = ("ddim-eta", "ddpm", "ddpm-small", "sde")


def small_start(net, name, count=2, shape=(1, 4, 4)):
    solver, path, prediction = SOLVERS[name]
    labels = torch.arange(count) % 3
    return start_of(
        model_of(net, path, prediction, num_classes=3), solver, count, shape, labels=labels
    )


def dense_variance(start, posterior):
    """diag(S Sigma S^T) after every step, S by reverse-mode differentiation of the sampler."""
    head = start.model.net.head
    states = []
    integrate(
        start.field(), start.steps(), start.draw(), start.draw, lambda step, x: states.append(x)
    )
    found = []
    for state in states:
        rows = []
        for value in state.flatten():
            weight, bias = torch.autograd.grad(value, (head.weight, head.bias), retain_graph=True)
            rows.append(torch.cat([weight.flatten(1), bias[:, None]], 1))
        s = torch.stack(rows)
        variance = torch.einsum("ncp,pq,ncq->n", s, posterior.covariance, s)
        found.append(variance.view_as(state))
    return torch.stack(found)


@pytest.mark.parametrize("name", SOLVERS)
def test_all_columns_give_the_dense_first_order_variance(name):
    """V = diag(S Sigma S^T) of the whole sampler with its noise fixed, after every step."""
    net, posterior, _ = curved(kernel=3, patch=2)
    truth = dense_variance(small_start(net, name), posterior)
    ends = [step.end for step in small_start(net, name).steps()]
    every = Linearised(draws="all", times=[end for end in ends if end < 1])
    samples = every(small_start(net, name), posterior)
    torch.testing.assert_close(samples.variance, truth[-1], rtol=1e-8, atol=0)
    torch.testing.assert_close(samples.state_variance, truth[:-1], rtol=1e-8, atol=0)
    torch.testing.assert_close(samples.summed, truth.flatten(2).sum(2), rtol=1e-8, atol=0)
    assert samples.variance.dtype == torch.float64 and not samples.variance.requires_grad
    assert torch.equal(samples.images, plain(small_start(net, name)))
    assert (samples.sampler_noise is not None) == (name in STOCHASTIC)


def test_all_columns_of_an_unconditional_model_with_a_diagonal_posterior():
    net, _, covariance = curved(kernel=3)
    posterior = posterior_of(net.head, covariance, "diag")

    def start():
        return start_of(model_of(net), Heun(3), 2, (1, 4, 4))

    truth = dense_variance(start(), posterior)
    samples = Linearised(draws="all")(start(), posterior)
    torch.testing.assert_close(samples.variance, truth[-1], rtol=1e-8, atol=0)
    assert samples.labels is None


class Tokens(nn.Module):
    """One token per 2 x 2 block of pixels, and a linear head for each."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(4, 3).double(), nn.Linear(3, 4).double()

    def features(self, x, t, y=None):
        tokens = nn.functional.pixel_unshuffle(x, 2).flatten(2).mT
        hidden = torch.tanh(self.body(tokens) + t.double()[:, None, None])
        return hidden + hidden.mean(1, keepdim=True)  # tokens hear each other

    def fold(self, output):
        return nn.functional.pixel_shuffle(output.mT.unflatten(2, (2, 2)), 2)


def test_a_linear_head_is_followed_as_well():
    net = Tokens()
    posterior = posterior_of(net.head, random_covariance(head_matrix(net.head).shape[1]))

    def start():
        return start_of(model_of(net), Midpoint(2), 2, (1, 4, 4))

    truth = dense_variance(start(), posterior)
    samples = Linearised(draws="all")(start(), posterior)
    torch.testing.assert_close(samples.variance, truth[-1], rtol=1e-8, atol=0)


@pytest.mark.parametrize(
    ("solver", "gain"),
    [
        (Euler(10), 0.52032225),
        (Heun(10), 0.50286859),
        (Midpoint(10), 0.50286859),
        (RK4(10), 0.50363118),
    ],
)
def test_an_affine_flow_has_the_tabulated_gains(solver, gain):
    """T6 and T7: V = s^2 G^2; with m = 0 it is s^2 f^2 whatever the number of steps."""
    model, posterior = affine_flow()
    got = Linearised(draws="all")(start_of(model, solver, first=0.7), posterior)
    assert float(got.variance) == pytest.approx((SPREAD * gain) ** 2, rel=1e-7)
    if isinstance(solver, Euler):
        assert float(got.variance) == pytest.approx(0.010829410, abs=5e-10)
    few = Linearised(draws=5, seed=3)(start_of(model, solver, first=0.7), posterior)
    deltas = directions(posterior, 5, 3)[:, 0, 1] / SCALE
    assert float(few.variance) == pytest.approx(gain**2 * float(deltas.square().mean()), rel=1e-5)
    model, posterior = affine_flow(slope=0.0)
    for steps in (1, 7):
        start = start_of(model, type(solver)(steps), first=0.7)
        got = Linearised(draws="all")(start, posterior)
        assert float(got.variance) == pytest.approx((SPREAD * SCALE) ** 2, rel=1e-9)


@pytest.mark.parametrize(("solver", "order"), [(Euler, 1), (Heun, 2), (Midpoint, 2), (RK4, 4)])
def test_the_gain_converges_with_the_order_of_the_solver(solver, order):
    """T7: to the variance 0.010145801 of the differential equation itself."""
    model, posterior = affine_flow()
    limit = (SCALE * SPREAD * math.expm1(M) / M) ** 2
    assert limit == pytest.approx(0.010145801, abs=5e-10)

    def error(steps):
        start = start_of(model, solver(steps), first=0.7)
        return abs(float(Linearised(draws="all")(start, posterior).variance) - limit)

    assert math.log2(error(8) / error(16)) == pytest.approx(order, abs=0.25)


def test_a_multiplicative_weight_is_followed_to_first_order():
    """T8: x0^2 (1 + m / N)^(2 N - 2) s^2, which tends to x0^2 e^(2 m) s^2 = 0.11388."""
    mean, spread, first = 0.3, 0.25, 1.0
    net = Hand(lambda x, t, y: x, [[mean]])
    posterior = posterior_of(net.head, torch.tensor([spread**2, 1e-16]).double().diag())
    for steps in (1, 10, 400):
        start = start_of(model_of(net), Euler(steps), first=first)
        got = float(Linearised(draws="all")(start, posterior).variance)
        exact = (first * spread) ** 2 * (1 + mean / steps) ** (2 * steps - 2)
        assert got == pytest.approx(exact, rel=1e-9)
    assert got == pytest.approx(0.11388, rel=2e-3)


@pytest.mark.parametrize(
    ("count", "spread", "shared"),
    [
        (25, 0.5, 9.548e-4),
        (50, 0.05, 1.178e-5),
        (50, 0.5, 9.947e-4),
        (50, 1.0, 3.271e-3),
        (100, 0.5, 1.015e-3),
        (250, 0.5, 1.027e-3),
    ],
)
def test_ddim_on_gaussian_data_has_the_tabulated_variances(count, spread, shared):
    """T9: the number does not fall with the number of steps."""
    model, posterior, times = gaussian_ddim(count, spread)
    start = start_of(model, DDIM(count), first=0.4, times=times)
    got = float(Linearised(draws="all")(start, posterior).variance)
    assert got == pytest.approx(shared, rel=5e-4)


def test_guidance_by_a_label_that_does_not_matter_changes_no_variance():
    """T11: with phi_c = phi_u the variance is independent of w."""
    net, posterior, _ = curved()
    body = net.formula
    net.formula = lambda x, t, y: body(x, t, None)
    labels = torch.tensor([0, 2])
    maps = []
    for w in (1.0, 0.0, 7.5):
        model = model_of(net, num_classes=3)
        start = start_of(model, Euler(4, guidance=w), 2, (1, 3, 3), labels=labels)
        maps.append(Linearised(draws=5)(start, posterior).variance)
    for other in maps[1:]:
        torch.testing.assert_close(other, maps[0], rtol=1e-9, atol=0)


def none_left(head):
    """A posterior of no width at all."""
    return HeadPosterior(certain(head).curvature, "full", 1.0, math.inf, 1.0)


@pytest.fixture
def few_pilots(monkeypatch):
    """Where it does not matter how well a rule predicts."""
    monkeypatch.setattr("bayesdiff.uncertainty.sensitivities.pilot_images.IMAGES", 2)
    monkeypatch.setattr("bayesdiff.uncertainty.sensitivities.linearised.DRAWS", 2)


DIFFERENCES = [(name, "difference") for name in SOLVERS]
OTHERS = [("ddpm", "exact"), ("euler-guided", "exact"), ("euler-guided", "bfloat16")]


@pytest.mark.parametrize(("name", "derivative"), DIFFERENCES + OTHERS)
def test_without_uncertain_weights_there_is_no_variance(name, derivative, few_pilots):
    """T5, exactly, at every step, also where products are predicted."""
    net, _ = small_unet()
    posterior, (solver, path, prediction) = none_left(net.head), SOLVERS[name]
    model = model_of(net, path, prediction, num_classes=3)
    starts = starts_of(model, solver, 1, (1, 8, 8), CPU)
    image = plain(starts([4, 7]))
    for skip in (1, 3):
        chosen = Linearised(draws=2, noise_draws=2, derivative=derivative, skip_interval=skip)
        samples = chosen.fit(starts, posterior)(starts([4, 7]), posterior)
        assert torch.equal(samples.images, image)
        assert not samples.variance.any() and not samples.summed.any()
        if name in STOCHASTIC:
            assert samples.sampler_noise.flatten(1).sum(1).min() > 0.1
        else:
            assert samples.sampler_noise is None


@pytest.mark.parametrize(("name", "derivative"), DIFFERENCES + OTHERS)
def test_the_shown_image_is_the_models_own_sample(name, derivative, few_pilots):
    """T5: bit for bit, for any posterior and skip interval."""
    net, posterior = small_unet()
    solver, path, prediction = SOLVERS[name]
    model = model_of(net, path, prediction, num_classes=3)
    starts = starts_of(model, solver, 1, (1, 8, 8), CPU)
    image = plain(starts([4, 7]))
    for skip in (1, solver.num_steps):
        chosen = Linearised(draws=3, derivative=derivative, skip_interval=skip)
        samples = chosen.fit(starts, posterior)(starts([4, 7]), posterior)
        assert torch.equal(samples.images, image)
        assert samples.variance.dtype == torch.float32 and (samples.variance >= 0).all()
        assert samples.variance.shape == image.shape and samples.variance.isfinite().all()
        assert samples.variance.any()


def test_few_draws_scatter_around_the_exact_map_as_stated():
    """Relative sd at most sqrt(2 / M) per pixel, more than 64 directions in several turns."""
    net, posterior, _ = curved(kernel=3, patch=2)
    draws = 300
    exact = Linearised(draws="all")(small_start(net, "heun"), posterior).variance
    some = Linearised(draws=draws)(small_start(net, "heun"), posterior).variance
    error = (some / exact - 1) / math.sqrt(2 / draws)
    assert error.abs().max() < 2 and 0.01 < error.square().mean().sqrt() < 0.7
    few = Linearised(draws=20)(small_start(net, "heun"), posterior).variance
    assert (few / exact - 1).abs().mean() > 2 * (some / exact - 1).abs().mean()


@pytest.mark.parametrize("name", ["ddpm", "dpmpp_2m", "euler-guided"])
def test_directions_in_turns_are_those_followed_at_once(name, monkeypatch):
    """The image's noise is played again for each turn; sampler noise is followed once."""
    net, posterior, _ = curved(kernel=3, patch=2)
    estimator = Linearised(draws=7, noise_draws=3)
    whole = estimator(small_start(net, name), posterior)
    monkeypatch.setattr("bayesdiff.uncertainty.sensitivities.linearised.ROWS", 3)
    turns = estimator(small_start(net, name), posterior)
    torch.testing.assert_close(turns.variance, whole.variance, rtol=1e-9, atol=0)
    torch.testing.assert_close(turns.summed, whole.summed, rtol=1e-9, atol=0)
    assert torch.equal(turns.images, whole.images)
    if name == "ddpm":
        torch.testing.assert_close(turns.sampler_noise, whole.sampler_noise, rtol=1e-9, atol=0)
    assert turns.nfe > whole.nfe


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(("name", "channels"), [*((name, 1) for name in REAL), ("heun", 3)])
def test_differences_are_as_accurate_as_stated(name, channels):
    """In the network's single precision; bfloat16 keeps the direction of every sensitivity."""
    net, posterior = small_unet(channels)
    deltas = directions(posterior, 6, 0)
    exact, close, coarse = (
        follow(real_start(net, name), deltas, 1 / 6, PRODUCTS[kind]).sensitivities
        for kind in ("exact", "difference", "bfloat16")
    )
    assert 0 < relative(close, exact) < 1e-2
    assert 1e-3 < relative(coarse, exact) < 0.2
    for a, b in zip(coarse.flatten(2).flatten(0, 1), exact.flatten(2).flatten(0, 1), strict=True):
        assert float(torch.corrcoef(torch.stack([a, b]))[0, 1]) > 0.95


@pytest.mark.parametrize("derivative", PRODUCTS)
def test_a_product_is_linear_in_directions_of_any_size(derivative):
    """Tiny ones do not drown in rounding, images do not share a step, and 0 gives 0."""
    net, _ = small_unet()
    start = real_start(net, "euler")
    with torch.no_grad():
        x = start.draw()
        output = start.field()(x, 0.3)
        d = torch.randn(3, *x.shape, generator=torch.Generator().manual_seed(0))
        product = PRODUCTS[derivative]
        plain_one = product(start.field(), x, output, d, 0.3)
        sizes = torch.tensor([[1e-24, 1.0], [0.0, 1e-3], [1e3, 0.0]])[..., None, None, None]
        scaled = product(start.field(), x, output, sizes * d, 0.3)
    expected = sizes * plain_one
    assert torch.equal(scaled == 0, expected == 0) and (scaled[1, 0] == 0).all()
    for got, wanted in zip(scaled.flatten(0, 1), expected.flatten(0, 1), strict=True):
        torch.testing.assert_close(
            got, wanted, rtol=0, atol=1e-2 * float(wanted.abs().max()) + 1e-45
        )


@pytest.mark.parametrize(
    ("estimator", "solver", "nfe"),
    [
        (Linearised(draws=4, derivative="difference"), Euler(10), 10 + 9 * 4),
        (Linearised(draws=4, derivative="bfloat16"), Euler(10), 10 + 9 * 5),
        (Linearised(draws=4), Euler(10), 10 + 9 * 5),
        (Linearised(draws=4), Heun(10), 20 + 19 * 5),
        (Linearised(draws=4), Euler(1), 1),
        (Linearised(draws=4, derivative="difference"), Euler(10, 2.0), 2 * (10 + 9 * 4)),
        (Linearised(draws=4), Euler(10, 2.0), 2 * (10 + 9 * 5)),
        (Linearised(draws=4, derivative="difference", skip_interval=3), Euler(10), 10 + 3 * 4),
        (Linearised(draws=4, derivative="difference", skip_interval=10), Euler(10), 10 + 4),
        (Linearised(draws=4, derivative="difference", skip_interval=4), RK4(4), 16 + 4 * 4),
        (Linearised(draws="all", derivative="difference"), Euler(10), 10 + 9 * 3),
    ],
)
def test_network_evaluations_are_counted(estimator, solver, nfe, few_pilots):
    """The first product is free, as nothing has been moved by then."""
    net, posterior, _ = curved()
    model = model_of(net, num_classes=3)
    starts = starts_of(model, solver, 0, (1, 2, 2), CPU)

    def start(numbers):
        found = starts(numbers)
        return Start(model, solver, found.labels, Double(found.noise), CPU)

    ready = estimator.fit(start, posterior)
    net.calls.clear()
    assert ready(start([0, 1]), posterior).nfe == nfe
    if estimator.derivative != "exact":
        assert sum(size for size, _ in net.calls) == 2 * nfe


@pytest.mark.parametrize(("solver", "path"), [(DDPM(6), LINEAR), (Heun(3), FLOW)])
@pytest.mark.parametrize("draws", [5, "all"])
def test_it_says_how_many_inputs_it_holds(draws, solver, path):
    net, posterior = small_unet()
    estimator = Linearised(draws=draws, noise_draws=3, derivative="bfloat16")
    seen, real = [], net.features
    net.features = lambda x, t, y=None: (seen.append(len(x)), real(x, t, y))[1]
    model = model_of(net, path, "v", num_classes=3)
    estimator(starts_of(model, solver, 0, (1, 8, 8), CPU)([0]), posterior)
    # A processor evaluates 64 of them at a time.
    assert min(64, estimator.copies(solver)) == max(seen)
    assert estimator.copies(solver) == 1 + (64 if draws == "all" else 5) + 3 * (path is LINEAR)


@pytest.mark.parametrize("solver", [DDPM(6), DDIM(6, eta=0.7), SDEEuler(6)])
def test_sampler_noise_is_exact_for_a_linear_network(solver):
    """d' = (a + b kap) d + c z with noise of its own; its variance to the draws' accuracy."""
    kappa, draws, seed = 0.4, 500, 7
    net = Hand(lambda x, t, y: kappa * x, [[1.0]])
    model, posterior = model_of(net, LINEAR, "v"), only_bias(net.head, 1e-4)
    start = start_of(model, solver, 2, (1, 2, 2))
    fresh, d, truth = start.noise.fork(seed), 0.0, 0.0
    for step in start.steps():
        factor = step.output[0] + step.output[1] * kappa
        d, truth = factor * d, factor**2 * truth + step.noise**2
        if step.noise:
            d = d + step.noise * torch.stack([fresh().double() for _ in range(draws)])
    samples = Linearised(draws=2, noise_draws=draws, seed=seed)(start, posterior)
    torch.testing.assert_close(samples.sampler_noise, d.square().mean(0), rtol=1e-10, atol=0)
    band = 4 * truth * math.sqrt(2 / draws)
    assert (samples.sampler_noise - truth).abs().max() < band
    none = Linearised(draws=2, noise_draws=0, seed=seed)
    quiet = none(start_of(model, solver, 2, (1, 2, 2)), posterior)
    assert quiet.sampler_noise is None and torch.equal(quiet.variance, samples.variance)


@pytest.mark.parametrize("derivative", ["exact", "difference"])
@pytest.mark.parametrize("skip", [1, 3])
@pytest.mark.parametrize("name", ["ddpm", "heun"])
def test_maps_do_not_depend_on_how_images_are_batched(name, skip, derivative):
    """All images meet the same directions and the same rule, and bring their own noise."""
    net, posterior, _ = curved(kernel=3, patch=2)
    solver, path, prediction = SOLVERS[name]
    model = model_of(net, path, prediction, num_classes=3)

    def start(numbers):
        noise = Double(SampleNoise(0, list(numbers), (1, 4, 4)))
        return Start(model, solver, torch.tensor(list(numbers)) % 3, noise, CPU)

    estimator = Linearised(draws=6, skip_interval=skip, derivative=derivative)
    ready = estimator.fit(start, posterior)
    whole = ready(start(range(5)), posterior)
    joined = Samples.join([ready(start(part), posterior) for part in ([0, 1], [2], [3, 4])])
    for name in ("images", "variance", "summed", "sampler_noise"):
        a, b = getattr(joined, name), getattr(whole, name)
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-18)
    assert joined.nfe == whole.nfe


def test_the_record_over_time_is_of_the_shown_image():
    net, posterior, _ = curved()
    model = model_of(net, LINEAR, "v")
    states = []
    start = start_of(model, DDPM(20), 10, (1, 3, 3))
    with torch.no_grad():
        integrate(
            start.field(),
            start.steps(),
            start.draw(),
            start.draw,
            lambda step, x: states.append(x),
        )
    samples = Linearised(draws=3, times=[0.5])(start_of(model, DDPM(20), 10, (1, 3, 3)), posterior)
    torch.testing.assert_close(samples.times, torch.arange(1, 21) / 20)
    torch.testing.assert_close(samples.summed[-1], sums(samples))
    assert torch.equal(samples.states[0], states[9]) and torch.equal(samples.images, states[-1])
    assert samples.frames.shape == samples.frame_variance.shape == (9, 8, 1, 3, 3)
    assert torch.equal(samples.frames[-1], samples.images[:8])
    assert torch.equal(samples.frame_variance[-1], samples.variance[:8])
    assert samples.estimator == "linearised, 3 draws, exact, skip 1"


def test_seeds_change_maps_and_nothing_else():
    net, posterior, _ = curved()

    def run(seed):
        start = start_of(model_of(net), Euler(4), 2, (1, 3, 3))
        return Linearised(draws=4, seed=seed)(start, posterior)

    first, again, other = run(1), run(1), run(2)
    assert torch.equal(first.variance, again.variance)
    assert not torch.equal(first.variance, other.variance)
    assert torch.equal(first.images, other.images)


@pytest.mark.parametrize("context", [torch.enable_grad, torch.inference_mode])
def test_no_graph_is_left_in_any_mode_of_the_caller(context, few_pilots):
    net, posterior = small_unet()
    solver, path, prediction = REAL["ddpm"]
    starts = starts_of(model_of(net, path, prediction, num_classes=3), solver, 1, (1, 8, 8), CPU)
    expected = Linearised(draws=2)(starts([4]), posterior).variance
    with context():
        for skip in (1, 2):
            ready = Linearised(draws=2, skip_interval=skip).fit(starts, posterior)
            samples = ready(starts([4]), posterior)
            if skip == 1:
                assert torch.equal(samples.variance, expected)
            for value in vars(samples).values():
                assert not (isinstance(value, torch.Tensor) and value.requires_grad)
        followed = follow(starts([4]), directions(posterior, 2, 0), 0.5, PRODUCTS["difference"])
    assert not followed.states.requires_grad and not followed.sensitivities.requires_grad


# Left-out products


def doubled(starts):
    """The same samples in double precision."""

    def start(numbers):
        found = starts(numbers)
        return Start(found.model, found.solver, found.labels, Double(found.noise), found.device)

    return start


@pytest.mark.parametrize(
    ("solver", "path", "prediction"),
    [
        (Euler(12), FLOW, "velocity"),
        (Heun(6), FLOW, "velocity"),
        (RK4(3), FLOW, "velocity"),
        (DDIM(12), LINEAR, "noise"),
        (DPMSolverPP2M(12), LINEAR, "v"),
    ],
)
def test_predicted_products_are_exact_where_the_network_is_linear_and_pixelwise(
    solver, path, prediction
):
    """g = kap(t) x + theta: J d is a multiple of d, which the regression finds."""
    net = Hand(lambda x, t, y: (0.3 - 0.8 * t) * x, [[1.0]])
    posterior = posterior_of(net.head, torch.tensor([0.02, 0.05]).double().diag())
    starts = doubled(starts_of(model_of(net, path, prediction), solver, 0, (1, 2, 2), CPU))
    exact = Linearised(draws=5)(starts(range(3)), posterior)
    for skip in (2, 5, solver.num_steps):
        if skip <= solver.num_steps:
            ready = Linearised(draws=5, skip_interval=skip).fit(starts, posterior)
            got = ready(starts(range(3)), posterior)
            torch.testing.assert_close(got.summed, exact.summed, rtol=1e-4, atol=0)
            torch.testing.assert_close(got.variance, exact.variance, rtol=1e-4, atol=0)
            torch.testing.assert_close(
                ready.rule.correction, torch.ones_like(ready.rule.correction), rtol=0, atol=1e-4
            )


@pytest.mark.parametrize("name", SOLVERS)
def test_a_rule_with_every_product_leaves_nothing_to_predict(name):
    net, posterior, _ = curved(kernel=3, patch=2)
    solver, path, prediction = SOLVERS[name]
    model = model_of(net, path, prediction, num_classes=3)
    starts = doubled(starts_of(model, solver, 0, (1, 4, 4), CPU))
    deltas, product = directions(posterior, 4, 0), PRODUCTS["exact"]
    count = evaluations(starts([0]))
    rule = Pilot.follow(starts, deltas, product).rule(frozenset(range(1, count)), product)
    with_rule = follow(starts([0, 1]), deltas, 0.25, product, rule, noise_draws=2)
    without = follow(starts([0, 1]), deltas, 0.25, product, noise_draws=2)
    torch.testing.assert_close(with_rule.variance, without.variance, rtol=1e-9, atol=0)
    assert torch.equal(with_rule.states, without.states) and with_rule.nfe == without.nfe
    if without.sampler_noise is not None:
        torch.testing.assert_close(with_rule.sampler_noise, without.sampler_noise)
    assert len(with_rule.features) == count - 1 and len(rule) == count
    assert rule.coefficients.dtype == rule.correction.dtype == torch.float64
    assert rule.coefficients.shape == (count, 2, 5) and not rule.coefficients[0].any()


def test_the_pilots_total_corrects_the_level_of_every_step():
    """Followed with the rule made of them, pilots get the total that every product gives."""
    net, posterior, _ = curved(kernel=3, patch=2)
    solver, path, prediction = SOLVERS["heun"]
    model = model_of(net, path, prediction, num_classes=3)
    starts = doubled(starts_of(model, solver, 0, (1, 4, 4), CPU))
    deltas, product = directions(posterior, 4, 0), PRODUCTS["exact"]
    rule = Pilot.follow(starts, deltas, product).rule(frozenset({2}), product)
    pilots = range(FIRST, FIRST + IMAGES)
    predicted = follow(starts(pilots), deltas, 0.25, product, rule)
    exact = follow(starts(pilots), deltas, 0.25, product)
    assert not torch.allclose(predicted.variance[-1], exact.variance[-1], rtol=1e-3)
    torch.testing.assert_close(
        predicted.variance.flatten(1).sum(1), exact.variance.flatten(1).sum(1), rtol=1e-9, atol=0
    )


def test_sampler_noise_does_not_depend_on_left_out_products():
    net, posterior, _ = curved(kernel=3, patch=2)
    model = model_of(net, LINEAR, "v", num_classes=3)
    starts = doubled(starts_of(model, DDPM(6), 0, (1, 4, 4), CPU))
    whole, skipped = (
        Linearised(draws=3, skip_interval=k).fit(starts, posterior)(starts([0, 1]), posterior)
        for k in (1, 3)
    )
    torch.testing.assert_close(skipped.sampler_noise, whole.sampler_noise, rtol=1e-9, atol=0)
    assert not torch.equal(skipped.variance, whole.variance)


def test_a_fit_is_the_ridge_regression_on_what_is_known():
    """Against the same regression written as one least-squares problem."""
    generator = torch.Generator().manual_seed(0)

    def some(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    memory, gate = Memory(), some(3, 1, 4, 4).square()
    d, forced, target = some(2, 3, 1, 4, 4), some(2, 3, 1, 4, 4), some(2, 3, 1, 4, 4)
    fitted = memory.fit(target, d, forced, gate)
    assert not fitted[:, :3].any() and fitted[:, 3:].all()
    guess = memory.predict(fitted, d, forced, gate)
    memory.learn(target, guess)
    assert memory.previous is None
    memory.learn(some(2, 3, 1, 4, 4), 0 * d)
    truth = some(2, 5)
    known = [memory.held, memory.previous, memory.surprise, d, forced]
    assert memory.previous is target
    # With the guess 0 the surprise is the answer itself: the ridge halves what they share.
    target = sum((a + b * gate) * k for (a, b), k in zip(truth.T, known, strict=True))
    fitted = memory.fit(target, d, forced, gate)
    torch.testing.assert_close(fitted[:, [1, 3, 4]], truth[:, [1, 3, 4]], rtol=1e-4, atol=1e-5)
    shared = truth[:, 0] + truth[:, 2]
    torch.testing.assert_close(fitted[:, 0], shared / 2, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fitted[:, 2], shared / 2, rtol=1e-4, atol=1e-5)
    predicted = memory.predict(fitted, d, forced, gate)
    torch.testing.assert_close(predicted, target, rtol=0, atol=1e-4)


def digits_model(path, prediction, steps):
    """A small network trained on 8 x 8 digits, and the posterior of its head."""
    images = (torch.tensor(load_digits().images)[:, None] / 16 * 255).round().to(torch.uint8)
    data = to_model_range(images)
    torch.manual_seed(0)
    net = UNet(1, 8, channels=(8, 16), blocks=1, attention=False)
    model = GenerativeModel(net, path, prediction, torch.optim.Adam)
    optimizer = torch.optim.Adam(model.parameters())
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in range(steps):
        x_1 = data[torch.randint(len(data), (64,))]
        t = model.times(torch.rand(64))
        x_t, target = model.corrupt(x_1, torch.randn_like(x_1), t)
        loss = (model(x_t, t) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
    model.eval()
    return model, HeadPosterior.fit(fit_curvature(model, images, None, source="digits"))


@pytest.fixture(scope="module")
def flow_of_digits():
    return digits_model(FLOW, "velocity", 120)


@pytest.fixture(scope="module")
def well_trained():
    """By the name that the path gives models; half a minute."""
    return {
        path.family: digits_model(path, prediction, 400)
        for path, prediction in ((FLOW, "velocity"), (LINEAR, "noise"))
    }


def digits_starts(model, solver):
    return starts_of(model, solver, 0, (1, 8, 8), CPU)


def sums(samples):
    """Variance of each image, summed over channels and pixels."""
    return samples.variance.flatten(1).sum(1)


def rank_correlation(a, b):
    ranks = torch.stack([v.argsort().argsort().double() for v in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def test_left_out_products_of_a_trained_network_are_predicted(flow_of_digits):
    """Images and directions that the pilot has not seen; measured: 0.3 %, 2.2 %, rank 0.97."""
    model, posterior = flow_of_digits
    starts = digits_starts(model, Euler(20))
    whole = Linearised(draws=8, seed=5, derivative="difference")(starts(range(24)), posterior)
    estimator = Linearised(draws=8, seed=5, skip_interval=5, derivative="difference")
    samples = estimator.fit(starts, posterior)(starts(range(24)), posterior)
    assert float(sums(samples).sum() / sums(whole).sum()) == pytest.approx(1, abs=0.02)
    assert float((sums(samples) / sums(whole)).log().square().mean().sqrt()) < 0.04
    assert rank_correlation(sums(samples), sums(whole)) > 0.93
    assert samples.nfe == 20 + 4 * 8


@pytest.mark.slow
@pytest.mark.parametrize("skip", [2, 3, 4, 5])
@pytest.mark.parametrize("solver", [Euler(20), Heun(10), RK4(5), DDIM(20), DPMSolverPP2M(20)])
def test_left_out_products_keep_level_and_rank(well_trained, solver, skip):
    """Measured: totals at most 5, 8, 13 and 19 % off for k = 2 to 5, ranks 0.98 or better."""
    name = "flow" if isinstance(solver, RungeKutta) else "diffusion"
    model, posterior = well_trained[name]
    starts, numbers = digits_starts(model, solver), range(48)
    estimator = Linearised(draws=16, seed=5, derivative="difference")
    whole = estimator(starts(numbers), posterior)
    predicted = replace(estimator, skip_interval=skip).fit(starts, posterior)
    samples = predicted(starts(numbers), posterior)
    bound = {2: 0.07, 3: 0.12, 4: 0.17, 5: 0.25}[skip]
    assert float(sums(samples).sum() / sums(whole).sum()) == pytest.approx(1, abs=bound)
    assert rank_correlation(sums(samples), sums(whole)) > 0.95


def drawn(posterior, count, seed):
    """The draws of an ensemble, as deviations."""
    generator = torch.Generator().manual_seed(seed)
    return posterior.draw(count, generator) - posterior.curvature.mean


@pytest.mark.slow
def test_linearised_is_the_ensemble_where_weights_barely_move(well_trained):
    """T18: with a tenth of the weights' spread, against 256 trajectories.

    At the posterior's own spread the median departure of this network is below 1 % as well, with
    5 % of pixels beyond 1 %; that is measured, not demanded.
    """
    model, posterior = well_trained["flow"]
    narrow = replace(posterior, n_eff=100 * posterior.n_eff)
    starts = digits_starts(model, Euler(20))
    ensemble = Ensemble(members=256, seed=1)(starts(range(4)), narrow)
    exact = Linearised(draws="all")(starts(range(4)), narrow)
    deltas = drawn(narrow, 256, 1 + _SALT)  # the same draws
    paired = follow(starts(range(4)), deltas, 1 / 256, PRODUCTS["exact"]).variance[-1]
    for variance in (exact.variance, paired):
        assert float((variance / ensemble.variance).log().median().abs()) < 0.1
    assert float((paired / ensemble.variance).log().abs().median()) < 0.02


@pytest.mark.slow
def test_recursions_with_fresh_weights_fall_as_one_over_the_steps(well_trained):
    """T18: their ratio to the ensemble; the linearised one stays at 1."""
    model, posterior = well_trained["flow"]
    estimators = {
        "published": Published(covariance="stein"),
        "total": TotalVariance(covariance="antithetic"),
    }
    counts, deltas = (10, 20, 50, 100), drawn(posterior, 48, _SALT)
    ratios = {name: [] for name in [*estimators, "linearised"]}
    for count in counts:
        starts = digits_starts(model, Euler(count))
        reference = Ensemble(members=48)(starts(range(4)), posterior).variance.sum()
        for name, estimator in estimators.items():
            found = estimator(starts(range(4)), posterior).variance.sum()
            ratios[name].append(float(found / reference))
        alike = follow(starts(range(4)), deltas, 1 / 48, PRODUCTS["difference"]).variance[-1]
        ratios["linearised"].append(float(alike.sum() / reference))
    x = torch.tensor(counts).log()
    for name in ("published", "total"):
        y = torch.tensor(ratios[name]).log()
        slope = float(((x - x.mean()) * y).sum() / (x - x.mean()).square().sum())
        assert slope == pytest.approx(-1, abs=0.15)
        assert max(ratios[name]) < 0.15
    assert ratios["linearised"] == pytest.approx([1] * 4, abs=0.03)


@pytest.mark.parametrize("count", [1, 2, 7, 20, 40])
def test_products_are_spread_over_the_evaluations(count):
    for products in range(1, count):
        nodes = sorted(spread_nodes(count, products))
        assert len(nodes) == products or 2 * products > count
        assert nodes[0] >= 1 and nodes[-1] <= count - 1
    assert spread_nodes(20, 4) == {4, 9, 13, 18}


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Linearised(draws=0), "uncertainty.draws .* got 0"),
        (lambda: Linearised(draws="some"), "uncertainty.draws .* or all, got 'some'"),
        (lambda: Linearised(draws=2.5), "uncertainty.draws .* got 2.5"),
        (lambda: Linearised(draws=True), "uncertainty.draws"),
        (lambda: Linearised(draws=None), "uncertainty.draws"),
        (lambda: Linearised(derivative="exactly"), "'exactly'; .*exact, difference, bfloat16"),
        (lambda: Linearised(derivative=["exact"]), "uncertainty.derivative"),
        (lambda: Linearised(noise_draws=-1), "uncertainty.noise_draws"),
        (lambda: Linearised(skip_interval=0).check(Euler(4)), "uncertainty.skip_interval"),
        (lambda: Linearised(skip_interval=5).check(Euler(4)), "skip_interval=5 .*num_steps=4"),
    ],
)
def test_unusable_settings_are_refused_in_one_line(make, named):
    with pytest.raises(UserError, match=named) as refused:
        make()
    assert "\n" not in str(refused.value)


def test_a_skip_interval_without_its_rule_is_a_mistake_of_the_caller():
    net, posterior, _ = curved()
    with pytest.raises(ValueError, match="needs fit"):
        Linearised(skip_interval=2)(start_of(model_of(net), Euler(4)), posterior)
