"""Whether chains agree, and how many independent draws theirs are worth.

Formulas of Vehtari, Gelman, Simpson, Carpenter and Buerkner (2021), "Rank-normalization, folding,
and localization". Draws are ``(C, N, P)`` throughout: chains, draws, parameters.
"""

import math

import torch
from scipy.stats import rankdata
from torch import Tensor

from bayesdiff.checks import UserError


def r_hat(draws: Tensor) -> Tensor:
    """Rank-normalised split R-hat ``(P,)``, the larger of location's and scale's.

    1 where chains agree; above 1.01 they have not mixed. NaN for a constant parameter.
    """
    halves = _split(draws)
    folded = (halves - halves.flatten(0, 1).median(0).values).abs()
    return torch.maximum(
        _plain_r_hat(_normal_scores(halves)), _plain_r_hat(_normal_scores(folded))
    )


def bulk_ess(draws: Tensor) -> Tensor:
    """Effective sample size ``(P,)`` of rank-normalised draws: for means and medians."""
    return _ess(_normal_scores(_split(draws)))


def tail_ess(draws: Tensor) -> Tensor:
    """The smaller effective sample size ``(P,)`` of the 5 % and the 95 % quantile."""
    halves = _split(draws)
    flat = halves.flatten(0, 1)
    sizes = [_ess((halves <= flat.quantile(q, 0)).double()) for q in (0.05, 0.95)]
    return torch.minimum(*sizes)


def mean_ess(draws: Tensor) -> Tensor:
    """Effective sample size ``(P,)`` of the draws' own mean, for its Monte Carlo error."""
    return _ess(_split(draws))


def mean_error(draws: Tensor) -> Tensor:
    """Monte Carlo standard error ``(P,)`` of the mean of all draws."""
    flat = draws.double().flatten(0, 1)
    return flat.std(0) / mean_ess(draws).sqrt()


def _split(draws: Tensor) -> Tensor:
    """Each chain as two: one that drifts disagrees with itself."""
    if draws.ndim != 3 or draws.shape[1] < 8:
        shape = tuple(draws.shape)
        raise UserError(f"diagnostics take (chains, 8 draws or more, parameters), got {shape}")
    half = draws.shape[1] // 2
    return torch.cat([draws[:, :half], draws[:, -half:]]).double()


def _normal_scores(draws: Tensor) -> Tensor:
    """Ranks over all chains as quantiles of a standard normal."""
    flat = draws.flatten(0, 1)
    ranks = torch.from_numpy(rankdata(flat.cpu().numpy(), axis=0)).to(flat)
    return torch.special.ndtri((ranks - 0.375) / (len(flat) + 0.25)).view_as(draws)


def _plain_r_hat(draws: Tensor) -> Tensor:
    within, total = _variances(draws)
    return (total / within).sqrt()


def _variances(draws: Tensor) -> tuple[Tensor, Tensor]:
    """Within chains, and of the target as all chains together overestimate it."""
    count = draws.shape[1]
    within = draws.var(1).mean(0)
    between = draws.mean(1).var(0)
    return within, (count - 1) / count * within + between


def _ess(draws: Tensor) -> Tensor:
    chains, count, _ = draws.shape
    within, total = _variances(draws)
    covariance = _autocovariance(draws).mean(0)
    correlation = 1 - (within - covariance * count / (count - 1)) / total
    correlation[0] = 1
    # Sums of neighbours are positive and fall for reversible chains (Geyer 1992): the first
    # negative one ends the sum, and noise may not lift a later one over an earlier.
    pairs = correlation[: count // 2 * 2].view(count // 2, 2, -1).sum(1)
    pairs = pairs * (pairs > 0).cumprod(0)
    time = 2 * pairs.cummin(0).values.sum(0) - 1
    # Antithetic chains beat independent draws, but their estimate is not to be trusted further.
    return chains * count / time.clamp(min=1 / math.log10(chains * count))


def _autocovariance(draws: Tensor) -> Tensor:
    """Of every chain at every lag, ``(C, N, P)``, by the Fourier transform."""
    count = draws.shape[1]
    centred = draws - draws.mean(1, keepdim=True)
    power = torch.fft.rfft(centred, n=2 * count, dim=1).abs().square()
    return torch.fft.irfft(power, n=2 * count, dim=1)[:, :count] / count
