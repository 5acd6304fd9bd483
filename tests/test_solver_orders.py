"""Identities between solvers, orders of convergence, and the grids of times (T9-T11)."""

import itertools
import math

import pytest
import torch
from test_solvers import COSINE, FLOW, LINEAR, as_tuples, exact_denoiser, no_noise, own_steps

from bayesdiff.checks import UserError
from bayesdiff.paths import (
    PREDICTIONS,
    GeometricAccuracy,
    QuadraticAccuracy,
    VariancePreserving,
    convert,
)
from bayesdiff.solvers import (
    DDIM,
    DDPM,
    DPMSolver1,
    DPMSolver2,
    DPMSolverPP2M,
    ProbabilityFlow,
    SDEEuler,
    integrate,
    time_grid,
)
from bayesdiff.solvers.integrate import advance, evaluate
from bayesdiff.solvers.snr import log_snr, time_at

DIFFUSION = [DDIM, DDPM, DPMSolver1, DPMSolver2, DPMSolverPP2M, SDEEuler, ProbabilityFlow]
GRIDS = ("uniform", "quadratic", "log_snr")
PATHS = pytest.mark.parametrize("path", [LINEAR, COSINE], ids=["linear", "cosine"])
UNEVEN = [0.0, 0.13, 0.2, 0.47, 0.55, 0.8, 0.93]


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def schedule(path, times):
    """alpha, sigma and lambda at the times, as lists."""
    c = path.coefficients(double(times))
    return c.alpha.tolist(), c.sigma.tolist(), (c.alpha / c.sigma).log().tolist()


def bent(x, t):
    """A predictor that is linear in nothing."""
    return torch.tanh(1.3 * x - 0.4) + 0.5 * math.cos(3 * t) * x


def states(solver, path, prediction, times, field, x):
    found = []
    plan = solver.steps(path, prediction, times)
    integrate(field, plan, x, no_noise, lambda step, x: found.append(x))
    return torch.stack(found)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@PATHS
def test_dpm_1_is_ddim_without_noise(path, prediction):
    """T11, coefficient by coefficient, to clean data as well."""
    for times in (time_grid("uniform", path, 20), [*UNEVEN, 1.0], UNEVEN):
        left = as_tuples(DPMSolver1(20).steps(path, prediction, times))
        right = as_tuples(DDIM(20).steps(path, prediction, times))
        torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-8)


@PATHS
def test_dpm_1_has_its_papers_coefficients(path):
    """a = alpha_t / alpha_s, b = -sigma_t (e^h - 1), h the step in half log-SNR."""
    alpha, sigma, lam = (double(v) for v in schedule(path, UNEVEN))
    a, b = alpha[1:] / alpha[:-1], -sigma[1:] * torch.expm1(lam.diff())
    expected = torch.stack([a, b, torch.zeros_like(a)], 1)
    torch.testing.assert_close(as_tuples(DPMSolver1(6).steps(path, "noise", UNEVEN)), expected)


@pytest.mark.parametrize("r1", [0.5, 0.3, 0.8])
@PATHS
def test_dpm_2_is_its_papers_algorithm(path, r1):
    """Stage by stage, with a network that is linear in nothing."""
    plan = DPMSolver2(6, r1=r1).steps(path, "noise", UNEVEN)
    alpha, sigma, lam = schedule(path, UNEVEN)
    x = double([-1.2, 0.1, 2.0])
    got = integrate(bent, plan, x, no_noise)
    for i, step in enumerate(plan):
        h = lam[i + 1] - lam[i]
        (alpha_1,), (sigma_1,), (lam_1,) = schedule(path, step.times[1:])
        assert lam_1 == pytest.approx(lam[i] + r1 * h, abs=1e-5)
        eps = bent(x, UNEVEN[i])
        u = alpha_1 / alpha[i] * x - sigma_1 * math.expm1(lam_1 - lam[i]) * eps
        change = bent(u, step.times[1]) - eps
        x = alpha[i + 1] / alpha[i] * x
        x = x - sigma[i + 1] * math.expm1(h) * (eps + change / (2 * r1))
    torch.testing.assert_close(got, x, rtol=1e-9, atol=1e-9)
    assert plan[0].output[1] == pytest.approx(0, abs=1e-9) or r1 != 0.5


