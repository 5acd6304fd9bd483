"""The likelihood of K classes without order, each a direction of its own in the states."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bayesdiff.data.one_hot import embedded
from bayesdiff.likelihoods.emission import PAIRS, Levels, draw, drawn_like, wide


@dataclass(frozen=True)
class Classes(Levels):
    """Classes e_x in K channels per value, as (K e_x - 1) / sqrt(K), with a softmax of K logits.

    The embedding that makes the accuracy of a Bayesian flow network its path's signal-to-noise
    ratio: transmissions y ~ N(a (K e_x - 1), a K I) of Graves et al. (2023). States and
    targets are of ``data.one_hot.OneHot``; see ``Likelihood``.

    Args:
        sampled: see ``Emission``.
        final: see ``Emission``.
        levels: K.

    Example:
        >>> law = Classes(levels=4)
        >>> data = law.values(torch.tensor([[0.1, 0.9, 0.2, 0.3]]))  # one value, of class 1
        >>> data, law.index(data)
        (tensor([[-0.5000,  1.5000, -0.5000, -0.5000]]), tensor([[1]]))
        >>> law.log_prob(torch.zeros(1, 4), data).exp()
        tensor([[0.2500]])
    """

    kind: ClassVar[str] = "classes"
    discrete: ClassVar[bool] = True

    def channels(self, data: int) -> int:
        """K logits per value."""
        return data * self.levels

    def values(self, x_1: Tensor) -> Tensor:
        """The class of the largest channel."""
        return self._embedded(self.index(x_1)).to(x_1)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean negative log-probability, in nats per value."""
        return F.cross_entropy(self._split(output).movedim(2, 1), self.index(target))

    def residual(self, output: Tensor, target: Tensor) -> Tensor:
        """Probabilities of the classes, minus 1 for the one that it is."""
        p = self._split(output).softmax(2)
        return (p - F.one_hot(self.index(target), self.levels).movedim(-1, 2).to(p)).flatten(1, 2)

    def hessian(self, output: Tensor) -> Tensor:
        """diag(p) - p p^T, ``(B, C, K, K, ...)``."""
        return softmax_hessian(self._split(output).softmax(2))

    def log_prob(self, output: Tensor, target: Tensor, sigma_noise: float = 1.0) -> Tensor:
        """Log-probability of every value, ``(B, C, ...)`` without the axis of classes."""
        index = self.index(target)[:, :, None]
        return self.log_probabilities(output).gather(2, index)[:, :, 0]

    def log_probabilities(self, output: Tensor) -> Tensor:
        """Of all classes, ``(B, C, K, ...)``."""
        return self._split(output).log_softmax(2)

    def index(self, target: Tensor) -> Tensor:
        """The class of the largest channel."""
        return self._split(target).argmax(2)

    def mean(self, output: Tensor) -> Tensor:
        """(K p - 1) / sqrt(K)."""
        p = self._split(wide(output)).softmax(2)
        return ((self.levels * p - 1) / math.sqrt(self.levels)).flatten(1, 2)

    def emit(self, output: Tensor, noise: Tensor | None = None, last: bool = False) -> Tensor:
        """The mean, the likeliest class, or one drawn by ``noise``, embedded."""
        p, way = self._split(wide(output)).softmax(2), self.way(last)
        if way == "mean":
            return self.mean(output)
        if way == "mode":
            return self._embedded(p.argmax(2)).to(p)
        # One uniform number for each value: that of its first channel.
        return self._embedded(draw(p, None if noise is None else self._split(noise)[:, :, 0])).to(
            p
        )

    def belief(self, x: Tensor, accuracy: Tensor) -> Tensor:
        """2 theta - 1."""
        return 2 * self._split(self.belief_logits(x, accuracy)).exp().flatten(1, 2) - 1

    def belief_logits(self, x: Tensor, accuracy: Tensor) -> Tensor:
        """Ln theta = log_softmax(y), y ~ N(beta (K e_x - 1), beta K I)."""
        y = (accuracy * self.levels * (1 + accuracy)).sqrt() * x
        return self._split(y).log_softmax(2).flatten(1, 2)

    def step_divergence(
        self, output: Tensor, target: Tensor, accuracy: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """-E ln sum_k p_k e^(r_k), r_k = -a K + sqrt(a K) (xi_k - xi_x), r_x = 0.

        The mixture over all K coordinates of a transmission together, never more than -ln p_x;
        five antithetic pairs of xi.
        """
        log_p, index = self._split(output).log_softmax(2), self.index(target)[:, :, None]
        total = torch.zeros_like(log_p[:, :, 0])
        scale = (accuracy * self.levels)[:, None] if accuracy.ndim else accuracy * self.levels
        for _ in range(PAIRS):
            xi = drawn_like(log_p, generator)
            steps = xi - xi.gather(2, index)
            for sign in (1, -1):
                r = (sign * scale.sqrt() * steps - scale).scatter(2, index, 0.0)
                total -= (log_p + r).logsumexp(2) / (2 * PAIRS)
        return total

    def slope(self, output: Tensor, direction: Tensor) -> Tensor:
        """sqrt(K) (diag(p) - p p^T) times the direction's K numbers."""
        p = self._split(wide(output)).softmax(2)
        axis = direction.ndim - output.ndim + 1
        each = direction.unflatten(axis, (-1, self.levels))
        centred = each - (p * each).sum(axis + 1, keepdim=True)
        return (math.sqrt(self.levels) * p * centred).flatten(axis, axis + 1)

    def _split(self, values: Tensor) -> Tensor:
        return values.unflatten(1, (-1, self.levels))

    def _embedded(self, index: Tensor) -> Tensor:
        return embedded(index, self.levels).flatten(1, 2)


def softmax_hessian(p: Tensor) -> Tensor:
    """diag(p) - p p^T for probabilities ``(B, C, K, ...)``, ``(B, C, K, K, ...)``."""
    p = p.movedim(2, -1)
    matrix = p.diag_embed() - p[..., :, None] * p[..., None, :]
    # p (1 - p) without a difference of like numbers: 1 - p is the sum of the other classes.
    other = (~torch.eye(p.shape[-1], dtype=torch.bool, device=p.device)).to(p)
    matrix.diagonal(dim1=-2, dim2=-1).copy_(p * (p @ other))
    return matrix.movedim((-2, -1), (2, 3))
