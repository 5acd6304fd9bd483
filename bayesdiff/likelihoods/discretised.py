"""The likelihood of numbers on K levels, each with the mass that a Gaussian has around it."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bayesdiff.likelihoods.emission import (
    PAIRS,
    GaussianBelief,
    Levels,
    drawn_like,
    required,
    wide,
)

_LOG_SPREAD = (-10.0, 10.0)
# Beyond all masses, and finite: an infinite edge has no derivative.
_FAR = 1e7


@dataclass(frozen=True)
class Discretised(GaussianBelief, Levels):
    """K equally spaced values from -1 to 1, with the mass of N(mu, s^2) between their midpoints.

    The outermost values have all that lies beyond them (Salimans et al., "PixelCNN++", 2017; the
    discretised data of Graves et al. 2023). The head says mu and ln s; see ``Likelihood``.

    Args:
        sampled: see ``Emission``.
        final: see ``Emission``.
        levels: K.

    Example:
        >>> law = Discretised(levels=3)  # values -1, 0 and 1
        >>> output = torch.tensor([[0.0, 0.0]])  # of one value: mean 0, log standard deviation 0
        >>> [round(float(law.log_prob(output, torch.tensor([[x]])).exp()), 4) for x in (-1, 0, 1)]
        [0.3085, 0.3829, 0.3085]
    """

    levels: int = 256

    kind: ClassVar[str] = "discretised"
    discrete: ClassVar[bool] = False

    @property
    def gap(self) -> float:
        """Between neighbouring levels."""
        return 2 / (self.levels - 1)

    def channels(self, data: int) -> int:
        """Mean and logarithm of the standard deviation, beside each other."""
        return 2 * data

    def values(self, x_1: Tensor) -> Tensor:
        """The nearest level."""
        index = ((x_1 + 1) / self.gap).round().clamp(0, self.levels - 1)
        return index * self.gap - 1

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean negative log-probability, in nats per value."""
        return -self.log_prob(output, target).mean()

    def log_prob(self, output: Tensor, target: Tensor, sigma_noise: float = 1.0) -> Tensor:
        """Log-probability of every value."""
        mu, spread = self._read(output)
        lower, upper = self._around(target.to(mu))
        return log_mass(lower, upper, mu, spread)

    def residual(self, output: Tensor, target: Tensor) -> Tensor:
        """Gradient of the negative log-probability in mu and ln s."""
        mu, spread = self._read(output.double())
        target = target.double()
        log_p = self.log_prob(output.double(), target)
        low, high = ((edge - mu) / spread for edge in self._around(target))
        below, above = ((_log_density(z) - log_p).exp() for z in (low, high))
        of_mu = (above - below) / spread
        of_spread = high * above - low * below
        return torch.stack([of_mu, of_spread], 2).flatten(1, 2).to(output)

    def hessian(self, output: Tensor) -> Tensor:
        """Fisher information sum_k g_k g_k^T / p_k of mu and ln s, ``(B, C, 2, 2, ...)``."""
        mu, spread = self._read(output)
        total = mu.new_zeros(*mu.shape[:2], 2, 2, *mu.shape[2:])
        for k in range(self.levels):
            value = torch.full_like(mu, k * self.gap - 1)
            edges = self._around(value)
            low, high = ((edge - mu) / spread for edge in edges)
            log_p = log_mass(*edges, mu, spread)
            root = (log_p / 2).exp()
            below, above = ((_log_density(z) - log_p).exp() for z in (low, high))
            slopes = torch.stack([(below - above) / spread, low * below - high * above], 2)
            slopes = torch.where(root[:, :, None] > 0, slopes * root[:, :, None], 0.0)
            total += slopes[:, :, :, None] * slopes[:, :, None]
        return total

    def mean(self, output: Tensor) -> Tensor:
        """1 - gap sum_k Phi((e_k - mu) / s) over the midpoints e_k: no differences of masses."""
        mu, spread = self._read(wide(output))
        total = torch.zeros_like(mu)
        for edge in self._midpoints():
            total += torch.special.ndtr((edge - mu) / spread)
        return 1 - self.gap * total

    def emit(self, output: Tensor, noise: Tensor | None = None, last: bool = False) -> Tensor:
        """The mean, the level nearest to mu, or one drawn by ``noise``."""
        way = self.way(last)
        if way == "mean":
            return self.mean(output)
        mu, spread = self._read(wide(output))
        drawn = mu if way == "mode" else mu + spread * required(noise).to(mu)
        return self.values(drawn)

    def belief_logits(self, x: Tensor, accuracy: Tensor) -> Tensor:
        """Mean and logarithm of the spread of the belief, N(mu, 1 / (1 + beta))."""
        mean = self.belief(x, accuracy)
        log_spread = (-torch.log1p(accuracy) / 2).expand_as(mean)
        return torch.stack([mean, log_spread], 2).flatten(1, 2)

    def step_divergence(
        self, output: Tensor, target: Tensor, accuracy: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """-E ln sum_k p_k e^(-a D_k^2 / 2 + sqrt(a) D_k xi), D_k from the value to level k."""
        mu, spread = self._read(output)
        total = torch.zeros_like(target)
        for _ in range(PAIRS):
            xi = drawn_like(target, generator)
            for sign in (1, -1):
                mixed = torch.full_like(target, -math.inf)
                for k in range(self.levels):
                    value = torch.full_like(mu, k * self.gap - 1)
                    step = value - target
                    exponent = -accuracy / 2 * step.square() + sign * accuracy.sqrt() * step * xi
                    log_p = log_mass(*self._around(value), mu, spread)
                    mixed = torch.logaddexp(mixed, log_p + exponent)
                total -= mixed / (2 * PAIRS)
        return total

    def slope(self, output: Tensor, direction: Tensor) -> Tensor:
        """Derivative of the mean along changes of mu and ln s."""
        mu, spread = self._read(wide(output))
        axis = direction.ndim - output.ndim + 1
        of_mu, of_spread = torch.zeros_like(mu), torch.zeros_like(mu)
        for edge in self._midpoints():
            z = (edge - mu) / spread
            density = self.gap * _log_density(z).exp()
            of_mu, of_spread = of_mu + density / spread, of_spread + density * z
        first, second = direction.unflatten(axis, (-1, 2)).unbind(axis + 1)
        return of_mu * first + of_spread * second

    def _read(self, output: Tensor) -> tuple[Tensor, Tensor]:
        mu, log_spread = output.unflatten(1, (-1, 2)).unbind(2)
        return mu, log_spread.clamp(*_LOG_SPREAD).exp()

    def _midpoints(self) -> list[float]:
        return [(k - 0.5) * self.gap - 1 for k in range(1, self.levels)]

    def _around(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """Edges of the interval of a level."""
        return level_edges(target, self.levels)


def level_edges(target: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Edges of the interval around values on K levels from -1 to 1, far beyond these two."""
    half = 1 / (levels - 1)
    lower = torch.where(target < half - 1, -_FAR, target - half)
    upper = torch.where(target > 1 - half, _FAR, target + half)
    return lower, upper


def log_mass(lower: Tensor, upper: Tensor, mu: Tensor, spread: Tensor) -> Tensor:
    """ln(Phi((upper - mu) / spread) - Phi((lower - mu) / spread)), precise in both tails."""
    a, b = (lower - mu) / spread, (upper - mu) / spread
    flip = a + b > 0
    a, b = torch.where(flip, -b, a), torch.where(flip, -a, b)
    log_a, log_b = torch.special.log_ndtr(a), torch.special.log_ndtr(b)
    gap = (log_b - log_a).clamp(min=torch.finfo(a.dtype).tiny)
    small = torch.log(-torch.expm1(-gap.clamp(max=1.0)))
    large = torch.log1p(-torch.exp(-gap.clamp(min=0.5)))
    return log_b + torch.where(gap < math.log(2), small, large)


def _log_density(z: Tensor) -> Tensor:
    return -z.square() / 2 - math.log(math.tau) / 2
