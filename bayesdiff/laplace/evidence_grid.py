"""Evidence and effective parameters for every sigma_noise and prior_precision at once.

With e the eigenvalues of the likelihood's precision, such as ``c lambda / sigma^2`` with lambda
those of the Gram matrix and c = n_eff / num_images, and m the trained weights of all channels,

    log Z = c log p(data | m, sigma) - (sum log(1 + e / tau) + tau |m|^2) / 2,

so that one eigendecomposition serves a whole grid, and its maximum is the root of one equation
(Bishop, "Pattern Recognition and Machine Learning", 2006, eq. 3.86-3.95).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bayesdiff.checks import UserError
from bayesdiff.laplace.evidence import log_evidence
from bayesdiff.laplace.posterior import HeadPosterior

_DECADES = 3  # of the evidence curve beyond its marks
_PER_DECADE = 10


@dataclass(frozen=True)
class EvidenceGrid:
    """What a grid of settings does to the posterior of one structure.

    Attributes:
        sigma_noise: ``(S,)``.
        prior_precision: ``(T,)``.
        log_evidence: ``(S, T)`` float64, NaN where float64 cannot invert the precision, or the
            structure has no evidence.
        effective_parameters: ``(S, T)`` float64, of one output channel; NaN where float64 cannot
            invert the precision.
    """

    sigma_noise: Tensor
    prior_precision: Tensor
    log_evidence: Tensor
    effective_parameters: Tensor


def evidence_grid(
    posterior: HeadPosterior, sigma_noise: Sequence[float], prior_precision: Sequence[float]
) -> EvidenceGrid:
    """Both numbers for every cell, in closed form.

    Args:
        posterior: gives curvature, structure and n_eff.
        sigma_noise: S noise levels, in units of the network's output; a likelihood that has none
            is the same at all of them.
        prior_precision: T precisions.
    """
    curvature = posterior.curvature
    sigmas = torch.tensor(list(sigma_noise), dtype=torch.float64)
    taus = torch.tensor(list(prior_precision), dtype=torch.float64)
    e, tau = likelihood_precisions(posterior, sigmas)[:, None], taus[:, None, None]
    evidence = log_evidence(curvature, e, sigmas[:, None], taus, posterior.n_eff)
    effective = (e / (e + tau)).sum((-2, -1)) / curvature.shape[0]
    known = resolved(e + tau)
    meant = known & posterior.has_evidence
    return EvidenceGrid(
        sigmas, taus, evidence.where(meant, torch.nan), effective.where(known, torch.nan)
    )


def likelihood_precisions(posterior: HeadPosterior, sigma_noise: Tensor) -> Tensor:
    """Eigenvalues ``(K, C_out, P)`` of the likelihood's precision at noise levels ``(K,)``."""
    levels, which = sigma_noise.double().unique(return_inverse=True)
    shape = posterior.curvature.shape
    found = [replace(posterior, sigma_noise=s).eigenvalues.expand(shape) for s in levels.tolist()]
    return torch.stack(found)[which]


def resolved(precisions: Tensor) -> Tensor:
    """Which precision matrices float64 can invert, from their eigenvalues ``(..., C_out, P)``."""
    bound = precisions.shape[-1] * torch.finfo(torch.float64).eps
    return precisions.amin((-2, -1)) > bound * precisions.amax((-2, -1))


def best_settings(posterior: HeadPosterior) -> HeadPosterior:
    """The posterior at the sigma_noise and the prior_precision that maximise the evidence jointly.

    With ``rho = tau sigma^2`` and ``gamma(rho)`` the effective parameters of all channels, both
    derivatives vanish where

        tau |m|^2 = gamma,    sigma^2 = c error / (c outputs - gamma).

    Their product is an equation in rho, whose right side falls: the root is the only one.

    Raises:
        UserError: for a structure whose law in sigma_noise is another, weights or features that
            are zero, a perfect fit, or fewer residuals than weights.
    """
    curvature = posterior.curvature
    values, twice = likelihood_precisions(posterior, torch.tensor([1.0, 2.0]))
    if not (posterior.has_evidence and torch.allclose(values, 4 * twice, rtol=1e-12, atol=0)):
        raise UserError(
            f"laplace.structure={posterior.structure} has no evidence in which sigma_noise enters"
            " as in exact regression; use full"
        )
    squares = float(curvature.mean.square().sum())
    weight = posterior.n_eff / curvature.num_images
    error, outputs = weight * curvature.squared_error, weight * curvature.num_outputs
    most = int((values > 0).sum())
    if squares <= 0 or most == 0 or error <= 0:
        raise UserError("the evidence has no maximum: head, features or residuals are all zero")
    if outputs <= most:
        raise UserError(
            f"the evidence has no maximum in sigma_noise: {outputs:g} residuals count for {most}"
            " weights; use more images, or raise laplace.n_eff"
        )

    def settings(rho: float) -> tuple[float, float]:
        gamma = float((values / (values + rho)).sum())
        return math.sqrt(error / (outputs - gamma)), gamma / squares

    def slope(log_rho: float) -> float:
        sigma, tau = settings(math.exp(log_rho))
        return log_rho - math.log(tau * sigma**2)

    high = math.log(most / squares * error / (outputs - most)) + 1e-9
    low = high - 1
    while slope(low) > 0:
        low -= 10
    from scipy.optimize import brentq

    sigma, tau = settings(math.exp(brentq(slope, low, high, xtol=1e-13, rtol=1e-13)))
    return replace(posterior, sigma_noise=sigma, prior_precision=tau)


