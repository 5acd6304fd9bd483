"""Weights of a mixture behind a map: joint and collapsed posteriors against exact ones."""

import math

import pytest
import torch
from scipy.special import gammaln
from torch import Tensor
from torch.distributions import Dirichlet, MultivariateNormal, Normal

from bayesdiff.checks import UserError
from bayesdiff.studies.inference.collapsed import component_likelihood, linear_likelihood
from bayesdiff.studies.inference.diagnostics import mean_error, r_hat
from bayesdiff.studies.inference.hamiltonian import Hamiltonian
from bayesdiff.studies.inference.mixture import JointPosterior, LatentMixture, jacobian
from bayesdiff.studies.inference.ranks import ranks_of, uniformity
from bayesdiff.studies.inference.simplex import (
    free_of,
    grid_posterior,
    log_posterior,
    log_prior,
    log_weights,
)

SLOPE = torch.tensor([[4 / 3, 0.0], [0.0, 0.7]]).double()
MEANS = torch.tensor([[0.0, 0.0], [-0.05, 0.0], [0.05, 0.0]]).double()
SCALES = torch.tensor([[0.75, 0.75], [0.1, 1.0], [1.0, 0.1]]).double()
TRUTH = torch.tensor([0.5, 0.25, 0.25]).double()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear(z: Tensor) -> Tensor:
    return z @ SLOPE.mT


def bent(z: Tensor) -> Tensor:
    """Shears twice, so that no coordinate stays straight; volumes change too."""
    first = z[:, :1] + 0.4 * z[:, 1:].square()
    return torch.cat([first, 1.3 * z[:, 1:] + 0.3 * first.sin()], 1)


def straight(x: Tensor) -> Tensor:
    second = (x[:, 1:] - 0.3 * x[:, :1].sin()) / 1.3
    return torch.cat([x[:, :1] - 0.4 * second.square(), second], 1)


LINEAR = LatentMixture(MEANS, SCALES, linear, 0.1)
BENT = LatentMixture(MEANS, SCALES, bent, 0.1)


def observed(count: int, seed: int = 0, mixture: LatentMixture = LINEAR) -> Tensor:
    return mixture.draw(TRUTH, count, seeded(seed))[1]


def encoded(x: Tensor) -> Tensor:
    return x @ SLOPE.inverse().mT


def matches(weights: Tensor, log_likelihood: Tensor) -> None:
    """Means and standard deviations of draws are the grid's: 0.1 sd and Monte Carlo error."""
    grid = grid_posterior(log_likelihood)
    assert r_hat(weights).max() < 1.03
    away = (weights.mean((0, 1)) - grid.mean).abs()
    assert (away < 0.1 * grid.deviation + 5 * mean_error(weights)).all(), away / grid.deviation
    spread = (weights - grid.mean).square()
    error = (spread.mean((0, 1)) - grid.deviation.square()).abs()
    assert (error < 0.1 * grid.deviation.square() + 5 * mean_error(spread)).all()


def test_the_grid_has_the_moments_of_dirichlets():
    """All components of each observation known: the posterior is Dirichlet(1 + counts)."""
    for counts in ([3, 0, 5], [40, 12, 8], [2, 9]):
        known = torch.cat([torch.eye(len(counts))[k].repeat(c, 1) for k, c in enumerate(counts)])
        grid = grid_posterior(known.double().log())
        exact = Dirichlet(torch.tensor(counts).double() + 1)
        assert torch.allclose(grid.mean, exact.mean, atol=2e-4)
        assert torch.allclose(grid.deviation, exact.variance.sqrt(), atol=5e-4)
        size = len(counts)
        evidence = gammaln(size) + sum(gammaln(c + 1) for c in counts)
        assert grid.log_evidence == pytest.approx(evidence - gammaln(size + sum(counts)), abs=0.02)


def test_the_toy_problem_is_as_hard_as_published():
    x = observed(2000)
    grid = grid_posterior(linear_likelihood(LINEAR, SLOPE, x))
    assert grid.deviation.tolist() == pytest.approx([0.020, 0.014, 0.016], rel=0.12)
    assert ((grid.mean - TRUTH).abs() < 3 * grid.deviation).all()
    assert float(grid.mass.sum()) == pytest.approx(1)


def test_likelihoods_of_a_linear_map_have_normal_densities():
    x = observed(5)
    for k in range(3):
        covariance = SLOPE @ SCALES[k].square().diag() @ SLOPE.mT + 0.01 * torch.eye(2)
        exact = MultivariateNormal(SLOPE @ MEANS[k], covariance).log_prob(x)
        assert torch.allclose(linear_likelihood(LINEAR, SLOPE, x)[:, k], exact)


