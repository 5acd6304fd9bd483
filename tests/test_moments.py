"""Moments with fresh weights, and every switch, against closed forms and slow loops (T5-T14)."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hand import (
    CPU,
    FLOW,
    LINEAR,
    SCALE,
    SOLVERS,
    SPREAD,
    Double,
    Hand,
    M,
    Noise,
    Timed,
    affine_flow,
    certain,
    curved,
    gaussian_ddim,
    model_of,
    only_bias,
    plain,
    posterior_of,
    real_start,
    small_unet,
    start_of,
)
from scipy.linalg import hadamard

from bayesdiff.checks import UserError
from bayesdiff.laplace.posterior import HeadPosterior
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
    Step,
)
from bayesdiff.solvers.flow import RungeKutta
from bayesdiff.solvers.integrate import combine
from bayesdiff.uncertainty import Published, Samples, Start, TotalVariance
from bayesdiff.uncertainty.recursion.covariance import (
    covariance_between,
    covariance_with_input,
    shifts,
    stein_covariance,
)
from bayesdiff.uncertainty.recursion.propagate import OutputMoments, propagate, without_negative
from bayesdiff.uncertainty.recursion.uncertain_head import UncertainHead

# Eight draws whose columns have mean 0 and do not correlate: estimates of a linear g are exact.
SIGNS = torch.from_numpy(hadamard(8)).double()
SIZE = len(SIGNS)


class Planned(Noise):
    """Draws with the sample moments of a normal distribution, 8 per purpose, for every pixel."""

    def __init__(self, purposes=1, unbiased=True, first=0.0, paired=False):
        super().__init__(1, (1, 1, 1), first=first)
        scale = math.sqrt(1 - 1 / SIZE) if unbiased else 1.0
        self.plan = (scale * SIGNS[:, 1 : 1 + purposes]).T.flatten().tolist()
        if paired:  # the estimator adds the other signs
            self.plan = [1.0]

    def fork(self, number):
        values = itertools.cycle(self.plan)
        return lambda: torch.full((1, 1, 1, 1), next(values), dtype=torch.float64)


class Even(HeadPosterior):
    """Draws of the bias with mean and unbiased variance of the posterior, apart from the noise."""

    @classmethod
    def like(cls, other):
        names = ("curvature", "structure", "sigma_noise", "prior_precision", "n_eff")
        return cls(*[getattr(other, name) for name in names])

    def draw(self, n, generator):
        draws = self.curvature.mean.expand(n, -1, -1).clone()
        spread = float(self.covariance[-1, -1]) ** 0.5
        draws[:, :, -1] += spread * math.sqrt(1 - 1 / n) * SIGNS[:, 7, None]
        return draws


def exactly(estimator, model, solver, times=None, first=0.0, purposes=1):
    """A run on one pixel with planned draws."""
    paired = estimator.covariance == "antithetic"
    unbiased = estimator.var_x or estimator.covariance == "centred"
    noise = Planned(purposes, unbiased, first, paired)
    if times is None:
        return Start(model, solver, None, noise, CPU)
    return Timed(model, solver, None, noise, CPU, times=tuple(times))


KINDS = ("uncentred", "centred", "antithetic", "stein")
LAW = [TotalVariance(SIZE, covariance=kind) for kind in KINDS[1:]]


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_weights_have_their_variances_on_an_affine_flow(kind):
    """T6 for Euler: (1 + z)^2 per step by the law of total variance, 1 + 2 z as published."""
    model, posterior = affine_flow()
    z, unit = M / 10, (SCALE * SPREAD / 10) ** 2
    published = Published(SIZE, covariance=kind)
    got = float(published(exactly(published, model, Euler(10)), posterior).variance)
    assert got == pytest.approx(unit * ((1 + 2 * z) ** 10 - 1) / (2 * z), rel=1e-9)
    assert got == pytest.approx(0.001184793, abs=5e-10)
    if kind == "uncentred":
        return
    total = TotalVariance(SIZE, covariance=kind)
    got = float(total(exactly(total, model, Euler(10)), posterior).variance)
    assert got == pytest.approx(unit * ((1 + z) ** 20 - 1) / ((1 + z) ** 2 - 1), rel=1e-9)
    assert got == pytest.approx(0.001250533, abs=5e-10)


def test_without_feedback_fresh_weights_average_out():
    """T6, m = 0: s^2 f^2 / N, where shared weights keep s^2 f^2."""
    model, posterior = affine_flow(slope=0.0)
    for kind, n in itertools.product((Published(SIZE), TotalVariance(SIZE)), (1, 4, 16)):
        got = float(kind(exactly(kind, model, Euler(n)), posterior).variance)
        assert got * n == pytest.approx((SCALE * SPREAD) ** 2, rel=1e-9)


def test_a_multiplicative_weight_needs_the_mean_of_gam2_over_the_draws():
    """T8 with fresh weights: E x_N^2 = ((1 + h m)^2 + h^2 s^2)^N x_0^2, exactly."""
    mean, spread, n = 0.3, 0.25, 10
    net = Hand(lambda x, t, y: x, [[mean]])
    covariance = torch.tensor([spread**2, 1e-16], dtype=torch.float64).diag()
    posterior, growth = posterior_of(net.head, covariance), 1 + mean / n
    second = (growth**2 + (spread / n) ** 2) ** n
    variances = []
    for gam2_at in ("draws", "realised"):
        law = TotalVariance(4, covariance="antithetic", gam2_at=gam2_at)
        start = exactly(law, model_of(net), Euler(n), first=1.0)
        variances.append(float(law(start, posterior).variance))
    assert variances[0] == pytest.approx(second - growth ** (2 * n), rel=1e-9)
    at_image = (spread / n) ** 2 * n * growth ** (2 * n - 2)
    assert variances[1] == pytest.approx(at_image, rel=1e-9) and variances[1] < variances[0]


@pytest.mark.parametrize(
    ("count", "spread", "every", "total", "fifth"),
    [
        (25, 0.5, 2.231e-5, 4.266e-5, 1.615e-2),
        (50, 0.05, 2.903e-7, 6.912e-7, 3.864e-3),
        (50, 0.5, 1.556e-5, 2.168e-5, 7.696e-3),
        (50, 1.0, 5.661e-5, 7.702e-5, 1.042e-2),
        (100, 0.5, 9.242e-6, 1.092e-5, 3.494e-3),
        (250, 0.5, 4.105e-6, 4.390e-6, 1.280e-3),
    ],
)
def test_ddim_on_gaussian_data_has_the_tabulated_moments(count, spread, every, total, fifth):
    """T9: both recursions fall as 1 / steps, and skipping inflates."""
    model, posterior, times = gaussian_ddim(count, spread)
    for estimator, expected in (
        (Published(SIZE), every),
        (TotalVariance(SIZE), total),
        (Published(SIZE, skip_interval=5), fifth),
    ):
        start = exactly(estimator, model, DDIM(count), times)
        assert float(estimator(start, posterior).variance) == pytest.approx(expected, rel=5e-4)


def response(step, kappa):
    """x' and what is kept, as coefficients of x, what was kept, and every evaluation's bias.

    For g(x, t) = kappa(t) x + bias, by pushing basis vectors through the step.
    """
    basis = torch.eye(2 + len(step.times), dtype=torch.float64)
    outputs = []
    for i, (t, row) in enumerate(zip(step.times, step.inputs, strict=True)):
        outputs.append(kappa(t) * combine(row, basis[0], outputs) + basis[2 + i])
    new = combine(step.output, basis[0], outputs) + sum(step.history) * basis[1]
    kept = combine(step.kept[0], basis[0], outputs) if step.kept else 0 * new
    return torch.stack([new, kept])


def total_variance(step, kappa, covariance, variance, shared, positive):
    """The exact 2 x 2 covariance of a linear Gaussian step."""
    found = response(step, kappa)
    state, bias = found[:, :2], found[:, 2:]
    bias = bias.sum(1, keepdim=True) if shared else bias
    return state @ covariance @ state.T + variance * bias @ bias.T


def published_variance(step, kappa, covariance, variance, shared, positive):
    """The same without Var_x(g), and with weights that act on the end of the step alone.

    Where the whole variance is negative all draws of x are its mean.
    """
    state = response(step, kappa)[:, :2]
    (kept,) = step.kept or [(0.0,) * len(step.output)]
    rows = [[step.output[0], sum(step.history)], [kept[0], 0]]
    linear = torch.tensor(rows, dtype=torch.float64)
    state = state if positive else linear
    slope = state - linear
    bias = torch.tensor([step.output[1:], kept[1:]], dtype=torch.float64)
    bias = bias.sum(1, keepdim=True) if shared else bias
    new = state @ covariance @ state.T - slope @ covariance @ slope.T
    new = new + variance * bias @ bias.T
    limit = float((new[0, 0].clamp(min=0) * new[1, 1].clamp(min=0)).sqrt())
    new[0, 1] = new[1, 0] = new[0, 1].clamp(-limit, limit)
    return new


ALL = [
    *[solver(6) for solver in (Euler, Heun, Midpoint, RK4)],
    *[solver(6) for solver in (DDIM, DPMSolver1, ProbabilityFlow, SDEEuler, DDPM, DPMSolverPP2M)],
    DDIM(6, eta=0.7),
    DDPM(6, variance="small"),
    DPMSolver2(6),
    DPMSolver2(6, grid="log_snr"),
    DPMSolverPP2M(12, grid="log_snr"),
]


def name_of(solver):
    return f"{solver.name}-{solver.grid}-{solver.num_steps}"


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("var_x", [True, False])
@pytest.mark.parametrize("solver", ALL, ids=name_of)
def test_every_solver_has_the_moments_of_a_linear_gaussian_recursion(solver, var_x, shared):
    """E1 and E2 on g = kappa(t) x + bias: epistemic, and the sampler's own noise apart."""
    if isinstance(solver, RungeKutta):
        model, posterior = affine_flow()
        variance = (SCALE * SPREAD) ** 2
    else:
        (model, posterior, _), variance = gaussian_ddim(6, 0.5), 1e-4
    posterior = Even.like(posterior)
    stages = max(len(step.times) for step in exactly(Published(), model, solver).steps())
    kind = "centred" if var_x else "uncentred"
    options = {"covariance": kind, "var_x": var_x, "shared": shared, "clamp": False}
    estimator = Published(SIZE, **options)
    purposes = 1 if shared else 1 + stages
    start = exactly(estimator, model, solver, first=0.3, purposes=purposes)
    got = estimator(start, posterior)
    field = Field(model, None, 1)

    def kappa(t):
        with torch.no_grad():
            return float(field(torch.ones(1, 1, 1, 1, dtype=torch.float64), t))

    law = total_variance if var_x else published_variance
    weights = noise = torch.zeros(2, 2, dtype=torch.float64)
    for step, summed in zip(start.steps(), got.summed[:, 0].tolist(), strict=True):
        positive = bool(weights[0, 0] + noise[0, 0] > 0)
        weights = law(step, kappa, weights, variance, shared, positive)
        noise = law(step, kappa, noise, 0.0, shared, positive)
        noise[0, 0] += step.noise**2
        assert summed == pytest.approx(float(weights[0, 0]), rel=1e-8)
    if noise.any():
        assert float(got.sampler_noise) == pytest.approx(float(noise[0, 0]), rel=1e-8)
    else:
        assert got.sampler_noise is None


