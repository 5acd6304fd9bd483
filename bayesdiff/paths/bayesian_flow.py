"""Bayesian flow networks as variance-preserving paths: their beliefs, scaled to unit variance.

A belief that has received data x through a Gaussian channel of accuracy beta is told by
z_t = sqrt(beta / (1 + beta)) x + sqrt(1 / (1 + beta)) eps alone (Graves et al., "Bayesian Flow
Networks", 2023): the signal-to-noise ratio of the path is the accuracy. The belief itself follows
from z_t and beta, see ``Likelihood.belief``. At t = 1 the accuracy is finite, so that samples end
with one more prediction of the data, see ``ends_in_data``.
"""

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from bayesdiff.checks import UserError, positive
from bayesdiff.paths.probability_path import PathCoefficients, ProbabilityPath


class AccuracyPath(ProbabilityPath):
    """What the accuracy schedules share; each gives the accuracy and its derivative.

    Example:
        >>> path, t = QuadraticAccuracy(beta_1=9.0), torch.tensor(0.5)
        >>> at = path.coefficients(t)
        >>> path.accuracy(t), (at.alpha / at.sigma) ** 2  # the signal-to-noise ratio
        (tensor(2.2500, dtype=torch.float64), tensor(2.2500, dtype=torch.float64))
    """

    family = "bfn"
    variance_preserving = True
    ends_in_data = False

    @abstractmethod
    def accuracy(self, t: Tensor) -> Tensor:
        """beta(t), float64: 0 at t = 0, the signal-to-noise ratio of the path."""

    @abstractmethod
    def accuracy_rate(self, t: Tensor) -> Tensor:
        """Its derivative alpha(t), float64."""

    def training_times(self, uniform: Tensor) -> Tensor:
        """All of [0, 1)."""
        return uniform


class QuadraticAccuracy(AccuracyPath):
    """beta(t) = beta_1 t^2, for discrete data (Graves et al. 2023).

    Args:
        beta_1: accuracy at t = 1.

    Raises:
        UserError: if it is not above 0.

    Example:
        >>> QuadraticAccuracy(beta_1=9.0).accuracy(torch.tensor([0.0, 0.5, 1.0]))
        tensor([0.0000, 2.2500, 9.0000], dtype=torch.float64)
    """

    def __init__(self, beta_1: float = 9.0) -> None:
        self.beta_1 = positive("path.beta_1", beta_1)

    def accuracy(self, t: Tensor) -> Tensor:
        """beta_1 t^2."""
        return self.beta_1 * t.double().square()

    def accuracy_rate(self, t: Tensor) -> Tensor:
        """2 beta_1 t."""
        return 2 * self.beta_1 * t.double()

    def coefficients(self, t: Tensor) -> PathCoefficients:
        """Coefficients at times ``t`` of any shape, in float64."""
        root = math.sqrt(self.beta_1)
        sigma = (1 + self.accuracy(t)).rsqrt()
        alpha = root * t.double() * sigma
        cube = sigma**3
        return PathCoefficients(alpha, sigma, root * cube, -root * root * t.double() * cube)


class GeometricAccuracy(AccuracyPath):
    """beta(t) = sigma_1^(-2 t) - 1, for continuous data (Graves et al. 2023).

    alpha^2 = gamma(t) = 1 - sigma_1^(2 t): the belief's entropy falls evenly in t.

    Args:
        sigma_1: standard deviation of the belief at t = 1.

    Raises:
        UserError: if it is not between 0 and 1.

    Example:
        >>> GeometricAccuracy(sigma_1=0.01).coefficients(torch.tensor([0.0, 0.5, 1.0])).sigma
        tensor([1.0000, 0.1000, 0.0100], dtype=torch.float64)
    """

    smooth = False  # alpha grows as sqrt(t) at t = 0

    def __init__(self, sigma_1: float = 1e-3) -> None:
        if not positive("path.sigma_1", sigma_1) < 1:
            raise UserError(f"path.sigma_1 must lie between 0 and 1, got {sigma_1}")
        self.sigma_1 = sigma_1

    def accuracy(self, t: Tensor) -> Tensor:
        """sigma_1^(-2 t) - 1, precise for small t."""
        return torch.expm1(-2 * math.log(self.sigma_1) * t.double())

    def accuracy_rate(self, t: Tensor) -> Tensor:
        """-2 ln(sigma_1) sigma_1^(-2 t)."""
        rate = -2 * math.log(self.sigma_1)
        return rate * torch.exp(rate * t.double())

    def coefficients(self, t: Tensor) -> PathCoefficients:
        """Coefficients at times ``t`` of any shape, in float64; d_alpha is infinite at t = 0."""
        log = math.log(self.sigma_1)
        sigma = torch.exp(log * t.double())
        alpha = torch.sqrt(-torch.expm1(2 * log * t.double()))
        d_sigma = log * sigma
        return PathCoefficients(alpha, sigma, -sigma * d_sigma / alpha, d_sigma)


class BayesianFlow(ProbabilityPath):
    """The accuracy schedule that goes with the likelihood: ``for_likelihood`` chooses.

    Args:
        beta_1: of discrete data, see ``QuadraticAccuracy``.
        sigma_1: of continuous data, see ``GeometricAccuracy``.

    Example:
        >>> from bayesdiff.likelihoods import Bernoulli, Gaussian
        >>> path = BayesianFlow(beta_1=9.0, sigma_1=0.01)
        >>> path.for_likelihood(Bernoulli()).accuracy(torch.tensor(1.0))
        tensor(9., dtype=torch.float64)
        >>> path.for_likelihood(Gaussian()).accuracy(torch.tensor(1.0))
        tensor(9999.0000, dtype=torch.float64)
    """

    family = "bfn"

    def __init__(self, beta_1: float = 9.0, sigma_1: float = 1e-3) -> None:
        self.discrete, self.continuous = QuadraticAccuracy(beta_1), GeometricAccuracy(sigma_1)

    def for_likelihood(self, likelihood: Any) -> AccuracyPath:
        """The schedule for data that are classes, or numbers."""
        return self.discrete if likelihood.discrete else self.continuous

    def coefficients(self, t: Tensor) -> PathCoefficients:
        """None before ``for_likelihood``.

        Raises:
            UserError: always.
        """
        raise UserError("path=bfn has no schedule yet; call for_likelihood(likelihood) first")


def accuracy_path(path: ProbabilityPath, who: str) -> AccuracyPath:
    """The path, if it has an accuracy.

    Args:
        path: of a model.
        who: needs it, for the message.

    Raises:
        UserError: if it has none.
    """
    if not isinstance(path, AccuracyPath):
        raise UserError(
            f"{who} is about Bayesian flow networks, path={path.family} is none; use model=bfn"
        )
    return path
