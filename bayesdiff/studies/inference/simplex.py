"""Weights that sum to 1: as free numbers for a sampler, and on a grid as its exact reference."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesdiff.checks import UserError, at_least

# Observations times grid points at once: 64 MiB.
_PRODUCTS = 1 << 23
RESOLUTION = 150  # of a grid, cells per side


def log_weights(free: Tensor) -> Tensor:
    """Logarithms ``(..., K)`` of the weights that ``(..., K - 1)`` log ratios to the last give."""
    return torch.log_softmax(torch.nn.functional.pad(free, (0, 1)), -1)


def free_of(weights: Tensor) -> Tensor:
    """The log ratios ``(..., K - 1)`` of weights ``(..., K)``."""
    return (weights[..., :-1] / weights[..., -1:]).log()


def log_prior(logs: Tensor) -> Tensor:
    """Log density of the log ratios ``(...)`` under weights of the uniform Dirichlet prior.

    The prior's (K - 1)! times the Jacobian of the weights, which is their product.
    """
    return math.lgamma(logs.shape[-1]) + logs.sum(-1)


def log_posterior(log_likelihood: Tensor, free: Tensor) -> Tensor:
    """Of log ratios of weights: their prior + sum over n of log sum over k of w_k p(x_n | k).

    Args:
        log_likelihood: of each observation under each component, ``(N, K)``.
        free: ``(C, K - 1)``.

    Returns:
        ``(C,)``.
    """
    logs = log_weights(free)
    return log_mixture(log_likelihood, logs.exp()) + log_prior(logs)


def log_mixture(log_likelihood: Tensor, weights: Tensor) -> Tensor:
    """Sum over n of log sum over k of w_k p(x_n | k).

    Each observation is divided by its largest likelihood, so that a product of matrices and one
    logarithm do, and nothing is summed in logarithms.

    Args:
        log_likelihood: ``(N, K)``.
        weights: ``(C, K)``.

    Returns:
        ``(C,)``.
    """
    largest = log_likelihood.amax(1, keepdim=True)
    ratios = (log_likelihood - largest).exp()
    least = torch.finfo(ratios.dtype).tiny  # of a weight that is 0 to all digits
    total = weights.new_zeros(len(weights))
    for rows in ratios.split(max(1, _PRODUCTS // len(weights))):
        total = total + (weights @ rows.T).clamp(min=least).log().sum(1)
    return total + largest.sum()


@dataclass(frozen=True)
class GridPosterior:
    """Posterior of the weights by a sum over a grid.

    Attributes:
        weights: of the grid, ``(G, K)``.
        mass: posterior probability of each of them, ``(G,)``.
        log_evidence: log p(x) under the prior.
    """

    weights: Tensor
    mass: Tensor
    log_evidence: float

    @property
    def mean(self) -> Tensor:
        """``(K,)``."""
        return self.mass @ self.weights

    @property
    def deviation(self) -> Tensor:
        """Standard deviations ``(K,)``."""
        return (self.mass @ (self.weights - self.mean).square()).sqrt()

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Independent draws ``(count, K)``, of the grid's own weights."""
        place = torch.multinomial(self.mass, count, replacement=True, generator=generator)
        return self.weights[place]


def grid_posterior(log_likelihood: Tensor, resolution: int = RESOLUTION) -> GridPosterior:
    """Sum over the simplex under the uniform prior; exact once cells are below the posterior's sd.

    Args:
        log_likelihood: ``(N, K)``, with K of 2 or 3; more components need too many cells.
        resolution: cells per side.
    """
    weights = _grid(log_likelihood.shape[1], resolution).to(log_likelihood.device)
    value = log_mixture(log_likelihood.double(), weights)
    total = torch.logsumexp(value, 0)
    evidence = float(total) - math.log(len(weights))
    return GridPosterior(weights, (value - total).exp(), evidence)


def _grid(components: int, resolution: int) -> Tensor:
    """Centres of cells of equal size, all inside the simplex."""
    at_least("resolution", resolution, 1)
    steps = torch.arange(resolution, dtype=torch.float64)
    if components == 2:
        first = (steps + 0.5) / resolution
        return torch.stack([first, 1 - first], 1)
    if components != 3:
        raise UserError(f"a grid takes 2 or 3 components, got {components}; sample instead")
    first, second = (axis.flatten() for axis in torch.meshgrid(steps, steps, indexing="ij"))
    # Triangles that point up, and those between them that point down.
    cells = []
    for sides, centre in ((resolution - 1, 1 / 3), (resolution - 2, 2 / 3)):
        third = sides - first - second
        cells.append(torch.stack([first, second, third], 1)[third >= 0] + centre)
    return torch.cat(cells) / resolution
