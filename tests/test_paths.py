"""Paths and conversions between predictions, against tables, differences and direct formulas."""

import math

import pytest
import torch

from bayesdiff.checks import UserError
from bayesdiff.paths import PREDICTIONS, CondOT, VariancePreserving, convert
from bayesdiff.paths.prediction import mix

T = 1000
PATHS = {
    "cond_ot": CondOT(),
    "linear": VariancePreserving(),
    "scaled_linear": VariancePreserving("scaled_linear", beta_start=0.00085, beta_end=0.012),
    "cosine": VariancePreserving("cosine"),
}


def index_time(i):
    return 1 - (torch.as_tensor(i, dtype=torch.float64) + 1) / T


def definition(name):
    """abar_0 ... abar_999 by the schedule's own recursion, in plain Python."""
    if name == "cosine":

        def level(k):
            return math.cos((k / T + 0.008) / 1.008 * math.pi / 2) ** 2

        betas = [min(1 - level(i + 1) / level(i), 0.999) for i in range(T)]
    elif name == "linear":
        betas = [1e-4 + (2e-2 - 1e-4) * i / (T - 1) for i in range(T)]
    else:
        low, high = math.sqrt(0.00085), math.sqrt(0.012)
        betas = [(low + (high - low) * i / (T - 1)) ** 2 for i in range(T)]
    abar = [1.0]
    for beta in betas:
        abar.append(abar[-1] * (1 - beta))
    return torch.tensor(abar[1:], dtype=torch.float64)


