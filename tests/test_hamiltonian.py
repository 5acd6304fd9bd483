"""Hamiltonian Monte Carlo: moments of known densities, adaptation, divergences."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from bayesdiff.checks import UserError
from bayesdiff.studies.inference import hamiltonian
from bayesdiff.studies.inference.diagnostics import bulk_ess, mean_error, r_hat
from bayesdiff.studies.inference.hamiltonian import Hamiltonian, Point, leapfrog

COVARIANCE = torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 100.0]]).double()
PRECISION = COVARIANCE.inverse()
MEAN = torch.tensor([1.0, -2.0, 30.0]).double()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def starts(chains: int, size: int, spread: float = 3.0, seed: int = 9) -> Tensor:
    return spread * torch.randn(chains, size, generator=seeded(seed), dtype=torch.float64)


def gaussian(state: Tensor) -> Tensor:
    away = state - MEAN.to(state)
    return -((away @ PRECISION.to(state)) * away).sum(1) / 2


def banana(state: Tensor) -> Tensor:
    """x ~ N(0, 1), y | x ~ N(x**2 - 1, 0.5**2)."""
    x, y = state.unbind(1)
    return -x.square() / 2 - (y - x.square() + 1).square() / (2 * 0.25)


def mixture(state: Tensor) -> Tensor:
    """0.7 N(-1, 0.8**2) + 0.3 N(1.5, 0.5**2)."""
    x = state[:, 0]
    logs = [
        math.log(w / s) - ((x - m) / s).square() / 2
        for w, m, s in ((0.7, -1.0, 0.8), (0.3, 1.5, 0.5))
    ]
    return torch.logsumexp(torch.stack(logs), 0)


def close(draws: Tensor, exact: Tensor | list[float]) -> None:
    """Means within 5 Monte Carlo errors."""
    exact = torch.as_tensor(exact, dtype=torch.float64)
    away = (draws.double().flatten(0, 1).mean(0) - exact).abs() / mean_error(draws)
    assert away.max() < 5, away


@pytest.fixture(scope="module")
def of_gaussian():
    return Hamiltonian(draws=400, warmup=250, leapfrog_steps=8).sample(
        gaussian, starts(16, 3, 10), seeded()
    )


def test_moments_of_a_correlated_gaussian(of_gaussian):
    draws = of_gaussian.draws
    assert draws.shape == (16, 400, 3) and draws.dtype == torch.float64
    close(draws, MEAN)
    away = draws - MEAN
    close((away[..., :, None] * away[..., None, :]).flatten(2), COVARIANCE.flatten())
    assert r_hat(draws).max() < 1.02
    assert bulk_ess(draws).min() > 1000
    assert torch.allclose(of_gaussian.log_density[:, -1], gaussian(of_gaussian.state))
    assert torch.equal(draws[:, -1], of_gaussian.state)


def test_warm_up_adapts_step_and_mass(of_gaussian):
    assert of_gaussian.divergences.sum() == 0
    # The averaged step lies below the mean of a concave acceptance: 0.9 rather than 0.8.
    assert 0.75 < float(of_gaussian.acceptance.mean()) < 0.98
    assert (of_gaussian.step_size == of_gaussian.step_size[0]).all()
    ratio = of_gaussian.variance / COVARIANCE.diagonal()
    assert 0.7 < ratio.min() and ratio.max() < 1.4


def moments(state: Tensor) -> Tensor:
    x, y = state.unbind(-1)
    return torch.stack([x, y, x.square(), y.square(), x.square() * y, x * y], -1)


# E[y] = 0, Var[y] = 2 + 1/4, E[x**2 y] = E[x**4] - 1 = 2.
OF_BANANA = torch.tensor([0, 0, 1, 2.25, 2, 0]).double()


@pytest.mark.parametrize("shared", [True, False])
def test_moments_of_a_banana(shared):
    """Its tails need short steps: at an acceptance of 0.8 chains hardly enter them."""
    sampler = Hamiltonian(
        draws=120, warmup=200, leapfrog_steps=20, target_acceptance=0.97, shared_step=shared
    )
    chains = sampler.sample(banana, starts(128, 2, 1.0), seeded(1))
    close(moments(chains.draws), OF_BANANA)
    assert (chains.step_size.unique().numel() == 1) == shared
    assert float(chains.acceptance.mean()) == pytest.approx(0.97, abs=0.02)


@pytest.mark.parametrize("step", [0.1, 0.25, 0.4])
def test_exact_draws_stay_exact(step):
    """Whatever the step and however slowly chains mix: independent chains, so plain errors."""
    count = 20_000
    x, noise = torch.randn(2, count, generator=seeded(11), dtype=torch.float64)
    exact = torch.stack([x, x.square() - 1 + 0.5 * noise], 1)
    sampler = Hamiltonian(draws=10, warmup=0, leapfrog_steps=10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hamiltonian, "_START", step)
        chains = sampler.sample(banana, exact, seeded(3))
    # A wrong acceptance first shows in the energy: half a chi-square of two, of mean 1.
    found = torch.cat([moments(chains.state), -banana(chains.state)[:, None]], 1)
    away = found.mean(0) - torch.cat([OF_BANANA, torch.ones(1)])
    away = away.abs() / (found.std(0) / count**0.5)
    assert away.max() < 4.5, away
    assert (chains.state != exact).any(1).double().mean() > 0.5


def test_moments_and_shares_of_a_mixture():
    chains = Hamiltonian(draws=300, warmup=120, leapfrog_steps=6).sample(
        mixture, starts(24, 1), seeded(2)
    )
    x = chains.draws
    mean = 0.7 * -1 + 0.3 * 1.5
    second = 0.7 * (1 + 0.64) + 0.3 * (2.25 + 0.25)
    close(torch.cat([x, x.square(), (x > 0.5).double()], -1), [mean, second, _above(0.5)])


def _above(edge: float) -> float:
    parts = ((0.7, -1.0, 0.8), (0.3, 1.5, 0.5))
    return sum(w * math.erfc((edge - m) / s / math.sqrt(2)) / 2 for w, m, s in parts)


def test_no_chain_that_starts_far_out_stays_there():
    """Errors of the energy grow with it: the others' step size would be refused for ever."""
    start = torch.cat([starts(7, 3, 1.0), 1000 + starts(1, 3)])
    sampler = Hamiltonian(draws=60, warmup=200, leapfrog_steps=6)
    chains = sampler.sample(gaussian, start, seeded())
    assert chains.acceptance.min() > 0.5
    assert gaussian(chains.draws.flatten(0, 1)).min() > -20