def slowly(net, covariance, start, options):
    """E1 or E2 written out for one-evaluation steps and pixelwise networks, draw by draw."""
    o = {"covariance": "uncentred", "var_x": False, "clamp": False, "gam2_at": "realised"}
    o |= {"ddpm_fix": True, "skip_interval": 1, **options}
    size, kind, paired = o["mc_samples"], o["covariance"], o["covariance"] == "antithetic"

    def phi(x, t):  # at whole indices, as ``Hand`` reads times
        return net.formula(x, torch.tensor(round(1000 * t) / 1000, dtype=torch.float64), None)

    def g(x, t):
        return net.head(phi(x, t))

    def gam2(x, t):
        rows = torch.cat([phi(x, t), torch.ones_like(x)], 1)
        return torch.einsum("bphw,pq,bqhw->bhw", rows, covariance, rows)[:, None]

    def slope(x, t):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(g(x, t).sum(), x)[0]

    fresh = start.noise.fork(0)
    x = mean = start.noise()
    weights, noise = torch.zeros_like(x), torch.zeros_like(x)
    for n, step in enumerate(start.steps()):
        (a, b), t, v = step.output, step.times[0], weights + noise
        expected, with_x, var, head = g(x, t), 0 * x, 0 * x, 0 * x
        if n % o["skip_interval"] == 0:
            head = gam2(x, t)
            if v.any():
                z = [fresh() for _ in range(size // 2 if paired else size)]
                z = [*z, *[-zi for zi in z]] if paired else z
                shift = [v.clamp(min=0).sqrt() * zi for zi in z]
                values = [g(mean + s, t) for s in shift]
                expected = sum(values) / size
                if kind == "uncentred":
                    with_x = sum(s * k for s, k in zip(shift, values, strict=True)) / size
                elif kind == "stein":
                    [fresh() for _ in range(size)]
                    with_x = v.clamp(min=0) * sum(slope(mean + s, t) for s in shift) / size
                else:
                    middle = sum(shift) / size
                    with_x = sum(
                        (s - middle) * (k - expected) for s, k in zip(shift, values, strict=True)
                    ) / (size - (0 if paired else 1))
                if o["gam2_at"] == "draws":
                    head = sum(gam2(mean + s, t) for s in shift) / size
                if o["var_x"] and paired:
                    half = size // 2
                    both = list(zip(values[:half], values[half:], strict=True))
                    var = sum((k - q) ** 2 / 4 for k, q in both) / half
                    var = var + torch.stack([(k + q) / 2 for k, q in both]).var(0)
                elif o["var_x"]:
                    var = torch.stack(values).var(0)
        share = torch.where(v > 0, weights / v, 1)
        power = 2 if o["ddpm_fix"] else 1
        due = 2 * a * b * with_x + b**2 * var
        weights = a**power * weights + share * due + b**2 * head
        noise = a**power * noise + (1 - share) * due + step.noise**2
        if o["clamp"]:
            weights, noise = weights.clamp(min=0), noise.clamp(min=0)
        mean = a * mean + b * expected if o["ddpm_fix"] else mean
        x = a * x + b * g(x, t)
        x = x + step.noise * start.noise() if step.noise else x
    return weights.detach(), noise.detach(), x.detach()


SWITCHES = [
    {},
    {"skip_interval": 2},
    {"skip_interval": 3, "var_x": True},
    {"covariance": "centred"},
    {"covariance": "antithetic"},
    {"covariance": "stein"},
    {"var_x": True},
    {"clamp": True},
    {"gam2_at": "draws"},
    {"ddpm_fix": False},
    *[
        {"covariance": kind, "var_x": True, "clamp": True, "gam2_at": "draws"}
        for kind in ("centred", "antithetic", "stein")
    ],
]


def told(options):
    return "-".join(f"{k}={v}" for k, v in options.items()) or "published"


@pytest.mark.parametrize(
    ("options", "solver"),
    [(o, s) for o in SWITCHES for s in (Euler(5), DDPM(6)) if "ddpm_fix" not in o or s == DDPM(6)],
    ids=lambda value: value.name if hasattr(value, "name") else told(value),
)
def test_every_switch_is_what_the_recursion_written_out_says(options, solver):
    """A curved network, real draws, a posterior with all covariances; H1, H2, H4-H6, M2."""
    net, posterior, covariance = curved()
    path, prediction = (FLOW, "velocity") if isinstance(solver, RungeKutta) else (LINEAR, "noise")
    options = {"mc_samples": 8, **options}

    def start():
        return start_of(model_of(net, path, prediction), solver, shape=(1, 3, 2))

    weights, noise, x = slowly(net, covariance, start(), options)
    got = Published(**options)(start(), posterior)
    torch.testing.assert_close(got.images, x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.variance, weights, rtol=1e-8, atol=1e-13)
    if noise.any():
        torch.testing.assert_close(got.sampler_noise, noise, rtol=1e-8, atol=1e-13)
    if options.get("clamp"):
        assert (got.summed >= 0).all() and (got.variance >= 0).all()


def test_the_official_second_order_solver_draws_its_two_evaluations_apart():
    """2.7: V' = A^2 V - 2 A B Cov(x, eps_u) + B^2 gam2(u), Cov by draws of x and then of u."""
    net, posterior, covariance = curved()
    solver, size = DPMSolver2(4, grid="log_snr"), 6
    start = start_of(model_of(net, LINEAR, "noise"), solver, shape=(1, 3, 2))
    got = Published(size, shared=False)(start, posterior)
    start = start_of(model_of(net, LINEAR, "noise"), solver, shape=(1, 3, 2))

    def phi(x, t):
        return net.formula(x, torch.tensor(round(1000 * t) / 1000, dtype=torch.float64), None)

    def eps(x, t):
        with torch.no_grad():
            return net.head(phi(x, t))

    fresh = start.noise.fork(0)
    x = mean = start.noise()
    variance = torch.zeros_like(x)
    for step in start.steps()[:-1]:
        s, s1 = step.times
        at = LINEAR.coefficients(torch.tensor([s, s1, step.end], dtype=torch.float64))
        alpha, sigma = at.alpha.tolist(), at.sigma.tolist()
        h = math.log(alpha[2] / sigma[2]) - math.log(alpha[0] / sigma[0])
        a1, b1 = alpha[1] / alpha[0], sigma[1] * math.expm1(h / 2)
        a, b = alpha[2] / alpha[0], sigma[2] * math.expm1(h)
        u = a1 * x - b1 * eps(x, s)
        expected, with_x = eps(u, s1), 0 * x
        if variance.any():
            shift = [variance.clamp(min=0).sqrt() * fresh() for _ in range(size)]
            inner = []
            for d in shift:
                noise = dense([(1.0, phi(mean + d, s))], covariance).sqrt() * fresh()
                inner.append(a1 * (mean + d) - b1 * (eps(mean + d, s) + noise))
            [fresh() for _ in range(size)]
            values = [eps(point, s1) for point in inner]
            expected = sum(values) / size
            with_x = sum(d * value for d, value in zip(shift, values, strict=True)) / size
        gam2 = dense([(1.0, phi(u, s1))], covariance)
        variance = a**2 * variance - 2 * a * b * with_x + b**2 * gam2
        mean = a * mean - b * expected
        x = a * x - b * eps(u, s1)
    torch.testing.assert_close(got.summed[-2], variance.flatten(1).sum(1), rtol=1e-7, atol=1e-12)
    assert float(variance.std()) > 0


@pytest.mark.parametrize("name", SOLVERS)
def test_a_switch_changes_the_map_where_it_applies_and_never_the_image(name):
    """Bit for bit the same map where a switch has no meaning."""
    net, posterior = small_unet()

    def run(**options):
        return Published(mc_samples=4, **options)(real_start(net, name), posterior)

    plainly = run()
    stages = max(len(step.times) for step in real_start(net, name).steps())
    applies = {
        "shared": stages > 1,
        "cfg_joint": "guided" in name,
        "ddpm_fix": False,
        "var_x": True,
        "covariance": True,
        "gam2_at": True,
    }
    others = {"shared": False, "cfg_joint": False, "var_x": True, "covariance": "centred"}
    for switch, value in (others | {"gam2_at": "draws", "ddpm_fix": True}).items():
        switched = run(**{switch: value})
        assert torch.equal(switched.images, plainly.images)
        assert torch.equal(switched.variance, plainly.variance) != applies[switch], switch
        # The variance of later evaluations is not 0 at the first step.
        first_draws = 4 * stages * (switch == "var_x" and stages > 1)
        assert switched.nfe == plainly.nfe + first_draws


def test_clamping_is_the_only_difference_until_a_variance_is_negative():
    net, posterior, _ = curved()
    free, clamped = (
        Published(mc_samples=3, clamp=clamp)(start_of(model_of(net), Euler(8), 4), posterior)
        for clamp in (False, True)
    )
    step = int((free.summed < 0).any(1).nonzero()[0])
    assert step > 0 and torch.equal(free.summed[:step], clamped.summed[:step])
    torch.testing.assert_close(clamped.summed[step], free.summed[step].clamp(min=0))
    assert (clamped.variance >= 0).all() and (free.summed < 0).any()


def test_the_settings_are_told():
    assert Published().describe() == "published, S = 10, skip 1"
    changed = Published(covariance="stein", var_x=True, skip_interval=3, num_images=2)
    assert changed.describe() == "published, S = 10, skip 3, covariance stein, var_x true"
    assert TotalVariance(mc_samples=4).describe() == "total variance, S = 4, skip 1"


# Covariance estimators (T13, H6): g = kap (x - m) + gbar.
V, KAPPA, GBAR = 4e-4, 1.0, 1.0


def estimates(kind, count, gbar=GBAR, curvature=0.0, draws=40_000, seed=0):
    """Many independent estimates of Cov(x, g) = kap V."""
    generator = torch.Generator().manual_seed(seed)
    variance = torch.full((draws,), V, dtype=torch.float64)

    def fresh():
        return torch.randn(draws, dtype=torch.float64, generator=generator)

    shifted = shifts(kind, variance, count, fresh)
    return covariance_with_input(
        kind, shifted, (KAPPA * shifted + gbar + curvature * shifted**2)[None]
    )[0]


@pytest.mark.parametrize(
    ("kind", "spread", "named"),
    [
        ("uncentred", math.sqrt((2 * KAPPA**2 * V**2 + GBAR**2 * V) / 10), 15.8),
        ("centred", math.sqrt(2 * KAPPA**2 * V**2 / 9), 0.47),
        ("antithetic", math.sqrt(4 * KAPPA**2 * V**2 / 10), 0.63),
    ],
)
def test_covariance_estimators_are_unbiased_with_their_own_noise(kind, spread, named):
    """T13: the uncentred estimate of one pixel carries gbar, 33 times the centred noise."""
    got = estimates(kind, 10) / (KAPPA * V)
    relative = spread / (KAPPA * V)
    assert relative == pytest.approx(named, abs=0.05)
    assert float(got.std()) == pytest.approx(relative, rel=0.02)
    assert float(got.mean()) == pytest.approx(1, abs=4 * relative / 200)


def test_the_antithetic_error_does_not_see_the_even_part():
    first = estimates("antithetic", 6)
    torch.testing.assert_close(estimates("antithetic", 6, gbar=1e3), first, rtol=0, atol=1e-12)
    torch.testing.assert_close(estimates("antithetic", 6, curvature=7.0), first)
    assert not torch.allclose(estimates("centred", 6, curvature=7e3), estimates("centred", 6))


def test_stein_takes_the_diagonal_of_the_jacobian():
    """T13: J = diag(j) + the rest; the mean over random signs is V_p j_p."""
    generator = torch.Generator().manual_seed(0)
    jacobian = torch.randn(5, 5, dtype=torch.float64, generator=generator)
    variance = torch.rand(5, dtype=torch.float64, generator=generator)
    variance[4] = -1.0
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=5)), dtype=torch.float64)
    got = stein_covariance(variance, signs, (signs @ jacobian.T)[None])[0]
    torch.testing.assert_close(got, variance.clamp(min=0) * jacobian.diagonal())