@PATHS
def test_two_step_dpm_is_its_papers_algorithm(path):
    """The data prediction of the step before enters with the ratio of the two lengths."""
    got = states(DPMSolverPP2M(6), path, "data", UNEVEN, bent, double([-1.2, 0.1, 2.0]))
    alpha, sigma, lam = schedule(path, UNEVEN)
    x, before = double([-1.2, 0.1, 2.0]), None
    for i in range(6):
        h, data = lam[i + 1] - lam[i], bent(x, UNEVEN[i])
        used = data
        if before is not None:
            r0 = (lam[i] - lam[i - 1]) / h
            used = (1 + 1 / (2 * r0)) * data - before / (2 * r0)
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * math.expm1(-h) * used
        torch.testing.assert_close(got[i], x, rtol=1e-9, atol=1e-9)
        before = data


@pytest.mark.parametrize("r1", [0.5, 0.3])
@PATHS
def test_dpm_2_of_a_constant_noise_prediction_is_dpm_1(path, r1):
    """T11."""
    times, x = time_grid("uniform", path, 20), double([-1.0, 0.4])

    def constant(x, t):
        return torch.full_like(x, 0.7)

    two = states(DPMSolver2(20, r1=r1), path, "noise", times, constant, x)
    one = states(DPMSolver1(20), path, "noise", times, constant, x)
    torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-9)


@PATHS
def test_two_step_dpm_of_a_constant_data_prediction_is_exact(path):
    """T11: any number of steps of any lengths is x_s = sigma_s x / sigma_t + one exact step."""
    generator = torch.Generator().manual_seed(0)
    inner = torch.rand(9, dtype=torch.float64, generator=generator).sort().values * 0.95
    x, data = double([-1.0, 0.4]), double([0.3, -0.8])
    for times in ([0.0, *inner.tolist()], [0.0, *inner.tolist(), 1.0]):
        found = states(DPMSolverPP2M(9), path, "data", times, lambda x, t: data, x)
        c = path.coefficients(double(times))
        for i, got in enumerate(found, 1):
            ratio = c.sigma[i] / c.sigma[0]
            exact = ratio * x + (c.alpha[i] - ratio * c.alpha[0]) * data
            torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[-1], data, rtol=0, atol=1e-9)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@PATHS
def test_ddim_with_eta_one_is_ancestral_sampling_with_small_variance(path, prediction):
    """T11, also on times between the schedule's own."""
    grids = (time_grid("uniform", path, 20), time_grid("uniform", path, 33))
    for times in (*grids, [0.0, 0.35, 0.61, 0.97]):
        left = as_tuples(DDIM(20, eta=1.0).steps(path, prediction, times))
        right = as_tuples(DDPM(20, variance="small").steps(path, prediction, times))
        torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("solver", DIFFUSION, ids=lambda solver: solver.name)
def test_the_last_step_takes_the_data_prediction_and_nothing_runs_beyond(solver, prediction, grid):
    """No evaluation after the last time the network knows, no number that is not finite."""
    for path, count in itertools.product((LINEAR, COSINE), (1, 2, 30)):
        plan = own_steps(solver(count, grid=grid), path, prediction)
        last = plan[-1]
        assert max(max(step.times) for step in plan) <= path.last_time
        assert (last.end, last.noise, last.history, len(last.times)) == (1.0, 0.0, (), 1)
        c = path.coefficients(double(last.times[0]))
        expected = [float(v) for v in convert(prediction, "data", c)]
        assert list(last.output) == pytest.approx(expected, rel=1e-9, abs=1e-9)
        for step in plan:
            assert all(map(math.isfinite, step.coefficients()))
        evaluations = 2 * count - 1 if solver is DPMSolver2 else count
        assert sum(len(step.times) for step in plan) == evaluations


