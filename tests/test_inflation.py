"""Inflationary flows against closed forms and the equation of the paper in its own coordinates."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bayesdiff import pipeline
from bayesdiff.checks import UserError
from bayesdiff.cli import explain
from bayesdiff.data.eigenbasis import Basis, Eigenbasis
from bayesdiff.data.toys import moons
from bayesdiff.models import GenerativeModel
from bayesdiff.models.exact import exact_model
from bayesdiff.networks import InDataCoordinates
from bayesdiff.paths import CondOT, Inflation, VariancePreserving, convert
from bayesdiff.paths.inflation import participation_ratio
from bayesdiff.runs.invertible import InvertibleFlow
from bayesdiff.solvers import DDIM, RK4, Euler, Heun, Midpoint, integrate, plan
from bayesdiff.solvers.encode import backward, decode, encode

DOUBLE = torch.float64


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=DOUBLE)


def ready(path: Inflation, *variances: float) -> Inflation:
    xi = double(*variances)
    return path.for_space(SimpleNamespace(variances=xi, shape=tuple(xi.shape)))


P1 = ready(Inflation(rho=2.0, duration=7.01), 1.444, 0.556)
P2 = ready(Inflation("prr", 1, rho=1.0), 1.0, 1.0)
PROPORTIONAL = ready(Inflation(kernel="proportional", rho=2.0, duration=7.01), 4.0, 1.0, 0.25)
SMALL = ready(Inflation("prr", 2, 1.5), 30.0, 1.0, 0.01, 1e-5)
PATHS = [P1, P2, PROPORTIONAL, SMALL]
T = torch.linspace(0, 1, 41, dtype=DOUBLE)


def _none() -> Tensor:
    raise AssertionError("no step draws noise")


def zero(x: Tensor, t: float) -> Tensor:
    return torch.zeros_like(x)


def paper(path: Inflation, n: int, solver: str, x: Tensor, denoiser, up: bool) -> Tensor:
    """The equation of the paper for scaled states s x~, on n uniform times between 0 and T."""
    xi, growth, rho = path.variances, path.rho * path.growth, path.rho
    top = path.growth[0]

    def gamma(tau):
        return path.gamma_0 * (growth * tau).exp()

    def scale(tau):
        return (xi[0] + gamma(tau)[0]).rsqrt()

    def slope(x, tau):
        ratio = gamma(tau)[0] / (xi[0] + gamma(tau)[0])
        s = scale(tau)
        own = growth / 2 - 0.5 * rho * top * ratio
        return own * x - growth / 2 * s * denoiser(x / s, gamma(tau))

    times = torch.linspace(0, path.duration, n, dtype=DOUBLE)
    times = times if up else times.flip(0)
    for start, end in zip(times[:-1], times[1:], strict=True):
        h, k = end - start, slope(x, start)
        if solver == "heun":
            k = (k + slope(x + h * k, end)) / 2
        x = x + h * k
    return x


def gaussian(path: Inflation):
    return lambda x, gamma: path.variances / (path.variances + gamma) * x


@pytest.mark.parametrize("path", PATHS)
def test_coefficients_are_those_of_the_noise_and_have_its_derivatives(path):
    c = path.coefficients(T)
    shape = path.variances.shape
    inner = T[1:-1].requires_grad_()
    own = path.coefficients(inner)
    for value, slope in ((own.alpha, own.d_alpha), (own.sigma, own.d_sigma)):
        for column in range(shape[0]):
            (found,) = torch.autograd.grad(value[:, column].sum(), inner, retain_graph=True)
            torch.testing.assert_close(found, slope[:, column], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(c.alpha**2 + c.sigma**2, torch.ones(len(T), *shape, dtype=DOUBLE))
    ratio = path.log_gamma(T).exp() / path.variances
    torch.testing.assert_close((c.sigma / c.alpha) ** 2, ratio, rtol=1e-9, atol=1e-15)
    assert c.d_alpha.isfinite().all() and c.d_sigma.isfinite().all()


def test_numbers_of_the_schedules():
    """T1 of the specification, and the table of latent variances."""
    start = torch.zeros((), dtype=DOUBLE)
    assert float(P1.log_gamma(start)[0].exp()) == pytest.approx(613.449251, abs=1e-5)
    assert P2.growth.tolist() == [2.0, 0.98]
    for gap, expected in ((1.02, 2.245e-7), (1.1, 6.77e-8), (1.25, 7.29e-9), (1.5, 3.50e-10)):
        path = ready(Inflation("prr", 1, gap, rho=1.0), 1.0, 1.0)
        assert float(path.latent_variance[1]) == pytest.approx(expected, rel=2e-3)
    even = ready(Inflation("prr", 62, "zero_sum"), *[1.0] * 3072)
    assert even.gap == pytest.approx(1.0206, abs=1e-4)
    assert float(even.growth.mean()) == pytest.approx(1.0)
    assert Inflation().rho == 2 and Inflation("prr", 1).rho == 1


def test_a_gaussian_is_followed_exactly_at_any_number_of_steps():
    """T4 and T5, where the scaled equation of the paper has an error."""
    x = double(1.0, 1.0)
    exact = (P1.latent_variance * (1.444 + 5e-4) / (P1.variances + 5e-4)).sqrt()
    torch.testing.assert_close(exact, double(1.0, 1.609950), rtol=1e-6, atol=1e-6)
    off = {s: float(paper(P1, 701, s, x, gaussian(P1), True)[1] / exact[1] - 1) for s in _SOLVERS}
    assert off["euler"] == pytest.approx(-3.784e-4, rel=1e-3)
    assert off["heun"] == pytest.approx(-2.75e-7, rel=1e-2)
    for solver in (Euler(1), Heun(2), Midpoint(3), RK4(2)):
        for path in PATHS:
            z = torch.randn(4, len(path.variances), dtype=DOUBLE)
            for steps in (backward(solver, path, "v"), plan(solver, path, "v")):
                alpha = path.coefficients(torch.ones((), dtype=DOUBLE)).alpha
                factor = alpha if steps[0].times[0] == 1 else 1 / alpha
                found = integrate(zero, steps, z, _none)
                torch.testing.assert_close(found, factor * z, rtol=1e-12, atol=0)


_SOLVERS = ("euler", "heun")


@pytest.mark.parametrize(
    "path, n, index, euler, heun",
    [(P1, 701, 1, -7.5749e-4, -1.37e-8), (P2, 1501, 1, -4.515e-2, 6.1e-7)],
)
def test_round_trips_of_the_scaled_equation_lose_what_ours_keep(path, n, index, euler, heun):
    """T6: the paper's own coordinates drift, and ours do not."""
    for solver, expected in (("euler", euler), ("heun", heun)):
        x = double(1.0, 1.0)
        there = paper(path, n, solver, x, gaussian(path), True)
        again = paper(path, n, solver, there, gaussian(path), False)
        assert float(again[index] - 1) == pytest.approx(expected, rel=2e-2)
    z = torch.randn(3, 2, dtype=DOUBLE)
    there = integrate(zero, backward(Euler(3), path, "v"), z, lambda: z)
    again = integrate(zero, plan(Euler(3), path, "v"), there, lambda: z)
    torch.testing.assert_close(again, z, rtol=1e-12, atol=0)