@pytest.mark.parametrize("paired", [False, True])
def test_variances_over_draws_are_unbiased(paired):
    """Of a curved output; pairs have an odd and an even part."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(4, 200_000, dtype=torch.float64, generator=generator)
    z = torch.cat([z[:2], -z[:2]]) if paired else z
    outputs = torch.stack([z + z**2, z**3 - 1])
    got = covariance_between(outputs, outputs, paired)
    # Moments of a standard normal: 1, 3, 15 for the powers 2, 4, 6.
    expected = torch.tensor([[1 + 2.0, 3.0], [3.0, 15.0]], dtype=torch.float64)
    error = got.std(-1) / math.sqrt(200_000)
    assert ((got.mean(-1) - expected).abs() < 4 * error).all() and (error < 0.2).all()


def test_the_published_covariance_is_unbiased_and_noisy_in_a_run():
    """T13 through the estimator: the first Euler step makes V, the second adds 2 h Cov."""

    def formula(x, t, y):
        return torch.where(t > 0, x - 0.5, 0 * x)

    net = Hand(formula, [[1.0]], bias=1.0)
    posterior = only_bias(net.head, 4 * V)
    side = 256
    start = start_of(model_of(net), Euler(2), shape=(1, side, side), first=0.0)
    samples = Published(mc_samples=10)(start, posterior)
    torch.testing.assert_close(samples.images, torch.ones_like(samples.images))
    assert float(samples.summed[0]) == pytest.approx(V * side**2, rel=1e-6)
    relative = (samples.variance - 2 * V) / V
    assert float(relative.std()) == pytest.approx(15.8, rel=0.02)
    assert float(relative.mean()) == pytest.approx(1, abs=4 * 15.8 / side)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("kind", KINDS)
def test_certain_weights_leave_the_samplers_noise_and_nothing_else(kind, name):
    """T5: V = 0 exactly at every step; T14: no negative variance where it is clamped."""
    net, posterior = small_unet()
    image = plain(real_start(net, name))
    options = {"mc_samples": 4, "covariance": kind}
    for estimator in (Published(**options), TotalVariance(**options)):
        samples = estimator(real_start(net, name), certain(net.head))
        assert torch.equal(samples.images, image)
        assert not samples.variance.any() and not samples.summed.any()
        stochastic = "eta" in name or name == "ddpm"
        assert (samples.sampler_noise is not None) == stochastic
        if stochastic and estimator.clamp:
            assert samples.sampler_noise.min() >= 0 and samples.sampler_noise.mean() > 1e-3
    samples = TotalVariance(**options)(real_start(net, name), posterior)
    assert torch.equal(samples.images, image)
    assert samples.variance.min() >= 0 and samples.variance.mean() > 1e-6


def test_the_total_of_a_stochastic_sampler_grows_by_its_noise():
    """T5: V' = (a + b kap)^2 V + c^2 for a linear network whose weights are certain."""
    model, _, times = gaussian_ddim(50, 0.5)
    law = TotalVariance(SIZE)
    start = exactly(law, model, DDIM(50, eta=1.0), times)
    samples = law(start, certain(model.net.head))
    variance = 0.0
    for step in start.steps():
        a, b = step.output
        c = LINEAR.coefficients(torch.tensor(step.times[0], dtype=torch.float64))
        kappa = float(c.sigma / (c.alpha**2 * 0.25 + c.sigma**2))
        variance = (a + b * kappa) ** 2 * variance + step.noise**2
    assert float(samples.sampler_noise) == pytest.approx(variance, rel=1e-9)
    assert float(samples.variance) < 1e-50