def test_steps_shrink_for_a_higher_acceptance():
    sizes = []
    for target in (0.5, 0.95):
        sampler = Hamiltonian(draws=50, warmup=200, leapfrog_steps=4, target_acceptance=target)
        chains = sampler.sample(gaussian, starts(16, 3), seeded())
        sizes.append(float(chains.step_size[0]))
    assert sizes[0] > 1.4 * sizes[1], sizes


def test_draws_repeat_with_their_seed():
    sampler = Hamiltonian(draws=10, warmup=40, leapfrog_steps=4)
    first, again, other = (
        sampler.sample(gaussian, starts(3, 3), seeded(k)).draws for k in (5, 5, 6)
    )
    assert torch.equal(first, again) and not torch.allclose(first, other)


def test_starts_stay_and_keep_chooses():
    start = starts(3, 3)
    copy = start.clone()
    chains = Hamiltonian(draws=9, warmup=0, leapfrog_steps=3).sample(
        gaussian, start.requires_grad_(), seeded(), keep=lambda state: state[:, 2:]
    )
    assert torch.equal(start, copy) and chains.draws.shape == (3, 9, 1)
    assert not chains.draws.requires_grad
    assert torch.equal(chains.draws[:, -1], chains.state[:, 2:])
    single = Hamiltonian(draws=9, warmup=9).sample(gaussian, start.float(), seeded())
    assert single.draws.dtype == single.step_size.dtype == torch.float32


