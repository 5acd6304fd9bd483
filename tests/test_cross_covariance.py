"""Variance carried by its recursion, cross-covariances from a few members, in float64."""

from dataclasses import replace

import pytest
import torch
from hand import CPU, FLOW, LINEAR, SOLVERS, Noise, certain, curved, model_of, only_bias
from hand import posterior_of as of_covariance
from hand import random_covariance as covariance_of
from test_history import AdamsBashforth3, Momentum

from bayesdiff.checks import UserError
from bayesdiff.likelihoods import Bernoulli
from bayesdiff.models import GenerativeModel
from bayesdiff.paths import QuadraticAccuracy
from bayesdiff.solvers import DDIM, BayesianUpdate, DPMSolverPP2M, Heun, Step, integrate
from bayesdiff.uncertainty import CrossCovariance, Ensemble, Linearised, Start
from bayesdiff.uncertainty.members.ensemble import MemberField
from bayesdiff.uncertainty.recursion.cross_covariance import Heads, covary

SHAPE = (1, 2, 2)
BELIEFS = QuadraticAccuracy(9.0)
CASES = {name: case for name, case in SOLVERS.items() if name != "heun"} | {
    "ab3": (AdamsBashforth3(7), FLOW, "velocity"),
    "momentum": (Momentum(6), FLOW, "velocity"),
    "dpmpp_2m": (DPMSolverPP2M(6), LINEAR, "v"),
    "beliefs": (BayesianUpdate(5), BELIEFS, "data"),
}


def started(solver, path, prediction, likelihood=None, count=2):
    net, posterior, _ = curved()
    model = model_of(net, path, prediction)
    if likelihood is not None:
        sgd = torch.optim.SGD
        model = GenerativeModel(net, path, prediction, sgd, likelihood=likelihood).eval()
    return Start(model, solver, None, Noise(count, SHAPE), CPU), posterior


@pytest.fixture
def of_members_alone(monkeypatch):
    """Var(g) as it is among the members: nothing is left that could differ from theirs."""
    drawn = Heads.__call__

    def call(heads, step, x):
        outputs, _ = drawn(heads, step, x)
        return outputs, outputs.var(0)

    monkeypatch.setattr(Heads, "__call__", call)


@pytest.mark.parametrize("name", CASES)
def test_with_the_members_own_variance_it_is_that_of_their_states(name, of_members_alone):
    solver, path, prediction = CASES[name]
    likelihood = Bernoulli() if path is BELIEFS else None
    start, posterior = started(solver, path, prediction, likelihood)
    found = CrossCovariance(members=5, seed=3)(start, posterior)
    start, posterior = started(solver, path, prediction, likelihood)
    weights = posterior.draw(5, torch.Generator().manual_seed(3))
    field, truth = MemberField(start.field(), weights), []
    x_0 = start.initial()[None]
    states = integrate(field, start.steps(), x_0, start.draw, lambda _, x: truth.append(x.var(0)))
    assert float(states.var(0).min()) > 0
    torch.testing.assert_close(found.variance, states.var(0), rtol=1e-9, atol=1e-14)
    summed = torch.stack([each.flatten(1).sum(1) for each in truth])
    torch.testing.assert_close(found.summed, summed, rtol=1e-9, atol=1e-14)


def test_of_beliefs_it_is_the_recursion_of_their_log_odds(monkeypatch):
    """Var(l') = Var(l) + 16 a^2 Var(p) + 8 a Cov(l, p), l = 2 sqrt(beta (1 + beta)) x."""
    count, seen, drawn = 6, [], Heads.__call__

    def call(heads, step, x):
        seen.append((x, *drawn(heads, step, x)))
        return seen[-1][1:]

    monkeypatch.setattr(Heads, "__call__", call)
    start, posterior = started(BayesianUpdate(count), BELIEFS, "data", Bernoulli())
    found = CrossCovariance(seed=1)(start, posterior)
    variance = torch.zeros(2, *SHAPE, dtype=torch.float64)
    for number, (x, outputs, of_outputs) in enumerate(seen[:-1]):
        beta, later = (9.0 * (n / count) ** 2 for n in (number, number + 1))
        log_odds = 2 * (beta * (1 + beta)) ** 0.5 * x.expand_as(outputs)
        p, of_p, a = (1 + outputs) / 2, of_outputs / 4, later - beta
        both = covary(log_odds, p)
        variance = (variance + 16 * a**2 * of_p + 8 * a * both).clamp(min=0)
        scaled = variance / (4 * later * (1 + later))
        summed = scaled.flatten(1).sum(1)
        torch.testing.assert_close(found.summed[number], summed, rtol=1e-9, atol=0)
    torch.testing.assert_close(found.variance, seen[-1][2], rtol=1e-12, atol=0)


def test_heads_at_the_same_features_have_the_posteriors_own_variance():
    start, posterior = started(DDIM(3), LINEAR, "v")
    field = start.field()
    estimator = CrossCovariance(members=3, head_draws=40_000)
    heads = Heads.drawn(estimator, field, posterior, start)
    x = start.initial()
    step = Step((0.5,), ((1.0,),), (1.0, 1.0), 0.0, 0.6)
    exact = posterior.predictive_variance(field.features(x, 0.5)).expand_as(x)
    _, found = heads(step, x[None])
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0)
    moved = torch.stack([x, x + 0.3, x - 0.2])
    sure = Heads.drawn(estimator, field, certain(field.model.net.head), start)
    outputs, found = sure(step, moved)
    torch.testing.assert_close(found, outputs.var(0), rtol=1e-9, atol=1e-15)
    # What a moved bias adds is the same at all states: the sum of all parts is theirs.
    bias = Heads.drawn(estimator, field, only_bias(field.model.net.head, 0.5), start)
    outputs, found = replace(bias, others=bias.members)(step, moved)
    torch.testing.assert_close(found, outputs.var(0), rtol=1e-5, atol=0)


def test_it_is_the_first_order_variance_where_the_posterior_is_narrow():
    start, _ = started(DDIM(5), LINEAR, "v")
    head = start.model.net.head
    narrow = of_covariance(head, 1e-4 * covariance_of(3))
    exact = Linearised(draws="all")(start, narrow).variance
    start, _ = started(DDIM(5), LINEAR, "v")
    found = CrossCovariance(members=400, head_draws=2000)(start, narrow).variance
    torch.testing.assert_close(found, exact, rtol=0.15, atol=0)


def test_it_is_less_noisy_than_an_ensemble_of_as_many():
    def variance(estimator):
        start, posterior = started(BayesianUpdate(5), BELIEFS, "data", Bernoulli())
        return estimator(start, posterior).variance.sum()

    def scatter(make):
        found = torch.stack([variance(make(seed)) for seed in range(24)])
        return float(found.std() / found.mean())

    ensemble = scatter(lambda seed: Ensemble(members=4, noise_members=0, seed=seed))
    assert scatter(lambda seed: CrossCovariance(seed=seed)) < 0.7 * ensemble


def test_what_it_cannot_follow_is_refused():
    for options in ({"members": 1}, {"head_draws": 1}):
        with pytest.raises(UserError, match=f"uncertainty.{next(iter(options))}"):
            CrossCovariance(**options)
    with pytest.raises(UserError, match=r"solver=heun have 2; use uncertainty=ensemble"):
        CrossCovariance().check(Heun(4))
    with pytest.raises(UserError, match=r"decoded pixels; use uncertainty=ensemble"):
        CrossCovariance().check_decoded()
