"""Simulation-based calibration (Talts et al. 2018): ranks of truths among posterior draws."""

import torch
from scipy.stats import chi2
from torch import Tensor

from bayesdiff.checks import UserError


def ranks_of(samples: Tensor, truth: Tensor) -> Tensor:
    """How many draws lie below the truth, ``(R, P)`` from 0 to S.

    Uniform if truths come from the prior, data from the truths, and the draws from the posterior.
    They must be independent: thin a chain by its autocorrelation first.

    Args:
        samples: of R posteriors, ``(R, S, P)``.
        truth: ``(R, P)``.
    """
    return (samples < truth[:, None]).sum(1)


def uniformity(ranks: Tensor, draws: int, bins: int = 10) -> Tensor:
    """Chi-square p-value ``(P,)`` of ranks ``(R, P)`` that should be uniform on 0 to ``draws``.

    Raises:
        UserError: if bins do not hold equally many ranks, or expect fewer than 5 each.
    """
    replications = len(ranks)
    if bins < 2 or (draws + 1) % bins:
        raise UserError(f"bins={bins} must divide draws + 1 = {draws + 1}")
    if replications < 5 * bins:
        raise UserError(f"{replications} ranks are too few for {bins} bins; 5 per bin are needed")
    place = ranks * bins // (draws + 1)
    counts = torch.nn.functional.one_hot(place, bins).sum(0).double()
    expected = replications / bins
    statistic = ((counts - expected).square() / expected).sum(-1)
    return torch.from_numpy(chi2.sf(statistic.cpu().numpy(), bins - 1))