def test_variance_of_latents():
    """T7: of data that are clean at the start, or have the noise that the path has there."""
    alpha = P1.coefficients(torch.ones((), dtype=DOUBLE)).alpha
    clean = P1.latent_variance * alpha**2
    total = P1.variances + 613.449251
    torch.testing.assert_close(P1.latent_variance, total / total[0])
    torch.testing.assert_close(clean, double(0.999654, 0.997659), atol=1e-6, rtol=0)
    x_1, x_0 = torch.randn(2, 200_000, 2, generator=torch.Generator().manual_seed(0))
    z = GenerativeModel(_Still(2), P1, "v", torch.optim.SGD).corrupt(x_1, x_0, torch.ones(200_000))
    torch.testing.assert_close(z[0].var(0), torch.ones(2), rtol=0.02, atol=0)


def test_participation_ratio_is_kept_by_the_proportional_kernel_alone():
    constant = ready(Inflation(rho=2.0, duration=7.01), 4.0, 1.0, 0.25)
    assert participation_ratio((4, 1, 0.25)) == pytest.approx(1.6154, abs=1e-4)
    for path, expected in ((constant, 2.99998), (PROPORTIONAL, 1.6154)):
        assert participation_ratio(path.latent_variance) == pytest.approx(expected, abs=1e-4)
    reduced = ready(Inflation("prr", 2, 1.5, kernel="proportional", rho=1.0), 4.0, 1.0, 0.25)
    assert participation_ratio(reduced.latent_variance) == pytest.approx(1.47059, abs=1e-4)