def test_free_weights_and_their_prior():
    free = torch.randn(7, 2, generator=seeded()).double()
    logs = log_weights(free)
    assert torch.allclose(logs.exp().sum(-1), torch.ones(7).double())
    assert torch.allclose(free_of(logs.exp()), free)
    for row, prior in zip(free, log_prior(logs), strict=True):
        change = torch.autograd.functional.jacobian(lambda u: log_weights(u).exp()[:2], row)
        uniform = Dirichlet(torch.ones(3).double()).log_prob(torch.ones(3).double() / 3)
        assert float(prior) == pytest.approx(float(uniform + torch.linalg.slogdet(change)[1]))


def test_the_joint_density_is_the_product_of_its_parts():
    x = observed(4, mixture=BENT)
    joint = JointPosterior(BENT, x, straight(x))
    state = joint.start(3, seeded())
    free, z = joint.unpack(state)
    for row in range(3):
        weights = log_weights(free[row]).exp()
        total = float(log_prior(weights.log()))
        for n in range(4):
            parts = Normal(MEANS, SCALES).log_prob(z[row, n]).sum(-1).exp()
            seen = Normal(bent(z[row, n : n + 1])[0], 0.1).log_prob(x[n]).sum()
            change = torch.autograd.functional.jacobian(
                lambda s, n=n: joint.unpack(s)[1][0, n], state[row : row + 1]
            )[:, 0, 2 + 2 * n : 4 + 2 * n]
            volume = torch.linalg.slogdet(change)[1]
            total += float((weights * parts).sum().log() + seen + volume)
        assert float(joint(state)[row]) == pytest.approx(total)


def test_residuals_are_of_unit_scale_whatever_the_map_stretches():
    """With a single Gaussian and a linear map they are standard normal, exactly."""
    slope = torch.tensor([[1e-3, 0.0], [0.5, 20.0]]).double()
    single = LatentMixture(MEANS[:1], SCALES[:1], lambda z: z @ slope.mT, 0.1)
    x = single.draw(torch.ones(1).double(), 6, seeded())[1]
    joint = JointPosterior(single, x, x @ slope.inverse().mT)
    state = torch.randn(9, 12, generator=seeded()).double()
    rest = joint(state) + state.square().sum(1) / 2
    assert torch.allclose(rest, rest[:1].expand(9), atol=1e-6)
    exact = linear_likelihood(single, slope, x).sum() - 6 * math.log(2 * math.pi)
    assert float(rest[0]) == pytest.approx(float(exact), abs=1e-6)


def test_starts_are_from_the_prior_and_spread():
    joint = JointPosterior(LINEAR, observed(3), encoded(observed(3)))
    start = joint.start(4000, seeded())
    weights = log_weights(joint.unpack(start)[0]).exp()
    assert weights.mean(0).tolist() == pytest.approx([1 / 3] * 3, abs=0.02)
    assert weights.std(0).tolist() == pytest.approx([math.sqrt(1 / 18)] * 3, abs=0.02)
    assert joint(start).isfinite().all()


def test_all_latents_at_once_give_the_posterior_of_the_weights():
    x = observed(100, 1)
    joint = JointPosterior(LINEAR, x, encoded(x))
    chains = Hamiltonian(draws=250, warmup=120, leapfrog_steps=10).sample(
        joint, joint.start(8, seeded()), seeded(2), keep=lambda state: state[:, :2]
    )
    assert chains.draws.shape == (8, 250, 2)
    matches(log_weights(chains.draws).exp(), linear_likelihood(LINEAR, SLOPE, x))


def test_weights_alone_give_their_posterior():
    x = observed(300, 2)
    likelihood = component_likelihood(LINEAR, x, encoded(x), seeded(3)).log_likelihood
    start = torch.randn(16, 2, generator=seeded()).double()
    chains = Hamiltonian(draws=250, warmup=100, leapfrog_steps=6).sample(
        lambda free: log_posterior(likelihood, free), start, seeded(4)
    )
    matches(log_weights(chains.draws).exp(), linear_likelihood(LINEAR, SLOPE, x))


def test_likelihoods_by_importance_are_exact_for_a_linear_map():
    x = observed(50)
    exact = linear_likelihood(LINEAR, SLOPE, x)
    # Wherever the search for the mode begins.
    for start in (encoded(x), encoded(x) + 0.3):
        found = component_likelihood(LINEAR, x, start, seeded(), draws=2, inflation=1.0)
        assert torch.allclose(found.log_likelihood, exact, atol=1e-9)
        assert torch.allclose(found.efficiency, torch.ones_like(exact))
    wide = component_likelihood(LINEAR, x, encoded(x), seeded(), draws=4000, inflation=1.3)
    assert (wide.log_likelihood - exact).abs().max() < 0.06
    # E[w]^2 / E[w^2] = ((2 s^2 - 1) / s^4)^(D/2) for a proposal s times too wide.
    assert wide.efficiency.mean().item() == pytest.approx((2 * 1.69 - 1) / 1.69**2, abs=0.01)


