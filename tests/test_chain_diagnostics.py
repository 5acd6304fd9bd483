"""R-hat and effective sample sizes against closed forms and a slow reading of the paper."""

import math

import pytest
import torch
from scipy.stats import norm, rankdata
from torch import Tensor

from bayesdiff.checks import UserError
from bayesdiff.studies.inference.diagnostics import (
    bulk_ess,
    mean_error,
    mean_ess,
    r_hat,
    tail_ess,
)


def normals(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def autoregressive(rho: float, chains: int = 8, count: int = 4000) -> Tensor:
    """x_t = rho x_(t-1) + sqrt(1 - rho**2) e_t, stationary: (C, N, 1)."""
    noise = normals(chains, count)
    x = [noise[:, 0]]
    for t in range(1, count):
        x.append(rho * x[-1] + math.sqrt(1 - rho**2) * noise[:, t])
    return torch.stack(x, 1)[..., None]


def slow_r_hat(chains: list[list[float]]) -> float:
    """Of one parameter, a loop over split chains."""
    half = len(chains[0]) // 2
    split = [part for c in chains for part in (c[:half], c[-half:])]
    flat = sorted(x for part in split for x in part)
    middle = flat[(len(flat) - 1) // 2]
    values = []
    for shape in (lambda x: x, lambda x: abs(x - middle)):
        numbers = [[shape(x) for x in part] for part in split]
        ranks = rankdata([x for part in numbers for x in part])
        scores = norm.ppf((ranks - 3 / 8) / (len(ranks) + 1 / 4)).reshape(len(split), half)
        within = scores.var(1, ddof=1).mean()
        between = half * scores.mean(1).var(ddof=1)
        values.append(math.sqrt(((half - 1) / half * within + between / half) / within))
    return max(values)


def test_r_hat_against_the_formulas():
    draws = normals(3, 21, 2).exp()
    draws[1] += 0.7
    draws[2] *= 3
    slow = [slow_r_hat(draws[..., p].tolist()) for p in range(2)]
    assert r_hat(draws).tolist() == pytest.approx(slow, abs=1e-12)


def test_r_hat_tells_stuck_chains():
    mixed = normals(4, 500, 3)
    assert (r_hat(mixed) - 1).abs().max() < 0.01
    apart = mixed + torch.arange(4)[:, None, None]
    assert r_hat(apart).min() > 1.5
    # Equal locations, other scales: only the folded draws tell.
    wide = mixed * torch.tensor([1, 1, 1, 6])[:, None, None]
    assert r_hat(wide).min() > 1.1 and r_hat(5 + wide).min() > 1.1
    # One chain that drifts disagrees with itself.
    drift = normals(1, 500, 1) + torch.linspace(0, 5, 500)[:, None]
    assert r_hat(drift) > 1.5
    # Of one and the same value in each chain there is no variance within.
    assert r_hat(torch.arange(4.0)[:, None, None].expand(4, 20, 1)).item() == math.inf


def test_r_hat_minds_no_monotone_map_and_no_infinite_variance():
    draws = normals(4, 300, 1)
    cauchy = torch.tan(math.pi * (torch.special.ndtr(draws) - 0.5))
    assert bulk_ess(cauchy).item() == pytest.approx(bulk_ess(draws).item(), rel=1e-6)
    assert r_hat(cauchy).item() < 1.02


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9, -0.4])
def test_ess_of_autoregressive_chains(rho):
    draws = autoregressive(rho)
    exact = draws.shape[0] * draws.shape[1] * (1 - rho) / (1 + rho)
    assert mean_ess(draws).item() == pytest.approx(exact, rel=0.12)
    # Of normal draws, rank normalisation changes nothing.
    assert bulk_ess(draws).item() == pytest.approx(mean_ess(draws).item(), rel=0.03)


def slow_ess(chains: list[list[float]]) -> float:
    """Of one parameter's own values: Geyer's sums of pairs, lag by lag."""
    half = len(chains[0]) // 2
    split = torch.tensor([part for c in chains for part in (c[:half], c[-half:])]).double()
    within, between = split.var(1).mean(), split.mean(1).var()
    total = (half - 1) / half * within + between

    def correlation(lag: int) -> float:
        centred = split - split.mean(1, keepdim=True)
        covariance = (centred[:, : half - lag] * centred[:, lag:]).sum(1).mean() / (half - 1)
        return float(1 - (within - covariance) / total) if lag else 1.0

    time, least = -1.0, math.inf
    for lag in range(0, half // 2 * 2, 2):
        pair = correlation(lag) + correlation(lag + 1)
        if pair <= 0:
            break
        least = min(least, pair)
        time += 2 * least
    return split.numel() / time


def test_ess_against_the_formulas():
    for rho, count in ((0.7, 60), (0.95, 101), (0.3, 20)):
        draws = autoregressive(rho, 3, count)
        assert mean_ess(draws).item() == pytest.approx(slow_ess(draws[..., 0].tolist()))


def test_ess_of_quantiles():
    """Indicators of an AR(1) at 5 % have correlations of the bivariate normal."""
    rho, draws = 0.8, autoregressive(0.8)
    z = norm.ppf(0.05)
    lags = [torch.tensor(rho) ** k for k in range(1, 60)]
    inner = [_both_below(z, float(r)) for r in lags]
    time = 1 + 2 * sum((p - 0.05**2) / (0.05 * 0.95) for p in inner)
    exact = draws.shape[0] * draws.shape[1] / time
    assert tail_ess(draws).item() == pytest.approx(exact, rel=0.15)


def _both_below(z: float, rho: float) -> float:
    x = torch.linspace(-9, z, 4001, dtype=torch.float64)
    inner = torch.special.ndtr((z - rho * x) / math.sqrt(1 - rho**2))
    return float(torch.trapezoid(inner * torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi), x))


def test_errors_of_means_are_their_spread():
    """Over 400 replications of short chains."""
    draws = autoregressive(0.7, chains=800, count=300).view(400, 2, 300).movedim(0, -1)
    means = draws.mean((0, 1))
    assert mean_error(draws).mean().item() == pytest.approx(means.std().item(), rel=0.15)


def test_each_parameter_by_itself():
    draws = torch.cat([autoregressive(r, 4, 200) for r in (0.0, 0.9)], -1)
    for each in (r_hat, bulk_ess, tail_ess, mean_ess, mean_error):
        alone = [each(draws[..., p : p + 1]).item() for p in range(2)]
        assert each(draws).tolist() == pytest.approx(alone)
        assert each(draws.float()).dtype == torch.float64


def test_too_few_draws_are_refused():
    for shape in ((4, 7, 1), (100, 3)):
        with pytest.raises(UserError, match="8 draws or more"):
            r_hat(torch.zeros(shape))