def bimodal(x: Tensor, gamma: Tensor) -> Tensor:
    """Posterior mean of data 1/2 N(-1, 0.01) + 1/2 N(1, 0.01)."""
    spread = 0.01 + gamma
    mean = torch.tanh(x / spread)
    return mean + 0.01 / spread * (x - mean)


def _transported(path: Inflation, start: Tensor) -> Tensor:
    """Scaled states at T with the share of the mixture below them that is below the start."""

    def below(x: Tensor, gamma: Tensor) -> Tensor:
        spread = (0.01 + gamma).sqrt()
        return (torch.special.ndtr((x + 1) / spread) + torch.special.ndtr((x - 1) / spread)) / 2

    ends = (path.log_gamma(double(t)[0]).exp() for t in (1.0, 0.0))
    first, last = ends
    share = below(start, first)
    low, high = torch.full_like(start, -1e4), torch.full_like(start, 1e4)
    for _ in range(80):
        middle = (low + high) / 2
        under = below(middle, last) < share
        low, high = torch.where(under, middle, low), torch.where(under, high, middle)
    return middle * (1.01 + last).rsqrt()


def test_a_flow_that_bends_ends_where_its_distribution_function_says():
    """T8: the flow in one dimension keeps the distribution function."""
    path = ready(Inflation(rho=2.0, duration=7.01), 1.01)
    start = double(-1.2, -1.0, -0.9, 0.85, 1.0, 1.15)[:, None]
    truth = _transported(path, start)
    told = double(-2.23403, -0.67449, -0.20773, 0.08988, 0.67449, 1.80154)[:, None]
    torch.testing.assert_close(truth, told, atol=1e-5, rtol=0)
    scale = path.latent_variance.sqrt()

    def v(z: Tensor, t: float) -> Tensor:
        at = torch.tensor(t, dtype=DOUBLE)
        c, gamma = path.coefficients(at), path.log_gamma(at).exp()
        x = z * (1.01 + gamma).sqrt()
        p, q = convert("data", "v", c)
        return p * z + q * bimodal(x, gamma) / math.sqrt(1.01)

    steps, back = backward(Heun(700), path, "v"), plan(Heun(700), path, "v")
    x_1 = start / math.sqrt(1.01)
    latents = integrate(v, steps, x_1, lambda: x_1)
    errors = {"ours": float((latents * scale - truth).abs().max())}
    s_0 = (1.01 + 5e-4) ** -0.5
    for solver in _SOLVERS:
        found = paper(path, 701, solver, s_0 * start, bimodal, True)
        errors[solver] = float((found - truth).abs().max())
    assert errors["euler"] == pytest.approx(8.8e-3, rel=0.05)
    # In one dimension the scaled state is ours, so that Heun's steps are the same.
    assert errors["heun"] == pytest.approx(1.92e-5, rel=0.01)
    assert errors["ours"] == pytest.approx(errors["heun"], rel=1e-6)
    again = integrate(v, back, latents, lambda: x_1)
    assert float((again - x_1).abs().max()) < 1e-7
    halves = [
        float((integrate(v, backward(Heun(n), path, "v"), x_1, lambda: x_1) - latents).abs().max())
        for n in (50, 100)
    ]
    assert halves[0] / halves[1] > 3.3


@pytest.mark.parametrize("gamma, x, expected", [(0.1, 0.3, 0.995055), (1.0, 0.3, 0.291313)])
def test_exact_score_of_two_points(gamma, x, expected):
    """T9: references at -1 and 1, in every prediction, and beside flows and diffusion."""
    path = ready(Inflation(rho=2.0, duration=7.01), 2.0)
    t = 1 - (math.log(gamma) - math.log(5e-4)) / (2.0 * 7.01)
    references = double(-1.0, 1.0)[:, None] / math.sqrt(2)
    z = double(x)[None] / math.sqrt(2 + gamma)
    for prediction in ("data", "v", "noise", "velocity"):
        model = exact_model(path, prediction, references)
        p, q = convert(prediction, "data", path.coefficients(torch.tensor(t, dtype=DOUBLE)))
        found = p * z + q * model(z, double(t))
        assert float(found * math.sqrt(2)) == pytest.approx(expected, abs=1e-6)
    model = exact_model(path, "data", references)
    far = model(double(1e4)[None], double(1.0))
    torch.testing.assert_close(far, references[1:], rtol=1e-12, atol=0)
    flipped = exact_model(path, "data", references.flip(0))
    torch.testing.assert_close(flipped(z, double(t)), model(z, double(t)))