def test_likelihoods_by_importance_of_a_bent_map_against_quadrature():
    x = observed(12, 5, BENT)
    assert torch.allclose(straight(bent(x)), x)
    axis = torch.linspace(-4.5, 4.5, 451).double()
    z = torch.cartesian_prod(axis, axis)
    cell = float(axis[1] - axis[0]) ** 2
    prior = BENT.log_components(z)
    seen = Normal(bent(z)[:, None], 0.1).log_prob(x).sum(-1)
    exact = torch.stack([torch.logsumexp(seen + p[:, None], 0) for p in prior.T], 1)
    exact += math.log(cell)
    found = component_likelihood(BENT, x, straight(x), seeded(), draws=4000)
    likely = exact > exact.amax(1, keepdim=True) - 8
    assert likely.sum() > 20
    assert (found.log_likelihood - exact)[likely].abs().max() < 0.06
    assert found.efficiency[likely].min() > 0.3


def test_chunks_of_observations_are_their_own(monkeypatch):
    from bayesdiff.studies.inference import collapsed

    x = observed(9)
    monkeypatch.setattr(collapsed, "_POINTS", 3 * 8 * 2)
    found = component_likelihood(LINEAR, x, encoded(x), seeded(), draws=8, inflation=1.0)
    assert torch.allclose(found.log_likelihood, linear_likelihood(LINEAR, SLOPE, x))


def test_jacobians_of_every_point():
    z = torch.randn(4, 2, generator=seeded()).double()
    slow = [torch.autograd.functional.jacobian(lambda p: bent(p[None])[0], p) for p in z]
    assert torch.allclose(jacobian(bent, z), torch.stack(slow))


def test_ranks_of_calibrated_posteriors_are_uniform():
    """theta ~ N(0, 1), x ~ N(theta, 1): the posterior is N(x / 2, 1 / 2)."""
    truth, noise = (torch.randn(2000, 1, generator=seeded(k)).double() for k in (0, 1))
    normal = torch.randn(2000, 99, 1, generator=seeded(2)).double()
    centre = (truth + noise)[:, None] / 2

    def p_value(width: float, shift: float = 0.0) -> float:
        ranks = ranks_of(centre + shift + width * math.sqrt(0.5) * normal, truth)
        assert ranks.min() >= 0 and ranks.max() <= 99
        return float(uniformity(ranks, 99))

    assert p_value(1.0) > 0.01
    assert p_value(0.7) < 1e-6 and p_value(1.4) < 1e-6 and p_value(1.0, 0.15) < 1e-6


def test_ranks_of_the_weights_of_small_data_sets_are_uniform():
    """Prior, data, posterior: what exact inference on 200 sets of 30 observations must pass."""
    generator = seeded(7)
    exponential = -torch.rand(200, 3, generator=generator).double().log()
    truths = exponential / exponential.sum(1, keepdim=True)
    samples = []
    for weights in truths:
        x = LINEAR.draw(weights, 30, generator)[1]
        grid = grid_posterior(linear_likelihood(LINEAR, SLOPE, x), 60)
        samples.append(grid.draw(19, generator))
    ranks = ranks_of(torch.stack(samples), truths)
    assert (uniformity(ranks, 19) > 0.01).all()


def test_p_values_of_uniform_ranks_are_uniform():
    ranks = torch.randint(0, 20, (400, 500), generator=seeded(3))
    p = uniformity(ranks, 19)
    assert p.shape == (500,)
    for level in (0.05, 0.5):
        assert float((p < level).double().mean()) == pytest.approx(level, abs=0.07)


def test_refusals():
    with pytest.raises(UserError, match="noise must be positive"):
        LatentMixture(MEANS, SCALES, linear, 0.0)
    with pytest.raises(UserError, match="scales must be positive"):
        LatentMixture(MEANS, -SCALES, linear, 0.1)
    with pytest.raises(UserError, match="2 or 3 components, got 4"):
        grid_posterior(torch.zeros(1, 4))
    with pytest.raises(UserError, match="bins=10 must divide draws . 1 = 101"):
        uniformity(torch.zeros(100, 1).long(), 100)
    with pytest.raises(UserError, match="too few"):
        uniformity(torch.zeros(9, 1).long(), 99)
