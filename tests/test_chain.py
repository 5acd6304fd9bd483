"""The sampler of the head against closed forms: regression, a quartic density, autoregression."""

import math

import pytest
import torch
from hand import curvature_of
from torch import nn

from bayesdiff.checks import UserError
from bayesdiff.laplace.chain import effective_draws, sample_chains, scale_reduction
from bayesdiff.laplace.head import apply_head
from bayesdiff.laplace.posterior import HeadPosterior

SIGMA, TAU = 0.5, 3.0


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def regression():
    """A head, its data, and the closed form at weights that are not the optimum."""
    torch.manual_seed(0)
    head = nn.Conv2d(2, 2, 1).double().requires_grad_(False)
    features = torch.randn(3, 2, 2, 2, dtype=torch.float64)
    features[:, 1] += features[:, 0]
    target = torch.randn(3, 2, 2, 2, dtype=torch.float64)
    residual = head(features) - target
    curvature = curvature_of(head, features, residual)
    posterior = HeadPosterior.fit(curvature, sigma_noise=SIGMA, prior_precision=TAU)

    def loss(weights):
        error = apply_head(head, features[None], weights) - target
        fit = error.square().sum((1, 2, 3, 4)) / (2 * SIGMA**2)
        return fit + TAU / 2 * weights.square().sum((1, 2))

    return loss, posterior


def run(loss, posterior, root, draws=250, **options):
    start = posterior.draw(80, seeded(1))
    return sample_chains(loss, start, root, draws=draws, warmup=20, generator=seeded(), **options)


def scores(draws, posterior):
    """How many standard errors mean and covariance of all weights are off, at most.

    The error of a Gaussian's covariance from n draws is ``(S_ij^2 + S_ii S_jj) / n`` squared.
    """
    flat = draws.flatten(2).flatten(0, 1)
    truth = torch.block_diag(posterior.covariance, posterior.covariance)
    variances = truth.diagonal()
    n = effective_draws(draws).flatten()
    mean = (flat.mean(0) - posterior.optimum.flatten()) / (variances / n).sqrt()
    squares = effective_draws((draws - draws.mean((0, 1))).square()).min()
    error = ((truth.square() + torch.outer(variances, variances)) / squares).sqrt()
    return float(mean.abs().max()), float(((flat.T.cov() - truth) / error).abs().max())


@pytest.mark.parametrize("precondition", ["posterior", "roughly"])
def test_the_chain_of_a_regression_has_the_mean_and_covariance_of_the_closed_form(precondition):
    loss, posterior = regression()
    root = torch.linalg.cholesky(posterior.covariance)
    if precondition == "roughly":  # what the chain finds does not come from this
        root = 1.3 * posterior.covariance.diagonal().sqrt().diag()
    chains = run(loss, posterior, root)
    assert chains.draws.shape == (250, 80, 2, 3)
    mean, covariance = scores(chains.draws, posterior)
    assert mean < 4 and covariance < 4
    assert float(scale_reduction(chains.draws).max()) < 1.01
    assert 0.6 < float(chains.acceptance.mean()) < 1
    assert float(effective_draws(chains.draws).min()) > 4000


def test_the_comparison_tells_a_wrong_noise_level_and_the_trained_mean_from_the_posterior():
    loss, posterior = regression()
    root = torch.linalg.cholesky(posterior.covariance)
    draws = run(lambda weights: 1.1 * loss(weights), posterior, root).draws
    assert scores(draws, posterior)[1] > 4
    gap = posterior.curvature.mean - posterior.optimum
    assert float((gap / posterior.covariance.diagonal().sqrt()).abs().max()) > 0.5
    assert posterior.distance > 0.3


def test_a_coarse_step_costs_proposals_and_no_accuracy():
    """Without the correction, one step of 1.2 on a Gaussian has a variance of 1.56."""
    start = torch.randn(400, 1, 1, dtype=torch.float64, generator=seeded(1))
    chains = sample_chains(
        lambda w: w.square().sum((1, 2)) / 2,
        start,
        torch.eye(1).double(),
        draws=100,
        warmup=20,
        generator=seeded(),
        step=1.2,
        length=1.2,
    )
    assert 0.5 < float(chains.acceptance.mean()) < 0.95
    assert float(chains.draws.var()) == pytest.approx(1, abs=0.03)