def test_equations_take_the_schedules_own_beta_over_one_index():
    """a = 1 + beta / 2 and b = -beta / sigma with noise sqrt(beta), or half of b and none."""
    beta = torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64).flip(0)[:-1]
    sigma = LINEAR.coefficients(1 - torch.arange(1000, 1, -1).double() / 1000).sigma
    stochastic = as_tuples(own_steps(SDEEuler(1000), LINEAR, "noise")[:-1])
    expected = torch.stack([1 + beta / 2, -beta / sigma, beta.sqrt()], 1)
    torch.testing.assert_close(stochastic, expected, rtol=1e-8, atol=1e-8)
    flow = as_tuples(own_steps(ProbabilityFlow(1000), LINEAR, "noise")[:-1])
    expected = torch.stack([1 + beta / 2, -beta / (2 * sigma), 0 * beta], 1)
    torch.testing.assert_close(flow, expected, rtol=1e-8, atol=1e-8)


@PATHS
def test_equations_have_the_coefficients_of_their_continuous_form(path):
    """In short steps beta D is -2 d ln alpha, the path's own derivative."""
    short = 1e-5
    for t in (0.0503, 0.3007, 0.9004):
        c = path.coefficients(double(t))
        change = float(2 * c.d_alpha / c.alpha) * short
        for solver, share in ((SDEEuler, 1), (ProbabilityFlow, 0.5)):
            (step,) = solver(1).steps(path, "noise", [t, t + short])
            a, b = step.output
            assert a - 1 == pytest.approx(change / 2, rel=1e-3)
            assert b == pytest.approx(-share * change / float(c.sigma), rel=1e-3)
            assert step.noise**2 == pytest.approx(change if share == 1 else 0, rel=1e-3)


def test_unit_gaussian_data_is_nearly_stationary_under_euler_steps():
    """T10 in one step: variance 1 + beta^2 / 4 with noise, and exactly 1 without."""
    for solver in (SDEEuler, ProbabilityFlow):
        for step in own_steps(solver(100), LINEAR, "noise")[:-1]:
            a, b = step.output
            kappa = float(LINEAR.coefficients(double(step.times[0])).sigma)
            excess = step.noise**4 / 4
            assert (a + b * kappa) ** 2 + step.noise**2 == pytest.approx(1 + excess, abs=1e-12)


# lambda from -3 to 2: nearly all of the way from noise to data, but away from both ends, where
# the first or last step outweighs the rest and no order shows. Equal steps of lambda make the
# error one power series in the step, on every schedule.
def middle_times(count, path=LINEAR):
    return time_at(path, torch.linspace(-3, 2, count + 1, dtype=torch.float64)).tolist()


def marginals(times, spread=0.5, mean=0.3):
    """Mean and variance of x at the times for data N(mean, spread^2)."""
    c = LINEAR.coefficients(double(times))
    return c.alpha * mean, c.alpha**2 * spread**2 + c.sigma**2


@pytest.mark.parametrize(
    ("solver", "options", "order"),
    [
        (DDIM, {}, 1),
        (DPMSolver1, {}, 1),
        (ProbabilityFlow, {}, 1),
        (DPMSolver2, {}, 2),
        (DPMSolver2, {"r1": 0.3}, 2),
        (DPMSolverPP2M, {}, 2),
    ],
)
def test_deterministic_solvers_converge_with_their_order(solver, options, order):
    """To the exact flow of Gaussian data, which keeps (x - mean_t) / spread_t."""
    field = exact_denoiser(LINEAR, "noise", spread=0.5, mean=0.3)
    x, errors = double(1.7), []
    for count in (80, 160, 320):
        times = middle_times(count)
        mean, variance = marginals(times)
        truth = mean[-1] + (variance[-1] / variance[0]).sqrt() * (x - mean[0])
        plan = solver(count, **options).steps(LINEAR, "noise", times)
        errors.append(abs(float(integrate(field, plan, x, no_noise) - truth)))
    assert errors[0] < (0.03 if order == 1 else 3e-4)
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.06)


