"""The Gaussian posterior of the head's weights: predict, draw, evidence.

Exact Bayesian linear regression per output channel: precision ``w G / sigma^2 + tau I`` with G
the Gram matrix of one pass over the data, w = n_eff / num_images (Bishop, "Pattern Recognition
and Machine Learning", 2006, eq. 3.53-3.54). One ``eigh(G)`` serves every (sigma, tau) pair.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from scipy.optimize import brentq
from torch import Tensor

from bayesdiff.checks import UserError, positive
from bayesdiff.laplace.record import Curvature
from bayesdiff.laplace.variance import TriangularFactor, diagonal_variance

__all__ = ["Curvature", "HeadPosterior"]


@dataclass(frozen=True)
class HeadPosterior:
    """Gaussian over the head's weights; independent and alike for every output channel.

    Attributes:
        curvature: the data's part.
        structure: "full" keeps all of G, "diag" its diagonal only.
        sigma_noise: sd of the likelihood, in units of the network's output.
        prior_precision: tau, of every weight, around zero.
        n_eff: images the likelihood counts for.
    """

    curvature: Curvature
    structure: Literal["full", "diag"]
    sigma_noise: float
    prior_precision: float
    n_eff: float

    @classmethod
    def fit(
        cls,
        curvature: Curvature,
        *,
        structure: str = "full",
        sigma_noise: float | str = "mle",
        prior_precision: float | str = 1.0,
        n_eff: float | None = None,
    ) -> "HeadPosterior":
        """Check the settings and fix the posterior; costs no pass over the data.

        Args:
            curvature: what the pass over the data left.
            structure: "full" or "diag".
            sigma_noise: positive number, or "mle" for the root mean squared residual.
            prior_precision: positive number, or "evidence" for the value that maximises
                ``log_evidence``.
            n_eff: weight of the likelihood in images; None takes the images of the pass.
        """
        check_settings(structure, sigma_noise, prior_precision, n_eff)
        noise = curvature.sigma_mle if sigma_noise == "mle" else float(sigma_noise)
        prior = 1.0 if prior_precision == "evidence" else float(prior_precision)
        images = float(curvature.num_images if n_eff is None else n_eff)
        posterior = cls(curvature, structure, noise, prior, images)  # type: ignore[arg-type]
        if prior_precision == "evidence":
            posterior = replace(posterior, prior_precision=posterior._evidence_prior())
        posterior._check_precision()
        return posterior

    def _check_precision(self) -> None:
        """Refuse a precision matrix that cannot be inverted in float64.

        Raises:
            UserError: if it is singular.
        """
        values, tau = self.eigenvalues, self.prior_precision
        low, high = float(values.min() + tau), float(values.max() + tau)
        if not low > len(values) * torch.finfo(torch.float64).eps * high:
            raise UserError(
                f"the posterior precision is singular in float64 (eigenvalues {low:.3g} to"
                f" {high:.3g}); raise prior_precision={tau:g}"
            )

    @property
    def num_parameters(self) -> int:
        """P, weights of one output channel."""
        return self.curvature.geometry.size

    @cached_property
    def eigenvalues(self) -> Tensor:
        """Eigenvalues of the likelihood's precision ``w G / sigma^2`` (or of its diagonal)."""
        full = self.structure == "full"
        values = self.curvature.eigen[0] if full else self.curvature.gram.diagonal()
        return self._likelihood_weight * values

    @property
    def _likelihood_weight(self) -> float:
        return self.n_eff / self.curvature.num_images / self.sigma_noise**2

    @property
    def eigenvalue_range(self) -> tuple[float, float]:
        """Smallest and largest eigenvalue of the likelihood's precision, to compare with tau."""
        return float(self.eigenvalues.min()), float(self.eigenvalues.max())

    @property
    def effective_parameters(self) -> float:
        """Weights of one channel that the data determine, ``sum a / (a + tau sigma^2)`` <= P."""
        return float((self.eigenvalues / (self.eigenvalues + self.prior_precision)).sum())

    @property
    def precision(self) -> Tensor:
        """Posterior precision of one channel, ``(P, P)`` float64."""
        gram = self.curvature.gram * self._likelihood_weight
        gram = gram if self.structure == "full" else gram.diagonal().diag()
        return gram + self.prior_precision * torch.eye(len(gram), dtype=gram.dtype)

    @property
    def covariance(self) -> Tensor:
        """Posterior covariance of one channel, ``(P, P)`` float64."""
        scales = 1 / (self.eigenvalues + self.prior_precision)
        if self.structure == "diag":
            return scales.diag()
        vectors = self.curvature.eigen[1]
        return (vectors * scales) @ vectors.T

    def log_evidence(self) -> float:
        """Log marginal likelihood in closed form, all constants included.

        Prior mean 0; the likelihood counts ``n_eff / num_images`` times (Bishop, eq. 3.86).
        Equals laplace-torch's ``log_marginal_likelihood``.
        """
        curvature, tau = self.curvature, self.prior_precision
        weight = self.n_eff / curvature.num_images
        log_likelihood = -0.5 * curvature.squared_error / self.sigma_noise**2
        log_likelihood -= curvature.num_outputs * math.log(self.sigma_noise * math.sqrt(math.tau))
        # log det of posterior over prior precision, for all channels
        log_ratio = len(curvature.mean) * float(torch.log1p(self.eigenvalues / tau).sum())
        scatter = tau * float(curvature.mean.square().sum())
        return weight * log_likelihood - 0.5 * (log_ratio + scatter)

    def _evidence_prior(self) -> float:
        """The tau that maximises the evidence: tau |m|^2 = C sum a / (a + tau), Bishop, eq. 3.92.

        The left side rises and the right side falls in tau, so the root is the only one.

        Raises:
            UserError: if the evidence has no maximum at a finite tau above zero.
        """
        squares, values = float(self.curvature.mean.square().sum()), self.eigenvalues
        if squares <= 0 or float(values.max()) <= 0:
            raise UserError(
                "prior_precision=evidence needs non-zero head weights and features; give a number"
            )

        def slope(log_tau: float) -> float:
            tau = math.exp(log_tau)
            return tau * squares / len(self.curvature.mean) - float(
                (values / (values + tau)).sum()
            )

        high = math.log(len(self.curvature.mean) * len(values) / squares)
        low = high - 1
        while slope(low) > 0:
            low -= 10
        return math.exp(brentq(slope, low, high + 1e-9, xtol=1e-13, rtol=1e-13))

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Weights ``(n, C_out, P)`` float64 from the posterior, on the generator's device."""
        mean = self.curvature.mean.to(generator.device)
        noise = torch.randn(
            n, *mean.shape, generator=generator, device=generator.device, dtype=mean.dtype
        )
        noise = noise * (self.eigenvalues + self.prior_precision).rsqrt().to(noise.device)
        if self.structure == "full":
            noise = noise @ self.curvature.eigen[1].T.to(noise.device)
        return mean + noise

    def columns(self) -> Tensor:
        """Weight directions ``(C_out P, C_out, P)`` float64 whose outer products sum to Sigma."""
        scales = (self.eigenvalues + self.prior_precision).rsqrt()
        root = scales.diag() if self.structure == "diag" else self.curvature.eigen[1] * scales
        return torch.block_diag(*[root.T] * len(self.curvature.mean)).unflatten(
            1, self.curvature.mean.shape
        )

    def predictive_variance(self, features: Tensor, ones: float = 1.0) -> Tensor:
        """Variance of every output due to the weights, alike for all channels.

        Closed form ``phi^T Sigma phi``: ``|L^-1 phi|^2`` with ``L L^T`` the precision (full), a
        convolution of the squared features with the variances (diag).

        Args:
            features: ``(B, D, h, w)``, or ``(B, ..., D)`` for a linear head.
            ones: the trailing entry of phi, other than 1 when features of several stages of a
                step have been combined.

        Returns:
            ``(B, 1, h, w)``, or ``(B, ..., 1)``; float32 for features of lower precision.
        """
        geometry = self.curvature.geometry
        geometry.check(features)
        if features.dtype != torch.float64:
            features = features.float()
        key = (features.dtype, features.device)
        if self.structure == "diag":
            if key not in self._variances:
                scales = 1 / (self.eigenvalues + self.prior_precision)
                self._variances[key] = scales.to(features)
            return diagonal_variance(features, self._variances[key], geometry, ones)
        if key not in self._factors:
            self._factors[key] = TriangularFactor.of(self.precision, geometry, features)
        return self._factors[key].variance(features, ones)

    # What predictive_variance keeps per dtype and device; the posterior itself never changes.
    @cached_property
    def _factors(self) -> dict[tuple[torch.dtype, torch.device], TriangularFactor]:
        return {}

    @cached_property
    def _variances(self) -> dict[tuple[torch.dtype, torch.device], Tensor]:
        return {}


def check_settings(
    structure: str,
    sigma_noise: float | str = "mle",
    prior_precision: float | str = 1.0,
    n_eff: float | None = None,
) -> None:
    """Refuse settings that no curvature could make a posterior of, before any work is done.

    Raises:
        UserError: if a setting is unusable.
    """
    if structure not in {"full", "diag"}:
        raise UserError(f"laplace.structure must be full or diag, got {structure!r}")
    if sigma_noise != "mle":
        positive("laplace.sigma_noise", sigma_noise, "give a number above 0, or mle")  # type: ignore[arg-type]
    if prior_precision != "evidence":
        positive("laplace.prior_precision", prior_precision, "give a number above 0, or evidence")  # type: ignore[arg-type]
    if n_eff is not None:
        positive("laplace.n_eff", n_eff, "give a number of images above 0, or null")
