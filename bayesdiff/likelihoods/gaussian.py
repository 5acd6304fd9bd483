"""The Gaussian likelihood: training by squared error, a posterior that is exact regression."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from bayesdiff.paths import PREDICTIONS


@dataclass(frozen=True)
class Gaussian:
    """Values with a variance ``sigma_noise^2`` around the output; see ``Likelihood``."""

    name: ClassVar[str] = "gaussian"
    scaled: ClassVar[bool] = True
    linear: ClassVar[bool] = True
    sampled: ClassVar[bool] = False
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

    def emit(self, output: Tensor, noise: Tensor | None = None) -> Tensor:
        """The output itself."""
        return output

    def slope(self, output: Tensor, direction: Tensor) -> Tensor:
        """The direction itself."""
        return direction
