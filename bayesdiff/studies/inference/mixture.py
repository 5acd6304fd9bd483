"""A mixture behind an invertible map: observations x = f(z) + noise, z from known Gaussians.

What is unknown are the weights of the Gaussians. Their posterior has a long way, over all latents
at once by Hamiltonian Monte Carlo, and a short one: each observation's likelihood under every
Gaussian once, then the weights alone.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesdiff.checks import UserError, at_least, positive
from bayesdiff.studies.inference.simplex import log_prior, log_weights

# Of a batch of points (B, D) -> (B, D), differentiable, each row by itself.
Map = Callable[[Tensor], Tensor]

_AT_ONCE = 512


@dataclass(frozen=True)
class LatentMixture:
    """Gaussians with diagonal covariances in the latent space, and how observations follow.

    Attributes:
        means: ``(K, D)``.
        scales: standard deviations, ``(K, D)``.
        decode: from latents to data.
        noise: standard deviation of the observations around ``decode(z)``.
    """

    means: Tensor
    scales: Tensor
    decode: Map
    noise: float

    def __post_init__(self) -> None:
        positive("noise", self.noise, "give a standard deviation")
        if self.means.ndim != 2 or self.means.shape != self.scales.shape:
            shapes = f"{tuple(self.means.shape)} and {tuple(self.scales.shape)}"
            raise UserError(f"means and scales must both be (components, D), got {shapes}")
        if not (self.scales > 0).all():
            raise UserError(f"scales must be positive, got {float(self.scales.min())}")

    def draw(
        self, weights: Tensor, count: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Latents and observations, both ``(count, D)``."""
        component = torch.multinomial(weights, count, replacement=True, generator=generator)
        return self.draw_of(component, generator)

    @torch.no_grad()
    def draw_of(self, component: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Latents and observations, both ``(N, D)``, of the components ``(N,)``."""
        count = len(component)
        z = self.means[component] + self.scales[component] * self._normal(count, generator)
        noise = self.noise * self._normal(count, generator)
        return z, self.decode(z) + noise

    def log_components(self, z: Tensor) -> Tensor:
        """Log density of latents ``(..., D)`` under each Gaussian, ``(..., K)``."""
        away = (z[..., None, :] - self.means) / self.scales
        return log_normal(away) - self.scales.log().sum(-1)

    def log_observed(self, x: Tensor, z: Tensor) -> Tensor:
        """Log density of observations ``(..., D)`` given their latents, ``(...)``."""
        decoded = self.decode(z.reshape(-1, z.shape[-1])).view_as(z)
        return log_normal((x - decoded) / self.noise) - x.shape[-1] * math.log(self.noise)

    def _normal(self, count: int, generator: torch.Generator) -> Tensor:
        return normal_like(self.means, (count, self.means.shape[1]), generator)


class JointPosterior:
    """Log density of the weights and of all latents, for a sampler of both.

    A state ``(K - 1 + N D,)`` holds log ratios of the weights and one standardised residual per
    latent coordinate: z_n = centre_n + root_n r_n, with the mean and covariance that z_n has for a
    linear map and one broad Gaussian in place of the mixture. So residuals are of unit scale
    whatever the map stretches, and no chain needs a step of its own for each.
    """

    def __init__(self, mixture: LatentMixture, x: Tensor, encoded: Tensor) -> None:
        """Take observations ``(N, D)`` and what the map's inverse makes of them, ``(N, D)``."""
        self.mixture, self.x = mixture, x
        mean = mixture.means.mean(0)
        spread = mixture.scales.square().mean(0) + mixture.means.var(0, correction=0)
        slope = jacobian(mixture.decode, encoded) / mixture.noise
        information = slope.mT @ slope
        precision = information + spread.reciprocal().diag()
        pull = (information @ (encoded - mean)[..., None])[..., 0]
        lower = torch.linalg.cholesky(precision)
        self.centre = mean + torch.cholesky_solve(pull[..., None], lower)[..., 0]
        eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        self.root = torch.linalg.solve_triangular(lower.mT, eye.expand_as(lower), upper=True)
        self.volume = -lower.diagonal(dim1=-2, dim2=-1).log().sum()

    def __call__(self, state: Tensor) -> Tensor:
        """``(C, K - 1 + N D) -> (C,)``, constants included."""
        free, z = self.unpack(state)
        logs = log_weights(free)
        prior = torch.logsumexp(logs[:, None] + self.mixture.log_components(z), -1)
        observed = self.mixture.log_observed(self.x, z)
        return (prior + observed).sum(-1) + log_prior(logs) + self.volume

    def unpack(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Log ratios ``(C, K - 1)`` and latents ``(C, N, D)``."""
        count = len(self.mixture.means) - 1
        residual = state[:, count:].view(len(state), *self.x.shape)
        z = self.centre + torch.einsum("nij,cnj->cni", self.root, residual)
        return state[:, :count], z

    def start(self, chains: int, generator: torch.Generator) -> Tensor:
        """States ``(chains, K - 1 + N D)``: weights from the prior, residuals from a normal."""
        at_least("chains", chains)
        count = len(self.mixture.means) - 1
        # Exponentials over their sum are uniform on the simplex.
        exponential = self.x.new_empty(chains, count + 1).exponential_(generator=generator)
        logs = exponential.log()
        residual = normal_like(self.x, (chains, self.x.numel()), generator)
        return torch.cat([logs[:, :-1] - logs[:, -1:], residual], 1)


def jacobian(decode: Map, z: Tensor) -> Tensor:
    """Derivatives of outputs by inputs at each point, ``(B, D) -> (B, D, D)``.

    A few points at once: all steps of a flow are kept for their derivatives.
    """
    return torch.cat([jacobian_of(decode, part)[1] for part in z.split(_AT_ONCE)])


def jacobian_of(function: Map, z: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs ``(B, D)`` and their derivatives ``(B, D, D)`` by inputs ``(B, D)``."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        outputs = function(z)
        last = outputs.shape[1] - 1
        rows = [
            torch.autograd.grad(outputs[:, place].sum(), z, retain_graph=place < last)[0]
            for place in range(last + 1)
        ]
    return outputs.detach(), torch.stack(rows, 1)


def normal_like(like: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard normal numbers, of the type and on the device of ``like``."""
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)


def log_normal(standardised: Tensor) -> Tensor:
    """Log density of a standard normal over the last axis."""
    constant = standardised.shape[-1] * math.log(2 * math.pi)
    return -(standardised.square().sum(-1) + constant) / 2