def test_linear_schedule_has_the_published_values():
    indices = torch.tensor([0, 10, 20, 980, 999])
    abar = PATHS["linear"].coefficients(index_time(indices)).alpha ** 2
    expected = torch.tensor([0.9999, 0.997807, 0.993735, 5.9038e-5, 4.0358e-5])
    torch.testing.assert_close(abar, expected.double(), rtol=1e-5, atol=5e-7)
    assert abs(abar[0] - 0.9999) < 1e-15
    torch.testing.assert_close(abar[3:], expected[3:].double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine"])
def test_every_index_equals_the_schedules_own_definition(name):
    t = torch.cat([index_time(torch.arange(T)), torch.ones(1, dtype=torch.float64)])
    c = PATHS[name].coefficients(t)
    expected = torch.cat([definition(name), torch.ones(1, dtype=torch.float64)])
    torch.testing.assert_close(c.alpha**2, expected, rtol=1e-11, atol=0)
    torch.testing.assert_close(c.sigma**2, 1 - expected, rtol=1e-9, atol=1e-15)
    assert c.sigma[-1] == 0 and c.alpha[-1] == 1
    assert (c.alpha[:-1].diff() < 0).all(), "index 0 has the least noise"


def test_cosine_telescopes_to_its_closed_form_below_the_cap():
    i = torch.arange(990, dtype=torch.float64)
    level = torch.cos(((i + 1) / T + 0.008) / 1.008 * math.pi / 2) ** 2
    level = level / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    alpha = PATHS["cosine"].coefficients(index_time(i)).alpha
    torch.testing.assert_close(alpha**2, level, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", PATHS)
def test_the_path_runs_from_noise_to_data(name):
    t = torch.linspace(0, 1, 4001, dtype=torch.float64)
    c = PATHS[name].coefficients(t)
    if name == "cond_ot":
        assert torch.equal(c.alpha, t) and torch.equal(c.sigma, 1 - t)
    else:
        torch.testing.assert_close(c.alpha**2 + c.sigma**2, torch.ones_like(t))
    assert (c.alpha.diff() > 0).all() and (c.sigma.diff() < 0).all()
    assert c.alpha[0] < 0.1 and c.sigma[-1] == 0


@pytest.mark.parametrize("name", PATHS)
def test_derivatives_equal_central_differences(name):
    """Between indices ln abar is linear, so mid-interval differences are smooth."""
    path = PATHS[name]
    torch.manual_seed(0)
    t = index_time(torch.randint(0, T - 1, (200,))) - 0.5 / T
    h = 2.0**-12 / T
    c, after, before = (path.coefficients(t + d) for d in (0, h, -h))
    for value, derivative in (("alpha", "d_alpha"), ("sigma", "d_sigma")):
        slope = (getattr(after, value) - getattr(before, value)) / (2 * h)
        torch.testing.assert_close(getattr(c, derivative), slope, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", PATHS)
def test_single_precision_times_of_any_shape_are_served_in_double(name):
    t = torch.rand(3, 1, 2, generator=torch.Generator().manual_seed(0)) * 0.999
    c, exact = PATHS[name].coefficients(t), PATHS[name].coefficients(t.double())
    for field in ("alpha", "sigma", "d_alpha", "d_sigma"):
        value = getattr(c, field)
        assert value.dtype == torch.float64 and value.shape == t.shape
        torch.testing.assert_close(value, getattr(exact, field), rtol=1e-12, atol=0)


def predictions(path, t, x_1, x_0):
    """All kinds from data and noise, written out."""
    c = path.coefficients(t)
    return {
        "velocity": c.d_alpha * x_1 + c.d_sigma * x_0,
        "noise": x_0,
        "data": x_1,
        "v": c.alpha * x_0 - c.sigma * x_1,
        "flow": -c.d_alpha * x_1 - c.d_sigma * x_0,
        "score": -x_0 / c.sigma,
    }, c.alpha * x_1 + c.sigma * x_0


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("target", PREDICTIONS)
@pytest.mark.parametrize("source", PREDICTIONS)
def test_conversion_equals_the_direct_formula_and_inverts(source, target, name):
    path = PATHS[name]
    torch.manual_seed(1)
    t = 0.02 + 0.96 * torch.rand(64, dtype=torch.float64)
    x_1, x_0 = torch.randn(2, 64, dtype=torch.float64)
    known, x_t = predictions(path, t, x_1, x_0)
    c = path.coefficients(t)
    p, q = convert(source, target, c)
    torch.testing.assert_close(p * x_t + q * known[source], known[target], rtol=1e-7, atol=1e-7)
    back_p, back_q = convert(target, source, c)
    again = back_p * x_t + back_q * (p * x_t + q * known[source])
    torch.testing.assert_close(again, known[source], rtol=1e-7, atol=1e-7)


def test_the_diffusion_velocity_is_the_derivative_of_the_noised_image():
    path = PATHS["cosine"]
    t, h = index_time(400) - 0.5 / T, 2.0**-8 / T
    x_1, x_0 = torch.tensor(0.7), torch.tensor(-1.3)
    (known, _), (_, after), (_, before) = (predictions(path, t + d, x_1, x_0) for d in (0, h, -h))
    torch.testing.assert_close(known["velocity"], (after - before) / (2 * h), rtol=1e-7, atol=0)


def test_a_conversion_that_the_ends_do_not_determine_is_not_finite():
    """At pure noise the noise says nothing of the data; solvers rely on seeing it."""
    ends = CondOT().coefficients(torch.tensor([0.0, 1.0]))
    assert not convert("noise", "velocity", ends)[1][0].isfinite()
    assert not convert("data", "velocity", ends)[1][1].isfinite()
    for kind in ("velocity", "v"):
        for target in PREDICTIONS:
            known = slice(1) if target == "score" else slice(2)  # -x_0 / sigma ends at no noise
            assert all(v[known].isfinite().all() for v in convert(kind, target, ends))
    assert not convert("velocity", "score", ends)[1][1].isfinite()


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: VariancePreserving("sqrt"), "'sqrt'"),
        (lambda: VariancePreserving(timesteps=1), "path.timesteps"),
        (lambda: VariancePreserving(beta_start=0.0), "path.beta_start"),
        (lambda: VariancePreserving(beta_end=1.0), "path.beta_end"),
        (lambda: VariancePreserving(beta_start=0.03), "path.beta_end"),
        (lambda: mix("epsilon", CondOT().coefficients(torch.zeros(1))), "'epsilon'"),
    ],
)
def test_unusable_settings_are_refused_in_one_line(make, named):
    with pytest.raises(UserError, match=named) as refused:
        make()
    assert "\n" not in str(refused.value)
