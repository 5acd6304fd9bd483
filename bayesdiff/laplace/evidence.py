"""Log marginal likelihood in closed form, and the prior that maximises it.

Exact for regression; for other likelihoods Laplace's approximation at the trained weights,
``log p(D | m) - 1/2 log det ratio - 1/2 scatter`` (MacKay 1992; Immer et al. 2021, eq. 6).
"""

import math

import torch
from torch import Tensor

from bayesdiff.checks import UserError
from bayesdiff.laplace.record import Curvature


def log_evidence(
    curvature: Curvature, values: Tensor, sigma_noise: Tensor, tau: Tensor, n_eff: float
) -> Tensor:
    """Log marginal likelihood with all constants (Bishop, eq. 3.86); prior mean 0.

    Args:
        curvature: gives residuals and weights.
        values: eigenvalues of the likelihood's precision, ``(..., C_out, P)``.
        sigma_noise: of the likelihood, of a shape that goes with ``...``.
        tau: prior precision, likewise.
        n_eff: images the likelihood counts.

    Returns:
        Float64 ``(...)``.
    """
    log_likelihood = _log_likelihood(curvature, sigma_noise)
    # log det of posterior over prior precision, for all channels
    log_ratio = torch.log1p(values / tau[..., None, None]).sum((-2, -1))
    scatter = tau * curvature.mean.square().sum()
    return n_eff / curvature.num_images * log_likelihood - 0.5 * (log_ratio + scatter)


def _log_likelihood(curvature: Curvature, sigma_noise: Tensor) -> Tensor:
    """Of the trained weights; one without a noise level is the same at all of them."""
    if not curvature.scaled:
        return torch.full_like(sigma_noise, -0.5 * curvature.squared_error)
    log_likelihood = -0.5 * curvature.squared_error / sigma_noise.square()
    return log_likelihood - curvature.num_outputs * (sigma_noise * math.sqrt(math.tau)).log()


def best_prior(mean: Tensor, values: Tensor) -> float:
    """The tau that maximises the evidence: ``tau |m|^2 = sum a / (a + tau)`` over channels.

    The left side rises and the right side falls in tau, so the root is the only one (Bishop,
    eq. 3.92).

    Args:
        mean: weights ``(C_out, P)``.
        values: eigenvalues of the likelihood's precision, ``(C_out, P)``.

    Raises:
        UserError: if the evidence has no maximum at a finite tau above zero.

    Example:
        >>> mean = torch.full((1, 4), 2.0, dtype=torch.float64)
        >>> data = torch.full((1, 4), 1e9, dtype=torch.float64)  # that say all there is to say
        >>> round(best_prior(mean, data), 6)  # the mean square of the weights is 1 / tau
        0.25
    """
    squares = float(mean.square().sum())
    if squares <= 0 or float(values.max()) <= 0:
        raise UserError(
            "prior_precision=evidence needs non-zero head weights and features; give a number"
        )

    def slope(log_tau: float) -> float:
        tau = math.exp(log_tau)
        return tau * squares - float((values / (values + tau)).sum())

    high = math.log(mean.numel() / squares)
    low = high - 1
    while slope(low) > 0:
        low -= 10
    from scipy.optimize import brentq

    return math.exp(brentq(slope, low, high + 1e-9, xtol=1e-13, rtol=1e-13))