@pytest.mark.parametrize(
    ("solver", "options", "exact_mean"),
    [
        (SDEEuler, {}, False),
        (DDPM, {}, True),
        (DDIM, {"eta": 1.0}, True),
        (DDIM, {"eta": 0.5}, True),
    ],
)
def test_stochastic_solvers_converge_weakly_with_order_one(solver, options, exact_mean):
    """Mean and variance carried exactly: factor a + b kap, and c^2 on top, no random number.

    Data and noise predictions of Gaussian data are exact at the mean, so ancestral steps keep it.
    """
    field = exact_denoiser(LINEAR, "noise", spread=0.5, mean=0.3)
    errors = []
    for count in (160, 320, 640):
        times = middle_times(count)
        means, variances = marginals(times)
        mean, variance = means[0], variances[0]
        for step in solver(count, **options).steps(LINEAR, "noise", times):
            (a, b), t = step.output, step.times[0]
            factor = a + b * (field(double(1.0), t) - field(double(0.0), t))
            mean = a * mean + b * field(mean, t)
            variance = factor**2 * variance + step.noise**2
        errors.append([abs(float(mean - means[-1])), abs(float(variance - variances[-1]))])
    assert (errors[0][0] < 1e-12) == exact_mean
    for kind in range(exact_mean, 2):
        assert 1e-7 < errors[0][kind] < 0.03
        for coarse, fine in itertools.pairwise(errors):
            assert math.log2(coarse[kind] / fine[kind]) == pytest.approx(1, abs=0.06)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("solver", DIFFUSION, ids=lambda solver: solver.name)
def test_whole_trajectories_end_in_the_data(solver, grid):
    """From pure noise to clean data N(0.3, 0.5^2), on the grid the user would get."""
    field = exact_denoiser(LINEAR, "v", spread=0.5, mean=0.3)
    x = double([0.0, 1.0])
    variance, memory = 0.0, ()
    plan = own_steps(solver(1000 if grid == "uniform" else 400, grid=grid), LINEAR, "v")
    for step in plan:
        before = x[1] - x[0]
        x, memory = advance(step, x, evaluate(field, step, x), memory, 1)
        variance = variance * float((x[1] - x[0]) / before) ** 2 + step.noise**2
    assert float(x[0]) == pytest.approx(0.3, abs=0.01)
    assert float((x[1] - x[0]) ** 2) + variance == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("path", [LINEAR, COSINE, FLOW], ids=["linear", "cosine", "flow"])
