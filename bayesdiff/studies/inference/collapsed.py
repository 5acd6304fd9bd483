"""Likelihood of observations under each Gaussian of a latent mixture, latents integrated out."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesdiff.checks import at_least, positive
from bayesdiff.studies.inference.mixture import LatentMixture, jacobian, log_normal, normal_like

# Points that the map takes at once.
_POINTS = 1 << 16


@dataclass(frozen=True)
class ComponentLikelihood:
    """Of every observation under every component.

    Attributes:
        log_likelihood: log p(x_n | k), ``(N, K)``.
        efficiency: effective share of the importance draws, ``(N, K)``: near 1 where the Gaussian
            proposal fits; a mean far below 0.1 asks for more draws.
    """

    log_likelihood: Tensor
    efficiency: Tensor


def component_likelihood(
    mixture: LatentMixture,
    x: Tensor,
    encoded: Tensor,
    generator: torch.Generator,
    *,
    draws: int = 64,
    newton_steps: int = 4,
    inflation: float = 1.2,
) -> ComponentLikelihood:
    """Integrate z out of N(z; mu_k, S_k) N(x_n; f(z), noise**2) by importance sampling.

    Every pair (n, k) has its own proposal: a Gaussian at the mode that Gauss-Newton steps reach,
    with the covariance of the linearised map. Exact for a linear map and ``inflation=1``.

    Args:
        mixture: of the latents, and their map.
        x: observations, ``(N, D)``.
        encoded: what the map's inverse makes of them, ``(N, D)``.
        generator: of the draws.
        draws: for each pair.
        newton_steps: towards each mode; each takes D + 1 evaluations of the map per pair.
        inflation: factor on the proposal's standard deviations: tails above the integrand's.
    """
    at_least("draws", draws)
    positive("inflation", inflation)
    components = len(mixture.means)
    rows = max(1, _POINTS // (components * draws))
    logs, shares = [], []
    for seen, start in zip(x.split(rows), encoded.split(rows), strict=True):
        pairs = _Pairs(mixture, seen, start)
        for _ in range(newton_steps):
            pairs.newton_step()
        log_mean, share = pairs.integrate(draws, inflation, generator)
        logs.append(log_mean.view(-1, components))
        shares.append(share.view(-1, components))
    return ComponentLikelihood(torch.cat(logs), torch.cat(shares))


def linear_likelihood(mixture: LatentMixture, slope: Tensor, x: Tensor) -> Tensor:
    """The exact ``(N, K)`` log likelihood for a linear map z -> slope z, ``(D, D)``.

    x | k ~ N(J mu_k, J S_k J^T + noise**2 I).
    """
    eye = torch.eye(len(slope), dtype=slope.dtype, device=slope.device)
    spread = slope * mixture.scales[:, None]
    covariance = spread @ spread.mT + mixture.noise**2 * eye
    means = mixture.means @ slope.mT
    each = torch.distributions.MultivariateNormal(means, covariance)
    return each.log_prob(x[:, None])


class _Pairs:
    """All pairs of an observation and a component, ``B = N K`` rows."""

    def __init__(self, mixture: LatentMixture, x: Tensor, encoded: Tensor) -> None:
        components = len(mixture.means)
        self.mixture = mixture
        self.x = x.repeat_interleave(components, 0)
        self.mean = mixture.means.repeat(len(x), 1)
        self.scale = mixture.scales.repeat(len(x), 1)
        self.z = self._linear_mode(encoded.repeat_interleave(components, 0))
        self.damping = torch.ones_like(self.z[:, :1])
        self.value = self._log_joint(self.z)

    @torch.no_grad()
    def newton_step(self) -> None:
        """Gauss-Newton; a step that leads down is not taken, and the next one is shorter."""
        lower, slope = self._precision_root(self.z)
        residual = (self.x - self.mixture.decode(self.z)) / self.mixture.noise
        gradient = (slope.mT @ residual[..., None])[..., 0]
        gradient = gradient - (self.z - self.mean) / self.scale.square()
        step = torch.cholesky_solve(gradient[..., None], lower)[..., 0]
        z = self.z + self.damping * step
        value = self._log_joint(z)
        better = value >= self.value
        self.z = torch.where(better[:, None], z, self.z)
        self.value = torch.where(better, value, self.value)
        self.damping = torch.where(better[:, None], 1.0, self.damping / 4).to(self.damping)

    def integrate(
        self, draws: int, inflation: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Log integral and effective share of the draws, both ``(B,)``."""
        lower, _ = self._precision_root(self.z)
        normal = normal_like(self.z, (draws, *self.z.shape), generator)
        away = torch.linalg.solve_triangular(lower.mT, normal[..., None], upper=True)[..., 0]
        log_joint = self._log_joint(self.z + inflation * away)
        log_proposal = log_normal(normal) - self.z.shape[1] * math.log(inflation)
        log_proposal = log_proposal + lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        ratio = log_joint - log_proposal
        total = torch.logsumexp(ratio, 0)
        effective = 2 * total - torch.logsumexp(2 * ratio, 0)
        return total - math.log(draws), effective.exp() / draws

    def _linear_mode(self, encoded: Tensor) -> Tensor:
        """Where the integrand peaks for the map's slope at the encoded observation."""
        lower, slope = self._precision_root(encoded)
        pull = slope.mT @ slope @ (encoded - self.mean)[..., None]
        return self.mean + torch.cholesky_solve(pull, lower)[..., 0]

    def _precision_root(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Cholesky factor of the linearised precision, and the slope over the noise."""
        slope = jacobian(self.mixture.decode, z) / self.mixture.noise
        precision = slope.mT @ slope + torch.diag_embed(self.scale.square().reciprocal())
        return torch.linalg.cholesky(precision), slope

    @torch.no_grad()
    def _log_joint(self, z: Tensor) -> Tensor:
        prior = log_normal((z - self.mean) / self.scale) - self.scale.log().sum(-1)
        return prior + self.mixture.log_observed(self.x.expand_as(z), z)
