"""Solvers on the paths of Bayesian flow networks, as steps of beliefs, in float64.

Solvers for Bayesian flow networks (Xue et al. 2024) follow equations of the beliefs themselves:
the mean mu of numbers, N(gamma x, gamma (1 - gamma)), and the logits y of classes,
N(beta m, beta K) with m = K e_x - 1. With the network's answer held over a step both have exact
solutions; they are written out here, and no schedule or step of the package is used for them.
"""

import math

import pytest
import torch
from test_bayesian_flow import DOUBLE, close, times

from bayesdiff.likelihoods import Bernoulli, Classes
from bayesdiff.paths import GeometricAccuracy, QuadraticAccuracy
from bayesdiff.solvers import (
    DDIM,
    BayesianUpdate,
    DPMSolver1,
    DPMSolver2,
    DPMSolverPP2M,
    ProbabilityFlow,
    SDEEuler,
    integrate,
    plan,
)

BETA_1, SIGMA_1 = 9.0, 0.05


def normal(*shape):
    return torch.randn(shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(3))


def stepped(solver, path, x, predicted, number):
    """State after step ``number`` from ``x``, without noise, for an answer in units of data."""
    step = plan(solver, path, "data")[number]
    return step.output[0] * x + step.output[1] * predicted, step


@pytest.mark.parametrize("solver", [DDIM, DPMSolver1])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_numbers_by_ddim_are_the_ode_of_their_belief(solver, number):
    path, x, answer = GeometricAccuracy(SIGMA_1), normal(4), normal(4).flip(0)
    t, s = number / 4, (number + 1) / 4
    gamma, later = (1 - SIGMA_1 ** (2 * each) for each in (t, s))
    mu = math.sqrt(gamma) * x
    ratio = math.sqrt(later * (1 - later) / (gamma * (1 - gamma)))
    found, _ = stepped(solver(4), path, x, answer, number)
    close(math.sqrt(later) * found, later * answer + ratio * (mu - gamma * answer), 1e-12)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_classes_by_ddim_are_the_ode_of_their_logits(number):
    """z_s = (s / t) z_t + beta_1 s (s - t) (K p - 1), and the log-odds of two classes."""
    path, t, s = QuadraticAccuracy(BETA_1), number / 4, (number + 1) / 4

    def logits(x, at, count):
        beta = BETA_1 * at**2
        return math.sqrt(beta * count * (1 + beta)) * x

    x, p = normal(5, 3), normal(5, 3).flip(0).softmax(1)
    answer = Classes(3).mean(p.log()[..., None, None])[..., 0, 0]
    found, _ = stepped(DDIM(4), path, x, answer, number)
    truth = (s / t) * logits(x, t, 3) + BETA_1 * s * (s - t) * (3 * p - 1)
    close(logits(found, s, 3), truth, 1e-12)
    # Of two classes, lambda = y_1 - y_0 has mean 2 beta x and variance 4 beta.
    lam, p = normal(6), normal(6).flip(0).sigmoid()
    beta, later = BETA_1 * t**2, BETA_1 * s**2
    found, _ = stepped(DDIM(4), path, lam / (2 * math.sqrt(beta * (1 + beta))), 2 * p - 1, number)
    truth = (s / t) * lam + 2 * BETA_1 * s * (s - t) * (2 * p - 1)
    close(2 * math.sqrt(later * (1 + later)) * found, truth, 1e-12)


@pytest.mark.parametrize("number", [0, 1, 3])
def test_expected_values_in_the_update_are_the_sde_of_the_log_odds(number):
    """Its first-order solver: lambda_s = lambda_t + 2 (beta_s - beta_t) (2 p - 1) + noise."""
    path, p = QuadraticAccuracy(BETA_1), normal(6).sigmoid()
    beta, later = (BETA_1 * each**2 for each in (number / 4, (number + 1) / 4))
    scale, size = (2 * math.sqrt(b * (1 + b)) for b in (beta, later))
    x = normal(6).flip(0)
    found, step = stepped(BayesianUpdate(4), path, x, Bernoulli().mean(p.logit()), number)
    close(size * found, scale * x + 2 * (later - beta) * (2 * p - 1), 1e-12)
    close(size * step.noise, 2 * math.sqrt(later - beta), 1e-12)


SOLVERS = (BayesianUpdate, DDIM, DPMSolver1, DPMSolver2, DPMSolverPP2M, SDEEuler, ProbabilityFlow)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("grid", ["uniform", "quadratic", "log_snr"])
def test_every_solver_starts_where_nothing_is_known(solver, grid):
    """At t = 0 the signal is 0, and not merely small."""
    for path, prediction in ((QuadraticAccuracy(), "data"), (GeometricAccuracy(), "v")):
        for n in (1, 2, 5):
            steps = plan(solver(n, grid=grid), path, prediction)
            assert len(steps) == n + 1  # and the last prediction
            for step in steps:
                values = [torch.as_tensor(value) for value in step.coefficients()]
                assert all(bool(value.isfinite().all()) for value in values)


# Error against the ODE of Gaussian data N(0, 1/4) is below this at 20 steps, and falls by this
# factor at 40. Of numbers alpha grows as sqrt(t) at first, and nothing is of second order.
ORDERS = {
    "numbers-ddim": (GeometricAccuracy(SIGMA_1), DDIM, 0.1, 1.8),
    "numbers-2m": (GeometricAccuracy(SIGMA_1), DPMSolverPP2M, 0.06, 1.8),
    "classes-ddim": (QuadraticAccuracy(BETA_1), DDIM, 0.1, 1.8),
    "classes-2": (QuadraticAccuracy(BETA_1), DPMSolver2, 0.02, 3.2),
    "classes-2m": (QuadraticAccuracy(BETA_1), DPMSolverPP2M, 0.02, 3.2),
}


@pytest.mark.parametrize("name", ORDERS)
def test_solvers_keep_their_order_from_a_start_without_signal(name):
    path, solver, most, factor = ORDERS[name]
    variance = 0.25

    def best(x, t):
        c = path.coefficients(times(min(t, 1.0)))
        return c.alpha * variance / (c.alpha**2 * variance + c.sigma**2) * x

    c = path.coefficients(times(1.0))
    spread = float(c.alpha**2 * variance + c.sigma**2)
    x = normal(3)
    truth = best(x * math.sqrt(spread), 1.0)
    errors = []
    for n in (20, 40):
        found = integrate(best, plan(solver(n), path, "data"), x, lambda: x)
        errors.append(float(((found - truth) / truth).abs().max()))
    assert errors[0] < most and errors[0] / errors[1] > factor, errors
