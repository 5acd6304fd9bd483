"""The Gaussian posterior of the head's weights: predict, draw, evidence.

Exact Bayesian linear regression per output channel: precision ``w G / sigma^2 + tau I`` with G
the Gram matrix of one pass over the data, w = n_eff / num_images (Bishop, "Pattern Recognition
and Machine Learning", 2006, eq. 3.53-3.54). One ``eigh(G)`` serves every (sigma, tau) pair. Other
structures put something else in the place of ``G / sigma^2``, other likelihoods their GGN: their
posterior is Laplace's approximation at the trained weights.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bayesdiff.checks import UserError, positive
from bayesdiff.laplace.directions import by_root, columns_of, orthogonal_rows
from bayesdiff.laplace.evidence import best_prior, log_evidence
from bayesdiff.laplace.record import Curvature
from bayesdiff.laplace.structures import (
    FITTED,
    Spectrum,
    Structure,
    check_invertible,
    check_likelihood,
    check_settings,
    check_structure,
    structure_of,
)
from bayesdiff.laplace.variance import QuadraticForm


@dataclass(frozen=True)
class HeadPosterior:
    """Gaussian over the head's weights; output channels are independent.

    Channels are alike but under an empirical Fisher and likelihoods that bend, where matrices and
    eigenvalues have a leading axis of channels. Channels that say one value together are one: a
    softmax of K levels has blocks of K P weights, and "P" below is K P.

    Attributes:
        curvature: the data's part.
        structure: a name in ``structures.STRUCTURES``.
        sigma_noise: sd of the likelihood, in units of the network's output.
        prior_precision: tau, of every weight, around zero.
        n_eff: images the likelihood counts for.
        rank: directions that keep their data; None but for ``subspace``.

    Example:
        After the example of ``starts_of``:

        >>> features = net.features(torch.randn(2, 1, 8, 8), torch.tensor([0.2, 0.8]))
        >>> narrow = HeadPosterior.fit(posterior.curvature, prior_precision=100.0)  # no new pass
        >>> ratio = narrow.predictive_variance(features) / posterior.predictive_variance(features)
        >>> ratio.shape, bool((ratio < 1).all())
        (torch.Size([2, 1, 8, 8]), True)
    """

    curvature: Curvature
    structure: str
    sigma_noise: float
    prior_precision: float
    n_eff: float
    rank: int | None = None

    @classmethod
    def fit(
        cls,
        curvature: Curvature,
        *,
        structure: str = "full",
        sigma_noise: float | str = "mle",
        prior_precision: float | str = 1.0,
        n_eff: float | None = None,
        rank: int | None = None,
    ) -> "HeadPosterior":
        """Check the settings and fix the posterior; costs no pass over the data.

        Args:
            curvature: what the pass over the data left.
            structure: what is kept of the data's part, see ``structures.STRUCTURES``.
            sigma_noise: positive number, "mle" for the root mean squared residual, or
                "mle_per_time" for one such number in each interval of t that the pass had apart;
                the attribute is then their geometric mean.
            prior_precision: positive number, or "evidence" for the value that maximises
                ``log_evidence``.
            n_eff: weight of the likelihood in images; None takes the images of the pass.
            rank: for "subspace", 0 to P.
        """
        check_settings(structure, sigma_noise, prior_precision, n_eff, rank)
        check_structure(structure, rank, curvature.shape[1], curvature.num_images)
        check_likelihood(curvature.said, curvature.scaled, structure, sigma_noise)
        if sigma_noise == "mle_per_time":
            curvature = curvature.per_time()
        fitted = sigma_noise in FITTED
        noise = curvature.sigma_mle if fitted else float(sigma_noise)
        positive("sigma_noise", noise, "the residuals are all zero, give a number")
        prior = 1.0 if prior_precision == "evidence" else float(prior_precision)
        images = float(curvature.num_images if n_eff is None else n_eff)
        posterior = cls(curvature, structure, noise, prior, images, rank)
        if prior_precision == "evidence":
            tau = best_prior(curvature.mean, posterior._all_eigenvalues)
            posterior = replace(posterior, prior_precision=tau)
        check_invertible(
            *posterior.eigenvalue_range, posterior.num_parameters, posterior.prior_precision
        )
        return posterior

    @property
    def kind(self) -> list[Any]:
        """The structure with its rank, where it has one."""
        return [self.structure] if self.rank is None else [self.structure, self.rank]

    @property
    def settings(self) -> list[Any]:
        """All that the posterior depends on beside its curvature, with words resolved.

        To nine digits: a sum over the data has other last bits in another order, on another
        machine or on more of them, and makes no other posterior.
        """
        numbers = self.sigma_noise, self.prior_precision, self.n_eff
        return [*self.kind, *(float(f"{number:.9g}") for number in numbers)]

    @property
    def num_parameters(self) -> int:
        """P, weights of one output channel."""
        return self.curvature.shape[1]

    @property
    def _structure(self) -> Structure:
        return structure_of(self.structure, self.rank)

    @cached_property
    def _spectrum(self) -> Spectrum:
        return self._structure.spectrum(self.curvature, self.rank)

    @cached_property
    def eigenvalues(self) -> Tensor:
        """Eigenvalues of the likelihood's precision, ``(P,)``; ``(C_out, P)`` if channels differ.

        In the order of the weights where the structure is diagonal.
        """
        return self._likelihood_weight * self._spectrum.values

    @property
    def _likelihood_weight(self) -> float:
        noise = self.sigma_noise if self.curvature.scaled else 1.0
        return self._structure.weight(self.n_eff / self.curvature.num_images, noise)

    @property
    def _variances(self) -> Tensor:
        """Of the covariance, of the shape of ``eigenvalues``."""
        return 1 / (self.eigenvalues + self.prior_precision)

    @property
    def eigenvalue_range(self) -> tuple[float, float]:
        """Extreme eigenvalues of the likelihood's precision, to compare with tau."""
        return float(self.eigenvalues.min()), float(self.eigenvalues.max())

    @property
    def effective_parameters(self) -> float:
        """Weights of one channel that the data determine, ``sum a / (a + tau sigma^2)`` <= P.

        The mean over channels where they differ. For ``prior_only`` the number says how far the
        size of the data outweighs tau.
        """
        values = self._all_eigenvalues
        return float((values / (values + self.prior_precision)).sum()) / len(values)

    @property
    def _all_eigenvalues(self) -> Tensor:
        """Those of every channel, ``(C_out, P)``."""
        return self.eigenvalues.expand(self.curvature.shape)

    @property
    def is_diagonal(self) -> bool:
        """Whether the weights are independent."""
        return self.eigenvectors is None

    @property
    def eigenvectors(self) -> Tensor | None:
        """Orthonormal columns ``(P, P)`` in the order of the eigenvalues; None if independent.

        No sigma_noise or prior_precision changes them.
        """
        return self._spectrum.vectors

    @property
    def likelihood_precision(self) -> Tensor:
        """The data's part of ``precision``, of its shape."""
        return self._likelihood_weight * self._spectrum.matrix

    @property
    def precision(self) -> Tensor:
        """Posterior precision, ``(P, P)`` float64; ``(C_out, P, P)`` if channels differ."""
        prior = torch.full((self.num_parameters,), self.prior_precision, dtype=torch.float64)
        return self.likelihood_precision + prior.diag()

    @property
    def covariance(self) -> Tensor:
        """Posterior covariance, ``(P, P)`` float64; ``(C_out, P, P)`` if channels differ."""
        return self._spectrum.compose(self._variances)

    @property
    def has_evidence(self) -> bool:
        """Whether ``log_evidence`` has a meaning for this structure."""
        return self._structure.sees_data

    def log_evidence(self) -> float:
        """Log marginal likelihood in closed form, all constants included.

        Prior mean 0; the likelihood counts ``n_eff / num_images`` times (Bishop, eq. 3.86).
        Equals laplace-torch's ``log_marginal_likelihood``; approximate where the structure is.

        Raises:
            UserError: for a structure that does not see the data.
        """
        if not self.has_evidence:
            raise UserError(
                f"laplace.structure={self.structure} has no evidence, since it does not see the"
                " data; use another one"
            )
        sigma, tau = torch.tensor([self.sigma_noise, self.prior_precision], dtype=torch.float64)
        return float(log_evidence(self.curvature, self._all_eigenvalues, sigma, tau, self.n_eff))

    @cached_property
    def optimum(self) -> Tensor | None:
        """Weights ``(C_out, P)`` that minimise ``w |r|^2 / (2 sigma^2) + tau |m|^2 / 2``.

        One Newton step from the mean, where training ended; exact, as the loss is quadratic. None
        for a likelihood whose loss is not, a matrix other than ``full``, or without the gradient.
        """
        gradient, mean = self.curvature.gradient, self.curvature.mean
        exact = self.curvature.scaled and self._structure.spectrum is structure_of("full").spectrum
        if gradient is None or not exact:
            return None
        slope = self._likelihood_weight * gradient + self.prior_precision * mean
        return mean - slope @ self.covariance

    @property
    def distance(self) -> float | None:
        """Mahalanobis distance of mean and optimum, root mean square over all weights.

        A draw lies 1 from the mean. None where the optimum is.
        """
        if self.optimum is None:
            return None
        step = self.optimum - self.curvature.mean
        return math.sqrt(float((step @ self.precision * step).mean()))

    def draw(self, n: int, generator: torch.Generator, orthogonal: bool = False) -> Tensor:
        """Weights ``(n, C_out, P)`` float64 from the posterior, on the generator's device.

        By the symmetric root of Sigma: there are no signs in it that rounding could turn.
        ``orthogonal`` ones share nothing, see ``orthogonal_rows``: outer products still average
        Sigma, and sums of squares along them vary less.
        """
        curvature, scale = self.curvature, self._variances.sqrt().to(generator.device)
        mean = curvature.blocks(curvature.mean.to(generator.device))
        noise = mean.new_empty(n, *mean.shape).normal_(generator=generator)
        noise = orthogonal_rows(noise) if orthogonal else noise
        return curvature.channels(mean + by_root(noise, self.eigenvectors, scale))

    def columns(self) -> Tensor:
        """Weight directions ``(C_out P, C_out, P)`` float64 whose outer products sum to Sigma."""
        scale = self._variances.sqrt().expand(self.curvature.shape)
        return self.curvature.channels(columns_of(self.eigenvectors, scale))

    def predictive_variance(self, features: Tensor, ones: float = 1.0) -> Tensor:
        """Variance of every output due to the weights.

        Closed form ``phi^T Sigma phi``: ``|L^-1 phi|^2`` with ``L L^T`` the precision, or a
        convolution of the squared features with the variances where Sigma is diagonal.

        Args:
            features: ``(B, D, h, w)``, or ``(B, ..., D)`` for a linear head.
            ones: the trailing entry of phi, other than 1 when features of several stages of a
                step have been combined.

        Returns:
            ``(B, 1, h, w)``, or ``(B, ..., 1)``, the same for all channels; C_out in the place of
            the 1 if channels differ. Float32 for features of lower precision.
        """
        self.curvature.geometry.check(features)
        features = self.curvature.geometry.read(features)
        if features.dtype != torch.float64:
            features = features.float()
        key = (features.dtype, features.device)
        if key not in self._kept:
            matrix = self._variances if self.is_diagonal else self.precision
            self._kept[key] = QuadraticForm.of(matrix, self.is_diagonal, self.curvature, features)
        return self._kept[key](features, ones)

    # What predictive_variance keeps per dtype and device; the posterior itself never changes.
    @cached_property
    def _kept(self) -> dict[tuple[torch.dtype, torch.device], QuadraticForm]:
        return {}