def test_energy_errs_with_the_square_of_the_step():
    state, momentum = starts(20, 2, 1.0), starts(20, 2, 1.0, 3)
    errors = []
    for halvings in range(4):
        size, steps = 0.02 / 2**halvings, 10 * 2**halvings
        unit = torch.ones(2).double()
        start = Point.at(banana, state)
        end, last = leapfrog(banana, start, momentum, torch.full((20,), size), unit, steps)
        energy = momentum.square().sum(1) / 2 - banana(state)
        errors.append((last.square().sum(1) / 2 - end.value - energy).abs().mean())
    ratios = torch.stack(errors[:-1]) / torch.stack(errors[1:])
    assert ((ratios - 4).abs() < 0.3).all(), ratios


def test_leapfrog_is_reversible():
    state, momentum, variance = starts(5, 3), starts(5, 3, 1.0, 3), torch.tensor([1.0, 2, 50])
    size = torch.linspace(0.01, 0.2, 5)
    start = Point.at(gaussian, state)
    end, last = leapfrog(gaussian, start, momentum, size, variance, 7)
    back, _ = leapfrog(gaussian, end, -last, size, variance, 7)
    assert torch.allclose(back.state, state, atol=1e-10)
    assert not torch.allclose(end.state, state, atol=0.1)


def test_gradients_are_those_of_each_chain():
    point = Point.at(gaussian, starts(4, 3))
    assert torch.equal(point.value, gaussian(starts(4, 3)))
    assert torch.allclose(point.gradient, -(starts(4, 3) - MEAN) @ PRECISION)


def test_divergences_are_counted_and_rejected():
    """Beyond 3 the density is not a number."""

    def cliff(state: Tensor) -> Tensor:
        return torch.where(state < 3, -state.square() / 2, math.nan).sum(1)

    chains = Hamiltonian(draws=300, warmup=150, leapfrog_steps=6).sample(
        cliff, starts(8, 1, 0.5), seeded()
    )
    assert chains.draws.max() < 3 and chains.divergences.sum() > 0
    assert chains.log_density.isfinite().all()


def test_refusals():
    with pytest.raises(UserError, match="chain 1 is not finite"):
        bad = torch.tensor([[0.0], [math.nan]])
        Hamiltonian(draws=1).sample(mixture, bad, seeded())
    with pytest.raises(UserError, match="target_acceptance=0"):
        Hamiltonian(target_acceptance=0.0)
    with pytest.raises(UserError, match="leapfrog_steps"):
        Hamiltonian(leapfrog_steps=0)


@pytest.mark.slow
def test_moments_of_pyros_no_u_turn_sampler():
    """Another program's sampler meets the same moments of the banana."""
    infer = pytest.importorskip("pyro.infer")
    import pyro

    pyro.set_rng_seed(0)
    kernel = infer.NUTS(potential_fn=lambda s: -banana(s["x"][None])[0], target_accept_prob=0.9)
    start = {"x": torch.zeros(2, dtype=torch.float64)}
    run = infer.MCMC(kernel, 1000, 300, initial_params=start, disable_progbar=True)
    run.run()
    theirs = run.get_samples()["x"].view(1, -1, 2)
    ours = Hamiltonian(draws=1000, warmup=300, leapfrog_steps=10, target_acceptance=0.9)
    own = ours.sample(banana, starts(16, 2), seeded()).draws
    for power in (1, 2):
        error = np.hypot(mean_error(own**power), mean_error(theirs**power))
        away = (own**power).mean((0, 1)) - (theirs**power).mean((0, 1))
        assert (away.abs() < 5 * torch.as_tensor(error)).all()
