"""The Gaussian likelihood: training by squared error, a posterior that is exact regression."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bayesdiff.likelihoods.discretised import level_edges, log_mass
from bayesdiff.likelihoods.emission import GaussianBelief
from bayesdiff.paths import PREDICTIONS

# Of images as they are stored.
_LEVELS = 256


@dataclass(frozen=True)
class Gaussian(GaussianBelief):
    """Values with a variance ``sigma_noise^2`` around the output; see ``Likelihood``.

    Example:
        >>> law = Gaussian()
        >>> output, target = torch.zeros(1, 2), torch.tensor([[0.0, 1.0]])
        >>> law.loss(output, target)  # the mean squared error
        tensor(0.5000)
        >>> law.log_prob(output, target, sigma_noise=0.5)
        tensor([[-0.2258, -2.2258]])
    """

    name: ClassVar[str] = "gaussian"
    scaled: ClassVar[bool] = True
    linear: ClassVar[bool] = True
    discrete: ClassVar[bool] = False
    sampled: ClassVar[bool] = False
    draws: ClassVar[bool] = False
    differentiable: ClassVar[bool] = True
    predictions: ClassVar[tuple[str, ...]] = PREDICTIONS

    def channels(self, data: int) -> int:
        """One output per value."""
        return data

    def values(self, x_1: Tensor) -> Tensor:
        """Any value."""
        return x_1

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean squared error."""
        return F.mse_loss(output, target)

    def residual(self, output: Tensor, target: Tensor) -> Tensor:
        """Output minus target."""
        return output - target

    def hessian(self, output: Tensor) -> None:
        """The identity, at every output."""

    def deviance(self, output: Tensor, target: Tensor) -> Tensor:
        """Squared error of every image, float64 ``(B,)``."""
        return (output - target).flatten(1).double().square().sum(1)

    def log_prob(self, output: Tensor, target: Tensor, sigma_noise: float = 1.0) -> Tensor:
        """Log-density of every value."""
        constant = math.log(sigma_noise * math.sqrt(math.tau))
        return -0.5 * ((output - target) / sigma_noise).square() - constant

    def mean(self, output: Tensor) -> Tensor:
        """The output itself."""
        return output

    def emit(self, output: Tensor, noise: Tensor | None = None, last: bool = False) -> Tensor:
        """The output itself."""
        return output

    def step_divergence(
        self, output: Tensor, target: Tensor, accuracy: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """Half the accuracy times the squared error; the output is all that data could be."""
        return accuracy / 2 * (output - target).square()

    def code_length(self, output: Tensor, target: Tensor, spread: float) -> Tensor:
        """Of 8-bit values: minus the log-mass of N(output, spread^2) around each of 256 levels."""
        edges = level_edges(target, _LEVELS)
        return -log_mass(*edges, output, torch.full_like(output, spread))

    def slope(self, output: Tensor, direction: Tensor) -> Tensor:
        """The direction itself."""
        return direction
