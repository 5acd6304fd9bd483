"""Solvers as coefficients, against closed forms on linear fields (T6, T7, T9-T11, T17)."""

import itertools
import math
import re

import pytest
import torch
from conftest import ROOT
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from bayesdiff.checks import UserError
from bayesdiff.models import GenerativeModel
from bayesdiff.networks import UNet
from bayesdiff.paths import PREDICTIONS, CondOT, VariancePreserving
from bayesdiff.paths.prediction import mix
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
    SampleNoise,
    SDEEuler,
    integrate,
    time_grid,
)
from bayesdiff.solvers.step import check_solver

LINEAR, COSINE, FLOW = VariancePreserving(), VariancePreserving("cosine"), CondOT()
M, F = -1.3, 0.9


def no_noise():
    raise AssertionError("a deterministic solver asked for noise")


def uniform_times(count):
    return [k / count for k in range(count + 1)]


def own_steps(solver, path, prediction):
    times = time_grid(solver.grid, path, solver.num_steps)
    return solver.steps(path, prediction, times)


def index_times(count):
    """Times of the indices 980, 960, ..., 0 for 50 steps: no step to clean data."""
    return [1 - (i * 1000 // count + 1) / 1000 for i in reversed(range(count))]


def exact_denoiser(path, prediction, spread, mean=0.0):
    """The best predictor for data N(mean, spread^2), written for each kind by ``mix``."""

    def field(x, t):
        c = path.coefficients(torch.tensor(t, dtype=torch.float64))
        centred = (x - c.alpha * mean) / (c.alpha**2 * spread**2 + c.sigma**2)
        r, s = mix(prediction, c)
        return r * (mean + c.alpha * spread**2 * centred) + s * c.sigma * centred

    return field


def affine(solver_class, steps, slope=M, x=0.0):
    """End of dx/dt = slope x + F from x."""
    solver = solver_class(steps)
    start = torch.tensor(x, dtype=torch.float64)
    plan = own_steps(solver, FLOW, "velocity")
    return float(integrate(lambda x, t: slope * x + F, plan, start, no_noise))


@pytest.mark.parametrize(
    ("solver", "growth", "value"),
    [
        (Euler, lambda z: 1 + z, 0.52032225),
        (Heun, lambda z: 1 + z + z**2 / 2, 0.50286859),
        (Midpoint, lambda z: 1 + z + z**2 / 2, 0.50286859),
        (RK4, lambda z: 1 + z + z**2 / 2 + z**3 / 6 + z**4 / 24, 0.50363118),
    ],
)
def test_sensitivity_of_an_affine_flow_has_its_closed_form(solver, growth, value):
    """T6 and T7: G = f (R(z)^N - 1) / m."""
    got = affine(solver, 10)
    assert got == pytest.approx(F * (growth(M / 10) ** 10 - 1) / M, abs=1e-14)
    assert got == pytest.approx(value, abs=5e-9)
    assert affine(solver, 10, x=2.0) - got == pytest.approx(2 * growth(M / 10) ** 10, abs=1e-14)
    assert affine(solver, 7, slope=0.0) == pytest.approx(F, abs=1e-14)


RUNGE_KUTTA = [(Euler, 1), (Heun, 2), (Midpoint, 2), (RK4, 4)]


@pytest.mark.parametrize(("solver", "order"), RUNGE_KUTTA)
def test_error_falls_with_the_order_of_the_method(solver, order):
    limit = F * (math.exp(M) - 1) / M
    assert 0.2**2 * limit**2 == pytest.approx(0.010145801, abs=5e-10)
    assert affine(solver, 10) == pytest.approx(limit, rel=0.05 if order < 4 else 1e-5)
    errors = [abs(affine(solver, n) - limit) for n in (40, 80, 160)]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.05)


@pytest.mark.parametrize(("solver", "order"), RUNGE_KUTTA)
def test_order_holds_for_a_nonlinear_field_that_depends_on_time(solver, order):
    """dx/dt = -x^2 t ends at 1 / (1 / x_0 + 1 / 2)."""
    errors = []
    for n in (64, 128):
        plan = own_steps(solver(n), FLOW, "velocity")
        x = integrate(lambda x, t: -(x**2) * t, plan, torch.tensor(2.0).double(), no_noise)
        errors.append(abs(float(x) - 1.0))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("path", [LINEAR, COSINE], ids=["linear", "cosine"])
@pytest.mark.parametrize("count", [10, 50])
def test_ddim_on_gaussian_data_multiplies_by_the_known_factor(count, path):
    """T9: a + b kap = (alpha_t alpha_s s0^2 + sigma_t sigma_s) / (alpha_t^2 s0^2 + sigma_t^2)."""
    times = uniform_times(count)
    c = path.coefficients(torch.tensor(times, dtype=torch.float64))
    for spread in (0.05, 0.5, 1.0):
        steps = DDIM(count).steps(path, "noise", times)
        for i, step in enumerate(steps):
            (alpha, alpha_s), (sigma, sigma_s) = c.alpha[i : i + 2], c.sigma[i : i + 2]
            total = alpha**2 * spread**2 + sigma**2
            a, b = step.output
            expected = (alpha * alpha_s * spread**2 + sigma * sigma_s) / total
            assert a + b * float(sigma / total) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize(
    ("count", "published", "total"), [(50, -0.7527, 0.0160), (100, -0.5746, 0.0456)]
)
def test_last_ddim_step_off_the_data_manifold(count, published, total):
    """T9: dropping Var(g) turns the factor on V negative where kap = 1 / sigma."""
    *_, step = DDIM(count).steps(LINEAR, "noise", index_times(count))
    sigma = float(LINEAR.coefficients(torch.tensor(step.times[0], dtype=torch.float64)).sigma)
    a, b = step.output
    assert a**2 + 2 * a * b / sigma == pytest.approx(published, abs=5e-5)
    assert (a + b / sigma) ** 2 == pytest.approx(total, abs=5e-5)


@pytest.mark.parametrize(
    ("count", "spread", "pub", "tot", "shared", "skipped"),
    [
        (25, 0.5, 2.231e-5, 4.266e-5, 9.548e-4, 1.615e-2),
        (50, 0.05, 2.903e-7, 6.912e-7, 1.178e-5, 3.864e-3),
        (50, 0.5, 1.556e-5, 2.168e-5, 9.947e-4, 7.696e-3),
        (50, 1.0, 5.661e-5, 7.702e-5, 3.271e-3, 1.042e-2),
        (100, 0.5, 9.242e-6, 1.092e-5, 1.015e-3, 3.494e-3),
        (250, 0.5, 4.105e-6, 4.390e-6, 1.027e-3, 1.280e-3),
    ],
)
def test_variance_recursions_on_ddim_coefficients(count, spread, pub, tot, shared, skipped):
    """T9, the whole table: eps = eps_hat + theta with theta ~ N(0, 1e-4)."""
    steps = DDIM(count).steps(LINEAR, "noise", index_times(count))
    one = torch.ones((), dtype=torch.float64)
    slope = exact_denoiser(LINEAR, "noise", spread)
    every, total, sensitivity, fifth = 0.0, 0.0, 0.0, 0.0
    for number, step in enumerate(steps):
        a, b = step.output
        kappa = float(slope(one, step.times[0]))
        every = (a**2 + 2 * a * b * kappa) * max(every, 0) + b**2 * 1e-4
        total = (a + b * kappa) ** 2 * total + b**2 * 1e-4
        sensitivity = (a + b * kappa) * sensitivity + b
        if number % 5:
            fifth = a**2 * fifth
        else:
            fifth = (a**2 + 2 * a * b * kappa) * max(fifth, 0) + b**2 * 1e-4
    values = [every, total, sensitivity**2 * 1e-4, fifth]
    assert values == pytest.approx([pub, tot, shared, skipped], rel=5e-4)


def as_tuples(steps):
    return torch.tensor([(*step.output, step.noise) for step in steps], dtype=torch.float64)


def test_ddim_between_zero_and_one_keeps_the_papers_marginals():
    """Song et al. 2021: the mean's noise part and fresh noise add up to sigma_s^2 for any eta."""
    times = uniform_times(25)
    sigma_s = LINEAR.coefficients(torch.tensor(times[1:], dtype=torch.float64)).sigma
    for eta in (0.0, 0.3, 1.0):
        got = []
        for step in DDIM(25, eta=eta).steps(LINEAR, "noise", times):
            c = LINEAR.coefficients(torch.tensor(step.times[0], dtype=torch.float64))
            a, b = step.output
            got.append((float(a * c.sigma) + b) ** 2 + step.noise**2)
        got = torch.tensor(got, dtype=torch.float64)
        torch.testing.assert_close(got, sigma_s**2, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("variance", ["large", "small"])
def test_ancestral_coefficients_are_those_of_the_algorithm(variance):
    """Every index: x' = (x - beta eps / sigma) / sqrt(1 - beta) + sqrt(beta or beta tilde) z."""
    beta = torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64).flip(0)
    abar = (1 - beta.flip(0)).cumprod(0).flip(0)
    before = torch.cat([abar[1:], abar.new_ones(1)])
    fresh = beta if variance == "large" else beta * (1 - before) / (1 - abar)
    fresh = fresh.sqrt() * (torch.arange(1000) < 999)
    expected = torch.stack(
        [(1 - beta).rsqrt(), -beta / ((1 - abar) * (1 - beta)).sqrt(), fresh], 1
    )
    steps = own_steps(DDPM(1000, variance=variance), LINEAR, "noise")
    torch.testing.assert_close(as_tuples(steps), expected, rtol=1e-8, atol=1e-8)


def test_unit_gaussian_data_is_stationary_and_its_mean_moves():
    """T10: (a + b kap)^2 + c^2 = 1; without Var(g) 1 - beta^2 / (1 - beta) instead."""
    steps = own_steps(DDPM(100), LINEAR, "noise")[:-1]
    mean = 1.0
    for step in steps:
        a, b = step.output
        t = torch.tensor(step.times[0], dtype=torch.float64)
        kappa = float(LINEAR.coefficients(t).sigma)
        beta = 1 - 1 / a**2
        assert (a + b * kappa) ** 2 + step.noise**2 == pytest.approx(1, abs=1e-12)
        incomplete = a**2 + 2 * a * b * kappa + step.noise**2
        assert incomplete == pytest.approx(1 - beta**2 / (1 - beta), abs=1e-12)
        mean *= a + b * kappa
    ends = LINEAR.coefficients(torch.tensor([0.0, 0.99], dtype=torch.float64)).alpha
    assert mean == pytest.approx(float(ends[0] / ends[1]), rel=1e-9)


SOLVERS = {
    "ddim": (DDIM(20), COSINE, PREDICTIONS),
    "ddim-eta": (DDIM(20, eta=0.7), LINEAR, PREDICTIONS),
    "ddpm": (DDPM(20), COSINE, PREDICTIONS),
    "ddpm-small": (DDPM(20, variance="small"), LINEAR, PREDICTIONS),
    "dpm1": (DPMSolver1(20), COSINE, PREDICTIONS),
    "dpm2": (DPMSolver2(20), COSINE, PREDICTIONS),
    "dpm2-log-snr": (DPMSolver2(20, grid="log_snr", r1=0.3), LINEAR, PREDICTIONS),
    "dpmpp_2m": (DPMSolverPP2M(20), COSINE, PREDICTIONS),
    "dpmpp_2m-quadratic": (DPMSolverPP2M(20, grid="quadratic"), LINEAR, PREDICTIONS),
    "sde": (SDEEuler(20), COSINE, PREDICTIONS),
    "pf_ode": (ProbabilityFlow(20, grid="log_snr"), COSINE, PREDICTIONS),
    "euler": (Euler(20), FLOW, ("velocity", "v", "data")),
    "heun": (Heun(20), FLOW, ("velocity", "v")),
    "midpoint": (Midpoint(20), FLOW, ("velocity", "v", "data")),
    "rk4": (RK4(20, grid="log_snr"), FLOW, ("velocity", "v")),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_all_predictions_of_the_exact_denoiser_give_one_trajectory(name):
    """T11: what the network predicts is a matter of coefficients only."""
    solver, path, kinds = SOLVERS[name]
    x_0 = torch.randn(500, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ends = []
    for kind in kinds:
        generator = torch.Generator().manual_seed(1)
        field = exact_denoiser(path, kind, spread=0.5, mean=0.3)
        states = []
        integrate(
            field,
            own_steps(solver, path, kind),
            x_0,
            lambda g=generator: torch.randn(500, dtype=torch.float64, generator=g),
            lambda step, x, states=states: states.append(x),
        )
        ends.append(torch.stack(states))
    for other in ends[1:]:
        torch.testing.assert_close(other, ends[0], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    ("solver", "prediction"),
    [
        (Euler(4), "noise"),
        (Heun(4), "noise"),
        (Heun(4), "data"),
        (RK4(4), "data"),
        (Midpoint(4), "noise"),
    ],
)
def test_a_prediction_that_is_singular_on_the_flows_ends_is_refused(solver, prediction):
    """Its velocity would be 0 / 0 at pure noise or at clean data: images of nan, silently."""
    named = f"model.prediction={prediction} .* solver={solver.name} "
    with pytest.raises(UserError, match=named):
        own_steps(solver, FLOW, prediction)


@pytest.mark.parametrize("variance", ["large", "small"])
def test_ancestral_samples_have_the_datas_mean_and_variance(variance):
    """Exact score of N(0.3, 0.5^2): the chain's own moments, which tend to those of the data."""
    field = exact_denoiser(LINEAR, "noise", spread=0.5, mean=0.3)

    def moments(steps):
        mean, spread = 0.0, 1.0
        for step in steps:
            zero, one = (field(torch.tensor(v).double(), step.times[0]) for v in (0.0, 1.0))
            factor = float(step.output[0] + step.output[1] * (one - zero))
            mean = factor * mean + step.output[1] * float(zero)
            spread = factor**2 * spread + step.noise**2
        return mean, spread

    fine = moments(own_steps(DDPM(1000, variance=variance), LINEAR, "noise"))
    assert fine == pytest.approx((0.3, 0.25), rel=0.02)
    steps = own_steps(DDPM(100, variance=variance), LINEAR, "noise")
    torch.manual_seed(0)
    count = 10_000
    x = integrate(
        field,
        steps,
        torch.randn(count, dtype=torch.float64),
        lambda: torch.randn(count, dtype=torch.float64),
    )
    mean, spread = moments(steps)
    assert float(x.var()) == pytest.approx(spread, rel=4 * math.sqrt(2 / (count - 1)))
    assert float(x.mean()) == pytest.approx(mean, abs=4 * math.sqrt(spread / count))


def test_ddim_maps_noise_to_data_by_the_exact_gaussian_map():
    """The probability flow of Gaussian data is x_1 = mean + spread x_0 in the limit."""
    plan = own_steps(DDIM(500), COSINE, "v")
    x_0 = torch.linspace(-2, 2, 9, dtype=torch.float64)
    x = integrate(exact_denoiser(COSINE, "v", spread=0.5, mean=0.3), plan, x_0, no_noise)
    torch.testing.assert_close(x, 0.3 + 0.5 * x_0, rtol=0, atol=1e-2)


class Spy(nn.Module):
    """A network that records what it is asked and answers with its own channels."""

    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(2, 2, 1)
        self.calls = []

    def features(self, x, t, y=None):
        self.calls.append((t.clone(), y))
        return (
            torch.tanh(x) + t[:, None, None, None] + (0 if y is None else y[:, None, None, None])
        )

    def fold(self, output):
        return output


def model_of(net, path=FLOW, prediction="velocity", num_classes=None):
    return GenerativeModel(net, path, prediction, torch.optim.SGD, num_classes).eval()


@torch.no_grad()
def sample(model, solver, seed=5, indices=(0, 1, 2), shape=(2, 4, 4), labels=None):
    noise = SampleNoise(seed, indices, shape)
    field = Field(model, labels, len(indices), solver.guidance)
    image = integrate(field, own_steps(solver, model.path, model.prediction), noise(), noise)
    return image, field


@pytest.mark.parametrize("count", [10, 7])
def test_euler_shows_the_network_true_fractions(count):
    """T17: 0, 0.1, ..., 0.9 as floats, one per image."""
    net = Spy()
    _, field = sample(model_of(net), Euler(count))
    times = torch.stack([t for t, _ in net.calls])
    assert times.dtype == torch.float32
    assert torch.equal(times, (torch.arange(count) / count)[:, None].expand(count, 3))
    assert field.evaluations == count


@pytest.mark.parametrize(
    ("solver", "visited"),
    [
        (Heun(4), [0, 2, 2, 4, 4, 6, 6, 8]),
        (Midpoint(4), [0, 1, 2, 3, 4, 5, 6, 7]),
        (RK4(4), [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8]),
    ],
)
def test_higher_order_flow_solvers_visit_ends_and_middles(solver, visited):
    net = Spy()
    _, field = sample(model_of(net), solver)
    assert [8 * float(t[0]) for t, _ in net.calls] == visited
    assert field.evaluations == len(visited)


@pytest.mark.parametrize(
    "solver",
    [DDIM(50), DDPM(50), DDIM(125), DPMSolver1(50), DPMSolverPP2M(20), SDEEuler(50)]
    + [ProbabilityFlow(50)],
)
def test_diffusion_samplers_visit_the_schedules_own_indices(solver):
    """T17: index = T (1 - t) - 1: 999, 979, ..., 19 for 50 steps."""
    net = Spy()
    sample(model_of(net, LINEAR, "noise"), solver)
    times = torch.stack([t[0] for t, _ in net.calls]).double()
    indices = 1000 * (1 - times) - 1
    stride = 1000 // solver.num_steps
    expected = torch.arange(999, -1, -stride, dtype=torch.float64)
    torch.testing.assert_close(indices, expected, rtol=0, atol=1e-4)
    assert (indices.diff() < 0).all()
    node_times = [step.times[0] for step in own_steps(solver, LINEAR, "noise")]
    alpha = LINEAR.coefficients(torch.tensor(node_times, dtype=torch.float64)).alpha
    table = (0.5 * LINEAR.log_abar[1:]).exp()
    assert torch.equal(alpha, table[expected.long()]), "coefficients sit exactly on the table"


def test_guidance_of_one_is_no_guidance():
    labels = torch.tensor([0, 1, 2])
    model = model_of(Spy(), num_classes=3)
    plain, free = sample(model, Euler(5), labels=labels)
    guided, field = sample(model, Euler(5, guidance=1.0), labels=labels)
    assert torch.equal(plain, guided)
    assert free.evaluations == field.evaluations == 5
    assert all(torch.equal(y, labels) for _, y in model.net.calls)


def test_guidance_combines_the_two_predictions():
    """w g(x, y) + (1 - w) g(x, none), of a real network, at twice the price."""
    torch.manual_seed(0)
    net = UNet(1, 8, num_classes=3, channels=(8, 16), blocks=1)
    nn.init.normal_(net.classes.weight)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.2)
    model = model_of(net, num_classes=3)
    x, labels, t = torch.randn(2, 1, 8, 8), torch.tensor([1, 2]), torch.full((2,), 0.4)
    field = Field(model, labels, 2, guidance=2.5)
    with torch.no_grad():
        with_label, without = net(x, t, labels), net(x, t, None)
        assert (with_label - without).abs().max() > 0.1
        expected = 2.5 * with_label - 1.5 * without
        torch.testing.assert_close(field(x, 0.4), expected, rtol=1e-4, atol=1e-4)
    assert field.evaluations == 2


@pytest.mark.parametrize(
    ("solver", "path", "prediction"),
    [
        (Euler(6), FLOW, "velocity"),
        (RK4(6), FLOW, "velocity"),
        (DPMSolver2(6, grid="log_snr"), LINEAR, "noise"),
        (DPMSolverPP2M(6), COSINE, "v"),
        (SDEEuler(6), COSINE, "v"),
        (DDIM(6, eta=0.5), COSINE, "v"),
        (DDPM(6), LINEAR, "noise"),
    ],
)
def test_images_do_not_depend_on_how_samples_are_batched(solver, path, prediction):
    torch.manual_seed(0)
    model = model_of(Spy(), path, prediction)
    together, _ = sample(model, solver, indices=range(5))
    for split in ([range(5)], [range(2), range(2, 5)], [[i] for i in range(5)], [[4, 2], [0]]):
        for indices in split:
            part, _ = sample(model, solver, indices=list(indices))
            torch.testing.assert_close(part, together[list(indices)], rtol=1e-5, atol=1e-5)
    other, _ = sample(model, solver, seed=6, indices=range(5))
    assert (other - together).abs().max() > 0.1


def test_noise_of_a_sample_depends_on_seed_and_number_alone():
    whole = SampleNoise(3, range(6), (2, 3))
    first, second = whole(), whole()
    assert not torch.equal(first, second)
    for part in ([0, 1], [5], [4, 3]):
        noise = SampleNoise(3, part, (2, 3))
        assert torch.equal(noise(), first[part]) and torch.equal(noise(), second[part])
    rows = torch.cat([SampleNoise(seed, range(40), (4,))() for seed in range(5)])
    assert len(rows.unique(dim=0)) == 200


def test_noise_is_standard_normal_and_independent_between_samples():
    rows = SampleNoise(0, range(400), (500,))()
    assert abs(float(rows.mean())) < 4 / math.sqrt(rows.numel())
    assert float(rows.var()) == pytest.approx(1, abs=4 * math.sqrt(2 / rows.numel()))
    correlation = (rows[:-1] * rows[1:]).mean(1)
    assert correlation.abs().max() < 5 / math.sqrt(500)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: check_solver(Euler(5), COSINE, True), "solver=euler"),
        (lambda: check_solver(DDIM(5), FLOW, True), "euler, heun, midpoint or rk4$"),
        (lambda: check_solver(DPMSolverPP2M(5), FLOW, True), "solver=dpmpp_2m is for diffusion"),
        (lambda: check_solver(Euler(5, grid="cosine"), FLOW, True), "'cosine'; .* log_snr"),
        (lambda: check_solver(Euler(5, grid=None), FLOW, True), "solver.grid None"),
        (lambda: check_solver(DDIM(1001), LINEAR, True), "solver.num_steps=1001"),
        (lambda: check_solver(Euler(0), FLOW, True), "solver.num_steps"),
        (lambda: check_solver(Euler(5, guidance=2.0), FLOW, False), "solver.guidance=2.0"),
        (lambda: check_solver(Euler(5, guidance=-1.0), FLOW, True), "solver.guidance"),
        (lambda: check_solver(Euler(5, guidance=math.nan), FLOW, True), "solver.guidance"),
        (lambda: check_solver(Euler(5, guidance=True), FLOW, True), "solver.guidance"),
        (lambda: DDIM(5, eta=1.5), "solver.eta"),
        (lambda: DDIM(5, eta=True), "solver.eta"),
        (lambda: DDPM(5, variance="medium"), "'medium'"),
        (lambda: DPMSolver2(5, r1=0), "solver.r1 .* got 0"),
        (lambda: DPMSolver2(5, r1=1.0), "solver.r1"),
        (lambda: DPMSolver2(5, r1="half"), "'half'"),
    ],
)
def test_unusable_solvers_are_refused_in_one_line(make, named):
    with pytest.raises(UserError, match=named) as refused:
        make()
    assert "\n" not in str(refused.value)


