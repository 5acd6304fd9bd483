"""The Gaussian posterior of layers by the leading directions of their GGN."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bayesdiff.laplace.block.low_rank import LowRankFactors
from bayesdiff.laplace.block.posterior import described
from bayesdiff.laplace.evidence import best_prior
from bayesdiff.laplace.posterior import HeadPosterior


@dataclass(frozen=True)
class LowRankPosterior:
    """Gaussian over the weights of layers, with the GGN's leading directions and the prior.

    With values a and orthonormal vectors u of the likelihood's precision its covariance is
    ``I / tau - sum_r u_r u_r^T (1 / tau - 1 / (a_r + tau))``: all other directions are as wide as
    the prior, however well the data know them. It is an upper bound of the posterior of all.

    Attributes:
        factors: the data's part.
        sigma_noise: sd of the likelihood, in units of the network's output.
        prior_precision: tau, of every weight.
        n_eff: images the likelihood counts for.
    """

    factors: LowRankFactors
    sigma_noise: float
    prior_precision: float
    n_eff: float

    @classmethod
    def beside(
        cls, head: HeadPosterior, factors: LowRankFactors, prior_precision: float | str = 1.0
    ) -> "LowRankPosterior":
        """With the likelihood of the head's posterior, and a prior for all layers.

        Raises:
            UserError: if the two come from other weights or data.
        """  # noqa: DOC502 - raised one level down
        factors.require_source(head.curvature.source)
        number = 1.0 if prior_precision == "evidence" else float(prior_precision)
        made = cls(factors, head.sigma_noise, number, head.n_eff)
        if prior_precision != "evidence":
            return made
        mean = torch.cat([each.flatten() for each in factors.means.values()])[None]
        return replace(made, prior_precision=best_prior(mean, made.eigenvalues[None]))

    @cached_property
    def eigenvalues(self) -> Tensor:
        """``(R,)``, of the likelihood's precision."""
        return self.factors.values * (self.n_eff / self.factors.num_images / self.sigma_noise**2)

    def deviations(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draws minus the trained weights, ``(n, C, P)`` float64 for every layer."""
        device, tau = generator.device, self.prior_precision
        means, vectors = self.factors.means, self.factors.vectors
        noise = {
            name: torch.randn(n, *mean.shape, generator=generator, device=device).double()
            for name, mean in means.items()
        }
        along = sum(noise[k].flatten(1) @ vectors[k].to(device).flatten(1).T for k in means)
        less = 1 - (tau / (self.eigenvalues + tau)).sqrt().to(device)
        assert isinstance(along, Tensor)
        return {
            name: (noise[name] - torch.tensordot(along * less, vectors[name].to(device), 1))
            / tau**0.5
            for name in means
        }

    def log_evidence(self) -> float:
        """What these layers add to the log marginal likelihood of the head's posterior."""
        squares = sum(float(mean.square().sum()) for mean in self.factors.means.values())
        ratio = float(torch.log1p(self.eigenvalues / self.prior_precision).sum())
        return -0.5 * (ratio + self.prior_precision * squares)

    @property
    def described(self) -> str:
        """How many layers and directions, for the record of a map."""
        layers, rank = len(self.factors.means), len(self.factors.values)
        return described(layers, f"{rank} directions", self.prior_range)

    @property
    def num_parameters(self) -> int:
        """Weights and biases of all layers."""
        return sum(mean.numel() for mean in self.factors.means.values())

    @property
    def effective_parameters(self) -> float:
        """Weights that the data determine among the directions that are kept."""
        return float((self.eigenvalues / (self.eigenvalues + self.prior_precision)).sum())

    @property
    def prior_range(self) -> tuple[float, float]:
        """The prior precision, twice."""
        return self.prior_precision, self.prior_precision

    @property
    def settings(self) -> list[Any]:
        """All that the posterior depends on, for a key; the directions by their content."""
        numbers = self.sigma_noise, self.n_eff, self.prior_precision
        digits = (float(f"{number:.9g}") for number in numbers)
        return ["low_rank", self.factors.source, self.factors.key, *digits]