def sigma_at(t):
    return float(LINEAR.coefficients(torch.tensor(t, dtype=torch.float64)).sigma)


def unit_gaussian():
    """The noise predictor of unit Gaussian data, kap = sigma."""
    net = Hand(lambda x, t, y: LINEAR.coefficients(t).sigma * x, [[1.0]])
    return model_of(net, LINEAR, "noise"), certain(net.head)


@pytest.mark.parametrize("law", ["total", "published", "official"])
def test_ancestral_sampling_of_unit_gaussian_data_keeps_its_variance(law):
    """T10 from V = 1: kept exactly; without Var_x and with the official factor it is not."""
    options = {"total": {"var_x": True}, "official": {"ddpm_fix": False}}.get(law, {})
    estimator = Published(SIZE, **options)
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    mean, zero = one, torch.zeros(1, *one.shape, dtype=torch.float64)
    for step in DDPM(50).steps(LINEAR, "noise", [k / 50 for k in range(50)]):
        a, b = step.output
        beta = 1 - 1 / a**2
        kappa = sigma_at(step.times[0])
        spread = kappa**2 * torch.ones_like(zero)[None] * estimator.var_x
        outputs = OutputMoments(kappa * b * mean[None], kappa * b * one[None], b**2 * spread, zero)
        covariance = torch.zeros(1, 1, 2, *one.shape, dtype=torch.float64)
        covariance[:, :, 1] = 1
        new_mean, new = estimator._advance(step, mean[None], covariance, outputs)
        expected = {
            "total": 1.0,
            "published": 1 - beta**2 / (1 - beta),
            "official": (1 - beta) ** -0.5 - 2 * beta / (1 - beta) + beta,
        }[law]
        assert float(new.sum()) == pytest.approx(expected, abs=1e-12)
        assert expected == 1 or expected < 1
        # The mean follows sqrt(al), unless it is frozen.
        shrunk = float(mean) if law == "official" else float(mean) / a
        assert float(new_mean) == pytest.approx(shrunk, rel=1e-12)


