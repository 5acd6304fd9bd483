"""The Bernoulli likelihood: the head says how likely every value is white, as a logit."""

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bayesdiff.likelihoods.emission import Emission, uniform, wide


@dataclass(frozen=True)
class Bernoulli(Emission):
    """Values -1 and 1 with log-odds that are the output; see ``Likelihood`` and ``Emission``.

    Example:
        >>> law = Bernoulli()
        >>> logits = torch.tensor([[0.0, 2.0]])
        >>> law.mean(logits)  # tanh(1) = 0.7616
        tensor([[0.0000, 0.7616]])
        >>> law.log_prob(logits, torch.tensor([[1.0, 1.0]])).exp()  # of white
        tensor([[0.5000, 0.8808]])
    """

    name: ClassVar[str] = "bernoulli"
    discrete: ClassVar[bool] = True

    def channels(self, data: int) -> int:
        """One logit per value."""
        return data

    def values(self, x_1: Tensor) -> Tensor:
        """Black and white, cut at the middle grey."""
        return torch.where(x_1 >= 0, 1.0, -1.0).to(x_1)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean negative log-probability, in nats per value."""
        return F.binary_cross_entropy_with_logits(output, (target > 0).to(output))

    def residual(self, output: Tensor, target: Tensor) -> Tensor:
        """Probability of white, minus 1 where the value is white."""
        return output.sigmoid() - (target > 0).to(output)

    def hessian(self, output: Tensor) -> Tensor:
        """Variance p (1 - p), ``(B, C, 1, 1, ...)``."""
        return (output.sigmoid() * (-output).sigmoid())[:, :, None, None]

    def log_prob(self, output: Tensor, target: Tensor, sigma_noise: float = 1.0) -> Tensor:
        """Log-probability of every value."""
        return F.logsigmoid(torch.where(target > 0, output, -output))

    def log_probabilities(self, output: Tensor) -> Tensor:
        """Of black and of white, ``(B, C, 2, ...)``."""
        return torch.stack([F.logsigmoid(-output), F.logsigmoid(output)], 2)

    def index(self, target: Tensor) -> Tensor:
        """0 for black, 1 for white."""
        return (target > 0).long()

    def mean(self, output: Tensor) -> Tensor:
        """2 p - 1."""
        return (wide(output) / 2).tanh()

    def emit(self, output: Tensor, noise: Tensor | None = None, last: bool = False) -> Tensor:
        """Mean value 2 p - 1, the likelier value, or one drawn by ``noise``."""
        logits, way = wide(output), self.way(last)
        if way == "mean":
            return self.mean(output)
        white = logits >= 0 if way == "mode" else uniform(noise, logits) < logits.sigmoid()
        return torch.where(white, 1.0, -1.0).to(logits)

    def belief(self, x: Tensor, accuracy: Tensor) -> Tensor:
        """Mean value under the belief, even odds at first."""
        return (self.belief_logits(x, accuracy) / 2).tanh()

    def belief_logits(self, x: Tensor, accuracy: Tensor) -> Tensor:
        """Log-odds lambda, with lambda | x ~ N(2 beta x, 4 beta)."""
        return 2 * (accuracy * (1 + accuracy)).sqrt() * x

    def step_divergence(
        self, output: Tensor, target: Tensor, accuracy: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """-E ln(p + (1 - p) e^(-2 a + 2 sqrt(a) xi)), p of the true value, by Gauss-Hermite.

        The mixture over both coordinates of a transmission together, never more than -ln p.
        """
        right = torch.where(target > 0, output, -output)
        log_p, log_q = F.logsigmoid(right), F.logsigmoid(-right)
        nodes, weights = _hermite(32 if float(accuracy.max()) <= 1 else 64)
        total = torch.zeros_like(output)
        for node, weight in zip(nodes, weights, strict=True):
            total -= weight * torch.logaddexp(
                log_p, log_q - 2 * accuracy + 2 * accuracy.sqrt() * node
            )
        return total

    def slope(self, output: Tensor, direction: Tensor) -> Tensor:
        """2 p (1 - p) times the direction."""
        logits = wide(output)
        return 2 * logits.sigmoid() * (-logits).sigmoid() * direction


@cache
def _hermite(count: int) -> tuple[list[float], list[float]]:
    """Nodes and weights with E f(xi) = sum w f(node) for standard normal xi."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(count)
    return nodes.tolist(), (weights / weights.sum()).tolist()