def test_fitting_solvers_are_accepted():
    check_solver(Euler(5, guidance=3), FLOW, True)
    check_solver(Heun(1, grid="log_snr"), FLOW, False)
    check_solver(DDIM(1000, grid="quadratic"), LINEAR, False)


def refusal(solver, path):
    try:
        check_solver(solver, path, True)
    except UserError as error:
        return str(error)
    return None


def test_refusals_offer_solvers_that_there_are_by_the_names_of_their_files():
    files = sorted((ROOT / "configs" / "solver").glob("*.yaml"))
    files = [file for file in files if file.stem != "scheduler"]  # of a pipeline's folder
    solvers = {file.stem: instantiate(OmegaConf.load(file)) for file in files}
    assert all(solver.name == name for name, solver in solvers.items())
    for path in (FLOW, COSINE):
        told = {name: refusal(solver, path) for name, solver in solvers.items()}
        fitting = {name for name, text in told.items() if text is None}
        assert len(fitting) > 3
        for text in filter(None, told.values()):
            offered = set(re.findall(r"\w+", text.split("; use ")[1])) & set(solvers)
            assert offered and offered <= fitting


def test_stages_bound_the_evaluations_of_a_step():
    for solver in (Euler(4), Heun(4), Midpoint(4), RK4(4)):
        steps = solver.steps(FLOW, "velocity", uniform_times(4))
        assert {len(step.times) for step in steps} == {solver.stages}
    for solver in (DDIM(4), DDPM(4), DPMSolver1(4), DPMSolver2(4), DPMSolverPP2M(4)):
        steps = solver.steps(COSINE, "v", uniform_times(4))
        assert max(len(step.times) for step in steps) == solver.stages