def test_a_density_that_is_no_gaussian():
    """exp(-w^4): the mean of w^2 is Gamma(3/4) / Gamma(1/4), the mean of w^4 is 1/4."""
    start = torch.zeros(300, 1, 1, dtype=torch.float64)
    chains = sample_chains(
        lambda w: w.pow(4).sum((1, 2)),
        start,
        torch.tensor([[0.6]]).double(),
        draws=150,
        warmup=20,
        generator=seeded(),
        step=0.5,
    )
    for power, truth in ((2, math.gamma(0.75) / math.gamma(0.25)), (4, 0.25)):
        moments = chains.draws.pow(power)
        error = float(moments.std() / effective_draws(moments).sqrt())
        assert error < 0.02 * truth
        assert abs(float(moments.mean()) - truth) < 4 * error


def test_paths_that_run_off_are_refused_and_those_inside_a_wall_stay():
    """A half normal, whose loss is not a number beyond the wall."""
    start = torch.ones(200, 1, 1, dtype=torch.float64)

    def loss(weights):
        w = weights.sum((1, 2))
        return torch.where(w > 0, w.square() / 2, math.nan)

    options = {"draws": 200, "warmup": 20, "step": 0.5}
    root = torch.eye(1).double()
    chains = sample_chains(loss, start, root, generator=seeded(), **options)
    assert bool((chains.draws > 0).all()) and 0.2 < float(chains.acceptance.mean()) < 0.9
    assert float(chains.draws.mean()) == pytest.approx(math.sqrt(2 / math.pi), rel=0.03)
    with pytest.raises(UserError, match="not finite where the chains start"):
        sample_chains(loss, -start, root, generator=seeded(), **options)


def test_the_generator_fixes_all_draws_and_each_chain_has_its_own():
    loss, posterior = regression()
    root = torch.linalg.cholesky(posterior.covariance)
    one, two = (run(loss, posterior, root, draws=4).draws for _ in range(2))
    assert torch.equal(one, two)
    assert len(one[-1].flatten(1).unique(dim=0)) == 80
    for options, words in (
        ({"step": 0.0}, "step"),
        ({"length": -1.0}, "length"),
        ({"draws": 0}, "draws"),
    ):
        with pytest.raises(UserError, match=words):
            run(loss, posterior, root, **options)


def autoregression(rate, count=4000, chains=8):
    """Chains of variance 1 in which neighbours have this correlation, ``(S, K)``."""
    noise = torch.randn(count, chains, dtype=torch.float64, generator=seeded())
    rows = [noise[0]]
    for row in noise[1:]:
        rows.append(rate * rows[-1] + math.sqrt(1 - rate**2) * row)
    return torch.stack(rows)


@pytest.mark.parametrize("rate", [-0.4, 0.0, 0.6, 0.9])
def test_effective_draws_of_an_autoregression(rate):
    """(1 - r) / (1 + r) of all, more than all where neighbours lie on opposite sides."""
    draws = autoregression(rate)
    expected = draws.numel() * (1 - rate) / (1 + rate)
    assert float(effective_draws(draws)) == pytest.approx(expected, rel=0.1)
    several = effective_draws(torch.stack([draws, 5 - 3 * draws], 2))
    torch.testing.assert_close(several, effective_draws(draws).expand(2))


def test_chains_that_never_met_count_for_little():
    draws = autoregression(0.0, count=500)
    apart = draws + 3 * torch.arange(8)
    assert float(effective_draws(apart)) < 20 < float(effective_draws(draws))
    assert float(scale_reduction(apart)) > 3
    assert float(scale_reduction(draws)) == pytest.approx(1, abs=0.01)
    alone = float(effective_draws(autoregression(0.6, chains=1)))
    assert alone == pytest.approx(4000 / 4, rel=0.2)