@pytest.mark.parametrize(
    "path, prediction, solver",
    [(CondOT(), "velocity", Euler), (VariancePreserving("cosine"), "v", DDIM), (P1, "v", Heun)],
)
def test_exact_scores_lead_to_the_references(path, prediction, solver):
    references = torch.randn(5, 2, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(40, 2, dtype=DOUBLE, generator=torch.Generator().manual_seed(2))
    model = exact_model(path, prediction, references)
    found = decode(model, solver(200, denoise=True), noise)
    nearest = torch.cdist(found, references).min(1).values
    assert float(nearest.median()) < 2e-2


def test_an_exact_score_is_of_one_time():
    model = exact_model(CondOT(), "velocity", torch.randn(5, 2))
    with pytest.raises(UserError, match="of one time for all states"):
        model(torch.randn(2, 2), torch.tensor([0.1, 0.9]))


def test_an_exact_score_has_no_value_without_noise():
    model = exact_model(CondOT(), "velocity", torch.randn(5, 2))
    with pytest.raises(UserError, match="no value at t=1, where no noise is left"):
        decode(model, Heun(4), torch.randn(3, 2))


class _Still(nn.Module):
    """A network that says 0, in the data's coordinates; features that differ."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.head = nn.Linear(size, size)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def features(self, x, t, y=None):
        return x.flatten(1).tanh()

    def fold(self, output):
        return output

    def forward(self, x, t, y=None):
        return self.fold(self.head(self.features(x, t, y)))


def rows(count: int, *spreads: float) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    turn = torch.linalg.qr(torch.randn(len(spreads), len(spreads), dtype=DOUBLE))[0]
    drawn = torch.randn(count, len(spreads), generator=generator, dtype=DOUBLE)
    return drawn * double(*spreads) @ turn.T + 3


def test_the_basis_whitens_and_fixes_its_signs():
    values = rows(5000, 3.0, 1.0, 0.1)
    basis = Basis.of(list(values.split(999)), 0.0)
    states = basis.encode(values)
    torch.testing.assert_close(torch.cov(states.T), torch.eye(3, dtype=DOUBLE))
    torch.testing.assert_close(states.mean(0), torch.zeros(3, dtype=DOUBLE))
    torch.testing.assert_close(basis.decode(states), values)
    assert basis.variances.tolist() == sorted(basis.variances.tolist(), reverse=True)
    assert (basis.vectors.gather(0, basis.vectors.abs().argmax(0, keepdim=True)) > 0).all()
    whole = Basis.of([values], 0.0)
    torch.testing.assert_close(whole.vectors, basis.vectors)


def test_values_that_never_change_have_directions_of_their_own():
    values = torch.cat([rows(500, 3.0, 1.0), torch.full((500, 2), 0.25, dtype=DOUBLE)], 1)
    with pytest.raises(
        UserError, match=r"do not vary in 2 of 4 directions and data.space.floor=0.0; give"
    ):
        Basis.of([values], 0.0)
    basis = Basis.of([values], 1e-3)
    assert basis.vectors[2:, 2:].tolist() == [[1.0, 0.0], [0.0, 1.0]]
    torch.testing.assert_close(basis.variances[2:], basis.variances[0] * double(1e-3, 1e-3))
    torch.testing.assert_close(basis.decode(basis.encode(values)), values)
    with pytest.raises(UserError, match="all values of the data are the same"):
        Basis.of([torch.ones(5, 2)], 1e-3)


def test_a_network_in_data_coordinates_is_turned_both_ways():
    space = Eigenbasis(moons(points=500, test_points=10), floor=0.0)
    net = _Still(2)
    nn.init.normal_(net.head.weight)
    z, t = torch.randn(6, 2), torch.full((6,), 0.5)
    w = space.basis.vectors.float()
    expected = net(z @ w.T, t) @ w
    wrapped = InDataCoordinates(net, space)
    torch.testing.assert_close(wrapped(z, t), expected)
    assert wrapped.head.weight.shape == (2, 2)
    with pytest.raises(UserError, match="use space=eigenbasis"):
        InDataCoordinates(_Still(2), SimpleNamespace(shape=(2,)))


def test_a_head_of_zeros_is_the_exact_denoiser_of_a_gaussian():
    """T3, in eigen-coordinates and in the data's."""
    values = rows(4000, 2.0, 0.7)
    basis = Basis.of([values], 0.0)
    path = ready(Inflation(), *basis.variances.tolist())
    covariance = torch.cov(values.T)
    at = torch.tensor(0.7, dtype=DOUBLE)
    gamma = path.log_gamma(at).exp()
    noisy = values + gamma.sqrt() * torch.randn(4000, 2, dtype=DOUBLE)
    truth = (noisy - values.mean(0)) @ torch.linalg.inv(
        covariance + gamma[0] * torch.eye(2, dtype=DOUBLE)
    ) @ covariance + values.mean(0)
    c = path.coefficients(at)
    z = c.alpha * basis.encode(noisy)  # = (x - mean) / sqrt(xi + gamma), turned
    p, _ = convert("v", "data", c)
    torch.testing.assert_close(basis.decode(p * z), truth)
    score = (basis.decode(p * z) - noisy) / gamma[0]
    total = covariance + gamma[0] * torch.eye(2, dtype=DOUBLE)
    torch.testing.assert_close(score, -(noisy - values.mean(0)) @ torch.linalg.inv(total))


def test_the_target_has_unit_variance_and_none_of_the_input():
    """T2: the loss of a head of zeros is 1 per dimension, whatever the data."""
    data = moons(points=50_000, test_points=10)
    space = Eigenbasis(data, floor=0.0, rows=50_000)
    path = Inflation(rho=2.0, duration=7.01).for_space(space)
    model = GenerativeModel(_Still(2), path, "v", torch.optim.SGD)
    generator = torch.Generator().manual_seed(0)
    x_1 = space.encode(data.images)
    x_0, t = torch.randn(50_000, 2, generator=generator), torch.rand(50_000, generator=generator)
    x_t, target = model.corrupt(x_1, x_0, t)
    torch.testing.assert_close(target.square().mean(0), torch.ones(2), atol=0.03, rtol=0)
    torch.testing.assert_close((x_t * target).mean(0), torch.zeros(2), atol=0.03, rtol=0)
    torch.testing.assert_close(x_t**2 + target**2, x_1**2 + x_0**2, atol=1e-4, rtol=1e-4)


def test_samples_end_in_data_units_or_denoised():
    path = ready(Inflation(gamma_0=0.5), 1.0, 0.1)
    x = torch.randn(3, 2, dtype=DOUBLE)
    alpha = path.coefficients(torch.ones((), dtype=DOUBLE)).alpha
    noisy = integrate(zero, plan(Heun(4), path, "v"), x, lambda: x)
    torch.testing.assert_close(noisy, x / alpha)
    clean = integrate(zero, plan(Heun(4, denoise=True), path, "v"), x, lambda: x)
    torch.testing.assert_close(clean, x * alpha)
    assert plan(Heun(4, denoise=True), CondOT(), "velocity") == plan(Heun(4), CondOT(), "velocity")


@pytest.mark.parametrize("solver", [Heun(60), RK4(40), DDIM(400)])
def test_encode_and_decode_are_inverse(solver):
    torch.manual_seed(0)
    net = _Still(2)
    nn.init.normal_(net.head.weight, std=0.3)
    model = GenerativeModel(net, P1, "v", torch.optim.SGD).double()
    x = torch.randn(8, 2, dtype=DOUBLE)
    again = decode(model, solver, encode(model, solver, x))
    torch.testing.assert_close(again, x, atol=2e-2 if solver.name == "ddim" else 2e-4, rtol=0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"schedule": "flat"}, "unknown path.schedule 'flat'; choose from prp, prr"),
        ({"kernel": "flat"}, "unknown path.kernel 'flat'"),
        ({"schedule": "prr"}, "path.schedule=prr needs path.dims_to_keep"),
        ({"dims_to_keep": 3}, "path.schedule=prp keeps all dimensions"),
        ({"schedule": "prr", "dims_to_keep": 0}, "path.dims_to_keep"),
        ({"schedule": "prr", "dims_to_keep": 2, "inflation_gap": 0}, "path.inflation_gap"),
        ({"schedule": "prr", "dims_to_keep": 2, "inflation_gap": 2.5}, "in \\(0, 2\\]"),
        ({"gamma_0": 0}, "path.gamma_0"),
        ({"duration": -1}, "path.duration"),
        ({"rho": float("nan")}, "path.rho"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Inflation(**options)


def test_data_that_stay_in_latents_are_said(caplog):
    ready(Inflation("prr", 1, 1.02), 4.0, 1.0)
    assert not caplog.records
    ready(Inflation("prr", 1, 2.0), 4.0, 1.0, 0.25)
    assert "2 of 3 dimensions have alpha up to 1 at t = 0" in caplog.text


def test_dimensions_that_do_not_fit_are_refused():
    three = SimpleNamespace(variances=torch.ones(3), shape=(3,))
    with pytest.raises(UserError, match="keeps 2 of 3 .* path.dims_to_keep of at most 1"):
        Inflation("prr", 2, "zero_sum").for_space(three)
    with pytest.raises(UserError, match="path.dims_to_keep=3 of 3 dimensions leaves none"):
        Inflation("prr", 3).for_space(three)
    with pytest.raises(UserError, match="use space=eigenbasis"):
        Inflation().for_space(SimpleNamespace(shape=(2,)))
    with pytest.raises(UserError, match="call for_space"):
        Inflation().coefficients(T)


def test_the_basis_knows_what_it_lifted():
    values = torch.cat([rows(500, 3.0, 1.0), torch.full((500, 1), 0.25, dtype=DOUBLE)], 1)
    basis = Basis.of([values], 0.5)
    states = basis.encode(values)
    torch.testing.assert_close(states.var(0), basis.spread)
    assert basis.spread[0] == 1 and 0 < basis.spread[1] < 0.5 and basis.spread[2] == 0


@pytest.mark.parametrize(
    "words, message",
    [
        (["space=rotation"], "data.space.floor is no option of .*Latents.* model=inflation"),
        (["solver.denoise=yess"], "solver.denoise must be true or false, got 'yess'"),
        (["data.space.floor=0"], "data.space.floor=0; give 1e-3 or so"),
        (["path.schedule=prr", "path.dims_to_keep=64"], "leaves none to compress"),
        (["path=inflation", "model=flow"], "use space=eigenbasis"),
    ],
)
def test_runs_that_cannot_work_are_one_line(compose, words, message):
    model = [] if "model=flow" in words else ["model=inflation"]
    with pytest.raises(Exception, match=message) as error:
        pipeline.run(compose(*model, *words))
    assert len(explain(error.value).splitlines()) == 1


def test_latents_of_a_run_from_python(compose, tmp_path):
    """Data as they are stored alone, other data's basis refused, latents of one solver."""
    words = [
        "model=inflation", "data=circles", "net=mlp", "net.width=16", "data.source.points=400",
        "data.source.test_points=50", "trainer.max_steps=2", "uncertainty=ensemble",
        "uncertainty.members=2", "uncertainty.num_images=4", "metrics.num_images=0",
        "solver.num_steps=20", "solver.denoise=true", "report.pdf=false",
    ]  # fmt: skip
    folder = pipeline.run(compose(*words)).folder.parent
    flow = InvertibleFlow.of(folder)
    data = torch.randn(5, 2)
    latents = flow.encode(data)
    torch.testing.assert_close(flow.decode(latents), data, atol=5e-3, rtol=0)
    with pytest.raises(UserError, match=r"as they are stored, float32 \(N, 2\), got float64"):
        flow.encode(data.double())
    with pytest.raises(UserError, match=r"decode takes latents \(N, 2\), got \(5, 1\)"):
        flow.decode(latents[:, :1])
    with pytest.raises(UserError, match="batch of 0"):
        flow.encode(data[:0])
    flow.save(tmp_path / "latents.safetensors", latents)
    assert torch.equal(flow.load(tmp_path / "latents.safetensors"), latents)
    other = InvertibleFlow.of(folder, Heun(20, grid="quadratic"))
    with pytest.raises(UserError, match="encode the data again"):
        other.load(tmp_path / "latents.safetensors")
    checkpoint = f"ckpt_path={folder / 'checkpoints' / 'last.ckpt'}"
    with pytest.raises(UserError, match="trained in states of other data"):
        pipeline.run(compose(*words, "data=moons", "fit=false", checkpoint))


def test_maps_of_images_by_derivatives_and_by_members(compose):
    """The whole way on images, in the eigenbasis, with the network turned under vmap."""
    words = [
        "model=inflation", "path.schedule=prr", "path.dims_to_keep=8", "trainer.max_steps=2",
        "uncertainty=linearised", "uncertainty.num_images=4", "metrics.num_images=0",
        "solver.num_steps=3", "report.pdf=false",
    ]  # fmt: skip
    result = pipeline.run(compose(*words))
    with np.load(result.samples) as found:
        assert found["variance"].shape == (4, 1, 8, 8)
        assert (found["variance"] > 0).all()
