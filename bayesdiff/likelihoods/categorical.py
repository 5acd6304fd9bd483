"""The categorical likelihood: the head says how likely each of K levels of a value is."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bayesdiff.likelihoods.classes import softmax_hessian
from bayesdiff.likelihoods.emission import (
    PAIRS,
    GaussianBelief,
    Levels,
    draw,
    drawn_like,
    wide,
)


@dataclass(frozen=True)
class Categorical(GaussianBelief, Levels):
    """K equally spaced values from -1 to 1 with a softmax of K logits; see ``Likelihood``.

    Levels are transmitted as numbers.

    Args:
        sampled: see ``Emission``.
        final: see ``Emission``.
        levels: K.

    Example:
        >>> law = Categorical(levels=3)  # values -1, 0 and 1
        >>> logits = torch.tensor([[0.5, 0.25, 0.25]]).log()  # of one value
        >>> law.mean(logits), law.log_prob(logits, torch.tensor([[0.0]])).exp()
        (tensor([[-0.2500]]), tensor([[0.2500]]))
    """

    kind: ClassVar[str] = "categorical"
    discrete: ClassVar[bool] = False  # numbers: near levels are alike

    def channels(self, data: int) -> int:
        """K logits per value."""
        return data * self.levels

    def values(self, x_1: Tensor) -> Tensor:
        """The nearest level."""
        return self._index(x_1) * (2 / (self.levels - 1)) - 1

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean negative log-probability, in nats per value."""
        return F.cross_entropy(self._split(output).movedim(2, 1), self._index(target).long())

    def residual(self, output: Tensor, target: Tensor) -> Tensor:
        """Probabilities of the levels, minus 1 for the one that it is."""
        p = self._split(output).softmax(2)
        right = F.one_hot(self._index(target).long(), self.levels).movedim(-1, 2)
        return (p - right.to(p)).flatten(1, 2)

    def hessian(self, output: Tensor) -> Tensor:
        """diag(p) - p p^T, ``(B, C, K, K, ...)``."""
        return softmax_hessian(self._split(output).softmax(2))

    def log_prob(self, output: Tensor, target: Tensor, sigma_noise: float = 1.0) -> Tensor:
        """Log-probability of every value."""
        index = self._index(target).long()[:, :, None]
        return self._split(output).log_softmax(2).gather(2, index)[:, :, 0]

    def mean(self, output: Tensor) -> Tensor:
        """Mean value of the levels."""
        return self._mean(self._probabilities(output))

    def emit(self, output: Tensor, noise: Tensor | None = None, last: bool = False) -> Tensor:
        """Mean value of the levels, the likeliest level, or one drawn by ``noise``."""
        p, way = self._probabilities(output), self.way(last)
        if way == "mean":
            return self._mean(p)
        index = p.argmax(2) if way == "mode" else draw(p, noise)
        return (index * (2 / (self.levels - 1)) - 1).to(p)

    def step_divergence(
        self, output: Tensor, target: Tensor, accuracy: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """-E ln sum_k p_k e^(-a D_k^2 / 2 + sqrt(a) D_k xi), D_k from the value to level k.

        Five antithetic pairs of xi; the level that it is counts p_k exactly.
        """
        log_p = self._split(output).log_softmax(2)
        steps = self._spread(log_p) - target[:, :, None]
        accuracy = accuracy[:, None] if accuracy.ndim else accuracy
        total = torch.zeros_like(target)
        for _ in range(PAIRS):
            xi = drawn_like(target, generator)[:, :, None]
            for sign in (1, -1):
                exponent = -accuracy / 2 * steps.square() + sign * accuracy.sqrt() * steps * xi
                total -= (log_p + exponent).logsumexp(2) / (2 * PAIRS)
        return total

    def slope(self, output: Tensor, direction: Tensor) -> Tensor:
        """Covariance, under the probabilities, of levels and the direction's K numbers."""
        p = self._probabilities(output)
        level = self._spread(p) - self._mean(p)[:, :, None]
        axis = direction.ndim - output.ndim + 1
        return (p * level * direction.unflatten(axis, (-1, self.levels))).sum(axis + 1)

    def _split(self, output: Tensor) -> Tensor:
        return output.unflatten(1, (-1, self.levels))

    def _probabilities(self, output: Tensor) -> Tensor:
        return self._split(wide(output)).softmax(2)

    def _index(self, values: Tensor) -> Tensor:
        scaled = (values + 1) * ((self.levels - 1) / 2)
        return scaled.round().clamp(0, self.levels - 1)

    def _spread(self, p: Tensor) -> Tensor:
        """Values of the levels, of a shape that goes with ``p``."""
        values = torch.linspace(-1, 1, self.levels, dtype=p.dtype, device=p.device)
        return values.view(-1, *[1] * (p.ndim - 3))

    def _mean(self, p: Tensor, power: int = 1) -> Tensor:
        return (p * self._spread(p).pow(power)).sum(2)