@pytest.mark.parametrize("law", ["total", "published", "official"])
def test_ancestral_sampling_from_one_point_approaches_that_variance(law):
    """T10 from V = 0: 1 - V falls by 1 - beta per step of the exact law."""
    options = {"total": {"var_x": True}, "official": {"ddpm_fix": False}}.get(law, {})
    kind = "centred" if law == "total" else "uncentred"
    estimator = Published(SIZE, covariance=kind, **options)
    model, posterior = unit_gaussian()
    times = [k / 50 for k in range(50)]
    start = exactly(estimator, model, DDPM(50), times, first=1.0)
    variance, left = 0.0, 1.0
    for step in start.steps():
        (a, b), beta = step.output, 1 - 1 / step.output[0] ** 2
        kappa = sigma_at(step.times[0])
        power = 1 if law == "official" else 2
        extra = (b * kappa) ** 2 if law == "total" else 0.0
        variance = (a**power + 2 * a * b * kappa + extra) * variance + step.noise**2
        left *= 1 - beta
    got = float(estimator(start, posterior).sampler_noise)
    assert got == pytest.approx(variance, rel=1e-9)
    if law == "total":
        assert got == pytest.approx(1 - left, rel=1e-9)


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


@pytest.mark.parametrize(
    ("estimator", "solver", "nfe"),
    [
        (Published(10, skip_interval=5), DDIM(50), 140),
        (TotalVariance(10, skip_interval=5), DDIM(50), 140),
        (Published(10, covariance="stein", skip_interval=5), DDIM(50), 50 + 9 * 20),
        (Published(4, gam2_at="draws", var_x=True), DDIM(10), 10 + 9 * 4),
        (Published(4, cfg_joint=False), DDIM(10, guidance=2.0), 2 * (10 + 9 * 4)),
        (Published(4, shared=False), DPMSolver2(5), 9 + 7 * 4),
        (TotalVariance(4), DPMSolver2(5), 9 + 9 * 4),
        (TotalVariance(4), DPMSolverPP2M(5), 5 + 4 * 4),
        (TotalVariance(4, skip_interval=2), DPMSolverPP2M(5), 5 + 2 * 4),
    ],
)
def test_network_evaluations_are_counted(estimator, solver, nfe):
    """T14: draws only where V > 0, or where earlier evaluations of a step have uncertain weights.

    A derivative counts as an evaluation.
    """
    net, posterior, _ = curved()
    model = model_of(net, LINEAR, "v", num_classes=3)
    start = start_of(model, solver, 2, (1, 2, 2), labels=torch.tensor([0, 1]))
    assert estimator(start, posterior).nfe == nfe
    calls = nfe - (90 if estimator.covariance == "stein" else 0)
    assert sum(size for size, _ in net.calls) == 2 * calls