@dataclass(frozen=True)
class SeparatePriors:
    """Prior precisions of the head's weights and of its bias that maximise the evidence.

    Attributes:
        weights: precision of all weights but the bias.
        bias: precision of the bias.
        log_evidence: at these two, and the posterior's sigma_noise.
    """

    weights: float
    bias: float
    log_evidence: float


def separate_priors(posterior: HeadPosterior) -> SeparatePriors:
    """A prior for the weights and one for the bias, by evidence, in closed form but for one root.

    Another precision of the bias is a change of rank one: with q the bias' posterior variance
    under the weights' tau alone, the determinant gets a factor ``1 + (tau_b - tau) q``. For
    given tau the best tau_b solves ``tau_b^2 + r tau_b = C r / |m_b|^2`` with ``r = 1/q - tau``.

    Raises:
        UserError: for a structure without evidence or with channels that differ, a head without
            bias, or zero weights.
    """
    curvature = posterior.curvature
    if not posterior.has_evidence or posterior.eigenvalues.ndim > 1:
        raise UserError(
            f"no separate priors for laplace.structure={posterior.structure}; use full"
        )
    if not curvature.geometry.bias:
        raise UserError("separate priors need a head with a bias; this one has none")
    squares = curvature.mean.square().sum(0)
    of_weights, of_bias = float(squares[:-1].sum()), float(squares[-1])
    if of_weights <= 0 or of_bias <= 0 or float(posterior.eigenvalues.max()) <= 0:
        raise UserError("separate priors need non-zero weights, bias and features")
    channels, values = len(curvature.mean), posterior.eigenvalues
    share = _bias_shares(posterior)

    def at(log_tau: float) -> SeparatePriors:
        tau = math.exp(log_tau)
        q = float((share / (values + tau)).sum())
        r, scale = 1 / q - tau, channels / of_bias
        # The positive root, without a difference of like numbers.
        tau_b = 2 * scale / (1 + math.sqrt(1 + 4 * scale / r)) if r > 0 else tau
        same = replace(posterior, prior_precision=tau).log_evidence()
        change = channels * (math.log(tau_b / tau) - math.log1p((tau_b - tau) * q))
        return SeparatePriors(tau, tau_b, same + 0.5 * (change - (tau_b - tau) * of_bias))

    centre = math.log(channels * len(values) / of_weights)
    from scipy.optimize import minimize_scalar

    found = minimize_scalar(
        lambda log_tau: -at(log_tau).log_evidence,
        bounds=(centre - 40, centre + 1),
        method="bounded",
        options={"xatol": 1e-9, "maxiter": 500},
    )
    return at(float(found.x))


def _bias_shares(posterior: HeadPosterior) -> Tensor:
    """Squared component of the bias in every eigenvector, ``(P,)``."""
    vectors = posterior.eigenvectors
    if vectors is not None:
        return vectors[-1].square()
    share = torch.zeros_like(posterior.eigenvalues)
    share[-1] = 1
    return share


@dataclass(frozen=True)
class EvidenceCurve:
    """The evidence over prior_precision at one sigma_noise, with what belongs on its axis.

    Attributes:
        sigma_noise: of the curve.
        prior_precision: ``(T,)``, whole tenths of a decade.
        log_evidence: ``(T,)``.
        effective_parameters: ``(T,)``, of one output channel.
        own: the run's prior_precision and log evidence.
        best: those of the maximum.
        eigenvalues: smallest and largest of the likelihood's precision.
        parameters: P.
    """

    sigma_noise: float
    prior_precision: Tensor
    log_evidence: Tensor
    effective_parameters: Tensor
    own: tuple[float, float]
    best: tuple[float, float]
    eigenvalues: tuple[float, float]
    parameters: int


def evidence_curve(posterior: HeadPosterior) -> EvidenceCurve | None:
    """The curve around the run's own prior and the best one; None where there is no maximum."""
    if not posterior.has_evidence:
        return None
    try:
        best = HeadPosterior.fit(
            posterior.curvature,
            structure=posterior.structure,
            sigma_noise=posterior.sigma_noise,
            prior_precision="evidence",
            n_eff=posterior.n_eff,
            rank=posterior.rank,
        )
    except UserError:
        return None
    marks = sorted(math.log10(each.prior_precision) for each in (posterior, best))
    first, last = math.floor(marks[0]) - _DECADES, math.ceil(marks[1]) + _DECADES
    steps = range(first * _PER_DECADE, last * _PER_DECADE + 1)
    taus = [10 ** (step / _PER_DECADE) for step in steps]
    grid = evidence_grid(posterior, [posterior.sigma_noise], taus)
    return EvidenceCurve(
        sigma_noise=posterior.sigma_noise,
        prior_precision=grid.prior_precision,
        log_evidence=grid.log_evidence[0],
        effective_parameters=grid.effective_parameters[0],
        own=(posterior.prior_precision, posterior.log_evidence()),
        best=(best.prior_precision, best.log_evidence()),
        eigenvalues=posterior.eigenvalue_range,
        parameters=posterior.num_parameters,
    )
