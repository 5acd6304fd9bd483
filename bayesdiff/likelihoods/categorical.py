"""The categorical likelihood: the head says how likely each of K levels of a value is."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bayesdiff.checks import at_least
from bayesdiff.likelihoods.bernoulli import check_sampled, drawn


@dataclass(frozen=True)
class Categorical:
    """K equally spaced values from -1 to 1 with a softmax of K logits; see ``Likelihood``.

    Args:
        levels: K.
        sampled: whether a solver's step takes a level drawn from these odds, and not their mean.
    """

    levels: int = 16
    sampled: bool = False

    scaled: ClassVar[bool] = False
    linear: ClassVar[bool] = False
    predictions: ClassVar[tuple[str, ...]] = ("data",)

    def __post_init__(self) -> None:
        at_least("model.likelihood.levels", self.levels, 2)
        check_sampled(self.sampled)

    @property
    def name(self) -> str:
        """With the number of levels."""
        return f"categorical-{self.levels}"

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
        p = self._split(output).softmax(2).movedim(2, -1)
        matrix = p.diag_embed() - p[..., :, None] * p[..., None, :]
        # p (1 - p) without a difference of like numbers: 1 - p is the sum of the other levels.
        other = (~torch.eye(self.levels, dtype=torch.bool, device=p.device)).to(p)
        matrix.diagonal(dim1=-2, dim2=-1).copy_(p * (p @ other))
        return matrix.movedim((-2, -1), (2, 3))

    def deviance(self, output: Tensor, target: Tensor) -> Tensor:
        """Minus twice the log-probability of every image, float64 ``(B,)``."""
        return -2 * self.log_prob(output.double(), target).flatten(1).sum(1)

    def log_prob(self, output: Tensor, target: Tensor, sigma_noise: float = 1.0) -> Tensor:
        """Log-probability of every value."""
        index = self._index(target).long()[:, :, None]
        return self._split(output).log_softmax(2).gather(2, index)[:, :, 0]

    def emit(self, output: Tensor, noise: Tensor | None = None) -> Tensor:
        """Mean value of the levels, or one level drawn by ``noise``."""
        p = self._probabilities(output)
        if not self.sampled:
            return self._mean(p)
        uniform = torch.special.ndtr(drawn(noise).to(p))[:, :, None]
        # The last sum may be a rounding below 1, and the uniform number above it.
        index = (p.cumsum(2)[:, :, :-1] <= uniform).sum(2)
        return (index * (2 / (self.levels - 1)) - 1).to(p)

    def slope(self, output: Tensor, direction: Tensor) -> Tensor:
        """Covariance, under the probabilities, of levels and the direction's K numbers."""
        p = self._probabilities(output)
        level = self._spread(p) - self._mean(p)[:, :, None]
        axis = direction.ndim - output.ndim + 1
        return (p * level * direction.unflatten(axis, (-1, self.levels))).sum(axis + 1)

    def _split(self, output: Tensor) -> Tensor:
        return output.unflatten(1, (-1, self.levels))

    def _probabilities(self, output: Tensor) -> Tensor:
        wide = output if output.dtype == torch.float64 else output.float()
        return self._split(wide).softmax(2)

    def _index(self, values: Tensor) -> Tensor:
        scaled = (values + 1) * ((self.levels - 1) / 2)
        return scaled.round().clamp(0, self.levels - 1)

    def _spread(self, p: Tensor) -> Tensor:
        """Values of the levels, of a shape that goes with ``p``."""
        values = torch.linspace(-1, 1, self.levels, dtype=p.dtype, device=p.device)
        return values.view(-1, *[1] * (p.ndim - 3))

    def _mean(self, p: Tensor, power: int = 1) -> Tensor:
        return (p * self._spread(p).pow(power)).sum(2)