@pytest.mark.parametrize(("weight", "excess"), [(1.0, 1.0), (3.0, 13.0), (7.5, 98.5)])
@pytest.mark.parametrize("estimator", [Published, TotalVariance])
def test_adding_the_variances_of_guidance_inflates_them(weight, excess, estimator):
    """H7: w^2 + (1 - w)^2 where labels do not matter, 13 at w = 3 and 98.5 at w = 7.5."""
    net, posterior, _ = curved()
    body = net.formula
    net.formula = lambda x, t, y: body(x, t, None)
    solver = Euler(1, guidance=weight)

    def run(cfg_joint):
        labels = torch.tensor([0, 2])
        start = start_of(model_of(net, num_classes=3), solver, 2, (1, 3, 3), labels=labels)
        return estimator(cfg_joint=cfg_joint)(start, posterior).variance

    torch.testing.assert_close(run(False), excess * run(True), rtol=1e-9, atol=0)


def dense(parts, covariance):
    """Var(sum_i c_i g_i) from features and coefficients, with its trailing ones."""
    phi = sum(c * torch.cat([f, torch.ones_like(f[:, :1])], 1) for c, f in parts)
    return torch.einsum("bphw,pq,bqhw->bhw", phi, covariance, phi)[:, None]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("joint", [True, False])