def test_the_time_of_a_log_snr_is_found_on_every_path(path):
    t = torch.linspace(0.001, 0.999, 97, dtype=torch.float64)
    torch.testing.assert_close(time_at(path, log_snr(path, t)), t, rtol=0, atol=1e-8)
    far = time_at(path, double([-100.0, 100.0]))
    torch.testing.assert_close(far, double([0.0, path.last_time]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("path", [LINEAR, COSINE, FLOW], ids=["linear", "cosine", "flow"])
def test_grids_rise_from_zero_to_one(path, name):
    """And visit distinct indices of a discrete schedule, down to every one of them."""
    for count in (1, 2, 3, 10, 31, 32, 100, 500, 999, 1000):
        times = time_grid(name, path, count)
        assert (len(times), times[0], times[-1]) == (count + 1, 0.0, 1.0)
        assert all(a < b for a, b in itertools.pairwise(times))
        if path is FLOW:
            continue
        assert count == 1 or times[-2] <= path.last_time + 1e-12
        if name != "uniform":
            indices = 1000 * (1 - double(times))
            torch.testing.assert_close(indices, indices.round(), rtol=0, atol=1e-9)
            assert (indices.round().diff() <= -1).all()


def test_uniform_times_are_fractions():
    assert time_grid("uniform", FLOW, 4) == [0, 0.25, 0.5, 0.75, 1]
    assert time_grid("uniform", LINEAR, 7) == [k / 7 for k in range(8)]


@pytest.mark.parametrize("path", [LINEAR, FLOW], ids=["diffusion", "flow"])
def test_quadratic_times_have_squares_as_distance_from_data(path):
    root = (1 - double(time_grid("quadratic", path, 25))).sqrt()
    expected = torch.linspace(1, 0, 26, dtype=torch.float64)
    # A node is off by half an index at most, 0.0005 of the whole way.
    atol = 1e-12 if path is FLOW else 0.000501
    torch.testing.assert_close(root**2, expected**2, rtol=0, atol=atol)


@pytest.mark.parametrize("count", [5, 12, 40])
def test_log_snr_times_of_a_flow_are_even_inside(count):
    """lambda is ln(t / (1 - t)); the outermost steps are those of the uniform grid."""
    times = double(time_grid("log_snr", FLOW, count))
    assert times[1] == pytest.approx(1 / count) and times[-2] == pytest.approx(1 - 1 / count)
    lam = torch.logit(times[1:-1])
    even = torch.full((count - 2,), 2 * math.log(count - 1) / (count - 2), dtype=torch.float64)
    torch.testing.assert_close(lam.diff(), even, rtol=0, atol=1e-9)


@pytest.mark.parametrize("path", [QuadraticAccuracy(9.0), GeometricAccuracy(0.01)])
@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_log_snr_times_of_beliefs_are_even_up_to_the_last_one(path, count):
    """At t = 1 the accuracy is finite; ln(alpha / sigma) is half its logarithm."""
    times = double(time_grid("log_snr", path, count))
    assert (len(times), times[0], times[-1]) == (count + 1, 0.0, 1.0)
    assert times[1] == pytest.approx(1 / count)
    lam = path.accuracy(times[1:]).log() / 2
    even = torch.full((count - 1,), float(lam[-1] - lam[0]) / max(count - 1, 1)).double()
    torch.testing.assert_close(lam.diff(), even, rtol=1e-6, atol=1e-9)


def test_log_snr_times_of_a_schedule_are_its_indices_nearest_to_even_ones():
    """Ten steps on the linear schedule, of which none is shorter than an index."""
    table = LINEAR.log_abar[1:]
    lam = 0.5 * (table - torch.log(-torch.expm1(table)))
    targets = torch.linspace(float(lam[-1]), float(lam[0]), 10, dtype=torch.float64)
    got = [round(1000 * (1 - t)) - 1 for t in time_grid("log_snr", LINEAR, 10)[:-1]]
    assert got[0] == 999 and got[-1] == 0
    for index, target in zip(got[1:-1], targets[1:-1], strict=True):
        around = lam[index - 1 : index + 2]
        # Nearest in the index, which is not quite nearest in lambda.
        assert abs(lam[index] - target) <= 0.6 * (around[:-1] - around[1:]).max()


def test_grids_that_ask_for_more_than_the_schedule_has_give_all_it_has():
    path = VariancePreserving("cosine", timesteps=12)
    for name in GRIDS:
        assert time_grid(name, path, 12) == pytest.approx([k / 12 for k in range(13)])
        with pytest.raises(UserError, match=r"solver.num_steps=13 is more than the 12 steps"):
            time_grid(name, path, 13)
    crowded = [round(1000 * (1 - t)) for t in time_grid("quadratic", LINEAR, 100)]
    assert crowded[-8:] == [7, 6, 5, 4, 3, 2, 1, 0] and crowded[50] == 250
    crowded = [round(1000 * (1 - t)) for t in time_grid("log_snr", COSINE, 20)]
    assert crowded[:5] == [1000, 999, 998, 997, 996]  # lambda jumps by 3.5 over the first


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("path", [COSINE, FLOW], ids=["cosine", "flow"])
def test_a_skip_interval_leaves_every_kth_time_and_both_ends(path, name):
    whole = time_grid(name, path, 10)
    assert time_grid(name, path, 10, 3) == [*whole[:10:3], 1.0]
    assert time_grid(name, path, 10, 10) == [0, 1]
    assert time_grid(name, path, 10, 5) == [whole[0], whole[5], 1.0]


@pytest.mark.parametrize("name", ["log-snr", "", None, 3, ["uniform"]])
def test_unknown_grids_are_refused_in_one_line(name):
    with pytest.raises(UserError, match="unknown solver.grid .* uniform, quadratic, log_snr,"):
        time_grid(name, FLOW, 5)