def test_outputs_of_a_step_covary_through_the_weights_they_share(joint, shared):
    """Two effective outputs of two guided evaluations, against dense products."""
    net, posterior, covariance = curved()
    model = model_of(net, num_classes=3)
    w, labels = 3.0, torch.tensor([0, 2])
    head = UncertainHead(Field(model, labels, 2, w), posterior, joint, shared)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 2, 1, 3, 3, generator=generator, dtype=torch.float64)
    features = [head.features(x[i], 0.1 + i) for i in range(2)]
    rows = torch.tensor([[0.4, -0.7], [1.5, 0.2]], dtype=torch.float64)
    got = head.covariance(features, rows)
    times = [torch.tensor([[[[0.1 + i]]]], dtype=torch.float64) for i in range(2)]
    guided = [net.formula(x[i], t, labels) for i, t in enumerate(times)]
    free = [net.formula(x[i], t, None) for i, t in enumerate(times)]

    def variance(row):
        """Groups of terms that meet the same weights add up inside, the groups outside."""
        terms = [(r, i, kind) for i, r in enumerate(row) for kind in (guided, free)]
        groups = {}
        for r, i, kind in terms:
            key = (None if shared else i, None if joint else kind is guided)
            scale = w if kind is guided else 1 - w
            groups.setdefault(key, []).append((r * scale, kind[i]))
        return sum(dense(parts, covariance) for parts in groups.values())

    for i, j in itertools.product(range(2), repeat=2):
        expected = variance((rows[i] + rows[j]).tolist()) - variance((rows[i] - rows[j]).tolist())
        torch.testing.assert_close(got[i, j], expected / 4, rtol=1e-8, atol=1e-14)


def test_correlations_stay_within_one_and_follow_a_clamped_variance():
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    step = Step((0.0,), ((1.0,),), (1.0, 1.0), 0.0, 1.0, kept=((0.1, 1.0),))
    zero = torch.zeros(2, 2, *one.shape, dtype=torch.float64)
    # Cov(x, g) far beyond what V and Var(g) allow.
    outputs = OutputMoments(zero[0], torch.stack([-2 * one, 3 * one]), zero, zero)
    _, new = propagate(step, one[None], one[None, None, None], outputs)
    first, off, second = (float(new[i, j].sum()) for i, j in ((0, 0), (0, 1), (1, 1)))
    assert (first, second) == pytest.approx((-3.0, 0.61)) and off == 0
    clamped = without_negative(new)
    assert float(clamped[0, 0].sum()) == 0 and float(clamped[0, 1].abs().sum()) == 0
    outputs = replace(outputs, with_x=torch.stack([0.4 * one, 9 * one]))
    _, new = propagate(step, one[None], one[None, None, None], outputs)
    limit = float((new[0, 0] * new[1, 1]).sqrt().sum())
    assert float(new[0, 1].sum()) == pytest.approx(limit) and limit < 9


def test_where_a_pixel_has_no_variance_its_neighbours_share_out_what_they_cause():
    """Var_x(g) of such a pixel is theirs, in the image's ratio of the two parts: here 2 to 6."""
    shape = (1, 1, 1, 3)
    step = Step((0.0,), ((1.0,),), (1.0, 1.0), 0.0, 1.0)
    parts = torch.tensor([[1.0, 0.0, 1.0], [4.0, 0.0, 2.0]], dtype=torch.float64)
    zero = torch.zeros(1, *shape, dtype=torch.float64)
    outputs = OutputMoments(zero, zero, torch.full_like(zero[None], 8.0), zero[None])
    covariance = parts.view(1, 1, 2, *shape)
    _, new = propagate(step, zero, covariance, outputs)
    torch.testing.assert_close(
        (new - covariance).view(2, 3),
        torch.tensor([[8 / 5, 2.0, 8 / 3], [32 / 5, 6.0, 16 / 3]], dtype=torch.float64),
    )


def test_the_mean_of_what_a_multistep_method_keeps_is_carried():
    """Without variance of x the mean path is the image itself, and V grows from gam2 alone."""
    net, posterior, _ = curved()
    model = model_of(net, LINEAR, "v")
    start = start_of(model, DPMSolverPP2M(6), shape=(1, 2, 2))
    seen = []
    original = Published._advance

    def watch(self, *arguments):
        found = original(self, *arguments)
        seen.append(found[0])
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Published, "_advance", watch)
        Published(skip_interval=6)(start, posterior)
    assert [len(mean) for mean in seen] == [2] * 5 + [1]
    image = plain(start_of(model, DPMSolverPP2M(6), shape=(1, 2, 2)))
    torch.testing.assert_close(seen[-1][0], image, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["euler", "heun", "ddpm", "dpm2", "dpmpp_2m"])
@pytest.mark.parametrize(
    "estimator",
    [
        TotalVariance(4),
        Published(4, covariance="stein"),
        Published(4, covariance="antithetic", shared=False),
    ],
)
def test_maps_do_not_depend_on_how_images_are_batched(estimator, name):
    """All images meet the same weight draws, and bring their own noise."""
    extra = {"dpm2": DPMSolver2(4), "dpmpp_2m": DPMSolverPP2M(4)}
    solver, path, prediction = SOLVERS.get(name) or (extra[name], LINEAR, "v")
    net, posterior, _ = curved()
    model = model_of(net, path, prediction)

    def run(indices):
        noise = Double(SampleNoise(0, indices, (1, 3, 3)))
        return estimator(Start(model, solver, None, noise, CPU), posterior)

    whole = run(range(5))
    joined = Samples.join([run(part) for part in ([0, 1], [2], [3, 4])])
    for name in ("images", "variance", "summed", "sampler_noise"):
        if getattr(whole, name) is not None:
            torch.testing.assert_close(
                getattr(joined, name), getattr(whole, name), rtol=1e-9, atol=1e-14
            )


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Published(0), "uncertainty.mc_samples must be a whole number >= 1"),
        (
            lambda: TotalVariance(1),
            ">= 2 for covariance=centred and var_x=true, got 1",
        ),
        (lambda: Published(1, covariance="centred"), ">= 2 for covariance=centred"),
        (lambda: Published(5, covariance="antithetic"), "even number >= 2.*got 5"),
        (lambda: TotalVariance(2, covariance="antithetic"), "even number >= 4.*got 2"),
        (lambda: Published(covariance="best"), "unknown uncertainty.covariance 'best'; choose"),
        (lambda: Published(covariance=3), "unknown uncertainty.covariance 3; choose from"),
        (lambda: Published(gam2_at="mean"), "uncertainty.gam2_at 'mean'; .* realised, draws"),
        (lambda: Published(var_x="yes"), "uncertainty.var_x must be true or false, got 'yes'"),
        (lambda: Published(clamp=1), "uncertainty.clamp must be true or false, got 1"),
        (lambda: Published(num_images=0), "uncertainty.num_images"),
        (lambda: Published(seed=-1), "uncertainty.seed"),
        (lambda: Published(ddpm_fix=False).check(DDIM(5)), "ddpm_fix=false.*solver=ddim"),
        (lambda: TotalVariance(skip_interval=6).check(DDIM(5)), "skip_interval=6"),
        (
            lambda: Published(ddpm_fix=False)(real_start(small_unet()[0], "ddpm"), None),
            "needs a noise predictor, got model.prediction=v",
        ),
    ],
)
def test_unusable_settings_are_refused_in_one_line(make, named):
    with pytest.raises(UserError, match=named) as refused:
        make()
    assert "\n" not in str(refused.value)


def test_the_fewest_draws_are_accepted():
    Published(1), Published(1, covariance="stein"), Published(2, covariance="antithetic")
    (
        TotalVariance(2),
        TotalVariance(2, covariance="stein"),
        Published(ddpm_fix=False).check(DDPM(4)),
    )


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


def test_a_run_with_real_draws_scatters_around_the_fresh_weight_variance():
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
